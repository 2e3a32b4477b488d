"""The training loop: stages, epochs and optimizer steps, with a state that can be saved after any step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..data.loading import Batch, StepLoader, is_worker_death
from ..interruption import Interruption
from ..model.modeling_captioner import CaptionerModel
from ..model.objectives import IGNORED
from .accelerator import raise_everywhere
from .checkpoints import Checkpoint, Checkpoints, random_state, restore_random_state
from .stages import Optimization, Stage

logger = logging.getLogger(__name__)

DIGEST = "digest of "  # start of the names of those settings that are digests of the data
HOW_TO_RESUME = "Go on with the same command and --resume."


@dataclass
class EpochTotals:
    """Metric, captions and seconds of an epoch, summed over its steps so far, and the last step's learning rate."""

    metric: float = 0.0
    num_captions: float = 0.0
    seconds: float = 0.0
    learning_rate: float = 0.0


@dataclass
class Progress:
    """Position of a run, with its scores so far.

    Args:
        stage: Index of the current stage; the number of stages when the run is over.
        epoch: Index of the current epoch within its stage.
        step: Number of optimizer steps done in the current epoch.
        totals: Totals over these steps.
        best_score: Best score of all epochs so far.
        epochs_since_best: Number of epochs of the current stage since the best score.
        log: One record per epoch.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    totals: EpochTotals = field(default_factory=EpochTotals)
    best_score: float = -1.0
    epochs_since_best: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the progress as plain values for a checkpoint."""
        values = {**asdict(self), "totals": _rename(asdict(self.totals), NAMES_IN_JSON)}
        return _rename(values, NAMES_IN_JSON)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Progress:
        """Rebuild the progress from the values of `to_json`."""
        names = {old: new for new, old in NAMES_IN_JSON.items()}
        return cls(**_rename({**saved, "totals": EpochTotals(**_rename(saved["totals"], names))}, names))


# Names in the JSON of checkpoints, whose format is that of version 0.1.0, where they differ from those above.
NAMES_IN_JSON = {"epochs_since_best": "without_better", "metric": "figure", "num_captions": "captions"}


