"""Score attention maps of a captioner of drawn shapes: does it look at an object when it names it?

    python benchmarks/pointing.py outputs/shapes
    python benchmarks/pointing.py outputs/shapes --split test --num_beams 1 --output pointing.json

The pointing game and its scores are described in hf_captioner/evaluation/pointing.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import pipeline

from hf_captioner.cli import CommandParser, load_captioner, run_command
from hf_captioner.data.shapes import load_shapes
from hf_captioner.evaluation.pointing import PointingGame


def main(argv: Sequence[str]) -> None:
    """Caption a split, and print and write the scores of the pointing game."""
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
    for attribute, values in scores.items():
        print(f"  words for a {attribute}")
        for name, value in values.items():
            print(f"    {name:<20} {value:.3f}" if isinstance(value, float) else f"    {name:<20} {value}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"protocol": protocol, **scores}, indent=2) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a captioner trained on shapes")
    add("--split", default="validation", help="split of shapes (default: %(default)s)")
    add("--num_beams", type=int, default=5, help="beams (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="images per batch (default: %(default)s)")
    add("--max_images", type=int, metavar="N", help="use only the first N images")
    add("--output", type=Path, metavar="FILE", help="JSON file to write the scores to")
    add("--device", help="cpu, cuda, … (default: the first accelerator found)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
