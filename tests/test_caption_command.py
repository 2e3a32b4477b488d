"""The command `hf-captioner caption` and the example script beside it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import pipeline

from hf_captioner import CaptionerModel, CaptionerProcessor, pretrained
from hf_captioner.cli import run_command
from hf_captioner.commands.caption import FORMATS, main, split_names
from hf_captioner.commands.caption_by_torch import PAGE, PICTURES
from hf_captioner.publishing.export import export_onnx

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "caption.py"


@pytest.fixture(scope="module")
def texts(captioner_folder: Path, photo_files: list[Path]) -> list[str]:
    """The caption that the pipeline writes for each of `photo_files`."""
    captioner = pipeline("image-captioning", model=captioner_folder, device="cpu")
    return [result[0]["generated_text"] for result in captioner([str(file) for file in photo_files])]


@pytest.fixture
def folder(photo_files: list[Path], tmp_path: Path) -> Path:
    """Folder of two images, a third in a folder within, a broken image, and a text."""
    folder = tmp_path / "holidays"
    (folder / "day2").mkdir(parents=True)
    for file, name in zip(photo_files, ["b.png", "a.PNG", "day2/b.png"], strict=False):
        shutil.copy(file, folder / name)
    (folder / "c.jpg").write_bytes(photo_files[0].read_bytes()[:500])
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments: object) -> None:
    main([*map(str, arguments), "--device", "cpu"])


def test_each_image_gives_a_line(
    captioner_folder: Path, photo_files: list[Path], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(captioner_folder, *photo_files, "--batch_size", 2)
    output, errors = capsys.readouterr()
    assert output.splitlines() == [f"{file}\t{text}" for file, text in zip(photo_files, texts, strict=True)]
    assert not errors  # no progress bar where nobody watches


def test_folder_with_all_options(
    captioner_folder: Path, folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, file = folder.parent / "out" / "attention", folder.parent / "out" / "captions.json"
    options = ["--num-captions", 2, "--num-beams", 5, "--skip-broken", "--attention", pictures, "--json", file]
    run(captioner_folder, folder, *options, "--batch_size", 2)
    output, errors = capsys.readouterr()
    assert f"Left out: {folder / 'c.jpg'} is not a readable image" in errors

    records = json.loads(file.read_text())
    drawn = [pictures / "a.png", pictures / "b.png", pictures / "b-2.png"]
    assert [record["image"] for record in records] == [str(folder / name) for name in ("a.PNG", "b.png", "day2/b.png")]
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


def test_pictures_in_all_formats(captioner_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "b.png", folder / "b.overlay.png")  # named like a picture of the image beside it
    pictures, file = folder.parent / "out", folder.parent / "captions.json"
    options = ["--attention", pictures, "--attention_format", "html", "gif", "overlay", "panels", "--json", file]
    run(captioner_folder, folder / "b.png", folder / "b.overlay.png", *options, "--num_captions", 2)
    output, errors = capsys.readouterr()
    suffixes = {"panels": ".png", "overlay": ".overlay.png", "gif": ".gif"}
    names = {path.name for path in pictures.iterdir()}
    assert names == {"index.html"} | {f"{stem}{end}" for stem in ("b", "b.overlay-2") for end in suffixes.values()}
    for record, stem in zip(json.loads(file.read_text()), ["b", "b.overlay-2"], strict=True):
        expected = {name: str(pictures / f"{stem}{end}") for name, end in suffixes.items()}
        assert record["attention"] == expected | {"html": str(pictures / "index.html")}
    formats = [Image.open(pictures / name).format for name in ("b.png", "b.overlay.png", "b.gif")]
    assert formats == ["PNG", "PNG", "GIF"]
    page = (pictures / "index.html").read_text()
    assert page.count("<figure>") == 2 and page.count('class="caption"') == 4 and str(folder / "b.png") in page
    assert [len(line.split("\t")) for line in output.splitlines()] == [5, 2, 5, 2]
    assert str(pictures / "index.html") in errors


def test_pipes_and_unreadable_folders_are_passed_over(
    captioner_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.jpg").unlink()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    shutil.copy(folder / "b.png", folder / "e.JFIF")
    shutil.copy(folder / "b.png", folder / "without_suffix")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("day2"):  # as if it were another user's
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert (
        run_command(main, [str(captioner_folder), str(folder), str(folder / "without_suffix"), "--device", "cpu"]) == 0
    )
    output, errors = capsys.readouterr()
    names = [line.split("\t")[0] for line in output.splitlines()]
    assert names == [str(folder / name) for name in ("a.PNG", "b.png", "e.JFIF", "without_suffix")]
    assert errors == f"Left out: the folder {folder / 'day2'} can't be read: Permission denied\n"
    assert run_command(main, [str(captioner_folder), str(folder / "pipe.jpg"), "--device", "cpu"]) == 2
    assert "pipe.jpg is not a readable image: it is a pipe" in capsys.readouterr().err


def test_page_alone(captioner_folder: Path, folder: Path) -> None:
    run(captioner_folder, folder / "b.png", "--attention", folder / "out", "--attention-format", "html")
    assert [path.name for path in (folder / "out").iterdir()] == ["index.html"]


def test_number_of_beams_rises_with_the_number_of_captions(
    captioner_folder: Path, photo_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(captioner_folder, photo_files[0], "--num_captions", 7)
    assert len(set(capsys.readouterr().out.splitlines())) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "FOLDER/gone.jpg"], "no image or folder"),
        (["MODEL", "FOLDER/c.jpg"], "c.jpg is not a readable image"),
        (["MODEL", "FOLDER"], "c.jpg is not a readable image"),
        (["MODEL", "FOLDER/c.jpg", "--skip_broken"], "None of the images could be read"),
        (["MODEL", "MODEL"], "holds no images"),
        (["EMPTY", "FOLDER/b.png"], "holds no images (.jpg, .jpeg, .png"),
        (["MODEL"], "is a captioner: name images"),
        (["FOLDER/b.png"], "has no captioner in"),
        (["owner/captioner"], "If it is a captioner, name images after it"),
        (["outputs/photo.jpg", "FOLDER/b.png"], "no image or folder outputs/photo.jpg"),
        (["MODEL", "FOLDER/b.png", "--num_beams", "2", "--num_captions", "3"], "needs at least as many beams"),
        (["MODEL", "FOLDER/b.png", "--device", "abacus"], "device 'abacus' can't be used"),
    ],
)
def test_mistake_ends_in_one_line_and_exit_code_2(
    captioner_folder: Path,
    folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrained, "PHOTOGRAPHS", str(folder / "nothing"))
    (empty := folder / "empty").mkdir()
    for name, path in {"MODEL": captioner_folder, "FOLDER": folder, "EMPTY": empty}.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert run_command(main, arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_beams", "0"], "--num_beams"),
        (["--batch-size", "-1"], "--batch_size"),
        (["--num_captions", "two"], "--num_captions"),
        (["--attention_format", "gif"], "name one with --attention DIR"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["model", "photo.jpg", *options])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(captioner_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved captioner with its export beside it."""
    folder = tmp_path_factory.mktemp("exported") / "captioner"
    shutil.copytree(captioner_folder, folder)
    model, processor = CaptionerModel.from_pretrained(folder), CaptionerProcessor.from_pretrained(folder)
    export_onnx(model, processor, folder / "onnx", beside=True)
    return folder


