"""Base class of the recurrent decoders: `step` reads one word of each caption, `forward` many words fast.

Cells are everywhere the grid cells of image features that the encoder computes, and a `Memory` holds those of a batch;
the c of an LSTM is called the LSTM's cell state.

`step` alone says what a decoder computes; a new kind of decoder is understood from it. `forward` gives the same logits,
weights and gradients as `step` called for one word after the other (a test compares them) and saves work:

- the words after a caption's end are not read (`packing.py`);
- the captions of an image begin with the same word, whose step is taken once;
- the part of the gates' pre-activations that comes from a word is computed once for all captions that contain it,
  before the first step;
- the gradients of the recurrent weights are computed once for all words (`unrolled_step`, `deferred_products.py`);
- where the captions of an image have many words, a layer's weights of the context are multiplied by the image's cells,
  once, in place of the context at every word (`project_cells`);
- beams that continue the same caption share products (`Siblings`).
"""

# B: images, K: captions or beams of an image, N = B·K: captions, T: words, R: rows (words of a batch), V: vocabulary
# b, k: images and captions that are still read; P: image cells, C: channels of a cell, E: word embedding, D: state

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attentions import sums_cells
from .decoder_interface import DecoderOutput, Memory, Siblings, State
from .deferred_products import DeferredSum
from .packing import FullOrder, PackedOrder
from .recurrence import Dropout, RecurrentLayer, Sentinel, stack

# Of one step: hidden states (b, k, D), contexts (b, k, C), weights (b, k, P) and, if the attention samples,
# log-probabilities (b, k).
StepOutput = tuple[Tensor, ...]

# Arguments: words (b, k, E), their part of the gates' pre-activations (b, k, gates), memory and state. Returns the
# state after and a StepOutput, without the contexts if the output does not need them.
UnrolledStep = Callable[[Tensor, Tensor, Memory, State], tuple[State, StepOutput]]

# Arguments: query (b, k, D), the LSTM's cell state (b, k, D), words (b, k, E), memory and the gate input of the layer
# that reads the context, which may be 0. Returns the inputs of that layer, its gate input, and a StepOutput without the
# hidden states.
UnrolledAttend = Callable[[Tensor, Tensor, Tensor, Memory, Tensor | float], tuple[Any, ...]]


