from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.font_manager import get_font
from PIL import Image

from hf_captioner.visualization import fonts
from hf_captioner.visualization.figures import SCORES, attention_figure, captions_figure, curves_figure
from hf_captioner.visualization.fonts import families, font_file

WORDS = ["a", "dog", "$x$"]  # the last is no formula


def pixels(figure: Any) -> np.ndarray:
    """A figure as it is saved: `(H, W, 3)`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def pictures(figure: Any) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def peak(row: int, column: int) -> np.ndarray:
    """A map of 4x4 cells with most of its weight in one."""
    weights = np.full((4, 4), 0.02)
    weights[row, column] = 0.7
    return weights


def brightest(picture: np.ndarray) -> tuple[float, float]:
    """Where a map lights a white photograph up most, in parts of its height and width."""
    light = picture.mean(-1)
    rows, columns = np.nonzero(light > 0.95 * light.max())
    return (rows.mean() + 0.5) / light.shape[0], (columns.mean() + 0.5) / light.shape[1]


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (40, 30)], ids=["landscape", "portrait", "small"])
@pytest.mark.parametrize("box", [None, (0.0, 0.0, 1.0, 1.0), (0.2, 0.4, 0.6, 0.8), (-0.5, -0.5, 1.5, 1.5)])
def test_light_falls_where_the_model_looked(size: tuple[int, int], box: tuple[float, ...] | None) -> None:
    width, height = size
    left, top, right, bottom = box or (0, 0, 1, 1)
    scaled = box and (left * width, top * height, right * width, bottom * height)
    white = Image.new("RGB", size, "white")
    original, picture = pictures(attention_figure(white, ["dog"], peak(1, 2)[None], scaled))
    assert original.min() == 1 and picture.max() > 0.95 and picture.min() < 0.4
    assert picture.shape[1] / picture.shape[0] == pytest.approx(width / height, rel=0.02)
    expected = top + (bottom - top) * 0.375, left + (right - left) * 0.625  # the middle of that cell
    assert brightest(picture) == pytest.approx(expected, abs=0.02)


def test_what_the_model_could_not_see_is_dim() -> None:
    _, picture = pictures(
        attention_figure(Image.new("RGB", (40, 30), "white"), ["a"], np.ones((1, 2, 2)), (10, 0, 30, 30))
    )
    assert picture[:, :70].max() < 0.4 and picture[:, 80:220].min() == 1 and picture[:, 230:].max() < 0.4


def test_photograph_is_shown_as_it_is(photos: list[Image.Image]) -> None:
    figure = attention_figure(photos[0], WORDS, np.full((3, 4, 4), 1 / 16))
    original, *panels = pictures(figure)
    expected = np.asarray(photos[0].resize((original.shape[1], original.shape[0]), Image.Resampling.LANCZOS)) / 255
    np.testing.assert_allclose(original, expected, atol=1e-6)
    for panel in panels:  # equal attention everywhere
        np.testing.assert_allclose(panel, expected, atol=1e-6)
    assert [axes.get_title() for axes in figure.axes] == ["", *WORDS]
    for axes, picture in zip(figure.axes, [original, *panels], strict=True):
        shown = axes.get_window_extent()
        assert shown.width / shown.height == pytest.approx(picture.shape[1] / picture.shape[0], rel=0.01)


@pytest.mark.parametrize("count", [0, 1, 4, 12, 30])
def test_panels_stand_apart_on_the_page(photos: list[Image.Image], count: int) -> None:
    figure = attention_figure(photos[1], ["skateboarding"] * count, np.ones((count, 2, 2)))
    page = figure.bbox
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]  # with their titles
    assert len(boxes) == count + 1
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert min(box.x1, other.x1) <= max(box.x0, other.x0) or min(box.y1, other.y1) <= max(box.y0, other.y0)


def test_captions_stand_beneath_their_photographs(photos: list[Image.Image]) -> None:
    captions = [f"photograph {n} " + "of a dog that jumps over a bench " * n for n in range(5)]
    figure = captions_figure(photos, captions, columns=3)
    figure.canvas.draw()
    for axes, photo, caption in zip(figure.axes, photos, captions, strict=True):
        (text,) = axes.texts
        shown, words = axes.get_window_extent(), text.get_window_extent()
        assert shown.width / shown.height == pytest.approx(photo.width / photo.height, rel=0.02)
        assert text.get_text().split() == caption.split()
        assert words.y1 <= shown.y0 and words.y0 >= 0
        assert words.x0 >= 0 and words.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    "epochs",
    [
        [],
        [{"epoch": 1, "loss": 3.0}],
        [{"epoch": 1, "loss": 3.0, "bleu_4": 0.1}, {"epoch": 2, "loss": 2.0, "cider": 0.4, "learning_rate": 1e-3}],
        [{"epoch": 1, "bleu_4": 0.2, "cider": None}],
    ],
)
def test_curves_of_what_was_measured(epochs: list[dict[str, Any]]) -> None:
    figure = curves_figure(epochs)
    left, right = figure.axes
    losses = [(record["epoch"], record["loss"]) for record in epochs if "loss" in record]
    assert [tuple(point) for point in left.lines[0].get_xydata()] == losses
    labelled = {line.get_label().split()[0]: line for line in right.lines if not line.get_label().startswith("_")}
    measured = {name for record in epochs for name, value in record.items() if name in SCORES and value is not None}
    assert labelled.keys() == {SCORES[name][0] for name in measured}
    assert pixels(figure).std() > 1


def test_best_epoch_is_named_and_marked() -> None:
    values = [0.1, 0.25, 0.2]
    right = curves_figure([{"epoch": n, "bleu_4": value} for n, value in enumerate(values, 1)]).axes[1]
    assert right.get_legend().get_texts()[0].get_text() == "BLEU-4  0.250"
    assert [2.0, 0.25] in [line.get_xydata().tolist()[0] for line in right.lines if len(line.get_xydata()) == 1]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda photo: attention_figure(photo, ["a", "dog"], np.ones((3, 4, 4))), r"\(3, 4, 4\) for 2 words"),
        (lambda photo: attention_figure(photo, ["a"], np.ones((1, 16))), r"\(1, 16\) for 1 words"),
        (lambda photo: captions_figure([photo], []), "1 images and 0 captions"),
        (lambda photo: captions_figure([], []), "0 images and 0 captions"),
    ],
)
def test_errors(photos: list[Image.Image], draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(photos[0])


def test_neither_import_nor_figures_load_pyplot() -> None:
    code = (
        "import sys; import hf_captioner.visualization.figures as v; assert 'matplotlib' not in sys.modules; "
        "v.curves_figure([{'epoch': 1, 'loss': 1.0}]).savefig(sys.stdout.buffer, format='png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    png = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=300).stdout
    assert math.prod(Image.open(io.BytesIO(png)).size) > 10_000


def test_a_font_that_has_the_characters_is_asked(monkeypatch):
    def named(file):
        return get_font(file).family_name

    assert (
        families()[0] == "DejaVu Sans"
        and named(font_file("a dog, \u0441\u043e\u0431\u0430\u043a\u0430")) == "DejaVu Sans"
    )
    # A font of mathematical letters stands for one of another script: it comes with matplotlib.
    monkeypatch.setattr(fonts, "FAMILIES", ("DejaVu Sans", "No Such Font", "STIXNonUnicode"))
    assert families() == ["DejaVu Sans", "STIXNonUnicode"]
    assert named(font_file("\ue000\ue001 a")) == "STIXNonUnicode"
