"""How a step of the optimizer is taken: by processes that each hold all of it, or that share it out.

A captioner is small beside what training it takes: the gradients and the state of the optimizer are what is worth
sharing out. Each process therefore keeps the whole model too, made current after every step, and all but the step
itself (decoding, averaging, saving) goes as it does on one process.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, convert_outputs_to_fp32, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..model.modeling_captioner import CaptionerModel


class Steps:
    """Steps of one process, or of several that each hold all weights and gradients (DDP).

    Args:
        model: the whole model, which is current after every step.
        accelerator: of the processes.
        max_grad_norm: longer gradients are scaled down.
    """

    optimizer: torch.optim.Optimizer
    wrapped: nn.Module  # what is called for a loss

    def __init__(self, model: CaptionerModel, accelerator: Accelerator, max_grad_norm: float) -> None:
        self.model, self.accelerator, self.max_grad_norm = model, accelerator, max_grad_norm
        self.trained: Any = self._to_train()

    @staticmethod
    def configure(accelerator: Accelerator) -> None:
        """Set up what `accelerate config` leaves open.

        Raises:
            ValueError: it says what a captioner can't be trained with.
        """

    def _to_train(self) -> nn.Module:
        """The module that is trained, with the encoder and decoder of a captioner."""
        return self.model

    def _copy(self) -> CaptionerModel:
        """A copy of the model, in the precision of training, which Accelerate sees to for DDP alone."""
        trained = copy.deepcopy(self.model)
        forward = trained.forward

        def forward_in_precision(**inputs: Any) -> Any:
            with self.autocast():
                return forward(**inputs)

        trained.forward = convert_outputs_to_fp32(forward_in_precision)  # type: ignore[method-assign]
        return trained

    def autocast(self) -> AbstractContextManager[None]:
        """Within, products are made in the precision of training."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Let Accelerate deal out what is trained, and its optimizer."""
        self.wrapped, self.optimizer = self.accelerator.prepare(self.trained, optimizer)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient; over the batches of a step and the processes it is the mean."""
        self.accelerator.backward(loss)

    def clip(self) -> Tensor | None:
        """Scale down a gradient that is too long, and tell its length; None where only the step finds it out."""
        return self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.max_grad_norm)

    def step(self) -> Tensor | None:
        """Take the step. Returns the gradient's length where `clip` couldn't."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None

    def state(self) -> Any:
        """Of the optimizer, whole; all processes have to ask."""
        return self.optimizer.state_dict()

    def load_state(self, state: Any) -> None:
        """Go on where `state` was."""
        self.optimizer.load_state_dict(state)

    def end(self) -> None:
        """Leave the model as it was before `prepare`, but for its weights."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


@torch.no_grad()
def _update(whole: nn.Module, trained: nn.Module, weights: Callable[[Any], Tensor]) -> None:
    """Bring what a step changed of a copy into the whole model.

    Args:
        whole: the model.
        trained: its copy. Buffers become those of the main process everywhere, as DDP does it.
        weights: gives the whole of a parameter of the copy.
    """
    for ours, theirs in zip(whole.parameters(), trained.parameters(), strict=True):
        if ours.requires_grad:
            ours.copy_(weights(theirs))
    for mine, buffer in zip(whole.buffers(), trained.buffers(), strict=True):
        buffer.copy_(broadcast(buffer))
        mine.copy_(buffer)


class _Hidden(nn.Module):
    """A captioner of which Accelerate sees no parts that it would shard by themselves."""

    def __init__(self, captioner: CaptionerModel) -> None:
        super().__init__()
        self.captioner = captioner

    @property
    def encoder(self) -> nn.Module:
        return self.captioner.encoder

    @property
    def decoder(self) -> nn.Module:
        return self.captioner.decoder

    def forward(self, **inputs: Any) -> Any:
        return self.captioner(**inputs)


class FsdpSteps(Steps):
    """Steps of processes that share out weights, gradients and the optimizer's state by PyTorch's FSDP 2.

    Decoders read weights of their layers outside the layers' own forward pass. So all are sharded as one unit, which
    FSDP makes whole for a pass.
    """

    @staticmethod
    def configure(accelerator: Accelerator) -> None:
        """Shard as one unit, whatever else `accelerate config` says.

        Raises:
            ValueError: the first version of FSDP.
        """
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                "Accelerate is configured for FSDP version 1, which PyTorch has replaced: set fsdp_version to 2 in "
                "`accelerate config`, or give `accelerate launch` the argument --fsdp_version 2."
            )
        plugin.auto_wrap_policy = None
        # It would round weights, gradients and losses: see `autocast`.
        plugin.mixed_precision_policy = None
        # Logits are a view, and nothing writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)

    def _to_train(self) -> nn.Module:
        return _Hidden(self._copy())

    def clip(self) -> Tensor | None:
        """As `Steps.clip`, of all shares."""
        return _gathered(super().clip())

    def step(self) -> Tensor | None:
        """As `Steps.step`, and bring it into the whole model."""
        super().step()
        _update(self.model, self.trained.captioner, DTensor.full_tensor)
        return None

    def state(self) -> Any:
        """As `Steps.state`: the format of one process."""
        return _gathered(super().state())

    def load_state(self, state: Any) -> None:
        """As `Steps.load_state`: each tensor is shared out as its parameter is."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def deal_out(value: Any, parameter: Tensor) -> Any:
            if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
                return value
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

        dealt_out = {
            index: {name: deal_out(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        super().load_state({**state, "state": dealt_out})


def _gathered(values: Any) -> Any:
    """Tensors whole on every process; all have to ask."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), values)


class DeepSpeedSteps(Steps):
    """Steps of processes that share out the optimizer's state, and gradients, by DeepSpeed's ZeRO (stages 1 and 2).

    Accelerate has DeepSpeed step as soon as a gradient is there. Here it steps when the loss is known to be a number.
    """

    @staticmethod
    def configure(accelerator: Accelerator) -> None:
        """Fill in what DeepSpeed asks for and has no bearing here.

        Raises:
            ValueError: another stage of ZeRO, or float16.
        """
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        stage = config["zero_optimization"]["stage"]
        if stage not in (1, 2):
            raise ValueError(
                f"Accelerate is configured for stage {stage} of DeepSpeed's ZeRO; choose 1 or 2 (--zero_stage 2). "
                "Stage 0 shares out nothing, as without DeepSpeed, and a captioner's weights are too few for stage 3."
            )
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"Accelerate is configured for DeepSpeed with mixed_precision {accelerator.mixed_precision!r}: "
                "it would round the weights themselves. Choose 'bf16' or 'no', or FSDP, which rounds products alone."
            )
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps

    def _to_train(self) -> nn.Module:
        return self._copy()

    def autocast(self) -> AbstractContextManager[None]:
        """As `Steps.autocast`, which Accelerate leaves to DeepSpeed."""
        is_half = self.accelerator.mixed_precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=is_half)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """As `Steps.prepare`, and clip gradients at the same length."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_clipping"] = self.max_grad_norm
        precision = config.get("bf16", {"enabled": False})
        config["bf16"] = {"enabled": False}  # it would round weights and gradients: see `autocast`
        super().prepare(optimizer)
        config["bf16"] = precision

    def backward(self, loss: Tensor) -> None:
        """As `Steps.backward`, without the step that Accelerate has follow."""
        engine: Any = self.wrapped
        engine.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        engine.backward(loss)

    def clip(self) -> Tensor | None:
        """Nothing: DeepSpeed does it with the step."""
        return None

    def step(self) -> Tensor | None:
        """As `Steps.step`, and bring it into the whole model."""
        engine: Any = self.wrapped
        engine.step()
        super().step()  # which does nothing more, but the learning rate's schedule asks for it
        _update(self.model, self.trained, torch.detach)
        return engine.get_global_grad_norm()

    def state(self) -> Any:
        """The shares of all processes, in order."""
        return gather_object([self._share.state_dict()])

    def load_state(self, state: Any) -> None:
        """Go on where `state` was, with as many processes."""
        self._share.load_state_dict(state[self.accelerator.process_index])

    @property
    def _share(self) -> torch.optim.Optimizer:
        """This process's, of numbers in a row."""
        return self.optimizer.optimizer.optimizer  # type: ignore[attr-defined]


class MegatronSteps(Steps):
    """None: Megatron-LM builds the models that it trains."""

    @staticmethod
    def configure(accelerator: Accelerator) -> None:
        """Refuse it.

        Raises:
            ValueError: always.
        """
        raise ValueError("Accelerate is configured for Megatron-LM, which trains its own models only; choose another.")


STEPS: dict[DistributedType, type[Steps]] = {
    DistributedType.FSDP: FsdpSteps,
    DistributedType.DEEPSPEED: DeepSpeedSteps,
    DistributedType.MEGATRON_LM: MegatronSteps,
}


def steps_of(accelerator: Accelerator) -> type[Steps]:
    """How these processes take steps."""
    return STEPS.get(accelerator.distributed_type, Steps)
