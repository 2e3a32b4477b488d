"""Rows of tables in text files: CSV with any delimiter, JSON lines, and JSON documents of many forms."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...files import parse_json
from ...model.images import is_image_name
from .caption_columns import find_columns, has_columns
from .damage import Damage, shortened
from .image_folder import ImageFolder
from .splits import CANONICAL_NAMES
from .text_files import SEPARATOR, Lines, text_lines

Row = dict[str, Any]
MAX_LINES_IN_ROW = 1000
# How a row may be written, the usual way first; then with spaces behind commas and at its end, or as "a \"big\" dog".
DIALECTS: tuple[dict[str, Any], ...] = ({}, {"skipinitialspace": True}, {"escapechar": "\\"})


def csv_rows(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[str, Row]]:
    """Yield the location and the values by column of each row of a CSV, whose first line names the columns."""
    lines = [(number, line) for number, line in text_lines(folder, file, damage) if line.strip()]
    declared = SEPARATOR.match(lines[0][1]) if lines else None
    lines = lines[bool(declared) :]
    if not lines:
        raise ValueError(f"{file} is empty.")
    header = lines[0][1]
    delimiter = declared[1] if declared else max(",\t;|", key=header.count)
    stems = {os.path.splitext(os.path.basename(image))[0] for image in folder.images}
    names = [name.strip() for name in _fields(header, delimiter)]
    if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise ValueError(f"{file} has two columns {shortened(twice[0])}. Rename one of them.")
    columns = find_columns(filter(None, names), file)
    table = _Csv(file, names, delimiter, names.index(columns.image), stems)
    start = 1
    while start < len(lines):
        location, num_lines = f"{file}, line {lines[start][0]}", 1
        with damage.skipping():
            values, num_lines, problem = table.read_row(lines, start)
            if any(values[len(table.names) :]):
                raise ValueError(f"{location}, has more fields than the header; put captions with commas in quotes.")
            if len(values) < len(table.names):
                problem = "rows with fewer fields than the header"
            if problem:
                damage.repaired(f"{file}: {problem}", f"line {lines[start][0]}")
            yield location, dict(zip(table.names, values, strict=False))
        start += num_lines


def _fields(line: str, delimiter: str) -> list[str]:
    """Return the fields of a single line, whatever its quotes."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return line.split(delimiter)


@dataclass(frozen=True)
class _Csv:
    """Form of the rows of a CSV file."""

    file: str
    names: list[str]
    delimiter: str
    image_column: int
    stems: Collection[str]  # names of the folder's images without suffixes

    def read_row(self, lines: Lines, start: int) -> tuple[list[str], int, str]:
        """Read the row that begins with a line.

        Returns:
            The values, the number of lines that they take up, and a description of what was repaired, if anything.

        Raises:
            ValueError: A quote is unpaired, and where it belongs is not clear.
        """
        number, line = lines[start]
        rows, problem = [], ""
        for dialect in DIALECTS:
            rest = (line if not dialect else line.rstrip(" \n") + "\n" for line in self._continued(lines, start))
            reader = csv.reader(rest, delimiter=self.delimiter, strict=True, **dialect)
            try:
                rows.append((next(reader), reader.line_num, ""))
            except csv.Error as e:
                problem = problem or str(e)
            else:
                if len(rows[-1][0]) == len(self.names):
                    return rows[-1]
        if rows:
            return rows[0]
        # Files whose fields are separated by tabs rarely have quotes around them, and two fields can't be confused.
        values = line.split(self.delimiter)
        if len(values) != len(self.names) or (self.delimiter != "\t" and len(values) > 2):
            raise ValueError(f"{self.file}, line {number}, has an unpaired quote ({problem}).")
        if line.count('"') % 2 == 0:
            return values, 1, "quotes in the middle of fields, which are kept"
        values = [value.strip('"') if value.count('"') % 2 else value for value in values]
        return values, 1, "unpaired quotes, which are removed"

    def _continued(self, lines: Lines, start: int) -> Iterator[str]:
        """Yield a line and, as long as a quote in it is open, those behind it, but none that is a row of its own."""
        yield lines[start][1] + "\n"
        for number, line in islice(lines, start + 1, start + MAX_LINES_IN_ROW):
            if self._is_row(line):
                raise csv.Error(f"a row begins in line {number}")
            yield line + "\n"

    def _is_row(self, line: str) -> bool:
        """Return whether a line, which may also continue a caption, is a row of its own."""
        values = _fields(line, self.delimiter)
        if len(values) != len(self.names):
            return False
        return is_image_name(values[self.image_column].strip()) or values[self.image_column].strip() in self.stems


