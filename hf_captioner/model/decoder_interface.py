"""The contract of decoders: what the model gives a decoder, and what a decoder returns.

A decoder is a `torch.nn.Module` that reads captions and predicts their next words. It sees an image as P cells, the
grid cells of image features that the encoder computes. The model builds it with these keyword arguments: the sizes
`vocab_size` (V), `embedding_size` (E), `hidden_size` (D) and `memory_size` (C); its `attention`; the settings `gate`,
`deep_output`, `memory_dropout`, `embedding_dropout` and `output_dropout` of the configuration, which it may disregard;
and the user's `decoder_kwargs`. It has

- `embedding` and `output`, the modules that embed words and compute logits, and `attention`, the module it was given,
  which it calls as `attention(query, memory.keys, memory.cells)`;
- `prepare(cells (B, P, C)) -> Memory`, which computes what depends on the images alone;
- `forward(input_ids (N, T), memory, state) -> (logits (N, T, V), weights (N, T, P), state)`, which reads the next T
  words of each caption. The K captions of an image are adjacent among all N = B·K captions. The state is a tuple of
  tensors with N in front; it is None before the first word, and then what `forward` returned last.

A decoder may offer more:

- It may return a `DecoderOutput`, which is that tuple with further fields.
- Its `forward` may have any of the keyword arguments `lengths`, `siblings` and `sampling`, which `run_decoder`
  describes. Those that its signature doesn't name are not passed to it; `**kwargs` names none.
- The class attribute `gives_sentinel = True` says that it works with attentions that ask for a sentinel, and
  `returns_log_probs = True` that it returns the log-probabilities of an attention that samples (`attentions.py`
  describes both). Without them, the model refuses such an attention.
"""

# B: images, K: captions or beams of an image, N = B·K: captions, T: words, V: vocabulary
# P: image cells, C: channels of an image cell, E: word embedding, D: state

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import SequenceKey, register_pytree_node

State = tuple[Tensor, ...]

OPTIONAL_ARGUMENTS = ("lengths", "siblings", "sampling")


@dataclass(frozen=True)
class Memory:
    """Features of a batch of images as the decoder reads them, shared by the captions or beams of each image.

    It is deliberately not a tensor: `generate()` copies every tensor of the encoder's output for each beam.

    Args:
        cells: Image cells, which are the grid cells of the encoder's features, `(B, P, C)`.
        keys: Result of the attention's `keys(cells)`, computed once per image; a tensor with B in front.
        mean: Mean of the cells of each image, `(B, C)`.
    """

    cells: Tensor
    keys: Tensor
    mean: Tensor

    @classmethod
    def of(cls, cells: Tensor, attention: nn.Module) -> Memory:
        """Build the memory of images from their cells `(B, P, C)` and the decoder's attention."""
        return cls(cells, attention.keys(cells), cells.mean(1))  # type: ignore[operator]

    def take(self, images: Tensor | slice) -> Memory:
        """Return the memory of some of the images."""
        return Memory(self.cells[images], self.keys[images], self.mean[images])


class DecoderOutput(NamedTuple):
    """Output of a decoder. The first three fields are required.

    Args:
        logits: Logits of the next word, `(N, T, V)`; zero after the end of a caption if `lengths` were given.
        weights: Attention weights with which each word was predicted, `(N, T, P)`; zero after a caption's end likewise.
        state: State after the last word, tensors with N in front. Meaningless if `lengths` were given.
        hidden: Hidden state after each word, `(N, T, D)`.
        log_probs: Log-probability of the image cell that a sampling attention drew for each word, `(N, T)`.
        packed: The logits of the words within `lengths` alone, `(R, V)`, and the index of each of these R words among
            all N·T, `(R,)`; it spares the loss the padding.
    """

    logits: Tensor
    weights: Tensor
    state: State
    hidden: Tensor | None = None
    log_probs: Tensor | None = None
    packed: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Siblings:
    """Groups of beams that continue the same caption; the beams of a group have the same state.

    Args:
        first: Index of one caption of each group, `(G,)`.
        group: Group of each caption, `(N,)`.
    """

    first: Tensor
    group: Tensor

    @classmethod
    def of(cls, parents: Tensor) -> Siblings:
        """Group captions by their parents `(N,)`, the captions that they continue."""
        found, group = parents.unique(return_inverse=True)
        index = torch.arange(len(parents), device=parents.device)
        return cls(index.new_empty(len(found)).scatter_(0, group, index), group)


class RecurrentCache:
    """State of a decoder between two words, passed through `generate()` as `cache`.

    Args:
        memory: Memory of the images, in the order of the batch; the beams of an image share it.
        state: State after the words read so far, tensors with N in front; None before the first word.
        length: Number of words read so far.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (True,)  # as in linear attention: a state, and no past words to look up

    def __init__(self, memory: Memory, state: State | None = None, length: int = 0) -> None:
        self.memory = memory
        self.state = state
        self.length = length
        self.siblings: Siblings | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of words read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let caption n continue caption `beam_idx[n]`. Beams stay with their image, so the memory is left alone."""
        assert self.state is not None, "no word has been read"
        self.state = tuple(part.index_select(0, beam_idx.to(part.device)) for part in self.state)
        # On an accelerator, the number of groups would have to be waited for, and fewer rows would save little.
        self.siblings = Siblings.of(beam_idx) if beam_idx.device.type == "cpu" else None

    def keep_images(self, images: Tensor) -> None:
        """Drop the memory of all images but those at these positions; `reorder_cache` drops the states of captions."""
        self.memory = self.memory.take(images)


