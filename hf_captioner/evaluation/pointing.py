"""The pointing game on drawn shapes: does the model look at an object when it names it?

After Zhang et al. 2016 ("Top-down Neural Attention by Excitation Backprop", sec. 4.1), with tolerance 0: a word is a
hit if the peak of its attention map lies in the box of the object that it names. A cell sees more than its part of
the grid, so a map is the sum of its weights each spread by a Gaussian around the middle of its cell, as Xu et al. 2015
draw theirs (sec. 5.4): its peak lies between two cells that share the weight. That makes for more hits, so the stricter
game, in which the peak is the middle of the heaviest cell, is reported beside it.
"""

# T: words

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.shapes import COLOURS, RULES, SHAPES
from ..visualization.maps import Box

Object = Mapping[str, Any]

# What a word says of an object: the attribute and its value, as in the column `objects`.
MEANINGS: dict[str, tuple[str, str]] = {
    **{shape: ("shape", shape) for shape in SHAPES},
    **{colour: ("colour", colour) for colour in COLOURS},
    **{word: ("size", size.lower()) for size in ("SMALL", "LARGE") for word in RULES[size]},
}
KINDS = ("shape", "colour")  # of words in the game; sizes alone hardly ever tell two objects apart

WIDTH = 0.6  # standard deviation, in cells, of the Gaussian around a cell: no ripples between even weights
FINE = 15  # places along a cell at which the peak is looked for; odd, so that one is in the middle


@dataclass(frozen=True)
class Mention:
    """A word that says what an object is.

    Args:
        place: of the word in the caption.
        kind: the attribute it tells.
        objects: indices of those that it may mean; none if there is no such object.
    """

    place: int
    kind: str
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Pointing:
    """How a map points at an object.

    Args:
        hit: whether its peak lies in the object's box.
        cell_hit: whether the middle of its heaviest cell does.
        share: the part of its weight inside the box, the weight of a cell being spread evenly over it.
        chance: the part of the map's area inside the box: what to expect of a peak anywhere, and of the share of a
            map without differences.
    """

    hit: bool
    cell_hit: bool
    share: float
    chance: float


def mentions(words: Sequence[str], objects: Sequence[Object]) -> Iterator[Mention]:
    """The words of a caption that name the shape or colour of an object.

    A word means every object of its shape or colour. Where there are several, the other words of its phrase, such as
    "small red star", rule out those that they don't fit, unless they rule out all.
    """
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and words[end] in MEANINGS:
            end += 1
        phrase = range(start, end)
        for place in phrase:
            kind, value = MEANINGS[words[place]]
            meant = [index for index, item in enumerate(objects) if item[kind] == value]
            for other in phrase:
                other_kind, other_value = MEANINGS[words[other]]
                meant = [index for index in meant if objects[index][other_kind] == other_value] or meant
            if kind in KINDS:
                yield Mention(place, kind, tuple(meant))
        start = max(end, start + 1)


def point(weights: np.ndarray, seen: Box, box: Box) -> Pointing:
    """Hold a map against a box.

    Args:
        weights: `(rows, columns)`.
        seen: `(left, top, right, bottom)` of what the map covers, in pixels of the image.
        box: of the object, likewise.
    """
    rows, columns = weights.shape
    across = _covered(columns, (seen[0], seen[2]), (box[0], box[2]))
    down = _covered(rows, (seen[1], seen[3]), (box[1], box[3]))
    return Pointing(
        hit=_peaks_inside(_spread(rows) @ weights @ _spread(columns).T, seen, box),
        cell_hit=_peaks_inside(weights, seen, box),
        share=float(down @ weights @ across / (weights.sum() or 1)),
        chance=float(down.mean() * across.mean()),
    )


