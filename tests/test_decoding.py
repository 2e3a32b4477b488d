"""Beam search against transformers' own and against searches in plain Python; guided decoding; scores of captions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch
from reference_search import Model, Settings, Words, all_captions, beam_search, diverse_beam_search
from torch import Tensor
from transformers import TextStreamer

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.model import decoding, modeling_captioner
from hf_captioner.model.captions import bad_endings
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.guided_decoding import constrained_beam_search
from hf_captioner.model.guided_decoding import diverse_beam_search as diverse

Build = Callable[..., CaptionerModel]
START, END = 2, 3
DIVERSE, CONSTRAINED = {"custom_generate": diverse}, {"custom_generate": constrained_beam_search}


def read_by(model: CaptionerModel, cells: Tensor, forbidden: tuple[int, ...] = (0,)) -> Model:
    """Return a function from words to log p of each next word, which reads the words anew at every call."""

    @cache
    def log_probs(words: Words) -> tuple[float, ...]:
        with torch.no_grad():
            logits = model(cells=cells[None], decoder_input_ids=torch.tensor([words])).logits[0, -1]
        scores = logits.log_softmax(-1)
        scores[list(forbidden)] = -torch.inf
        return tuple(scores.tolist())

    return lambda words: list(log_probs(words))


def generate(model: CaptionerModel, cells: Tensor, **kwargs: Any) -> Any:
    return model.generate(encoder_outputs=CaptionerEncoderOutput.of(cells), return_dict_in_generate=True, **kwargs)


def by_transformers(patch: MonkeyPatch, model: CaptionerModel, cells: Tensor, **kwargs: Any) -> Any:
    """Generate by transformers' own beam search."""
    with patch.context() as patched:
        patched.setattr(modeling_captioner, "can_drop_images", lambda *_: False)
        return generate(model, cells, output_scores=True, **kwargs)


def trimmed(sequence: Tensor) -> Words:
    """Return the words of a sequence up to its end token."""
    words = tuple(sequence.tolist())
    return words[: words.index(END) + 1] if END in words else words


def test_beam_search_equals_two_references(model: CaptionerModel, cells: Tensor, monkeypatch: MonkeyPatch) -> None:
    """No sequence differs, whatever the number of beams, the length penalty, early stopping and the longest caption."""
    readers = [read_by(model, image) for image in cells]
    names = ("num_beams", "max_length", "length_penalty", "early_stopping")
    for values in itertools.product((2, 3, 5), (4, 9), (-1.0, 0.0, 0.7, 2.0), (True, False, "never")):
        settings, kwargs = Settings(*values), dict(zip(names, values, strict=True), num_return_sequences=values[0])
        ours = generate(model, cells, **kwargs)
        theirs = by_transformers(monkeypatch, model, cells, **kwargs)
        assert torch.equal(ours.sequences, theirs.sequences), settings
        assert torch.equal(ours.beam_indices, theirs.beam_indices.long()), settings
        assert torch.allclose(ours.sequences_scores, theirs.sequences_scores, atol=1e-5), settings
        expected = [caption for reader in readers for caption in beam_search(reader, (START,), settings)]
        assert [trimmed(sequence) for sequence in ours.sequences] == [words for _, words in expected], settings
        assert ours.sequences_scores.tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"no_repeat_ngram_size": 1}, {"repetition_penalty": 1.7}, {"bad_words_ids": [[9], [5, 6], [7, END]]},
        {"min_length": 11}, {"suppress_tokens": [0, 4, 9]}, {"max_new_tokens": 6},
        {"decoder_input_ids": torch.tensor([[START, 5, 8]]).expand(5, -1)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)  # fmt: skip
def test_settings_of_transformers(model: CaptionerModel, cells: Tensor, monkeypatch: MonkeyPatch, kwargs: dict) -> None:
    plain_kwargs = {"max_length": 13, "num_beams": 3, "num_return_sequences": 2}
    kwargs = plain_kwargs | kwargs | ({"max_length": None} if "max_new_tokens" in kwargs else {})
    ours = generate(model, cells, **kwargs)
    assert "sequences_scores" in ours  # which transformers' own search returns only if asked for scores
    assert torch.equal(ours.sequences, by_transformers(monkeypatch, model, cells, **kwargs).sequences)
    plain = generate(model, cells, **plain_kwargs)
    assert not torch.equal(ours.sequences, plain.sequences), "the setting must have an effect"


