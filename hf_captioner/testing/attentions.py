"""Contract test for authors of attentions: `check_attention` checks outputs, independence, gradients and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..model.attentions import ATTENTIONS, sums_cells
from .captioner import check_captioner
from .rules import A, B, C, D, K, P, noise, require, require_close, require_shape, seeded

Attend = Callable[..., tuple[Tensor, ...]]  # query, memory and perhaps a sentinel -> what `forward` returns


@seeded
def check_attention(part: Callable[..., nn.Module], **kwargs: Any) -> None:
    """Check that an attention keeps the contract in `model/attentions.py`.

    `part` is the class or function that `ATTENTIONS` would hold, and `kwargs` are its `attention_kwargs`.

    Raises:
        AssertionError: The part breaks the rule that the message names.
    """
    attention = part(query_size=D, memory_size=C, attention_size=A, **kwargs).double().eval()
    uses_sentinel = getattr(attention, "uses_sentinel", False)
    inputs = [noise(B, K, D), noise(B, P, C), noise(B, K, D)][: 3 if uses_sentinel else 2]

    def attend(query: Tensor, memory: Tensor, *sentinels: Tensor) -> tuple[Tensor, ...]:
        return attention(query, attention.keys(memory), memory, *sentinels)  # type: ignore[operator]

    _check_outputs(attention, attend, inputs, uses_sentinel)
    _check_independence(attention, attend, inputs)
    _check_gradients(attention, attend, inputs)
    _check_sampling(attention.train(), attend, inputs)
    check_captioner(ATTENTIONS, part, kwargs)


def _check_outputs(attention: nn.Module, attend: Attend, inputs: list[Tensor], uses_sentinel: bool) -> None:
    """Check what `keys` and, in evaluation mode, `forward` return."""
    query, memory, *sentinels = inputs
    keys = attention.keys(memory)  # type: ignore[operator]
    require(isinstance(keys, Tensor) and len(keys) == B, "keys(memory) is one tensor with the images in front")
    output = attend(*inputs)
    is_pair = isinstance(output, tuple) and len(output) == 2
    require(is_pair, "forward returns (context, weights) in evaluation", type(output))
    context, weights = output
    require_shape(context, (B, K, C), "the context is (B, K, C)")
    require_shape(weights, (B, K, P), "the weights are (B, K, P)")
    require(bool((weights >= 0).all()), "weights are not negative")
    total = weights.sum(-1)
    if uses_sentinel:
        require(bool((total < 1 + 1e-9).all()), "beside a sentinel, the weights of the cells sum to at most 1")
    else:
        require_close(total, torch.ones_like(total), "the weights of a query sum to 1")
    if sums_cells(type(attention)):
        require_close(context, weights @ memory, "with sums_cells, the context is weights @ memory")
        weighed = attention.weigh(query, keys)  # type: ignore[operator]
        require_close(weighed, weights, "with sums_cells, weigh(query, keys) gives the weights of forward")
    require(all(map(torch.equal, output, attend(*inputs))), "in evaluation, the same inputs give the same outputs")
    require_shape(attend(query, memory[:, :4], *sentinels)[1], (B, K, 4), "the number of cells may be any")


def _check_independence(attention: nn.Module, attend: Attend, inputs: list[Tensor]) -> None:
    """Check that neither the images of a batch nor the queries of an image affect each other."""
    query, memory, *sentinels = inputs
    keys, output = attention.keys(memory), attend(*inputs)  # type: ignore[operator]
    some = torch.tensor([2, 0])
    require_close(attention.keys(memory[some]), keys[some], "keys of an image depend on that image alone")  # type: ignore[operator]
    for index in range(B):
        alone = attend(*(tensor[index : index + 1] for tensor in inputs))
        for mine, theirs in zip(alone, output, strict=True):
            require_close(mine[0], theirs[index], "images of a batch do not see each other")
    for index in range(K):
        alone = attend(query[:, index : index + 1], memory, *(extra[:, index : index + 1] for extra in sentinels))
        for mine, theirs in zip(alone, output, strict=True):
            require_close(mine[:, 0], theirs[:, index], "queries of an image do not see each other")


def _check_gradients(attention: nn.Module, attend: Attend, inputs: list[Tensor]) -> None:
    """Compare the gradients of all inputs and parameters with numerical ones."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    learned = [parameter for parameter in attention.parameters() if parameter.requires_grad]
    require(all(tensor.requires_grad for tensor in attend(*inputs)), "gradients flow from context and weights")
    try:
        torch.autograd.gradcheck(lambda *tensors: attend(*tensors[: len(inputs)]), (*inputs, *learned))
    except RuntimeError as e:  # GradcheckError, or an error of a faulty backward
        require(False, "gradients are those of what forward computes", first_line(e))


def _check_sampling(attention: nn.Module, attend: Attend, inputs: list[Tensor]) -> None:
    """Check what `forward` returns in training mode, and the further attributes of an attention that samples."""
    context, weights, *more = attend(*inputs)
    require_shape(context, (B, K, C), "the context is (B, K, C) in training too")
    require_shape(weights, (B, K, P), "the weights are (B, K, P) in training too")
    if not more:
        return
    require(len(more) == 1, "forward returns (context, weights) or (context, weights, log-probabilities)")
    log_probs = more[0]
    require_shape(log_probs, (B, K), "log-probabilities of sampled cells are (B, K)")
    require(bool((log_probs <= 0).all()), "log-probabilities are at most 0")
    require(log_probs.requires_grad, "log-probabilities carry a gradient")
    for name in ("reinforce_weight", "entropy_weight"):
        value = getattr(attention, name, None)
        is_weight = isinstance(value, int | float) and value >= 0
        require(is_weight, f"an attention that samples has {name}, a number >= 0", value)
    baseline = getattr(attention, "baseline", None)
    is_buffer = isinstance(baseline, Tensor) and baseline.shape == () and "baseline" in attention.state_dict()
    require(is_buffer, "an attention that samples has baseline, a tensor () that is saved")
