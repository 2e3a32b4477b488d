from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from transformers import pipeline

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "caption.py"


def load_script() -> ModuleType:
    """The script as a module, so that one process can run it many times."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("caption", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def caption() -> ModuleType:
    return load_script()


@pytest.fixture(scope="module")
def texts(captioner_folder: Path, photo_files: list[Path]) -> list[str]:
    captioner = pipeline("image-captioning", model=captioner_folder, device="cpu")
    return [result[0]["generated_text"] for result in captioner([str(file) for file in photo_files])]


@pytest.fixture
def folder(photo_files: list[Path], tmp_path: Path) -> Path:
    """Folder with two photographs, a third in a folder inside, one that is broken, and a text."""
    folder = tmp_path / "holidays"
    (folder / "day2").mkdir(parents=True)
    for file, name in zip(photo_files, ["b.png", "a.PNG", "day2/b.png"], strict=False):
        shutil.copy(file, folder / name)
    (folder / "c.jpg").write_bytes(photo_files[0].read_bytes()[:500])
    (folder / "notes.txt").write_text("no image")
    return folder


def run(caption: ModuleType, *arguments: Any) -> None:
    caption.main([*map(str, arguments), "--device", "cpu"])


def test_files_give_a_line_each(
    caption: ModuleType,
    captioner_folder: Path,
    photo_files: list[Path],
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(caption, captioner_folder, *photo_files, "--batch_size", 2)
    expected = [f"{file}\t{text}" for file, text in zip(photo_files, texts, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected


def test_folder_with_all_options(
    caption: ModuleType, captioner_folder: Path, folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, file = folder.parent / "out" / "attention", folder.parent / "out" / "captions.json"
    options = ["--num-captions", 2, "--num-beams", 5, "--skip-broken", "--attention", pictures, "--json", file]
    run(caption, captioner_folder, folder, *options)
    output, errors = capsys.readouterr()
    assert f"Left out: {folder / 'c.jpg'} is not a readable image" in errors

    records = json.loads(file.read_text())
    found = [folder / "a.PNG", folder / "b.png", folder / "day2" / "b.png"]
    drawn = [pictures / "a.png", pictures / "b.png", pictures / "b-2.png"]
    assert [record["image"] for record in records] == list(map(str, found))
    assert [record["captions"][0] for record in records] == [texts[1], texts[0], texts[2]]
    assert [record["attention"] for record in records] == [{"panels": str(picture)} for picture in drawn]
    assert all(record["scores"] == sorted(record["scores"], reverse=True) for record in records)
    assert sorted(pictures.iterdir()) == sorted(drawn)
    assert all(Image.open(picture).width > 300 for picture in drawn)
    lines = []
    for record, picture in zip(records, drawn, strict=True):
        first, second = record["captions"]
        lines += [f"{record['image']}\t{first}\t{picture}", f"{record['image']}\t{second}"]
    assert output.splitlines() == lines


def test_pictures_in_all_formats(
    caption: ModuleType, captioner_folder: Path, folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "b.png", folder / "b.overlay.png")  # as if it were a picture of the one beside it
    pictures, file = folder.parent / "out", folder.parent / "captions.json"
    options = ["--attention", pictures, "--attention_format", "html", "gif", "overlay", "panels", "--json", file]
    run(caption, captioner_folder, folder / "b.png", folder / "b.overlay.png", *options, "--num_captions", 2)
    output, errors = capsys.readouterr()
    suffixes = {"panels": ".png", "overlay": ".overlay.png", "gif": ".gif"}
    names = {path.name for path in pictures.iterdir()}
    assert names == {"index.html"} | {f"{stem}{end}" for stem in ("b", "b.overlay-2") for end in suffixes.values()}
    records = json.loads(file.read_text())
    for record, stem in zip(records, ["b", "b.overlay-2"], strict=True):
        expected = {name: str(pictures / f"{stem}{end}") for name, end in suffixes.items()}
        assert record["attention"] == expected | {"html": str(pictures / "index.html")}
    with Image.open(pictures / "b.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames > 3
    assert Image.open(pictures / "b.overlay.png").format == Image.open(pictures / "b.png").format == "PNG"
    page = (pictures / "index.html").read_text()
    assert page.count("<figure>") == 2 and page.count('class="caption"') == 4 and str(folder / "b.png") in page
    lines = [line.split("\t") for line in output.splitlines()]
    assert [len(line) for line in lines] == [5, 2, 5, 2]
    assert str(pictures / "index.html") in errors


def test_page_alone(caption: ModuleType, captioner_folder: Path, folder: Path) -> None:
    run(caption, captioner_folder, folder / "b.png", "--attention", folder / "out", "--attention-format", "html")
    assert [path.name for path in (folder / "out").iterdir()] == ["index.html"]


def test_format_without_a_folder(caption: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        caption.main(["model", "photo.jpg", "--attention_format", "gif"])
    assert "give one with --attention DIR" in capsys.readouterr().err


def test_more_captions_than_beams_the_model_has(
    caption: ModuleType, captioner_folder: Path, photo_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(caption, captioner_folder, photo_files[0], "--num_captions", 7)
    assert len(set(capsys.readouterr().out.splitlines())) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "FOLDER/gone.jpg"], "no image or folder"),
        (["MODEL", "FOLDER/c.jpg"], "c.jpg is not a readable image"),
        (["MODEL", "FOLDER/c.jpg", "--skip_broken"], "No image could be read"),
        (["MODEL", "MODEL"], "holds no images"),
        (["FOLDER", "FOLDER/b.png"], "has no config.json"),
        (["MODEL", "FOLDER/b.png", "--num_beams", "2", "--num_captions", "3"], "3 captions need as many beams"),
        (["MODEL", "FOLDER/b.png", "--device", "abacus"], "device 'abacus' can't be used"),
    ],
)
def test_errors(caption: ModuleType, captioner_folder: Path, folder: Path, arguments: list[str], message: str) -> None:
    places = {"MODEL": str(captioner_folder), "FOLDER": str(folder)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises((ValueError, OSError), match=message):
        caption.main(arguments)


def test_command_line_ends_in_one_line_and_code_2(captioner_folder: Path, folder: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(captioner_folder), str(folder), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "error" in line.lower()] == [result.stderr.splitlines()[-1]]
    assert "c.jpg is not a readable image" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("name", "value"), [("--num_beams", "0"), ("--batch-size", "-1"), ("--num_captions", "two")])
def test_arguments_are_checked(caption: ModuleType, name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        caption.main(["model", "photo.jpg", name, value])
    assert name in capsys.readouterr().err
