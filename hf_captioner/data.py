"""Captioned photographs: data sets by name, path or id, and how they become batches.

    python -m hf_captioner.data inspect PATH --picture ten.png   # counts, words, and what looks wrong

A part is a function `(split=None, **kwargs)` that returns a `datasets.Dataset` with the columns `image`, `captions`
(a list of strings) and `image_id`, or for `split=None` a `datasets.DatasetDict` of all its splits.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import first_line
from .image_processing_captioner import CaptionerImageProcessor
from .images import OpenedImage, Size, open_image
from .inspection import count_lines, image_lines, near_empty_lines, sample_figure
from .layouts import LAYOUTS, Splits, load_layout
from .layouts.damage import Damage
from .layouts.splits import find_leaks, split_of
from .layouts.stored_tables import read_hub
from .registry import Registry

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from PIL.Image import Image

# The package imports this module before `python -m` runs it, of which Python warns; `main` is that of the package.
warnings.filterwarnings("ignore", f"'{__package__}.data' found in sys.modules", RuntimeWarning)

DATASETS = Registry(
    "datasets",
    {"flickr8k": f"{__name__}:load_flickr8k", "shapes": "hf_captioner.shapes:load_shapes"},
)

Row = dict[str, Any]
AnyDataset = TypeVar("AnyDataset", bound="Dataset | IterableDataset")


def load_captions(
    name_or_path: str,
    split: str | None = None,
    *,
    format: str | None = None,
    streaming: bool = False,
    skip_broken: bool = False,
    report: Callable[[str], None] = print,
    **kwargs: Any,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load captioned images by the name of a data set, a folder, a file, or an id on the Hub.

    A folder or file is taken for the first of the forms in `layouts.LAYOUTS` that fits; a line says which. Splits that
    are absent are made, by image, the same ones each time.

    Args:
        name_or_path: a name in `DATASETS` (`"shapes"`, `"flickr8k"`), a folder or a file of it, or a data set on the
            Hub with a column of images and one or more of captions.
        split: one split; None for all of them. `dev` and `val` are `validation`.
        format: a key of `LAYOUTS`, where a folder fits several.
        streaming: give rows one after the other (`IterableDataset`), in little memory however many there are.
        skip_broken: leave out what can't be read, naming each, rather than refuse the data set. Images are opened
            later: see `drop_broken_images`.
        report: called with a line for what the data set was taken for, and each thing that is wrong with it: damage
            that is mended, missing images, images in two splits.
        kwargs: further arguments of the part, which may also take `streaming`, `skip_broken` and `report`.

    Returns:
        A data set with `image`, `captions` and `image_id`, or a dict of splits.

    Raises:
        ValueError: an unknown name, format or split, other columns than expected, or broken files.
        FileNotFoundError: a path where there is nothing.
    """
    if name_or_path in DATASETS.names():
        if format is not None:
            raise ValueError(f"{name_or_path!r} is a data set's name; a format goes with a folder or a file.")
        part = DATASETS.get(name_or_path)
        taken = signature(part).parameters
        options = {"streaming": streaming, "skip_broken": skip_broken, "report": report}
        named = part(split, **{name: value for name, value in options.items() if name in taken}, **kwargs)
        return named if "streaming" in taken or not streaming else _stream(named)
    if kwargs:
        raise ValueError(f"Unknown arguments: {', '.join(kwargs)}. Only named data sets take further ones.")
    damage = Damage(report, skip_broken=skip_broken)
    return _chosen(_load(name_or_path, format, streaming, damage), split, name_or_path, damage)


def _load(path: str, format: str | None, streaming: bool, damage: Damage) -> Splits:
    """All splits of a folder or file, or a data set on the Hub."""
    if Path(path).exists():
        return load_layout(path, damage, format=format, streaming=streaming)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        if "/" in path or "\\" in path:
            raise FileNotFoundError(f"No data set at {path!r}. Give a folder that exists.")
        DATASETS.get(path)  # names the known ones
    return read_hub(path, damage, streaming)


