"""Every kind of encoder works with every attention and every decoder."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_captioner import ATTENTIONS, DECODERS, CaptionerModel
from hf_captioner.model import objectives
from hf_captioner.testing.captioner import LABELS, check_captions, check_learning, check_reload

Build = Callable[..., CaptionerModel]

# An encoder for each kind of features, each with 4x4 cells for images of 64x64 pixels.
ENCODERS: dict[str, dict[str, Any]] = {
    "NCHW": {"encoder_name": "test_resnet", "encoder_kwargs": {"output_stride": 16}},
    "NHWC": {
        "encoder_name": "swin_tiny_patch4_window7_224",
        "encoder_kwargs": dict(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4)),
        "data_config": {"input_size": (3, 64, 64)},
    },
    "tokens": {"encoder_name": "test_vit", "encoder_kwargs": {"img_size": 64}},
}
LAYERS: list[dict[str, Any]] = [{}, {"num_layers": 2}]

MIXES = [
    pytest.param(
        {**ENCODERS[encoder], "attention_type": attention, "decoder_type": decoder, "decoder_kwargs": kwargs},
        id="-".join([encoder, attention, decoder, *map(str, kwargs.values())]),
    )
    for encoder, attention, kwargs, decoder in product(ENCODERS, ATTENTIONS.names(), LAYERS, DECODERS.names())
    if not kwargs or (encoder, attention) == ("NCHW", "additive")
]


@pytest.fixture(scope="module", params=MIXES)
def model(request: pytest.FixtureRequest, tiny_model: Build) -> CaptionerModel:
    return tiny_model(seed=3, scale=3, initializer_range=1.0, **request.param)


@pytest.fixture(scope="module")
def cells(model: CaptionerModel, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encoder(pixel_values[: len(LABELS)]).last_hidden_state


@torch.no_grad()
def test_captions_read_together_equal_captions_read_alone_word_by_word(model: CaptionerModel, cells: Tensor) -> None:
    """Packing, several captions per image and the carried state must all be right for this to hold."""
    model, cells = deepcopy(model).double(), cells.double()  # so that rounding is not mistaken for an error
    output = model(cells=cells, labels=LABELS)
    weights = output.cross_attentions[0]
    assert output.logits.shape == (*LABELS.shape, model.config.vocab_size) and weights.shape == (*LABELS.shape, 16)
    assert torch.isfinite(output.loss)
    for b, k in product(range(LABELS.shape[0]), range(LABELS.shape[1])):
        word, cache = model.config.decoder_start_token_id, None
        for t, label in enumerate(LABELS[b, k].tolist()):
            if label == -100:
                assert not output.logits[b, k, t].any() and not weights[b, k, t].any()
                continue
            image, read = cells[b : b + 1], torch.tensor([[word]])
            step = model(cells=image, decoder_input_ids=read, cache=cache, output_attentions=True)
            assert torch.allclose(output.logits[b, k, t], step.logits[0, 0], atol=1e-9)
            assert torch.allclose(weights[b, k, t], step.cross_attentions[0][0, 0, 0], atol=1e-9)
            word, cache = label, step.cache


def test_captioner_learns_captions_and_comes_back(model: CaptionerModel, cells: Tensor) -> None:
    """Every parameter of the decoder learns; captions depend neither on other images nor on the cache."""
    check_learning(model, model.decoder, {"cells": cells}, all_parameters=True)
    check_captions(model.eval(), cells)
    check_reload(model, {"cells": cells})


def test_additive_captioner_goes_on_with_hard_attention(tiny_model: Build, tmp_path: Path) -> None:
    """Both attentions have the same parameters; the baseline, which only hard attention has, begins at zero."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    try:
        torch.use_deterministic_algorithms(True)  # fills unwritten memory with NaN
        hard = CaptionerModel.from_pretrained(tmp_path, attention_type="hard")
    finally:
        torch.use_deterministic_algorithms(False)
    assert hard.decoder.attention.baseline.item() == 0
    for name, parameter in hard.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("decoder", DECODERS.names())
