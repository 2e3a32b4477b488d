"""Data sets of captioned images, by name, path or id on the Hub.

A data set is, like an encoder or a decoder, a named component that other packages can add: a function
`(split=None, **kwargs)` that returns a `datasets.Dataset` with the columns `image`, `captions` (a list of strings) and
`image_id`, or for `split=None` a `datasets.DatasetDict` of all its splits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ..model.registry import Registry
from .layouts import load_layout
from .layouts.damage import NAMES_SHOWN, Damage
from .layouts.splits import Splits, canonical_split, find_leaks
from .layouts.stored_tables import read_hub
from .rows import undecoded

logger = logging.getLogger(__name__)

DATASETS = Registry(
    "datasets", {"flickr8k": f"{__name__}:load_flickr8k", "shapes": "hf_captioner.data.shapes:load_shapes"}
)


def load_captions(
    name_or_path: str,
    split: str | None = None,
    *,
    format: str | None = None,
    streaming: bool = False,
    skip_broken: bool = False,
    allow_urls: bool = False,
    allow_outside: bool = False,
    names_shown: int | None = NAMES_SHOWN,
    report: Callable[[str], None] = logger.warning,
    **kwargs: Any,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load a data set of captioned images.

    Whoever needs several splits loads all of them in one call and picks from the dict that it returns (`pick_split`):
    each call reads the whole folder, compares its splits and reports what is wrong with them.

    The layout of a folder or file is the first one of `layouts.LAYOUTS` that fits, and it is reported. Missing
    validation and test splits are made from training images, always from the same ones.

    Args:
        name_or_path: Name in `DATASETS` (`"shapes"`, `"flickr8k"`), path of a folder or of a file in it, or id of a
            data set on the Hub with a column of images and one or more columns of captions.
        split: Name of the split to return; None for all splits. `dev` and `val` are `validation`.
        format: Key of `LAYOUTS`, for a folder that several layouts fit.
        streaming: Return an `IterableDataset`, which reads rows one after the other and needs little memory.
        skip_broken: Leave out files and rows that can't be read, and report them, instead of raising an error. Images
            are not opened yet: see `drop_broken_images`.
        allow_urls: Open images that the data set names by http and https addresses, which are refused by default:
            whoever made the data set then decides where requests go.
        allow_outside: Follow paths and links that lead out of the folder, which are refused by default.
        names_shown: Largest number of names in one line of the report; None for no limit.
        report: Function that is called with each line about the data set: its layout, damage that was repaired, missing
            images, images that are in two splits. By default lines are logged as warnings.
        kwargs: Further arguments of a named data set. The options above are passed to those that accept them.

    Returns:
        One split with the columns `image`, `captions` and `image_id`, or a dict of all splits.

    Raises:
        ValueError: The name, the format or the split is unknown, columns are missing, or a file is broken.
        FileNotFoundError: There is nothing at this path.
    """
    access = {"allow_urls": allow_urls, "allow_outside": allow_outside}
    options = {"streaming": streaming, "skip_broken": skip_broken, "names_shown": names_shown, "report": report}
    if name_or_path in DATASETS.names():
        if format is not None:
            raise ValueError(f"{name_or_path!r} is a data set's name; a format goes with a folder or a file.")
        if Path(name_or_path).exists():
            report(f"{name_or_path!r} is the data set of this name; for the local folder, give './{name_or_path}'.")
        return _load_part(name_or_path, split, options | access, kwargs)
    if kwargs:
        raise ValueError(f"Unknown arguments: {', '.join(kwargs)}. Only named data sets take further ones.")
    damage = Damage(report, skip_broken=skip_broken, names_shown=names_shown)
    splits = _read_path(name_or_path, format, streaming, damage, access)
    chosen = None if split is None else pick_split(splits, split, name_or_path)
    loaded = {name: dataset for name, dataset in splits.items() if isinstance(dataset, Dataset)}
    for leak in find_leaks({name: undecoded(dataset) for name, dataset in loaded.items()}):
        for line in leak.lines(names_shown):
            report(line)
    if chosen is not None:
        return chosen
    return DatasetDict(loaded) if loaded else IterableDatasetDict(splits)


def pick_split(splits: Mapping[str, Any], name: str, source: str) -> Any:
    """Return one of the splits of the data set `source`, which the error names; `dev` and `val` are `validation`.

    Raises:
        ValueError: There is no such split.
    """
    found = name if name in splits else canonical_split(name)
    if found not in splits:
        raise ValueError(f"{source!r} has no split {name!r}. It has: {', '.join(splits)}.")
    return splits[found]


def load_flickr8k(
    split: str | None = None,
    *,
    path: str = "jxie/flickr8k",
    streaming: bool = False,
    report: Callable[[str], None] = logger.warning,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load Flickr8k (Hodosh, Young and Hockenmaier 2013) in the form of the Hub's `jxie/flickr8k`.

    `path` is the id on the Hub of this data set or of a copy. The other arguments are those of `load_captions`.

    Raises:
        ValueError: There is no such split, or the data set can't be reached.
    """
    return load_captions(path, split, streaming=streaming, report=report)


def _load_part(name: str, split: str | None, options: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the function of a named data set with the options that it accepts, and stream its result on request."""
    part = DATASETS.get(name)
    parameters = signature(part).parameters
    accepted = {option: value for option, value in options.items() if option in parameters}
    loaded = part(split, **accepted, **kwargs)
    if not options["streaming"] or "streaming" in accepted:
        return loaded
    if isinstance(loaded, Dataset):
        return loaded.to_iterable_dataset()
    return IterableDatasetDict({name: dataset.to_iterable_dataset() for name, dataset in loaded.items()})


def _read_path(path: str, format: str | None, streaming: bool, damage: Damage, access: Mapping[str, bool]) -> Splits:
    """Read all splits of a folder, a file or a data set on the Hub."""
    if Path(path).exists():
        return load_layout(path, damage, format=format, streaming=streaming, **access)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        if "/" in path or "\\" in path:
            raise FileNotFoundError(f"No data set at {path!r}. Give a folder that exists.")
        DATASETS.get(path)  # raises an error that lists the known names
    return read_hub(path, damage, streaming, **access)
