"""Decoders, which predict the next word of a caption from image cells and the words before it.

Image cells are the grid cells of image features that the encoder computes; the c of an LSTM is called the LSTM's cell
state. `decoder_interface.py` defines what a decoder is, and `recurrent_decoder.py` holds what the decoders below have
in common. The `step` of each shows how it reads a word; `unrolled_step` computes the same, arranged for speed.
"""

# B: images, K: captions or beams of an image, C: channels of an image cell, E: word embedding, D: state

from __future__ import annotations

from torch import Tensor, nn

from .decoder_interface import Memory, Siblings, State
from .recurrence import GRULayer, LSTMLayer, RecurrentLayer, stack
from .recurrent_decoder import RecurrentDecoder, StepOutput, UnrolledStep
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


class LSTMDecoder(RecurrentDecoder):
    """LSTM with attention after Show, Attend and Tell (Xu et al. 2015); see `RecurrentDecoder`."""

    layer_type = LSTMLayer

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.step_to_lstm = LSTMLayer.linear_map(memory_size, hidden_size, bias=False)
        self.upper_lstms = nn.ModuleList(LSTMLayer.linear_map(hidden_size, hidden_size) for _ in range(num_layers - 1))

    def _layers(self) -> list[RecurrentLayer]:
        return [LSTMLayer(linear) for linear in (self.step_to_lstm, *self.upper_lstms)]

    def _word_to_gates(self, words: Tensor) -> Tensor:
        return self.word_to_lstm(words)


class ChannelGateLSTMDecoder(LSTMDecoder):
    """LSTM whose gate scales each channel of the context by itself; see `RecurrentDecoder`.

    The state before the first word is linear in the mean image cell. Departure: the gate of Xu et al. 2015 is one
    number (sec. 4.2.1). Captioners that `hf-captioner convert` converts use this decoder.
    """

    gates_channels = True

    def initial_state(self, memory: Memory, num_captions: int) -> State:
        """Compute the state before the first word, tensors `(B·K, D)`, from the mean image cell."""
        state = self.memory_to_state(memory.mean).repeat_interleave(num_captions, 0)
        return state.chunk(self._num_states, -1)


class GRUDecoder(RecurrentDecoder):
    """GRU (Cho et al. 2014) in place of the LSTM; see `RecurrentDecoder`.

    A GRU has no cell state, so the visual sentinel of adaptive attention (Lu et al. 2017) is computed from the hidden
    state h in place of the LSTM's c.
    """

    layer_type = GRULayer

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_gru = nn.Linear(embedding_size, 3 * hidden_size)
        self.step_to_gru = GRULayer.linear_map(memory_size, hidden_size, bias=False)
        self.upper_grus = nn.ModuleList(GRULayer.linear_map(hidden_size, hidden_size) for _ in range(num_layers - 1))

    def _layers(self) -> list[RecurrentLayer]:
        return [GRULayer(linear) for linear in (self.step_to_gru, *self.upper_grus)]

    def _word_to_gates(self, words: Tensor) -> Tensor:
        return self.word_to_gru(words)


