"""Pointing game on the drawn shapes: does the model look at an object when it names it?

After Zhang et al. 2016 ("Top-down Neural Attention by Excitation Backprop", sec. 4.1), with tolerance 0: a word is a
hit if the peak of its attention map lies in the box of the object that the word names. A grid cell of image features
sees more of the image than its own square of the grid. Therefore, as in the figures of Xu et al. 2015 (sec. 5.4), the
weight of each cell is spread by a Gaussian around the middle of the cell before the peak is searched, and the peak of
two neighbouring cells of equal weight lies between them. This gives more hits, so the accuracy without spreading is
reported too (`cell_accuracy`).
"""

# T: words

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.shapes import COLOURS, RULES, SHAPES
from ..model.images import Box

Object = Mapping[str, Any]  # with "shape", "colour", "size" and "box", as in the column `objects` of shapes

# Attribute of an object that a word tells, and the value of the attribute.
MEANINGS: dict[str, tuple[str, str]] = {
    **{shape: ("shape", shape) for shape in SHAPES},
    **{colour: ("colour", colour) for colour in COLOURS},
    **{word: ("size", size.lower()) for size in ("SMALL", "LARGE") for word in RULES[size]},
}
ATTRIBUTES = ("shape", "colour")  # attributes whose words are scored; size alone hardly ever identifies an object

SPREAD = 0.6  # standard deviation, in cells, of the Gaussian around a cell; smaller ones leave ripples in even maps
SAMPLES_PER_CELL = 15  # points along a cell at which the peak is searched; odd, so that one is in the middle


@dataclass(frozen=True)
class Mention:
    """A word of a caption that tells the shape or colour of an object.

    Args:
        position: Position of the word in the caption.
        attribute: Attribute that the word tells: `shape` or `colour`.
        objects: Indices of the objects that the word may mean; empty if the image has no such object.
    """

    position: int
    attribute: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Pointing:
    """Measures of how well an attention map points at an object.

    Args:
        hit: Whether the peak of the spread map lies in the object's box.
        cell_hit: Whether the middle of the heaviest cell lies in the box.
        weight_inside: Fraction of the attention weight inside the box, with each cell's weight even over its area.
        area_inside: Fraction of the map's area inside the box: the hit rate of a random peak, and the `weight_inside`
            of a uniform map.
    """

    hit: bool
    cell_hit: bool
    weight_inside: float
    area_inside: float


def mentions(words: Sequence[str], objects: Sequence[Object]) -> Iterator[Mention]:
    """Yield the words of a caption that tell the shape or colour of an object.

    A word means every object with its shape or colour. If there are several, the other words of the same phrase, such
    as "small red star", exclude objects that they don't describe, unless they exclude all.
    """
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and words[end] in MEANINGS:
            end += 1
        phrase = range(start, end)
        for position in phrase:
            attribute, value = MEANINGS[words[position]]
            candidates = [index for index, item in enumerate(objects) if item[attribute] == value]
            for other_position in phrase:
                other, other_value = MEANINGS[words[other_position]]
                candidates = [index for index in candidates if objects[index][other] == other_value] or candidates
            if attribute in ATTRIBUTES:
                yield Mention(position, attribute, tuple(candidates))
        start = max(end, start + 1)


def point(weights: np.ndarray, map_box: Box, object_box: Box) -> Pointing:
    """Compare an attention map with the box of an object.

    Args:
        weights: Attention map, `(rows, columns)`.
        map_box: Box `(left, top, right, bottom)` that the map covers, in pixels of the image.
        object_box: Box of the object, likewise.
    """
    rows, columns = weights.shape
    across = _fractions_inside(columns, (map_box[0], map_box[2]), (object_box[0], object_box[2]))
    down = _fractions_inside(rows, (map_box[1], map_box[3]), (object_box[1], object_box[3]))
    return Pointing(
        hit=_is_peak_inside(_spreading(rows) @ weights @ _spreading(columns).T, map_box, object_box),
        cell_hit=_is_peak_inside(weights, map_box, object_box),
        weight_inside=float(down @ weights @ across / (weights.sum() or 1)),
        area_inside=float(down.mean() * across.mean()),
    )


