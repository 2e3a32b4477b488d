"""Splits by whatever name, splits made where they are absent, and images that are in two of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from .damage import listed

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Tenths of the images that a split gets which is absent; the others are for training.
TENTHS = {"validation": 8, "test": 9}


def split_of(value: str) -> str:
    """A split's name by that of a file's or column's: `val` and `dev` are `validation`; others stay."""
    return NAMES.get(value.strip().lower(), value.strip())


def split_in(path: str) -> str | None:
    """The split that a path names in a folder or in its file's name: `train/a.csv`, `captions_val2014.json`."""
    for part in path.lower().split("/"):
        for word in re.findall(r"[a-z]+", part):
            if word in NAMES:
                return NAMES[word]
    return None


def absent_splits(present: Collection[str | None]) -> list[str]:
    """The splits to make from training images: validation where there is none, and then test likewise."""
    if "validation" in present or not {"train", None} & set(present):
        return []
    return [name for name in TENTHS if name not in present]


def made_split(image: str | bytes, absent: Collection[str]) -> str:
    """The split of an image, by a digest of its id or bytes: the same each time, whatever other images there are."""
    digest = hashlib.blake2b(image.encode() if isinstance(image, str) else image, digest_size=8).digest()
    tenth = int.from_bytes(digest, "big") % 10
    return next((name for name in absent if TENTHS[name] == tenth), "train")


def made_splits(images: Iterable[str], absent: Collection[str]) -> list[str]:
    """`made_split` of each, but that no split stays empty where there are enough images for all."""
    images = list(images)
    splits = [made_split(image, absent) for image in images]
    in_turn = sorted(range(len(images)), key=lambda i: hashlib.blake2b(images[i].encode(), digest_size=8).digest())
    for name in absent:
        if name not in splits and splits.count("train") > 1:
            splits[next(i for i in in_turn if splits[i] == "train")] = name
    return splits


def said_of_made(absent: Collection[str]) -> str:
    """A line about them."""
    return (
        f"There is no {' and no '.join(absent)} split: made of {' and '.join(['a tenth'] * len(absent))} of the "
        "training images, by a digest of each image, so the same ones each time."
    )


class Leak(NamedTuple):
    """Images that two splits share."""

    splits: tuple[str, str]
    same_bytes: list[tuple[str, str]]  # ids in the one and in the other
    same_name: list[tuple[str, str]]  # of the same file name but other bytes

    def lines(self, limit: int | None = None) -> list[str]:
        """A line for each kind."""
        where = " and ".join(self.splits)
        kinds = (
            ("the same bytes", self.same_bytes, "Scores on the one are not those of unseen images."),
            ("the same file name but other bytes", self.same_name, "They may be the same photographs."),
        )
        return [
            f"Leak: {len(pairs)} images of {where} have {what} ({listed(list(map(_pair, pairs)), limit)}). {hint}"
            for what, pairs, hint in kinds
            if pairs
        ]


def _pair(names: tuple[str, str]) -> str:
    return names[0] if names[0] == names[1] else f"{names[0]} = {names[1]}"


def find_leaks(splits: Mapping[str, Dataset]) -> list[Leak]:
    """Images that are in two splits, by their files' names and by their bytes.

    Only files of equal size are read.

    Args:
        splits: undecoded rows.
    """
    files = {name: _Files(dataset) for name, dataset in splits.items()}
    leaks = []
    for one, other in combinations(files, 2):
        same_bytes = files[one].pairs(files[other], "sizes", "digest")
        known = set(same_bytes)
        same_name = [pair for pair in files[one].pairs(files[other], "names") if pair not in known]
        ids = [[(files[one].ids[i], files[other].ids[j]) for i, j in pairs] for pairs in (same_bytes, same_name)]
        if same_bytes or same_name:
            leaks.append(Leak((one, other), *ids))
    return leaks


class _Files:
    """What can be told of a split's images without decoding them."""

    def __init__(self, dataset: Dataset) -> None:
        import pyarrow.compute as pc

        self.dataset = dataset
        self.ids = [str(name) for name in dataset["image_id"][:]]
        # The lengths of bytes in a table are known without reading them.
        images = dataset.with_format("arrow")[:]["image"] if dataset._indices else dataset.data["image"]
        lengths = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        self.sizes = [
            length if length is not None else _size(path) for length, path in zip(lengths, paths, strict=True)
        ]
        self.names = [os.path.basename(path or name) for path, name in zip(paths, self.ids, strict=True)]
        if len(set(self.names)) < len(self.names):  # several images of one split share a name: names tell nothing
            self.names = list(self.ids)
        self._digests: dict[int, bytes] = {}

    def digest(self, index: int) -> bytes:
        if index not in self._digests:
            image = self.dataset[index]["image"]
            self._digests[index] = image_digest(image)
        return self._digests[index]

    def pairs(self, other: _Files, key: str, confirm: str | None = None) -> list[tuple[int, int]]:
        """Rows of this and of the other split that agree."""
        places: dict[Any, list[int]] = defaultdict(list)
        for index, value in enumerate(getattr(other, key)):
            places[value].append(index)
        return [
            (index, twin)
            for index, value in enumerate(getattr(self, key))
            if value is not None
            for twin in places.get(value, ())
            if confirm is None or self.digest(index) == other.digest(twin)
        ]


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:  # a broken file is reported by those who open it
        return None


def image_digest(image: Mapping[str, Any]) -> bytes:
    """Of the bytes of an undecoded image."""
    content = image["bytes"]
    if content is None:
        with open(image["path"], "rb") as file:
            content = file.read()
    return hashlib.blake2b(content, digest_size=16).digest()
