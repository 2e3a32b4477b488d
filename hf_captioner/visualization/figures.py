"""Figures of attention maps, of captioned images and of training curves.

Each function returns a `matplotlib.figure.Figure`; save it with `figure.savefig("attention.png")`. The figures are made
without pyplot, so they need no display and leave pyplot's state alone.

Words are set in matplotlib's default font, which has no Chinese, Japanese, Korean or Indic scripts and shows their
characters as boxes. Name an installed font that has them:
`matplotlib.rcParams["font.family"] = ["DejaVu Sans", "Noto Sans CJK JP"]`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.images import Box, ImageSource, OpenedImage, open_to_draw, scaled
from .maps import check_maps, min_max_scaled, relative_box, shift_into_image, upsample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# T: words; H, W: height and width of an image in pixels. Lengths without a unit are in inches.

DPI = 150
GAP = 0.1
MARGIN = 0.15
TEXT_COLOR = "#222222"

PANEL_EDGE = 2.0  # longer edge of each panel of `attention_figure`
TITLE_HEIGHT = 0.3  # of the word above a panel
# Where the model did not look, a panel shows grey fog: this brightness, plus this fraction of the image's own.
FOG_BRIGHTNESS, FOG_TRANSPARENCY = 0.14, 0.25
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # weights of red, green and blue, ITU-R BT.601

# Layout of `captions_figure`
ROW_WIDTH = 9.0
MAX_ROW_HEIGHT = 2.4
LINE_HEIGHT = 0.18
CHARACTERS_PER_INCH = 13.5

# Scores that `curves_figure` draws, with their labels and colours (by Okabe and Ito, for colour-blind readers too).
SCORES = {
    "cider": ("CIDEr-D", "#d55e00"),
    "rouge_l": ("ROUGE-L", "#009e73"),
    "bleu_1": ("BLEU-1", "#56b4e9"),
    "bleu_4": ("BLEU-4", "#0072b2"),
}


def attention_figure(
    image: ImageSource | OpenedImage, words: Sequence[str], maps: np.ndarray, box: Box | None = None
) -> Figure:
    """Draw the image, and then a panel for each word that shows where the model looked (Xu et al. 2015, fig. 3).

    A panel shows the image clearly where the model looked, and in grey fog elsewhere. As in the paper, each map is
    scaled from its own smallest to its own largest weight; a map of equal weights leaves the image clear.

    Args:
        image: Any image that `open_image` reads. It is drawn upright and whole, in its own aspect ratio.
        words: Words of the caption.
        maps: Attention weights of each word, `(T, rows, columns)`.
        box: Part of the image that the maps cover, `(left, top, right, bottom)` in pixels, as the pipeline returns it;
            None for the whole image.

    Raises:
        ValueError: `maps` has the wrong shape, or the image can't be read (see `open_image` for other errors).
    """
    maps = check_maps(words, maps)
    opened = open_to_draw(image)
    small = scaled(opened.image, PANEL_EDGE * DPI)
    maps, box = shift_into_image(maps, relative_box(box, opened.size))
    pixels = np.asarray(small, dtype=np.float32) / 255  # (H, W, 3)
    fog = FOG_BRIGHTNESS + FOG_TRANSPARENCY * (pixels @ LUMA)[..., None]  # (H, W, 1)
    panels = [(pixels, "")]
    for word, weights in zip(words, maps, strict=True):
        clarity = upsample(min_max_scaled(weights, constant=1), small.size, box)[..., None]  # (H, W, 1)
        panels.append((clarity * pixels + (1 - clarity) * fog, word))

    width, height = small.width / DPI, small.height / DPI
    columns = _num_columns(len(panels), width / height)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(
        2 * MARGIN + columns * (width + GAP) - GAP, 2 * MARGIN + rows * (TITLE_HEIGHT + height + GAP) - GAP
    )
    for index, (panel, word) in enumerate(panels):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * (width + GAP), MARGIN + row * (TITLE_HEIGHT + height + GAP) + TITLE_HEIGHT
        axes = add_image(figure, panel, left, top, width, height)
        axes.set_title(word, fontsize=12, color=TEXT_COLOR, pad=5, parse_math=False)
    return figure


def captions_figure(
    images: Iterable[ImageSource | OpenedImage], captions: Sequence[str], *, columns: int = 4
) -> Figure:
    """Draw images in rows of equal height, each with its caption beneath.

    Args:
        images: Any images that `open_image` reads. They are drawn upright and whole, in their own aspect ratios.
        captions: One caption for each image; it may have several lines.
        columns: Number of images in a row.

    Raises:
        ValueError: There are no images, there is not one caption for each, or one can't be read (see `open_image` for
            other errors).
    """
    opened = [open_to_draw(image).image for image in images]
    if not opened or len(opened) != len(captions):
        raise ValueError(
            f"{len(opened)} images and {len(captions)} captions are given; give at least one image, and one caption "
            "for each."
        )
    placed, right, top = [], 0.0, MARGIN
    for start in range(0, len(opened), columns):
        row = opened[start : start + columns]
        # A tall image gets as much width as a square one, or its caption would be a column of single words.
        aspects = [max(1.0, image.width / image.height) for image in row]
        height = min(MAX_ROW_HEIGHT, (ROW_WIDTH - GAP * (len(row) - 1)) / sum(aspects))
        num_lines, left = 0, MARGIN
        for image, aspect, caption in zip(row, aspects, captions[start:], strict=False):
            line_length = max(8, int(CHARACTERS_PER_INCH * aspect * height))
            lines = [line for text in caption.splitlines() for line in textwrap.wrap(text, line_length)]
            placed.append((image, "\n".join(lines), left, top, height))
            num_lines, left = max(num_lines, len(lines)), left + aspect * height + GAP
        right, top = max(right, left - GAP), top + height + LINE_HEIGHT * (1.5 + num_lines)
    figure = new_figure(right + MARGIN, top)
    for image, text, left, top, height in placed:
        width = height * image.width / image.height
        axes = add_image(figure, np.asarray(scaled(image, max(width, height) * DPI)), left, top, width, height)
        axes.annotate(
            text, (0, 0), (0, -5), xycoords="axes fraction", textcoords="offset points",
            ha="left", va="top", fontsize=9.5, color=TEXT_COLOR, parse_math=False,
        )  # fmt: skip
    return figure


def curves_figure(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the training loss and, beside it, the validation scores of each epoch, with the best of each score marked.

    Args:
        epochs: Records with the key `epoch` and any of `loss` and the keys of `SCORES`; other keys are ignored.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9.0, 3.3)
    loss_axes, score_axes = figure.subplots(1, 2)
    for axes, title in ((loss_axes, "Training loss"), (score_axes, "Validation scores")):
        axes.set_title(title, fontsize=11, color=TEXT_COLOR, loc="left")
        axes.set_xlabel("epoch", color=TEXT_COLOR)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#555555", labelsize=9)

    style = {"linewidth": 1.8, "marker": ".", "markersize": 5, "markevery": 1}
    loss_axes.plot(*_series(epochs, "loss"), color=TEXT_COLOR, **style)
    lines = []
    for name, (label, color) in SCORES.items():
        x, y = _series(epochs, name)
        if y:
            best = max(range(len(y)), key=y.__getitem__)
            score_axes.plot(x[best], y[best], "o", color=color, markersize=6)
            label = f"{label}  {y[best]:.3f}"
            lines += score_axes.plot(x, y, color=color, label=label, **style)
    if lines:
        score_axes.set_ylim(bottom=0)
        lines.sort(key=lambda line: float(line.get_ydata()[-1]), reverse=True)  # from top to bottom, as the curves end
        score_axes.legend(
            handles=lines, title="best epoch", frameon=False, fontsize=9, title_fontsize=9, alignment="left",
            loc="center left", bbox_to_anchor=(1.02, 0.5),
        )  # fmt: skip
    figure.tight_layout(w_pad=2.5)
    return figure


def _series(epochs: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return the epochs in which a value of this name was recorded, and these values."""
    points = [(record["epoch"], record[name]) for record in epochs if record.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _num_columns(count: int, aspect: float) -> int:
    """Return the number of columns for so many panels of this aspect ratio.

    It is about as many as fit on a page, chosen so that the last row is as full as possible.
    """
    fewest, most = min(count, 4), min(count, max(4, round(7 / math.sqrt(aspect))))
    return max(range(fewest, most + 1), key=lambda columns: (-(-count % columns), columns))


def new_figure(width: float, height: float, dpi: float = DPI) -> Figure:
    """Return an empty white figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor="white")


def add_image(figure: Figure, pixels: np.ndarray, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes that show an image, and return them.

    Args:
        figure: Figure to draw in.
        pixels: Image `(H, W, 3)`.
        left: Distance from the left edge of the figure in inches.
        top: Distance from the top edge of the figure in inches.
        width: Width of the axes in inches.
        height: Height of the axes in inches.
    """
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    )
    axes.imshow(pixels, aspect="auto")
    axes.set_axis_off()
    return axes
