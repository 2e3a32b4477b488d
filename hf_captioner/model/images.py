"""Functions that open images of any kind. This module needs neither torch nor transformers."""

# H: height, W: width

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from .image_limits import BinaryFile, TooLargeError, check_cost, limit_metadata, without_pillow_warnings
from .image_metadata import ORIENTED_METADATA, SIDEWAYS, TRANSPOSITIONS, orientation_of, report, without_metadata
from .image_sources import is_url, open_source, shown

__all__ = ["IMAGE_FORMATS", "IMAGE_SUFFIXES", "is_image_name", "is_url", "open_as_used", "open_image"]

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray
Size = tuple[int, int]  # width and height
Box = tuple[float, float, float, float]  # left, top, right and bottom, in pixels

# Pillow's names of the formats that are read; "JPEG" includes "MPO". HEIF is added if pillow-heif is installed. Others
# may start foreign programs, as EPS starts Ghostscript, or are kinds of data that nobody means by an image.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Ends of the names of such files; those of HEIF need the package pillow-heif. None is the beginning of a later one.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tiff", ".tif", ".jpe", ".jfif", ".mpo", ".apng", ".dib"),
    *(".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".jpc", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif", ".hif"),
)

PIXELS_AT_ONCE = 2**20  # converted to RGB at once

# A large JPEG is decoded at a reduced size that is still at least this many times as large as the size at which it is
# used, as in Pillow's thumbnails. Pixels then differ by less than one level of 255 on average; at 1 it would be up to 4
# levels, more than between two interpolations.
REDUCTION_GAP = 2
DRAWN_EDGE = 720  # pixels of the longer edge of the largest pictures, and no less


