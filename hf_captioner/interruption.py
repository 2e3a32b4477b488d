"""SIGTERM and Ctrl-C: heard at once, answered where nothing is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Somebody asked the program to stop.

    Args:
        message: what is saved, and how to go on.
        signal_number: of the signal that asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Interruption:
    """Within `with Interruption() as interruption`, signals raise `Interrupted`, or wait while they are deferred.

    `accelerate launch` does not pass SIGTERM on to a single process. The end of that launcher counts as one.
    """

    def __init__(self) -> None:
        self.message = "Stopped before the training began."
        self._process = os.getpid()
        self._launcher = os.getppid() if "ACCELERATE_DYNAMO_BACKEND" in os.environ else None
        self._asked: int | None = None
        self._deferred = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._handlers = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> int | None:
        """The signal that asked to stop, if one did."""
        if self._asked is None and self._launcher is not None and os.getppid() != self._launcher:
            self._asked = signal.SIGTERM
        return self._asked

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, signals are kept in `asked`; one that came raises when all such blocks are left."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self._asked is not None and not self._deferred:
            self.stop()

    def stop(self) -> None:
        """Raise `Interrupted`."""
        number = self._asked or signal.SIGTERM
        raise Interrupted(f"Stopped by {signal.Signals(number).name}. {self.message}", number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a reader of images, which the training will end
        self._asked = number
        if not self._deferred:
            self.stop()
