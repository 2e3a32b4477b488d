"""The built-in data set `shapes`: the same everywhere, and true in every caption and box."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from hf_captioner.data import shapes
from hf_captioner.data.shapes import load_shapes

SYNONYMS = {"big": "large", "little": "small"}
LEFT, TOP, RIGHT, BOTTOM = range(4)
IS_TRUE = {  # whether a relation holds between two boxes
    "left of": lambda a, b: a[RIGHT] < b[LEFT],
    "right of": lambda a, b: a[LEFT] > b[RIGHT],
    **dict.fromkeys(("above", "over"), lambda a, b: a[BOTTOM] < b[TOP]),
    **dict.fromkeys(("below", "under"), lambda a, b: a[TOP] > b[BOTTOM]),
}
SHAPE = "|".join(shapes.SHAPES)


@pytest.fixture(scope="module")
def train() -> Dataset:
    return load_shapes("train", num_images=600)


@pytest.fixture(scope="module")
def rows(train: Dataset) -> list[dict[str, Any]]:
    return as_rows(train)


def as_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Return all columns as plain Python values; each image is its bytes and path."""
    return dataset.with_format("arrow")[:].to_pylist()


def centre(box: Sequence[int]) -> tuple[float, float]:
    return (box[LEFT] + box[RIGHT]) / 2, (box[TOP] + box[BOTTOM]) / 2


def test_columns(train):
    words = dict.fromkeys(("shape", "colour", "size"), Value("string"))
    objects = List({**words, "box": List(Value("int32"))})
    columns = {"image": ImageFeature(), "captions": List(Value("string")), "image_id": Value("string")}
    assert train.features == Features({**columns, "objects": objects})
    assert train[0]["image"].size == (96, 96) and train[0]["image"].mode == "RGB"
    assert train[42]["image_id"] == "shapes-train-00042" and len(set(train["image_id"])) == len(train)


def test_images_and_captions_are_the_same_in_every_process():
    """Check it in a process with another salt of `hash()`."""
    script = "from hf_captioner.data import shapes; print([shapes._row('test', i, 96, seed=3) for i in range(20)])"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    output = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment)
    assert output.strip() == str([shapes._row("test", i, 96, seed=3) for i in range(20)])


def test_seed_and_number_of_images(rows):
    others = as_rows(load_shapes("train", num_images=50, seed=1))
    assert not {row["image"]["bytes"] for row in others} & {row["image"]["bytes"] for row in rows}
    assert as_rows(load_shapes("train", num_images=7)) == rows[:7]
    assert len(load_shapes("validation")) == shapes.NUM_IMAGES["validation"]


def test_scene_is_the_same_at_every_image_size(rows):
    doubled = load_shapes("train", num_images=20, image_size=192)
    assert doubled[0]["image"].size == (192, 192)
    for row, large in zip(rows, doubled, strict=False):
        assert large["captions"] == row["captions"]
        for item, large_item in zip(row["objects"], large["objects"], strict=True):
            assert np.allclose(np.array(large_item["box"]) / 2, item["box"], atol=1.5)


def test_splits_share_no_scene():
    def scenes(split: str, num_images: int, seed: int) -> Iterator[str]:
        """Describe each scene by its objects and by the axis of their relation or the position of a lone object."""
        for row in load_shapes(split, num_images=num_images, seed=seed).remove_columns("image"):
            objects = row["objects"]
            first, last = (np.array(centre(item["box"])) for item in (objects[0], objects[-1]))
            layout = first // 32 if len(objects) == 1 else abs(last - first).argmax()
            yield str(([(o["shape"], o["colour"], o["size"]) for o in objects], layout))

    sets = [set(scenes("train", 800, 0)), set(scenes("validation", 400, 1)), set(scenes("test", 400, 2))]
    assert min(map(len, sets)) > 250 and len(set.union(*sets)) == sum(map(len, sets))


@pytest.mark.parametrize("image_size", [32, 96])
def test_boxes_fit_the_drawn_pixels(image_size):
    rng = random.Random(0)
    for _ in range(150):
        objects, _, background = shapes._sample_scene(rng, "train")
        empty, _ = shapes._draw([], background, image_size)
        _, boxes = shapes._draw(objects, background, image_size)
        for item, box in zip(objects, boxes, strict=True):
            image, _ = shapes._draw([item], background, image_size)
            y, x = (np.array(image) != np.array(empty)).any(axis=-1).nonzero()
            assert np.allclose(box, (x.min(), y.min(), x.max() + 1, y.max() + 1), atol=2), item


