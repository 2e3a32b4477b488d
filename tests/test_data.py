from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.data import cells as cells_module
from hf_captioner.data.cells import cached_cells, cells_key
from hf_captioner.data.collator import CaptionCollator, _augmented
from hf_captioner.data.loading import StepLoader, StepSampler
from hf_captioner.data.rows import check_captions, drop_broken_images, open_row, undecoded


def jpeg(photo: Image.Image) -> bytes:
    file = io.BytesIO()
    photo.save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def rows(photos: list[Image.Image]) -> Dataset:
    """Five undecoded rows; the fourth is half a JPEG."""
    files = [jpeg(photo) for photo in photos]
    files[3] = files[3][: len(files[3]) // 2]
    return Dataset.from_dict(
        {
            "image": [{"bytes": file, "path": None} for file in files],
            "captions": [["a black dog", "the woman in the snow"], ["two small children"]] * 2 + [["a man"]],
            "image_id": [f"photo{i}" for i in range(5)],
        },
        features=Features(
            {"image": ImageFeature(decode=False), "captions": List(Value("string")), "image_id": Value("string")}
        ),
    )


def whole(rows: Dataset) -> Dataset:
    return rows.select([0, 1, 2, 4])


def test_real_flickr8k_and_a_named_part_load_alike(flickr8k: Path) -> None:
    real = load_captions(str(flickr8k))
    assert isinstance(real, DatasetDict) and set(real) >= {"train", "validation"}
    assert len(real["validation"]) == 1000 and len(real["train"]) == 5999
    row = real["validation"][0]
    assert len(row["captions"]) == 5 and row["image"].size == (224, 224) and row["image_id"].endswith(".jpg")
    drawn = load_captions("shapes", "test", num_images=3)
    assert {"image", "captions", "image_id"} <= set(drawn.column_names) and len(drawn) == 3


def test_columns_of_parquet_are_gathered_in_order(rows: Dataset, tmp_path: Path) -> None:
    table = {"image": [row["image"]["bytes"] for row in whole(rows)]}
    table |= {f"caption_{i}": [f"caption {i} of {n}" for n in range(4)] for i in range(11)}
    Dataset.from_dict(table).cast_column("image", ImageFeature()).to_parquet(tmp_path / "test.parquet")
    dataset = load_captions(str(tmp_path), "test")
    assert dataset["captions"][2] == [f"caption {i} of 2" for i in range(11)]
    assert dataset["image_id"][2] == "test-000002"


@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("shapez", "train", ValueError, "not among the datasets. Known: flickr8k, shapes"),
        ("no/such/folder", "train", FileNotFoundError, "No data set at 'no/such/folder'"),
        ("shapes", "dev", ValueError, "train, validation, test"),
        ("FOLDER/good", "dev", ValueError, "no split 'dev'. It has: test"),
        ("FOLDER/bad", "test", ValueError, "has the columns image, label; wanted are image, caption_0"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    name: str, split: str, error: type[Exception], message: str, rows: Dataset, tmp_path: Path
) -> None:
    for folder, column in (("good", "text"), ("bad", "label")):
        table = {"image": [row["image"]["bytes"] for row in whole(rows)], column: ["a dog"] * 4}
        Dataset.from_dict(table).cast_column("image", ImageFeature()).to_parquet(tmp_path / folder / "test.parquet")
    with pytest.raises(error, match=message):
        load_captions(name.replace("FOLDER", str(tmp_path)), split)


def test_empty_captions_are_refused_or_reported(rows: Dataset) -> None:
    captions = [["a dog", " ."], ["?"], ["a man"], ["a man"], [""]]
    rows = rows.remove_columns("captions").add_column("captions", captions)
    with pytest.raises(ValueError, match=r"'photo0'.*1 empty of 2 captions.*--skip-broken"):
        check_captions(rows)
    said: list[str] = []
    kept = check_captions(rows, skip_broken=True, report=said.append)
    assert kept["image_id"][:] == ["photo0", "photo2", "photo3"] and kept["captions"][0] == ["a dog"]
    assert [line.split("'")[1] for line in said] == ["photo0", "photo1", "photo4"]


def test_broken_images_are_named(rows: Dataset) -> None:
    with pytest.raises(ValueError, match=r"Image 'photo3' can't be read.*--skip-broken"):
        open_row(rows[3])
    said: list[str] = []
    kept = drop_broken_images(rows, report=said.append)
    assert kept["image_id"][:] == ["photo0", "photo1", "photo2", "photo4"]
    assert len(said) == 1 and "photo3" in said[0]


def test_collator_brings_an_image_once_with_all_its_captions(rows: Dataset, processor: CaptionerProcessor) -> None:
    batch = CaptionCollator(processor)([rows[0], rows[1]])
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["labels"].shape == (2, 2, 6)
    assert (batch["labels"][1, 1] == -100).all()
    cells = np.arange(5 * 4 * 2, dtype=np.float16).reshape(5, 4, 2)
    collator = CaptionCollator(processor, cells=cells, max_words=3)
    batch = collator([{"index": 4, "captions": ["a man"]}, {"index": 0, "captions": ["the woman in the snow"]}])
    assert torch.equal(batch["cells"], torch.from_numpy(cells[[4, 0]]).float())
    assert batch["labels"].shape == (2, 1, 3)


def test_collator_mirrors_every_other_image(rows: Dataset, processor: CaptionerProcessor) -> None:
    plain = CaptionCollator(processor)([rows[0]])["pixel_values"]
    torch.manual_seed(0)
    mirrored = CaptionCollator(processor, mirror=True)([rows[0]] * 40)["pixel_values"]
    as_it_is, turned = (sum(torch.equal(x, y[0]) for x in mirrored) for y in (plain, plain.flip(-1)))
    assert as_it_is + turned == 40 and 10 < turned < 30
    cells = np.zeros((5, 4, 2), dtype=np.float16)
    collator = CaptionCollator(processor, cells=cells, mirror=True, mirrored_cells=cells + 1)
    batch = collator([{"index": 3, "captions": ["a man"]}] * 40)["cells"]
    assert 10 < batch[:, 0, 0].sum() < 30


@pytest.fixture(scope="module")
def frozen(tiny_model: Callable[..., CaptionerModel]) -> CaptionerModel:
    model = tiny_model()
    model.freeze_encoder()
    return model


def cache(
    model: CaptionerModel, processor: CaptionerProcessor, rows: Dataset, folder: Path, **kwargs: Any
) -> np.ndarray:
    return cached_cells(model.encoder, processor.image_processor, rows, cache_dir=folder, show_progress=False, **kwargs)


def test_cells_are_encoded_once(
    frozen: CaptionerModel, processor: CaptionerProcessor, rows: Dataset, tmp_path: Path
) -> None:
    rows = whole(rows)
    calls: list[int] = []
    handle = frozen.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    first = cache(frozen, processor, rows, tmp_path, batch_size=3)
    encoded, calls[:] = sum(calls), []
    second = cache(frozen, processor, rows, tmp_path)
    handle.remove()
    assert encoded == 5 and not calls  # four images, one of them twice to learn the shape
    with torch.no_grad():
        images = processor(images=[open_row(row) for row in rows])["pixel_values"]
        expected = frozen.encoder(images).last_hidden_state
    assert np.array_equal(first, second)
    assert torch.allclose(torch.from_numpy(np.array(first)).float(), expected, rtol=2e-3, atol=2e-3)
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]


