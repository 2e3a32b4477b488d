"""Opening images of any kind, and where in them a model looks. Needs neither torch nor transformers."""

# H: height, W: width

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Size = tuple[int, int]  # width and height
Box = tuple[float, float, float, float]
Resize = Callable[[Image.Image, Size, tuple[int, int, int, int], str], np.ndarray]  # see `resize_and_crop`

DOWNLOAD_TIMEOUT = 30.0  # seconds

# A JPEG is decoded at least so many times as wide and high as it is used, which Pillow's thumbnails do too. What comes
# out differs by less than one level of 255 on average; at 1 it would be as many as 4, more than between interpolations.
REDUCTION_GAP = 2

# Images are opened a few at a time, then these are resized, and then written. The code of each of the three is large
# next to a small image: fetching it anew for every one took a quarter of the time at 224 x 224 pixels.
AT_ONCE = 16
PIXELS_AT_ONCE = 2**20  # of which fewer images are enough

# Filters for which only what a crop keeps is resized, see `resize_and_crop`.
_FORGIVING = (Image.Resampling.BILINEAR, Image.Resampling.HAMMING, Image.Resampling.BICUBIC)


class OpenedImage(NamedTuple):
    """An image to be used at a certain size."""

    image: Image.Image  # upright, in RGB; a large JPEG file's perhaps at a half, a quarter or an eighth of its size
    size: Size  # of the whole


def open_image(source: ImageSource, *, used_size: Callable[[int, int], Size] | None = None) -> Image.Image:
    """Open an image as a viewer would show it: upright, in RGB, 8 bits a channel.

    The EXIF rotation is applied, transparent parts lie on white, 16-bit grey is scaled, and of an animation
    the first frame is taken.

    Args:
        source: path, http(s) URL, bytes of a file, PIL image, or array `(H, W)`, `(H, W, 3)` or `(H, W, 4)`
            of uint8 or uint16.
        used_size: gives, for width and height of the upright image, those with which it will be used. A JPEG file more
            than `REDUCTION_GAP` times as large is then decoded at a half, a quarter or an eighth of its size, which is
            several times as fast. None for the whole size.

    Returns:
        New RGB image, held in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: a URL cannot be downloaded.
        ValueError: the source is not an image, is truncated, or has more pixels than is safe to open.
        TypeError: the source is none of the above.
    """
    image, _ = open_as_used(source, used_size)
    return image.copy() if image is source or isinstance(image, ImageFile.ImageFile) else image


def open_as_used(source: ImageSource, used_size: Callable[[int, int], Size] | None) -> OpenedImage:
    """What `open_image` opens, perhaps the source itself, and its whole size. For arguments and errors see there."""
    if isinstance(source, np.ndarray):
        image = _to_rgb(_from_array(source))
        return OpenedImage(image, image.size)
    name, file = _name_and_file(source)
    try:
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            lies = orientation in (5, 6, 7, 8)
            size = image.size[::-1] if lies else image.size
            if used_size is not None and image is not file and isinstance(image, JpegImageFile):
                width, height = (REDUCTION_GAP * edge for edge in used_size(*size))
                image.draft(None, (height, width) if lies else (width, height))
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
    return image if image.mode == "RGB" else image.convert("RGB")


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


def resize_and_crop(image: Image.Image, size: Size, crop: tuple[int, int, int, int], interpolation: str) -> np.ndarray:
    """`image.resize(size).crop(crop)`, by the usual filters without computing what the crop takes away.

    Pillow takes the borders of what it resizes in single precision, and for a part may choose to go upright first and
    across second. The usual filters turn that into levels of 255 here and there. Where weights jump a pixel would get
    another's colour, and Lanczos makes more of it, so with those all is resized.

    Args:
        image: in RGB.
        size: width and height to resize to.
        crop: `(left, top, right, bottom)` of the part to keep, in pixels of that size.
        interpolation: a name of Pillow's, in lower case.

    Returns:
        The part's pixels `(H, W, 3)`, uint8.
    """
    resampling = Image.Resampling[interpolation.upper()]
    if resampling not in _FORGIVING:
        return np.asarray(image.resize(size, resampling).crop(crop))
    left, top, right, bottom = visible_box(image.size, size, size, crop)
    # The far border is not to exceed the image by a rounding error.
    box = left, top, min(right, image.width), min(bottom, image.height)
    return np.asarray(image.resize((crop[2] - crop[0], crop[3] - crop[1]), resampling, box))


def write_pixels(
    pixel_values: np.ndarray,
    images: Iterable[OpenedImage],
    resized_size: Callable[[int, int], Size],
    interpolation: str,
    padding: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resize: Resize = resize_and_crop,
) -> list[Size]:
    """Resize images, take their centres and standardise them.

    Args:
        pixel_values: `(B, 3, H, W)`, float32, overwritten.
        images: B of them. They are asked for as they are needed, `AT_ONCE` at a time.
        resized_size: gives, for width and height of a whole image, those it is resized to.
        interpolation: a name of Pillow's, in lower case.
        padding: colour around an image that is smaller than the crop.
        mean: of red, green and blue on the scale from 0 to 1, subtracted.
        std: of the three, divided by.
        resize: does what `resize_and_crop` does.

    Returns:
        Width and height of the whole images.
    """
    height, width = pixel_values.shape[2:]
    means, stds = (np.asarray(numbers, np.float64)[:, None, None] for numbers in (mean, std))
    scale, shift = (1 / (255 * stds)).astype(np.float32), (means / stds).astype(np.float32)
    images, rest, sizes = iter(images), iter(pixel_values), []
    while opened := _take_a_few(images):
        parts = []
        for image, size in opened:
            resized = resized_size(*size)
            left, top = crop_start(resized[0], width), crop_start(resized[1], height)
            seen = max(left, 0), max(top, 0), min(left + width, resized[0]), min(top + height, resized[1])
            parts.append((resize(image, resized, seen, interpolation), seen[0] - left, seen[1] - top))
            sizes.append(size)
        del image, opened  # large ones need not be in memory when the next ones are opened
        for (part, x, y), values in zip(parts, rest, strict=False):
            if part.shape[:2] != (height, width):
                values[:] = np.asarray(padding)[:, None, None]
            # By numpy, because a tensor's operations start threads of their own in every thread that reads images.
            values[:, y : y + part.shape[0], x : x + part.shape[1]] = part.transpose(2, 0, 1)
            values *= scale
            values -= shift
    assert next(rest, None) is None, "fewer images than pixel_values"
    return sizes


def _take_a_few(images: Iterator[OpenedImage]) -> list[OpenedImage]:
    """The next images to be worked on together, none at the end."""
    taken: list[OpenedImage] = []
    num_pixels = 0
    for opened in images:
        taken.append(opened)
        num_pixels += opened.image.width * opened.image.height
        if len(taken) == AT_ONCE or num_pixels >= PIXELS_AT_ONCE:
            break
    return taken


def scaled(image: Image.Image, longest_edge: float) -> Image.Image:
    """Return a copy of an image whose longer edge has this many pixels."""
    scale = longest_edge / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def jpeg_uri(image: Image.Image, longest_edge: int = 640, quality: int = 82) -> str:
    """Return an image as a data URI, for web pages that hold all they show.

    Args:
        image: RGB image.
        longest_edge: Larger images are scaled down to this number of pixels.
        quality: JPEG quality, from 1 to 95.
    """
    file = io.BytesIO()
    smaller = scaled(image, longest_edge) if max(image.size) > longest_edge else image
    smaller.save(file, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
