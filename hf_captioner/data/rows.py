"""Rows of a captioned data set: checking their captions, and opening their images one at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import first_line
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.images import OpenedImage, Size, open_image

Row = dict[str, Any]
AnyDataset = TypeVar("AnyDataset", bound=Dataset | IterableDataset)

logger = logging.getLogger(__name__)


def check_captions(
    dataset: Dataset, *, skip_broken: bool = False, report: Callable[[str], None] = logger.warning
) -> Dataset:
    """Refuse captions without a word and images without a caption, or remove them and report each image concerned.

    Raises:
        ValueError: A caption is empty, or an image has none, and `skip_broken` is False.
    """
    captions = dataset["captions"][:]
    kept = [[caption for caption in row if re.search(r"\w", caption or "")] for row in captions]
    if kept == captions and all(kept):
        return dataset
    names = dataset["image_id"][:]
    for name, before, after in zip(names, captions, kept, strict=True):
        if before == after and after:
            continue
        counts = f"{len(before) - len(after)} empty of {len(before)} captions"
        problem = f"Image {name!r} of split {dataset.split} has {counts}"
        if not skip_broken:
            raise ValueError(f"{problem}. Every caption needs a word: fix the data, or go on with --skip_broken.")
        report(f"{problem}: left out.")
    dataset = dataset.remove_columns("captions").add_column("captions", kept)
    return dataset.select([i for i, row in enumerate(kept) if row])


def drop_broken_images(dataset: Dataset, *, report: Callable[[str], None] = logger.warning) -> Dataset:
    """Open every image once, return the rows whose images can be read, and report each of the others in a line."""
    kept = []
    for index, row in enumerate(tqdm(undecoded(dataset), desc="Checking images", leave=False, disable=None)):
        try:
            open_row(row)
        except ValueError as e:
            report(f"Left out: {first_line(e)}")
        else:
            kept.append(index)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def undecoded(dataset: AnyDataset, column: str = "image") -> AnyDataset:
    """Return the same rows with each image as its file, `{"bytes": …, "path": …}`, for `open_row` to open later."""
    return dataset.cast_column(column, ImageFeature(decode=False))


def open_row(row: Row, *, used_size: Callable[[int, int], Size] | None = None) -> Image:
    """Open the image of one row of a data set that `undecoded` returned; for `used_size` see `open_image`.

    Raises:
        ValueError: The image can't be read. The error contains the image's id.
    """
    with image_file(row) as file:
        return open_image(file, used_size=used_size)


def read_pixels(rows: Sequence[Row], image_processor: CaptionerImageProcessor) -> Tensor:
    """Open and preprocess the images of undecoded rows, and return their pixel values `(B, 3, H, W)`.

    Raises:
        ValueError: An image can't be read. The error contains the image's id.
    """

    def opened(row: Row) -> OpenedImage:
        with image_file(row) as file:
            return image_processor.open(file)

    return image_processor.read(rows, opened)[0]


@contextmanager
def image_file(row: Row) -> Iterator[Any]:
    """Yield the bytes or the path of a row's image, or the image itself if the row holds it.

    Errors raised while it is read get the image's id.
    """
    file = row["image"]
    if isinstance(file, dict):
        file = file["bytes"] if file["bytes"] is not None else file["path"]
    try:
        if file is None:
            raise ValueError("there is none.")
        yield file
    except (ValueError, OSError) as e:
        raise ValueError(
            f"Image {row.get('image_id')!r} can't be read: {first_line(e)} "
            "Mend or remove it, or go on without it with --skip_broken."
        ) from e


def select_usable_rows(
    dataset: Dataset,
    *,
    max_images: int | None = None,
    skip_broken: bool = False,
    report: Callable[[str], None] = logger.warning,
) -> Dataset:
    """Return the rows of a split to train or evaluate on: checked, with images that are not yet decoded.

    Args:
        dataset: Split as `load_captions` returns it.
        max_images: Number of images from the start of the split to use; None for all.
        skip_broken: Remove and report what can't be used: see `check_captions` and `drop_broken_images`.
        report: Function called with each message.

    Raises:
        ValueError: A caption is empty, or an image has none, and `skip_broken` is False.
    """
    if max_images is not None:
        dataset = dataset.select(range(min(max_images, len(dataset))))
    dataset = check_captions(dataset, skip_broken=skip_broken, report=report)
    return undecoded(drop_broken_images(dataset, report=report) if skip_broken else dataset)