@dataclass(frozen=True)
class OpenedImage:
    """An opened image, upright and in RGB. A large JPEG file may be decoded at a half to an eighth of its size."""

    image: Image.Image
    size: Size  # of the image at full size


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Tell whether a file is an image by the end of its name."""
    return os.fspath(name).lower().endswith(IMAGE_SUFFIXES)


def open_image(source: ImageSource, *, used_size: Callable[[int, int], Size] | None = None) -> Image.Image:
    """Open an image as a viewer would show it: upright, in RGB, 8 bits a channel.

    The EXIF rotation is applied, transparent parts are put on white, 16-bit grey is scaled to 8 bits, and an animation
    is reduced to its first frame.

    Args:
        source: Path, http(s) URL, data URI, bytes of a file, open binary file, PIL image, or array `(H, W)`,
            `(H, W, 3)` or `(H, W, 4)` of uint8 or uint16. Files may have any of `IMAGE_FORMATS`.
        used_size: Function from width and height of the upright image to the width and height at which it will be
            used. A JPEG file more than `REDUCTION_GAP` times as large is then decoded at a half, a quarter or an
            eighth of its size, which is several times as fast. None to decode it at full size.

    Returns:
        A new RGB image, loaded into memory.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: The URL cannot be downloaded.
        ValueError: The source is not an image, is truncated, or exceeds `image_limits.MAX_MEMORY` or `MAX_SECONDS`.
        TypeError: The source has none of these types.
    """
    image = open_as_used(source, used_size).image
    if image is source:
        return image.copy()
    # A plain image, which is not bound to a format, with the same pixels.
    return image._new(image.im) if isinstance(image, ImageFile.ImageFile) else image


def open_as_used(source: ImageSource, used_size: Callable[[int, int], Size] | None) -> OpenedImage:
    """Open an image as `open_image` does, and return it with its full size.

    The image may be the source itself if that is a PIL image. Arguments and errors are those of `open_image`.
    """
    if isinstance(source, np.ndarray):
        image = _to_rgb(_from_array(source))
        return OpenedImage(image, image.size)
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = shown(str(filename)) if filename else "The given PIL image"
        _refuse_foreign_format(source, name)
    else:
        name, file = open_source(source)
    try:
        with without_pillow_warnings():
            if isinstance(source, Image.Image):
                return _read(name, source, None, used_size)
            with file:
                return _read_file(name, file, used_size)
    except UnidentifiedImageError as e:
        raise ValueError(
            f"{name} is not a readable image: it is empty, or in none of the formats {', '.join(IMAGE_FORMATS)}. "
            "Convert it to JPEG or PNG."
        ) from e
    except TooLargeError as e:
        raise ValueError(f"{name} {e}") from e
    except Image.DecompressionBombError as e:
        raise ValueError(
            f"{name} has more pixels than is safe to open: {e} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from e
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others for broken files
        raise ValueError(f"{name} is not a readable image: {' '.join(str(e).split())[:200] or type(e).__name__}") from e


def _is_unloaded(image: Image.Image) -> bool:
    """Tell whether a PIL image is a file whose pixels have not been decoded yet."""
    return isinstance(image, ImageFile.ImageFile) and getattr(image, "_im", True) is None


def open_to_draw(source: ImageSource | OpenedImage) -> OpenedImage:
    """Open an image for a picture of it whose longer edge has at most `DRAWN_EDGE` pixels; see `open_as_used`."""
    if isinstance(source, OpenedImage):
        return source

    def used_size(width: int, height: int) -> Size:
        scale = DRAWN_EDGE / max(width, height)
        return math.ceil(width * scale), math.ceil(height * scale)

    return open_as_used(source, used_size)


def _refuse_foreign_format(image: Image.Image, name: str) -> None:
    """Refuse a PIL image that would first have to be decoded from a format that `IMAGE_FORMATS` excludes."""
    if _is_unloaded(image) and image.format not in (*IMAGE_FORMATS, "MPO", "HEIF"):
        raise ValueError(
            f"{name} is not a readable image: its format is {image.format}, which is none of "
            f"{', '.join(IMAGE_FORMATS)}. If you trust it, call its load() yourself."
        )


def _read_file(name: str, file: BinaryFile, used_size: Callable[[int, int], Size] | None) -> OpenedImage:
    """Decode a file as `_read` does, if need be without metadata that Pillow fails at."""
    try:
        return _read(name, _identify(file), file, used_size)
    except (UnidentifiedImageError, ValueError) as e:
        if isinstance(e, TooLargeError) or not (data := without_metadata(file)):
            raise
    opened = _read(name, _identify(data), data, used_size)
    report(name, "its metadata are broken, and have been ignored")
    return opened


def _identify(file: BinaryFile) -> ImageFile.ImageFile:
    """Open a file by Pillow without decoding its pixels."""
    limit_metadata(file)
    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        if not re.match(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", file.read(12), re.DOTALL):
            raise
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]
    except ImportError as e:
        raise ValueError("it is a HEIF file; install pillow-heif to read it, or convert it to JPEG.") from e
    register_heif_opener(thumbnails=False)
    limit_metadata(file)
    return Image.open(file, formats=["HEIF"])


def _read(
    name: str, image: Image.Image, file: BinaryFile | None, used_size: Callable[[int, int], Size] | None
) -> OpenedImage:
    """Decode an image that Pillow has opened, and turn it upright and into RGB."""
    is_jpeg, full_size = isinstance(image, JpegImageFile), image.size
    orientation = orientation_of(image, name) if is_jpeg else 1  # which other formats may have behind the pixels
    is_sideways = orientation in SIDEWAYS
    upright_size = full_size[::-1] if is_sideways else full_size
    if isinstance(image, JpegImageFile) and file is not None and used_size is not None:
        width, height = (REDUCTION_GAP * edge for edge in used_size(*upright_size))
        image.draft(None, (height, width) if is_sideways else (width, height))
    is_reduced = image.size != full_size
    if isinstance(image, ImageFile.ImageFile) and _is_unloaded(image):
        check_cost(image, file, full_size, orientation != 1)
        image.load()
        if not is_jpeg and (orientation := orientation_of(image, name)) != 1:
            check_cost(image, None, full_size, True)
    elif not is_jpeg:
        orientation = orientation_of(image, name)
    rgb = _to_rgb(image)
    if orientation != 1:
        rgb = rgb.transpose(TRANSPOSITIONS[orientation])
        for name in ORIENTED_METADATA:  # or it would be rotated again when it is next given as an image
            rgb.info.pop(name, None)
    return OpenedImage(rgb, upright_size if is_reduced else rgb.size)


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not is_image or array.size == 0 or array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(
            f"The given array has shape {array.shape} and dtype {array.dtype}; an image is (H, W), (H, W, 3) "
            "or (H, W, 4) of uint8 or uint16."
        )
    return Image.fromarray(array if array.dtype.itemsize == 1 else _scale_16_bits(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, the image itself if it is; a few rows at a time, so that this needs little memory."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; convert them to 8 bits.")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I":  # 32 bits, which Pillow also uses for some 16-bit files
        low, high = np.ravel(image.getextrema())
        if low < 0 or high > 65535:
            raise ValueError(f"its pixel values range from {low} to {high}, beyond 16 bits; convert them to 8 bits.")
    num_rows = max(1, PIXELS_AT_ONCE // image.width)
    if num_rows >= image.height:
        return _rows_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, num_rows):
        rows = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        rgb.paste(_rows_to_rgb(rows), (0, top))
    return rgb


def _rows_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I", "I;16", "I;16B"
        image = Image.fromarray(_scale_16_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_16_bits(values: np.ndarray) -> np.ndarray:
    """Scale values from 0 … 65535 to 0 … 255; Pillow's own conversion would clip them at 255."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def scaled(image: Image.Image, longest_edge: float) -> Image.Image:
    """Return an image resized, in its own aspect ratio, so that its longer edge has `longest_edge` pixels."""
    scale = longest_edge / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def jpeg_uri(image: Image.Image, longest_edge: int = 640, quality: int = 82) -> str:
    """Return an RGB image as the data URI of a JPEG, for web pages that hold all they show.

    Images whose longer edge has more than `longest_edge` pixels are scaled down. `quality` is from 1 to 95.
    """
    file = io.BytesIO()
    smaller = scaled(image, longest_edge) if max(image.size) > longest_edge else image
    smaller.save(file, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
