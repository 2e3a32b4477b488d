"""Attentions: where in the image to look for the next word.

A part is a `torch.nn.Module` built from sizes. `keys(memory)` is computed once an image; then for K queries an
image `forward((B, K, D), keys, (B, P, C)) -> context (B, K, C), weights (B, K, P)`. K is the captions of an image
in training and its beams in decoding: they share one memory.

Three things an attention may do beyond that:

- One whose context is `weights @ memory` may say so by the class attribute `sums_cells = True` beside its `forward`.
  It then has the method `weigh((B, K, D), keys) -> weights (B, K, P)`, as a decoder may have something else to sum by
  these weights. A subclass with a `forward` of its own has to say it again.
- With the class attribute `uses_sentinel = True`, `forward` takes a fourth argument, a sentinel `(B, K, D)`: what the
  decoder knows without the image. It may share the weights with the image, whose weights then sum to less than 1.
- One that samples returns a third tensor in training: log-probabilities `(B, K)` of the cells it took, 0 where it took
  none. It then has the attributes `reinforce_weight` and `entropy_weight`, and `baseline`, a tensor `()` that the
  model keeps up to date (see `objectives.reinforce`).
"""

# B: images, K: captions or beams of an image, P: image cells, C: channels of a cell, D: query, A: hidden layer
# H: heads

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Registry

ATTENTIONS = Registry(
    "attentions",
    {
        "additive": f"{__name__}:AdditiveAttention",
        "additive_relu": f"{__name__}:ReLUAttention",
        "dot": f"{__name__}:DotAttention",
        "multi_head": f"{__name__}:MultiHeadAttention",
        "adaptive": f"{__name__}:AdaptiveAttention",
        "hard": f"{__name__}:HardAttention",
    },
)


class AdditiveAttention(nn.Module):
    """One hidden layer scores every cell: `e = v · tanh(W_a a + W_h h)`, weights are softmax over cells.

    Xu et al. 2015, eq. 4-6 (f_att after Bahdanau et al. 2014).

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width of the hidden layer.
    """

    sums_cells = True

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.memory_to_key = nn.Linear(memory_size, attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size, bias=False)
        self.key_to_score = nn.Linear(attention_size, 1, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """What depends on the image alone, `exp(2 W_a a)`: `(B, P, C) -> (B, P, A)`."""
        keys: Tensor = _Exponential.apply(self.memory_to_key(memory))
        return keys

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, K, D), (B, P, A), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        weights = self.weigh(query, keys)
        return weights @ memory, weights

    def weigh(self, query: Tensor, keys: Tensor) -> Tensor:
        """The weights of `forward` alone: `(B, K, D), (B, P, A) -> (B, K, P)`."""
        return torch.softmax(self._scores(self.query_to_key(query), keys), dim=-1)

    def _scores(self, query_key: Tensor, keys: Tensor) -> Tensor:
        """`(B, K, A), (B, P, A) -> (B, K, P)`."""
        vector = self.key_to_score.weight.squeeze(0)  # (A,)
        scores: Tensor = _AdditiveScore.apply(query_key, keys, vector)
        return scores


class ReLUAttention(AdditiveAttention):
    """Additive attention with a rectifier in the place of tanh: `e = v · max(0, W_a a + W_h h)`.

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width of the hidden layer.
    """

    def keys(self, memory: Tensor) -> Tensor:
        """What depends on the image alone: `(B, P, C) -> (B, P, A)`."""
        keys: Tensor = self.memory_to_key(memory)
        return keys

    def _scores(self, query_key: Tensor, keys: Tensor) -> Tensor:
        scores: Tensor = self.key_to_score(torch.relu(query_key.unsqueeze(2) + keys.unsqueeze(1)))  # (B, K, P, 1)
        return scores.squeeze(-1)


class DotAttention(nn.Module):
    """Scaled dot product of a projected query with projected cells (Luong et al. 2015; Vaswani et al. 2017).

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width in which they meet.
    """

    sums_cells = True

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.memory_to_key = nn.Linear(memory_size, attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size)

    def keys(self, memory: Tensor) -> Tensor:
        """What depends on the image alone: `(B, P, C) -> (B, A, P)`, scaled by 1/sqrt(A)."""
        keys = self.memory_to_key(memory).transpose(1, 2)  # (B, A, P)
        return keys / math.sqrt(keys.shape[1])

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, K, D), (B, A, P), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        weights = self.weigh(query, keys)
        return weights @ memory, weights

    def weigh(self, query: Tensor, keys: Tensor) -> Tensor:
        """The weights of `forward` alone: `(B, K, D), (B, A, P) -> (B, K, P)`."""
        return torch.softmax(self.query_to_key(query) @ keys, dim=-1)


