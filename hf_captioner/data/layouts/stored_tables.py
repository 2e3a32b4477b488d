"""Tables that contain images, which `datasets` reads from Parquet, the Hub or its own files, with columns renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, NamedSplit, Value, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from pyarrow import parquet

from ...errors import first_line
from ..rows import undecoded
from .caption_columns import IMAGE_COLUMNS, Columns, captions_in_row, find_columns
from .damage import Damage
from .image_folder import ImageFolder
from .splits import assign_split, assign_splits, canonical_split, image_digest, missing_splits, split_in_path

AnyDataset: TypeAlias = Dataset | IterableDataset


def has_images_inside(folder: ImageFolder, file: str) -> bool:
    """Return whether a Parquet file holds images, not names of files; raise a ValueError if it is no Parquet file."""
    try:
        schema = parquet.read_schema(folder.root / file)
    except pa.ArrowInvalid as e:
        raise ValueError(f"{file} is not a Parquet file: {e}.") from e
    column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    return column is None or not pa.types.is_string(schema.field(column).type)


def read_parquet(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """Read Parquet files with images inside; the names of files or folders give the splits."""
    data_files: dict[str, list[str]] = {}
    for file in files:
        data_files.setdefault(split_in_path(file) or "train", []).append(str(folder.root / file))
    return standardize(load_dataset("parquet", data_files=data_files, streaming=streaming), str(folder.path), damage)


def read_saved(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """Read one split or several that `save_to_disk` wrote."""
    loaded = load_from_disk(str(folder.root))
    splits = {str(loaded.split or "train"): loaded} if isinstance(loaded, Dataset) else loaded
    standardized = standardize(splits, str(folder.path), damage)
    if not streaming:
        return standardized
    return {name: cast(Dataset, dataset).to_iterable_dataset() for name, dataset in standardized.items()}


def read_hub(path: str, damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """Read a data set on the Hub, or raise a ValueError if it can't be reached or has other columns."""
    try:
        splits = load_dataset(path, streaming=streaming)
    except (OSError, ValueError) as e:  # raised by datasets and huggingface_hub for a data set that is not there
        raise ValueError(
            f"The data set {path!r} can't be loaded: {first_line(e)} "
            "Give a folder of captioned images or the id of a data set on the Hub that you can reach."
        ) from e
    return standardize(splits, path, damage)


def standardize(splits: Mapping[str, AnyDataset], source: str, damage: Damage) -> dict[str, AnyDataset]:
    """Bring splits to the columns `image`, `captions` and `image_id`, and make missing splits.

    Rows of one caption each are gathered into one row per image, except in a stream. Errors name the `source`.
    """
    splits = {canonical_split(str(name)): dataset for name, dataset in splits.items()}
    first = next(iter(splits.values()))
    columns = find_columns(_column_names(first), source)
    if len(splits) == 1 and columns.split is not None:
        splits = _divide_by_column(first, columns.image, columns.split)
    missing = missing_splits(splits, damage.report)
    # Training images are divided between train and the missing splits.
    divided = ("train", *missing) if missing else ()
    if not isinstance(first, Dataset):
        sources = {**splits, **dict.fromkeys(missing, splits.get("train", first))}
        return {
            name: _standardize_stream(dataset, name, columns, missing if name in divided else [])
            for name, dataset in sources.items()
        }
    done = {name: _standardize_split(dataset, name, columns, source, damage) for name, dataset in splits.items()}
    if missing:
        done |= {name: _select_assigned(done["train"], name, missing) for name in divided}
    return {name: done[name] for name in (*splits, *missing)}


def row_features() -> Features:
    """Return the columns of a captioned data set and their types."""
    return Features({"image": ImageFeature(), "captions": List(Value("string")), "image_id": Value("string")})


def _column_names(dataset: AnyDataset) -> list[str]:
    """Return the names of columns; a stream may have to read its first row for them."""
    return dataset.column_names or dataset._resolve_features().column_names


def _standardize_stream(
    dataset: IterableDataset, split: str, columns: Columns, missing: Sequence[str]
) -> IterableDataset:
    """Bring a stream to the columns `image`, `captions` and `image_id`.

    If `missing` names splits that are made from this stream, keep only the images that `assign_split` gives to `split`.
    """

    def standardize_row(row: dict[str, Any], index: int) -> dict[str, Any]:
        image_id = f"{split}-{index:06d}" if columns.image_id is None else str(row[columns.image_id])
        return {"image": row[columns.image], "captions": captions_in_row(row, columns.captions), "image_id": image_id}

    def is_in_split(image: dict[str, Any]) -> bool:
        return assign_split(image_digest(image).hex(), missing) == split

    other_columns = list({*_column_names(dataset)} - row_features().keys())
    dataset = undecoded(dataset, columns.image)
    dataset = dataset.map(standardize_row, with_indices=True, remove_columns=other_columns)
    if missing:
        dataset = dataset.filter(is_in_split, input_columns="image")
    return dataset.cast(row_features())  # last, since map and filter would decode images and encode them anew


def _standardize_split(dataset: Dataset, split: str, columns: Columns, source: str, damage: Damage) -> Dataset:
    """Bring a split to the columns `image`, `captions` and `image_id`, with one row per image."""
    captions = [captions_in_row(row) for row in dataset.select_columns(columns.captions).to_list()]
    dataset = dataset.remove_columns(columns.captions)
    dataset = dataset.add_column("captions", captions, feature=row_features()["captions"])
    for name, wanted in ((columns.image, "image"), (columns.image_id, "image_id")):
        if name is not None and name != wanted:
            dataset = dataset.rename_column(name, wanted)
    dataset = dataset.cast_column("image", ImageFeature())
    if columns.image_id is not None and dataset.features["image_id"] != Value("string"):
        dataset = dataset.cast_column("image_id", Value("string"))
    if len(columns.captions) == 1 and all(len(row) == 1 for row in captions):
        dataset = _gather_captions(dataset, source, damage)
    if columns.image_id is None:
        return dataset.add_column("image_id", [f"{split}-{i:06d}" for i in range(len(dataset))])
    return _drop_duplicates(dataset, split, source, damage)


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


def _image_digests(dataset: Dataset) -> list[str]:
    """Return the digest of each image's bytes; `datasets` keeps them in its cache."""

    def digest_row(row: dict[str, Any]) -> dict[str, str]:
        return {"digest": image_digest(row["image"]).hex()}

    images = undecoded(dataset.select_columns("image"))
    return images.map(digest_row, remove_columns="image", desc="Reading images")["digest"][:]


def _select_assigned(dataset: Dataset, split: str, missing: Sequence[str]) -> Dataset:
    """Return those training images that are assigned to a split when missing splits are made."""
    assigned = assign_splits(_image_digests(dataset), missing)
    dataset = dataset.select([i for i, name in enumerate(assigned) if name == split])
    dataset._split = NamedSplit(split)  # there is no public way
    return dataset


def _gather_captions(dataset: Dataset, source: str, damage: Damage) -> Dataset:
    """Gather rows of one caption each into one row per image; rows of one image have the same id and bytes."""
    digests = _image_digests(dataset)
    names = dataset["image_id"][:] if "image_id" in dataset.column_names else digests
    rows: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(names, digests, strict=True)):
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
