"""Scheduled sampling, tied word embeddings, training of the encoder, and augmentation."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.data import cells as cells_module
from hf_captioner.data.collator import CaptionCollator
from hf_captioner.data.rows import read_pixels
from hf_captioner.model.objectives import sampling_probability
from hf_captioner.model.packing import PackedOrder
from hf_captioner.training.recipe import Recipe
from hf_captioner.training.train import train

TinyModel = Callable[..., CaptionerModel]


def captions_of(model: CaptionerModel, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, model.config.vocab_size, (num_images, 3, 6), generator=generator)
    labels[:, 1, 4:] = -100
    labels[0, 2, 2:] = -100
    return labels


def test_sampling_probability_has_known_values() -> None:
    assert sampling_probability(0.5, 0.4, "linear") == pytest.approx(0.2)
    assert sampling_probability(0.5, 0.75, "exponential") == pytest.approx(1 - 0.25**0.5)
    assert sampling_probability(0.5, 0.4, "inverse_sigmoid") == pytest.approx(0.2)
    assert sampling_probability(0.1, 0.4, "inverse_sigmoid") < 0.01
    for course in ("linear", "exponential", "inverse_sigmoid"):
        values = [sampling_probability(n / 10, 0.4, course) for n in range(11)]
        assert values == sorted(values)
        assert values[0] == pytest.approx(0) and values[-1] == pytest.approx(0.4)
    assert sampling_probability(0.0, 0.4, "constant") == 0.4


@pytest.mark.parametrize("decoder_type", ["lstm", "gru", "spatial", "top_down"])
@pytest.mark.parametrize("deep_output", [False, True])
def test_scheduled_sampling_reads_the_sampled_words(
    tiny_model: TinyModel, decoder_type: str, deep_output: bool
) -> None:
    """Teacher forcing with the words that were sampled gives the same logits and gradients."""
    model = tiny_model(decoder_type=decoder_type, deep_output=deep_output, doubly_stochastic_weight=0.0)
    cells = torch.randn(2, 16, model.encoder.part.hidden_size)
    labels = captions_of(model, 2)
    read: list[Tensor] = []
    handle = model.decoder.embedding.register_forward_hook(lambda _, inputs, output: read.append(inputs[0]))
    torch.manual_seed(0)
    sampled = model(cells=cells, labels=labels, sampling=0.6)
    handle.remove()
    parameters = [*model.decoder.parameters()]
    gradients = torch.autograd.grad(sampled.loss, parameters, allow_unused=True)

    words = labels.flatten(0, 1)
    lengths = (words != -100).sum(1)
    order = PackedOrder(lengths, 3, 6)
    ids = order.unpack(order.trim(torch.cat(read)))
    teacher = model.prepare_decoder_input_ids_from_labels(words)
    changed = (ids != teacher)[words != -100]
    assert (ids[:, 0] == teacher[:, 0]).all() and 0.2 < changed.float().mean() < 0.8

    plain = model.decoder(ids, model.decoder.prepare(cells), None, lengths)
    assert torch.allclose(plain.logits.view_as(sampled.logits), sampled.logits, atol=1e-5)
    loss = functional.cross_entropy(plain.logits.flatten(0, 1), words.flatten(), ignore_index=-100)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    for found, correct in zip(gradients, expected, strict=True):
        assert (found is None) == (correct is None)
        assert found is None or torch.allclose(found, correct, atol=1e-5)


def test_sampled_words_follow_the_probabilities_of_the_decoder(tiny_model: TinyModel) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.decoder.output.bias[7] = 50.0
    read: list[Tensor] = []
    handle = model.decoder.embedding.register_forward_hook(lambda _, inputs, output: read.append(inputs[0]))
    cells = torch.randn(2, 16, model.encoder.part.hidden_size)
    model(cells=cells, labels=captions_of(model, 2), sampling=0.999)
    handle.remove()
    assert (read[0] == 2).all() and all((ids == 7).float().mean() > 0.9 for ids in read[1:])


@pytest.mark.parametrize("deep_output", [False, True])
def test_tied_word_embeddings_stay_tied(tiny_model: TinyModel, deep_output: bool, tmp_path: Path) -> None:
    sizes = {"embedding_size": 24} if deep_output else {"embedding_size": 32, "hidden_size": 32}
    model = tiny_model(tie_word_embeddings=True, deep_output=deep_output, **sizes)
    assert model.decoder.output.weight is model.decoder.embedding.weight
    model.save_pretrained(tmp_path)
    again = CaptionerModel.from_pretrained(tmp_path)
    assert again.decoder.output.weight is again.decoder.embedding.weight
    assert torch.equal(again.decoder.output.weight, model.decoder.output.weight)
    untied = tiny_model(deep_output=deep_output, **sizes)
    assert untied.decoder.output.weight is not untied.decoder.embedding.weight
    with pytest.raises(ValueError, match=r"embedding_size is 16, and the last layer reads 32"):
        tiny_model(tie_word_embeddings=True)


def test_encoder_is_trained_from_a_stage_on(tiny_model: TinyModel) -> None:
    model = tiny_model()
    model.unfreeze_encoder(from_stage=3)
    model.train()
    norms = [module for module in model.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(pixel_values=torch.randn(2, 3, 64, 64), labels=captions_of(model, 2)).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert norms and not any(norm.training for norm in norms)
    assert moved and all("layer3" in name or "layer4" in name for name in moved)
    assert not any("bn" in name or "running" in name for name in moved)
    model.unfreeze_encoder(from_stage=4, freeze_batch_norm=False)
    model.train()
    assert {norm.training for norm in norms} == {True, False}
    with pytest.raises(ValueError, match=r"encoder_from_stage is 5; 'test_resnet' has the stages 0 \(the stem\) to 4"):
        model.unfreeze_encoder(from_stage=5)
    model.freeze_encoder()
    assert not model.train().encoder.training


@pytest.mark.parametrize(
    ("name", "stage"), [("test_resnet", 3), ("test_efficientnet", 4), ("test_convnext", 3), ("test_byobnet", 2)]
)
def test_training_from_a_stage_on_needs_no_more_than_its_inputs(tiny_model: TinyModel, name: str, stage: int) -> None:
    """Compare loss and gradients with those of training on images."""
    model = tiny_model(encoder_name=name, encoder_kwargs={}, output_dropout=0.0)
    assert model.encoder.can_divide(stage) and not model.encoder.can_divide(0)
    model.unfreeze_encoder(from_stage=stage)
    pixel_values, labels = torch.randn(2, 3, 64, 64), captions_of(model, 2)
    results = []
    for is_divided in (False, True):
        inputs = {"pixel_values": pixel_values}
        if is_divided:
            stage_inputs = model.encoder.part.input_of_stage(pixel_values, stage).detach()
            inputs = {"stage_inputs": stage_inputs, "from_stage": stage}
        model.zero_grad()
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.allclose(loss, other_loss, atol=1e-6) and gradients.keys() == other_gradients.keys()
    assert any(n.startswith("encoder.") for n in gradients)
    assert all(torch.allclose(gradients[n], other_gradients[n], rtol=1e-4, atol=1e-6) for n in gradients)


def test_an_encoder_that_adds_something_between_its_modules_is_not_divided(tiny_model: TinyModel) -> None:
    model = tiny_model(encoder_name="test_vit", encoder_kwargs={"img_size": 64})
    assert not any(model.encoder.can_divide(stage) for stage in range(1, 4))  # its position embeddings


def test_fine_tuning_of_the_last_stages_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in three stages of which the images are read once, and cells after fine-tuning come from the cache."""
    opened: list[int] = []

    def read(rows: Any, image_processor: Any) -> Tensor:
        opened.append(len(rows))
        return read_pixels(rows, image_processor)

    monkeypatch.setattr(cells_module, "read_pixels", read)
    sizes = {name: 16 for name in ("hidden_size", "embedding_size", "attention_size")}
    recipe = Recipe.from_fields(
        **{**sizes, "max_images": 12, "batch_size": 4, "max_length": 9, "num_beams": 1, "final_num_beams": 1},
        **{"epochs": 1, "finetune_epochs": 1, "reward_epochs": 1, "freeze_encoder": True, "encoder_from_stage": 3},
        **{"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cells"), "num_workers": 0},
        tracking="none",
    )
    trained = train(recipe)
    assert sum(opened) == 12 + 12 + 2  # train and validation, and one image of each to learn the shape
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in log] == ["Epoch", "Encoder", "Rewards"]
    assert len([*(tmp_path / "cells").glob("*.npy")]) == 6  # inputs, cells before and after, of both splits
    assert trained.model.encoder.can_divide(3)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: TinyModel) -> None:
    gradients = []
    for is_on in (False, True):
        model = tiny_model(output_dropout=0.0)
        model.unfreeze_encoder()
        if is_on:
            model.encoder.part.checkpoint_gradients()
        pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        model.train()(pixel_values=pixel_values, labels=captions_of(model, 2)).loss.backward()
        gradients.append([p.grad for p in model.encoder.parameters() if p.requires_grad])
    assert len(gradients[0]) == len(gradients[1]) > 5
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*gradients, strict=True))


def test_the_draw_of_a_row_decides_its_augmentation(processor: CaptionerProcessor, photos: list[Image.Image]) -> None:
    collator = CaptionCollator(processor, augment=True)
    row: dict[str, Any] = {"captions": ["a man"], "image_id": "x", "image": {"bytes": _png(photos[0]), "path": None}}

    def show(seed: tuple[int, ...]) -> Tensor:
        return collator([{**row, "random_seed": seed}])["pixel_values"]

    torch.manual_seed(0)
    first, state = show((0, 0, 1)), torch.get_rng_state()
    assert torch.equal(show((0, 0, 1)), first) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(show((0, 1, 1)), first)
    plain = CaptionCollator(processor)([row])["pixel_values"]
    assert 0.01 < (first - plain).abs().mean() < 1.5


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