def test_beam_search_with_enough_beams_finds_the_best_caption_of_all(tiny_model: Build) -> None:
    model = tiny_model(seed=5, scale=4, vocab_size=6)
    cells = torch.randn(3, 16, model.encoder.part.hidden_size, generator=torch.Generator().manual_seed(0))
    kwargs = {"num_beams": 6**4, "max_length": 5, "early_stopping": "never", "num_return_sequences": 10}
    for length_penalty in (0.0, 1.0):
        found = generate(model, cells, length_penalty=length_penalty, **kwargs).sequences.unflatten(0, (-1, 10))
        settings = Settings(6**4, 5, length_penalty, "never")
        for image, sequences in zip(cells, found, strict=True):
            everything = sorted(all_captions(read_by(model, image), (START,), settings), reverse=True)
            assert len(everything) == 5 + sum(4**n for n in (1, 2)) + 4**3 * 5 - 4  # no caption is left out
            assert [trimmed(sequence) for sequence in sequences] == [words for _, words in everything[:10]]


def test_finished_images_are_dropped_from_the_batch(model: CaptionerModel, cells: Tensor) -> None:
    many, kwargs = cells.repeat(3, 1, 1), {"num_beams": 4, "max_length": 20, "early_stopping": True}
    rows_read: list[int] = []
    handle = model.decoder.register_forward_pre_hook(lambda module, args: rows_read.append(len(args[0])))
    output = generate(model, many, **kwargs)
    handle.remove()
    assert rows_read[0] == len(many)  # the beams of an image begin alike, so one of them is read
    assert rows_read[1] == len(many) * 4
    assert rows_read[-1] < len(many) * 4
    assert len({len(trimmed(sequence)) for sequence in output.sequences}) > 1, "equal lengths would show nothing"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 1},
        {"num_beams": 4, "early_stopping": True},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0},
        {"num_beams": 6, **DIVERSE, "num_beam_groups": 3, "diversity_penalty": 2.0},
        {"num_beams": 6, **CONSTRAINED, "force_words_ids": [[7], [9, 10]]},
    ],
    ids=["greedy", "beam", "returned", "diverse", "constrained"],
)
def test_batch_equals_one_by_one(model: CaptionerModel, cells: Tensor, kwargs: dict) -> None:
    batch = generate(model, cells, max_length=14, **kwargs).sequences
    for image, expected in zip(cells, batch.unflatten(0, (len(cells), -1)), strict=True):
        alone = generate(model, image[None], max_length=14, **kwargs).sequences
        assert [trimmed(sequence) for sequence in alone] == [trimmed(sequence) for sequence in expected]


def test_rare_checks_for_ends_change_no_caption(model: CaptionerModel, cells: Tensor, monkeypatch: MonkeyPatch) -> None:
    """On accelerators the search checks every few steps only; here the CPU is made to do so."""
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_length": 20}
    expected = generate(model, cells, **kwargs).sequences
    monkeypatch.setattr(decoding, "STEPS_BETWEEN_CHECKS", {})
    assert torch.equal(generate(model, cells, **kwargs).sequences, expected)


