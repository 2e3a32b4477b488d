"""Decoders: image cells and the words so far in, scores of the next word out.

A part is a `torch.nn.Module` built from sizes and an attention. `prepare(cells)` computes what depends on the
image alone; `forward(input_ids (N, T), memory, state, lengths)` reads T words of each of N = B·K captions and
returns scores, attention weights and the state after the last word. With the class attribute `uses_siblings = True`,
it takes a fifth argument: which captions continue the same caption. `attentions.py` says what an attention may ask of
its decoder, and tell it, beyond that.
"""

# B: images, K: captions or beams of an image, N = B·K: captions, T: words, V: vocabulary
# P: image cells, C: channels of a cell, E: word embedding, D: state

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .recurrence import (
    Dropout,
    GRULayer,
    LSTMLayer,
    Plan,
    RecurrentLayer,
    RecurrentSum,
    Sentinel,
    Siblings,
    State,
    unroll,
)
from .registry import Registry

DECODERS = Registry(
    "decoders",
    {
        "lstm": f"{__name__}:LSTMDecoder",
        "lstm_channel_gate": f"{__name__}:ChannelGateLSTMDecoder",
        "gru": f"{__name__}:GRUDecoder",
        "spatial": f"{__name__}:SpatialDecoder",
        "top_down": f"{__name__}:TopDownDecoder",
    },
)


@dataclass(frozen=True)
class Memory:
    """An image as the decoder sees it, shared by its captions and beams.

    A plain object on purpose: `generate()` copies every tensor of the encoder's output for each beam.

    Args:
        cells: `(B, P, C)`.
        keys: what the attention computes from them once.
        mean: `(B, C)`, the mean cell.
    """

    cells: Tensor
    keys: Tensor
    mean: Tensor

    def take(self, images: Tensor | slice) -> Memory:
        """The memory of some of the images."""
        return Memory(self.cells[images], self.keys[images], self.mean[images])


class RecurrentCache:
    """State of a recurrent decoder, passed through `generate()` as `cache`.

    Args:
        memory: the images, in the order of the batch; beams share them.
        state: tensors `(N, D)` that follow their caption when beams are reordered.
        length: words read so far.
        siblings: which captions continue the same caption, if known.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (True,)  # a state, as of linear attention: there is nothing of the past to look up

    def __init__(self, memory: Memory, state: State, length: int) -> None:
        self.memory = memory
        self.state = state
        self.length = length
        self.siblings: Siblings | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Words read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let caption n continue caption `beam_idx[n]`. Beams stay with their image, so memory stays put."""
        self.state = tuple(part.index_select(0, beam_idx.to(part.device)) for part in self.state)
        # An accelerator would have to wait for their number, and has little to gain from fewer rows.
        self.siblings = Siblings.of(beam_idx) if beam_idx.device.type == "cpu" else None

    def keep_images(self, images: Tensor) -> None:
        """Forget the memory of all but these images; their captions' states are kept by `reorder_cache`."""
        self.memory = self.memory.take(images)


@dataclass
class DecoderOutput:
    """What a decoder returns.

    Args:
        logits: `(N, T, V)`, zero where a caption is already over.
        weights: `(N, T, P)`, attention that chose each word, zero where a caption is over.
        hidden: `(N, T, D)`, the state after each word read.
        state: tensors `(N, D)` after the last word. Only meaningful without `lengths`.
        log_probs: `(N, T)`, of an attention that sampled: log-probability of the cell it took for each word.
        read: of the words read alone, where `lengths` were given, their logits `(R, V)` and places `(R,)` among N·T.
    """

    logits: Tensor
    weights: Tensor
    hidden: Tensor
    state: State
    log_probs: Tensor | None = None
    read: tuple[Tensor, Tensor] | None = None


