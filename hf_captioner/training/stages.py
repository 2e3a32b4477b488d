"""The stages of a training: the objective of each, and how the encoder and decoder are trained in it."""

# B: images, K: captions of an image, T: words

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..data.loading import Batch
from ..model.objectives import sampling_probability


class Objective(Protocol):
    """The quantity that a stage minimises; `metric` is the name of the value that progress bar and log show for it."""

    metric: str

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Prepare a batch of `CaptionCollator` for `loss`, without gradients.

        Args:
            batch: Batch of `CaptionCollator`.
            progress: Fraction of the stage's optimizer steps that are done, in [0, 1).

        Returns:
            The batch with the `labels` to train on, `(B, K, T)`, -100 after the end of a caption.
        """

    def loss(self, model: nn.Module, batch: Batch, num_items_in_batch: int, num_captions: int) -> tuple[Tensor, Tensor]:
        """Compute the contributions of a prepared batch to the loss and to the metric of its optimizer step.

        The contributions of all batches of the step, on all processes, add up to its loss and its metric.

        Args:
            model: The captioner as Accelerate wraps it.
            batch: Batch that `prepare` returned.
            num_items_in_batch: Number of words in the whole step, `<end>` included.
            num_captions: Number of captions in the whole step.
        """


class Likelihood:
    """Objective: the model's own loss on the reference captions.

    Args:
        sampling: Highest probability in [0, 1) of reading a word sampled from the model instead of the reference's
            (scheduled sampling, Bengio et al. 2015).
        course: How that probability rises, see `objectives.sampling_probability`.

    Raises:
        ValueError: The probability is outside [0, 1).
    """

    metric = "loss"

    def __init__(self, sampling: float = 0.0, course: str = "linear") -> None:
        if not 0 <= sampling < 1:
            raise ValueError(f"scheduled_sampling is {sampling}; it must be at least 0 and below 1, such as 0.25.")
        self.sampling, self.course = sampling, course

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Return the model's arguments: the batch without `index`, and the probability of sampling."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "index"}
        return {**inputs, "sampling": sampling_probability(progress, self.sampling, self.course)}

    def loss(self, model: nn.Module, batch: Batch, num_items_in_batch: int, num_captions: int) -> tuple[Tensor, Tensor]:
        """Compute the batch's contribution to the loss, and to the logged metric; here both are the loss."""
        model.train()
        loss = model(**batch, num_items_in_batch=num_items_in_batch, num_captions=num_captions).loss
        return loss, loss.detach()


@dataclass(frozen=True)
class EncoderTraining:
    """Settings by which a stage trains the encoder.

    Args:
        learning_rate: Highest learning rate of the encoder.
        from_stage: First of the encoder's own stages that is trained; 0 is the stem.
        freeze_batch_norm: Keep the encoder's batch norms as they are.
    """

    learning_rate: float
    from_stage: int = 0
    freeze_batch_norm: bool = True


@dataclass(frozen=True)
class Stage:
    """A number of epochs with one objective and one learning-rate schedule.

    Args:
        name: Name in the progress bar and the log.
        epochs: Passes over the training images.
        learning_rate: Highest learning rate of the decoder.
        objective: Objective that the stage minimises.
        encoder: Settings of the encoder's training; None to freeze the encoder.
    """

    name: str
    epochs: int
    learning_rate: float
    objective: Objective
    encoder: EncoderTraining | None = None


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimizer, the same in all stages.

    Args:
        schedule: Name of the learning-rate schedule, as `transformers.get_scheduler` takes it.
        warmup: Fraction of a stage's steps in which the learning rate rises.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Largest gradient norm; longer gradients are scaled down.
        ema_decay: Decay of the running average of the weights; 0 for no average.
        patience: Number of epochs without a better score after which a stage ends.
    """

    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 5.0
    ema_decay: float = 0.0
    patience: int = 5
