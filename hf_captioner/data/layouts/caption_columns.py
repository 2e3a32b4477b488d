"""Recognition of a table's columns of images, captions and ids by their names, and reading of captions from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

# Names of columns, those that are preferred first. WebDataset names its columns by the suffixes of files.
IMAGE_COLUMNS = (
    *("image", "img", *(suffix[1:] for suffix in IMAGE_SUFFIXES)),
    *("file_name", "filename", "image_path", "image_file", "image_name", "file_path", "filepath", "file", "path"),
)
CAPTION_COLUMNS = (
    *("captions", "caption", "sentences", "sentence", "raw", "texts", "text", "txt"),
    *("descriptions", "description", "comments", "comment", "json"),
)
ID_COLUMNS = ("image_id", "img_id", "cocoid", "__key__")


class Columns(NamedTuple):
    """Names of a table's columns; several columns hold captions if they are numbered."""

    image: str
    captions: list[str]
    image_id: str | None
    split: str | None


def find_columns(names: Iterable[str], source: str) -> Columns:
    """Find the columns to read among all columns of a `source`, a file or a data set, by their names.

    Raises:
        ValueError: There is no column of images, or none of captions.
    """
    names = list(names)
    lower = {name.strip().lower(): name for name in reversed(names)}
    image = next((lower[name] for name in IMAGE_COLUMNS if name in lower), None)
    captions = find_caption_columns(names)
    if image is None or not captions:
        raise ValueError(
            f"{source!r} has the columns {', '.join(names)}; wanted are image, caption_0, caption_1, … or another "
            f"column of images ({', '.join(IMAGE_COLUMNS[-9:-5])}, …) and of captions "
            f"({', '.join(CAPTION_COLUMNS[:8])}, …). Rename them."
        )
    image_id = next((lower[name] for name in ID_COLUMNS if name in lower), None)
    return Columns(image, captions, image_id, lower.get("split"))


def find_caption_columns(names: Iterable[str]) -> list[str]:
    """Return the columns of captions: those with the preferred name of `CAPTION_COLUMNS`, sorted by their numbers.

    For example, they are `caption_0` and `caption_1` in a table with the columns `caption_1`, `caption_0` and `text`.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := re.fullmatch(rf"({'|'.join(CAPTION_COLUMNS)})(?:[_ -]?(\d+))?", name.strip().lower()):
            found.setdefault(match[1], []).append((int(match[2] or -1), name))
    kind = next((kind for kind in CAPTION_COLUMNS if kind in found), None)
    return [] if kind is None else [name for _, name in sorted(found[kind])]


def captions_in_row(row: Mapping[str, Any], columns: Iterable[str] | None = None) -> list[str]:
    """Return all captions of a row, whose columns of captions are found by name unless they are given.

    A value may be a string, a list, the JSON of a list, or a record such as COCO's and Karpathy's, whose own caption
    columns are then read.
    """
    columns = find_caption_columns(row) if columns is None else columns
    return [caption for name in columns for caption in _captions_in_value(row[name])]


def _captions_in_value(value: Any) -> list[str]:
    """Return the captions in one value of a table; raise a ValueError if it can't hold any."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return captions_in_row(value)
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    if isinstance(value, str):
        return [value]
    if isinstance(value, Iterable):
        return [caption for item in value for caption in _captions_in_value(item)]
    raise ValueError(f"{value!r} is no caption: captions are strings, or lists of strings.")
