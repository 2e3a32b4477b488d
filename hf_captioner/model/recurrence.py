"""What recurrent decoders are made of: layers, their deferred gradients, and the order in which captions are read.

A layer is unrolled once for all words of a batch: `step = layer.unroll()`, then `state = step(inputs, state, drive)`
for every word.
"""

# B: images, K: captions or beams of an image, N = B·K: captions, T: words, R: rows, X: inputs, D: state

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, ...]

# Inputs (b, k, ·) next to each other, state (b, k, D) before, and the drive (b, k, gates), what enters the gates
# from outside in place of the bias: state after.
Step = Callable[[Sequence[Tensor], State, Tensor | None], State]


@dataclass(frozen=True)
class Siblings:
    """Which captions continue the same caption, so that all it decides alone is computed once for them.

    Args:
        first: `(F,)`, a caption of each family.
        family: `(N,)`, the family of each caption.
    """

    first: Tensor
    family: Tensor

    @classmethod
    def of(cls, parents: Tensor) -> Siblings:
        """From the caption that each continues: `(N,)`."""
        found, family = parents.unique(return_inverse=True)
        places = torch.arange(len(parents), device=parents.device)
        return cls(places.new_empty(len(found)).scatter_(0, family, places), family)


class RecurrentLayer(nn.Linear):
    """One map from inputs and h to all gates; what becomes of them is each kind's own.

    Args:
        input_size: X.
        hidden_size: D.
        bias: have one; without it, every step needs a drive.
    """

    num_states: int
    num_gates: int

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__(input_size + hidden_size, self.num_gates * hidden_size, bias)

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        """One step as a function.

        Args:
            siblings: captions whose inputs, other than the drive, and state are the same; without gradients only.
            weight: `(gates, ·)`, of the inputs and h, where some inputs come with the drive; all of them by default.
        """
        raise NotImplementedError


class LSTMLayer(RecurrentLayer):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; Gers et al. 2000); the state is (h, c).

    One map from inputs and h to the gates (admit, forget, emit) and the new content. Departure: forget gates start
    open by a fixed bias of 1 (Jozefowicz et al. 2015).
    """

    num_states = 2
    num_gates = 4

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        """One step as a function."""
        linear = _RecurrentLinear(self.weight if weight is None else weight, siblings)

        def step(inputs: Sequence[Tensor], state: State, drive: Tensor | None) -> State:
            hidden, cell = state
            gates = (self.bias if drive is None else drive) + linear(torch.cat([*inputs, hidden], -1))
            admit, forget, emit, new = gates.chunk(4, -1)
            cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(admit) * torch.tanh(new)
            return torch.sigmoid(emit) * torch.tanh(cell), cell

        return step


class GRULayer(RecurrentLayer):
    """Gated recurrent unit (Cho et al. 2014, eq. 5-8); the state is (h,).

    One map from inputs and h to the gates (reset, keep), and from inputs and what reset leaves of h to the new
    content: `h' = keep ∘ h + (1 - keep) ∘ new`.
    """

    num_states = 1
    num_gates = 3

    def unroll(self, siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
        """One step as a function."""
        hidden_size = self.out_features // self.num_gates
        sizes = [2 * hidden_size, hidden_size]
        gates_weight, new_weight = (self.weight if weight is None else weight).split(sizes)
        # The reset gate depends on the word, so siblings part there.
        to_gates, to_new = _RecurrentLinear(gates_weight, siblings), _RecurrentLinear(new_weight)

        def step(inputs: Sequence[Tensor], state: State, drive: Tensor | None) -> State:
            (hidden,) = state
            drive_gates, drive_new = (self.bias if drive is None else drive).split(sizes, -1)
            gates = torch.sigmoid(drive_gates + to_gates(torch.cat([*inputs, hidden], -1)))
            reset, keep = gates.chunk(2, -1)
            new = torch.tanh(drive_new + to_new(torch.cat([*inputs, reset * hidden], -1)))
            return (keep * hidden + (1 - keep) * new,)

        return step


class Sentinel(nn.Linear):
    """What a decoder knows without the image: `s = σ(W_x x + W_h h) ∘ tanh(c)` (Lu et al. 2017, eq. 9-10).

    Departures: x is the word alone; the mean cell, which is part of the paper's x, is already in the first state. h is
    the attention's query, in a decoder that reads the word before it looks the h after it.

    Args:
        embedding_size: E, width of x.
        hidden_size: D, width of h and of the memory cell c.
    """

    def __init__(self, embedding_size: int, hidden_size: int) -> None:
        super().__init__(embedding_size + hidden_size, hidden_size)

    def unroll(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """One step as a function of x `(b, k, E)`, h and c `(b, k, D)`."""
        linear = _RecurrentLinear(self.weight)

        def step(word: Tensor, hidden: Tensor, cell: Tensor) -> Tensor:
            return torch.sigmoid(self.bias + linear(torch.cat([word, hidden], -1))) * torch.tanh(cell)

        return step


class Dropout(nn.Dropout):
    """PyTorch's dropout, with draws that take a processor a quarter of the time: floats, not one bit of a double."""

    def forward(self, values: Tensor) -> Tensor:
        """Zeros some of the elements in training, and scales the others."""
        if not self.training or self.p in (0, 1) or values.device.type != "cpu":
            return super().forward(values)
        is_kept = torch.rand(values.shape) >= self.p
        return values * is_kept.to(values.dtype).mul_(1 / (1 - self.p))


