"""Damaged data sets: what is known of Flickr's files, broken files, paths that leave the folder, leaks between splits."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import layout_writers as lw
import pytest
from layout_writers import Photo

from hf_captioner import load_captions
from hf_captioner.__main__ import main
from hf_captioner.data.layouts.splits import assign_split, assign_splits, find_leaks
from hf_captioner.data.rows import undecoded

Edit = Callable[[list[str]], list[str]]


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def photos() -> list[Photo]:
    """Fourteen photographs: ten for training, two for validation, two for testing."""
    photos = lw.make_photos()
    return [*photos[:10], *photos[80:82], *photos[98:]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def read(folder: Path, **kwargs: Any) -> tuple[dict[str, list[str]], str]:
    """Return the captions of all splits by image id, and the report."""
    report: list[str] = []
    splits = load_captions(str(folder), report=report.append, **kwargs)
    captions = {row["image_id"]: row["captions"] for rows in splits.values() for row in undecoded(rows)}
    return captions, "\n".join(report)


def assert_refused(folder: Path, message: str, **kwargs: Any) -> None:
    """Assert that reading raises a ValueError that matches a pattern."""
    with pytest.raises(ValueError, match=message):
        read(folder, **kwargs)


def captions_of(photos: list[Photo]) -> dict[str, list[str]]:
    return {photo.name: list(photo.captions) for photo in photos}


def edit_lines(path: Path, edit: Edit) -> None:
    """Edit the lines of a file; the character "\\udce9" is written as a single byte, which is not UTF-8."""
    lines = edit(path.read_text(encoding="utf-8").splitlines())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def test_known_damage_of_flickr8k_is_repaired(photos, folder):
    lw.flickr8k_archives(folder, photos)
    (folder / "Flicker8k_Dataset" / photos[1].name).unlink()
    lines = [line.replace(f"{photos[2].name}#", f"{photos[2].name}.1#") for line in lw.token_lines(photos)]
    lines[18:21], lines[3:5] = ["".join(lines[18:21])], ["".join(lines[3:5])]
    lw.write_lines(folder / "Flickr8k.token.txt", lines)
    captions, report = read(folder)
    assert captions == captions_of([photo for photo in photos if photo is not photos[1]])
    assert "lines joined with the next one, separated: 2 (line 4, line 18)" in report
    assert f"which is removed: 5 ({photos[2].name}.1 in line 10" in report
    assert f"listed images that are missing, left out: 1 ({photos[1].name})" in report


def test_known_damage_of_kaggles_captions_is_repaired(photos, folder):
    photos = [replace(p, captions=(*p.captions[:3], 'A "big" dog , a cat', "One , two and three")) for p in photos]
    lw.kaggle(folder, photos)

    def damage(lines: list[str]) -> list[str]:
        assert lines[4].endswith('"A ""big"" dog , a cat"') and lines[5].endswith(',"One , two and three"')
        lines[5] = f"{photos[0].name},One , two and three"
        lines[10:11] = [f'{photos[1].name},"One , two', 'and three"']
        lines[14:16] = [lines[14] + lines[15]]
        return lines

    edit_lines(folder / "captions.txt", damage)
    captions, report = read(folder)
    assert captions == captions_of(photos)
    assert "captions in quotes for their commas, which are removed: " in report
    assert "line breaks inside captions, removed: 1 (line 12)" in report
    assert "lines joined with the next one, separated: 1 (line 15)" in report


def test_line_of_flickr30k_without_its_second_separator(photos, folder):
    lw.flickr30k_csv(folder, photos)
    edit_lines(folder / "results.csv", at(6, lambda line: line.replace("| 4| ", "| 4   ")))
    captions, report = read(folder)
    assert captions == captions_of(photos)
    assert "captions without a separator before them: 1 (line 6)" in report


def test_images_without_split_or_captions_are_named(photos, folder):
    lw.flickr8k_archives(folder, photos)
    edit_lines(folder / "Flickr_8k.devImages.txt", at(2, lambda _: "12_ab.jpg"))
    edit_lines(folder / "Flickr8k.token.txt", lambda lines: lines[5:])
    captions, report = read(folder)
    assert captions.keys() == {photo.name for photo in photos} - {photos[0].name, photos[11].name}
    assert f"Images with captions that are in no split, left out: 1 ({photos[11].name})" in report
    assert f"Images without a caption, left out: 1 (Flicker8k_Dataset/{photos[0].name})" in report
    assert "a split lists but Flickr8k.token.txt does not: 2 " in report and "12_ab.jpg" in report


def at(number: int, edit: Callable[[str], str]) -> Edit:
    """Return an edit of one line, counted from 1."""
    return lambda lines: [edit(line) if i == number else line for i, line in enumerate(lines, start=1)]


def latin_1(number: int) -> Edit:
    """Return an edit that writes an é in Latin-1 into a line."""
    return at(number, lambda line: f"{line[:-3]}caf\udce9{line[-3:]}")


def edit_json(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Return an edit of the value of a JSON file in place."""

    def edited(lines: list[str]) -> list[str]:
        content = json.loads(lines[0])
        edit(content)
        return [json.dumps(content)]

    return edited


