"""Worker processes that try inputs one after the other, watched for time, memory, opened files and requests."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_SECONDS = 5.0
MAX_PEAK = 10**9  # bytes
MAX_ASKED = 4 * 10**9  # bytes; a worker gets a MemoryError beyond
MAX_MESSAGE = 400  # characters

# Kinds of faults; the order is that of the columns of the table.
FAULTS = ("raw", "hang", "peak", "silent", "opened", "request")
LIBRARIES = ("torch", "datasets", "transformers", "timm", "hf_captioner", "hf_captioner.model.modeling_captioner")


@dataclass(frozen=True)
class Case:
    """An input, known by its kind (the module that makes it), its name and its seed."""

    kind: str
    name: str
    seed: int


@dataclass
class Outcome:
    """What became of an input: whether it was read or refused, and what was wrong about that, by kind of fault.

    Each `watch` begins by a call of `clock`, from which its time is counted.
    """

    clock: Callable[[], None]
    is_read: bool = True
    faults: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def watch(self, names: Sequence[str] = ()) -> Iterator[None]:
        """Note how this context ends. A refusal is a line that, if `names` are given, contains one of them."""
        self.clock()
        try:
            yield
        except (ValueError, OSError) as e:
            self.is_read = False
            message = str(e)
            if "\n" in message.strip() or not 0 < len(message) <= MAX_MESSAGE:
                self.faults["raw"] = f"{type(e).__name__} of {len(message)} characters: {message[:200]!r}"
            elif names and not any(name in message for name in names):
                self.faults["raw"] = f"{type(e).__name__} that names no file: {message}"
        except MemoryError:
            self.is_read = False
            self.faults["peak"] = f"asks for more than {MAX_ASKED / 1e9:.0f} GB"
        except Exception as e:
            self.is_read = False
            kind = "peak" if "can't allocate memory" in str(e) else "raw"
            self.faults[kind] = f"{type(e).__name__}: {str(e)[:200]!r}"


class Witness:
    """Observer of a process: the requests that it sends, the programs that it starts, and devices that it opens."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []  # kind of fault, and what happened
        witness = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                witness.seen.append(("request", self.path))
                self.send_error(404)

            do_HEAD = do_POST = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(("/dev/", "/proc/")):
            if os.path.realpath(arguments[0]) == "/dev/zero" or arguments[0].endswith("/environ"):
                self.seen.append(("opened", arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo"):
            address = arguments[1] if event == "socket.connect" else arguments[0]
            self.seen.append(("request", str(address)))
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
            self.seen.append(("raw", f"the program {arguments[0]!r} was started"))


@cache
def witness() -> Witness:
    """Return the witness of this process."""
    return Witness()


def try_inputs(
    cases: Sequence[Case], folder: Path, num_workers: int, keep: Path | None
) -> Iterable[tuple[Case, Outcome]]:
    """Yield the outcome of each input, in the order in which they are done.

    Args:
        cases: The inputs.
        folder: Folder for temporary files.
        num_workers: Number of processes.
        keep: Folder for copies of the inputs that show a fault; None to keep none.
    """
    context = multiprocessing.get_context("forkserver")
    kinds = {f"{__package__}.{case.kind}" for case in cases}
    context.set_forkserver_preload([*LIBRARIES, *kinds])
    waiting = list(reversed(cases))
    workers = [_Worker(context, folder, keep) for _ in range(min(num_workers, len(cases)))]
    try:
        while True:
            for worker in workers:
                if worker.case is None and waiting:
                    worker.start(waiting.pop())
            busy = {worker.connection: worker for worker in workers if worker.case is not None}
            if not busy:
                return
            wait(list(busy), timeout=0.2)
            for worker in busy.values():
                if (done := worker.poll()) is not None:
                    yield done
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that tries inputs; it is killed and replaced if it hangs or dies."""

    def __init__(self, context: Any, root: Path, keep: Path | None) -> None:
        self.context, self.root, self.keep = context, root, keep
        self.case: Case | None = None
        self.started: float | None = None  # seconds at which the input was ready
        self._spawn()

    def _spawn(self) -> None:
        self.folder = tempfile.mkdtemp(dir=self.root)
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(theirs, self.folder, self.keep), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, case: Case) -> None:
        """Send an input to the process."""
        self.case, self.started = case, None
        self.connection.send(case)

    def poll(self) -> tuple[Case, Outcome] | None:
        """Return the outcome of the input if it is done, or if there is no use in waiting for it."""
        assert self.case is not None
        case, outcome = self.case, None
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, tuple):
                    outcome = Outcome(_no_clock, *message)
                elif isinstance(message, str):
                    raise RuntimeError(message)
                else:
                    self.started, self.starved = time.monotonic(), self._starved()
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = Outcome(_no_clock, False, {"raw": f"the process died with exit code {self.process.exitcode}"})
            self._replace()
        if outcome is None and self.started is not None:
            seconds = time.monotonic() - self.started
            if seconds > MAX_SECONDS and seconds - (self._starved() - self.starved) > MAX_SECONDS:
                outcome = Outcome(_no_clock, False, {"hang": f"over {MAX_SECONDS:.0f} s"})
                self._replace(killed=case)
        if outcome is None:
            return None
        self.case = None
        return case, outcome

    def _starved(self) -> float:
        """Return the seconds for which the process was ready to run, but other processes ran."""
        try:
            return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def _replace(self, killed: Case | None = None) -> None:
        if killed is not None:
            self.process.kill()
            self.process.join()
            _keep(Path(self.folder), killed, self.keep)
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._spawn()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(connection: Connection, folder: str, keep: Path | None) -> None:
    """Try inputs from the parent process until it ends."""
    import datasets
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + MAX_ASKED, resource.RLIM_INFINITY))
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            case = connection.recv()
            work = Path(folder, "input")
            work.mkdir()
            datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
            tempfile.tempdir = folder
            try:
                job: Callable[[Outcome], None] = importlib.import_module(f"{__package__}.{case.kind}").prepare(
                    case, work
                )
            except Exception:
                connection.send(f"{case} can't be made:\n{traceback.format_exc()}")
                return
            outcome = Outcome(lambda: connection.send(None))
            _measure(job, outcome)
            if outcome.faults:
                _keep(Path(folder), case, keep)
            connection.send((outcome.is_read, outcome.faults))
            os.chdir(folder)
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(Path(folder, "cache"), ignore_errors=True)


def _measure(job: Callable[[Outcome], None], outcome: Outcome) -> None:
    """Run a job, and add to its outcome the memory it took and what the witness saw."""
    seen = witness().seen
    seen.clear()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    job(outcome)
    peak = _memory("VmHWM") - before
    if peak > MAX_PEAK:
        outcome.faults.setdefault("peak", f"{peak / 1e9:.1f} GB")
    for kind, what in seen:
        outcome.faults.setdefault(kind, what)


def _no_clock() -> None:
    """Do nothing: the outcome is final."""


def _memory(name: str) -> int:
    """Return a size of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def _keep(folder: Path, case: Case, keep: Path | None) -> None:
    if keep is not None:
        target = keep / case.kind / f"{case.name.replace('/', '_')}-{case.seed}"
        shutil.copytree(folder / "input", target, symlinks=True, dirs_exist_ok=True, ignore=_special)


def _special(folder: str, names: list[str]) -> list[str]:
    """Return the names of FIFOs, which copying would wait for."""
    return [name for name in names if not (path := Path(folder, name)).is_symlink() and path.is_fifo()]
