"""Checks of stored weights against the model that a configuration describes, before memory is taken for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .folder_check import LFS_POINTER, read_json

MAX_PARAMETERS = 20_000  # weights and biases; the largest encoders of timm have 3,000
ARCHITECTURE = r"(encoder|attention|decoder)_(type|name|kwargs)|\w+_size|gate|deep_output|tie_word_embeddings"
FREE_NUMBERS = 2**26  # numbers in buffers that a model may have beyond what its weights file holds


class Stored(NamedTuple):
    """Shape and type of a tensor in a file; the type is one of safetensors' names, such as `"F32"`."""

    shape: tuple[int, ...]
    kind: str


@contextmanager
def limited_parameters(folder: Path) -> Iterator[None]:
    """Raise a ValueError when a model gets far more weights and biases within this block than its folder holds.

    A configuration can ask for a million layers, which take hours to build even without memory for the weights.

    Args:
        folder: Folder with the weights; if it is none, as for an id on the Hub, the limit is that of any encoder.
    """
    stored = len(stored_tensors(sorted(folder.glob("*.safetensors")))) if folder.is_dir() else MAX_PARAMETERS
    limit = 300 + 4 * stored  # each counts when it is built and again when it is loaded
    count = 0

    def check(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError("config.json asks for many more layers than the file of weights holds.")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def stored_tensors(files: Sequence[str | Path]) -> dict[str, Stored]:
    """Return the shapes and types of the tensors in safetensors files, by name.

    Raises:
        ValueError: A file is not complete, or no safetensors file.
    """
    stored = {}
    for path in map(Path, files):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    stored[name] = Stored(tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as e:
            raise ValueError(f"{str(path)!r} holds no weights: {_reason(path, e)}") from e
    return stored


def check_weights(model: Any, files: Sequence[str | Path], *, lenient: bool = False) -> None:
    """Check that files hold the weights of a model and no others; the model may be on the meta device.

    Weights may be missing, left over or of another size if the caller has asked for another architecture than the one
    that is stored beside them.

    Args:
        model: Captioner that a configuration describes.
        files: Safetensors files of its weights.
        lenient: Whether weights may be missing, left over or of another size in any case.

    Raises:
        ValueError: Weights are missing, left over or of another size or type, or the model needs far more memory than
            they.
    """
    stored = stored_tensors(files)
    folder = Path(files[0]).parent
    numbers = sum(math.prod(buffer.shape) for buffer in model.buffers())
    if numbers > FREE_NUMBERS + sum(math.prod(tensor.shape) for tensor in stored.values()):
        raise ValueError(f"The config.json in {str(folder)!r} asks for {numbers:,} numbers besides the weights.")
    if lenient or not _has_stored_architecture(model.config, folder / "config.json"):
        return
    own, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
    if missing := [name for name in own if name not in stored and tied.get(name) not in stored]:
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} of the {len(own)} weights that its config.json asks for, such as "
            f"{missing[0]!r}. The weights are another model's, or incomplete."
        )
    if left := sorted(stored.keys() - own.keys()):  # what they were for would silently be left out
        raise ValueError(
            f"{str(folder)!r} holds {len(left)} weights that its config.json does not ask for, such as {left[0]!r}. "
            "The weights are another model's, or the configuration was changed."
        )
    for name in own.keys() & stored.keys():
        shape, kind = tuple(own[name].shape), stored[name].kind
        if shape != stored[name].shape or own[name].is_floating_point() != bool(re.match("F|BF", kind)):
            raise ValueError(
                f"{str(folder)!r} holds other weights than its config.json asks for: {name!r} is "
                f"{stored[name].shape} in {kind}, and should be {shape} in {own[name].dtype}. They are another model's."
            )


def check_finite(model: nn.Module, folder: Any) -> None:
    """Raise a ValueError if a loaded weight is NaN or infinite, as after a training that diverged."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.sum(dtype=torch.float64).isfinite():
            raise ValueError(f"{str(folder)!r} holds weights that are not finite, such as {name!r}: they are damaged.")


def _has_stored_architecture(config: Any, path: Path) -> bool:
    """Return whether a configuration describes the same architecture as the file that it was read from."""
    stored = read_json(path) if path.is_file() else {}
    names = [name for name in stored if re.fullmatch(ARCHITECTURE, name)]
    return all(_plain(stored[name]) == _plain(getattr(config, name, None)) for name in names)


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _reason(path: Path, error: Exception) -> str:
    """Return why a file can't be read as safetensors."""
    start = path.read_bytes()[: len(LFS_POINTER)] if path.stat().st_size < 2**12 else b""
    if start == LFS_POINTER:
        return "it is a pointer of git-lfs. Run `git lfs pull`."
    if not path.stat().st_size:
        return "it is empty."
    return f"it is incomplete or no safetensors file ({' '.join(str(error).split())})."


def check_encoder_weights(encoder: nn.Module, file: str | Path) -> None:
    """Raise a ValueError unless most weights of an encoder are those of the file that timm loaded.

    timm leaves weights random which the file lacks.
    """
    stored: dict[torch.Size, list[torch.Tensor]] = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no dict)
            tensor = tensors.get_tensor(name)
            stored.setdefault(tensor.shape, []).append(tensor)
    weights = [tensor.cpu() for tensor in encoder.state_dict().values() if tensor.ndim > 1]
    found = sum(
        any(torch.equal(weight, x.to(weight.dtype)) for x in stored.get(weight.shape, [])) for weight in weights
    )
    if found < len(weights) / 2:
        raise ValueError(
            f"{str(file)!r} has {found} of the {len(weights)} weights of the encoder: it is of another architecture "
            "or not of an encoder alone."
        )
