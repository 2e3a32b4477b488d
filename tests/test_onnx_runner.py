"""An exported captioner without its graphs: its pixels, and its search, in which the captioner's own decoder reads words."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_captioner import CaptionerImageProcessor, CaptionerModel
from hf_captioner.model import image_processing_captioner
from hf_captioner.model.decoder_interface import Memory
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.onnx_runner import Pixels
from hf_captioner.model.onnx_search import Arrays, Captions, Settings, search
from hf_captioner.model.pixels import resize_and_crop
from hf_captioner.publishing.export import generation_settings

SHAPES = [(50, 50), (97, 64), (64, 131), (20, 30), (301, 33), (56, 47)]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "crop_pct"), [((48, 48), 0.875), ((48, 48), 1.0), ((40, 56), 0.9), ((32, 32), 1.1)])
def test_pixels_and_box_are_those_of_the_processor(
    crop_mode: str, size: tuple[int, int], crop_pct: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner and the image processor give equal pixels if the latter resizes by Pillow, too."""
    monkeypatch.setattr(image_processing_captioner, "_resize_and_crop", resize_and_crop)
    generator = np.random.default_rng(0)
    for shape, interpolation in itertools.product(SHAPES, ["nearest", "bilinear", "bicubic", "lanczos"]):
        image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
        settings = interpolation, crop_pct, crop_mode, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        theirs = CaptionerImageProcessor(dict(zip(("height", "width"), size, strict=True)), *settings)
        ours = Pixels(size, *settings)
        pixel_values, sizes = ours([image])
        np.testing.assert_array_equal(pixel_values, theirs(image)["pixel_values"].numpy())
        assert sizes == [image.size]
        assert ours.resized(*image.size) == theirs.resized_size(*image.size)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_differ_from_those_resized_by_torch_by_rounding(photos: list[Image.Image], interpolation: str) -> None:
    photos = [photo.resize((300, 200)) for photo in photos]
    settings = interpolation, 0.9, "center", [0.0, 0.0, 0.0], [1 / 255] * 3
    pixel_values, sizes = Pixels((96, 96), *settings)(photos)
    assert sizes == [(300, 200)] * len(photos)
    theirs = CaptionerImageProcessor({"height": 96, "width": 96}, *settings)
    difference = np.abs(pixel_values - theirs(photos)["pixel_values"].numpy())
    assert difference.max() < 3 and 0 < difference.mean() < 0.1


@torch.no_grad()
def searched(model: CaptionerModel, cells: Tensor, *, weights: bool = False, **kwargs: Any) -> Captions:
    """Return the captions of the search in numpy, for which the captioner's own decoder reads each word."""
    config = model.generation_config.from_dict(model.generation_config.to_dict() | kwargs)
    settings = Settings(**generation_settings(config))
    memory = model.decoder.prepare(cells)

    @torch.no_grad()
    def read(words: np.ndarray, memory: Arrays, state: Arrays) -> tuple[np.ndarray, np.ndarray, Arrays]:
        flat = tuple(torch.from_numpy(part).flatten(0, 1) for part in state)
        ids = torch.from_numpy(words).reshape(-1, 1)
        output = model.decoder(ids, Memory(*map(torch.from_numpy, memory)), flat)
        parts = (output.logits[:, 0].log_softmax(-1), output.weights[:, 0], *output.state)
        log_probs, attention, *after = (part.unflatten(0, words.shape).numpy() for part in parts)
        return log_probs, attention, after

    arrays = [memory.cells.numpy(), memory.keys.numpy(), memory.mean.numpy()]
    start = [part.unsqueeze(1).numpy() for part in model.decoder.initial_state(memory, 1)]
    return search(read, arrays, start, settings, num_cells=cells.shape[1] if weights else 0)


def assert_as_generated(model: CaptionerModel, cells: Tensor, **kwargs: Any) -> None:
    """Check that the search in numpy has the captions and scores of `generate()`."""
    outputs = CaptionerEncoderOutput.of(cells)
    theirs = model.generate(encoder_outputs=outputs, return_dict_in_generate=True, **kwargs)
    ours, expected = searched(model, cells, **kwargs), theirs.sequences.numpy()
    words = ours.words.reshape(-1, ours.words.shape[-1])
    np.testing.assert_array_equal(words[:, : expected.shape[1]], expected, err_msg=str(kwargs))
    assert (words[:, expected.shape[1] :] == 1).all()  # nothing but padding
    if kwargs["num_beams"] > 1:
        np.testing.assert_allclose(ours.scores.flatten(), theirs.sequences_scores, atol=1e-4, err_msg=str(kwargs))


@pytest.mark.parametrize("max_length", [4, 9])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beam_search_is_that_of_generate(
    model: CaptionerModel, cells: Tensor, early_stopping: bool | str, max_length: int
) -> None:
    kwargs = {"early_stopping": early_stopping, "max_length": max_length, "num_beams": 4, "num_return_sequences": 4}
    for length_penalty in (-1.0, 0.0, 0.7, 2.0):
        assert_as_generated(model, cells, length_penalty=length_penalty, **kwargs)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        {}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"min_length": 11}, {"suppress_tokens": [0, 4, 9]},
        {"bad_words_ids": [[9], [5, 6], [7, 3], [2, 4], [8, 8, 8], [3]]}, {"begin_suppress_tokens": [4, 5, 6, 7, 8]},
        {"eos_token_id": [3, 9]}, {"max_new_tokens": 6}, {"min_new_tokens": 9},
    ],
    ids=lambda kwargs: next(iter(kwargs), "default"),
)  # fmt: skip
def test_settings_act_as_in_generate(model: CaptionerModel, cells: Tensor, num_beams: int, kwargs: dict) -> None:
    assert_as_generated(model, cells, **{"max_length": 13, **kwargs, "num_beams": num_beams})


def test_an_image_has_the_same_caption_alone_and_among_others(model: CaptionerModel, cells: Tensor) -> None:
    for num_beams in (1, 4):
        together = searched(model, cells, num_beams=num_beams, max_length=13, weights=True)
        lengths = (together.words[:, 0] != 1).sum(1)
        assert len(set(lengths)) > 1, "captions must end at different steps, or no image is dropped"
        for index, length in enumerate(lengths):
            alone = searched(model, cells[index : index + 1], num_beams=num_beams, max_length=13, weights=True)
            np.testing.assert_array_equal(alone.words[0], together.words[index])
            for name in ("word_scores", "weights"):
                mine, theirs = getattr(alone, name)[0, 0], getattr(together, name)[index, 0]
                np.testing.assert_allclose(mine[:length], theirs[:length], atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 3, "num_return_sequences": 4}, "num_return_sequences is 4; it must be at least 1 and at most"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_settings_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    ids = {"decoder_start_token_id": 2, "eos_token_id": [3], "pad_token_id": 1}
    with pytest.raises(ValueError, match=message):
        Settings(**{**ids, "max_length": 9, **kwargs})
