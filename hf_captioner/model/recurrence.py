"""Recurrent layers of the decoders: LSTM, GRU and the visual sentinel.

Each layer can be run in two equal ways: `layer.step(inputs, state)` takes one step plainly; `layer.unroll()` returns
the same step as a function to be called for all words of a batch, and computes the gradients of the weights once for
all of them (`deferred_products.py`).

h is a layer's hidden state, and c an LSTM's cell state, which has nothing to do with the grid cells of image features
that the other modules call cells.
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
    """Recurrent layer with one linear map from its inputs and h to all gates; a subclass implements `_update`.

    Args:
        input_size: Width of all inputs together, X.
        hidden_size: Width of h, D.
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
        """Split the layer's weight `(gates, ·)` into one weight for each matrix product; by default there is one."""
        return [weight]

    def step(self, inputs: Inputs, state: State, gate_input: Tensor | None = None) -> State:
        """Compute the layer's state after one step; this is the plain version of `unroll`.

        Args:
            inputs: Tensors `(b, k, ·)`, X wide together.
            state: Tensors `(b, k, D)`.
            gate_input: What is already known of the gates' pre-activations, `(b, k, gates)`, in place of the bias.
        """
        products = [partial(functional.linear, weight=part) for part in self._split(self.weight)]
        return self._update(products, inputs, state, gate_input)

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        """Return a function that is called once per step in place of `step`, with equal results in less time.

        Args:
            siblings: Groups of captions whose inputs and state are the same; None in training.
            weight: Columns of the layer's weight, `(gates, ·)`, for the hidden state and for the inputs given at each
                step. Products of inputs known before are passed to the returned function as `gate_input`. By default,
                the whole weight.
        """
        first, *rest = self._split(self.weight if weight is None else weight)
        # Later products depend on the gates, and so on the word, which differs between siblings.
        products = [DeferredLinear(first, siblings), *map(DeferredLinear, rest)]
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

    def _split(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.split(self._sizes)

    def _update(self, products: Products, inputs: Inputs, state: State, gate_input: Tensor | None) -> State:
        (to_gates, to_new), (hidden,) = products, state
        gates, new = (self.bias if gate_input is None else gate_input).split(self._sizes, -1)
        reset_gate, update_gate = torch.sigmoid(gates + to_gates(torch.cat([*inputs, hidden], -1))).chunk(2, -1)
        new = torch.tanh(new + to_new(torch.cat([*inputs, reset_gate * hidden], -1)))
        return (update_gate * hidden + (1 - update_gate) * new,)

    @property
    def _sizes(self) -> list[int]:
        hidden_size = self.out_features // self.num_gates
        return [2 * hidden_size, hidden_size]


class Sentinel(nn.Linear):
    """Visual sentinel of adaptive attention, `s = σ(W_x x + W_h h) ∘ tanh(c)` (Lu et al. 2017, eq. 9-10).

    It stands for what a decoder knows without the image. Departures: x is the word alone, as the mean of the image
    features, which is part of the paper's x, is already in the first state; h is the query of the attention, which in a
    decoder that reads the word before it attends is the h after the word.

    Args:
        embedding_size: Width of the word embedding x, E.
        hidden_size: Width of the hidden state h and of the LSTM's cell state c, D.
    """

    def __init__(self, embedding_size: int, hidden_size: int) -> None:
        super().__init__(embedding_size + hidden_size, hidden_size)

    def _update(self, product: Product, word: Tensor, hidden: Tensor, cell_state: Tensor) -> Tensor:
        """Compute the sentinel, given a function that multiplies by its weight."""
        return torch.sigmoid(self.bias + product(torch.cat([word, hidden], -1))) * torch.tanh(cell_state)

    def step(self, word: Tensor, hidden: Tensor, cell_state: Tensor) -> Tensor:
        """Compute sentinels `(b, k, D)` from words `(b, k, E)`, hidden states and LSTM cell states `(b, k, D)`."""
        return self._update(partial(functional.linear, weight=self.weight), word, hidden, cell_state)

    def unroll(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a function that is called once per step in place of `step`, with equal results in less time."""
        return partial(self._update, DeferredLinear(self.weight))


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
