"""Data sets from files that list captions: find the listed images, gather their captions, divide them into splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, NamedSplit

from .annotation_files import ReadRecords, Record
from .caption_columns import clean_captions
from .damage import LONGEST_NAME, Damage, located
from .image_folder import ImageFolder
from .splits import Splits, assign_splits, missing_splits
from .stored_rows import row_features

Rows = dict[tuple[str | None, str], dict[str, Any]]  # by split, None if files name none, and image id


def read_listing(
    read_records: ReadRecords, folder: ImageFolder, files: list[str], damage: Damage, streaming: bool
) -> Splits:
    """Read files that list captions of images in the same folder, by a reader such as those in `annotation_files.py`.

    Raises:
        ValueError: Something is broken, or none of the listed images is there.
    """
    rows = _gather_rows(folder, files, read_records(folder, files, damage), damage)
    splits: dict[str, Dataset | IterableDataset] = {}
    for name, split_rows in _divide(folder, rows, damage).items():
        columns = {column: [row[column] for row in split_rows] for column in ("image", "captions", "image_id")}
        dataset = Dataset.from_dict(columns, features=row_features(), split=NamedSplit(name))
        splits[name] = dataset.to_iterable_dataset(min(64, len(dataset))) if streaming else dataset
    return splits


def _gather_rows(folder: ImageFolder, files: list[str], records: Iterable[Record], damage: Damage) -> Rows:
    """Find the image of each record, and gather all captions of an image in one row."""
    rows: Rows = {}
    numbers: set[tuple[str | None, str, int]] = set()
    missing_images: dict[str, None] = {}
    for record in records:
        with damage.skipping():
            with located(record.location):
                image = folder.find(record.image, record.folder)
            if image is None:
                missing_images[record.image[:LONGEST_NAME]] = None
                continue
            is_unique = folder.has_distinct_names and image in folder.images
            name = record.image_id or (os.path.basename(image) if is_unique else image)
            with located(record.location):
                name.encode()  # raises a ValueError for half a character
            captions = clean_captions(record.captions, record.location, damage)
            row = rows.setdefault((record.split, name), {"image": image, "captions": [], "image_id": name})
            number = (record.split, name, -1 if record.number is None else record.number)
            if row["image"] != image or (record.number is not None and number in numbers):
                which = "" if not record.number else f" with caption number {record.number}"
                raise ValueError(f"{record.location}: the image {name!r}{which} occurs twice.")
            numbers.add(number)
            row["captions"] += captions
    for name in missing_images:
        damage.repaired(f"{files[0]}: listed images that are missing, left out", name)
    if not rows:
        damage.report_repairs()
        raise ValueError(
            f"None of the images that {files[0]} lists is in {str(folder.root)!r}. Put them there, unpacked."
        )
    report_odd_counts({name: row["captions"] for (_, name), row in rows.items()}, damage)
    for name in sorted(folder.images.keys() - {row["image"] for row in rows.values()}):
        damage.repaired("Images without a caption, left out", name)
    return rows


def report_odd_counts(captions: Mapping[str, Sequence[str]], damage: Damage) -> None:
    """Report the images with more or fewer captions than most others, as they have if lines were lost or doubled.

    Args:
        captions: Captions by image id.
        damage: Collector of what is reported.
    """
    counts = Counter(len(of_image) for of_image in captions.values())
    usual, num_images = counts.most_common(1)[0] if counts else (0, 0)
    if 2 * num_images > len(captions):
        for name, of_image in captions.items():
            if len(of_image) != usual:
                damage.repaired(f"Images with another number of captions than {usual}, as most have", name)
    for name, of_image in captions.items():
        if len(set(of_image)) < len(of_image):
            damage.repaired("Images with the same caption twice", name)


def _divide(folder: ImageFolder, rows: Rows, damage: Damage) -> Mapping[str, list[dict[str, Any]]]:
    """Divide rows into splits, those that are missing included, and give images their absolute paths."""
    present: set[str | None] = {split for split, _ in rows if split is not None} or {None}
    missing = missing_splits(present, damage.report)
    source = "train" if "train" in present else None  # the split from whose images missing ones are made
    candidates = [name for split, name in rows if missing and split == source]
    assigned = dict(zip(candidates, assign_splits(candidates, missing), strict=True))
    splits: dict[str, list[dict[str, Any]]] = {}
    for (split, name), row in rows.items():
        target = assigned.get(name, split) if split == source else split
        if target is None:
            damage.repaired("Images with captions that are in no split, left out", name)
            continue
        path = folder.absolute(row["image"])
        splits.setdefault(target, []).append({**row, "image": {"bytes": None, "path": path}})
    usual_order = [*(name for name in ("train", "validation", "test") if name in splits), *sorted(splits)]
    return {name: splits[name] for name in dict.fromkeys(usual_order)}
