from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_captioner import ATTENTIONS
from hf_captioner.model import additive_scores
from hf_captioner.model.additive_scores import plain_scores
from hf_captioner.model.attentions import sums_cells
from hf_captioner.testing import check_attention

B, K, P, C, D, A = 3, 4, 6, 10, 12, 8


def build(name: str, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    attention = ATTENTIONS.get(name)(query_size=D, memory_size=C, attention_size=A, **kwargs)
    return attention.double().eval()  # type: ignore[no-any-return]


def inputs(attention: torch.nn.Module) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a query, a memory and, if the attention uses one, a sentinel."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(B, K, D, dtype=torch.double, generator=generator)
    memory = torch.randn(B, P, C, dtype=torch.double, generator=generator)
    sentinel = torch.randn(B, K, D, dtype=torch.double, generator=generator)
    sentinels = [sentinel.requires_grad_()] if getattr(attention, "uses_sentinel", False) else []
    return query.requires_grad_(), memory.requires_grad_(), sentinels


def attend(name: str, **kwargs: Any) -> tuple[Any, ...]:
    """Return an attention, a query and a memory, and the context and the weights that the attention computes of them."""
    attention = build(name, **kwargs)
    query, memory, _ = inputs(attention)
    return attention, query, memory, *attention(query, attention.keys(memory), memory)


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_keeps_its_contract(name: str) -> None:
    check_attention(ATTENTIONS.get(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 8, 40])
def test_additive_scores_equal_plain_ones_in_every_precision(dtype: torch.dtype, size: float) -> None:
    """At the larger sizes of query and memory, exponentials could overflow."""
    attention = build("additive").to(dtype)
    generator = torch.Generator().manual_seed(2)
    query = (size * torch.randn(B, K, D, dtype=torch.double, generator=generator)).to(dtype)
    memory = (size * torch.randn(B, P, C, dtype=torch.double, generator=generator)).to(dtype)
    with torch.no_grad():
        _, weights = attention(query, attention.keys(memory), memory)
        operands = attention.query_to_key(query), attention.memory_to_key(memory), attention.key_to_score.weight[0]
        expected = plain_scores(*(operand.double() for operand in operands)).softmax(-1)
    assert weights.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}[dtype]
    assert torch.allclose(weights.double(), expected, atol=tolerance), (weights.double() - expected).abs().max()


