"""What transformers, its Trainer and PEFT expect of models and processors, beyond what `tests/peer` holds them to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import pipeline
from transformers.trainer_pt_utils import LabelSmoother

from hf_captioner import CaptionCollator, CaptionerImageProcessor, CaptionerModel, CaptionerProcessor

TinyModel = Callable[..., CaptionerModel]
WORDS = torch.tensor([[2, 8, 5, 9], [2, 7, 6, 4]])
ARRAY = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(pixel_values: Tensor) -> Tensor:
    return pixel_values[:2]


def test_what_a_call_leaves_open_is_what_the_configuration_says(captioner_folder: Path, images: Tensor) -> None:
    settings = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    usual, other = (CaptionerModel.from_pretrained(captioner_folder, **kwargs) for kwargs in ({}, settings))
    logits, _, attentions, hidden, encoded = other(images, decoder_input_ids=WORDS)
    assert torch.equal(logits, usual(images, decoder_input_ids=WORDS).logits)
    assert attentions[0].shape == (2, 1, 4, 16) and hidden[0].shape == (2, 4, 32) and encoded[0].shape[:2] == (2, 16)
    for arguments in ({"num_beams": 3}, {"num_beams": 1}):
        assert torch.equal(other.generate(images, **arguments), usual.generate(images, **arguments))


def test_returned_hidden_states_have_gradients(tiny_model: TinyModel, images: Tensor) -> None:
    model = tiny_model().train()
    for labels in (None, WORDS):
        output = model(images, labels=labels, decoder_input_ids=WORDS, output_hidden_states=True)
        states = output.decoder_hidden_states[0], output.encoder_hidden_states[0]
        for state in states:
            state.retain_grad()
        (output.logits.sum() if labels is None else output.loss).backward()
        assert all(state.grad is not None and state.grad.any() for state in states)


def test_missing_encoder_weights_are_those_of_a_new_encoder(captioner_folder: Path) -> None:
    torch.manual_seed(0)
    other = {"encoder_name": "test_vit", "encoder_kwargs": {"img_size": 64}, "ignore_mismatched_sizes": True}
    part = CaptionerModel.from_pretrained(captioner_folder, **other).encoder.part
    weights = part.body.patch_embed.proj.weight
    assert part.body.norm.weight.eq(1).all() and 0.001 < weights.std() < 1


def test_ids_are_read_as_the_processor_gives_them(
    tiny_model: TinyModel, processor: CaptionerProcessor, photos: list[Any]
) -> None:
    model = tiny_model(scale=3)
    batch = processor(images=photos[:2], text=["a black dog", "the woman"])
    expected = model(batch.pixel_values, decoder_input_ids=batch.decoder_input_ids).logits
    given = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    assert torch.equal(model(**given).logits, expected)
    assert torch.equal(model(batch.pixel_values, input_ids=WORDS).logits, model(batch.pixel_values, None, WORDS).logits)
    same = processor(images=photos[:2], text=["a black", "the woman"])
    assert torch.equal(model.generate(**same)[:, 1:3], same.input_ids[:, :2])
    with pytest.raises(TypeError, match="no argument 'inputs_embeds'"):
        model(batch.pixel_values, input_ids=WORDS, inputs_embeds=torch.zeros(1))
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0"):
        model.generate(batch.pixel_values, guidance_scale=2.0)


def test_label_smoothing_of_trainer(tiny_model: TinyModel, processor: CaptionerProcessor, photos: list[Any]) -> None:
    rows = [{"image": photo, "captions": ["a black dog", "the woman"]} for photo in photos[:2]]
    batch = CaptionCollator(processor)(rows)
    settings = {"doubly_stochastic_weight": 0.0, "output_dropout": 0.0}
    expected = tiny_model(label_smoothing=0.1, **settings)(**batch).loss
    labels = batch.pop("labels")  # as Trainer does
    assert LabelSmoother(0.1)(tiny_model(**settings)(**batch), labels).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_peft_takes_a_captioner_for_a_sequence_to_sequence_model(tiny_model: TinyModel, images: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear"))
    model(pixel_values=images, labels=WORDS).loss.backward()
    assert model.generate(pixel_values=images, max_new_tokens=3).shape == (2, 4)


def test_a_processor_takes_arguments_as_those_of_transformers_do(processor: CaptionerProcessor) -> None:
    long = processor(images=ARRAY, text="a dog", padding="max_length", max_length=6, size={"height": 32, "width": 48})
    nested = {"text_kwargs": {"padding": "max_length", "max_length": 6}, "images_kwargs": {"size": (32, 48)}}
    assert long.pixel_values.shape == (1, 3, 32, 48) and long.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0]]
    for name, tensor in processor(images=ARRAY, text="a dog", **nested).items():
        assert torch.equal(tensor, long[name])
    assert processor(text="a dog", pad_to_multiple_of=4).input_ids.shape == (1, 4)
    assert processor(images=ARRAY).pixel_values.shape[2:] == (64, 64)
    with pytest.raises(ValueError, match="max_length was passed two times"):
        processor(text="a dog", max_length=4, text_kwargs={"max_length": 5})
    with pytest.raises(ValueError, match="padding_side is 'left'"):
        processor(text="a dog", padding_side="left")
    with pytest.raises(TypeError, match="no argument 'sizes'"):
        processor(images=ARRAY, sizes=3)


@pytest.mark.parametrize(
    ("image", "arguments"),
    [
        (ARRAY.transpose(2, 0, 1), {}), (torch.from_numpy(ARRAY), {}), (torch.from_numpy(ARRAY).permute(2, 0, 1), {}),
        (ARRAY[None], {}), (ARRAY.astype(np.int64), {}), (ARRAY.astype(np.float32), {}),
        (ARRAY / 255, {"do_rescale": False}), (torch.from_numpy(ARRAY).permute(2, 0, 1) / 255, {"do_rescale": False}),
        (ARRAY, {"input_data_format": "channels_last"}),
    ],
)  # fmt: skip
def test_arrays_of_any_form_are_the_same_image(image: Any, arguments: dict[str, Any]) -> None:
    image_processor = CaptionerImageProcessor({"height": 24, "width": 24})
    assert torch.equal(image_processor(image, **arguments).pixel_values, image_processor(ARRAY).pixel_values)


def test_settings_of_a_call_and_of_loading_are_obeyed(tmp_path: Path) -> None:
    image_processor = CaptionerImageProcessor({"height": 24, "width": 24}, crop_pct=1.0)
    usual = image_processor(ARRAY).pixel_values
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    plain = image_processor(ARRAY, do_normalize=False).pixel_values
    assert torch.allclose((plain - mean) / std, usual, atol=1e-5) and plain.min() >= 0 and plain.max() <= 1
    levels = image_processor(ARRAY, do_normalize=False, do_rescale=False).pixel_values
    assert torch.equal(levels, levels.round()) and torch.allclose(levels / 255, plain)
    cropped = image_processor(ARRAY, do_resize=False, do_normalize=False, do_rescale=False).pixel_values
    assert torch.equal(cropped[0], torch.from_numpy(ARRAY[3:27, 8:32]).permute(2, 0, 1).float())
    assert image_processor(ARRAY, data_format="channels_last").pixel_values.shape == (1, 24, 24, 3)
    image_processor.save_pretrained(tmp_path)
    loaded = CaptionerImageProcessor.from_pretrained(tmp_path, do_normalize=False, resample=0, crop_pct=1.0)
    assert loaded.interpolation == "nearest" and loaded(ARRAY).pixel_values.max() <= 1
    loaded.save_pretrained(tmp_path)
    assert CaptionerImageProcessor.from_pretrained(tmp_path).do_normalize is False


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (ARRAY / 255, {}, "do_rescale=False"),
        (ARRAY.astype(float), {"do_rescale": False}, "ranges from 0 to 255"),
        (ARRAY.astype(np.int64) - 9, {}, "ranges from -9"),
        (ARRAY[..., 0], {"do_convert_rgb": False}, "takes RGB"),
        (ARRAY, {"do_pad": True}, "do_pad is no argument"),
        (ARRAY, {"size": {"shortest_edge": 24}}, "give {"),
    ],
)
def test_what_an_image_processor_refuses(image: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionerImageProcessor({"height": 24, "width": 24})(image, **arguments)


def test_a_step_with_the_cache_is_exported_once_for_all_steps(tiny_model: TinyModel, images: Tensor) -> None:
    model = tiny_model(scale=3)
    first = model(images, decoder_input_ids=WORDS[:, :1]).cache
    exported = torch.export.export(model, (), {"decoder_input_ids": WORDS[:, 1:2], "cache": first}).module()
    caches = [first, first]
    for step in (1, 2, 3):
        found, expected = (
            each(decoder_input_ids=WORDS[:, step : step + 1], cache=cache)
            for each, cache in zip((exported, model), caches, strict=True)
        )
        assert torch.allclose(found.logits, expected.logits, atol=1e-6)
        caches = [found.cache, expected.cache]


@pytest.mark.parametrize("task", ["image-captioning", "image-text-to-text"])
def test_saved_pipelines_are_loaded_again(task: str, captioner_folder: Path, photos: list[Any], tmp_path: Path) -> None:
    captioner = pipeline(task, model=captioner_folder)
    captioner.save_pretrained(tmp_path)
    given = {} if task == "image-captioning" else {"text": "a"}
    assert pipeline(task, model=tmp_path)(photos[0], **given) == captioner(photos[0], **given)
