"""Data sets that `datasets` saved or loads from the Hub.

A row has its image as bytes, or as a path or URL. Whatever the latter lead to is checked before a data set is returned,
in a stream before a row is yielded, so that nobody who opens images has to check again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from datasets.features.features import require_decoding
from datasets.table import MemoryMappedTable, concat_tables

from ...errors import first_line
from ...model.images import is_url
from ..rows import undecoded
from .boundary import Boundary
from .caption_columns import Columns, captions_in_row, clean_captions, find_columns
from .damage import Damage, located, shortened
from .image_folder import ImageFolder
from .splits import assign_split, canonical_split, image_digest, missing_splits
from .stored_rows import (
    Resolve,
    build_row,
    gather_and_check,
    in_stream,
    resolve_images,
    resolver,
    row_features,
    with_missing,
)
from .text_files import read_json

AnyDataset: TypeAlias = Dataset | IterableDataset

END_OF_ARROW = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of a complete Arrow file as `datasets` writes it


def read_saved(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """Read one split or several that `save_to_disk` wrote.

    `load_from_disk` would open whatever files `state.json` and the types of columns name.
    """
    part, file = os.path.split(files[0])
    content = read_json(folder, files[0], damage)
    if file.lower() == "state.json":
        parts = {str(content.get("_split") or "train") if isinstance(content, dict) else "train": part}
    else:
        names = content.get("splits") if isinstance(content, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{files[0]} has no list of splits.")
        parts = {name: os.path.join(part, name) for name in names}
        for other in folder.beside("state.json"):
            if os.path.dirname(os.path.dirname(other)) == part and os.path.dirname(other) not in parts.values():
                damage.repaired(f"Splits that {files[0]} does not list, left out", os.path.dirname(other))
    splits = {}
    for name, part in parts.items():
        with damage.skipping():
            splits[name] = _open_saved(folder, part, damage)
    standardized = standardize(splits, str(folder.path), damage, resolver(folder))
    if not streaming:
        return standardized
    return {name: dataset.to_iterable_dataset() for name, dataset in standardized.items()}  # type: ignore[union-attr]


def _open_saved(folder: ImageFolder, part: str, damage: Damage) -> Dataset:
    """Open one split that `save_to_disk` wrote to a folder in the data set's folder."""
    state_file = os.path.join(part, "state.json")
    state = read_json(folder, state_file, damage)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [str(entry.get("filename")) for entry in entries or () if isinstance(entry, dict)]
    if not names:
        raise ValueError(f"{state_file} has no list of data files.")
    tables, listed = [], {os.path.join(part, name) for name in names}
    for other in folder.beside("data-*.arrow"):
        if os.path.dirname(other) == part and other not in listed:
            damage.repaired(f"Files that {state_file} does not list, left out", other)
    for name in names:
        with damage.skipping(), located(state_file):
            tables.append(_open_arrow(folder, os.path.join(part, name)))
    try:
        return Dataset(concat_tables(tables))
    except Exception as e:  # of datasets and pyarrow, for files of different columns, or none
        raise ValueError(f"The files that {state_file} lists can't be read together: {first_line(e)}") from e


def _open_arrow(folder: ImageFolder, file: str) -> MemoryMappedTable:
    """Open an Arrow file of `datasets` without its types of columns, which may ask for other files to be opened."""
    path = folder.locate(file)
    try:
        with open(path, "rb") as content:
            content.seek(-min(len(END_OF_ARROW), path.stat().st_size), os.SEEK_END)
            if content.read() != END_OF_ARROW:
                raise ValueError("it is cut off.")
        table = MemoryMappedTable.from_file(str(path)).replace_schema_metadata(None)
        if not table.num_columns:
            raise ValueError("it has no columns.")
        table.table.validate(full=True)  # a wrong offset would make pyarrow read beyond the file, and crash
    except Exception as e:  # pyarrow raises its own errors, OSError, UnicodeDecodeError, MemoryError
        raise ValueError(f"{file} is not an Arrow file that datasets saved, or is damaged: {first_line(e)}") from e
    return table


