"""Folders that publishing reads from and writes to."""

from __future__ import annotations

from pathlib import Path

from .. import model

# Modules in this folder are copied into what is published and exported.
MODEL_FOLDER = Path(model.__path__[0])


def require_empty(folder: Path) -> None:
    """Make sure that writing to a folder overwrites nothing.

    Raises:
        ValueError: Something other than an empty folder is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists already and is not an empty folder. Name a new or an empty folder.")
