"""The model: outputs, loss, generation, training by transformers' Trainer, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments

from hf_captioner import CaptionerModel, CaptionerProcessor
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.encoders import TimmEncoder


@pytest.fixture(scope="module")
def pixel_values(processor: CaptionerProcessor, photos: list[Image.Image]) -> torch.Tensor:
    return processor(images=photos[:3])["pixel_values"]


@pytest.fixture(scope="module")
def labels(processor: CaptionerProcessor) -> torch.Tensor:
    texts = [
        ["a black dog is running on the beach", "the woman in the snow"],
        ["two small children"],
        ["a man in a red shirt jumps over a bench near the water", "the woman plays with a ball"],
    ]
    return processor(text=texts)["labels"]


def test_outputs_have_the_shape_of_the_labels(tiny_model, pixel_values, labels):
    model = tiny_model()
    num_images, num_captions, num_words = labels.shape
    several = model(pixel_values, labels=labels)
    assert several.logits.shape == (num_images, num_captions, num_words, model.config.vocab_size)
    assert several.cross_attentions[0].shape == (num_images, num_captions, num_words, 16)
    one = model(pixel_values, labels=labels[:, 0])
    assert one.logits.shape == (num_images, num_words, model.config.vocab_size)
    assert torch.allclose(one.logits, several.logits[:, 0], atol=1e-6)
    assert torch.allclose(one.cross_attentions[0], several.cross_attentions[0][:, :1], atol=1e-6)
    assert isinstance(model(pixel_values, labels=labels, return_dict=False), tuple)


def test_loss_equals_that_computed_caption_by_caption(tiny_model, pixel_values, labels):
    model = tiny_model(doubly_stochastic_weight=0.7, doubly_stochastic_reduction="sum")
    log_likelihood, num_words, shortfalls = 0.0, 0, []
    for image, captions in zip(pixel_values, labels, strict=True):
        for caption in captions:
            words = caption[caption != -100]
            if not len(words):
                continue
            read = torch.cat([torch.tensor([model.config.decoder_start_token_id]), words[:-1]])
            output = model(image[None], decoder_input_ids=read[None], output_attentions=True)
            log_likelihood += output.logits[0].log_softmax(-1).gather(1, words[:, None]).sum().item()
            num_words += len(words)
            shortfalls.append((1 - output.cross_attentions[0][0, 0].sum(0)).square().sum().item())
    expected = -log_likelihood / num_words + 0.7 * sum(shortfalls) / len(shortfalls)
    assert model(pixel_values, labels=labels).loss.item() == pytest.approx(expected, abs=1e-5)


def test_greedy_search_takes_the_likeliest_word_at_each_step(tiny_model, pixel_values):
    model = tiny_model(seed=3, initializer_range=1.0)
    sequences = model.generate(pixel_values, num_beams=1, max_length=10)
    encoder_outputs = CaptionerEncoderOutput.of(model.encoder(pixel_values).last_hidden_state)
    assert torch.equal(model.generate(encoder_outputs=encoder_outputs, num_beams=1, max_length=10), sequences)
    logits = model(pixel_values, decoder_input_ids=sequences[:, :-1]).logits
    logits[..., 0] = -torch.inf  # <unk> is suppressed
    ends = sequences[:, 1:] == model.config.eos_token_id
    words = ends.cumsum(1) - ends.long() == 0  # all up to <end>
    assert torch.equal(sequences[:, 1:][words], logits.argmax(-1)[words])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prefix_is_continued(tiny_model, pixel_values, num_beams):
    model = tiny_model(seed=3, initializer_range=1.0)
    whole = model.generate(pixel_values[:1], num_beams=1, max_length=10)
    continued = model.generate(pixel_values[:1], decoder_input_ids=whole[:, :4], num_beams=1, max_length=10)
    assert torch.equal(whole, continued)
    prefix = whole[:, :4].expand(3, -1)
    prefixed = model.generate(pixel_values, decoder_input_ids=prefix, num_beams=num_beams, max_length=10)
    assert torch.equal(prefixed[:, :4], prefix)


def test_beams_share_one_memory(tiny_model, pixel_values):
    model = tiny_model()
    calls: list[tuple[int, ...]] = []
    project = model.decoder.attention.memory_to_key
    project.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    model.generate(pixel_values, num_beams=5, max_length=8)
    assert calls == [(3, 16, model.encoder.part.hidden_size)]  # once, for three images, not for fifteen beams


def test_projection_is_a_linear_layer_with_relu_before_the_decoder(tiny_model, pixel_values, labels):
    model = tiny_model(projection_size=12)
    cells = model.encoder(pixel_values).last_hidden_state
    projected = torch.relu(cells @ model.projection.weight.T + model.projection.bias)
    memory = model.prepare_memory(cells)
    assert torch.allclose(memory.cells, projected, atol=1e-6) and memory.cells.shape[-1] == 12
    model.freeze_encoder()
    model(pixel_values, labels=labels).loss.backward()
    trained = {id(parameter) for parameter in model.decoder_parameters()}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in model.decoder_parameters())


def test_frozen_encoder_stays_as_it_is(tiny_model, pixel_values, labels):
    model = tiny_model()
    model.freeze_encoder()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    model(pixel_values, labels=labels).loss.backward()
    assert model.decoder.training and not model.encoder.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


@pytest.fixture
def trainer(pixel_values: torch.Tensor, labels: torch.Tensor, tmp_path: Path) -> Callable[..., Trainer]:
    """Return a function that builds trainers on the images and the first words of their captions."""

    def build(model: CaptionerModel, num_words: int | None = None, **kwargs: Any) -> Trainer:
        pairs = zip(pixel_values, labels[..., :num_words], strict=True)
        rows = [{"pixel_values": image, "labels": captions} for image, captions in pairs]
        quiet = {"remove_unused_columns": False, "report_to": [], "save_strategy": "no", "use_cpu": True}
        arguments = TrainingArguments(output_dir=str(tmp_path), **quiet, logging_steps=1, **kwargs)
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)

    return build


def test_trainer_of_transformers_trains_and_evaluates(tiny_model, trainer):
    model = tiny_model()
    before = model.decoder.output.weight.clone()
    training = trainer(model, max_steps=2, eval_strategy="steps", eval_steps=2, label_names=["labels"])
    training.train()
    history = [record for record in training.state.log_history if "loss" in record or "eval_loss" in record]
    assert len(history) == 3 and not torch.equal(model.decoder.output.weight, before)


@pytest.mark.parametrize(
    ("weight", "length"), [(0.0, None), (1.0, 3)], ids=["uneven captions", "doubly stochastic, even captions"]
)
def test_trainer_accumulates_gradients_to_those_of_one_large_batch(tiny_model, trainer, weight, length):
    losses, weights = [], []
    for batch_size, num_batches in ((3, 1), (1, 3)):
        model = tiny_model(output_dropout=0.0, doubly_stochastic_weight=weight)
        model.freeze_encoder()
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": num_batches}
        training = trainer(model, length, max_steps=1, optim="sgd", learning_rate=1.0, **sizes)
        training.train()
        losses.append(training.state.log_history[0]["loss"])
        weights.append(dict(model.decoder.named_parameters()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


def test_losses_of_the_parts_of_a_batch_add_up(tiny_model, pixel_values, labels):
    model = tiny_model(doubly_stochastic_weight=0.7)
    words = labels != -100
    numbers = {"num_items_in_batch": int(words.sum()), "num_captions": int(words.any(-1).sum())}
    parts = [model(pixel_values[i : i + 1], labels=labels[i : i + 1], **numbers).loss for i in range(len(labels))]
    assert sum(parts).item() == pytest.approx(model(pixel_values, labels=labels).loss.item(), abs=1e-6)


def test_the_encoder_is_built_once_and_its_weights_change_no_others(tiny_model, tmp_path, monkeypatch):
    built: list[dict[str, Any]] = []
    build = TimmEncoder.__init__
    monkeypatch.setattr(TimmEncoder, "__init__", lambda *args, **kwargs: built.append(kwargs) or build(*args, **kwargs))
    other = tiny_model(seed=1).encoder.part.body.state_dict()
    save_file(other, tmp_path / "weights.safetensors")
    random, trained = tiny_model(), tiny_model(encoder_weights=tmp_path / "weights.safetensors", pretrained=True)
    assert [kwargs.get("pretrained", False) for kwargs in built] == [False, False, True]
    assert all(torch.equal(trained.encoder.part.body.state_dict()[name], other[name]) for name in other)
    weights = random.decoder.state_dict()
    assert all(torch.equal(trained.decoder.state_dict()[name], weights[name]) for name in weights)


def test_a_saved_captioner_reloads_bit_equal_and_captions_alike(tiny_model, captioner_folder, pixel_values):
    model, reloaded = tiny_model(seed=1, scale=6), CaptionerModel.from_pretrained(captioner_folder).eval()
    assert (captioner_folder / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(captioner_folder).model_type == "hf_captioner"
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(captioner_folder)) is CaptionerModel
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())
    assert torch.equal(reloaded.generate(pixel_values), model.generate(pixel_values))


def test_resnet101_is_the_default_encoder_and_learns():
    torch.manual_seed(0)
    model = CaptionerModel.from_encoder(pretrained=False, vocab_size=100)
    assert model.config.encoder_name == "resnet101" and model.encoder.part.grid_size(224, 224) == (7, 7)
    pixel_values, labels = torch.randn(2, 3, 224, 224), torch.randint(4, 100, (2, 5, 6))
    model(pixel_values, labels=labels).loss.backward()
    gradient = model.encoder.part.body.conv1.weight.grad
    assert torch.isfinite(gradient).all() and gradient.any()
    assert model.eval().generate(pixel_values[:1], num_beams=2, max_length=5).shape[1] <= 5


def test_errors(tiny_model, pixel_values):
    model = tiny_model()
    with pytest.raises(ValueError, match="No image is given"):
        model(labels=torch.tensor([[4, 3]]))
    with pytest.raises(ValueError, match="Neither labels nor"):
        model(pixel_values)
    with pytest.raises(FileNotFoundError, match="No encoder weights at 'nowhere"):
        CaptionerModel.from_encoder("test_resnet", encoder_weights="nowhere.safetensors")
    with pytest.raises(ValueError, match="not among the attentions"):
        tiny_model(attention_type="telepathy")


def test_weights_of_something_else_are_refused(captioner_folder: Path) -> None:
    file = captioner_folder / "model.safetensors"  # of a captioner, where those of an encoder alone are meant
    with pytest.raises(ValueError, match=r"model.safetensors' has 0 of the \d+ weights of the encoder"):
        CaptionerModel.from_encoder("test_resnet", pretrained=True, encoder_weights=file, vocab_size=9)
