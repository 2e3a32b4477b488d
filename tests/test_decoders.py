from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hf_captioner import ATTENTIONS, DECODERS
from hf_captioner.model import recurrent_decoder
from hf_captioner.model.decoder_interface import Memory, RecurrentCache, Siblings
from hf_captioner.model.decoders import LSTMDecoder
from hf_captioner.model.deferred_products import DeferredSum
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.packing import PackedOrder
from hf_captioner.model.recurrence import Dropout, GRULayer, Sentinel
from hf_captioner.model.recurrent_decoder import RecurrentDecoder
from hf_captioner.testing import check_decoder

B, K, T, V, P, C, E, D = 3, 2, 7, 30, 6, 10, 8, 12
LENGTHS = torch.tensor([7, 3, 5, 1, 6, 6])

PARTS = [(decoder, attention) for decoder in DECODERS.names() for attention in ATTENTIONS.names()]


def build(decoder: str = "lstm", attention: str = "additive", **kwargs: Any) -> RecurrentDecoder:
    torch.manual_seed(0)
    seen_by = ATTENTIONS.get(attention)(query_size=D, memory_size=C, attention_size=8)
    built = DECODERS.get(decoder)(V, E, D, C, seen_by, output_dropout=0.0, **kwargs)
    return built.double().eval()  # type: ignore[no-any-return]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B * K, T), generator=generator)
    return ids, torch.randn(B, P, C, dtype=torch.double, generator=generator)


def read(*parts: str, **kwargs: Any) -> tuple[Any, ...]:
    """Return a decoder, captions, the cells and memory of their images, and what the decoder says of them."""
    decoder, (ids, cells) = build(*parts, **kwargs), inputs()
    memory = decoder.prepare(cells)
    return decoder, ids, cells, memory, decoder(ids, memory)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", DECODERS.names())
def test_keeps_its_contract(name: str, num_layers: int) -> None:
    check_decoder(DECODERS.get(name), num_layers=num_layers)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("name", "attention"), PARTS)
def test_siblings_are_read_like_other_captions(name: str, attention: str, num_layers: int) -> None:
    decoder, (ids, cells) = build(name, attention, num_layers=num_layers), inputs()
    memory = decoder.prepare(cells)
    with torch.no_grad():
        cache = RecurrentCache(memory, decoder(ids[:, :3], memory).state, 3)
        cache.reorder_cache(torch.tensor([0, 0, 3, 2, 5, 5], dtype=torch.int32))
        assert cache.siblings is not None and len(cache.siblings.first) == 4
        alone = decoder(ids[:, 3:4], memory, cache.state)
        together = decoder(ids[:, 3:4], memory, cache.state, None, cache.siblings)
        strangers = decoder(ids[:, 3:4], memory, cache.state, None, Siblings.of(torch.tensor([0, 0, 1, 1, 5, 4])))
    assert torch.allclose(together.logits, alone.logits) and torch.allclose(together.weights, alone.weights)
    assert all(torch.allclose(a, b) for a, b in zip(together.state, alone.state, strict=True))
    # Other captions would get each other's state, as products are shared; not if the context depends on the word.
    works_alone = attention == "adaptive" and name not in ("spatial", "top_down")
    assert torch.allclose(strangers.logits, alone.logits) == works_alone


def read_plainly(decoder: RecurrentDecoder, ids: Tensor, cells: Tensor) -> list[Tensor]:
    """Read captions word by word with `step`; return logits, weights and hidden states."""
    memory = decoder.prepare(cells)
    state = tuple(part.unflatten(0, (B, K)) for part in decoder.initial_state(memory, K))
    steps = []
    for words in decoder.embedding(ids).unflatten(0, (B, K)).unbind(2):
        state, (hidden, contexts, weights) = decoder.step(words, memory, state)
        steps.append((decoder.output(decoder.features(words, hidden, contexts)), weights, hidden))
    return [torch.stack(parts, 2).flatten(0, 1) for parts in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    ("num_layers", "gate", "deep_output"), [(1, True, True), (2, True, False), (1, False, True), (3, False, False)]
)
@pytest.mark.parametrize(("name", "attention"), PARTS)
def test_forward_equals_plain_steps(name: str, attention: str, num_layers: int, gate: bool, deep_output: bool) -> None:
    """Logits, weights, hidden states and gradients are the same, whatever work `forward` saves."""
    decoder = build(name, attention, num_layers=num_layers, gate=gate, deep_output=deep_output)
    ids, cells = inputs()
    cells.requires_grad_()

    def gradients(outputs: list[Tensor], is_read: Tensor) -> list[Tensor]:
        loss = sum((output[is_read].sin().sum() for output in outputs), torch.zeros(()))
        return list(torch.autograd.grad(loss, [*decoder.parameters(), cells]))

    for first_words in (ids[:, 0].clone(), ids[0, 0].clone()):  # different ones, then the same, read once per image
        ids[:, 0] = first_words
        for lengths in (None, LENGTHS):
            is_read = torch.arange(T) < (torch.full((B * K,), T) if lengths is None else lengths).unsqueeze(1)
            plain = read_plainly(decoder, ids, cells)
            output = decoder(ids, decoder.prepare(cells), lengths=lengths)
            fast = [output.logits, output.weights, output.hidden]
            assert all(torch.allclose(a[is_read], b[is_read]) for a, b in zip(fast, plain, strict=True))
            pairs = zip(gradients(fast, is_read), gradients(plain, is_read), strict=True)
            assert all(torch.allclose(a, b) for a, b in pairs)


