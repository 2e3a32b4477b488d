"""Files that list captions, read record by record, with the damage that is known of them.

Every reader takes the folder, the files to read and a `Damage`, and yields `Record`s.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .caption_columns import IMAGE_SUFFIXES, captions_of, find_columns
from .damage import Damage
from .image_folder import ImageFolder
from .splits import split_in, split_of


@dataclass(frozen=True)
class Record:
    """Captions of an image from one place in a file."""

    image: str  # its file, relative to `folder`
    captions: list[str]
    place: str  # for errors: file and line
    folder: str = ""  # relative to the data set's
    image_id: str | None = None
    split: str | None = None
    number: int | None = None  # of an image, no two records have the same one; None where that may be


IMAGE_NAME = rf"[^\t#|]+?\.(?:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})(?:\.\d+)?"


class LineForm(NamedTuple):
    """A form of file with a caption a line."""

    first: str  # what its first line matches
    head: str  # what stands before a caption
    is_csv: bool = False  # captions with commas are in quotes


LINE_FORMS = (
    LineForm(r".*#\d+\s", rf"(?P<image>{IMAGE_NAME})#(?P<number>\d+)\s+"),
    LineForm(r"[^,]*\|", rf"(?P<image>{IMAGE_NAME})\s*\|\s*(?P<number>\d+)\s*(?P<bar>\|?)\s*"),
    LineForm(r"[^,]*,[^,]*number[^,]*,", rf'"?(?P<image>{IMAGE_NAME})"?,\s*(?P<number>\d+)\s*,\s*', is_csv=True),
    LineForm(r"", rf'"?(?P<image>{IMAGE_NAME})"?,', is_csv=True),
)


def text_lines(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[int, str]]:
    """Lines of a text file, counted from 1."""
    with open(folder.root / file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            with damage.skipping():
                yield number, _decoded(line.removeprefix(b"\xef\xbb\xbf"), f"{file}, line {number}")


def _decoded(text: bytes, place: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{place}, is not UTF-8 (byte 0x{text[e.start]:02x} at {e.start + 1}); if it is Latin-1, convert the file: "
            "iconv -f latin1 -t utf-8."
        ) from e


def read_caption_lines(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """A caption a line behind the name of its image: Flickr8k's and Flickr30k's token files, Kaggle's captions.txt.

    Splits are Flickr8k's lists of names, where they are there.
    """
    splits = _split_lists(folder, damage)
    for file in files:
        lines = list(text_lines(folder, file, damage))
        form = next(form for form in LINE_FORMS if re.match(form.first, lines[0][1] if lines else ""))
        head = re.compile(form.head, re.IGNORECASE)
        if lines and not head.match(lines[0][1]):  # names of columns
            del lines[0]
        known = {match["image"] for _, line in lines if (match := head.match(line))}
        found: list[tuple[int, dict[str, str], str]] = []
        for number, line in lines:
            pieces = list(_pieces(line.strip(), head, known))
            if pieces and pieces[0][0] is None:
                rest = pieces.pop(0)[1]
                if not found:
                    damage.broken(f"{file}, line {number}, has no image's name before its caption.")
                    continue
                found[-1] = (*found[-1][:2], f"{found[-1][2]} {rest}")
                damage.mended(f"{file}: line breaks inside captions, taken out", f"line {number}")
            if len(pieces) > 1:
                damage.mended(f"{file}: lines run together with the next, taken apart", f"line {number}")
            found += [(number, fields, caption) for fields, caption in pieces if fields is not None]
        captioned = set()
        for number, fields, caption in found:
            record = _caption_record(file, number, fields, caption, form, splits, damage)
            captioned.add(record.image)
            yield record
        for name in (splits or {}).keys() - captioned:
            damage.mended(f"Images that a split lists but {file} does not", name)


def _pieces(line: str, head: re.Pattern[str], known: set[str]) -> Iterator[tuple[dict[str, str] | None, str]]:
    """What stands in a line: heads with the captions behind them; a caption without head belongs to the line before."""
    fields: dict[str, str] | None = None
    start = 0
    for match in head.finditer(line):
        found, name = match.groupdict(), match["image"]
        if match.start() > 0 or fields is not None:
            # The match begins with the end of the caption before.
            likely = re.search(r"(?:\d+(?:_[0-9a-f]+)?|[^\s.]+)\.\w+(?:\.\d+)?$", name)
            name = next((name[i:] for i in range(len(name)) if name[i:] in known), likely[0] if likely else name)
            yield fields, line[start : match.start("image") + len(match["image"]) - len(name)].strip()
        fields, start = {**found, "image": name}, match.end()
    if fields is not None or line.strip():
        yield fields, line[start:].strip()


def _caption_record(
    file: str,
    line: int,
    fields: Mapping[str, str],
    caption: str,
    form: LineForm,
    splits: Mapping[str, str] | None,
    damage: Damage,
) -> Record:
    name = re.sub(r"\.\d+$", "", fields["image"])
    if name != fields["image"]:
        kind = "file names with a number behind their ending, which is taken off"
        damage.mended(f"{file}: {kind}", f"{fields['image']} in line {line}")
    if fields.get("bar") == "":
        damage.mended(f"{file}: captions without a separator before them", f"line {line}")
    if form.is_csv and caption.startswith('"'):
        kind = "captions in quotes for their commas" if caption.endswith('"') else "captions with an unpaired quote"
        damage.mended(f"{file}: {kind}, which are taken off", f"line {line}")
        caption = caption[1:].removesuffix('"').replace('""', '"')
    split = None if splits is None else splits.get(name)
    number = int(fields["number"]) if "number" in fields else None
    return Record(name, [caption], f"{file}, line {line}", split=split, number=number)


def _split_lists(folder: ImageFolder, damage: Damage) -> dict[str, str] | None:
    """The split of each image by its name, from files such as `Flickr_8k.trainImages.txt`; None without any."""
    splits: dict[str, str] = {}
    for file in folder.beside("*[._]trainImages.txt", "*[._]devImages.txt", "*[._]testImages.txt"):
        split = split_of(re.search(r"(\w+?)Images\.txt$", file)[1].rpartition("_")[2])  # type: ignore[index]
        for number, line in text_lines(folder, file, damage):
            name = re.sub(r"\.\d+$", "", line.strip())
            if name and splits.setdefault(name, split) != split:
                damage.broken(f"{file}, line {number}: {name!r} is in the list of {splits[name]} too.")
    return splits or None


def read_karpathy(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Karpathy's `dataset_flickr8k.json`, `dataset_flickr30k.json` or `dataset_coco.json`.

    `restval`, images of COCO's validation that all papers train on, is training.
    """
    for file in files:
        for index, image in enumerate(_list_in(read_json(folder, file), "images", file)):
            place = f"{file}, images[{index}]"
            with damage.skipping():
                captions = captions_of({"raw": [s["raw"] for s in _field(image, "sentences", place)]})
                split = _field(image, "split", place)
                if split == "restval":
                    damage.mended(f"{file}: images of restval counted as training", str(image["filename"]))
                name = _field(image, "filename", place)  # COCO's are distinct, wherever its folders went
                image_id = str(image["cocoid"]) if "cocoid" in image else None
                yield Record(name, captions, place, image_id=image_id, split=split_of(split), number=0)


