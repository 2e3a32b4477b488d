"""Errors of libraries in a line of ours."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """What an error says in its first line, as a sentence; its kind where it says nothing."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if line.endswith(".") else line + "."
