"""The checks for authors of parts notice each broken rule. That the built-in parts pass is tested beside each kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from torch import Tensor, nn

from hf_captioner import DATASETS, METRICS
from hf_captioner.data.shapes import load_shapes
from hf_captioner.metrics.java import JAVA_METRICS
from hf_captioner.model.attentions import AdaptiveAttention, AdditiveAttention, DotAttention, HardAttention
from hf_captioner.model.decoder_interface import DecoderOutput
from hf_captioner.model.decoders import GRUDecoder, LSTMDecoder
from hf_captioner.model.encoders import TimmEncoder
from hf_captioner.testing import check_attention, check_dataset, check_decoder, check_encoder, check_metric

Change = Callable[..., Any]


def broken(base: type, **flaws: Any) -> type:
    """Make a part like `base` with other attributes."""
    return type(f"Broken{base.__name__}", (base,), flaws)


def changed(base: type, change: Change, method: str = "forward", **flaws: Any) -> type:
    """Make a part like `base` whose method returns `change(part, result, *arguments)`."""
    original = getattr(base, method)

    @wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, original(self, *args, **kwargs), *args)

    return broken(base, **{method: run}, **flaws)


def with_unused_layer(base: type) -> type:
    """Make a part with a layer that computes nothing."""
    return changed(base, lambda part, *_: part.add_module("idle", nn.Linear(2, 2)), "__init__")


def with_unsaved_buffer(base: type, use: Change, method: str = "forward") -> type:
    """Make a part whose method returns `use(part, result)`, which reads a buffer that no checkpoint holds."""
    build = changed(base, lambda part, *_: part.register_buffer("scale", torch.full((), 2.0), False), "__init__")
    return changed(build, lambda part, out, *_: use(part, out), method)


class Doubled(torch.autograd.Function):
    """Doubles a tensor, with the gradient of a function that does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


DOT = partial(changed, DotAttention)
ATTENTIONS: list[tuple[type, str]] = [
    (DOT(lambda part, keys, *_: (keys, keys), "keys"), "keys.* is one tensor with the images"),
    (DOT(lambda part, out, *_: out[0]), r"forward returns \(context, weights\)"),
    (DOT(lambda part, out, *_: (out[0][..., 1:], out[1])), r"the context is \(B, K, C\)"),
    (DOT(lambda part, out, *_: (out[0], out[1].mT)), r"the weights are \(B, K, P\)"),
    (DOT(lambda part, out, *_: (out[0] / 0, out[1])), "finite"),
    (DOT(lambda part, out, *_: (out[0], out[1] - 0.5)), "weights are not negative"),
    (DOT(lambda part, out, *_: (out[0], 2 * out[1])), "sum to 1"),
    (changed(AdaptiveAttention, lambda part, out, *_: (out[0], 9 * out[1])), "sum to at most 1"),
    (DOT(lambda part, out, *_: (out[0] + torch.rand(()), out[1])), "same inputs give the same"),
    (DOT(lambda part, keys, *_: keys + keys.mean(0), "keys"), "keys of an image depend on that"),
    (DOT(lambda part, out, *_: (out[0] + out[0].mean(0), out[1])), "images of a batch do not see"),
    (DOT(lambda part, out, *_: (out[0] + out[0].mean(1, keepdim=True), out[1])), "queries of an image"),
    (DOT(lambda part, out, *_: (out[0].detach(), out[1])), "gradients flow from context"),
    (DOT(lambda part, out, *_: (Doubled.apply(out[0]), out[1])), "gradients are those"),
    (changed(HardAttention, lambda part, out, *_: (*out[:2], *(x.detach() for x in out[2:]))), "carry a gradient"),
    (changed(HardAttention, lambda part, out, *_: (*out[:2], *(-x for x in out[2:]))), "at most 0"),
    (broken(HardAttention, entropy_weight=property(lambda part: None, lambda part, value: None)), "entropy_weight"),
    (DOT(lambda part, out, *_: (2 * out[0], out[1]), sums_cells=True), "with sums_cells, the context is weights @ mem"),
    (with_unused_layer(DotAttention), "idle.weight gets a gradient"),
    (with_unsaved_buffer(DotAttention, lambda part, keys: part.scale * keys, "keys"),
     "reloaded part is equal.*attention.scale is not"),
]  # fmt: skip