def unroll(layers: Sequence[RecurrentLayer], siblings: Siblings | None = None, weight: Tensor | None = None) -> Step:
    """One step of layers on top of each other, as if of one; each reads the new h of the one below.

    The state is all layers' states from the lowest up. The drive and the other arguments are the lowest layer's.
    """
    steps = [layers[0].unroll(siblings, weight), *(layer.unroll() for layer in layers[1:])]
    size = layers[0].num_states

    def step(inputs: Sequence[Tensor], state: State, drive: Tensor | None) -> State:
        states: list[Tensor] = []
        for start, step_of_layer in zip(range(0, len(state), size), steps, strict=True):
            after = step_of_layer(inputs, state[start : start + size], drive)
            states += after
            inputs, drive = after[:1], None
        return tuple(states)

    return step


class _Recurrent:
    """A product used at every step, one operand of which gets its gradient from all steps in one product.

    Autograd would make a product over a few captions at every step, and add up gradients as large as the operand.
    Going back, the first step comes last, since every later one depends on it: it makes the product for all.

    Args:
        operand: the same at every step.
    """

    def __init__(self, operand: Tensor) -> None:
        device = operand.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else operand.dtype
        self.operand = operand
        self.constant = operand.detach().to(dtype)
        self.used = False
        self.steps: list[tuple[Tensor, Tensor]] = []  # what was multiplied, and the gradient of the product

    def __call__(self, step: Tensor) -> Tensor:
        is_first, self.used = not self.used, True
        output: Tensor = _RecurrentStep.apply(step.to(self.constant.dtype), self.operand, self, is_first)
        return output

    def product(self, step: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, grad: Tensor) -> Tensor:
        """Of what was multiplied."""
        raise NotImplementedError

    def operand_gradient(self) -> Tensor:
        """From all steps."""
        raise NotImplementedError


class _RecurrentLinear(_Recurrent):
    """A linear map, `(b, k, in) -> (b, k, out)`.

    Args:
        weight: `(out, in)`.
        siblings: captions whose inputs are the same, so that one product will do for each family.
    """

    def __init__(self, weight: Tensor, siblings: Siblings | None = None) -> None:
        super().__init__(weight)
        self.siblings = siblings

    def __call__(self, step: Tensor) -> Tensor:
        if self.siblings is None:
            return super().__call__(step)
        families = step.flatten(0, 1)[self.siblings.first].to(self.constant.dtype)
        return self.product(families)[self.siblings.family].unflatten(0, step.shape[:2])

    def product(self, step: Tensor) -> Tensor:
        return functional.linear(step, self.constant)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.constant

    def operand_gradient(self) -> Tensor:
        steps, grads = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*self.steps, strict=True))
        return grads.T @ steps  # (out, R) @ (R, in)


class RecurrentSum(_Recurrent):
    """Sums over the cells of each image: weights `(b, k, P) -> (b, k, X)`.

    Args:
        values: `(B, P, X)`; a step may leave out the last images.
    """

    def product(self, step: Tensor) -> Tensor:
        """With the values."""
        return step @ self.constant[: len(step)]

    def gradient(self, grad: Tensor) -> Tensor:
        """Of the weights."""
        return grad @ self.constant[: len(grad)].transpose(1, 2)

    def operand_gradient(self) -> Tensor:
        """Of the values, from all steps."""
        num_images, num_rows = len(self.constant), sum(step.shape[1] for step, _ in self.steps)
        weights = self.constant.new_empty(num_images, num_rows, self.constant.shape[1])
        grads = self.constant.new_empty(num_images, num_rows, self.constant.shape[2])
        first = 0
        for step, grad in self.steps:
            last = first + step.shape[1]
            for whole, part in ((weights, step), (grads, grad)):
                whole[: len(part), first:last] = part
                whole[len(part) :, first:last] = 0
            first = last
        return weights.transpose(1, 2) @ grads  # (B, P, ΣK) @ (B, ΣK, X)


