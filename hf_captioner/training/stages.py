"""What a stage of a training is: what its steps minimise, and how they are taken."""

# B: images, K: captions of an image, T: words

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..data.loading import Batch
from ..model.objectives import sampling_probability


class Objective(Protocol):
    """What the steps of a stage minimise; `figure` names what is shown of it."""

    figure: str

    def prepare(self, batch: Batch, share: float) -> Batch:
        """A batch of `data.CaptionCollator` with `labels` `(B, K, T)` to be trained on, -100 after their end.

        `share` of the stage's steps is done.
        """

    def loss(self, model: nn.Module, batch: Batch, num_items_in_batch: int, num_captions: int) -> tuple[Tensor, Tensor]:
        """The part of the loss, and of the figure, that a prepared batch has in a step of so many words and captions.

        The parts of all batches of a step, on all processes, add up to the step's loss and figure.
        """


class Likelihood:
    """The model's own loss on people's captions.

    Args:
        sampling: highest probability in [0, 1) with which words are read that the model draws (Bengio et al. 2015).
        course: of that probability, see `objectives.sampling_probability`.

    Raises:
        ValueError: another probability.
    """

    figure = "loss"

    def __init__(self, sampling: float = 0.0, course: str = "linear") -> None:
        if not 0 <= sampling < 1:
            raise ValueError(f"scheduled_sampling is {sampling}; it must be at least 0 and below 1, such as 0.25.")
        self.sampling, self.course = sampling, course

    def prepare(self, batch: Batch, share: float) -> Batch:
        """The batch as the model takes it."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "index"}
        return {**inputs, "sampling": sampling_probability(share, self.sampling, self.course)}

    def loss(self, model: nn.Module, batch: Batch, num_items_in_batch: int, num_captions: int) -> tuple[Tensor, Tensor]:
        """This batch's part of the loss, twice."""
        model.train()
        loss = model(**batch, num_items_in_batch=num_items_in_batch, num_captions=num_captions).loss
        return loss, loss.detach()


@dataclass(frozen=True)
class EncoderTraining:
    """How a stage trains the encoder.

    Args:
        learning_rate: the highest.
        from_stage: the first of the encoder's stages that is trained; 0 is the stem.
        freeze_batch_norm: keep batch norms as they are.
    """

    learning_rate: float
    from_stage: int = 0
    freeze_batch_norm: bool = True


@dataclass(frozen=True)
class Stage:
    """A part of a training with an objective of its own.

    Args:
        name: for the progress bar and the log.
        epochs: passes over the training images.
        learning_rate: the highest, of the decoder.
        objective: what it minimises.
        encoder: how the encoder is trained; None to freeze it.
    """

    name: str
    epochs: int
    learning_rate: float
    objective: Objective
    encoder: EncoderTraining | None = None


@dataclass(frozen=True)
class Optimization:
    """How steps are taken, in all stages.

    Args:
        schedule: transformers' name of the course of the learning rate.
        warmup: share of a stage's steps in which it rises.
        weight_decay: of AdamW.
        max_grad_norm: longer gradients are scaled down.
        ema_decay: of the running average of the weights; 0 for none.
        patience: epochs without a better score after which a stage ends.
    """

    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 5.0
    ema_decay: float = 0.0
    patience: int = 5
