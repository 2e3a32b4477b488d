"""Figures: where a captioner looked, how its training went, and what it says.

Each is a `matplotlib.figure.Figure` made without pyplot, so it needs no display and leaves pyplot's state alone. Save
it with `figure.savefig("attention.png")`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.images import ImageSource, open_image
from .fonts import families
from .maps import checked_maps, relative_box, scaled, settled, spread, stretched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# T: words, H, W: height and width of a photograph in pixels; lengths without a unit are inches

DOTS = 150  # an inch
GAP = 0.1
MARGIN = 0.15
INK = "#222222"

PANEL = 2.0  # longer edge of a photograph beside its maps
FOG, SEEN_THROUGH = 0.14, 0.25  # brightness of the fog where a model did not look, and how much shows through
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # luma of red, green and blue, ITU-R BT.601

ROW_WIDTH = 9.0  # of photographs with captions
ROW_HEIGHT = 2.4  # at most
LINE = 0.18  # height of a line of a caption
LETTERS = 13.5  # an inch of a line

# Scores that curves_figure draws, with their names and colours (Okabe and Ito's, told apart by the colour-blind).
SCORES = {
    "cider": ("CIDEr-D", "#d55e00"),
    "rouge_l": ("ROUGE-L", "#009e73"),
    "bleu_1": ("BLEU-1", "#56b4e9"),
    "bleu_4": ("BLEU-4", "#0072b2"),
}


def attention_figure(
    image: ImageSource,
    words: Sequence[str],
    maps: np.ndarray,
    box: tuple[float, float, float, float] | None = None,
) -> Figure:
    """The photograph, then for every word where the model looked, after the figures of Xu et al. 2015.

    Where the model looked the photograph is clear, elsewhere it lies in grey fog. Each map is scaled from its own
    least to its own greatest weight, as in the paper; a map without differences leaves the photograph as it is.

    Args:
        image: anything that `open_image` reads; shown upright, whole, with its own aspect ratio.
        words: of the caption.
        maps: `(T, rows, columns)`, attention weights of each word.
        box: `(left, top, right, bottom)` of what the maps cover in pixels of the image, as the pipeline gives it;
            None for the whole image.

    Raises:
        ValueError: maps of another shape or number; see `open_image` for its errors.
    """
    maps = checked_maps(words, maps)
    original = open_image(image)
    photo = scaled(original, PANEL * DOTS)
    maps, box = settled(maps, relative_box(box, original.size))
    pixels = np.asarray(photo, dtype=np.float32) / 255  # (H, W, 3)
    fog = FOG + SEEN_THROUGH * (pixels @ GREY)[..., None]  # (H, W, 1)
    panels = [(pixels, "")]
    for word, weights in zip(words, maps, strict=True):
        light = spread(stretched(weights, even=1), photo.size, box)[..., None]
        panels.append((light * pixels + (1 - light) * fog, word))

    title, width, height = 0.3, photo.width / DOTS, photo.height / DOTS
    columns = _num_columns(len(panels), width / height)
    rows = math.ceil(len(panels) / columns)
    figure = _figure(2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + rows * (title + height + GAP) - GAP)
    for index, (picture, word) in enumerate(panels):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (width + GAP), MARGIN + row * (title + height + GAP) + title
        axes = _add_picture(figure, picture, left, top, width, height)
        axes.set_title(word, fontsize=12, fontfamily=families(), color=INK, pad=5, parse_math=False)
    return figure


def captions_figure(images: Iterable[ImageSource], captions: Sequence[str], *, columns: int = 4) -> Figure:
    """Photographs in rows of equal height, each with its caption beneath.

    Args:
        images: anything that `open_image` reads, shown upright, whole, with their own aspect ratios.
        captions: one an image; it may have several lines.
        columns: photographs in a row.

    Raises:
        ValueError: no images, or not as many captions; see `open_image` for its errors.
    """
    photos = [open_image(image) for image in images]
    if not photos or len(photos) != len(captions):
        raise ValueError(f"{len(photos)} images and {len(captions)} captions are given; give one caption an image.")
    placed, right, top = [], 0.0, MARGIN
    for start in range(0, len(photos), columns):
        row = photos[start : start + columns]
        # A tall photograph gets the room of a square one, or its caption would be a column of single words.
        rooms = [max(1.0, photo.width / photo.height) for photo in row]
        height = min(ROW_HEIGHT, (ROW_WIDTH - GAP * (len(row) - 1)) / sum(rooms))
        num_lines, left = 0, MARGIN
        for photo, room, caption in zip(row, rooms, captions[start:], strict=False):
            letters = max(8, int(LETTERS * room * height))
            lines = [line for text in caption.splitlines() for line in textwrap.wrap(text, letters)]
            placed.append((photo, "\n".join(lines), left, top, height))
            num_lines, left = max(num_lines, len(lines)), left + room * height + GAP
        right, top = max(right, left - GAP), top + height + LINE * (1.5 + num_lines)
    figure = _figure(right + MARGIN, top)
    for photo, text, left, top, height in placed:
        width = height * photo.width / photo.height
        axes = _add_picture(figure, np.asarray(scaled(photo, max(width, height) * DOTS)), left, top, width, height)
        axes.annotate(
            text, (0, 0), (0, -5), xycoords="axes fraction", textcoords="offset points",
            ha="left", va="top", fontsize=9.5, fontfamily=families(), color=INK, parse_math=False,
        )  # fmt: skip
    return figure


def curves_figure(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Training curves: the loss on the left, validation scores on the right with the best epoch of each marked.

    Args:
        epochs: records with `epoch` and any of `loss` and the names in `SCORES`; other keys are ignored.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9.0, 3.3)
    loss_axes, score_axes = figure.subplots(1, 2)
    for axes, title in ((loss_axes, "Training loss"), (score_axes, "Validation scores")):
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#555555", labelsize=9)

    style = {"linewidth": 1.8, "marker": ".", "markersize": 5, "markevery": 1}
    loss_axes.plot(*_series(epochs, "loss"), color=INK, **style)
    lines = []
    for name, (label, colour) in SCORES.items():
        x, y = _series(epochs, name)
        if y:
            best = max(range(len(y)), key=y.__getitem__)
            score_axes.plot(x[best], y[best], "o", color=colour, markersize=6)
            label = f"{label}  {y[best]:.3f}"
            lines += score_axes.plot(x, y, color=colour, label=label, **style)
    if lines:
        score_axes.set_ylim(bottom=0)
        lines.sort(key=lambda line: float(line.get_ydata()[-1]), reverse=True)  # as they lie in the picture
        score_axes.legend(
            handles=lines, title="best epoch", frameon=False, fontsize=9, title_fontsize=9, alignment="left",
            loc="center left", bbox_to_anchor=(1.02, 0.5),
        )  # fmt: skip
    figure.tight_layout(w_pad=2.5)
    return figure


def _series(epochs: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Epochs that have a value of this name, and these values."""
    points = [(record["epoch"], record[name]) for record in epochs if record.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _num_columns(count: int, aspect: float) -> int:
    """Columns for `count` panels: about as many as fit a page, and the last row as full as can be."""
    fewest, most = min(count, 4), min(count, max(4, round(7 / math.sqrt(aspect))))
    return max(range(fewest, most + 1), key=lambda columns: (-(-count % columns), columns))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS, facecolor="white")


def _add_picture(figure: Figure, picture: np.ndarray, left: float, top: float, width: float, height: float) -> Axes:
    """Put a picture into a figure, `left` and `top` measured from the upper left corner."""
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    )
    axes.imshow(picture, aspect="auto")
    axes.set_axis_off()
    return axes
