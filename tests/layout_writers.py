"""Small photographs with captions, and functions that write them in every layout, for tests to read back."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Photo:
    """A photograph as Flickr8k has them: a JPEG with five captions."""

    name: str
    content: bytes
    captions: tuple[str, ...]
    split: str
    number: int

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".jpg")


@cache
def make_photos() -> tuple[Photo, ...]:
    """Make a hundred photographs of coloured blocks: 80 for training, 10 for validation, 10 for testing."""
    splits = 80 * ["train"] + 10 * ["validation"] + 10 * ["test"]
    return tuple(_make_photo(index, split) for index, split in enumerate(splits))


def _make_photo(index: int, split: str) -> Photo:
    """Make one photograph, with a name like Flickr's and captions that contain commas, quotes and an accent."""
    rng = random.Random(index)
    blocks = np.frombuffer(rng.randbytes(6 * 8 * 3), np.uint8).reshape(6, 8, 3)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((96, 72), Image.Resampling.BICUBIC).save(file, "JPEG")
    captions = (
        f"A brown dog runs across meadow {index} .",
        f"The dog , which is brown , leaps over {index} stones .",
        f'A sign says " {index} " behind a spotted dog .',
        f"{index} people watch the terrier's jump",
        f"{index} dogs play near a café .",
    )
    return Photo(f"{1000000 + 37 * index}_{rng.getrandbits(40):010x}.jpg", file.getvalue(), captions, split, index + 1)


def write_images(folder: Path, photos: Iterable[Photo], path: Callable[[Photo], str] = lambda p: p.name) -> None:
    for photo in photos:
        file = folder / path(photo)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo.content)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    write_lines(path, [json.dumps(content, ensure_ascii=False)])


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    write_lines(path, file.getvalue().splitlines())


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows whose image, if they have one, is stored in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_list(list(rows))
    if "image" in dataset.column_names:
        dataset = dataset.cast_column("image", ImageFeature())
    dataset.to_parquet(path)


def of_split(photos: Iterable[Photo], split: str) -> list[Photo]:
    return [photo for photo in photos if photo.split == split]


def token_lines(photos: Iterable[Photo]) -> list[str]:
    return [f"{p.name}#{i}\t{caption}" for p in photos for i, caption in enumerate(p.captions)]


def single_captions(photos: Iterable[Photo], folder: str = "") -> list[tuple[str, str]]:
    return [(f"{folder}{p.name}", caption) for p in photos for caption in p.captions]


def flickr8k_archives(folder: Path, photos: Sequence[Photo], images: str = "Flicker8k_Dataset") -> None:
    write_images(folder / images, photos)
    write_lines(folder / "Flickr8k.token.txt", token_lines(photos))
    write_lines(folder / "Flickr8k.lemma.token.txt", ["another file of the archive"])
    for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True):
        write_lines(folder / f"Flickr_8k.{name}Images.txt", (p.name for p in of_split(photos, split)))


def flickr8k_archives_unpacked_apart(folder: Path, photos: Sequence[Photo]) -> None:
    flickr8k_archives(folder / "Flickr8k_text", photos, "../Flickr8k_Dataset/Flickr8k_Dataset")


def kaggle(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "Images", photos)
    write_csv(folder / "captions.txt", ["image", "caption"], single_captions(photos))


def karpathy_image(photo: Photo) -> dict[str, object]:
    sentences = [{"raw": caption, "tokens": caption.lower().split()} for caption in photo.captions]
    split = "val" if photo.split == "validation" else photo.split
    return {"filename": photo.name, "imgid": photo.number, "split": split, "sentences": sentences}


def karpathy(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "images", photos)
    write_json(folder / "dataset_flickr8k.json", {"images": [*map(karpathy_image, photos)], "dataset": "flickr8k"})


def coco_path(photo: Photo) -> str:
    part = "train2014" if photo.split == "train" else "val2014"
    return f"{part}/COCO_{part}_{photo.number:012d}.jpg"


def karpathy_coco(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, coco_path)
    images = [karpathy_image(p) | {"filename": Path(coco_path(p)).name, "cocoid": p.number} for p in photos]
    images[0]["split"] = "restval"
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def coco(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, coco_path)
    for part in ("train2014", "val2014"):
        chosen = [p for p in photos if coco_path(p).startswith(part)]
        pairs = [(p, i) for i in range(5) for p in chosen]
        annotations = [{"id": 10 * p.number + i, "image_id": p.number, "caption": p.captions[i]} for p, i in pairs]
        images = [{"id": p.number, "file_name": Path(coco_path(p)).name} for p in chosen]
        write_json(folder / f"annotations/captions_{part}.json", {"images": images, "annotations": annotations})


def flickr30k_csv(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "flickr30k_images", photos)
    lines = [f"{p.name}| {i}| {caption}" for p in photos for i, caption in enumerate(p.captions)]
    write_lines(folder / "results.csv", ["image_name| comment_number| comment", *lines])


