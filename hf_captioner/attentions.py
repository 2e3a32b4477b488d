"""Attentions: where in the image to look for the next word.

A part is a `torch.nn.Module` built from sizes. `keys(memory)` is computed once an image; then for K queries an
image `forward((B, K, D), keys, (B, P, C)) -> context (B, K, C), weights (B, K, P)`. K is the captions of an image
in training and its beams in decoding: they share one memory.
"""

# B: images, K: captions or beams of an image, P: image cells, C: channels of a cell, D: query, A: hidden layer

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Registry

ATTENTIONS = Registry(
    "attentions",
    {"additive": f"{__name__}:AdditiveAttention", "dot": f"{__name__}:DotAttention"},
)


class AdditiveAttention(nn.Module):
    """One hidden layer scores every cell: `e = v · tanh(W_a a + W_h h)`, weights are softmax over cells.

    Xu et al. 2015, eq. 4-6 (f_att after Bahdanau et al. 2014).

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width of the hidden layer.
    """

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.memory_to_key = nn.Linear(memory_size, attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size, bias=False)
        self.key_to_score = nn.Linear(attention_size, 1, bias=False)

    def keys(self, memory: Tensor) -> Tensor:
        """What depends on the image alone: `(B, P, C) -> (B, P, A)`."""
        return self.memory_to_key(memory)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, K, D), (B, P, A), (B, P, C) -> context (B, K, C), weights (B, K, P)`."""
        vector = self.key_to_score.weight.squeeze(0)  # (A,)
        scores = _AdditiveScore.apply(self.query_to_key(query), keys, vector)  # (B, K, P)
        weights = torch.softmax(scores, dim=-1)
        return weights @ memory, weights


class DotAttention(nn.Module):
    """Scaled dot product of a projected query with projected cells (Luong et al. 2015; Vaswani et al. 2017).

    Args:
        query_size: D, width of the decoder's state.
        memory_size: C, channels of a cell.
        attention_size: A, width in which they meet.
    """

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
        weights = torch.softmax(self.query_to_key(query) @ keys, dim=-1)  # (B, K, P)
        return weights @ memory, weights


class _AdditiveScore(torch.autograd.Function):
    """`v · tanh(keys + query)` for every query and cell, with a backward pass in two matrix products.

    The hidden layer (B, K, P, A) is by far the largest tensor of a step. Autograd would read or write it about
    eight times; here it is written once, and squared once going back:
    with s = tanh(·), d(query) = v ∘ Σ_p g (1 - s²) and d(keys) = v ∘ Σ_k g (1 - s²).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, vector: Tensor) -> Tensor:
        hidden = (query.unsqueeze(2) + keys.unsqueeze(1)).tanh_()  # (B, K, P, A)
        ctx.save_for_backward(hidden, vector)
        return hidden @ vector  # (B, K, P)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, vector = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        grad_vector = grad.flatten() @ hidden.flatten(0, 2)  # (A,)
        squared = hidden.square()  # (B, K, P, A)
        over_cells = (grad.unsqueeze(2) @ squared).squeeze(2)  # (B, K, A)
        grad_query = vector * (grad.sum(2, keepdim=True) - over_cells)  # (B, K, A)
        over_captions = (grad.transpose(1, 2).unsqueeze(2) @ squared.transpose(1, 2)).squeeze(2)  # (B, P, A)
        grad_keys = vector * (grad.sum(1).unsqueeze(2) - over_captions)  # (B, P, A)
        return grad_query, grad_keys, grad_vector
