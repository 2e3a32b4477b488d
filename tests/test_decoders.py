from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hf_captioner.model import decoders
from hf_captioner.model.attentions import ATTENTIONS
from hf_captioner.model.decoders import DECODERS, Memory, RecurrentCache, RecurrentDecoder
from hf_captioner.model.recurrence import Dropout, GRULayer, LSTMLayer, Plan, RecurrentSum, Sentinel, Siblings
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


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", DECODERS.names())
def test_keeps_its_promises(name: str, num_layers: int) -> None:
    check_decoder(DECODERS.get(name), num_layers=num_layers)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("name", "attention"), PARTS)
def test_siblings_are_read_as_if_they_were_none(name: str, attention: str, num_layers: int) -> None:
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
    # Captions that are none would get each other's state: the work is shared, unless the word is part of the context.
    works_alone = attention == "adaptive" and name not in ("spatial", "top_down")
    assert torch.allclose(strangers.logits, alone.logits) == works_alone


def test_captions_of_an_image_and_images_may_leave_on_the_way() -> None:
    """As in a search, where the beams of an image change in number and finished images are dropped."""
    decoder, (ids, cells) = build("top_down", "adaptive"), inputs()
    memory = decoder.prepare(cells)
    whole = decoder(ids, memory)
    first = decoder(ids[::K, :2], memory, tuple(part[::K] for part in decoder.initial_state(memory, K)))
    images = torch.tensor([2, 0])
    kept = tuple(part[images].repeat_interleave(K, 0) for part in first.state)
    words = ids.unflatten(0, (B, K))[images].flatten(0, 1)
    words[:, :2] = words[::K, :2].repeat_interleave(K, 0)
    later = decoder(words[:, 2:], memory.take(images), kept)
    assert torch.allclose(later.logits.unflatten(0, (2, K))[:, 0], whole.logits.unflatten(0, (B, K))[images, 0, 2:])


