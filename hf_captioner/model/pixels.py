"""Transform of images into pixel values: resize, centre crop, standardise. Needs neither torch nor transformers."""

# B: images, H: height, W: width

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image

from .images import Box, OpenedImage, Size

Crop = tuple[int, int, int, int]  # left, top, right and bottom, in whole pixels
Resize = Callable[[Image.Image, Size, Crop, str], np.ndarray]  # see `resize_and_crop`

# Images are first opened, then resized, then written, a few at a time in each step. The machine code of each step is
# large compared with a small image: loading it anew for every image took a quarter of the time at 224 x 224 pixels.
AT_ONCE = 16  # maximum number of images
PIXELS_AT_ONCE = 2**20  # no further image is opened once the opened ones have this many pixels

# Most pixels of a whole resized image; of a larger one, such as a long strip, only the part is computed that is kept.
MAX_RESIZED = 2**24

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MAX_PIXELS = 1536**2  # of the model's input; timm's largest inputs have 1024 x 1024
CROP_PCT_RANGE = (0.1, 10)

# Filters for which `resize_and_crop` computes only the part of the image that the crop keeps.
_PARTIAL_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.HAMMING, Image.Resampling.BICUBIC)


def check_settings(size: Sequence[Any], interpolation: Any, crop_pct: Any, crop_mode: Any, mean: Any, std: Any) -> None:
    """Check the settings of a transform, which a stranger's file may give any value of any type.

    Args:
        size: Height and width of the model's input.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: Number in `CROP_PCT_RANGE`.
        crop_mode: One of `CROP_MODES`.
        mean: Three numbers, for red, green and blue.
        std: Three numbers, not too close to 0.

    Raises:
        ValueError: A setting is of the wrong type or out of its range.
    """
    is_size = len(size) == 2 and all(isinstance(edge, Integral) and not isinstance(edge, bool) for edge in size)
    if not is_size or min(size) < 1 or math.prod(size) > MAX_PIXELS:
        raise ValueError(
            f"size is {' x '.join(map(str, size))} (height x width); give whole numbers of at least 1, and at most "
            f"{MAX_PIXELS:,} pixels."
        )
    if crop_mode not in CROP_MODES:  # timm treats an unknown one as "center"
        raise ValueError(f"crop_mode is {crop_mode!r}; choose from {', '.join(CROP_MODES)}.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}; choose from {', '.join(INTERPOLATIONS)}.")
    smallest, largest = CROP_PCT_RANGE
    if not _are_numbers([crop_pct], 1) or not smallest <= crop_pct <= largest:
        raise ValueError(
            f"crop_pct is {crop_pct!r}; it must be from {smallest} to {largest}, and is usually at most 1."
        )
    if not _are_numbers(mean, 3) or not _are_numbers(std, 3) or min(std) < 1e-4:
        raise ValueError(
            f"image_mean is {mean} and image_std {std}; give three numbers each, for red, green and blue, and standard "
            "deviations above 0."
        )


