"""Rows of stored data sets: bringing them to a common form, checking where their images are, and dividing them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, Features, List, NamedSplit, Value
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError

from ..rows import undecoded
from .caption_columns import Columns, captions_in_row, clean_captions
from .damage import Damage, located, shortened
from .image_folder import ImageFolder
from .splits import assign_splits, image_digest, image_files

Resolve: TypeAlias = Callable[[str], str]  # from an image's path or URL to that at which it may be opened


def row_features() -> Features:
    """Return the columns of a captioned data set and their types."""
    return Features({"image": ImageFeature(), "captions": List(Value("string")), "image_id": Value("string")})


def generate(rows: Callable[..., Iterator[dict[str, Any]]], split: str, arguments: dict[str, Any]) -> Dataset:
    """Copy the rows of a generator into the cache of `datasets`, unless it has those of equal arguments already.

    Rows have the columns of a captioned data set and `location`, where they are from.
    """
    # As an image, bytes would be thrown away if there is a file on this machine at the path that comes with them.
    stored = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({**row_features(), "image": stored, "location": Value("string")})
    try:
        dataset = Dataset.from_generator(rows, features=features, gen_kwargs=arguments, split=NamedSplit(split))
        return dataset.cast_column("image", ImageFeature())
    except DatasetGenerationError as e:
        if isinstance(e.__cause__, ValueError | OSError):  # of the generator, or of a full disk
            raise e.__cause__ from e
        raise


def file_stamps(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the sizes and times of files, by which the cache of `datasets` tells changed files from known ones."""
    return tuple(f"{status.st_size} {status.st_mtime_ns}" for status in map(os.stat, paths))


def build_row(
    row: Mapping[str, Any],
    columns: Columns,
    location: str,
    default_id: str,
    damage: Damage,
    resolve: Resolve | None,
) -> dict[str, Any]:
    """Bring a row to the columns `image`, `captions` and `image_id`; raise a ValueError if it is broken."""
    with located(location):
        captions = captions_in_row(row, columns.captions)
        image = _image_in_value(row[columns.image]) if columns.image in row else None
        if image and not image["bytes"]:
            image = {"bytes": None, "path": resolve(image["path"] or "") if resolve else image["path"]}
    captions = clean_captions(captions, location, damage)
    image_id = None if columns.image_id is None else row[columns.image_id]
    return {"image": image, "captions": captions, "image_id": default_id if image_id is None else str(image_id)}