class MultiHeadAttention(nn.Module):
    """Scaled dot product in several heads (Vaswani et al. 2017, sec. 3.2.2).

    The heads read values, projections of the cells to size A in all; put side by side and projected, they are the
    context, of size C as the contract has it. The weights reported are the mean over the heads.

    Departure: no dropout on the weights.

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width of all heads together.
        num_heads: H, a divisor of A.

    Raises:
        ValueError: heads that can't share the width evenly.
    """

    def __init__(self, query_size: int, memory_size: int, attention_size: int, *, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or attention_size % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, which does not divide attention_size={attention_size}. Heads share that "
                "width evenly: change one of the two."
            )
        self.num_heads = num_heads
        self.memory_to_key_value = nn.Linear(memory_size, 2 * attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size)
        self.heads_to_context = nn.Linear(attention_size, memory_size)

    def keys(self, memory: Tensor) -> Tensor:
        """Keys and values, which depend on the image alone: `(B, P, C) -> (B, H, P, 2A/H)`."""
        key_value = self.memory_to_key_value(memory).unflatten(2, (self.num_heads, -1))  # (B, P, H, 2A/H)
        return key_value.transpose(1, 2).contiguous()

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, K, D), (B, H, P, 2A/H), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        key, value = keys.chunk(2, -1)  # (B, H, P, A/H)
        heads = self.query_to_key(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, K, A/H)
        scores = heads / math.sqrt(heads.shape[-1]) @ key.transpose(2, 3)  # (B, H, K, P)
        weights = torch.softmax(scores, dim=-1)
        context = (weights @ value).transpose(1, 2).flatten(2)  # (B, K, A)
        return self.heads_to_context(context), weights.mean(1)


