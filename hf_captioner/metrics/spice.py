"""SPICE, which runs Java, for `evaluate.load("hf_captioner/metrics/spice.py")`."""

from __future__ import annotations

# `evaluate.load` copies only modules that this file imports: hence a name that is imported but not used.
from .caption_metric import PER_IMAGE, CocoMetric
from .java import spice
from .ngrams import NgramCounts as NgramCounts
from .scores import Tally
from .tokenization import Tokens


class Spice(CocoMetric):
    """Mean SPICE of a corpus as image-captioning papers report it."""

    _description = (
        "SPICE as in COCO caption evaluation: captions are parsed into objects, attributes and relations, and the "
        "score is the F-measure between those of a prediction and those of its references, averaged over images. Runs "
        'the Java program of pycocoevalcap 1.2, which needs pip install "hf_captioner[metrics]", Java 8, and '
        "python -m pycocoevalcap.spice.get_stanford_models for its parser."
    )
    _citation = """\
@inproceedings{anderson2016spice,
    title = {{SPICE}: Semantic Propositional Image Caption Evaluation},
    author = {Anderson, Peter and Fernando, Basura and Johnson, Mark and Gould, Stephen},
    booktitle = {Proceedings of ECCV},
    year = {2016},
    pages = {382--398}
}
"""
    _outputs = (
        PER_IMAGE
        + """\
Returns:
    spice (float): from 0 to 1.
Example:
    >>> spice = evaluate.load("hf_captioner/metrics/spice.py")
    >>> spice.compute(predictions=["a dog runs"], references=[["a dog runs", "a dog"]])["spice"]
    1.0
"""
    )
    _urls = ("https://arxiv.org/abs/1607.08822", "https://github.com/salaniz/pycocoevalcap")

    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        return spice(predictions, references)