def twice(key: str) -> Edit:
    """Return an edit that repeats the first item of a list in a JSON file."""
    return edit_json(lambda content: content[key].insert(0, content[key][0]))


KARPATHY, COCO = (lw.karpathy, "dataset_flickr8k.json"), (lw.coco, "annotations/captions_val2014.json")
TOKEN, TEXT = (lw.flickr8k_archives, "Flickr8k.token.txt"), (lw.text_pairs, "train/STEM.txt")
KAGGLE, FLICKR30K = (lw.kaggle, "captions.txt"), (lw.flickr30k_csv, "results.csv")
JSONL, CSV = (lw.imagefolder_jsonl, "train/metadata.jsonl"), (lw.table_csv, "train.csv")
# A layout and its file, an edit of it, the error, and the captions that are left without what is broken, if any.
BROKEN_FILES: list[tuple[tuple[Callable[..., None], str], Edit, str, int | None]] = [
    (TOKEN, latin_1(7), ", line 7, is not UTF-8 (byte 0xe9 at", 69),
    (KAGGLE, latin_1(9), ", line 9, is not UTF-8 (byte 0xe9 at", 69),
    (FLICKR30K, latin_1(3), ", line 3, is not UTF-8 (byte 0xe9 at", 69),
    (JSONL, at(2, lambda line: f"{line[:-3]}caf\udc8e{line[-3:]}"), ", line 2, is not UTF-8 (byte 0x8e at", 65),
    (CSV, latin_1(4), ", line 4, is not UTF-8 (byte 0xe9 at", 69),
    (TEXT, latin_1(3), ", line 3, is not UTF-8 (byte 0xe9 at", 69),
    (KARPATHY, latin_1(1), ", line 1, is not UTF-8 (byte 0xe9 at", None),
    (KARPATHY, lambda _: ['{"images": [', '{"a" 3}]}'], ", line 2, is not", None),
    (JSONL, at(2, lambda line: line[:30]), ", line 2, is not JSON: ", 65),
    (JSONL, at(1, lambda _: "[1]"), ", line 1, is no JSON object", 65),
    (JSONL, at(3, lambda _: '{"file_name": "a.jpg"}'), ", line 3, has no captions.", 65),
    (CSV, at(2, lambda line: f"{line},more"), ", line 2, has more fields than the header", 69),
    (CSV, at(1, lambda _: "file_name,picture"), " has the columns file_name, picture; wanted are", None),
    (KARPATHY, edit_json(lambda content: content["images"][2].pop("split")), ", images[2], has no 'split'", 65),
    (TOKEN, lambda lines: [lines[1], *lines], ", line 3: the image 'NAME' with caption number 1 occurs twice", 70),
    (KARPATHY, twice("images"), ", images[1]: the image 'NAME' occurs twice", 70),
    (JSONL, lambda lines: [lines[0], *lines], ", line 2: the image 'NAME' occurs twice", 70),
    (COCO, twice("images"), ", images[1]: the id '81' occurs twice", 70),
    (COCO, twice("annotations"), ", annotations[1]: the id '810' occurs twice", 70),
]


@pytest.mark.parametrize(("layout", "edit", "message", "num_captions"), BROKEN_FILES)
def test_broken_files_are_refused_or_left_out(layout, edit, message, num_captions, photos, folder):
    write, file = layout[0], layout[1].replace("STEM", photos[0].stem)
    write(folder, photos)
    edit_lines(folder / file, edit)
    message = file + message.replace("NAME", photos[0].name)
    assert_refused(folder, re.escape(message))
    if num_captions is not None:
        captions, report = read(folder, skip_broken=True)
        assert report.count("Left out: ") == 1 and f"Left out: {message}" in report
        assert sum(map(len, captions.values())) == num_captions
        if num_captions == 70 and write is not lw.coco:  # whose ids are numbers
            assert {name: sorted(row) for name, row in captions.items()} == {p.name: sorted(p.captions) for p in photos}