class AdaptiveAttention(AdditiveAttention):
    """Additive attention to the cells and to a visual sentinel (Lu et al. 2017, eq. 6-12).

    The sentinel, what the decoder knows without the image, competes with the cells in one softmax. Its share is β,
    and the context is `Σ_p α_p a_p + β s`. The weights `(B, K, P)` are those of the cells, so that they sum to the
    image's share 1 - β: divided by that sum they are a map of the image.

    Departures: it looks where its decoder does, which is before the LSTM in `lstm` and `gru` and after the attention
    LSTM in `top_down`, and the context goes where that decoder sends it; cells keep their own size C, to which the
    sentinel is projected.

    Args:
        query_size: D, width of the decoder's state and of the sentinel.
        memory_size: C, channels of a cell.
        attention_size: A, width of the hidden layer.
    """

    uses_sentinel = True

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__(query_size, memory_size, attention_size)
        self.sentinel_to_key = nn.Linear(query_size, attention_size)
        self.sentinel_to_context = nn.Linear(query_size, memory_size)

    def forward(  # type: ignore[override]
        self, query: Tensor, keys: Tensor, memory: Tensor, sentinel: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`(B, K, D), (B, P, A), (B, P, C), (B, K, D) -> context (B, K, C), weights (B, K, P)`."""
        query_key = self.query_to_key(query)  # (B, K, A)
        sentinel_score = self.key_to_score(torch.tanh(query_key + self.sentinel_to_key(sentinel)))  # (B, K, 1)
        scores = torch.cat([self._scores(query_key, keys), sentinel_score], -1)
        weights, beta = torch.softmax(scores, dim=-1).split([memory.shape[1], 1], -1)
        return weights @ memory + beta * self.sentinel_to_context(sentinel), weights


class HardAttention(AdditiveAttention):
    """Additive attention that takes one cell a word, drawn with its weights (Xu et al. 2015, sec. 4.1).

    In training the context is the drawn cell or, for a share `expected_rate` of the words, the expected context;
    the weights are learned by REINFORCE (`objectives.reinforce`) beside what flows through the expected contexts.
    Otherwise every context is the expected one: it is the same each time, and scores words by an approximation of
    their likelihood over all cells (sec. 4.2), of which the likeliest cell is only one term.

    Departure: the paper takes the expected context for half of the images, the authors' code for half of the batches;
    here every word draws for itself.

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width of the hidden layer.
        expected_rate: probability in [0, 1] of taking the expected context for a word in training.
        reinforce_weight: λ_r >= 0 of the REINFORCE term. At 1 the gradient is that of the bound on the likelihood.
        entropy_weight: λ_e >= 0 of the entropy of the weights, which keeps them from settling early.

    Raises:
        ValueError: a rate that is no probability, or a negative weight.
    """

    baseline: Tensor

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        attention_size: int,
        *,
        expected_rate: float = 0.5,
        reinforce_weight: float = 1.0,
        entropy_weight: float = 0.01,
    ) -> None:
        super().__init__(query_size, memory_size, attention_size)
        if not 0 <= expected_rate <= 1:
            raise ValueError(f"expected_rate is {expected_rate}, but must be in [0, 1].")
        for name, value in (("reinforce_weight", reinforce_weight), ("entropy_weight", entropy_weight)):
            if value < 0:
                raise ValueError(f"{name} is {value}, but must not be negative.")
        self.expected_rate = expected_rate
        self.reinforce_weight = reinforce_weight
        self.entropy_weight = entropy_weight
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """`(B, K, D), (B, P, A), (B, P, C) -> context (B, K, C), weights (B, K, P)`; in training log p `(B, K)`."""
        if not self.training:
            return super().forward(query, keys, memory)
        log_weights = torch.log_softmax(self._scores(self.query_to_key(query), keys), dim=-1)
        weights = log_weights.exp()
        cells = torch.multinomial(weights.detach().flatten(0, 1), 1).view(*weights.shape[:2], 1)  # (B, K, 1)
        is_drawn = torch.rand(cells.shape, device=cells.device) >= self.expected_rate
        drawn = torch.zeros_like(weights).scatter(-1, cells, 1.0)  # (B, K, P)
        context = torch.where(is_drawn, drawn, weights) @ memory
        return context, weights, (log_weights.gather(-1, cells) * is_drawn).squeeze(-1)


# Elements of the hidden layer that a processor computes at once: they stay in its cache.
_AT_ONCE = 2**19


class _Exponential(torch.autograd.Function):
    """`exp(2x)`, for `_AdditiveScore`, which returns gradients of x in the place of those of the exponential."""

    @staticmethod
    def forward(ctx: Any, logarithm: Tensor) -> Tensor:
        return _exponential(logarithm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _exponential(logarithm: Tensor) -> Tensor:
    """`exp(2x)`; beyond the x whose exponentials there are, ±43 in single precision, that of these."""
    if logarithm.dtype != torch.float64:
        logarithm = logarithm.float()  # float16 has too small a range, and bfloat16 too few digits for a sum of them
    limit = 0.49 * math.log(torch.finfo(logarithm.dtype).max)
    return (2 * logarithm.clamp(-limit, limit)).exp_()


class _AdditiveScore(torch.autograd.Function):
    """`v · tanh(a + h)` for every cell and query, from `exp(2a)` and h.

    The hidden layer (B, K, P, A) is by far the largest tensor of a step, and its tanh would take longer than all
    matrix products of a decoding step but one. As `tanh x = 1 - 2r` with `r = 1 / s` and `s = 1 + exp(2a) exp(2h)`,
    exponentials are taken of a once an image and of h once a query, and their pairs are only divided by.

    Going back, s is computed again: what is kept of it for all words would be hundreds of megabytes, which take longer
    to get from the operating system than to compute. With `tanh' = 4 (r - r²)`, `d(h) = 4v ∘ Σ_p g (r - r²)` and
    `d(a) = 4v ∘ Σ_k g (r - r²)`.

    What is summed up is summed up image by image. A product over all images would be split among a processor's cores
    otherwise than what is done element by element: each would wait for what the other has in its cache, which takes
    longer than the arithmetic where they share none.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, vector: Tensor) -> Tensor:
        exponential = _exponential(query).to(keys.dtype)
        ctx.save_for_backward(exponential, keys, vector)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])  # (B, K, P)
        factors = vector.to(keys.dtype)
        for images, sums in _sums(exponential, keys):
            torch.sum(torch.div(factors, sums, out=sums), 3, out=scores[images])
        return (vector.sum() - 2 * scores).to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exponential, keys, vector = ctx.saved_tensors
        grad = grad.to(keys.dtype)  # (B, K, P)
        grad_query, grad_keys = torch.empty_like(exponential), torch.empty_like(keys)
        grad_vectors = keys.new_empty(len(keys), 1, keys.shape[2])
        for images, sums in _sums(exponential, keys):
            rest, part = sums.reciprocal_(), grad[images]
            torch.bmm(part.flatten(1).unsqueeze(1), rest.flatten(1, 2), out=grad_vectors[images])
            slope = rest.addcmul_(rest, rest, value=-1).mul_(part.unsqueeze(3))  # g (r - r²) (b, K, P, A)
            torch.sum(slope, 2, out=grad_query[images])
            torch.sum(slope, 1, out=grad_keys[images])
        scale = 4 * vector
        return grad_query.mul_(scale), grad_keys.mul_(scale), grad.sum() - 2 * grad_vectors.sum((0, 1))


def _sums(exponential: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The s of some images after the other, `(B, K, A), (B, P, A) -> (b, K, P, A)`, each where the last was."""
    query, key = exponential.unsqueeze(2), keys.unsqueeze(1)
    one = torch.ones((), dtype=keys.dtype, device=keys.device)
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(None), torch.addcmul(one, query, key)
        return
    shape = (exponential.shape[1], *keys.shape[1:])
    at_once = max(1, _AT_ONCE // max(1, math.prod(shape)))
    sums = keys.new_empty(min(at_once, len(keys)), *shape)
    for images in (slice(first, first + at_once) for first in range(0, len(keys), at_once)):
        part = key[images]
        yield images, torch.addcmul(one, query[images], part, out=sums[: len(part)])
