"""The checks for authors of parts notice each broken rule. That the built-in parts pass is tested beside each kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from hf_captioner import DATASETS, METRICS
from hf_captioner.data.shapes import load_shapes
from hf_captioner.metrics.java import JAVA_METRICS
from hf_captioner.model.attentions import AdaptiveAttention, AdditiveAttention, DotAttention, HardAttention
from hf_captioner.model.decoder_interface import DecoderOutput
from hf_captioner.model.decoders import GRUDecoder, LSTMDecoder
from hf_captioner.model.encoders import TimmEncoder
from hf_captioner.testing import check_attention, check_dataset, check_decoder, check_encoder, check_metric


def broken(base: type, **flaws: Any) -> type:
    """Make a part like `base` with other attributes."""
    return type(f"Broken{base.__name__}", (base,), flaws)


def changed(base: type, change: Callable[..., Any], method: str = "forward") -> type:
    """Make a part like `base` whose method returns `change(part, result, *arguments)`."""
    original = getattr(base, method)

    @wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, original(self, *args, **kwargs), *args)

    return broken(base, **{method: run})


class Doubled(torch.autograd.Function):
    """Doubles a tensor, with the gradient of a function that does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class UnsavedAttention(DotAttention):
    def __init__(self, *sizes: int, **kwargs: int) -> None:
        super().__init__(*sizes, **kwargs)
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.scale * query, keys, memory)


class DoublingAttention(DotAttention):
    sums_cells = True

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = super().forward(query, keys, memory)
        return 2 * context, weights


class IdleAttention(DotAttention):
    def __init__(self, *sizes: int, **kwargs: int) -> None:
        super().__init__(*sizes, **kwargs)
        self.idle = nn.Linear(2, 2)


ATTENTIONS: list[tuple[type, str]] = [
    (changed(DotAttention, lambda part, keys, *_: (keys, keys), "keys"), "keys.* is one tensor with the images"),
    (changed(DotAttention, lambda part, out, *_: out[0]), r"forward returns \(context, weights\)"),
    (changed(DotAttention, lambda part, out, *_: (out[0][..., 1:], out[1])), r"the context is \(B, K, C\)"),
    (changed(DotAttention, lambda part, out, *_: (out[0], out[1].mT)), r"the weights are \(B, K, P\)"),
    (changed(DotAttention, lambda part, out, *_: (out[0] / 0, out[1])), "finite"),
    (changed(DotAttention, lambda part, out, *_: (out[0], out[1] - 0.5)), "weights are not negative"),
    (changed(DotAttention, lambda part, out, *_: (out[0], 2 * out[1])), "sum to 1"),
    (changed(AdaptiveAttention, lambda part, out, *_: (out[0], 9 * out[1])), "sum to at most 1"),
    (changed(DotAttention, lambda part, out, *_: (out[0] + torch.rand(()), out[1])), "same inputs give the same"),
    (changed(DotAttention, lambda part, keys, *_: keys + keys.mean(0), "keys"), "keys of an image depend on that"),
    (changed(DotAttention, lambda part, out, *_: (out[0] + out[0].mean(0), out[1])), "images of a batch do not see"),
    (
        changed(DotAttention, lambda part, out, *_: (out[0] + out[0].mean(1, keepdim=True), out[1])),
        "queries of an image",
    ),
    (changed(DotAttention, lambda part, out, *_: (out[0].detach(), out[1])), "gradients flow from context"),
    (changed(DotAttention, lambda part, out, *_: (Doubled.apply(out[0]), out[1])), "gradients are those"),
    (changed(HardAttention, lambda part, out, *_: (*out[:2], *(x.detach() for x in out[2:]))), "carry a gradient"),
    (changed(HardAttention, lambda part, out, *_: (*out[:2], *(-x for x in out[2:]))), "at most 0"),
    (broken(HardAttention, entropy_weight=property(lambda part: None, lambda part, value: None)), "entropy_weight"),
    (DoublingAttention, "with sums_cells, the context is weights @ memory"),
    (IdleAttention, "idle.weight gets a gradient"),
    (UnsavedAttention, "reloaded part is equal.*attention.scale is not"),
]


