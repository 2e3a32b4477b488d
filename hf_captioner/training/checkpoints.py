"""Checkpoints of a training on disk, each of which is written completely or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save
from torch import nn

from ..errors import first_line, is_out_of_memory
from ..files import explain_write_errors, read_json, sync

logger = logging.getLogger(__name__)

CONTENTS = "contents.json"  # sizes and digests of the other files, written last
PROGRESS = "progress.json"
TENSORS = "state.pt"


HOW_TO_GO_ON = "All that the run saved before is intact: go on with --resume."


class Checkpoint:
    """One saved state of a run.

    Args:
        path: Folder of the checkpoint.

    Attributes:
        progress: Position of the run.
        settings: Settings of the run.
        is_begun: Whether the run has done a step.
        is_over: Whether the run has ended.

    Raises:
        ValueError: A file is missing, or has changed since it was written, or is not of a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.explain_damage():
            contents = read_json(path / CONTENTS, "The list of files")
            if missing := {"model.safetensors", TENSORS, PROGRESS} - contents.keys():
                raise ValueError(f"{CONTENTS} lacks {', '.join(sorted(missing))}")
            changed = [name for name, digest in contents.items() if _digest((path / name).read_bytes()) != digest]
            if changed:
                raise ValueError(f"{', '.join(changed)} changed since")
            self.progress: dict[str, Any] = read_json(path / PROGRESS, "The progress")
            self.settings = dict(self.progress.get("facts", {}))
            self.is_begun = any(self.progress.get(name) for name in ("stage", "epoch", "step"))
            self.is_over = bool(self.progress.get("is_over"))

    @contextmanager
    def explain_damage(self) -> Iterator[None]:
        """Turn the error of reading from a file that is not what this version of the package writes into a ValueError.

        Whatever a library raises about wrong content, the user's remedy is the same.
        """
        try:
            yield
        except Exception as e:
            if is_out_of_memory(e):
                raise
            kind = "" if isinstance(e, ValueError | OSError) else f"{type(e).__name__}: "
            raise ValueError(f"The checkpoint {str(self.path)!r} is damaged: {kind}{first_line(e)}") from e

    def load_weights(self, name: str, module: nn.Module) -> None:
        """Load the parameters and buffers that were saved under a name into their module."""
        load_model(module, self.path / f"{name}.safetensors")

    def tensors(self) -> dict[str, Any]:
        """Load the states of the optimizer, the scheduler and the random generators, saved as `tensors`.

        Only tensors and plain values are unpickled, no other Python objects.
        """
        return torch.load(self.path / TENSORS, weights_only=True, map_location="cpu")


class Checkpoints:
    """Folder with the newest checkpoints of a run.

    A checkpoint is written to a folder under a temporary name, forced to the disk, and renamed. So a folder under a
    final name is complete, whenever and however the process ends.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of checkpoints to keep, at least 1.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints is {keep}; resuming needs at least 1.")
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Return the folders of all checkpoints, from the oldest to the newest."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"\d{6}", path.name))

    def newest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None if there is none; log a warning for each damaged one.

        Raises:
            ValueError: All checkpoints are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return Checkpoint(path)
            except ValueError as e:
                logger.warning(str(e))
        if paths:
            raise ValueError(f"No checkpoint in {str(self.folder)!r} can be read. Delete the folder to start anew.")
        return None

    def save(self, weights: Mapping[str, nn.Module], tensors: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
        """Save a checkpoint, and delete the oldest ones beyond the number to keep.

        Args:
            weights: Modules by name; all their parameters and buffers are saved.
            tensors: States of the optimizer, the scheduler and the random generators, as tensors and plain values.
            progress: Position of the run, as values for a JSON file.

        Raises:
            OSError: The checkpoint can't be written. Earlier checkpoints remain intact.
        """
        paths = self.paths()
        path = self.folder / f"{int(paths[-1].name) + 1 if paths else 1:06d}"
        partial = self.folder / f".{path.name}.partial"
        then = f"The last good one is {str(paths[-1])!r}: go on with --resume." if paths else "There is none yet."
        try:
            with explain_write_errors("A checkpoint", self.folder, then=then):
                self._remove_partial()
                partial.mkdir(parents=True)
                contents = {}
                for name, data in _files(weights, tensors, progress):
                    _write(partial / name, data)
                    contents[name] = _digest(data)
                _write(partial / CONTENTS, json.dumps(contents, indent=1).encode())
                sync(partial)
                partial.rename(path)
                sync(self.folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.paths()[: -self.keep]:
            _remove(old)
        return path

    def clear(self) -> None:
        """Delete all checkpoints."""
        for path in self.paths():
            _remove(path)
        self._remove_partial()

    def _remove_partial(self) -> None:
        """Delete the incomplete folders that an interruption left behind."""
        for path in self.folder.glob(".*.partial"):
            shutil.rmtree(path)


def _files(
    weights: Mapping[str, nn.Module], tensors: Mapping[str, Any], progress: Mapping[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of a checkpoint's files, see `Checkpoints.save`."""
    for name, module in weights.items():
        # Tied weights are saved under one name, as `load_model` expects.
        state, seen = {}, set()
        for key, tensor in module.state_dict().items():
            storage = (tensor.data_ptr(), tensor.shape)
            if storage not in seen or not tensor.numel():
                state[key] = tensor.contiguous()
                seen.add(storage)
        yield f"{name}.safetensors", save(state)
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    yield TENSORS, buffer.getvalue()
    yield PROGRESS, json.dumps(progress, indent=1).encode()


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of all random generators that this process uses, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the random generators of this process back into the states of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def _remove(path: Path) -> None:
    """Delete a checkpoint: rename it first, so that half a folder is never taken for a checkpoint."""
    partial = path.with_name(f".{path.name}.partial")
    path.rename(partial)
    shutil.rmtree(partial)


def _write(path: Path, data: bytes) -> None:
    """Write a file and force it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _digest(data: bytes) -> str:
    """Return the size and a hash of a file's content."""
    return f"{len(data)} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
