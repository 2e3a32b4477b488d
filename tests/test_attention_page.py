from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_captioner.model.pipeline_captioner import ImageCaptioningPipeline
from hf_captioner.visualization.page import EDGE, attention_page

EVIL = '<img src=x onerror="alert(1)">\'"&</script>'


class Parsed(HTMLParser):
    """Elements in their order, each as (tag, attributes, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]


def caption(words: list[str], **more: Any) -> dict[str, Any]:
    maps = np.random.default_rng(0).random((len(words), 2, 3)).astype(np.float32)
    return {"words": words, "attentions": maps, "box": (0.0, 0.0, 10.0, 10.0), **more}


def test_page_holds_captions_maps_and_photographs() -> None:
    photos = [Image.new("RGB", (1000, 500), "navy"), Image.new("RGB", (20, 40), "gold")]
    first = caption(["a", "dog"], box=(-100.0, 0.0, 1100.0, 250.0), word_scores=[math.log(0.25), math.nan])
    results = [[first, caption(["two", "dogs", "run"])], [caption(["sun"])]]
    page = Parsed(attention_page(photos, results, ["one.jpg", "two.jpg"], title="Dogs & suns"))

    images = [Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1]))) for image, _ in page.all("img")]
    assert [image.size for image in images] == [(EDGE, EDGE // 2), (20, 40)]
    assert [image["alt"] for image, _ in page.all("img")] == ["a dog", "sun"]
    assert page.all("canvas")[0][0]["data-box"] == "-10.000 0.000 110.000 50.000"

    words = page.all("button")
    assert [text.strip() for _, text in words] == ["a", "dog", "two", "dogs", "run", "sun"]
    assert [button["tabindex"] for button, _ in words] == ["0", "-1", "0", "-1", "-1", "0"]  # one stop a caption
    assert [button.get("data-probability") for button, _ in words] == ["0.2500", *[None] * 5]
    assert words[0][0]["title"] == "a: probability 25.0%" and words[1][0]["title"] == "dog"
    for (button, _), weights in zip(words[:2], first["attentions"], strict=True):
        light = np.frombuffer(base64.b64decode(str(button["data-map"])), np.uint8)
        assert (button["data-rows"], button["data-columns"]) == ("2", "3")
        expected = 255 * (weights - weights.min()) / (weights.max() - weights.min())
        np.testing.assert_allclose(light.reshape(2, 3), expected, atol=0.51)
    assert page.all("title")[0][1].strip() == "Dogs & suns"


def test_a_grid_that_looks_past_its_places_leaves_no_strip_bare() -> None:
    photo = Image.new("RGB", (12, 12))
    row = [0.0, 1.0, 0.0, 0.0]
    told = {"words": ["dog"], "attentions": np.array([[row] * 2], dtype=np.float32), "box": (1.5, 0.0, 13.5, 12.0)}
    page = Parsed(attention_page([photo], [[told]]))
    assert page.all("canvas")[0][0]["data-box"] == "0.000 0.000 100.000 100.000"
    light = np.frombuffer(base64.b64decode(str(page.all("button")[0][0]["data-map"])), np.uint8)
    assert light.reshape(2, 4).tolist() == [[0, 255, 255, 0]] * 2  # the cells are 3 pixels wide, and looked 1.5 further


def test_nothing_given_becomes_markup() -> None:
    page = attention_page([Image.new("RGB", (9, 9))], [[caption([EVIL, "dog"])]], [EVIL], title=EVIL)
    parsed = Parsed(page)
    assert len(parsed.all("script")) == len(parsed.all("img")) == 1
    assert not [name for _, attributes, _ in parsed.elements for name in attributes if name.startswith("on")]
    assert parsed.all("button")[0] == (parsed.all("button")[0][0] | {"title": EVIL}, EVIL)
    assert [text.strip() for attributes, text in parsed.all("div") if attributes.get("class") == "name"] == [EVIL]
    assert parsed.all("img")[0][0]["alt"] == f"{EVIL} dog" and parsed.all("h1")[0][1].strip() == EVIL


def test_page_needs_nothing_from_elsewhere() -> None:
    page = attention_page([Image.new("RGB", (9, 9))], [[caption(["dog"])]])
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image, _ in Parsed(page).all("img"))
    policy = str(Parsed(page).all("meta")[1][0]["content"])
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "style=" not in page  # which the policy would forbid


def test_page_of_what_the_pipeline_gives(
    captioner_folder: Any, photos: list[Image.Image], photo_files: list[Any]
) -> None:
    from transformers import pipeline

    captioner: ImageCaptioningPipeline = pipeline("image-captioning", model=captioner_folder, device="cpu")
    results = captioner(photos[:2], return_attentions=True, return_scores=True, num_return_sequences=2)
    page = attention_page(photo_files[:2], results, ["0.png", "1.png"])
    words = [word for result in results for caption in result for word in caption["words"]]
    assert [text.strip() for _, text in Parsed(page).all("button")] == words
    assert len(page) < 40_000


def test_no_captions_and_no_images() -> None:
    empty = Parsed(attention_page([Image.new("RGB", (9, 9))], [[caption([])]], ["sky.png"]))
    assert not empty.all("button") and len(empty.all("figure")) == 1
    assert not Parsed(attention_page([], [])).all("figure")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "1 images, 0 results and 1 names"),
        ([[{"generated_text": "a dog"}]], "no words; call the pipeline with return_attentions=True"),
        ([[{"words": ["a"], "attentions": np.ones((2, 3, 3))}]], r"\(2, 3, 3\) for 1 words"),
    ],
)
def test_errors(results: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_page([Image.new("RGB", (9, 9))], results)
