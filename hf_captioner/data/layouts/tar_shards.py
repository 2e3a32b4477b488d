"""WebDataset's tar shards: files of one sample lie one behind the other, with one name and several endings."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from .caption_columns import ID_COLUMNS, IMAGE_SUFFIXES, captions_of
from .damage import Damage
from .splits import made_split

TEXT_SUFFIXES = (".txt", ".text", ".caption", ".captions")


def tar_rows(
    shards: Sequence[str],
    split: str | None = None,
    absent: Sequence[str] = (),
    *,
    report: Callable[[str], None],
    skip_broken: bool = False,
    open_images: bool = True,
) -> Iterator[dict[str, Any]]:
    """Rows of tar shards, read from front to back in the memory of one sample.

    Args:
        shards: paths of tar files, compressed or not.
        split: the one of the made splits to give; None for all images.
        absent: splits to make, see `splits.py`.
        report: called with a line for each kind of damage in a shard.
        skip_broken: leave out what can't be read, naming each.
        open_images: False to leave images unread, to learn of all that is there.

    Raises:
        ValueError: a shard or a sample that can't be read.
    """
    for shard in shards:
        damage = Damage(report, skip_broken=skip_broken)
        keys: set[str] = set()
        for key, members in _samples(shard, damage, open_images):
            with damage.skipping():
                if key in keys:
                    raise ValueError(f"{shard}: the sample {key!r} is there twice.")
                keys.add(key)
                row = _row(shard, key, members, damage)
                if row is not None and (split is None or made_split(row["image_id"], absent) == split):
                    yield row
        damage.tell()


def _row(shard: str, key: str, members: dict[str, bytes], damage: Damage) -> dict[str, Any] | None:
    image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
    captions: list[str] = []
    image_id = key
    for suffix, content in members.items():
        if suffix in (*TEXT_SUFFIXES, ".json"):
            try:
                text = content.decode("utf-8-sig")
                fields = json.loads(text) if suffix == ".json" else {}
            except UnicodeDecodeError as e:
                raise ValueError(f"{shard}: {key + suffix!r} is not UTF-8, byte 0x{content[e.start]:02x}.") from e
            except json.JSONDecodeError as e:
                raise ValueError(f"{shard}: {key + suffix!r}, line {e.lineno}, is not JSON: {e.msg}.") from e
            if suffix == ".json":
                captions += captions_of(fields)
                image_id = str(next((fields[name] for name in ID_COLUMNS if name in fields), key))
            else:
                captions += [line.strip() for line in text.splitlines() if line.strip()]
    if image is None or not captions:
        damage.mended(f"{shard}: samples without {'a caption' if image else 'an image'}, left out", key)
        return None
    return {"image": {"bytes": members[image], "path": key + image}, "captions": captions, "image_id": image_id}


def _samples(shard: str, damage: Damage, open_images: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Names of samples, with the content of their files by suffix."""
    key = ""
    members: dict[str, bytes] = {}
    for name, content in _members(shard, damage, open_images):
        folder, _, file = name.removeprefix("./").rpartition("/")
        stem, dot, suffix = file.partition(".")
        stem = os.path.join(folder, stem)
        if stem != key and members:
            yield key, members
            members = {}
        key = stem
        members[dot + suffix.lower()] = content
    if members:
        yield key, members


def _members(shard: str, damage: Damage, open_images: bool) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(shard) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers all that it has seen
                if member.isdir():
                    continue
                if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                    damage.broken(f"{shard}: {member.name!r} leaves the data set's folder.")
                elif (file := None if member.issym() or member.islnk() else tar.extractfile(member)) is None:
                    damage.broken(f"{shard}: {member.name!r} is no file but a link, to {member.linkname!r}.")
                else:
                    is_wanted = open_images or not member.name.lower().endswith(IMAGE_SUFFIXES)
                    yield member.name, file.read() if is_wanted else b""
    except (tarfile.TarError, EOFError, OSError) as e:
        damage.broken(f"{shard} can't be read to its end: {e}.")
