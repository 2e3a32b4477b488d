"""Speed of reading image files into pixel values, relative to torchvision in the same run.

    python benchmarks/data.py --out benchmarks/results/data.json

The loader of training (`StepLoader`) is compared with torchvision's `ImageFolder` in a DataLoader with the usual
transform: resize the shorter edge to 256, centre crop of 224, tensor, normalisation. Both read the same files in
batches of 32 with the same number of worker processes. The difference of their pixel values is given in levels of 255.
`read_ahead`, by which cells are encoded, reads with as many threads of one process.

The photographs are those of Flickr8k as they are at hand, 224 x 224, and enlarged to their size on Flickr and to that
of a camera. Enlarged photographs have little detail, so their files are smaller and decode faster than a camera's.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from timing import seconds_of, write_result
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from hf_captioner import CaptionerImageProcessor
from hf_captioner.data.loading import StepLoader, StepSampler, read_ahead
from hf_captioner.data.rows import read_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"camera": (2048, 1536), "flickr": (500, 375), "shared": (224, 224)}
BATCH_SIZE = 32


def write_photos(folder: Path, size: tuple[int, int], count: int, path: Path) -> Dataset:
    """Write photographs of one size in the form that `ImageFolder` reads, and return their rows."""
    rows = load_dataset("parquet", data_files=str(path), split="train").cast_column("image", ImageFeature(decode=False))
    (folder / "photos").mkdir(parents=True)
    files = []
    for index, row in enumerate(rows.select(range(count))):
        data = row["image"]["bytes"]
        image = Image.open(io.BytesIO(data))
        files.append(str(folder / "photos" / f"{index:05d}.jpg"))
        if image.size == size:
            Path(files[-1]).write_bytes(data)
        else:
            image.resize(size, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    rows = Dataset.from_dict({"image": files, "image_id": [Path(file).name for file in files]})
    return rows.cast_column("image", ImageFeature(decode=False))


def torchvision_loader(folder: Path, interpolation: str, num_workers: int) -> Callable[[], int]:
    """Return a function that reads all files with `ImageFolder` and returns their number."""
    transform = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(ImageFolder(str(folder), transform), BATCH_SIZE, shuffle=True, num_workers=num_workers)
    return lambda: sum(len(pixel_values) for pixel_values, _ in loader)


def our_loaders(
    rows: Dataset, image_processor: CaptionerImageProcessor, num_workers: int
) -> dict[str, Callable[[], int]]:
    """Return functions that read all files with the loader of training and with threads."""
    sampler = StepSampler(len(rows), BATCH_SIZE, seed=0)

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"pixel_values": read_pixels(batch, image_processor)}

    loader = StepLoader(rows, sampler, collate, num_workers=num_workers)
    jobs = [range(len(rows))[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]

    def read(images: range) -> torch.Tensor:
        return read_pixels(rows.__getitems__(list(images)), image_processor)

    return {
        "ours": lambda: sum(len(batch["pixel_values"]) for group in loader.steps(0) for batch in group),
        "read_ahead": lambda: sum(map(len, read_ahead(read, jobs, num_workers))),
    }


def checked(job: Callable[[], int], count: int) -> Callable[[], None]:
    """Return a job that asserts that every image was read."""

    def run() -> None:
        assert job() == count

    return run


def difference(folder: Path, rows: Dataset, image_processor: CaptionerImageProcessor, interpolation: str) -> dict:
    """Return the mean and the largest difference of pixel values from torchvision's, in levels of 255."""
    resize = transforms.Resize(256, transforms.InterpolationMode(interpolation))
    transform = transforms.Compose([resize, transforms.CenterCrop(224), transforms.ToTensor()])
    images = ImageFolder(str(folder), transform)
    theirs = torch.stack([images[i][0] for i in range(BATCH_SIZE)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    ours = read_pixels(rows.__getitems__(list(range(BATCH_SIZE))), image_processor) * std + mean
    levels = (ours - theirs).abs() * 255
    return {"mean": round(levels.mean().item(), 4), "largest": round(levels.max().item(), 2)}


def main() -> None:
    """Time all loaders on all kinds of photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default="../shared/flickr8k/data/train-00000-of-00001.parquet")
    parser.add_argument("--camera", type=int, default=256, help="number of photographs of a camera's size")
    parser.add_argument("--flickr", type=int, default=3072, help="number of photographs of Flickr's size")
    parser.add_argument("--shared", type=int, default=4096, help="number of photographs as they are")
    parser.add_argument("--interpolations", nargs="+", default=["bicubic", "bilinear"])
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind, size in SIZES.items():
            folder, count = Path(temporary) / kind, getattr(arguments, kind)
            rows = write_photos(folder, size, count, arguments.photos)
            num_bytes = sum(file.stat().st_size for file in folder.rglob("*.jpg"))
            for interpolation in arguments.interpolations:
                processor = CaptionerImageProcessor(
                    interpolation=interpolation, crop_pct=0.875, image_mean=MEAN, image_std=STD
                )
                jobs = {
                    **our_loaders(rows, processor, arguments.num_workers),
                    "torchvision": torchvision_loader(folder, interpolation, arguments.num_workers),
                }
                seconds = seconds_of({name: checked(job, count) for name, job in jobs.items()}, arguments.repeats)
                results.append(
                    {
                        "photographs": kind,
                        "size": size,
                        "interpolation": interpolation,
                        "kilobytes": round(num_bytes / count / 1000, 1),
                        "images_per_second": {name: round(count / value, 1) for name, value in seconds.items()},
                        "times_torchvision": round(seconds["torchvision"] / seconds["ours"], 3),
                        "read_ahead_times_torchvision": round(seconds["torchvision"] / seconds["read_ahead"], 3),
                        "difference_in_levels": difference(folder, rows, processor, interpolation),
                    }
                )
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "photos")}
    write_result(arguments.out, {"settings": settings, "load": os.getloadavg()[0], "results": results})


if __name__ == "__main__":
    main()
