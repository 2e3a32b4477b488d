"""Limits of the memory and the time that an image may take, checked before it is decoded."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from PIL import ImageFile

# An image that would need more is refused. Raise these limits if your images are larger and you trust them.
MAX_MEMORY = 400 * 2**20  # bytes to decode an image and convert it to RGB: 104 million pixels of a usual PNG or JPEG
MAX_SECONDS = 4.0  # to decode an image, on a processor of 2020
MAX_EDGE = 2**18  # pixels; resizing longer strips takes seconds

RESIZING = 10.0  # nanoseconds per decoded pixel

# What a reasonable file needs before its first pixel.
MAX_READS = 2_000_000  # pieces, which Pillow reads one by one in Python
MAX_METADATA = 16 * 2**20  # bytes
MAX_TIFF_METADATA = 128 * 2**20  # bytes; Photoshop keeps its layers there
MAX_TIFF_VALUES = 2**17  # of a tag, such as the places of strips and tiles


class TooLargeError(ValueError):
    """An image would need too much memory or time; the message continues a sentence that begins with its name."""


class Cost(NamedTuple):
    """Memory and time to decode an image, beside the memory of its pixels, as measured with noise and plain images."""

    bytes_per_pixel: float = 0.0
    copies_of_file: int = 0
    nanoseconds_per_pixel: float = 20.0
    nanoseconds_per_byte: float = 0.0  # of the file


# By the name of Pillow's decoder, or else of the format. The first three decoders are written in Python.
COSTS = {
    "bmp_rle": Cost(8.0, 0, 5.0, 700.0),
    "ppm": Cost(16.0, 0, 1500.0),
    "ppm_plain": Cost(8.0, 1, 5.0, 300.0),
    "JPEG": Cost(0.0, 0, 12.0, 10.0),
    "PNG": Cost(0.0, 1, 35.0, 5.0),
    "WEBP": Cost(14.0, 2, 15.0, 40.0),
    "AVIF": Cost(8.0, 1, 25.0, 100.0),
    "HEIF": Cost(8.0, 2, 25.0, 100.0),
    "JPEG2000": Cost(22.0, 1, 30.0, 150.0),
}
COSTS["MPO"] = COSTS["JPEG"]


class _LimitedReads:
    """A mixin of binary files that refuses too many reads, and too many bytes that are read piece by piece."""

    reads_left = MAX_READS
    bytes_left = MAX_METADATA

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        self.bytes_left -= max(size or 0, 0)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise ValueError("its metadata are too large, or it consists of too many small pieces.")
        return super().read(size)  # type: ignore[misc]


class LimitedBytes(_LimitedReads, io.BytesIO):
    """The bytes of an image file."""


class LimitedFile(_LimitedReads, io.BufferedReader):
    """An image file on disk."""


BinaryFile = LimitedBytes | LimitedFile


def file_size(file: BinaryFile) -> int:
    """Return the number of bytes of a file, and go to its start."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def limit_metadata(file: BinaryFile) -> None:
    """Limit what is read from a file until its pixels are decoded, and check the tags of a TIFF."""
    file.seek(0)
    is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    file.reads_left, file.bytes_left = MAX_READS, MAX_TIFF_METADATA if is_tiff else MAX_METADATA
    if is_tiff:
        with suppress(struct.error, OverflowError):  # Pillow finds better words for a broken file
            _check_tags(file)
    file.seek(0)


