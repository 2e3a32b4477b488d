"""A web page of photographs whose captions show, word by word, where the model looked.

One file without anything from elsewhere: photographs lie in it as JPEG, maps as a byte a cell, which the browser
spreads and colours. Its content security policy forbids all scripts but its own and all that is not in the file.
"""

# T: words, P: image cells

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from ..model.images import ImageSource, open_image
from .maps import FAINT, HEAT, OPACITY, checked_maps, relative_box, scaled, settled, stretched

EDGE = 640  # longer edge of a photograph in pixels
QUALITY = 82  # of its JPEG

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1d1f; --faded: #6b6b70; --mark: #ffd580;
  --bar: #f0a070; }
@media (prefers-color-scheme: dark) { :root { --paper: #17171a; --ink: #ececf0; --faded: #a0a0a8; --mark: #7a4a00;
  --bar: #b0602c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 1.05rem/1.5 system-ui, sans-serif; }
header p { margin: 0 0 1.5rem; color: var(--faded); }
h1 { margin: 0; font-size: 1.4rem; }
main { display: grid; gap: 2.5rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
.photo { position: relative; overflow: hidden; border-radius: .5rem; max-width: 40rem; }
.photo img { display: block; width: 100%; height: auto; }
.photo canvas { position: absolute; opacity: 0; transition: opacity .18s; pointer-events: none; }
.photo canvas.lit { opacity: 1; }
figcaption { margin-top: .6rem; max-width: 40rem; }
.name { color: var(--faded); font-size: .8rem; overflow-wrap: anywhere; }
.caption { display: flex; flex-wrap: wrap; gap: .1rem; margin: .2rem -.3rem .5rem; }
.caption button { font: inherit; color: inherit; border: 0; border-radius: .3rem; cursor: default; max-width: 100%;
  overflow-wrap: anywhere; padding: .1rem .3rem .2rem;
  background: linear-gradient(var(--bar) 0 0) .3rem 100% / calc(var(--share, 0) * (100% - .6rem)) 2px no-repeat; }
.caption button:hover, .caption button:focus { background-color: var(--mark); }
.caption button:focus-visible { outline: 2px solid currentColor; }
.said { min-height: 1.5em; color: var(--faded); font-size: .85rem; font-variant-numeric: tabular-nums; }
@media (prefers-reduced-motion: reduce) { .photo canvas { transition: none; } }
@media print { .said { display: none; } }
"""

# Spreads a map as Pillow's bicubic filter does, so that the page and the pictures show the same.
SCRIPT = Template("""
"use strict";
const HEAT = $heat, OPACITY = $opacity, FAINT = $faint, FINE = 12;
const cubic = x => (x = Math.abs(x)) < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
function weightsOf(length) {
  return Array.from({length: length * FINE}, (_, i) => {
    const at = (i + 0.5) / FINE - 0.5, row = Array.from({length}, (_, j) => cubic(at - j));
    const sum = row.reduce((a, b) => a + b);
    return row.map(weight => weight / sum);
  });
}
function paint(canvas, map, rows, columns) {
  const down = weightsOf(rows), across = weightsOf(columns);
  const [width, height] = [canvas.width, canvas.height] = [across.length, down.length];
  const wide = across.map(row => Array.from({length: rows}, (_, y) =>
    row.reduce((sum, weight, x) => sum + weight * map[y * columns + x], 0)));
  const pen = canvas.getContext("2d"), image = pen.createImageData(width, height);
  for (let y = 0, place = 0; y < height; y++) for (let x = 0; x < width; x++, place += 4) {
    const light = down[y].reduce((sum, weight, row) => sum + weight * wide[x][row], 0) / 255;
    const heat = Math.min(Math.max((light - FAINT) / (1 - FAINT), 0), 1);
    const next = Math.max(1, HEAT.findIndex(([share]) => share >= heat));
    const [[from, low], [to, high]] = [HEAT[next - 1], HEAT[next]];
    for (let c = 0; c < 3; c++) image.data[place + c] = low[c] + (high[c] - low[c]) * (heat - from) / (to - from);
    image.data[place + 3] = 255 * OPACITY * heat * (2 - heat);
  }
  pen.putImageData(image, 0, 0);
}
for (const figure of document.querySelectorAll("figure")) {
  const canvas = figure.querySelector("canvas"), said = figure.querySelector(".said");
  const [left, top, right, bottom] = canvas.dataset.box.split(" ").map(Number), {style} = canvas;
  [style.left, style.top, style.width, style.height] = [left, top, right - left, bottom - top].map(n => n + "%");
  for (const word of figure.querySelectorAll("button")) word.style.setProperty("--share", word.dataset.probability);
  let shown = null;
  const show = () => {
    const word = figure.querySelector("button:hover") || figure.querySelector("button:focus");
    if (word === shown) return;
    shown = word;
    canvas.classList.toggle("lit", word !== null);
    said.textContent = word ? word.title : "";
    if (word) paint(canvas, Uint8Array.from(atob(word.dataset.map), c => c.charCodeAt(0)),
      +word.dataset.rows, +word.dataset.columns);
  };
  for (const event of ["pointerover", "pointerout", "pointerleave", "focusin"]) figure.addEventListener(event, show);
  figure.addEventListener("focusout", () => setTimeout(show));
  for (const caption of figure.querySelectorAll(".caption")) caption.addEventListener("keydown", event => {
    const words = [...caption.children], here = words.indexOf(event.target), last = words.length - 1;
    const there = {ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last}[event.key];
    if (event.key === "Escape") event.target.blur();
    if (there === undefined) return;
    event.preventDefault();
    const word = words[Math.min(Math.max(there, 0), last)];
    for (const other of words) other.tabIndex = other === word ? 0 : -1;
    word.focus();
  });
}
""").substitute(heat=json.dumps(HEAT), opacity=OPACITY, faint=FAINT)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-$style_hash'; \
script-src 'sha256-$script_hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>Point at a word, or go to it with Tab and the arrow keys, to see where the model looked for it.</p>
</header>
<main>
$figures
</main>
<script>$script</script>
</body>
</html>
""")


def attention_page(
    images: Iterable[ImageSource],
    results: Iterable[Sequence[Mapping[str, Any]]],
    names: Iterable[str] | None = None,
    *,
    title: str = "Where it looked",
) -> str:
    """A page of photographs with their captions.

        captioner = pipeline("image-captioning", model=FOLDER)
        results = captioner(files, return_attentions=True, return_scores=True)
        Path("page.html").write_text(attention_page(files, results, files), encoding="utf-8")

    Args:
        images: anything that `open_image` reads.
        results: of each image, what the pipeline gives: captions with `words`, `attentions` and `box`; where there are
            `word_scores`, words show their probability.
        names: of the images, shown above their captions.
        title: of the page.

    Raises:
        ValueError: not as many images, results and names, or captions without attentions; see `open_image` for its
            errors.
    """
    images, results = list(images), list(results)
    names = [""] * len(images) if names is None else list(names)
    if not len(images) == len(results) == len(names):
        raise ValueError(
            f"{len(images)} images, {len(results)} results and {len(names)} names are given; give as many of each."
        )
    return page_of_figures((page_figure(*row) for row in zip(images, results, names, strict=True)), title=title)


def page_figure(image: ImageSource, captions: Sequence[Mapping[str, Any]], name: str = "") -> str:
    """The part of a page that shows one image, for `page_of_figures`; see `attention_page`."""
    if missing := [key for key in ("words", "attentions") for caption in captions if key not in caption]:
        raise ValueError(f"A caption has no {missing[0]}; call the pipeline with return_attentions=True.")
    photo = open_image(image)
    box = shown = relative_box(captions[0].get("box") if captions else None, photo.size)
    texts, lines = [], []
    for caption in captions:
        maps, shown = settled(checked_maps(caption["words"], caption["attentions"]), box)
        texts.append(" ".join(caption["words"]))
        lines.append(_caption(caption, maps, texts[-1]))
    rows_of_captions = "\n".join(lines)
    return f"""<figure>
<div class="photo"><img src="{jpeg_uri(photo)}" width="{photo.width}" height="{photo.height}" \
alt="{escape(texts[0] if texts else name)}">\
<canvas data-box="{" ".join(f"{100 * share:.3f}" for share in shown)}" aria-hidden="true"></canvas></div>
<figcaption>
<div class="name">{escape(name)}</div>
{rows_of_captions}
<div class="said" aria-live="polite"></div>
</figcaption>
</figure>"""


def page_of_figures(figures: Iterable[str], *, title: str = "Where it looked") -> str:
    """A page of what `page_figure` made, so that photographs need not be held until all have their captions."""
    return PAGE.substitute(
        title=escape(title),
        style=STYLE,
        style_hash=sha256_of(STYLE),
        script=SCRIPT,
        script_hash=sha256_of(SCRIPT),
        figures="\n".join(figures),
    )


def _caption(caption: Mapping[str, Any], maps: np.ndarray, text: str) -> str:
    """A caption as a row of buttons, of which Tab reaches one and the arrow keys the others."""
    words = caption["words"]
    scores = caption.get("word_scores") or [math.nan] * len(words)
    buttons = []
    for place, (word, weights, score) in enumerate(zip(words, maps, scores, strict=True)):
        rows, columns = weights.shape
        light = base64.b64encode((255 * stretched(weights, even=0)).round().astype(np.uint8).tobytes()).decode()
        known = not math.isnan(score)  # words given to the model have no probability
        probability = f' data-probability="{math.exp(score):.4f}"' if known else ""
        title = f"{word}: probability {math.exp(score):.1%}" if known else word
        buttons.append(
            f'<button type="button" tabindex="{0 if place == 0 else -1}" title="{escape(title)}"{probability} '
            f'data-rows="{rows}" data-columns="{columns}" data-map="{light}">{escape(word)}</button>'
        )
    return f'<div class="caption" role="group" aria-label="{escape(text)}">{"".join(buttons)}</div>'


def jpeg_uri(photo: Image.Image) -> str:
    """A photograph as a data URI, made smaller if it is large."""
    file = io.BytesIO()
    (scaled(photo, EDGE) if max(photo.size) > EDGE else photo).save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def sha256_of(text: str) -> str:
    """How a content security policy names a script or style that it allows."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
