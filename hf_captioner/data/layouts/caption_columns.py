"""Recognition of a table's columns of images, captions and ids by their names, and reading of captions from them."""

from __future__ import annotations

import ast
import html
import html.entities
import json
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from ...files import is_utf8
from ...model.images import IMAGE_SUFFIXES
from .damage import Damage, shortened

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
CAPTION_NAME = re.compile(rf"({'|'.join(CAPTION_COLUMNS)})(?:[_ -]?([0-9]{{1,9}}))?")
LONGEST_COLUMN = 40  # characters of the name of a column that may be meant for another one

STRING = r"""'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*\""""
# Lists as Python and numpy write them: ['a', 'b'], ('a', 'b'), ['a' 'b'], array(['a', 'b'], dtype=object).
LIST = re.compile(
    rf"(?:array\()?[\[({{]\s*(?:{STRING}|None|nan)(?:[\s,]+(?:{STRING}|None|nan))*[\s,]*[\])}}](?:,\s*dtype=\w+)?\)?",
    re.DOTALL,
)
# The suffix of an image's name. Some of Flickr8k's have a number behind it.
SUFFIX = rf"\.(?:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})(?:\.\d+)?"
NAMED_IMAGE = re.compile(rf"{SUFFIX}\s*[#,;\t|]", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")


class Columns(NamedTuple):
    """Names of a table's columns; several columns hold captions if they are numbered."""

    image: str
    captions: list[str]
    image_id: str | None
    split: str | None
    ignored: list[str]


def has_columns(names: Iterable[str]) -> bool:
    """Return whether there are a column of images and one of captions among all columns."""
    names = list(names)
    return bool(find_caption_columns(names)) and any(name.strip().lower() in IMAGE_COLUMNS for name in names)


def find_columns(names: Iterable[str], source: str) -> Columns:
    """Find the columns to read among all columns of a `source`, a file or a data set, by their names.

    Raises:
        ValueError: There is no column of images, or none of captions, or one of several numbered ones is missing.
    """
    names = list(names)
    lower = {name.strip().lower(): name for name in reversed(names)}
    image = next((lower[name] for name in IMAGE_COLUMNS if name in lower), None)
    captions = find_caption_columns(names)
    if image is None or not captions:
        raise ValueError(
            f"{_shown([source])} has the columns {_shown(names)}; wanted are image, caption_0, caption_1, … or other "
            "columns of images (file_name, image_path, path, …) and of captions (captions, text, sentences, …). Rename "
            "them."
        )
    image_id = next((lower[name] for name in ID_COLUMNS if name in lower), None)
    split = lower.get("split")
    ignored = [name for name in names if name not in (image, image_id, split, *captions)]
    _refuse_gaps(captions, ignored, source)
    return Columns(image, captions, image_id, split, ignored)


def _refuse_gaps(captions: list[str], ignored: list[str], source: str) -> None:
    """Raise a ValueError if numbered columns of captions lack one, or another column seems to be meant for one."""
    matches = [CAPTION_NAME.fullmatch(name.strip().lower()) for name in captions]
    numbers = {int(match[2]) for match in matches if match and match[2]}
    gaps = (n for n in range(min(1, *numbers), max(numbers)) if n not in numbers) if len(numbers) > 1 else iter(())
    if (gap := next(gaps, None)) is not None:
        raise ValueError(f"{_shown([source])} has the columns {_shown(captions)}, but none with the number {gap}.")
    for name in ignored if numbers else ():
        if name[-1:].isdigit() and len(name) <= LONGEST_COLUMN and get_close_matches(name.lower(), captions, 1, 0.75):
            raise ValueError(
                f"{_shown([source])} has the columns {_shown(captions)} and {name!r}. If it holds captions, rename "
                "it like the others; otherwise rename or remove it."
            )


def _shown(names: list[str]) -> str:
    """Return names for a message; what is beyond a hundred characters is left out."""
    text = ", ".join(names)
    return text if len(text) <= 100 else f"{text[:100]}…"


def find_caption_columns(names: Iterable[str]) -> list[str]:
    """Return the columns of captions: those with the preferred name of `CAPTION_COLUMNS`, sorted by their numbers.

    For example, they are `caption_0` and `caption_1` in a table with the columns `caption_1`, `caption_0` and `text`.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if match := CAPTION_NAME.fullmatch(name.strip().lower()):
            found.setdefault(match[1], []).append((int(match[2] or -1), name))
    kind = next((kind for kind in CAPTION_COLUMNS if kind in found), None)
    return [] if kind is None else [name for _, name in sorted(found[kind])]


def captions_in_row(row: Mapping[str, Any], columns: Iterable[str] | None = None) -> list[str]:
    """Return all captions of a row, whose columns of captions are found by name unless they are given.

    A value may be a string, a list, a list written by JSON, Python or numpy, or a record such as COCO's and Karpathy's,
    whose own caption columns are then read.

    Raises:
        ValueError: A value can't hold captions.
    """
    columns = find_caption_columns(row) if columns is None else columns
    try:
        return [caption for name in columns for caption in _captions_in_value(row[name])]
    except RecursionError as e:
        raise ValueError("The captions are nested too deeply.") from e


def _captions_in_value(value: Any) -> list[str]:
    """Return the captions in one value of a table; raise a ValueError if it can't hold any."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        items = parse_list(value)
        return [value] if items is None else items
    if isinstance(value, Mapping) and find_caption_columns(value):
        return captions_in_row(value)
    if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        return [caption for item in value for caption in _captions_in_value(item)]
    raise ValueError(f"{shortened(str(value))} is no caption: captions are strings, or lists of strings.")


def parse_list(text: str) -> list[str] | None:
    """Return the strings in the text of a list, as JSON, Python or numpy write it; None if the text is no list.

    Raises:
        ValueError: The text begins as a list and is none, because a part of it is missing.
    """
    text = text.strip()
    if not re.match(r"""(?:array\()?[\[({]\s*['"]""", text):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = None
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return items
    if LIST.fullmatch(text):
        try:
            return [ast.literal_eval(string) for string in re.findall(STRING, text, re.DOTALL)]
        except (SyntaxError, ValueError):  # a line break, or a number of a character that is none
            pass
    if text.startswith(("[", "array(")):
        raise ValueError(f"{shortened(text)} begins as a list of captions, and is none.")
    return None


def clean_captions(captions: Iterable[str], location: str, damage: Damage) -> list[str]:
    """Return captions with the characters that HTML's entities such as `&quot;` stand for, and report these.

    Captions that name an image, as one does to which a line was joined, are reported too, and kept.

    Raises:
        ValueError: A caption holds half a character, which can't be written to any file.
    """
    return [_clean_caption(caption, location, damage) for caption in captions]


def _clean_caption(caption: str, location: str, damage: Damage) -> str:
    """Return a caption without HTML's entities."""
    cleaned = caption
    for _ in range(2 if "&" in caption else 0):  # twice, for `&amp;quot;`
        cleaned = ENTITY.sub(_unescape, cleaned)
    if cleaned != caption:
        damage.repaired("Captions with HTML's entities such as &quot;, replaced", location)
    if NAMED_IMAGE.search(cleaned):
        damage.repaired("Captions that name an image's file, kept whole", location)
    if not is_utf8(cleaned):
        raise ValueError(f"{location}, has a caption with half a character: {shortened(cleaned)}.")
    return cleaned


def _unescape(entity: re.Match[str]) -> str:
    """Return the character of an HTML entity; the text as it is if there is no such entity."""
    is_known = entity[0][1] == "#" or entity[0][1:] in html.entities.html5
    return html.unescape(entity[0]) if is_known else entity[0]
