"""Attentions, which weight the cells of an image for the prediction of the next word.

Cells are the feature vectors that the encoder computes at the positions of a grid over the image; those of all images
of a batch are the argument `memory`. An attention is a `torch.nn.Module` that is built with the keyword arguments
`query_size` (D), `memory_size` (C) and `attention_size` (A), and with the user's `attention_kwargs`. It has

- `keys(memory (B, P, C)) -> keys`, a tensor with B in front, which holds what depends on the images alone;
- `forward(query (B, K, D), keys, memory (B, P, C)) -> (context (B, K, C), weights (B, K, P))`, for K queries for each
  image: those of its captions in training, and of its beams in decoding, which share one memory.

An attention may also do three things:

- If its context is `weights @ memory`, it may declare that by the class attribute `sums_cells = True` beside its
  `forward`. It then has the method `weigh(query, keys) -> weights`, so that a decoder can compute weighted sums of
  something else than cells. A subclass with a `forward` of its own has to repeat the attribute.
- With the class attribute `uses_sentinel = True`, its `forward` takes a fourth argument, a sentinel `(B, K, D)`, which
  holds what the decoder knows without the image. The sentinel may compete with the cells, whose weights then sum to
  less than 1.
- It may sample cells: then its `forward` returns a third tensor in training, the log-probabilities `(B, K)` of the
  cells drawn, 0 where none was drawn. It has the attributes `reinforce_weight` and `entropy_weight`, and the buffer
  `baseline`, a tensor `()` that the model updates (see `objectives.reinforce`).
"""

