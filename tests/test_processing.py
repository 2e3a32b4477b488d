from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedConfig

from hf_captioner.model.image_processing_captioner import CaptionerImageProcessor
from hf_captioner.model.processing_captioner import CaptionerProcessor

CAPTIONS = ["a dog runs", "a dog on the grass", "a cat"]
DATA_CONFIG = {
    **resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("resnet101").to_dict()),
    "input_size": (3, 32, 32),
}
END = 3


class Config(PreTrainedConfig):
    model_type = "processing_test"


@pytest.fixture(scope="module")
def processor() -> CaptionerProcessor:
    backends = {"torchvision": CaptionerImageProcessor, "pil": CaptionerImageProcessor}
    AutoImageProcessor.register(Config, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(Config, CaptionerProcessor, exist_ok=True)
    return CaptionerProcessor.from_captions(CAPTIONS, DATA_CONFIG, min_count=1)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30 + 9 * i, 3), np.uint8)) for i in range(3)]


def ids(processor: CaptionerProcessor, words: str, length: int) -> list[int]:
    """Labels of a caption, written without the tokenizer's own template and padding."""
    row = [*processor.tokenizer.convert_tokens_to_ids(words.split()), END]
    return row + [-100] * (length - len(row))


def test_from_captions_passes_everything_on():
    processor = CaptionerProcessor.from_captions(CAPTIONS, DATA_CONFIG, min_count=2)
    assert processor.image_processor.crop_pct == DATA_CONFIG["crop_pct"]
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert processor.tokenizer.convert_ids_to_tokens(range(4, len(processor.tokenizer))) == ["a", "dog"]


def test_images_alone(processor, images):
    batch = processor(images)
    assert set(batch) == {"pixel_values"}
    assert batch.pixel_values.shape == (3, 3, 32, 32)
    assert torch.equal(batch.pixel_values, processor.image_processor(images).pixel_values)


def test_one_caption_an_image(processor, images):
    batch = processor(images=images, text=["A dog runs.", "the cat", "a zebra on the grass"])
    assert set(batch) == set(processor.model_input_names)
    assert batch.labels.dtype == torch.int64
    expected = ["a dog runs", "the cat", "a zebra on the grass"]
    assert batch.labels.tolist() == [ids(processor, caption, length=6) for caption in expected]
    assert batch.labels[2, 1] == processor.tokenizer.unk_token_id


def test_several_captions_an_image(processor, images):
    batch = processor(images, [["a dog runs", "a dog"], ["the cat"], []])
    missing = [-100] * 4
    assert batch.labels.tolist() == [
        [ids(processor, "a dog runs", 4), ids(processor, "a dog", 4)],
        [ids(processor, "the cat", 4), missing],
        [missing, missing],
    ]


@pytest.mark.parametrize("text", ["a dog", ["a dog"]])
def test_one_image(processor, images, text):
    batch = processor(images[0], text)
    assert batch.pixel_values.shape == (1, 3, 32, 32)
    assert batch.labels.shape == (1, 3)


def test_lists_of_one_caption_keep_their_dimension(processor, images):
    assert processor(images, [["a dog"]] * 3).labels.shape == (3, 1, 3)


def test_text_alone(processor):
    assert set(processor(text=["a dog"])) == {"labels"}


def test_numpy(processor, images):
    batch = processor(images, ["a dog"] * 3, return_tensors="np")
    assert type(batch.pixel_values) is type(batch.labels) is np.ndarray
    assert batch.labels.dtype == np.int64


def test_special_tokens_in_a_caption_do_not_end_it(processor):
    assert (processor(text=["a dog <end> runs"]).labels == END).sum() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["a dog", " ... ", "a cat"], r"^text\[1\] is ' ... ', which has no words"),
        ([["a dog"], ["a cat", ""], ["a cat"]], r"^text\[1\]\[1\] is '', which has no words"),
        (["a dog", None, "a cat"], r"^text\[1\] is None; give strings only"),
        ([["a dog"], [None], ["a cat"]], r"^text\[1\]\[0\] is None; a caption must be a string"),
        (["a dog", ["a cat"], "a cat"], r"^text\[1\] is \['a cat'\]; give strings only"),
        ([["a dog"], "a cat", ["a cat"]], r"^text\[1\] is 'a cat'; give strings only"),
        (["a dog", "a cat"], "There are 3 images, but text for 2; give one caption"),
        ("a dog", "There are 3 images, but text for 1"),
        ([], "text has no captions"),
        ([[], [], []], "text has no captions"),
    ],
)
def test_errors_in_text(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images, text)


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
    rows = [[start, *ids(processor, "a dog runs", 4)], [start, *ids(processor, "a cat", 3), pad]]
    assert processor.batch_decode(rows) == ["a dog runs", "a cat"]
    assert processor.batch_decode(torch.tensor(rows)) == ["a dog runs", "a cat"]
    assert processor.decode(torch.tensor(rows[1])) == "a cat"
    assert processor.decode(rows[1], skip_special_tokens=False) == "<start> a cat <end> <pad>"


@pytest.mark.parametrize("auto_class", [CaptionerProcessor, AutoProcessor])
def test_round_trip_in_one_folder(processor, images, tmp_path, auto_class):
    text = [["a dog <end>", "a cat"], ["a zebra"], ["on the grass"]]
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


def test_travels_as_remote_code(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(CaptionerProcessor, "_auto_class", "AutoProcessor")
    monkeypatch.setattr(CaptionerImageProcessor, "_auto_class", "AutoImageProcessor")
    folder, image = tmp_path / "saved", tmp_path / "photo.png"
    processor.save_pretrained(folder)
    Image.new("RGB", (40, 60), "red").save(image)
    code = (
        "import sys; from transformers import AutoProcessor;"
        f"p = AutoProcessor.from_pretrained({folder.name!r}, trust_remote_code=True);"
        f"b = p([{image.name!r}], ['a dog']);"
        "assert not any(m.startswith('hf_captioner') for m in sys.modules);"
        "print(type(p.image_processor).__name__, *b.pixel_values.shape, *b.labels[0].tolist())"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(Path(tmp_path, "modules")), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stdout
    labels = " ".join(map(str, ids(processor, "a dog", 3)))
    assert output.split("\n")[0] == f"CaptionerImageProcessor 1 3 32 32 {labels}"
