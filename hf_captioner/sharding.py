"""Weights that FSDP deals out to processes, and the whole of them beside: to decode, average and save.

A captioner is small beside what training it takes: the gradients and the state of the optimizer are what is worth
sharing out. Each process therefore keeps the whole model too, made current after every step, and all but the step
itself goes as it does elsewhere.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from .modeling_captioner import CaptionerModel


class ShardedCaptioner(nn.Module):
    """A copy of a captioner, to be prepared by Accelerate.

    Decoders read weights of their layers outside the layers' own forward pass. So all are sharded as one unit, which
    FSDP makes whole for a pass: this module hides from Accelerate what of a captioner it would shard by itself.

    Args:
        whole: the captioner.
    """

    def __init__(self, whole: CaptionerModel) -> None:
        super().__init__()
        self.captioner = copy.deepcopy(whole)

    @property
    def encoder(self) -> nn.Module:
        """Of the copy."""
        return self.captioner.encoder

    @property
    def decoder(self) -> nn.Module:
        """Of the copy."""
        return self.captioner.decoder

    def forward(self, **inputs: Any) -> Any:
        """As the captioner's."""
        return self.captioner(**inputs)


def shard_as_one(plugin: FullyShardedDataParallelPlugin) -> None:
    """Set FSDP up for a `ShardedCaptioner`, whatever else `accelerate config` says.

    Raises:
        ValueError: the first version of FSDP.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            "Accelerate is configured for FSDP version 1, which PyTorch has replaced: set fsdp_version to 2 in "
            "`accelerate config`, or give `accelerate launch` the argument --fsdp_version 2."
        )
    plugin.auto_wrap_policy = None
    # Logits are a view, and nothing writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


@torch.no_grad()
def gather_weights(prepared: nn.Module, whole: CaptionerModel) -> None:
    """Bring what a step changed of a prepared `ShardedCaptioner` into the whole model; nothing for other models.

    Buffers become those of the main process everywhere, as DDP does it.
    """
    if not isinstance(prepared, ShardedCaptioner):
        return
    for ours, theirs in zip(whole.parameters(), prepared.captioner.parameters(), strict=True):
        if ours.requires_grad:
            ours.copy_(theirs.full_tensor())  # type: ignore[attr-defined]
    for ours, theirs in zip(whole.buffers(), prepared.captioner.buffers(), strict=True):
        theirs.copy_(broadcast(theirs))
        ours.copy_(theirs)


def gathered(values: Any) -> Any:
    """Tensors, such as those of an optimizer's state, whole on every process; all have to ask."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), values)


def deal_out_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `gathered` made whole, for this process: each tensor shared out as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def deal_out(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    dealt_out = {
        index: {name: deal_out(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": dealt_out}
