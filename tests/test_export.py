"""Captioners exported to ONNX caption like the model they come from, without torch."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_parts import ENCODERS
from torch import Tensor
from transformers import pipeline

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.commands.export import main
from hf_captioner.model import image_processing_captioner
from hf_captioner.model.attentions import ATTENTIONS, DotAttention
from hf_captioner.model.decoders import DECODERS
from hf_captioner.model.onnx_runner import OnnxCaptioner
from hf_captioner.model.pixels import resize_and_crop
from hf_captioner.publishing import export, quantization
from hf_captioner.publishing.export import export_onnx, generation_settings
from hf_captioner.publishing.exported import find_export

Build = Callable[..., CaptionerModel]

# Together with the model of most tests, nearly every attention and decoder once; the slow ones fill the gaps.
PAIRS = [("additive_relu", "lstm_channel_gate"), ("dot", "gru"), ("multi_head", "spatial"), ("hard", "lstm")]
SLOW_PAIRS = {*product(["adaptive"], DECODERS.names()), *product(ATTENTIONS.names(), ["lstm"])} - {*PAIRS}


@pytest.fixture(scope="module", autouse=True)
def without_traces() -> Iterator[None]:
    """Switch off torch's trace log: it formats every step of tracing as soon as anything listens, as pytest does."""
    logger = logging.getLogger("torch.__trace")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.fixture(scope="module")
def model(tiny_model: Build, processor: CaptionerProcessor, photos: list[Image.Image]) -> CaptionerModel:
    """Captioner whose captions differ between images: its batch norms have seen some."""
    model = tiny_model(seed=2, scale=8)
    with torch.no_grad():
        model.encoder.train()(processor(images=photos * 4)["pixel_values"])
    model.eval()
    model.generation_config.update(max_length=14, no_repeat_ngram_size=3, length_penalty=0.8)
    return model