def _check_tags(file: BinaryFile) -> None:
    """Refuse a TIFF file whose directories have so many tags or numbers that Python objects of them fill the memory."""
    file.seek(0)
    head = file.read(16)
    order, is_big = "<" if head.startswith(b"II") else ">", b"+" in head[2:4]
    number_of_tags, tag = (struct.Struct(order + codes) for codes in (("Q", "HHQQ") if is_big else ("H", "HHII")))
    offsets = list(struct.unpack(order + "Q", head[8:16]) if is_big else struct.unpack(order + "I", head[4:8]))
    for _ in range(8):  # the first directory, and those of EXIF, GPS and interoperability
        if not offsets:
            return
        file.seek(offsets.pop())
        (count,) = number_of_tags.unpack(file.read(number_of_tags.size))
        entries = file.read(tag.size * min(count, 2**16))
        for name, kind, num_values, value in tag.iter_unpack(entries[: len(entries) // tag.size * tag.size]):
            if num_values > MAX_TIFF_VALUES and kind not in (1, 2, 6, 7):  # bytes stay bytes
                raise ValueError(f"its tag {name} has {num_values} values.")
            if name in (34665, 34853, 40965):
                offsets.append(value)


def check_cost(image: ImageFile.ImageFile, file: BinaryFile | None, full_size: tuple[int, int], rotated: bool) -> None:
    """Refuse an opened image that would need too much memory or time, before its pixels are decoded.

    Args:
        image: Image as Pillow has opened it, perhaps to be decoded at reduced size.
        file: The file it is read from, whose further reads are then no longer limited; None if it is unknown.
        full_size: Width and height as they are in the file.
        rotated: Whether it will be rotated.

    Raises:
        ValueError: It exceeds `MAX_MEMORY`, `MAX_SECONDS` or `MAX_EDGE`.
    """
    num_bytes = 0
    if file is not None:
        num_bytes = file_size(file)
        file.bytes_left = 2**63
        if image.format != "PNG":  # whose pixels may come in pieces of a byte
            file.reads_left = 2**63
    codec = str(image.tile[0][0]) if image.tile else ""
    cost = COSTS.get(codec) or COSTS.get(str(image.format), Cost())
    is_copied = rotated or image.mode != "RGB" or image.has_transparency_data
    full_pixels = full_size[0] * full_size[1]
    memory = image.width * image.height * (_pixel_bytes(image.mode) + cost.bytes_per_pixel + 4 * is_copied)
    memory += num_bytes * cost.copies_of_file
    nanoseconds = full_pixels * cost.nanoseconds_per_pixel + num_bytes * cost.nanoseconds_per_byte
    seconds = 1e-9 * (nanoseconds + image.width * image.height * RESIZING)
    if codec == "jpeg" and file is not None and (image.info.get("progressive") or _is_first_scan_partial(image, file)):
        memory += 2 * full_pixels * _relative_samples(image)  # libjpeg keeps the coefficients of all scans
        seconds += 1e-9 * full_pixels * _num_scans(file)
    elif codec == "libtiff":
        memory += _strip_bytes(image)
    if max(full_size) > MAX_EDGE:
        raise TooLargeError(
            f"is too large: it has {full_size[0]} x {full_size[1]} pixels, but an edge may have {MAX_EDGE:,}. "
            f"Cut it, or raise MAX_EDGE in {__name__}."
        )
    if memory > MAX_MEMORY or seconds > MAX_SECONDS:
        raise TooLargeError(
            f"is too large: its {full_size[0]} x {full_size[1]} pixels ({image.format}) would take about "
            f"{memory / 2**20:,.0f} MiB and {seconds:.1f} s, but at most {MAX_MEMORY / 2**20:,.0f} MiB and "
            f"{MAX_SECONDS} s are allowed. Make it smaller; if you trust it, raise MAX_MEMORY or MAX_SECONDS in "
            f"{__name__}."
        )


def _pixel_bytes(mode: str) -> int:
    """Return the bytes of a pixel in Pillow's memory."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def _is_first_scan_partial(image: Any, file: BinaryFile) -> bool:
    """Tell whether the first scan of a JPEG file lacks some of its channels, or can't be found."""
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        if head[1] == 0xDA:
            return file.read(1)[:1] != bytes([image.layers])
        file.seek(-3 if head[1] == 0xFF else int.from_bytes(head[2:]) - 2, io.SEEK_CUR)
    return True


def _num_scans(file: BinaryFile) -> int:
    """Return about how many scans a JPEG file has."""
    file.seek(0)
    return sum(block.count(b"\xff\xda") for block in iter(lambda: file.read(2**20), b""))


def _relative_samples(image: Any) -> float:
    """Return the number of samples for each pixel of a JPEG image, all channels together."""
    factors = [(layer[1], layer[2]) for layer in image.layer]
    largest = max(h for h, _ in factors) * max(v for _, v in factors)
    return sum(h * v for h, v in factors) / max(largest, 1)


def _strip_bytes(image: Any) -> int:
    """Return the bytes of the largest piece that libtiff decodes at once."""
    tags = image.tag_v2
    rows, width = min(tags.get(278, image.height), image.height), image.width
    if 322 in tags and 323 in tags:
        width, rows = tags[322], tags[323]
    return int(width) * int(rows) * max(4, sum(tags.get(258, (8,))) // 8)


@contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Hide Pillow's warnings about size and metadata, in all threads, while any image is read.

    `warnings.catch_warnings` would not do: threads that overlap would restore each other's filters, and every warning
    of the program that is shown once would be shown again after each image.
    """
    hidden = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    warnings.filters.insert(0, hidden)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody else has replaced the filters meanwhile
            warnings.filters.remove(hidden)  # type: ignore[attr-defined]
