"""A training as an object whose state can be saved at any step: how stages, epochs and steps follow each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..data.loading import Batch, StepLoader, is_death_of_reader
from ..interruption import Interruption
from ..model.modeling_captioner import CaptionerModel
from ..model.objectives import IGNORED
from .checkpoints import Checkpoint, Checkpoints, random_state, restore_random_state
from .stages import Optimization, Stage
from .steps import Steps, steps_of

TO_GO_ON = "Go on with the same command and --resume."


@dataclass
class Progress:
    """How far a run is; plain values.

    Args:
        stage: number of the stage; that of stages when the run is over.
        epoch: of the stage, from 0.
        step: steps of the epoch that are done.
        totals: over these steps.
        best_score: of all epochs so far.
        without_better: epochs of the stage since.
        log: a record an epoch.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    best_score: float = -1.0
    without_better: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A model in training: its weights, their average, the optimizer and how far it all is.

        while run.stage is not None:
            run.start_stage(best)
            while run.epochs_left:
                run.train_epoch(loader)
                is_best = run.end_epoch(scores, score)
            run.end_stage()

    `restore` puts a run where a saved one was, in the middle of any of these.

    Args:
        model: on its device, not wrapped for distribution.
        stages: in order.
        accelerator: of the processes.
        num_steps: of an epoch.
        optimization: how steps are taken.
        checkpoints: where the state goes; None to save none.
        minutes: between two states within an epoch.
        facts: what must be the same when the run goes on; saved with each state.
        interruption: asks to stop.
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
        minutes: float = 10.0,
        facts: dict[str, Any] | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.model, self.stages, self.accelerator = model, stages, accelerator
        self.num_steps, self.optimization = num_steps, optimization
        self.checkpoints, self.minutes, self.facts = checkpoints, minutes, facts or {}
        self.interruption = interruption or Interruption()
        self.average = weight_average(model, optimization.ema_decay)
        self.progress = Progress()
        self.steps: Steps | None = None
        self._saved_at = time.monotonic()

    @property
    def stage(self) -> Stage | None:
        """The stage under way; None when all are over."""
        return self.stages[self.progress.stage] if self.progress.stage < len(self.stages) else None

    @property
    def epochs_left(self) -> bool:
        """Whether the stage goes on."""
        assert self.stage is not None
        return self.progress.epoch < self.stage.epochs and self.progress.without_better < self.optimization.patience

    @property
    def is_under_way(self) -> bool:
        """Whether the stage has started."""
        return self.steps is not None

    @property
    def kept(self) -> CaptionerModel:
        """The model that is validated and kept: the average, where there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    def start_stage(self, weights: dict[str, Tensor] | None = None) -> None:
        """Begin the stage, from other weights if they are given."""
        if weights is not None:
            self.model.load_state_dict(weights)
            self.kept.load_state_dict(weights)
        self._build_stage()
        self.save()

    def _build_stage(self) -> None:
        assert self.stage is not None
        settings, encoder = self.optimization, self.stage.encoder
        if encoder is None:
            self.model.freeze_encoder()
        else:
            self.model.unfreeze_encoder(from_stage=encoder.from_stage, freeze_batch_norm=encoder.freeze_batch_norm)
        self.steps = steps_of(self.accelerator)(self.model, self.accelerator, settings.max_grad_norm)
        decoder, trained_encoder = self.steps.trained.decoder, self.steps.trained.encoder
        groups: list[dict[str, Any]] = [{"params": [*decoder.parameters()], "lr": self.stage.learning_rate}]
        if encoder is not None:
            parameters = [parameter for parameter in trained_encoder.parameters() if parameter.requires_grad]
            groups.append({"params": parameters, "lr": encoder.learning_rate})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True)
        self.steps.prepare(optimizer)
        num_steps = self.stage.epochs * self.num_steps
        num_warmup_steps = int(settings.warmup * num_steps)
        self.scheduler = get_scheduler(settings.schedule, self.steps.optimizer, num_warmup_steps, num_steps)

    def end_stage(self) -> None:
        """Go on to the next stage."""
        assert self.steps is not None
        self.steps.end()
        del self.scheduler
        self.steps = None
        self.progress.stage += 1
        self.progress.epoch = self.progress.step = self.progress.without_better = 0

    def train_epoch(self, loader: StepLoader) -> None:
        """Do what is left of the epoch, with a progress bar. The state is saved at its end, and whenever it is time.

        Raises:
            Interrupted: somebody asked to stop; the state is saved.
            FloatingPointError: the loss is not a number.
            ChildProcessError: a process that reads images died.
        """
        assert self.stage is not None
        progress, figure = self.progress, self.stage.objective.figure
        bar = tqdm(
            initial=progress.step,
            total=self.num_steps,
            desc=f"{self.stage.name} {progress.epoch + 1}/{self.stage.epochs}",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        with bar, self.interruption.deferred(), _readers_that_die():
            started, before = time.monotonic(), progress.totals.get("seconds", 0.0)
            for batches in loader.steps(progress.epoch, progress.step):
                must_stop, must_save = self._step(batches)
                progress.totals["seconds"] = before + time.monotonic() - started
                figures = self.figures()
                bar.set_postfix_str(
                    f"{figure} {figures[figure]:.3f}, {figures['captions_per_second']:.0f} captions/s, "
                    f"lr {figures['learning_rate']:.1e}",
                    refresh=False,
                )
                bar.update()
                if must_stop or must_save or progress.step == self.num_steps:
                    self.save()
                if must_stop:
                    self.interruption.stop()

    def _step(self, batches: Sequence[Batch]) -> tuple[bool, bool]:
        """One step of the optimizer; whether the processes are to stop after it, and to save."""
        assert self.stage is not None and self.steps is not None
        objective, accelerator, progress, steps = self.stage.objective, self.accelerator, self.progress, self.steps
        share = (progress.epoch * self.num_steps + progress.step) / (self.stage.epochs * self.num_steps)
        with steps.autocast():  # what a model draws is drawn in the precision in which it is trained
            batches = [objective.prepare(batch, share) for batch in batches]
        words = [batch["labels"] != IGNORED for batch in batches]  # (B, K, T)
        num_items_in_batch, num_captions = self._sum(sum(w.sum() for w in words), sum(w.any(2).sum() for w in words))
        parts: list[Tensor] = []
        for batch in batches:
            with accelerator.accumulate(steps.wrapped):
                part = objective.loss(steps.wrapped, batch, max(int(num_items_in_batch), 1), max(int(num_captions), 1))
                # The mean over batches and processes is taken of gradients: here they add up.
                steps.backward(part[0] * len(batches) * accelerator.num_processes)
            parts.append(torch.stack(part).detach())
        length = steps.clip()
        is_due = accelerator.is_main_process and time.monotonic() - self._saved_at > self.minutes * 60
        is_asked = self.interruption.asked is not None
        loss, figure, must_stop, must_save = self._sum(*torch.stack(parts).sum(0), is_asked, is_due)
        self._refuse_unless_finite(loss, length)
        learning_rate = steps.optimizer.param_groups[0]["lr"]
        self._refuse_unless_finite(loss, steps.step())
        self.scheduler.step()
        progress.step += 1
        if self.average is not None:
            self.average.update(self.model, step=progress.epoch * self.num_steps + progress.step)
        totals = progress.totals
        totals["figure"] = totals.get("figure", 0.0) + figure
        totals["captions"] = totals.get("captions", 0.0) + num_captions
        totals["learning_rate"] = learning_rate
        return bool(must_stop), bool(must_save)

    def _sum(self, *values: Tensor | float) -> list[float]:
        """Sums over all processes."""
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        return self.accelerator.reduce(stacked, "sum").tolist()

    def _refuse_unless_finite(self, loss: float, length: Tensor | None) -> None:
        # In half precision the optimizer leaves out steps whose gradient overflows, and scales the next ones less.
        checked = [loss] if length is None or self.accelerator.scaler is not None else [loss, float(length)]
        if not all(value - value == 0 for value in checked):
            place = f"step {self.progress.step + 1} of {self.stage.name} {self.progress.epoch + 1}"  # type: ignore[union-attr]
            path = self.checkpoints.paths()[-1:] if self.checkpoints is not None else []
            kept = f" The last good state is {str(path[0])!r}." if path else ""
            raise FloatingPointError(
                f"The loss is {loss} and the gradient's length {checked[-1]} at {place}, which is not saved.{kept} "
                "Train with a lower learning rate, a longer warm-up or mixed_precision 'no', in another output folder."
            )

    def figures(self) -> dict[str, float]:
        """Of the steps of the epoch done so far: mean of the objective's figure, learning rate, rate and seconds."""
        assert self.stage is not None
        totals = self.progress.totals
        return {
            self.stage.objective.figure: totals["figure"] / self.progress.step,
            "learning_rate": totals["learning_rate"],
            "captions_per_second": totals["captions"] / totals["seconds"],
            "train_seconds": totals["seconds"],
        }

    def prepare_to_validate(self) -> None:
        """Let all processes validate the same: what a batch norm has seen differs from one to the other."""
        if self.accelerator.num_processes > 1:
            for buffer in self.kept.buffers():
                buffer.copy_(broadcast(buffer))

    def end_epoch(self, scores: dict[str, float], score: float) -> bool:
        """Enter the epoch in the log.

        Args:
            scores: what else to write in the log.
            score: by which the best epoch is chosen.

        Returns:
            Whether this is the best so far.
        """
        assert self.stage is not None
        progress = self.progress
        is_best = score > progress.best_score
        progress.best_score = max(score, progress.best_score)
        progress.without_better = 0 if is_best else progress.without_better + 1
        progress.log.append(
            {"epoch": len(progress.log) + 1, "stage": self.stage.name, **self.figures(), **scores}
        )  # fmt: skip
        progress.epoch, progress.step, progress.totals = progress.epoch + 1, 0, {}
        return is_best

    def save(self) -> None:
        """Save the state, by the main process, with the random generators of all.

        Raises:
            OSError: it can't be written; raised on all processes.
        """
        if self.checkpoints is None:
            return
        accelerator = self.accelerator
        with self.interruption.deferred():
            states = gather_object([random_state(accelerator.device)])
            optimizer = None if self.steps is None else self.steps.state()
            problem: list[Any] = [None]
            if accelerator.is_main_process:
                weights: dict[str, nn.Module] = {"model": self.model}
                tensors: dict[str, Any] = {"random": states}
                if self.average is not None:
                    weights["average"] = self.average.module
                if self.stage is not None:
                    tensors["optimizer"] = optimizer
                    tensors["scheduler"] = self.scheduler.state_dict()
                    tensors["scaler"] = accelerator.scaler and accelerator.scaler.state_dict()
                try:
                    self.checkpoints.save(weights, tensors, self._plain_values())
                except OSError as e:
                    problem = [e]
            if accelerator.num_processes > 1:
                problem = broadcast_object_list(problem)
            if problem[0] is not None:
                raise problem[0]
            self.interruption.message = f"The state is saved. {TO_GO_ON}"
            self._saved_at = time.monotonic()

    def _plain_values(self) -> dict[str, Any]:
        return {**asdict(self.progress), "is_over": self.stage is None, "facts": self.facts}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a saved run was.

        Raises:
            ValueError: it was a run of other facts than this one.
        """
        saved = dict(checkpoint.progress)
        refuse_other_facts(saved.pop("facts"), self.facts)
        del saved["is_over"]
        self.progress = Progress(**saved)
        checkpoint.load_weights("model", self.model)
        if self.average is not None:
            checkpoint.load_weights("average", self.average.module)
        tensors = checkpoint.tensors()
        if self.stage is not None:
            self._build_stage()
            assert self.steps is not None
            self.steps.load_state(tensors["optimizer"])
            self.scheduler.load_state_dict(tensors["scheduler"])
            if tensors["scaler"]:
                self.accelerator.scaler.load_state_dict(tensors["scaler"])
        restore_random_state(tensors["random"][self.accelerator.process_index], self.accelerator.device)
        self.interruption.message = f"The state is saved. {TO_GO_ON}"
        self._saved_at = time.monotonic()


def refuse_other_facts(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise a ValueError that names what differs."""
    different = [
        f"{name} was {saved.get(name)!r} and is now {given.get(name)!r}"
        for name in (given | saved)
        if saved.get(name) != given.get(name)
    ]
    if different:
        raise ValueError(
            f"The run can't go on exactly: {'; '.join(different)}. Give what it began with, or train anew in another "
            "output folder."
        )


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


@contextmanager
def _readers_that_die() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        if not is_death_of_reader(e):
            raise
        raise ChildProcessError(
            f"A process that reads images died: {' '.join(str(e).split())} Mostly memory has run out: lower "
            f"num_workers. {TO_GO_ON}"
        ) from e
