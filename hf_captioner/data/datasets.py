"""Captioned photographs: data sets by name, path or id, and how they become batches.

A part is a function `(split=None, **kwargs)` that returns a `datasets.Dataset` with the columns `image`, `captions`
(a list of strings) and `image_id`, or for `split=None` a `datasets.DatasetDict` of all its splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.registry import Registry
from .layouts import Splits, load_layout
from .layouts.damage import Damage
from .layouts.splits import find_leaks, split_of
from .layouts.stored_tables import read_hub
from .rows import undecoded

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


DATASETS = Registry(
    "datasets",
    {"flickr8k": f"{__name__}:load_flickr8k", "shapes": "hf_captioner.data.shapes:load_shapes"},
)


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
