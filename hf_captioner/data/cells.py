"""Cached image cells: a frozen encoder computes the grid cells of image features once, and they are kept on disk.

Where only the last stages of the encoder are trained, what enters the first of these is kept instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import first_line
from ..files import explain_write_errors, locked, sync
from ..model.encoder_model import CaptionerEncoder
from ..model.images import REDUCTION_GAP, is_url
from ..model.modes import in_evaluation
from .layouts.splits import image_digest
from .loading import read_ahead
from .rows import read_pixels

logger = logging.getLogger(__name__)

# Half the disk space of float32. Cells have values of a few units, and dropout disturbs them far more than the 0.05 %
# of rounding does.
DTYPE = np.dtype(np.float16)
SPARE_BYTES = 256 * 2**20  # disk space to leave free
CHECKSUM = np.dtype("<u4")  # CRC-32 of the cells of an image; those of all images stand behind the array


@dataclass
class Split:
    """A split that is ready to be read: undecoded rows and, if they are cached, features of their images.

    Args:
        rows: Undecoded rows.
        features: Image cells `(images, P, C)` or, with `from_stage`, what enters that stage of the encoder.
        mirrored_features: The same of the mirrored images.
        from_stage: Stage of the encoder that reads the features; None for cells, which the decoder reads.
    """

    rows: Dataset
    features: np.ndarray | None = None
    mirrored_features: np.ndarray | None = None
    from_stage: int | None = None


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
    stage: int | None = None,
    through_stage: int | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
    check: bool = True,
    show_progress: bool = True,
) -> np.ndarray:
    """Return the cells of every image, memory-mapped; encode the images first unless the cache has their cells.

    The name of the cache file is a digest of the encoder's weights and architecture, the image processor and the bytes
    of the images, so cells of another encoder, another transform or other images are never read. The file has this
    name only once it is complete, and a checksum of each image's cells is at its end. A file that was damaged since, or
    one of version 0.1.0, which has no checksums, is written anew.

    Args:
        encoder: Encoder; its training mode is restored afterwards.
        image_processor: Processor of the captioner's images.
        dataset: Undecoded rows.
        mirrored: Whether to encode images mirrored left to right.
        stage: Stage of the encoder whose input is wanted in place of cells; later stages play no role.
        through_stage: Stage of the encoder whose input is cached too, and from which the cells are computed: where it
            was cached before, no image is opened.
        cache_dir: Folder of the cache, by default `default_cache_dir()`.
        batch_size: Number of images encoded at once.
        check: Whether to compare the checksums, which takes a second for about 2 GB that are in memory. Processes that
            come after one that has compared them need not.
        show_progress: Whether to show a progress bar.

    Returns:
        Read-only float16 array `(images, P, C)`; with `stage`, `(images, …)`.

    Raises:
        OSError: The cells do not fit on the disk, or can't be written; nothing was written.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    key = "".join(
        [
            cells_key(encoder, image_processor, dataset, stage),
            "" if through_stage is None else f"-from_{through_stage}",  # differs in the last digits
            "-mirrored" if mirrored else "",
        ]
    )
    file = folder / f"{key}.npy"
    cells = _read_cells(file, len(dataset), check=check)
    if cells is None:
        with explain_write_errors("The cells of images", folder, then="The option is --cache_dir."):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f"{key}.lock", f"is encoding the same images to {str(file)!r}", report=logger.info):
                _remove_leftovers(folder)
                if (cells := _read_cells(file, len(dataset), check=check, report=None)) is None:
                    inputs = None
                    if through_stage is not None:
                        inputs = cached_cells(
                            encoder,
                            image_processor,
                            dataset,
                            mirrored=mirrored,
                            stage=through_stage,
                            cache_dir=cache_dir,
                            batch_size=batch_size,
                            check=check,
                            show_progress=show_progress,
                        )
                    source = _Source(encoder, image_processor, dataset, mirrored, stage, through_stage, inputs)
                    _encode_to_file(source, file, batch_size, show_progress)
                    cells = _read_cells(file, len(dataset), check=False)
    assert cells is not None
    return cells


def _read_cells(
    file: Path, num_images: int, *, check: bool, report: Callable[[str], None] | None = logger.warning
) -> np.ndarray | None:
    """Return the cells in a file, memory-mapped, or None if there are none; report a damaged file in a line."""
    if not file.exists():
        return None
    try:
        cells = np.load(file, mmap_mode="r", allow_pickle=False)
        end = cells.offset + cells.nbytes
        if len(cells) != num_images or cells.dtype != DTYPE or cells.ndim < 3:
            raise ValueError("it holds something else")
        if file.stat().st_size == end:
            raise ValueError("it has no checksums")
        if file.stat().st_size != end + num_images * CHECKSUM.itemsize:
            raise ValueError("it has another size than when it was written")
        if check:
            checksums = np.fromfile(file, CHECKSUM, offset=end)
            found = read_ahead(lambda index: zlib.crc32(cells[index]), range(num_images))
            if changed := sum(a != b for a, b in zip(found, checksums.tolist(), strict=True)):
                raise ValueError(f"the cells of {changed} images have changed since")
    except (OSError, ValueError, EOFError, AttributeError) as e:
        if report is not None:
            report(f"The cached cells {str(file)!r} are not used: {first_line(e)} The images are encoded again.")
        return None
    return cells


