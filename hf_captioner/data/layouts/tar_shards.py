"""WebDataset's tar shards: the files of a sample lie one behind the other, with one name and different suffixes."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from datasets import Dataset, IterableDataset, NamedSplit

from .caption_columns import ID_COLUMNS, IMAGE_SUFFIXES, captions_in_row
from .damage import Damage
from .image_folder import ImageFolder
from .splits import Splits, assign_split, missing_splits, split_in_path
from .stored_tables import row_features

TEXT_SUFFIXES = (".txt", ".text", ".caption", ".captions")


def read_tar_shards(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Splits:
    """Stream tar shards, or copy them once into an Arrow file in the cache of `datasets` for random access."""
    shards: dict[str, list[str]] = {}
    for file in files:
        shards.setdefault(split_in_path(file) or "train", []).append(str(folder.root / file))
    missing = missing_splits(shards, damage.report)
    report_once = cache(damage.report)  # splits that are made read the same shards
    splits: dict[str, Dataset | IterableDataset] = {}
    for name in [*shards, *missing]:
        paths = shards.get(name, shards.get("train", []))
        arguments: dict[str, Any] = {"shards": paths, "skip_broken": damage.skip_broken}
        if missing and paths is shards.get("train"):
            arguments |= {"split": name, "missing": tuple(missing)}
        if streaming:
            reported = {**arguments, "report": damage.report}
            splits[name] = IterableDataset.from_generator(
                tar_rows, features=row_features(), gen_kwargs=reported, split=NamedSplit(name)
            )
            continue
        # Damage is reported every time, also where rows come from the cache.
        num_rows = sum(1 for _ in tar_rows(**arguments, report=report_once, read_images=False))
        if not num_rows:
            raise ValueError(
                f"{len(paths)} tar shards such as {paths[0]} hold no image for the split {name!r}. Add images, or name "
                f"shards by their split: {name}-00000.tar."
            )
        stamps = tuple(f"{status.st_size} {status.st_mtime_ns}" for status in map(os.stat, paths))
        cached = {**arguments, "file_stamps": stamps}
        splits[name] = Dataset.from_generator(
            _cached_tar_rows, features=row_features(), gen_kwargs=cached, split=NamedSplit(name)
        )
    return splits


def _cached_tar_rows(file_stamps: tuple[str, ...], **arguments: Any) -> Iterable[dict[str, Any]]:
    """Call `tar_rows` without reports; by `file_stamps`, `datasets` tells changed files from those it has cached."""
    return tar_rows(**arguments, report=lambda line: None)


def tar_rows(
    shards: Sequence[str],
    split: str | None = None,
    missing: Sequence[str] = (),
    *,
    report: Callable[[str], None],
    skip_broken: bool = False,
    read_images: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of tar shards; no more than one sample at a time is in memory.

    If missing splits are made of these shards (see `splits.assign_split`), only the rows of one `split` are yielded.
    With `read_images=False`, images are left empty, merely to learn which rows there are. `report` and `skip_broken`
    are those of `Damage`.

    Raises:
        ValueError: A shard or a sample can't be read.
    """
    for shard in shards:
        damage = Damage(report, skip_broken=skip_broken)
        keys: set[str] = set()
        for key, files in _read_samples(shard, damage, read_images):
            with damage.skipping():
                if key in keys:
                    raise ValueError(f"{shard}: the sample {key!r} occurs twice.")
                keys.add(key)
                row = _build_row(shard, key, files, damage)
                if row is not None and (split is None or assign_split(row["image_id"], missing) == split):
                    yield row
        damage.report_repairs()


def _build_row(shard: str, key: str, files: dict[str, bytes], damage: Damage) -> dict[str, Any] | None:
    """Build the row of a sample from its files by suffix; None if it has no image or no caption."""
    image_suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), None)
    captions: list[str] = []
    image_id = key
    for suffix, content in files.items():
        if suffix not in (*TEXT_SUFFIXES, ".json"):
            continue
        try:
            text = content.decode("utf-8-sig")
            fields = json.loads(text) if suffix == ".json" else {}
        except UnicodeDecodeError as e:
            raise ValueError(f"{shard}: {key + suffix!r} is not UTF-8, byte 0x{content[e.start]:02x}.") from e
        except json.JSONDecodeError as e:
            raise ValueError(f"{shard}: {key + suffix!r}, line {e.lineno}, is not JSON: {e.msg}.") from e
        if suffix == ".json":
            captions += captions_in_row(fields)
            image_id = str(next((fields[name] for name in ID_COLUMNS if name in fields), key))
        else:
            captions += [line.strip() for line in text.splitlines() if line.strip()]
    if image_suffix is None or not captions:
        lacking = "a caption" if image_suffix else "an image"
        damage.repaired(f"{shard}: samples without {lacking}, left out", key)
        return None
    image = {"bytes": files[image_suffix], "path": key + image_suffix}
    return {"image": image, "captions": captions, "image_id": image_id}


def _read_samples(shard: str, damage: Damage, read_images: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the name of each sample and its files by suffix."""
    key = ""
    files: dict[str, bytes] = {}
    for path, content in _read_members(shard, damage, read_images):
        folder, _, name = path.removeprefix("./").rpartition("/")
        stem, dot, suffix = name.partition(".")
        stem = os.path.join(folder, stem)
        if stem != key and files:
            yield key, files
            files = {}
        key = stem
        files[dot + suffix.lower()] = content
    if files:
        yield key, files


def _read_members(shard: str, damage: Damage, read_images: bool) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each file in a tar; refuse links and paths that leave its folder."""
    try:
        with tarfile.open(shard) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it has seen in memory
                if member.isdir():
                    continue
                if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                    damage.broken(f"{shard}: {member.name!r} leaves the data set's folder.")
                elif (file := None if member.issym() or member.islnk() else tar.extractfile(member)) is None:
                    damage.broken(f"{shard}: {member.name!r} is no file but a link, to {member.linkname!r}.")
                else:
                    is_wanted = read_images or not member.name.lower().endswith(IMAGE_SUFFIXES)
                    yield member.name, file.read() if is_wanted else b""
    except (tarfile.TarError, EOFError, OSError) as e:
        damage.broken(f"{shard} can't be read to its end: {e}.")
