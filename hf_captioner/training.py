"""Stages of a training: what their steps minimise, and one pass over the images."""

# B: images, S: captions sampled for an image, T: words

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .modeling_captioner import CaptionerModel
from .objectives import others_mean, self_critical
from .processing_captioner import CaptionerProcessor
from .rewards import CaptionReward, sample_captions

Batch = dict[str, Tensor]
# From the model, wrapped for distribution, and a batch of `CaptionCollator` with `index`: the loss, and what is shown.
Step = Callable[[nn.Module, Batch], tuple[Tensor, float]]


@dataclass(frozen=True)
class Stage:
    """A part of a training with an objective of its own.

    Args:
        name: for the progress bar and the log.
        epochs: passes over the training images.
        learning_rate: the highest.
        figure: name of what is shown of each step.
        step: gives the loss of a batch and that figure.
    """

    name: str
    epochs: int
    learning_rate: float
    figure: str
    step: Step


def likelihood(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """The model's own loss on people's captions."""
    loss = model(**{name: tensor for name, tensor in batch.items() if name != "index"}).loss
    return loss, loss.item()


class Rewards:
    """Captions that the model draws, held against people's (self-critical, Rennie et al. 2017; Luo 2020).

    Captions are drawn without dropout, so their gradient is taken without dropout too.

    Args:
        captioner: the model, not wrapped for distribution.
        processor: its processor.
        reward: of captions of the training split.
        num_samples: S, captions drawn for each image; the others' mean reward is each one's baseline.
        top_k: words to draw from each time, see `sample_captions`.
        max_length: longest caption drawn, `<start>` and `<end>` included.

    Raises:
        ValueError: a single sample, which has no others.
    """

    def __init__(
        self,
        captioner: CaptionerModel,
        processor: CaptionerProcessor,
        reward: CaptionReward,
        *,
        num_samples: int,
        top_k: int,
        max_length: int,
    ) -> None:
        if num_samples < 2:
            raise ValueError(
                f"reward_samples is {num_samples}; it must be at least 2: each has the others for baseline."
            )
        self.captioner, self.processor, self.reward = captioner, processor, reward
        self.settings: dict[str, Any] = {"num_samples": num_samples, "top_k": top_k, "max_length": max_length}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        """The loss of a batch and the mean reward."""
        model.eval()
        inputs: dict[str, Any] = {name: batch[name] for name in ("pixel_values", "cells") if name in batch}
        labels = sample_captions(self.captioner, **self.settings, **inputs)  # (B, S, T)
        tokenizer = self.processor.tokenizer
        captions = [self.processor.batch_decode(row) for row in labels.clamp(min=tokenizer.pad_token_id)]
        ended = (labels == tokenizer.eos_token_id).any(2)
        rewards = self.reward(batch["index"].tolist(), captions, ended).to(labels.device)  # (B, S)
        logits = model(labels=labels, **inputs).logits  # (B, S, T, V)
        advantages = rewards - others_mean(rewards)
        loss = self_critical(logits.flatten(0, 1), labels.flatten(0, 1), advantages.flatten())
        return loss, rewards.mean().item()


def weight_average(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """Running average of the weights that spans a fifth of the steps done until `decay` limits it; None for 0.

    Raises:
        ValueError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay is {decay}; it must be at least 0 and below 1, such as 0.999.")
    if not decay:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=5.0, warmup_power=1.0)


def train_epoch(
    stage: Stage,
    epoch: int,
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    *,
    average: ModelEmaV3 | None = None,
    max_grad_norm: float = 5.0,
) -> dict[str, float]:
    """One pass over the training images, with a progress bar.

    Args:
        stage: what to do.
        epoch: of the stage, from 0.
        model: prepared by Accelerate, as are the loader and the optimizer.
        loader: gives batches.
        optimizer: of the model's parameters.
        scheduler: stepped after every batch.
        accelerator: of all these.
        average: of the weights, updated after every batch.
        max_grad_norm: longer gradients are scaled down.

    Returns:
        Mean of the stage's figure, the last learning rate, the rate and the seconds.
    """
    model.train()
    started, total, num_captions = time.monotonic(), 0.0, 0
    bar = tqdm(
        loader,
        desc=f"{stage.name} {epoch + 1}/{stage.epochs}",
        unit="batch",
        disable=not accelerator.is_local_main_process,
    )
    for step, batch in enumerate(bar, start=1):
        loss, figure = stage.step(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(accelerator.unwrap_model(model), step=epoch * len(loader) + step)
        total += figure
        num_captions += batch["labels"].shape[:2].numel() * accelerator.num_processes
        seconds = time.monotonic() - started
        bar.set_postfix_str(
            f"{stage.figure} {total / step:.3f}, {num_captions / seconds:.0f} captions/s, lr {learning_rate:.1e}",
            refresh=False,
        )
    return {
        stage.figure: total / step,
        "learning_rate": learning_rate,
        "captions_per_second": num_captions / seconds,
        "train_seconds": seconds,
    }
