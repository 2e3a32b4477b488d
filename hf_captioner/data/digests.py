"""Digests of a data set's content, by which a resumed training knows its data again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from datasets import Dataset
from tqdm.auto import tqdm

from .layouts.splits import image_digest
from .loading import read_ahead
from .rows import Row, image_file

ROWS_AT_ONCE = 64


def data_digests(rows: Dataset, *, show_progress: bool = True) -> dict[str, str]:
    """Return digests of a split's images, captions and image ids, each in the order of the rows.

    Every image file is read once, by threads: a second for about a gigabyte that is in memory, on two cores. Times,
    names and folders of files don't count.

    Args:
        rows: Undecoded rows, as `select_usable_rows` returns them.
        show_progress: Show a progress bar, if standard error is a terminal.

    Raises:
        ValueError: An image can't be read.
    """
    starts = range(0, len(rows), ROWS_AT_ONCE)
    batches = (range(start, min(start + ROWS_AT_ONCE, len(rows))) for start in starts)
    read = read_ahead(lambda indices: [_image_digest(row) for row in rows.__getitems__(list(indices))], batches)
    bar = tqdm(read, desc="Reading images", total=len(starts), leave=False, disable=None if show_progress else True)
    texts = {name: (json.dumps(value).encode() for value in rows[name][:]) for name in ("captions", "image_id")}
    return {
        "images": _digest(digest for batch in bar for digest in batch),
        "captions": _digest(texts["captions"]),
        "image ids": _digest(texts["image_id"]),
    }


def _image_digest(row: Row) -> bytes:
    """Return the digest of a row's image; an error names the image."""
    with image_file(row):
        return image_digest(row["image"])


def _digest(parts: Iterable[bytes]) -> str:
    """Return a digest of a sequence of bytes, which depends on where each part ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]