@pytest.mark.parametrize("images_at_once", [1, 2, B])
def test_additive_weights_and_gradients_equal_plain_ones(images_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive_scores, "ELEMENTS_AT_ONCE", images_at_once * K * P * A)
    attention, query, memory, _, weights = attend("additive")
    vector = attention.key_to_score.weight[0]
    expected = plain_scores(attention.query_to_key(query), attention.memory_to_key(memory), vector).softmax(-1)
    assert torch.allclose(weights, expected)
    operands = [query, memory, *attention.parameters()]
    found, gradients = (torch.autograd.grad(each.sin().sum(), operands) for each in (weights, expected))
    for one, other in zip(found, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("name", ["additive", "additive_relu", "dot", "hard"])
def test_context_is_the_weighted_memory(name: str) -> None:
    attention, query, memory, context, weights = attend(name)
    assert torch.allclose(context, (weights.unsqueeze(-1) * memory.unsqueeze(1)).sum(2))
    assert not sums_cells(type(attention)) or torch.equal(attention.weigh(query, attention.keys(memory)), weights)


def test_only_attentions_whose_context_is_the_weighted_memory_say_so() -> None:
    found = {name for name in ATTENTIONS.names() if sums_cells(ATTENTIONS.get(name))}
    assert found == {"additive", "additive_relu", "dot"}


def test_relu_scores_are_those_of_one_hidden_layer() -> None:
    attention, query, memory, _, weights = attend("additive_relu")
    hidden = attention.query_to_key(query).unsqueeze(2) + attention.memory_to_key(memory).unsqueeze(1)
    assert torch.allclose(weights, attention.key_to_score(hidden.relu()).squeeze(-1).softmax(-1))


@pytest.mark.parametrize("num_heads", [1, 4])
def test_heads_are_those_of_torch(num_heads: int) -> None:
    attention, query, memory, context, weights = attend("multi_head", num_heads=num_heads)

    # Torch wants queries as wide as all heads, and first all keys, then all values.
    per_head = [part.unflatten(0, (num_heads, -1)).chunk(2, 1) for part in attention.memory_to_key_value.parameters()]
    (key, value), (key_bias, value_bias) = (tuple(half.flatten(0, 1) for half in halves) for halves in per_head)
    expected, expected_weights = functional.multi_head_attention_forward(
        attention.query_to_key(query).transpose(0, 1),
        *(functional.linear(memory, *each).transpose(0, 1) for each in ((key, key_bias), (value, value_bias))),
        embed_dim_to_check=A, num_heads=num_heads, add_zero_attn=False, dropout_p=0.0,
        in_proj_weight=torch.eye(A, dtype=torch.double).repeat(3, 1), in_proj_bias=None, bias_k=None, bias_v=None,
        out_proj_weight=torch.eye(A, dtype=torch.double), out_proj_bias=None,
    )  # fmt: skip
    assert torch.allclose(context, attention.heads_to_context(expected.transpose(0, 1)))
    assert torch.allclose(weights, expected_weights)


def test_sentinel_competes_with_the_cells() -> None:
    """One softmax over the cells and the sentinel, as in the paper, computed query by query."""
    attention = build("adaptive")
    query, memory, (sentinel,) = inputs(attention)
    context, weights = attention(query, attention.keys(memory), memory, sentinel)
    for b, k in product(range(B), range(K)):
        keys = torch.cat([attention.memory_to_key(memory[b]), attention.sentinel_to_key(sentinel[b, k])[None]])
        scores = attention.key_to_score(torch.tanh(keys + attention.query_to_key(query[b, k]))).squeeze(1)
        *alpha, beta = scores.softmax(0)
        assert torch.allclose(weights[b, k], torch.stack(alpha)) and torch.allclose(weights[b, k].sum(), 1 - beta)
        seen = weights[b, k] / weights[b, k].sum() @ memory[b]
        expected = (1 - beta) * seen + beta * attention.sentinel_to_context(sentinel[b, k])
        assert torch.allclose(context[b, k], expected)


def test_hard_attention_takes_one_cell_in_training() -> None:
    attention = build("hard", expected_rate=0.0).train()
    query, memory, _ = inputs(attention)
    torch.manual_seed(2)
    context, weights, log_probs = attention(query, attention.keys(memory), memory)
    cells = (context.unsqueeze(2) - memory.unsqueeze(1)).abs().sum(-1).argmin(-1)  # (B, K)
    assert torch.allclose(context, memory.gather(1, cells.unsqueeze(-1).expand(-1, -1, C)))
    assert torch.allclose(log_probs, weights.gather(-1, cells.unsqueeze(-1)).squeeze(-1).log())
    assert torch.allclose(weights, attention.eval()(query, attention.keys(memory), memory)[1])
    torch.manual_seed(2)
    assert torch.equal(attention.train()(query, attention.keys(memory), memory)[0], context)


def test_hard_attention_draws_cells_as_often_as_weighted() -> None:
    attention = build("hard", expected_rate=0.25).train()
    query, memory, _ = inputs(attention)
    num_draws = 4000
    torch.manual_seed(3)
    same = query[:1, :1].detach().expand(1, num_draws, D)
    context, weights, log_probs = attention(same, attention.keys(memory[:1]), memory[:1])
    is_drawn = log_probs[0] != 0
    assert is_drawn.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.allclose(context[0, ~is_drawn], (weights[0, 0] @ memory[0]).expand((~is_drawn).sum(), -1))
    cells = torch.cdist(context[0, is_drawn], memory[0]).argmin(1)
    frequencies = cells.bincount(minlength=P) / is_drawn.sum()
    assert torch.allclose(frequencies.double(), weights[0, 0], atol=0.03)


def test_expected_contexts_teach_hard_attention_as_soft_attention_learns() -> None:
    attention, query, memory, soft, _ = attend("hard", expected_rate=1.0)
    expected, _, log_probs = attention.train()(query, attention.keys(memory), memory)
    assert torch.allclose(soft, expected) and not log_probs.any()
    parameters = [query, memory, *attention.parameters()]
    gradients = (torch.autograd.grad(context.sin().sum(), parameters) for context in (soft, expected))
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("multi_head", {"num_heads": 3}, "num_heads is 3, which does not divide attention_size=8"),
        ("multi_head", {"num_heads": 0}, "num_heads is 0"), ("hard", {"expected_rate": 1.5}, "expected_rate is 1.5"),
        ("hard", {"reinforce_weight": -1.0}, "reinforce_weight is -1.0"),
        ("hard", {"entropy_weight": -1.0}, "entropy_weight is -1.0"),
    ],
)  # fmt: skip
def test_refuses(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **kwargs)
