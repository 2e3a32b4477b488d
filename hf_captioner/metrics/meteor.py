"""METEOR of COCO caption evaluation, which runs Java, for `evaluate.load("hf_captioner/metrics/meteor.py")`."""

from __future__ import annotations

# `evaluate.load` copies only modules that this file imports: hence a name that is imported but not used.
from .caption_metric import PER_IMAGE, CocoMetric
from .java import meteor
from .ngrams import NgramCounts as NgramCounts
from .scores import Tally
from .tokenization import Tokens


class Meteor(CocoMetric):
    """Corpus METEOR as image-captioning papers report it."""

    _description = (
        "METEOR 1.5 as in COCO caption evaluation: words of a prediction are aligned with those of each reference, "
        "by form, stem, synonym and paraphrase; the score combines precision, recall and word order of the best "
        "alignment. Runs the Java program of pycocoevalcap 1.2, which needs "
        'pip install "hf_captioner[metrics]", and Java.'
    )
    _citation = """\
@inproceedings{denkowski2014meteor,
    title = {{Meteor} Universal: Language Specific Translation Evaluation for Any Target Language},
    author = {Denkowski, Michael and Lavie, Alon},
    booktitle = {Proceedings of the Ninth Workshop on Statistical Machine Translation},
    year = {2014},
    pages = {376--380}
}
"""
    _outputs = (
        PER_IMAGE
        + """\
Returns:
    meteor (float): from 0 to 1.
Example:
    >>> meteor = evaluate.load("hf_captioner/metrics/meteor.py")
    >>> round(meteor.compute(predictions=["a dog runs"], references=[["a dog runs", "a dog"]])["meteor"], 6)
    1.0
"""
    )
    _urls = ("https://aclanthology.org/W14-3348", "https://github.com/salaniz/pycocoevalcap")

    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        return meteor(predictions, references)
