"""BLEU-1 to BLEU-4 of COCO caption evaluation, for `evaluate.load("hf_captioner/metrics/coco_bleu.py")`."""

from __future__ import annotations

from .caption_metric import PER_IMAGE, CocoMetric
from .ngrams import NgramCounts
from .scores import Tally, coco_bleu
from .tokenization import Tokens


class CocoBleu(CocoMetric):
    """Corpus BLEU-1 to BLEU-4 as image-captioning papers report them."""

    _description = (
        "BLEU-1 to BLEU-4 as in COCO caption evaluation (pycocoevalcap 1.2, without Java): Penn Treebank "
        "tokens in lower case without punctuation, and a penalty for predictions shorter than the references "
        "closest to them in length."
    )
    _citation = """\
@inproceedings{papineni2002bleu,
    title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
    author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
    booktitle = {Proceedings of ACL},
    year = {2002},
    pages = {311--318}
}
@article{chen2015coco,
    title = {{Microsoft COCO} Captions: Data Collection and Evaluation Server},
    author = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
              Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
    journal = {arXiv:1504.00325},
    year = {2015}
}
"""
    _outputs = (
        PER_IMAGE
        + """\
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4 (float): from 0 to 1.
Example:
    >>> coco_bleu = evaluate.load("hf_captioner/metrics/coco_bleu.py")
    >>> round(coco_bleu.compute(predictions=["A dog runs."], references=[["a dog runs"]])["bleu_1"], 6)
    1.0
"""
    )
    _urls = ("https://arxiv.org/abs/1504.00325", "https://github.com/salaniz/pycocoevalcap")

    def _tally(self, predictions: list[Tokens], references: list[list[Tokens]]) -> Tally:
        return coco_bleu(NgramCounts(predictions, references))
