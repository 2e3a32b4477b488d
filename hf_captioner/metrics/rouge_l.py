"""ROUGE-L of COCO caption evaluation, for `evaluate.load("hf_captioner/metrics/rouge_l.py")`."""

from __future__ import annotations

# `evaluate.load` copies only modules that this file imports: hence a name that is imported but not used.
from .caption_metric import PER_IMAGE, CocoMetric
from .ngrams import NgramCounts as NgramCounts
from .scores import Tally, rouge_l
from .tokenization import Tokens


class RougeL(CocoMetric):
    """Mean ROUGE-L of a corpus as image-captioning papers report it."""

    _description = (
        "ROUGE-L as in COCO caption evaluation (pycocoevalcap 1.2, without Java): the F-measure of the longest "
        "common subsequence with the references, with recall weighted 1.2 times as much as precision, averaged "
        "over images. Precision and recall are each the maximum over an image's references."
    )
    _citation = """\
@inproceedings{lin2004rouge,
    title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
    author = {Lin, Chin-Yew},
    booktitle = {Text Summarization Branches Out},
    year = {2004},
    pages = {74--81}
}
"""
    _outputs = (
        PER_IMAGE
        + """\
Returns:
    rouge_l (float): from 0 to 1.
Example:
    >>> rouge_l = evaluate.load("hf_captioner/metrics/rouge_l.py")
    >>> rouge_l.compute(predictions=["a dog runs"], references=[["a dog runs", "a dog"]])["rouge_l"]
    1.0
"""
    )
    _urls = ("https://aclanthology.org/W04-1013", "https://github.com/salaniz/pycocoevalcap")

    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        return rouge_l(predictions, references)
