"""Small intact data sets in every layout, as the contents of their files, with what each part of a file says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .images import picture, saved

NUM_PHOTOS = 12


class Photo(NamedTuple):
    """An image with its captions."""

    name: str
    content: bytes
    captions: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.removesuffix(".jpg")


class Entry(NamedTuple):
    """A part of a file that gives captions to a photo; where it stands whole, a reader must find them."""

    file: str
    text: bytes
    photo: int
    captions: tuple[str, ...]
    is_line: bool = False  # whether it must have a line of its own


@dataclass
class Layout:
    """The files of a data set, those among them that may be damaged, and the entries of the latter."""

    files: dict[str, bytes]
    targets: list[str]
    entries: list[Entry] = field(default_factory=list)


@cache
def make_photos() -> list[Photo]:
    """Draw photos, and give them captions with commas, quotes and an accent."""
    return [
        Photo(
            f"photo_{n:02d}.jpg",
            saved(picture(seed=n), "JPEG"),
            (
                f"a brown dog runs over {n} meadows",
                f"{n + 20} children, all of them wet, play in the rain",
                f'the sign says "{n}" beside a café',
            ),
        )
        for n in range(NUM_PHOTOS)
    ]


def _image_files(folder: str = "") -> dict[str, bytes]:
    return {folder + photo.name: photo.content for photo in make_photos()}


def _csv_line(cells: Iterable[object], delimiter: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="").writerow(cells)
    return file.getvalue()


def _of_lines(
    file: str, header: Sequence[str], lines: Iterable[tuple[str, int, Sequence[str]]], folder: str = "", **more: bytes
) -> Layout:
    """Return a layout with a file whose lines give captions to photos."""
    entries = [Entry(file, line.encode(), photo, tuple(captions), True) for line, photo, captions in lines]
    content = b"".join(line + b"\n" for line in [*(line.encode() for line in header), *(e.text for e in entries)])
    return Layout({**_image_files(folder), file: content, **more}, [file, *more], entries)


def _numbered() -> list[tuple[int, Photo, int, str]]:
    """Return the index of each photo, the photo, the number of each of its captions, and the caption."""
    return [(n, photo, i, text) for n, photo in enumerate(make_photos()) for i, text in enumerate(photo.captions)]


def table(delimiter: str = ",", file: str = "captions.csv") -> Layout:
    """Return a table with a row for each caption."""
    lines = [(_csv_line([f"images/{p.name}", text], delimiter), n, [text]) for n, p, _, text in _numbered()]
    return _of_lines(file, [_csv_line(["image", "caption"], delimiter)], lines, "images/")


def wide_table() -> Layout:
    """Return a table with a column for each of an image's captions."""
    lines = [(_csv_line([p.name, *p.captions]), n, p.captions) for n, p in enumerate(make_photos())]
    return _of_lines("metadata.csv", ["file_name,caption_0,caption_1,caption_2"], lines)


def table_of_lists() -> Layout:
    """Return a table with lists of captions in one column, as pandas writes them."""
    lines = [(_csv_line([p.name, str(list(p.captions))]), n, p.captions) for n, p in enumerate(make_photos())]
    return _of_lines("captions.csv", ["image,captions"], lines)


def kaggle() -> Layout:
    """Return Flickr8k as Kaggle has it."""
    lines = [(_csv_line([photo.name, text]), n, [text]) for n, photo, _, text in _numbered()]
    return _of_lines("captions.txt", ["image,caption"], lines, "Images/")


def flickr8k() -> Layout:
    """Return Flickr8k's archives, with lists of the images of each split."""
    lines = [(f"{photo.name}#{i}\t{text}", n, [text]) for n, photo, i, text in _numbered()]
    names = [photo.name for photo in make_photos()]
    splits = {"train": names[:8], "dev": names[8:10], "test": names[10:]}
    lists = {f"Flickr_8k.{split}Images.txt": ("\n".join(part) + "\n").encode() for split, part in splits.items()}
    return _of_lines("Flickr8k.token.txt", [], lines, "Flicker8k_Dataset/", **lists)


def flickr30k() -> Layout:
    """Return Flickr30k's table."""
    lines = [(f"{photo.name}| {i}| {text}", n, [text]) for n, photo, i, text in _numbered()]
    return _of_lines("results.csv", ["image_name| comment_number| comment"], lines, "flickr30k_images/")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def coco() -> Layout:
    """Return COCO's annotations."""
    file = "annotations/captions_train2017.json"
    images = [{"id": n + 500, "file_name": photo.name} for n, photo in enumerate(make_photos())]
    captions = [(n, text, {"id": 100 * n + i, "image_id": n + 500, "caption": text}) for n, _, i, text in _numbered()]
    content = _json({"images": images, "annotations": [record for *_, record in captions]})
    entries = [Entry(file, _json(record), n, (text,)) for n, text, record in captions]
    return Layout({**_image_files("train2017/"), file: content}, [file], entries)


def karpathy() -> Layout:
    """Return Karpathy's splits."""
    records = [
        {"filename": photo.name, "imgid": n, "split": ("train", "val", "test")[n % 3]}
        | {"sentences": [{"raw": text, "tokens": text.split()} for text in photo.captions]}
        for n, photo in enumerate(make_photos())
    ]
    entries = [
        Entry("dataset_flickr8k.json", _json(record), n, make_photos()[n].captions) for n, record in enumerate(records)
    ]
    content = _json({"images": records, "dataset": "flickr8k"})
    return Layout({**_image_files("images/"), "dataset_flickr8k.json": content}, ["dataset_flickr8k.json"], entries)


