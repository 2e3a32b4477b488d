"""Parquet files, saved data sets and tar shards: every writer's types are read, and no damage passes unsaid."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layout_writers as lw
import pyarrow as pa
import pytest
from layout_writers import Photo
from pyarrow import parquet

from hf_captioner import load_captions
from hf_captioner.data.rows import open_row, undecoded

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def photos() -> list[Photo]:
    return list(lw.make_photos()[:12])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def read(folder: Path, **options: Any) -> tuple[dict[str, tuple[str, ...]], str]:
    """Open all images of a data set, and return its captions by image id and the report."""
    report: list[str] = []
    captions = {}
    for rows in load_captions(str(folder), report=report.append, **options).values():
        for row in undecoded(rows):
            open_row(row)
            captions[row["image_id"]] = tuple(row["captions"])
    return captions, "\n".join(report)


# Types in which pandas, polars, DuckDB and others write text and bytes.
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.large_string())]
LISTS = [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))]
CONTENTS = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
STRUCTS = [pa.struct([("bytes", kind), ("path", text)]) for kind, text in zip(CONTENTS[:3], TEXTS[:3], strict=True)]


@pytest.mark.parametrize(
    ("kind", "captions_kind"), [*zip(TEXTS, LISTS + TEXTS[3:], strict=True), *zip(TEXTS, TEXTS, strict=True)], ids=str
)
def test_names_of_images_in_parquet_of_any_writer(kind, captions_kind, photos, folder):
    lw.write_images(folder, photos)
    is_list = captions_kind in LISTS
    captions = pa.array([list(p.captions) if is_list else p.captions[0] for p in photos])
    table = {"image": typed(pa.array([p.name for p in photos]), kind), "caption": typed(captions, captions_kind)}
    parquet.write_table(pa.table(table), folder / "list.parquet")
    expected = {p.name: p.captions if is_list else p.captions[:1] for p in photos}
    assert read(folder)[0] == expected == read(folder, streaming=True)[0]


@pytest.mark.parametrize("kind", [*CONTENTS, *STRUCTS, pa.struct([("bytes", pa.binary())])], ids=str)
def test_images_in_parquet_of_any_writer(kind, photos, folder):
    values = [{"bytes": p.content, "path": p.name} for p in photos] if pa.types.is_struct(kind) else None
    images = pa.array(values, kind) if values else typed(pa.array([p.content for p in photos]), kind)
    columns = {"image": images, "captions": [list(p.captions) for p in photos], "image_id": [p.name for p in photos]}
    parquet.write_table(pa.table(columns), folder / "x.parquet")
    assert read(folder)[0] == {p.name: p.captions for p in photos} == read(folder, streaming=True)[0]


def typed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return values as another type."""
    if pa.types.is_dictionary(kind):
        return values.cast(kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values.to_pylist(), kind) if values.type != kind else values


# Images of rows that can't be read, and what the error says about them.
BROKEN_IMAGES: list[tuple[Any, str]] = [
    (None, "there is no image"),
    ({"bytes": None, "path": None}, "there is no image"),
    ({"bytes": b"", "path": None}, "there is no image"),
    ({"bytes": b"", "path": ""}, "there is no image"),
    ({"bytes": None, "path": "a.jpg"}, "the image 'a.jpg' is not in"),
    ({"bytes": None, "path": "a\0.jpg"}, "the image .* is not in"),
]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_rows_are_refused_or_left_out(streaming, save, photos, folder):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def write(broken: list[Any]) -> None:
        images = [*({"bytes": p.content, "path": p.name} for p in photos), *broken]
        names = [*(p.name for p in photos), *(f"broken{i}" for i in range(len(broken)))]
        table = pa.table({"image": pa.array(images, kind), "captions": [["a dog"]] * len(images), "image_id": names})
        save_to_disk(table, folder) if save else parquet.write_table(table, folder / "train.parquet")

    for value, message in BROKEN_IMAGES:
        write([value])
        with pytest.raises(ValueError, match=rf"row 12\b.*{message}"):
            read(folder, streaming=streaming)
    write([value for value, _ in BROKEN_IMAGES])
    captions, report = read(folder, streaming=streaming, skip_broken=True)
    assert captions == {p.name: ("a dog",) for p in photos}
    assert all(f"row {row}" in report for row in range(12, 18))


def save_to_disk(table: pa.Table, folder: Path) -> None:
    """Write a table as `save_to_disk` does."""
    from datasets import Dataset

    Dataset(table).save_to_disk(folder)


