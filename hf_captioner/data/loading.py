"""Loading of images: which are read at which optimizer step, and with which random seed.

Both follow from the seed, the epoch and the image's index alone: neither the number of processes, nor the number of
workers, nor the step at which a run was interrupted changes what an epoch shows.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

Batch = dict[str, Any]  # tensors, and plain values that go to the model with them
Key = tuple[int, int]  # epoch and index of an image
Job = TypeVar("Job")
Result = TypeVar("Result")


def is_worker_death(error: RuntimeError) -> bool:
    """Return whether an error of torch or of `StepLoader` reports that a worker process died."""
    return "DataLoader worker" in str(error) and not _is_raised_by_worker(error)


def _is_raised_by_worker(error: Exception) -> bool:
    """Return whether an error was raised by code in a live worker; torch notes that at the start of its message."""
    return re.match(r"Caught \w+ in DataLoader worker", str(error)) is not None


def num_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_ahead(read: Callable[[Job], Result], jobs: Iterable[Job], num_threads: int | None = None) -> Iterator[Result]:
    """Yield `read(job)` for each job in order, computed by threads that keep a few results ready.

    Images are decoded and resized outside of Python's global lock, so threads are as fast as processes and copy
    nothing. However many jobs there are, at most one result more than there are threads waits to be consumed. By
    default there is a thread for each core, up to 8.
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
    """Samples the images of each optimizer step, in a new order each epoch, and yields those of one process.

    No image is left out and no step is small: the images of an epoch are divided into steps whose sizes differ by at
    most one, and the images of a step in the same way into batches, one for each process and each step of gradient
    accumulation.

    Args:
        num_images: Number of images of the split.
        batch_size: Largest number of images in a batch.
        seed: Seed of the order.
        num_processes: Number of processes that train together.
        process: Index of this process.
        accumulation: Number of batches per step that a process reads one after the other.

    Raises:
        ValueError: There are fewer images than batches of a step.
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
        """Set the epoch and the step at which the next iteration begins."""
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for images in np.array_split(order, self.num_steps)[self.step :]:
            for part in np.array_split(images, self.num_parts)[self.process :: self.num_processes]:
                yield [(self.epoch, image) for image in part.tolist()]

    def __len__(self) -> int:
        """Return the number of batches that this process reads in a whole epoch."""
        return self.num_steps * self.accumulation


class SeededRows:
    """Undecoded rows of a split: each gets its `index` and the `random_seed` that decides its augmentation."""

    def __init__(self, rows: Dataset, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Return the rows of several keys in one read, which torch's DataLoader asks for."""
        rows = self.rows.__getitems__([image for _, image in keys])
        return [
            {**row, "index": image, "random_seed": (self.seed, epoch, image)}
            for row, (epoch, image) in zip(rows, keys, strict=True)
        ]


def _leave_process_group(worker: int) -> None:
    """Make a worker process leave the process group of the training, so that signals to the group don't reach it."""
    # As from `timeout`, `kill` and Ctrl-C. The training process handles these at the end of its step, which it could
    # not reach without its workers, and ends them itself.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class StepLoader:
    """Loads the batches of this process, step by step.

    A sampler chooses the images of each step. `num_workers` processes, or this one if there are none, read their
    undecoded rows and make batches of them by `collate`, such as a `CaptionCollator`.
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
            SeededRows(rows, sampler.seed),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=_leave_process_group,
            pin_memory=self.device.type == "cuda",
            # torch seeds its workers from this generator. If it used the one of dropout, a resumed run would draw
            # other numbers than one that was not interrupted.
            generator=torch.Generator(),
        )

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps per epoch."""
        return self.sampler.num_steps

    def steps(self, epoch: int, step: int = 0) -> Iterator[list[Batch]]:
        """Yield the batches of each step of an epoch, from the given step on: one per step of gradient accumulation.

        Raises:
            RuntimeError: A worker died (see `is_worker_death`).
        """
        self.sampler.start_at(epoch, step)
        batches = self._read_batches()
        while group := list(islice(batches, self.sampler.accumulation)):
            yield group

    def _read_batches(self) -> Iterator[Batch]:
        """Yield all batches of an iteration of the data loader, moved to the device."""
        try:
            for batch in self.loader:
                yield {
                    name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }
        except Exception as e:
            if _is_raised_by_worker(e):
                # torch puts the whole traceback into the message, and the error's own message behind that.
                e.add_note(str(e))
                e.args = (re.split(r"^\w[\w.]*: ", str(e), flags=re.MULTILINE)[-1].strip(),)
                raise
            if isinstance(e, EOFError | ConnectionError) and self.loader.num_workers:
                # torch noticed the broken connection to a dead worker before its death.
                raise RuntimeError("DataLoader worker hung up.") from e
            raise
