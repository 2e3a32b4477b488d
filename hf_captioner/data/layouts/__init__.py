"""Layouts: the forms in which captioned images are stored on disk, how each is recognised, and how it is read.

A layout is an entry of `LAYOUTS`. Its `recognize` returns the files by which it is known, none if a folder has another
layout; its `read` turns them into splits with the columns `image`, `captions` and `image_id`. For files that list
captions of images, `_listing` builds the entry from a function that reads their records, as `annotation_files.py` has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .annotation_files import read_coco, read_karpathy, read_tables, read_text_pairs
from .caption_lines import read_caption_lines
from .damage import Damage
from .image_folder import ImageFolder
from .listings import ReadRecords, read_listing
from .splits import Splits
from .stored_tables import has_images_inside, read_parquet, read_saved
from .tar_shards import read_tar_shards

Recognize = Callable[[ImageFolder], list[str]]
Read = Callable[[ImageFolder, list[str], Damage, bool], Splits]  # the last argument says whether to stream


@dataclass(frozen=True)
class Layout:
    """One form of a data set on disk."""

    description: str
    recognize: Recognize
    read: Read


def load_layout(path: str, damage: Damage, *, format: str | None = None, streaming: bool = False) -> Splits:
    """Load all splits of a folder or file by the first layout that recognises it, and report which one that was.

    Raises:
        ValueError: No layout fits, or not the one that `format` names, or something is broken.
    """
    if format is not None and format not in LAYOUTS:
        raise ValueError(f"There is no format {format!r}. Known: {', '.join(LAYOUTS)}.")
    folder = ImageFolder(path)
    evidence = {name: files for name, layout in LAYOUTS.items() if (files := layout.recognize(folder))}
    name = next(iter(evidence), None) if format is None else format
    if name not in evidence:
        expected = f"{LAYOUTS[name].description} (format {name})" if name else "captions in any known form"
        raise ValueError(
            f"{path!r} does not hold {expected}; it has {len(folder.images)} images and {len(folder.files)} other files"
            f"{' such as ' + repr(folder.files[0]) if folder.files else ''}. Known formats: {', '.join(LAYOUTS)}."
        )
    files = evidence[name]
    splits = LAYOUTS[name].read(folder, files, damage, streaming)
    damage.report_repairs()
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    others = [other for other in evidence if not {*evidence[other]} & {*files}]
    choice = f"; other formats that fit: {', '.join(others)}" if others else ""
    # A stream does not know its number of images.
    sizes = [f"{name} {len(rows)} images" if hasattr(rows, "__len__") else name for name, rows in splits.items()]
    damage.report(
        f"{path}: read as {LAYOUTS[name].description} (format {name}), recognised by {files[0]}{more}{choice}. "
        f"{', '.join(sizes)}."
    )
    return splits


def _by_name(*patterns: str) -> Recognize:
    """Return a function that recognises a layout by patterns of file names."""
    return lambda folder: folder.matching(*patterns)


def _find_parquet(folder: ImageFolder) -> list[str]:
    """Return the Parquet files with images inside."""
    return [file for file in folder.matching("*.parquet") if has_images_inside(folder, file)]


def _find_tables(folder: ImageFolder) -> list[str]:
    """Return the files of tables whose rows name image files."""
    files = folder.matching("*.csv", "*.tsv", "*.jsonl", "*.parquet")
    return [file for file in files if not file.endswith(".parquet") or not has_images_inside(folder, file)]


def _find_text_pairs(folder: ImageFolder) -> list[str]:
    """Return all text files if at least one is named like an image, such as `x.txt` beside `x.jpg`; otherwise none."""
    stems = {os.path.splitext(name)[0] for name in folder.images}
    files = folder.matching("*.txt")
    return files if any(os.path.splitext(name)[0] in stems for name in files) else []


def _listing(read_records: ReadRecords) -> Read:
    """Return the `read` of a layout whose files list captions of images."""
    return partial(read_listing, read_records)


# In the order in which they are tried.
LAYOUTS: dict[str, Layout] = {
    "saved": Layout("a data set saved by datasets", _by_name("dataset_dict.json", "state.json"), read_saved),
    "flickr8k": Layout("Flickr8k's original archives", _by_name("Flickr8k.token.txt"), _listing(read_caption_lines)),
    "karpathy": Layout(
        "Karpathy's splits",
        _by_name("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json"),
        _listing(read_karpathy),
    ),
    "flickr30k": Layout("Flickr30k", _by_name("results*.csv", "*.token"), _listing(read_caption_lines)),
    "kaggle": Layout("Flickr as Kaggle has it", _by_name("captions.txt"), _listing(read_caption_lines)),
    "coco": Layout("COCO's annotations", _by_name("captions_*20[0-9][0-9].json"), _listing(read_coco)),
    "imagefolder": Layout(
        "an imagefolder with metadata",
        _by_name("metadata.csv", "metadata.jsonl", "metadata.parquet"),
        _listing(read_tables),
    ),
    "webdataset": Layout("WebDataset's tar shards", _by_name("*.tar", "*.tar.gz", "*.tgz"), read_tar_shards),
    "parquet": Layout("Parquet files", _find_parquet, read_parquet),
    "table": Layout("a table of images and captions", _find_tables, _listing(read_tables)),
    "text": Layout("images with texts of the same names", _find_text_pairs, _listing(read_text_pairs)),
}
