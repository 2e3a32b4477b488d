"""Speed on an accelerator: training next to timm's plain encoder, and captioning by batch size.

    python benchmarks/accelerator.py --out benchmarks/results/accelerator.json

Random weights and images. Training takes whole optimizer steps in bfloat16; captioning uses five beams and captions
of twelve words, which a random model would never end by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import seconds_of, write_result

from hf_captioner import CaptionerModel

VOCAB_SIZE, NUM_CAPTIONS, NUM_WORDS = 2539, 5, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder_name", default="resnet101")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = CaptionerModel.from_encoder(arguments.encoder_name, pretrained=False, vocab_size=VOCAB_SIZE).to(device)
    model.generation_config = model.default_generation_config()
    result: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name != "out"}
    shape = 3, arguments.image_size, arguments.image_size
    result["captioning"] = [
        captioning(model, torch.randn(batch_size, *shape, device=device), arguments.repeats)
        for batch_size in arguments.batch_sizes
    ]
    images = torch.randn(arguments.train_batch_size, *shape, device=device)
    result["training"] = training(model, images, arguments.repeats)
    write_result(arguments.out, result)


@torch.inference_mode()
def captioning(model: CaptionerModel, images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return captions per second, and the fraction of the time that the encoder takes."""
    model.eval()
    length = NUM_WORDS + 1  # <start> included
    seconds = seconds_of(
        {
            "captions": lambda: model.generate(images, num_beams=5, min_length=length, max_length=length),
            "encoder": lambda: model.encoder(images),
        },
        repeats,
    )
    return {
        "batch_size": len(images),
        "captions_per_second": len(images) / seconds["captions"],
        "encoder_fraction": seconds["encoder"] / seconds["captions"],
    }


def training(model: CaptionerModel, images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return images per second of a step of the whole captioner, and of a step of timm's encoder alone."""
    model.train().unfreeze_encoder()
    labels = torch.randint(4, VOCAB_SIZE, (len(images), NUM_CAPTIONS, NUM_WORDS), device=images.device)
    whole = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    encoder = torch.optim.AdamW(model.encoder.part.body.parameters(), lr=1e-5, fused=True)

    def step(optimizer: torch.optim.Optimizer, compute_loss: Any) -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = seconds_of(
        {
            "captioner": lambda: step(whole, lambda: model(pixel_values=images, labels=labels).loss),
            "timm": lambda: step(encoder, lambda: model.encoder.part.body.forward_features(images).float().mean()),
        },
        repeats,
    )
    return {
        "images_per_second": len(images) / seconds["captioner"],
        "timm_images_per_second": len(images) / seconds["timm"],
        "fraction_of_timm": seconds["timm"] / seconds["captioner"],
    }


if __name__ == "__main__":
    main()
