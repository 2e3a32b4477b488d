"""Every form of captions is written from real photographs and read back equal; so are broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from layout_writers import CASES, SPLITS, Case, Photo, webdataset
from torch.utils.data import DataLoader

from hf_captioner import CaptionerProcessor, load_captions
from hf_captioner.data.collator import CaptionCollator
from hf_captioner.data.layouts import LAYOUTS
from hf_captioner.data.rows import undecoded

ROOT = Path(__file__).resolve().parents[1]
Content = dict[str, tuple[tuple[str, ...], bytes]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def content(rows: Iterable[dict[str, Any]]) -> Content:
    found = {}
    for row in rows:
        image = row["image"]
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        assert row["image_id"] not in found
        found[row["image_id"]] = (tuple(row["captions"]), data)
    return found


def wanted(photos: Iterable[Photo], case: Case) -> Content:
    return {case.image_id(p): (p.captions, p.content) for p in photos}


def write(case: Case, photos: list[Photo], folder: Path) -> Path:
    folder = folder / "set"
    folder.mkdir()
    case.write(folder, photos)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.write.__name__)
def test_a_layout_is_recognised_and_read_back_equal(case: Case, hundred_photos: list[Photo], tmp_path: Path) -> None:
    folder = write(case, hundred_photos, tmp_path)
    said: list[str] = []
    splits = load_captions(str(folder), report=said.append)
    found = {name: content(undecoded(dataset)) for name, dataset in splits.items()}
    taken = [line for line in said if "taken for" in line]
    assert len(taken) == 1 and f"(format {case.format})" in taken[0], said
    if len(case.splits) == 3:
        for split in SPLITS:
            assert found[split] == wanted([p for p in hundred_photos if p.split == split], case)
    else:
        assert {k: v for part in found.values() for k, v in part.items()} == wanted(hundred_photos, case)
        assert sum(map(len, found.values())) == 100
        assert all(found.values()) and set(found) == set(case.splits or SPLITS)
        assert case.splits or any("no validation and no test split" in line for line in said)
    assert not [line for line in said if "Leak" in line or "missing" in line]

    streams = load_captions(str(folder), streaming=True, report=said.append)
    for name, rows in streams.items():
        if case.write.__name__ == "hub_parquet_of_single_captions":
            assert len(list(undecoded(rows))) == 5 * len(found[name])
        else:
            assert content(undecoded(rows)) == found[name]
    assert next(iter(rows))["image"].size == (224, 224)
    alone = load_captions(str(folder), "train", format=case.format, report=said.append)
    assert alone["image_id"][:] == list(found["train"])


def test_a_stream_makes_batches(hundred_photos: list[Photo], tmp_path: Path, processor: CaptionerProcessor) -> None:
    webdataset(tmp_path / "set", hundred_photos)
    stream = undecoded(load_captions(str(tmp_path / "set"), "train", streaming=True)).shuffle(seed=0, buffer_size=20)
    loader = DataLoader(stream, batch_size=10, num_workers=2, collate_fn=CaptionCollator(processor))
    batches = list(loader)
    assert sum(len(batch["labels"]) for batch in batches) == 80
    assert all(batch["pixel_values"].shape == (10, 3, 64, 64) for batch in batches)


@pytest.mark.slow
def test_training_and_scoring_on_tar_shards(hundred_photos: list[Photo], tmp_path: Path) -> None:
    half = hundred_photos[3]
    broken = Photo(half.name, half.content[: len(half.content) // 2], half.captions, half.split, half.number)
    webdataset(tmp_path / "shards", [broken if photo is half else photo for photo in hundred_photos])

    def run(script: str, *arguments: object) -> str:
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        options = ["--dataset", tmp_path / "shards", "--dataset-format", "webdataset", "--skip-broken"]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        result = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    sizes = {"hidden_size": 16, "embedding_size": 16, "attention_size": 16, "epochs": 1, "num_beams": 1}
    tiny = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    said = run("train.py", "--output_dir", tmp_path / "out", *tiny, "--min_count", 2)
    assert said.count("taken for WebDataset's tar shards") == 1
    assert f"Left out: Image '{half.stem}' can't be read" in said and "79 images to train on, 10 to" in said
    said = run("evaluate.py", tmp_path / "out", "--split", "test", "--num-beams", 1)
    assert "test, 10 images" in said and said.count("taken for WebDataset's tar shards") == 1


def test_every_layout_is_tested() -> None:
    assert {case.format for case in CASES} == set(LAYOUTS)
