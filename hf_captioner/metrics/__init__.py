"""Caption metrics without Java or network: the registry `METRICS`, and `caption_metrics` for all at once.

Every metric is also a file for `evaluate.load(PATH)`: `bleu.py`, `coco_bleu.py`, `cider.py`, `rouge_l.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..registry import Registry
from . import scores  # not its functions: they are called as the modules of this package are
from .tokenization import tokenize_13a, tokenize_captions, tokenize_ptb

__all__ = ["METRICS", "caption_metrics"]

# Each is a class whose instances have `compute(predictions=list[str], references=list[list[str]])` and return
# dict[str, float]. The one exception is "bleu", which keeps the list `precisions` of the official module.
METRICS = Registry(
    "metrics",
    {
        "bleu": "hf_captioner.metrics.bleu:Bleu",
        "coco_bleu": "hf_captioner.metrics.coco_bleu:CocoBleu",
        "cider": "hf_captioner.metrics.cider:Cider",
        "rouge_l": "hf_captioner.metrics.rouge_l:RougeL",
    },
)


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str] | str]) -> dict[str, float]:
    """Score captions by every built-in metric, tokenizing them once for each protocol.

    Args:
        predictions: one caption an image; it may be empty.
        references: the captions of each image, one or more; their number may differ between images.

    Returns:
        `bleu_1` … `bleu_4` (COCO protocol), `cider` (CIDEr-D, 0 to 10), `rouge_l`, and `evaluate_bleu_1` …
        `evaluate_bleu_4`: the official `evaluate` BLEU with `max_order` 1 … 4. All but `cider` are in [0, 1].

    Raises:
        ValueError: no images, lists of different lengths, an image without references, a caption that is not
            a string.
    """
    coco = tokenize_captions(predictions, references, tokenize_ptb)
    official = scores.match_ngrams(
        *tokenize_captions(predictions, references, tokenize_13a), scores.shortest, max_order=4
    )
    return {
        **scores.coco_bleu(*coco),
        **scores.cider(*coco),
        **scores.rouge_l(*coco),
        **{f"evaluate_bleu_{order}": scores.bleu(official, order)["bleu"] for order in range(1, 5)},
    }
