"""Figures, overlays and animations: where attention is drawn, and how words and images are laid out."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_captioner.visualization import (
    attention_animation,
    attention_figure,
    attention_overlay,
    captions_figure,
    curves_figure,
)
from hf_captioner.visualization.figures import SCORES
from hf_captioner.visualization.maps import shift_into_image
from hf_captioner.visualization.overlay import ANIMATION_DPI, EDGE, MARGIN, MILLISECONDS_PER_WORD, OVERLAY_DPI

WORDS = ["two", "dogs", "on", "two", "боты"]
CELLS = [(0, 0), (1, 2), (3, 3), (3, 0), (0, 3)]  # row and column where the model looked for each word
MAPS = np.full((5, 4, 4), 0.02)
for _index, _cell in enumerate(CELLS):
    MAPS[_index][_cell] = 0.7


def white_image(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def shown_images(figure: Any) -> list[np.ndarray]:
    """Return the image `(H, W, 3)` of each panel of a figure."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def cut_image(picture: Image.Image, size: tuple[int, int], dpi: int) -> np.ndarray:
    """Return the pixels of the image in an overlay or a frame of an animation, without paper and caption."""
    width, height = (round(EDGE * dpi * edge / max(size)) for edge in size)
    left, top = (picture.width - width) // 2, round(MARGIN * dpi)
    return np.asarray(picture.convert("RGB"), dtype=float)[top : top + height, left : left + width]


def clarity_of_panel(image: Image.Image, maps: np.ndarray, box: Any) -> np.ndarray:
    """Return how clear each pixel is in the panel of a word."""
    return shown_images(attention_figure(image, ["dog"], maps, box))[1].mean(-1)


def heat_of_overlay(image: Image.Image, maps: np.ndarray, box: Any) -> np.ndarray:
    """Return how hot each pixel is in an overlay."""
    return hotness(cut_image(attention_overlay(image, ["dog"], maps, box), image.size, OVERLAY_DPI))


def hotness(pixels: np.ndarray) -> np.ndarray:
    """Return a measure that is largest where a white image has the yellow of the hottest colour."""
    return pixels @ np.array([1, 1, -1])


def brightest_point(values: np.ndarray) -> tuple[float, float]:
    """Return the centre of the pixels with the largest values, in fractions of height and width."""
    rows, columns = np.nonzero(values > 0.95 * values.max())
    return (rows.mean() + 0.5) / values.shape[0], (columns.mean() + 0.5) / values.shape[1]


@pytest.mark.parametrize("draw", [clarity_of_panel, heat_of_overlay])
@pytest.mark.parametrize("size", [(400, 300), (40, 30), (30, 200)])
@pytest.mark.parametrize("box", [None, (0.2, 0.4, 0.6, 0.8), (-0.5, -0.5, 1.5, 1.5)])
def test_attention_is_drawn_where_the_model_looked(
    draw: Callable[..., np.ndarray], size: tuple[int, int], box: tuple[float, ...] | None
) -> None:
    left, top, right, bottom = box or (0, 0, 1, 1)
    in_pixels = box and (left * size[0], top * size[1], right * size[0], bottom * size[1])
    drawn = draw(white_image(*size), MAPS[1:2], in_pixels)
    assert drawn.shape[1] / drawn.shape[0] == pytest.approx(size[0] / size[1], rel=0.02)
    assert drawn.min() < 0.8 * drawn.max()
    expected = top + (bottom - top) * 0.375, left + (right - left) * 0.625  # the centre of the cell (1, 2)
    assert brightest_point(drawn) == pytest.approx(expected, abs=0.02)


def test_parts_that_the_model_did_not_see_are_in_fog() -> None:
    clarity = clarity_of_panel(white_image(40, 30), np.ones((1, 2, 2)), (10, 0, 30, 30))
    assert clarity[:, :70].max() < 0.4 and clarity[:, 80:220].min() == 1 and clarity[:, 230:].max() < 0.4


def test_equal_weights_leave_the_image_clear(photos: list[Image.Image]) -> None:
    words = ["a", "dog", "$x$"]  # the last is not to be set as a formula
    figure = attention_figure(photos[0], words, np.full((3, 4, 4), 1 / 16))
    original, *panels = shown_images(figure)
    expected = np.asarray(photos[0].resize((original.shape[1], original.shape[0]), Image.Resampling.LANCZOS)) / 255
    for panel in (original, *panels):
        np.testing.assert_allclose(panel, expected, atol=1e-6)
    assert [axes.get_title() for axes in figure.axes] == ["", *words]
    for axes in figure.axes:
        extent = axes.get_window_extent()
        assert extent.width / extent.height == pytest.approx(original.shape[1] / original.shape[0], rel=0.01)


