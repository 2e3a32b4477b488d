"""Files that list captions: Karpathy's and COCO's JSON, tables, and texts beside images. Each yields `Record`s.

Every reader takes the folder, the files to read and a `Damage`, as does the one in `caption_lines.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .caption_columns import Columns, captions_in_row, find_columns, has_columns, parse_list
from .damage import Damage, located, shortened
from .image_folder import ImageFolder
from .parquet_files import read_rows
from .splits import checked_split, split_in_path
from .table_rows import csv_rows, json_rows
from .text_files import read_json, text_lines

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
JSON_TYPES = {str: "a text", int: "a number or a text", list: "a list"}


@dataclass(frozen=True)
class Record:
    """Captions of an image that are listed in one place of a file."""

    image: str  # path of the image file, relative to `folder`
    captions: list[str]
    location: str  # file and line of this record, for errors
    folder: str = ""  # folder of the file, relative to the data set's folder
    image_id: str | None = None  # None to use the image's file name
    split: str | None = None  # None if the file does not say
    # Number of the caption, or 0 for all captions of an image: no two records of an image have the same one. None for a
    # file that lists captions without numbers.
    number: int | None = None


ReadRecords: TypeAlias = Callable[[ImageFolder, list[str], Damage], Iterator[Record]]
ReadFile: TypeAlias = Callable[[ImageFolder, str, Damage], Iterator[Record]]


def each_file(read_file: ReadFile) -> ReadRecords:
    """Return the reader that reads files one after the other, and refuses or leaves out those without captions."""

    def read_files(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
        for file in files:
            with damage.skipping():
                record = None
                for record in read_file(folder, file, damage):
                    yield record
                if record is None:
                    raise ValueError(f"{file} holds no captions.")

    return read_files


@each_file
def read_karpathy(folder: ImageFolder, file: str, damage: Damage) -> Iterator[Record]:
    """Read Karpathy's `dataset_flickr8k.json`, `dataset_flickr30k.json`, `dataset_coco.json` or one of the same form.

    Images of `restval`, the part of COCO's validation images that all papers train on, are for training.
    """
    for location, image in _entries(read_json(folder, file, damage), "images", file):
        with damage.skipping():
            sentences = _field(image, "sentences", location, list)
            captions = [_field(s, "raw", f"{location}, sentences[{i}]", str) for i, s in enumerate(sentences)]
            split = _field(image, "split", location, str)
            name = _field(image, "filename", location, str)  # distinct even in COCO, whatever became of its folders
            if not captions:
                raise ValueError(f"{location}, has no sentences.")
            if split == "restval":
                damage.repaired(f"{file}: images of restval counted as training", name)
            image_id = str(_field(image, "cocoid", location, int, str)) if "cocoid" in image else None
            base, split = _base(file, name), checked_split(split, location)
            yield Record(name, captions, location, base, image_id=image_id, split=split, number=0)


def read_coco(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read COCO's `captions_train2017.json` and `captions_val2017.json`, or those of 2014 if there are no others."""
    years = {match[0] for file in files if (match := re.search(r"20\d\d", os.path.basename(file)))}
    if len(years) > 1:
        files = [file for file in files if max(years) in os.path.basename(file)]
        damage.report(f"Annotations of {' and '.join(sorted(years))} share images: those of {max(years)} are read.")
    yield from each_file(_read_coco_file)(folder, list(files), damage)


def _read_coco_file(folder: ImageFolder, file: str, damage: Damage) -> Iterator[Record]:
    """Read one file in COCO's form; the split is part of its name, or of its folder's."""
    content = read_json(folder, file, damage)
    images: dict[Any, tuple[str, str]] = {}  # location and file name by id
    captions: dict[Any, list[str]] = {}
    for location, image in _entries(content, "images", file):
        with damage.skipping():
            image_id, name = _field(image, "id", location, int, str), _field(image, "file_name", location, str)
            if image_id in images:
                raise ValueError(f"{location}: the id {shortened(str(image_id))} occurs twice.")
            images[image_id], captions[image_id] = (location, name), []
    caption_ids: set[Any] = set()
    for location, annotation in _entries(content, "annotations", file):
        with damage.skipping():
            caption_id, image_id = (_field(annotation, key, location, int, str) for key in ("id", "image_id"))
            if caption_id in caption_ids:
                raise ValueError(f"{location}: the id {shortened(str(caption_id))} occurs twice.")
            if image_id not in images:
                raise ValueError(f"{location}: there is no image with the id {shortened(str(image_id))}.")
            caption_ids.add(caption_id)
            captions[image_id].append(_field(annotation, "caption", location, str))
    split = split_in_path(os.path.basename(file)) or split_in_path(os.path.dirname(file))
    for image_id, (location, name) in images.items():
        if captions[image_id]:
            base = _base(file, name)
            yield Record(name, captions[image_id], location, base, image_id=str(image_id), split=split, number=0)
        else:
            damage.repaired(f"{file}: images without a caption, left out", name)