@pytest.mark.parametrize("values", [[1.5], [[{"a": 1}]], [True], [[["x"]]]])
@pytest.mark.parametrize("column", ["image", "captions"])
def test_columns_of_other_types_are_refused_in_one_line(column, values, photos, folder):
    columns = {"image": [p.content for p in photos], "captions": [p.captions[0] for p in photos]}
    if column == "captions" and values == [[["x"]]]:
        return  # lists of lists of captions are read
    parquet.write_table(pa.table(columns | {column: values * len(photos)}), folder / "train.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"train\.parquet.*") as error:
            read(folder, streaming=streaming)
        assert "\n" not in str(error.value)


def split_photos() -> list[Photo]:
    photos = lw.make_photos()
    return [*photos[:12], *photos[80:82], *photos[98:]]


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    """Flip bits in the middle, where rows are."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]


DAMAGED = [
    (lw.hub_parquet, "data/train-00000-of-00001.parquet", cut),
    (lw.hub_parquet, "data/train-00000-of-00001.parquet", lambda data: b"PAR1" + bytes(99)),
    (lw.hub_parquet, "data/train-00000-of-00001.parquet", lambda data: b""),
    (lw.saved, "train/data-00000-of-00001.arrow", cut),
    (lw.saved, "train/data-00000-of-00001.arrow", lambda data: data[:-8]),
    (lw.saved, "train/data-00000-of-00001.arrow", lambda data: data[:100] + bytes(400) + data[500:]),
    (lw.saved, "train/state.json", cut),
    (lw.saved, "train/state.json", lambda data: b"[]"),
    (lw.saved, "train/state.json", lambda data: b'{"_data_files": [{}]}'),
    (lw.saved, "dataset_dict.json", lambda data: b"{}"),
    (lw.webdataset, "train-00000.tar", cut),
    (lw.webdataset_json, "train/00000.tar.gz", cut),
    (lw.webdataset_json, "train/00000.tar.gz", flipped),
    (lw.webdataset_json, "train/00000.tar.gz", lambda data: data[:-4]),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("write", "file", "damage"), DAMAGED)
def test_damaged_files_are_named(write, file, damage, streaming, folder):
    write(folder, split_photos())
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=file) as error:
        read(folder, streaming=streaming)
    assert "\n" not in str(error.value)


def test_damaged_page_of_parquet_costs_its_rows_alone(folder):
    """The damage is in the bytes of images, which are read last; rows of other groups are still read."""
    photos = [Photo(p.name, p.content + os.urandom(500), p.captions, p.split, p.number) for p in split_photos()[:12]]
    rows = [lw.stored(photo) | {"captions": photo.captions} for photo in photos]
    path = folder / "test.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=4, compression="zstd")
    chunk = next(
        c
        for i in range(5)
        if "bytes" in (c := parquet.ParquetFile(path).metadata.row_group(1).column(i)).path_in_schema
    )
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 30] = bytes(30)
    path.write_bytes(data)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"test\.parquet, rows 4 to 7, can't be read"):
            read(folder, streaming=streaming)
    for _ in range(2):  # the second time from the cache
        captions, report = read(folder, skip_broken=True)
        assert len(captions) == 8 and "Left out: 4 rows" in report
    captions, report = read(folder, skip_broken=True, streaming=True)
    assert len(captions) == 8 and "rows 4 to 7" in report


def test_parts_of_a_saved_data_set_that_are_not_listed_are_named(folder):
    lw.saved(folder, split_photos())
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (folder / "train/data-00001-of-00002.arrow").write_bytes(b"")
    report = read(folder)[1]
    assert "Splits that dataset_dict.json does not list, left out: 1 (validation)" in report
    assert "train/state.json does not list, left out: 1 (train/data-00001-of-00002.arrow)" in report


def tar_of(photos: list[Photo], *, json_too: bool = False) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for photo in photos:
            files = {".jpg": photo.content, ".txt": photo.captions[0].encode(), ".mp4": b"x" * 700}
            if json_too:  # as img2dataset does
                files[".json"] = json.dumps(
                    {"caption": photo.captions[0], "key": photo.stem, "status": "success"}
                ).encode()
            for suffix, content in files.items():
                member = tarfile.TarInfo(photo.stem + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("count", [1, 3, 12])
def test_small_shards_of_img2dataset_have_each_caption_once(count, photos, folder):
    (folder / "00000.tar").write_bytes(tar_of(photos[:count], json_too=True))
    captions, _ = read(folder)
    assert captions == {p.stem: p.captions[:1] for p in photos[:count]}
    assert count == 1 or all(len(rows) for rows in load_captions(str(folder)).values())


def test_different_captions_of_text_and_json_are_all_kept(photos, folder):
    fields = json.dumps({"captions": ["a cat", "a dog", "a cat"]}).encode()
    lw.write_tar(folder / "test.tar", [("a.jpg", photos[0].content), ("a.txt", b"a dog\n"), ("a.json", fields)])
    assert read(folder)[0] == {"a": ("a dog", "a cat", "a cat")}


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_headers_of_a_tar_are_told(streaming, photos, folder):
    whole, path = tar_of(photos), folder / "test.tar"
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        offsets = [member.offset for member in tar.getmembers() if member.name.endswith(".jpg")]
    for index in (0, 1, 5, 11):
        for bit in (0, 30, 110, 140, 256 + 20):
            data = bytearray(whole)
            data[offsets[index] + bit] ^= 4
            path.write_bytes(data)
            with pytest.raises(ValueError, match=rf"test\.tar can't be read .*(byte {offsets[index]}|start)"):
                read(folder, streaming=streaming)
        if index:
            captions, report = read(folder, streaming=streaming, skip_broken=True)
            assert len(captions) == index and f"byte {offsets[index]}" in report


ENDS: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[: len(data) // 2 // 512 * 512], "ends"),
    (lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), "ends without the zeros"),
    (lambda data: data[:-10240] + bytes(1024) + data, "data behind the zeros"),
    (lambda data: data + b"x", "data behind the zeros"),
    (lambda data: data[:5120] + bytes(512) + data[5632:], "damaged"),
]


@pytest.mark.parametrize(("edit", "message"), ENDS)
def test_tars_that_end_too_early_are_told(edit, message, photos, folder):
    (folder / "test.tar").write_bytes(edit(tar_of(photos)))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"test\.tar can't be read to its end: .*{message}"):
            read(folder, streaming=streaming)


def bomb(member: str) -> bytes:
    """Return a compressed tar of 6 GiB of zeros, in 6 MB."""
    header = tarfile.TarInfo(member)
    header.size = 6 * 2**30
    return gzip.compress(header.tobuf(tarfile.GNU_FORMAT)) + gzip.compress(bytes(2**26)) * 96


@pytest.mark.parametrize("member", ["a.jpg", "a.txt", "a.json", "a.bin"])
def test_small_files_that_unpack_to_gigabytes_are_refused(member, photos, folder):
    (folder / "test.tar.gz").write_bytes(bomb(member))
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"test\.tar\.gz.*(unpacks to more than 100 times|6442450944 bytes)"):
            read(folder, streaming=streaming)
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024


def test_parquet_that_unpacks_to_gigabytes_is_refused(photos, folder):
    rows = pa.table({"image": [bytes(2**26 + 2**20)], "caption": ["a dog"]})
    parquet.write_table(rows, folder / "test.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(ValueError, match=r"test\.parquet has \d+ bytes and claims to hold 1 rows"):
        read(folder)


HOSTILE_HEADERS = [
    {"size": -512},
    {"size": 2**40},
    {"type": tarfile.FIFOTYPE},
    {"type": tarfile.CHRTYPE},
    {"type": tarfile.LNKTYPE, "linkname": "../../secret"},
    {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    {"type": tarfile.GNUTYPE_LONGNAME, "size": 2**40},
    {"type": tarfile.XHDTYPE, "size": 2**33},
    {"pax_headers": {"size": "-1000000"}},
    {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}},
    {"pax_headers": {"GNU.sparse.size": str(2**50), "GNU.sparse.map": "0,1,x"}},
    {"name": "/etc/x.jpg"},
]


@pytest.mark.parametrize("fields", HOSTILE_HEADERS)
def test_hostile_headers_of_a_tar_are_refused(fields, photos, folder):
    member = tarfile.TarInfo("a.jpg")
    for name, value in fields.items():
        setattr(member, name, value)
    header = member.tobuf(tarfile.PAX_FORMAT if "pax_headers" in fields else tarfile.GNU_FORMAT)
    (folder / "test.tar").write_bytes(header + tar_of(photos))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"test\.tar") as error:
            read(folder, streaming=streaming)
        assert "\n" not in str(error.value)
