"""Stop on SIGTERM and Ctrl-C without losing work: the signal is noticed at once and acted upon at a safe moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Exception that is raised when a signal stops the program.

    Args:
        message: What was saved, and how to resume.
        signal_number: Number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def ending_at_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the program at once and silently in the block: while it imports, it has nothing to lose.

    An import that is interrupted by an exception may print it, turn it into an ImportError, or go on.
    """
    end_at_ctrl_c()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end the program at once and silently, unless it is ignored or handled by someone else."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


class Interruption:
    """Context manager in which SIGTERM and Ctrl-C raise `Interrupted`, or wait for the end of a `deferred` block.

    `accelerate launch` does not pass SIGTERM on to a single process, so the end of that launcher counts as SIGTERM.

    Attributes:
        message: Text for the `Interrupted` that will be raised: what is saved by now, and how to resume.
    """

    def __init__(self) -> None:
        self.message = "Stopped before the training began."
        self._process = os.getpid()
        self._launcher = os.getppid() if "ACCELERATE_DYNAMO_BACKEND" in os.environ else None
        self._signal_number: int | None = None
        self._num_deferred_blocks = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @property
    def signal_number(self) -> int | None:
        """Number of the signal that arrived; None if there was none."""
        if self._signal_number is None and self._launcher is not None and os.getppid() != self._launcher:
            self._signal_number = signal.SIGTERM
        return self._signal_number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay the reaction to signals until the end of the block, or of the outermost of several nested blocks."""
        self._num_deferred_blocks += 1
        try:
            yield
        finally:
            self._num_deferred_blocks -= 1
        if self._signal_number is not None and not self._num_deferred_blocks:
            self.stop()

    def stop(self) -> None:
        """Raise `Interrupted` with the current message."""
        number = self._signal_number or signal.SIGTERM
        raise Interrupted(f"Stopped by {signal.Signals(number).name}. {self.message}", number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: stop, or only note it in a deferred block."""
        if os.getpid() != self._process:
            return  # This is a forked data loader worker, which the training process will end.
        self._signal_number = number
        if not self._num_deferred_blocks:
            self.stop()