@pytest.mark.parametrize("count", [0, 1, 4, 12, 30])
def test_panels_and_their_words_do_not_overlap(photos: list[Image.Image], count: int) -> None:
    figure = attention_figure(photos[1], ["skateboarding"] * count, np.ones((count, 2, 2)))
    figure.canvas.draw()
    page, boxes = figure.bbox, [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == count + 1
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert min(box.x1, other.x1) <= max(box.x0, other.x0) or min(box.y1, other.y1) <= max(box.y0, other.y0)


def test_captions_stand_beneath_their_images(photos: list[Image.Image]) -> None:
    captions = [f"photograph {n} " + "of a dog that jumps over a bench " * n for n in range(5)]
    figure = captions_figure(photos, captions, columns=3)
    figure.canvas.draw()
    for axes, photo, caption in zip(figure.axes, photos, captions, strict=True):
        (text,) = axes.texts
        image_extent, text_extent = axes.get_window_extent(), text.get_window_extent()
        assert image_extent.width / image_extent.height == pytest.approx(photo.width / photo.height, rel=0.02)
        assert text.get_text().split() == caption.split()
        assert text_extent.y1 <= image_extent.y0 and text_extent.y0 >= 0
        assert text_extent.x0 >= 0 and text_extent.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [{"epoch": 1, "loss": 3.0}],
        [{"epoch": 1, "loss": 3.0, "bleu_4": 0.1}, {"epoch": 2, "loss": 2.0, "cider": 0.4, "learning_rate": 1e-3}],
        [{"epoch": 1, "bleu_4": 0.2, "cider": None}],
    ],
)
def test_curves_show_the_recorded_values(epochs: list[dict[str, Any]]) -> None:
    figure = curves_figure(epochs)
    loss_axes, score_axes = figure.axes
    losses = [(record["epoch"], record["loss"]) for record in epochs if "loss" in record]
    assert [tuple(point) for point in loss_axes.lines[0].get_xydata()] == losses
    labels = {line.get_label().split()[0] for line in score_axes.lines if not line.get_label().startswith("_")}
    recorded = {name for record in epochs for name, value in record.items() if name in SCORES and value is not None}
    assert labels == {SCORES[name][0] for name in recorded}
    figure.savefig(io.BytesIO())


def test_best_epoch_is_marked_and_in_the_legend() -> None:
    values = [0.1, 0.25, 0.2]
    axes = curves_figure([{"epoch": n, "bleu_4": value} for n, value in enumerate(values, 1)]).axes[1]
    assert axes.get_legend().get_texts()[0].get_text() == "BLEU-4  0.250"
    assert [2.0, 0.25] in [line.get_xydata().tolist()[0] for line in axes.lines if len(line.get_xydata()) == 1]


