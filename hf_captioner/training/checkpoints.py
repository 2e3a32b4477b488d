"""The state of a training on disk: written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from torch import nn

CONTENTS = "contents.json"  # written last: sizes and digests of the other files
PROGRESS = "progress.json"
TENSORS = "state.pt"


class Checkpoint:
    """One saved state.

    Args:
        path: its folder.

    Raises:
        ValueError: a file is missing or is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            contents = json.loads((path / CONTENTS).read_text())
            broken = [name for name, digest in contents.items() if _digest((path / name).read_bytes()) != digest]
            if broken:
                raise ValueError(f"{', '.join(broken)} changed since")
            self.progress: dict[str, Any] = json.loads((path / PROGRESS).read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"The checkpoint {str(path)!r} is damaged: {e}.") from e

    def load_weights(self, name: str, module: nn.Module) -> None:
        """Put the weights and buffers saved under a name back into their module."""
        load_model(module, self.path / f"{name}.safetensors")

    def tensors(self) -> dict[str, Any]:
        """What else was saved. Nothing but tensors and plain values is read."""
        return torch.load(self.path / TENSORS, weights_only=True, map_location="cpu")


class Checkpoints:
    """The newest states of a run, in a folder of their own.

    A state is written to a folder under another name, forced to the disk, and renamed: whatever happens, and whenever,
    the folders under their right names are whole.

    Args:
        folder: where they are.
        keep: how many, at least 1.

    Raises:
        ValueError: keep none.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints is {keep}; at least 1 is needed to go on from.")
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """From the oldest to the newest."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"\d{6}", path.name))

    def newest(self, report: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest that is undamaged; those that are not are reported.

        Raises:
            ValueError: there are some, all of them damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return Checkpoint(path)
            except ValueError as e:
                report(str(e))
        if paths:
            raise ValueError(f"No checkpoint in {str(self.folder)!r} can be read. Delete the folder to start anew.")
        return None

    def save(self, weights: Mapping[str, nn.Module], tensors: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
        """Save a state as the newest, and delete those beyond the number to keep.

        Args:
            weights: modules by name; all their parameters and buffers are saved.
            tensors: further tensors and plain values.
            progress: what can be JSON.

        Raises:
            OSError: it can't be written. Earlier states are as they were.
        """
        paths = self.paths()
        path = self.folder / f"{int(paths[-1].name) + 1 if paths else 1:06d}"
        partial = self.folder / f".{path.name}.partial"
        try:
            self._clear()
            partial.mkdir(parents=True)
            contents = {}
            for name, data in _files(weights, tensors, progress):
                _write(partial / name, data)
                contents[name] = _digest(data)
            _write(partial / CONTENTS, json.dumps(contents, indent=1).encode())
            _sync(partial)
            partial.rename(path)
            _sync(self.folder)
        except OSError as e:
            shutil.rmtree(partial, ignore_errors=True)
            last = f"The last good one is {str(paths[-1])!r}: make room" if paths else "There is none yet: make room"
            raise OSError(
                e.errno, f"No checkpoint can be written to {str(self.folder)!r}: {e.strerror}. {last}, then go on with "
                "--resume.",
            ) from e  # fmt: skip
        self.prune()
        return path

    def prune(self, keep: int | None = None) -> None:
        """Delete all but the newest."""
        for path in self.paths()[: -(keep or self.keep)]:
            _remove(path)

    def clear(self) -> None:
        """Delete all."""
        for path in self.paths():
            _remove(path)
        self._clear()

    def _clear(self) -> None:
        """Delete what an interruption left behind."""
        for path in self.folder.glob(".*.partial"):
            shutil.rmtree(path)


def _files(weights: Mapping[str, nn.Module], tensors: Mapping[str, Any], progress: Mapping[str, Any]) -> Any:
    for name, module in weights.items():
        # One name for weights that are tied, as `load_model` expects.
        state, seen = {}, set()
        for key, tensor in module.state_dict().items():
            if (place := (tensor.data_ptr(), tensor.shape)) not in seen or not tensor.numel():
                state[key] = tensor.contiguous()
                seen.add(place)
        yield f"{name}.safetensors", save(state)
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    yield TENSORS, buffer.getvalue()
    yield PROGRESS, json.dumps(progress, indent=1).encode()


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and put its files, once all are whole, in place of those of another.

    Raises:
        OSError: they can't be written. The files there are as they were.
    """
    partial = folder / ".partial"
    try:
        with said_if_full("The model", folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            files = sorted(partial.iterdir())
            for file in files:
                _sync(file)
            for file in files:
                os.replace(file, folder / file.name)
            _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def said_if_full(what: str, folder: Path) -> Iterator[None]:
    """Within, what can't be written raises an OSError that says so, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise OSError(
            f"{what} can't be written to {str(folder)!r}: {reason}. What the run saved before is as it was. Make room, "
            "then go on with --resume."
        ) from e


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all random generators that this process draws from, as tensors and plain values."""
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
    """Go on drawing where `random_state` was."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def _remove(path: Path) -> None:
    """Delete a checkpoint; halfway through, it is none."""
    gone = path.with_name(f".{path.name}.partial")
    path.rename(gone)
    shutil.rmtree(gone)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Force a file, or the list of files of a folder, to the disk."""
    if os.name != "posix":
        return  # others can't open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(data: bytes) -> str:
    return f"{len(data)} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
