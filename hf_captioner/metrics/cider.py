"""CIDEr of COCO caption evaluation, for `evaluate.load("hf_captioner/metrics/cider.py")`."""

from __future__ import annotations

from .caption_metric import PER_IMAGE, CocoMetric
from .ngrams import NgramCounts
from .scores import Tally, cider
from .tokenization import Tokens


class Cider(CocoMetric):
    """Corpus CIDEr as papers report it: CIDEr-D, with document frequencies from the references scored."""

    _description = (
        "CIDEr as in COCO caption evaluation (pycocoevalcap 1.2, without Java): the cosine between TF-IDF "
        "vectors of n-grams, 1 to 4, of a prediction and each reference. This is the CIDEr-D of the paper, "
        "with clipped counts and a penalty on differing lengths, but without stemming; for CIDEr without "
        "these two see plain_cider. Document frequencies come from the references scored, so that scores on "
        "different sets of images are not comparable, and a single image scores 0."
    )
    _citation = """\
@inproceedings{vedantam2015cider,
    title = {{CIDEr}: Consensus-based Image Description Evaluation},
    author = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
    booktitle = {Proceedings of CVPR},
    year = {2015},
    pages = {4566--4575}
}
"""
    _outputs = (
        PER_IMAGE
        + """\
Returns:
    cider (float): from 0 to 10, as pycocoevalcap prints it (papers often give it times 100).
Example:
    >>> cider = evaluate.load("hf_captioner/metrics/cider.py")
    >>> references = [["a dog runs on grass"], ["two men ride a horse"]]
    >>> cider.compute(predictions=["a dog runs on grass", "three cats"], references=references)["cider"]
    5.0
"""
    )
    _urls = ("https://arxiv.org/abs/1411.5726", "https://github.com/salaniz/pycocoevalcap")

    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        return cider(NgramCounts(predictions, references))
