"""Writers of every form in which people have captions, for tests to read back: files as they are found."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from hf_captioner import load_captions

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Photo:
    """A photograph of Flickr8k."""

    name: str
    content: bytes
    captions: tuple[str, ...]
    split: str
    number: int

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".jpg")


def read_photos(flickr8k: Path) -> list[Photo]:
    """A hundred photographs: 80 to train on, 10 to validate, 10 to test."""
    rows = load_captions(str(flickr8k), "validation", report=lambda line: None).select(range(100))
    rows = rows.cast_column("image", ImageFeature(decode=False))
    return [
        Photo(
            row["image_id"],
            row["image"]["bytes"],
            tuple(" ".join(caption.split()) for caption in row["captions"]),
            "train" if index < 80 else "validation" if index < 90 else "test",
            index + 1,
        )
        for index, row in enumerate(rows)
    ]


def write_images(
    folder: Path, photos: Iterable[Photo], name: Callable[[Photo], str] = lambda photo: photo.name
) -> None:
    for photo in photos:
        path = folder / name(photo)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.content)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def token_lines(photos: Sequence[Photo]) -> list[str]:
    return [f"{p.name}#{i}\t{caption}" for p in photos for i, caption in enumerate(p.captions)]


def csv_lines(photos: Sequence[Photo]) -> list[str]:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows((p.name, caption) for p in photos for caption in p.captions)
    return ["image,caption", *file.getvalue().splitlines()]


def flickr8k_archives(folder: Path, photos: Sequence[Photo], images: str = "Flicker8k_Dataset") -> None:
    write_images(folder / images, photos)
    write_lines(folder / "Flickr8k.token.txt", token_lines(photos))
    write_lines(folder / "Flickr8k.lemma.token.txt", token_lines(photos))  # comes with them, and is not it
    for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True):
        write_lines(folder / f"Flickr_8k.{name}Images.txt", (p.name for p in photos if p.split == split))


def flickr8k_archives_unpacked_apart(folder: Path, photos: Sequence[Photo]) -> None:
    flickr8k_archives(folder / "Flickr8k_text", photos, "../Flickr8k_Dataset/Flickr8k_Dataset")


def kaggle(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder / "Images", photos)
    write_lines(folder / "captions.txt", csv_lines(photos))


def karpathy(folder: Path, photos: Sequence[Photo], name: str = "dataset_flickr8k.json") -> None:
    write_images(folder / "images", photos)
    write_json(folder / name, {"images": [karpathy_image(p) for p in photos], "dataset": "flickr8k"})


def karpathy_image(photo: Photo) -> dict[str, object]:
    sentences = [{"raw": caption, "tokens": caption.lower().split()} for caption in photo.captions]
    split = "val" if photo.split == "validation" else photo.split
    return {"filename": photo.name, "imgid": photo.number, "split": split, "sentences": sentences}


def karpathy_coco(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, coco_path)
    images = [
        {**karpathy_image(p), "filename": coco_name(p), "filepath": f"{coco_part(p)}2014", "cocoid": p.number}
        for p in photos
    ]
    images[0]["split"] = "restval"
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def coco_part(photo: Photo) -> str:
    return "train" if photo.split == "train" else "val"


def coco_name(photo: Photo) -> str:
    return f"COCO_{coco_part(photo)}2014_{photo.number:012d}.jpg"


def coco_path(photo: Photo) -> str:
    return f"{coco_part(photo)}2014/{coco_name(photo)}"


def coco(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, coco_path)
    for part in ("train", "val"):
        chosen = [p for p in photos if coco_part(p) == part]
        annotations = [
            {"id": 10 * p.number + i, "image_id": p.number, "caption": caption}
            for i in range(5)
            for p in chosen
            for caption in [p.captions[i]]
        ]
        images = [{"id": p.number, "file_name": coco_name(p)} for p in chosen]
        content = {"info": {}, "images": images, "annotations": annotations}
        write_json(folder / "annotations" / f"captions_{part}2014.json", content)


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
        rows = [{"file_name": p.name, "captions": p.captions} for p in photos if p.split == split]
        write_lines(folder / split / "metadata.jsonl", map(json.dumps, rows))


def imagefolder_csv(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos)
    rows = [(p.name, *p.captions, p.split) for p in photos]
    write_csv(folder / "metadata.csv", ["file_name", *(f"caption_{i}" for i in range(5)), "split"], rows)


def table_csv(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, lambda p: f"pictures/{p.name}")
    for split in SPLITS:
        rows = [(f"pictures/{p.name}", c) for p in photos if p.split == split for c in p.captions]
        write_csv(folder / f"{split}.csv", ["image", "caption"], rows)


def table_jsonl(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, lambda p: f"pictures/{p.name}")
    rows = [{"id": p.number, "image": f"pictures/{p.name}", "text": list(p.captions), "split": p.split} for p in photos]
    write_lines(folder / "all.jsonl", map(json.dumps, rows))


def table_parquet(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, lambda p: f"pictures/{p.name}")
    columns = {"path": [f"pictures/{p.name}" for p in photos], "split": [p.split for p in photos]}
    Dataset.from_dict({**columns, "captions": [p.captions for p in photos]}).to_parquet(folder / "all.parquet")


def embedded(photos: Sequence[Photo], captions: Callable[[Photo], dict[str, object]]) -> Dataset:
    rows = [{"image_id": p.name, "image": {"bytes": p.content, "path": p.name}, **captions(p)} for p in photos]
    dataset = Dataset.from_list(rows)
    return dataset.cast_column("image", ImageFeature()).cast(
        Features({**dataset.features, "image": ImageFeature(), "image_id": Value("string")})
    )


def hub_parquet(folder: Path, photos: Sequence[Photo]) -> None:
    (folder / "data").mkdir(parents=True)
    for split in SPLITS:
        chosen = [p for p in photos if p.split == split]
        dataset = embedded(chosen, lambda p: {f"caption_{i}": caption for i, caption in enumerate(p.captions)})
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def hub_parquet_of_lists(folder: Path, photos: Sequence[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    embedded(photos, lambda p: {"sentences": list(p.captions), "split": p.split}).to_parquet(folder / "test.parquet")


def hub_parquet_of_single_captions(folder: Path, photos: Sequence[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [{"image": {"bytes": p.content, "path": p.name}, "image_id": p.name, "caption": c}
                for p in photos if p.split == split for c in p.captions]  # fmt: skip
        Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(folder / f"{split}.parquet")


def saved(folder: Path, photos: Sequence[Photo]) -> None:
    splits = {
        split: embedded([p for p in photos if p.split == split], lambda p: {"captions": list(p.captions)})
        for split in SPLITS
    }
    DatasetDict(splits).save_to_disk(folder)


def text_pairs(folder: Path, photos: Sequence[Photo]) -> None:
    write_images(folder, photos, lambda p: f"{p.split}/{p.name}")
    for p in photos:
        write_lines(folder / p.split / f"{p.stem}.txt", p.captions)


def webdataset(folder: Path, photos: Sequence[Photo]) -> None:
    for split in SPLITS:
        chosen = [p for p in photos if p.split == split]
        for shard, start in enumerate(range(0, len(chosen), 30)):
            write_tar(folder / f"{split}-{shard:05d}.tar", [
                (f"{p.stem}{suffix}", content) for p in chosen[start : start + 30] for suffix, content in (
                    (".jpg", p.content), (".txt", "\n".join(p.captions).encode())
                )
            ])  # fmt: skip


def webdataset_json(folder: Path, photos: Sequence[Photo]) -> None:
    for split in SPLITS:
        write_tar(folder / split / "00000.tar.gz", [
            (f"./{p.stem}{suffix}", content) for p in photos if p.split == split for suffix, content in (
                (".json", json.dumps({"captions": p.captions}).encode()), (".jpg", p.content)
            )
        ])  # fmt: skip


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def by_name(photo: Photo) -> str:
    return photo.name


@dataclass(frozen=True)
class Case:
    """A layout to write, and what reading it must give."""

    write: Callable[..., None]
    format: str
    image_id: Callable[[Photo], str] = by_name
    splits: tuple[str, ...] = SPLITS  # that the files name


CASES = [
    Case(flickr8k_archives, "flickr8k"),
    Case(flickr8k_archives_unpacked_apart, "flickr8k"),
    Case(kaggle, "kaggle", splits=()),
    Case(karpathy, "karpathy"),
    Case(karpathy_coco, "karpathy", lambda p: str(p.number)),
    Case(coco, "coco", lambda p: str(p.number), ("train", "validation")),
    Case(flickr30k_csv, "flickr30k", splits=()),
    Case(flickr30k_token, "flickr30k", splits=()),
    Case(imagefolder_jsonl, "imagefolder"),
    Case(imagefolder_csv, "imagefolder"),
    Case(table_csv, "table"),
    Case(table_jsonl, "table"),
    Case(table_parquet, "table"),
    Case(hub_parquet, "parquet"),
    Case(hub_parquet_of_lists, "parquet"),
    Case(hub_parquet_of_single_captions, "parquet"),
    Case(saved, "saved"),
    Case(text_pairs, "text"),
    Case(webdataset, "webdataset", lambda p: p.stem),
    Case(webdataset_json, "webdataset", lambda p: p.stem),
]
