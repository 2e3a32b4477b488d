"""The web page of attention maps: what it holds, and that it is safe and needs no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_captioner.visualization import attention_page
from hf_captioner.visualization.heat import HEAT_COLORS

HOSTILE = '<img src=x onerror="alert(1)">\'"&</script>'
SMALL_IMAGE = Image.new("RGB", (9, 9))


class ParsedPage(HTMLParser):
    """The elements of a page in their order, each as (tag, attributes, pieces of text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.elements[-1][2].append(data)

    def find(self, tag: str, class_name: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        """Return attributes and text of all elements with a tag, and of a class if one is given."""
        found = [(attributes, "".join(text).strip()) for name, attributes, text in self.elements if name == tag]
        return [element for element in found if class_name in (None, element[0].get("class"))]


def caption(words: list[str], **more: Any) -> dict[str, Any]:
    """Return a caption as the pipeline does, with random maps of 2 x 3 cells."""
    maps = np.random.default_rng(0).random((len(words), 2, 3)).astype(np.float32)
    return {"words": words, "attentions": maps, "box": (0.0, 0.0, 10.0, 10.0), **more}


def decode_map(button: dict[str, str | None]) -> np.ndarray:
    """Return the map of a word's button as bytes `(rows, columns)`."""
    cells = np.frombuffer(base64.b64decode(str(button["data-map"])), np.uint8)
    return cells.reshape(int(str(button["data-rows"])), int(str(button["data-columns"])))


def test_page_holds_images_captions_maps_and_colours() -> None:
    images = [Image.new("RGB", (1000, 500), "navy"), Image.new("RGB", (20, 40), "gold")]
    first = caption(["a", "dog"], box=(-100.0, 0.0, 1100.0, 250.0), word_scores=[math.log(0.25), math.nan])
    results = [[first, caption(["two", "dogs", "run"])], [caption(["sun"])]]
    page = ParsedPage(attention_page(images, results, ["one.jpg", "two.jpg"], title="Dogs & suns"))

    shown = page.find("img")
    sources = [Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1]))) for image, _ in shown]
    assert [image.size for image in sources] == [(640, 320), (20, 40)]
    assert [image["alt"] for image, _ in shown] == ["a dog", "sun"]
    assert page.find("canvas")[0][0]["data-box"] == "-10.000 0.000 110.000 50.000"
    assert [group["aria-label"] for group, _ in page.find("div", "caption")] == ["a dog", "two dogs run", "sun"]

    words = page.find("button")
    assert [text for _, text in words] == ["a", "dog", "two", "dogs", "run", "sun"]
    assert [button["tabindex"] for button, _ in words] == ["0", "-1", "0", "-1", "-1", "0"]  # Tab stops once a caption
    assert [button.get("data-probability") for button, _ in words] == ["0.2500", *[None] * 5]
    assert [button["title"] for button, _ in words[:2]] == ["a: probability 25.0%", "dog"]
    for (button, _), weights in zip(words[:2], first["attentions"], strict=True):
        expected = 255 * (weights - weights.min()) / (weights.max() - weights.min())
        np.testing.assert_allclose(decode_map(button), expected, atol=0.51)
    assert page.find("title")[0][1] == "Dogs & suns"
    colors = json.loads(str(page.find("body")[0][0]["data-heat"]))["colors"]
    assert [(stop, tuple(color)) for stop, color in colors] == list(HEAT_COLORS)


def test_box_that_reaches_out_on_one_side_is_shifted_into_the_image() -> None:
    maps = np.array([[[0.0, 1, 0, 0]] * 2])
    result = caption(["dog"], attentions=maps, box=(1.5, 0.0, 13.5, 12.0))  # half a cell of 3 pixels to the right
    page = ParsedPage(attention_page([Image.new("RGB", (12, 12))], [[result]]))
    assert page.find("canvas")[0][0]["data-box"] == "0.000 0.000 100.000 100.000"
    assert decode_map(page.find("button")[0][0]).tolist() == [[0, 255, 255, 0]] * 2


def test_words_names_and_titles_are_escaped() -> None:
    page = ParsedPage(attention_page([SMALL_IMAGE], [[caption([HOSTILE, "犬"])]], [HOSTILE], title=HOSTILE))
    assert len(page.find("script")) == len(page.find("img")) == 1
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert [(button["title"], text) for button, text in page.find("button")] == [(HOSTILE, HOSTILE), ("犬", "犬")]
    assert page.find("div", "name")[0][1] == page.find("h1")[0][1] == HOSTILE
    assert page.find("img")[0][0]["alt"] == page.find("div", "caption")[0][0]["aria-label"] == f"{HOSTILE} 犬"


def test_page_needs_no_network_and_its_policy_allows_only_its_own_style_and_script() -> None:
    page = attention_page([SMALL_IMAGE], [[caption(["dog"])]])
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image, _ in ParsedPage(page).find("img"))
    policy = str(ParsedPage(page).find("meta")[1][0]["content"])
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "style=" not in page  # the policy would forbid it


def test_page_of_the_results_of_the_pipeline(
    captioner_folder: Any, photos: list[Image.Image], photo_files: list[Any]
) -> None:
    from transformers import pipeline

    captioner = pipeline("image-captioning", model=captioner_folder, device="cpu")
    results = captioner(photos[:2], return_attentions=True, return_scores=True, num_return_sequences=2)
    page = attention_page(photo_files[:2], results, ["0.png", "1.png"])
    words = [word for result in results for caption in result for word in caption["words"]]
    assert [text for _, text in ParsedPage(page).find("button")] == words
    assert len(page) < 40_000


def test_page_without_words_and_page_without_images() -> None:
    page = ParsedPage(attention_page([SMALL_IMAGE], [[caption([])]], ["sky.png"]))
    assert not page.find("button") and len(page.find("figure")) == 1
    assert not ParsedPage(attention_page([], [])).find("figure")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "1 images, 0 results and 1 names"),
        ([[{"generated_text": "a dog"}]], "no 'words'; call the pipeline with return_attentions=True"),
        ([[{"words": ["a"], "attentions": np.ones((2, 3, 3))}]], r"\(2, 3, 3\) for 1 words"),
    ],
)
def test_wrong_results(results: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_page([SMALL_IMAGE], results)
