"""Pictures and animations of an image that is overlaid with a heat map of where the model looked.

For captions in scripts that matplotlib's default font lacks, see `figures`.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from ..model.images import Box, ImageSource, OpenedImage, open_to_draw, scaled
from .figures import TEXT_COLOR, add_image, new_figure
from .heat import blend_heat
from .maps import check_maps, min_max_scaled, relative_box, shift_into_image, upsample

# T: words; H, W: height and width of an image in pixels. Lengths without a unit are in inches.

OVERLAY_DPI, ANIMATION_DPI = 150, 75
EDGE = 4.8  # longer edge of the image
MIN_WIDTH = 0.75  # of the caption beneath a tall image, as a fraction of the image's height
MARGIN = 0.2
LINE_HEIGHT = 0.32
WORD_GAP = 0.09
FONT_SIZE = 13  # in points
FADED_COLOR, MARK_COLOR = "#787878", "#ffd580"
MILLISECONDS_PER_WORD = 650  # in the animation, which shows the plain image for twice as long


def attention_overlay(
    image: ImageSource | OpenedImage,
    words: Sequence[str],
    maps: np.ndarray,
    box: Box | None = None,
    *,
    chosen: Collection[str | int] | None = None,
) -> Image.Image:
    """Draw the image once, with a heat map of where the model looked for its caption or for some words of it.

    The heat map is the mean of the words' attention maps, scaled from its own smallest to its own largest weight; equal
    weights leave the image as it is. The caption stands beneath, with the chosen words marked. The colours of the heat
    map are in `heat.HEAT_COLORS`.

    Args:
        image: Any image that `open_image` reads. It is drawn upright and whole, in its own aspect ratio.
        words: Words of the caption.
        maps: Attention weights of each word, `(T, rows, columns)`.
        box: Part of the image that the maps cover, `(left, top, right, bottom)` in pixels, as the pipeline returns it;
            None for the whole image.
        chosen: Words to draw the heat map of, or their indices from 0; None for the whole caption.

    Raises:
        ValueError: `maps` has the wrong shape, the caption lacks a chosen word, or the image can't be read (see
            `open_image` for other errors).
    """
    maps = check_maps(words, maps)
    indices = _chosen_indices(words, chosen)
    captioned = _CaptionedImage(image, words, box, OVERLAY_DPI)
    captioned.show(maps[indices].mean(0) if indices else None, marked=() if chosen is None else indices)
    return captioned.render()


def attention_animation(
    image: ImageSource | OpenedImage, words: Sequence[str], maps: np.ndarray, box: Box | None = None
) -> bytes:
    """Return an animated GIF that shows the heat map of one word after the other, marking the word in the caption.

    It starts with the plain image and repeats forever. Write it to a file with
    `Path("attention.gif").write_bytes(...)`.

    Args:
        image: Any image that `open_image` reads.
        words: Words of the caption.
        maps: Attention weights of each word, `(T, rows, columns)`, scaled as in `attention_overlay`.
        box: Part of the image that the maps cover, in pixels; None for the whole image.

    Raises:
        ValueError: `maps` has the wrong shape, or the image can't be read (see `open_image` for other errors).
    """
    maps = check_maps(words, maps)
    captioned = _CaptionedImage(image, words, box, ANIMATION_DPI)
    captioned.show(None)
    frames = [captioned.render()]
    for index, weights in enumerate(maps):
        captioned.show(weights, marked=[index])
        frames.append(captioned.render())
    # Pillow would choose the 256 colours of a frame by median cut, which takes half a second for a photograph.
    first, *others = (frame.quantize(method=Image.Quantize.FASTOCTREE) for frame in frames)
    durations = [2 * MILLISECONDS_PER_WORD, *[MILLISECONDS_PER_WORD] * len(others)]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue()


def _chosen_indices(words: Sequence[str], chosen: Collection[str | int] | None) -> list[int]:
    """Return the indices of the chosen words, of all if None is given; see `attention_overlay`."""
    if chosen is None:
        return list(range(len(words)))
    if missing := [word for word in chosen if word not in words and word not in range(len(words))]:
        raise ValueError(
            f"The caption has no word {missing[0]!r}; choose among its words, {', '.join(words)}, "
            f"or their indices, 0 to {len(words) - 1}."
        )
    return [index for index, word in enumerate(words) if word in chosen or index in chosen]


def _break_into_lines(widths: Sequence[float], line_width: float) -> list[tuple[float, int]]:
    """Return the left end of each word and the index of its line, from the widths of the words."""
    positions, right, line = [], 0.0, 0
    for width in widths:
        if right > 0 and right + width > line_width:
            right, line = 0.0, line + 1
        positions.append((right, line))
        right += width + WORD_GAP
    return positions


class _CaptionedImage:
    """A figure of an image with its caption beneath, whose heat map and marked words can be changed.

    Args:
        image: Any image that `open_image` reads.
        words: Words of the caption, which is broken into lines as wide as the image.
        box: Part of the image that the heat maps cover, in pixels; None for the whole image.
        dpi: Resolution of the figure.
    """

    def __init__(self, image: ImageSource | OpenedImage, words: Sequence[str], box: Box | None, dpi: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        opened = open_to_draw(image)
        self.image = scaled(opened.image, EDGE * dpi)
        self.box = relative_box(box, opened.size)
        width, height = self.image.width / dpi, self.image.height / dpi
        text_width = max(width, MIN_WIDTH * height)

        self.figure = new_figure(2 * MARGIN + text_width, height, dpi)
        self.canvas = FigureCanvasAgg(self.figure)
        self.texts = [
            self.figure.text(
                0, 0, word, fontsize=FONT_SIZE, parse_math=False, transform=self.figure.dpi_scale_trans,
                bbox={"boxstyle": "round,pad=0.2,rounding_size=0.2", "edgecolor": "none"},
            )
            for word in words
        ]  # fmt: skip
        positions = _break_into_lines([text.get_window_extent().width / dpi for text in self.texts], text_width)
        num_lines = 1 + max((line for _, line in positions), default=0)
        caption_height = num_lines * LINE_HEIGHT + MARGIN / 2
        self.figure.set_size_inches(2 * MARGIN + text_width, 1.5 * MARGIN + height + caption_height)
        for text, (left, line) in zip(self.texts, positions, strict=True):
            text.set_position((MARGIN + left, caption_height - (line + 0.7) * LINE_HEIGHT))
        left = MARGIN + (text_width - width) / 2
        self.axes_image = add_image(self.figure, np.asarray(self.image), left, MARGIN, width, height).images[0]

    def show(self, weights: np.ndarray | None, marked: Collection[int] = ()) -> None:
        """Show the heat map of attention weights `(rows, columns)`, or none, and mark the words at these indices."""
        image = self.image
        if weights is not None:
            maps, box = shift_into_image(weights[None], self.box)
            image = blend_heat(image, upsample(min_max_scaled(maps[0], constant=0), image.size, box))
        self.axes_image.set_data(np.asarray(image))
        for index, text in enumerate(self.texts):
            text.set_color(TEXT_COLOR if index in marked or not marked else FADED_COLOR)
            background = text.get_bbox_patch()
            assert background is not None
            background.set_facecolor(MARK_COLOR if index in marked else "none")

    def render(self) -> Image.Image:
        """Return the figure as an RGB image."""
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