class SpatialDecoder(LSTMDecoder):
    """LSTM that reads words alone; its hidden state h after a word chooses where to look (Lu et al. 2017, sec. 2.2).

    The next word comes from h and the context together. As the context never enters the LSTM, the map shown beside a
    word is what this very word was predicted from. With the attention `adaptive` this is the paper's adaptive model.

    Departures: the mean image cell enters by the first state, not with every word; the paper's image cells have the
    width of h, which here a linear map gives to the context. The paper has no gate and no deep output: for it, build
    with `gate=False`.
    """

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.lstm = LSTMLayer.linear_map(0, hidden_size, bias=False)
        self.upper_lstms = nn.ModuleList(LSTMLayer.linear_map(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.context_to_hidden = nn.Linear(memory_size, hidden_size)

    def _layers(self) -> list[RecurrentLayer]:
        return [LSTMLayer(linear) for linear in (self.lstm, *self.upper_lstms)]

    def step(self, words: Tensor, memory: Memory, state: State) -> tuple[State, StepOutput]:
        """Read one word of each caption, then look; see `RecurrentDecoder.step`."""
        state = stack([layer.step for layer in self._layers()])([], state, self._word_to_gates(words))
        hidden, cell_state = state[-2:]
        context, weights, *log_probs = self.attend(hidden, cell_state, words, memory)
        return state, (hidden + self.context_to_hidden(context), context, weights, *log_probs)

    def unrolled_step(self, memory: Memory, num_rows: int, siblings: Siblings | None) -> UnrolledStep:
        """Return a faster equivalent of `step`; see `RecurrentDecoder.unrolled_step` for the arguments."""
        lowest, *upper = self._layers()
        read = stack([lowest.unroll(siblings), *(layer.unroll() for layer in upper)])
        attend = self.unrolled_attend()

        def step(words: Tensor, gate_input: Tensor, memory: Memory, state: State) -> tuple[State, StepOutput]:
            state = read([], state, gate_input)
            hidden, cell_state = state[-2:]
            (context,), _, *seen = attend(hidden, cell_state, words, memory, gate_input)
            return state, (hidden + self.context_to_hidden(context), *seen)

        return step


class TopDownDecoder(LSTMDecoder):
    """Two LSTMs, one that looks and one that speaks (Anderson et al. 2018, sec. 3.2).

    The attention LSTM reads the language LSTM's last hidden state, the mean image cell and the word (eq. 2); its hidden
    state chooses where to look (eq. 3-5), and the language LSTM reads that hidden state and the context (eq. 6).
    `num_layers` counts the layers of the language LSTM.

    Departures: the first state comes from the mean image cell, as in the other decoders. The paper has no gate and no
    deep output: for it, build with `gate=False`.
    """

    layers_below = 1

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        self.word_to_lstm = nn.Linear(embedding_size, 4 * hidden_size)
        self.mean_to_lstm = nn.Linear(memory_size, 4 * hidden_size, bias=False)
        self.attention_lstm = LSTMLayer.linear_map(hidden_size, hidden_size, bias=False)
        self.language_lstm = LSTMLayer.linear_map(memory_size + hidden_size, hidden_size)
        self.upper_lstms = nn.ModuleList(LSTMLayer.linear_map(hidden_size, hidden_size) for _ in range(num_layers - 1))

    def _layers(self) -> list[RecurrentLayer]:
        return [LSTMLayer(linear) for linear in (self.language_lstm, *self.upper_lstms)]

    def step(self, words: Tensor, memory: Memory, state: State) -> tuple[State, StepOutput]:
        """Look, then speak, for one word of each caption; see `RecurrentDecoder.step`."""
        gate_input = self._word_to_gates(words) + self.mean_to_lstm(memory.mean).unsqueeze(1)
        query, cell_state = LSTMLayer(self.attention_lstm).step([state[-2]], state[:2], gate_input)
        context, weights, *log_probs = self.attend(query, cell_state, words, memory)
        spoken = stack([layer.step for layer in self._layers()])([context, query], state[2:], None)
        return (query, cell_state, *spoken), (spoken[-2], context, weights, *log_probs)

    def unrolled_step(self, memory: Memory, num_rows: int, siblings: Siblings | None) -> UnrolledStep:
        """Return a faster equivalent of `step`; see `RecurrentDecoder.unrolled_step` for the arguments."""
        language, *upper = self._layers()
        projected, weight = self.project_cells(language, memory, num_rows)
        attend, look = self.unrolled_attend(projected), LSTMLayer(self.attention_lstm).unroll(siblings)
        speak = stack([language.unroll(weight=weight), *(layer.unroll() for layer in upper)])
        mean_gates = self.mean_to_lstm(memory.mean).unsqueeze(1)  # (B, 1, 4D)

        def step(words: Tensor, gate_input: Tensor, memory: Memory, state: State) -> tuple[State, StepOutput]:
            query, cell_state = look([state[-2]], state[:2], gate_input + mean_gates[: len(gate_input)])
            inputs, bias, *seen = attend(query, cell_state, words, memory, language.bias)
            spoken = speak([*inputs, query], state[2:], bias)
            return (query, cell_state, *spoken), (spoken[-2], *seen)

        return step