def test_path_that_leaves_the_folder_is_refused(photos, folder):
    outside, table = folder.parent / "elsewhere", folder / "captions.csv"
    first = photos[0].name
    lw.write_images(outside, photos)
    lw.write_images(folder, photos[1:])
    inside = [(photo.name, "a dog") for photo in photos[1:]]
    relative = (f"../elsewhere/{first}", f"x/../../elsewhere/{first}", f"..\\elsewhere\\{first}")
    for name in (str(outside / first), *relative):
        lw.write_csv(table, ["image", "caption"], [*inside, (name, "x")])
        assert_refused(folder, r"captions\.csv, line 15: .* leaves the data set's folder")
    assert "Left out: captions.csv, line 15" in read(folder, skip_broken=True)[1]

    (folder / first).symlink_to(outside / first)
    lw.write_csv(table, ["image", "caption"], [(first, "a dog")])
    assert_refused(folder, r"line 2: .* leads to .*elsewhere/.*, which leaves the data set's folder")
    (folder / first).unlink()
    (folder / "pictures").symlink_to(outside, target_is_directory=True)
    for name in (first, f"pictures/{first}"):
        lw.write_csv(table, ["image", "caption"], [(name, "a dog")])
        assert_refused(folder, r"line 2: .*pictures.* leads to .*elsewhere.*, which leaves the data set's folder")
    (folder / "pictures").unlink()
    (folder / first).symlink_to(photos[1].name)  # a link to an image in the folder is fine
    lw.write_csv(table, ["image", "caption"], [(first, "a dog")])
    assert read(folder)[0] == {first: ["a dog"]}


def test_images_of_the_same_name_are_not_confused(photos, folder):
    for path, photo in zip(("test/a.jpg", "train/b.jpg", "train/deep/c.jpg"), photos, strict=False):
        lw.write_images(folder, [photo], lambda _, path=path: path)
    lw.write_csv(folder / "train/metadata.csv", ["file_name", "caption"], [(f"{x}.jpg", f"a {x}") for x in "abc"])
    captions, report = read(folder, format="imagefolder")
    assert {Path(name).name: row for name, row in captions.items()} == {"b.jpg": ["a b"], "c.jpg": ["a c"]}
    assert "missing, left out: 1 (a.jpg)" in report
    shutil.rmtree(folder / "train")
    lw.write_images(folder, [photos[1]], lambda _: "train/a.jpg")
    rows = [("a.jpg", "a dog"), (str(folder / "test/a.jpg"), "a cat")]
    lw.write_csv(folder / "captions.csv", ["image", "caption"], rows)
    assert_refused(folder, r"captions\.csv, line 2: 'a\.jpg' may be any of test/a\.jpg, train/a\.jpg")
    assert read(folder, skip_broken=True)[0] == {"test/a.jpg": ["a cat"]}


def test_tar_members_that_leave_the_folder_are_refused(photos, folder):
    files = [("a.jpg", photos[0].content), ("a.txt", b"a dog"), ("../b.jpg", photos[1].content), ("../b.txt", b"a cat")]
    lw.write_tar(folder / "test.tar", files)
    for streaming in (False, True):
        assert_refused(folder, r"test\.tar: '\.\./b\.jpg' leaves the data set's folder", streaming=streaming)
        captions, report = read(folder, streaming=streaming, skip_broken=True)
        assert captions == {"a": ["a dog"]} and "'../b.txt' leaves" in report


def test_broken_tars_are_named(photos, folder):
    sample = [("a.jpg", photos[0].content), ("a.txt", b"a dog")]
    lw.write_tar(folder / "test.tar", [*sample, ("b.jpg", photos[1].content), ("b.txt", b"caf\xe9")])
    assert_refused(folder, r"test\.tar: 'b\.txt' is not UTF-8, byte 0xe9")
    lw.write_tar(folder / "test.tar", [*sample, ("c.jpg", photos[2].content), *sample])
    assert_refused(folder, r"test\.tar: the sample 'a' occurs twice")
    assert "samples without a caption, left out: 1 (c)" in read(folder, skip_broken=True)[1]
    content = (folder / "test.tar").read_bytes()
    (folder / "test.tar").write_bytes(content[: len(photos[0].content)])
    assert_refused(folder, r"test\.tar can't be read to its end")


def test_changed_tar_is_read_again(photos, folder):
    for caption in ("a dog", "a cat"):
        lw.write_tar(folder / "test.tar", [("a.jpg", photos[0].content), ("a.txt", caption.encode())])
        assert read(folder)[0] == {"a": [caption]}


def test_duplicate_ids_in_parquet_are_refused(photos, folder):
    rows = [lw.stored(photo) | {"image_id": "a", "captions": ["a", "b"]} for photo in photos[:3]]
    lw.write_parquet(folder / "test.parquet", rows)
    assert_refused(folder, "the image_id 'a' occurs twice in test, in rows 0 and 1")
    assert len(read(folder, skip_broken=True)[0]) == 1