class _RecurrentStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, operand: Tensor, recurrent: _Recurrent, is_first: bool) -> Tensor:
        ctx.save_for_backward(step)
        ctx.recurrent, ctx.is_first = recurrent, is_first
        return recurrent.product(step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recurrent: _Recurrent = ctx.recurrent
        if ctx.needs_input_grad[1]:
            recurrent.steps.append((*ctx.saved_tensors, grad))
        grad_operand = None
        if ctx.is_first and recurrent.steps:
            grad_operand = recurrent.operand_gradient()
            recurrent.steps.clear()
        return recurrent.gradient(grad), grad_operand, None, None


class Plan:
    """In which order words are read, so that finished captions cost nothing.

    Images are sorted by their longest caption and the captions of an image by length, so that the captions still
    running at step t fill a corner (b, k) of the (B, K) captions, but for a few of an image that has fewer than k
    left. Captions that begin alike take their first step as one, (b, 1). Results of all steps are packed into
    R = Σ b·k rows.

    Args:
        num_images: B.
        num_captions: K.
        num_words: T.
        lengths: `(N,)`, or None to read T words of every caption.
        begin_alike: whether the captions of an image have the same first word and state; only with lengths.
    """

    def __init__(
        self, num_images: int, num_captions: int, num_words: int, lengths: Tensor | None, begin_alike: bool = False
    ) -> None:
        self.num_words = num_words
        self.blocks = [(num_images, num_captions)] * num_words
        self.images: Tensor | None = None
        if lengths is None:
            return
        per_image = lengths.view(num_images, num_captions)
        per_image, by_caption = per_image.sort(dim=1, descending=True, stable=True)
        self.images = per_image[:, 0].argsort(descending=True, stable=True)  # (B,)
        per_image, by_caption = per_image[self.images], by_caption[self.images]
        self.captions = self.images.unsqueeze(1) * num_captions + by_caption  # (B, K)
        running = per_image.cpu().unsqueeze(2) > torch.arange(num_words)  # (B, K, T)
        images_left = running[:, 0].sum(0).tolist()
        captions_left = running.sum(1).amax(0).tolist()
        self.blocks = [(b, k) for b, k in zip(images_left, captions_left, strict=True) if b]
        steps = [self.captions[:b, :k].flatten() * num_words + t for t, (b, k) in enumerate(self.blocks)]
        places = torch.cat(steps)  # of what the rows give, in (N, T)
        rows = torch.arange(len(places), device=places.device)
        if begin_alike:
            b, k = self.blocks[0]
            self.blocks[0], steps[0] = (b, 1), steps[0][::k]
            rows = torch.cat([rows[: b * k] // k, rows[b * k :] - b * (k - 1)])
        self.rows = torch.cat(steps)  # (R,), where in (N, T) the word of a row is read
        is_word = (places % num_words < lengths[places // num_words]).nonzero().squeeze(1)
        self.read, self.places = rows[is_word], places[is_word]  # (words,), the row of each word, and where it belongs

    def sort(self, state: State) -> State:
        """Put captions `(N, ·)` into reading order; images go by `images`."""
        return state if self.images is None else tuple(part[self.captions.flatten()] for part in state)

    def pack(self, words: Tensor) -> Tensor:
        """`(N, T) -> (R,)`."""
        return words.T.flatten() if self.images is None else words.flatten()[self.rows]

    def trim(self, packed: Tensor) -> Tensor:
        """Of each word its row, none of captions that were over, but in the corner: `(R, X) -> (words, X)`."""
        return packed if self.images is None else packed.index_select(0, self.read)

    def unpack(self, packed: Tensor) -> Tensor:
        """`(words, X) -> (N, T, X)`, zero where no word was read."""
        if self.images is None:
            return packed.unflatten(0, (self.num_words, -1)).transpose(0, 1)
        num_rows = self.captions.numel() * self.num_words
        rows = packed.new_zeros(num_rows, *packed.shape[1:]).index_copy_(0, self.places, packed)
        return rows.unflatten(0, (-1, self.num_words))