# B: images, K: captions or beams of an image, P: image cells, C: channels of a cell, D: query, A: hidden layer
# H: heads

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .additive_scores import AdditiveScores, Exponential
from .deferred_products import is_plain
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
    """Attention that scores an image cell a for a query h by a hidden layer, `e = v · tanh(W_a a + W_h h)`.

    The weights are the softmax of the scores. Xu et al. 2015, eq. 4-6 (f_att after Bahdanau et al. 2014).

    Args:
        query_size: Width of a query, which is a hidden state of the decoder, D.
        memory_size: Number of channels of an image cell, C.
        attention_size: Width of the hidden layer, A.
    """

    sums_cells = True

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.memory_to_key = nn.Linear(memory_size, attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size, bias=False)
        self.key_to_score = nn.Linear(attention_size, 1, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """Compute what depends on the images alone, `exp(2 W_a a)`: `(B, P, C) -> (B, P, A)`."""
        return Exponential.apply(self.memory_to_key(memory))

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the image cells: `(B, K, D), (B, P, A), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        weights = self.weigh(query, keys)
        return weights @ memory, weights

    def weigh(self, query: Tensor, keys: Tensor) -> Tensor:
        """Compute the weights of `forward` alone, `(B, K, D), (B, P, A) -> (B, K, P)`."""
        return torch.softmax(self._scores(self.query_to_key(query), keys), dim=-1)

    def _scores(self, query_key: Tensor, keys: Tensor) -> Tensor:
        """Score all cells for each query, `(B, K, A), (B, P, A) -> (B, K, P)`."""
        if is_plain(self.key_to_score):
            vector = self.key_to_score.weight  # (1, A)
        else:  # LoRA or a quantized layer in its place is called; a linear map of the identity is its weight
            vector = self.key_to_score(torch.eye(keys.shape[2], dtype=query_key.dtype, device=query_key.device)).T
        return AdditiveScores.apply(query_key, keys, vector.squeeze(0))


class ReLUAttention(AdditiveAttention):
    """Additive attention with a ReLU in place of tanh, `e = v · max(0, W_a a + W_h h)`."""

    def keys(self, memory: Tensor) -> Tensor:
        """Compute what depends on the images alone, `W_a a`: `(B, P, C) -> (B, P, A)`."""
        return self.memory_to_key(memory)

    def _scores(self, query_key: Tensor, keys: Tensor) -> Tensor:
        """Score all cells for each query, `(B, K, A), (B, P, A) -> (B, K, P)`."""
        return self.key_to_score(torch.relu(query_key.unsqueeze(2) + keys.unsqueeze(1))).squeeze(-1)  # (B, K, P)


class DotAttention(nn.Module):
    """Attention by the scaled dot product of projected queries and cells (Luong et al. 2015; Vaswani et al. 2017)."""

    sums_cells = True

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.memory_to_key = nn.Linear(memory_size, attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size)

    def keys(self, memory: Tensor) -> Tensor:
        """Compute what depends on the images alone, projected cells times 1/sqrt(A): `(B, P, C) -> (B, A, P)`."""
        keys = self.memory_to_key(memory).transpose(1, 2)  # (B, A, P)
        return keys / math.sqrt(keys.shape[1])

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the image cells: `(B, K, D), (B, A, P), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        weights = self.weigh(query, keys)
        return weights @ memory, weights

    def weigh(self, query: Tensor, keys: Tensor) -> Tensor:
        """Compute the weights of `forward` alone, `(B, K, D), (B, A, P) -> (B, K, P)`."""
        return torch.softmax(self.query_to_key(query) @ keys, dim=-1)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with several heads (Vaswani et al. 2017, sec. 3.2.2).

    Each head sums values, projections of the cells to size A / H. The sums of all heads are concatenated and projected
    to the context, of size C. The weights returned are the mean over the heads.

    Departure: no dropout on the weights.

    Args:
        query_size, memory_size, attention_size: D, C and A, width of all heads together; see `AdditiveAttention`.
        num_heads: H, number of heads, which must divide A.

    Raises:
        ValueError: `num_heads` doesn't divide `attention_size`.
    """

    def __init__(self, query_size: int, memory_size: int, attention_size: int, *, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or attention_size % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, which does not divide attention_size={attention_size}. Change one of the "
                "two, as all heads have the same width."
            )
        self.num_heads = num_heads
        self.memory_to_key_value = nn.Linear(memory_size, 2 * attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size)
        self.heads_to_context = nn.Linear(attention_size, memory_size)

    def keys(self, memory: Tensor) -> Tensor:
        """Compute what depends on the images alone, keys and values of each head: `(B, P, C) -> (B, H, P, 2A/H)`."""
        key_value = self.memory_to_key_value(memory).unflatten(2, (self.num_heads, -1))  # (B, P, H, 2A/H)
        return key_value.transpose(1, 2).contiguous()

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the cells: `(B, K, D), (B, H, P, 2A/H), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        key, value = keys.chunk(2, -1)  # (B, H, P, A/H)
        heads = self.query_to_key(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, K, A/H)
        scores = heads / math.sqrt(heads.shape[-1]) @ key.transpose(2, 3)  # (B, H, K, P)
        weights = torch.softmax(scores, dim=-1)
        context = (weights @ value).transpose(1, 2).flatten(2)  # (B, K, A)
        return self.heads_to_context(context), weights.mean(1)


class AdaptiveAttention(AdditiveAttention):
    """Additive attention to the image cells and to a visual sentinel (Lu et al. 2017, eq. 6-12).

    The sentinel s stands for what the decoder knows without the image, and competes with the cells in one softmax. Its
    weight is β, and the context is `Σ_p α_p a_p + β s`. The weights `(B, K, P)` returned are those of the cells alone
    and sum to 1 - β; divided by that sum, they are a map of the image.

    Departures: the decoder decides when to look and where the context goes, so with `lstm` and `gru` the model looks
    before the LSTM, and with `top_down` after the attention LSTM; cells keep their own size C, to which the sentinel
    is projected.
    """

    uses_sentinel = True

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__(query_size, memory_size, attention_size)
        self.sentinel_to_key = nn.Linear(query_size, attention_size)
        self.sentinel_to_context = nn.Linear(query_size, memory_size)

    def forward(  # type: ignore[override]
        self, query: Tensor, keys: Tensor, memory: Tensor, sentinel: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend: `(B, K, D), (B, P, A), (B, P, C), (B, K, D) -> context (B, K, C), weights (B, K, P)`."""
        query_key = self.query_to_key(query)  # (B, K, A)
        sentinel_score = self.key_to_score(torch.tanh(query_key + self.sentinel_to_key(sentinel)))  # (B, K, 1)
        scores = torch.cat([self._scores(query_key, keys), sentinel_score], -1)
        weights, beta = torch.softmax(scores, dim=-1).split([memory.shape[1], 1], -1)
        return weights @ memory + beta * self.sentinel_to_context(sentinel), weights


class HardAttention(AdditiveAttention):
    """Additive attention whose weights are probabilities of drawing an image cell (Xu et al. 2015, sec. 4.1).

    In training, the context of a word is the one image cell that is drawn or, with probability `expected_rate`, the
    expected context `Σ_p α_p a_p`. The weights are learned by REINFORCE (`objectives.reinforce`), and by the gradient
    through the expected contexts. In evaluation every context is the expected one: results are then reproducible, and
    words are scored by an approximation of their likelihood over all cells (sec. 4.2).

    Departure: the paper takes the expected context for half of the images, and the authors' code for half of the
    batches; here it is decided for each word.

    Args:
        query_size, memory_size, attention_size: D, C and A; see `AdditiveAttention`.
        expected_rate: Probability in [0, 1] of taking the expected context for a word in training.
        reinforce_weight: Weight λ_r >= 0 of the REINFORCE term. At 1 the gradient is that of the bound on the
            likelihood.
        entropy_weight: Weight λ_e >= 0 of the entropy of the attention weights, which keeps them from settling early.

    Raises:
        ValueError: `expected_rate` is outside [0, 1], or a weight is negative.
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
        self.expected_rate, self.reinforce_weight, self.entropy_weight = expected_rate, reinforce_weight, entropy_weight
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Attend to the image cells: `(B, K, D), (B, P, A), (B, P, C) -> context (B, K, C), weights (B, K, P)`.

        In training, it also returns the log-probabilities of the drawn cells, `(B, K)`.
        """
        if not self.training:
            return super().forward(query, keys, memory)
        log_weights = torch.log_softmax(self._scores(self.query_to_key(query), keys), dim=-1)
        weights = log_weights.exp()
        cells = torch.multinomial(weights.detach().flatten(0, 1), 1).view(*weights.shape[:2], 1)  # (B, K, 1)
        is_drawn = torch.rand(cells.shape, device=cells.device) >= self.expected_rate
        drawn = torch.zeros_like(weights).scatter(-1, cells, 1.0)  # (B, K, P)
        context = torch.where(is_drawn, drawn, weights) @ memory
        return context, weights, (log_weights.gather(-1, cells) * is_drawn).squeeze(-1)


def sums_cells(attention: type) -> bool:
    """Return whether a class of attention declares that the context of its `forward` is `weights @ memory`.

    Only an attribute `sums_cells` of the class that defines `forward` counts: a subclass that overrides `forward` must
    repeat it.
    """
    return next(vars(owner).get("sums_cells", False) for owner in attention.__mro__ if "forward" in vars(owner))