def test_outputs_of_every_step_and_streamers_come_from_transformers(
    model: CaptionerModel, cells: Tensor, processor: CaptionerProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    full = generate(model, cells, num_beams=3, max_length=9, output_scores=True, output_attentions=True)
    assert len(full.scores) == len(full.cross_attentions) >= full.sequences.shape[1] - 1
    assert torch.equal(full.sequences, generate(model, cells, num_beams=3, max_length=9).sequences)

    streamer = TextStreamer(processor.tokenizer, skip_special_tokens=True)
    sequence = generate(model, cells[:1], num_beams=1, max_length=9, streamer=streamer).sequences[0]
    assert capsys.readouterr().out.strip() == processor.decode(sequence)


def test_bad_endings_are_saved_with_a_model(
    model: CaptionerModel, cells: Tensor, processor: CaptionerProcessor, tmp_path: Path
) -> None:
    def last_words(model: CaptionerModel) -> set[int]:
        """Return the words that captions, made of words and no special tokens, end in."""
        sequences = generate(model, cells, num_beams=3, max_length=12, suppress_tokens=[0, 1, 2]).sequences
        return {words[-2] for words in map(trimmed, sequences) if words[-1] == END}

    ends = last_words(model)
    forbidden = [processor.tokenizer.convert_ids_to_tokens(word) for word in ends]
    assert ends
    model.save_pretrained(tmp_path)
    carrier = CaptionerModel.from_pretrained(tmp_path).eval()
    carrier.generation_config.bad_words_ids = bad_endings(processor.tokenizer, forbidden)
    carrier.save_pretrained(tmp_path)
    assert not ends & last_words(CaptionerModel.from_pretrained(tmp_path).eval())


def test_prefix_allowed_tokens_fn_restricts_the_words_of_each_image(model: CaptionerModel, cells: Tensor) -> None:
    """The function gets the image that a caption belongs to, also after other images are finished."""
    allowed = {image: [END, *range(4 + 2 * image, 6 + 2 * image)] for image in range(len(cells))}
    kwargs = {"num_beams": 3, "max_length": 10, "prefix_allowed_tokens_fn": lambda image, words: allowed[image]}
    for image, sequence in enumerate(generate(model, cells, **kwargs).sequences):
        assert set(trimmed(sequence)[1:]) <= set(allowed[image])


def test_words_are_sampled_with_their_probabilities(model: CaptionerModel, cells: Tensor) -> None:
    torch.manual_seed(0)
    count = 4000
    kwargs = {"do_sample": True, "num_beams": 1, "top_k": 0, "max_length": 2, "num_return_sequences": count}
    first_words = generate(model, cells[:1], **kwargs).sequences[:, 1]
    expected = torch.tensor(read_by(model, cells[0])((START,))).softmax(-1)
    frequencies = torch.bincount(first_words, minlength=len(expected)) / count
    assert (frequencies - expected).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("penalty", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("num_beams", "num_groups"), [(4, 1), (4, 2), (6, 3)])
def test_diverse_beam_search_equals_a_reference(
    model: CaptionerModel, cells: Tensor, num_beams: int, num_groups: int, penalty: float
) -> None:
    settings, count = Settings(num_beams, 9, early_stopping="never"), {"num_return_sequences": num_beams}
    kwargs = {"num_beams": num_beams, "max_length": 9, "early_stopping": "never", "length_penalty": 1.0, **count}
    guided = {**DIVERSE, "num_beam_groups": num_groups, "diversity_penalty": penalty}
    found = generate(model, cells, **kwargs, **guided).sequences
    for image, sequences in zip(cells, found.unflatten(0, (-1, num_beams)), strict=True):
        groups = diverse_beam_search(read_by(model, image), (START,), settings, num_groups, penalty)
        expected = sorted((caption for group in groups for caption in group), key=lambda caption: -caption[0])
        assert sorted(trimmed(sequence) for sequence in sequences) == sorted(words for _, words in expected)
    if num_groups == 1:
        assert torch.equal(found, generate(model, cells, **kwargs).sequences)


def test_every_group_returns_a_caption_before_any_returns_a_second(model: CaptionerModel, cells: Tensor) -> None:
    kwargs = {"num_beams": 6, "max_length": 9, "num_return_sequences": 3}
    guided = {**DIVERSE, "num_beam_groups": 3, "diversity_penalty": 3.0}
    output = generate(model, cells, **kwargs, **guided)
    scores = output.sequences_scores.unflatten(0, (-1, 3))
    assert (scores.diff(dim=1) <= 0).all()
    distinct, plain_distinct = (
        sum(len(set(words.tolist())) for words in each.sequences[:, 1].unflatten(0, (-1, 3)))
        for each in (output, generate(model, cells, **kwargs))
    )
    assert distinct > plain_distinct


def holds(words: Words, constraint: list[Any]) -> bool:
    """Return whether a phrase of a constraint occurs in a caption."""
    phrases = [constraint] if isinstance(constraint[0], int) else constraint
    return any(words[start : start + len(phrase)] == tuple(phrase) for phrase in phrases for start in range(len(words)))


def test_constrained_search_with_enough_beams_finds_the_best_captions_meeting_them(tiny_model: Build) -> None:
    model = tiny_model(seed=5, scale=4, vocab_size=7)
    cells = torch.randn(3, 16, model.encoder.part.hidden_size, generator=torch.Generator().manual_seed(0))
    settings = Settings(7**3, 5, 1.0, "never")
    everything = [list(all_captions(read_by(model, image), (START,), settings)) for image in cells]
    kwargs = {"num_beams": 7**3, "max_length": 5, "length_penalty": 1.0, "early_stopping": "never", **CONSTRAINED}
    for constraints in ([[4]], [[5], [6]], [[4, 5]], [[4, 4]], [[[5, 6], [4]]], [[5], [[4, 6], [1]]]):
        output = generate(model, cells, force_words_ids=constraints, num_return_sequences=3, **kwargs)
        for captions, found in zip(everything, output.sequences.unflatten(0, (-1, 3)), strict=True):
            meeting = [c for c in captions if all(holds(c[1], constraint) for constraint in constraints)]
            expected = sorted(meeting, reverse=True)[:3]
            assert [trimmed(sequence) for sequence in found] == [words for _, words in expected], constraints


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("constraints", [[[5]], [[5], [11]], [[5, 6, 7]], [[[5, 6], [12]], [9]], [[5, 5], [5, 6]]])
def test_few_beams_meet_constraints(model: CaptionerModel, cells: Tensor, num_beams: int, constraints: list) -> None:
    output = generate(model, cells, num_beams=num_beams, max_length=12, force_words_ids=constraints, **CONSTRAINED)
    for sequence in output.sequences:
        assert all(holds(trimmed(sequence), constraint) for constraint in constraints), (sequence, constraints)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({**DIVERSE, "num_beam_groups": 3}, "must divide num_beams=4"),
        ({**DIVERSE, "diversity_penalty": -1.0}, "must not be negative"),
        ({**DIVERSE, "num_beams": 1}, "at least 2"),
        (CONSTRAINED, "0 constraints"),
        ({**CONSTRAINED, "force_words_ids": [[]]}, "a list of word ids"),
        ({**CONSTRAINED, "force_words_ids": [[5, 6, 7]], "max_length": 4}, "room for 3"),
        ({**CONSTRAINED, "force_words_ids": [[5]], "bad_words_ids": [[5]]}, "stop forbidding these words"),
    ],
)
def test_errors(model: CaptionerModel, cells: Tensor, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, cells, **{"max_length": 9, "num_beams": 4, **kwargs})