def test_boxes_lie_within_the_image_and_apart(rows):
    for row in rows:
        boxes = [item["box"] for item in row["objects"]]
        for left, top, right, bottom in boxes:  # an object at the edge would be cut off
            assert 0 < left < right < 96 and 0 < top < bottom < 96
        if len(boxes) == 2:
            assert any(is_true(*boxes) for is_true in IS_TRUE.values())


def test_objects_have_their_colour_and_size(train):
    colours = {name: np.array(shapes._rgb(h / 360, s, v)) for name, (h, s, v) in shapes.COLOURS.items()}
    for row in train.select(range(200)):
        for item in row["objects"]:
            pixel = row["image"].getpixel(tuple(int(c) for c in centre(item["box"])))
            assert min(colours, key=lambda name: np.abs(colours[name] - pixel).sum()) == item["colour"]
            side = max(item["box"][RIGHT] - item["box"][LEFT], item["box"][BOTTOM] - item["box"][TOP])
            assert item["size"] == ("small" if side < 24 else "large")


def test_captions_are_distinct_and_name_each_object_with_its_size_and_colour(rows):
    for row in rows:
        objects = {item["shape"]: (item["size"], item["colour"]) for item in row["objects"]}
        assert len(objects) == len(row["objects"]) and len(set(row["captions"])) == 5
        for caption in row["captions"]:
            assert re.fullmatch(r"[a-z]+( [a-z]+)+", caption)
            assert set(caption.split()) & set(shapes.SHAPES) == objects.keys()
            named = re.findall(rf"(\w+) (\w+) ({SHAPE})\b", caption)
            named = [(size, colour, shape) for size, colour, shape in named if colour in shapes.COLOURS]
            if looks := re.search(rf"^the ({SHAPE}) .* is (\w+) and (\w+)$", caption):
                named.append((looks[2], looks[3], looks[1]))
            assert {shape: (SYNONYMS.get(size, size), colour) for size, colour, shape in named} == objects


def test_relations_in_captions_are_true(rows):
    seen: Counter[str] = Counter()
    pairs = [row for row in rows if len(row["objects"]) == 2]
    for row in pairs:
        boxes = {item["shape"]: item["box"] for item in row["objects"]}
        for caption in row["captions"]:
            before, relation, after = re.fullmatch(rf"(.*?)({'|'.join(IS_TRUE)})\b(.*)", caption).groups()
            # In "below a x is a y" the subject is y; otherwise it is the last object before the relation.
            subject = (re.findall(SHAPE, before) or re.findall(SHAPE, after))[-1]
            (other,) = boxes.keys() - {subject}
            assert IS_TRUE[relation](boxes[subject], boxes[other]), caption
            along, across = sorted(abs(np.subtract(centre(boxes[subject]), centre(boxes[other]))))[::-1]
            assert across < 0.6 * along
            seen[relation] += 1
    assert seen.keys() == IS_TRUE.keys()


def test_positions_in_captions_are_true(rows):
    third = {"left": 0, "right": 2, "top": 0, "bottom": 2}
    seen = set()
    loners = [row for row in rows if len(row["objects"]) == 1]
    for row in loners:
        position = [int(c // 32) for c in centre(row["objects"][0]["box"])]
        for caption in row["captions"]:
            x = [third[word] for word in caption.split() if word in ("left", "right")] or [1]
            y = [third[word] for word in caption.split() if word in ("top", "bottom")] or [1]
            assert [*x, *y] == position, caption
            assert ("middle" in caption) == (position == [1, 1]) and ("corner" in caption) == (1 not in position)
        seen.add(tuple(position))
    assert len(seen) == 9 and 0.1 < len(loners) / len(rows) < 0.3


def test_attributes_occur_about_equally_often(rows):
    for attribute, known in (("shape", shapes.SHAPES), ("colour", shapes.COLOURS), ("size", shapes.SIZES)):
        seen = Counter(item[attribute] for row in rows for item in row["objects"])
        assert seen.keys() == known.keys() and min(seen.values()) > 0.7 * max(seen.values())


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="num_images is 0"):
        load_shapes("train", num_images=0)
    with pytest.raises(ValueError, match=r"image_size is 8.*32"):
        load_shapes("train", image_size=8)
