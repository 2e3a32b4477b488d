"""Terms of the loss against values computed by hand, and REINFORCE against the exact gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from hf_captioner.model.attentions import HardAttention
from hf_captioner.model.decoder_interface import DecoderOutput
from hf_captioner.model.decoders import GRUDecoder
from hf_captioner.model.objectives import (
    attention_entropy,
    cross_entropy,
    doubly_stochastic,
    log_likelihood,
    moving_average,
    reinforce,
)


def test_label_smoothing_by_hand() -> None:
    logits, labels = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[1]])
    expected = 0.9 * -math.log(3 / 4) + 0.1 * (-math.log(3 / 4) - math.log(1 / 4)) / 2
    assert cross_entropy(logits, labels, 0.1).item() == pytest.approx(expected)


def test_doubly_stochastic_by_hand() -> None:
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.0, 0.0]], [[0.5, 0.1], [0.0, 0.0]]])
    weights[1, 1] = 0.3  # a word that is read and does not count
    labels = torch.tensor([[4, 3], [3, -100], [-100, -100]])  # the third caption has no word
    first, second = 0.5**2 + 0.5**2, 0.75**2 + 0.25**2
    assert doubly_stochastic(weights, labels, "sum").item() == pytest.approx((first + second) / 2)
    assert doubly_stochastic(weights, labels, "mean").item() == pytest.approx((first + second) / 4)


def test_log_likelihood_and_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]], [[0.0, 0.0], [9.0, -9.0]]])
    labels = torch.tensor([[1, 0], [0, -100]])
    expected = torch.tensor([[math.log(3 / 4), math.log(1 / 2)], [math.log(1 / 2), 0.0]])
    assert torch.allclose(log_likelihood(logits, labels), expected)
    assert -expected.sum() / 3 == pytest.approx(cross_entropy(logits, labels).item())


def test_reinforce_by_hand() -> None:
    scores = torch.tensor([[-1.0, -3.0], [-2.5, 0.0]])
    log_probs = torch.tensor([[-0.5, -0.25], [-2.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[4, 3], [3, -100]])
    first, second = (-4.0 + 2 * 1.5) * -0.75, (-2.5 + 1.5) * -2.0
    loss = reinforce(scores, log_probs, labels, torch.tensor(-1.5))
    assert loss.item() == pytest.approx(-(first + second) / 3)
    loss.backward()
    assert torch.allclose(
        log_probs.grad, torch.tensor([[1.0, 1.0], [1.0, 0.0]]) / 3
    )  # captions worse than the baseline become less likely


def test_entropy_by_hand() -> None:
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[4, 3], [3, -100]])
    entropy = attention_entropy(weights, labels)
    last = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert entropy.item() == pytest.approx((math.log(2) + 0 + last) / 3)
    entropy.backward()
    assert torch.isfinite(weights.grad).all()


def test_moving_average_by_hand() -> None:
    scores, labels = torch.tensor([[-1.0, -3.0], [-2.0, 0.0]]), torch.tensor([[4, 3], [3, -100]])
    assert moving_average(torch.tensor(-4.0), scores, labels).item() == pytest.approx(0.9 * -4 + 0.1 * -2)
    nothing = torch.full((1, 2), -100)
    assert moving_average(torch.tensor(-4.0), torch.zeros(1, 2), nothing).item() == pytest.approx(-3.6)


EXPECTED = 0  # a choice of hard attention: 0 for the expected context, or n for cell n


class FixedChoices:
    """Replaces torch's random numbers, so that hard attention makes the next of `choices` for each caption in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choices: Iterator[int]
        self.made = torch.empty(0)
        monkeypatch.setattr(torch, "multinomial", self.multinomial)
        monkeypatch.setattr(torch, "rand", self.rand)

    def multinomial(self, weights: Tensor, num_samples: int) -> Tensor:
        self.made = torch.tensor([next(self.choices, 1) for _ in weights])
        return (self.made - 1).clamp(min=0).unsqueeze(1)

    def rand(self, shape: torch.Size, device: torch.device) -> Tensor:
        return (self.made != EXPECTED).double().view(shape) - 1e-9


@pytest.mark.parametrize("baseline", [0.0, -3.7])
@pytest.mark.parametrize("expected_rate", [0.0, 0.5])
def test_reinforce_is_the_gradient_of_the_bound(
    expected_rate: float, baseline: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the REINFORCE loss over all possible choices has the gradient of the exact bound.

    Enumerated are the choices for the four words of three captions of two images, which are read packed.
    """
    torch.manual_seed(0)
    num_cells, vocab_size = 2, 5
    attention = HardAttention(4, 3, 4, expected_rate=expected_rate)
    decoder = GRUDecoder(vocab_size, 3, 4, 3, attention, output_dropout=0.0).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
    cells = torch.randn(2, num_cells, 3, dtype=torch.double)
    labels = torch.tensor([[1, -100], [2, 4], [3, -100], [-100, -100]])
    lengths = (labels != -100).sum(1)
    ids = torch.tensor([[0, 0], [0, 2], [0, 0], [0, 0]])
    fixed = FixedChoices(monkeypatch)

    def read(choices: tuple[int, ...]) -> DecoderOutput:
        # At the first step the fourth caption, which has no word, is in the block with the others, and not read.
        fixed.choices = iter([*choices[:3], 1, *choices[3:]])
        output = decoder(ids, decoder.prepare(cells), lengths=lengths)
        assert next(fixed.choices, None) is None
        return output  # type: ignore[no-any-return]

    bound, estimate, total = torch.zeros(()), torch.zeros(()), 0.0
    for choices in product(range(EXPECTED if expected_rate else 1, num_cells + 1), repeat=4):
        output = read(choices)
        num_expected = choices.count(EXPECTED)
        rate = expected_rate**num_expected * (1 - expected_rate) ** (len(choices) - num_expected)
        probability = rate * output.log_probs.sum().exp()
        scores = log_likelihood(output.logits, labels)
        bound = bound + probability * -scores.sum() / 4
        loss = cross_entropy(output.logits, labels) + reinforce(scores, output.log_probs, labels, baseline)
        estimate = estimate + probability.detach() * loss
        total += probability.item()
    assert total == pytest.approx(1)
    parameters = dict(decoder.named_parameters())
    exact = torch.autograd.grad(bound, list(parameters.values()), retain_graph=True)
    expected = torch.autograd.grad(estimate, list(parameters.values()))
    for name, a, b in zip(parameters, exact, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    assert exact[list(parameters).index("attention.key_to_score.weight")].abs().max() > 1e-3
