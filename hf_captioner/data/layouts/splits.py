"""Splits of a data set: canonical names, creation of missing splits, and search for images that are in two splits."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ...model.images import is_url
from .damage import join_names, shortened

Splits = Mapping[str, Dataset | IterableDataset]  # by the names of splits

CANONICAL_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Digests of images are dealt out to ten classes: these become splits that are missing, the others are for training.
TENTHS = {"validation": 8, "test": 9}


def canonical_split(name: str) -> str:
    """Return the canonical form of a split's name: `val` and `dev` become `validation`; unknown names stay."""
    return CANONICAL_NAMES.get(name.strip().lower(), name.strip())


def checked_split(name: str, location: str) -> str:
    """Return the canonical form of a split's name, or raise a ValueError if no split can have this name."""
    split = canonical_split(name)
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"{location}, has the split {shortened(name)}; names of splits are letters and digits.")
    return split


def split_in_path(path: str) -> str | None:
    """Return the split that a folder's or file's name contains, as in `train/a.csv` or `captions_val2014.json`."""
    for part in path.lower().split("/"):
        for word in re.findall(r"[a-z]+", part):
            if word in CANONICAL_NAMES:
                return CANONICAL_NAMES[word]
    return None


def missing_splits(present: Collection[str | None], report: Callable[[str], None]) -> list[str]:
    """Return the splits that must be made from training images, and report them in a line.

    These are none if there is a validation split; otherwise validation, and test unless it is there.
    """
    if "validation" in present or not {"train", None} & set(present):
        return []
    missing = [name for name in TENTHS if name not in present]
    report(
        f"There is no {' and no '.join(missing)} split: {'each' if len(missing) > 1 else 'it'} is made of a tenth of "
        "the training images, chosen by a digest of each image, so always the same ones."
    )
    return missing


def assign_split(image: str | bytes, missing: Collection[str]) -> str:
    """Assign a training image to one of the missing splits or to `train`, by the digest of its id or bytes alone."""
    return next((name for name in missing if TENTHS[name] == int.from_bytes(_short_digest(image), "big") % 10), "train")


def assign_splits(images: Iterable[str], missing: Collection[str]) -> list[str]:
    """Return the split of each training image in a data set that lacks the splits `missing`.

    Each image is assigned by `assign_split`; if there are enough images, no split is left empty.
    """
    images = list(images)
    splits = [assign_split(image, missing) for image in images]
    by_digest = sorted(range(len(images)), key=lambda i: _short_digest(images[i]))
    for name in ("train", *missing):
        donor = "train" if splits.count("train") > 1 else max(missing, key=splits.count, default="train")
        if name not in splits and splits.count(donor) > 1:
            splits[next(i for i in by_digest if splits[i] == donor)] = name
    return splits


def _short_digest(image: str | bytes) -> bytes:
    """Return a digest of an image's id or bytes by which images are assigned to splits."""
    return hashlib.blake2b(image.encode() if isinstance(image, str) else image, digest_size=8).digest()


class Leak(NamedTuple):
    """Images that are in two splits, as pairs of their ids in the first and in the second split."""

    splits: tuple[str, str]
    same_bytes: list[tuple[str, str]]
    same_name: list[tuple[str, str]]  # same file name but other bytes

    def lines(self, limit: int | None = None) -> list[str]:
        """Describe the leak in one line for each kind, with at most `limit` pairs of names."""
        kinds = (
            ("the same bytes", self.same_bytes, "Scores on one of them are not scores on unseen images."),
            ("the same file name but other bytes", self.same_name, "They may be the same photographs."),
        )
        lines = []
        for kind, pairs, hint in kinds:
            names = [first if first == second else f"{first} = {second}" for first, second in pairs]
            if names:
                splits = " and ".join(self.splits)
                lines.append(f"Leak: {len(names)} images of {splits} have {kind} ({join_names(names, limit)}). {hint}")
        return lines


def find_leaks(splits: Mapping[str, Dataset]) -> list[Leak]:
    """Find images that are in two splits, by their bytes and file names; the rows must be undecoded.

    Files of different sizes differ, so only files of equal size are read.
    """
    files = {name: _ImageFiles(dataset) for name, dataset in splits.items()}
    leaks = []
    for first, second in combinations(files, 2):
        one, other = files[first], files[second]
        sizes = {*one.sizes} & {*other.sizes} - {None}
        same_bytes = _equal_pairs(one.digests_of_sizes(sizes), other.digests_of_sizes(sizes))
        known = {j for _, j in same_bytes}
        same_name = [(i, j) for i, j in _equal_pairs(one.names, other.names) if j not in known]
        if same_bytes or same_name:
            ids = [[(one.ids[i], other.ids[j]) for i, j in pairs] for pairs in (same_bytes, same_name)]
            leaks.append(Leak((first, second), *ids))
    return leaks


class _ImageFiles:
    """Ids, file names, file sizes and digests of a split's images, known without decoding them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.ids = [str(name) for name in dataset["image_id"][:]]
        lengths, paths = image_files(dataset)
        self.sizes = [
            length if length is not None else _file_size(path or "")
            for length, path in zip(lengths, paths, strict=True)
        ]
        self.names = [os.path.basename(path or name) for path, name in zip(paths, self.ids, strict=True)]
        if len(set(self.names)) < len(self.names):  # names that repeat within a split identify no image
            self.names = list(self.ids)
        self._digests: dict[int, bytes] = {}

    def digests_of_sizes(self, sizes: Collection[int | None]) -> list[bytes | None]:
        """Return the digests of the images with one of these file sizes, None for others; each image is read once."""
        for index, size in enumerate(self.sizes):
            if size in sizes and index not in self._digests:
                self._digests[index] = image_digest(self.dataset[index]["image"])
        return [self._digests.get(index) if size in sizes else None for index, size in enumerate(self.sizes)]


def _equal_pairs(one: Sequence[Hashable], other: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return pairs of indices of equal values, one for each value of `other` that is in `one` and not None."""
    first = {value: index for index, value in reversed([*enumerate(one)])}
    return sorted((first[value], j) for j, value in enumerate(other) if value is not None and value in first)


def _file_size(path: str) -> int | None:
    """Return the size of a file in bytes, or None without the file; opening it will report the error."""
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def image_files(dataset: Dataset) -> tuple[list[int | None], list[str | None]]:
    """Return the number of bytes and the path of each image, None where there is none, without reading the bytes."""
    images = dataset.with_format("arrow")[:]["image"] if dataset._indices else dataset.data["image"]
    lengths = pc.binary_length(pc.struct_field(images, "bytes"))
    return lengths.to_pylist(), pc.struct_field(images, "path").to_pylist()


def image_digest(image: Mapping[str, Any]) -> bytes:
    """Return the digest of the bytes of an undecoded image, that of its address for an image on the web."""
    content, path = image["bytes"], image["path"]
    if content is None and not is_url(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).digest()
    return hashlib.blake2b(path.encode() if content is None else content, digest_size=16).digest()
