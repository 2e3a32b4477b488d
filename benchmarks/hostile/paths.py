"""Data sets of every layout that name a file, a folder, a device or an address elsewhere, in many ways."""

from __future__ import annotations

import csv
import ctypes
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .captions import write_files
from .layouts import Photo, make_photos
from .pool import Case, Outcome, witness

IN_OPEN = 0x20  # of inotify: a file, or a folder, was opened
NUM_GOOD = 6  # photos of each data set that are where they belong

# What stands in the place of a photo's name, by kind: {outside} is a folder beside that of the data, with the image
# secret.jpg, the text secret.txt, and a FIFO; {data} is the folder of the data, {url} the server.
NAMES = {
    "absolute": "{outside}/secret.jpg",
    "absolute_text": "{outside}/secret.txt",
    "relative": "../outside/secret.jpg",
    "relative_far": "../../../../../../../../..{outside}/secret.jpg",
    "through_folder": "images/../../outside/secret.jpg",
    "through_missing_folder": "missing/../../outside/secret.jpg",
    "through_data": "{data}/../outside/secret.jpg",
    "doubled_slashes": "..//outside//secret.jpg",
    "slashes_at_start": "//{outside}/secret.jpg",
    "dots": "./.././outside/./secret.jpg",
    "backslashes": "..\\outside\\secret.jpg",
    "mixed_slashes": "images\\../..\\outside/secret.jpg",
    "drive": "C:\\..\\outside\\secret.jpg",
    "percent": "..%2Foutside%2Fsecret.jpg",
    "doubly_percent": "%252e%252e/outside/secret.jpg",
    "full_width_dots": "\uff0e\uff0e/outside/secret.jpg",
    "full_width_slash": "..\uff0foutside\uff0fsecret.jpg",
    "ellipsis": "\u2025/outside/secret.jpg",
    "division_slash": "..\u2215outside\u2215secret.jpg",
    "null_byte": "../outside/secret.jpg\0.jpg",
    "spaces": "  ../outside/secret.jpg  ",
    "quotes": "'../outside/secret.jpg'",
    "home": "~/../..{outside}/secret.jpg",
    "variable": "$OUTSIDE/secret.jpg",
    "sibling_of_same_prefix": "../data-outside/secret.jpg",
    "link": "link.jpg",
    "chain_of_links": "chain.jpg",
    "relative_link": "relative_link.jpg",
    "link_in_folder": "linked/secret.jpg",
    "through_linked_folder": "linked/../outside/secret.jpg",
    "loop_of_links": "loop.jpg",
    "link_to_device": "zero.jpg",
    "link_to_process": "environ.jpg",
    "device": "/dev/zero",
    "environment": "/proc/self/environ",
    "own_folder": "/proc/self/cwd/../outside/secret.jpg",
    "root_of_process": "/proc/self/root{outside}/secret.jpg",
    "fifo": "{outside}/fifo.jpg",
    "fifo_inside": "fifo.jpg",
    "folder": "{outside}",
    "http": "{url}/secret.jpg",
    "http_upper_case": "HTTP://{address}/secret.jpg",
    "http_credentials": "http://user:password@{address}/secret.jpg",
    "http_spaces": " {url}/secret.jpg",
    "http_without_slashes": "http:{address}/secret.jpg",
    "https": "https://{address}/secret.jpg",
    "ftp": "ftp://{address}/secret.jpg",
    "network_share": "\\\\127.0.0.1\\share\\secret.jpg",
    "object_store": "s3://bucket/secret.jpg",
    "hub": "hf://datasets/somebody/something/secret.jpg",
    "file": "file://{outside}/secret.jpg",
    "file_short": "file:{outside}/secret.jpg",
    "file_host": "file://localhost{outside}/secret.jpg",
    "local": "local://{outside}/secret.jpg",
    "zip_chain": "zip://secret.jpg::{outside}/secret.zip",
    "cache_chain": "simplecache::{url}/secret.jpg",
    "cached_file": "filecache::file://{outside}/secret.jpg",
    "tar_chain": "tar://secret.jpg::{url}/secret.tar",
    "gzip_chain": "gzip://secret.jpg::{outside}/secret.jpg.gz",
    "data_address": "data:image/jpeg;base64,{base64}",
    "long": "../outside/" + 5000 * "a" + ".jpg",
    "empty": "",
    "dot": ".",
    "dot_dot": "..",
}  # fmt: skip
LINKED_FILES = ("caption_file_link", "caption_folder_link", "split_list_link", "image_folder_link")


