"""Fixtures for all tests: a tiny captioner, its processor, photographs, and real data if they are in ../shared."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from hf_captioner import CaptionerModel, CaptionerProcessor

# huggingface_hub reads this when it is imported, so fixtures import this package only when they are used.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

SHARED = Path(__file__).resolve().parents[2] / "shared"

CAPTIONS = [
    f"{who} {doing} {where}"
    for who in ("a black dog", "two small children", "a man in a red shirt", "the woman")
    for doing in ("is running", "plays with a ball", "jumps over a bench")
    for where in ("on the beach", "near the water", "in the snow")
]


def pytest_configure() -> None:
    """Use one thread, because small tests gain nothing from more, and hide the progress bars of transformers."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches in a folder of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def processor() -> CaptionerProcessor:
    """Return a processor for images of 64x64 pixels and the words of `CAPTIONS`."""
    from hf_captioner import CaptionerProcessor

    data_config = {
        "input_size": (3, 64, 64),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    return CaptionerProcessor.from_captions(CAPTIONS, data_config, min_count=1)


@pytest.fixture(autouse=True)
def messages_go_to_the_present_stderr() -> Iterator[None]:
    """Remove the handler that a command called in this test has added: it writes to where stderr was captured then."""
    yield
    logging.getLogger("hf_captioner").handlers.clear()


@pytest.fixture(scope="session")
def tiny_model(processor: CaptionerProcessor) -> Callable[..., CaptionerModel]:
    """Return a function that builds random captioners with 4x4 cells for each image, in evaluation mode.

    With `scale=6` attention is sharp and captions differ between images and in length, as those of a trained model.
    """
    from hf_captioner import CaptionerModel

    def build(seed: int = 0, scale: float = 1.0, **config_kwargs: Any) -> CaptionerModel:
        sizes = {"hidden_size": 32, "attention_size": 24, "embedding_size": 16}
        encoder = {"encoder_name": "test_resnet", "encoder_kwargs": {"output_stride": 16}}
        words = {"vocab_size": len(processor.tokenizer)}
        torch.manual_seed(seed)
        arguments = {"pretrained": False, **encoder, **sizes, **words, **config_kwargs}
        model = CaptionerModel.from_encoder(**arguments)
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(scale if parameter.ndim > 1 else 1.0)
        model.generation_config = model.default_generation_config(unknown_token_id=0)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def captioner_folder(
    tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with a saved captioner and its processor."""
    folder = tmp_path_factory.mktemp("captioner")
    tiny_model(seed=1, scale=6).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photographs(captioner_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a tiny captioner in the place of the one that comes with the package, and return its folder."""
    from transformers.pipelines import PIPELINE_REGISTRY

    monkeypatch.setattr("hf_captioner.pretrained.PHOTOGRAPHS", str(captioner_folder))
    default = {"model": (str(captioner_folder), "tiny")}
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks["image-captioning"], "default", default)
    return captioner_folder


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Return five colourful RGB images of different shapes."""
    generator = np.random.default_rng(0)
    images = []
    for width, height in [(96, 64), (64, 96), (80, 80), (70, 64), (120, 90)]:
        blocks = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        images.append(blocks.resize((width, height), Image.Resampling.BICUBIC))
    return images


@pytest.fixture(scope="session")
def photo_files(photos: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the same images as PNG files `photo0.png`, `photo1.png`, … in one folder."""
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"photo{i}.png" for i in range(len(photos))]
    for image, file in zip(photos, files, strict=True):
        image.save(file)
    return files


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., CaptionerModel]) -> CaptionerModel:
    """Return a captioner whose captions differ from image to image and in length."""
    return tiny_model(seed=2, scale=8)


@pytest.fixture(scope="session")
def pixel_values(processor: CaptionerProcessor, photos: list[Image.Image]) -> torch.Tensor:
    """Return `photos` as the encoder takes them."""
    return processor(images=photos)["pixel_values"]


@pytest.fixture(scope="session")
def cells(model: CaptionerModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the image cells that `model` computes of `photos`."""
    with torch.no_grad():
        return model.encoder(pixel_values).last_hidden_state


def _shared(name: str) -> Path:
    """Return a path in ../shared, or skip the test if there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} in the folder shared/ next to this repository")
    return path


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Return the folder with Flickr8k's training and validation splits."""
    return _shared("flickr8k")


@pytest.fixture(scope="session")
def encoder_weights() -> Path:
    """Return the file with ImageNet weights of timm's `mobilenetv2_100`."""
    return _shared("encoders/mobilenetv2_100_imagenet.safetensors")