@each_file
def read_tables(folder: ImageFolder, file: str, damage: Damage) -> Iterator[Record]:
    """Read a table with a column of image names and one or more of captions: CSV, JSON, JSON lines or Parquet.

    A row holds all captions of an image or one of them. The split is a column, or part of the file's or folder's name.
    """
    known: dict[tuple[str, ...], Columns] = {}  # by the names of all columns, in which rows of JSON may differ
    columns: Columns | None = None
    ignored: set[str] = set()
    first_rows: dict[bool, str] = {}  # locations of the first row with a list as text, and of the first one without
    for location, row in _table_rows(folder, file, damage):
        with damage.skipping():
            names = tuple(name for name in row if name)
            if names not in known:
                if columns is not None and not has_columns(names):
                    missing = columns.captions[0] if columns.image in row else columns.image
                    raise ValueError(f"{location}, has no {missing}.")
                known[names] = find_columns(names, location)
            columns = known[names]
            for name in [name for name in columns.ignored if name not in ignored]:
                damage.repaired("Columns that are not read", f"{name} of {file}")
            ignored.update(columns.ignored)
            record = _build_record(row, columns, location, file)
            if len(columns.captions) == 1 and isinstance(text := row[columns.captions[0]], str):
                is_list = parse_list(text) is not None
                first_rows.setdefault(is_list, location)
                if (not is_list) in first_rows and os.path.splitext(file)[1].lower() not in JSON_SUFFIXES:
                    which = "a list of captions" if is_list else "no list of captions"
                    raise ValueError(f"{location}, has {which}, unlike {first_rows[not is_list]}: {shortened(text)}.")
            yield record


def _table_rows(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return the location and the values by column of each row."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix == ".parquet":
        return ((location, row) for location, _, row in read_rows(folder.locate(file), file, damage))
    return (json_rows if suffix in JSON_SUFFIXES else csv_rows)(folder, file, damage)


def _build_record(row: Mapping[str, Any], columns: Columns, location: str, file: str) -> Record:
    """Build the record of a table's row, or raise a ValueError if it lacks its image or all captions."""
    name = row.get(columns.image)
    if name is None or name == "":
        raise ValueError(f"{location}, has no {columns.image}.")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"{location}, has {shortened(str(name))} as {columns.image}; wanted is the name of a file.")
    present = [column for column in columns.captions if row.get(column) not in (None, "")]
    with located(location):
        captions = captions_in_row(row, present)
    if not captions:
        raise ValueError(f"{location}, has no {columns.captions[0]}.")
    image_id = row.get(columns.image_id) if columns.image_id else None
    split = row.get(columns.split) if columns.split else None
    is_single = len(columns.captions) == 1 and isinstance(row[columns.captions[0]], str)
    return Record(
        str(name),
        captions,
        location,
        folder=os.path.dirname(file),
        image_id=None if image_id is None or image_id == "" else str(image_id),
        split=checked_split(str(split), location) if split else split_in_path(file),
        number=None if is_single and len(captions) == 1 else 0,
    )


def read_text_pairs(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read texts such as `x.txt` beside `x.jpg` with one caption per line; the names of folders give the splits."""
    images_by_stem = {os.path.splitext(name)[0]: name for name in folder.images}
    for file in files:
        image = images_by_stem.get(os.path.splitext(file)[0])
        if image is None:
            damage.repaired("Texts without an image, left out", file)
            continue
        with damage.skipping():
            captions = [text for _, line in text_lines(folder, file, damage) if (text := line.strip())]
            if not captions:
                raise ValueError(f"{file} holds no captions.")
            yield Record(image, captions, file, split=split_in_path(os.path.dirname(file)), number=0)


def _base(file: str, name: str) -> str:
    """Return the folder from which a name in a JSON file is to be followed; "" for the data set's folder."""
    return os.path.dirname(file) if ".." in name else ""


def _entries(content: Any, name: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the value of each entry of a list in a JSON file; without the list, raise a ValueError."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise ValueError(f"{file} has no list {name!r}.")
    yield from ((f"{file}, {name}[{index}]", entry) for index, entry in enumerate(content[name]))


def _field(record: Any, name: str, location: str, *types: type) -> Any:
    """Return a field of a JSON object, or raise a ValueError if it is not there or has none of these types."""
    if not isinstance(record, dict):
        raise ValueError(f"{location}, is no JSON object.")
    if name not in record:
        raise ValueError(f"{location}, has no {name!r}.")
    if not isinstance(record[name], types) or isinstance(record[name], bool):
        value = shortened(str(record[name]))
        raise ValueError(f"{location}, has the {name!r} {value}; wanted is {JSON_TYPES[types[0]]}.")
    return record[name]
