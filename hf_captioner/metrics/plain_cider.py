"""Plain CIDEr: `evaluate.load("hf_captioner/metrics/plain_cider.py")`.

Unlike CIDEr-D, it neither clips counts of n-grams nor penalises differences in length.
"""

from __future__ import annotations

from .caption_metric import PER_IMAGE, CocoMetric
from .ngrams import NgramCounts
from .scores import Tally, plain_cider
from .tokenization import Tokens


class PlainCider(CocoMetric):
    """Corpus CIDEr as its paper first defines it, before CIDEr-D; document frequencies from the references scored."""

    _description = (
        "CIDEr without the clipping and the length penalty of CIDEr-D: the cosine between TF-IDF vectors of n-grams, "
        "1 to 4, of a prediction and each reference, on PTB tokens without stemming. COCO caption evaluation and most "
        "papers mean CIDEr-D when they say CIDEr (see cider), so that this one is not comparable with theirs. Document "
        "frequencies come from the references scored."
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
    plain_cider (float): from 0 to 10.
Example:
    >>> cider = evaluate.load("hf_captioner/metrics/plain_cider.py")
    >>> references = [["a dog runs on grass"], ["two men ride a horse"]]
    >>> cider.compute(predictions=["a dog runs on grass", "three cats"], references=references)["plain_cider"]
    5.0
"""
    )
    _urls = ("https://arxiv.org/abs/1411.5726", "https://github.com/vrama91/cider")

    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        return plain_cider(NgramCounts(predictions, references))