def test_a_stale_cache_is_never_read(
    frozen: CaptionerModel, tiny_model: Callable[..., CaptionerModel], processor: CaptionerProcessor, rows: Dataset
) -> None:
    import copy

    def key(
        model: CaptionerModel = frozen, image_processor: Any = processor.image_processor, kept: Any = (0, 1)
    ) -> str:
        return cells_key(model.encoder, image_processor, rows.select(kept))

    other_transform = copy.deepcopy(processor.image_processor)
    other_transform.crop_pct = 1.0
    nudged = copy.deepcopy(frozen)
    nudged.encoder.part.body.conv1[0].weight.data[0, 0, 0, 0] += 1e-3
    keys = [key(), key(nudged), key(image_processor=other_transform), key(kept=(1, 0)), key(kept=(0, 2))]
    assert len(set(keys)) == len(keys)
    assert key(copy.deepcopy(frozen)) == keys[0]


def test_mirrored_cells_are_those_of_mirrored_images(
    frozen: CaptionerModel, processor: CaptionerProcessor, rows: Dataset, tmp_path: Path
) -> None:
    cells, mirrored = (cache(frozen, processor, rows.select([0]), tmp_path, mirrored=flag) for flag in (False, True))
    with torch.no_grad():
        pixel_values = processor(images=[open_row(rows[0])])["pixel_values"].flip(-1)
        expected = frozen.encoder(pixel_values).last_hidden_state
    assert torch.allclose(torch.from_numpy(np.array(mirrored)).float(), expected, rtol=2e-3, atol=2e-3)
    assert not np.array_equal(cells, mirrored)


