"""What users saved with version 0.1.0 still gives the same captions, losses and scores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.model.onnx_runner import OnnxCaptioner

FOLDER = Path(__file__).with_name("fixtures") / "first_release"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return load_captions("shapes", "validation", num_images=12)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["captioner", "published"])
def test_saved_captioner(name: str, rows: Dataset) -> None:
    model = CaptionerModel.from_pretrained(FOLDER / name).eval()
    processor = CaptionerProcessor.from_pretrained(FOLDER / name)
    inputs = processor([row["image"] for row in rows])
    for way, num_beams in (("greedy", 1), ("beams", 3)):
        assert processor.batch_decode(model.generate(**inputs, num_beams=num_beams)) == EXPECTED[way]
    with torch.no_grad():
        first = processor(text=[row["captions"][0] for row in rows])["labels"]
        log_probabilities = model.score(**inputs, captions=first).scores.diagonal().tolist()
        assert log_probabilities == pytest.approx(EXPECTED["log_probabilities"], abs=1e-4)
        labels = processor(text=[row["captions"] for row in rows])["labels"]
        assert float(model(**inputs, labels=labels).loss) == pytest.approx(EXPECTED["loss"], abs=1e-5)


def test_published_code_runs_without_the_package(rows: Dataset, tmp_path: Path) -> None:
    """The folder's own code, by `trust_remote_code`, in a process that cannot import this package."""
    rows[0]["image"].save(tmp_path / "shapes.png")
    program = (
        "import sys; sys.modules['hf_captioner'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"kwargs = dict(pretrained_model_name_or_path={str(FOLDER / 'published')!r}, trust_remote_code=True)\n"
        "model, processor = AutoModelForImageTextToText.from_pretrained(**kwargs), AutoProcessor.from_pretrained(**kwargs)\n"
        f"inputs = processor({str(tmp_path / 'shapes.png')!r})\n"
        "print(processor.batch_decode(model.generate(**inputs, num_beams=3))[0])"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.stdout.strip().splitlines()[-1] == EXPECTED["beams"][0], result.stderr[-2000:]


@pytest.mark.parametrize("name", ["onnx", "onnx_int8"])
def test_export(name: str, rows: Dataset) -> None:
    pytest.importorskip("onnxruntime")
    captions = OnnxCaptioner(FOLDER / name)([row["image"] for row in rows])
    assert [caption[0]["generated_text"] for caption in captions] == EXPECTED[name]


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "training", tmp_path / "run")
    shutil.copytree(FOLDER / "captioner", tmp_path / "run", dirs_exist_ok=True)  # the best model so far
    arguments: list[Any] = [FOLDER / "recipe.yaml", "--output_dir", tmp_path / "run", "--resume"]
    command = [sys.executable, "-m", "hf_captioner", "train", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 30
    for record, expected in zip(log[28:], EXPECTED["log"], strict=True):
        assert {name: record[name] for name in expected} == pytest.approx(expected, abs=1e-4)
