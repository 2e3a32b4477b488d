"""Reading ahead by threads, and worker processes that read images."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_captioner.data.loading import SeededRows, StepLoader, StepSampler, num_cores, read_ahead


def test_results_of_threads_come_in_order() -> None:
    threads = set()

    def read(job: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.02 if job % 2 else 0.001)
        return job * job

    assert list(read_ahead(read, range(11), num_threads=3)) == [job * job for job in range(11)]
    assert len(threads) == 3 and threading.get_ident() not in threads
    assert list(read_ahead(read, [], num_threads=3)) == []
    assert num_cores() >= 1


def test_threads_read_only_a_little_ahead() -> None:
    started: list[int] = []
    results = read_ahead(lambda job: started.append(job), iter(range(10**9)), num_threads=2)
    for num_consumed in range(1, 6):
        next(results)
        time.sleep(0.01)
        assert len(started) <= num_consumed + 2
    results.close()
    time.sleep(0.02)
    assert len(started) <= 7


def test_an_error_is_raised_in_order_and_ends_the_reading() -> None:
    started: list[int] = []

    def read(job: int) -> int:
        started.append(job)
        if job == 3:
            raise ValueError("image 3 is broken")
        return job

    results = read_ahead(read, range(100), num_threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="image 3"):
        next(results)
    assert len(started) < 8


def test_random_seed_of_a_row_depends_on_run_epoch_and_image() -> None:
    rows = SeededRows(Dataset.from_dict({"captions": [["a dog"], ["a cat"]]}), seed=7)
    assert rows[3, 1] == {"captions": ["a cat"], "index": 1, "random_seed": (7, 3, 1)}


def collate_process_ids(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"process": torch.tensor(os.getpid()), "group": torch.tensor(os.getpgid(0))}


def test_workers_leave_the_process_group_of_the_training() -> None:
    """So a signal to the group ends no worker before the training has finished its step."""
    rows = Dataset.from_dict({"captions": [["a dog"]] * 4})
    loader = StepLoader(rows, StepSampler(4, 2, seed=0), collate_process_ids, num_workers=2)
    processes = [(batch["process"].item(), batch["group"].item()) for [batch] in loader.steps(0)]
    assert len({group for _, group in processes}) == 2
    assert all(process == group != os.getpgid(0) for process, group in processes)
