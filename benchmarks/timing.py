"""Helpers of the benchmarks: time programs in turns, describe the machine, write results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def seconds_of(jobs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each job. Jobs take turns, so that other work on the machine slows all alike."""
    for job in jobs.values():
        job()  # warm up
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            synchronize()
            started = time.perf_counter()
            job()
            synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Compute matrix products in bfloat16 where the machine supports it; weights and results stay in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def machine() -> str:
    """Return the names of the processor and the accelerator, the number of cores and threads, and torch's version."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{name}, {cores} cores, {torch.get_num_threads()} threads, {accelerator}, torch {torch.__version__}"


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Print a result with the machine's name and, if a path is given, write it to that file."""
    text = json.dumps({"machine": machine(), **result}, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
