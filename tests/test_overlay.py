from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_captioner.visualization.maps import settled
from hf_captioner.visualization.overlay import ANIMATION, PICTURE, PLAIN, STEADY, attention_animation, attention_overlay

WORDS = ["two", "dogs", "on", "two", "боты"]


def peak(row: int, column: int) -> np.ndarray:
    """A map of 4x4 cells with most of its weight in one."""
    weights = np.full((4, 4), 0.02)
    weights[row, column] = 0.7
    return weights


MAPS = np.stack([peak(0, 0), peak(1, 2), peak(3, 3), peak(3, 0), peak(0, 3)])


def heat(picture: Image.Image, edge: int, size: tuple[int, int]) -> tuple[float, float]:
    """Where the photograph, a white one of this shape, is least white, in parts of its height and width."""
    width, height = (round(edge * length / max(size)) for length in size)
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    left, top = ((picture.width - width) // 2, (picture.width - max(width, round(0.75 * height))) // 2)
    blue = pixels[top : top + height, left : left + width, 2]  # heat has no blue where it is greatest
    cold = np.where(pixels[top : top + height, left : left + width, 0] > 200, blue, 255)
    rows, columns = np.nonzero(cold < cold.min() + 3)
    return (rows.mean() + 0.5) / height, (columns.mean() + 0.5) / width


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (40, 30), (30, 200)])
@pytest.mark.parametrize("box", [None, (0.2, 0.2, 0.8, 1.0)])
def test_heat_lies_where_the_model_looked(size: tuple[int, int], box: tuple[float, ...] | None) -> None:
    left, top, right, bottom = box or (0, 0, 1, 1)
    given = box and (left * size[0], top * size[1], right * size[0], bottom * size[1])
    picture = attention_overlay(Image.new("RGB", size, "white"), WORDS[1:2], MAPS[1:2], given)
    expected = top + (bottom - top) * 0.375, left + (right - left) * 0.625  # the middle of that cell
    assert heat(picture, PICTURE, size) == pytest.approx(expected, abs=0.06)


def overlay(chosen: list[str | int] | None, words: list[str] = WORDS, maps: np.ndarray = MAPS) -> np.ndarray:
    return np.asarray(attention_overlay(Image.new("RGB", (60, 60), "white"), words, maps, chosen=chosen), dtype=int)


def test_words_are_chosen_by_name_or_place() -> None:
    np.testing.assert_array_equal(overlay(["two"]), overlay([0, 3]))
    np.testing.assert_array_equal(overlay([1]), overlay(["dogs"]))
    assert np.abs(overlay([0]) - overlay(["two"])).max() > 50
    # The whole caption is the mean of all maps, and none of its words is marked.
    everything = overlay(None)
    np.testing.assert_array_equal(everything[:PICTURE], overlay(list(range(5)))[:PICTURE])
    mean = overlay(None, maps=np.stack([MAPS.mean(0)] * 5))
    np.testing.assert_allclose(everything, mean, atol=1)
    assert np.abs(everything - overlay(list(range(5))))[PICTURE + 40 :].max() > 50


def test_caption_stands_beneath_and_fits() -> None:
    words = ["caption"] * 30 + ["supercalifragilistic"]
    for size in [(400, 300), (30, 300)]:
        page = np.asarray(attention_overlay(Image.new("RGB", size, "white"), words, np.ones((31, 2, 2))))
        written = page.min(-1) < 128
        assert written.any() and not written[:, :5].any() and not written[:, -5:].any() and not written[-5:].any()


@pytest.mark.parametrize("maps", [np.ones((2, 4, 4)), np.zeros((2, 4, 4))], ids=["even", "zero"])
def test_map_without_differences_leaves_the_photograph_as_it_is(maps: np.ndarray) -> None:
    assert overlay(None, ["a", "dog"], maps)[30:PICTURE].min() == 255
    assert overlay(None, [], maps[:0])[30:PICTURE].min() == 255


