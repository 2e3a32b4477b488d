"""Memory and time of fine-tuning a whole encoder, with and without gradient checkpointing.

    python benchmarks/finetuning.py --out benchmarks/results/finetuning.json

A few steps on random images. The peak memory is that of the whole process, with libraries and optimizer.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from timing import synchronize, write_result

from hf_captioner import CaptionerModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder_name", default="resnet101")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gradient_checkpointing", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = CaptionerModel.from_encoder(arguments.encoder_name, pretrained=False, vocab_size=2539)
    model.unfreeze_encoder()
    if arguments.gradient_checkpointing:
        model.encoder.part.checkpoint_gradients()
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)
    pixel_values = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    labels = torch.randint(4, 2539, (arguments.batch_size, 5, 12))
    before = {name: parameter.detach().clone() for name, parameter in model.encoder.named_parameters()}
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        model(pixel_values=pixel_values, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - started)
    trained = [name for name, parameter in model.encoder.named_parameters() if not torch.equal(parameter, before[name])]
    unit = 1 if sys.platform == "darwin" else 1024
    write_result(
        arguments.out,
        {
            "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
            "seconds": seconds,
            "parameters_that_moved": len(trained),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        },
    )


if __name__ == "__main__":
    main()
