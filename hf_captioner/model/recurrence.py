"""Layers of recurrent decoders.

Each layer can be run in two equal ways: `layer.step(inputs, state)` takes one step plainly; `layer.unroll()` returns
the same step as a function to be called for all words of a batch, which computes the gradients of the weights once for
all of them (`deferred_products.py`).
"""

# b: images, k: captions or beams of an image, E: word embedding, D: state, X: width of all inputs of a layer

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder_interface import Siblings, State
from .deferred_products import DeferredLinear

Inputs = Sequence[Tensor]

# Arguments: the inputs (b, k, ·), which are concatenated; the state before, tensors (b, k, D); and, in place of the
# layer's bias, what is already known of the gates' pre-activations (b, k, gates), or None. Returns the state after.
Step = Callable[[Inputs, State, Tensor | None], State]

Product = Callable[[Tensor], Tensor]  # with a weight, (b, k, in) -> (b, k, out)
Products = Sequence[Product]


class RecurrentLayer(nn.Linear):
    """One linear map from the inputs and h to all gates; a subclass says in `_update` what becomes of the gates.

    Args:
        input_size: X.
        hidden_size: D.
        bias: Whether the layer has a bias; without it, every step needs `gate_input`.
    """

    num_states: int
    num_gates: int

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__(input_size + hidden_size, self.num_gates * hidden_size, bias)

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        """Compute the layer's state after one step, given functions that multiply by its weights."""
        raise NotImplementedError

    def _split(self, weight: Tensor) -> Sequence[Tensor]:
        """Split the layer's weight `(gates, ·)` into one for each of its products; by default there is one product."""
        return [weight]

    def step(self, inputs: Inputs, state: State, gate_input: Tensor | None = None) -> State:
        """Compute the layer's state after one step, plainly.

        Args:
            inputs: Tensors `(b, k, ·)`, X wide together.
            state: Tensors `(b, k, D)`.
            gate_input: What is already known of the gates' pre-activations, `(b, k, gates)`, in place of the bias.
        """
        products = [partial(functional.linear, weight=part) for part in self._split(self.weight)]
        return self._update(products, inputs, state, gate_input)

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        """Return `step` as a function that is to be called for every word of a batch.

        Args:
            siblings: Groups of captions whose inputs and state are the same. Not for training.
            weight: Weight `(gates, ·)` of h and of those inputs that do not come with `gate_input`; by default, all.
        """
        first, *rest = self._split(self.weight if weight is None else weight)
        # Later products depend on the gates, and so on the word, which differs between siblings.
        products = [DeferredLinear(first, siblings), *map(DeferredLinear, rest)]
        return partial(self._update, products)


class LSTMLayer(RecurrentLayer):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000); the state is (h, c).

    The gates are admit, forget, emit and the new content. Departure: forget gates start open by a fixed bias of 1
    (Jozefowicz et al. 2015).
    """

    num_states = 2
    num_gates = 4

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        (to_gates,), (hidden, cell) = products, state
        gates = (self.bias if gate_input is None else gate_input) + to_gates(torch.cat([*inputs, hidden], -1))
        admit, forget, emit, new = gates.chunk(4, -1)
        cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(admit) * torch.tanh(new)
        return torch.sigmoid(emit) * torch.tanh(cell), cell


class GRULayer(RecurrentLayer):
    """Gated recurrent unit (Cho et al. 2014, eq. 5-8); the state is (h,).

    One product of inputs and h gives the gates reset and keep, another of inputs and `reset ∘ h` the new content:
    `h' = keep ∘ h + (1 - keep) ∘ new`.
    """

    num_states = 1
    num_gates = 3

    def _split(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.split(self._sizes)

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        (to_gates, to_new), (hidden,) = products, state
        gates, new = (self.bias if gate_input is None else gate_input).split(self._sizes, -1)
        reset, keep = torch.sigmoid(gates + to_gates(torch.cat([*inputs, hidden], -1))).chunk(2, -1)
        new = torch.tanh(new + to_new(torch.cat([*inputs, reset * hidden], -1)))
        return (keep * hidden + (1 - keep) * new,)

    @property
    def _sizes(self) -> list[int]:
        hidden_size = self.out_features // self.num_gates
        return [2 * hidden_size, hidden_size]


class Sentinel(nn.Linear):
    """What a decoder knows without the image, `s = σ(W_x x + W_h h) ∘ tanh(c)` (Lu et al. 2017, eq. 9-10).

    Departures: x is the word alone, as the mean cell, which is part of the paper's x, is already in the first state; h
    is the query of the attention, which in a decoder that reads the word before it attends is the h after the word.

    Args:
        embedding_size: E, width of x.
        hidden_size: D, width of h and of the memory cell c.
    """

    def __init__(self, embedding_size: int, hidden_size: int) -> None:
        super().__init__(embedding_size + hidden_size, hidden_size)

    def _update(self, product: Product, word: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
        """Compute the sentinel, given a function that multiplies by its weight."""
        return torch.sigmoid(self.bias + product(torch.cat([word, hidden], -1))) * torch.tanh(cell)

    def step(self, word: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
        """Compute the sentinel `(b, k, D)` from x `(b, k, E)`, h and c `(b, k, D)`."""
        return self._update(partial(functional.linear, weight=self.weight), word, hidden, cell)

    def unroll(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return `step` as a function that is to be called for every word of a batch."""
        return partial(self._update, DeferredLinear(self.weight))


class Dropout(nn.Dropout):
    """PyTorch's dropout, drawn four times as fast on CPUs, from floats in place of bits of doubles."""

    def forward(self, values: Tensor) -> Tensor:
        """Zero some elements in training, and scale the others up."""
        if not self.training or self.p in (0, 1) or values.device.type != "cpu":
            return super().forward(values)
        is_kept = torch.rand(values.shape) >= self.p
        return values * is_kept.to(values.dtype).mul_(1 / (1 - self.p))


def stack(steps: Sequence[Step]) -> Step:
    """Return the step of layers on top of each other, given the step of each layer, the lowest first.

    Each layer reads the new h of the layer below. The state holds the states of all layers, from the lowest up; inputs
    and `gate_input` are those of the lowest.
    """

    def step(inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        num_states = len(state) // len(steps)
        states: list[Tensor] = []
        for index, step_of_layer in enumerate(steps):
            after = step_of_layer(inputs, state[index * num_states : (index + 1) * num_states], gate_input)
            states += after
            inputs, gate_input = after[:1], None
        return tuple(states)

    return step