class Wrapper(nn.Module):
    """A layer in the place of an `nn.Linear`, as LoRA puts one there: its weight can't be read, only called for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, values: Tensor) -> Tensor:
        return self.base_layer(values)  # type: ignore[no-any-return]


def wrap(module: nn.Module) -> None:
    """Put a `Wrapper` in the place of every linear layer."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Wrapper(child))
        else:
            wrap(child)


def double(module: nn.Module) -> None:
    """Double what every linear layer computes, by a hook."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.register_forward_hook(lambda _, inputs, output: 2 * output)


@pytest.mark.parametrize(("name", "attention"), PARTS)
def test_layers_that_were_replaced_are_called(name: str, attention: str) -> None:
    """Logits and gradients, of long and of single words, are those of the weights that are read."""
    decoder, (ids, cells) = build(name, attention, num_layers=2), inputs()
    parameters = list(decoder.parameters())

    def results() -> list[Tensor]:
        output = decoder(ids, decoder.prepare(cells), lengths=LENGTHS)
        siblings = Siblings.of(torch.tensor([0, 0, 1, 1, 2, 2]))
        state = tuple(part.repeat_interleave(K, 0) for part in decoder(ids[::K], decoder.prepare(cells)).state)
        with torch.no_grad():
            after = decoder(ids[:, :1], decoder.prepare(cells), state, siblings=siblings)
        return [output.logits, after.logits, *torch.autograd.grad(output.logits.sin().sum(), parameters)]

    read = results()
    wrap(decoder)
    assert all(torch.allclose(a, b) for a, b in zip(results(), read, strict=True))
    doubled = build(name, attention, num_layers=2)
    double(doubled)
    found = doubled(ids, doubled.prepare(cells)).logits
    for parameter in parameters:
        parameter.data.mul_(1 if parameter is decoder.embedding.weight else 2)
    assert torch.allclose(found, decoder(ids, decoder.prepare(cells)).logits)


def test_captions_that_begin_alike_share_their_first_step() -> None:
    decoder, (ids, cells) = build(), inputs()
    for first_words, block in ((ids[:, 0].clone(), (B, K)), (ids[0, 0].clone(), (B, 1))):
        ids[:, 0] = first_words
        with mock.patch.object(PackedOrder, "__init__", autospec=True, side_effect=PackedOrder.__init__) as order:
            decoder(ids, decoder.prepare(cells), lengths=LENGTHS)
        assert order.call_args.args[0].blocks[0] == block


@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("name", ["lstm", "gru", "top_down"])
def test_cells_are_projected_only_if_that_saves_work(name: str, attention: str) -> None:
    decoder, (ids, cells) = build(name, attention), inputs()
    with mock.patch.object(recurrent_decoder, "DeferredSum", wraps=DeferredSum) as sums:
        decoder(ids, decoder.prepare(cells), lengths=LENGTHS)
        assert sums.call_count == 1
        decoder(ids[:, :1], decoder.prepare(cells))
        assert sums.call_count == 1, "a single word is less work than all cells"


def test_packed_order_is_that_of_its_docstring() -> None:
    order = PackedOrder(torch.tensor([2, 4, 1, 1, 3, 2]), 2, 4)
    assert order.images.tolist() == [0, 2, 1]
    assert order.blocks == [(3, 2), (2, 2), (2, 1), (1, 1)] and len(order.inputs) == 6 + 4 + 2 + 1
    words = torch.arange(1, 25).view(6, 4)
    is_word = torch.arange(4) < torch.tensor([2, 4, 1, 1, 3, 2]).unsqueeze(1)
    assert torch.equal(order.unpack(order.trim(order.pack(words))), words * is_word)


class ThreeArguments(nn.Module):
    """A decoder that takes three arguments and returns a tuple of three, as its contract says."""

    gives_sentinel = False

    def __init__(self, *sizes: Any, attention: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.wrapped = LSTMDecoder(*sizes, attention=attention, **settings)
        self.embedding, self.output, self.attention = self.wrapped.embedding, self.wrapped.output, attention

    def prepare(self, cells: Tensor) -> Memory:
        return self.wrapped.prepare(cells)

    def forward(self, input_ids: Tensor, memory: Memory, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        return self.wrapped(input_ids, memory, state)[:3]


def test_decoder_of_three_arguments_trains_and_captions_like_one_with_more(tiny_model: Callable[..., Any]) -> None:
    """The model passes it neither `lengths` in training nor `siblings` in a beam search."""
    expected = tiny_model(scale=3)
    with DECODERS.temporarily("three", ThreeArguments) as name:
        model = tiny_model(scale=3, decoder_type=name)
        model.decoder.wrapped.load_state_dict(expected.decoder.state_dict())
        cells = torch.randn(2, P, model.encoder.part.hidden_size)
        labels = torch.tensor([[[5, 9, 3], [6, 3, -100]], [[7, 3, -100], [8, 9, 3]]])
        with torch.no_grad():
            found, wanted = (each(cells=cells, labels=labels) for each in (model, expected))
        assert torch.allclose(found.loss, wanted.loss) and torch.allclose(found.logits, wanted.logits, atol=1e-5)
        outputs = CaptionerEncoderOutput.of(cells)
        assert torch.equal(*(each.generate(encoder_outputs=outputs, num_beams=3) for each in (model, expected)))
        assert torch.allclose(*(each.score(cells=cells, captions=labels).scores for each in (model, expected)))
        with pytest.raises(ValueError, match=r"Scheduled sampling .* ThreeArguments has no argument 'sampling'"):
            model(cells=cells, labels=labels, sampling=0.5)
        for attention, need in (("adaptive", "gives_sentinel"), ("hard", "returns_log_probs")):
            with pytest.raises(ValueError, match=f"needs a decoder with {need} = True, which ThreeArguments does not"):
                tiny_model(decoder_type=name, attention_type=attention)


def as_torch(lstm: nn.Linear, words: nn.Linear | None = None) -> nn.LSTMCell:
    """Build the same LSTM of torch, which has another order of gates; `words` is the map of words to gates."""
    bias = lstm.bias if words is None else words.bias
    weight = lstm.weight if words is None else torch.cat([words.weight, lstm.weight], 1)
    (admit, forget, emit, new), (b_admit, b_forget, b_emit, b_new) = weight.chunk(4), bias.chunk(4)
    cell = nn.LSTMCell(weight.shape[1] - D, D, dtype=torch.double)
    cell.weight_ih.data, cell.weight_hh.data = torch.cat([admit, forget, new, emit]).tensor_split([-D], 1)
    cell.bias_ih.data = torch.cat([b_admit, b_forget + 1, b_new, b_emit])
    cell.bias_hh.data.zero_()
    return cell


@torch.no_grad()
def test_lstm_layers_are_those_of_torch() -> None:
    decoder, ids, _, memory, output = read(gate=False, num_layers=2)
    lower, upper = as_torch(decoder.step_to_lstm, decoder.word_to_lstm), as_torch(decoder.upper_lstms[0])
    h1, c1, h2, c2 = decoder.initial_state(memory, K)
    for t in range(T):
        context, weights = decoder.attention(h2.unflatten(0, (B, K)), memory.keys, memory.cells)
        h1, c1 = lower(torch.cat([decoder.embedding(ids[:, t]), context.flatten(0, 1)], 1), (h1, c1))
        h2, c2 = upper(h1, (h2, c2))
        assert torch.allclose(output.weights[:, t], weights.flatten(0, 1))
        assert torch.allclose(output.hidden[:, t], h2)


@torch.no_grad()
def test_top_down_is_that_of_the_paper() -> None:
    decoder, ids, cells, memory, output = read("top_down", gate=False)
    mean = cells.mean(1).repeat_interleave(K, 0)
    # The attention LSTM takes word, mean cell and the last h of the language LSTM.
    words = nn.Linear(E + C, 4 * D, dtype=torch.double)
    words.weight.data = torch.cat([decoder.word_to_lstm.weight, decoder.mean_to_lstm.weight], 1)
    words.bias.data = decoder.word_to_lstm.bias
    look, speak = as_torch(decoder.attention_lstm, words), as_torch(decoder.language_lstm)
    h1, c1, h2, c2 = decoder.initial_state(memory, K)
    for t in range(T):
        h1, c1 = look(torch.cat([decoder.embedding(ids[:, t]), mean, h2], 1), (h1, c1))
        context, weights = decoder.attention(h1.unflatten(0, (B, K)), memory.keys, memory.cells)
        h2, c2 = speak(torch.cat([context.flatten(0, 1), h1], 1), (h2, c2))
        assert torch.allclose(output.weights[:, t], weights.flatten(0, 1))
        assert torch.allclose(output.logits[:, t], decoder.output(h2))


@torch.no_grad()
def test_gru_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    linear = GRULayer.linear_map(E, D).double()
    cell = GRULayer(linear)
    x, h = torch.randn(5, E, dtype=torch.double), torch.randn(5, D, dtype=torch.double)
    (after,) = cell.step([x], (h,))
    w_r, w_z, w = linear.weight.chunk(3)
    b_r, b_z, b = linear.bias.chunk(3)
    r = torch.sigmoid(x @ w_r[:, :E].T + h @ w_r[:, E:].T + b_r)
    z = torch.sigmoid(x @ w_z[:, :E].T + h @ w_z[:, E:].T + b_z)
    candidate = torch.tanh(x @ w[:, :E].T + (r * h) @ w[:, E:].T + b)
    assert torch.allclose(after, z * h + (1 - z) * candidate)
    # The gate input takes the place of the bias.
    (given,) = cell.step([x], (h,), linear.bias.expand(5, -1))
    linear.bias.zero_()
    assert torch.allclose(given, after) and not torch.allclose(cell.step([x], (h,))[0], after)


@torch.no_grad()
def test_sentinel_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    sentinel = Sentinel.linear_map(E, D).double()
    x, h, c = (torch.randn(5, size, dtype=torch.double) for size in (E, D, D))
    gate = torch.sigmoid(x @ sentinel.weight[:, :E].T + h @ sentinel.weight[:, E:].T + sentinel.bias)
    assert torch.allclose(Sentinel(sentinel).step(x, h, c), gate * torch.tanh(c))


@torch.no_grad()
@pytest.mark.parametrize(("name", "query", "cell"), [("lstm", 0, 1), ("gru", 0, 0)])
def test_sentinel_reads_word_query_and_memory_cell(name: str, query: int, cell: int) -> None:
    decoder, ids, _, memory, output = read(name, "adaptive")
    state = decoder.initial_state(memory, K)
    word, h, c = (part.unflatten(0, (B, K)) for part in (decoder.embedding(ids[:, 0]), state[query], state[cell]))
    _, expected = decoder.attention(h, memory.keys, memory.cells, Sentinel(decoder.sentinel).step(word, h, c))
    assert torch.allclose(output.weights[:, 0], expected.flatten(0, 1))


def test_initial_state_comes_from_the_mean_cell() -> None:
    decoder, (_, cells) = build(), inputs()
    hidden, cell = decoder.initial_state(decoder.prepare(cells), K)
    shuffled = decoder.initial_state(decoder.prepare(cells.flip(1)), K)[0]
    assert hidden.shape == cell.shape == (B * K, D)
    assert torch.equal(hidden[0], hidden[1]) and not torch.allclose(hidden[0], hidden[2])
    assert torch.allclose(hidden, shuffled)


def test_parameters_of_the_first_checkpoints_keep_their_names() -> None:
    names = {name.removesuffix(".weight") for name in build(deep_output=True).state_dict() if "bias" not in name}
    attention = {f"attention.{name}" for name in ("memory_to_key", "query_to_key", "key_to_score")}
    steps = {
        "embedding",
        "memory_to_state",
        "state_to_gate",
        "word_to_lstm",
        "step_to_lstm",
        "step_to_output",
        "output",
    }
    assert names == attention | steps


def test_dropout_zeros_with_its_probability_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    values = torch.ones(200, 500, requires_grad=True)
    dropped = Dropout(0.3)(values)
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    dropped.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, dropped.detach())
    assert Dropout(0.3)(values.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(Dropout(0.3).eval()(values), values)
    assert not Dropout(1.0)(values).any()
