"""Contract test for authors of metrics: `check_metric` checks the scores of a few made-up captions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any

from .rules import require

PREDICTIONS = ["a dog runs on the beach", "two children", "", "a man in a red red shirt"]
REFERENCES = [
    ["a dog is running on the beach", "the dog runs"],
    ["two small children play with a ball in the snow"],
    ["a bird on a branch", "a small bird", "bird"],
    ["a man wears a red shirt", "the man in red"],
]


def check_metric(part: Callable[[], Any], **kwargs: Any) -> None:
    """Check that a metric keeps the contract in `metrics/__init__.py`.

    `part` is the class that `METRICS` would hold, and `kwargs` are further arguments of its `compute`.

    Raises:
        AssertionError: The part breaks the rule that the message names.
    """

    def compute(metric: Any, order: Sequence[int] = range(len(PREDICTIONS))) -> dict[str, Any]:
        """Compute the metric for some of the images, in the given order."""
        captions = [PREDICTIONS[i] for i in order], [list(REFERENCES[i]) for i in order]
        before = deepcopy(captions)
        scores: dict[str, Any] = metric.compute(predictions=captions[0], references=captions[1], **kwargs)
        require(captions == before, "compute leaves the captions it is given as they are")
        return scores

    metric = part()
    scores = compute(metric)
    require(isinstance(scores, dict) and bool(scores), "compute returns a dict of scores", scores)
    require(all(isinstance(name, str) for name in scores), "names of scores are strings")
    for name, score in scores.items():
        is_finite = all(isinstance(number, Real) and math.isfinite(number) for number in _numbers(score))
        require(is_finite, f"{name} is a finite float", score)
    require(_are_equal(compute(metric), scores), "a second compute does not remember the first")
    require(_are_equal(compute(part()), scores), "another instance gives the same scores")
    require(_are_equal(compute(part(), (2, 0, 3, 1)), scores), "scores do not depend on the order of the images")
    require(compute(part(), [0]).keys() == scores.keys(), "a single image has the same scores")


def _numbers(score: Any) -> list[Any]:
    """Return the numbers of a score, which may be a list."""
    return score if isinstance(score, list) else [score]


def _are_equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two dicts of scores are equal but for rounding."""
    return first.keys() == second.keys() and all(
        math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-12)
        for name in first
        for mine, theirs in zip(_numbers(first[name]), _numbers(second[name]), strict=True)
    )