def flickr30k_token(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "flickr30k-images", photos)
    write_lines(folder / "results_20130124.token", token_lines(photos))


def imagefolder_jsonl(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, lambda p: f"{p.split}/{p.name}")
    for split in SPLITS:
        rows = [{"file_name": p.name, "captions": p.captions} for p in of_split(photos, split)]
        write_lines(folder / split / "metadata.jsonl", map(json.dumps, rows))


def imagefolder_csv(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos)
    header = ["file_name", *(f"caption_{i}" for i in range(5)), "split"]
    write_csv(folder / "metadata.csv", header, [(p.name, *p.captions, p.split) for p in photos])


def table_csv(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "pictures", photos)
    for split in SPLITS:
        write_csv(folder / f"{split}.csv", ["image", "caption"], single_captions(of_split(photos, split), "pictures/"))


def table_jsonl(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "pictures", photos)
    rows = [{"id": p.number, "image": f"pictures/{p.name}", "text": p.captions, "split": p.split} for p in photos]
    write_lines(folder / "all.jsonl", map(json.dumps, rows))


def table_parquet(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "pictures", photos)
    rows = [{"path": f"pictures/{p.name}", "split": p.split, "captions": p.captions} for p in photos]
    write_parquet(folder / "all.parquet", rows)


def stored(photo: Photo) -> dict[str, object]:
    return {"image_id": photo.name, "image": {"bytes": photo.content, "path": photo.name}}


def hub_parquet(folder: Path, photos: Sequence[Photo]) -> None:
    for split in SPLITS:
        rows = [stored(p) | {f"caption_{i}": p.captions[i] for i in range(5)} for p in of_split(photos, split)]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)


def hub_parquet_of_lists(folder: Path, photos: Sequence[Photo]) -> None:
    write_parquet(folder / "test.parquet", (stored(p) | {"sentences": p.captions, "split": p.split} for p in photos))


def hub_parquet_of_single_captions(folder: Path, photos: Sequence[Photo]) -> None:
    for split in SPLITS:
        rows = (stored(p) | {"caption": caption} for p in of_split(photos, split) for caption in p.captions)
        write_parquet(folder / f"{split}.parquet", rows)


def saved(folder: Path, photos: Sequence[Photo]) -> None:
    rows = {split: [stored(p) | {"captions": p.captions} for p in of_split(photos, split)] for split in SPLITS}
    splits = DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})
    splits.cast_column("image", ImageFeature()).save_to_disk(folder)


def text_pairs(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, lambda p: f"{p.split}/{p.name}")
    for p in photos:
        write_lines(folder / p.split / f"{p.stem}.txt", p.captions)


def webdataset(folder: Path, photos: Sequence[Photo]) -> None:
    for split in SPLITS:
        chosen = of_split(photos, split)
        for shard, start in enumerate(range(0, len(chosen), 30)):
            images = {f"{p.stem}.jpg": p.content for p in chosen[start : start + 30]}
            texts = {f"{p.stem}.txt": "\n".join(p.captions).encode() for p in chosen[start : start + 30]}
            write_tar(folder / f"{split}-{shard:05d}.tar", sorted((images | texts).items()))


def webdataset_json(folder: Path, photos: Sequence[Photo]) -> None:
    for split in SPLITS:
        chosen = of_split(photos, split)
        images = {f"./{p.stem}.jpg": p.content for p in chosen}
        fields = {f"./{p.stem}.json": json.dumps({"captions": p.captions}).encode() for p in chosen}
        write_tar(folder / split / "00000.tar.gz", sorted((images | fields).items()))


@dataclass(frozen=True)
class Case:
    """A layout to write, the format that must be recognised, and the ids and splits that reading must give.

    A layout that does not name its splits has none here.
    """

    write: Callable[[Path, Sequence[Photo]], None]
    format: str
    image_id: Callable[[Photo], str] = lambda photo: photo.name
    splits: tuple[str, ...] = SPLITS


CASES = [
    *(Case(write, "flickr8k") for write in (flickr8k_archives, flickr8k_archives_unpacked_apart)),
    Case(kaggle, "kaggle", splits=()),
    Case(karpathy, "karpathy"),
    Case(karpathy_coco, "karpathy", lambda p: str(p.number)),
    Case(coco, "coco", lambda p: str(p.number), ("train", "validation")),
    *(Case(write, "flickr30k", splits=()) for write in (flickr30k_csv, flickr30k_token)),
    *(Case(write, "imagefolder") for write in (imagefolder_jsonl, imagefolder_csv)),
    *(Case(write, "table") for write in (table_csv, table_jsonl, table_parquet)),
    *(Case(write, "parquet") for write in (hub_parquet, hub_parquet_of_lists, hub_parquet_of_single_captions)),
    Case(saved, "saved"),
    Case(text_pairs, "text"),
    *(Case(write, "webdataset", lambda p: p.stem) for write in (webdataset, webdataset_json)),
]
