from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_captioner.data import shapes
from hf_captioner.data.shapes import load_shapes

datasets = pytest.importorskip("datasets")

SAME_WORDS = {"big": "large", "little": "small"}
LEFT, TOP, RIGHT, BOTTOM = range(4)
TRUE_OF_BOXES = {
    "left of": lambda a, b: a[RIGHT] < b[LEFT],
    "right of": lambda a, b: a[LEFT] > b[RIGHT],
    "above": lambda a, b: a[BOTTOM] < b[TOP],
    "over": lambda a, b: a[BOTTOM] < b[TOP],
    "below": lambda a, b: a[TOP] > b[BOTTOM],
    "under": lambda a, b: a[TOP] > b[BOTTOM],
}
SHAPE = "|".join(shapes.SHAPES)


@pytest.fixture(scope="module")
def train():
    return load_shapes("train", num_images=600)


@pytest.fixture(scope="module")
def rows(train):
    """All columns as plain Python, the images as {"bytes", "path"}."""
    return train.with_format("arrow")[:].to_pylist()


@pytest.fixture(scope="module")
def pairs(rows):
    return [row for row in rows if len(row["objects"]) == 2]


@pytest.fixture(scope="module")
def loners(rows):
    return [row for row in rows if len(row["objects"]) == 1]


def centre(box):
    return (box[LEFT] + box[RIGHT]) / 2, (box[TOP] + box[BOTTOM]) / 2


def test_columns(train):
    assert train.features == datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("string"),
            "objects": datasets.List(
                {
                    **dict.fromkeys(("shape", "colour", "size"), datasets.Value("string")),
                    "box": datasets.List(datasets.Value("int32")),
                }
            ),
        }
    )
    assert train[0]["image"].size == (96, 96)
    assert train[0]["image"].mode == "RGB"
    assert train[42]["image_id"] == "shapes-train-00042"
    assert len(set(train["image_id"])) == len(train)