LSTM, read = partial(changed, LSTMDecoder), LSTMDecoder.forward


def with_siblings_of_one_image(part: Any, ids: Tensor, memory: Any, state: Any = None, siblings: Any = None) -> Any:
    """Read captions that continue the same one as if they went on alike."""
    output = read(part, ids, memory, state)
    return output if siblings is None else output._replace(logits=output.logits[siblings.first][siblings.group])


def seen_from_afar(part: Any, output: DecoderOutput, *_: Any) -> DecoderOutput:
    assert output.hidden is not None
    return output._replace(logits=output.logits + output.hidden.mean() * (output.logits != 0))


DECODERS: list[tuple[type, str]] = [
    (LSTM(lambda part, out, *_: (out.logits, out.state)), r"forward returns \(logits, weights, state\)"),
    (LSTM(lambda part, out, *_: out._replace(logits=out.logits[..., 1:])), r"logits are \(N, T, V\)"),
    (LSTM(lambda part, out, *_: out._replace(weights=out.weights[:, 1:])), r"weights are \(N, T, P\)"),
    (LSTM(lambda part, out, *_: out._replace(state=list(out.state))), "the state is a tuple"),
    (LSTM(seen_from_afar), "captions do not see each other"),
    (LSTM(lambda part, out, *_: out._replace(logits=out.logits + 1)), "logits are zero where"),
    (LSTM(lambda part, memory, *_: memory.cells, "prepare"), "prepare.* returns a Memory"),
    (broken(LSTMDecoder, forward=lambda part, ids, memory, state, lengths: None),
     r"forward takes \(input_ids, memory, state\) and needs nothing else.*lengths"),
    (broken(LSTMDecoder, forward=lambda part, ids, memory, state=None, lengths=None: read(part, ids, memory, state)),
     "are zero where a caption is over"),
    (broken(LSTMDecoder, forward=lambda part, ids, memory, state=None, sampling=0.0: read(part, ids, memory, state)),
     "all words but the first are drawn"),
    (broken(GRUDecoder, forward=lambda part, ids, memory, state=None: GRUDecoder.forward(part, ids, memory)),
     "a carried state gives what recomputation gives"),
    (broken(LSTMDecoder, forward=with_siblings_of_one_image), "captions that continue the same one"),
    (LSTM(lambda part, out, *_: out._replace(logits=Doubled.apply(out.logits), packed=None)), "the gradient of"),
    (with_unused_layer(LSTMDecoder), "every parameter gets a gradient; idle.weight"),
    (LSTM(lambda part, out, *_: out._replace(log_probs=None)), "log_probs of an attention that samples"),
    (broken(LSTMDecoder, output=property(lambda part: None, lambda part, value: None)), "has the module output"),
]  # fmt: skip


def grid_size_in_training_mode(part: Any, height: int, width: int) -> Any:
    """Return the grid's size after a forward pass that changes the encoder's statistics."""
    with torch.no_grad():
        part.body.train()(torch.zeros(2, 3, height, width))
    return TimmEncoder.grid_size(part, height, width)


def transposed(part: Any, cells: Tensor, *_: Any) -> Tensor:
    return cells.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)


TIMM = partial(changed, TimmEncoder)
ENCODERS: list[tuple[type, str]] = [
    (broken(TimmEncoder, hidden_size=0.5), "hidden_size is the number of channels"),
    (broken(TimmEncoder, data_config={}), "data_config says what pixels"),
    (broken(TimmEncoder, grid_size=lambda part, height, width: 16), r"is \(rows, columns\)"),
    (broken(TimmEncoder, grid_size=lambda part, height, width: part.eval() and (4, 4)), "grid_size leaves the mode"),
    (broken(TimmEncoder, grid_size=grid_size_in_training_mode), "neither weights nor statistics"),
    (broken(TimmEncoder, grid_box=lambda part, height, width: (64, 0, 0, 64)), "grid_box is"),
    (broken(TimmEncoder, grid_size=lambda part, height, width: (4, 5)), r"cells are \(B, P, C\)"),
    (TIMM(lambda part, cells, *_: cells + torch.rand(())), "same images give the same cells"),
    (TIMM(lambda part, cells, *_: cells - cells.mean((0, 1))), "images of a batch do not see"),
    (TIMM(lambda part, cells, *_: torch.ones_like(cells)), "different images have different"),
    (TIMM(transposed), "row by row from the top left"),
    (TIMM(lambda part, cells, *_: cells.detach()), "gradients flow"),
    (with_unsaved_buffer(TimmEncoder, lambda part, cells: cells + part.scale),
     "reloaded part is equal.*init_non_persistent_buffers"),
]  # fmt: skip


