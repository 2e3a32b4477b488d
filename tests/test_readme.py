"""The README keeps its word: its Python runs, its commands are understood, its set-up is two lines."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_captioner.model.attentions import ATTENTIONS
from hf_captioner.training.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    language: str
    section: str
    line: int
    code: str


def blocks(language: str) -> list[Block]:
    """Fenced blocks of the README, each with the title of its section and the number of its first line."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        titles = re.findall(r"^## (.+)$", README[: match.start()], re.MULTILINE)
        line = README[: match.start(2)].count("\n") + 1
        found.append(Block(match[1], titles[-1] if titles else "", line, match[2]))
    return [block for block in found if block.language == language]


def commands() -> list[str]:
    """Every command of the README: the lines of its bash blocks, split at `&&`."""
    lines = [line for block in blocks("bash") for line in block.code.splitlines()]
    return list(dict.fromkeys(command.strip() for line in lines for command in line.split("&&")))


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


def test_set_up_is_two_lines() -> None:
    set_up = [block.code.splitlines() for block in blocks("bash") if block.section == "Set up"]
    assert [len(lines) for lines in set_up] == [1, 1]
    (main,), (tests,) = set_up
    assert "examples/train.py" in main and tests.endswith("python -m pytest")
    assert all(line.startswith("python -m pip install ") for line in (main, tests))


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match shlex.split(command):
        case ["python", "-m", "pip", "install", *_, what]:
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
            assert extras is not None
            known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set((extras[1] or "").split(",")) - {""} <= known.keys()
        case ["python", "-m", "pytest"]:
            pass
        case ["python", "-m", module, *arguments] if module.startswith("hf_captioner."):
            importlib.import_module(module).parse(arguments)
        case ["python", path, *arguments] | ["accelerate", "launch", path, *arguments]:
            script = load_script(Path(path))
            helped = arguments == ["--help"]
            try:
                if hasattr(script, "parse"):
                    script.parse(arguments)
                else:
                    parse_recipe(script.Recipe, arguments, description="")
            except SystemExit as e:
                assert helped and e.code == 0, f"{path} does not understand {arguments}"
        case other:
            pytest.fail(f"no check for {other}")


@pytest.fixture
def folder(captioner_folder: Path, photo_files: list[Path], tmp_path: Path) -> Path:
    """Folder laid out as the README takes it to be: a trained captioner and a photograph."""
    shutil.copytree(captioner_folder, tmp_path / "outputs" / "shapes")
    scores = {"protocol": "shapes, validation, 400 images, 5 beams", "bleu_4": 0.9}
    (tmp_path / "outputs" / "shapes" / "scores.json").write_text(json.dumps(scores))
    Image.open(photo_files[0]).save(tmp_path / "photo.jpg")
    return tmp_path


def test_python_runs(folder: Path) -> None:
    # One program of all blocks, in a process of its own, with the line numbers of the README.
    lines = [""] * README.count("\n")
    for block in blocks("python"):
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    program = folder / "README.py"
    program.write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, program], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

    assert Image.open(folder / "attention.png").width > 100
    assert {"model.safetensors", "processor_config.json"} <= {f.name for f in (folder / "outputs/trainer").iterdir()}
    card = ModelCard.load(folder / "published" / "README.md")
    assert card.data.pipeline_tag == "image-to-text" and card.data.datasets == ["shapes"]
    assert "0.9" in card.text and "validation, 400 images" in card.text and "{{" not in card.text


def test_entry_point_names_a_registry() -> None:
    (block,) = blocks("toml")
    groups = tomllib.loads(block.code)["project"]["entry-points"]
    assert groups == {ATTENTIONS.group: {"general": "my_package:GeneralAttention"}}
    assert len(block.code.splitlines()) == 2


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", README)
    assert not [target for target in targets if not (ROOT / target).exists()]
