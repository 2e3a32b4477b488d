"""Which images are read at which step, and what is drawn for each.

All of it follows from the seed, the epoch and the image's number alone: neither the number of processes, nor that of
the readers, nor where a run was interrupted changes what an epoch shows.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Any]  # tensors, and plain values that go to the model with them
Key = tuple[int, int]  # epoch and image
Job = TypeVar("Job")
Result = TypeVar("Result")


def is_death_of_reader(error: RuntimeError) -> bool:
    """Whether torch, or `StepLoader`, says by it that a reader died."""
    return "DataLoader worker" in str(error) and not _is_passed_on(error)


def _is_passed_on(error: Exception) -> bool:
    """Whether it was raised in a reader that lives: torch puts these words before what it passes on."""
    return re.match(r"Caught \w+ in DataLoader worker", str(error)) is not None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(read: Callable[[Job], Result], jobs: Iterable[Job], num_threads: int | None = None) -> Iterator[Result]:
    """`map(read, jobs)`, done by threads that are a few results ahead of whoever asks for them.

    Images are decoded and resized outside of Python's lock, so threads do for reading what processes would, and copy
    nothing. However many jobs there are, no more than one result a thread and one more wait to be asked for.

    Args:
        read: called in a thread.
        jobs: in order.
        num_threads: by default one a core, but 8 at most.
    """
    num_threads = num_threads or min(8, num_cores())
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="read_ahead") as threads:
        try:
            for job in jobs:
                waiting.append(threads.submit(read, job))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class StepSampler(Sampler[list[Key]]):
    """The images of each step, in an order drawn anew each epoch, and this process's share of them.

    All steps are equally large but for one image, so that no image is left out and no step is small; so are the parts
    that a step's images are dealt out in, to processes and to steps of gradient accumulation.

    Args:
        num_images: of the split.
        batch_size: most images in a part.
        seed: of the order.
        num_processes: that share a step.
        process: which of them this is.
        accumulation: parts of a step that a process reads one after the other.

    Raises:
        ValueError: fewer images than parts.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        num_processes: int = 1,
        process: int = 0,
        accumulation: int = 1,
    ) -> None:
        self.num_images, self.seed = num_images, seed
        self.num_processes, self.process, self.accumulation = num_processes, process, accumulation
        self.num_parts = num_processes * accumulation
        if num_images < self.num_parts:
            raise ValueError(
                f"{num_images} images can't be dealt out to {num_processes} processes with {accumulation} steps of "
                "gradient accumulation. Use fewer of them, or more images."
            )
        self.num_steps = min(-(-num_images // (batch_size * self.num_parts)), num_images // self.num_parts)
        self.epoch = self.step = 0

    def start_at(self, epoch: int, step: int) -> None:
        """Where the next pass begins."""
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for images in np.array_split(order, self.num_steps)[self.step :]:
            for part in np.array_split(images, self.num_parts)[self.process :: self.num_processes]:
                yield [(self.epoch, image) for image in part.tolist()]

    def __len__(self) -> int:
        """Parts that this process reads in a whole epoch."""
        return self.num_steps * self.accumulation


class ShownRows:
    """Rows of a split as an epoch shows them: with their `index`, and the `draw` that seeds what is random of it.

    Args:
        rows: undecoded rows.
        seed: of all that is drawn.
    """

    def __init__(self, rows: Dataset, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Several at once, as torch asks for them."""
        rows = self.rows.__getitems__([image for _, image in keys])
        return [
            {**row, "index": image, "draw": (self.seed, epoch, image)}
            for row, (epoch, image) in zip(rows, keys, strict=True)
        ]


def _leave_its_group(reader: int) -> None:
    """Spare a process that reads images the signals to its training's group, as from `timeout`, `kill` and Ctrl-C.

    The training answers them at the end of its step, which it could not reach without its readers, and ends them.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class StepLoader:
    """Batches for this process, step by step.

    Args:
        rows: undecoded rows of the training split.
        sampler: deals them out.
        collate: rows to a batch, such as `data.CaptionCollator`.
        device: where batches go.
        num_workers: processes that read images; 0 to read them here.
    """

    def __init__(
        self,
        rows: Dataset,
        sampler: StepSampler,
        collate: Callable[[Sequence[dict[str, Any]]], Batch],
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> None:
        self.sampler, self.device = sampler, torch.device(device)
        self.loader: DataLoader[Any] = DataLoader(
            ShownRows(rows, sampler.seed),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=_leave_its_group,
            pin_memory=self.device.type == "cuda",
            # torch seeds its readers from this; from the generator that dropout uses, a resumed run would draw others.
            generator=torch.Generator(),
        )

    @property
    def num_steps(self) -> int:
        """Of an epoch."""
        return self.sampler.num_steps

    def steps(self, epoch: int, step: int = 0) -> Iterator[list[Batch]]:
        """The batches of every step from this one on, as many each as there are steps of gradient accumulation."""
        self.sampler.start_at(epoch, step)
        batches = self._read()
        while group := list(islice(batches, self.sampler.accumulation)):
            yield group

    def _read(self) -> Iterator[Batch]:
        """All batches. That a reader died is a RuntimeError, as torch's, even if torch sees first that it hung up."""
        try:
            for batch in self.loader:
                yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        except (EOFError, ConnectionError) as e:
            if not self.loader.num_workers or _is_passed_on(e):
                raise
            raise RuntimeError("DataLoader worker hung up.") from e