class _Length:
    """Number of words read, which says nothing about the structure of a cache: one exported graph serves all steps."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Length)

    def __hash__(self) -> int:
        return 0


def _tensors_of(cache: RecurrentCache) -> tuple[list[Tensor], _Length]:
    memory = cache.memory
    return [memory.cells, memory.keys, memory.mean, *(cache.state or ())], _Length(cache.length)


def _cache_of(tensors: Iterable[Tensor], length: _Length) -> RecurrentCache:
    cells, keys, mean, *state = tensors
    return RecurrentCache(Memory(cells, keys, mean), tuple(state) or None, length.value)


# So that torch.export knows which tensors a cache has.
register_pytree_node(
    RecurrentCache,
    _tensors_of,
    _cache_of,
    serialized_type_name=f"{__name__}.RecurrentCache",
    flatten_with_keys_fn=lambda cache: (
        [(SequenceKey(i), tensor) for i, tensor in enumerate(_tensors_of(cache)[0])],
        _Length(cache.length),
    ),
    to_dumpable_context=lambda length: length.value,
    from_dumpable_context=_Length,
)


def run_decoder(
    decoder: nn.Module,
    input_ids: Tensor,
    memory: Memory,
    state: State | None = None,
    *,
    lengths: Tensor | None = None,
    siblings: Siblings | None = None,
    sampling: float = 0.0,
    keep_gradients: bool = False,
) -> DecoderOutput:
    """Call a decoder with the three arguments of its contract and those optional ones that its `forward` names.

    Args:
        decoder: The decoder.
        input_ids: Words to read, `(N, T)`.
        memory: Memory of the images, which the decoder's `prepare` returned.
        state: State that the decoder returned after the words before; None at the start.
        lengths: How many words of each caption to read, `(N,)`. A decoder that takes it skips the padding and returns
            zeros there; for others, the zeros are filled in here.
        siblings: Beams that continue the same caption. A decoder that takes it computes for each group only once what
            depends on the state alone; others lose nothing but time.
        sampling: Probability in [0, 1] with which each word but the first is drawn from the decoder's own prediction
            (scheduled sampling, Bengio et al. 2015, sec. 2.4).
        keep_gradients: Whether the logits shall depend on the tensor of hidden states that is returned, so that
            `hidden.retain_grad()` works. The decoder then reads the padding, too.

    Raises:
        ValueError: `sampling` is above 0, and the decoder does not take it.
    """
    accepted = optional_arguments(decoder)
    if sampling and "sampling" not in accepted:
        raise ValueError(
            f"Scheduled sampling is asked for, but the decoder {type(decoder).__name__} has no argument 'sampling'. "
            "Set the sampling probability to 0, or choose another decoder."
        )
    offered = {"lengths": lengths, "siblings": siblings, "sampling": sampling}
    if keep_gradients:
        accepted -= {"lengths"}
    arguments = {name: value for name, value in offered.items() if name in accepted}
    output = DecoderOutput(*decoder(input_ids, memory, state, **arguments))
    if lengths is None or "lengths" in accepted:
        return output
    is_padding = torch.arange(input_ids.shape[1], device=lengths.device) >= lengths.unsqueeze(1)  # (N, T)
    return output._replace(
        logits=output.logits.masked_fill(is_padding.unsqueeze(2), 0),
        weights=output.weights.masked_fill(is_padding.unsqueeze(2), 0),
        hidden=output.hidden
        if output.hidden is None or keep_gradients
        else output.hidden.masked_fill(is_padding.unsqueeze(2), 0),
        log_probs=None if output.log_probs is None else output.log_probs.masked_fill(is_padding, 0),
    )


def optional_arguments(decoder: nn.Module) -> frozenset[str]:
    """Return those of `OPTIONAL_ARGUMENTS` that the `forward` of a decoder names."""
    return _parameters(type(decoder).forward).intersection(OPTIONAL_ARGUMENTS)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's parameters, cached because they are needed at every word."""
    return frozenset(inspect.signature(function).parameters)


def check_fit(decoder: nn.Module, attention: nn.Module) -> None:
    """Check that a decoder supports what its attention asks for.

    Raises:
        ValueError: The attention asks for a sentinel, or samples, and the decoder does not say that it supports that.
    """
    needs = {
        "gives_sentinel": getattr(attention, "uses_sentinel", False),
        "returns_log_probs": hasattr(attention, "reinforce_weight"),
    }
    for name, is_needed in needs.items():
        if is_needed and not getattr(decoder, name, False):
            raise ValueError(
                f"The attention {type(attention).__name__} needs a decoder with {name} = True, which "
                f"{type(decoder).__name__} does not have. Choose another attention or decoder."
            )
