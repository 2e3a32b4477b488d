"""Opening images of any kind, and where in them a model looks. Needs neither torch nor transformers."""

# H: height, W: width

from __future__ import annotations

import io
import os
from contextlib import nullcontext

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Box = tuple[float, float, float, float]

DOWNLOAD_TIMEOUT = 30.0  # seconds


def open_image(source: ImageSource) -> Image.Image:
    """Open an image as a viewer would show it: upright, in RGB, 8 bits a channel.

    The EXIF rotation is applied, transparent parts lie on white, 16-bit grey is scaled, and of an animation
    the first frame is taken.

    Args:
        source: path, http(s) URL, bytes of a file, PIL image, or array `(H, W)`, `(H, W, 3)` or `(H, W, 4)`
            of uint8 or uint16.

    Returns:
        New RGB image, held in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: a URL cannot be downloaded.
        ValueError: the source is not an image, is truncated, or has more pixels than is safe to open.
        TypeError: the source is none of the above.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    name, file = _name_and_file(source)
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
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
    except Exception as e:  # Pillow's decoders meet broken files with OSError, SyntaxError, struct.error, …
        raise ValueError(f"{name} is not a readable image: {e}") from e


def _name_and_file(source: ImageSource) -> tuple[str, str | io.BytesIO | Image.Image]:
    """What to call a source in an error, and what Pillow can read it from."""
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
    # transformers' load_image would decode an error page, and loses transparency and the range of 16 bits.
    try:
        from huggingface_hub.utils import httpx  # which an exported captioner can do without
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
    if image.mode.startswith("I"):  # "I;16", "I;16B", and 32-bit "I", in which Pillow also gives 16-bit files
        image = Image.fromarray(_scale_16_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_16_bits(values: np.ndarray) -> np.ndarray:
    """Map 0 … 65535 to 0 … 255, where Pillow's own conversion clips at 255."""
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels go from {low} to {high}, beyond 16 bits; convert them to 8 bits.")
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def visible_box(
    original: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int], part: Box | None = None
) -> Box:
    """Where in an image lies what a model sees of it after a resize and a centre crop.

    Args:
        original: width and height of the image.
        resized: what it is resized to.
        crop: what is taken from the middle of that.
        part: of the crop, `(left, top, right, bottom)` in its pixels; None for all.

    Returns:
        `(left, top, right, bottom)` in pixels of the original. It exceeds the image where the model sees padding.
    """
    x, y = (crop_start(*edge) for edge in zip(resized, crop, strict=True))
    left, top, right, bottom = part or (0, 0, *crop)
    scale_x, scale_y = (a / b for a, b in zip(original, resized, strict=True))
    return (x + left) * scale_x, (y + top) * scale_y, (x + right) * scale_x, (y + bottom) * scale_y


def crop_start(resized: int, crop: int) -> int:
    """Where torchvision's centre crop starts along an edge, in resized pixels; below 0 it is padding."""
    return -((crop - resized) // 2) if crop > resized else round((resized - crop) / 2)