def read_hub(
    path: str, damage: Damage, streaming: bool, *, allow_urls: bool = False, allow_outside: bool = False
) -> Mapping[str, AnyDataset]:
    """Read a data set on the Hub; `allow_urls` and `allow_outside` are those of `load_captions`.

    Raises:
        ValueError: It can't be reached, has other columns, or is made of files that are not its own.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    # `datasets` loads any file that a data set's card names.
    own_file = re.compile(rf"(zip://[^:]*::)?hf://datasets/{re.escape(path)}@[^:]+", re.IGNORECASE)
    try:
        data_files = load_dataset_builder(path).config.data_files or {}
        strange = [file for files in data_files.values() for file in files if not own_file.fullmatch(file)]
        if strange and not allow_outside:
            raise ValueError(f"it names {shortened(strange[0])}, which is none of its own files (see --allow_outside).")
        splits = load_dataset(path, streaming=streaming)
    except (OSError, ValueError, DatasetGenerationError) as e:  # of datasets and huggingface_hub
        raise ValueError(
            f"The data set {path!r} can't be loaded: {first_line(e)} "
            "Give a folder of captioned images or the id of a data set on the Hub that you can reach."
        ) from e
    from datasets.config import DOWNLOADED_DATASETS_PATH

    downloads = (os.path.join(HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}"), DOWNLOADED_DATASETS_PATH)
    boundary = Boundary(tuple(map(os.path.realpath, downloads)), allow_urls, allow_outside)

    def resolve(name: str) -> str:
        if streaming and own_file.fullmatch(name) and ".." not in name:
            return name
        if is_url(name):
            return boundary.check_url(name)
        if not os.path.isabs(name):
            raise ValueError(f"{shortened(name)} is no file of this data set." if name else "there is no image.")
        boundary.check_file(name, shortened(name))
        return name

    return standardize(splits, path, damage, resolve)


def standardize(
    splits: Mapping[str, AnyDataset], source: str, damage: Damage, resolve: Resolve
) -> dict[str, AnyDataset]:
    """Bring splits to the columns `image`, `captions` and `image_id`, and make missing splits.

    Rows of one caption each are gathered into one row per image, except in a stream. Errors name the `source`, and
    `resolve` checks paths of images.
    """
    splits = {canonical_split(str(name)): dataset for name, dataset in splits.items()}
    if not splits:
        raise ValueError(f"{source!r} has no split that can be read.")
    first = next(iter(splits.values()))
    features = _features(first)
    columns = find_columns(features, source)
    for name in (*columns.captions, columns.image_id, columns.split):
        if name is not None and require_decoding(features[name]):
            raise ValueError(f"{source}: the column {name!r} holds {type(features[name]).__name__}, not text.")
    if len(splits) == 1 and columns.split is not None:
        splits = _divide_by_column(first, columns.image, columns.split)
    missing = missing_splits(splits, damage.report)
    # Training images are divided between train and the missing splits.
    divided = ("train", *missing) if missing else ()
    if not isinstance(first, Dataset):
        sources = {**splits, **dict.fromkeys(missing, splits.get("train", first))}
        made = {name: missing if name in divided else [] for name in sources}
        return {
            name: _standardize_stream(dataset, name, columns, source, damage, resolve, made[name])
            for name, dataset in sources.items()
        }
    done = {}
    for name, dataset in splits.items():
        try:
            dataset = _standardize_split(dataset, name, columns, source, damage, resolve)
        except (TypeError, KeyError, NotImplementedError) as e:  # of datasets, for columns of unexpected types
            raise ValueError(f"{source}: the columns of {name} can't be read as captioned images: {e!r}.") from e
        done[name] = gather_and_check(dataset, name, columns, source, damage)
    return with_missing(done, missing)


def _features(dataset: AnyDataset) -> Features:
    """Return the types of columns; a stream may have to read its first row for them."""
    features: Features = dataset.features
    return dataset._resolve_features().features if features is None else features


def _standardize_stream(
    dataset: IterableDataset,
    split: str,
    columns: Columns,
    source: str,
    damage: Damage,
    resolve: Resolve,
    missing: Sequence[str],
) -> IterableDataset:
    """Bring a stream to the columns `image`, `captions` and `image_id`.

    If `missing` names splits that are made from this stream, keep only the images that `assign_split` gives to `split`.
    """

    def standardize_row(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        row = {name: values[0] for name, values in rows.items()}
        location, default_id = f"{source}, row {indices[0]} of {split}", f"{split}-{indices[0]:06d}"
        with damage.skipping():
            built = build_row(row, columns, location, default_id, damage, resolve)
            path = built["image"]["path"]
            if not built["image"]["bytes"] and path.startswith(("hf://", "zip://")):
                built["image"] = {"bytes": _read_from_hub(path), "path": path}
            if not missing or assign_split(image_digest(built["image"]).hex(), missing) == split:
                return {name: [value] for name, value in in_stream(built).items()}
        return {name: [] for name in row_features()}

    used = [name for name in (columns.image, *columns.captions, columns.image_id) if name is not None]
    # Other columns are dropped before map decodes them. It would decode images too, and encode them anew.
    dataset = undecoded(dataset.select_columns(used), columns.image)
    others = [name for name in used if name not in row_features()]
    dataset = dataset.map(standardize_row, with_indices=True, batched=True, batch_size=1, remove_columns=others)
    return dataset.cast(row_features())


def _read_from_hub(path: str) -> bytes:
    """Return the content of a file of a data set that is streamed from the Hub."""
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        content: bytes = file.read()
    return content


def _standardize_split(
    dataset: Dataset, split: str, columns: Columns, source: str, damage: Damage, resolve: Resolve
) -> Dataset:
    """Bring a split to the columns `image`, `captions` and `image_id`, and leave out broken rows."""
    captions, kept, locations = [], [], []
    for index, row in enumerate(dataset.select_columns(columns.captions).to_list()):
        with damage.skipping():
            location = f"{source}, row {index} of {split}"
            with located(location):
                found = captions_in_row(row)
            captions.append(clean_captions(found, location, damage))
            kept.append(index)
            locations.append(location)
    if not kept:
        raise ValueError(f"{source}: no row of {split} can be read.")
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    # Columns that `datasets` would decode, such as further images, might make it open files that are not checked.
    decoded = [name for name, kind in dataset.features.items() if require_decoding(kind) and name != columns.image]
    dataset = dataset.remove_columns([*columns.captions, *(name for name in decoded if name not in columns.captions)])
    dataset = dataset.add_column("captions", captions, feature=row_features()["captions"])
    for name, wanted in ((columns.image, "image"), (columns.image_id, "image_id")):
        if name is not None and name != wanted:
            dataset = dataset.rename_column(name, wanted)
    dataset = dataset.cast_column("image", ImageFeature())
    if columns.image_id is None:
        dataset = dataset.add_column("image_id", [f"{split}-{index:06d}" for index in kept])
    elif dataset.features["image_id"] != Value("string"):
        dataset = dataset.cast_column("image_id", Value("string"))
    return resolve_images(dataset, locations, damage, resolve)


def _divide_by_column(dataset: AnyDataset, image_column: str, split_column: str) -> dict[str, AnyDataset]:
    """Divide a data set into splits by the values of a column."""
    values = [canonical_split(str(row[split_column])) for row in dataset.select_columns(split_column)]
    if isinstance(dataset, Dataset):
        return {
            name: dataset.select([i for i, value in enumerate(values) if value == name]).remove_columns(split_column)
            for name in dict.fromkeys(values)
        }

    def is_in_split(value: Any, *, name: str) -> bool:
        return canonical_split(str(value)) == name

    dataset = undecoded(dataset, image_column)  # or filter would decode images and encode them anew
    return {
        name: dataset.filter(partial(is_in_split, name=name), input_columns=split_column).remove_columns(split_column)
        for name in dict.fromkeys(values)
    }
