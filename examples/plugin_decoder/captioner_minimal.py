"""A decoder of minimal gated units: one gate where a GRU has two and an LSTM three."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_captioner.model.decoders import RecurrentDecoder
from hf_captioner.model.recurrence import RecurrentLayer, Siblings, Step


class MinimalLayer(RecurrentLayer):
    """`f = σ(W_f [x, h])`, `h' = (1 - f) ∘ h + f ∘ tanh(W [x, f ∘ h])` (Zhou et al. 2016, eq. 5); the state is (h,)."""

    num_states, num_gates = 1, 2

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        to_forget, to_new = (self.weight if weight is None else weight).chunk(2)

        def step(inputs: list[Tensor], state: tuple[Tensor], drive: Tensor | None) -> tuple[Tensor]:
            (hidden,), (forget, new) = state, (self.bias if drive is None else drive).chunk(2, -1)
            forget = torch.sigmoid(forget + linear(torch.cat([*inputs, hidden], -1), to_forget))
            new = torch.tanh(new + linear(torch.cat([*inputs, forget * hidden], -1), to_new))
            return ((1 - forget) * hidden + forget * new,)

        return step


class MinimalDecoder(RecurrentDecoder):
    layer_type = MinimalLayer

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_gates = nn.Linear(embedding_size, 2 * hidden_size)
        sizes = [memory_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(MinimalLayer(size, hidden_size, bias=i > 0) for i, size in enumerate(sizes))

    def _layers(self) -> list[RecurrentLayer]:
        return list(self.layers)

    def _drives(self, words: Tensor) -> Tensor:
        return self.word_to_gates(words)
