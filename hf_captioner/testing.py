"""What parts promise, as checks for those who write one.

    from hf_captioner.testing import check_attention

    def test_my_attention():
        check_attention(MyAttention, num_heads=4)

A check builds the part as the model does, small and with random weights, and raises an AssertionError that says which
promise is broken. It takes the part itself, be it a class or a function, and the arguments a user would give it beside
the sizes. The promises stand at the top of `encoders.py`, `attentions.py`, `decoders.py`, `data.py` and
`metrics/__init__.py`.
"""

# B: images, K: captions of an image, N = B·K, T: words, V: vocabulary, P: image cells, C: channels of a cell
# E: word embedding, D: state, A: attention's hidden layer

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from numbers import Real
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .data.collator import CaptionCollator
from .data.rows import check_captions, open_row, undecoded
from .model.attentions import ATTENTIONS
from .model.configuration_captioner import CaptionerConfig
from .model.decoder_interface import RecurrentCache, Siblings
from .model.decoders import DECODERS
from .model.encoder_model import CaptionerEncoderOutput
from .model.encoders import ENCODERS
from .model.image_processing_captioner import CaptionerImageProcessor
from .model.modeling_captioner import CaptionerModel
from .model.processing_captioner import CaptionerProcessor
from .model.registry import Registry

__all__ = ["check_attention", "check_dataset", "check_decoder", "check_encoder", "check_metric"]

B, K, T, V, P, C, E, D, A = 3, 2, 7, 30, 6, 10, 8, 12, 8
LENGTHS = (7, 3, 5, 1, 6, 6)  # (N,)
TINY = {"hidden_size": D, "attention_size": A, "embedding_size": E, "vocab_size": V, "output_dropout": 0.0}
# For attentions and decoders, whose captioner gets cells and never runs it.
ANY_ENCODER = {"encoder_name": "test_resnet"}
LABELS = (((5, 9, 12, 7, 3), (8, 3)), ((6, 6, 3), ()), ((10, 3), (5, 11, 14, 3)))

Check = TypeVar("Check", bound=Callable[..., None])


