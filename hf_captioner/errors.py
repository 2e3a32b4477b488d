"""Errors of other libraries: their messages shortened to one line, and which of them mean that memory has run out."""

from __future__ import annotations

MAX_LENGTH = 1000  # characters of a message, which may quote a name or a caption of any length


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message with a full stop; the name of the error's class if it has none."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if line.endswith(".") else line + "."


def shortened_message(text: str) -> str:
    """Return a message, without the middle of a very long one, which quotes something that nobody would read."""
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH // 2]} … {text[-MAX_LENGTH // 2 :]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, numpy or torch, on any device, means that memory has run out."""
    # torch has a class of its own for devices; on CPUs it raises a RuntimeError with this text.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
