"""Damaged data sets in every layout, read whole and compared with what of the intact data is left."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from .layouts import LAYOUTS, Entry, Layout, make_layout, make_photos, rows
from .mutations import MUTATIONS
from .pool import Case, Outcome

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 0.5, float("nan"), float("inf"), "", " ", '"', "''", "x" * 300_000, "\ud800", "\0"),
    *([], [[]], [None], {}, {"a": {}}, ["a", 5], "['a dog', 'a cat']", '["a"', "=1+1", "../../x.jpg", "&quot;&#0;"),
)  # fmt: skip
SNIPPETS = (
    *(b'"', b'""', b"'", b"\n", b"\r", b"\r\n", b"\0", b",", b"\t", b";", b"|", b"#", b"\\", b"\xef\xbb\xbf", b"\xff"),
    *(b"\xe2\x80\xa8", b"\x0c", b"\x1a", b"x " * 200_000, b"," * 100_000, b"[" * 100_000, b'{"a":' * 50_000, b"NaN"),
    *(b"9" * 10_000, b"\\ud800", b"photo_01.jpg", b"photo_02.jpg,", b"a.jpg b.png " * 2_000, b'"\n"', b"&quot;"),
)  # fmt: skip


def _insert_snippet(data: bytes, rng: random.Random) -> bytes:
    start, snippet = rng.randrange(len(data) + 1), rng.choice(SNIPPETS)
    return data[:start] + snippet + data[start:]


def _damage_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    index = rng.randrange(len(lines))
    lines[index] = rng.choice((b"", b'"' + lines[index], lines[index] + b'"', lines[index].lower(), b" " * 100_000))
    return b"\n".join(lines)


def _damage_cell(data: bytes, rng: random.Random) -> bytes:
    """Replace, drop, add or double a cell of a table, often one of its header."""
    dialect = max(",\t;|", key=data.split(b"\n")[0].decode().count)
    cells = list(csv.reader(io.StringIO(data.decode()), delimiter=dialect))
    row = cells[rng.choice((0, rng.randrange(len(cells))))]
    index = rng.randrange(len(row))
    junk = str(rng.choice(JUNK)).replace("\ud800", "")
    letters = "".join(rng.sample(row[index], len(row[index])))
    row[index : index + rng.choice((0, 1, 1, 1))] = rng.choice(([], [junk], [letters], 2 * [row[index]]))
    file = io.StringIO()
    csv.writer(file, delimiter=dialect, lineterminator="\n").writerows(cells)
    return file.getvalue().encode()


def _damage_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, drop or double a value somewhere in a JSON file, or in a line of it."""
    lines = [data] if data[:1] in b"{[" and data.count(b"\n{") == 0 else data.split(b"\n")
    index = rng.randrange(max(1, len(lines) - 1))
    root = [json.loads(lines[index])]
    holder, key = root, 0
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.8:
        holder = holder[key]
        key = rng.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
    change = rng.choice(("junk", "junk", "drop", "double"))
    if change == "junk" or holder is root:
        holder[key] = rng.choice(JUNK)
    elif change == "drop":
        del holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice((f"{key}_", "image", "caption"))] = holder.pop(key)
    else:
        holder.insert(key, holder[key])
    lines[index] = json.dumps(root[0], ensure_ascii=False).encode(errors="surrogatepass")
    return b"\n".join(lines)


