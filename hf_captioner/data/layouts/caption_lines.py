"""Text files with one caption per line, behind the name of its image, and the known damage of such files.

Flickr8k's and Flickr30k's token files and Kaggle's `captions.txt` have this form. Their published copies contain line
breaks inside captions, lines that were joined with the next one, and captions in quotes for their commas.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from .annotation_files import Record, each_file, read_tables
from .caption_columns import IMAGE_COLUMNS, SUFFIX, has_columns
from .damage import Damage, shortened
from .image_folder import ImageFolder
from .splits import canonical_split, split_in_path
from .text_files import SEPARATOR, Lines, text_lines

LONGEST_NAME = 255  # characters of a file's name
NUM_LINES_TRIED = 50  # lines at the beginning of a file that tell its form
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"\s*')


class LineFormat:
    """Form of the lines of a file: each is a head, which names the image, and a caption.

    Args:
        separator: Pattern of what is behind the name of the image, with the group `number` if captions are numbered.
        trace: Pattern of what a damaged head leaves, which no caption begins with.
        is_csv: Whether captions that contain commas are in quotes.
    """

    def __init__(self, separator: str, trace: str, *, is_csv: bool = False) -> None:
        quote = '"?' if is_csv else ""
        self.head = re.compile(rf'{quote}(?P<image>[^\t#|"]+?{SUFFIX}){separator}', re.IGNORECASE)
        self.tail = re.compile(rf"(?P<image>{SUFFIX}){separator}", re.IGNORECASE)  # of a head within a line
        self.trace = re.compile(rf"\S*{SUFFIX}|{trace}", re.IGNORECASE)
        self.is_csv, self.is_numbered = is_csv, "(?P<number>" in separator


LINE_FORMATS = (
    LineFormat(r"#(?P<number>\d{1,9})(?:\s+|$)", r"\S*#\d|[^\t]*\t"),
    LineFormat(r"\s*\|\s*(?P<number>\d{1,9})\s*(?P<bar>\|?)\s*", r"[^|]*\|"),
    LineFormat(r'"?,\s*(?P<number>\d{1,9})\s*,\s*', r"\S*,\s*\d+\s*,", is_csv=True),
    LineFormat(r'"?[,;\t]', r"\S*[,;\t]\S", is_csv=True),
)


class CaptionLine(NamedTuple):
    """A caption with the groups of its head, and the number of its line in the file."""

    number: int
    head: Mapping[str, str]
    caption: str


class KnownNames:
    """Names of images that occur at the start of a line or in the folder."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.lengths = sorted({len(name) for name in self.names if len(name) <= LONGEST_NAME}, reverse=True)

    def ending(self, text: str) -> str | None:
        """Return the longest of these names with which a text ends, or None."""
        return next((text[-n:] for n in self.lengths if text[-n:] in self.names), None)


@each_file
def read_caption_lines(folder: ImageFolder, file: str, damage: Damage) -> Iterator[Record]:
    """Read a text file with one caption per line; lists of image names, as Flickr8k has them, give the splits."""
    lines = [(number, text) for number, line in text_lines(folder, file, damage) if (text := line.strip())]
    lines = lines[bool(lines and SEPARATOR.match(lines[0][1])) :]
    form, num_matches = find_format([line for _, line in lines])
    if lines and not form.head.match(lines[0][1]):
        columns = re.split(r"[,;\t|]", lines[0][1])
        is_known = has_columns(columns)
        in_order = columns[0].strip(' "').lower() in IMAGE_COLUMNS and len(columns) == 2 + form.is_numbered
        if is_known and not (num_matches and in_order):
            yield from read_tables(folder, [file], damage)
            return
        if is_known or not form.trace.match(lines[0][1]):
            if not is_known:
                damage.repaired(f"{file}: the first line, taken for names of columns", shortened(lines[0][1]))
            lines = lines[1:]
    splits = _read_split_lists(folder, damage)
    names = (os.path.basename(image) for image in folder.images)
    heads = (match["image"] for _, line in lines if (match := form.head.match(line)))
    known_names = KnownNames({*names, *(name for name in heads if " " not in name)})
    captioned = set()
    for caption_line in _repair_lines(file, lines, form, known_names, damage):
        with damage.skipping():
            record = _build_record(file, caption_line, form, splits, damage)
            captioned.add(record.image)
            yield record
    for name in sorted((splits or {}).keys() - captioned):
        damage.repaired(f"Images that a split lists but {file} does not", name)


