"""Helpers of the contract tests: the sizes that all use, and assertions that name the rule that is broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

# B: images, K: captions of an image, T: words, V: vocabulary, P: image cells, C: channels of a cell
# E: word embedding, D: decoder state, A: hidden layer of the attention
B, K, T, V, P, C, E, D, A = 3, 2, 7, 30, 6, 10, 8, 12, 8
LENGTHS = (7, 3, 5, 1, 6, 6)  # number of words of each of the N = B·K captions

Check = TypeVar("Check", bound=Callable[..., None])


def seeded(check: Check) -> Check:
    """Decorate a check so that it draws the same random numbers each time and leaves the caller's generator alone."""

    @wraps(check)
    def run(*args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(*args, **kwargs)

    return run  # type: ignore[return-value]


def require(is_kept: bool, rule: str, found: Any = None) -> None:
    """Raise an AssertionError that names the rule, and what was found instead, unless the rule is kept."""
    if not is_kept:
        more = "" if found is None else f" Found: {str(found).rstrip('.')}."
        raise AssertionError(f"Contract broken: {rule}.{more}")


def require_shape(tensor: Any, shape: Sequence[int], rule: str) -> None:
    """Require a tensor of this shape whose elements are finite."""
    found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    require(found == tuple(shape), rule, f"{found} instead of {tuple(shape)}")
    require(bool(torch.isfinite(tensor).all()), f"{rule}, and finite")


def require_close(first: Tensor, second: Tensor, rule: str, tolerance: float = 1e-6) -> None:
    """Require two tensors to be equal up to a relative and absolute tolerance."""
    require(first.shape == second.shape, rule, f"shapes {tuple(first.shape)} and {tuple(second.shape)}")
    is_close = torch.allclose(first, second, rtol=tolerance, atol=tolerance)
    require(is_close, rule, None if is_close else f"a difference of {(first - second).abs().max().item():.1e}")


def noise(*shape: int) -> Tensor:
    """Draw a tensor of normal noise in double precision."""
    return torch.randn(*shape, dtype=torch.double)
