"""Functions that open images of any kind. This module needs neither torch nor transformers."""

# H: height, W: width

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Size = tuple[int, int]  # width and height
Box = tuple[float, float, float, float]  # left, top, right and bottom, in pixels

# Pillow's names of the formats that are read. Others may start foreign programs (EPS starts Ghostscript), or mean data of
# another kind; "JPEG" includes "MPO".
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Ends of the names of such files; those of HEIF need the package pillow-heif. None is the beginning of a later one.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tiff", ".tif", ".jpe", ".jfif", ".mpo", ".apng", ".dib"),
    *(".jp2", ".j2k", ".j2c", ".jpf", ".jpx", ".jpc", ".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif", ".hif"),
)

DOWNLOAD_TIMEOUT = 30.0  # seconds

# A large JPEG is decoded at a reduced size that is still at least this many times as large as the size at which it is
# used, as in Pillow's thumbnails. Pixels then differ by less than one level of 255 on average; at 1 it would be up to 4
# levels, more than between two interpolations.
REDUCTION_GAP = 2


@dataclass(frozen=True)
class OpenedImage:
    """An opened image, upright and in RGB. A large JPEG file may be decoded at a half to an eighth of its size."""

    image: Image.Image
    size: Size  # of the image at full size


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Tell whether a file is an image by the end of its name."""
    return os.fspath(name).lower().endswith(IMAGE_SUFFIXES)


def is_url(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name is an address, of any scheme, and not a path; `open_image` reads http and https."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(name), re.IGNORECASE) is not None


def open_image(source: ImageSource, *, used_size: Callable[[int, int], Size] | None = None) -> Image.Image:
    """Open an image as a viewer would show it: upright, in RGB, 8 bits a channel.

    The EXIF rotation is applied, transparent parts are put on white, 16-bit grey is scaled to 8 bits, and an animation
    is reduced to its first frame.

    Args:
        source: Path, http(s) URL, bytes of a file, PIL image, or array `(H, W)`, `(H, W, 3)` or `(H, W, 4)`
            of uint8 or uint16.
        used_size: Function from width and height of the upright image to the width and height at which it will be
            used. A JPEG file more than `REDUCTION_GAP` times as large is then decoded at a half, a quarter or an
            eighth of its size, which is several times as fast. None to decode it at full size.

    Returns:
        A new RGB image, loaded into memory.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: The URL cannot be downloaded.
        ValueError: The source is not an image, is truncated, or has more pixels than is safe to open.
        TypeError: The source has none of these types.
    """
    image = open_as_used(source, used_size).image
    return image.copy() if image is source or isinstance(image, ImageFile.ImageFile) else image


def open_as_used(source: ImageSource, used_size: Callable[[int, int], Size] | None) -> OpenedImage:
    """Open an image as `open_image` does, and return it with its full size.

    The image may be the source itself if that is a PIL image. Arguments and errors are those of `open_image`.
    """
    if isinstance(source, np.ndarray):
        image = _to_rgb(_from_array(source))
        return OpenedImage(image, image.size)
    name, file = _name_and_file(source)
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            is_sideways = orientation in (5, 6, 7, 8)
            size = image.size[::-1] if is_sideways else image.size
            if used_size is not None and image is not file and isinstance(image, JpegImageFile):
                width, height = (REDUCTION_GAP * edge for edge in used_size(*size))
                image.draft(None, (height, width) if is_sideways else (width, height))
            image.load()
            return OpenedImage(_to_rgb(image if orientation == 1 else ImageOps.exif_transpose(image)), size)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{name} does not exist.") from e
    except UnidentifiedImageError as e:
        raise ValueError(
            f"{name} is not a readable image: it is empty, or in a format that Pillow does not read. "
            "Convert it to JPEG or PNG."
        ) from e
    except Image.DecompressionBombError as e:
        raise ValueError(
            f"{name} has more pixels than is safe to open: {e} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from e
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others for broken files
        raise ValueError(f"{name} is not a readable image: {e}") from e


def _name_and_file(source: ImageSource) -> tuple[str, str | io.BytesIO | Image.Image]:
    """Return the name of a source for error messages, and an object that Pillow can read it from."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "The given PIL image", source
    if isinstance(source, bytes):
        return "The given bytes object", io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"An image cannot be read from {type(source).__name__}; give a path, a URL, bytes, a PIL image "
            "or a numpy array."
        )
    name = os.fspath(source)
    if name.lower().startswith(("http://", "https://")):
        return name, io.BytesIO(_download(name))
    return name, name


def _download(url: str) -> bytes:
    # Not transformers' load_image, which decodes error pages and loses transparency and the range of 16 bits.
    try:
        from huggingface_hub.utils import httpx  # an exported captioner runs without it
    except ImportError as e:
        raise ConnectionError(f"{url} cannot be downloaded without huggingface_hub; give a file.") from e
    try:
        response = httpx.get(url, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True)
        return response.raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise ConnectionError(f"{url} cannot be downloaded: {e}") from e


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not is_image or array.size == 0 or array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(
            f"The given array has shape {array.shape} and dtype {array.dtype}; an image is (H, W), (H, W, 3) "
            "or (H, W, 4) of uint8 or uint16."
        )
    return Image.fromarray(array if array.dtype.itemsize == 1 else _scale_16_bits(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; convert them to 8 bits.")
    if image.mode.startswith("I"):  # "I;16", "I;16B", and 32-bit "I", which Pillow also uses for 16-bit files
        image = Image.fromarray(_scale_16_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_16_bits(values: np.ndarray) -> np.ndarray:
    """Scale values from 0 … 65535 to 0 … 255; Pillow's own conversion would clip them at 255."""
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"its pixel values range from {low} to {high}, beyond 16 bits; convert them to 8 bits.")
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