def json_list() -> Layout:
    """Return a list of images with a caption each, as LAVIS and BLIP have it."""
    records = [(n, text, {"image": photo.name, "caption": text}) for n, photo, _, text in _numbered()]
    entries = [Entry("captions.json", _json(record), n, (text,)) for n, text, record in records]
    content = _json([record for *_, record in records])
    return Layout({**_image_files(), "captions.json": content}, ["captions.json"], entries)


def json_lines() -> Layout:
    """Return JSON lines with all captions of an image in a line."""
    records = [{"file_name": photo.name, "captions": photo.captions} for photo in make_photos()]
    lines = [(_json(record).decode(), n, make_photos()[n].captions) for n, record in enumerate(records)]
    return _of_lines("metadata.jsonl", [], lines)


def single_json_lines() -> Layout:
    """Return JSON lines with one caption each."""
    lines = [(_json({"image": p.name, "caption": text}).decode(), n, [text]) for n, p, _, text in _numbered()]
    return _of_lines("train.jsonl", [], lines)


def text_pairs() -> Layout:
    """Return texts beside images."""
    texts = {f"{photo.stem}.txt": "".join(f"{text}\n" for text in photo.captions).encode() for photo in make_photos()}
    entries = [Entry(f"{photo.stem}.txt", text.encode(), n, (text,), True) for n, photo, _, text in _numbered()]
    return Layout({**_image_files(), **texts}, [*texts], entries)


def rows() -> list[dict[str, Any]]:
    """Return a row for each photo, with its image inside."""
    return [
        {"image": {"bytes": p.content, "path": p.name}, "captions": list(p.captions), "image_id": p.stem}
        for p in make_photos()
    ]


def parquet(**options: Any) -> Layout:
    """Return a Parquet file with images inside."""
    return Layout({"train.parquet": _parquet(rows(), **options)}, ["train.parquet"])


def single_parquet() -> Layout:
    """Return a Parquet file with images inside and a caption in each row."""
    single = [{"image": row["image"], "caption": text} for row in rows() for text in row["captions"]]
    return Layout({"train.parquet": _parquet(single)}, ["train.parquet"])


def parquet_of_names() -> Layout:
    """Return a Parquet file that names image files."""
    named = [{"image": photo.name, "captions": list(photo.captions)} for photo in make_photos()]
    return Layout({**_image_files(), "captions.parquet": _parquet(named)}, ["captions.parquet"])


def _parquet(values: list[dict[str, Any]], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet as writer

    file = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(values), file, **options)
    return file.getvalue()


def saved_dataset(num_splits: int = 1) -> Layout:
    """Return what `save_to_disk` of a data set writes."""
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    dataset = Dataset.from_list(rows()).cast_column("image", ImageFeature())
    with tempfile.TemporaryDirectory() as folder:
        if num_splits > 1:
            parts = {"train": dataset.select(range(8)), "validation": dataset.select(range(8, NUM_PHOTOS))}
            DatasetDict(parts).save_to_disk(folder)
        else:
            dataset.save_to_disk(folder)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return Layout(files, [*files])


def member(name: str, content: bytes) -> bytes:
    """Return a file as it lies in a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def shard(*suffixes: str, is_compressed: bool = False) -> Layout:
    """Return a tar shard with captions in files of some suffixes."""
    texts = {
        ".txt": lambda photo: "\n".join(photo.captions).encode(),
        ".json": lambda photo: _json({"captions": photo.captions}),
    }
    file = "train-00000.tar" + is_compressed * ".gz"
    entries = [
        Entry(
            file,
            member(photo.name, photo.content) + b"".join(member(photo.stem + s, texts[s](photo)) for s in suffixes),
            n,
            photo.captions,
        )
        for n, photo in enumerate(make_photos())
    ]
    content = b"".join(entry.text for entry in entries) + bytes(1024)
    return Layout({file: gzip.compress(content, mtime=0) if is_compressed else content}, [file], entries)


@cache
def make_layout(name: str) -> Layout:
    """Return a layout by its name."""
    return LAYOUTS[name]()


LAYOUTS = {
    "csv": table,
    "tsv": lambda: table("\t", "captions.tsv"),
    "semicolons": lambda: table(";"),
    "wide_csv": wide_table,
    "csv_of_lists": table_of_lists,
    "kaggle": kaggle,
    "flickr8k": flickr8k,
    "flickr30k": flickr30k,
    "coco": coco,
    "karpathy": karpathy,
    "json_list": json_list,
    "json_lines": json_lines,
    "single_json_lines": single_json_lines,
    "text_pairs": text_pairs,
    "parquet": parquet,
    "plain_parquet": lambda: parquet(compression="none", use_dictionary=False),
    "single_parquet": single_parquet,
    "parquet_of_names": parquet_of_names,
    "saved": saved_dataset,
    "saved_splits": lambda: saved_dataset(2),
    "tar": lambda: shard(".txt"),
    "tar_of_json": lambda: shard(".json"),
    "tar_of_both": lambda: shard(".json", ".txt"),
    "tar_gz": lambda: shard(".txt", is_compressed=True),
}