def test_a_full_disk_is_refused_before_anything_is_written(
    frozen: CaptionerModel,
    processor: CaptionerProcessor,
    rows: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cells_module, "SPARE_BYTES", 2**60)  # more than any disk has free
    with pytest.raises(OSError, match=r"The cells need 0\.00 GiB in .*--cache-dir"):
        cache(frozen, processor, whole(rows), tmp_path / "cells")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_encoding_leaves_nothing_behind(
    frozen: CaptionerModel, processor: CaptionerProcessor, rows: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="photo3"):
        cache(frozen, processor, rows, tmp_path, batch_size=1)
    assert not list(tmp_path.iterdir())


def test_workers_give_the_batches_of_one_process(rows: Dataset, processor: CaptionerProcessor) -> None:
    rows, collator = whole(rows), CaptionCollator(processor, mirror=True, augment=True)
    passes = []
    for num_workers in (0, 2):
        loader = StepLoader(rows, StepSampler(4, 2, seed=0), collator, num_workers=num_workers)
        passes.append([batch for group in loader.steps(1) for batch in group])
    for mine, theirs in zip(*passes, strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert passes[1][0]["pixel_values"].is_shared()


def test_a_row_that_cannot_be_read_is_named_by_the_collator(rows: Dataset, processor: CaptionerProcessor) -> None:
    for augment in (False, True):
        with pytest.raises(ValueError, match=r"^Image 'photo3' can't be read: .*--skip-broken\.$"):
            CaptionCollator(processor, augment=augment)([rows[0], rows[3]])


def test_augmentation_of_large_jpegs_needs_no_whole_image(processor: CaptionerProcessor) -> None:
    """The photograph is 600 wide and used at 71 / 0.8 at most, so a quarter of it is enough."""
    ramps = np.zeros((600, 600, 3), np.uint8)
    ramps[..., 0] = np.linspace(0, 255, 600)
    row = {"image": {"bytes": jpeg(Image.fromarray(ramps)), "path": None}, "captions": ["a man"], "draw": (0, 0, 0)}
    assert 0.8 * 300 <= _augmented(row, processor.image_processor).width <= 300
    assert CaptionCollator(processor, augment=True)([row])["pixel_values"].shape == (1, 3, 64, 64)


GROWTH = """
import io, resource, sys
import numpy as np, torch
from datasets import Dataset, Image as ImageFeature
from PIL import Image
from hf_captioner import CaptionerImageProcessor
from hf_captioner.data.rows import read_pixels
from hf_captioner.data.loading import StepLoader, StepSampler

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

num_images = int(sys.argv[1])
torch.set_num_threads(1)
file = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(file, "JPEG")
rows = Dataset.from_list([{"image": {"bytes": file.getvalue(), "path": None}, "image_id": str(i)} for i in range(64)])
rows = rows.select(np.arange(num_images) % 64).cast_column("image", ImageFeature(decode=False))
processor = CaptionerImageProcessor(size={"height": 96, "width": 96})
collate = lambda batch: {"pixel_values": read_pixels(batch, processor), "peak": torch.tensor(peak())}
loader = StepLoader(rows, StepSampler(num_images, 16, seed=0), collate, num_workers=1)
print(max(batch["peak"].item() for group in loader.steps(0) for batch in group))
"""


@pytest.mark.slow
def test_memory_of_a_worker_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    script = tmp_path / "growth.py"
    script.write_text(GROWTH)
    few, many = (float(subprocess.check_output([sys.executable, script, str(n)], text=True)) for n in (128, 1280))
    assert many - few < 60  # MiB, where pixel values of what more is read are 121


def test_undecoded_rows_keep_the_bytes_of_the_file() -> None:
    rows = undecoded(load_captions("shapes", "test", num_images=2))
    assert rows[0]["image"]["bytes"].startswith(b"\x89PNG")
