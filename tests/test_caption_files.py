"""Files of captions as people write and damage them: read right, or refused with the line."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hf_captioner import load_captions
from hf_captioner.data.layouts.caption_columns import parse_list

Captions = dict[str, list[str]]
ABC: Captions = {"0.jpg": ["a"], "1.jpg": ["b"], "2.jpg": ["c"]}
HEADER = "image,caption\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images 0.jpg, 1.jpg and 2.jpg, which loading does not open."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"image" * (number + 1))
    return tmp_path


def read(folder: Path, name: str, content: str | bytes, path: str = "", **options: Any) -> tuple[Captions, str]:
    """Write a file of captions, and return the captions of each image with the report."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    lines: list[str] = []
    splits = load_captions(str(folder / path), report=lines.append, **options)
    found = {row["image_id"]: row["captions"] for rows in splits.values() for row in rows.remove_columns("image")}
    return dict(sorted(found.items())), "\n".join(lines)


def refused(folder: Path, name: str, content: str | bytes, message: str, **options: Any) -> None:
    """Assert that a file is refused in one short line that names it and contains a message."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(folder, name, content, **options)
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


FRENCH = f"{HEADER}0.jpg,un café\n1.jpg,l’été – à Nîmes\n2.jpg,une fille élégante\n"
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252")


@pytest.mark.parametrize("name", ["captions.csv", "captions.txt"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_are_told_and_reported(name, encoding, folder):
    captions, report = read(folder, name, FRENCH.encode(encoding))
    assert captions == {"0.jpg": ["un café"], "1.jpg": ["l’été – à Nîmes"], "2.jpg": ["une fille élégante"]}
    expected = {"utf-8-sig": "", "cp1252": "read as Windows-1252, since they are not UTF-8: 1 "}
    assert expected.get(encoding, f"Files read as {encoding[:6].upper()}: 1 ({name})") in report


RUSSIAN = f"{HEADER}0.jpg,Черная собака бежит по траве\n1.jpg,Две девочки играют в парке\n"
OTHER_ENCODINGS = {
    "mac_roman": (FRENCH, "It may be mac_roman; if so, convert the file: iconv -f MACINTOSH"),
    "cp850": (FRENCH.replace("’", "'").replace("–", "-"), "It may be cp850"),
    "cp1251": (RUSSIAN, "It may be cp1251"),
    "cp1250": (f"{HEADER}0.jpg,červený míč\n1.jpg,pes běží přes řeku\n", "It may be cp1250"),
    "gb18030": (f"{HEADER}0.jpg,一只黑狗在草地上奔跑\n1.jpg,两个女孩在公园里玩耍\n", "It may be gb18030"),
}


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_other_encodings_are_refused_by_their_names(encoding, folder):
    text, advice = OTHER_ENCODINGS[encoding]
    refused(folder, "c.csv", text.encode(encoding), "c.csv, line 2, is not UTF-8 (byte 0x")
    refused(folder, "c.csv", text.encode(encoding), advice)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FRENCH.encode("utf-16")[:-1], "line 4, has bytes that are no text"),
        (FRENCH.encode("utf-16")[:60] + FRENCH.encode("utf-16")[61:], "line 3, has bytes that are no text"),
        (f"{HEADER}0.jpg,a\0b\n".encode(), "line 2, has bytes that are no text"),
        (b"PK\x03\x04" + bytes(range(200)), "is not a text file"),
        (b"", "c.csv is empty"),
        (HEADER.encode(), "c.csv holds no captions"),
    ],
)
def test_files_that_are_no_text_are_refused(content, message, folder):
    refused(folder, "c.csv", content, message)


TABLES = {
    "c.csv": [f"{HEADER}0.jpg,a\r1.jpg,b\r2.jpg,c\r", "sep=;\nimage;caption\n0.jpg;a\n1.jpg;b\n2.jpg;c\n"],
    "c.tsv": ["image\tcaption\r\n0.jpg\ta\r\n1.jpg\tb\r\n2.jpg\tc", f"{HEADER}0,a\n1,b\n2,c\n"],
    "c.txt": [
        "0.jpg\ta\n1.jpg\tb\n2.jpg\tc\n",
        "0.jpg;a\n1.jpg;b\n2.jpg;c\n",
        "caption;image\na;0.jpg\nb;1.jpg\nc;2.jpg",
    ],
    "captions.txt": [
        *("image\tcaption\n0.jpg\ta\n1.jpg\tb\n2.jpg\tc\n", "image;caption\n0.jpg;a\n1.jpg;b\n2.jpg;c\n"),
        *(f"{HEADER}0,a\n1,b\n2,c\n", f"{HEADER}.\\0.jpg,a\n.\\1.jpg,b\n.\\2.jpg,c\n"),
        "image,caption,split\n0.jpg,a,train\n1.jpg,b,val\n2.jpg,c,test\n",
    ],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in TABLES.items() for text in texts])
def test_delimiters_line_ends_and_names(name, content, folder):
    assert read(folder, name, content)[0] == ABC


QUOTES: list[tuple[str, list[str] | str, str]] = [  # rows of a CSV, the captions or the error, and the report
    ('0.jpg,"a\n1.jpg,b\n2.jpg,c', ["a", "b", "c"], "c.csv: unpaired quotes, which are removed: 1 (line 2)"),
    ('0.jpg,a\n1.jpg,b\n2.jpg,"c', ["a", "b", "c"], "unpaired quotes, which are removed: 1 (line 4)"),
    ('0.jpg,"a\n\nb"\n1.jpg,"c, d"\n2.jpg,e "f"', ["a\nb", "c, d", 'e "f"'], ""),
    (
        '0.jpg,"a" b\n1.jpg,b\n2.jpg,c',
        ['"a" b', "b", "c"],
        "quotes in the middle of fields, which are kept: 1 (line 2)",
    ),
    ('0.jpg, "a, b"\n1.jpg,"b \\"x\\", y"\n2.jpg,"c"  ', ["a, b", 'b "x", y', "c"], ""),
    ('0.jpg,"a, b\n1.jpg,b\n2.jpg,c', "c.csv, line 2, has an unpaired quote", ""),
    ('0.jpg,a\n1.jpg,"b, c"d"\n2.jpg,c', "c.csv, line 3, has an unpaired quote", ""),
    ("0.jpg,a, b\n1.jpg,b\n2.jpg,c", "c.csv, line 2, has more fields than the header", ""),
]


@pytest.mark.parametrize(("rows", "expected", "line"), QUOTES)
def test_quotes_do_not_join_rows(rows, expected, line, folder):
    if isinstance(expected, str):
        refused(folder, "c.csv", HEADER + rows, expected)
        left = read(folder, "c.csv", HEADER + rows, skip_broken=True)[0]
        assert sum(map(len, left.values())) == 2
    else:
        captions, report = read(folder, "c.csv", HEADER + rows)
        assert [captions[f"{number}.jpg"] for number in range(3)] == [[caption] for caption in expected]
        assert line in report


def test_rows_behind_an_unpaired_quote_are_read_however_many_they_are(folder):
    rows = "".join(f"{number}.jpg,a dog with a long caption\n" for number in range(3, 6000))
    captions, report = read(folder, "c.csv", f'{HEADER}0.jpg,"a\n1.jpg,b\n2.jpg,c\n{rows}')
    assert captions == ABC and "listed images that are missing, left out: 5997 " in report


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,caption_0,cbption_1,caption_2", "has the columns caption_0, caption_2, but none with the number 1"),
        ("image,caption_0,caption_1,capt_on_2", "and 'capt_on_2'. If it holds captions, rename it like the others"),
        ("image,caption,Caption,caption", "c.csv has two columns 'caption'"),
        ("image,x" + "y" * 9999, "c.csv has the columns image, xyyy"),
    ],
)
def test_damaged_headers_are_refused(header, message, folder):
    refused(folder, "c.csv", f"{header}\n0.jpg,a,b,c\n", message)


def test_columns_and_cells_that_are_not_read_are_reported(folder):
    table = "image,caption_0,caption_1,caption_lang\n0.jpg,a,b,en\n1.jpg,a\n2.jpg,c,d,en\n"
    captions, report = read(folder, "c.csv", table)
    assert captions == {"0.jpg": ["a", "b"], "1.jpg": ["a"], "2.jpg": ["c", "d"]}
    assert "Columns that are not read: 1 (caption_lang of c.csv)" in report
    assert "c.csv: rows with fewer fields than the header: 1 (line 3)" in report
    assert "Images with another number of captions than 2, as most have: 1 (1.jpg)" in report


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        *[(text, ["a dog", "it's"]) for text in ("['a dog', \"it's\"]", "['a dog' \"it's\"]", "('a dog', \"it's\")")],
        ("array(['a dog',\n       \"it's\"], dtype=object)", ["a dog", "it's"]),
        ('[ "a dog" , "it\'s" ]', ["a dog", "it's"]),
        ('["caf\\u00e9 \\ud83d\\ude00"]', ["café 😀"]),
        ("['a', None]", ["a"]),
        *[(text, None) for text in ("a dog", "[a dog]", '"a dog"', "(a dog) runs", "{'a'} runs", "[]")],
    ],
)
def test_lists_in_cells(text, captions):
    assert parse_list(text) == captions


@pytest.mark.parametrize("cell", ["['b', 'c", "['b, 'c']", "'b', 'c']"])
def test_damaged_lists_in_cells_are_refused(cell, folder):
    refused(folder, "c.csv", f"image,captions\n0.jpg,\"['a', 'b']\"\n1.jpg,\"{cell}\"\n", "c.csv, line 3")


def test_html_entities_are_replaced(folder):
    text = f"{HEADER}0.jpg,a &quot;dog&quot; &amp;amp; caf&#233;\n1.jpg,AT&T a < b &foo; R&D;\n2.jpg,c\n"
    captions, report = read(folder, "c.csv", text)
    assert captions == {"0.jpg": ['a "dog" & café'], "1.jpg": ["AT&T a < b &foo; R&D;"], "2.jpg": ["c"]}
    assert "Captions with HTML's entities such as &quot;, replaced: 1 (c.csv, line 2)" in report


LINES: list[tuple[str, list[str], str]] = [  # lines of captions.txt, the captions of 0, 1 and 2, and the report
    (
        '0.jpg,"a logo.png, b"\n1.jpg,"says 0.jpg, in red"\n2.jpg,c',
        ["a logo.png, b", "says 0.jpg, in red", "c"],
        "name an image's file",
    ),
    (
        "0.jpg,a logo.png, b\n1.jpg,says 0.jpg, x\n2.jpg,c",
        ["a logo.png, b", "says 0.jpg, x", "c"],
        "image's file, kept whole: 2 (captions.txt, line 2",
    ),
    (
        "0.jpg,see 1.jpg,2.jpg now\n1.jpg,b\n2.jpg,c",
        ["see 1.jpg,2.jpg now", "b", "c"],
        "kept whole: 1 (captions.txt, line 2)",
    ),
    ("0.jpg,a1.jpg,b .2.jpg,c", ["a", "b .", "c"], "joined with the next one, separated: 1 (line 2)"),
    ("0.jpg,a . 1.jpg,b\nand x\n2.jpg,c", ["a .", "b and x", "c"], "line breaks inside captions, removed: 1 (line 3)"),
]


@pytest.mark.parametrize(("lines", "expected", "line"), LINES)
def test_captions_that_name_files_and_lines_that_are_joined(lines, expected, line, folder):
    captions, report = read(folder, "captions.txt", HEADER + lines)
    assert captions == {f"{number}.jpg": [caption] for number, caption in enumerate(expected)}
    assert line in report


def test_names_with_spaces(folder):
    (folder / "a b").mkdir()
    (folder / "0.jpg").rename(folder / "a b" / "my 0.jpg")
    captions, _ = read(folder, "captions.txt", f"{HEADER}a b/my 0.jpg, a dog\nand x1.jpg,b\n2.jpg,c\n")
    assert captions == {"my 0.jpg": ["a dog and x"], "1.jpg": ["b"], "2.jpg": ["c"]}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        *[("captions.txt", f"0.jpg,a\n{line}\n2.jpg,c", "line 2, has no image") for line in ("1.jxg,b", "1.jpg*b x,y")],
        *[("x.token", f"0.jpg#0\ta\n{line}\n2.jpg#0\tc", "line 2, has no image") for line in ("1.jpg$0\tb", "1#0\tb")],
        ("x.token", "0.jpg$0\ta\n1.jpg#0\tb", "line 1, has no image's name"),
        ("x.token", "0.jpg#0\ta\n1.jpg#0\t\n", "line 2, has no caption"),
        ("captions.txt", f"{HEADER}0.jpg,a\n1.jpg,\n", "line 3, has no caption"),
    ],
)
def test_damaged_lines_are_refused(name, lines, message, folder):
    refused(folder, name, lines, message)


ROWS = [{"image": "0.jpg", "caption": "a"}, {"image": "1.jpg", "caption": "b"}, {"image": "2.jpg", "caption": "c"}]
COCO = {
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)],
    "annotations": [{"id": 10 + n, "image_id": n, "caption": "abc"[n]} for n in range(3)],
}
KARPATHY = {"images": [{"filename": f"{n}.jpg", "split": "val", "sentences": [{"raw": "abc"[n]}]} for n in range(3)]}
BY_IMAGE = {row["image"]: row["caption"] for row in ROWS}
DOCUMENTS: dict[str, Any] = {
    "list of rows": ROWS,
    "list of rows with lists": [{**row, "caption": [row["caption"]]} for row in ROWS],
    "list in a dict": {"info": {"year": 2020}, "data": ROWS},
    "dict by image": BY_IMAGE,
    "dict by image with lists": {image: [caption] for image, caption in BY_IMAGE.items()},
    "dict by image with rows": {image: {"captions": [caption]} for image, caption in BY_IMAGE.items()},
    "dict of splits": {"train": ROWS[:1], "val": ROWS[1:2], "test": ROWS[2:]},
    "dict of splits by image": {"train": {"0.jpg": "a"}, "val": {"1.jpg": "b", "2.jpg": ["c"]}},
    "dict of rows by index": {str(index): row for index, row in enumerate(ROWS)},
    "columns as lists": {name: [row[name] for row in ROWS] for name in ("image", "caption")},
    "columns by index": {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ("image", "caption")},
    "Karpathy's": KARPATHY,
}


@pytest.mark.parametrize("form", DOCUMENTS)
def test_json_of_any_name_is_known_by_its_content(form, folder):
    content = json.dumps(DOCUMENTS[form])
    assert read(folder, "mine.json", content)[0] == ABC
    assert read(
        folder, "mine.json", content.encode("utf-16"), format="karpathy" if KARPATHY is DOCUMENTS[form] else "table"
    )


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_json_lines_and_lists_under_either_suffix(name, folder):
    for content in ("\n".join(map(json.dumps, ROWS)), json.dumps(ROWS), json.dumps(ROWS, indent=1)):
        assert read(folder, name, content)[0] == ABC


def test_names_of_rows_may_be_numbers_and_ids_may_repeat(folder):
    rows = [{"image": n, "caption": caption, "image_id": f"coco_{n}"} for n in range(3) for caption in "xy"]
    assert read(folder, "val.json", json.dumps(rows))[0] == {f"coco_{n}": ["x", "y"] for n in range(3)}


def test_coco_of_any_name_and_format(folder):
    for options in ({}, {"format": "coco"}, {"format": "coco", "path": "mine.json"}):
        captions, report = read(folder, "mine.json", json.dumps(COCO), **options)
        assert captions == {"0": ["a"], "1": ["b"], "2": ["c"]} and "(format coco)" in report
    (folder / "mine.json").unlink()
    assert read(folder, "odd.data", json.dumps(COCO), path="odd.data", format="coco")[0] == captions
    refused(folder, "odd.data", json.dumps(COCO), "images[0], has no 'sentences'", path="odd.data", format="karpathy")


def changed(document: Any, *keys: str | int, value: Any) -> str:
    """Return the JSON of a document in which one value is another one."""
    copy = holder = json.loads(json.dumps(document))
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    return json.dumps(copy)


BROKEN_JSON = [
    (json.dumps(ROWS, indent=1)[:-20], "x.json, line 11, is not JSON"),
    ('[{"image": "0.jpg", "caption": ' + "[" * 99_999, "x.json is not JSON"),
    ('[{"image": "0.jpg", "caption": ' + "[" * 900 + "]" * 900 + "}]", "x.json, row 0: The captions are nested"),
    ('[{"image": "0.jpg", "caption": ' + "9" * 9999 + "}]", "x.json"),
    ('{"0.jpg": "a", "0.jpg": "b"}', "the key '0.jpg' occurs twice"),
    *[(changed(ROWS, 1, "caption", value=value), "x.json, row 1") for value in (None, float("nan"), 5, {}, [], True)],
    *[(changed(ROWS, 1, "image", value=value), "x.json, row 1") for value in (None, ["1.jpg"], 0.5, {})],
    (changed(ROWS, 1, value=5), "x.json, row 1, is no JSON object"),
    (changed(ROWS, 1, value={"image": "1.jpg", "captoin": "b"}), "x.json, row 1, has no caption"),
    (changed(ROWS, 1, "caption", value="a \ud83d"), "row 1, has a caption with half a character"),
    (changed(ROWS, 1, "split", value="a b"), "row 1, has the split 'a b'"),
    *[(changed(COCO, "images", 1, "id", value=value), "images[1], has the 'id'") for value in ([1], None, True, 0.5)],
    *[(changed(COCO, "images", 1, "file_name", value=value), "images[1], has the 'file_name'") for value in (5, None)],
    *[(changed(COCO, "annotations", 1, "image_id", value=v), "annotations[1]") for v in ({}, 7, None)],
    *[(changed(COCO, "annotations", 1, "caption", value=v), "annotations[1], has the 'caption'") for v in (5, ["a"])],
    *[(changed(KARPATHY, "images", 1, "sentences", value=value), "images[1], ") for value in ({}, [5], [], [{}])],
    *[(changed(KARPATHY, "images", 1, "split", value=value), "images[1], has the ") for value in (5, "a/b")],
]


@pytest.mark.parametrize(("content", "message"), BROKEN_JSON)
def test_broken_json_is_refused(content, message, folder):
    refused(folder, "x.json", content, message)


def test_text_without_a_caption_is_refused_and_a_caption_twice_is_reported(folder):
    (folder / "0.txt").write_text("a\na\n")
    refused(folder, "1.txt", "\n", "1.txt holds no captions")
    captions, report = read(folder, "1.txt", "b\n")
    assert captions == {"0.jpg": ["a", "a"], "1.jpg": ["b"]} and "the same caption twice: 1 (0.jpg)" in report


HEADS = {
    "captions.txt": f"{HEADER}0.jpg,",
    "x.token": "0.jpg#0\t",
    "results.csv": "image_name| comment_number| comment\n0.jpg| 0| ",
    "c.csv": f"{HEADER}0.jpg,",
    "0.txt": "",
    "c.jsonl": '{"image": "0.jpg", "caption": "',
}
LONG = ("x ", ".jpg,", "1", '"', "['a',", "#1", "\\", "é")


@pytest.mark.parametrize("name", HEADS)
def test_long_lines_take_no_long_time(name, folder):
    for text in LONG:
        started = time.process_time()
        try:
            read(folder, name, HEADS[name] + text * (400_000 // len(text)))
        except ValueError as e:
            assert name in str(e) and len(str(e)) < 400, text
        assert time.process_time() - started < 4, text
