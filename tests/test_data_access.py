"""A stranger's data set opens nothing that was not given: no file elsewhere, no device, no address."""

from __future__ import annotations

import http.server
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import layout_writers as lw
import pyarrow as pa
import pytest
from datasets import Dataset
from layout_writers import Photo
from pyarrow import parquet

from hf_captioner import load_captions
from hf_captioner.data.layouts import stored_tables
from hf_captioner.data.layouts.damage import Damage
from hf_captioner.data.rows import open_row, undecoded

WATCHED: list[str] = []  # files and hosts that the process opens while this has an entry "on"


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED and event in ("open", "socket.connect", "socket.getaddrinfo"):
        WATCHED.append(f"{event} {arguments[:2]}")


sys.addaudithook(_watch)


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def photos() -> list[Photo]:
    return list(lw.make_photos()[:8])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.fixture
def outside(tmp_path: Path, photos: list[Photo]) -> Path:
    """Return a folder beside that of the data set, with an image that is none of its own."""
    lw.write_images(tmp_path / "outside", photos[-1:], lambda _: "secret.jpg")
    return tmp_path / "outside"


@pytest.fixture
def opened(outside: Path) -> Iterator[Callable[[], list[str]]]:
    """Return a function that lists what was opened outside, devices, and connections."""
    WATCHED.append("on")
    yield lambda: [
        line for line in WATCHED if any(word in line for word in (str(outside), "/dev/", "/proc/", "socket"))
    ]
    WATCHED.clear()


