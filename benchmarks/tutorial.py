"""Show, Attend and Tell as the usual tutorials write it: what the benchmarks measure this package by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

P, C = 49, 1280  # image cells and their channels
START, END = 2, 3


class TutorialDecoder(nn.Module):
    """A decoder with the sizes of a captioner's, that projects all cells again for every word.

    Args:
        size: of the word embedding, the state and the attention's hidden layer.
        vocab_size: number of words.
        activation: of the attention's hidden layer.
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
        """The first state of captions, one a row of cells `(N, P, C)`."""
        mean = cells.mean(1)
        return self.cells_to_hidden(mean), self.cells_to_cell(mean)

    def read(
        self, words: Tensor, hidden: Tensor, cell: Tensor, cells: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state after embedded words `(N, size)`; keys `(N, P, size)` if they were computed before."""
        keys = self.cells_to_attention(cells) if keys is None else keys
        layer = self.activation(keys + self.state_to_attention(hidden).unsqueeze(1))
        weights = self.attention_to_score(layer).squeeze(2).softmax(1)
        context = (cells * weights.unsqueeze(2)).sum(1)
        context = torch.sigmoid(self.state_to_gate(hidden)) * context
        return self.lstm(torch.cat([words, context], 1), (hidden, cell))