@pytest.mark.parametrize(
    ("name", "attention", "num_layers"),
    [*((*parts, 1) for parts in PARTS), *((name, "additive", 2) for name in DECODERS.names())],
)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "packed"])
def test_gradients_equal_numerical_ones(name: str, attention: str, num_layers: int, lengths: Tensor | None) -> None:
    """Of weights whose gradient is made in one product for all steps, and of what flows past them."""
    decoder, (ids, cells) = build(name, attention, deep_output=True, num_layers=num_layers), inputs()
    mask = torch.arange(T) < (LENGTHS if lengths is not None else torch.full((B * K,), T)).unsqueeze(1)

    def loss() -> Tensor:
        output = decoder(ids, decoder.prepare(cells), lengths=lengths)
        return (output.logits.sin()[mask]).sum() + output.weights[mask].square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in decoder.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.double, generator=generator)
        assert parameter.grad is not None, parameter_name
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            step = 1e-6
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        assert torch.allclose(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-6), parameter_name


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("name", "attention"), PARTS)
def test_captions_that_begin_alike_share_their_first_step(
    name: str, attention: str, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their outputs and gradients are those of reading each by itself."""
    decoder, (ids, cells) = build(name, attention, deep_output=True, num_layers=num_layers), inputs()
    mask = torch.arange(T) < LENGTHS.unsqueeze(1)
    plans = mock.Mock(wraps=Plan)
    monkeypatch.setattr(decoders, "Plan", plans)

    def run(lengths: Tensor | None) -> list[Tensor]:
        output = decoder(ids, decoder.prepare(cells), None, lengths)
        loss = output.logits[mask].sin().sum() + output.weights[mask].square().sum()
        return [output.logits[mask], output.weights[mask], *torch.autograd.grad(loss, [*decoder.parameters()])]

    for first_words in (ids[:, 0].clone(), ids[0, 0].clone()):
        ids[:, 0] = first_words
        assert all(torch.allclose(a, b) for a, b in zip(run(LENGTHS), run(None), strict=True))
    assert [call.args[-1] for call in plans.call_args_list] == [False, False, True, False]


@pytest.mark.parametrize(("deep_output", "gate"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("name", ["lstm", "gru", "top_down"])
def test_drives_of_the_cells_give_what_contexts_give(
    name: str, attention: str, deep_output: bool, gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where captions are many words, products with the cells are made in the place of those with contexts."""
    decoder, (ids, cells) = build(name, attention, deep_output=deep_output, gate=gate), inputs()
    cells.requires_grad_()

    def run(has_drives: bool) -> list[Tensor]:
        monkeypatch.setattr(type(decoder.attention), "sums_cells", has_drives)
        memory = decoder.prepare(cells)
        output = decoder(ids, memory, None, LENGTHS)
        loss = output.logits.sin().sum() + output.weights.square().sum()
        return [output.logits, output.weights, *torch.autograd.grad(loss, [*decoder.parameters(), cells])]

    by_contexts = run(False)
    sums = mock.Mock(wraps=RecurrentSum)
    monkeypatch.setattr(decoders, "RecurrentSum", sums)
    by_drives = run(True)
    assert sums.call_count == 1
    assert all(torch.allclose(a, b) for a, b in zip(by_drives, by_contexts, strict=True))
    decoder(ids[:, :1], decoder.prepare(cells))
    assert sums.call_count == 1, "a word alone is less work than all cells"


def as_torch(lstm: LSTMLayer, drive: nn.Linear | None = None) -> nn.LSTMCell:
    """The same LSTM as torch has it: what drives it comes first, its bias of 1 and order of gates are its own."""
    weight, bias = lstm.weight, lstm.bias if drive is None else drive.bias
    if drive is not None:
        weight = torch.cat([drive.weight, weight], 1)
    admit, forget, emit, new = weight.chunk(4)
    bias_admit, bias_forget, bias_emit, bias_new = bias.chunk(4)
    hidden_size = len(admit)
    cell = nn.LSTMCell(weight.shape[1] - hidden_size, hidden_size, dtype=torch.double)
    weight = torch.cat([admit, forget, new, emit])
    cell.weight_ih.data, cell.weight_hh.data = weight[:, :-hidden_size], weight[:, -hidden_size:]
    cell.bias_ih.data = torch.cat([bias_admit, bias_forget + 1, bias_new, bias_emit])
    cell.bias_hh.data.zero_()
    return cell


@torch.no_grad()
def test_lstm_layers_are_those_of_torch() -> None:
    decoder, (ids, cells) = build(gate=False, num_layers=2), inputs()
    memory = decoder.prepare(cells)
    output = decoder(ids, memory)
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
    decoder, (ids, cells) = build("top_down", gate=False), inputs()
    memory = decoder.prepare(cells)
    output = decoder(ids, memory)
    mean = cells.mean(1).repeat_interleave(K, 0)
    # The attention LSTM takes word, mean cell and the last h of the language LSTM.
    drive = nn.Linear(E + C, 4 * D, dtype=torch.double)
    drive.weight.data = torch.cat([decoder.word_to_lstm.weight, decoder.mean_to_lstm.weight], 1)
    drive.bias.data = decoder.word_to_lstm.bias
    look, speak = as_torch(decoder.attention_lstm, drive), as_torch(decoder.language_lstm)
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
    cell = GRULayer(E, D).double()
    x, h = torch.randn(5, E, dtype=torch.double), torch.randn(5, D, dtype=torch.double)
    (after,) = cell.unroll()([x], (h,), None)
    w_r, w_z, w = cell.weight.chunk(3)
    b_r, b_z, b = cell.bias.chunk(3)
    r = torch.sigmoid(x @ w_r[:, :E].T + h @ w_r[:, E:].T + b_r)
    z = torch.sigmoid(x @ w_z[:, :E].T + h @ w_z[:, E:].T + b_z)
    candidate = torch.tanh(x @ w[:, :E].T + (r * h) @ w[:, E:].T + b)
    assert torch.allclose(after, z * h + (1 - z) * candidate)
    # A drive stands in for the bias.
    (driven,) = cell.unroll()([x], (h,), cell.bias.expand(5, -1))
    cell.bias.zero_()
    assert torch.allclose(driven, after) and not torch.allclose(cell.unroll()([x], (h,), None)[0], after)


@torch.no_grad()
def test_sentinel_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    sentinel = Sentinel(E, D).double()
    x, h, c = (torch.randn(5, size, dtype=torch.double) for size in (E, D, D))
    gate = torch.sigmoid(x @ sentinel.weight[:, :E].T + h @ sentinel.weight[:, E:].T + sentinel.bias)
    assert torch.allclose(sentinel.unroll()(x, h, c), gate * torch.tanh(c))


@torch.no_grad()
@pytest.mark.parametrize(("name", "query", "cell"), [("lstm", 0, 1), ("gru", 0, 0)])
def test_sentinel_reads_word_query_and_memory_cell(name: str, query: int, cell: int) -> None:
    decoder, (ids, cells) = build(name, "adaptive"), inputs()
    memory = decoder.prepare(cells)
    state = decoder.initial_state(memory, K)
    word, h, c = (part.unflatten(0, (B, K)) for part in (decoder.embedding(ids[:, 0]), state[query], state[cell]))
    _, expected = decoder.attention(h, memory.keys, memory.cells, decoder.sentinel.unroll()(word, h, c))
    assert torch.allclose(decoder(ids[:, :1], memory).weights[:, 0], expected.flatten(0, 1))


def test_initial_state_comes_from_the_mean_cell() -> None:
    decoder, (_, cells) = build(), inputs()
    hidden, cell = decoder.initial_state(decoder.prepare(cells), K)
    shuffled = decoder.initial_state(decoder.prepare(cells.flip(1)), K)[0]
    assert hidden.shape == cell.shape == (B * K, D)
    assert torch.equal(hidden[0], hidden[1]) and not torch.allclose(hidden[0], hidden[2])
    assert torch.allclose(hidden, shuffled)


def test_reordering_moves_states_and_leaves_memory() -> None:
    decoder, (ids, cells) = build(), inputs()
    memory = decoder.prepare(cells)
    cache = RecurrentCache(memory, decoder(ids, memory).state, T)
    before = [part.clone() for part in cache.state]
    order = torch.tensor([1, 1, 2, 3, 5, 4])
    cache.reorder_cache(order)
    assert cache.memory is memory and cache.get_seq_length() == T
    for old, new in zip(before, cache.state, strict=True):
        assert torch.equal(new, old[order])


def test_memory_of_some_images() -> None:
    decoder, (_, cells) = build(attention="multi_head"), inputs()
    images = torch.tensor([2, 0])
    some, own = decoder.prepare(cells).take(images), decoder.prepare(cells[images])
    assert isinstance(some, Memory)
    for name in ("cells", "keys", "mean"):
        assert torch.allclose(getattr(some, name), getattr(own, name)), name


def test_parameters_of_the_first_checkpoints_keep_their_names() -> None:
    """Those of an additive attention and an LSTM as they were first saved."""
    names = {name.removesuffix(".weight") for name in build(deep_output=True).state_dict() if "bias" not in name}
    attention = {f"attention.{name}" for name in ("memory_to_key", "query_to_key", "key_to_score")}
    assert names == attention | {
        *("embedding", "memory_to_state", "state_to_gate", "word_to_lstm", "step_to_lstm", "step_to_output", "output")
    }


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        build(num_layers=0)


def test_dropout_zeros_its_share_and_keeps_the_mean() -> None:
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