def test_a_score_is_the_sum_over_words_read_one_by_one(
    model: CaptionerModel, cells: Tensor, processor: CaptionerProcessor, pixel_values: Tensor,
    monkeypatch: MonkeyPatch,
) -> None:  # fmt: skip
    captions = processor(text=["a black dog", "two small children in the snow", "the woman"])["labels"]
    output = model.score(cells=cells, captions=captions)
    assert output.scores.shape == (5, 3) and output.word_scores.shape == (5, *captions.shape)
    for image, scores in zip(cells, output.word_scores, strict=True):
        read = read_by(model, image, forbidden=())
        for caption, found in zip(captions.tolist(), scores.tolist(), strict=True):
            words = [word for word in caption if word != -100]
            expected = [read((START, *words[:t]))[word] for t, word in enumerate(words)]
            assert found == pytest.approx(expected + [0.0] * (len(caption) - len(words)), abs=1e-4)
    assert torch.allclose(output.scores, output.word_scores.sum(2))
    own = captions.expand(5, -1, -1).clone()
    assert torch.allclose(model.score(pixel_values, own).scores, output.scores, atol=1e-4)

    monkeypatch.setattr(modeling_captioner, "SCORED_AT_ONCE", 1)  # caption by caption
    assert torch.allclose(model.score(cells=cells, captions=captions).scores, output.scores, atol=1e-5)
    with pytest.raises(ValueError, match=r"captions have shape None"):
        model.score(cells=cells)
    with pytest.raises(ValueError, match=r"\(5, K, T\)"):
        model.score(cells=cells, captions=captions.expand(4, -1, -1))