# Query and memory cell (b, k, D), word (b, k, E) and the images' memory: what the decoder is to read, which is the
# context or what it brings to the gates; what the output is to read of the context (b, k, C or 0), weights (b, k, P)
# and, of an attention that samples, log-probabilities (b, k).
Attend = Callable[[Tensor, Tensor, Tensor, Memory], tuple[Tensor, ...]]

# Word (b, k, E), drive (b, k, gates), the images' memory and the state before:
# the state after; and h (b, k, D) to compute the word from, followed by what the attention gave.
DecoderStep = Callable[[Tensor, Tensor, Memory, State], tuple[State, tuple[Tensor, ...]]]


def sums_cells(attention: type) -> bool:
    """Whether a class of attention says of the very `forward` that it has that its context is `weights @ memory`."""
    return next(vars(owner).get("sums_cells", False) for owner in attention.__mro__ if "forward" in vars(owner))


class RecurrentDecoder(nn.Module):
    """What recurrent decoders share, and how layers on top of each other caption, after Show, Attend and Tell.

    Reading word y_{t-1}, the state h_{t-1} of the top layer chooses where to look, and the word and the context ẑ_t
    drive the lowest layer (Xu et al. 2015, eq. 1-3). A gate β_t = σ(f_β(h_{t-1})) scales the context (sec. 4.2.1).
    The next word comes from h_t alone or, with `deep_output`, from `L_o tanh(E y_{t-1} + L_h h_t + L_z ẑ_t)` (eq. 7).

    Departures: f_init is one linear layer with tanh and eq. 7 has a tanh, both as in the authors' code.

    Args:
        vocab_size: V.
        embedding_size: E.
        hidden_size: D.
        memory_size: C.
        attention: from `ATTENTIONS`, built for queries of size D and memory of size C.
        num_layers: LSTMs or GRUs on top of each other.
        gate: scale the context by β.
        deep_output: eq. 7.
        memory_dropout: probability in [0, 1) of zeroing an element of a cell.
        embedding_dropout: probability in [0, 1) of zeroing an element of a word embedding.
        output_dropout: probability in [0, 1) of zeroing an element before the last linear layer.

    Raises:
        ValueError: no layers.
    """

    uses_siblings = True
    layer_type: type[RecurrentLayer]
    layers_below = 0  # that run before the attention
    gates_channels = False  # each by itself

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        memory_size: int,
        attention: nn.Module,
        *,
        num_layers: int = 1,
        gate: bool = True,
        deep_output: bool = False,
        memory_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        output_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}, but a decoder has at least 1.")
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.attention = attention
        self._num_states = (self.layers_below + num_layers) * self.layer_type.num_states
        self.memory_to_state = nn.Linear(memory_size, self._num_states * hidden_size)
        self.state_to_gate = nn.Linear(hidden_size, memory_size if self.gates_channels else 1) if gate else None
        self._build_layers(embedding_size, hidden_size, memory_size, num_layers)
        self.step_to_output = nn.Linear(hidden_size + memory_size, embedding_size) if deep_output else None
        self.output = nn.Linear(embedding_size if deep_output else hidden_size, vocab_size)
        uses_sentinel = getattr(attention, "uses_sentinel", False)
        self.sentinel = Sentinel(embedding_size, hidden_size) if uses_sentinel else None
        self.memory_dropout = Dropout(memory_dropout)
        self.embedding_dropout = Dropout(embedding_dropout)
        self.output_dropout = Dropout(output_dropout)

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        raise NotImplementedError

    def _layers(self) -> list[RecurrentLayer]:
        """The layers whose uppermost h words are computed from, from the lowest up."""
        raise NotImplementedError

    def _drives(self, words: Tensor) -> Tensor:
        """What words bring to the gates of the layer that reads them: `(R, E) -> (R, gates)`."""
        raise NotImplementedError

    def prepare(self, cells: Tensor) -> Memory:
        """Everything that is computed once an image: `(B, P, C)` -> `Memory`."""
        cells = self.memory_dropout(cells)
        return Memory(cells, self.attention.keys(cells), cells.mean(1))  # type: ignore[operator]

    def initial_state(self, memory: Memory, num_captions: int) -> State:
        """The state before the first word, tensors `(B·K, D)`, from the mean cell (Xu et al. 2015, sec. 3.1.2)."""
        state = torch.tanh(self.memory_to_state(memory.mean)).repeat_interleave(num_captions, 0)
        return state.chunk(self._num_states, -1)

    def forward(
        self,
        input_ids: Tensor,
        memory: Memory,
        state: State | None = None,
        lengths: Tensor | None = None,
        siblings: Siblings | None = None,
        sampling: float = 0.0,
    ) -> DecoderOutput:
        """Read T words of each caption.

        Args:
            input_ids: `(N, T)`, the captions of an image next to each other.
            memory: of B images; K = N / B.
            state: as returned for the words before; None at the start of the captions.
            lengths: `(N,)`, how many words to read of each. Given them, no arithmetic is spent on padding.
            siblings: captions whose states are the same. Used for a single word and without gradients.
            sampling: probability in [0, 1] with which a word but the first is drawn from what the decoder itself
                predicted (scheduled sampling, Bengio et al. 2015, sec. 2.4).
        """
        num_images = memory.cells.shape[0]
        num_captions = input_ids.shape[0] // num_images
        assert num_captions * num_images == input_ids.shape[0], f"{input_ids.shape[0]} captions for {num_images} images"
        # Captions share their first step, and what dropout does to its word, unless each draws words or cells.
        can_begin_alike = lengths is not None and state is None and not sampling and not self._draws_cells
        begin_alike = can_begin_alike and bool((input_ids[:, 0] == input_ids[0, 0]).all())
        plan = Plan(num_images, num_captions, input_ids.shape[1], lengths, begin_alike)
        memory = memory if plan.images is None else memory.take(plan.images)
        state = self.initial_state(memory, 1 if begin_alike else num_captions) if state is None else plan.sort(state)
        if input_ids.shape[1] > 1 or torch.is_grad_enabled():
            siblings = None
        packed = plan.pack(input_ids)  # (R,)
        if sampling:
            words, outputs, state = self._unroll_sampling(packed, memory, state, plan.blocks, sampling)
        else:
            words, drives = self._words_and_drives(packed)
            outputs, state = self._unroll(words, drives, memory, state, plan.blocks, siblings)
        words, hidden, contexts, weights, *log_probs = (plan.trim(part) for part in (words, *outputs))
        logits = self.output(self.output_dropout(self._features(words, hidden, contexts)))  # (R, V)
        read = None if plan.images is None else (logits, plan.places)
        logits, weights, hidden, *log_probs = (plan.unpack(part) for part in (logits, weights, hidden, *log_probs))
        return DecoderOutput(logits, weights, hidden, state, log_probs[0] if log_probs else None, read)

    @property
    def _draws_cells(self) -> bool:
        return self.training and hasattr(self.attention, "reinforce_weight")

    def _words_and_drives(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings `(R, E)` of words `(R,)`, and what they bring to the gates `(R, gates)`."""
        is_disturbed = self.training and self.embedding_dropout.p > 0  # each word by itself
        # An accelerator would have to wait for the number of words, and a graph can't be made of it.
        if is_disturbed or ids.device.type != "cpu" or torch.compiler.is_exporting():
            words = self.embedding_dropout(self.embedding(ids))
            return words, self._drives(words)
        found, places = ids.unique(return_inverse=True)  # captions say the same few words
        words = self.embedding(found)
        # Its gradient adds up rows faster than that of `words[places]`.
        return functional.embedding(places, words), functional.embedding(places, self._drives(words))

    def _unroll(
        self,
        words: Tensor,
        drives: Tensor,
        memory: Memory,
        state: State,
        blocks: list[tuple[int, int]],
        siblings: Siblings | None,
    ) -> tuple[list[Tensor], State]:
        num_images = memory.cells.shape[0]
        state = tuple(part.unflatten(0, (num_images, -1)) for part in state)  # (B, K, D)
        sizes = [b * k for b, k in blocks]
        is_one_word = len(sizes) == 1  # then sizes may be symbols of a graph, which none must be compared with
        step = self._step(memory, 0 if is_one_word else sum(sizes), siblings)
        rows = zip(blocks, words.split(sizes), drives.split(sizes), strict=True)
        steps = []
        for (b, k), word, drive in rows:
            if is_one_word or state[0].shape[:2] != (b, k):
                state = tuple(part[:b, :k].expand(-1, k, -1) for part in state)  # from 1 to all after the first word
            if is_one_word or len(memory.cells) != b:
                memory = memory.take(slice(b))
            state, outputs = step(word.view(b, k, -1), drive.view(b, k, -1), memory, state)
            steps.append([part.flatten(0, 1) for part in outputs])
        packed = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*steps, strict=True)]
        return packed, tuple(part.flatten(0, 1) for part in state)

    def _features(self, words: Tensor, hidden: Tensor, contexts: Tensor) -> Tensor:
        """What the last layer computes the scores of the next word from."""
        if self.step_to_output is None:
            return hidden
        return torch.tanh(words + self.step_to_output(torch.cat([hidden, contexts], -1)))

    def _unroll_sampling(
        self, ids: Tensor, memory: Memory, state: State, blocks: list[tuple[int, int]], sampling: float
    ) -> tuple[Tensor, list[Tensor], State]:
        """`_unroll` that draws words on its way, one step at a time; also the words that were read, `(R, E)`.

        Departure: no gradient passes through the draw, and no dropout disturbs it but that of what was read before.
        """
        read: list[Tensor] = []
        steps: list[list[Tensor]] = []
        start = 0
        for t, (b, k) in enumerate(blocks):
            step_ids, start = ids[start : start + b * k].view(b, k), start + b * k
            if t:
                with torch.no_grad():
                    before = blocks[t - 1]
                    word, hidden, context = (part.unflatten(0, before)[:b, :k] for part in (read[-1], *steps[-1][:2]))
                    probabilities = self.output(self._features(word, hidden, context)).float().softmax(-1)
                    drawn = probabilities.flatten(0, 1).multinomial(1).view(b, k)
                    is_drawn = torch.rand(b, k, device=ids.device) < sampling
                    step_ids = torch.where(is_drawn, drawn, step_ids)
            state = tuple(part.unflatten(0, (len(memory.cells), -1))[:b, :k].flatten(0, 1) for part in state)
            memory = memory.take(slice(b))
            read.append(self.embedding_dropout(self.embedding(step_ids.flatten())))
            outputs, state = self._unroll(read[-1], self._drives(read[-1]), memory, state, [(b, k)], None)
            steps.append(outputs)
        return torch.cat(read), [torch.cat(parts) for parts in zip(*steps, strict=True)], state

    def _attend(self, sums: RecurrentSum | None = None) -> Attend:
        """How to look, with sums of what the cells bring to the gates in the place of contexts if they are given."""
        sentinel = None if self.sentinel is None else self.sentinel.unroll()
        needs_context = self.step_to_output is not None

        def attend(query: Tensor, cell: Tensor, word: Tensor, memory: Memory) -> tuple[Tensor, ...]:
            sentinels = () if sentinel is None else (sentinel(word, query, cell),)
            context, weights, *log_probs = self.attention(query, memory.keys, memory.cells, *sentinels)
            if self.state_to_gate is not None:
                context = torch.sigmoid(self.state_to_gate(query)) * context  # (b, k, C)
            return context, context if needs_context else context[..., :0], weights, *log_probs

        def attend_to_drives(query: Tensor, cell: Tensor, word: Tensor, memory: Memory) -> tuple[Tensor, ...]:
            assert sums is not None
            weights = self.attention.weigh(query, memory.keys)  # type: ignore[operator]
            shares = weights if self.state_to_gate is None else torch.sigmoid(self.state_to_gate(query)) * weights
            return sums(shares), shares @ memory.cells if needs_context else query[..., :0], weights

        return attend if sums is None else attend_to_drives

    def _sums_of_drives(self, layer: RecurrentLayer, memory: Memory, num_rows: int) -> tuple[Any, Tensor | None]:
        """For a layer that reads the context first: sums of what the cells bring to its gates, its other weights.

        `W Σ α a = Σ α W a`: the products with W can be made once an image. Both are None where these are more than
        with each of R contexts; with gradients, they are one less, that of the context.
        """
        num_images, num_cells, size = memory.cells.shape
        work = num_images * num_cells
        work, work_of_contexts = (2 * work, 3 * num_rows) if torch.is_grad_enabled() else (work, num_rows)
        if work > work_of_contexts or self.gates_channels or not sums_cells(type(self.attention)):
            return None, None
        of_context, others = layer.weight.split([size, layer.in_features - size], 1)
        return RecurrentSum(functional.linear(memory.cells, of_context)), others

    def _step(self, memory: Memory, num_rows: int, siblings: Siblings | None) -> DecoderStep:
        """One step as a function, of R that are to come."""
        sums, weight = self._sums_of_drives(self._layers()[0], memory, num_rows)
        attend = self._attend(sums)
        # A sentinel brings the word into the context.
        run = unroll(self._layers(), siblings if self.sentinel is None else None, weight)
        top = -self.layer_type.num_states  # where in the state the top layer's h stands

        def step(word: Tensor, drive: Tensor, memory: Memory, state: State) -> tuple[State, tuple[Tensor, ...]]:
            read, *seen = attend(state[top], state[-1], word, memory)
            state = run([read], state, drive) if sums is None else run([], state, drive + read)
            return state, (state[top], *seen)

        return step


class LSTMDecoder(RecurrentDecoder):
    """LSTM with attention after Show, Attend and Tell (Xu et al. 2015); see `RecurrentDecoder`."""

    layer_type = LSTMLayer

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.step_to_lstm = LSTMLayer(memory_size, hidden_size, bias=False)
        self.upper_lstms = nn.ModuleList(LSTMLayer(hidden_size, hidden_size) for _ in range(num_layers - 1))

    def _layers(self) -> list[RecurrentLayer]:
        return [self.step_to_lstm, *self.upper_lstms]  # type: ignore[list-item]

    def _drives(self, words: Tensor) -> Tensor:
        return self.word_to_lstm(words)


class ChannelGateLSTMDecoder(LSTMDecoder):
    """LSTM whose gate scales every channel of the context by itself, and whose first state is linear in the mean cell.

    Departure: a gate of Xu et al. 2015 is one number (sec. 4.2.1). Captioners from elsewhere have this one.
    """

    gates_channels = True

    def initial_state(self, memory: Memory, num_captions: int) -> State:
        """The state before the first word, tensors `(B·K, D)`, from the mean cell."""
        state = self.memory_to_state(memory.mean).repeat_interleave(num_captions, 0)
        return state.chunk(self._num_states, -1)


class GRUDecoder(RecurrentDecoder):
    """GRU (Cho et al. 2014) in the place of the LSTM; its state is also what a sentinel takes for memory cell."""

    layer_type = GRULayer

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_gru = nn.Linear(embedding_size, 3 * hidden_size)
        self.step_to_gru = GRULayer(memory_size, hidden_size, bias=False)
        self.upper_grus = nn.ModuleList(GRULayer(hidden_size, hidden_size) for _ in range(num_layers - 1))

    def _layers(self) -> list[RecurrentLayer]:
        return [self.step_to_gru, *self.upper_grus]  # type: ignore[list-item]

    def _drives(self, words: Tensor) -> Tensor:
        return self.word_to_gru(words)


class SpatialDecoder(RecurrentDecoder):
    """LSTM that reads words alone; h after the word chooses where to look (Lu et al. 2017, sec. 2.2).

    The next word comes from h and the context together. As the context never enters the LSTM, what a word says of the
    image was seen for this very word: the map shown beside it is where it came from, not where the model will look
    or has looked. With the attention `adaptive` this is the paper's adaptive model.

    Departures: the mean cell enters by the first state, not with every word; the paper's cells have the width of h,
    here a linear map gives it to the context. The paper has no gate and no deep output: for it, build with
    `gate=False`.
    """

    layer_type = LSTMLayer

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.lstm = LSTMLayer(0, hidden_size, bias=False)
        self.upper_lstms = nn.ModuleList(LSTMLayer(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.context_to_hidden = nn.Linear(memory_size, hidden_size)

    def _layers(self) -> list[RecurrentLayer]:
        return [self.lstm, *self.upper_lstms]  # type: ignore[list-item]

    def _drives(self, words: Tensor) -> Tensor:
        return self.word_to_lstm(words)

    def _step(self, memory: Memory, num_rows: int, siblings: Siblings | None) -> DecoderStep:
        """One step as a function."""
        attend, read = self._attend(), unroll(self._layers(), siblings)

        def step(word: Tensor, drive: Tensor, memory: Memory, state: State) -> tuple[State, tuple[Tensor, ...]]:
            state = read([], state, drive)
            hidden, cell = state[-2:]
            context, *seen = attend(hidden, cell, word, memory)
            return state, (hidden + self.context_to_hidden(context), *seen)

        return step


class TopDownDecoder(RecurrentDecoder):
    """Two LSTMs, one that looks and one that speaks (Anderson et al. 2018, sec. 3.2).

    The attention LSTM reads the language LSTM's last h, the mean cell and the word (eq. 2); its h chooses where to
    look (eq. 3-5), and the language LSTM reads the context and that h (eq. 6). `num_layers` counts the layers of the
    language LSTM.

    Departures: the first state comes from the mean cell, as in the other decoders. The paper has no gate and no deep
    output: for it, build with `gate=False`.
    """

    layer_type = LSTMLayer
    layers_below = 1

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.mean_to_lstm = nn.Linear(memory_size, 4 * hidden_size, bias=False)
        self.attention_lstm = LSTMLayer(hidden_size, hidden_size, bias=False)
        self.language_lstm = LSTMLayer(memory_size + hidden_size, hidden_size)
        self.upper_lstms = nn.ModuleList(LSTMLayer(hidden_size, hidden_size) for _ in range(num_layers - 1))

    def _layers(self) -> list[RecurrentLayer]:
        return [self.language_lstm, *self.upper_lstms]  # type: ignore[list-item]

    def _drives(self, words: Tensor) -> Tensor:
        return self.word_to_lstm(words)

    def _step(self, memory: Memory, num_rows: int, siblings: Siblings | None) -> DecoderStep:
        """One step as a function, of R that are to come."""
        sums, weight = self._sums_of_drives(self.language_lstm, memory, num_rows)
        attend, look = self._attend(sums), self.attention_lstm.unroll(siblings)
        speak = unroll(self._layers(), weight=weight)
        mean_drive = self.mean_to_lstm(memory.mean).unsqueeze(1)  # (B, 1, 4D)

        def step(word: Tensor, drive: Tensor, memory: Memory, state: State) -> tuple[State, tuple[Tensor, ...]]:
            query, cell = look([state[-2]], state[:2], drive + mean_drive[: len(drive)])
            read, *seen = attend(query, cell, word, memory)
            below = state[2:]
            if sums is None:
                state = (query, cell, *speak([read, query], below, None))
            else:
                state = (query, cell, *speak([query], below, self.language_lstm.bias + read))
            return state, (state[-2], *seen)

        return step
