"""A tiny captioner, and what it is given, for the tests of transformers."""

from __future__ import annotations

from typing import Any

import torch

from hf_captioner import CaptionerConfig

CAPTIONS = [f"{who} {doing}" for who in ("a black dog", "two small children") for doing in ("is running", "plays")]
IMAGE_SIZE = 32
NUM_IMAGES = 3


def tiny_config(**fields: Any) -> CaptionerConfig:
    """Return the configuration of a captioner with 2x2 cells of 96 channels for each image."""
    sizes = {"vocab_size": 20, "hidden_size": 96, "attention_size": 12, "embedding_size": 96}
    encoder = {"encoder_name": "test_resnet", "encoder_kwargs": {"output_stride": 16}}
    return CaptionerConfig(**{**encoder, **sizes, **fields})


def tiny_images(num_images: int = NUM_IMAGES) -> torch.Tensor:
    """Return pixel values of random images."""
    return torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE)


def tiny_words(config: CaptionerConfig, num_captions: int = NUM_IMAGES, length: int = 5) -> torch.Tensor:
    """Return random captions `(N, T)` that begin with `<start>` and have neither `<end>` nor `<pad>`."""
    words = torch.randint(4, config.vocab_size, (num_captions, length))
    words[:, 0] = config.decoder_start_token_id
    return words