class ForgetfulDecoder(GRUDecoder):
    def forward(self, input_ids: Tensor, memory: Any, state: Any = None) -> DecoderOutput:  # type: ignore[override]
        return super().forward(input_ids, memory)


class PaddingDecoder(LSTMDecoder):
    def forward(self, input_ids: Tensor, memory: Any, state: Any = None, lengths: Any = None) -> DecoderOutput:  # type: ignore[override]
        return super().forward(input_ids, memory, state)


class DemandingDecoder(LSTMDecoder):
    def forward(self, input_ids: Tensor, memory: Any, state: Any, lengths: Any) -> DecoderOutput:  # type: ignore[override]
        return super().forward(input_ids, memory, state, lengths)


class TeacherForcedDecoder(LSTMDecoder):
    def forward(self, input_ids: Tensor, memory: Any, state: Any = None, sampling: float = 0.0) -> DecoderOutput:  # type: ignore[override]
        return super().forward(input_ids, memory, state)


class ExtraDecoder(LSTMDecoder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = nn.Linear(2, 2)


class SiblingDecoder(LSTMDecoder):
    def forward(self, input_ids: Tensor, memory: Any, state: Any = None, siblings: Any = None) -> DecoderOutput:  # type: ignore[override]
        output = super().forward(input_ids, memory, state)
        return output if siblings is None else output._replace(logits=output.logits[siblings.first][siblings.group])


def seen_from_afar(part: Any, output: DecoderOutput, *_: Any) -> DecoderOutput:
    assert output.hidden is not None
    return output._replace(logits=output.logits + output.hidden.mean() * (output.logits != 0))


DECODERS: list[tuple[type, str]] = [
    (
        changed(LSTMDecoder, lambda part, out, *_: (out.logits, out.state)),
        r"forward returns \(logits, weights, state\)",
    ),
    (changed(LSTMDecoder, lambda part, out, *_: out._replace(logits=out.logits[..., 1:])), r"logits are \(N, T, V\)"),
    (changed(LSTMDecoder, lambda part, out, *_: out._replace(weights=out.weights[:, 1:])), r"weights are \(N, T, P\)"),
    (changed(LSTMDecoder, lambda part, out, *_: out._replace(state=list(out.state))), "the state is a tuple"),
    (changed(LSTMDecoder, seen_from_afar), "captions do not see each other"),
    (changed(LSTMDecoder, lambda part, out, *_: out._replace(logits=out.logits + 1)), "logits are zero where"),
    (changed(LSTMDecoder, lambda part, memory, *_: memory.cells, "prepare"), "prepare.* returns a Memory"),
    (DemandingDecoder, r"forward takes \(input_ids, memory, state\) and needs nothing else.*lengths"),
    (PaddingDecoder, "are zero where a caption is over"),
    (TeacherForcedDecoder, "all words but the first are drawn"),
    (ForgetfulDecoder, "a carried state gives what recomputation gives"),
    (SiblingDecoder, "captions that continue the same one"),
    (
        changed(LSTMDecoder, lambda part, out, *_: out._replace(logits=Doubled.apply(out.logits), packed=None)),
        "the gradient of",
    ),
    (ExtraDecoder, "every parameter gets a gradient; extra.weight"),
    (
        changed(LSTMDecoder, lambda part, out, *_: out._replace(log_probs=None)),
        "log_probs of an attention that samples",
    ),
    (broken(LSTMDecoder, output=property(lambda part: None, lambda part, value: None)), "has the module output"),
]


class StatefulEncoder(TimmEncoder):
    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        with torch.no_grad():
            self.body.train()(torch.zeros(2, 3, height, width))
        return super().grid_size(height, width)


class UnsavedEncoder(TimmEncoder):
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self.register_buffer("shift", torch.ones(()), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values) + self.shift


def transposed(part: Any, cells: Tensor, *_: Any) -> Tensor:
    return cells.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)