def _damage_member(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a member of a tar, with a right checksum."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = rng.choice(tar.getmembers()).offset
    header = bytearray(data[start : start + 512])
    where, what = rng.choice(
        [(156, kind) for kind in (b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"V", b"\0", b"?")]
        + [
            (124, size)
            for size in (b"77777777777\0", b"00000000000\0", b"\x80" + bytes(3) + b"\xff" * 8, b"-1\0", b"abc\0")
        ]
        + [
            (0, name)
            for name in (b"\0" * 100, b"x" * 100, b"../../x.jpg\0", b"/x.txt\0", b"a.\xff\xfe.jpg\0", b".\0", b"a//\0")
        ]
        + [(257, b"ustar  \0"), (257, bytes(8)), (345, b"../..\0"), (100, b"\xff" * 24)]
    )
    header[where : where + len(what)] = what
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + header + data[start + 512 :]


def _other_types(data: bytes, rng: random.Random) -> bytes:
    """Store a column of a Parquet file as another type."""
    import pyarrow
    from pyarrow import parquet

    content = parquet.read_table(io.BytesIO(data)).to_pydict()
    name, count = rng.choice([*content]), len(next(iter(content.values())))
    values = content[name]
    first = lambda value: value[0] if isinstance(value, list) else value["bytes"] if isinstance(value, dict) else value  # noqa: E731
    others: list[Callable[[], Any]] = [
        lambda: pyarrow.array([str(value) for value in values], pyarrow.large_string()),
        lambda: pyarrow.array([str(value) for value in values]).dictionary_encode(),
        lambda: pyarrow.array([first(value) for value in values]),
        lambda: pyarrow.array([[value] for value in values]),
        lambda: pyarrow.array([{"a": value} for value in values]),
        lambda: pyarrow.nulls(count),
        lambda: pyarrow.array([5] * count),
        lambda: pyarrow.array([0.5] * count),
        lambda: pyarrow.array([b"\xff"] * count),
        lambda: pyarrow.array([None, *values[1:]]),
        lambda: pyarrow.array([None] * (count - 1) + values[-1:]),
        lambda: pyarrow.array(["../x.jpg", "", " "] + [None] * (count - 3)),
        lambda: pyarrow.array([[("k", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        lambda: pyarrow.array([{"bytes": None, "path": None}] * count),
        lambda: pyarrow.array([{"bytes": b"", "path": ""}] * count),
        lambda: pyarrow.array([{"bytes": 5, "path": 5}] * count),
    ]
    table = pyarrow.table({**content, rng.choice((name, name, "text", "file_name")): rng.choice(others)()})
    if rng.random() < 0.2:
        table = table.rename_columns([rng.choice(("image", "caption", "split", "x")) for _ in table.column_names])
    file = io.BytesIO()
    parquet.write_table(table.slice(0, rng.choice((count, count, 0, 1))), file)
    return file.getvalue()


def _other_file(data: bytes, rng: random.Random) -> bytes:
    """Put something else in the place of a file."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
    files = [layout.files[layout.targets[0]] for layout in map(make_layout, LAYOUTS)]
    return rng.choice([b"", b"\n", b"\0", bytes(5000), pointer, b"<!DOCTYPE html><html></html>", b"null", *files])


# What spreadsheets, editors and other systems make of a file, without losing anything.
REWRITES: dict[str, Callable[[str], bytes]] = {
    "utf_16": lambda text: text.encode("utf-16"),
    "utf_16_be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf_16_without_mark": lambda text: text.encode("utf-16-le"),
    "utf_32": lambda text: text.encode("utf-32"),
    "windows_1252": lambda text: text.encode("cp1252"),
    "macintosh": lambda text: text.encode("mac-roman"),
    "byte_order_mark": lambda text: text.encode("utf-8-sig"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
    "blank_lines": lambda text: text.replace("\n", "\n\n").encode(),
    "no_last_line_end": lambda text: text.rstrip("\n").encode(),
    "trailing_spaces": lambda text: text.replace("\n", "  \n").encode(),
    "gzip": lambda text: gzip.compress(text.encode(), mtime=0),
    "sep_line": lambda text: f"sep={max(',;', key=text.count)}\n{text}".encode(),
    "backslashes": lambda text: text.replace("images/", "images\\").encode(),
    "upper_case_names": lambda text: text.replace(".jpg", ".JPG").encode(),
    "doubled": lambda text: (text + text).encode(),
}


def _bomb(data: bytes, rng: random.Random) -> bytes:
    """Return a compressed tar with a member of 6 GiB of zeros, before or behind the others."""
    header = tarfile.TarInfo(rng.choice(("photo_50.jpg", "photo_50.txt", "photo_00.json")))
    header.size = 6 * 2**30
    zeros = gzip.compress(bytes(2**26), mtime=0) * 96
    parts = [
        gzip.compress(header.tobuf(tarfile.GNU_FORMAT), mtime=0) + zeros,
        gzip.compress(gzip.decompress(data)[:-1024]),
    ]
    return b"".join(rng.sample(parts, 2)) + gzip.compress(bytes(1024), mtime=0)


def _changes(target: str) -> dict[str, Callable[[bytes, random.Random], bytes]]:
    """Return the ways to damage a file, by name."""
    changes = {**MUTATIONS, "other_file": _other_file}
    if target.endswith((".csv", ".tsv", ".txt", ".json", ".jsonl")):
        changes |= {"snippet": _insert_snippet, "snippets": _insert_snippet, "line": _damage_line}
        changes |= {
            f"as_{rewrite}": lambda data, rng, write=write: write(data.decode()) for rewrite, write in REWRITES.items()
        }
    if target.endswith((".csv", ".tsv")) or target == "captions.txt":
        changes |= {"cell": _damage_cell, "cells": _damage_cell, "more_cells": _damage_cell}
    if target.endswith((".json", ".jsonl")):
        changes |= {name: _damage_json for name in ("json", "jsons", "more_json", "still_more_json")}
    if target.endswith(".tar"):
        changes |= {"member": _damage_member, "members": _damage_member, "more_members": _damage_member}
    if target.endswith(".gz"):
        changes["bomb"] = _bomb
    if target.endswith(".parquet"):
        changes |= {"types": _other_types, "more_types": _other_types, "still_more_types": _other_types}
    return changes


def cases(count: int, seed: int) -> list[Case]:
    """Return every layout intact, then with every rewriting of its text, then with random damage."""
    rng = random.Random(seed)
    chosen, layouts = [], list(LAYOUTS)
    changes = {name: sorted({c for target in make_layout(name).targets for c in _changes(target)}) for name in layouts}
    sure = [f"{name}/{change}" for name in layouts for change in ("intact", *changes[name]) if _is_sure(change)]
    while len(chosen) < max(count - len(sure), count // 2):
        name = layouts[len(chosen) % len(layouts)]
        chosen.append(f"{name}/{rng.choice([change for change in changes[name] if not _is_sure(change)])}")
    chosen += sure
    rng.shuffle(chosen)
    return [Case("captions", name, seed * 10**6 + n) for n, name in enumerate(chosen[:count])]


def _is_sure(change: str) -> bool:
    """Return whether a change happens in one way alone, so that one case of it is enough."""
    return change.startswith("as_") or change in ("intact", "bomb")


def prepare(case: Case, folder: Path) -> Callable[[Outcome], None]:
    """Write the data set of a case, and return the job that reads it."""
    name, change = case.name.split("/")
    layout, rng = make_layout(name), random.Random(case.seed)
    expected_lines = set() if change == "intact" else _intact_report(name)
    files = dict(layout.files)
    targets = [target for target in layout.targets if change == "intact" or change in _changes(target)]
    if not _is_sure(change):
        targets = [rng.choice(targets)]
    for target in targets:
        if change != "intact":
            files[target] = _changes(target)[change](files[target], rng)
    write_files(folder, files)
    expected = _expected(layout, files, change)
    options = {"streaming": case.seed % 4 == 0, "skip_broken": case.seed % 8 == 1}

    def job(outcome: Outcome) -> None:
        lines: list[str] = []
        given: dict[int, list[str]] = {}
        with outcome.watch([folder.name, "Image '", *(Path(file).name for file in files)]):
            given = _load(folder, lines.append, **options)
        if change == "intact" and len(given) < len(make_photos()):
            outcome.faults.setdefault("raw", "intact data are refused")
        if outcome.is_read and not {_shape(line) for line in lines} - expected_lines:
            loss = _loss(
                expected,
                given,
                files,
                targets[0].endswith((".csv", ".tsv", ".txt")) and name != "text_pairs",
            )
            if loss is not None:
                outcome.faults["silent"] = loss

    return job


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their paths in a folder."""
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)


def _load(folder: Path, report: Callable[[str], None], *, streaming: bool, skip_broken: bool) -> dict[int, list[str]]:
    """Read a data set as training does, and return the captions of each photo."""
    from hf_captioner import load_captions
    from hf_captioner.data.rows import check_captions, undecoded

    splits = load_captions(str(folder), streaming=streaming, skip_broken=skip_broken, report=report)
    given: dict[int, list[str]] = {}
    for split in splits.values():
        if not streaming:
            split = check_captions(split, skip_broken=skip_broken, report=report)
        for row in undecoded(split):
            content = row["image"]["bytes"]
            content = Path(row["image"]["path"]).read_bytes() if content is None else content
            given.setdefault(_numbers().get(content, -1), []).extend(row["captions"])
    return given


@cache
def _numbers() -> dict[bytes, int]:
    """Return the number of each photo by its content."""
    return {photo.content: number for number, photo in enumerate(make_photos())}


@cache
def _intact_report(name: str) -> set[str]:
    """Return the lines that are reported of the intact data."""
    import tempfile

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), make_layout(name).files)
        try:
            _load(Path(folder), lines.append, streaming=False, skip_broken=False)
        except (ValueError, OSError):
            return set()
    return {_shape(line) for line in lines}


def _shape(line: str) -> str:
    """Return what a line says, without numbers; all lines on layout and splits, which tell no losses, are one."""
    is_usual = re.search(r": read as |^There is no .* split|^Leak: ", line)
    return "" if is_usual else re.sub(r"\d+", "0", line)


@dataclass(frozen=True)
class Expected:
    """Captions that a reader must find, the photo that they belong to, and the place that says so."""

    photo: int
    caption: str
    source: str


def _expected(layout: Layout, files: dict[str, bytes], change: str) -> list[Expected]:
    """Return what the files of a data set still say for certain."""
    everything = change.startswith("as_") or change == "intact"
    if layout.entries:
        # Checksums protect a compressed shard, and a shard that was cut lacks its end.
        everything |= any(file.endswith(".gz") or (".tar" in file and change == "cut_end") for file in layout.targets)
        return [
            Expected(entry.photo, caption, entry.file)
            for entry in layout.entries
            if everything or _survives(entry, files[entry.file])
            for caption in entry.captions
        ]
    return list(chain.from_iterable(_stored(file, content) for file, content in files.items()))


def _survives(entry: Entry, content: bytes) -> bool:
    """Return whether an entry stands whole in a file."""
    if not entry.is_line:
        return entry.text in content
    return b"\n" + entry.text + b"\n" in b"\n" + content + b"\n"


def _stored(file: str, content: bytes) -> list[Expected]:
    """Return what pyarrow alone reads in a Parquet or Arrow file."""
    import pyarrow
    from pyarrow import parquet

    if not file.endswith((".parquet", ".arrow")):
        return []
    try:
        if file.endswith(".parquet"):
            table = parquet.read_table(io.BytesIO(content))
        else:
            table = pyarrow.ipc.open_stream(content).read_all()
        table.validate(full=True)
        values = table.to_pylist()
    except Exception:  # then it can't be read at all, which must be said
        return [
            Expected(n, text, f"{file}, which pyarrow can't read")
            for n, row in enumerate(rows())
            for text in row["captions"]
        ]
    names = {photo.name: number for number, photo in enumerate(make_photos())}
    found = []
    for row in values:
        image, captions = row.get("image"), row.get("captions", row.get("caption"))
        number = names.get(image) if isinstance(image, str) else None
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
            number = _numbers().get(image["bytes"])
        if isinstance(captions, str):
            captions = [] if captions.startswith("[") else [captions]  # a list as text may be read as the list
        if number is not None and isinstance(captions, list):
            found += [
                Expected(number, text, file) for text in captions if isinstance(text, str) and re.search(r"\w", text)
            ]
    return found


def _loss(expected: list[Expected], given: dict[int, list[str]], files: dict[str, bytes], is_table: bool) -> str | None:
    """Return what was lost, or given to the wrong image, without a word; None if nothing was."""
    owners: dict[str, set[int]] = {}
    for photo, captions in given.items():
        for caption in captions:
            owners.setdefault(" ".join(caption.split()), set()).add(photo)
    for item in expected:
        photos = owners.get(" ".join(item.caption.split()), set())
        if item.photo not in photos:
            fate = "another image has it" if photos else "it is lost"
            return f"caption {item.caption!r} of photo {item.photo} stands in {item.source}, but {fate}"
        if len(photos) > 1 and sum(content.count(item.caption.encode()) for content in files.values()) == 1:
            return f"caption {item.caption!r} of photo {item.photo} was given to another image too"
    known = {text for photo in make_photos() for text in photo.captions}
    # In JSON, text that happens to look like a line is a caption like any other.
    for caption in owners.keys() - known if is_table else ():
        if re.search(r"photo_\d\d\.jpg[#,\t|]", caption):
            return f"a line became part of the caption {caption[:200]!r}"
    return None
