"""Every layout is written with made photographs, recognised, and read back equal."""

from __future__ import annotations

from collections.abc import Iterable
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


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


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
