"""Parquet files with images inside, whose rows are read one by one so that what is damaged can be named or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset, NamedSplit

from .caption_columns import IMAGE_COLUMNS, Columns, find_columns
from .damage import Damage
from .image_folder import ImageFolder
from .parquet_files import column_type, is_text, open_parquet, read_rows
from .splits import (
    Splits,
    assign_split,
    canonical_split,
    checked_split,
    image_digest,
    missing_splits,
    split_in_path,
)
from .stored_rows import (
    Resolve,
    build_row,
    file_stamps,
    gather_and_check,
    generate,
    in_stream,
    resolve_images,
    resolver,
    row_features,
    with_missing,
)


class Shard(NamedTuple):
    """A Parquet file: its path, its name in messages, and the number of rows of its split in the files before it."""

    path: str
    name: str
    start: int


def has_images_inside(folder: ImageFolder, file: str) -> bool:
    """Return whether a Parquet file holds images, not names of files; also if it can't be read, which reading tells."""
    try:
        opened = open_parquet(folder.locate(file), file)
    except ValueError:
        return True
    column = next((name for name in IMAGE_COLUMNS if name in opened.schema_arrow.names), None)
    return column is None or not is_text(column_type(opened, column))


def read_parquet(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Splits:
    """Read Parquet files with images inside; the names of files or folders give the splits, or a column does.

    Streams read the files row by row. Otherwise rows are copied once into an Arrow file in the cache of `datasets`.
    """
    source = str(folder.path)
    shards, columns = _find_shards(folder, files, damage)
    values: dict[str, list[str]] = {name: [] for name in shards}  # of the column of splits, by the name of each split
    if len(shards) == 1 and columns.split is not None:
        (only,) = shards.values()
        values = _split_values(only, columns.split, damage)
        shards = {checked_split(name, source): only for name in values}
    missing = missing_splits(shards, damage.report)
    streams: dict[str, IterableDataset] = {}
    stored: dict[str, Dataset] = {}
    for name in (*shards, *missing) if streaming else shards:
        made_of = name if name in shards else "train"
        # `datasets` takes every list for one of shards.
        arguments: dict[str, Any] = {"shards": shards[made_of], "values": tuple(values[made_of]), "columns": columns}
        arguments |= {"split": name, "skip_broken": damage.skip_broken}
        if streaming:
            if name in ("train", *missing):
                arguments["missing"] = tuple(missing)
            streamed = {**arguments, "report": damage.report, "resolve": resolver(folder)}
            streams[name] = IterableDataset.from_generator(
                _streamed_rows, features=row_features(), gen_kwargs=streamed, split=NamedSplit(name)
            )
            continue
        # Damage is reported every time, also where rows come from the cache.
        num_rows = sum(1 for _ in _located_rows(**arguments, report=damage.report, read_images=False))
        if not num_rows:
            raise ValueError(f"{source}: no row of {name} can be read.")
        stamps = file_stamps([shard.path for shard in shards[name]])
        dataset = generate(_cached_rows, name, {**arguments, "stamps": stamps})
        if len(dataset) < num_rows:
            damage.report(f"Left out: {num_rows - len(dataset)} rows of {source} whose images can't be read.")
        locations, dataset = dataset["location"][:], dataset.remove_columns("location")
        dataset = resolve_images(dataset, locations, damage, resolver(folder))
        stored[name] = gather_and_check(dataset, name, columns, source, damage)
    return streams or with_missing(stored, missing)


def _find_shards(folder: ImageFolder, files: Sequence[str], damage: Damage) -> tuple[dict[str, list[Shard]], Columns]:
    """Return the Parquet files of each split, and the columns of the first, which all must have."""
    shards: dict[str, list[Shard]] = {}
    num_rows: dict[str, int] = {}
    columns = None
    for file in files:
        with damage.skipping():
            opened = open_parquet(folder.locate(file), file)
            found = find_columns(opened.schema_arrow.names, file)
            columns = columns or found
            if found != columns:
                raise ValueError(f"{file} has other columns of images, captions and ids than {files[0]}.")
            name = split_in_path(file) or "train"
            shards.setdefault(name, []).append(Shard(str(folder.locate(file)), file, num_rows.get(name, 0)))
            num_rows[name] = num_rows.get(name, 0) + opened.metadata.num_rows
    if columns is None:
        raise ValueError(f"None of the Parquet files in {str(folder.path)!r} can be read.")
    return shards, columns


def _split_values(shards: Sequence[Shard], column: str, damage: Damage) -> dict[str, list[str]]:
    """Return the values that mean each split in a column of their names."""
    values: dict[str, list[str]] = {}
    for shard in shards:
        for _, _, row in read_rows(Path(shard.path), shard.name, damage, [column]):
            known = values.setdefault(canonical_split(str(row[column])), [])
            if str(row[column]) not in known:
                known.append(str(row[column]))
    return values


def _streamed_rows(**arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows that `_located_rows` yields."""
    return (in_stream(row) for _, row in _located_rows(**arguments))


def _cached_rows(stamps: Sequence[str], **arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield rows with their locations, without reports; by `stamps`, `datasets` tells changed files from known ones."""
    location = None
    for location, row in _located_rows(**arguments, report=lambda line: None):
        yield {**row, "location": location}
    if location is None:
        raise ValueError(f"No image of {arguments['split']} in {arguments['shards'][0].path} can be read.")


def _located_rows(
    shards: Sequence[Shard],
    split: str,
    columns: Columns,
    values: Sequence[str],
    *,
    report: Callable[[str], None],
    skip_broken: bool = False,
    missing: Sequence[str] = (),
    resolve: Resolve | None = None,
    read_images: bool = True,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of Parquet files, each behind its location for messages.

    Args:
        shards: The files.
        split: Name of the split that is read.
        columns: The columns to read.
        values: Values of the column of splits whose rows are wanted; empty for all rows.
        report: As of `Damage`.
        skip_broken: As of `Damage`.
        missing: Splits that are made of these files (see `splits.assign_split`).
        resolve: Function that checks paths; None to leave them as they are.
        read_images: Whether to read images too; without it, they stay empty.

    Raises:
        ValueError: A file or a row can't be read.
    """
    damage = Damage(report, skip_broken=skip_broken)
    wanted = [*columns.captions, *(name for name in (columns.image_id, columns.split) if name)]
    wanted += [columns.image] if read_images else []
    for path, name, start in shards:
        for location, index, row in read_rows(Path(path), name, damage, wanted, has_images=read_images):
            if columns.split and values and str(row[columns.split]) not in values:
                continue
            with damage.skipping():
                row = build_row(row, columns, location, f"{split}-{start + index:06d}", damage, resolve)
                if not missing or assign_split(image_digest(row["image"]).hex(), missing) == split:
                    yield location, row
    damage.report_repairs()