def in_stream(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for a stream, in which `datasets` would open a path that comes with bytes, if it exists."""
    image = row["image"]
    return {**row, "image": {"bytes": image["bytes"], "path": None}} if image["bytes"] else row


def _image_in_value(value: Any) -> dict[str, Any]:
    """Return the image in one value of a table as `{"bytes": …, "path": …}`, one of which may be None."""
    if isinstance(value, list):  # numbers of pixels
        try:
            value = ImageFeature().encode_example(np.asarray(value))
        except Exception as e:  # numpy and Pillow raise several errors for what is no image
            raise ValueError(f"a list of {len(value)} values is no image.") from e
    if isinstance(value, bytes):
        value = {"bytes": value}
    elif isinstance(value, str):
        value = {"path": value}
    content, path = (value.get(name) for name in ("bytes", "path")) if isinstance(value, Mapping) else (None, None)
    is_known = value is None or isinstance(value, Mapping)
    if not is_known or not isinstance(content, bytes | None) or not isinstance(path, str | None):
        raise ValueError(f"{shortened(str(value))} is no image.")
    return {"bytes": content, "path": path}


def resolver(folder: ImageFolder) -> Resolve:
    """Return a function that finds images of a folder by their names."""
    return partial(_resolve_in_folder, folder)


def _resolve_in_folder(folder: ImageFolder, name: str) -> str:
    """Return the absolute path or the URL of an image; raise a ValueError if it may not be opened, or is missing."""
    if not name:
        raise ValueError("there is no image.")
    found = folder.find(name)
    if found is None:
        raise ValueError(f"the image {shortened(name)} is not in {str(folder.root)!r}.")
    return folder.absolute(found)


def resolve_images(dataset: Dataset, locations: Sequence[str], damage: Damage, resolve: Resolve) -> Dataset:
    """Check the paths of images that are not stored as bytes; refuse or leave out rows without an image.

    Args:
        dataset: Rows with a column `image`.
        locations: Where each row is from, for messages.
        damage: Collector of what is refused.
        resolve: Function that checks a path or URL, and returns that at which the image may be opened.
    """
    lengths, paths = image_files(dataset)
    resolved: dict[int, str] = {}
    broken = set()
    for index in (i for i, length in enumerate(lengths) if not length):
        broken.add(index)
        with damage.skipping(), located(locations[index]):
            resolved[index] = resolve(paths[index] or "")
            broken.remove(index)
    if any(lengths[index] == 0 or paths[index] != path for index, path in resolved.items()):

        def with_paths(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            pairs = zip(rows["image"], indices, strict=True)
            return {"image": [{"bytes": None, "path": resolved[i]} if i in resolved else image for image, i in pairs]}

        dataset = undecoded(dataset).map(with_paths, with_indices=True, batched=True, batch_size=100)
        dataset = dataset.cast_column("image", ImageFeature())
    if len(broken) == len(dataset):
        raise ValueError(f"{locations[0] if locations else 'A data set'}: no image of this split can be read.")
    return dataset.select([i for i in range(len(dataset)) if i not in broken]) if broken else dataset


def with_missing(splits: Mapping[str, Dataset], missing: Sequence[str]) -> dict[str, Dataset]:
    """Add the splits that are missing, made of training images that are known by their bytes."""
    if not missing:
        return dict(splits)
    parts = divide_training(splits["train"], _image_digests(splits["train"]), missing)
    return {**splits, **parts}


def divide_training(dataset: Dataset, keys: Sequence[str], missing: Sequence[str]) -> dict[str, Dataset]:
    """Divide training images between `train` and the missing splits, by keys that identify the images."""
    assigned = assign_splits(keys, missing)
    parts = {}
    for name in ("train", *missing):
        parts[name] = dataset.select([i for i, split in enumerate(assigned) if split == name])
        parts[name]._split = NamedSplit(name)  # there is no public way
    return parts


def _image_digests(dataset: Dataset) -> list[str]:
    """Return the digest of each image's bytes; `datasets` keeps them in its cache."""

    def digest_row(row: dict[str, Any]) -> dict[str, str]:
        return {"digest": image_digest(row["image"]).hex()}

    images = undecoded(dataset.select_columns("image"))
    return images.map(digest_row, remove_columns="image", desc="Reading images")["digest"][:]


def gather_and_check(dataset: Dataset, split: str, columns: Columns, source: str, damage: Damage) -> Dataset:
    """Gather the captions of images that have a row for each, and refuse or leave out images that occur twice."""
    num_rows = len(dataset)
    if len(columns.captions) == 1 and all(len(row) == 1 for row in dataset["captions"][:]):
        dataset = _gather_captions(dataset, columns.image_id is not None, source, damage)
    if columns.image_id is not None:
        return _drop_duplicates(dataset, split, source, damage)
    if len(dataset) == num_rows:
        return dataset
    names = [f"{split}-{index:06d}" for index in range(len(dataset))]
    return dataset.remove_columns("image_id").add_column("image_id", names)


def _gather_captions(dataset: Dataset, has_ids: bool, source: str, damage: Damage) -> Dataset:
    """Gather rows of one caption each into one row per image; rows of one image have the same bytes and id, if any."""
    digests = _image_digests(dataset)
    rows: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(dataset["image_id"][:] if has_ids else digests, digests, strict=True)):
        rows.setdefault(key, []).append(index)
    if len(rows) == len(dataset):
        return dataset
    damage.report(f"{source}: {len(dataset)} rows of one caption each are {len(rows)} images.")
    captions = dataset["captions"][:]
    gathered = [[caption for i in indices for caption in captions[i]] for indices in rows.values()]
    first = dataset.select([indices[0] for indices in rows.values()]).remove_columns("captions")
    return first.add_column("captions", gathered, feature=dataset.features["captions"])


def _drop_duplicates(dataset: Dataset, split: str, source: str, damage: Damage) -> Dataset:
    """Refuse or leave out rows whose image id an earlier row has."""
    first_rows: dict[str, int] = {}
    for index, name in enumerate(dataset["image_id"][:]):
        if first_rows.setdefault(name, index) != index:
            damage.broken(
                f"{source}: the image_id {name!r} occurs twice in {split}, in rows {first_rows[name]} and {index}."
            )
    return dataset if len(first_rows) == len(dataset) else dataset.select(list(first_rows.values()))
