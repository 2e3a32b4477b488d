"""The `Accelerator` of a training or an evaluation, set up for the machine that it runs on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from ..data.loading import num_cores
from ..files import only_writer

logger = logging.getLogger(__name__)

Precision = Literal["no", "bf16", "fp16"]


def build_accelerator(
    mixed_precision: Precision | None = None,
    num_threads: int | None = None,
    gradient_accumulation_steps: int = 1,
    **kwargs: Any,
) -> Accelerator:
    """Build an `Accelerator`, set the number of threads on a CPU, and let the main process alone log messages.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`, replaced by `supported_precision`. By default the choice of
            `accelerate config`.
        num_threads: Threads per process on a CPU. By default the cores are divided among the processes: `accelerate
            launch` gives each process a single thread, which leaves most of a machine idle.
        gradient_accumulation_steps: Batches per optimizer step. An argument of `accelerate launch` overrides it.
        kwargs: Further arguments of `Accelerator`.

    Raises:
        ValueError: Accelerate is configured for FSDP, DeepSpeed, Megatron-LM or TPUs.
    """
    precision = None if mixed_precision is None else supported_precision(mixed_precision)
    accelerator = Accelerator(
        # Without an accelerator, several processes only find each other if Accelerate is told to use the CPU.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        **kwargs,
    )
    refuse_sharding(accelerator.distributed_type)
    if not accelerator.is_main_process:
        logging.getLogger("hf_captioner").setLevel(logging.ERROR)
    if precision != mixed_precision:
        logger.warning("This processor has no instructions for bf16. Training in single precision, which is faster.")
    if accelerator.device.type == "cpu":
        torch.set_num_threads(num_threads or max(1, num_cores() // accelerator.num_processes))
    return accelerator


def supported_precision(mixed_precision: Precision) -> Precision:
    """Return the given precision, or `"no"` instead of `"bf16"` on a processor that would have to emulate it."""
    has_instructions = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_emulated = not (has_instructions or torch.accelerator.is_available())
    return "no" if mixed_precision == "bf16" and is_emulated else mixed_precision


def refuse_sharding(distributed_type: DistributedType) -> None:
    """Raise a ValueError unless every process holds the whole model: a single process, or several with DDP."""
    if distributed_type != DistributedType.NO and not distributed_type.value.startswith("MULTI_"):
        raise ValueError(
            f"Accelerate is configured for {distributed_type.value}. Captioners are small and are trained by DDP: "
            "choose multi-GPU or multi-CPU in `accelerate config`, or use transformers' Trainer, which supports "
            "FSDP and DeepSpeed."
        )


@contextmanager
def raise_everywhere(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error of the main process in this block on all processes, as they would wait in vain. Collective."""
    error: list[Exception | None] = [None]
    try:
        yield
    except (OSError, ValueError) as e:
        if not accelerator.is_main_process:
            raise
        error = [e]
    if accelerator.num_processes > 1:
        error = broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]


@contextmanager
def owned_folder(folder: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """Make sure that results can be written to a folder, and that no other run does so in the block. Collective.

    Raises:
        ValueError: Another run writes to the folder.
        OSError: The folder can't be written to.
    """
    with ExitStack() as stack:
        with raise_everywhere(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(only_writer(folder, content="Results"))
        yield
