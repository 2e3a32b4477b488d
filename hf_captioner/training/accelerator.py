"""Accelerate's entry point, set up for what this machine has."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from accelerate import Accelerator

from ..data.loading import num_cores
from .steps import steps_of

Precision = Literal["no", "bf16", "fp16"]


def precision_here(mixed_precision: Precision) -> Precision:
    """`"no"` in the place of `"bf16"` on a processor that would take many times as long for it."""
    has_instructions = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_emulated = not (has_instructions or torch.accelerator.is_available())
    return "no" if mixed_precision == "bf16" and is_emulated else mixed_precision


def build_accelerator(
    mixed_precision: Precision | None = None,
    num_threads: int | None = None,
    gradient_accumulation_steps: int = 1,
    **kwargs: Any,
) -> Accelerator:
    """Accelerate's entry point, set up for what this machine has.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`; by default what `accelerate config` says.
        num_threads: threads of each process on a CPU, by default its share of the cores: `accelerate launch` leaves
            one thread to each process, which leaves most of a machine idle.
        gradient_accumulation_steps: batches that make a step, unless `accelerate launch` is told of others.
        kwargs: further arguments of `Accelerator`.

    Raises:
        ValueError: Accelerate is configured for what a captioner can't be trained with, such as Megatron-LM.
    """
    # Else FSDP has transformers read saved weights on one process only. All of them need the whole.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        # Several processes without an accelerator only find each other if Accelerate is told of the CPU.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        **kwargs,
    )
    steps_of(accelerator).configure(accelerator)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(num_threads or max(1, num_cores() // accelerator.num_processes))
    return accelerator
