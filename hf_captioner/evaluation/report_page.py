"""Web page about a system's captions: scores, histograms of words, and the best, worst and random images.

The page is one file without scripts and loads nothing. Its parts are `report.html` and `report.css`.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
from PIL.Image import Image

from ..metrics.tokenization import tokenize_ptb
from ..model.captions import spaced
from ..model.images import jpeg_uri
from .scoring import Evaluation, format_score

NUM_WORDS = 20  # bars in the histogram of words
RARE = 0.002  # fraction of references below which a length longer than all captions gets no bar


def report_page(
    evaluation: Evaluation, open_image: Callable[[int], Image], *, num_images: int = 8, seed: int = 0
) -> str:
    """Return the HTML page of an evaluation.

    Args:
        evaluation: Evaluation from `evaluate_predictions`.
        open_image: Function that opens the image at an index of the data set.
        num_images: Number of images in each of the three galleries: best, worst and random.
        seed: Seed for the choice of the random images.
    """
    cider = evaluation.image_scores["cider"]
    ranked = sorted(range(len(cider)), key=lambda index: (-cider[index], index))
    num_images = min(num_images, len(ranked))
    galleries = {
        "Best images by CIDEr": ranked[:num_images],
        "Worst images by CIDEr": ranked[::-1][:num_images],
        "Random images": random.Random(seed).sample(ranked, num_images),
    }
    images = {}
    for index in {index: None for indices in galleries.values() for index in indices}:
        image = open_image(index)
        images[index] = {"uri": jpeg_uri(image), "width": image.width, "height": image.height}

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"score": format_score, "percent": "{:.1%}".format}
    style = (folder / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        protocol=evaluation.protocol,
        galleries=galleries,
        images=images,
        style=style,
        # The page's content security policy allows only the style with this hash.
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        **_histograms(evaluation),
    )


def _histograms(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Return the histograms `lengths`, of the number of words per caption, and `words`, of the most frequent words."""
    captions = [tokenize_ptb(spaced(prediction.caption)) for prediction in evaluation.predictions]
    references = [tokenize_ptb(spaced(text)) for prediction in evaluation.predictions for text in prediction.references]
    lengths, reference_lengths = (Counter(map(len, rows)) for rows in (captions, references))
    words, reference_words = (Counter(word for row in rows for word in row) for rows in (captions, references))
    common = [length for length, count in reference_lengths.items() if count > RARE * len(references)]
    return {
        "lengths": _bars(range(max(*lengths, *common, 0) + 1), lengths, reference_lengths),
        "words": _bars([word for word, _ in words.most_common(NUM_WORDS)], words, reference_words),
    }


def _bars(labels: Iterable[object], captions: Counter, references: Counter) -> list[dict[str, Any]]:
    """Return each label with its fraction of all counts in captions and in references.

    The scale of the bars, `largest`, is the largest fraction of all labels.
    """
    totals = max(1, captions.total()), max(1, references.total())
    bars: list[dict[str, Any]] = [
        {"label": label, "captions": captions[label] / totals[0], "references": references[label] / totals[1]}
        for label in labels
    ]
    largest = max((max(bar["captions"], bar["references"]) for bar in bars), default=0) or 1
    return [bar | {"largest": largest} for bar in bars]