def _csv(photos: list[Photo], name: str) -> dict[str, bytes]:
    file = io.StringIO()
    csv.writer(file).writerows([["image", "caption"], *([n, f"a dog of {n[:40]}"] for n in [*_names(photos), name])])
    return {"captions.csv": file.getvalue().encode()}


def _lines(photos: list[Photo], name: str) -> dict[str, bytes]:
    names = [*_names(photos), name]
    return {"Flickr8k.token.txt": "".join(f"{n}#0\ta dog\n{n}#1\ta cat\n" for n in names).encode()}


def _kaggle(photos: list[Photo], name: str) -> dict[str, bytes]:
    return {"captions.txt": ("image,caption\n" + "".join(f"{n},a dog\n" for n in [*_names(photos), name])).encode()}


def _coco(photos: list[Photo], name: str) -> dict[str, bytes]:
    names = [*_names(photos), name]
    images = [{"id": i, "file_name": n, "coco_url": name} for i, n in enumerate(names)]
    captions = [{"id": i, "image_id": i, "caption": "a dog"} for i in range(len(names))]
    return {"annotations/captions_train2017.json": json.dumps({"images": images, "annotations": captions}).encode()}


def _karpathy(photos: list[Photo], name: str) -> dict[str, bytes]:
    records = [
        {"filename": n, "filepath": name if n != name else "", "split": "train", "sentences": [{"raw": "a dog"}]}
        for n in [*_names(photos), name]
    ]
    return {"dataset_flickr8k.json": json.dumps({"images": records}).encode()}


def _json_lines(photos: list[Photo], name: str) -> dict[str, bytes]:
    lines = [json.dumps({"file_name": n, "captions": ["a dog"]}) for n in [*_names(photos), name]]
    return {"metadata.jsonl": "\n".join(lines).encode()}


def _json_list(photos: list[Photo], name: str) -> dict[str, bytes]:
    return {"captions.json": json.dumps([{"image": n, "caption": "a dog"} for n in [*_names(photos), name]]).encode()}


def _parquet(images: list[Any]) -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": images, "captions": [["a dog"]] * len(images)}), file)
    return {"train.parquet": file.getvalue()}


def _parquet_of_names(photos: list[Photo], name: str) -> dict[str, bytes]:
    return _parquet([*_names(photos), name])


def _parquet_of_structs(photos: list[Photo], name: str) -> dict[str, bytes]:
    return _parquet([*_structs(photos), {"bytes": None, "path": name}])


def _parquet_of_path_structs(photos: list[Photo], name: str) -> dict[str, bytes]:
    return _parquet([{"path": n} for n in [*_names(photos), name]])


def _parquet_of_empty_bytes(photos: list[Photo], name: str) -> dict[str, bytes]:
    return _parquet([*_structs(photos), {"bytes": b"", "path": name}])


