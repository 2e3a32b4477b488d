"""Files that list captions: Karpathy's and COCO's JSON, tables, and texts beside images. Each yields `Record`s.

Every reader takes the folder, the files to read and a `Damage`, as does the one in `caption_lines.py`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import parquet

from .caption_columns import captions_in_row, find_columns
from .damage import Damage
from .image_folder import ImageFolder
from .splits import canonical_split, split_in_path


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


def read_karpathy(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read Karpathy's `dataset_flickr8k.json`, `dataset_flickr30k.json` or `dataset_coco.json`.

    Images of `restval`, the part of COCO's validation images that all papers train on, are for training.
    """
    for file in files:
        for location, image in _entries(read_json(folder, file), "images", file):
            with damage.skipping():
                captions = captions_in_row({"raw": [s["raw"] for s in _field(image, "sentences", location)]})
                split = _field(image, "split", location)
                name = _field(image, "filename", location)  # distinct even in COCO, whatever became of its folders
                if split == "restval":
                    damage.repaired(f"{file}: images of restval counted as training", str(name))
                image_id = str(image["cocoid"]) if "cocoid" in image else None
                yield Record(name, captions, location, image_id=image_id, split=canonical_split(split), number=0)


def read_coco(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read COCO's `captions_train2017.json` and `captions_val2017.json`, or those of 2014 if there are no others."""
    years = {match[0] for file in files if (match := re.search(r"20\d\d", os.path.basename(file)))}
    if len(years) > 1:
        files = [file for file in files if max(years) in os.path.basename(file)]
        damage.report(f"Annotations of {' and '.join(sorted(years))} share images: those of {max(years)} are read.")
    for file in files:
        content = read_json(folder, file)
        images: dict[Any, tuple[str, str]] = {}  # location and file name by id
        captions: dict[Any, list[str]] = {}
        for location, image in _entries(content, "images", file):
            with damage.skipping():
                image_id, name = (_field(image, key, location) for key in ("id", "file_name"))
                if image_id in images:
                    raise ValueError(f"{location}: the id {image_id} occurs twice.")
                images[image_id], captions[image_id] = (location, name), []
        caption_ids: set[Any] = set()
        for location, annotation in _entries(content, "annotations", file):
            with damage.skipping():
                caption_id, image_id = (_field(annotation, key, location) for key in ("id", "image_id"))
                if caption_id in caption_ids:
                    raise ValueError(f"{location}: the id {caption_id} occurs twice.")
                if image_id not in images:
                    raise ValueError(f"{location}: there is no image with the id {image_id}.")
                caption_ids.add(caption_id)
                captions[image_id].append(_field(annotation, "caption", location))
        split = split_in_path(os.path.basename(file))
        for image_id, (location, name) in images.items():
            yield Record(name, captions[image_id], location, image_id=str(image_id), split=split, number=0)


def read_tables(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read tables with a column of image names and one or more of captions: CSV, TSV, JSON lines or Parquet.

    A row holds all captions of an image or one of them. The split is a column, or part of the file's or folder's name.
    """
    for file in files:
        columns = None
        for location, row in _table_rows(folder, file, damage):
            if columns is None:
                columns = find_columns((name for name in row if name is not None), file)
            with damage.skipping():
                missing = [name for name in (columns.image, *columns.captions) if row.get(name) in (None, "")]
                if missing == columns.captions or columns.image in missing:
                    raise ValueError(f"{location}, has no {missing[0]}.")
                if None in row:
                    raise ValueError(
                        f"{location}, has more fields than the header; put captions with commas in quotes."
                    )
                captions = captions_in_row(row, [name for name in columns.captions if name not in missing])
                split = row.get(columns.split) if columns.split else None
                is_single = len(columns.captions) == 1 and isinstance(row[columns.captions[0]], str)
                yield Record(
                    str(row[columns.image]),
                    captions,
                    location,
                    folder=os.path.dirname(file),
                    image_id=None if columns.image_id is None else str(row[columns.image_id]),
                    split=canonical_split(str(split)) if split else split_in_path(file),
                    number=None if is_single and len(captions) == 1 else 0,
                )


def _table_rows(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the location and the values by column of each row; values beyond a CSV's header have the key None."""
    suffix = Path(file).suffix.lower()
    if suffix == ".parquet":
        start = 0
        for batch in parquet.ParquetFile(folder.root / file).iter_batches():
            for index, row in enumerate(batch.to_pylist(), start):
                yield f"{file}, row {index}", row
            start += len(batch)
    elif suffix == ".jsonl":
        for number, line in text_lines(folder, file, damage):
            location = f"{file}, line {number}"
            with damage.skipping():
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as e:
                        raise ValueError(f"{location}, is not JSON: {e.msg} at character {e.pos + 1}.") from e
                    if not isinstance(row, dict):
                        raise ValueError(f"{location}, is no JSON object.")
                    yield location, row
    else:
        lines = (line for _, line in text_lines(folder, file, damage))
        header = next(lines, "")
        delimiter = max(",\t;|", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        reader = csv.DictReader(lines, names, delimiter=delimiter)
        for row in reader:
            yield f"{file}, line {reader.line_num + 1}", row


def read_text_pairs(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read texts such as `x.txt` beside `x.jpg` with one caption per line; the names of folders give the splits."""
    images_by_stem = {os.path.splitext(name)[0]: name for name in folder.images}
    for file in files:
        lines = (line.strip() for _, line in text_lines(folder, file, damage))
        captions = [line for line in lines if line]
        if image := images_by_stem.get(os.path.splitext(file)[0]):
            yield Record(image, captions, file, split=split_in_path(os.path.dirname(file)), number=0)
        else:
            damage.repaired("Texts without an image, left out", file)


def text_lines(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, which begin at 1."""
    with open(folder.root / file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            with damage.skipping():
                yield number, _decode(line.removeprefix(b"\xef\xbb\xbf"), f"{file}, line {number}")


def read_json(folder: ImageFolder, file: str) -> Any:
    """Return the content of a JSON file, or raise a ValueError if it is not JSON, or not UTF-8."""
    content = (folder.root / file).read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        start = content.rfind(b"\n", 0, e.start) + 1
        _decode(content[start:].split(b"\n", 1)[0], f"{file}, line {line}")
        raise
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}, line {e.lineno}, is not JSON: {e.msg} at character {e.colno}.") from e


def _decode(text: bytes, location: str) -> str:
    """Decode UTF-8, or raise a ValueError that says where the first invalid byte is."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{location}, is not UTF-8 (byte 0x{text[e.start]:02x} at {e.start + 1}); if it is Latin-1, convert the "
            "file: iconv -f latin1 -t utf-8."
        ) from e


def _entries(content: Any, name: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the value of each entry of a list in a JSON file; without the list, raise a ValueError."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise ValueError(f"{file} has no list {name!r}.")
    yield from ((f"{file}, {name}[{index}]", entry) for index, entry in enumerate(content[name]))


def _field(record: Mapping[str, Any], name: str, location: str) -> Any:
    """Return a field of a JSON object, or raise a ValueError if it is not there."""
    if name not in record:
        raise ValueError(f"{location}, has no {name!r}.")
    return record[name]
