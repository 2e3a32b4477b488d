"""Parquet files, read a few rows at a time, so that damage is named with its file and row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ...errors import first_line
from .damage import Damage, shortened

# Nothing that people photograph and describe is compressed so much, but a small file that fills the memory is.
MAX_EXPANSION = 100
MODEST_BYTES = 64 * 2**20  # sizes up to this are read, whatever they are compressed to
# Rows are read in groups: few with images, since each may be large.
ROWS_WITH_IMAGES, ROWS_OF_TEXT = 16, 1024


def open_parquet(path: Path, name: str) -> parquet.ParquetFile:
    """Open a Parquet file, which messages call `name`.

    Raises:
        ValueError: It is no Parquet file, or one whose content is out of all proportion to its size.
    """
    try:
        file = parquet.ParquetFile(path)
        metadata, size = file.metadata, path.stat().st_size
        num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        names = file.schema_arrow.names
    except Exception as e:  # pyarrow raises its own errors, OSError, and for some damage TypeError or OverflowError
        raise ValueError(f"{name} is not a Parquet file, or is damaged: {first_line(e)}") from e
    if len(set(names)) < len(names):
        raise ValueError(f"{name} has a column twice, among {shortened(', '.join(names))}.")
    if metadata.num_rows > size or num_bytes > max(MODEST_BYTES, MAX_EXPANSION * size):
        raise ValueError(f"{name} has {size} bytes and claims to hold {metadata.num_rows} rows of {num_bytes} bytes.")
    return file


def column_type(file: parquet.ParquetFile, name: str) -> pa.DataType:
    """Return the type of a column's values, that of its categories if they are stored as numbers of categories."""
    kind = file.schema_arrow.field(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's types of strings, of which every writer has its own favourite."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def read_rows(
    path: Path, name: str, damage: Damage, columns: Sequence[str] | None = None, *, has_images: bool = False
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield the location, the index and the values by column of each row; rows that can't be read are refused.

    Args:
        path: Path of the file.
        name: Name of the file in messages.
        damage: Collector of what can't be read.
        columns: Names of the columns to read; None for all.
        has_images: Whether one of them holds images.
    """
    try:
        file = open_parquet(path, name)
    except ValueError as e:
        damage.broken(str(e))
        return
    end = 0
    for group in range(file.metadata.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        batches = file.iter_batches(ROWS_WITH_IMAGES if has_images else ROWS_OF_TEXT, [group], columns)
        index = start
        while index < end:
            try:
                rows = next(batches).to_pylist()
            except Exception as e:  # as above, and UnicodeDecodeError
                problem = "they are missing." if isinstance(e, StopIteration) else first_line(e)
                damage.broken(f"{name}, rows {index} to {end - 1}, can't be read: {problem}")
                break
            for row in rows:
                yield f"{name}, row {index}", index, row
                index += 1