def test_loss_of_attention_that_samples(tiny_model: Build, pixel_values: Tensor, decoder: str) -> None:
    kwargs = {"expected_rate": 0.3, "reinforce_weight": 0.7, "entropy_weight": 0.2}
    model = tiny_model(attention_type="hard", attention_kwargs=kwargs, decoder_type=decoder, output_dropout=0.0)
    attention = model.decoder.attention
    labels = LABELS.flatten(0, 1)
    with torch.no_grad():
        cells = model.encoder(pixel_values[: len(LABELS)]).last_hidden_state
        attention.baseline.fill_(-2.5)
        model.train()

        torch.manual_seed(7)
        ids, lengths = model.prepare_decoder_input_ids_from_labels(labels), (labels != -100).sum(1)
        output = model.decoder(ids, model.decoder.prepare(cells), lengths=lengths)
        scores = objectives.log_likelihood(output.logits, labels)
        expected = objectives.cross_entropy(output.logits, labels)
        expected += objectives.doubly_stochastic(output.weights, labels)
        expected += 0.7 * objectives.reinforce(scores, output.log_probs, labels, -2.5)
        expected -= 0.2 * objectives.attention_entropy(output.weights, labels)

        torch.manual_seed(7)
        assert torch.allclose(model(cells=cells, labels=LABELS).loss, expected)
        baseline = attention.baseline.clone()
        assert torch.allclose(baseline, objectives.moving_average(torch.tensor(-2.5), scores, labels))
        assert not torch.allclose(model(cells=cells, labels=LABELS).loss, expected)  # other cells were drawn

        baseline, model = attention.baseline.clone(), model.eval()
        plain = model(cells=cells, labels=LABELS)
        assert torch.equal(attention.baseline, baseline)
        assert torch.equal(model(cells=cells, labels=LABELS).loss, plain.loss)
        loss = objectives.cross_entropy(plain.logits.flatten(0, 1), labels)
        loss += objectives.doubly_stochastic(plain.cross_attentions[0].flatten(0, 1), labels)
        assert torch.allclose(plain.loss, loss)


def test_parts_get_their_arguments(tiny_model: Build) -> None:
    model = tiny_model(attention_type="multi_head", attention_kwargs={"num_heads": 3}, decoder_kwargs={"num_layers": 3})
    assert model.decoder.attention.num_heads == 3
    assert len(model.decoder.upper_lstms) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention_type": "multi_head", "attention_kwargs": {"heads": 4}},
         "'multi_head' of the attentions does not take 'heads' as attention_kwargs, but num_heads"),
        ({"attention_kwargs": {"num_heads": 4}}, "'additive' .* does not take 'num_heads' .*, but nothing"),
        ({"attention_kwargs": {"query_size": 4}}, "does not take 'query_size'"),
        ({"decoder_type": "gru", "decoder_kwargs": {"layers": 2, "depth": 1}},
         "'gru' of the decoders does not take 'depth', 'layers' as decoder_kwargs, but num_layers"),
        ({"decoder_kwargs": {"gate": False}}, "does not take 'gate'"),
        ({"decoder_kwargs": {"num_layers": 0}}, "num_layers is 0"),
        ({"attention_type": "multi_head", "attention_size": 20}, "does not divide attention_size=20"),
    ],
)  # fmt: skip
def test_refuses_arguments(tiny_model: Build, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**kwargs)


def test_part_of_an_outside_package_may_take_any_argument(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def build(query_size: int, memory_size: int, attention_size: int, **kwargs: Any) -> torch.nn.Module:
        given.update(kwargs)
        return ATTENTIONS.get("additive")(query_size, memory_size, attention_size)  # type: ignore[no-any-return]

    monkeypatch.setattr(ATTENTIONS, "_parts", {"outside": build})
    tiny_model(attention_type="outside", attention_kwargs={"anything": 1})
    assert given == {"anything": 1}
    with pytest.raises(ValueError, match="does not take 'query_size'"):
        tiny_model(attention_type="outside", attention_kwargs={"query_size": 1})
