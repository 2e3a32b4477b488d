"""Messages of other libraries' errors, shortened to one line."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Return the first line of an error's message with a full stop; the name of the error's class if it has none."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if line.endswith(".") else line + "."
