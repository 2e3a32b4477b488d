"""The packages in examples/plugin_*, installed as users install them: captioners use them, and say where they are missing."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_captioner import testing

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {folder.name.removeprefix("plugin_"): folder for folder in sorted(ROOT.glob("examples/plugin_*"))}
OPTIONS: dict[str, Any] = {"encoder": {"encoder_name": "test_resnet", "image_size": (64, 96)}, "dataset": {"size": 32}}
PARTS = {"encoder": "two_scales", "attention": "sparse", "decoder": "minimal", "dataset": "clocks", "metric": "habits"}

# Program that trains and saves a captioner with each plug-in, and writes its losses and captions.
TRAIN = """
import json, sys, torch
from hf_captioner import METRICS, CaptionCollator, CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.data.rows import undecoded

torch.set_num_threads(1)
folder, parts = sys.argv[1], json.loads(sys.argv[2])
losses, captions = {}, {}
for kind, name in parts.items():
    torch.manual_seed(0)
    dataset = load_captions(name) if kind == "dataset" else load_captions("shapes", num_images=12)
    texts = [caption for row in dataset["train"]["captions"] for caption in row]
    chosen = {f"{kind}_type": name} if kind in ("encoder", "attention", "decoder") else {}
    sizes = {"hidden_size": 32, "attention_size": 32, "embedding_size": 32, "output_dropout": 0.0}
    vocab_size = 4 + len({word for text in texts for word in text.split()})
    model = CaptionerModel.from_encoder("test_resnet", pretrained=False, doubly_stochastic_weight=0.0,
                                        vocab_size=vocab_size, **sizes, **chosen)
    processor = CaptionerProcessor.from_captions(texts, model.data_config | {"input_size": (3, 64, 64)}, min_count=1)
    assert len(processor.tokenizer) == model.config.vocab_size
    model.generation_config = model.default_generation_config()
    rows = undecoded(dataset["train"])
    batch = CaptionCollator(processor)([rows[i] for i in range(8)])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses[kind] = []
    for _ in range(8):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[kind].append(loss.item())
    model.eval().save_pretrained(f"{folder}/{kind}")
    processor.save_pretrained(f"{folder}/{kind}")
    torch.save(batch["pixel_values"], f"{folder}/{kind}/pixels.pt")
    captions[kind] = processor.batch_decode(model.generate(batch["pixel_values"]))
scores = METRICS.get(parts["metric"])().compute(predictions=captions["metric"], references=[["a star"]] * 8)
json.dump({"losses": losses, "captions": captions, "scores": scores}, open(f"{folder}/trained.json", "w"))
"""

# Program that loads each captioner, and prints its captions or the error.
LOAD = """
import json, sys, torch
from hf_captioner import METRICS, CaptionerModel, CaptionerProcessor, load_captions

torch.set_num_threads(1)
folder, parts, results = sys.argv[1], json.loads(sys.argv[2]), {}
for kind, name in parts.items():
    try:
        model = CaptionerModel.from_pretrained(f"{folder}/{kind}").eval()
        if kind == "dataset":
            load_captions(name, "validation")
        if kind == "metric":
            METRICS.get(name)
        processor = CaptionerProcessor.from_pretrained(f"{folder}/{kind}")
        results[kind] = processor.batch_decode(model.generate(torch.load(f"{folder}/{kind}/pixels.pt")))
    except ValueError as e:
        results[kind] = str(e)
print(json.dumps(results))
"""


def project(kind: str) -> dict[str, Any]:
    """Return the table `project` of the plug-in's pyproject.toml."""
    return dict(tomllib.loads((FOLDERS[kind] / "pyproject.toml").read_text())["project"])


Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(folder: Path, *packages: Path) -> Run:
    """Make a virtual environment with the packages, and with the dependencies of the environment of these tests."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    sources = [shutil.copytree(package, folder / package.name, ignore=_other_files) for package in packages]
    install = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet", *map(str, sources)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=folder, env=clean)

    pip = run("-m", "pip", "install", *install)
    assert pip.returncode == 0, pip.stderr[-2000:]
    return run


def _other_files(folder: str, names: list[str]) -> list[str]:
    """Return the names in a folder of a checkout that don't belong to the package, such as old builds."""
    if Path(folder) != ROOT:
        return [name for name in names if name in ("__pycache__", "build") or name.endswith(".egg-info")]
    return [name for name in names if name not in ("hf_captioner", "pyproject.toml", "README.md", "LICENSE")]


