"""Layouts: the forms in which captioned images are stored on disk, how each is recognised, and how it is read.

A layout is an entry of `LAYOUTS`. Its `recognize` returns the files by which it is known, none if a folder has another
layout; its `read` turns them into splits with the columns `image`, `captions` and `image_id`. For files that list
captions of images, `_listing` builds the entry from a function that reads their records, as `annotation_files.py` has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...model.images import is_image_name
from .annotation_files import ReadRecords, read_coco, read_karpathy, read_tables, read_text_pairs
from .caption_columns import has_columns
from .caption_lines import NUM_LINES_TRIED, find_format, read_caption_lines
from .damage import Damage
from .image_folder import ImageFolder
from .listings import read_listing
from .parquet_tables import has_images_inside, read_parquet
from .splits import Splits
from .stored_tables import read_saved
from .tar_shards import read_tar_shards
from .text_files import SEPARATOR, contains, first_lines

Recognize = Callable[[ImageFolder], list[str]]
Read = Callable[[ImageFolder, list[str], Damage, bool], Splits]  # the last argument says whether to stream
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".token")


@dataclass(frozen=True)
class Layout:
    """One form of a data set on disk."""

    description: str
    recognize: Recognize
    read: Read
    # Whether a text file holds captions in this form, whatever its name. Asked if no other layout is recognised.
    fits: Callable[[ImageFolder, str], bool] | None = None


def load_layout(
    path: str,
    damage: Damage,
    *,
    format: str | None = None,
    streaming: bool = False,
    allow_urls: bool = False,
    allow_outside: bool = False,
) -> Splits:
    """Load all splits of a folder or file by the first layout that recognises it, and report which one that was.

    The options are those of `load_captions`.

    Raises:
        ValueError: No layout fits, or not the one that `format` names, or something is broken.
    """
    if format is not None and format not in LAYOUTS:
        raise ValueError(f"There is no format {format!r}. Known: {', '.join(LAYOUTS)}.")
    folder = ImageFolder(path, damage, allow_urls=allow_urls, allow_outside=allow_outside)
    evidence = _recognize(folder, format)
    name = next(iter(evidence), None) if format is None else format
    if name not in evidence:
        expected = f"{LAYOUTS[name].description} (format {name})" if name else "captions in any known form"
        raise ValueError(
            f"{path!r} does not hold {expected}; it has {len(folder.images)} images and {len(folder.files)} other files"
            f"{' such as ' + repr(folder.files[0]) if folder.files else ''}. Known formats: {', '.join(LAYOUTS)}."
        )
    files = folder.readable(evidence[name])
    if not files:
        raise ValueError(f"{path!r} holds {LAYOUTS[name].description} (format {name}), but no file that can be read.")
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


def _recognize(folder: ImageFolder, format: str | None) -> dict[str, list[str]]:
    """Return the files by which each layout that fits is known, by their names or else by their content.

    A single file that was given together with its format is taken for what it was said to be.
    """
    found = {name: files for name, layout in LAYOUTS.items() if (files := layout.recognize(folder))}
    if format is not None and format not in found and not folder.path.is_dir():
        return found | {format: folder.matching("*")}
    if format in found or (format is None and next(iter(found), "text") not in ("table", "text")):
        return found
    stems = {os.path.splitext(image)[0] for image in folder.images}
    files = [file for file in folder.matching("*") if file.lower().endswith(TEXT_SUFFIXES)]
    files = folder.readable([file for file in files if os.path.splitext(file)[0] not in stems])
    by_content = {
        name: fitting
        for name, layout in LAYOUTS.items()
        if layout.fits and name not in found and (fitting := [file for file in files if layout.fits(folder, file)])
    }
    merged = by_content | found
    return {name: merged[name] for name in LAYOUTS if name in merged}


def _by_name(*patterns: str) -> Recognize:
    """Return a function that recognises a layout by patterns of file names."""
    return lambda folder: folder.matching(*patterns)


def _find_parquet(folder: ImageFolder) -> list[str]:
    """Return the Parquet files with images inside."""
    return [file for file in folder.matching("*.parquet") if has_images_inside(folder, file)]


def _find_tables(folder: ImageFolder) -> list[str]:
    """Return the files of tables whose rows name image files."""
    files = folder.matching("*.csv", "*.tsv", "*.jsonl", "*.ndjson", "*.parquet")
    return [file for file in files if not file.endswith(".parquet") or not has_images_inside(folder, file)]


def _find_text_pairs(folder: ImageFolder) -> list[str]:
    """Return all text files if at least one is named like an image, such as `x.txt` beside `x.jpg`; otherwise none."""
    stems = {os.path.splitext(name)[0] for name in folder.images}
    files = folder.matching("*.txt")
    return files if any(os.path.splitext(name)[0] in stems for name in files) else []


def _fits_karpathy(folder: ImageFolder, file: str) -> bool:
    """Return whether a file holds what Karpathy's JSON does."""
    return file.lower().endswith(".json") and contains(folder, file, '"images"', '"sentences"', '"raw"', '"filename"')


def _fits_coco(folder: ImageFolder, file: str) -> bool:
    """Return whether a file holds what COCO's JSON of captions does; that of its instances has no captions."""
    words = ('"images"', '"annotations"', '"image_id"', '"file_name"', '"caption"')
    return file.lower().endswith(".json") and contains(folder, file, *words)


def _fits_lines(folder: ImageFolder, file: str) -> bool:
    """Return whether most lines of a file, the first included, begin with an image's name."""
    lines = [line for line in first_lines(folder, file) if line.strip() and not SEPARATOR.match(line)][:NUM_LINES_TRIED]
    if file.lower().endswith(".json") or not find_format(lines[:1])[1]:
        return False
    return 2 * find_format(lines)[1] >= len(lines)


def _fits_table(folder: ImageFolder, file: str) -> bool:
    """Return whether a file begins with a row of JSON, or with names of columns, of images and of captions."""
    lines = first_lines(folder, file)
    if not file.lower().endswith(".json"):
        header = next((line for line in lines if line.strip() and not SEPARATOR.match(line)), "")
        return has_columns(name.strip(' "') for name in re.split(r"[,;\t|]", header))
    keys = {match[1].lower() for line in lines for match in re.finditer(r'"([^"\\]{1,255})"\s*:\s*["\[{\d]', line)}
    return has_columns(keys) or any(is_image_name(key) for key in keys)


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
        _fits_karpathy,
    ),
    "flickr30k": Layout("Flickr30k", _by_name("results*.csv", "*.token"), _listing(read_caption_lines)),
    "kaggle": Layout("Flickr as Kaggle has it", _by_name("captions.txt"), _listing(read_caption_lines), _fits_lines),
    "coco": Layout("COCO's annotations", _by_name("captions_*20[0-9][0-9].json"), _listing(read_coco), _fits_coco),
    "imagefolder": Layout(
        "an imagefolder with metadata",
        _by_name("metadata.csv", "metadata.jsonl", "metadata.parquet"),
        _listing(read_tables),
    ),
    "webdataset": Layout("WebDataset's tar shards", _by_name("*.tar", "*.tar.gz", "*.tgz"), read_tar_shards),
    "parquet": Layout("Parquet files", _find_parquet, read_parquet),
    "table": Layout("a table of images and captions", _find_tables, _listing(read_tables), _fits_table),
    "text": Layout("images with texts of the same names", _find_text_pairs, _listing(read_text_pairs)),
}
