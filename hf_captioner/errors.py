"""Errors of other libraries: their messages shortened to one line, and which of them mean that memory has run out."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message with a full stop; the name of the error's class if it has none."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if line.endswith(".") else line + "."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, numpy or torch, on any device, means that memory has run out."""
    # torch has a class of its own for devices; on CPUs it raises a RuntimeError with this text.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