def load_flickr8k(
    split: str | None = None,
    *,
    path: str = "jxie/flickr8k",
    streaming: bool = False,
    report: Callable[[str], None] = print,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Flickr8k (Hodosh, Young and Hockenmaier 2013) as the Hub's `jxie/flickr8k` has it.

    Args:
        split: `"train"`, `"validation"` or `"test"`; None for all.
        path: id on the Hub of it or a set like it.
        streaming: as `load_captions` has it.
        report: as `load_captions` has it.

    Raises:
        ValueError: no such split, or the data set can't be reached.
    """
    return load_captions(path, split, streaming=streaming, report=report)


def _chosen(
    splits: Splits, split: str | None, path: str, damage: Damage
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """One of the splits or all, and what is in two of them said."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    if split is not None and split_of(split) not in splits:
        raise ValueError(f"{path!r} has no split {split!r}. It has: {', '.join(splits)}.")
    loaded = {name: dataset for name, dataset in splits.items() if isinstance(dataset, Dataset)}
    for leak in find_leaks({name: undecoded(dataset) for name, dataset in loaded.items()}):
        for line in leak.lines(damage.names_shown):
            damage.report(line)
    if split is not None:
        return splits[split_of(split)]
    return DatasetDict(loaded) if loaded else IterableDatasetDict(splits)


def _stream(loaded: Dataset | DatasetDict) -> IterableDataset | IterableDatasetDict:
    from datasets import Dataset, IterableDatasetDict

    if isinstance(loaded, Dataset):
        return loaded.to_iterable_dataset()
    return IterableDatasetDict({name: dataset.to_iterable_dataset() for name, dataset in loaded.items()})


def check_captions(dataset: Dataset, *, skip_broken: bool = False, report: Callable[[str], None] = print) -> Dataset:
    """Refuse, or take out and report, images without captions and captions without a word.

    Args:
        dataset: as `load_captions` returns it.
        skip_broken: take them out, naming each, rather than refuse.
        report: called with a line for each caption taken out.

    Raises:
        ValueError: a caption is empty and `skip_broken` is False.
    """
    captions = dataset["captions"][:]
    kept = [[caption for caption in row if re.search(r"\w", caption or "")] for row in captions]
    if kept == captions and all(kept):
        return dataset
    names = dataset["image_id"][:]
    for name, before, after in zip(names, captions, kept, strict=True):
        if before == after and after:
            continue
        problem = (
            f"Image {name!r} of split {dataset.split} has {len(before) - len(after)} empty of {len(before)} captions"
        )
        if not skip_broken:
            raise ValueError(f"{problem}. Every caption needs a word: mend the data, or go on with --skip-broken.")
        report(f"{problem}: left out.")
    dataset = dataset.remove_columns("captions").add_column("captions", kept)
    return dataset.select([i for i, row in enumerate(kept) if row])


def undecoded(dataset: AnyDataset) -> AnyDataset:
    """The same rows with images as files (`{"bytes": …, "path": …}`), to be opened one by one, by name."""
    from datasets import Image as ImageFeature

    return dataset.cast_column("image", ImageFeature(decode=False))


def open_row(row: Row, *, used_size: Callable[[int, int], Size] | None = None) -> Image:
    """Open the image of one row of `undecoded` rows; for `used_size` see `open_image`.

    Raises:
        ValueError: the image can't be read; the error names it.
    """
    with _source(row) as source:
        return open_image(source, used_size=used_size)


def read_pixels(rows: Sequence[Row], image_processor: CaptionerImageProcessor) -> Tensor:
    """Pixel values `(B, 3, H, W)` of `undecoded` rows.

    Raises:
        ValueError: an image can't be read; the error names it.
    """

    def opened(row: Row) -> OpenedImage:
        with _source(row) as source:
            return image_processor.open(source)

    pixel_values = image_processor.empty(len(rows))
    image_processor.write(map(opened, rows), pixel_values)
    return pixel_values


@contextmanager
def _source(row: Row) -> Iterator[bytes | str]:
    """What the image of a row is opened from; errors on the way get its name."""
    file = row["image"]
    try:
        yield file["bytes"] if file["bytes"] is not None else file["path"]
    except (ValueError, OSError) as e:
        raise ValueError(
            f"Image {row['image_id']!r} can't be read: {first_line(e)} "
            "Mend or remove it, or go on without it with --skip-broken."
        ) from e


def drop_broken_images(dataset: Dataset, *, report: Callable[[str], None] = print) -> Dataset:
    """Open every image once and leave out those that can't be read, reporting each by name."""
    from tqdm.auto import tqdm

    kept = []
    for index, row in enumerate(tqdm(undecoded(dataset), desc="Checking images", leave=False)):
        try:
            open_row(row)
        except ValueError as e:
            report(f"Left out: {first_line(e)}")
        else:
            kept.append(index)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


class CaptionCollator:
    """Rows of a captioned data set to a batch: every image once, with all its captions.

    Args:
        processor: a `CaptionerProcessor`.
        cells: image cells computed earlier, `(images, P, C)`; rows then carry their `index`, and images stay shut.
        mirror: show every other image mirrored left to right; which ones is drawn by the `draw` that rows carry (see
            `loading.py`), or else by torch's generator.
        mirrored_cells: cells of the mirrored images; needed to mirror where there are cells.
        max_words: longer captions are cut, `<end>` included, so that one rambling caption does not stretch a batch.
        augment: crop images a little and change their brightness, contrast and saturation, as `draw` has it.

    Returns a dict with `labels` `(B, K, T)`, padded with -100; either `pixel_values` `(B, 3, H, W)` or `cells`
    `(B, P, C)`; and `index` `(B,)` if rows have one.
    """

    def __init__(
        self,
        processor: Any,
        *,
        cells: np.ndarray | None = None,
        mirror: bool = False,
        mirrored_cells: np.ndarray | None = None,
        max_words: int = 30,
        augment: bool = False,
    ) -> None:
        assert not mirror or (cells is None) == (mirrored_cells is None), "mirrored cells go with cells"
        self.processor = processor
        self.mirror = mirror
        self.mirrored_cells = mirrored_cells
        self.cells = cells
        self.max_words = max_words
        self.augment = augment and cells is None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate rows with `captions` and `image` or `index`, or both."""
        labels = self.processor(text=[row["captions"] for row in rows])["labels"]
        batch = {"labels": labels[..., : self.max_words]}
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        mirrored = torch.tensor([self.mirror and _generator(row).random() < 0.5 for row in rows])
        if self.cells is not None:
            views = (self.cells, self.cells if self.mirrored_cells is None else self.mirrored_cells)
            cells = np.stack([views[flag][row["index"]] for flag, row in zip(mirrored.tolist(), rows, strict=True)])
            return batch | {"cells": torch.from_numpy(cells).float()}
        image_processor = self.processor.image_processor
        if self.augment:
            pixel_values = image_processor([_augmented(row, image_processor) for row in rows])["pixel_values"]
        else:
            pixel_values = read_pixels(rows, image_processor)
        pixel_values[mirrored] = pixel_values[mirrored].flip(-1)
        return batch | {"pixel_values": pixel_values}


LEAST_CROP = 0.8  # share of an image's width, and of its height, that augmentation leaves at least


def _augmented(row: Row, image_processor: CaptionerImageProcessor) -> Image:
    """The image of a row as its draw has it."""
    from torchvision.transforms import v2

    def used_size(width: int, height: int) -> Size:
        """An image of which a part will be resized is used as if it were resized to more."""
        width, height = image_processor.resized_size(width, height)
        return math.ceil(width / LEAST_CROP), math.ceil(height / LEAST_CROP)

    image = open_row(row, used_size=used_size)
    with torch.random.fork_rng(devices=[]):  # what is drawn here is the image's own affair
        torch.manual_seed(int(_generator(row).integers(2**62)))
        sizes = torch.tensor([image.height, image.width]) * (LEAST_CROP + (1 - LEAST_CROP) * torch.rand(2))
        # Mild: what a caption names must stay in sight and keep its colour.
        change_colours = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        return change_colours(v2.RandomCrop(sizes.ceil().int().tolist())(image))


def _generator(row: Row) -> np.random.Generator:
    """What is drawn for an image as it is shown this once."""
    return np.random.default_rng(row["draw"] if "draw" in row else int(torch.randint(2**62, ())))


def main(argv: Sequence[str]) -> int:
    """Look into a data set; 2 if it can't be read."""
    arguments = parse(argv)
    try:
        inspect(arguments.path, format=arguments.format, picture=arguments.picture)
    except (ValueError, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


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
    parser = argparse.ArgumentParser(prog="python -m hf_captioner.data", description="Look into captioned images.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="counts, lengths, vocabulary, and what is missing, broken, near-empty or in two splits",
        description="Say what a data set was taken for, how many images and captions it has, how long these are, how "
        "large a vocabulary, and name files that are missing or broken, near-empty captions, and images in two splits.",
    )
    add = command.add_argument
    add("path", metavar="PATH", help="name of a data set, a folder or file, or an id on the Hub")
    add("--format", "--dataset_format", "--dataset-format", help=f"one of {', '.join(LAYOUTS)}; recognised by default")
    add("--picture", metavar="FILE", help="write a picture of ten images with their captions")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
