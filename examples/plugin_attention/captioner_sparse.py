"""Dot-product attention whose weights are exactly zero for most cells."""

import math

import torch
from torch import Tensor, nn


class SparseAttention(nn.Module):
    """Scaled dot-product attention with sparsemax in place of softmax (Martins and Astudillo 2016)."""

    def __init__(self, query_size: int, memory_size: int, attention_size: int) -> None:
        super().__init__()
        self.memory_to_key = nn.Linear(memory_size, attention_size)
        self.query_to_key = nn.Linear(query_size, attention_size)

    def keys(self, memory: Tensor) -> Tensor:
        """Compute what depends on the images alone, scaled keys of the image cells: `(B, P, C) -> (B, A, P)`."""
        keys = self.memory_to_key(memory).transpose(1, 2)
        return keys / math.sqrt(keys.shape[1])

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Attend with K queries for each image.

        Args:
            query: Queries `(B, K, D)`.
            keys: Keys `(B, A, P)`, from the method `keys`.
            memory: Image cells `(B, P, C)`.

        Returns:
            Contexts `(B, K, C)` and weights `(B, K, P)`.
        """
        weights = sparsemax(self.query_to_key(query) @ keys)
        return weights @ memory, weights


def sparsemax(scores: Tensor) -> Tensor:
    """Project scores `(..., P)` onto the probability simplex (Martins and Astudillo 2016, algorithm 1)."""
    ordered = scores.sort(-1, descending=True).values
    total = ordered.cumsum(-1)
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    size = (1 + count * ordered > total).sum(-1, keepdim=True)  # number of cells with a weight above 0
    threshold = (total.gather(-1, size - 1) - 1) / size
    return (scores - threshold).clamp(min=0)
