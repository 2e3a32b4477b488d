"""Training that goes on from a captioner, with words of new captions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_captioner import CaptionerModel, CaptionerProcessor, build_tokenizer
from hf_captioner.cli import load_captioner
from hf_captioner.model.captions import widened_tokenizer
from hf_captioner.training.build import build_captioner
from hf_captioner.training.continuing import add_words, with_options_of_captioner
from hf_captioner.training.recipe import Recipe, parse_recipe
from hf_captioner.training.train import train

NEW = ["A velocipede leans on a bench.", "two velocipedes, and a bench", "don’t lean"]


@pytest.fixture
def folder(captioner_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the captioner's folder, which a test may change."""
    return Path(shutil.copytree(captioner_folder, tmp_path / "source"))


@pytest.fixture
def photographs(photos: list, tmp_path: Path) -> Path:
    """Return a folder of photographs with captions, as users have them."""
    for split, chosen in (("train", photos), ("validation", photos[:2])):
        (tmp_path / "mine" / split).mkdir(parents=True)
        lines = []
        for index, photo in enumerate(chosen):
            # Otherwise the same image would be in both splits.
            photo.rotate(90 * (split == "train")).save(tmp_path / "mine" / split / f"{index}.png")
            lines.append(json.dumps({"file_name": f"{index}.png", "captions": NEW}))
        (tmp_path / "mine" / split / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "mine"


def recipe_from(folder: Path, *options: str, **fields: object) -> Recipe:
    """Return the recipe of a small training that goes on from a captioner."""
    fields = {"output_dir": folder.with_name("out"), "dataset": folder.with_name("mine"), "tracking": "none", **fields}
    arguments = [f"--{name}={value}" for name, value in fields.items()]
    return parse_recipe(["--from", str(folder), *arguments, *options])


def test_new_words_get_the_ids_after_the_known_ones() -> None:
    tokenizer = build_tokenizer(["a bench on a beach", "a dog"], min_count=1)
    widened = widened_tokenizer(tokenizer, [*NEW, "lean"], min_count=1)
    known, words = tokenizer.get_vocab(), widened.get_vocab()
    assert known.items() < words.items() and len(known) == len(tokenizer)
    new = sorted(words.keys() - known.keys(), key=words.__getitem__)
    assert new == ["lean", "and", "don't", "leans", "two", "velocipede", "velocipedes"]
    assert widened("Two Velocipedes on a beach!").input_ids == [
        *(words[word] for word in ("two", "velocipedes", "on", "a", "beach", "<end>")),
    ]
    assert len(widened_tokenizer(tokenizer, [*NEW, "lean"], min_count=2)) == len(tokenizer) + 1
    assert len(widened_tokenizer(tokenizer, NEW, vocab_size=len(tokenizer) + 2)) == len(tokenizer) + 2
    assert len(widened_tokenizer(tokenizer, NEW, vocab_size=5)) == len(tokenizer)


@pytest.mark.parametrize("is_tied", [False, True])
def test_known_words_keep_their_weights_to_the_bit(tiny_model: Callable[..., CaptionerModel], is_tied: bool) -> None:
    sizes = {"embedding_size": 32} if is_tied else {}
    model = tiny_model(seed=1, scale=3, tie_word_embeddings=is_tied, **sizes)
    num_known = model.config.vocab_size
    cells = torch.randn(2, 16, model.encoder.part.hidden_size)
    labels = torch.randint(4, num_known, (2, 6))
    with torch.no_grad():
        before = model(cells=cells, labels=labels).logits
        add_words(model, num_known, num_known + 30)
        after = model(cells=cells, labels=labels).logits
    assert after.shape[-1] == num_known + 30 == model.config.vocab_size
    assert torch.allclose(after[..., :num_known], before, atol=1e-6)
    assert after.softmax(-1)[..., num_known:].sum(-1).max() < 0.5
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is output) == is_tied and len(embedding[num_known:].unique(dim=0)) == 30
    unwidened = tiny_model(seed=1, scale=3, tie_word_embeddings=is_tied, **sizes)
    assert torch.equal(embedding[:num_known], unwidened.get_input_embeddings().weight)
    assert torch.equal(output[:num_known], unwidened.get_output_embeddings().weight)