def _seeded(check: Check) -> Check:
    """The same check each time, and the caller's random numbers as if there had been none."""

    @wraps(check)
    def run(*args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(*args, **kwargs)

    return run  # type: ignore[return-value]


def _promise(is_kept: bool, promise: str, found: Any = None) -> None:
    if not is_kept:
        raise AssertionError(f"Broken promise: {promise}." + ("" if found is None else f" Found: {found}."))


def _shape(tensor: Any, shape: Sequence[int], promise: str) -> None:
    given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    _promise(given == tuple(shape), promise, f"{given} where it is {tuple(shape)}")
    _promise(bool(torch.isfinite(tensor).all()), f"{promise}, and finite")


def _close(first: Tensor, second: Tensor, promise: str, tolerance: float = 1e-6) -> None:
    same = first.shape == second.shape and torch.allclose(first, second, rtol=tolerance, atol=tolerance)
    _promise(same, promise, None if same or first.shape != second.shape else _difference(first, second))


def _difference(first: Tensor, second: Tensor) -> str:
    return f"a difference of {(first - second).abs().max().item():.1e}"


@_seeded
def check_attention(part: Callable[..., nn.Module], **kwargs: Any) -> None:
    """Check what `attentions.py` asks of an attention.

    Args:
        part: what `ATTENTIONS` would hold.
        kwargs: its arguments beside the sizes, as in `attention_kwargs`.

    Raises:
        AssertionError: a promise is broken; it says which.
    """
    attention = part(query_size=D, memory_size=C, attention_size=A, **kwargs).double().eval()
    query, memory, sentinel = (_noise(B, length, size) for length, size in ((K, D), (P, C), (K, D)))
    uses_sentinel = getattr(attention, "uses_sentinel", False)
    given = [query, memory, *([sentinel] if uses_sentinel else [])]

    def attend(query: Tensor, memory: Tensor, *sentinels: Tensor) -> tuple[Tensor, ...]:
        return attention(query, attention.keys(memory), memory, *sentinels)  # type: ignore[operator]

    keys = attention.keys(memory)  # type: ignore[operator]
    _promise(isinstance(keys, Tensor) and len(keys) == B, "keys(memory) is one tensor with the images in front")
    output = attend(*given)
    _promise(
        isinstance(output, tuple) and len(output) == 2, "forward returns (context, weights) in evaluation", type(output)
    )
    context, weights = output
    _shape(context, (B, K, C), "the context is (B, K, C)")
    _shape(weights, (B, K, P), "the weights are (B, K, P)")
    _promise(bool((weights >= 0).all()), "weights are not negative")
    total = weights.sum(-1)
    if uses_sentinel:
        _promise(bool((total < 1 + 1e-9).all()), "beside a sentinel, the weights of the cells sum to at most 1")
    else:
        _close(total, torch.ones_like(total), "the weights of a query sum to 1")
    again = attend(*given)
    _promise(all(map(torch.equal, output, again)), "in evaluation, the same inputs give the same outputs")
    some = torch.tensor([2, 0])
    _close(attention.keys(memory[some]), keys[some], "keys of an image depend on that image alone")  # type: ignore[operator]
    for index in range(B):
        alone = attend(*(tensor[index : index + 1] for tensor in given))
        for mine, theirs in zip(alone, output, strict=True):
            _close(mine[0], theirs[index], "images of a batch do not see each other")
    for index in range(K):
        alone = attend(query[:, index : index + 1], memory, *(extra[:, index : index + 1] for extra in given[2:]))
        for mine, theirs in zip(alone, output, strict=True):
            _close(mine[:, 0], theirs[:, index], "queries of an image do not see each other")
    _shape(attend(query, memory[:, :4], *given[2:])[1], (B, K, 4), "any number of cells will do")
    _check_gradients_of_attention(attention, attend, given)
    _check_sampling(attention.train(), attend, given)
    _check_captioner(ATTENTIONS, part, kwargs)


def _check_gradients_of_attention(
    attention: nn.Module, attend: Callable[..., tuple[Tensor, ...]], given: list[Tensor]
) -> None:
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    learned = [parameter for parameter in attention.parameters() if parameter.requires_grad]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return attend(*tensors[: len(inputs)])

    flows = all(tensor.requires_grad for tensor in run(*inputs))
    _promise(flows, "gradients flow from context and weights")
    try:
        torch.autograd.gradcheck(run, (*inputs, *learned))
    except RuntimeError as e:  # GradcheckError, or what a wrong backward raises
        first = str(e).strip().partition("\n")[0]
        raise AssertionError(f"Broken promise: gradients are those of what forward computes. Found: {first}") from e


def _check_sampling(attention: nn.Module, attend: Callable[..., tuple[Tensor, ...]], given: list[Tensor]) -> None:
    """In training mode."""
    output = attend(*given)
    _shape(output[0], (B, K, C), "the context is (B, K, C) in training too")
    _shape(output[1], (B, K, P), "the weights are (B, K, P) in training too")
    if len(output) == 2:
        return
    _promise(len(output) == 3, "forward returns (context, weights) or (context, weights, log-probabilities)")
    log_probs = output[2]
    _shape(log_probs, (B, K), "log-probabilities of sampled cells are (B, K)")
    _promise(bool((log_probs <= 0).all()), "log-probabilities are at most 0")
    _promise(log_probs.requires_grad, "log-probabilities carry a gradient")
    for name in ("reinforce_weight", "entropy_weight"):
        value = getattr(attention, name, None)
        _promise(
            isinstance(value, int | float) and value >= 0, f"an attention that samples has {name}, a number >= 0", value
        )
    baseline = getattr(attention, "baseline", None)
    is_buffer = isinstance(baseline, Tensor) and baseline.shape == () and "baseline" in attention.state_dict()
    _promise(is_buffer, "an attention that samples has baseline, a tensor () that is saved")


@_seeded
def check_decoder(part: Callable[..., nn.Module], **kwargs: Any) -> None:
    """Check what `decoders.py` asks of a decoder, with attentions that use a sentinel or sample among others.

    Args:
        part: what `DECODERS` would hold.
        kwargs: its arguments beside the sizes and rates, as in `decoder_kwargs`.

    Raises:
        AssertionError: a promise is broken; it says which.
    """
    ids, cells = torch.randint(0, V, (B * K, T)), _noise(B, P, C)
    for name, gate, deep_output in (("additive", True, True), ("adaptive", False, False), ("hard", True, False)):
        decoder: Any = part(
            vocab_size=V,
            embedding_size=E,
            hidden_size=D,
            memory_size=C,
            attention=ATTENTIONS.get(name)(query_size=D, memory_size=C, attention_size=A),
            gate=gate,
            deep_output=deep_output,
            memory_dropout=0.0,
            embedding_dropout=0.0,
            output_dropout=0.0,
            **kwargs,
        )
        decoder = decoder.double().eval()
        _promise(
            isinstance(getattr(decoder, "embedding", None), nn.Module), "a decoder has its word embedding in .embedding"
        )
        _promise(
            isinstance(getattr(decoder, "attention", None), nn.Module), "a decoder has its attention in .attention"
        )
        with torch.no_grad():
            _check_reading(decoder, ids, cells)
            _check_search(decoder, ids, cells)
        _check_gradients_of_decoder(decoder, ids, cells)
        output = decoder.train()(ids, decoder.prepare(cells), lengths=torch.tensor(LENGTHS))
        if name == "hard":
            _shape(output.log_probs, (B * K, T), "log-probabilities of an attention that samples come back as (N, T)")
    _check_captioner(DECODERS, part, kwargs)


def _check_reading(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    memory = decoder.prepare(cells)
    whole = decoder(ids, memory)
    _shape(whole.logits, (B * K, T, V), "logits are (N, T, V)")
    _shape(whole.weights, (B * K, T, P), "weights are (N, T, P)")
    _shape(whole.hidden, (B * K, T, D), "hidden is (N, T, D)")
    is_state = isinstance(whole.state, tuple) and all(len(tensor) == B * K for tensor in whole.state)
    _promise(is_state, "the state is a tuple of tensors with the captions in front, (N, ...)")

    packed = decoder(ids, memory, lengths=torch.tensor(LENGTHS))
    for n, length in enumerate(LENGTHS):
        alone = decoder(ids[n : n + 1, :length], decoder.prepare(cells[n // K : n // K + 1]))
        for name in ("logits", "weights", "hidden"):
            mine, together, read = (getattr(output, name) for output in (alone, whole, packed))
            _close(together[n, :length], mine[0], f"{name}: captions do not see each other, nor words to come")
            _close(read[n, :length], mine[0], f"{name}: with lengths, captions are read as without")
            _promise(not read[n, length:].any(), f"{name} are zero where a caption is over")

    state = None
    for t in range(T):
        step = decoder(ids[:, t : t + 1], memory, state)
        state = step.state
        _close(step.logits[:, 0], whole.logits[:, t], "a carried state gives what recomputation gives")
        _close(step.weights[:, 0], whole.weights[:, t], "a carried state gives the weights of recomputation")


def _check_search(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    """As in a search, where captions continue others and images leave."""
    memory = decoder.prepare(cells)
    parents = torch.tensor([1, 1, 2, 3, 5, 5])
    cache = RecurrentCache(memory, decoder(ids[:, :3], memory).state, 3)
    cache.reorder_cache(parents)
    siblings = Siblings.of(parents)
    history = torch.cat([ids[parents, :3], ids[:, 3:4]], 1)
    expected = decoder(history, memory)
    known = ((None, siblings),) if getattr(decoder, "uses_siblings", False) else ()
    for more in ((), *known):
        step = decoder(ids[:, 3:4], memory, cache.state, *more)
        promise = (
            "captions that continue the same one are read as if they did not" if more else "states can be reordered"
        )
        _close(step.logits[:, 0], expected.logits[:, 3], promise)
        _close(step.weights[:, 0], expected.weights[:, 3], promise)
    images = torch.tensor([2, 0])
    captions = (images.unsqueeze(1) * K + torch.arange(K)).flatten()
    cache.reorder_cache(captions)
    cache.keep_images(images)
    step = decoder(ids[captions, 3:4], cache.memory, cache.state)
    _close(step.logits[:, 0], expected.logits[captions, 3], "memory.take(images) is the memory of these images")


def _check_gradients_of_decoder(decoder: Any, ids: Tensor, cells: Tensor) -> None:
    lengths = torch.tensor(LENGTHS)
    is_read = torch.arange(T) < lengths.unsqueeze(1)

    def loss() -> Tensor:
        output = decoder(ids, decoder.prepare(cells), lengths=lengths)
        return output.logits[is_read].sin().sum() + output.weights[is_read].square().sum()

    decoder.zero_grad()
    loss().backward()
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            continue
        _promise(parameter.grad is not None, f"every parameter gets a gradient; {name} gets none")
        direction, step = _noise(*parameter.shape), 1e-6
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                parameter += sign * step * direction
                values.append(loss())
            parameter += step * direction
        _close(
            slope,
            (values[0] - values[1]) / (2 * step),
            f"the gradient of {name} is that of what forward computes",
            1e-5,
        )


@_seeded
def check_encoder(
    part: Callable[..., nn.Module],
    encoder_name: str = "",
    *,
    image_size: tuple[int, int] | None = None,
    **kwargs: Any,
) -> None:
    """Check what `encoders.py` asks of an encoder.

    Args:
        part: what `ENCODERS` would hold.
        encoder_name: architecture, as in `encoder_name` of the configuration.
        image_size: height and width of images; by default those that the encoder names in its `data_config`.
        kwargs: its further arguments, as in `encoder_kwargs`.

    Raises:
        AssertionError: a promise is broken; it says which.
    """
    encoder: Any = part(encoder_name, **kwargs)
    channels: Any = getattr(encoder, "hidden_size", None)
    _promise(isinstance(channels, int) and channels > 0, "hidden_size is the number of channels of a cell", channels)
    try:
        CaptionerImageProcessor.from_data_config(encoder.data_config)
        height, width = image_size or encoder.data_config["input_size"][1:]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise AssertionError(f"Broken promise: data_config says what pixels the encoder wants. Found: {e!r}") from e
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    rows, columns = _grid(encoder.train(), height, width)
    _promise(encoder.training, "grid_size leaves the mode, training or not, as it was")
    same = all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    _promise(same, "grid_size changes neither weights nor statistics")

    pixels = _noise(B, 3, height, width).float()
    with torch.no_grad():
        cells = encoder.eval()(pixels)
        _shape(
            cells, (B, rows * columns, channels), "cells are (B, P, C): rows x columns of grid_size, hidden_size wide"
        )
        _promise(torch.equal(encoder(pixels), cells), "in evaluation, the same images give the same cells")
        for index in range(B):
            _close(encoder(pixels[index : index + 1])[0], cells[index], "images of a batch do not see each other", 1e-3)
        _promise(not torch.equal(cells[0], cells[1]), "different images have different cells")
        if rows > 1 and columns > 1:
            _check_order(encoder, pixels, cells, rows, columns)
    if hasattr(encoder, "grid_box"):
        left, top, right, bottom = encoder.grid_box(height, width)
        _promise(left < right and top < bottom, "grid_box is (left, top, right, bottom)", (left, top, right, bottom))
    _check_gradients_of_encoder(encoder.train(), pixels)
    _check_captioner(ENCODERS, part, kwargs, pixels, encoder_name=encoder_name)


def _grid(encoder: Any, height: int, width: int) -> tuple[int, int]:
    grid = encoder.grid_size(height, width)
    is_grid = isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
    _promise(is_grid, "grid_size(height, width) is (rows, columns)", grid)
    return grid


def _check_order(encoder: Any, pixels: Tensor, cells: Tensor, rows: int, columns: int) -> None:
    """Changed pixels at the top right change other cells than changed pixels at the bottom left."""
    height, width = pixels.shape[-2] // 2, pixels.shape[-1] // 2
    places = []
    for corner in ((slice(None, height), slice(width, None)), (slice(height, None), slice(None, width))):
        changed = pixels.clone()
        changed[..., *corner] = changed[..., *corner].flip(0)
        change = (encoder(changed) - cells).square().sum((0, 2)).view(rows, columns)
        share = change / change.sum()
        places.append(((share.sum(1) @ torch.arange(rows).float()), (share.sum(0) @ torch.arange(columns).float())))
    (row, column), (lower, left) = places
    _promise(bool(row < lower and column > left), "cells run row by row from the top left")


def _check_gradients_of_encoder(encoder: Any, pixels: Tensor) -> None:
    pixels = pixels.clone().requires_grad_()
    cells = encoder(pixels)
    _promise(cells.requires_grad, "gradients flow from the cells")
    cells.square().mean().backward()
    given = pixels.grad
    seen = given is not None and bool(torch.isfinite(given).all()) and bool(given.any())
    _promise(seen, "gradients flow from the cells to the pixels")
    grads = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
    learned = [grad for grad in grads if grad is not None]
    _promise(not grads or bool(learned), "gradients flow from the cells to the weights")
    _promise(all(torch.isfinite(grad).all() for grad in learned), "gradients of the weights are finite")


def _check_captioner(
    registry: Registry, part: Any, kwargs: dict[str, Any], pixels: Tensor | None = None, **config: Any
) -> None:
    """The part inside a captioner: it learns, captions and comes back from a checkpoint."""
    kind = registry.kind.removesuffix("s")
    with registry.temporarily("part under test", part) as name:
        fields = {**TINY, **ANY_ENCODER, **config, f"{kind}_type": name, f"{kind}_kwargs": kwargs}
        model = CaptionerModel(CaptionerConfig(**fields))
        model.generation_config = model.default_generation_config()
        with torch.no_grad():
            for parameter in model.decoder.parameters():  # or all captions are alike
                parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
            if pixels is None:
                cells = _noise(B, P, model.encoder.part.hidden_size).float()
            else:
                cells = model.eval().encoder(pixels).last_hidden_state
        trained = model.encoder if pixels is not None else model.decoder
        _check_learning(
            model, trained, {"cells": cells} if pixels is None else {"pixel_values": pixels}, pixels is None
        )
        _check_captions(model.eval(), cells)
        _check_reload(model, {"cells": cells} if pixels is None else {"pixel_values": pixels})


def _labels() -> Tensor:
    labels = torch.full((B, K, max(len(words) for row in LABELS for words in row)), -100)
    for image, row in enumerate(LABELS):
        for caption, words in enumerate(row):
            labels[image, caption, : len(words)] = torch.tensor(words)
    return labels


def _check_learning(model: CaptionerModel, trained: nn.Module, seen: dict[str, Tensor], wholly: bool) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for half in (False, True):
        precision = "bfloat16" if half else "float32"
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.train()(**seen, labels=_labels()).loss
        _promise(bool(torch.isfinite(loss)), f"the loss is finite in {precision}", loss.item())
        loss.backward()
        for name, parameter in trained.named_parameters():
            grad = parameter.grad
            _promise(grad is not None or not (wholly and parameter.requires_grad), f"{name} gets a gradient")
            _promise(
                grad is None or bool(torch.isfinite(grad).all()), f"the gradient of {name} is finite in {precision}"
            )
    model.zero_grad()
    model.load_state_dict(before)  # running statistics moved


@torch.no_grad()
def _check_captions(model: CaptionerModel, cells: Tensor) -> None:
    def caption(cells: Tensor, num_beams: int, **kwargs: Any) -> Tensor:
        encoder_outputs = CaptionerEncoderOutput.of(cells)
        return model.generate(encoder_outputs=encoder_outputs, num_beams=num_beams, max_length=9, **kwargs)

    for num_beams in (1, 3):
        together = caption(cells, num_beams)
        again = caption(cells, num_beams, use_cache=False)
        _promise(torch.equal(again, together), "captions with and without a carried state are the same")
        for image, expected in zip(cells, together, strict=True):
            (alone,) = caption(image[None], num_beams)
            is_same = torch.equal(alone, expected[: len(alone)])
            _promise(is_same, "an image's caption is the same alone and in a batch")


@torch.no_grad()
def _check_reload(model: CaptionerModel, seen: dict[str, Tensor]) -> None:
    with TemporaryDirectory() as folder, _unwritten_memory_is_nan():
        model.save_pretrained(folder)
        reloaded = CaptionerModel.from_pretrained(folder).eval()
    # First of all: some buffers are made by the first image.
    logits, expected = (each(**seen, labels=_labels()).logits for each in (reloaded, model))
    for kind in ("parameters", "buffers"):
        mine, theirs = (dict(getattr(each, f"named_{kind}")()) for each in (model, reloaded))
        _promise(mine.keys() == theirs.keys(), f"a reloaded part has the same {kind}")
        for name, tensor in mine.items():
            if not torch.equal(tensor, theirs[name]):
                what = (
                    "save it, or make it anew in init_non_persistent_buffers()" if kind == "buffers" else "it is lost"
                )
                raise AssertionError(f"Broken promise: a reloaded part is equal. Found: {name} is not; {what}.")
    _close(logits, expected, "a reloaded part computes the same", 1e-4)


@contextmanager
def _unwritten_memory_is_nan() -> Iterator[None]:
    """What no checkpoint fills is seen at once."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def check_dataset(part: Callable[..., Any], **kwargs: Any) -> None:
    """Check what `data.py` asks of a data set.

    Every row is read, so give arguments that keep it small where the part has some.

    Args:
        part: what `DATASETS` would hold.
        kwargs: its further arguments.

    Raises:
        AssertionError: a promise is broken; it says which.
    """
    from datasets import Dataset, DatasetDict

    splits = part(None, **kwargs)
    _promise(
        isinstance(splits, DatasetDict) and len(splits) > 0,
        "split=None gives a DatasetDict of all splits",
        type(splits),
    )
    try:
        part("no such split", **kwargs)
    except ValueError as e:
        _promise(all(name in str(e) for name in splits), "an unknown split is refused by naming those there are", e)
    else:
        _promise(False, "an unknown split is refused by a ValueError")
    for name, expected in splits.items():
        dataset = part(name, **kwargs)
        _promise(isinstance(dataset, Dataset) and len(dataset) > 0, f"split {name!r} is a Dataset with rows")
        missing = {"image", "captions", "image_id"} - set(dataset.column_names)
        _promise(not missing, "columns are image, captions and image_id", f"no {', '.join(sorted(missing))}")
        _check_rows(dataset, name)
        same = all(dataset[column][:] == expected[column][:] for column in ("captions", "image_id"))
        _promise(same, "each time, and with split=None, the rows are the same in the same order")


def _check_rows(dataset: Any, split: str) -> None:
    names, captions = dataset["image_id"][:], dataset["captions"][:]
    _promise(all(isinstance(name, str) for name in names), "image_id is a string")
    _promise(len(set(names)) == len(names), f"no two images of a split have the same image_id ({split!r})")
    listed = all(isinstance(row, list) and all(isinstance(caption, str) for caption in row) for row in captions)
    _promise(listed, "captions are a list of strings")
    try:
        check_captions(dataset)
        rows = undecoded(dataset)
        for row in rows:
            open_row(row)
    except (ValueError, TypeError, KeyError) as e:
        raise AssertionError(f"Broken promise: every image opens and has captions with words. Found: {e}") from e
    pixels = {
        "input_size": (3, 32, 32),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    processor = CaptionerProcessor.from_captions((caption for row in captions for caption in row), pixels, min_count=1)
    batch = CaptionCollator(processor)([rows[0], rows[len(rows) - 1]])
    _promise(batch["pixel_values"].shape == (2, 3, 32, 32) and len(batch["labels"]) == 2, "rows become a batch")


def check_metric(part: Callable[[], Any], **kwargs: Any) -> None:
    """Check what `metrics/__init__.py` asks of a metric.

    Args:
        part: what `METRICS` would hold.
        kwargs: further arguments of `compute`.

    Raises:
        AssertionError: a promise is broken; it says which.
    """
    predictions = ["a dog runs on the beach", "two children", "", "a man in a red red shirt"]
    references = [
        ["a dog is running on the beach", "the dog runs"],
        ["two small children play with a ball in the snow"],
        ["a bird on a branch", "a small bird", "bird"],
        ["a man wears a red shirt", "the man in red"],
    ]

    def score(order: Sequence[int] = range(4), metric: Any = None) -> dict[str, Any]:
        metric = part() if metric is None else metric
        given = ([predictions[i] for i in order], [list(references[i]) for i in order])
        before = deepcopy(given)
        scores: dict[str, Any] = metric.compute(predictions=given[0], references=given[1], **kwargs)
        _promise(given == before, "compute leaves the captions it is given as they are")
        return scores

    metric = part()
    scores = score(metric=metric)
    _promise(isinstance(scores, dict) and bool(scores), "compute returns a dict with figures", scores)
    _promise(all(isinstance(name, str) for name in scores), "names of figures are strings")
    for name, figure in scores.items():
        finite = all(isinstance(number, Real) and math.isfinite(number) for number in _numbers(figure))
        _promise(finite, f"{name} is a finite float", figure)
    _promise(_equal(score(metric=metric), scores), "a second compute does not remember the first")
    _promise(_equal(score(), scores), "another instance gives the same figures")
    _promise(_equal(score(order=(2, 0, 3, 1)), scores), "figures do not depend on the order of the images")
    _promise(score(order=[0]).keys() == scores.keys(), "a single image has the same figures")


def _numbers(figure: Any) -> list[Any]:
    return figure if isinstance(figure, list) else [figure]


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-12)
        for name in first
        for mine, theirs in zip(_numbers(first[name]), _numbers(second[name]), strict=True)
    )


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)
