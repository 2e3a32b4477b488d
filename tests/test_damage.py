"""Data sets as they shouldn't be: the known damage of Flickr's files, broken files, leaks between splits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from layout_writers import (
    Photo,
    coco,
    coco_name,
    csv_lines,
    flickr8k_archives,
    flickr30k_csv,
    imagefolder_jsonl,
    kaggle,
    karpathy,
    karpathy_coco,
    karpathy_image,
    table_csv,
    text_pairs,
    token_lines,
    webdataset,
    write_csv,
    write_images,
    write_json,
    write_lines,
    write_tar,
)

from hf_captioner import load_captions
from hf_captioner.data.datasets import main
from hf_captioner.data.layouts.splits import find_leaks, made_split, made_splits
from hf_captioner.data.rows import drop_broken_images, undecoded

ABSENT = ["validation", "test"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(hundred_photos: list[Photo]) -> list[Photo]:
    """Fourteen of them: ten to train on, two to validate, two to test."""
    return hundred_photos[:10] + hundred_photos[80:82] + hundred_photos[98:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    path.mkdir()
    return path


def read(folder: Path, **kwargs: Any) -> tuple[dict[str, list[str]], str]:
    """Captions by image of all splits, and what was said."""
    said: list[str] = []
    splits = load_captions(str(folder), report=said.append, **kwargs)
    captions = {row["image_id"]: row["captions"] for rows in splits.values() for row in undecoded(rows)}
    return captions, "\n".join(said)


def captions_of(photos: list[Photo]) -> dict[str, list[str]]:
    return {photo.name: list(photo.captions) for photo in photos}


def edit_lines(path: Path, edit: Callable[[list[str]], list[str]]) -> None:
    write_lines(path, edit(path.read_text(encoding="utf-8").splitlines()))


def spoil(path: Path, line: int) -> None:
    """Write é into a line as Latin-1 has it."""
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = lines[line - 1][:-3] + b"caf\xe9" + lines[line - 1][-3:]
    path.write_bytes(b"\n".join(lines))


def test_known_damage_of_flickr8k_is_mended_and_said(photos: list[Photo], folder: Path) -> None:
    flickr8k_archives(folder, photos)
    (folder / "Flicker8k_Dataset" / photos[1].name).unlink()

    def damage(lines: list[str]) -> list[str]:
        lines = [line.replace(f"{photos[2].name}#", f"{photos[2].name}.1#") for line in lines]
        assert lines[3].endswith(".") and lines[18].startswith(photos[3].name)
        return [*lines[:3], lines[3] + lines[4], *lines[5:18], lines[18] + lines[19] + lines[20], *lines[21:]]

    edit_lines(folder / "Flickr8k.token.txt", damage)
    captions, said = read(folder)
    assert captions == captions_of([photo for photo in photos if photo is not photos[1]])
    assert "run together with the next, taken apart: 2 (line 4, line 18)" in said
    assert f"taken off: 5 ({photos[2].name}.1 in line 10" in said
    assert f"listed images that are missing, left out: 1 ({photos[1].name})" in said


def test_known_damage_of_kaggles_captions_is_mended_and_said(photos: list[Photo], folder: Path) -> None:
    photos = [
        Photo(p.name, p.content, (*p.captions[:3], 'A "big" dog , a cat', "One , two and three"), p.split, p.number)
        for p in photos
    ]
    kaggle(folder, photos)

    def damage(lines: list[str]) -> list[str]:
        name = photos[0].name
        assert lines[4].endswith('"A ""big"" dog , a cat"') and lines[5].endswith(',"One , two and three"')
        lines[5] = f"{name},One , two and three"
        lines[10:11] = [f'{photos[1].name},"One , two', 'and three"']
        lines[14:16] = [lines[14] + lines[15]]
        return lines

    edit_lines(folder / "captions.txt", damage)
    captions, said = read(folder)
    assert captions == captions_of(photos)
    assert "captions in quotes for their commas, which are taken off: " in said
    assert "line breaks inside captions, taken out: 1 (line 12)" in said
    assert "run together with the next, taken apart: 1 (line 15)" in said


def test_a_line_of_flickr30k_without_its_second_separator(photos: list[Photo], folder: Path) -> None:
    flickr30k_csv(folder, photos)
    edit_lines(folder / "results.csv", lambda lines: [*lines[:5], lines[5].replace("| 4| ", "| 4   "), *lines[6:]])
    captions, said = read(folder)
    assert captions == captions_of(photos)
    assert "captions without a separator before them: 1 (line 6)" in said


def test_images_in_no_split_and_without_captions_are_named(photos: list[Photo], folder: Path) -> None:
    flickr8k_archives(folder, photos)
    edit_lines(folder / "Flickr_8k.devImages.txt", lambda lines: [lines[0], "12_ab.jpg"])
    edit_lines(folder / "Flickr8k.token.txt", lambda lines: lines[5:])
    captions, said = read(folder)
    assert captions.keys() == {photo.name for photo in photos} - {photos[0].name, photos[11].name}
    assert f"Images with captions that are in no split, left out: 1 ({photos[11].name})" in said
    assert f"Images without a caption, left out: 1 (Flicker8k_Dataset/{photos[0].name})" in said
    assert "a split lists but Flickr8k.token.txt does not: 2 " in said and "12_ab.jpg" in said


LATIN = [
    (flickr8k_archives, "Flickr8k.token.txt", 7, "Flickr8k.token.txt, line 7, is not UTF-8"),
    (kaggle, "captions.txt", 9, "captions.txt, line 9, is not UTF-8"),
    (flickr30k_csv, "results.csv", 3, "results.csv, line 3, is not UTF-8"),
    (imagefolder_jsonl, "train/metadata.jsonl", 2, "train/metadata.jsonl, line 2, is not UTF-8"),
    (table_csv, "train.csv", 4, "train.csv, line 4, is not UTF-8"),
    (text_pairs, "train/FIRST.txt", 3, "train/FIRST.txt, line 3, is not UTF-8"),
    (karpathy, "dataset_flickr8k.json", 1, "dataset_flickr8k.json, line 1, is not UTF-8"),
]


@pytest.mark.parametrize(("write", "file", "line", "message"), LATIN, ids=[row[0].__name__ for row in LATIN])
def test_latin_1_is_refused_with_file_and_line(
    write: Callable[..., None], file: str, line: int, message: str, photos: list[Photo], folder: Path
) -> None:
    write(folder, photos)
    spoil(folder / file.replace("FIRST", photos[0].stem), line)
    message = message.replace("FIRST", photos[0].stem)
    with pytest.raises(ValueError, match=rf"^{message} \(byte 0xe9 at \d+\); .*iconv"):
        read(folder)
    if write is karpathy:  # one value: there is nothing to go on with
        return
    captions, said = read(folder, skip_broken=True)
    assert f"Left out: {message}" in said
    assert sum(map(len, captions.values())) in (69, 65)  # one caption less, or a row with all five of an image


def test_broken_rows_are_refused_with_file_and_line(photos: list[Photo], folder: Path) -> None:
    imagefolder_jsonl(folder, photos)
    table = folder / "train/metadata.jsonl"
    edit_lines(table, lambda lines: [lines[0], lines[1][:30], '{"file_name": "a.jpg"}', *lines[3:]])
    with pytest.raises(ValueError, match=r"train/metadata\.jsonl, line 2, is not JSON: .* character"):
        read(folder)
    captions, said = read(folder, skip_broken=True)
    assert len(captions) == 12 and "metadata.jsonl, line 3, has no captions." in said
    table.unlink()
    write_csv(folder / "train/metadata.csv", ["file_name", "caption"], [(photos[0].name, "a dog", "a cat")])
    with pytest.raises(ValueError, match=r"train/metadata\.csv, line 2, has more fields than the header"):
        read(folder)
    (folder / "train/metadata.csv").write_text("file_name,picture\na.jpg,b\n")
    with pytest.raises(ValueError, match=r"metadata\.csv' has the columns file_name, picture; wanted are"):
        read(folder)


def test_a_path_that_leaves_the_folder_is_refused(photos: list[Photo], folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    write_images(outside, photos)
    write_images(folder, photos[1:])
    first = photos[0].name
    for name in (
        f"../elsewhere/{first}",
        str(outside / first),
        f"x/../../elsewhere/{first}",
        f"..\\elsewhere\\{first}",
    ):
        write_csv(
            folder / "captions.csv", ["image", "caption"], [(p.name, "a dog") for p in photos[1:]] + [(name, "x")]
        )
        with pytest.raises(ValueError, match=r"captions\.csv, line 15: .* leaves the data set's folder"):
            read(folder)
    assert "Left out: captions.csv, line 15" in read(folder, skip_broken=True)[1]

    (folder / first).symlink_to(outside / first)
    write_csv(folder / "captions.csv", ["image", "caption"], [(p.name, "a dog") for p in photos])
    with pytest.raises(ValueError, match=r"line 2: .* is a link that leaves the data set's folder"):
        read(folder)
    (folder / first).unlink()
    (folder / "pictures").symlink_to(outside, target_is_directory=True)
    for name in (first, f"pictures/{first}"):
        write_csv(folder / "captions.csv", ["image", "caption"], [(name, "a dog")])
        with pytest.raises(ValueError, match=r"line 2: .*'pictures', a link that leaves the data set's folder"):
            read(folder)
    (folder / "pictures").unlink()
    (folder / first).symlink_to(photos[1].name)  # a link within is as good as a file
    write_csv(folder / "captions.csv", ["image", "caption"], [(first, "a dog")])
    assert read(folder)[0] == {first: ["a dog"]}


def test_an_image_is_never_taken_for_another_of_its_name(photos: list[Photo], folder: Path) -> None:
    first, second, third = photos[:3]
    for path, photo in (("test/a.jpg", first), ("train/b.jpg", second), ("train/deep/c.jpg", third)):
        write_images(folder, [photo], lambda _, path=path: path)
    write_csv(folder / "train/metadata.csv", ["file_name", "caption"], [(f"{x}.jpg", f"a {x}") for x in "abc"])
    captions, said = read(folder, format="imagefolder")
    assert {Path(name).name: row for name, row in captions.items()} == {"b.jpg": ["a b"], "c.jpg": ["a c"]}
    assert "missing, left out: 1 (a.jpg)" in said
    shutil.rmtree(folder / "train")
    write_images(folder, [second], lambda _: "train/a.jpg")
    write_csv(
        folder / "captions.csv", ["image", "caption"], [("a.jpg", "a dog"), (str(folder / "test/a.jpg"), "a cat")]
    )
    with pytest.raises(ValueError, match=r"captions\.csv, line 2: 'a\.jpg' may be any of test/a\.jpg, train/a\.jpg"):
        read(folder)
    assert read(folder, skip_broken=True)[0] == {"test/a.jpg": ["a cat"]}


def test_tar_members_that_leave_the_folder_are_refused(photos: list[Photo], folder: Path) -> None:
    files = [("a.jpg", photos[0].content), ("a.txt", b"a dog"), ("../b.jpg", photos[1].content), ("../b.txt", b"a cat")]
    write_tar(folder / "test.tar", files)
    with pytest.raises(ValueError, match=r"test\.tar: '\.\./b\.jpg' leaves the data set's folder"):
        read(folder)
    with pytest.raises(ValueError, match=r"test\.tar: '\.\./b\.jpg' leaves the data set's folder"):
        read(folder, streaming=True)
    for streaming in (False, True):
        captions, said = read(folder, streaming=streaming, skip_broken=True)
        assert captions == {"a": ["a dog"]} and "'../b.txt' leaves" in said


def test_broken_tars_are_named(photos: list[Photo], folder: Path) -> None:
    sample = [("a.jpg", photos[0].content), ("a.txt", b"a dog"), ("b.jpg", photos[1].content), ("b.txt", b"caf\xe9")]
    write_tar(folder / "test.tar", sample)
    with pytest.raises(ValueError, match=r"test\.tar: 'b\.txt' is not UTF-8, byte 0xe9"):
        read(folder)
    write_tar(folder / "test.tar", [*sample[:2], ("c.jpg", photos[2].content), *sample[:2]])
    with pytest.raises(ValueError, match=r"test\.tar: the sample 'a' is there twice"):
        read(folder)
    assert "samples without a caption, left out: 1 (c)" in read(folder, skip_broken=True)[1]
    content = (folder / "test.tar").read_bytes()
    (folder / "test.tar").write_bytes(content[: len(photos[0].content)])
    with pytest.raises(ValueError, match=r"test\.tar can't be read to its end"):
        read(folder)


def test_a_changed_tar_is_read_anew(photos: list[Photo], folder: Path) -> None:
    write_tar(folder / "test.tar", [("a.jpg", photos[0].content), ("a.txt", b"a dog")])
    assert read(folder)[0] == {"a": ["a dog"]}
    write_tar(folder / "test.tar", [("a.jpg", photos[0].content), ("a.txt", b"a cat")])
    assert read(folder)[0] == {"a": ["a cat"]}


@pytest.mark.parametrize(("write", "message"), [
    (flickr8k_archives, r"Flickr8k\.token\.txt, line 2: the image '{0}' with caption number 1 is there twice"),
    (karpathy, r"dataset_flickr8k\.json, images\[1\]: the image '{0}' is there twice"),
    (imagefolder_jsonl, r"train/metadata\.jsonl, line 2: the image '{0}' is there twice"),
])  # fmt: skip
def test_duplicate_ids_are_refused_with_their_place(
    write: Callable[..., None], message: str, photos: list[Photo], folder: Path
) -> None:
    write(folder, photos)

    def double(lines: list[str]) -> list[str]:
        if write is flickr8k_archives:
            return [lines[1], *lines]
        content = json.loads(lines[0])
        if write is karpathy:
            content["images"].insert(0, content["images"][0])
            return [json.dumps(content)]
        return [lines[0], *lines]

    edit_lines(next(folder / f for f in ("Flickr8k.token.txt", "dataset_flickr8k.json", "train/metadata.jsonl")
                    if (folder / f).exists()), double)  # fmt: skip
    with pytest.raises(ValueError, match=message.format(photos[0].name).replace(", line 2", r", line \d")):
        read(folder)
    captions, said = read(folder, skip_broken=True)
    assert {name: sorted(row) for name, row in captions.items()} == {p.name: sorted(p.captions) for p in photos}
    assert said.count("is there twice") == 1


def test_duplicate_ids_of_coco_and_parquet(photos: list[Photo], folder: Path) -> None:
    coco(folder, photos)
    file = folder / "annotations/captions_val2014.json"
    content = json.loads(file.read_text())
    for name, problem in (("images", r"images\[1\]: the id 81"), ("annotations", r"annotations\[1\]: the id 810")):
        doubled = {**content, name: [content[name][0], *content[name]]}
        write_json(file, doubled)
        with pytest.raises(ValueError, match=rf"captions_val2014\.json, {problem} is there twice"):
            read(folder)
        captions, said = read(folder, skip_broken=True)
        assert len(captions) == 14 and all(len(row) == 5 for row in captions.values()) and "there twice" in said
    shutil.rmtree(folder)
    rows = [{"image_id": "a", "image": {"bytes": p.content, "path": None}, "captions": ["a", "b"]} for p in photos[:3]]
    Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    with pytest.raises(ValueError, match="the image_id 'a' is there twice in test, in rows 0 and 1"):
        read(folder)
    assert len(read(folder, skip_broken=True)[0]) == 1


def test_folders_without_captions_are_refused(photos: list[Photo], folder: Path) -> None:
    with pytest.raises(ValueError, match=r"The folder .* is empty"):
        read(folder)
    write_images(folder, photos)
    with pytest.raises(ValueError, match=r"does not hold captions in any known form; it has 14 images.*flickr8k, karp"):
        read(folder)
    write_lines(folder / "captions.csv", csv_lines(photos))
    with pytest.raises(ValueError, match="does not hold COCO's annotations"):
        read(folder, format="coco")
    with pytest.raises(ValueError, match=r"no format 'cocoa'. Known: saved, flickr8k"):
        read(folder, format="cocoa")
    with pytest.raises(ValueError, match="'shapes' is a data set's name"):
        load_captions("shapes", "test", format="coco")
    write_csv(folder / "captions.csv", ["image", "caption"], [("no.jpg", "a dog")])
    with pytest.raises(ValueError, match=r"None of the images that captions\.csv lists is in"):
        read(folder)


def test_unreadable_images_are_skipped_by_name(photos: list[Photo], folder: Path) -> None:
    karpathy(folder, photos)
    half, text = (folder / "images" / photo.name for photo in photos[3:5])
    half.write_bytes(photos[3].content[: len(photos[3].content) // 2])
    text.write_text("This is no photograph.")
    said: list[str] = []
    rows = load_captions(str(folder), "train", report=said.append)
    kept = drop_broken_images(undecoded(rows), report=said.append)
    assert len(kept) == 8 and not {half.name, text.name} & set(kept["image_id"])
    assert [str(path) in line for path, line in zip((half, text), said[-2:], strict=True)] == [True, True]


def test_a_format_overrides_what_is_recognised(photos: list[Photo], folder: Path) -> None:
    karpathy_coco(folder, photos)
    coco(folder, photos)
    said: list[str] = []
    both = load_captions(str(folder), report=said.append)
    assert set(both) == {"train", "validation", "test"}
    assert "(format karpathy), by dataset_coco.json; format= chooses among it and coco." in said[-1]
    assert "images of restval counted as training: 1 " in said[0]
    official = load_captions(str(folder), format="coco", report=said.append)
    assert {name: len(rows) for name, rows in official.items()} == {"train": 10, "validation": 4}
    file = folder / "annotations/captions_val2014.json"
    alone = load_captions(str(file), report=said.append)
    assert {name: len(rows) for name, rows in alone.items()} == {"validation": 4}
    assert undecoded(alone["validation"])[0]["image"]["path"] == str(folder / "val2014" / coco_name(photos[10]))


def test_made_splits_go_by_image_and_stay(hundred_photos: list[Photo], folder: Path) -> None:
    kaggle(folder, hundred_photos)
    said: list[str] = []
    splits = load_captions(str(folder), report=said.append)
    first = {name: rows["image_id"][:] for name, rows in splits.items()}
    assert sum(len(names) for names in first.values()) == 100 == len(set().union(*first.values()))
    assert 4 <= len(first["validation"]) <= 18 and 4 <= len(first["test"]) <= 18
    assert all(len(row) == 5 for rows in splits.values() for row in rows["captions"][:])
    assert "There is no validation and no test split" in said[0] or "no test split" in "".join(said)
    gone = first["train"][0]
    edit_lines(folder / "captions.txt", lambda lines: [line for line in reversed(lines) if gone not in line])
    edit_lines(folder / "captions.txt", lambda lines: [lines[-1], *lines[:-1]])
    again = {name: rows["image_id"][:] for name, rows in load_captions(str(folder), report=said.append).items()}
    assert {name: set(names) for name, names in again.items()} == {
        name: set(names) - {gone} for name, names in first.items()
    }


def test_made_splits_are_tenths_and_never_empty() -> None:
    names = [f"{i}.jpg" for i in range(5000)]
    splits = [made_split(name, ABSENT) for name in names]
    assert splits == made_splits(names, ABSENT)
    assert 420 < splits.count("validation") < 580 and 420 < splits.count("test") < 580
    assert {made_split(name, ["validation"]) for name in names} == {"train", "validation"}
    for count in (3, 4, 5, 9):
        assert set(made_splits(names[:count], ABSENT)) == {"train", "validation", "test"}


def test_leaks_are_found_and_said(photos: list[Photo], folder: Path) -> None:
    twin, namesake = photos[10], photos[11]
    photos[10] = Photo(twin.name, photos[0].content, twin.captions, "validation", twin.number)
    photos[11] = Photo(photos[1].name, namesake.content, namesake.captions, "validation", namesake.number)
    for write in (text_pairs, webdataset):
        shutil.rmtree(folder)
        write(folder, photos)
        said: list[str] = []
        splits = load_captions(str(folder), report=said.append)
        leaks = [line for line in said if line.startswith("Leak")]
        assert len(leaks) == 2 and "train and validation have the same bytes" in leaks[0]
        assert photos[0].stem in leaks[0] and twin.stem in leaks[0]
        assert "the same file name but other bytes" in leaks[1] and photos[1].stem in leaks[1]
        (leak,) = find_leaks({name: undecoded(rows) for name, rows in splits.items()})
        assert len(leak.same_bytes) == len(leak.same_name) == 1


def test_inspection_says_what_is_there_and_what_is_wrong(
    photos: list[Photo], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flickr8k_archives(folder, photos)
    pictures = folder / "Flicker8k_Dataset"
    (pictures / photos[3].name).write_bytes(photos[3].content[:2000])
    (pictures / photos[4].name).unlink()
    (pictures / photos[13].name).write_bytes(photos[0].content)
    lines = token_lines(photos)
    lines[5] = lines[5].partition("\t")[0] + "\tdog ."
    write_lines(folder / "Flickr8k.token.txt", lines)
    assert main(["inspect", str(folder), "--picture", str(folder.parent / "ten.png")]) == 0
    said = capsys.readouterr().out
    assert "train       9       45        5 " in said and "validation  2       10        5 " in said
    assert "Vocabulary of train by how often" in said and "   1: " in said and "  10: " in said
    for problem in (
        f"train: {photos[1].name} has the caption 'dog .' of 1 words.",
        f"train: Image '{photos[3].name}' can't be read: {pictures / photos[3].name}",
        f"listed images that are missing, left out: 1 ({photos[4].name})",
        f"images of train and test have the same bytes ({photos[0].name} = {photos[13].name})",
    ):
        assert problem in said
    assert (folder.parent / "ten.png").stat().st_size > 100_000
    assert main(["inspect", str(folder / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: No data set at")


def test_karpathys_images_say_what_they_lack(photos: list[Photo], folder: Path) -> None:
    karpathy(folder, photos)
    images = [karpathy_image(photo) for photo in photos]
    del images[2]["split"]
    write_json(folder / "dataset_flickr8k.json", {"images": images})
    with pytest.raises(ValueError, match=r"dataset_flickr8k\.json, images\[2\], has no 'split'"):
        read(folder)
    (folder / "dataset_flickr8k.json").write_text('{"images": [\n{"filename" 3}]}')
    with pytest.raises(ValueError, match=r"dataset_flickr8k\.json, line 2, is not JSON"):
        read(folder)
