"""Diversity of captions, without references, for `evaluate.load("hf_captioner/metrics/diversity.py")`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

# `evaluate.load` copies only modules that this file imports: hence a name that is imported but not used.
from .caption_metric import CaptionMetric
from .ngrams import NgramCounts as NgramCounts
from .scores import diversity
from .tokenization import check_captions, tokenize_ptb


class Diversity(CaptionMetric):
    """Fractions of distinct captions and words, size of the vocabulary, and length of captions."""

    _description = (
        "Statistics of a set of captions that need no references: the fraction of distinct captions, the variety of "
        "words (distinct-1, distinct-2, size of the vocabulary), the mean length, and, on request, the fractions of "
        "captions that are not among the training captions and of captions that never end. PTB tokens. All depend on "
        "the number of captions: compare sets of equal size only."
    )
    _citation = """\
@inproceedings{li2016diversity,
    title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
    author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
    booktitle = {Proceedings of NAACL},
    year = {2016},
    pages = {110--119}
}
"""
    _outputs = """
Args:
    predictions (list of str): one caption per image; it may be empty.
    training (list of str): the captions that the model was trained on. Default: None.
    ended (list of bool): whether decoding reached <end>, for each prediction. Default: None.
Returns:
    distinct_captions (float): different captions, as a fraction of all captions.
    distinct_1, distinct_2 (float): different words, and different pairs of words, as a fraction of all.
    vocabulary (int): number of different words.
    length (float): mean number of words.
    novel_captions (float): fraction of captions not among the training captions, if these are given.
    endless_captions (float): fraction of captions without <end>, if `ended` is given.
Example:
    >>> diversity = evaluate.load("hf_captioner/metrics/diversity.py")
    >>> diversity.compute(predictions=["a dog runs", "A dog runs."])["distinct_captions"]
    0.5
"""
    _urls = ("https://arxiv.org/abs/1510.03055",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation=self._citation,
            inputs_description=self._outputs,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=list(self._urls),
        )

    def add_batch(self, *, predictions: Sequence[str] | None = None, references: Sequence[Any] | None = None) -> None:
        """Add captions; references are not needed and are ignored."""
        checked, _ = check_captions(predictions, None if predictions is None else [[""]] * len(predictions))
        evaluate.Metric.add_batch(self, predictions=checked)

    def _compute(
        self,
        *,
        predictions: list[str],
        references: Any = None,
        training: Sequence[str] | None = None,
        ended: Sequence[bool] | None = None,
    ) -> dict[str, Any]:
        known = None if training is None else map(tokenize_ptb, training)
        return diversity([*map(tokenize_ptb, predictions)], training=known, ended=ended)
