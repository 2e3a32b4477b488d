"""Recurrent layers of the decoders: LSTM, GRU and the visual sentinel.

A layer is what is computed from the products of a linear map. The map is a module of its own, which the decoder owns:
`LSTMLayer(self.step_to_lstm)`. It can be run in two equal ways: `layer.step(inputs, state)` takes one step plainly;
`layer.unroll()` returns the same step as a function to be called for all words of a batch, and computes the gradients
of the weights once for all of them (`deferred_products.py`). A map that is no plain `nn.Linear` any more, because LoRA
or a quantized one took its place, is called at every step instead.

h is a layer's hidden state, and c an LSTM's cell state, which has nothing to do with the grid cells of image features
that the other modules call cells.
"""

# b: images, k: captions or beams of an image, E: word embedding, D: state, X: width of all inputs of a layer

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder_interface import Siblings, State
from .deferred_products import DeferredLinear, is_plain

Inputs = Sequence[Tensor]

# Arguments: the inputs (b, k, ·), which are concatenated; the state before, tensors (b, k, D); and, in place of the
# layer's bias, what is already known of the gates' pre-activations (b, k, gates), or None. Returns the state after.
Step = Callable[[Inputs, State, Tensor | None], State]

Product = Callable[[Tensor], Tensor]  # with a weight, (b, k, in) -> (b, k, out)
Products = Sequence[Product]


class LinearMap:
    """The products of what is computed from the same linear map at every step.

    Args:
        linear: `nn.Linear`, or a module in its place.
    """

    num_products = 1

    def __init__(self, linear: nn.Module) -> None:
        self.linear: Any = linear
        self.is_plain = is_plain(linear)

    @property
    def bias(self) -> Tensor | float:
        """What is to be added to the products: the bias of a plain map, while another one adds its own."""
        return self.linear.bias if self.is_plain else 0.0

    def _split(self, values: Tensor, dim: int) -> Sequence[Tensor]:
        """Split weights or gates along a dimension of all gates, one part for each product; by default one for all."""
        return [values]

    def _products(self, product_with: Callable[[Tensor], Product], weight: Tensor | None = None) -> Products:
        """Return the map as one function for each product, made of a weight, or calling the map if it isn't plain."""
        if self.is_plain:
            return [product_with(part) for part in self._split(self.linear.weight if weight is None else weight, 0)]

        def product(step: Tensor, n: int) -> Tensor:
            return self._split(self.linear(step), -1)[n]

        return [partial(product, n=n) for n in range(self.num_products)]


def plain_product(weight: Tensor) -> Product:
    """Return the function that multiplies by a weight; `DeferredLinear` is the fast one."""
    return partial(functional.linear, weight=weight)


class RecurrentLayer(LinearMap):
    """Recurrent layer with one linear map from its inputs and h to all gates; a subclass implements `_update`."""

    num_states: int
    num_gates: int

    @classmethod
    def linear_map(cls, input_size: int, hidden_size: int, bias: bool = True) -> nn.Linear:
        """Build the linear map of a layer.

        Args:
            input_size: Width of all inputs together, X.
            hidden_size: Width of h, D.
            bias: Whether the map has a bias; without it, every step needs `gate_input`.
        """
        return nn.Linear(input_size + hidden_size, cls.num_gates * hidden_size, bias)

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        """Compute the layer's state after one step, given functions that multiply by its weights."""
        raise NotImplementedError

    def step(self, inputs: Inputs, state: State, gate_input: Tensor | None = None) -> State:
        """Compute the layer's state after one step; this is the plain version of `unroll`.

        Args:
            inputs: Tensors `(b, k, ·)`, X wide together.
            state: Tensors `(b, k, D)`.
            gate_input: What is already known of the gates' pre-activations, `(b, k, gates)`, in place of the bias.
        """
        return self._update(self._products(plain_product), inputs, state, gate_input)

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        """Return a function that is called once per step in place of `step`, with equal results in less time.

        Args:
            siblings: Groups of captions whose inputs and state are the same; None in training.
            weight: Columns of the layer's weight, `(gates, ·)`, for the hidden state and for the inputs given at each
                step. Products of inputs known before are passed to the returned function as `gate_input`. By default,
                the whole weight.
        """
        products = self._products(DeferredLinear, weight)
        if isinstance(products[0], DeferredLinear):
            # Later products depend on the gates, and so on the word, which differs between siblings.
            products[0].siblings = siblings
        return partial(self._update, products)