def _are_numbers(values: Any, count: int) -> bool:
    """Return whether values are so many numbers of usual size, not NaN."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return False
    numbers = [float(value) for value in values if isinstance(value, Real) and not isinstance(value, bool)]
    return len(numbers) == len(list(values)) == count and all(abs(value) <= 1e4 for value in numbers)


def visible_box(original: Size, resized: Size, crop: Size, part: Box | None = None) -> Box:
    """Return the box of an image, in its pixels, that a model sees after a resize and a centre crop, or a part of it.

    `part` is in pixels of the crop, which is all of it by default. The box exceeds the image where the model sees
    padding.
    """
    x, y = (crop_start(*edge) for edge in zip(resized, crop, strict=True))
    left, top, right, bottom = part or (0, 0, *crop)
    scale_x, scale_y = (a / b for a, b in zip(original, resized, strict=True))
    return (x + left) * scale_x, (y + top) * scale_y, (x + right) * scale_x, (y + bottom) * scale_y


def crop_start(resized: int, crop: int) -> int:
    """Return where torchvision's centre crop starts along an edge, in resized pixels; below 0 it pads."""
    return -((crop - resized) // 2) if crop > resized else round((resized - crop) / 2)


def shortened_strip(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """Return the image, or, if it is an upright strip that a horizontal resize would blow up, its vertical resize.

    All resizing here begins horizontally, which makes a strip of width 1 and height 100,000 hundreds of times as large.
    """
    if image.height <= size[1] or image.height * size[0] <= MAX_RESIZED:
        return image
    return image.resize((image.width, size[1]), Image.Resampling[interpolation.upper()])


def resize_and_crop(image: Image.Image, size: Size, crop: Crop, interpolation: str) -> np.ndarray:
    """Return `image.resize(size).crop(crop)`, if possible without computing pixels outside the crop.

    If Pillow resizes only a part of an image, it holds the borders of the part in single precision, and may resize
    vertically before horizontally. For the usual filters this changes a few pixels by one of 255 levels. Filters with
    discontinuous weights (nearest, box) could choose another pixel, and Lanczos amplifies the differences, so with
    those the whole image is resized, unless it is a strip that would have more than `MAX_RESIZED` pixels. The result is
    `(H, W, 3)`, uint8, for an RGB image.
    """
    image = shortened_strip(image, size, interpolation)
    resampling = Image.Resampling[interpolation.upper()]
    if resampling not in _PARTIAL_FILTERS and size[0] * size[1] <= MAX_RESIZED:
        return np.asarray(image.resize(size, resampling).crop(crop))
    left, top, right, bottom = visible_box(image.size, size, size, crop)
    # A rounding error must not push the right or lower border out of the image.
    box = left, top, min(right, image.width), min(bottom, image.height)
    return np.asarray(image.resize((crop[2] - crop[0], crop[3] - crop[1]), resampling, box))


@dataclass(frozen=True)
class PixelTransform:
    """Settings of the transform from an opened image to pixel values."""

    resized_size: Callable[[int, int], Size]  # from width and height of a full image to those it is resized to
    interpolation: str  # name of a Pillow filter, in lower case
    padding: tuple[int, int, int]  # colour around an image that is smaller than the crop, from 0 to 255
    mean: Sequence[float]  # mean of red, green and blue on the scale from 0 to 1, which is subtracted
    std: Sequence[float]  # standard deviation of the three, by which they are divided
    resize: Resize = resize_and_crop

    def visible_part(self, opened: OpenedImage, width: int, height: int) -> tuple[np.ndarray, int, int]:
        """Resize an image; return its pixels within a centre crop of this size, and their left and top edge in it."""
        resized = self.resized_size(*opened.size)
        left, top = crop_start(resized[0], width), crop_start(resized[1], height)
        part = max(left, 0), max(top, 0), min(left + width, resized[0]), min(top + height, resized[1])
        return self.resize(opened.image, resized, part, self.interpolation), part[0] - left, part[1] - top


def write_pixels(pixel_values: np.ndarray, images: Iterable[OpenedImage], transform: PixelTransform) -> list[Size]:
    """Resize B images, crop their centres and overwrite `(B, 3, H, W)` float32 by their standardised pixel values.

    Return the width and height of each image at full size. Images are requested as needed, up to `AT_ONCE` at a time.
    """
    height, width = pixel_values.shape[2:]
    means, stds = (np.asarray(numbers, np.float64)[:, None, None] for numbers in (transform.mean, transform.std))
    scale, shift = (1 / (255 * stds)).astype(np.float32), (means / stds).astype(np.float32)
    images, unwritten, sizes = iter(images), iter(pixel_values), []
    while group := _next_group(images):
        sizes += [opened.size for opened in group]
        parts = [transform.visible_part(opened, width, height) for opened in group]
        del group  # frees large images before the next ones are opened
        for (part, x, y), values in zip(parts, unwritten, strict=False):
            if part.shape[:2] != (height, width):
                values[:] = np.asarray(transform.padding)[:, None, None]
            # In numpy, because torch would start its own threads in every thread that reads images.
            values[:, y : y + part.shape[0], x : x + part.shape[1]] = part.transpose(2, 0, 1)
            values *= scale
            values -= shift
    assert next(unwritten, None) is None, "fewer images than pixel_values"
    return sizes


def _next_group(images: Iterator[OpenedImage]) -> list[OpenedImage]:
    """Return the next images to process together, or an empty list at the end."""
    group: list[OpenedImage] = []
    num_pixels = 0
    for opened in images:
        group.append(opened)
        num_pixels += opened.image.width * opened.image.height
        if len(group) == AT_ONCE or num_pixels >= PIXELS_AT_ONCE:
            break
    return group