ENCODERS: list[tuple[type, str]] = [
    (broken(TimmEncoder, hidden_size=0.5), "hidden_size is the number of channels"),
    (broken(TimmEncoder, data_config={}), "data_config says what pixels"),
    (broken(TimmEncoder, grid_size=lambda part, height, width: 16), r"is \(rows, columns\)"),
    (broken(TimmEncoder, grid_size=lambda part, height, width: part.eval() and (4, 4)), "grid_size leaves the mode"),
    (StatefulEncoder, "neither weights nor statistics"),
    (broken(TimmEncoder, grid_box=lambda part, height, width: (64, 0, 0, 64)), "grid_box is"),
    (broken(TimmEncoder, grid_size=lambda part, height, width: (4, 5)), r"cells are \(B, P, C\)"),
    (changed(TimmEncoder, lambda part, cells, *_: cells + torch.rand(())), "same images give the same cells"),
    (changed(TimmEncoder, lambda part, cells, *_: cells - cells.mean((0, 1))), "images of a batch do not see"),
    (changed(TimmEncoder, lambda part, cells, *_: torch.ones_like(cells)), "different images have different"),
    (changed(TimmEncoder, transposed), "row by row from the top left"),
    (changed(TimmEncoder, lambda part, cells, *_: cells.detach()), "gradients flow"),
    (UnsavedEncoder, "reloaded part is equal.*init_non_persistent_buffers"),
]


def shapes(change: Callable[[Dataset], Dataset]) -> Callable[..., Any]:
    """Make a data set like `shapes` with changed splits."""

    def load(split: str | None = None, **kwargs: Any) -> Dataset | DatasetDict:
        splits = DatasetDict({name: change(load_shapes(name, num_images=3)) for name in ("train", "test")})
        if split is not None and split not in splits:
            raise ValueError("It has train and test.")
        return splits if split is None else splits[split]

    return load


def put(name: str, values: list[Any]) -> Callable[..., Any]:
    return shapes(lambda dataset: dataset.remove_columns(name).add_column(name, values))


def only_train(split: str | None = "train") -> Dataset:
    return load_shapes("train", num_images=3)


def lenient(split: str | None = None) -> Any:
    load = shapes(lambda dataset: dataset)
    return load(split) if split in (None, "train", "test") else load("train")


DATASETS_: list[tuple[Callable[..., Any], str]] = [
    (only_train, "split=None gives a DatasetDict"),
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


def metric(compute: Callable[..., Any]) -> type:
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


def ids(rows: list[tuple[Any, str]]) -> list[str]:
    return [rule for _, rule in rows]


@pytest.mark.parametrize(("part", "rule"), ATTENTIONS, ids=ids(ATTENTIONS))
def test_broken_attention(part: type, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_attention(part)


@pytest.mark.parametrize(("part", "rule"), DECODERS, ids=ids(DECODERS))
def test_broken_decoder(part: type, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_decoder(part)


@pytest.mark.parametrize(("part", "rule"), ENCODERS, ids=ids(ENCODERS))
def test_broken_encoder(part: type, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_encoder(part, "test_resnet", image_size=(64, 64), output_stride=16)


@pytest.mark.parametrize(("part", "rule"), DATASETS_, ids=ids(DATASETS_))
def test_broken_dataset(part: Callable[..., Any], rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_dataset(part)


@pytest.mark.parametrize(("part", "rule"), METRICS_, ids=ids(METRICS_))
def test_broken_metric(part: type, rule: str) -> None:
    with pytest.raises(AssertionError, match=rule):
        check_metric(part)


def test_dataset_keeps_its_contract() -> None:
    check_dataset(DATASETS.get("shapes"), num_images=4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in JAVA_METRICS else ()) for name in METRICS.names()],
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
