"""Fast computation of the scores of additive attention.

`plain_scores` defines them; `AdditiveScores` gives the same scores and gradients in less time. a is the projection of
an image cell, h that of a query, and v a vector of weights.
"""

# B: images, K: captions or beams of an image, P: image cells, A: hidden layer

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**19  # of the hidden layer that a CPU computes at once, so few that they stay in its cache


def plain_scores(query: Tensor, key: Tensor, vector: Tensor) -> Tensor:
    """Compute `v · tanh(a + h)` for every image cell and query.

    Args:
        query: Projected queries h, `(B, K, A)`.
        key: Projected image cells a, `(B, P, A)`.
        vector: Vector v, `(A,)`.

    Returns:
        Scores, `(B, K, P)`.
    """
    return torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ vector


class Exponential(torch.autograd.Function):
    """The function `exp(2x)`, whose backward pass is given gradients of x itself, as `AdditiveScores` returns them."""

    @staticmethod
    def forward(ctx: Any, logarithm: Tensor) -> Tensor:
        """Compute `exp(2x)` elementwise."""
        return _exponential(logarithm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Pass on the gradient of x, which `AdditiveScores` has already computed."""
        return grad


def _exponential(logarithm: Tensor) -> Tensor:
    """Compute `exp(2x)` in single or double precision, with x clamped to a range without overflow (±43 in single)."""
    if logarithm.dtype != torch.float64:
        logarithm = logarithm.float()  # float16 has too small a range, and bfloat16 too few digits
    limit = 0.49 * math.log(torch.finfo(logarithm.dtype).max)
    return (2 * logarithm.clamp(-limit, limit)).exp_()


class AdditiveScores(torch.autograd.Function):
    """Scores of additive attention, equal to `plain_scores(h, a, v)`, from h, `Exponential` of a, and v.

    The hidden layer (B, K, P, A) is by far the largest tensor of a step, and its tanh would take longer than all
    matrix products of a decoding step but one. As `tanh x = 1 - 2r` with `r = 1 / s` and `s = 1 + exp(2a) exp(2h)`,
    it is enough to compute exponentials of a once per image and of h once per query; for each pair of them there is
    only a division.

    In the backward pass, s is computed again: kept for all words it would take hundreds of megabytes, which take longer
    to get from the operating system than to compute. With `tanh' = 4 (r - r²)`, `d(h) = 4v ∘ Σ_p g (r - r²)` and
    `d(a) = 4v ∘ Σ_k g (r - r²)`.

    All sums are made image by image. A product over all images would be split among a processor's cores differently
    from the elementwise operations, and each core would wait for what another has in its cache.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, vector: Tensor) -> Tensor:
        """Compute scores, `(B, K, A), (B, P, A), (A,) -> (B, K, P)`."""
        exponential = _exponential(query).to(keys.dtype)
        ctx.save_for_backward(exponential, keys, vector)
        scores = keys.new_empty(*query.shape[:2], keys.shape[1])  # (B, K, P)
        factors = vector.to(keys.dtype)
        for images, pairs in _pairs(exponential, keys):
            if torch.compiler.is_compiling():  # a graph with gradients takes no `out`
                scores = torch.sum(factors / pairs, 3)
            else:
                torch.sum(torch.div(factors, pairs, out=pairs), 3, out=scores[images])
        return (vector.sum() - 2 * scores).to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of h, a and v from those of the scores."""
        exponential, keys, vector = ctx.saved_tensors
        grad = grad.to(keys.dtype)  # (B, K, P)
        grad_query, grad_keys = torch.empty_like(exponential), torch.empty_like(keys)
        grad_vectors = keys.new_empty(len(keys), 1, keys.shape[2])
        for images, pairs in _pairs(exponential, keys):
            reciprocal, part = pairs.reciprocal_(), grad[images]
            torch.bmm(part.flatten(1).unsqueeze(1), reciprocal.flatten(1, 2), out=grad_vectors[images])
            slope = reciprocal.addcmul_(reciprocal, reciprocal, value=-1).mul_(part.unsqueeze(3))  # g (r - r²)
            torch.sum(slope, 2, out=grad_query[images])
            torch.sum(slope, 1, out=grad_keys[images])
        scale = 4 * vector
        return grad_query.mul_(scale), grad_keys.mul_(scale), grad.sum() - 2 * grad_vectors.sum((0, 1))


def _pairs(query: Tensor, key: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield `1 + exp(2a) exp(2h)` for all pairs of cells and queries, a few images at a time.

    Args:
        query: `exp(2h)` of the queries, `(B, K, A)`.
        key: `exp(2a)` of the image cells, `(B, P, A)`.

    Yields:
        The slice of these images, and their tensor `(b, K, P, A)`, whose memory is reused for the next images.
    """
    num_queries, num_images = query.shape[1], len(key)
    query, key = query.unsqueeze(2), key.unsqueeze(1)
    one = torch.ones((), dtype=key.dtype, device=key.device)
    if key.device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(None), torch.addcmul(one, query, key)
        return
    shape = (num_queries, *key.shape[2:])
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, math.prod(shape)))
    pairs = key.new_empty(min(at_once, num_images), *shape)
    for images in (slice(first, first + at_once) for first in range(0, num_images, at_once)):
        part = key[images]
        yield images, torch.addcmul(one, query[images], part, out=pairs[: len(part)])
