"""The pipeline: its captions, scores and attention maps, for one image or many."""

from __future__ import annotations

import io
import math
import types
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline
from transformers.generation import utils
from transformers.pipelines.pt_utils import KeyDataset

from hf_captioner import CaptionerProcessor, ImageCaptioningPipeline
from hf_captioner.data.rows import read_pixels
from hf_captioner.model.captions import build_tokenizer, caption_words
from hf_captioner.model.pipeline_captioner import caption_attentions

QUICK = {"num_beams": 3, "max_new_tokens": 8}
BLACK = np.zeros((8, 8, 3), np.uint8)
DECODINGS = [
    {},  # five beams
    {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 9},
    {"num_beams": 1},
    {"num_beams": 1, "do_sample": True, "num_return_sequences": 2},
    {"num_beams": 3, "do_sample": True},
]


@pytest.fixture(scope="module")
def captioner(captioner_folder: Path) -> ImageCaptioningPipeline:
    return pipeline("image-captioning", model=captioner_folder, device="cpu")


@pytest.fixture(scope="module")
def pixel_values(processor: CaptionerProcessor, photos: list[Image.Image]) -> torch.Tensor:
    return processor(images=photos)["pixel_values"]


@pytest.mark.parametrize(
    ("beam_indices", "cells"),
    [
        (None, [[0, 1, 2], [1, 2, 3]]),
        ([[0, 1, 0], [1, 0, 1]], [[0, 2, 2], [1, 1, 3]]),
        ([[1, 1, 0], [1, 0, -1]], [[1, 2, 2], [1, 1, 2]]),  # both from beam 1; the second ended after two words
    ],
)
def test_known_maps_follow_the_beams(beam_indices, cells):
    """The attention of beam n at step t is on cell (n + t) % 4, for two beams, three words and 2x2 cells."""
    steps = [torch.eye(4)[[(beam + t) % 4 for beam in range(2)]].view(2, 1, 1, 4) for t in range(3)]
    output = types.SimpleNamespace(cross_attentions=[(step,) for step in steps])
    if beam_indices is not None:
        output.beam_indices = torch.tensor(beam_indices)
    assert caption_attentions(output, (2, 2)).flatten(2).argmax(-1).tolist() == cells


def test_maps_sum_to_one_also_if_weights_do_not():
    weights = torch.tensor([[0.1, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-6, 0.0, 0.0, 3e-6]]).half()
    output = types.SimpleNamespace(cross_attentions=[(weights[None, None],)])
    maps = caption_attentions(output, (2, 2))[0].flatten(1)
    expected = torch.tensor([[0.25, 0.5, 0.25, 0], [0, 0, 0, 0], [0.25, 0, 0, 0.75]])
    torch.testing.assert_close(maps, expected, atol=2e-2, rtol=0)
    assert maps[:1].sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_results_are_those_of_feeding_the_captions_to_the_model(captioner, pixel_values, photos, decoding):
    wanted = {"return_dict_in_generate": True, "output_attentions": True}
    for images in (pixel_values, pixel_values[4:]):
        torch.manual_seed(0)
        output = captioner.model.generate(pixel_values=images, **wanted, **decoding)
        sequences = output.sequences
        with torch.no_grad():
            expected = captioner.model(images, decoder_input_ids=sequences[:, :-1], output_attentions=True)
        maps = expected.cross_attentions[0].unflatten(3, (4, 4)).squeeze(1)  # (captions, words, 4, 4)
        ends = sequences[:, 1:] == 3
        words = ends.cumsum(1) - ends.long() == 0  # (captions, words), all up to <end>
        torch.testing.assert_close(caption_attentions(output, (4, 4))[words], maps[words], atol=1e-5, rtol=0)
    scores = expected.logits.log_softmax(-1).gather(2, sequences[:, 1:, None]).squeeze(2)  # (captions, words)
    ordinary = sequences[:, 1:] > 3  # this random model also generates <start> and <pad> within a caption

    torch.manual_seed(0)
    captions = captioner(photos[4], return_scores=True, return_attentions=True, **decoding)
    assert len(captions) == decoding.get("num_return_sequences", 1)
    grid_box = captioner.model.encoder.part.grid_box(64, 64)
    assert grid_box != (0, 0, 64, 64)
    box = captioner.processor.image_processor.visible_box(*photos[4].size, grid_box)
    for n, (caption, text) in enumerate(zip(captions, captioner.processor.batch_decode(sequences), strict=True)):
        assert caption["generated_text"] == " ".join(caption["words"]) == text and caption["box"] == box
        assert caption["word_scores"] == pytest.approx(scores[n, ordinary[n]].tolist(), abs=1e-4)
        assert caption["score"] == pytest.approx(scores[n, words[n]].mean().item(), abs=1e-4)
        np.testing.assert_allclose(caption["attentions"], maps[n, ordinary[n]], atol=1e-5)
        np.testing.assert_allclose(caption["attentions"].sum((1, 2)), 1, atol=1e-5)