class LSTMLayer(RecurrentLayer):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    The state is (h, c): the hidden state, and the LSTM's cell state. The rows of the weight are those of the input
    gate, the forget gate, the output gate and the candidate for c. Departure: forget gates start open by a fixed bias
    of 1 (Jozefowicz et al. 2015).
    """

    num_states = 2
    num_gates = 4

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        (to_gates,), (hidden, cell_state) = products, state
        gates = (self.bias if gate_input is None else gate_input) + to_gates(torch.cat([*inputs, hidden], -1))
        input_gate, forget_gate, output_gate, new = gates.chunk(4, -1)
        cell_state = torch.sigmoid(forget_gate + 1) * cell_state + torch.sigmoid(input_gate) * torch.tanh(new)
        return torch.sigmoid(output_gate) * torch.tanh(cell_state), cell_state


class GRULayer(RecurrentLayer):
    """Gated recurrent unit (Cho et al. 2014, eq. 5-8); the state is (h,).

    One product of inputs and h gives the reset gate r and the update gate z, and another of inputs and `r ∘ h` the
    candidate h̃; then `h' = z ∘ h + (1 - z) ∘ h̃`.
    """

    num_states = 1
    num_gates = 3
    num_products = 2

    def _split(self, values: Tensor, dim: int) -> Sequence[Tensor]:
        hidden_size = values.shape[dim] // self.num_gates
        return values.split([2 * hidden_size, hidden_size], dim)

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        (to_gates, to_new), (hidden,) = products, state
        known = self.bias if gate_input is None else gate_input
        gates, new = self._split(known, -1) if isinstance(known, Tensor) else (known, known)
        reset_gate, update_gate = torch.sigmoid(gates + to_gates(torch.cat([*inputs, hidden], -1))).chunk(2, -1)
        new = torch.tanh(new + to_new(torch.cat([*inputs, reset_gate * hidden], -1)))
        return (update_gate * hidden + (1 - update_gate) * new,)


class Sentinel(LinearMap):
    """Visual sentinel of adaptive attention, `s = σ(W_x x + W_h h) ∘ tanh(c)` (Lu et al. 2017, eq. 9-10).

    It stands for what a decoder knows without the image. Departures: x is the word alone, as the mean of the image
    features, which is part of the paper's x, is already in the first state; h is the query of the attention, which in a
    decoder that reads the word before it attends is the h after the word.
    """

    @staticmethod
    def linear_map(embedding_size: int, hidden_size: int) -> nn.Linear:
        """Build the linear map of a sentinel.

        Args:
            embedding_size: Width of the word embedding x, E.
            hidden_size: Width of the hidden state h and of the LSTM's cell state c, D.
        """
        return nn.Linear(embedding_size + hidden_size, hidden_size)

    def _update(self, products: Products, word: Tensor, hidden: Tensor, cell_state: Tensor) -> Tensor:
        """Compute the sentinel, given a function that multiplies by its weight."""
        (product,) = products
        return torch.sigmoid(self.bias + product(torch.cat([word, hidden], -1))) * torch.tanh(cell_state)

    def step(self, word: Tensor, hidden: Tensor, cell_state: Tensor) -> Tensor:
        """Compute sentinels `(b, k, D)` from words `(b, k, E)`, hidden states and LSTM cell states `(b, k, D)`."""
        return self._update(self._products(plain_product), word, hidden, cell_state)

    def unroll(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a function that is called once per step in place of `step`, with equal results in less time."""
        return partial(self._update, self._products(DeferredLinear))


class Dropout(nn.Dropout):
    """PyTorch's dropout, but with a mask that is drawn four times as fast on CPUs, from single-precision numbers."""

    def forward(self, values: Tensor) -> Tensor:
        """Zero some elements in training, and scale the others up."""
        if not self.training or self.p in (0, 1) or values.device.type != "cpu":
            return super().forward(values)
        is_kept = torch.rand(values.shape) >= self.p
        return values * is_kept.to(values.dtype).mul_(1 / (1 - self.p))


def stack(steps: Sequence[Step]) -> Step:
    """Return the step of layers on top of each other, given the step of each layer, the lowest first.

    Each layer reads the new hidden state of the layer below. The state of the stack holds the states of all layers,
    from the lowest up; its inputs and `gate_input` go to the lowest layer.
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
