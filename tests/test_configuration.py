"""The configuration: it is saved whole, and refuses wrong values."""

from __future__ import annotations

from typing import Any

import pytest

from hf_captioner import CaptionerConfig


def test_round_trip(tmp_path: Any) -> None:
    config = CaptionerConfig(
        encoder_name="vit_tiny_patch16_224",
        encoder_kwargs={"img_size": 64},
        attention_type="multi_head",
        attention_kwargs={"num_heads": 4},
        decoder_kwargs={"num_layers": 2},
        deep_output=True,
    )
    config.save_pretrained(tmp_path)
    assert CaptionerConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size is 0"),
        ("output_dropout", 1.0, "must be in"),
        ("label_smoothing", -0.1, "must be in"),
        ("doubly_stochastic_weight", -1.0, "must not be negative"),
        ("doubly_stochastic_reduction", "median", "median"),
        ("pad_token_id", 0, "must not be"),
        ("vocab_size", 3, "eos_token_id is 3"),
        ("gate", "yes", "gate"),
        ("attention_kwargs", "num_heads", "attention_kwargs"),
        ("decoder_kwargs", 2, "decoder_kwargs"),
    ],
)
def test_refuses(field: str, value: object, message: str) -> None:
    with pytest.raises(Exception, match=message):
        CaptionerConfig(**{field: value})
