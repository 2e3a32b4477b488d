"""Play the pointing game with a captioner of drawn shapes: when it names an object, does it look at it?

    python benchmarks/pointing.py outputs/shapes
    python benchmarks/pointing.py outputs/shapes --split test --num_beams 1 --output pointing.json

What the figures mean, and how it is played, stands in hf_captioner/evaluation/pointing.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import pipeline

from hf_captioner.cli import load_captioner, run_main
from hf_captioner.data.shapes import load_shapes
from hf_captioner.evaluation.pointing import PointingGame


def main(argv: Sequence[str]) -> None:
    """Caption a split, play, print, write."""
    arguments = parse(argv)
    model, processor = load_captioner(arguments.folder)
    captioner = pipeline("image-captioning", model=model, processor=processor, device=arguments.device)
    dataset = load_shapes(arguments.split, num_images=arguments.max_images)
    captions = captioner(
        (image for image in dataset["image"]),
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        return_attentions=True,
    )
    game = PointingGame()
    for (caption,), objects in tqdm(
        zip(captions, dataset["objects"], strict=True), total=len(dataset), unit="image", disable=None
    ):
        game.add(caption["words"], caption["attentions"], caption["box"], objects)

    scores = game.scores()
    rows, columns = caption["attentions"].shape[1:]
    protocol = (
        f"shapes, {arguments.split}, {len(dataset)} images, {arguments.num_beams} beams, maps of {rows}x{columns}"
    )
    print(f"Pointing game of {arguments.folder} on {protocol}:")
    for kind, figures in scores.items():
        print(f"  words for a {kind}")
        for name, value in figures.items():
            print(f"    {name:<20} {value:.3f}" if isinstance(value, float) else f"    {name:<20} {value}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"protocol": protocol, **scores}, indent=2) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a captioner trained on shapes")
    add("--split", default="validation", help="split of shapes (default: %(default)s)")
    add("--num_beams", "--num-beams", type=int, default=5, help="beams (default: %(default)s)")
    add("--batch_size", "--batch-size", type=int, default=32, help="images at once (default: %(default)s)")
    add("--max_images", "--max-images", type=int, help="play with the first so many images only")
    add("--output", type=Path, metavar="FILE", help="also write the figures to this JSON file")
    add("--device", help="cpu, cuda, … (default: the first accelerator there is)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