@pytest.fixture(scope="module")
def folder(model: CaptionerModel, processor: CaptionerProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "new" / "onnx"
    export_onnx(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def captioner(folder: Path) -> OnnxCaptioner:
    return OnnxCaptioner(folder, num_threads=1)


@pytest.fixture(autouse=True)
def resized_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resize images with Pillow, as the export does: torch's resizing differs in a few pixels by one level of 255,
    which can change the caption of an untrained model."""
    monkeypatch.setattr(image_processing_captioner, "_resize_and_crop", resize_and_crop)


def captions_of(model: CaptionerModel, processor: CaptionerProcessor, images: list[Any], **kwargs: Any) -> list[str]:
    """Return the best caption of each image, by `generate()`."""
    return processor.batch_decode(model.generate(**processor(images=images), **kwargs))


@pytest.mark.parametrize("settings", [{"num_beams": 1}, {"num_beams": 4, "num_return_sequences": 3}], ids=str)
def test_results_equal_those_of_the_pipeline(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    captioner: OnnxCaptioner,
    photos: list[Image.Image],
    settings: dict[str, int],
) -> None:
    """Compare captions, words, log-probabilities, attention maps and the box that the maps cover."""
    wanted = {"return_scores": True, "return_attentions": True}
    expected = pipeline("image-captioning", model=model, processor=processor)(photos, **wanted, **settings)
    found = captioner(photos, batch_size=3, **wanted, **settings)
    for theirs, ours in zip(chain(*expected), chain(*found), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["generated_text"] == theirs["generated_text"] and ours["words"] == theirs["words"]
        for name in ("score", "word_scores", "attentions", "box"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


def test_captions_of_a_hundred_images_are_equal(
    model: CaptionerModel, processor: CaptionerProcessor, captioner: OnnxCaptioner
) -> None:
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
    images = [
        Image.fromarray(colors).resize((90, 70 + index), Image.Resampling.BICUBIC)
        for index, colors in enumerate(blocks)
    ]
    expected = captions_of(model, processor, images)
    assert len(set(expected)) > 20
    found = captioner(images, batch_size=50)
    assert [captions[0]["generated_text"] for captions in found] == expected


WITHOUT_LIBRARIES = """
import runpy, sys
for name in ("torch", "torchvision", "transformers", "timm", "huggingface_hub", "hf_captioner"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_folder(folder: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the folder's program where only its requirements can be imported."""
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, str(folder / "caption.py"), *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_folder_captions_without_torch(
    model: CaptionerModel, processor: CaptionerProcessor, folder: Path, photo_files: list[Path], tmp_path: Path
) -> None:
    run = run_folder(folder, tmp_path, *photo_files, "--json", "captions.json", "--attentions", "--threads", 1)
    assert run.stderr == "" and run.returncode == 0
    captions = captions_of(model, processor, photo_files)
    assert run.stdout.splitlines() == [f"{p}\t{caption}" for p, caption in zip(photo_files, captions, strict=True)]
    first = json.loads((tmp_path / "captions.json").read_text())[0]
    maps = np.array(first["captions"][0]["attentions"])
    assert maps.shape == (len(first["captions"][0]["words"]), 4, 4)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-5)

    missing = run_folder(folder, tmp_path, "nothing.jpg")
    assert (missing.returncode, missing.stderr) == (2, "error: nothing.jpg does not exist.\n")


def assert_equal_captions(
    model: CaptionerModel, processor: CaptionerProcessor, images: list[Any], folder: Path
) -> None:
    """Export a model, and compare greedy and beam captions of model and export."""
    export_onnx(model, processor, folder)
    captioner = OnnxCaptioner(folder, num_threads=1)
    for settings in ({"num_beams": 1, "max_length": 9}, {"num_beams": 3, "max_length": 9}):
        found = [captions[0]["generated_text"] for captions in captioner(images, **settings)]
        assert found == captions_of(model, processor, images, **settings)


@pytest.mark.parametrize(
    ("attention", "decoder"),
    [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in sorted(SLOW_PAIRS))],
)
def test_every_attention_with_every_decoder(
    tiny_model: Build,
    processor: CaptionerProcessor,
    photos: list[Image.Image],
    tmp_path: Path,
    attention: str,
    decoder: str,
) -> None:
    """Compare captions of model and export for pairs of attention and decoder, with an encoder that is quick to trace."""
    model = tiny_model(seed=3, scale=6, attention_type=attention, decoder_type=decoder, deep_output=True)
    model.encoder.part = Patches(model.encoder.part)
    assert_equal_captions(model, processor, photos[:3], tmp_path / "onnx")


class Patches(torch.nn.Module):
    """Encoder that maps patches of 16x16 pixels with one linear layer."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.hidden_size = part.hidden_size
        self.linear = torch.nn.Linear(3 * 16 * 16, part.hidden_size)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 16, width // 16

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = pixel_values.unfold(2, 16, 16).unfold(3, 16, 16)  # (B, 3, rows, columns, 16, 16)
        return self.linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)).relu()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        ENCODERS["NHWC"],
        ENCODERS["tokens"],
        {"encoder_type": "timm_pooled", "encoder_name": "test_resnet", "encoder_kwargs": {"pooled_size": 5}},
        {**ENCODERS["NCHW"], "decoder_type": "top_down", "decoder_kwargs": {"num_layers": 2}, "gate": False},
    ],
    ids=["NHWC", "tokens", "pooled", "two_layers"],
)
def test_every_kind_of_encoder(
    tiny_model: Build, processor: CaptionerProcessor, photos: list[Image.Image], tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    model = tiny_model(seed=3, scale=6, **kwargs)
    assert_equal_captions(model, processor, photos, tmp_path / "onnx")


def test_int8_is_smaller_and_close(
    tiny_model: Build,
    processor: CaptionerProcessor,
    photos: list[Image.Image],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantization, "SMALLEST", 8192)  # the tiny captioner's weights are all below the usual number
    model = tiny_model(seed=3, scale=6, hidden_size=64, embedding_size=64, projection_size=32, tie_word_embeddings=True)
    model.encoder.part = Patches(model.encoder.part)
    caplog.set_level(logging.INFO, "hf_captioner")
    export_onnx(model, processor, tmp_path / "int8", int8=True)
    lines = [record.message for record in caplog.records if record.name == export.__name__]
    encoder, decoder, small_encoder, small_decoder, difference = lines
    sizes, small_sizes = (
        [float(line.split()[-2]) for line in pair] for pair in ((encoder, decoder), (small_encoder, small_decoder))
    )
    assert all(small < 0.6 * size for small, size in zip(small_sizes, sizes, strict=True)), lines
    assert 0 < float(difference.split()[-1].rstrip(".")) < 0.2
    captions = OnnxCaptioner(tmp_path / "int8", num_threads=1)(photos)
    assert len(captions) == len(photos)


def test_weights_are_stored_to_half_a_step_of_their_group() -> None:
    groups = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    groups[7] = 0
    integers, scales = quantization._quantized(groups)
    assert integers.dtype == np.int8 and (np.abs(integers).max(1) == np.where(np.arange(50) == 7, 0, 127)).all()
    assert (np.abs(integers * scales[:, None] - groups) <= 0.501 * scales[:, None]).all()


def test_an_export_beside_a_captioner_replaces_an_earlier_one_and_nothing_else(
    tiny_model: Build, processor: CaptionerProcessor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert find_export(tmp_path) is None
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        main([str(tmp_path)])
    (tmp_path / "onnx" / "mine.txt").rename(tmp_path / "onnx" / "captioner.json")
    main([str(tmp_path)])
    assert f"hf-captioner caption {tmp_path} photo.jpg" in capsys.readouterr().out
    names = ["captioner.json", "decoder.onnx", "encoder.onnx", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names
    assert find_export(tmp_path) == tmp_path / "onnx" and find_export(tmp_path / "onnx") == tmp_path / "onnx"
    (tmp_path / "README.md").write_text("a card may change")
    assert find_export(tmp_path) is not None
    tiny_model(seed=4).save_pretrained(tmp_path)
    assert find_export(tmp_path) is None
    with pytest.raises(ValueError, match="name one for the export"):
        main(["owner/captioner"])


class Untraceable(DotAttention):
    """Attention that branches on a computed value, which torch cannot trace."""

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = super().forward(query, keys, memory)
        return (context if float(weights.max()) > 0.5 else context / 2), weights


def test_a_part_that_cannot_be_traced_is_named(
    tiny_model: Build, processor: CaptionerProcessor, tmp_path: Path
) -> None:
    model = tiny_model(attention_type="dot")
    model.encoder.part = Patches(model.encoder.part)
    model.decoder.attention.__class__ = Untraceable
    with pytest.raises(ValueError, match="decoder 'lstm' with attention 'dot' can't be exported to ONNX") as error:
        export_onnx(model, processor, tmp_path / "onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())  # no incomplete export stays behind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "sampling is not exported"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3, which is not exported"),
        ({"max_length": None}, "no max_length"),
    ],
)
def test_settings_without_a_counterpart_are_refused(
    model: CaptionerModel, settings: dict[str, Any], message: str
) -> None:
    config = model.generation_config.from_dict(model.generation_config.to_dict() | settings)
    with pytest.raises(ValueError, match=message):
        generation_settings(config)


def test_defaults_of_generate_that_trainers_write_down_have_no_effect(model: CaptionerModel) -> None:
    config = model.generation_config.from_dict(model.generation_config.to_dict())
    config.update(**config._get_default_generation_params(), defaults_only=True)
    expected = {**generation_settings(model.generation_config), "min_length": 0, "num_return_sequences": 1}
    assert config.typical_p == 1 and generation_settings(config) == expected


def test_other_errors_say_what_to_do(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    captioner: OnnxCaptioner,
    photos: list[Image.Image],
    captioner_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        main([str(captioner_folder), str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no exported captioner"):
        OnnxCaptioner(tmp_path)
    with pytest.raises(ValueError, match="Unknown settings: temperature"):
        captioner(photos, temperature=2.0)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ValueError, match="needs onnxscript: run `pip install 'hf_captioner"):
        export_onnx(model, processor, tmp_path / "onnx")
