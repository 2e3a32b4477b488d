"""Every layout is written with made photographs, recognised, and read back equal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layout_writers import CASES, SPLITS, Case, Photo, make_photos, of_split, webdataset
from torch.utils.data import DataLoader

from hf_captioner import CaptionerProcessor, load_captions
from hf_captioner.data.collator import CaptionCollator
from hf_captioner.data.layouts import LAYOUTS
from hf_captioner.data.rows import undecoded

Content = dict[str, tuple[tuple[str, ...], bytes]]


pytestmark = pytest.mark.usefixtures("datasets_cache")


def content(rows: Iterable[dict[str, Any]]) -> Content:
    """Return captions and bytes by image id."""
    found = {}
    for row in rows:
        image = row["image"]
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        assert row["image_id"] not in found
        found[row["image_id"]] = (tuple(row["captions"]), data)
    return found


def expected(photos: Iterable[Photo], case: Case) -> Content:
    return {case.image_id(p): (p.captions, p.content) for p in photos}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.write.__name__)
def test_layout_is_recognised_and_read_back_equal(case: Case, tmp_path: Path) -> None:
    photos, folder = make_photos(), tmp_path / "set"
    folder.mkdir()
    case.write(folder, photos)
    lines: list[str] = []
    splits = load_captions(str(folder), report=lines.append)
    found = {name: content(undecoded(dataset)) for name, dataset in splits.items()}
    recognised = [line for line in lines if ": read as " in line]
    assert len(recognised) == 1 and f"(format {case.format})" in recognised[0], lines
    if case.splits == SPLITS:
        assert found == {split: expected(of_split(photos, split), case) for split in SPLITS}
    else:
        assert set(found) == set(case.splits or SPLITS) and all(found.values())
        assert sum(map(len, found.values())) == 100
        assert {k: v for part in found.values() for k, v in part.items()} == expected(photos, case)
        assert case.splits or any("no validation and no test split" in line for line in lines)
    assert not [line for line in lines if "Leak" in line or "missing" in line]

    streams = load_captions(str(folder), streaming=True, report=lines.append)
    for name, rows in streams.items():
        if case.write.__name__ == "hub_parquet_of_single_captions":  # a stream does not gather rows
            assert len(list(undecoded(rows))) == 5 * len(found[name])
        else:
            assert content(undecoded(rows)) == found[name]
    assert next(iter(rows))["image"].size == (96, 72)
    one_split = load_captions(str(folder), "train", format=case.format, report=lines.append)
    assert one_split["image_id"][:] == list(found["train"])


def test_every_layout_is_tested() -> None:
    assert {case.format for case in CASES} == set(LAYOUTS)


def test_batches_from_a_stream(tmp_path: Path, processor: CaptionerProcessor) -> None:
    webdataset(tmp_path / "set", make_photos())
    stream = undecoded(load_captions(str(tmp_path / "set"), "train", streaming=True)).shuffle(seed=0, buffer_size=20)
    batches = list(DataLoader(stream, batch_size=10, num_workers=2, collate_fn=CaptionCollator(processor)))
    assert sum(len(batch["labels"]) for batch in batches) == 80
    assert all(batch["pixel_values"].shape == (10, 3, 64, 64) for batch in batches)


@pytest.mark.slow
def test_training_and_evaluation_on_tar_shards_with_a_broken_image(tmp_path: Path) -> None:
    photos = list(make_photos())
    photos[3] = replace(photos[3], content=photos[3].content[:1000])
    webdataset(tmp_path / "shards", photos)

    def run(command: str, *arguments: object) -> str:
        data = ["--dataset", tmp_path / "shards", "--dataset_format", "webdataset", "--skip_broken"]
        program = [sys.executable, "-m", "hf_captioner", command, *map(str, [*arguments, *data])]
        env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        result = subprocess.run(program, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout + result.stderr

    sizes = {"hidden_size": 16, "embedding_size": 16, "attention_size": 16, "epochs": 1, "num_beams": 1}
    tiny = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    output = run("train", "--output_dir", tmp_path / "out", *tiny, "--min_count", 2)
    assert output.count("read as WebDataset's tar shards") == 1
    assert f"Left out: Image '{photos[3].stem}' can't be read" in output and "79 images to train on, 10 to" in output
    output = run("evaluate", tmp_path / "out", "--split", "test", "--num_beams", 1)
    assert "test, 10 images" in output and output.count("read as WebDataset's tar shards") == 1