def test_options_come_from_the_captioner_unless_they_are_given(folder: Path) -> None:
    model, _ = load_captioner(folder)
    model.generation_config.update(length_penalty=0.7, max_length=17)
    model.half().save_pretrained(folder)
    recipe = with_options_of_captioner(recipe_from(folder, "--max_length=9", output_dropout=0.25))
    assert (recipe.model.hidden_size, recipe.model.encoder_kwargs) == (32, "{output_stride: 16}")
    assert (recipe.model.output_dropout, recipe.model.decoder_type) == (0.25, "lstm")
    assert (recipe.decoding.length_penalty, recipe.decoding.max_length, recipe.decoding.num_beams) == (0.7, 9, 1)
    assert recipe.optimization.freeze_encoder and with_options_of_captioner(recipe) == recipe
    again = Recipe.from_fields(**recipe.as_fields())  # as read from the output folder
    assert with_options_of_captioner(again) == recipe
    continued, processor = build_captioner(recipe, [NEW])
    assert {parameter.dtype for parameter in continued.parameters()} == {torch.float32}
    assert continued.config.output_dropout == continued.decoder.output_dropout.p == 0.25
    assert (continued.generation_config.max_length, continued.generation_config.length_penalty) == (9, 0.7)
    assert len(processor.tokenizer) == continued.config.vocab_size > model.config.vocab_size
    assert torch.equal(continued.decoder.memory_to_state.weight, model.decoder.memory_to_state.weight.float())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64 and the captioner's 32. Leave"),
        ({"encoder_kwargs": "{output_stride: 8}", "gate": "false"}, "encoder_kwargs is '{output_stride: 8}' .*; gate is"),
        ({"data_config": "{crop_pct: 0.5}"}, "data_config is"),
        ({"encoder_weights": "x.safetensors"}, "encoder_weights is 'x.safetensors' and the captioner's None"),
        ({"tokenizer": "bpe"}, "tokenizer is 'bpe' and the captioner's 'words'"),
        ({"output_dir": "SOURCE"}, "that of the captioner to go on from"),
        ({"from": "no/such/captioner/here"}, "There is no captioner 'no/such"),
    ],
)  # fmt: skip
def test_what_contradicts_the_captioner_is_refused_in_one_line(
    folder: Path, fields: dict[str, str], message: str
) -> None:
    fields = {name: str(folder) if value == "SOURCE" else value for name, value in fields.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^[^\n]*{message}[^\n]*$"):
        with_options_of_captioner(recipe_from(folder, **fields))


def test_captions_of_ones_own_must_be_named() -> None:
    for arguments in (["--from", "photographs"], ["continue"]):
        with pytest.raises(ValueError, match="--dataset FOLDER"):
            parse_recipe(arguments)
    assert parse_recipe(["--from=photographs", "--dataset=x"]) == parse_recipe(["continue", "--dataset=x"])


def test_pieces_are_kept_as_they_are(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, tmp_path: Path
) -> None:
    tokenizer = build_tokenizer(NEW, kind="bpe", min_count=2)
    CaptionerProcessor(processor.image_processor, tokenizer).save_pretrained(tmp_path / "source")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "source")
    recipe = with_options_of_captioner(recipe_from(tmp_path / "source"))
    model, continued = build_captioner(recipe, [["Zebras!"]])
    assert continued.tokenizer.get_vocab() == tokenizer.get_vocab() and model.config.vocab_size == len(tokenizer)
    assert recipe.data.tokenizer == "bpe"


def test_training_goes_on_from_a_captioner_and_resumes_from_no_other(folder: Path, photographs: Path) -> None:
    recipe = recipe_from(folder, epochs=2, num_threads=1, learning_rate=1e-2, cache_cells="false")
    trained = train(recipe)
    model, processor = load_captioner(recipe.run.output_dir)
    assert "velocipede" in processor.tokenizer.get_vocab()
    source, _ = load_captioner(folder)
    assert not torch.equal(model.decoder.memory_to_state.weight, source.decoder.memory_to_state.weight)
    encoder = source.encoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in model.encoder.state_dict().items())
    resumed = recipe_from(folder, "--resume", epochs=2, num_threads=1, learning_rate=1e-2, cache_cells="false")
    assert train(resumed).evaluation.scores == trained.evaluation.scores
    with torch.no_grad():
        source.decoder.memory_to_state.weight += 1e-3
    source.save_pretrained(folder)
    with pytest.raises(ValueError, match="the captioner's weights and words have changed"):
        train(resumed)
