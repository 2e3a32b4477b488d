"""Confidence intervals of scores by a bootstrap over images (Efron 1979; paired, Koehn 2004)."""

# R: resamples

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .scores import Tally

NUM_RESAMPLES, LEVEL = 1000, 0.95


class Difference(NamedTuple):
    """Difference between the scores of two systems: second minus first, with its confidence interval."""

    value: float
    low: float
    high: float
    fraction_better: float  # of resamples in which the second system is better; ties count half


def resampled(tallies: Sequence[Tally], *, num_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Return the scores, by name, of R bootstrap resamples: samples of images drawn with replacement, `(R,)` each.

    Document frequencies of CIDEr stay those of all images, so that CIDEr is a mean over images like other scores, and
    a resample is the product of a vector (how often each image is drawn) and the table of contributions. Equal seeds
    draw equal images, which pairs the samples of two systems.
    """
    table = np.concatenate([tally.rows for tally in tallies], axis=1)
    sums = np.stack([times_drawn @ table for times_drawn in _samples(len(table), num_resamples, seed)])
    parts = np.split(sums, np.cumsum([tally.rows.shape[1] for tally in tallies])[:-1], axis=1)
    return {
        name: column
        for tally, part in zip(tallies, parts, strict=True)
        for name, column in zip(tally.names, tally.score(part).T, strict=True)
    }


def _samples(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield, for each sample, how often each image is in it."""
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)


def intervals(
    tallies: Sequence[Tally], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the percentile interval of each score, at the confidence level `LEVEL`.

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
    """Return the difference between two systems in each score that both have, with a bootstrap confidence interval.

    A `Tally` holds what each image contributes to one or more scores, so the scores of a resample (images drawn with
    replacement) are computed from sums of its rows. Both systems are scored on the same resamples (paired bootstrap,
    Koehn 2004).

    Raises:
        ValueError: The systems were scored on different numbers of images, or `num_resamples` is below 1.
    """
    _check(num_resamples)
    num_images = [len(tallies[0].rows) for tallies in (first, second)]
    if num_images[0] != num_images[1]:
        raise ValueError(f"The systems captioned {num_images[0]} and {num_images[1]} images; compare the same images.")
    before, after = (resampled(tallies, num_resamples=num_resamples, seed=seed) for tallies in (first, second))
    totals = [{k: v for tally in tallies for k, v in tally.of_corpus().items()} for tallies in (first, second)]
    differences = {}
    for name in before.keys() & after.keys():
        change = after[name] - before[name]
        fraction_better = float((change > 0).mean() + (change == 0).mean() / 2)
        differences[name] = Difference(totals[1][name] - totals[0][name], *_interval(change), fraction_better)
    return {name: differences[name] for name in before if name in differences}


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Return the lower and upper percentile between which a fraction `LEVEL` of the values lies."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


def _check(num_resamples: int) -> None:
    """Raise a ValueError if the number of resamples is below 1."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1, and 1000 is usual.")