def _peaks_inside(values: np.ndarray, seen: Box, box: Box) -> bool:
    """Whether the greatest of values `(rows, columns)`, evenly over what is seen, lies in a box."""
    rows, columns = values.shape
    row, column = np.unravel_index(values.argmax(), values.shape)
    x = seen[0] + (seen[2] - seen[0]) * (column + 0.5) / columns
    y = seen[1] + (seen[3] - seen[1]) * (row + 0.5) / rows
    return bool(box[0] <= x <= box[2] and box[1] <= y <= box[3])


def _spread(count: int) -> np.ndarray:
    """What each of `count` cells along an edge gives to each place: `(FINE·count, count)`."""
    places = (np.arange(FINE * count) + 0.5) / FINE - 0.5
    return np.exp(-(((places[:, None] - np.arange(count)) / WIDTH) ** 2) / 2)


def _covered(count: int, seen: tuple[float, float], span: tuple[float, float]) -> np.ndarray:
    """Which part of each of `count` cells along an edge lies in a span: `(count,)`."""
    edges = np.linspace(*seen, count + 1)
    inside = np.minimum(edges[1:], span[1]) - np.maximum(edges[:-1], span[0])
    return (inside / (edges[1] - edges[0])).clip(0, 1)


class PointingGame:
    """Collects captions and says how often they point at what they name."""

    def __init__(self) -> None:
        # Of each word that names one object: how its own map, the map before and the map after point at it.
        self._named: dict[str, list[tuple[Pointing | None, ...]]] = {kind: [] for kind in KINDS}
        self._absent = dict.fromkeys(KINDS, 0)
        self._skipped = dict.fromkeys(KINDS, 0)

    def add(self, words: Sequence[str], maps: np.ndarray, seen: Box, objects: Sequence[Object]) -> None:
        """Play a caption.

        Args:
            words: of the caption.
            maps: `(T, rows, columns)`, a map for each word.
            seen: `(left, top, right, bottom)` of what the maps cover, in pixels of the image.
            objects: of the image, each with `shape`, `colour`, `size` and `box`.
        """
        for mention in mentions(words, objects):
            if not mention.objects:
                self._absent[mention.kind] += 1
            elif len(mention.objects) > 1:
                self._skipped[mention.kind] += 1
            else:
                box = objects[mention.objects[0]]["box"]
                places = (mention.place, mention.place - 1, mention.place + 1)
                pointings = (point(maps[place], seen, box) if 0 <= place < len(maps) else None for place in places)
                self._named[mention.kind].append(tuple(pointings))

    def scores(self) -> dict[str, dict[str, float]]:
        """What came out, for words that name shapes and for words that name colours.

        - `accuracy`: share of hits. A word that names no object of the image is a miss.
        - `cell_accuracy`: share of hits of the middle of the heaviest cell.
        - `chance`: the accuracy to expect of a peak that is anywhere on the map.
        - `weight_inside`: mean share of the weight inside the box, of words that name an object of the image.
        - `accuracy_map_before`, `accuracy_map_after`: share of hits of these words by the map of the word before or
          after them, where there is one: what maps score that are a step out of place.
        - `words`, `absent`, `skipped`: words in the game, those of them that name no object of the image, and words
          left out because either of two objects may be meant.
        """
        scores = {}
        for kind in KINDS:
            absent = self._absent[kind]
            own, before, after = (
                [pointing for pointing in column if pointing is not None]
                for column in (zip(*self._named[kind], strict=True) if self._named[kind] else ((), (), ()))
            )
            scores[kind] = {
                "accuracy": _mean([pointing.hit for pointing in own] + [False] * absent),
                "cell_accuracy": _mean([pointing.cell_hit for pointing in own] + [False] * absent),
                "chance": _mean([pointing.chance for pointing in own] + [0.0] * absent),
                "weight_inside": _mean([pointing.share for pointing in own]),
                "accuracy_map_before": _mean([pointing.hit for pointing in before]),
                "accuracy_map_after": _mean([pointing.hit for pointing in after]),
                "words": len(own) + absent,
                "absent": absent,
                "skipped": self._skipped[kind],
            }
        return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
