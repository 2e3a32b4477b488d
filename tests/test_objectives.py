from __future__ import annotations

import math

import pytest
import torch

from hf_captioner.objectives import cross_entropy, doubly_stochastic


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]], [[0.0, 0.0], [9.0, -9.0]]])
    labels = torch.tensor([[1, -100], [0, -100]])
    assert cross_entropy(logits, labels).item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)


def test_label_smoothing_by_hand() -> None:
    logits, labels = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[1]])
    expected = 0.9 * -math.log(3 / 4) + 0.1 * (-math.log(3 / 4) - math.log(1 / 4)) / 2
    assert cross_entropy(logits, labels, 0.1).item() == pytest.approx(expected)


def test_doubly_stochastic_by_hand() -> None:
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[4, 3], [3, -100], [-100, -100]])  # the third caption does not exist
    first, second = 0.5**2 + 0.5**2, 0.75**2 + 0.25**2
    assert doubly_stochastic(weights, labels, "sum").item() == pytest.approx((first + second) / 2)
    assert doubly_stochastic(weights, labels, "mean").item() == pytest.approx((first + second) / 4)