@pytest.fixture
def address(photos: list[Photo]) -> Iterator[str]:
    """Return the address of an image on a server of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(photos[-1].content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret.jpg"
    server.shutdown()


def read(folder: Path | str, **options: Any) -> tuple[dict[str, list[str]], str]:
    """Open all images of a data set, and return its captions by image id and the report."""
    report: list[str] = []
    captions = {}
    for rows in load_captions(str(folder), report=report.append, **options).values():
        for row in undecoded(rows):
            open_row(row)
            captions[row["image_id"]] = row["captions"]
    return captions, "\n".join(report)


Names = list[str]  # of images elsewhere


def csv_names(folder: Path, photos: list[Photo], names: Names) -> None:
    rows = [*((name, "a secret") for name in names), *((photo.name, "a dog") for photo in photos)]
    lw.write_csv(folder / "list.csv", ["image", "caption"], rows)


def jsonl_names(folder: Path, photos: list[Photo], names: Names) -> None:
    rows = [{"file_name": name, "text": "a dog"} for name in (*names, *(photo.name for photo in photos))]
    lw.write_lines(folder / "metadata.jsonl", map(json.dumps, rows))


def parquet_names(folder: Path, photos: list[Photo], names: Names) -> None:
    names = [*names, *(photo.name for photo in photos)]
    parquet.write_table(pa.table({"image": names, "caption": ["a dog"] * len(names)}), folder / "list.parquet")


def karpathy_names(folder: Path, photos: list[Photo], names: Names) -> None:
    names = [*names, *(photo.name for photo in photos)]
    images = [lw.karpathy_image(photos[0]) | {"filename": name} for name in names]
    lw.write_json(folder / "dataset_flickr8k.json", {"images": images})


def coco_names(folder: Path, photos: list[Photo], names: Names) -> None:
    numbered = list(enumerate([*names, *(photo.name for photo in photos)]))
    images = [{"id": number, "file_name": name} for number, name in numbered]
    annotations = [{"id": number, "image_id": number, "caption": "a dog"} for number, _ in numbered]
    lw.write_json(folder / "captions_train2017.json", {"images": images, "annotations": annotations})


def structs(photos: list[Photo], names: Names) -> dict[str, list[Any]]:
    """Return columns of images that are paths, and of images whose bytes come with the path of an existing file."""
    images = [{"bytes": None, "path": name} for name in names]
    images += [{"bytes": photo.content, "path": names[0]} for photo in photos]
    return {"image": images, "caption": ["a dog"] * len(images), "image_id": [f"id{i}" for i in range(len(images))]}


def parquet_structs(folder: Path, photos: list[Photo], names: Names) -> None:
    columns = structs(photos, names)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    parquet.write_table(pa.table(columns | {"image": pa.array(columns["image"], kind)}), folder / "train.parquet")


def saved_structs(folder: Path, photos: list[Photo], names: Names) -> None:
    Dataset.from_dict(structs(photos, names)).save_to_disk(folder)


WRITERS = [csv_names, jsonl_names, parquet_names, karpathy_names, coco_names, parquet_structs, saved_structs]


def link(folder: Path, target: Path | str) -> str:
    """Make a link with a new name, and return the name."""
    name = f"link{len(os.listdir(folder))}.jpg"
    (folder / name).symlink_to(target)
    return name


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.jpg")
    return "pipe.jpg"


def unix_socket(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(os.path.relpath(folder / "socket.jpg"))
    return "socket.jpg"


Make = Callable[[Path, Path, str], str]
# Names of images that lead elsewhere, made from the data set's folder, the one outside, and the address of a server.
ON_REQUEST: dict[str, Make] = {
    "absolute path": lambda folder, outside, url: str(outside / "secret.jpg"),
    "relative path": lambda folder, outside, url: "../outside/secret.jpg",
    "long way": lambda folder, outside, url: "../set/../outside/secret.jpg",
    "path of Windows": lambda folder, outside, url: "..\\outside\\secret.jpg",
    "link": lambda folder, outside, url: link(folder, outside / "secret.jpg"),
    "link to a link": lambda folder, outside, url: link(folder, link(folder, outside / "secret.jpg")),
    "relative link": lambda folder, outside, url: link(folder, "../outside/secret.jpg"),
    "linked folder": lambda folder, outside, url: link(folder, outside) + "/secret.jpg",
    "name in a linked folder": lambda folder, outside, url: (link(folder, outside), "secret.jpg")[1],
    "way through a linked folder": lambda folder, outside, url: link(folder, outside) + "/../outside/secret.jpg",
    "http": lambda folder, outside, url: url,
    "capitals": lambda folder, outside, url: url.replace("http", "HTTP"),
}
NEVER: dict[str, Make] = {
    "device": lambda folder, outside, url: "/dev/zero",
    "link to a device": lambda folder, outside, url: link(folder, "/dev/zero"),
    "pipe": lambda folder, outside, url: pipe(folder),
    "socket": lambda folder, outside, url: unix_socket(folder),
    "folder": lambda folder, outside, url: "..",
    "file": lambda folder, outside, url: (outside / "secret.jpg").as_uri(),
    "chain": lambda folder, outside, url: f"zip://secret.jpg::{url}",
    "chain behind http": lambda folder, outside, url: f"{url}::{(outside / 'secret.jpg').as_uri()}",
    "Hub": lambda folder, outside, url: "hf://datasets/somebody/private/secret.jpg",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_images_elsewhere_are_left_out_unopened(write, streaming, photos, folder, outside, address, opened):
    lw.write_images(folder, photos)
    names = [make(folder, outside, address) for make in (ON_REQUEST | NEVER).values()]
    write(folder, photos, names)
    captions, report = read(folder, streaming=streaming, skip_broken=True)
    left_out = {line for line in report.splitlines() if line.startswith("Left out: ")}
    assert len(captions) == len(photos) and len(left_out) == len(names), report
    assert opened() == []


@pytest.mark.parametrize("write", WRITERS)
def test_images_elsewhere_are_refused_with_their_row_or_opened_on_request(write, photos, folder, outside, address):
    lw.write_images(folder, photos)
    names = [ON_REQUEST[kind](folder, outside, address) for kind in ("relative path", "http")]
    write(folder, photos, names)
    place = r"(list\.csv, line 2|metadata\.jsonl, line 1|row 0|images\[0\])"
    with pytest.raises(ValueError, match=place + r".* leaves the data set's folder .*--allow_outside"):
        read(folder)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.* is a URL.*--allow_urls"):
        read(folder, allow_outside=True)
    assert len(read(folder, allow_outside=True, allow_urls=True)[0]) == len(photos) + 2


@pytest.mark.parametrize("kind", ON_REQUEST | NEVER)
def test_each_way_elsewhere_is_refused(kind, photos, folder, outside, address, opened):
    lw.write_images(folder, photos)
    name = (ON_REQUEST | NEVER)[kind](folder, outside, address)
    csv_names(folder, photos, [name])
    with pytest.raises(ValueError, match=r"list\.csv, line 2: "):
        read(folder)
    assert opened() == []
    if kind in ON_REQUEST:
        assert len(read(folder, allow_outside=True, allow_urls=True)[0]) == len(photos) + 1
    else:
        with pytest.raises(ValueError, match=r"list\.csv, line 2: .*(no regular file but a|never opened)"):
            read(folder, allow_outside=True, allow_urls=True)


# How a data set that lies elsewhere as a whole is reached from its folder: what is written there, and the file linked.
LINKED_FILES = [
    (lw.table_csv, "train.csv"),
    (lw.flickr8k_archives, "Flickr8k.token.txt"),
    (lw.flickr8k_archives, "Flickr_8k.trainImages.txt"),
    (lw.karpathy, "dataset_flickr8k.json"),
    (lw.imagefolder_jsonl, "train/metadata.jsonl"),
    (lw.table_parquet, "all.parquet"),
    (lw.hub_parquet, "data/train-00000-of-00001.parquet"),
    (lw.webdataset, "train-00000.tar"),
    (lw.text_pairs, None),
    (lw.saved, "dataset_dict.json"),
    (lw.saved, "train/state.json"),
    (lw.saved, "train/data-00000-of-00001.arrow"),
]


@pytest.mark.parametrize(("write", "file"), LINKED_FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_linked_files_follow_the_same_rule_as_linked_images(write, file, streaming, folder, outside, opened):
    photos = lw.make_photos()
    photos = [*photos[:4], *photos[80:82], *photos[98:]]
    write(folder, photos)
    file = folder / (file or f"train/{photos[0].stem}.txt")
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)
    with pytest.raises(ValueError, match=r"leaves the data set's folder .*--allow_outside"):
        read(folder, streaming=streaming)
    assert opened() == []
    assert len(read(folder, streaming=streaming, allow_outside=True)[0]) == len(photos)
    if file.suffix not in (".json", ".arrow") and write not in (lw.flickr8k_archives, lw.text_pairs):
        assert load_captions(str(file), streaming=streaming)  # a link may lead anywhere if the user gives it


def test_saved_data_sets_open_no_files_elsewhere(photos, folder, outside, opened):
    lw.saved(folder, lw.make_photos())
    Dataset.from_dict({"image": ["secret.jpg"], "caption": ["a secret"]}).save_to_disk(outside)
    state = json.loads((folder / "train/state.json").read_text())
    state["_data_files"][0]["filename"] = "../../outside/data-00000-of-00001.arrow"
    (folder / "train/state.json").write_text(json.dumps(state | {"_fingerprint": "../../../x"}))
    WATCHED[:] = ["on"]
    with pytest.raises(ValueError, match=r"'train/\.\./\.\./outside/data.* leaves the data set's folder"):
        read(folder)
    (folder / "dataset_dict.json").write_text('{"splits": ["test", "../outside"]}')
    with pytest.raises(ValueError, match=r"'\.\./outside/state\.json' .*leaves the data set's folder"):
        read(folder)
    assert opened() == []
    assert len(read(folder, skip_broken=True)[0]) == 10


def test_columns_of_other_files_are_not_opened(photos, folder, outside, opened):
    """The types that a data set gives its columns would make `datasets` open images and sounds in them."""
    rows = [lw.stored(photo) | {"captions": photo.captions, "other": str(outside / "secret.jpg")} for photo in photos]
    for name, column in (("parquet", "other"), ("saved", "other"), ("saved", "captions")):
        dataset = Dataset.from_list(rows).cast_column("image", stored_tables.ImageFeature())
        if column == "captions":
            dataset = dataset.remove_columns("captions").rename_column("other", "captions")
        dataset = dataset.cast_column(column, stored_tables.ImageFeature())
        path = folder / f"{name}_{column}"
        path.mkdir()
        dataset.save_to_disk(path) if name == "saved" else dataset.to_parquet(path / "x.parquet")
        WATCHED[:] = ["on"]
        for streaming in (False, True):
            with suppress(ValueError):  # images in place of captions
                for split in load_captions(str(path), streaming=streaming, skip_broken=True).values():
                    list(split)
        assert opened() == [], name


def test_hub_data_sets_open_only_their_own_files(photos, tmp_path, outside, monkeypatch, opened):
    """Rows of the Hub's image folders are paths in the cache, and addresses of their own files in streams."""
    own = tmp_path / "hub/datasets--me--set/snapshots/1/a.jpg"
    lw.write_images(own.parent, photos[:1], lambda _: "a.jpg")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(stored_tables, "load_dataset_builder", lambda path: Dataset)
    monkeypatch.setattr(Dataset, "config", type("Config", (), {"data_files": {}}), raising=False)

    def load(name: str, streaming: bool) -> dict[str, list[str]]:
        rows = Dataset.from_dict({"image": [str(own), name], "caption": ["a dog", "a cat"]})
        rows = rows.cast_column("image", stored_tables.ImageFeature())
        splits = {"test": rows.to_iterable_dataset() if streaming else rows}
        monkeypatch.setattr(stored_tables, "load_dataset", lambda path, streaming: splits)
        read_splits = stored_tables.read_hub("me/set", Damage(), streaming)
        return {row["image_id"]: row["captions"] for rows in read_splits.values() for row in rows}

    assert len(load(str(own), streaming=True)) == 2
    for streaming in (False, True):
        for name in (
            str(outside / "secret.jpg"),
            "hf://datasets/me/private@1/a.jpg",
            "http://127.0.0.1/a.jpg",
            "a.jpg",
        ):
            with pytest.raises(ValueError, match="me/set, row 1 of test: "):
                load(name, streaming)
    strange = {"train": [str(outside / "x.parquet")]}
    monkeypatch.setattr(Dataset, "config", type("Config", (), {"data_files": strange}), raising=False)
    with pytest.raises(ValueError, match=r"it names .*x\.parquet', which is none of its own files"):
        load(str(own), streaming=False)
    assert opened() == []