def read_coco(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """COCO's `captions_train2017.json` and `captions_val2017.json`, or those of 2014."""
    years = {match[0] for file in files if (match := re.search(r"20\d\d", os.path.basename(file)))}
    if len(years) > 1:
        files = [file for file in files if max(years) in os.path.basename(file)]
        damage.report(f"Annotations of {' and '.join(sorted(years))} share images: {max(years)} is taken.")
    for file in files:
        content = read_json(folder, file)
        captions: dict[Any, list[str]] = {}
        seen: set[Any] = set()
        for index, image in enumerate(_list_in(content, "images", file)):
            with damage.skipping():
                if captions.setdefault(_field(image, "id", f"{file}, images[{index}]"), []) or image["id"] in seen:
                    raise ValueError(f"{file}, images[{index}]: the id {image['id']} is there twice.")
                seen.add(image["id"])
        numbers: set[Any] = set()
        for index, annotation in enumerate(_list_in(content, "annotations", file)):
            place = f"{file}, annotations[{index}]"
            with damage.skipping():
                number, image_id = (_field(annotation, name, place) for name in ("id", "image_id"))
                if number in numbers:
                    raise ValueError(f"{place}: the id {number} is there twice.")
                if image_id not in captions:
                    raise ValueError(f"{place}: there is no image with the id {image_id}.")
                numbers.add(number)
                captions[image_id].append(_field(annotation, "caption", place))
        split = split_in(os.path.basename(file))
        for index, image in enumerate(content["images"]):
            if image.get("id") in seen:
                seen.remove(image["id"])
                name, place = image["file_name"], f"{file}, images[{index}]"
                yield Record(name, captions[image["id"]], place, image_id=str(image["id"]), split=split, number=0)


def read_tables(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """CSV, TSV, JSON lines or Parquet with a column of images' names and one or more of captions.

    A row may hold all captions of an image or one of them. Splits are a column, or named by file or folder.
    """
    for file in files:
        columns = None
        for place, row in _rows(folder, file, damage):
            if columns is None:
                columns = find_columns((name for name in row if name is not None), file)
            with damage.skipping():
                missing = [name for name in (columns.image, *columns.captions) if row.get(name) in (None, "")]
                if missing == columns.captions or columns.image in missing:
                    raise ValueError(f"{place}, has no {missing[0]}.")
                if None in row:
                    raise ValueError(f"{place}, has more fields than the header; put captions with commas in quotes.")
                captions = captions_of(row, [name for name in columns.captions if name not in missing])
                split = row.get(columns.split) if columns.split else None
                is_single = len(columns.captions) == 1 and isinstance(row[columns.captions[0]], str)
                yield Record(
                    str(row[columns.image]),
                    captions,
                    place,
                    folder=os.path.dirname(file),
                    image_id=None if columns.image_id is None else str(row[columns.image_id]),
                    split=split_of(str(split)) if split else split_in(file),
                    number=None if is_single and len(captions) == 1 else 0,
                )


def _rows(folder: ImageFolder, file: str, damage: Damage) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Rows of a table with their places."""
    suffix = Path(file).suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet

        start = 0
        for batch in parquet.ParquetFile(folder.root / file).iter_batches():
            for index, row in enumerate(batch.to_pylist(), start):
                yield f"{file}, row {index}", row
            start += len(batch)
    elif suffix == ".jsonl":
        for number, line in text_lines(folder, file, damage):
            place = f"{file}, line {number}"
            with damage.skipping():
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as e:
                        raise ValueError(f"{place}, is not JSON: {e.msg} at character {e.pos + 1}.") from e
                    if not isinstance(row, dict):
                        raise ValueError(f"{place}, is no JSON object.")
                    yield place, row
    else:
        lines = (line for _, line in text_lines(folder, file, damage))
        header = next(lines, "")
        delimiter = max(",\t;|", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        reader = csv.DictReader(lines, names, delimiter=delimiter)
        for row in reader:
            yield f"{file}, line {reader.line_num + 1}", row


def read_text_pairs(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """`x.txt` beside `x.jpg`: every line a caption. Splits are named by folders."""
    stems = {os.path.splitext(name)[0]: name for name in folder.images}
    for file in files:
        lines = (line.strip() for _, line in text_lines(folder, file, damage))
        captions = [line for line in lines if line]
        if image := stems.get(os.path.splitext(file)[0]):
            yield Record(image, captions, file, split=split_in(os.path.dirname(file)), number=0)
        else:
            damage.mended("Texts without an image, left out", file)


def read_json(folder: ImageFolder, file: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON, or not UTF-8.
    """
    content = (folder.root / file).read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        start = content.rfind(b"\n", 0, e.start) + 1
        _decoded(content[start:].split(b"\n", 1)[0], f"{file}, line {line}")
        raise
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}, line {e.lineno}, is not JSON: {e.msg} at character {e.colno}.") from e


def _list_in(content: Any, name: str, file: str) -> Iterable[dict[str, Any]]:
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise ValueError(f"{file} has no list {name!r}.")
    return content[name]


def _field(record: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in record:
        raise ValueError(f"{place}, has no {name!r}.")
    return record[name]