@pytest.mark.parametrize("size", [(200, 150), (90, 160)])
def test_animation_shows_a_map_a_word(size: tuple[int, int]) -> None:
    gif = Image.open(io.BytesIO(attention_animation(Image.new("RGB", size, "white"), WORDS, MAPS)))
    assert gif.info["loop"] == 0 and gif.n_frames > 2 * len(WORDS)
    still = []
    for frame in range(gif.n_frames):
        gif.seek(frame)
        if gif.info["duration"] >= STEADY:
            still.append((gif.info["duration"], gif.convert("RGB")))
    durations, pictures = zip(*still, strict=True)
    assert durations == (PLAIN, *[STEADY] * len(WORDS))
    for picture, (row, column) in zip(pictures[1:], [(0, 0), (1, 2), (3, 3), (3, 0), (0, 3)], strict=True):
        found = heat(picture, ANIMATION, size)
        assert (int(4 * found[0]), int(4 * found[1])) == (row, column)


def test_animation_is_small_and_true_to_the_photograph(photos: list[Image.Image]) -> None:
    data = attention_animation(photos[0], WORDS, MAPS)
    assert len(data) < 1_000_000
    gif = Image.open(io.BytesIO(data)).convert("RGB")
    overlaid = attention_overlay(photos[0], [], MAPS[:0])
    photo = overlaid.resize(gif.size).crop((40, 40, 300, 200))
    difference = np.asarray(gif.crop((40, 40, 300, 200)), dtype=float) - np.asarray(photo, dtype=float)
    assert np.abs(difference).mean() < 12


def test_animation_of_no_words() -> None:
    assert Image.open(io.BytesIO(attention_animation(Image.new("RGB", (60, 40)), [], np.ones((0, 4, 4))))).width > 100


@pytest.mark.parametrize(
    ("words", "chosen", "message"),
    [
        (["a"], None, r"\(5, 4, 4\) for 1 words"),
        (WORDS, ["cat"], "no word 'cat'; choose among its words, two, dogs"),
        (WORDS, [5], "no word 5; .* places, 0 to 4"),
    ],
)
def test_errors(words: list[str], chosen: list[str | int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(chosen, words)
    if chosen is None:
        with pytest.raises(ValueError, match=message):
            attention_animation(Image.new("RGB", (60, 60)), words, MAPS)


@pytest.mark.parametrize(
    ("box", "expected", "columns"),
    [
        (
            (0.25, 0.0, 1.25, 1.0),
            (0.0, 0.0, 1.0, 1.0),
            [1, 1, 2, 3],
        ),  # a cell further right: the first covers the strip
        ((-0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0), [3, 4, 4, 4]),
        ((0.125, 0.0, 1.125, 1.0), (0.0, 0.0, 1.0, 1.0), [1, 1.5, 2.5, 3.5]),
        ((0.2, 0.0, 1.1, 1.0), (0.1, 0.0, 1.0, 1.0), [1, 1 + 5 / 9, 2 + 5 / 9, 3 + 5 / 9]),  # no more than reaches out
        ((0.1, 0.0, 0.9, 1.0), (0.1, 0.0, 0.9, 1.0), [1, 2, 3, 4]),  # the middle of the image
        ((-0.5, 0.0, 1.5, 1.0), (-0.5, 0.0, 1.5, 1.0), [1, 2, 3, 4]),  # all of it, and padding
    ],
)
def test_maps_that_reach_out_are_brought_back(box: Any, expected: Any, columns: list[float]) -> None:
    maps = np.array([[[1.0, 2, 3, 4]] * 3])
    moved, moved_box = settled(maps, box)
    assert moved_box == pytest.approx(expected)
    np.testing.assert_allclose(moved, [[columns] * 3])
    upright, upright_box = settled(maps.transpose(0, 2, 1), (box[1], box[0], box[3], box[2]))  # and downwards alike
    np.testing.assert_allclose(upright.transpose(0, 2, 1), moved)
    assert upright_box == pytest.approx((expected[1], expected[0], expected[3], expected[2]))
