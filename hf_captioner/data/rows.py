"""Rows of a captioned data set: checked, and their images opened one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..errors import first_line
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.images import OpenedImage, Size, open_image

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from PIL.Image import Image

Row = dict[str, Any]
AnyDataset = TypeVar("AnyDataset", bound="Dataset | IterableDataset")


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
