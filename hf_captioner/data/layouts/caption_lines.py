"""Text files with one caption per line, behind the name of its image, and the known damage of such files.

Flickr8k's and Flickr30k's token files and Kaggle's `captions.txt` have this form. Their published copies contain line
breaks inside captions, lines that were joined with the next one, and captions in quotes for their commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .annotation_files import Record, text_lines
from .caption_columns import IMAGE_SUFFIXES
from .damage import Damage
from .image_folder import ImageFolder
from .splits import canonical_split

# The name of an image. Some of Flickr8k's have a number behind their suffix.
IMAGE_NAME = rf"[^\t#|]+?\.(?:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})(?:\.\d+)?"


class LineFormat(NamedTuple):
    """Form of the lines of a file: each is a head, which names the image, and a caption."""

    first_line: str  # pattern by which the form is recognised in a file's first line
    head: str  # pattern of a head, with the groups `image` and, where captions are numbered, `number`
    is_csv: bool = False  # whether captions that contain commas are in quotes


# In the order in which they are tried.
LINE_FORMATS = (
    LineFormat(r".*#\d+\s", rf"(?P<image>{IMAGE_NAME})#(?P<number>\d+)\s+"),
    LineFormat(r"[^,]*\|", rf"(?P<image>{IMAGE_NAME})\s*\|\s*(?P<number>\d+)\s*(?P<bar>\|?)\s*"),
    LineFormat(r"[^,]*,[^,]*number[^,]*,", rf'"?(?P<image>{IMAGE_NAME})"?,\s*(?P<number>\d+)\s*,\s*', is_csv=True),
    LineFormat(r"", rf'"?(?P<image>{IMAGE_NAME})"?,', is_csv=True),
)


class CaptionLine(NamedTuple):
    """A caption with the groups of its head, and the number of its line in the file."""

    number: int
    head: Mapping[str, str]
    caption: str


def read_caption_lines(folder: ImageFolder, files: Sequence[str], damage: Damage) -> Iterator[Record]:
    """Read text files with one caption per line; lists of image names, as Flickr8k has them, give the splits."""
    splits = _read_split_lists(folder, damage)
    for file in files:
        lines = list(text_lines(folder, file, damage))
        first_line = lines[0][1] if lines else ""
        line_format = next(known for known in LINE_FORMATS if re.match(known.first_line, first_line))
        head = re.compile(line_format.head, re.IGNORECASE)
        has_header = bool(lines) and not head.match(first_line)
        captioned = set()
        for caption_line in _repair_lines(file, lines[has_header:], head, damage):
            record = _build_record(file, caption_line, line_format, splits, damage)
            captioned.add(record.image)
            yield record
        for name in (splits or {}).keys() - captioned:
            damage.repaired(f"Images that a split lists but {file} does not", name)


def _repair_lines(
    file: str, lines: Sequence[tuple[int, str]], head: re.Pattern[str], damage: Damage
) -> list[CaptionLine]:
    """Return the captions of a file; join those that are broken into lines and separate lines that are joined."""
    known_names = {match["image"] for _, line in lines if (match := head.match(line))}
    captions: list[CaptionLine] = []
    for number, line in lines:
        continuation, parts = split_line(line.strip(), head, known_names)
        if continuation and not captions:
            damage.broken(f"{file}, line {number}, has no image's name before its caption.")
            continue
        if continuation:
            captions[-1] = captions[-1]._replace(caption=f"{captions[-1].caption} {continuation}")
            damage.repaired(f"{file}: line breaks inside captions, removed", f"line {number}")
        if len(parts) > 1:
            damage.repaired(f"{file}: lines joined with the next one, separated", f"line {number}")
        captions += [CaptionLine(number, fields, caption) for fields, caption in parts]
    return captions


def split_line(line: str, head: re.Pattern[str], known_names: set[str]) -> tuple[str, list[tuple[dict[str, str], str]]]:
    """Split a line at its heads, of which an intact line has one, at its start.

    Return the text before the first head, which continues the caption of the line before, and the pairs of a head's
    groups with the caption behind it. `known_names` are those at the start of a line somewhere in the file.
    """
    heads, starts, ends = [], [], []
    for match in head.finditer(line):
        start, name = 0, match["image"]
        if match.start() > 0:
            # Any text may be part of a name, so this match begins with the end of the caption before it. Flickr's
            # names are an id, an underscore and hexadecimal digits, and a caption may end right before them.
            likely = re.search(r"(?:\d+(?:_[0-9a-f]+)?|[^\s.]+)\.\w+(?:\.\d+)?$", name)
            known = (name[i:] for i in range(len(name)) if name[i:] in known_names)
            name = next(known, likely[0] if likely else name)
            start = match.end("image") - len(name)
        heads.append({**match.groupdict(), "image": name})
        starts.append(start)
        ends.append(match.end())
    if not heads:
        return line, []
    captions = [line[end:start].strip() for end, start in zip(ends, [*starts[1:], len(line)], strict=True)]
    return line[: starts[0]].strip(), list(zip(heads, captions, strict=True))


def _build_record(
    file: str, line: CaptionLine, line_format: LineFormat, splits: Mapping[str, str] | None, damage: Damage
) -> Record:
    """Build the record of one caption, and repair the damage of its line."""
    name = re.sub(r"\.\d+$", "", line.head["image"])
    if name != line.head["image"]:
        kind = "file names with a number behind their suffix, which is removed"
        damage.repaired(f"{file}: {kind}", f"{line.head['image']} in line {line.number}")
    if line.head.get("bar") == "":
        damage.repaired(f"{file}: captions without a separator before them", f"line {line.number}")
    caption = line.caption
    if line_format.is_csv and caption.startswith('"'):
        kind = "captions in quotes for their commas" if caption.endswith('"') else "captions with an unpaired quote"
        damage.repaired(f"{file}: {kind}, which are removed", f"line {line.number}")
        caption = caption[1:].removesuffix('"').replace('""', '"')
    split = None if splits is None else splits.get(name)
    number = int(line.head["number"]) if "number" in line.head else None
    return Record(name, [caption], f"{file}, line {line.number}", split=split, number=number)


def _read_split_lists(folder: ImageFolder, damage: Damage) -> dict[str, str] | None:
    """Read the split of each image from lists of names such as `Flickr_8k.trainImages.txt`; None without any list."""
    splits: dict[str, str] = {}
    for suffix in ("trainImages.txt", "devImages.txt", "testImages.txt"):
        for file in folder.beside(f"*[._]{suffix}"):
            split = canonical_split(suffix.removesuffix("Images.txt"))
            for number, line in text_lines(folder, file, damage):
                name = re.sub(r"\.\d+$", "", line.strip())
                if name and splits.setdefault(name, split) != split:
                    damage.broken(f"{file}, line {number}: {name!r} is in the list of {splits[name]} too.")
    return splits or None