def find_format(lines: list[str]) -> tuple[LineFormat, int]:
    """Return the form of a file's lines, and how many of the first lines have it."""
    tried = [line.strip() for line in lines[:NUM_LINES_TRIED]]
    counts = [sum(bool(form.head.match(line)) for line in tried) for form in LINE_FORMATS]
    return LINE_FORMATS[counts.index(max(counts))], max(counts)


def _repair_lines(
    file: str, lines: Lines, form: LineFormat, known_names: KnownNames, damage: Damage
) -> list[CaptionLine]:
    """Return the captions of a file; join those that are broken into lines and separate lines that are joined."""
    captions: list[CaptionLine] = []
    for number, line in lines:
        continuation, parts = split_line(line, form, known_names)
        if continuation and (not captions or form.trace.match(continuation[:LONGEST_NAME])):
            damage.broken(f"{file}, line {number}, has no image's name before its caption.")
        elif continuation:
            captions[-1] = captions[-1]._replace(caption=f"{captions[-1].caption} {continuation}")
            damage.repaired(f"{file}: line breaks inside captions, removed", f"line {number}")
        if len(parts) > 1:
            damage.repaired(f"{file}: lines joined with the next one, separated", f"line {number}")
        captions += [CaptionLine(number, fields, caption) for fields, caption in parts]
    return captions


def split_line(line: str, form: LineFormat, known_names: KnownNames) -> tuple[str, list[tuple[dict[str, str], str]]]:
    """Split a line at its heads, of which an intact line has one, at its start.

    Returns:
        The text before the first head, which continues the caption of the line before, and pairs of a head's groups
        with the caption behind it.
    """
    first = form.head.match(line)
    if first and form.is_csv and QUOTED.fullmatch(line, first.end()):
        return "", [(first.groupdict(), line[first.end() :].strip())]
    heads, starts, ends = [], [], []
    # A name with spaces may be the end of a caption and the name behind it.
    first_name = os.path.basename(first["image"].replace("\\", "/")) if first else ""
    if first and (" " not in first_name or known_names.ending(first_name) in (None, first_name)):
        heads, starts, ends = [first.groupdict()], [0], [first.end()]
    for match in form.tail.finditer(line, ends[-1] if ends else 0):
        caption_start, name_end = ends[-1] if ends else 0, match.end("image")
        text = line[max(caption_start, name_end - LONGEST_NAME) : name_end]
        name = known_names.ending(text)
        if name is None and form.is_numbered:
            # Flickr's names are an id, an underscore and hexadecimal digits; a caption may end right before them.
            likely = re.search(r"(?:\d+(?:_[0-9a-f]+)?|[^\s.]+)\.\w+(?:\.\d+)?$", text)
            name = likely[0] if likely else None
        if name and (form.is_numbered or _is_head(line, name_end - len(name), match.end(), caption_start)):
            heads.append({**match.groupdict(), "image": name})
            starts.append(name_end - len(name))
            ends.append(match.end())
    if not heads:
        return line, []
    captions = [line[end:start].strip() for end, start in zip(ends, [*starts[1:], len(line)], strict=True)]
    return line[: starts[0]].strip(), list(zip(heads, captions, strict=True))


def _is_head(line: str, start: int, end: int, caption_start: int) -> bool:
    """Return whether a name within a line begins a caption of its own, and is not mentioned in the one before.

    Behind the name, a mention has a space, as in "a sign says 0.jpg, in red"; before it, no caption ends.
    """
    before = line[max(caption_start, start - LONGEST_NAME) : start]
    ends_caption = not before or before[-1] not in " /\\_-:" or before.rstrip().endswith((".", "!", "?", '"'))
    return ends_caption and not line[end : end + 1].isspace()


def _build_record(
    file: str, line: CaptionLine, form: LineFormat, splits: Mapping[str, str] | None, damage: Damage
) -> Record:
    """Build the record of one caption, and repair the damage of its line."""
    name = re.sub(r"\.\d+$", "", line.head["image"])
    if name != line.head["image"]:
        kind = "file names with a number behind their suffix, which is removed"
        damage.repaired(f"{file}: {kind}", f"{line.head['image']} in line {line.number}")
    if line.head.get("bar") == "":
        damage.repaired(f"{file}: captions without a separator before them", f"line {line.number}")
    caption = line.caption
    if form.is_csv and caption.startswith('"'):
        kind = "captions in quotes for their commas" if caption.endswith('"') else "captions with an unpaired quote"
        damage.repaired(f"{file}: {kind}, which are removed", f"line {line.number}")
        caption = caption[1:].removesuffix('"').replace('""', '"')
    if not caption.strip():
        raise ValueError(f"{file}, line {line.number}, has no caption.")
    split = split_in_path(file) if splits is None else splits.get(name)
    number = int(line.head["number"]) if form.is_numbered else None
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
