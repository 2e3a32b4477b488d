from __future__ import annotations

import pytest
import torch

from hf_captioner.attentions import ATTENTIONS

B, K, P, C, D, A = 3, 4, 6, 10, 12, 7


@pytest.fixture(params=ATTENTIONS.names())
def attention(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return ATTENTIONS.get(request.param)(query_size=D, memory_size=C, attention_size=A).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(B, K, D, dtype=torch.double, generator=generator)
    memory = torch.randn(B, P, C, dtype=torch.double, generator=generator)
    return query.requires_grad_(), memory.requires_grad_()


def test_context_is_the_weighted_memory(attention: torch.nn.Module) -> None:
    query, memory = inputs()
    context, weights = attention(query, attention.keys(memory), memory)
    assert context.shape == (B, K, C) and weights.shape == (B, K, P)
    assert torch.allclose(weights.sum(-1), torch.ones(B, K, dtype=torch.double))
    expected = (weights.unsqueeze(-1) * memory.unsqueeze(1)).sum(2)
    assert torch.allclose(context, expected)


def test_queries_share_a_memory_without_seeing_each_other(attention: torch.nn.Module) -> None:
    query, memory = inputs()
    together, _ = attention(query, attention.keys(memory), memory)
    for k in range(K):
        alone, _ = attention(query[:, k : k + 1], attention.keys(memory), memory)
        assert torch.allclose(together[:, k : k + 1], alone)


def test_gradients(attention: torch.nn.Module) -> None:
    query, memory = inputs()
    parameters = list(attention.parameters())

    def both(query: torch.Tensor, memory: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        context, weights = attention(query, attention.keys(memory), memory)
        return context, weights

    assert torch.autograd.gradcheck(both, (query, memory, *parameters))


def test_additive_scores_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    attention = ATTENTIONS.get("additive")(query_size=D, memory_size=C, attention_size=A).double()
    query, memory = inputs()
    _, weights = attention(query, attention.keys(memory), memory)
    hidden = attention.query_to_key(query).unsqueeze(2) + attention.memory_to_key(memory).unsqueeze(1)
    expected = attention.key_to_score(torch.tanh(hidden)).squeeze(-1).softmax(-1)
    assert torch.allclose(weights, expected)
