"""Memory of reading many images from tar shards.

    python benchmarks/streaming.py --out benchmarks/results/streaming.json

100,000 drawn JPEGs with five captions each go into tar shards of 2,000 in a temporary folder. They are read front to
back, every image opened, as `load_captions(folder, streaming=True)` gives them; then once more as training reads tar
shards, by way of the Arrow file that `datasets` keeps on disk. Each in a process of its own, whose peak of resident
memory counts all it has imported.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", "--num-images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=96, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the result")
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
    """Coloured blocks, no two images alike."""
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
    # A split of its own, so that none is made of the training images and all of these are read.
    (folder / f"train-{0:05d}.tar").rename(folder / f"validation-{0:05d}.tar")


def measured(job: Any, folder: str) -> dict[str, float]:
    """What a job needs in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(job, (folder,))


def import_only(folder: str) -> dict[str, float]:
    import datasets  # noqa: F401

    import hf_captioner  # noqa: F401

    return {"peak_resident_gb": peak()}


def stream(folder: str) -> dict[str, float]:
    from hf_captioner import load_captions

    started = time.perf_counter()
    return count(load_captions(folder, streaming=True).values(), started)


def read_cached(folder: str) -> dict[str, float]:
    import datasets

    from hf_captioner import load_captions

    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    started = time.perf_counter()
    return count(load_captions(folder).values(), started)


def count(splits: Iterable[Iterable[dict[str, Any]]], started: float) -> dict[str, float]:
    images = sum(row["image"].convert("RGB").width > 0 and len(row["captions"]) == 5 for rows in splits for row in rows)
    seconds = time.perf_counter() - started
    return {"images": images, "seconds": round(seconds, 1), "peak_resident_gb": peak()}


def peak() -> float:
    """Most GB of resident memory that this process ever had, files mapped into it among them."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


if __name__ == "__main__":
    main()