def test_folders_that_fit_no_layout_are_refused(photos, folder):
    assert_refused(folder, r"The folder .* is empty")
    lw.write_images(folder, photos)
    assert_refused(folder, r"does not hold captions in any known form; it has 14 images.*flickr8k, karp")
    lw.write_csv(folder / "captions.csv", ["image", "caption"], lw.single_captions(photos))
    assert_refused(folder, "does not hold COCO's annotations", format="coco")
    assert_refused(folder, r"no format 'cocoa'. Known: saved, flickr8k", format="cocoa")
    with pytest.raises(ValueError, match="'shapes' is a data set's name"):
        load_captions("shapes", "test", format="coco")
    lw.write_csv(folder / "captions.csv", ["image", "caption"], [("no.jpg", "a dog")])
    assert_refused(folder, r"None of the images that captions\.csv lists is in")


def test_format_chooses_between_layouts(photos, folder, caplog):
    lw.karpathy_coco(folder, photos)
    lw.coco(folder, photos)
    both = load_captions(str(folder))
    assert set(both) == {"train", "validation", "test"}
    repairs, recognised = caplog.messages  # reports are logged by default
    assert "(format karpathy), recognised by dataset_coco.json; other formats that fit: coco." in recognised
    assert "images of restval counted as training: 1 " in repairs
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    official = load_captions(str(folder), format="coco")
    assert {name: len(rows) for name, rows in official.items()} == {"train": 10, "validation": 4}
    one_file = load_captions(str(folder / "annotations/captions_val2014.json"))
    assert {name: len(rows) for name, rows in one_file.items()} == {"validation": 4}
    assert undecoded(one_file["validation"])[0]["image"]["path"] == str(folder / lw.coco_path(photos[10]))


def test_made_splits_depend_on_each_image_alone(folder):
    lw.kaggle(folder, lw.make_photos())
    first = {name: set(rows["image_id"]) for name, rows in load_captions(str(folder)).items()}
    assert sum(map(len, first.values())) == 100 == len(set().union(*first.values()))
    assert 4 <= len(first["validation"]) <= 18 and 4 <= len(first["test"]) <= 18
    gone = min(first["train"])
    edit_lines(folder / "captions.txt", lambda lines: [lines[0], *(x for x in lines[:0:-1] if gone not in x)])
    again = {name: set(rows["image_id"]) for name, rows in load_captions(str(folder)).items()}
    assert again == {name: names - {gone} for name, names in first.items()}


def test_made_splits_are_tenths_and_never_empty():
    names, missing = [f"{i}.jpg" for i in range(5000)], ["validation", "test"]
    splits = [assign_split(name, missing) for name in names]
    assert splits == assign_splits(names, missing)
    assert 420 < splits.count("validation") < 580 and 420 < splits.count("test") < 580
    assert {assign_split(name, ["validation"]) for name in names} == {"train", "validation"}
    for count in (3, 4, 5, 9):
        assert set(assign_splits(names[:count], missing)) == {"train", "validation", "test"}


@pytest.mark.parametrize("write", [lw.text_pairs, lw.webdataset])
def test_leaks_are_reported(write, photos, folder):
    twin = photos[10].stem
    photos[10] = replace(photos[10], content=photos[0].content)
    photos[11] = replace(photos[11], name=photos[1].name)
    photos[12] = replace(photos[12], content=photos[2].content[::-1])  # the same size alone is no leak
    write(folder, photos)
    report: list[str] = []
    splits = load_captions(str(folder), report=report.append)
    same_bytes, same_name = (line for line in report if line.startswith("Leak"))
    assert "train and validation have the same bytes" in same_bytes
    assert photos[0].stem in same_bytes and twin in same_bytes
    assert "the same file name but other bytes" in same_name and photos[1].stem in same_name
    (leak,) = find_leaks({name: undecoded(rows) for name, rows in splits.items()})
    assert len(leak.same_bytes) == len(leak.same_name) == 1


def test_inspect_prints_contents_and_problems(photos, folder, capsys):
    lw.flickr8k_archives(folder, photos)
    pictures = folder / "Flicker8k_Dataset"
    (pictures / photos[3].name).write_bytes(photos[3].content[:1000])
    (pictures / photos[4].name).unlink()
    (pictures / photos[13].name).write_bytes(photos[0].content)
    edit_lines(folder / "Flickr8k.token.txt", at(6, lambda line: line.partition("\t")[0] + "\tdog ."))
    assert main(["inspect", str(folder), "--picture", str(folder.parent / "ten.png")]) == 0
    output = capsys.readouterr().out
    for expected in (
        "train       9       45        5 ",
        "validation  2       10        5 ",
        *("Vocabulary of train by how often", "   1: ", "  10: "),
        f"train: {photos[1].name} has the caption 'dog .' of 1 words.",
        f"train: Image '{photos[3].name}' can't be read: {pictures / photos[3].name}",
        f"listed images that are missing, left out: 1 ({photos[4].name})",
        f"images of train and test have the same bytes ({photos[0].name} = {photos[13].name})",
    ):
        assert expected in output
    assert (folder.parent / "ten.png").stat().st_size > 50_000
    assert main(["inspect", str(folder / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: No data set at")
