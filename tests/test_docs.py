"""The README and docs/ keep their word: their Python runs, their commands are understood, their links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_captioner import ATTENTIONS, PHOTOGRAPHS
from hf_captioner.__main__ import COMMANDS
from hf_captioner.training.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Return the number of the first line, and the code, of each fenced block of a page in a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [(PAGES[page].count("\n", 0, match.start(1)), match[1]) for match in found]


def commands() -> list[str]:
    """Return every command of all pages: the lines of bash blocks, split at `&&`."""
    lines = [line for page in PAGES for _, code in blocks(page, "bash") for line in code.splitlines()]
    return list(dict.fromkeys(command.strip() for line in lines for command in line.split("&&")))


def test_readme_is_short_and_each_line_of_its_set_up_does_one_job() -> None:
    readme = PAGES["README.md"]
    assert readme.count("\n") <= 150
    set_up = readme.partition("## Set up\n")[2].partition("\n## ")[0]
    main, tests = re.findall(r"^```bash\n(.*)\n```$", set_up, re.MULTILINE)
    assert main.endswith("&& accelerate launch examples/train.py") and tests.endswith("&& python -m pytest")
    assert all(line.startswith("python -m pip install ") for line in (main, tests))


def understand(command: str, arguments: list[str]) -> None:
    """Parse the arguments of a command of the package, or fail."""
    assert command in COMMANDS
    if command == "train":
        parse_recipe([argument for argument in arguments if argument not in ("--list", "--help")])
    else:
        importlib.import_module(f"hf_captioner.commands.{command}").parse(arguments)


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match shlex.split(command):
        case ["python", "-m", "pip", "install", *_, what]:
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
            assert extras is not None
            known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set((extras[1] or "").split(",")) - {""} <= known.keys()
        case ["hf-captioner", name, *arguments] | ["accelerate", "launch", "-m", "hf_captioner", name, *arguments]:
            understand(name, arguments)
        case ["accelerate", "launch", "examples/train.py", *arguments]:
            understand("train", arguments)
        case ["python", path, *_] if path.startswith("outputs/"):
            pass  # an exported captioner, tested in test_export.py
        case ["python", "-m", "pytest" | "venv", *_] | ["source" | "pre-commit" | "ruff" | "mypy" | "bash", *_]:
            pass
        case other:
            pytest.fail(f"no check for {other}")


@pytest.fixture
def folder(captioner_folder: Path, photo_files: list[Path], tmp_path: Path) -> Path:
    """A folder laid out as the pages take it to be: a trained captioner with its results, and a photograph."""
    shutil.copytree(captioner_folder, tmp_path / "outputs" / "shapes")
    results = {"protocol": "shapes, validation, 400 images, 5 beams", "bleu_4": 0.9}
    (tmp_path / "outputs" / "shapes" / "results.json").write_text(str(results).replace("'", '"'))
    Image.open(photo_files[0]).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page: str, folder: Path) -> None:
    """All blocks of a page as one program, in a process of its own, with the line numbers of the page.

    A tiny captioner takes the place of the one in the package.
    """
    lines = [""] * PAGES[page].count("\n")
    lines[0] = f"import hf_captioner.pretrained as p; p.PHOTOGRAPHS = {str(folder / 'outputs' / 'shapes')!r}"
    for line, code in blocks(page, "python"):
        lines[line : line + code.count("\n")] = code.splitlines()
    program = folder / f"{Path(page).stem}.py"
    program.write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, program], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    if page == "docs/caption.md":
        assert Image.open(folder / "attention.png").width > 100 and "<figure" in (folder / "attention.html").read_text()
    if page == "docs/train.md":
        assert {"model.safetensors", "processor_config.json"} <= {
            f.name for f in (folder / "outputs/trainer").iterdir()
        }
    if page == "docs/publish.md":
        card = ModelCard.load(folder / "published" / "README.md")
        assert card.data.pipeline_tag == "image-to-text" and card.data.datasets == ["shapes"]
        assert "0.9" in card.text and "validation, 400 images" in card.text and "{{" not in card.text


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_first_block_with_an_auto_class_makes_the_captioner_known(page: str) -> None:
    """Each block that loads a captioner through transformers, or one before it on the page, imports this package."""
    code = ""
    for _, block in blocks(page, "python"):
        code += block
        assert not re.search(r"from_pretrained\(|pipeline\(", block) or re.search(r"(import|from) hf_captioner", code)


def test_entry_point_names_a_registry() -> None:
    ((_, code),) = blocks("docs/extend.md", "toml")
    groups = tomllib.loads(code)["project"]["entry-points"]
    assert groups == {ATTENTIONS.group: {"general": "my_package:GeneralAttention"}}
    assert len(code.splitlines()) == 2


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(((?!https?:|#)[^)#]+)[^)]*\)", PAGES[page])
    paths = [(ROOT / page).parent.joinpath(target).resolve() for target in targets]
    bundle = Path(PHOTOGRAPHS)  # absent until it has been trained
    assert not [path for path in paths if not path.exists() and (bundle.exists() or not path.is_relative_to(bundle))]
