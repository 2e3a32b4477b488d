"""Show, Attend and Tell as in the usual tutorials, for the benchmarks to compare this package with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

P, C = 49, 1280  # image cells and their channels
START, END = 2, 3


class TutorialDecoder(nn.Module):
    """A decoder that projects all image cells again for every word.

    Args:
        size: Size of the word embedding, of the state and of the attention's hidden layer.
        vocab_size: Number of words in the vocabulary.
        activation: Activation function of the attention's hidden layer.
    """

    def __init__(self, size: int, vocab_size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.embedding = nn.Embedding(vocab_size, size)
        self.cells_to_attention = nn.Linear(C, size)
        self.state_to_attention = nn.Linear(size, size)
        self.attention_to_score = nn.Linear(size, 1)
        self.state_to_gate = nn.Linear(size, C)
        self.cells_to_hidden = nn.Linear(C, size)
        self.cells_to_cell = nn.Linear(C, size)
        self.lstm = nn.LSTMCell(size + C, size)
        self.output = nn.Linear(size, vocab_size)

    def start(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first state of N captions from the cells of their images, `(N, P, C)`."""
        mean = cells.mean(1)
        return self.cells_to_hidden(mean), self.cells_to_cell(mean)

    def read(
        self, words: Tensor, hidden: Tensor, cell: Tensor, cells: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the state after embedded words `(N, size)`. Keys `(N, P, size)` may be passed if computed before."""
        keys = self.cells_to_attention(cells) if keys is None else keys
        layer = self.activation(keys + self.state_to_attention(hidden).unsqueeze(1))
        weights = self.attention_to_score(layer).squeeze(2).softmax(1)
        context = (cells * weights.unsqueeze(2)).sum(1)
        context = torch.sigmoid(self.state_to_gate(hidden)) * context
        return self.lstm(torch.cat([words, context], 1), (hidden, cell))
