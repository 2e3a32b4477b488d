"""Image cells of a frozen encoder, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..model.images import REDUCTION_GAP
from .loading import read_ahead
from .rows import read_pixels

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model.modeling_captioner import CaptionerEncoder

# Half the disk of float32. Features of an encoder are a few units wide and dropout disturbs them far more than
# the 0.05 % that rounding does.
DTYPE = np.dtype(np.float16)
SPARE_BYTES = 256 * 2**20  # left free on the disk


@dataclass
class Split:
    """A split ready to be read.

    Args:
        rows: undecoded, images unopened.
        cells: `(images, P, C)` of them, where these are cached.
        mirrored_cells: of the images mirrored.
    """

    rows: Dataset
    cells: np.ndarray | None = None
    mirrored_cells: np.ndarray | None = None


def default_cache_dir() -> Path:
    """Beside the other caches of Hugging Face's libraries, under `HF_HOME`."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_captioner" / "cells"


def cached_cells(
    encoder: CaptionerEncoder,
    image_processor: Any,
    dataset: Dataset,
    *,
    mirrored: bool = False,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    show_progress: bool = True,
) -> np.ndarray:
    """The cells of every image, memory-mapped; encoded now unless this was done before.

    The file's name is a digest of the encoder's weights and architecture, the image processor and the bytes of the
    images, so cells of another encoder, another transform or other images are never read. It appears under that
    name only when complete.

    Args:
        encoder: a `CaptionerEncoder`, in evaluation mode.
        image_processor: a `CaptionerImageProcessor`.
        dataset: undecoded rows (see `data.undecoded`).
        mirrored: encode the images mirrored left to right.
        cache_dir: folder of the cache; by default one beside the other Hugging Face caches.
        batch_size: images encoded at once.
        show_progress: show a bar.

    Returns:
        `(images, P, C)` float16, read-only.

    Raises:
        OSError: the cells do not fit on the disk; nothing was written.
    """
    assert not encoder.training, "cells of an encoder in training mode depend on the batch"
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    file = folder / f"{cells_key(encoder, image_processor, dataset)}{'-mirrored' if mirrored else ''}.npy"
    if not file.exists():
        _encode(encoder, image_processor, dataset, file, mirrored, batch_size, show_progress)
    cells = np.load(file, mmap_mode="r")
    assert len(cells) == len(dataset)
    return cells


def cells_key(encoder: CaptionerEncoder, image_processor: Any, dataset: Dataset) -> str:
    """Digest of all that decides what the cells are."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = encoder.config
    parts = [config.encoder_type, config.encoder_name, config.encoder_kwargs, image_processor.to_dict(), str(DTYPE)]
    parts.append(REDUCTION_GAP)  # decides the pixels too
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for row in dataset.select_columns("image"):
        file = row["image"]
        if file["bytes"] is None:
            status = os.stat(file["path"])
            digest.update(f"{file['path']} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            digest.update(hashlib.blake2b(file["bytes"]).digest())
    return digest.hexdigest()


@torch.no_grad()
def _encode(
    encoder: CaptionerEncoder,
    image_processor: Any,
    dataset: Dataset,
    file: Path,
    mirrored: bool,
    batch_size: int,
    show_progress: bool,
) -> None:
    device = next(encoder.parameters()).device

    def read(images: range) -> Tensor:
        return read_pixels(dataset.__getitems__(list(images)), image_processor)

    def encode(pixel_values: Tensor) -> np.ndarray:
        pixel_values = pixel_values.flip(-1) if mirrored else pixel_values
        return encoder(pixel_values.to(device)).last_hidden_state.to("cpu", torch.float16).numpy()

    description = "Encoding mirrored images" if mirrored else "Encoding images"
    shape = (len(dataset), *encode(read(range(1))).shape[1:])
    _refuse_if_full(file.parent, int(np.prod(shape)) * DTYPE.itemsize)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        batches = (range(shape[0])[start : start + batch_size] for start in range(0, shape[0], batch_size))
        with (
            open(partial, "wb") as output,
            tqdm(total=shape[0], desc=description, unit="image", disable=not show_progress) as bar,
        ):
            header = {"descr": np.lib.format.dtype_to_descr(DTYPE), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(output, header)
            for pixel_values in read_ahead(read, batches):
                cells = encode(pixel_values)
                output.write(np.ascontiguousarray(cells).data)
                bar.update(len(cells))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_if_full(folder: Path, num_bytes: int) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes + SPARE_BYTES > free:
        raise OSError(
            f"The cells need {num_bytes / 2**30:.2f} GiB in {str(folder)!r}, where {free / 2**30:.2f} GiB are free. "
            "Name a folder on a larger disk with --cache-dir, or encode anew each epoch with --cache-cells false."
        )
