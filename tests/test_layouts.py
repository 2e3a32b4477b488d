"""Every form of captions is written from real photographs and read back equal; so are broken ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from layout_writers import CASES, SPLITS, Case, Photo

from hf_captioner import load_captions
from hf_captioner.data import undecoded
from hf_captioner.layouts import LAYOUTS

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


def test_every_layout_is_tested() -> None:
    assert {case.format for case in CASES} == set(LAYOUTS)
