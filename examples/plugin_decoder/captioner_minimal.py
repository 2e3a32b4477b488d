"""A decoder of minimal gated units: one gate where a GRU has two and an LSTM three."""

import torch
from torch import Tensor, nn

from hf_captioner.model.decoder_interface import Memory


class MinimalDecoder(nn.Module):
    """Decoder of minimal gated units (Zhou et al. 2016, eq. 5).

    They compute `h' = (1 - f) ∘ h + f ∘ tanh(W [x, f ∘ h])` with `f = σ(W_f [x, h])`. The input x is the word and the
    context. Of the configuration's settings it has the output dropout; it has no gate on the context and no deep
    output, and ignores all other settings, which arrive as `unused`.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        memory_size: int,
        attention: nn.Module,
        output_dropout: float = 0.5,
        **unused: object,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.attention = attention
        self.mean_to_state = nn.Linear(memory_size, hidden_size)
        self.to_forget = nn.Linear(embedding_size + memory_size + hidden_size, hidden_size)
        self.to_new = nn.Linear(embedding_size + memory_size + hidden_size, hidden_size)
        self.output_dropout = nn.Dropout(output_dropout)
        self.output = nn.Linear(hidden_size, vocab_size)

    def prepare(self, cells: Tensor) -> Memory:
        """Compute what depends on the images alone, from their image cells `(B, P, C)`."""
        return Memory.of(cells, self.attention)

    def forward(self, input_ids: Tensor, memory: Memory, state: tuple[Tensor] | None = None):
        """Read words `(N, T)` and return logits `(N, T, V)`, weights `(N, T, P)` and the state."""
        num_images, num_captions = len(memory.mean), len(input_ids) // len(memory.mean)
        if state is None:
            state = (torch.tanh(self.mean_to_state(memory.mean)).repeat_interleave(num_captions, 0),)
        (hidden,), logits, weights = state, [], []
        for word in self.embedding(input_ids).unbind(1):
            query = hidden.unflatten(0, (num_images, num_captions))
            context, weight = (part.flatten(0, 1) for part in self.attention(query, memory.keys, memory.cells))
            inputs = torch.cat([word, context], 1)
            forget = torch.sigmoid(self.to_forget(torch.cat([inputs, hidden], 1)))
            new = torch.tanh(self.to_new(torch.cat([inputs, forget * hidden], 1)))
            hidden = (1 - forget) * hidden + forget * new
            logits.append(self.output(self.output_dropout(hidden)))
            weights.append(weight)
        return torch.stack(logits, 1), torch.stack(weights, 1), (hidden,)