def test_neither_the_import_nor_a_figure_loads_pyplot() -> None:
    code = (
        "import sys; import hf_captioner.visualization as v; assert 'matplotlib' not in sys.modules; "
        "v.curves_figure([{'epoch': 1, 'loss': 1.0}]).savefig(sys.stdout.buffer, format='png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    png = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=300).stdout
    assert math.prod(Image.open(io.BytesIO(png)).size) > 10_000


def overlay(chosen: list[str | int] | None, words: list[str] = WORDS, maps: np.ndarray = MAPS) -> np.ndarray:
    return np.asarray(attention_overlay(white_image(60, 60), words, maps, chosen=chosen), dtype=int)


def test_words_of_an_overlay_are_chosen_by_name_or_index() -> None:
    np.testing.assert_array_equal(overlay(["two"]), overlay([0, 3]))
    np.testing.assert_array_equal(overlay([1]), overlay(["dogs"]))
    assert np.abs(overlay([0]) - overlay(["two"])).max() > 50


def test_overlay_of_a_caption_is_the_mean_of_its_maps_without_marks() -> None:
    image_bottom = round(OVERLAY_DPI * (EDGE + MARGIN))
    whole_caption, all_words = overlay(None), overlay(list(range(5)))
    np.testing.assert_array_equal(whole_caption[:image_bottom], all_words[:image_bottom])
    assert np.abs(whole_caption - all_words)[image_bottom:].max() > 50
    np.testing.assert_allclose(whole_caption, overlay(None, maps=np.stack([MAPS.mean(0)] * 5)), atol=1)


@pytest.mark.parametrize("size", [(400, 300), (30, 300)])
def test_caption_of_an_overlay_fits_on_the_paper(size: tuple[int, int]) -> None:
    words = ["caption"] * 30 + ["supercalifragilistic"]
    paper = np.asarray(attention_overlay(white_image(*size), words, np.ones((31, 2, 2))))
    ink = paper.min(-1) < 128
    assert ink.any() and not ink[:, :5].any() and not ink[:, -5:].any() and not ink[-5:].any()


@pytest.mark.parametrize(
    ("words", "maps"), [(["dog"], np.ones((1, 4, 4))), (["dog"], np.zeros((1, 4, 4))), ([], MAPS[:0])]
)
def test_overlay_without_differences_leaves_the_image_as_it_is(words: list[str], maps: np.ndarray) -> None:
    assert cut_image(attention_overlay(white_image(9, 9), words, maps), (9, 9), OVERLAY_DPI).min() == 255


def read_gif(data: bytes) -> list[tuple[int, Image.Image]]:
    """Return the duration in milliseconds and the image of each frame."""
    gif, frames = Image.open(io.BytesIO(data)), []
    assert gif.info["loop"] == 0  # repeats forever
    for index in range(gif.n_frames):
        gif.seek(index)
        frames.append((gif.info["duration"], gif.convert("RGB")))
    return frames


@pytest.mark.parametrize("size", [(200, 150), (90, 160)])
def test_animation_shows_the_heat_of_one_word_after_the_other(size: tuple[int, int]) -> None:
    durations, pictures = zip(*read_gif(attention_animation(white_image(*size), WORDS, MAPS)), strict=True)
    assert durations == (2 * MILLISECONDS_PER_WORD, *[MILLISECONDS_PER_WORD] * len(WORDS))
    assert cut_image(pictures[0], size, ANIMATION_DPI).min() > 250  # white but for rounding to 256 colours
    for picture, cell in zip(pictures[1:], CELLS, strict=True):
        row, column = brightest_point(hotness(cut_image(picture, size, ANIMATION_DPI)))
        assert (int(4 * row), int(4 * column)) == cell


def test_animation_is_small_and_true_to_the_image(photos: list[Image.Image]) -> None:
    data = attention_animation(photos[0], WORDS, MAPS)
    assert len(data) < 1_000_000
    first = cut_image(read_gif(data)[0][1], photos[0].size, ANIMATION_DPI)
    expected = photos[0].resize((first.shape[1], first.shape[0]), Image.Resampling.LANCZOS)
    assert np.abs(first - np.asarray(expected, dtype=float)).mean() < 12


def test_animation_of_an_empty_caption() -> None:
    assert len(read_gif(attention_animation(white_image(60, 40), [], np.ones((0, 4, 4))))) == 1


@pytest.mark.parametrize("draw", [attention_figure, attention_overlay, attention_animation])
def test_characters_that_the_font_lacks_are_drawn_as_boxes(draw: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="missing from font"):
        drawn = draw(white_image(9, 9), ["犬"], MAPS[:1])
        if draw is attention_figure:
            drawn.savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda image: attention_figure(image, ["a", "dog"], np.ones((3, 4, 4))), r"\(3, 4, 4\) for 2 words"),
        (lambda image: attention_figure(image, ["a"], np.ones((1, 16))), r"\(1, 16\) for 1 words"),
        (lambda image: attention_overlay(image, ["a"], MAPS), r"\(5, 4, 4\) for 1 words"),
        (lambda image: attention_animation(image, ["a"], MAPS), r"\(5, 4, 4\) for 1 words"),
        (lambda image: overlay(["cat"]), "no word 'cat'; choose among its words, two, dogs"),
        (lambda image: overlay([5]), "no word 5; .* indices, 0 to 4"),
        (lambda image: captions_figure([image], []), "1 images and 0 captions"),
        (lambda image: captions_figure([], []), "0 images and 0 captions"),
    ],
)
def test_wrong_arguments(draw: Callable[[Image.Image], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(white_image(9, 9))


@pytest.mark.parametrize(
    ("box", "expected_box", "expected_weights"),
    [
        ((0.25, 0.0, 1.25, 1.0), (0.0, 0.0, 1.0, 1.0), [1, 1, 2, 3]),  # one cell too far right
        ((-0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0), [3, 4, 4, 4]),  # two cells too far left
        ((0.125, 0.0, 1.125, 1.0), (0.0, 0.0, 1.0, 1.0), [1, 1.5, 2.5, 3.5]),  # half a cell too far right
        ((0.2, 0.0, 1.1, 1.0), (0.1, 0.0, 1.0, 1.0), [1, 1 + 5 / 9, 2 + 5 / 9, 3 + 5 / 9]),  # smaller than the image
        ((0.1, 0.0, 0.9, 1.0), (0.1, 0.0, 0.9, 1.0), [1, 2, 3, 4]),  # within the image
        ((-0.5, 0.0, 1.5, 1.0), (-0.5, 0.0, 1.5, 1.0), [1, 2, 3, 4]),  # reaching out on both sides
    ],
)
def test_box_that_reaches_out_on_one_side_is_shifted_into_the_image(
    box: Any, expected_box: Any, expected_weights: list[float]
) -> None:
    maps = np.array([[[1.0, 2, 3, 4]] * 3])
    shifted, shifted_box = shift_into_image(maps, box)
    assert shifted_box == pytest.approx(expected_box)
    np.testing.assert_allclose(shifted, [[expected_weights] * 3])
    transposed, transposed_box = shift_into_image(maps.transpose(0, 2, 1), (box[1], box[0], box[3], box[2]))
    np.testing.assert_allclose(transposed.transpose(0, 2, 1), shifted)
    assert transposed_box == pytest.approx((expected_box[1], expected_box[0], expected_box[3], expected_box[2]))
