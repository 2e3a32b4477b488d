from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_captioner.data.shapes import load_shapes
from hf_captioner.evaluation.pointing import PointingGame, mentions, point

ROOT = Path(__file__).resolve().parents[1]

# On an image of 80 x 40 pixels with maps of 4 x 8 cells, a cell is 10 pixels wide and high.
MAP_BOX = (0.0, 0.0, 80.0, 40.0)
RED_CIRCLE = {"shape": "circle", "colour": "red", "size": "small", "box": [10, 10, 20, 20]}
RED_STAR = {"shape": "star", "colour": "red", "size": "large", "box": [40, 0, 70, 30]}
BLUE_STAR = {"shape": "star", "colour": "blue", "size": "large", "box": [0, 0, 40, 40]}


def looking_at(row: int, column: int) -> np.ndarray:
    weights = np.full((4, 8), 0.5 / 31)
    weights[row, column] = 0.5
    return weights


@pytest.mark.parametrize(
    ("caption", "objects", "expected"),
    [
        ("a small red circle", [RED_CIRCLE, BLUE_STAR], [("red", {0}), ("circle", {0})]),
        ("a blue star above a circle", [RED_CIRCLE, BLUE_STAR], [("blue", {1}), ("star", {1}), ("circle", {0})]),
        ("the circle is little and red", [RED_CIRCLE, BLUE_STAR], [("circle", {0}), ("red", {0})]),
        # Both are red: the noun tells them apart; without one, either may be meant.
        ("a big red star", [RED_CIRCLE, RED_STAR], [("red", {1}), ("star", {1})]),
        ("the star above a circle is red", [RED_CIRCLE, RED_STAR], [("star", {1}), ("circle", {0}), ("red", {0, 1})]),
        # Two stars: size or colour tells them apart.
        ("the red star left of the blue star", [RED_STAR, BLUE_STAR], [("red", {0}), ("star", {0}), ("blue", {1}), ("star", {1})]),
        ("a star", [RED_STAR, BLUE_STAR], [("star", {0, 1})]),
        ("a large star", [RED_STAR, BLUE_STAR], [("star", {0, 1})]),
        ("a small star", [RED_STAR, {**BLUE_STAR, "size": "small"}], [("star", {1})]),
        # An object that is absent, or has another colour: each word counts on its own.
        ("a green heart", [RED_CIRCLE, BLUE_STAR], [("green", set()), ("heart", set())]),
        ("a blue circle", [RED_CIRCLE, BLUE_STAR], [("blue", {1}), ("circle", {0})]),
        ("it is in the middle", [RED_CIRCLE], []),
        ("", [RED_CIRCLE], []),
    ],
)  # fmt: skip
def test_words_name_objects(caption: str, objects: list[Any], expected: list[Any]) -> None:
    words = caption.split()
    assert [(words[m.position], set(m.objects)) for m in mentions(words, objects)] == expected


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_reference_caption_names_its_objects(split: str) -> None:
    for row in load_shapes(split, num_images=60):
        for caption in row["captions"]:
            named = [m for m in mentions(caption.split(), row["objects"]) if m.attribute == "shape"]
            assert sorted(m.objects for m in named) == [(index,) for index in range(len(row["objects"]))]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 7), (3, 0), (2, 5)])
def test_peak_is_the_middle_of_the_heaviest_cell(row: int, column: int) -> None:
    x, y = 10 * column + 5, 10 * row + 5
    weights = looking_at(row, column)
    assert point(weights, MAP_BOX, (x - 1, y - 1, x + 1, y + 1)).hit
    for box in [(x + 1, y - 1, x + 3, y + 1), (x - 3, y - 1, x - 1, y + 1), (x - 1, y + 1, x + 1, y + 3)]:
        assert not point(weights, MAP_BOX, box).hit


def test_peak_lies_between_cells_of_equal_weight() -> None:
    weights = looking_at(1, 1)
    weights[1, 2] = weights[1, 1] - 1e-6
    assert point(weights, MAP_BOX, (19, 14, 21, 16)).hit  # their common border
    assert not point(weights, MAP_BOX, (19, 14, 21, 16)).cell_hit and point(weights, MAP_BOX, (14, 14, 16, 16)).cell_hit


def test_fractions_of_weight_and_of_area() -> None:
    pointing = point(looking_at(1, 1), MAP_BOX, (10, 10, 20, 25))  # that cell, and half of the one below
    assert pointing.weight_inside == pytest.approx(0.5 + 0.5 * 0.5 / 31)
    assert pointing.area_inside == pytest.approx(1.5 / 32)
    assert point(np.ones((4, 8)), MAP_BOX, (3, 5, 31, 22)).weight_inside == pytest.approx(28 * 17 / (80 * 40))


def test_maps_that_cover_a_part_of_the_image() -> None:
    map_box = (20.0, 10.0, 60.0, 30.0)  # cells of 5 x 5 pixels
    pointing = point(looking_at(3, 0), map_box, (0, 26, 23, 40))  # exceeds the part of the image that the map covers
    assert pointing.hit and pointing.area_inside == pytest.approx(3 * 4 / (40 * 20))
    assert not point(looking_at(0, 0), map_box, (0, 26, 23, 40)).hit


def test_scores_of_maps_that_are_right_and_of_maps_that_are_off_by_one_step() -> None:
    words = ["a", "blue", "star", "and", "a", "red", "circle", "on", "green"]
    star, circle, nowhere = looking_at(1, 2), looking_at(1, 1), looking_at(3, 7)
    maps = np.stack([nowhere, star, star, nowhere, nowhere, circle, circle, nowhere, star])
    blue_star = {**BLUE_STAR, "box": [20, 10, 40, 40]}
    game = PointingGame()
    game.add(words, maps, MAP_BOX, [RED_CIRCLE, blue_star])
    assert game.scores()["shape"] == pytest.approx({
        "accuracy": 1, "cell_accuracy": 1, "chance": (6 + 1) / 32 / 2, "weight_inside": (0.5 + 5 * 0.5 / 31 + 0.5) / 2,
        "accuracy_map_before": 1, "accuracy_map_after": 0, "words": 2, "absent": 0, "skipped": 0,
    })  # fmt: skip
    colour = game.scores()["colour"]  # no object is green
    assert colour["accuracy"] == pytest.approx(2 / 3) and colour["chance"] == pytest.approx(7 / 32 / 3)
    assert (colour["words"], colour["absent"], colour["skipped"]) == (3, 1, 0)
    assert (colour["accuracy_map_before"], colour["accuracy_map_after"]) == (0, 1)

    game.add(["star"], maps[:1], MAP_BOX, [RED_STAR, BLUE_STAR])
    assert game.scores()["shape"]["skipped"] == 1 and game.scores()["shape"]["words"] == 2


def test_no_words_no_accuracy() -> None:
    assert math.isnan(PointingGame().scores()["shape"]["accuracy"])


def test_script(captioner_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "results" / "pointing.json"
    arguments = [captioner_folder, "--max_images", 6, "--num_beams", 2, "--output", file, "--device", "cpu"]
    command = [sys.executable, ROOT / "benchmarks" / "pointing.py", *arguments]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(file.read_text())
    assert result["protocol"] == "shapes, validation, 6 images, 2 beams, maps of 4x4"
    assert {"accuracy", "chance", "weight_inside", "words"} <= result["shape"].keys() & result["colour"].keys()
    assert "words for a shape" in run.stdout
