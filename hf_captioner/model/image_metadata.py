"""What image files say beside their pixels: the orientation, and how to go on where these metadata are broken."""

from __future__ import annotations

import logging
import re

from PIL import ExifTags, Image

from .image_limits import MAX_MEMORY, BinaryFile, LimitedBytes, file_size

logger = logging.getLogger(__name__)

# How to turn an image upright, by its EXIF orientation.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)

# Keys of `info` of PIL images whose values hold the orientation.
ORIENTED_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")

MAX_EXIF = 2**20  # bytes; Python objects of more would fill the memory
MAX_REPORTS = 10  # images with broken metadata that are named, in each process
_reported: set[str] = set()

PNG_METADATA = (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT")
# All but JFIF's APP0 and Adobe's APP14, which say what the channels mean.
JPEG_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)


def orientation_of(image: Image.Image, name: str) -> int:
    """Return the EXIF orientation of an image, or 1, upright, if it has none or its EXIF data are broken."""
    try:
        if len(image.info.get("exif") or b"") > MAX_EXIF:
            raise ValueError("too large")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises whatever its parsing comes upon
        report(name, "its EXIF data are broken, so it is not rotated")
        return 1
    return orientation if isinstance(orientation, int) and orientation in TRANSPOSITIONS else 1


def report(name: str, problem: str) -> None:
    """Log a problem with the metadata of an image, once for an image and for a few images of a process."""
    if name in _reported or len(_reported) >= MAX_REPORTS:
        return
    _reported.add(name)
    more = " Further images like this are not named." if len(_reported) == MAX_REPORTS else ""
    logger.warning(f"{name}: {problem}.{more}")


def without_metadata(file: BinaryFile) -> LimitedBytes | None:
    """Return a file without the metadata that Pillow may fail at; None if it has none that can be left out."""
    if file_size(file) > MAX_MEMORY // 4:
        return None
    file.bytes_left = MAX_MEMORY
    data = file.read()
    if data.startswith(b"\x89PNG"):
        kept = _without_chunks(data)
    elif data.startswith(b"\xff\xd8"):
        kept = _without_segments(data)
    else:  # AVIF, in which metadata of an unknown kind are ignored
        kept = re.sub(rb"(infe\x02.{7})Exif", rb"\1free", data, flags=re.DOTALL)
    return LimitedBytes(kept) if kept != data else None


def _without_chunks(png: bytes) -> bytes:
    parts, start = [png[:8]], 8
    while start + 12 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        if png[start + 4 : start + 8] not in PNG_METADATA:
            parts.append(png[start:end])
        start = end
    return b"".join(parts) + png[start:]


def _without_segments(jpeg: bytes) -> bytes:
    parts, start = [jpeg[:2]], 2
    while jpeg[start : start + 1] == b"\xff" and jpeg[start + 1 : start + 2] != b"\xda" and start + 4 <= len(jpeg):
        end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])
        if jpeg[start + 1] not in JPEG_METADATA:
            parts.append(jpeg[start:end])
        start = end
    return b"".join(parts) + jpeg[start:]
