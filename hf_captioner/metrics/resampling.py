"""How sure scores are: bootstrap over images (Efron 1979; paired, Koehn 2004)."""

# N: images, R: resamples, S: scores

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .scores import Tally

NUM_RESAMPLES, LEVEL = 1000, 0.95


class Difference(NamedTuple):
    """By how much a second system is better than a first.

    Args:
        value: second score minus first.
        low: lower end of the interval of that difference.
        high: its upper end.
        share_better: share of resamples in which the second is better, ties counting half.
    """

    value: float
    low: float
    high: float
    share_better: float


def resampled(tallies: Sequence[Tally], *, num_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Scores, `(R,)` each, of as many images drawn with replacement. Equal seeds draw equal images.

    Document frequencies stay those of all images. That CIDEr is a mean over images makes this quick: a resample is one
    product of a vector and the table of rows.
    """
    table = np.concatenate([tally.rows for tally in tallies], axis=1)
    sums = np.stack([drawn @ table for drawn in _draws(len(table), num_resamples, seed)])
    parts = np.split(sums, np.cumsum([tally.rows.shape[1] for tally in tallies])[:-1], axis=1)
    return {
        name: column
        for tally, part in zip(tallies, parts, strict=True)
        for name, column in zip(tally.names, tally.score(part).T, strict=True)
    }


def _draws(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)


def intervals(
    tallies: Sequence[Tally], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The percentile interval of each score, at `LEVEL`.

    Raises:
        ValueError: `num_resamples` is below 1.
    """
    _check(num_resamples)
    return {
        name: _interval(values) for name, values in resampled(tallies, num_resamples=num_resamples, seed=seed).items()
    }


def compare(
    first: Sequence[Tally], second: Sequence[Tally], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """How much better the second system is, by every score that both have, on the same images drawn for both.

    Raises:
        ValueError: the two were scored on different numbers of images; `num_resamples` is below 1.
    """
    _check(num_resamples)
    images = [len(tallies[0].rows) for tallies in (first, second)]
    if images[0] != images[1]:
        raise ValueError(f"The systems captioned {images[0]} and {images[1]} images; a comparison needs the same ones.")
    before, after = (resampled(tallies, num_resamples=num_resamples, seed=seed) for tallies in (first, second))
    totals = [{k: v for tally in tallies for k, v in tally.of_corpus().items()} for tallies in (first, second)]
    differences = {}
    for name in before.keys() & after.keys():
        change = after[name] - before[name]
        share = float((change > 0).mean() + (change == 0).mean() / 2)
        differences[name] = Difference(totals[1][name] - totals[0][name], *_interval(change), share)
    return {name: differences[name] for name in before if name in differences}


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def _check(num_resamples: int) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1, and 1000 is usual.")
