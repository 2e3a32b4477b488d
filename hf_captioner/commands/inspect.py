"""`hf-captioner inspect`: look into a data set before training on it."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import CommandParser, add_access_arguments
from ..data.datasets import load_captions
from ..data.inspection import count_lines, image_lines, near_empty_lines
from ..data.layouts import LAYOUTS
from ..data.rows import open_row, undecoded
from ..files import explain_write_errors, write_atomically
from ..visualization.figures import captions_figure

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure


def main(argv: Sequence[str]) -> None:
    """Print what is in a data set and what looks wrong, with all names."""
    arguments = parse(argv)
    splits = load_captions(
        arguments.path,
        format=arguments.format,
        skip_broken=True,
        allow_urls=arguments.allow_urls,
        allow_outside=arguments.allow_outside,
        names_shown=None,
        report=print,
    )
    rows = {str(name): undecoded(dataset) for name, dataset in splits.items()}
    for line in chain(count_lines(rows), near_empty_lines(rows), image_lines(rows)):
        print(line)
    if arguments.picture is not None:
        path = Path(arguments.picture)
        path = path if path.suffix else path.with_suffix(".png")
        with explain_write_errors("The picture", path.parent):
            print(f"Picture: {write_atomically(path, sample_figure(rows).savefig)}")


def sample_figure(splits: Mapping[str, Dataset], num_images: int = 10) -> Figure:
    """Draw a sample of images from the whole data set, with their captions.

    Args:
        splits: Undecoded rows of each split.
        num_images: Number of images to draw, fewer if not as many can be read.
    """
    indices = [(dataset, i) for dataset in splits.values() for i in range(len(dataset))]
    images, captions = [], []
    for dataset, index in random.Random(0).sample(indices, len(indices)):
        row = dataset[index]
        try:
            images.append(open_row(row))
        except ValueError:  # `image_lines` has reported it
            continue
        captions.append("\n– ".join([row["image_id"], *row["captions"]]))
        if len(images) == num_images:
            break
    return captions_figure(images, captions, columns=3)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `hf-captioner inspect`."""
    parser = CommandParser(
        prog="hf-captioner inspect",
        description="Print the layout of a data set, its numbers of images and captions, the lengths of captions and "
        "the size of the vocabulary, and name missing and broken files, near-empty captions, and images in two splits.",
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="name of a data set, a folder or file, or an id on the Hub")
    add("--format", "--dataset_format", help=f"one of {', '.join(LAYOUTS)}; recognised by default")
    add("--picture", metavar="FILE", help="write a picture of ten images with their captions")
    add_access_arguments(parser)
    return parser.parse_args(argv)
