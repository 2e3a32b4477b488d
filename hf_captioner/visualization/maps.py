"""Preparation of attention maps for drawing: check them, scale them, and place them on the image."""

# T: words; H, W: height and width of an image in pixels

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..model.images import Box


def check_maps(words: Sequence[str], maps: np.ndarray) -> np.ndarray:
    """Return attention maps as a float32 array `(T, rows, columns)`.

    Raises:
        ValueError: The array has another number of dimensions, or there is not one map for each word.
    """
    maps = np.asarray(maps, dtype=np.float32)
    if maps.ndim != 3 or len(maps) != len(words):
        raise ValueError(
            f"The maps have shape {maps.shape} for {len(words)} words; give an array (T, rows, columns) with one map "
            "for each word."
        )
    return maps


def min_max_scaled(weights: np.ndarray, *, constant: float) -> np.ndarray:
    """Scale a map linearly so that its smallest weight becomes 0 and its largest becomes 1.

    Args:
        weights: Map `(rows, columns)` of weights that are not negative.
        constant: Value of all cells of a map whose weights are all the same.
    """
    low, high = weights.min(), weights.max()
    if high - low <= 1e-3 * high:
        return np.full_like(weights, constant)
    return (weights - low) / (high - low)


def relative_box(box: Box | None, size: tuple[int, int]) -> Box:
    """Convert a box `(left, top, right, bottom)` from pixels into fractions of an image's width and height.

    Args:
        box: Box in pixels; None for the whole image.
        size: Width and height of the image in pixels.
    """
    width, height = size
    left, top, right, bottom = box or (0, 0, width, height)
    return left / width, top / height, right / width, bottom / height


def shift_into_image(maps: np.ndarray, box: Box) -> tuple[np.ndarray, Box]:
    """Move the box of attention maps back into the image where it reaches out on one side and leaves a gap opposite.

    An encoder's cells may all see what lies, say, half a cell to the right of their positions in the grid (see
    `TimmEncoder.grid_box`), so that their box leaves a strip at the left of the image without any attention. Here the
    box moves to the left, and the weights move to the right within it by the same distance. Thus each weight keeps its
    place in the image, and the weights of the leftmost cells extend over the strip.

    Args:
        maps: Attention maps `(T, rows, columns)`.
        box: Box that they cover, in fractions of the image's width and height.

    Returns:
        The maps and the box after the move; both as given if there is no such gap.
    """
    _, rows, columns = maps.shape
    left, up = _excess(box[0], box[2]), _excess(box[1], box[3])
    move_columns = _shift_matrix(columns, left / (box[2] - box[0]) * columns)
    move_rows = _shift_matrix(rows, up / (box[3] - box[1]) * rows)
    box = (box[0] - left, box[1] - up, box[2] - left, box[3] - up)
    return (move_rows @ maps @ move_columns.T).astype(maps.dtype), box


def _excess(start: float, end: float) -> float:
    """Return how far the interval from `start` to `end` must move down to cover as much of 0 to 1 as it can.

    A negative distance means up.
    """
    return max(0.0, min(start, end - 1)) - max(0.0, min(-start, 1 - end))


def _shift_matrix(count: int, distance: float) -> np.ndarray:
    """Return the `(count, count)` matrix that moves a row of weights up by `distance` cells.

    Distances between whole cells interpolate linearly, and the outermost weight fills the cells left behind.
    """
    sources = (np.arange(count) - distance).clip(0, count - 1)
    return (1 - np.abs(sources[:, None] - np.arange(count))).clip(0, 1)


def upsample(attention: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """Return the attention of each pixel of an image `(H, W)`: a map resized smoothly to its box, and 0 outside.

    Args:
        attention: Map `(rows, columns)` with values from 0 to 1.
        size: Width and height of the image in pixels.
        box: Box that the map covers, in fractions of the image's width and height.
    """
    width, height = size
    left, right = (round(fraction * width) for fraction in box[::2])
    top, bottom = (round(fraction * height) for fraction in box[1::2])
    smooth = Image.fromarray(attention).resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    canvas = Image.new("F", size, 0.0)
    canvas.paste(smooth, (left, top))
    return np.asarray(canvas).clip(0, 1)
