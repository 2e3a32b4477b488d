"""BLEU-1 to BLEU-4 as COCO caption evaluation computes them, as an `evaluate` module."""

from __future__ import annotations

import datasets
import evaluate

from .scores import coco_bleu
from .tokenization import tokenize_captions, tokenize_ptb


class CocoBleu(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="d", citation="c", inputs_description="i",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}))

    def _compute(self, predictions, references):
        return coco_bleu(*tokenize_captions(predictions, references, tokenize_ptb))