def _is_peak_inside(values: np.ndarray, map_box: Box, object_box: Box) -> bool:
    """Return whether the position of the largest value of a map, `(rows, columns)`, lies in the box of an object."""
    rows, columns = values.shape
    row, column = np.unravel_index(values.argmax(), values.shape)
    x = map_box[0] + (map_box[2] - map_box[0]) * (column + 0.5) / columns
    y = map_box[1] + (map_box[3] - map_box[1]) * (row + 0.5) / rows
    return bool(object_box[0] <= x <= object_box[2] and object_box[1] <= y <= object_box[3])


def _spreading(num_cells: int) -> np.ndarray:
    """Return the Gaussian of each cell at samples along an edge, `(SAMPLES_PER_CELL * num_cells, num_cells)`."""
    positions = (np.arange(SAMPLES_PER_CELL * num_cells) + 0.5) / SAMPLES_PER_CELL - 0.5
    return np.exp(-(((positions[:, None] - np.arange(num_cells)) / SPREAD) ** 2) / 2)


def _fractions_inside(num_cells: int, covered: tuple[float, float], span: tuple[float, float]) -> np.ndarray:
    """Return the fraction inside a span of each of the cells that a stretch of an edge is cut into, `(num_cells,)`."""
    edges = np.linspace(*covered, num_cells + 1)
    inside = np.minimum(edges[1:], span[1]) - np.maximum(edges[:-1], span[0])
    return (inside / (edges[1] - edges[0])).clip(0, 1)


class PointingGame:
    """Scores of the pointing game over many captions."""

    def __init__(self) -> None:
        # For each word that names one object: how the word's own map, the map before and the map after point at it.
        self._pointings: dict[str, list[tuple[Pointing | None, ...]]] = {name: [] for name in ATTRIBUTES}
        self._absent = dict.fromkeys(ATTRIBUTES, 0)
        self._skipped = dict.fromkeys(ATTRIBUTES, 0)

    def add(self, words: Sequence[str], maps: np.ndarray, map_box: Box, objects: Sequence[Object]) -> None:
        """Add a caption to the game.

        Args:
            words: Words of the caption.
            maps: Attention map of each word, `(T, rows, columns)`.
            map_box: Box `(left, top, right, bottom)` that the maps cover, in pixels of the image.
            objects: Objects of the image, each with `shape`, `colour`, `size` and `box`.
        """
        for mention in mentions(words, objects):
            if not mention.objects:
                self._absent[mention.attribute] += 1
            elif len(mention.objects) > 1:
                self._skipped[mention.attribute] += 1
            else:
                object_box = objects[mention.objects[0]]["box"]
                positions = (mention.position, mention.position - 1, mention.position + 1)
                self._pointings[mention.attribute].append(
                    tuple(point(maps[i], map_box, object_box) if 0 <= i < len(maps) else None for i in positions)
                )

    def scores(self) -> dict[str, dict[str, float]]:
        """Return the scores of words for shapes and of words for colours.

        - `accuracy`: fraction of words whose smoothed attention map peaks inside the box of the object that they
          name. A word that names no object of the image is a miss.
        - `cell_accuracy`: the same with the middle of the heaviest cell as the peak.
        - `chance`: expected accuracy of a peak at a random position.
        - `weight_inside`: mean fraction of the attention weight inside the box, for words that name an object.
        - `accuracy_map_before`, `accuracy_map_after`: `accuracy` with the map of the word before or after, where
          there is one.
        - `words`: number of words scored; `absent`: number of these that name no object of the image; `skipped`: number
          of words left out because each of several objects may be meant.
        """
        scores = {}
        for attribute in ATTRIBUTES:
            absent = self._absent[attribute]
            own, before, after = (
                [pointing for pointings in self._pointings[attribute] if (pointing := pointings[i]) is not None]
                for i in range(3)
            )
            scores[attribute] = {
                "accuracy": _mean([pointing.hit for pointing in own] + [False] * absent),
                "cell_accuracy": _mean([pointing.cell_hit for pointing in own] + [False] * absent),
                "chance": _mean([pointing.area_inside for pointing in own] + [0.0] * absent),
                "weight_inside": _mean([pointing.weight_inside for pointing in own]),
                "accuracy_map_before": _mean([pointing.hit for pointing in before]),
                "accuracy_map_after": _mean([pointing.hit for pointing in after]),
                "words": len(own) + absent,
                "absent": absent,
                "skipped": self._skipped[attribute],
            }
        return scores


def _mean(values: Sequence[float]) -> float:
    """Return the mean of values; not a number if there are none."""
    return sum(values) / len(values) if values else float("nan")
