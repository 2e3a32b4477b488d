"""Programs in processes of their own that start quickly: they are forked from a server that has the libraries."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "transformers.generation.utils",
        "datasets",
        "tiny_run",
        "hf_captioner.training.train",
        "matplotlib.figure",
        "processes",
    ]
)


class Program:
    """A script that runs in one process, or in several that find each other as those of `torchrun` do.

    Args:
        script: Path of the script, relative to the root of the repository.
        arguments: Command-line arguments.
        output: File for everything that the script prints.
        num_processes: Number of processes.
    """

    def __init__(self, script: str, arguments: Sequence[object], output: Path, *, num_processes: int = 1) -> None:
        self.output = output
        output.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes: list[BaseProcess] = []
        for rank in range(num_processes):
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
            env = env if num_processes > 1 else {}
            words = [str(argument) for argument in arguments]
            process = _context.Process(target=_run, args=(str(ROOT / script), words, str(output), env))
            process.start()
            self.processes.append(process)

    @property
    def is_over(self) -> bool:
        """Whether at least one of the processes has ended."""
        return any(process.exitcode is not None for process in self.processes)

    def send(self, number: int) -> None:
        """Send a signal to every process and its children, as batch systems do."""
        for process in self.processes:
            assert process.pid is not None
            os.killpg(process.pid, number)

    def finish(self, code: int = 0) -> str:
        """Wait for the end of all processes, check their exit code, and return what they printed."""
        for process in self.processes:
            process.join(500)
            assert process.exitcode == code, (process.exitcode, self.output.read_text()[-3000:])
        return self.output.read_text()


def _run(script: str, arguments: list[str], output: str, env: Mapping[str, str]) -> None:
    """Run a script in this process, in a process group of its own."""
    os.setpgid(0, 0)
    os.environ.update(env)
    os.chdir(ROOT)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
