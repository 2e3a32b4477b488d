"""Decoders: image cells and the words so far in, scores of the next word out.

A part is a `torch.nn.Module` built from sizes and an attention. `prepare(cells)` computes what depends on the
image alone; `forward(input_ids (N, T), memory, state, lengths)` reads T words of each of N = B·K captions and
returns scores, attention weights and the state after the last word.
"""

# B: images, K: captions or beams of an image, N = B·K: captions, T: words, V: vocabulary
# P: image cells, C: channels of a cell, E: word embedding, D: state

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .registry import Registry

DECODERS = Registry("decoders", {"lstm": f"{__name__}:LSTMDecoder"})


State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Memory:
    """An image as the decoder sees it, shared by its captions and beams.

    A plain object on purpose: `generate()` copies every tensor of the encoder's output for each beam.

    Args:
        cells: `(B, P, C)`.
        keys: what the attention computes from them once.
    """

    cells: Tensor
    keys: Tensor


class RecurrentCache:
    """State of a recurrent decoder, passed through `generate()` as `past_key_values`.

    Args:
        memory: the images, in the order of the batch; beams share them.
        state: tensors `(N, D)` that follow their caption when beams are reordered.
        length: words read so far.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, memory: Memory, state: State, length: int) -> None:
        self.memory = memory
        self.state = state
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Words read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let caption n continue caption `beam_idx[n]`. Beams stay with their image, so memory stays put."""
        self.state = tuple(part.index_select(0, beam_idx.to(part.device)) for part in self.state)


@dataclass
class DecoderOutput:
    """What a decoder returns.

    Args:
        logits: `(N, T, V)`, zero where a caption is already over.
        weights: `(N, T, P)`, attention that chose each word, zero where a caption is over.
        hidden: `(N, T, D)`, the state after each word read.
        state: tensors `(N, D)` after the last word. Only meaningful without `lengths`.
    """

    logits: Tensor
    weights: Tensor
    hidden: Tensor
    state: State


