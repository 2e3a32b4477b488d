"""Speed of training an encoder's last stages from their cached inputs, next to running the whole encoder.

    python benchmarks/stage_inputs.py --out benchmarks/results/stage_inputs.json

An optimizer step of random images with five captions each, in four settings that take turns: the encoder's last stages
are trained from images, or from what enters the first of them, which was computed before; the whole encoder is trained;
and the encoder is frozen and its cells cached, which is the time of the decoder alone. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import seconds_of, write_result

from hf_captioner import CaptionerModel

SIZES = {"projection_size": 512, "embedding_size": 512, "hidden_size": 512, "attention_size": 512, "vocab_size": 2540}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder_name", default="tf_efficientnet_lite2")
    parser.add_argument("--from_stage", type=int, default=6, help="first stage that is trained")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = CaptionerModel.from_encoder(
        arguments.encoder_name, pretrained=False, deep_output=True, tie_word_embeddings=True, **SIZES
    )
    assert model.encoder.can_divide(arguments.from_stage), "this encoder can't be divided there"
    pixel_values = torch.randn(arguments.batch_size, *model.data_config["input_size"])
    labels = torch.randint(4, SIZES["vocab_size"], (arguments.batch_size, 5, 12))
    with torch.no_grad():
        model.eval()
        stage_inputs = model.encoder.part.input_of_stage(pixel_values, arguments.from_stage)
        cells = model.encoder(pixel_values).last_hidden_state
    from_stage = {"stage_inputs": stage_inputs, "from_stage": arguments.from_stage}

    def step(first_stage: int | None, inputs: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            model.freeze_encoder() if first_stage is None else model.unfreeze_encoder(from_stage=first_stage)
            model.train().zero_grad()
            model(**inputs, labels=labels).loss.backward()

        return run

    seconds = seconds_of(
        {
            "last stages, from images": step(arguments.from_stage, {"pixel_values": pixel_values}),
            "last stages, from cached inputs": step(arguments.from_stage, from_stage),
            "whole encoder": step(0, {"pixel_values": pixel_values}),
            "decoder alone, from cached cells": step(None, {"cells": cells}),
        },
        arguments.repeats,
    )
    images, cached = "last stages, from images", "last stages, from cached inputs"
    decoder = seconds["decoder alone, from cached cells"]
    write_result(
        arguments.out,
        {
            "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
            "images_per_second": {name: arguments.batch_size / value for name, value in seconds.items()},
            "times_as_fast": seconds[images] / seconds[cached],
            "times_as_fast_without_the_decoder": (seconds[images] - decoder) / (seconds[cached] - decoder),
        },
    )


if __name__ == "__main__":
    main()
