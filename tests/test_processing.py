"""The processor: images and captions in, pixel values and labels out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from hf_captioner import CaptionerImageProcessor, CaptionerProcessor

END = 3


@pytest.fixture(scope="module")
def images(photos: list[Image.Image]) -> list[Image.Image]:
    return photos[:3]


def ids(processor: CaptionerProcessor, words: str, length: int) -> list[int]:
    """Return the labels of a caption, made without the tokenizer's own template and padding."""
    row = [*processor.tokenizer.convert_tokens_to_ids(words.split()), END]
    return row + [-100] * (length - len(row))


def test_from_captions_passes_everything_on():
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("resnet101").to_dict())
    captions = ["a dog runs", "a dog on the grass", "a cat"]
    processor = CaptionerProcessor.from_captions(captions, {**config, "input_size": (3, 32, 48)}, min_count=2)
    assert processor.image_processor.crop_pct == config["crop_pct"]
    assert processor.image_processor.size == {"height": 32, "width": 48}
    assert processor.tokenizer.convert_ids_to_tokens(range(4, len(processor.tokenizer))) == ["a", "dog"]


def test_images_or_text_alone(processor, images):
    batch = processor(images)
    assert set(batch) == {"pixel_values"} and batch.pixel_values.shape == (3, 3, 64, 64)
    assert torch.equal(batch.pixel_values, processor.image_processor(images).pixel_values)
    assert set(processor(text=["a dog"])) == {"labels", "input_ids", "attention_mask"}


def test_one_caption_for_each_image(processor, images):
    batch = processor(images=images, text=["A dog plays.", "the man", "a zebra on the beach"])
    assert set(batch) == set(processor.model_input_names)
    assert batch.labels.dtype == torch.int64
    expected = ["a dog plays", "the man", "a zebra on the beach"]
    assert batch.labels.tolist() == [ids(processor, caption, length=6) for caption in expected]
    assert batch.labels[2, 1] == processor.tokenizer.unk_token_id
    for text in ("a dog", ["a dog"]):
        one = processor(images[0], text)
        assert one.pixel_values.shape == (1, 3, 64, 64) and one.labels.shape == (1, 3)
    as_numpy = processor(images, ["a dog"] * 3, return_tensors="np")
    assert type(as_numpy.pixel_values) is type(as_numpy.labels) is np.ndarray and as_numpy.labels.dtype == np.int64


def test_several_captions_for_each_image(processor, images):
    batch = processor(images, [["a dog plays", "a dog"], ["the man"], []])
    missing = [-100] * 4
    assert batch.labels.tolist() == [
        [ids(processor, "a dog plays", 4), ids(processor, "a dog", 4)],
        [ids(processor, "the man", 4), missing],
        [missing, missing],
    ]
    assert processor(images, [["a dog"]] * 3).labels.shape == (3, 1, 3)


def test_text_takes_the_usual_arguments(processor):
    text = ["a dog plays", "a man"]

    def labels(**arguments: Any) -> list[list[int]]:
        return processor(text=text, **arguments).labels.tolist()

    default = [ids(processor, caption, 4) for caption in text]
    assert labels() == labels(padding="longest") == labels(max_length=3) == default
    assert labels(padding="max_length", max_length=6) == [ids(processor, caption, 6) for caption in text]
    assert labels(truncation=True, max_length=3) == [ids(processor, caption, 3) for caption in ("a dog", "a man")]
    assert labels(truncation=True, max_length=3, padding=False) == labels(truncation=True, max_length=3)
    assert labels(add_special_tokens=False) == [[-100 if i == END else i for i in row[:3]] for row in default]
    assert labels() == default  # arguments of one call do not change the next


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (["a dog", " ... ", "a man"], {}, r"^text\[1\] is ' ... ', which has no words"),
        ([["a dog"], ["a man", ""], ["a man"]], {}, r"^text\[1\]\[1\] is '', which has no words"),
        (["a dog", None, "a man"], {}, r"^text\[1\] is None; give strings only"),
        ([["a dog"], [None], ["a man"]], {}, r"^text\[1\]\[0\] is None; a caption must be a string"),
        (["a dog", ["a man"], "a man"], {}, r"^text\[1\] is \['a man'\]; give strings only"),
        ([["a dog"], "a man", ["a man"]], {}, r"^text\[1\] is 'a man'; give strings only"),
        (["a dog", "a man"], {}, "There are 3 images, but text for 2; give one caption"),
        ("a dog", {}, "There are 3 images, but text for 1"),
        ([], {}, "text has no captions"),
        ([[], [], []], {}, "text has no captions"),
        (["a dog"] * 3, {"max_length": 1}, "max_length is 1; give at least 2"),
        (["a dog"] * 3, {"max_length": 2, "padding": "max_length"}, "max_length is 2, but a caption has 3 ids"),
        (["a dog"] * 3, {"padding": "max_length"}, "max_length is None"),
        (["a dog", "man", "man"], {"padding": False}, "differ in length and padding is False"),
        (["a dog"] * 3, {"padding": "shortest"}, "padding is 'shortest'; choose from"),
    ],
)
def test_errors_in_text(processor, images, text, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(images, text, **arguments)


def test_other_errors(processor, images, tmp_path):
    with pytest.raises(ValueError, match="Neither images nor text"):
        processor()
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist"):
        processor([tmp_path / "none.jpg"])
    with pytest.raises(TypeError, match="paddng"):
        processor(images, paddng=True)
    with pytest.raises(TypeError, match="image_processor"):
        CaptionerProcessor(processor.tokenizer, processor.image_processor)


def test_decoding_leaves_special_tokens_out(processor):
    start, pad = processor.tokenizer.bos_token_id, processor.tokenizer.pad_token_id
    rows = [[start, *ids(processor, "a dog plays", 4)], [start, *ids(processor, "a man", 3), pad]]
    assert processor.batch_decode(rows) == processor.batch_decode(torch.tensor(rows)) == ["a dog plays", "a man"]
    assert processor.decode(torch.tensor(rows[1])) == "a man"
    assert processor.decode(rows[1], skip_special_tokens=False) == "<start> a man <end> <pad>"


@pytest.mark.parametrize("auto_class", [CaptionerProcessor, AutoProcessor])
def test_round_trip_in_one_folder(processor, images, tmp_path, auto_class):
    text = [["a dog <end>", "a man"], ["a zebra"], ["on the beach"]]
    before = processor(images, text)
    processor.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is CaptionerProcessor
    assert type(loaded.image_processor) is CaptionerImageProcessor
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    after = loaded(images, text)
    assert torch.equal(after.pixel_values, before.pixel_values)
    assert torch.equal(after.labels, before.labels)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CaptionerImageProcessor
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