def test_what_is_inside_is_found_on_any_way(photos, folder):
    lw.write_images(folder / "images", photos)
    lw.write_images(folder / ".hidden", [Photo("h.jpg", photos[0].content, (), "train", 0)])
    (folder / "linked").symlink_to("images", target_is_directory=True)
    (folder / "images/circle").symlink_to("..", target_is_directory=True)
    (folder / "one.jpg").symlink_to(folder / "images" / photos[0].name)
    names = [f"../images/{photos[1].name}", f"..\\images\\{photos[2].name}", str(folder / "images" / photos[3].name)]
    names += [f"../linked/{photos[4].name}", "../.hidden/h.jpg", "one.jpg", f"images/circle/images/{photos[5].name}"]
    lw.write_csv(folder / "ann/list.csv", ["image", "caption"], [(name, "a dog") for name in names])
    captions, report = read(folder)
    assert len(captions) == len(names) and "missing" not in report


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        ("a.jpg", "a.JPG"),
        ("Ä.jpg", "A\u0308.jpg"),
        ("a\u0308.JPG", "ä.jpg"),
        ("a", "a.jpg"),
        ("a.v2", "a.v2.jpg"),
        ("a", "a"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_names_are_found_in_another_case_or_form_or_without_suffix(listed, stored, deep, photos, folder):
    lw.write_images(folder, photos[:1], lambda _: f"images/{stored}" if deep else stored)
    lw.write_csv(folder / "list.csv", ["image", "caption"], [(listed, "a dog")])
    assert list(read(folder)[0].values()) == [["a dog"]]


def test_different_images_of_one_name_are_not_confused(photos, folder):
    lw.write_images(folder, photos[:1], lambda _: "x/a.jpg")
    for content in (photos[0].content, photos[0].content[::-1]):
        lw.write_images(folder, [Photo("", content, (), "", 0)], lambda _: "y/A.JPG")
        lw.write_csv(folder / "list.csv", ["image", "caption"], [("a.Jpg", "a dog")])
        if content == photos[0].content:
            assert len(read(folder)[0]) == 1
    with pytest.raises(ValueError, match=r"line 2: 'a\.Jpg' may be any of x/a\.jpg, y/A\.JPG"):
        read(folder)


def test_unreadable_folders_are_named(photos, folder, monkeypatch):
    lw.write_images(folder, photos)
    csv_names(folder, photos, [])
    (folder / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match=r"The folder '.*/locked/' can't be read: Permission denied"):
        read(folder)
    captions, report = read(folder, skip_broken=True)
    assert len(captions) == len(photos) and "Left out: The folder" in report


@pytest.mark.parametrize("write", [parquet_structs, saved_structs])
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_itself_opens_nothing_else(write, streaming, folder, photos, outside, opened):
    """`datasets` throws bytes away where the path that comes with them exists on this machine."""
    write(folder, photos, [str(outside / "secret.jpg")])
    splits = load_captions(str(folder), streaming=streaming, skip_broken=True)
    assert [row["image"].size for rows in splits.values() for row in rows] == [(96, 72)] * len(photos)
    assert opened() == []
