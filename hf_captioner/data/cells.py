"""Cached image cells: a frozen encoder computes the grid cells of image features once, and they are kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..model.encoder_model import CaptionerEncoder
from ..model.images import REDUCTION_GAP
from .loading import read_ahead
from .rows import read_pixels

# Half the disk space of float32. Cells have values of a few units, and dropout disturbs them far more than the 0.05 %
# of rounding does.
DTYPE = np.dtype(np.float16)
SPARE_BYTES = 256 * 2**20  # disk space to leave free


@dataclass
class Split:
    """A split that is ready to be read: undecoded rows and, if they are cached, the cells of their images."""

    rows: Dataset
    cells: np.ndarray | None = None  # (images, P, C)
    mirrored_cells: np.ndarray | None = None  # (images, P, C), of the mirrored images


def default_cache_dir() -> Path:
    """Return the folder of cached cells, beside the other caches of Hugging Face's libraries under `HF_HOME`."""
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
    """Return the cells of every image, memory-mapped; encode the images first unless the cache has their cells.

    The name of the cache file is a digest of the encoder's weights and architecture, the image processor and the bytes
    of the images, so cells of another encoder, another transform or other images are never read. The file has this
    name only once it is complete.

    The encoder must be in evaluation mode, and the rows undecoded. With `mirrored`, images are encoded mirrored left to
    right. The cache is in `cache_dir`, by default `default_cache_dir()`.

    Returns:
        Read-only float16 array `(images, P, C)`.

    Raises:
        OSError: The cells do not fit on the disk; nothing was written.
    """
    assert not encoder.training, "cells of an encoder in training mode depend on the batch"
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    file = folder / f"{cells_key(encoder, image_processor, dataset)}{'-mirrored' if mirrored else ''}.npy"
    if not file.exists():
        _encode_to_file(encoder, image_processor, dataset, file, mirrored, batch_size, show_progress)
    cells = np.load(file, mmap_mode="r")
    assert len(cells) == len(dataset)
    return cells


def cells_key(encoder: CaptionerEncoder, image_processor: Any, dataset: Dataset) -> str:
    """Return a digest of everything that determines the cells of a data set's images."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = encoder.config
    settings = [config.encoder_type, config.encoder_name, config.encoder_kwargs, image_processor.to_dict(), str(DTYPE)]
    settings.append(REDUCTION_GAP)  # changes the pixels of large JPEGs
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in dataset.select_columns("image"):
        file = row["image"]
        if file["bytes"] is None:
            status = os.stat(file["path"])
            digest.update(f"{file['path']} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            digest.update(hashlib.blake2b(file["bytes"]).digest())
    return digest.hexdigest()


@torch.no_grad()
def _encode_to_file(
    encoder: CaptionerEncoder,
    image_processor: Any,
    dataset: Dataset,
    file: Path,
    mirrored: bool,
    batch_size: int,
    show_progress: bool,
) -> None:
    """Encode all images batch by batch into an `.npy` file, which keeps a temporary name until it is complete."""
    device = next(encoder.parameters()).device
    num_images = len(dataset)

    def read(indices: range) -> Tensor:
        return read_pixels(dataset.__getitems__(list(indices)), image_processor)

    def encode(pixel_values: Tensor) -> np.ndarray:
        pixel_values = pixel_values.flip(-1) if mirrored else pixel_values
        return encoder(pixel_values.to(device)).last_hidden_state.to("cpu", torch.float16).numpy()

    shape = (num_images, *encode(read(range(1))).shape[1:])
    _check_disk_space(file.parent, int(np.prod(shape)) * DTYPE.itemsize)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    batches = (range(num_images)[start : start + batch_size] for start in range(0, num_images, batch_size))
    description = "Encoding mirrored images" if mirrored else "Encoding images"
    progress = tqdm(total=num_images, desc=description, unit="image", disable=None if show_progress else True)
    try:
        with open(partial, "wb") as output, progress:
            header = {"descr": np.lib.format.dtype_to_descr(DTYPE), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(output, header)
            for pixel_values in read_ahead(read, batches):
                cells = encode(pixel_values)
                output.write(np.ascontiguousarray(cells).data)
                progress.update(len(cells))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise an OSError if a file of this size does not fit in a folder, which may not exist yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes + SPARE_BYTES > free:
        raise OSError(
            f"The cells need {num_bytes / 2**30:.2f} GiB in {str(folder)!r}, where {free / 2**30:.2f} GiB are free. "
            "Name a folder on a larger disk with --cache_dir, or encode images anew each epoch with "
            "--cache_cells false."
        )