@pytest.fixture(scope="module")
def with_plugins(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return environment(tmp_path_factory.mktemp("with_plugins"), ROOT, *FOLDERS.values())


@pytest.fixture(scope="module")
def trained(with_plugins: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = with_plugins("-c", TRAIN, str(folder), json.dumps(PARTS))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def loaded(run: Run, folder: Path) -> dict[str, Any]:
    result = run("-c", LOAD, str(folder), json.dumps(PARTS))
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("kind", FOLDERS)
def test_is_a_complete_small_package_that_keeps_the_contract_of_its_kind(kind: str) -> None:
    (file,) = FOLDERS[kind].glob("*.py")
    assert sum(map(bool, map(str.strip, file.read_text().splitlines()))) < 50
    ((group, points),) = project(kind)["entry-points"].items()
    assert group == f"hf_captioner.{kind}s" and list(points) == [PARTS[kind]]
    assert f"pip install ./examples/plugin_{kind}" in (FOLDERS[kind] / "README.md").read_text()
    part = runpy.run_path(str(file))[points[PARTS[kind]].rpartition(":")[2]]
    getattr(testing, f"check_{kind}")(part, **OPTIONS.get(kind, {}))


def test_decoder_uses_the_public_contract_alone() -> None:
    (file,) = FOLDERS["decoder"].glob("*.py")
    imported = re.findall(r"^from (hf_captioner\S*) import (.*)$", file.read_text(), re.MULTILINE)
    assert imported == [("hf_captioner.model.decoder_interface", "Memory")]


@pytest.mark.slow
def test_all_are_listed(with_plugins: Run) -> None:
    result = with_plugins("-m", "hf_captioner", "parts")
    assert result.returncode == 0, result.stderr[-2000:]
    for kind, name in PARTS.items():
        assert any(line.split()[:1] == [name] and project(kind)["name"] in line for line in result.stdout.splitlines())


@pytest.mark.slow
def test_models_learn_and_come_back_where_the_plugins_are(trained: Path, with_plugins: Run) -> None:
    report = json.loads((trained / "trained.json").read_text())
    for kind, losses in report["losses"].items():
        assert losses[-1] < 0.9 * losses[0], kind
    assert report["scores"]["words"] > 0
    for kind in ("encoder", "attention", "decoder"):
        config = json.loads((trained / kind / "config.json").read_text())
        assert config["packages"] == {f"{kind}s/{PARTS[kind]}": project(kind)["name"]}
    assert loaded(with_plugins, trained) == report["captions"]


@pytest.mark.slow
def test_a_recipe_chooses_a_plugin(with_plugins: Run, tmp_path: Path) -> None:
    fields = {
        "encoder_type": "two_scales", "encoder_kwargs": "{}", "attention_type": "sparse", "max_images": 8, "epochs": 1,
        "batch_size": 4, "hidden_size": 16, "embedding_size": 16, "max_length": 6, "num_beams": 1,
        "final_num_beams": 1, "tracking": "none", "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    result = with_plugins("-m", "hf_captioner", "train", str(tmp_path / "recipe.yaml"))
    assert result.returncode == 0, result.stderr[-2000:]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder_type"], config["attention_type"]) == ("two_scales", "sparse")
    assert config["packages"]["encoders/two_scales"] == project("encoder")["name"]


@pytest.mark.slow
def test_models_say_what_to_install_where_the_plugins_are_not(trained: Path, tmp_path: Path) -> None:
    errors = loaded(environment(tmp_path, ROOT), trained)
    for kind, name in PARTS.items():
        assert f"{name!r} is not among the {kind}s. Known: " in errors[kind], kind
    for kind in ("encoder", "attention", "decoder"):  # whose packages the checkpoint names
        assert f"pip install {project(kind)['name']}" in errors[kind]
    for kind in ("dataset", "metric"):
        assert f"'hf_captioner.{kind}s'), install that package" in errors[kind]
