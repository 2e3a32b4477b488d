"""Products with the same operand at every step, whose gradient is computed once for all steps.

`DeferredLinear(weight)(x)` equals `functional.linear(x, weight)` and `DeferredSum(values)(weights)` equals
`weights @ values`, gradients included. They differ in when the gradient of the operand is computed: autograd would make
a product over a few captions at every step and add up gradients as large as the operand; here the inputs and gradients
of all steps are collected, and one large product is made of them.
"""

# B: images, K: captions or beams of an image, P: image cells, R: rows, X: width of what is summed

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder_interface import Siblings


def is_plain(linear: nn.Module) -> bool:
    """Return whether a module is an `nn.Linear` whose weight may be read in place of calling the module.

    It is not if LoRA, quantization or a parametrization has replaced it, or if hooks or another `forward` change what
    it computes, as those of accelerate do that load a weight from disk when it is needed.
    """
    is_changed = "forward" in linear.__dict__ or linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and not is_changed


class DeferredProduct:
    """A product of each step's input and an operand that is the same at every step; subclasses define the product.

    In the backward pass the first step comes last, since every later step depends on it: there, the operand's gradient
    is computed.

    Args:
        operand: Tensor that the input of every step is multiplied with.
    """

    def __init__(self, operand: Tensor) -> None:
        device = operand.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else operand.dtype
        self.operand = operand
        self.constant = operand.detach().to(dtype)
        self.has_begun = False
        self.steps: list[tuple[Tensor, Tensor]] = []  # of each step, the input and the gradient of the product

    def __call__(self, step: Tensor) -> Tensor:
        """Return the product of a step's input and the operand, with a gradient that is deferred for the operand."""
        is_first, self.has_begun = not self.has_begun, True
        output: Tensor = _DeferredStep.apply(step.to(self.constant.dtype), self.operand, self, is_first)
        return output

    def _product(self, step: Tensor) -> Tensor:
        """Return the product of a step's input and the operand."""
        raise NotImplementedError

    def _input_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of a step's input from the gradient of its product."""
        raise NotImplementedError

    def _operand_gradient(self) -> Tensor:
        """Return the gradient of the operand from all steps."""
        raise NotImplementedError


class DeferredLinear(DeferredProduct):
    """A linear map without bias whose weight gets its gradient once for all steps, `(b, k, in) -> (b, k, out)`.

    Args:
        weight: `(out, in)`.
        siblings: Groups of captions whose inputs are the same, so that one product serves each group; None
            in training, where gradients need every product.
    """

    def __init__(self, weight: Tensor, siblings: Siblings | None = None) -> None:
        super().__init__(weight)
        self.siblings = siblings

    def __call__(self, step: Tensor) -> Tensor:
        """Return the linear map of a step's input, computed once for each group of siblings."""
        if self.siblings is None:
            return super().__call__(step)
        groups = step.flatten(0, 1)[self.siblings.first].to(self.constant.dtype)
        return self._product(groups)[self.siblings.group].unflatten(0, step.shape[:2])

    def _product(self, step: Tensor) -> Tensor:
        return functional.linear(step, self.constant)

    def _input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.constant

    def _operand_gradient(self) -> Tensor:
        inputs, grads = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*self.steps, strict=True))
        return grads.T @ inputs  # (out, R) @ (R, in)


class DeferredSum(DeferredProduct):
    """Weighted sums over the grid cells of each image, weights `(b, k, P) -> (b, k, X)`, for the first b of B images.

    The gradient of `values` is computed once for all steps.

    Args:
        values: Vectors that are summed, one for each cell, `(B, P, X)`.
    """

    def _product(self, step: Tensor) -> Tensor:
        return step @ self.constant[: len(step)]

    def _input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.constant[: len(grad)].transpose(1, 2)

    def _operand_gradient(self) -> Tensor:
        num_images, num_rows = len(self.constant), sum(step.shape[1] for step, _ in self.steps)
        weights = self.constant.new_empty(num_images, num_rows, self.constant.shape[1])
        grads = self.constant.new_empty(num_images, num_rows, self.constant.shape[2])
        first = 0
        for step, grad in self.steps:
            last = first + step.shape[1]
            for whole, part in ((weights, step), (grads, grad)):
                whole[: len(part), first:last] = part
                whole[len(part) :, first:last] = 0
            first = last
        return weights.transpose(1, 2) @ grads  # (B, P, ΣK) @ (B, ΣK, X)


class _DeferredStep(torch.autograd.Function):
    """One step of a `DeferredProduct`, which gives the operand its gradient only at the first step."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, operand: Tensor, deferred: DeferredProduct, is_first: bool) -> Tensor:
        ctx.save_for_backward(step)
        ctx.deferred, ctx.is_first = deferred, is_first
        return deferred._product(step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        deferred: DeferredProduct = ctx.deferred
        if ctx.needs_input_grad[1]:
            deferred.steps.append((*ctx.saved_tensors, grad))
        operand_gradient = None
        if ctx.is_first and deferred.steps:
            operand_gradient = deferred._operand_gradient()
            deferred.steps.clear()
        return deferred._input_gradient(grad), operand_gradient, None, None
