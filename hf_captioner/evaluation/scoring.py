"""Scores of captions, with their confidence intervals and the protocol that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..metrics import caption_metrics, caption_tallies
from ..metrics.resampling import LEVEL, NUM_RESAMPLES, Difference, compare, intervals
from ..metrics.scores import Tally, diversity
from ..metrics.tokenization import tokenize_ptb
from ..model.captions import spaced
from .predictions import Prediction
from .protocol import Protocol, describe_metrics, hash_of_ids, software_versions

# Beyond these fractions, captions reflect the language of the data set more than the images.
MIN_DISTINCT, MAX_ENDLESS = 0.1, 0.1

INTERVAL_METHOD = "percentile bootstrap over images; document frequencies stay those of all images"


@dataclass(frozen=True)
class Evaluation:
    """Scores of a system's captions, with everything needed to compare them.

    Args:
        predictions: Captions that were scored.
        tallies: Contributions of each image to the scores.
        scores: Scores of all images together, by name.
        intervals: 95 % confidence interval of each score that uses references.
        protocol: Data, decoding and software behind the scores.
    """

    predictions: list[Prediction]
    tallies: list[Tally]
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocol: Protocol

    def as_dict(self) -> dict[str, Any]:
        """Return scores, intervals and protocol as a record for JSON."""
        return {"scores": self.scores, "intervals": self.intervals, "protocol": self.protocol.as_dict()}

    @cached_property
    def image_scores(self) -> dict[str, list[float]]:
        """Scores of each image, by the name of the score."""
        columns = {name: column for tally in self.tallies for name, column in tally.of_images().items()}
        return {name.removesuffix("_per_image"): column for name, column in columns.items()}

    def table(self) -> list[str]:
        """Return lines for a terminal: scores with their intervals, then what they are comparable with."""
        lines = []
        for name, value in self.scores.items():
            interval = "  [{:.4f}, {:.4f}]".format(*self.intervals[name]) if name in self.intervals else ""
            lines.append(f"{name:<18} {format_score(value)}{interval}")
        return [*lines, *self.protocol.comparable_with()]


def score_captions(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return the scores of `caption_metrics`, with the fraction of captions that never reach `<end>`.

    In scripts without spaces between words, n-grams consist of characters (see `captions.spaced`).
    """
    return caption_metrics(*_spaced(predictions), ended=_ended(predictions))


def evaluate_predictions(
    predictions: Sequence[Prediction],
    *,
    system: str,
    dataset: str,
    split: str,
    split_images: int | None = None,
    decoding: dict[str, Any] | None = None,
    training: Sequence[str] | None = None,
    java: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Evaluation:
    """Score captions, and record the protocol of the scores.

    Args:
        predictions: Captions from `decode_captions` or `read_predictions`.
        system: Name of the system that wrote them.
        dataset: Name of the data set.
        split: Name of the split.
        split_images: Number of images in the whole split; by default that of the predictions.
        decoding: Settings of the decoding, if known (see `describe_decoding`).
        training: Captions that the system was trained on; with them, the fraction of novel captions is scored too.
        java: Score METEOR and SPICE too, where they can be run.
        num_resamples: Number of bootstrap samples for the intervals.
        seed: Seed of these samples.

    Raises:
        ValueError: There are no predictions, or `caption_metrics` refuses them.
    """
    predictions = list(predictions)
    captions, references = _spaced(predictions)
    tallies = caption_tallies(captions, references, java=java)
    known = None if training is None else (tokenize_ptb(spaced(caption)) for caption in training)
    scores = {name: value for tally in tallies for name, value in tally.of_corpus().items()}
    scores |= diversity([*map(tokenize_ptb, captions)], training=known, ended=_ended(predictions))
    counts = [len(row) for row in references]
    protocol = Protocol(
        system=system,
        decoding=decoding,
        dataset=dataset,
        split=split,
        num_images=len(predictions),
        split_images=split_images or len(predictions),
        ids_sha256=hash_of_ids([prediction.image_id for prediction in predictions]),
        references_per_image=(min(counts), max(counts)),
        metrics=describe_metrics([*scores]),
        interval={"level": LEVEL, "method": INTERVAL_METHOD, "resamples": num_resamples, "seed": seed},
        software=software_versions(),
    )
    bounds = intervals(tallies, num_resamples=num_resamples, seed=seed)
    return Evaluation(predictions, tallies, scores, bounds, protocol)


def compare_evaluations(
    first: Evaluation, second: Evaluation, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Return the second system's scores minus the first's, by name, with intervals from a paired bootstrap.

    Raises:
        ValueError: The systems captioned different images.
    """
    if first.protocol.ids_sha256 != second.protocol.ids_sha256:
        raise ValueError(
            f"{first.protocol.system!r} and {second.protocol.system!r} captioned different images; compare systems "
            "on the same split of the same data set."
        )
    return compare(first.tallies, second.tallies, num_resamples=num_resamples, seed=seed)


def comparison_table(first: Evaluation, second: Evaluation, differences: dict[str, Difference]) -> list[str]:
    """Return lines for a terminal that say, score by score, whether the second of two systems is better."""
    lines = []
    for name, (value, low, high, fraction) in differences.items():
        verdict = "better" if low > 0 else "worse" if high < 0 else "not significantly different"
        lines.append(
            f"{name:<18} {value:+.4f}  [{low:+.4f}, {high:+.4f}]  {second.protocol.system} is {verdict}: "
            f"ahead of {first.protocol.system} in {fraction:.1%} of resamples"
        )
    return lines


def collapse_warnings(scores: dict[str, float]) -> list[str]:
    """Return a line of advice for each score that shows a failure: few distinct captions, or many without `<end>`."""
    lines = []
    if scores["distinct_captions"] < MIN_DISTINCT:
        lines.append(
            f"Captions have collapsed: only {scores['distinct_captions']:.1%} of them are distinct. "
            "This is usual in early epochs; later, lower the learning rate or check that images reach the model."
        )
    if scores.get("endless_captions", 0) > MAX_ENDLESS:
        lines.append(
            f"{scores['endless_captions']:.1%} of the captions never reach <end>. "
            "Train longer, or raise max_length if the references are that long."
        )
    return lines


def format_score(score: float) -> str:
    """Format a score for people: counts as they are, other values with four decimals."""
    return str(score) if isinstance(score, int) else f"{score:.4f}"


def _spaced(predictions: Sequence[Prediction]) -> tuple[list[str], list[list[str]]]:
    """Return captions and references with spaces between the units that metrics count."""
    captions = [spaced(prediction.caption) for prediction in predictions]
    return captions, [[*map(spaced, prediction.references)] for prediction in predictions]


def _ended(predictions: Sequence[Prediction]) -> list[bool] | None:
    """Return whether each caption reached `<end>`, or None if that is unknown for any of them."""
    ended = [prediction.ended for prediction in predictions if prediction.ended is not None]
    return ended if len(ended) == len(predictions) else None