def _saved(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return a saved data set; `datasets` gives every image a struct of bytes and path."""
    return _save([*_structs(photos), {"bytes": None, "path": name}])


def _save(images: list[dict[str, Any]]) -> dict[str, bytes]:
    import tempfile

    from datasets import Dataset, Features, List, Value

    structs = Features(
        {"image": {"bytes": Value("binary"), "path": Value("string")}, "captions": List(Value("string"))}
    )
    dataset = Dataset.from_dict({"image": images, "captions": [["a dog"]] * len(images)}, features=structs)
    with tempfile.TemporaryDirectory() as folder:
        dataset.save_to_disk(folder)
        files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    information = json.loads(files["dataset_info.json"])
    information["features"]["image"] = {"_type": "Image"}
    return files | {"dataset_info.json": json.dumps(information).encode()}


def _saved_state(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return a saved data set whose state names a data file elsewhere."""
    files = _save(_structs(photos))
    state = json.loads(files["state.json"])
    state["_data_files"].append({"filename": name})
    return files | {"state.json": json.dumps(state).encode()}


def _saved_splits(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return saved splits, of which one is named elsewhere."""
    files = {f"train/{file}": content for file, content in _save(_structs(photos)).items()}
    return files | {"dataset_dict.json": json.dumps({"splits": ["train", name]}).encode()}


def _tar_names(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return a shard with a member of this name."""
    return _tar(photos, [(name, photos[0].content, tarfile.REGTYPE, "")])


def _tar_symbolic_links(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return a shard with a symbolic link to this name."""
    return _tar(photos, [("x.jpg", b"", tarfile.SYMTYPE, name), ("x.txt", b"a dog", tarfile.REGTYPE, "")])


def _tar_hard_links(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return a compressed shard with a hard link to this name."""
    files = _tar(photos, [("x.jpg", b"", tarfile.LNKTYPE, name), ("x.txt", b"a dog", tarfile.REGTYPE, "")])
    return {"train-00000.tar.gz": gzip.compress(files["train-00000.tar"])}


def _tar_json(photos: list[Photo], name: str) -> dict[str, bytes]:
    """Return a shard whose samples name their image."""
    fields = json.dumps({"caption": "a dog", "image": name, "url": name, "path": name, "image_id": name}).encode()
    return _tar(photos, [("x.json", fields, tarfile.REGTYPE, "")])


def _tar(photos: list[Photo], members: list[tuple[str, bytes, bytes, str]]) -> dict[str, bytes]:
    file = io.BytesIO()
    good = [member for p in photos for member in ((p.name, p.content, b"0", ""), (p.stem + ".txt", b"a dog", b"0", ""))]
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content, kind, target in [*good, *members]:
            header = tarfile.TarInfo(name)
            header.type, header.linkname, header.size = kind, target, len(content)
            tar.addfile(header, io.BytesIO(content))
    return {"train-00000.tar": file.getvalue()}


def _names(photos: list[Photo]) -> list[str]:
    return [f"images/{photo.name}" for photo in photos]


def _structs(photos: list[Photo]) -> list[dict[str, Any]]:
    return [{"bytes": photo.content, "path": photo.name} for photo in photos]


WRITERS = {
    function.__name__.strip("_"): function
    for function in (
        *(_csv, _lines, _kaggle, _coco, _karpathy, _json_lines, _json_list, _parquet_of_names, _parquet_of_structs),
        *(_parquet_of_path_structs, _parquet_of_empty_bytes, _saved, _saved_state, _saved_splits, _tar_names),
        *(_tar_symbolic_links, _tar_hard_links, _tar_json),
    )
}


def cases(count: int, seed: int) -> list[Case]:
    """Return every layout with nothing outside, then pairs of a layout and a kind of name, spread over all of both."""
    rng = random.Random(seed)
    inside = [f"{layout}/inside" for layout in WRITERS if layout not in ("saved_state", "saved_splits")]
    pairs = [f"{layout}/{name}" for layout in WRITERS for name in NAMES]
    pairs += [f"{layout}/{link}" for layout in WRITERS for link in LINKED_FILES]
    rng.shuffle(pairs)
    return [Case("paths", pair, seed * 10**6 + n) for n, pair in enumerate(inside + pairs[:count])]


def prepare(case: Case, folder: Path) -> Callable[[Outcome], None]:
    """Write the data set of a case and what lies outside of it, and return the job that reads all of it."""
    layout, kind = case.name.split("/")
    data, photos = folder / "data", make_photos()[:NUM_GOOD]
    outside = _write_outside(folder, photos)
    name = NAMES.get(kind, "images/photo_00.jpg").format(
        outside=outside, data=data, url=witness().url, address=witness().url.removeprefix("http://"), base64="/9j/" * 50
    )
    files = WRITERS[layout](photos, name.replace("\0", "") if "tar" in layout else name)
    write_files(data, {**{f"images/{p.name}": p.content for p in photos}, **files})
    _link(data, outside, kind, [*files])
    os.chdir(data if case.seed % 2 else folder)  # paths may be taken relative to where the program runs
    watch = FolderWatch([outside, *(path for path in outside.rglob("*") if path.is_dir())])

    def job(outcome: Outcome) -> None:
        for streaming in (False, True):
            num_opened = 0
            with outcome.watch():
                num_opened = _read(data, streaming=streaming)
            if kind == "inside" and num_opened < NUM_GOOD:
                outcome.faults.setdefault("raw", f"only {num_opened} images of intact data are read")
        if seen := watch.opened():
            outcome.faults["opened"] = f"{seen} in the folder outside"

    return job


def _write_outside(folder: Path, photos: list[Photo]) -> Path:
    """Write a folder beside that of the data, with all that names might mean."""
    outside = folder / "outside"
    image = photos[-1].content
    files = {"secret.jpg": image, "secret.txt": b"a secret\n", "secret.jpg.gz": gzip.compress(image)}
    write_files(
        outside, files | {"captions/metadata.jsonl": b'{"file_name": "secret.jpg", "captions": ["a secret"]}\n'}
    )
    os.mkfifo(outside / "fifo.jpg")
    (folder / "data-outside").symlink_to(outside)
    os.environ["OUTSIDE"] = str(outside)
    return outside


def _link(data: Path, outside: Path, kind: str, files: list[str]) -> None:
    """Put the link, FIFO or device that a kind of name means into the folder of the data."""
    links = {
        "link": ("link.jpg", outside / "secret.jpg"),
        "relative_link": ("relative_link.jpg", "../outside/secret.jpg"),
        "link_in_folder": ("linked", outside),
        "through_linked_folder": ("linked", outside),
        "link_to_device": ("zero.jpg", "/dev/zero"),
        "link_to_process": ("environ.jpg", "/proc/self/environ"),
        "loop_of_links": ("loop.jpg", "loop.jpg"),
        "chain_of_links": ("chain.jpg", "images/next.jpg"),
        "image_folder_link": ("more", outside),
        "caption_folder_link": ("captions", outside / "captions"),
        "split_list_link": ("Flickr_8k.trainImages.txt", outside / "secret.txt"),
    }
    if kind in links:
        path, target = links[kind]
        (data / path).symlink_to(target)
    if kind == "chain_of_links":
        (data / "images/next.jpg").symlink_to(outside / "secret.jpg")
    elif kind == "fifo_inside":
        os.mkfifo(data / "fifo.jpg")
    elif kind == "caption_file_link":
        moved = outside / Path(files[0]).name
        (data / files[0]).rename(moved)
        (data / files[0]).symlink_to(moved)


def _read(data: Path, *, streaming: bool) -> int:
    """Read all rows, open all images in every way in which they are opened, and return their number."""
    from hf_captioner import load_captions
    from hf_captioner.data.rows import open_row, undecoded

    num_opened = 0
    for split in load_captions(str(data), streaming=streaming, skip_broken=True, report=lambda line: None).values():
        for row in undecoded(split):
            try:
                open_row(row)
            except ValueError:
                continue
        for row in split:
            row["image"].load()
            num_opened += 1
    return num_opened


class FolderWatch:
    """Observer of folders: tells which of their files, or whether they themselves, are opened by anybody."""

    def __init__(self, folders: list[Path]) -> None:
        self.inotify = ctypes.CDLL(None, use_errno=True)
        self.file = self.inotify.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for folder in folders:
            watched = self.inotify.inotify_add_watch(self.file, os.fsencode(folder), IN_OPEN)
            assert self.file >= 0 and watched >= 0, f"{folder} can't be watched"

    def opened(self) -> list[str]:
        """Return the names of what was opened, and end the watch."""
        try:
            events = os.read(self.file, 2**16)
        except BlockingIOError:
            return []
        finally:
            os.close(self.file)
        names = []
        while events:
            size = int.from_bytes(events[12:16], "little")
            names.append(events[16 : 16 + size].rstrip(b"\0").decode(errors="replace") or "the folder itself")
            events = events[16 + size :]
        return sorted({*names})
