"""Attention maps on their way to a picture: checked, stretched, and laid over the part of the photograph they cover."""

# T: words, H, W: height and width of a photograph in pixels

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]

# Heat from where the model hardly looked to where it looked most: shares of the range with red, green and blue.
# After matplotlib's inferno, without the black: as readable in print and to the colour-blind.
HEAT: tuple[tuple[float, tuple[int, int, int]], ...] = (
    (0.0, (70, 20, 110)),
    (0.35, (170, 40, 95)),
    (0.6, (230, 80, 40)),
    (0.8, (250, 150, 20)),
    (1.0, (255, 225, 90)),
)
FAINT = 0.15  # share of the range up to which there is no heat
OPACITY = 0.75  # of the greatest heat


def checked_maps(words: Sequence[str], maps: np.ndarray) -> np.ndarray:
    """Maps `(T, rows, columns)` in single precision, one for each word.

    Raises:
        ValueError: they are of another shape or number.
    """
    maps = np.asarray(maps, dtype=np.float32)
    if maps.ndim != 3 or len(maps) != len(words):
        raise ValueError(
            f"maps have shape {maps.shape} for {len(words)} words; give an array (T, rows, columns), a map a word."
        )
    return maps


def stretched(weights: np.ndarray, *, even: float) -> np.ndarray:
    """A map scaled so that its least weight is 0 and its greatest 1; `even` everywhere if it has no differences."""
    low, high = weights.min(), weights.max()
    if high - low <= 1e-3 * high:
        return np.full_like(weights, even)
    return (weights - low) / (high - low)


def relative_box(box: Box | None, size: tuple[int, int]) -> Box:
    """A box `(left, top, right, bottom)` in shares of an image's width and height; None is the whole image."""
    width, height = size
    left, top, right, bottom = box or (0, 0, width, height)
    return left / width, top / height, right / width, bottom / height


def settled(maps: np.ndarray, box: Box) -> tuple[np.ndarray, Box]:
    """Maps and their box in shares of the image, with what reaches out of the image on one side brought back.

    An encoder's cells may all look a part of a cell past their places (see `TimmEncoder.grid_box`), so that the grid
    leaves a strip of the image bare. Here the cells stay, the weights move, and those at the bare side cover it.

    Args:
        maps: `(T, rows, columns)`.
        box: in shares of the image's width and height.
    """
    _, rows, columns = maps.shape
    across, down = _overhang(box[0], box[2]), _overhang(box[1], box[3])
    moved_across = _moved(columns, across / (box[2] - box[0]))
    moved_down = _moved(rows, down / (box[3] - box[1]))
    box = (box[0] - across, box[1] - down, box[2] - across, box[3] - down)
    return (moved_down @ maps @ moved_across.T).astype(maps.dtype), box


def _overhang(start: float, end: float) -> float:
    """How far a span must move back, backwards being positive, to leave no part of 0 to 1 bare that it can cover."""
    return max(0.0, min(start, end - 1)) - max(0.0, min(-start, 1 - end))


def _moved(count: int, shift: float) -> np.ndarray:
    """Matrix that moves `count` weights by a share of their number, linearly between them: `(count, count)`."""
    places = (np.arange(count) - shift * count).clip(0, count - 1)
    return (1 - np.abs(places[:, None] - np.arange(count))).clip(0, 1)


def spread(light: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """A map `(rows, columns)` spread smoothly over its box in a photograph: `(H, W)`, 0 outside the box.

    Args:
        light: the map, from 0 to 1.
        size: W and H.
        box: in shares of them, see `relative_box`.
    """
    width, height = size
    left, right = (round(share * width) for share in box[::2])
    top, bottom = (round(share * height) for share in box[1::2])
    smooth = Image.fromarray(light).resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    canvas = Image.new("F", size, 0.0)
    canvas.paste(smooth, (left, top))
    return np.asarray(canvas).clip(0, 1)


def scaled(photo: Image.Image, edge: float) -> Image.Image:
    """A photograph with a longer edge of so many pixels."""
    scale = edge / max(photo.size)
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS)