HEAVY = {"torch", "transformers", "timm", "datasets", "matplotlib", "tqdm", "yaml", "filelock", "huggingface_hub"}
PROGRAM = f"""
import sys
from hf_captioner.__main__ import main
code = main(sys.argv[1:])
print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["ONNX"], ["MODEL", "--skip_broken", "--num_captions", "3"]], ids=str)
def test_plain_captions_of_an_exported_captioner_need_no_torch(
    captioner_folder: Path, exported: Path, folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Output, messages and JSON are those that torch gives, up to the pixels that Pillow resizes otherwise."""
    (folder / "day2" / "b.png").rename(folder / "c.jpg" if "--skip_broken" not in arguments else folder / "d.png")
    captioner, *options = arguments
    names = {"ONNX": exported / "onnx", "MODEL": exported}
    command = [sys.executable, "-c", PROGRAM, "caption", names[captioner], folder, *options, "--json", "ONNX.json"]
    process = subprocess.run([*map(str, command)], cwd=folder.parent, capture_output=True, text=True, check=False)
    *messages, imported = process.stderr.split("\n")[:-1]
    assert (process.returncode, imported) == (0, "filelock yaml"), process.stderr  # files.py writes the JSON

    main([str(captioner_folder), str(folder), *options, "--json", str(folder.parent / "torch.json")])
    output, errors = capsys.readouterr()
    assert messages == errors.splitlines() and len(messages) == ("--skip_broken" in options)
    assert [line.split("\t")[0] for line in process.stdout.splitlines()] == [
        line.split("\t")[0] for line in output.splitlines()
    ]
    ours, theirs = (json.loads((folder.parent / f"{name}.json").read_text()) for name in ("ONNX", "torch"))
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    same = [a["captions"][0] == b["captions"][0] for a, b in zip(ours, theirs, strict=True)]
    assert same.count(False) <= 1


def test_torch_is_used_where_the_export_is_not_that_of_the_captioner(
    exported: Path, photo_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    (changed / "onnx" / "decoder.onnx").write_bytes(b"never read")
    settings = json.loads((changed / "generation_config.json").read_text())
    (changed / "generation_config.json").write_text(json.dumps({**settings, "max_length": 3}))
    run(changed, photo_files[0])
    assert len(capsys.readouterr().out.split("\t")[1].split()) <= 2
    assert run_command(main, [str(exported / "onnx"), str(photo_files[0]), "--attention", str(tmp_path)]) == 2
    assert "Name the one that it was made from" in capsys.readouterr().err


def test_the_first_name_is_the_captioner_or_an_image(
    exported: Path, photo_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(photo_files[0], "photo")
    Path("holidays").mkdir()
    captioners = "photographs", str(exported), str(exported / "onnx"), "owner/captioner"
    images = "photo", "holidays", "./photographs", "https://a.b/c", "c.jpg", "a/b.jpg", "/a/b"
    assert [split_names([name, "x"], None) for name in captioners] == [(name, ["x"]) for name in captioners]
    assert [split_names([name, "x"], None) for name in images] == [("photographs", [name, "x"]) for name in images]
    assert split_names([str(exported.parent), "x"], exported.name) == (str(exported.parent), ["x"])
    assert set(FORMATS) == {*PICTURES, PAGE}


def test_captions_appear_at_once_and_ctrl_c_ends_in_one_line(
    captioner_folder: Path, photo_files: list[Path], tmp_path: Path
) -> None:
    # Ten animations take a while, and ten lines do not fill the buffer of a pipe.
    options = ["--batch_size", "1", "--attention", tmp_path, "--attention_format", "gif"]
    command = [sys.executable, "-m", "hf_captioner", "caption", captioner_folder, *photo_files * 2, *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(str(photo_files[0]))
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and errors == "Stopped by SIGINT.\n"


def test_example(
    captioner_folder: Path,
    photo_files: list[Path],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(captioner_folder), str(photo_files[0])])
    runpy.run_path(str(EXAMPLE))
    first, *words = capsys.readouterr().out.splitlines()
    assert first == texts[0] and [line.split()[1] for line in words] == first.split()
    assert Image.open("attention.png").width > 300