def test_score_is_what_beam_search_ranks_by(captioner, pixel_values, photos):
    output = captioner.model.generate(pixel_values=pixel_values, return_dict_in_generate=True, output_scores=True)
    captions = [result[0] for result in captioner(photos, batch_size=5, return_scores=True)]
    assert len({len(caption["words"]) for caption in captions}) > 1  # the shorter ones are padded
    scores = [caption["score"] for caption in captions]
    assert scores == pytest.approx(output.sequences_scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_give_what_single_images_give(captioner, photos, batch_size):
    wanted = {"return_scores": True, "return_attentions": True, "num_return_sequences": 2, **QUICK}
    batched = captioner(photos, batch_size=batch_size, **wanted)
    single = [captioner(photo, **wanted) for photo in photos]
    assert len(batched) == len(photos) and len({result[0]["generated_text"] for result in batched}) > 2
    for ours, theirs in zip(chain(*batched), chain(*single), strict=True):
        assert (ours["generated_text"], ours["box"]) == (theirs["generated_text"], theirs["box"])
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        np.testing.assert_allclose(ours["attentions"], theirs["attentions"], atol=1e-5)


@pytest.mark.parametrize(
    "read",
    [
        *(str, lambda file: file, lambda file: file.read_bytes(), lambda file: bytearray(file.read_bytes())),
        *(lambda file: memoryview(file.read_bytes()), lambda file: io.BytesIO(file.read_bytes())),
        *(lambda file: file.open("rb"), Image.open, lambda file: np.asarray(Image.open(file))),
    ],
    ids=["str", "Path", "bytes", "bytearray", "memoryview", "BytesIO", "open file", "PIL", "numpy"],
)
def test_one_image(captioner, photo_files, photos, read):
    expected = captioner(photos[1], **QUICK)
    assert expected == [{"generated_text": expected[0]["generated_text"]}]
    assert captioner(read(photo_files[1]), **QUICK) == expected
    assert captioner([read(photo_files[1])], **QUICK) == [expected]
    assert list(captioner((read(file) for file in photo_files[1:2]), **QUICK)) == [expected]


def column(files: list[str]) -> Any:
    return Dataset.from_dict({"image": files}).cast_column("image", ImageFeature())


@pytest.mark.parametrize(
    ("collect", "kind"),
    [
        (list, list),
        (tuple, list),
        (lambda files: column(files)["image"], list),
        (lambda files: KeyDataset(column(files), "image"), None),
        (lambda files: (file for file in files), None),
        (lambda files: column(files).to_iterable_dataset()["image"], None),
    ],
    ids=["list", "tuple", "column", "KeyDataset", "generator", "streamed column"],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_many_images(captioner, photo_files, photos, collect, kind, batch_size):
    results = captioner(collect([str(file) for file in photo_files]), batch_size=batch_size, **QUICK)
    assert kind is None or isinstance(results, kind)
    assert list(results) == [captioner(photo, **QUICK) for photo in photos]


def test_pixels_are_those_of_training_and_evaluation(captioner, tmp_path):
    """Check it with a large JPEG, which is decoded at reduced size."""
    file = tmp_path / "large.jpg"
    Image.effect_noise((1100, 825), 90).convert("RGB").save(file)
    image_processor = captioner.processor.image_processor
    row = {"image_id": "large", "image": {"path": str(file), "bytes": None}}
    expected = read_pixels([row], image_processor)
    for source in (file, file.read_bytes()):
        inputs = captioner.preprocess(source)
        assert torch.equal(inputs["pixel_values"], expected)
        assert inputs["image_size"].tolist() == [[1100, 825]]
    assert torch.equal(image_processor(file)["pixel_values"], expected)
    assert not torch.equal(image_processor(Image.open(file))["pixel_values"], expected)  # decoded at full size


@pytest.mark.parametrize("nothing", [[], (), (file for file in [])], ids=["list", "tuple", "generator"])
def test_no_images_give_no_captions(captioner, nothing):
    assert list(captioner(nothing)) == []


def test_generation_arguments(captioner_folder, photos):
    short = pipeline("image-captioning", model=captioner_folder, device="cpu", max_new_tokens=2, num_beams=1)
    assert len(short(photos[0])[0]["generated_text"].split()) == 2
    assert len(short(photos[0], max_new_tokens=3)[0]["generated_text"].split()) == 3
    assert len(short(photos[0], generate_kwargs={"max_new_tokens": 4})[0]["generated_text"].split()) == 4
    greedy = short(photos[0], max_new_tokens=20)
    assert greedy != short(photos[0], max_new_tokens=20, num_beams=5)
    both = pipeline("image-captioning", model=captioner_folder, device="cpu", generate_kwargs={"num_beams": 1})
    assert both(photos[0], max_new_tokens=20) == greedy


def test_max_new_tokens_overrules_the_stored_length_without_a_warning(captioner, photos, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(utils.logger, "warning", messages.append)
    assert captioner.model.generation_config.max_length is not None
    inputs = captioner.processor(photos[0])
    assert captioner.model.generate(**inputs, max_new_tokens=2, min_new_tokens=1, num_beams=1).shape == (1, 3)
    assert captioner.model.generate(**inputs, max_length=4, num_beams=1).shape == (1, 4)
    captioner(photos[0], max_new_tokens=2)
    assert not messages
    captioner(photos[0], max_new_tokens=2, max_length=5)
    assert len(messages) == 1 and "Both `max_new_tokens`" in messages[0]  # two wishes in one call


@pytest.mark.parametrize("num_beams", [1, 5])
def test_prefix_has_maps_but_no_scores(captioner, photos, num_beams):
    prefix = captioner.processor.tokenizer("two small children", add_special_tokens=False).input_ids
    start = torch.tensor([[captioner.model.config.decoder_start_token_id, *prefix]])
    wanted = {"return_scores": True, "return_attentions": True, "num_beams": num_beams}
    caption = captioner(photos[0], decoder_input_ids=start, **wanted)[0]
    assert caption["words"][:3] == ["two", "small", "children"] and len(caption["words"]) > 3
    assert [math.isnan(score) for score in caption["word_scores"][:4]] == [True, True, True, False]
    assert math.isfinite(caption["score"])
    assert len(caption["attentions"]) == len(caption["words"])


def test_a_model_in_training_mode_is_put_into_evaluation_mode(tiny_model, processor, captioner, photos):
    model = tiny_model(seed=1, scale=6).train()
    given = pipeline("image-captioning", model=model, processor=processor, device="cpu")
    assert given(photos, **QUICK) == captioner(photos, **QUICK)


@pytest.mark.parametrize(
    ("images", "kwargs", "error", "message"),
    [
        ("nowhere/photo.jpg", {}, FileNotFoundError, "nowhere/photo.jpg does not exist"),
        (b"no image", {}, ValueError, "bytes object is not a readable image"),
        (["nowhere/photo.jpg"], {"batch_size": 2}, FileNotFoundError, "nowhere/photo.jpg does not exist"),
        (torch.zeros(3, 8, 8), {}, TypeError, "cannot be read from Tensor"),
        (BLACK, {"nonsense": 1}, ValueError, "nonsense"),
        (BLACK, {"num_beams": 2, "generate_kwargs": {"num_beams": 3}}, ValueError, "num_beams is given twice"),
    ],
)
def test_errors(captioner, images, kwargs, error, message):
    with pytest.raises(error, match=message):
        captioner(images, **kwargs)


def test_pieces_are_shown_as_words(tiny_model, processor):
    captions = ["赤い丸が青い四角の上にある。", "a black dog's T-shirt", "the unheard-of xylophone"] * 3
    tokenizer = build_tokenizer(captions, kind="bpe", min_count=3, vocab_size=290)
    model = tiny_model(seed=3, scale=6, vocab_size=len(tokenizer))
    pieces = CaptionerProcessor(processor.image_processor, tokenizer)
    captioner = pipeline("image-captioning", model=model, processor=pieces)
    image = Image.new("RGB", (80, 60), "red")
    # The captions of a random model are noise, so a prefix is given.
    for caption, words in [("a black dog's T-shirt", ["a", "black", "dog's"]), ("赤い丸が", []), ("a 赤い dog", ["a"])]:
        given = torch.tensor([[2, *tokenizer(caption, add_special_tokens=False).input_ids]])
        kwargs = {"decoder_input_ids": given, "num_beams": 1, "max_new_tokens": 3}
        result = captioner(image, return_attentions=True, return_scores=True, **kwargs)[0]
        assert result["generated_text"].startswith(caption)
        assert len(result["words"]) == len(result["attentions"]) == len(result["word_scores"])
        assert result["attentions"].shape[1:] == (4, 4) and np.allclose(result["attentions"].sum((1, 2)), 1, atol=1e-5)
        assert result["words"][: len(words)] == words
        pixel_values = pieces(images=image)["pixel_values"]
        output = model.generate(pixel_values, **kwargs, output_attentions=True, return_dict_in_generate=True)
        maps = caption_attentions(output, (4, 4))[0].numpy()
        positions = caption_words(tokenizer, output.sequences[0, 1:].tolist())
        assert any(len(indices) > 1 for _, indices in positions)
        for shown, (word, indices), expected in zip(result["attentions"], positions, result["words"], strict=True):
            assert word == expected
            assert np.allclose(shown, maps[indices].mean(0), atol=1e-6)