def _rename(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


@dataclass
class PreparedStage:
    """The captioner as Accelerate wraps it for the current stage, its optimizer and its learning-rate scheduler."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


class Run:
    """A captioner in training: its weights, their running average, the optimizer and the progress.

        while run.stage is not None:
            run.start_stage(best_weights)
            while run.has_epochs_left:
                run.train_epoch(loader)
                is_best = run.end_epoch(scores, score)
            run.end_stage()

    `restore` continues a saved run at any point of this loop.

    Args:
        model: Captioner on its device, not wrapped by Accelerate.
        stages: Stages in their order.
        accelerator: Accelerator of all processes.
        num_steps: Number of optimizer steps per epoch.
        optimization: Settings of the optimizer.
        checkpoints: Folder of checkpoints; None to save none.
        checkpoint_minutes: Minutes between two checkpoints within an epoch.
        settings: Settings that must be the same when the run is resumed; saved in each checkpoint.
        interruption: Source of requests to stop.
    """

    def __init__(
        self,
        model: CaptionerModel,
        stages: Sequence[Stage],
        accelerator: Accelerator,
        *,
        num_steps: int,
        optimization: Optimization,
        checkpoints: Checkpoints | None = None,
        checkpoint_minutes: float = 10.0,
        settings: dict[str, Any] | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.model, self.stages, self.accelerator = model, stages, accelerator
        self.num_steps, self.optimization = num_steps, optimization
        self.checkpoints, self.checkpoint_minutes = checkpoints, checkpoint_minutes
        self.settings = settings or {}
        self.interruption = interruption or Interruption()
        self.average = weight_average(model, optimization.ema_decay)
        self.progress = Progress()
        self.prepared: PreparedStage | None = None
        self._saved_at = time.monotonic()

    @property
    def stage(self) -> Stage | None:
        """The current stage; None when all stages are over."""
        return self.stages[self.progress.stage] if self.progress.stage < len(self.stages) else None

    @property
    def has_epochs_left(self) -> bool:
        """Whether the current stage has epochs left and its scores still improve."""
        assert self.stage is not None
        improves = self.progress.epochs_since_best < self.optimization.patience
        return self.progress.epoch < self.stage.epochs and improves

    @property
    def is_under_way(self) -> bool:
        """Whether the current stage has been started."""
        return self.prepared is not None

    @property
    def validated_model(self) -> CaptionerModel:
        """The model that is validated and saved: the running average of the weights, if there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def start_stage(self, weights: dict[str, Tensor] | None = None) -> None:
        """Start the current stage and save a checkpoint. Collective: call it on every process.

        Args:
            weights: State dict to start from; None to go on from the current weights.
        """
        if weights is not None:
            self.model.load_state_dict(weights)
            self.validated_model.load_state_dict(weights)
        self._prepare_stage()
        self.save()

    def _prepare_stage(self) -> None:
        """Freeze or unfreeze the encoder, and build the optimizer and the scheduler of the current stage."""
        assert self.stage is not None
        settings, encoder = self.optimization, self.stage.encoder
        groups: list[dict[str, Any]] = [{"params": self.model.decoder_parameters(), "lr": self.stage.learning_rate}]
        if encoder is None:
            self.model.freeze_encoder()
        else:
            self.model.unfreeze_encoder(from_stage=encoder.from_stage, freeze_batch_norm=encoder.freeze_batch_norm)
            trained = [parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad]
            groups.append({"params": trained, "lr": encoder.learning_rate})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True)
        model, optimizer = self.accelerator.prepare(self.model, optimizer)
        num_steps = self.stage.epochs * self.num_steps
        scheduler = get_scheduler(settings.schedule, optimizer, int(settings.warmup * num_steps), num_steps)
        self.prepared = PreparedStage(model, optimizer, scheduler)

    def end_stage(self) -> None:
        """End the current stage; after the last one, save a checkpoint. Collective: call it on every process."""
        assert self.prepared is not None
        self.accelerator.unwrap_model(self.prepared.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.prepared = None
        self.progress.stage += 1
        self.progress.epoch = self.progress.step = self.progress.epochs_since_best = 0
        if self.stage is None:
            self.save()

    def train_epoch(self, loader: StepLoader) -> None:
        """Train for the rest of the current epoch, with a progress bar.

        A checkpoint is saved at the end of the epoch, every `checkpoint_minutes`, and when the run is interrupted.

        Raises:
            Interrupted: A signal arrived; the state is saved.
            FloatingPointError: The loss or the gradient is not finite.
            ChildProcessError: A data loader worker died.
        """
        assert self.stage is not None
        progress, metric = self.progress, self.stage.objective.metric
        bar = tqdm(
            initial=progress.step,
            total=self.num_steps,
            desc=f"{self.stage.name} {progress.epoch + 1}/{self.stage.epochs}",
            unit="step",
            disable=None if self.accelerator.is_local_main_process else True,  # None: off unless on a terminal
        )
        with bar, self.interruption.deferred(), _explain_dead_workers():
            started, seconds_before = time.monotonic(), progress.totals.seconds
            for batches in loader.steps(progress.epoch, progress.step):
                self._train_step(batches)
                progress.totals.seconds = seconds_before + time.monotonic() - started
                values = self.epoch_metrics()
                bar.set_postfix_str(
                    f"{metric} {values[metric]:.3f}, {values['captions_per_second']:.0f} captions/s, "
                    f"lr {values['learning_rate']:.1e}",
                    refresh=False,
                )
                bar.update()
                self._save_or_stop()

    def _train_step(self, batches: Sequence[Batch]) -> None:
        """Take one optimizer step on the batches of this process, one per step of gradient accumulation."""
        assert self.stage is not None and self.prepared is not None
        optimizer, progress = self.prepared.optimizer, self.progress
        num_steps_done = progress.epoch * self.num_steps + progress.step
        with self.accelerator.autocast():  # captions are sampled in the precision of training
            fraction = num_steps_done / (self.stage.epochs * self.num_steps)
            batches = [self.stage.objective.prepare(batch, fraction) for batch in batches]
        num_words, num_captions = self._count(batches)
        loss, metric = self._accumulate_gradients(batches, num_words, num_captions)
        grad_norm = self.accelerator.clip_grad_norm_(self.prepared.model.parameters(), self.optimization.max_grad_norm)
        self._refuse_unless_finite(loss, grad_norm)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        self.prepared.scheduler.step()
        if self.average is not None:
            self.average.update(self.model, step=num_steps_done + 1)
        progress.step += 1
        progress.totals.metric += metric
        progress.totals.num_captions += num_captions
        progress.totals.learning_rate = learning_rate

    def _count(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """Count the words and the captions of an optimizer step, over all processes."""
        words = [batch["labels"] != IGNORED for batch in batches]  # (B, K, T)
        num_words, num_captions = self._sum(sum(w.sum() for w in words), sum(w.any(2).sum() for w in words))
        return int(num_words), int(num_captions)

    def _accumulate_gradients(self, batches: Sequence[Batch], num_words: int, num_captions: int) -> tuple[float, float]:
        """Add up the gradients of an optimizer step, and return its loss and its metric, over all processes."""
        assert self.stage is not None and self.prepared is not None
        contributions: list[Tensor] = []
        for batch in batches:
            with self.accelerator.accumulate(self.prepared.model):
                contribution = self.stage.objective.loss(
                    self.prepared.model, batch, max(num_words, 1), max(num_captions, 1)
                )
                # Accelerate averages gradients over batches and processes. Here they are meant to add up.
                self.accelerator.backward(contribution[0] * len(batches) * self.accelerator.num_processes)
            contributions.append(torch.stack(contribution).detach())
        loss, metric = self._sum(*torch.stack(contributions).sum(0))
        return loss, metric

    def _sum(self, *values: Tensor | float) -> list[float]:
        """Return the sums of values over all processes."""
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        return self.accelerator.reduce(stacked, "sum").tolist()

    def _any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any process."""
        return [*flags] if self.accelerator.num_processes == 1 else [total > 0 for total in self._sum(*flags)]

    def _refuse_unless_finite(self, loss: float, grad_norm: Tensor) -> None:
        """Raise a FloatingPointError if the loss or the gradient is not finite, before the step ruins the weights."""
        assert self.stage is not None
        values = torch.tensor([loss, float(grad_norm)])
        if self.accelerator.scaler is not None:
            values = values[:1]  # With fp16, the gradient scaler skips a step whose gradient overflows.
        if not values.isfinite().all():
            paths = [] if self.checkpoints is None else self.checkpoints.paths()
            saved = f" The last good state is {str(paths[-1])!r}." if paths else ""
            raise FloatingPointError(
                f"The loss is {loss} and the gradient norm {float(grad_norm)} in step {self.progress.step + 1} of "
                f"{self.stage.name} {self.progress.epoch + 1}, which is not saved.{saved} Train with a lower learning "
                "rate, a longer warm-up or mixed_precision 'no', in another output folder."
            )

    def _save_or_stop(self) -> None:
        """Save a checkpoint if one is due or the epoch is over; if a process got a signal, save one and stop."""
        minutes = (time.monotonic() - self._saved_at) / 60
        is_due = self.accelerator.is_main_process and minutes > self.checkpoint_minutes
        must_stop, must_save = self._any(self.interruption.signal_number is not None, is_due)
        if must_stop or must_save or self.progress.step == self.num_steps:
            self.save()
        if must_stop:
            self.interruption.stop()

    def epoch_metrics(self) -> dict[str, float]:
        """Return the mean of the objective's metric, the learning rate, the speed and the time of the epoch so far."""
        assert self.stage is not None
        totals = self.progress.totals
        return {
            self.stage.objective.metric: totals.metric / self.progress.step,
            "learning_rate": totals.learning_rate,
            "captions_per_second": totals.num_captions / totals.seconds,
            "train_seconds": totals.seconds,
        }

    def prepare_to_validate(self) -> None:
        """Copy the main process's buffers to all processes, whose batch norms have seen different images."""
        if self.accelerator.num_processes > 1:
            for buffer in self.validated_model.buffers():
                buffer.copy_(broadcast(buffer))

    def end_epoch(self, scores: dict[str, float], score: float) -> bool:
        """Add the epoch to the log, and note whether it is the best.

        Args:
            scores: Validation scores for the log.
            score: Score by which the best epoch is selected.

        Returns:
            Whether this epoch is the best so far.
        """
        assert self.stage is not None
        progress = self.progress
        is_best = score > progress.best_score
        progress.best_score = max(score, progress.best_score)
        progress.epochs_since_best = 0 if is_best else progress.epochs_since_best + 1
        record = {"epoch": len(progress.log) + 1, "stage": self.stage.name, **self.epoch_metrics(), **scores}
        progress.log.append(record)
        progress.epoch, progress.step, progress.totals = progress.epoch + 1, 0, EpochTotals()
        return is_best

    def save(self) -> None:
        """Save a checkpoint. Collective: call it on every process.

        Raises:
            OSError: The checkpoint can't be written. Raised on all processes.
        """
        if self.checkpoints is None:
            return
        with self.interruption.deferred():
            random_states = gather_object([random_state(self.accelerator.device)])
            with raise_everywhere(self.accelerator):
                if self.accelerator.is_main_process:
                    progress = {**self.progress.to_json(), "is_over": self.stage is None, "facts": self.settings}
                    self.checkpoints.save(self._modules(), self._tensors(random_states), progress)
            self._note_saved()

    def _modules(self) -> dict[str, nn.Module]:
        """Return the modules whose weights a checkpoint holds."""
        return {"model": self.model} if self.average is None else {"model": self.model, "average": self.average.module}

    def _tensors(self, random_states: list[Any]) -> dict[str, Any]:
        """Return the states of the random generators of all processes, of the optimizer and of the scheduler."""
        tensors: dict[str, Any] = {"random": random_states}
        if self.prepared is not None:
            tensors["optimizer"] = self.prepared.optimizer.state_dict()
            tensors["scheduler"] = self.prepared.scheduler.state_dict()
            tensors["scaler"] = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a saved run, so that it continues exactly there. Collective: call it on every process.

        Raises:
            ValueError: The settings or the data of the saved run are different, or the checkpoint is damaged.
        """
        refuse_other_settings(checkpoint.settings, self.settings)
        with checkpoint.explain_damage():
            saved = {name: checkpoint.progress[name] for name in Progress().to_json()}
            self.progress = Progress.from_json(saved)
            for name, module in self._modules().items():
                checkpoint.load_weights(name, module)
            tensors = checkpoint.tensors()
            if self.stage is not None:
                self._prepare_stage()
                assert self.prepared is not None
                self.prepared.optimizer.load_state_dict(tensors["optimizer"])
                self.prepared.scheduler.load_state_dict(tensors["scheduler"])
                if tensors["scaler"]:
                    self.accelerator.scaler.load_state_dict(tensors["scaler"])
            restore_random_state(tensors["random"][self.accelerator.process_index], self.accelerator.device)
        self._note_saved()

    def _note_saved(self) -> None:
        """Record that the current state is on the disk, and when it was saved."""
        self.interruption.message = f"The state is saved. {HOW_TO_RESUME}"
        self._saved_at = time.monotonic()


def refuse_other_settings(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise a ValueError that names the settings, and the parts of the data, in which two runs differ.

    Args:
        saved: Settings of the saved run. Without digests of its data, which version 0.1.0 did not save, a warning says
            that the data can't be compared.
        given: Settings of the present run.
    """
    if not any(name.startswith(DIGEST) for name in saved):
        logger.warning("The checkpoint does not tell its data: make sure that images and captions are still the same.")
        given = {name: value for name, value in given.items() if not name.startswith(DIGEST)}
    different = [
        f"{name.removeprefix(DIGEST)} have changed"
        if name.startswith(DIGEST)
        else f"{name} was {saved.get(name)!r} and is now {given.get(name)!r}"
        for name in (given | saved)
        if saved.get(name) != given.get(name)
    ]
    if different:
        raise ValueError(
            f"The run can't be resumed exactly: {'; '.join(different)}. Give the original settings and data, or train "
            "anew in another output folder."
        )


def weight_average(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """Build the running average of a model's weights; None for a decay of 0.

    The average spans a fifth of the steps done so far, until `decay` limits it.

    Raises:
        ValueError: The decay is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay is {decay}; it must be at least 0 and below 1, such as 0.999.")
    if not decay:
        return None
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=5.0, warmup_power=1.0)


@contextmanager
def _explain_dead_workers() -> Iterator[None]:
    """Turn torch's RuntimeError about a dead data loader worker into a ChildProcessError that says what to do."""
    try:
        yield
    except RuntimeError as e:
        if not is_worker_death(e):
            raise
        raise ChildProcessError(
            f"A process that reads images died: {' '.join(str(e).split())} Mostly memory has run out: lower "
            f"num_workers. {HOW_TO_RESUME}"
        ) from e
