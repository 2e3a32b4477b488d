"""Memory for reading many images from tar shards.

    python benchmarks/streaming.py --out benchmarks/results/streaming.json

100,000 drawn JPEGs with five captions each are written into tar shards of 2,000 in a temporary folder. They are read
from front to back and every image is opened: first as a stream, by `load_captions(folder, streaming=True)`; then as
training reads tar shards, through the Arrow file that `datasets` keeps on disk. Each job runs in a process of its own,
whose peak of resident memory includes everything it has imported.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timing import write_result
from tqdm.auto import tqdm

SHARD = 2000


def main() -> None:
    """Draw the images and measure all ways to read them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=96, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), arguments.num_images, arguments.side)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.tar"))
        result = {
            "command": " ".join(["python", *sys.argv]),
            "images": arguments.num_images,
            "side": arguments.side,
            "gb_of_shards": round(size / 1e9, 2),
            "before_reading": measured(import_only, folder),
            "streamed": measured(stream, folder),
            "through_arrow_on_disk": measured(read_cached, folder),
        }
    write_result(arguments.out, result)


def draw(folder: Path, num_images: int, side: int) -> None:
    """Write tar shards of different images of coloured blocks."""
    generator = np.random.default_rng(0)
    for start in tqdm(range(0, num_images, SHARD), desc="Drawing", unit="shard", disable=None):
        with tarfile.open(folder / f"train-{start // SHARD:05d}.tar", "w") as tar:
            for index in range(start, min(start + SHARD, num_images)):
                blocks = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                file = io.BytesIO()
                blocks.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
                captions = "\n".join(f"caption {i} of the drawn image {index}" for i in range(5))
                for suffix, content in ((".jpg", file.getvalue()), (".txt", captions.encode())):
                    member = tarfile.TarInfo(f"{index:08d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    # With a validation split, none is made of training images, so the training split has all of these.
    (folder / f"train-{0:05d}.tar").rename(folder / f"validation-{0:05d}.tar")


def measured(job: Any, folder: str) -> dict[str, float]:
    """Run a job in a new process and return its measurements."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(job, (folder,))


def import_only(folder: str) -> dict[str, float]:
    """Measure the memory of the imports alone."""
    import datasets  # noqa: F401

    import hf_captioner  # noqa: F401

    return {"peak_resident_gb": peak()}


def stream(folder: str) -> dict[str, float]:
    """Read a stream."""
    from hf_captioner import load_captions

    started = time.perf_counter()
    return count(load_captions(folder, streaming=True).values(), started)


def read_cached(folder: str) -> dict[str, float]:
    """Read through the Arrow file that `datasets` writes first."""
    import datasets

    from hf_captioner import load_captions

    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    started = time.perf_counter()
    return count(load_captions(folder).values(), started)


def count(splits: Iterable[Iterable[dict[str, Any]]], started: float) -> dict[str, float]:
    """Open the images of all rows; return their number, the seconds since the start and the peak of memory."""
    images = sum(row["image"].convert("RGB").width > 0 and len(row["captions"]) == 5 for rows in splits for row in rows)
    seconds = time.perf_counter() - started
    return {"images": images, "seconds": round(seconds, 1), "peak_resident_gb": peak()}


def peak() -> float:
    """Return this process's peak of resident memory in GB; it includes memory-mapped files."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


if __name__ == "__main__":
    main()
