"""Metric of a captioner's style: how long, how repetitive and how varied its captions are, right or wrong."""

from collections.abc import Sequence
from itertools import pairwise


class Habits:
    """Length, repetition and variety of captions."""

    def compute(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Score the length, repetition and variety of captions.

        Returns:
            `words`, the mean number of words; `length_ratio`, its ratio to that of the references; `repeated`, the
            fraction of pairs of adjacent words that occur earlier in the same caption; `distinct`, the fraction of
            different captions.
        """
        if not predictions or len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} images: give one for each.")
        captions = [caption.split() for caption in predictions]
        reference_captions = [caption.split() for captions in references for caption in captions]
        pairs = [list(pairwise(caption)) for caption in captions]
        num_pairs = sum(map(len, pairs))
        return {
            "words": mean_length(captions),
            "length_ratio": mean_length(captions) / mean_length(reference_captions),
            "repeated": 1 - sum(len(set(row)) for row in pairs) / num_pairs if num_pairs else 0.0,
            "distinct": len(set(predictions)) / len(predictions),
        }


def mean_length(captions: Sequence[Sequence[str]]) -> float:
    """Return the mean number of words of a caption."""
    return sum(map(len, captions)) / len(captions)