def test_same_in_another_process():
    """Bytes and captions, under another salt of hash(). The file alone, as importing torch takes seconds."""
    script = "import shapes; print([shapes._row('test', index, 96, seed=3) for index in range(20)])"
    output = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(shapes.__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "1234"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == str([shapes._row("test", index, 96, seed=3) for index in range(20)])


def test_seed_draws_other_images(rows):
    others = load_shapes("train", num_images=50, seed=1).with_format("arrow")[:].to_pylist()
    assert not {row["image"]["bytes"] for row in others} & {row["image"]["bytes"] for row in rows}


def test_fewer_images_are_the_first(rows):
    assert load_shapes("train", num_images=7).with_format("arrow")[:].to_pylist() == rows[:7]


def test_all_images_by_default():
    assert len(load_shapes("validation")) == shapes.NUM_IMAGES["validation"]


def test_scene_is_the_same_at_every_size(rows):
    doubled = load_shapes("train", num_images=20, image_size=192)
    assert doubled[0]["image"].size == (192, 192)
    for row, large in zip(rows, doubled, strict=False):
        assert large["captions"] == row["captions"]
        for item, large_item in zip(row["objects"], large["objects"], strict=True):
            assert np.allclose(np.array(large_item["box"]) / 2, item["box"], atol=1.5)


def test_splits_share_no_scene():
    def scenes(split, num_images, seed):
        """The objects in order, with the axis of their relation or the cell of a lone object."""
        for row in load_shapes(split, num_images=num_images, seed=seed).remove_columns("image"):
            objects = row["objects"]
            first, last = (np.array(centre(item["box"])) for item in (objects[0], objects[-1]))
            where = first // 32 if len(objects) == 1 else abs(last - first).argmax()
            yield str(([(o["shape"], o["colour"], o["size"]) for o in objects], where))

    known = set(scenes("train", 800, seed=0))
    validation, test = set(scenes("validation", 400, seed=1)), set(scenes("test", 400, seed=2))
    assert min(len(known), len(validation), len(test)) > 250
    assert not known & validation
    assert not known & test
    assert not validation & test


@pytest.mark.parametrize("image_size", [32, 96])
def test_boxes_fit_the_drawn_pixels(image_size):
    rng = random.Random(0)
    for _ in range(150):
        scene = shapes._sample_scene(rng, "train")
        background = np.array(shapes._draw(replace(scene, objects=()), image_size)[0])
        _, boxes = shapes._draw(scene, image_size)
        for item, box in zip(scene.objects, boxes, strict=True):
            image, _ = shapes._draw(replace(scene, objects=(item,)), image_size)
            y, x = (np.array(image) != background).any(axis=-1).nonzero()
            drawn = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            assert np.allclose(box, drawn, atol=2), (item, box, drawn)


def test_boxes_in_the_image_and_apart(rows):
    for row in rows:
        boxes = [item["box"] for item in row["objects"]]
        for box in boxes:
            assert 0 < box[LEFT] < box[RIGHT] < 96  # at the edge it would be cut off
            assert 0 < box[TOP] < box[BOTTOM] < 96
        if len(boxes) == 2:
            assert any(true(*boxes) for true in TRUE_OF_BOXES.values())


def test_boxes_show_their_object(train):
    """The middle of a box has the colour it is said to have, and its side the size."""
    for row in train.select(range(200)):
        for item in row["objects"]:
            paint = row["image"].getpixel(tuple(int(c) for c in centre(item["box"])))
            named = {name: np.array(shapes._rgb(h / 360, s, v)) for name, (h, s, v) in shapes.COLOURS.items()}
            assert min(named, key=lambda name: np.abs(named[name] - paint).sum()) == item["colour"]
            side = max(item["box"][RIGHT] - item["box"][LEFT], item["box"][BOTTOM] - item["box"][TOP])
            assert item["size"] == ("small" if side < 24 else "large")


def test_five_distinct_plain_captions(rows):
    for row in rows:
        assert len(set(row["captions"])) == 5
        assert all(re.fullmatch(r"[a-z]+( [a-z]+)+", caption) for caption in row["captions"])


def test_captions_name_every_object_and_nothing_else(rows):
    for row in rows:
        shown = {item["shape"] for item in row["objects"]}
        assert len(shown) == len(row["objects"])
        for caption in row["captions"]:
            assert set(caption.split()) & set(shapes.SHAPES) == shown


def test_captions_tell_true_attributes(rows):
    for row in rows:
        objects = {item["shape"]: (item["size"], item["colour"]) for item in row["objects"]}
        for caption in row["captions"]:
            told = [(*match.groups(),) for match in re.finditer(rf"(\w+) (\w+) ({SHAPE})\b", caption)]
            told = [(size, colour, shape) for size, colour, shape in told if colour in shapes.COLOURS]
            if looks := re.search(rf"^the ({SHAPE}) .* is (\w+) and (\w+)$", caption):
                told.append((looks[2], looks[3], looks[1]))
            assert {shape: (SAME_WORDS.get(size, size), colour) for size, colour, shape in told} == objects


def test_captions_tell_true_relations(pairs):
    seen = Counter()
    for row in pairs:
        boxes = {item["shape"]: item["box"] for item in row["objects"]}
        for caption in row["captions"]:
            before, relation, after = re.fullmatch(rf"(.*?)({'|'.join(TRUE_OF_BOXES)})\b(.*)", caption).groups()
            # "below a x is a y": y; otherwise the last object before the relation is the one it is said of.
            subject = (re.findall(SHAPE, before) or re.findall(SHAPE, after))[-1]
            (other,) = boxes.keys() - {subject}
            assert TRUE_OF_BOXES[relation](boxes[subject], boxes[other]), caption
            along, across = sorted(abs(np.subtract(centre(boxes[subject]), centre(boxes[other]))))[::-1]
            assert across < 0.6 * along
            seen[relation] += 1
    assert seen.keys() == TRUE_OF_BOXES.keys()


def test_captions_tell_true_places(loners):
    third = {"left": 0, "right": 2, "top": 0, "bottom": 2}
    seen = set()
    for row in loners:
        column, row_of_board = (int(c // 32) for c in centre(row["objects"][0]["box"]))
        for caption in row["captions"]:
            x = [third[word] for word in caption.split() if word in ("left", "right")] or [1]
            y = [third[word] for word in caption.split() if word in ("top", "bottom")] or [1]
            assert (x, y) == ([column], [row_of_board]), caption
            assert ("middle" in caption) == ((x, y) == ([1], [1]))
            assert ("corner" in caption) == (1 not in (*x, *y))
        seen.add((column, row_of_board))
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("attribute", "known"), [("shape", shapes.SHAPES), ("colour", shapes.COLOURS), ("size", shapes.SIZES)]
)
def test_all_attributes_occur(rows, attribute, known):
    seen = Counter(item[attribute] for row in rows for item in row["objects"])
    assert seen.keys() == known.keys()
    assert min(seen.values()) > 0.7 * max(seen.values())


def test_most_images_have_two_objects(pairs, loners):
    assert 0.1 < len(loners) / (len(pairs) + len(loners)) < 0.3


@pytest.mark.parametrize(
    ("split", "kwargs", "message"),
    [
        ("dev", {}, "'dev'.*train, validation, test"),
        ("train", {"num_images": 0}, "num_images is 0"),
        ("train", {"image_size": 8}, "image_size is 8.*32"),
    ],
)
def test_errors_say_what_to_do(split, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_shapes(split, **kwargs)
