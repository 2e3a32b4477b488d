"""What there is to know of captioned images before training on them: counts, words, and what looks wrong."""

from __future__ import annotations

import argparse
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cli import CommandParser
from ..data.datasets import DATASETS, _chosen, _load, load_captions
from ..data.layouts import LAYOUTS
from ..data.layouts.damage import Damage
from ..data.rows import open_row, undecoded
from ..model.captions import build_tokenizer
from ..visualization.figures import captions_figure

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from PIL.Image import Image

MIN_COUNTS = (1, 2, 3, 5, 10)
FEW_WORDS = 2  # a caption of no more tells next to nothing

OpenRow = Callable[[dict[str, Any]], "Image"]


def count_lines(splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Images, captions and lengths of each split, then the vocabulary of training captions."""
    split_words = words_of(splits)
    rows = [("split", "images", "captions", "an image", "words a caption", "median", "95 %")]
    for name, captions in split_words.items():
        numbers = [len(row) for row in captions]
        lengths = sorted(len(words) for row in captions for words in row)
        if not lengths:
            rows.append((name, str(len(numbers)), "0", "0", "", "", ""))
            continue
        rows.append(
            (
                *(name, str(len(numbers)), str(len(lengths)), _range(numbers), _range(lengths)),
                *(f"{statistics.median(lengths):g}", str(lengths[int(0.95 * (len(lengths) - 1))])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()

    training = next(name for name in ("train", *split_words) if name in split_words)
    counts = Counter(word for row in split_words[training] for words in row for word in words)
    total = max(1, counts.total())
    yield f"Vocabulary of {training} by how often a word must occur (min_count):"
    for min_count in MIN_COUNTS:
        kept = [count for count in counts.values() if count >= min_count]
        yield f"  {min_count:>2}: {len(kept)} words, {sum(kept) / total:.2%} of all that is written"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def words_of(splits: Mapping[str, Dataset]) -> dict[str, list[list[list[str]]]]:
    """The words of each caption of each image, as the tokenizer sees them."""
    captions = {name: dataset["captions"][:] for name, dataset in splits.items()}
    every = [caption for rows in captions.values() for row in rows for caption in row]
    tokenizer = build_tokenizer(every, min_count=1).backend_tokenizer

    def words(caption: str) -> list[str]:
        text = tokenizer.normalizer.normalize_str(caption)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    return {name: [[words(caption) for caption in row] for row in rows] for name, rows in captions.items()}


def near_empty_lines(splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Captions of hardly a word, and images without any, by name."""
    for name, rows in words_of(splits).items():
        ids, captions = splits[name]["image_id"][:], splits[name]["captions"][:]
        for image_id, texts, words in zip(ids, captions, rows, strict=True):
            if not texts:
                yield f"{name}: {image_id} has no caption."
            for text, found in zip(texts, words, strict=True):
                if len(found) <= FEW_WORDS:
                    yield f"{name}: {image_id} has the caption {text!r} of {len(found)} words."


def image_lines(splits: Mapping[str, Dataset], open_row: OpenRow) -> Iterator[str]:
    """Every image is opened: the sizes of all, and those that can't be read.

    Args:
        splits: undecoded rows.
        open_row: opens the image of one, or raises ValueError.
    """
    from tqdm.auto import tqdm

    for name, dataset in splits.items():
        sizes: Counter[tuple[int, int]] = Counter()
        broken = []
        for row in tqdm(dataset, desc=f"Opening the images of {name}", unit="image", leave=False, disable=None):
            try:
                sizes[open_row(row).size] += 1
            except ValueError as e:
                broken.append(str(e))
        if sizes:
            (width, height), count = sizes.most_common(1)[0]
            widths, heights = ([size[axis] for size in sizes] for axis in (0, 1))
            yield (
                f"{name}: {sizes.total()} images can be read, {_range(widths)} pixels wide and {_range(heights)} high; "
                f"{count} are {width}x{height}."
            )
        yield from (f"{name}: {problem}" for problem in broken)


def sample_figure(splits: Mapping[str, Dataset], open_row: OpenRow, num_images: int = 10) -> Figure:
    """Images from all over the data set, with their captions."""
    places = [(dataset, i) for dataset in splits.values() for i in range(len(dataset))]
    images, captions = [], []
    chosen = random.Random(0).sample(places, len(places))  # more than are shown, for some may be broken
    for dataset, index in chosen:
        row = dataset[index]
        try:
            images.append(open_row(row))
        except ValueError:
            continue
        captions.append("\n– ".join([row["image_id"], *row["captions"]]))
        if len(images) == num_images:
            break
    return captions_figure(images, captions, columns=3)


def main(argv: Sequence[str]) -> None:
    """Look into a data set."""
    arguments = parse(argv)
    inspect(arguments.path, format=arguments.format, picture=arguments.picture)


def inspect(
    path: str, *, format: str | None = None, picture: str | None = None, report: Callable[[str], None] = print
) -> None:
    """Report what is in a data set and what looks wrong, all of it by name.

    Args:
        path: as `load_captions` takes it.
        format: as it takes it.
        picture: file for a picture of ten images with their captions.
        report: called with each line.

    Raises:
        ValueError: nothing can be read.
    """
    damage = Damage(report, skip_broken=True, names_shown=None)
    if path in DATASETS.names():
        splits = load_captions(path)
    else:
        splits = _chosen(_load(path, format, False, damage), None, path, damage)
    rows = {str(name): undecoded(dataset) for name, dataset in splits.items()}
    for line in (*count_lines(rows), *near_empty_lines(rows)):
        report(line)
    for line in image_lines(rows, open_row):
        report(line)
    if picture is not None:
        sample_figure(rows, open_row).savefig(picture)
        report(f"Picture: {picture}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = CommandParser(
        prog="hf-captioner inspect",
        description="Say what a data set was taken for, how many images and captions it has, how long these are, how "
        "large a vocabulary, and name files that are missing or broken, near-empty captions, and images in two splits.",
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="name of a data set, a folder or file, or an id on the Hub")
    add("--format", "--dataset_format", help=f"one of {', '.join(LAYOUTS)}; recognised by default")
    add("--picture", metavar="FILE", help="write a picture of ten images with their captions")
    return parser.parse_args(argv)
