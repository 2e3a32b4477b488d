"""`check_captioner`, the contract test of encoders, attentions and decoders as parts of a whole captioner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..model.configuration_captioner import CaptionerConfig
from ..model.encoder_model import CaptionerEncoderOutput
from ..model.modeling_captioner import CaptionerModel
from ..model.registry import Registry
from .rules import A, B, D, E, P, V, noise, require, require_close

# The encoder's name matters to checks of encoders alone: in the others the captioner is given cells.
TINY: dict[str, Any] = {
    **{"hidden_size": D, "attention_size": A, "embedding_size": E, "vocab_size": V, "output_dropout": 0.0},
    "encoder_name": "test_resnet",
}
# K captions of B images; -100 is padding.
CAPTIONS = [[5, 9, 12, 7, 3], [8, 3], [6, 6, 3], [], [10, 3], [5, 11, 14, 3]]
LABELS = torch.tensor([caption + [-100] * (5 - len(caption)) for caption in CAPTIONS]).view(B, 2, 5)


def check_captioner(
    registry: Registry, part: Any, kwargs: dict[str, Any], pixels: Tensor | None = None, **config: Any
) -> None:
    """Check that a captioner with the part and its `kwargs` can be trained, can caption, and can be saved and reloaded.

    An encoder is given the `pixels` `(B, 3, H, W)`; without them, the captioner is given random cells. `config` holds
    further fields of the configuration.
    """
    kind = registry.kind.removesuffix("s")
    with registry.temporarily("part under test", part) as name:
        fields = {**TINY, **config, f"{kind}_type": name, f"{kind}_kwargs": kwargs}
        model = CaptionerModel(CaptionerConfig(**fields))
        model.generation_config = model.default_generation_config()
        with torch.no_grad():
            for parameter in model.decoder.parameters():  # without larger weights, all captions would be alike
                parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
            if pixels is None:
                cells = noise(B, P, model.encoder.part.hidden_size).float()
                inputs, trained = {"cells": cells}, model.decoder
            else:
                cells = model.eval().encoder(pixels).last_hidden_state
                inputs, trained = {"pixel_values": pixels}, model.encoder
        # Some parameters of an encoder may have nothing to do with its cells.
        check_learning(model, trained, inputs, all_parameters=pixels is None)
        check_captions(model.eval(), cells)
        check_reload(model, inputs)


def check_learning(model: CaptionerModel, trained: nn.Module, inputs: dict[str, Tensor], all_parameters: bool) -> None:
    """Check that the loss and the gradients of the trained module are finite in single and in half precision."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for half in (False, True):
        precision = "bfloat16" if half else "float32"
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.train()(**inputs, labels=LABELS).loss
        require(bool(torch.isfinite(loss)), f"the loss is finite in {precision}", loss.item())
        loss.backward()
        for name, parameter in trained.named_parameters():
            grad = parameter.grad
            require(grad is not None or not (all_parameters and parameter.requires_grad), f"{name} gets a gradient")
            is_finite = grad is None or bool(torch.isfinite(grad).all())
            require(is_finite, f"the gradient of {name} is finite in {precision}")
    model.zero_grad()
    model.load_state_dict(before)  # the batch statistics have moved


@torch.no_grad()
def check_captions(model: CaptionerModel, cells: Tensor) -> None:
    """Check that captions depend neither on the other images of a batch nor on `use_cache`.

    With `use_cache`, the decoder's state is kept between words; without, all words are read again.
    """

    def caption(cells: Tensor, num_beams: int, **kwargs: Any) -> Tensor:
        encoder_outputs = CaptionerEncoderOutput.of(cells)
        return model.generate(encoder_outputs=encoder_outputs, num_beams=num_beams, max_length=9, **kwargs)

    for num_beams in (1, 3):
        together = caption(cells, num_beams)
        again = caption(cells, num_beams, use_cache=False)
        require(torch.equal(again, together), "captions with and without a carried state are the same")
        for image, expected in zip(cells, together, strict=True):
            (alone,) = caption(image[None], num_beams)
            is_same = torch.equal(alone, expected[: len(alone)])
            is_padded = bool((expected[len(alone) :] == model.config.pad_token_id).all())
            require(is_same and is_padded, "an image's caption is the same alone and in a batch")


@torch.no_grad()
def check_reload(model: CaptionerModel, inputs: dict[str, Tensor]) -> None:
    """Check that a saved and reloaded captioner has the same parameters and buffers, and computes the same."""
    with TemporaryDirectory() as folder, _unwritten_memory_is_nan():
        model.save_pretrained(folder)
        reloaded = CaptionerModel.from_pretrained(folder).eval()
    # Run both before their buffers are compared: some are made when the first image is seen.
    logits, expected = (each(**inputs, labels=LABELS).logits for each in (reloaded, model))
    for kind in ("parameters", "buffers"):
        mine, theirs = (dict(getattr(each, f"named_{kind}")()) for each in (model, reloaded))
        require(mine.keys() == theirs.keys(), f"a reloaded part has the same {kind}")
        for name, tensor in mine.items():
            advice = "save it, or make it anew in init_non_persistent_buffers()" if kind == "buffers" else "it is lost"
            require(torch.equal(tensor, theirs[name]), "a reloaded part is equal", f"{name} is not; {advice}")
    require_close(logits, expected, "a reloaded part computes the same", 1e-4)


@contextmanager
def _unwritten_memory_is_nan() -> Iterator[None]:
    """Fill new tensors with NaN within the `with` block, so that a value that no checkpoint holds is noticed."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warned_only)
