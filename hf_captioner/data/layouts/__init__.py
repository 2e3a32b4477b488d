"""The forms in which people have captions: how each is recognised, and how it is read.

A layout is a row of `LAYOUTS`. Its `recognise` gives the files by which it is known, none if it is not this one; its
`read` turns them into data sets with `image`, `captions` and `image_id` by split. Files that list captions need no more
than a reader in `annotation_files.py`, wrapped in `_listing`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .annotation_files import Record, read_caption_lines, read_coco, read_karpathy, read_tables, read_text_pairs
from .damage import Damage
from .image_folder import ImageFolder
from .splits import absent_splits, made_splits, said_of_made, split_in
from .stored_tables import has_images_inside, read_parquet, read_saved, row_features
from .tar_shards import tar_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Splits = Mapping[str, "Dataset | IterableDataset"]
Recogniser = Callable[[ImageFolder], list[str]]


@dataclass(frozen=True)
class Layout:
    """One form of data set on disk."""

    description: str
    recognise: Recogniser
    read: Callable[[ImageFolder, list[str], Damage, bool], Splits]  # the last says whether to stream


def load_layout(path: str, damage: Damage, *, format: str | None = None, streaming: bool = False) -> Splits:
    """All splits of a folder or file, taken for the first layout that recognises it, which is said.

    Raises:
        ValueError: no layout, or not the one that `format` names, fits; or what it reads is broken.
    """
    if format is not None and format not in LAYOUTS:
        raise ValueError(f"There is no format {format!r}. Known: {', '.join(LAYOUTS)}.")
    folder = ImageFolder(path)
    found = {name: files for name, layout in LAYOUTS.items() if (files := layout.recognise(folder))}
    name = next(iter(found), None) if format is None else format
    if name not in found:
        looked = f"{LAYOUTS[name].description} (format {name})" if name else "captions in any known form"
        raise ValueError(
            f"{path!r} does not hold {looked}; it has {len(folder.images)} images and {len(folder.files)} other files"
            f"{' such as ' + repr(folder.files[0]) if folder.files else ''}. Known formats: {', '.join(LAYOUTS)}."
        )
    splits = LAYOUTS[name].read(folder, found[name], damage, streaming)
    damage.tell()
    evidence = found[name][0] + (f" and {len(found[name]) - 1} more" if len(found[name]) > 1 else "")
    others = [other for other, files in found.items() if not {*files} & {*found[name]}]
    choice = f"; format= chooses among it and {', '.join(others)}" if others else ""
    damage.report(
        f"{path}: taken for {LAYOUTS[name].description} (format {name}), by {evidence}{choice}. {sizes(splits)}"
    )
    return splits


def sizes(splits: Splits) -> str:
    """How many images each split has, as far as that is known."""
    counts = {name: f" {len(rows)} images" if hasattr(rows, "__len__") else "" for name, rows in splits.items()}
    return ", ".join(f"{name}{count}" for name, count in counts.items()) + "."


def _listing(
    read: Callable[[ImageFolder, list[str], Damage], Iterable[Record]],
) -> Callable[[ImageFolder, list[str], Damage, bool], Splits]:
    """Read a file that lists captions of images beside it."""

    def load(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Splits:
        from datasets import Dataset, NamedSplit

        splits = {}
        for name, rows in _rows_by_split(folder, files, read(folder, files, damage), damage).items():
            columns = {column: [row[column] for row in rows] for column in ("image", "captions", "image_id")}
            dataset = Dataset.from_dict(columns, features=row_features(), split=NamedSplit(name))
            splits[name] = dataset.to_iterable_dataset(min(64, len(dataset))) if streaming else dataset
        return splits

    return load


def _rows_by_split(
    folder: ImageFolder, files: list[str], records: Iterable[Record], damage: Damage
) -> dict[str, list[dict[str, Any]]]:
    """Gather the records of each image, find its file, and give it to its split."""
    rows: dict[tuple[str | None, str], dict[str, Any]] = {}
    seen: set[tuple[str | None, str, int]] = set()
    missing: dict[str, None] = {}
    for record in records:
        with damage.skipping():
            try:
                image = folder.find(record.image, record.folder)
            except ValueError as e:
                raise ValueError(f"{record.place}: {e}") from e
            if image is None:
                missing[record.image] = None
                continue
            name = record.image_id or (os.path.basename(image) if folder.has_distinct_names else image)
            row = rows.setdefault((record.split, name), {"image": image, "captions": [], "image_id": name})
            number = (record.split, name, -1 if record.number is None else record.number)
            if row["image"] != image or (record.number is not None and number in seen):
                which = "" if not record.number else f" with caption number {record.number}"
                raise ValueError(f"{record.place}: the image {name!r}{which} is there twice.")
            seen.add(number)
            row["captions"] += record.captions
    _tell_of_images(folder, files, rows, missing, damage)
    return _dealt_out(folder, rows, damage)


def _tell_of_images(
    folder: ImageFolder,
    files: list[str],
    rows: Mapping[tuple[str | None, str], dict[str, Any]],
    missing: Iterable[str],
    damage: Damage,
) -> None:
    for name in missing:
        damage.mended(f"{files[0]}: listed images that are missing, left out", name)
    if not rows:
        damage.tell()
        raise ValueError(
            f"None of the images that {files[0]} lists is in {str(folder.root)!r}. Put them there, unpacked."
        )
    without = folder.images.keys() - {row["image"] for row in rows.values()}
    for name in sorted(without):
        damage.mended("Images without a caption, left out", name)


def _dealt_out(
    folder: ImageFolder, rows: Mapping[tuple[str | None, str], dict[str, Any]], damage: Damage
) -> dict[str, list[dict[str, Any]]]:
    """Rows by split, which is made where it is absent."""
    named: set[str | None] = {split for split, _ in rows if split is not None} or {None}
    absent = absent_splits(named)
    if absent:
        damage.report(said_of_made(absent))
    source = "train" if "train" in named else None
    to_deal = [name for split, name in rows if absent and split == source]
    dealt = dict(zip(to_deal, made_splits(to_deal, absent), strict=True))
    splits: dict[str, list[dict[str, Any]]] = {}
    for (split, name), row in rows.items():
        wanted = dealt.get(name, split) if split == source else split
        if wanted is None:
            damage.mended("Images with captions that are in no split, left out", name)
            continue
        path = os.path.abspath(folder.root / row["image"])
        splits.setdefault(wanted, []).append({**row, "image": {"bytes": None, "path": path}})
    in_order = [*(name for name in ("train", "validation", "test") if name in splits), *sorted(splits)]
    return {name: splits[name] for name in dict.fromkeys(in_order)}


def _read_tar(folder: ImageFolder, files: list[str], damage: Damage, streaming: bool) -> Splits:
    """Streamed, or read once into an Arrow file in the cache of `datasets`, from where rows are read at will."""
    from datasets import Dataset, IterableDataset, NamedSplit

    shards: dict[str, list[str]] = {}
    for file in files:
        shards.setdefault(split_in(file) or "train", []).append(str(folder.root / file))
    absent = absent_splits(shards)
    if absent:
        damage.report(said_of_made(absent))
    once = cache(damage.report)  # made splits read the same shards
    splits: dict[str, Dataset | IterableDataset] = {}
    for name in [*shards, *absent]:
        paths = shards.get(name, shards.get("train", []))
        made = {"split": name, "absent": tuple(absent)} if absent and paths is shards.get("train") else {}
        arguments: dict[str, Any] = {"shards": paths, "skip_broken": damage.skip_broken, **made}
        if streaming:
            splits[name] = IterableDataset.from_generator(
                tar_rows, features=row_features(), gen_kwargs={**arguments, "report": damage.report},
                split=NamedSplit(name),
            )  # fmt: skip
            continue
        # What is wrong is said every time, also where the rows come from the cache.
        count = sum(1 for _ in tar_rows(**arguments, report=once, open_images=False))
        if not count:
            raise ValueError(f"{paths[0]} and its like hold no image of the split {name!r}.")
        splits[name] = Dataset.from_generator(
            _cached_tar_rows, features=row_features(), gen_kwargs={**arguments, "stamps": tuple(map(_stamp, paths))},
            split=NamedSplit(name),
        )  # fmt: skip
    return splits


def _cached_tar_rows(stamps: tuple[str, ...], **arguments: Any) -> Iterable[dict[str, Any]]:
    """`tar_rows` without a word; the stamps are there for `datasets` to tell a changed file from what it has cached."""
    return tar_rows(**arguments, report=lambda line: None)


def _stamp(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _by_name(*patterns: str) -> Recogniser:
    return lambda folder: folder.matching(*patterns)


def _parquet(folder: ImageFolder) -> list[str]:
    return [file for file in folder.matching("*.parquet") if has_images_inside(folder, file)]


def _tables(folder: ImageFolder) -> list[str]:
    files = folder.matching("*.csv", "*.tsv", "*.jsonl", "*.parquet")
    return [file for file in files if not file.endswith(".parquet") or not has_images_inside(folder, file)]


def _text_pairs(folder: ImageFolder) -> list[str]:
    stems = {os.path.splitext(name)[0] for name in folder.images}
    files = folder.matching("*.txt")
    return files if any(os.path.splitext(name)[0] in stems for name in files) else []


# In the order in which they are tried.
LAYOUTS: dict[str, Layout] = {
    "saved": Layout("a data set saved by datasets", _by_name("dataset_dict.json", "state.json"), read_saved),
    "flickr8k": Layout(
        "Flickr8k's original archives", _by_name("Flickr8k.token.txt"), _listing(read_caption_lines)
    ),
    "karpathy": Layout(
        "Karpathy's splits", _by_name("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json"),
        _listing(read_karpathy),
    ),
    "flickr30k": Layout("Flickr30k", _by_name("results*.csv", "*.token"), _listing(read_caption_lines)),
    "kaggle": Layout("Flickr as Kaggle has it", _by_name("captions.txt"), _listing(read_caption_lines)),
    "coco": Layout("COCO's annotations", _by_name("captions_*20[0-9][0-9].json"), _listing(read_coco)),
    "imagefolder": Layout(
        "an imagefolder with metadata", _by_name("metadata.csv", "metadata.jsonl", "metadata.parquet"),
        _listing(read_tables),
    ),
    "webdataset": Layout("WebDataset's tar shards", _by_name("*.tar", "*.tar.gz", "*.tgz"), _read_tar),
    "parquet": Layout("Parquet files", _parquet, read_parquet),
    "table": Layout("a table of images and captions", _tables, _listing(read_tables)),
    "text": Layout("images with texts of the same names", _text_pairs, _listing(read_text_pairs)),
}  # fmt: skip
