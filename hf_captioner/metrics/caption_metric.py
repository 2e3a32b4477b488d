"""Base classes of this package's `evaluate` modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from .scores import Tally
from .tokenization import Tokens, check_captions, tokenize_captions, tokenize_ptb

_INPUTS = """
Args:
    predictions (list of str): one caption per image; it may be empty.
    references (list of lists of str): reference captions of each image, one or more; their number may differ
        between images, and a plain string counts as one reference.
"""
PER_IMAGE = """\
    per_image (bool): return the scores of each image too, as lists `<name>_per_image`. Default: False.
"""


class CaptionMetric(evaluate.Metric, ABC):  # abstract, or `evaluate.load` would take it for the metric
    """Metric of predicted captions against reference captions, which checks captions as they are added."""

    _description: ClassVar[str]
    _citation: ClassVar[str]
    _outputs: ClassVar[str]
    _urls: ClassVar[tuple[str, ...]]

    def _info(self) -> evaluate.MetricInfo:
        """Return what `evaluate` shows about the metric."""
        caption = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self._description,
            citation=self._citation,
            inputs_description=_INPUTS + self._outputs,
            features=datasets.Features({"predictions": caption, "references": datasets.Sequence(caption)}),
            reference_urls=list(self._urls),
        )

    def add_batch(self, *, predictions: Sequence[str] | None = None, references: Sequence[Any] | None = None) -> None:
        """Add the captions of some images; `compute()` scores all captions added so far."""
        checked, listed = check_captions(predictions, references)
        super().add_batch(predictions=checked, references=listed)

    def add(self, *, prediction: str, reference: Sequence[str] | str) -> None:
        """Add the captions of one image."""
        self.add_batch(predictions=[prediction], references=[reference])

    @abstractmethod
    def _compute(self, *, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        """Score all captions that were added."""


class CocoMetric(CaptionMetric):
    """Metric of COCO caption evaluation: computed on PTB tokens, from contributions of each image."""

    @abstractmethod
    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        """Return the contributions of each image to the score."""

    def _compute(
        self, *, predictions: list[str], references: list[list[str]], per_image: bool = False
    ) -> dict[str, Any]:
        return self._tally(*tokenize_captions(predictions, references, tokenize_ptb)).result(per_image)
