"""Time caption scores against pycocoevalcap, tokenization included.

    python benchmarks/metrics.py --data ../shared/flickr8k --out benchmarks/results/metrics.json

BLEU, ROUGE-L and CIDEr-D of 40,000 images with five references each, on one core, in one run. References are captions
of Flickr8k in which one word in ten is replaced by a random word, so that none occurs twice; predictions likewise.
Needs Java and pycocoevalcap.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Otherwise Java would use all cores.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from timing import write_result

from hf_captioner import load_captions
from hf_captioner.metrics.ngrams import NgramCounts
from hf_captioner.metrics.scores import cider, coco_bleu, rouge_l
from hf_captioner.metrics.tokenization import tokenize_captions, tokenize_ptb

NAMES = [*(f"bleu_{order}" for order in range(1, 5)), "rouge_l", "cider"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/flickr8k", help="captions to vary (default: %(default)s)")
    parser.add_argument("--num_images", "--num-images", type=int, default=40_000)
    parser.add_argument("--out", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    predictions, references = corpus(arguments.data, arguments.num_images)
    ours, seconds = timed(lambda: score(predictions, references))
    theirs, reference_seconds = timed(lambda: score_by_pycocoevalcap(predictions, references))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "images": len(predictions),
        "references_per_image": 5,
        "seconds": seconds,
        "pycocoevalcap_seconds": reference_seconds,
        "times_as_fast": {name: round(reference_seconds[name] / seconds[name], 2) for name in seconds},
        "largest_difference": max(abs(ours[name] - theirs[name]) for name in NAMES),
        "scores": ours,
    }
    write_result(arguments.out, result)


def corpus(path: str, num_images: int) -> tuple[list[str], list[list[str]]]:
    """Return predictions and references made from the captions of a data set."""
    rows = [row for split in load_captions(path).values() for row in split["captions"][:]]
    words = [word for row in rows for caption in row for word in caption.split() if word.isalpha()]
    generator = random.Random(0)

    def vary(caption: str) -> str:
        return " ".join(w if generator.random() < 0.9 else generator.choice(words) for w in caption.split())

    chosen = [rows[index % len(rows)] for index in range(num_images)]
    return [vary(generator.choice(row)) for row in chosen], [[vary(caption) for caption in row] for row in chosen]


def timed(job: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run a job once; return its result, and the wall-clock and CPU seconds it took, Java's included."""
    started, times = time.perf_counter(), os.times()
    result = job()
    worked = sum(os.times()[:4]) - sum(times[:4])
    return result, {"waited": round(time.perf_counter() - started, 2), "worked": round(worked, 2)}


def score(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    tokens = tokenize_captions(predictions, references, tokenize_ptb)
    counts = NgramCounts(*tokens)
    return coco_bleu(counts).of_corpus() | rouge_l(*tokens).of_corpus() | cider(counts).of_corpus()


def score_by_pycocoevalcap(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    records = {i: [{"caption": caption} for caption in row] for i, row in enumerate(references)}
    reference_tokens = PTBTokenizer().tokenize(records)
    tokens = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(predictions)})
    bleu, _ = Bleu(4).compute_score(reference_tokens, tokens, verbose=0)
    others = [scorer.compute_score(reference_tokens, tokens)[0] for scorer in (Rouge(), Cider())]
    return dict(zip(NAMES, map(float, [*bleu, *others]), strict=True))


if __name__ == "__main__":
    main()