def _remove_leftovers(folder: Path) -> None:
    """Delete the incomplete files in a cache that processes left behind which were killed."""
    for partial in folder.glob("*.partial"):
        # Version 0.1.0 put a process id before the suffix, and had no locks.
        with suppress(ValueError), locked(partial.with_name(f"{partial.name.split('.')[0]}.lock"), "is encoding"):
            partial.unlink(missing_ok=True)


def cells_key(encoder: CaptionerEncoder, image_processor: Any, dataset: Dataset, stage: int | None = None) -> str:
    """Return a digest of everything that determines the cells of a data set's images, or what enters a stage."""
    digest = hashlib.blake2b(digest_size=16)
    later = set() if stage is None else {f"part.{name}" for name in encoder.part.names_from(stage)}
    for name, tensor in encoder.state_dict().items():
        if name in later:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Adding 0 turns -0.0 into 0.0, as a running average of the weights does.
        tensor = tensor.detach().cpu().contiguous().flatten() + 0
        digest.update(tensor.view(torch.uint8).numpy().data)
    config = encoder.config
    settings = [config.encoder_type, config.encoder_name, config.encoder_kwargs, image_processor.to_dict(), str(DTYPE)]
    settings.append(REDUCTION_GAP)  # changes the pixels of large JPEGs
    settings += [] if stage is None else [stage]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in dataset.select_columns("image"):
        file = row["image"]
        if file["bytes"] is None and not is_url(file["path"]):
            status = os.stat(file["path"])
            digest.update(f"{file['path']} {status.st_size} {status.st_mtime_ns}".encode())
        else:
            digest.update(image_digest(file))
    return digest.hexdigest()


@dataclass
class _Source:
    """The computation that a cache file holds the results of; see `cached_cells` for the fields."""

    encoder: CaptionerEncoder
    image_processor: Any
    dataset: Dataset
    mirrored: bool
    stage: int | None
    through_stage: int | None
    stage_inputs: np.ndarray | None  # of `through_stage`

    def read(self, indices: range) -> Tensor:
        """Read what a batch of images is encoded from: pixels, or what enters a stage."""
        if self.stage_inputs is not None:
            return torch.from_numpy(self.stage_inputs[indices.start : indices.stop].astype(np.float32))
        pixel_values = read_pixels(self.dataset.__getitems__(list(indices)), self.image_processor)
        return pixel_values.flip(-1) if self.mirrored else pixel_values

    def encode(self, batch: Tensor) -> np.ndarray:
        """Encode what `read` returned."""
        batch = batch.to(next(self.encoder.parameters()).device)
        with in_evaluation(self.encoder):  # else a batch norm would make cells depend on the batch
            if self.stage is not None:
                features = self.encoder.part.input_of_stage(batch, self.stage)
            elif self.through_stage is not None:
                features = self.encoder.forward_from(batch, self.through_stage).last_hidden_state
            else:
                features = self.encoder(batch).last_hidden_state
        return np.ascontiguousarray(features.to("cpu", torch.float16).numpy())


@torch.no_grad()
def _encode_to_file(source: _Source, file: Path, batch_size: int, show_progress: bool) -> None:
    """Encode all images batch by batch into an `.npy` file, which keeps a temporary name until it is complete."""
    num_images = len(source.dataset)
    shape = (num_images, *source.encode(source.read(range(1))).shape[1:])
    _check_disk_space(file.parent, int(np.prod(shape)) * DTYPE.itemsize)
    partial = file.with_suffix(".partial")
    batches = (range(num_images)[start : start + batch_size] for start in range(0, num_images, batch_size))
    description = "Encoding mirrored images" if source.mirrored else "Encoding images"
    progress = tqdm(total=num_images, desc=description, unit="image", disable=None if show_progress else True)
    try:
        with open(partial, "wb") as output, progress:
            header = {"descr": np.lib.format.dtype_to_descr(DTYPE), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(output, header)
            checksums = []
            for batch in read_ahead(source.read, batches):
                cells = source.encode(batch)
                output.write(cells.data)
                checksums += [zlib.crc32(image) for image in cells]
                progress.update(len(cells))
            output.write(np.array(checksums, CHECKSUM).tobytes())
        sync(partial)
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