def json_rows(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[str, Row]]:
    """Yield the location and the values by column of each row of JSON lines, or of a JSON document.

    A document is a list of rows, a dict of rows or of captions by image, a dict of columns, or has these inside of it;
    keys that are names of splits give the split.
    """
    lines = [(number, line) for number, line in text_lines(folder, file, damage) if line.strip()]
    if not _is_json_lines(file, lines):
        numbered = {number: line for number, line in lines}
        text = "\n".join(numbered.get(number, "") for number in range(1, max(numbered, default=0) + 1))
        yield from _document_rows(parse_json(text, file), file)
        return
    for number, line in lines:
        location = f"{file}, line {number}"
        with damage.skipping():
            yield location, _as_row(parse_json(line, f"{location},"), location)


def _is_json_lines(file: str, lines: Lines) -> bool:
    """Return whether each line of a file is a row of its own."""
    if not lines or (lines[0][1].lstrip().startswith("[") and lines[-1][1].rstrip().endswith("]")):
        return False
    if not file.lower().endswith(".json"):
        return True
    try:
        return len(lines) > 1 and isinstance(parse_json(lines[0][1], file), dict)
    except ValueError:
        return False


def _document_rows(content: Any, location: str) -> Iterator[tuple[str, Row]]:
    """Yield the location and the values by column of each row in the value of a JSON document."""
    if isinstance(content, list):
        for index, row in enumerate(content):
            where = f"{location}, row {index}"
            yield where, _as_row(row, where)
    elif not isinstance(content, dict):
        raise ValueError(f"{location}, is no list and no dict of captions.")
    elif has_columns(content):
        yield from _column_rows(content, location)
    else:
        lists = {key: value for key, value in content.items() if _holds_rows(value)}
        for key, value in (lists or content).items():
            where = f"{location}, {shortened(key)}"
            if lists:
                split = {"split": key} if key.lower() in CANONICAL_NAMES else {}
                yield from ((row_where, split | row) for row_where, row in _document_rows(value, where))
            elif isinstance(value, dict):
                yield where, value if has_columns(value) else {"image": key, **value}
            else:
                yield where, {"image": key, "captions": value}


def _holds_rows(value: Any) -> bool:
    """Return whether a value of a JSON document is a list of rows, or a dict of captions or of rows by image."""
    if isinstance(value, list):
        return any(isinstance(row, dict) and has_columns(row) for row in value)
    return isinstance(value, dict) and not has_columns(value) and any(is_image_name(key) for key in value)


def _column_rows(columns: Mapping[str, Any], location: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a dict of columns, which are lists or dicts by the row's index, or of a single row."""
    image = find_columns(columns, location).image
    if not isinstance(columns[image], list | dict):
        yield location, dict(columns)
        return
    by_key = {name: dict(enumerate(v)) if isinstance(v, list) else v for name, v in columns.items()}
    for name, values in by_key.items():
        if not isinstance(values, dict) or values.keys() != by_key[image].keys():
            raise ValueError(f"{location}: the columns {shortened(image)} and {shortened(name)} have different rows.")
    yield from ((f"{location}, row {key}", {name: by_key[name][key] for name in by_key}) for key in by_key[image])


def _as_row(value: Any, location: str) -> Row:
    """Return a value that must be a JSON object, or raise a ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{location}, is no JSON object.")
    return value
