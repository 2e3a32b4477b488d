"""A web page of captioned images that shows, for the word under the pointer, where the model looked.

The page is one file that loads nothing from the network: it holds the images as JPEG and each attention map as one byte
per cell, which the browser resizes and colours (page.js). Its content security policy allows its own style sheet and
script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from ..model.images import ImageSource, OpenedImage, jpeg_uri, open_to_draw
from .heat import HEAT_COLORS, HEAT_OPACITY, HEAT_THRESHOLD
from .maps import check_maps, min_max_scaled, relative_box, shift_into_image

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class PageWord:
    """Values that the page's template fills in for one word of a caption."""

    text: str
    title: str  # what its tooltip says
    probability: float | None  # None if the word was given to the model
    rows: int
    columns: int
    map: str  # base64 of rows x columns bytes


@dataclass(frozen=True)
class PageFigure:
    """Values that the page's template fills in for one image: its name, its JPEG, and the words of its captions."""

    name: str
    description: str  # for readers who can't see the image
    uri: str
    width: int
    height: int
    box: str  # left, top, right and bottom of what the maps cover, in percent of the image's edges
    captions: list[list[PageWord]]


def attention_page(
    images: Iterable[ImageSource | OpenedImage],
    results: Iterable[Sequence[Mapping[str, Any]]],
    names: Iterable[str] | None = None,
    *,
    title: str = "Where the model looked",
) -> str:
    """Return the HTML of a page of images whose captions show, word by word, where the model looked.

        captioner = pipeline("image-captioning", model=FOLDER)
        results = captioner(files, return_attentions=True, return_scores=True)
        Path("attention.html").write_text(attention_page(files, results, files), encoding="utf-8")

    Args:
        images: Any images that `open_image` reads.
        results: Captions of each image, as the pipeline returns them with `return_attentions`. With `return_scores`,
            the page also shows the probability of each word.
        names: Names of the images, shown above their captions.
        title: Title of the page.

    Raises:
        ValueError: There are not as many images, results and names, or a caption lacks attention maps, or an image
            can't be read (see `open_image` for other errors).
    """
    images, results = list(images), list(results)
    names = [""] * len(images) if names is None else list(names)
    if not len(images) == len(results) == len(names):
        raise ValueError(
            f"{len(images)} images, {len(results)} results and {len(names)} names are given; give as many of each."
        )
    return render_page([page_figure(*row) for row in zip(images, results, names, strict=True)], title=title)


def page_figure(image: ImageSource | OpenedImage, captions: Sequence[Mapping[str, Any]], name: str = "") -> PageFigure:
    """Prepare one image for `render_page`, so that not all images need to be in memory; see `attention_page`."""
    if missing := [key for key in ("words", "attentions") for caption in captions if key not in caption]:
        raise ValueError(f"A caption has no {missing[0]!r}; call the pipeline with return_attentions=True.")
    opened = open_to_draw(image)
    box = shown_box = relative_box(captions[0].get("box") if captions else None, opened.size)
    lines = []
    for caption in captions:
        words = caption["words"]
        maps, shown_box = shift_into_image(check_maps(words, caption["attentions"]), box)
        scores = caption.get("word_scores") or [math.nan] * len(words)
        lines.append([_page_word(*row) for row in zip(words, maps, scores, strict=True)])
    return PageFigure(
        name=name,
        description=" ".join(captions[0]["words"]) if captions else name,
        uri=jpeg_uri(opened.image),
        width=opened.size[0],
        height=opened.size[1],
        box=" ".join(f"{100 * fraction:.3f}" for fraction in shown_box),
        captions=lines,
    )


def _page_word(word: str, weights: np.ndarray, score: float) -> PageWord:
    """Prepare a word with its attention map and its log-probability, which is NaN if the word was given."""
    probability = None if math.isnan(score) else math.exp(score)
    cells = (255 * min_max_scaled(weights, constant=0)).round().astype(np.uint8)
    return PageWord(
        text=word,
        title=word if probability is None else f"{word}: probability {probability:.1%}",
        probability=probability,
        rows=cells.shape[0],
        columns=cells.shape[1],
        map=base64.b64encode(cells.tobytes()).decode(),
    )


def render_page(figures: Iterable[PageFigure], *, title: str = "Where the model looked") -> str:
    """Return the HTML of a page of images that `page_figure` prepared."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        figures=figures,
        title=title,
        heat={"colors": HEAT_COLORS, "opacity": HEAT_OPACITY, "threshold": HEAT_THRESHOLD},
        style=style,
        style_hash=_sha256(style),
        script=script,
        script_hash=_sha256(script),
    )


def _sha256(text: str) -> str:
    """Return the hash by which a content security policy allows an inline style sheet or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
