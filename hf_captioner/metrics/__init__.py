"""Caption metrics: the registry `METRICS`, and `caption_metrics`, which computes all of them.

Each metric is also a file for `evaluate.load(PATH)`: `bleu.py`, `coco_bleu.py`, `cider.py`, `plain_cider.py`,
`rouge_l.py`, `diversity.py`, and two that run Java, `meteor.py` and `spice.py`. None needs the network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from ..model.registry import Registry
from . import scores  # the module, since its functions `cider` and `rouge_l` share names with modules of this package
from .java import JAVA_METRICS
from .ngrams import NgramCounts
from .tokenization import tokenize_13a, tokenize_captions, tokenize_ptb

__all__ = ["METRICS", "caption_metrics", "caption_tallies"]

logger = logging.getLogger(__name__)

# Each part is a class whose instances have `compute(predictions=list[str], references=list[list[str]])` and return
# dict[str, float]. "bleu" also keeps the list `precisions` of the official module, and `per_image=True` adds lists.
METRICS = Registry(
    "metrics",
    {
        "bleu": "hf_captioner.metrics.bleu:Bleu",
        "coco_bleu": "hf_captioner.metrics.coco_bleu:CocoBleu",
        "cider": "hf_captioner.metrics.cider:Cider",
        "plain_cider": "hf_captioner.metrics.plain_cider:PlainCider",
        "rouge_l": "hf_captioner.metrics.rouge_l:RougeL",
        "meteor": "hf_captioner.metrics.meteor:Meteor",
        "spice": "hf_captioner.metrics.spice:Spice",
        "diversity": "hf_captioner.metrics.diversity:Diversity",
    },
)


def caption_tallies(
    predictions: Sequence[str], references: Sequence[Sequence[str] | str], *, java: bool = False
) -> list[scores.Tally]:
    """Return each image's contributions to all scores that use references.

    Args:
        predictions: One caption per image; it may be empty.
        references: Reference captions of each image, one or more; their number may differ between images.
        java: Score METEOR and SPICE too. Where Java, pycocoevalcap or the models of SPICE are missing, a logged warning
            says so, and the score is left out.

    Raises:
        ValueError: The captions are malformed, see `caption_metrics`.
    """
    tokens = tokenize_captions(predictions, references, tokenize_ptb)
    counts = NgramCounts(*tokens)
    tallies = [scores.coco_bleu(counts), scores.cider(counts), scores.rouge_l(*tokens)]
    for name, score in JAVA_METRICS.items() if java else ():
        try:
            tallies.append(score(*tokens))
        except (ImportError, OSError) as e:
            logger.warning(f"{name.upper()} is left out. {e}")
    official = NgramCounts(*tokenize_captions(predictions, references, tokenize_13a))
    return [*tallies, scores.plain_cider(counts), scores.official_bleu(official)]


def caption_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str] | str],
    *,
    per_image: bool = False,
    java: bool = False,
    training: Iterable[str] | None = None,
    ended: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Score captions with every built-in metric, tokenizing them once per tokenizer.

    Args:
        predictions: One caption per image; it may be empty.
        references: Reference captions of each image, one or more; their number may differ between images.
        per_image: Return the scores of each image too, as lists `<name>_per_image`.
        java: Score METEOR and SPICE too, where they can be run, see `caption_tallies`.
        training: Captions that the model was trained on; with them, novel captions are counted.
        ended: Whether decoding reached `<end>`, for each prediction; with it, endless captions are counted.

    Returns:
        `bleu_1` … `bleu_4` (COCO protocol), `cider` (CIDEr-D, which papers call CIDEr, 0 to 10), `rouge_l`, `meteor`
        and `spice` on request, `plain_cider` (CIDEr without the D, 0 to 10), `evaluate_bleu_1` … `evaluate_bleu_4`
        (the official `evaluate` BLEU with `max_order` 1 … 4), and the values of `scores.diversity`. All but the CIDErs,
        `vocabulary` and `length` are in [0, 1].

    Raises:
        ValueError: There are no images, the lists differ in length, an image has no references, or a caption is not
            a string.
    """
    tallies = caption_tallies(predictions, references, java=java)
    known = None if training is None else map(tokenize_ptb, training)
    variety = scores.diversity([*map(tokenize_ptb, predictions)], training=known, ended=ended)
    results = [tally.result(per_image) for tally in tallies]
    return {name: value for result in [*results, variety] for name, value in result.items()}
