"""Data sets that `datasets` reads itself, from Parquet, the Hub or its own files: their columns made ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from .caption_columns import IMAGE_COLUMNS, Columns, captions_of, find_columns
from .damage import Damage
from .image_folder import ImageFolder
from .splits import absent_splits, image_digest, made_split, made_splits, said_of_made, split_in, split_of

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

AnyDataset: TypeAlias = "Dataset | IterableDataset"


def has_images_inside(folder: ImageFolder, file: str) -> bool:
    """Whether a Parquet file holds images themselves, not the names of files."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(folder.root / file)
    except pa.ArrowInvalid as e:
        raise ValueError(f"{file} is not a Parquet file: {e}.") from e
    column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    return column is None or not (pa.types.is_string(schema.field(column).type))


def read_parquet(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """Parquet files with images inside; splits are named by files or folders."""
    from datasets import load_dataset

    data_files: dict[str, list[str]] = {}
    for file in files:
        data_files.setdefault(split_in(file) or "train", []).append(str(folder.root / file))
    return arranged(load_dataset("parquet", data_files=data_files, streaming=streaming), str(folder.path), damage)


def read_saved(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """What `save_to_disk` wrote, of one split or several."""
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(str(folder.root))
    splits = {str(loaded.split or "train"): loaded} if isinstance(loaded, Dataset) else loaded
    arranged_splits = arranged(splits, str(folder.path), damage)
    if not streaming:
        return arranged_splits
    return {name: cast("Dataset", dataset).to_iterable_dataset() for name, dataset in arranged_splits.items()}


def read_hub(path: str, damage: Damage, streaming: bool) -> Mapping[str, AnyDataset]:
    """A data set on the Hub.

    Raises:
        ValueError: it can't be reached, or has other columns.
    """
    from datasets import load_dataset

    try:
        splits = load_dataset(path, streaming=streaming)
    except (OSError, ValueError) as e:  # what datasets and the Hub raise for a set that is not there
        line = str(e).strip().partition("\n")[0] or type(e).__name__
        raise ValueError(
            f"The data set {path!r} can't be loaded: {line.rstrip('.')}. "
            "Give a folder of captioned images or the id of a data set on the Hub that you can reach."
        ) from e
    return arranged(splits, path, damage)


def arranged(splits: Mapping[str, AnyDataset], place: str, damage: Damage) -> dict[str, AnyDataset]:
    """Splits with the columns `image`, `captions` and `image_id`; absent splits are made.

    Rows of one caption each are gathered to one row an image; a stream gives them as they come.
    """
    from datasets import Dataset

    splits = {split_of(str(name)): dataset for name, dataset in splits.items()}
    first = next(iter(splits.values()))
    columns = find_columns(first.column_names or first._resolve_features().column_names, place)
    if len(splits) == 1 and columns.split is not None:
        splits = _by_column(first, columns)
    absent = absent_splits(splits)
    if absent:
        damage.report(said_of_made(absent))
    sources = {**splits, **dict.fromkeys(absent, splits.get("train", first))}
    made = {name: absent if name in ("train", *absent) else [] for name in sources}
    if not isinstance(first, Dataset):
        return {name: _streamed(dataset, name, columns, made[name]) for name, dataset in sources.items()}
    ours = {name: _arranged(dataset, name, columns, place, damage) for name, dataset in splits.items()}
    return {name: _only(ours.get(name, ours["train"]), name, made[name]) if made[name] else ours[name] for name in made}


def row_features() -> Features:
    """The columns of a captioned data set."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    return Features({"image": ImageFeature(), "captions": List(Value("string")), "image_id": Value("string")})


def _streamed(dataset: IterableDataset, split: str, columns: Columns, absent: Sequence[str]) -> IterableDataset:
    from datasets import Image as ImageFeature

    def ours(row: dict[str, Any], index: int) -> dict[str, Any]:
        image_id = f"{split}-{index:06d}" if columns.image_id is None else str(row[columns.image_id])
        return {"image": row[columns.image], "captions": captions_of(row, columns.captions), "image_id": image_id}

    def is_chosen(image: dict[str, Any]) -> bool:
        return made_split(image_digest(image).hex(), absent) == split

    names = dataset.column_names or dataset._resolve_features().column_names
    dataset = dataset.cast_column(columns.image, ImageFeature(decode=False))
    dataset = dataset.map(ours, with_indices=True, remove_columns=list({*names} - row_features().keys()))
    if absent:
        dataset = dataset.filter(is_chosen, input_columns="image")
    return dataset.cast(row_features())  # last: datasets decodes no images of rows that go on through map or filter


def _arranged(dataset: Dataset, split: str, columns: Columns, place: str, damage: Damage) -> Dataset:
    from datasets import Image as ImageFeature
    from datasets import Value

    captions = [captions_of(row) for row in dataset.select_columns(columns.captions).to_list()]
    dataset = dataset.remove_columns(columns.captions)
    dataset = dataset.add_column("captions", captions, feature=row_features()["captions"])
    for name, wanted in ((columns.image, "image"), (columns.image_id, "image_id")):
        if name is not None and name != wanted:
            dataset = dataset.rename_column(name, wanted)
    dataset = dataset.cast_column("image", ImageFeature())
    if columns.image_id is not None and dataset.features["image_id"] != Value("string"):
        dataset = dataset.cast_column("image_id", Value("string"))
    if len(columns.captions) == 1 and all(len(row) == 1 for row in captions):
        dataset = _gathered(dataset, place, damage)
    if columns.image_id is None:
        return dataset.add_column("image_id", [f"{split}-{i:06d}" for i in range(len(dataset))])
    return _without_duplicates(dataset, split, place, damage)


def _by_column(dataset: AnyDataset, columns: Columns) -> dict[str, AnyDataset]:
    """A data set's splits by a column's values."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    column = columns.split
    values = [split_of(str(row[column])) for row in dataset.select_columns(column)]
    if isinstance(dataset, Dataset):
        return {
            name: dataset.select([i for i, value in enumerate(values) if value == name]).remove_columns(column)
            for name in dict.fromkeys(values)
        }

    def of(name: str) -> Callable[[Any], bool]:
        return lambda value: split_of(str(value)) == name

    undecoded = dataset.cast_column(columns.image, ImageFeature(decode=False))  # or filter would encode images anew
    return {
        name: undecoded.filter(of(name), input_columns=column).remove_columns(column) for name in dict.fromkeys(values)
    }


def _digests(dataset: Dataset) -> list[str]:
    """Of every image's bytes, kept in the cache of `datasets`."""
    from datasets import Image as ImageFeature

    images = dataset.select_columns("image").cast_column("image", ImageFeature(decode=False))
    return images.map(_digest, remove_columns="image", desc="Reading images")["digest"][:]


def _digest(row: dict[str, Any]) -> dict[str, str]:
    return {"digest": image_digest(row["image"]).hex()}


def _only(dataset: Dataset, split: str, absent: Sequence[str]) -> Dataset:
    """The images of a made split."""
    from datasets import NamedSplit

    dataset = dataset.select([i for i, name in enumerate(made_splits(_digests(dataset), absent)) if name == split])
    dataset._split = NamedSplit(split)  # there is no public way
    return dataset


def _gathered(dataset: Dataset, place: str, damage: Damage) -> Dataset:
    """One row an image, of rows with one caption each."""
    digests = _digests(dataset)
    names = dataset["image_id"][:] if "image_id" in dataset.column_names else digests
    rows: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(names, digests, strict=True)):
        rows.setdefault(key, []).append(index)
    if len(rows) == len(dataset):
        return dataset
    damage.report(f"{place}: {len(dataset)} rows of one caption each are {len(rows)} images.")
    captions = dataset["captions"][:]
    gathered = [[caption for i in indices for caption in captions[i]] for indices in rows.values()]
    first = dataset.select([indices[0] for indices in rows.values()]).remove_columns("captions")
    return first.add_column("captions", gathered, feature=dataset.features["captions"])


def _without_duplicates(dataset: Dataset, split: str, place: str, damage: Damage) -> Dataset:
    seen: dict[str, int] = {}
    for index, name in enumerate(dataset["image_id"][:]):
        if seen.setdefault(name, index) != index:
            damage.broken(
                f"{place}: the image_id {name!r} is there twice in {split}, in rows {seen[name]} and {index}."
            )
    return dataset if len(seen) == len(dataset) else dataset.select(list(seen.values()))