class RecurrentDecoder(nn.Module):
    """Recurrent layers on top of each other that read words and contexts, after Show, Attend and Tell.

    The memory of the images holds the grid cells of their features, of which a context ẑ is a weighted sum. Reading
    word y_{t-1}, the hidden state h_{t-1} of the top layer chooses where to look, and the word and the context ẑ_t
    enter the lowest layer (Xu et al. 2015, eq. 1-3). A gate β_t = σ(f_β(h_{t-1})) scales the context (sec. 4.2.1). The
    next word comes from h_t alone or, with `deep_output`, from `L_o tanh(E y_{t-1} + L_h h_t + L_z ẑ_t)` (eq. 7).

    Departures: f_init is one linear layer with tanh and eq. 7 has a tanh, both as in the authors' code.

    Args:
        vocab_size: Number of words in the vocabulary, V.
        embedding_size: Width of a word embedding, E.
        hidden_size: Width of the hidden state of a layer, D.
        memory_size: Number of channels of an image cell, C.
        attention: Attention from `ATTENTIONS`, built for queries of width D and image cells of C channels.
        num_layers: Number of LSTM or GRU layers on top of each other.
        gate: Whether β scales the context.
        deep_output: Whether the next word comes from eq. 7.
        memory_dropout: Probability in [0, 1) of zeroing an element of an image cell.
        embedding_dropout: Probability in [0, 1) of zeroing an element of a word embedding.
        output_dropout: Probability in [0, 1) of zeroing an element before the last linear layer.

    Raises:
        ValueError: `num_layers` is below 1.
    """

    gives_sentinel = True
    returns_log_probs = True
    layer_type: type[RecurrentLayer]
    layers_below = 0  # number of layers that run before the attention
    gates_channels = False  # whether the gate scales each channel of the context by itself

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
        self.sentinel = Sentinel.linear_map(embedding_size, hidden_size) if uses_sentinel else None
        self.memory_dropout = Dropout(memory_dropout)
        self.embedding_dropout = Dropout(embedding_dropout)
        self.output_dropout = Dropout(output_dropout)

    def _build_layers(self, embedding_size: int, hidden_size: int, memory_size: int, num_layers: int) -> None:
        """Build the modules, such as linear maps of layers, that `_layers` and `_word_to_gates` use."""
        raise NotImplementedError

    def _layers(self) -> list[RecurrentLayer]:
        """Return the stacked layers, the lowest first; words are predicted from the h of the uppermost."""
        raise NotImplementedError

    def _word_to_gates(self, words: Tensor) -> Tensor:
        """Compute the part of the gates' pre-activations that comes from words, `(..., E) -> (..., gates)`."""
        raise NotImplementedError

    def prepare(self, cells: Tensor) -> Memory:
        """Compute what depends on the images alone, from their image cells `(B, P, C)`."""
        return Memory.of(self.memory_dropout(cells), self.attention)

    def initial_state(self, memory: Memory, num_captions: int) -> State:
        """Compute the state before the first word from the mean image cell (Xu et al. 2015, sec. 3.1.2).

        Returns:
            Tensors `(B·K, D)`, the same for all K = `num_captions` captions of an image.
        """
        state = torch.tanh(self.memory_to_state(memory.mean)).repeat_interleave(num_captions, 0)
        return state.chunk(self._num_states, -1)

    def step(self, words: Tensor, memory: Memory, state: State) -> tuple[State, StepOutput]:
        """Read one word of each caption; this is the plain version of a step of `forward`.

        Args:
            words: Word embeddings, `(B, K, E)`.
            memory: Memory of the B images.
            state: State before, tensors `(B, K, D)`.

        Returns:
            The state after; and hidden states `(B, K, D)`, contexts `(B, K, C)`, attention weights `(B, K, P)` and, if
            the attention samples, log-probabilities `(B, K)`.
        """
        context, weights, *log_probs = self.attend(state[self._top], state[-1], words, memory)
        state = stack([layer.step for layer in self._layers()])([context], state, self._word_to_gates(words))
        return state, (state[self._top], context, weights, *log_probs)

    def attend(
        self,
        query: Tensor,
        cell_state: Tensor,
        words: Tensor,
        memory: Memory,
        sentinel_step: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Attend to the images, and scale the context by the gate β.

        Args:
            query: Hidden states that choose where to look, `(B, K, D)`.
            cell_state: Cell states of the LSTM, from which a sentinel is computed, `(B, K, D)`.
            words: Word embeddings, `(B, K, E)`.
            memory: Memory of the B images.
            sentinel_step: Function that computes the sentinel, by default `Sentinel.step`.

        Returns:
            Contexts, weights and, if the attention samples, log-probabilities.
        """
        sentinels: tuple[Tensor, ...] = ()
        if self.sentinel is not None:
            compute = sentinel_step or Sentinel(self.sentinel).step
            sentinels = (compute(words, query, cell_state),)
        context, weights, *log_probs = self.attention(query, memory.keys, memory.cells, *sentinels)
        if self.state_to_gate is not None:
            context = torch.sigmoid(self.state_to_gate(query)) * context
        return context, weights, *log_probs

    def features(self, words: Tensor, hidden: Tensor, contexts: Tensor) -> Tensor:
        """Compute the input of the last linear layer from words, hidden states and contexts, each `(R, ·)`."""
        if self.step_to_output is None:
            return hidden
        return torch.tanh(words + self.step_to_output(torch.cat([hidden, contexts], -1)))

    @property
    def _top(self) -> int:
        """Index of the top layer's hidden state in the state."""
        return -self.layer_type.num_states

    def forward(
        self,
        input_ids: Tensor,
        memory: Memory,
        state: State | None = None,
        lengths: Tensor | None = None,
        siblings: Siblings | None = None,
        sampling: float = 0.0,
    ) -> DecoderOutput:
        """Read T words of each of N captions; see `decoder_interface.run_decoder` for the arguments."""
        num_images, num_words = memory.cells.shape[0], input_ids.shape[1]
        num_captions = input_ids.shape[0] // num_images
        assert num_captions * num_images == input_ids.shape[0], f"{input_ids.shape[0]} captions for {num_images} images"
        order, share_first = FullOrder(num_images, num_captions, num_words), False
        if lengths is not None:
            # Captions that sample words or cells differ from their first step on.
            share_first = state is None and not sampling and not self._draws_cells
            share_first = share_first and bool((input_ids[:, 0] == input_ids[0, 0]).all())
            order = PackedOrder(lengths, num_captions, num_words, share_first)

        memory = order.sort_memory(memory)
        if state is None:
            state = self.initial_state(memory, 1 if share_first else num_captions)
        else:
            state = order.sort_state(state)
        state = tuple(part.unflatten(0, (num_images, -1)) for part in state)  # (B, K, D)
        ids = order.pack(input_ids)  # (R,)
        if sampling:
            words, outputs, state = self._read_and_sample(ids, memory, state, order.blocks, sampling)
        else:
            words, gate_inputs = self._embed(ids)
            if num_words > 1 or torch.is_grad_enabled():
                siblings = None
            outputs, state = self._read(words, gate_inputs, memory, state, order.blocks, siblings)

        words, hidden, contexts, weights, *log_probs = (order.trim(rows) for rows in (words, *outputs))
        unpacked = order.unpack(hidden)
        if order.words is None:  # The logits then depend on the hidden states that are returned, as gradients do.
            hidden = unpacked.transpose(0, 1).flatten(0, 1)
        logits = self.output(self.output_dropout(self.features(words, hidden, contexts)))  # (R, V)
        return DecoderOutput(
            logits=order.unpack(logits),
            weights=order.unpack(weights),
            state=tuple(part.flatten(0, 1) for part in state),
            hidden=unpacked,
            log_probs=order.unpack(log_probs[0]) if log_probs else None,
            packed=None if order.words is None else (logits, order.words),
        )

    @property
    def _draws_cells(self) -> bool:
        """Whether the attention now draws image cells at random, as hard attention does in training."""
        return self.training and hasattr(self.attention, "reinforce_weight")

    def _embed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embed words `(R,)`; return embeddings `(R, E)` and their part of the gates' pre-activations, `(R, gates)`.

        Captions use the same few words, so on CPUs both are computed once for each distinct word. This is not possible
        if dropout changes each embedding differently; and an accelerator would have to wait for the number of words.
        """
        has_dropout = self.training and self.embedding_dropout.p > 0
        if has_dropout or ids.device.type != "cpu" or torch.compiler.is_exporting():
            words = self.embedding_dropout(self.embedding(ids))
            return words, self._word_to_gates(words)
        found, index = ids.unique(return_inverse=True)
        words = self.embedding(found)
        # `functional.embedding` adds up gradients faster than indexing.
        return functional.embedding(index, words), functional.embedding(index, self._word_to_gates(words))

    def _read(
        self,
        words: Tensor,
        gate_inputs: Tensor,
        memory: Memory,
        state: State,
        blocks: list[tuple[int, int]],
        siblings: Siblings | None,
    ) -> tuple[list[Tensor], State]:
        """Read words `(R, E)` with gate inputs `(R, gates)`, block by block of (b, k) captions.

        Return the parts of a `StepOutput`, each of all steps one after the other, `(R, ·)`; and the state after.
        """
        sizes = [b * k for b, k in blocks]
        is_one_word = len(sizes) == 1  # then sizes may be symbols of an exported graph, which must not be compared
        step = self.unrolled_step(memory, 0 if is_one_word else sum(sizes), siblings)
        steps = []
        for (b, k), word, gate_input in zip(blocks, words.split(sizes), gate_inputs.split(sizes), strict=True):
            if is_one_word or state[0].shape[:2] != (b, k):
                # Captions that are over leave; after a first step that all captions of an image share, all k enter.
                state = tuple(part[:b, :k].expand(-1, k, -1) for part in state)
            if is_one_word or len(memory.cells) != b:
                memory = memory.take(slice(b))
            state, output = step(word.view(b, k, -1), gate_input.view(b, k, -1), memory, state)
            steps.append([part.flatten(0, 1) for part in output])
        return [parts[0] if is_one_word else torch.cat(parts) for parts in zip(*steps, strict=True)], state

    def _read_and_sample(
        self, ids: Tensor, memory: Memory, state: State, blocks: list[tuple[int, int]], sampling: float
    ) -> tuple[Tensor, list[Tensor], State]:
        """Read words `(R,)` with scheduled sampling; return the embeddings that were read, and what `_read` returns.

        No gradient passes through the draw of a word. Departure from Bengio et al. 2015: words are drawn from logits
        that are computed without output dropout.
        """
        words: list[Tensor] = []
        steps: list[StepOutput] = []
        for (b, k), step_ids in zip(blocks, ids.split([b * k for b, k in blocks]), strict=True):
            if steps:
                hidden, contexts, *_ = steps[-1]
                step_ids = self._sample(step_ids.view(b, k), words[-1], hidden, contexts, sampling).flatten()
            memory, state = memory.take(slice(b)), tuple(part[:b, :k] for part in state)
            words.append(self.embedding_dropout(self.embedding(step_ids)).view(b, k, -1))
            state, output = self.step(words[-1], memory, state)
            steps.append(output)
        read, *packed = (
            torch.cat([part.flatten(0, 1) for part in parts]) for parts in (words, *zip(*steps, strict=True))
        )
        return read, packed, state

    @torch.no_grad()
    def _sample(self, ids: Tensor, words: Tensor, hidden: Tensor, contexts: Tensor, sampling: float) -> Tensor:
        """Replace words `(b, k)`, each with probability `sampling`, by words drawn from the model's own prediction.

        The prediction is computed from the words `(b', k', E)`, hidden states and contexts of the step before, which
        may have had more images and captions.
        """
        b, k = ids.shape
        features = self.features(*(part[:b, :k] for part in (words, hidden, contexts)))
        probabilities = self.output(features).float().softmax(-1)
        drawn = probabilities.flatten(0, 1).multinomial(1).view(b, k)
        is_drawn = torch.rand(b, k, device=ids.device) < sampling
        return torch.where(is_drawn, drawn, ids)

    def unrolled_step(self, memory: Memory, num_rows: int, siblings: Siblings | None) -> UnrolledStep:
        """Return a function that is called once per step in place of `step`, with equal results in less time.

        Args:
            memory: Memory of all B images; a step may leave out the last ones.
            num_rows: R, the number of words that will be read; 0 if unknown.
            siblings: Beams that continue the same caption.
        """
        lowest, *upper = self._layers()
        projected, weight = self.project_cells(lowest, memory, num_rows)
        attend = self.unrolled_attend(projected)
        # A sentinel brings the word into the context, so siblings no longer share it.
        siblings = siblings if self.sentinel is None else None
        run = stack([lowest.unroll(siblings, weight), *(layer.unroll() for layer in upper)])

        def step(words: Tensor, gate_input: Tensor, memory: Memory, state: State) -> tuple[State, StepOutput]:
            inputs, gate_input, *seen = attend(state[self._top], state[-1], words, memory, gate_input)
            state = run(inputs, state, gate_input)
            return state, (state[self._top], *seen)

        return step

    def project_cells(
        self, layer: RecurrentLayer, memory: Memory, num_rows: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Multiply the image cells by the weights that a layer applies to the context, if that saves work.

        In the plain step, a layer that reads the context ẑ = β Σ_p α_p a_p multiplies it by its weights W, R products
        for all words. As W ẑ = β Σ_p α_p W a_p, the products W a_p of the B·P cells can be used instead. In training,
        the plain step takes three products per word (forward, and for the gradients of ẑ and W), and this way two per
        cell (forward, and for the gradient of W; the cells of a frozen encoder need no gradient).

        Args:
            layer: A layer whose first input is the context.
            memory: Memory of all B images.
            num_rows: R, the number of words that will be read.

        Returns:
            The products W a of the cells, `(B, P, gates)`, and the layer's weights of its other inputs. Both are None
            if this saves nothing, if a gate scales each channel of ẑ, if the attention does not declare `sums_cells`,
            or if the layer's linear map is not plain.
        """
        num_images, num_cells, memory_size = memory.cells.shape
        cost, plain_cost = num_images * num_cells, num_rows
        if torch.is_grad_enabled():
            cost, plain_cost = 2 * cost, 3 * plain_cost
        if cost > plain_cost or self.gates_channels or not (layer.is_plain and sums_cells(type(self.attention))):
            return None, None
        of_context, of_others = layer.linear.weight.tensor_split([memory_size], 1)
        return functional.linear(memory.cells, of_context), of_others

    def unrolled_attend(self, projected: Tensor | None = None) -> UnrolledAttend:
        """Return `attend` in the form that `unrolled_step` calls at every step of a batch, an `UnrolledAttend`.

        Its arguments are queries and the LSTM's cell states, both `(b, k, D)`, words `(b, k, E)`, the memory, and the
        gate input `(b, k, gates)` of the layer that reads the context. It returns the inputs of that layer, its gate
        input, contexts, attention weights and, if the attention samples, log-probabilities.

        Args:
            projected: Products from `project_cells`, or None. With them, that layer gets no context as an input; the
                context's part of the pre-activations is added to its gate input instead.
        """
        needs_context = self.step_to_output is not None  # as deep output reads it too
        sentinel_step = None if self.sentinel is None else Sentinel(self.sentinel).unroll()

        def attend(
            query: Tensor, cell_state: Tensor, words: Tensor, memory: Memory, gate_input: Tensor | float
        ) -> tuple[Any, ...]:
            context, weights, *log_probs = self.attend(query, cell_state, words, memory, sentinel_step)
            return [context], gate_input, context if needs_context else context[..., :0], weights, *log_probs

        if projected is None:
            return attend
        sum_projected = DeferredSum(projected)

        def attend_projected(
            query: Tensor, cell_state: Tensor, words: Tensor, memory: Memory, gate_input: Tensor | float
        ) -> tuple[Any, ...]:
            weights = self.attention.weigh(query, memory.keys)  # type: ignore[operator]
            scaled = weights if self.state_to_gate is None else torch.sigmoid(self.state_to_gate(query)) * weights
            context = scaled @ memory.cells if needs_context else query[..., :0]
            return [], gate_input + sum_projected(scaled), context, weights

        return attend_projected