class LSTMDecoder(nn.Module):
    """LSTM with soft attention after Show, Attend and Tell (Xu et al. 2015).

    Reading word y_{t-1}, the state h_{t-1} chooses where to look, and the word and the context ẑ_t drive the LSTM
    (eq. 1-3). A gate β_t = σ(f_β(h_{t-1})) scales the context (sec. 4.2.1). The next word comes from h_t alone or,
    with `deep_output`, from `L_o tanh(E y_{t-1} + L_h h_t + L_z ẑ_t)` (eq. 7).

    Departures: f_init is one linear layer with tanh and eq. 7 has a tanh, both as in the authors' code; forget
    gates start open by a fixed bias of 1 (Jozefowicz et al. 2015).

    Args:
        vocab_size: V.
        embedding_size: E.
        hidden_size: D.
        memory_size: C.
        attention: from `ATTENTIONS`, built for queries of size D and memory of size C.
        gate: scale the context by β.
        deep_output: eq. 7.
        memory_dropout: probability in [0, 1) of zeroing an element of a cell.
        embedding_dropout: probability in [0, 1) of zeroing an element of a word embedding.
        output_dropout: probability in [0, 1) of zeroing an element before the last linear layer.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        memory_size: int,
        attention: nn.Module,
        *,
        gate: bool = True,
        deep_output: bool = False,
        memory_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        output_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.attention = attention
        self.memory_to_state = nn.Linear(memory_size, 2 * hidden_size)
        self.state_to_gate = nn.Linear(hidden_size, 1) if gate else None
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.step_to_lstm = nn.Linear(memory_size + hidden_size, 4 * hidden_size, bias=False)
        self.step_to_output = nn.Linear(hidden_size + memory_size, embedding_size) if deep_output else None
        self.output = nn.Linear(embedding_size if deep_output else hidden_size, vocab_size)
        self.memory_dropout = nn.Dropout(memory_dropout)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.output_dropout = nn.Dropout(output_dropout)

    def prepare(self, cells: Tensor) -> Memory:
        """Everything that is computed once an image: `(B, P, C)` -> `Memory`."""
        cells = self.memory_dropout(cells)
        return Memory(cells, self.attention.keys(cells))  # type: ignore[operator]

    def initial_state(self, memory: Memory, num_captions: int) -> State:
        """h_0 and c_0, `(B·K, D)` each, from the mean cell (Xu et al. 2015, sec. 3.1.2)."""
        state = torch.tanh(self.memory_to_state(memory.cells.mean(1)))  # (B, 2D)
        return state.repeat_interleave(num_captions, 0).chunk(2, -1)

    def forward(
        self, input_ids: Tensor, memory: Memory, state: State | None = None, lengths: Tensor | None = None
    ) -> DecoderOutput:
        """Read T words of each caption.

        Args:
            input_ids: `(N, T)`, the captions of an image next to each other.
            memory: of B images; K = N / B.
            state: as returned for the words before; None at the start of the captions.
            lengths: `(N,)`, how many words to read of each. Given them, no arithmetic is spent on padding.
        """
        num_images = memory.cells.shape[0]
        num_captions, rest = divmod(input_ids.shape[0], num_images)
        assert rest == 0, f"{input_ids.shape[0]} captions for {num_images} images"
        if state is None:
            state = self.initial_state(memory, num_captions)
        plan = _Plan(num_images, num_captions, input_ids.shape[1], lengths)
        memory, state = plan.sort(memory, state)
        words = self.embedding_dropout(self.embedding(plan.pack(input_ids)))  # (R, E)
        hidden, contexts, weights, state = self._unroll(words, memory, state, plan.blocks)
        words, hidden, contexts, weights = (plan.trim(part) for part in (words, hidden, contexts, weights))
        features = hidden
        if self.step_to_output is not None:
            features = torch.tanh(words + self.step_to_output(torch.cat([hidden, contexts], -1)))
        logits = self.output(self.output_dropout(features))  # (R, V)
        return DecoderOutput(plan.unpack(logits), plan.unpack(weights), plan.unpack(hidden), state)

    def _unroll(
        self, words: Tensor, memory: Memory, state: State, blocks: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        num_images, (hidden, cell) = memory.cells.shape[0], state
        hidden, cell = (part.unflatten(0, (num_images, -1)) for part in (hidden, cell))  # (B, K, D)
        recurrence = _RecurrentLinear(self.step_to_lstm.weight)
        steps = []
        lstm_words = self.word_to_lstm(words).split([b * k for b, k in blocks])
        for (b, k), word in zip(blocks, lstm_words, strict=True):
            hidden, cell = hidden[:b, :k], cell[:b, :k]
            context, weights = self.attention(hidden, memory.keys[:b], memory.cells[:b])
            if self.state_to_gate is not None:
                context = torch.sigmoid(self.state_to_gate(hidden)) * context  # (b, k, C)
            gates = word.view(b, k, -1) + recurrence(torch.cat([context, hidden], -1))
            admit, forget, emit, new = gates.chunk(4, -1)
            cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(admit) * torch.tanh(new)
            hidden = torch.sigmoid(emit) * torch.tanh(cell)
            steps.append([part.flatten(0, 1) for part in (hidden, context, weights)])
        packed = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*steps, strict=True)]
        return *packed, (hidden.flatten(0, 1), cell.flatten(0, 1))  # type: ignore[return-value]


class _RecurrentLinear:
    """A linear map used at every step, whose weight gets its gradient from all steps in one product.

    Autograd would make a product over a few captions at every step, and add up gradients as large as the weight.
    Going back, the first step comes last, since every later one depends on it: it makes the product for all.

    Args:
        weight: `(out, in)`.
    """

    def __init__(self, weight: Tensor) -> None:
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.weight = weight
        self.matrix = weight.detach().to(dtype)
        self.used = False
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: Tensor) -> Tensor:
        """`(b, k, in) -> (b, k, out)`."""
        is_first, self.used = not self.used, True
        output: Tensor = _RecurrentLinearStep.apply(step.to(self.matrix.dtype), self.weight, self, is_first)
        return output


class _RecurrentLinearStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, weight: Tensor, linear: _RecurrentLinear, is_first: bool) -> Tensor:
        ctx.save_for_backward(step)
        ctx.linear, ctx.is_first = linear, is_first
        return functional.linear(step, linear.matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        linear: _RecurrentLinear = ctx.linear
        if ctx.needs_input_grad[1]:
            linear.steps.append((ctx.saved_tensors[0].flatten(0, 1), grad.flatten(0, 1)))
        grad_weight = None
        if ctx.is_first and linear.steps:
            steps, grads = (torch.cat(parts) for parts in zip(*linear.steps, strict=True))  # (R, in), (R, out)
            grad_weight = grads.T @ steps
            linear.steps.clear()
        return grad @ linear.matrix, grad_weight, None, None


class _Plan:
    """In which order words are read, so that finished captions cost nothing.

    Images are sorted by their longest caption and the captions of an image by length, so that the captions still
    running at step t fill a corner (b, k) of the (B, K) captions, but for a few of an image that has fewer than k
    left. Results of all steps are packed into R = Σ b·k rows.

    Args:
        num_images: B.
        num_captions: K.
        num_words: T.
        lengths: `(N,)`, or None to read T words of every caption.
    """

    def __init__(self, num_images: int, num_captions: int, num_words: int, lengths: Tensor | None) -> None:
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
        self.rows = torch.cat(steps)  # (R,), where in (N, T) a row belongs
        self.read = (self.rows % num_words < lengths[self.rows // num_words]).nonzero().squeeze(1)

    def sort(self, memory: Memory, state: State) -> tuple[Memory, State]:
        """Put images and captions into reading order."""
        if self.images is None:
            return memory, state
        captions = self.captions.flatten()
        memory = Memory(memory.cells[self.images], memory.keys[self.images])
        return memory, tuple(part[captions] for part in state)

    def pack(self, words: Tensor) -> Tensor:
        """`(N, T) -> (R,)`."""
        return words.T.flatten() if self.images is None else words.flatten()[self.rows]

    def trim(self, packed: Tensor) -> Tensor:
        """Drop rows of captions that were over, but in the corner: `(R, X) -> (words, X)`."""
        return packed if self.images is None else packed.index_select(0, self.read)

    def unpack(self, packed: Tensor) -> Tensor:
        """`(words, X) -> (N, T, X)`, zero where no word was read."""
        if self.images is None:
            return packed.unflatten(0, (self.num_words, -1)).transpose(0, 1)
        num_rows = self.captions.numel() * self.num_words
        rows = packed.new_zeros(num_rows, packed.shape[1]).index_copy(0, self.rows[self.read], packed)
        return rows.unflatten(0, (-1, self.num_words))