def shapes(change: Change) -> Change:
    """Make a data set like `shapes` with changed splits."""

    def load(split: str | None = None, **kwargs: Any) -> Any:
        splits = DatasetDict({name: change(load_shapes(name, num_images=3)) for name in ("train", "test")})
        if split is not None and split not in splits:
            raise ValueError("It has train and test.")
        return splits if split is None else splits[split]

    return load


def put(name: str, values: list[Any]) -> Change:
    return shapes(lambda dataset: dataset.remove_columns(name).add_column(name, values))


def lenient(split: str | None = None) -> Any:
    return shapes(lambda dataset: dataset)(split if split in (None, "train", "test") else "train")


DATASETS_: list[tuple[Change, str]] = [
    (lambda split="train": load_shapes("train", num_images=3), "split=None gives a DatasetDict"),
    (lenient, "an unknown split is refused by a ValueError"),
    (shapes(lambda dataset: dataset.remove_columns("image_id")), "no image_id"),
    (put("image_id", [1, 2, 3]), "image_id is a string"),
    (put("image_id", ["a", "b", "a"]), "the same image_id"),
    (put("captions", ["a dog", "a cat", "a bird"]), "captions are a list of strings"),
    (put("captions", [["a dog"], [" . "], ["a bird"]]), "captions with words"),
    (put("image", [{"bytes": b"no image", "path": None}] * 3), "every image opens"),
    (put("image", ["a.png", "b.png", "c.png"]), "every image opens"),
    (shapes(lambda dataset: dataset.select(random.sample(range(3), 3))), "the same order|same in the same"),
]


def metric(compute: Change) -> type:
    return type("Metric", (), {"compute": lambda self, predictions, references: compute(predictions, references)})


class Remembering:
    def __init__(self) -> None:
        self.seen = 0

    def compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        self.seen += len(predictions)
        return {"seen": float(self.seen)}


METRICS_: list[tuple[type, str]] = [
    (metric(lambda predictions, references: 0.5), "returns a dict"),
    (metric(lambda predictions, references: {"score": float("nan")}), "score is a finite float"),
    (metric(lambda predictions, references: {"score": "0.5"}), "score is a finite float"),
    (metric(lambda predictions, references: {"score": 1.0} if predictions.pop() else {}), "leaves the captions"),
    (Remembering, "does not remember"),
    (metric(lambda predictions, references: {"first": float(len(predictions[0]))}), "the order of the images"),
    (metric(lambda predictions, references: {str(len(predictions)): 1.0}), "a single image has the same scores"),
]


CHECKS = [
    (check_attention, ATTENTIONS),
    (check_decoder, DECODERS),
    (partial(check_encoder, encoder_name="test_resnet", image_size=(64, 64), output_stride=16), ENCODERS),
    (check_dataset, DATASETS_),
    (check_metric, METRICS_),
]
BROKEN = [pytest.param(check, part, rule, id=rule) for check, rows in CHECKS for part, rule in rows]


@pytest.mark.parametrize(("check", "part", "rule"), BROKEN)
def test_broken_rule_is_named(check: Change, part: Change, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check(part)


def test_dataset_keeps_its_contract() -> None:
    check_dataset(DATASETS.get("shapes"), num_images=4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in JAVA_METRICS else ()) for name in METRICS.names()]
)
def test_metrics_keep_their_contract(name: str) -> None:
    try:
        check_metric(METRICS.get(name))
    except (ImportError, OSError) as e:  # of the metrics in Java
        pytest.skip(str(e))


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_attention(AdditiveAttention)
    assert torch.equal(torch.rand(3), expected)
