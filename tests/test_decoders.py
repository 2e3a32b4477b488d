from __future__ import annotations

import pytest
import torch

from hf_captioner.attentions import AdditiveAttention
from hf_captioner.decoders import DECODERS, LSTMDecoder, RecurrentCache

B, K, T, V, P, C, E, D = 3, 2, 7, 30, 6, 10, 8, 12
LENGTHS = torch.tensor([7, 3, 5, 1, 6, 6])


def build(**kwargs: bool) -> LSTMDecoder:
    torch.manual_seed(0)
    decoder = DECODERS.get("lstm")(V, E, D, C, AdditiveAttention(D, C, 7), output_dropout=0.0, **kwargs)
    return decoder.double()  # type: ignore[no-any-return]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B * K, T), generator=generator)
    return ids, torch.randn(B, P, C, dtype=torch.double, generator=generator)


@pytest.mark.parametrize("deep_output", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_packed_captions_equal_captions_read_alone(deep_output: bool, gate: bool) -> None:
    decoder, (ids, cells) = build(deep_output=deep_output, gate=gate), inputs()
    output = decoder(ids, decoder.prepare(cells), lengths=LENGTHS)
    for n, length in enumerate(LENGTHS.tolist()):
        alone = decoder(ids[n : n + 1, :length], decoder.prepare(cells[n // K : n // K + 1]))
        for name in ("logits", "weights", "hidden"):
            assert torch.allclose(getattr(output, name)[n, :length], getattr(alone, name)[0]), name
            assert not getattr(output, name)[n, length:].any(), name


def test_carried_state_equals_recomputation() -> None:
    decoder, (ids, cells) = build(deep_output=True), inputs()
    memory = decoder.prepare(cells)
    whole = decoder(ids, memory)
    state = None
    for t in range(T):
        step = decoder(ids[:, t : t + 1], memory, state)
        state = step.state
        assert torch.allclose(step.logits[:, 0], whole.logits[:, t])
    assert all(torch.allclose(a, b) for a, b in zip(state or (), whole.state, strict=True))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_gradients_equal_numerical_ones(lengths: torch.Tensor | None) -> None:
    """Of the weight whose gradient is made in one product for all steps, and of what flows past it."""
    decoder, (ids, cells) = build(deep_output=True), inputs()
    mask = torch.arange(T) < (LENGTHS if lengths is not None else torch.full((B * K,), T)).unsqueeze(1)

    def loss() -> torch.Tensor:
        output = decoder(ids, decoder.prepare(cells), lengths=lengths)
        return (output.logits.sin()[mask]).sum() + output.weights[mask].square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in decoder.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.double, generator=generator)
        assert parameter.grad is not None, name
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            step = 1e-6
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        assert torch.allclose(slope, (above - below) / (2 * step), rtol=1e-5, atol=1e-6), name


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
