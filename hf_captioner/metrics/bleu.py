"""Official BLEU of `evaluate`, without a download, for `evaluate.load("hf_captioner/metrics/bleu.py")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .caption_metric import PER_IMAGE, CaptionMetric
from .ngrams import NgramCounts
from .scores import bleu, matches_of, shortest
from .tokenization import Tokens, tokenize_13a, tokenize_captions


class Bleu(CaptionMetric):
    """Corpus BLEU, with the same fields and values as `evaluate.load("bleu")`."""

    _description = (
        "BLEU: geometric mean of a corpus' clipped n-gram precisions, times a penalty for predictions "
        "shorter than their shortest references. Tokens as in mteval-v13a, case kept. Scores equal those "
        "of the official evaluate module; COCO caption evaluation computes BLEU differently (see coco_bleu)."
    )
    _citation = """\
@inproceedings{papineni2002bleu,
    title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
    author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
    booktitle = {Proceedings of ACL},
    year = {2002},
    pages = {311--318}
}
@inproceedings{lin2004orange,
    title = {{ORANGE}: a Method for Evaluating Automatic Evaluation Metrics for Machine Translation},
    author = {Lin, Chin-Yew and Och, Franz Josef},
    booktitle = {Proceedings of COLING},
    year = {2004},
    pages = {501--507}
}
"""
    _outputs = (
        """\
    tokenizer (callable): splits one caption into tokens. Default: mteval-v13a.
    max_order (int): longest n-gram, at least 1. Default: 4.
    smooth (bool): add one to the counts of 2-grams and longer (Lin and Och 2004). Default: False.
"""
        + PER_IMAGE
        + """\
Returns:
    bleu (float): from 0 to 1.
    precisions (list of float): one per order, 1-grams first.
    brevity_penalty (float): from 0 to 1.
    length_ratio (float): translation_length / reference_length.
    translation_length (int): tokens of the predictions.
    reference_length (int): tokens of the shortest reference of each image.
Example:
    >>> bleu = evaluate.load("hf_captioner/metrics/bleu.py")
    >>> bleu.compute(predictions=["a dog on the grass"], references=[["a dog on the grass", "a dog"]])["bleu"]
    1.0
"""
    )
    _urls = ("https://aclanthology.org/P02-1040", "https://huggingface.co/spaces/evaluate-metric/bleu")

    def _compute(
        self,
        *,
        predictions: list[str],
        references: list[list[str]],
        tokenizer: Callable[[str], Tokens] = tokenize_13a,
        max_order: int = 4,
        smooth: bool = False,
        per_image: bool = False,
    ) -> dict[str, Any]:
        rows = NgramCounts(*tokenize_captions(predictions, references, tokenizer), max_order).matches(shortest)
        result: dict[str, Any] = {**bleu(matches_of(rows.sum(0)), max_order, smooth)}
        if per_image:
            result["bleu_per_image"] = [bleu(matches_of(row), max_order, smooth)["bleu"] for row in rows]
        return result
