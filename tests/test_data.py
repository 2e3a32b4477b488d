"""Data sets by name and path, checks of their rows, batches, and cached cells."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from datasets import Image as ImageFeature
from layout_writers import write_parquet
from PIL import Image
from test_images import jpeg

from hf_captioner import CaptionerModel, CaptionerProcessor, load_captions
from hf_captioner.data import cells as cells_module
from hf_captioner.data.cells import cached_cells, cells_key
from hf_captioner.data.collator import CaptionCollator, _augment
from hf_captioner.data.datasets import pick_split
from hf_captioner.data.digests import data_digests
from hf_captioner.data.loading import StepLoader, StepSampler
from hf_captioner.data.rows import check_captions, drop_broken_images, open_row, undecoded


@pytest.fixture
def rows_with_a_broken_image(photos: list[Image.Image]) -> Dataset:
    """Five undecoded rows; the fourth image is half a JPEG."""
    files = [jpeg(photo) for photo in photos]
    files[3] = files[3][: len(files[3]) // 2]
    captions = [["a black dog", "the woman in the snow"], ["two small children"]] * 2 + [["a man"]]
    images = [{"bytes": file, "path": None} for file in files]
    rows = Dataset.from_dict({"image": images, "captions": captions, "image_id": [f"photo{i}" for i in range(5)]})
    return rows.cast_column("image", ImageFeature(decode=False))


@pytest.fixture
def rows(rows_with_a_broken_image: Dataset) -> Dataset:
    return rows_with_a_broken_image.select([0, 1, 2, 4])


def test_real_flickr8k(flickr8k):
    splits = load_captions(str(flickr8k))
    assert isinstance(splits, DatasetDict) and set(splits) >= {"train", "validation"}
    assert len(splits["validation"]) == 1000 and len(splits["train"]) == 5999
    row = splits["validation"][0]
    assert len(row["captions"]) == 5 and row["image"].size == (224, 224) and row["image_id"].endswith(".jpg")


def test_named_data_set_takes_arguments_and_streams():
    drawn = load_captions("shapes", "test", num_images=3)
    assert len(drawn) == 3 and undecoded(drawn)[0]["image"]["bytes"].startswith(b"\x89PNG")
    stream = load_captions("shapes", "test", num_images=3, streaming=True)
    assert isinstance(stream, IterableDataset) and [row["image_id"] for row in stream] == drawn["image_id"][:]


def test_split_is_picked_by_any_of_its_names():
    assert pick_split({"train": 1, "validation": 2}, "dev", "x") == 2
    assert pick_split({"dev": 1, "validation": 2}, "dev", "x") == 1


def test_numbered_columns_of_captions_keep_their_order(rows, tmp_path):
    columns = [{f"caption_{i}": f"caption {i} of {n}" for i in range(11)} for n in range(4)]
    write_parquet(tmp_path / "test.parquet", ({"image": row["image"]} | columns[n] for n, row in enumerate(rows)))
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
def test_errors_say_what_can_be_loaded(name, split, error, message, rows, tmp_path):
    for folder, column in (("good", "text"), ("bad", "label")):
        write_parquet(tmp_path / folder / "test.parquet", ({"image": row["image"], column: "a dog"} for row in rows))
    with pytest.raises(error, match=message):
        load_captions(name.replace("FOLDER", str(tmp_path)), split)


def test_empty_captions_are_refused_or_left_out(rows):
    rows = rows.remove_columns("captions").add_column("captions", [["a dog", " ."], ["?"], ["a man"], [""]])
    with pytest.raises(ValueError, match=r"'photo0'.*1 empty of 2 captions.*--skip_broken"):
        check_captions(rows)
    report: list[str] = []
    kept = check_captions(rows, skip_broken=True, report=report.append)
    assert kept["image_id"][:] == ["photo0", "photo2"] and kept["captions"][0] == ["a dog"]
    assert [line.split("'")[1] for line in report] == ["photo0", "photo1", "photo4"]


def test_broken_images_are_named(rows_with_a_broken_image, processor):
    rows, message = rows_with_a_broken_image, r"^Image 'photo3' can't be read: .*--skip_broken\.$"
    with pytest.raises(ValueError, match=message):
        open_row(rows[3])
    for augment in (False, True):
        with pytest.raises(ValueError, match=message):
            CaptionCollator(processor, augment=augment)([rows[0], rows[3]])
    report: list[str] = []
    kept = drop_broken_images(rows, report=report.append)
    assert kept["image_id"][:] == ["photo0", "photo1", "photo2", "photo4"]
    assert len(report) == 1 and "photo3" in report[0]


def test_batch_has_each_image_once_with_all_its_captions(rows, processor):
    padded = CaptionCollator(processor)([rows[0], rows[1]])["labels"]  # as long as transformers' trainers need it
    batch = CaptionCollator(processor, pad_to_longest=True)([rows[0], rows[1]])
    assert (
        padded.shape == (2, 2, 31) and torch.equal(padded[..., :6], batch["labels"]) and (padded[..., 6:] == -100).all()
    )
    assert batch["pixel_values"].shape == (2, 3, 64, 64) and batch["labels"].shape == (2, 2, 6)
    assert (batch["labels"][1, 1] == -100).all()
    cells = np.arange(5 * 4 * 2, dtype=np.float16).reshape(5, 4, 2)
    collator = CaptionCollator(processor, cells=cells, max_words=3, pad_to_longest=True)
    batch = collator([{"index": 4, "captions": ["a man"]}, {"index": 0, "captions": ["the woman in the snow"]}])
    assert torch.equal(batch["cells"], torch.from_numpy(cells[[4, 0]]).float())
    assert batch["labels"].shape == (2, 1, 3)


def test_half_of_the_images_are_mirrored(rows, processor):
    plain = CaptionCollator(processor)([rows[0]])["pixel_values"][0]
    torch.manual_seed(0)
    batch = CaptionCollator(processor, mirror=True)([rows[0]] * 40)["pixel_values"]
    num_plain, num_mirrored = (sum(torch.equal(x, view) for x in batch) for view in (plain, plain.flip(-1)))
    assert num_plain + num_mirrored == 40 and 10 < num_mirrored < 30
    cells = np.zeros((5, 4, 2), dtype=np.float16)
    collator = CaptionCollator(processor, cells=cells, mirror=True, mirrored_cells=cells + 1)
    batch = collator([{"index": 3, "captions": ["a man"]}] * 40)["cells"]
    assert 10 < batch[:, 0, 0].sum() < 30


def test_large_jpegs_are_augmented_at_reduced_size(processor):
    """The photograph is 600 pixels wide and used at 71 / 0.8 pixels at most, so it is decoded at half its width."""
    ramps = np.zeros((600, 600, 3), np.uint8)
    ramps[..., 0] = np.linspace(0, 255, 600)
    image = {"bytes": jpeg(Image.fromarray(ramps)), "path": None}
    row = {"image": image, "captions": ["a man"], "random_seed": (0, 0, 0)}
    assert 0.8 * 300 <= _augment(row, processor.image_processor).width <= 300
    assert CaptionCollator(processor, augment=True)([row])["pixel_values"].shape == (1, 3, 64, 64)


def test_worker_processes_give_the_same_batches(rows, processor):
    collator = CaptionCollator(processor, mirror=True, augment=True)
    epochs = []
    for num_workers in (0, 2):
        loader = StepLoader(rows, StepSampler(4, 2, seed=0), collator, num_workers=num_workers)
        epochs.append([batch for group in loader.steps(1) for batch in group])
    for one, other in zip(*epochs, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert epochs[1][0]["pixel_values"].is_shared()


@pytest.fixture(scope="module")
def frozen(tiny_model: Callable[..., CaptionerModel]) -> CaptionerModel:
    model = tiny_model()
    model.freeze_encoder()
    return model


@pytest.fixture
def cache(frozen: CaptionerModel, processor: CaptionerProcessor, tmp_path: Path) -> Callable[..., np.ndarray]:
    """Return a function that returns cached cells of undecoded rows."""
    return partial(cached_cells, frozen.encoder, processor.image_processor, cache_dir=tmp_path / "cells")


def test_cells_are_encoded_once(frozen, processor, rows, cache, tmp_path):
    batch_sizes: list[int] = []
    handle = frozen.encoder.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(inputs[0])))
    plain = cache(rows, batch_size=3)
    assert sum(batch_sizes) == 5  # four images, one of them twice to learn the shape
    assert np.array_equal(cache(rows), plain) and sum(batch_sizes) == 5
    handle.remove()
    assert [file.suffix for file in (tmp_path / "cells").iterdir()] == [".npy"]
    pixel_values = processor(images=[open_row(row) for row in rows])["pixel_values"]
    for cells, pixels in ((plain, pixel_values), (cache(rows, mirrored=True), pixel_values.flip(-1))):
        with torch.no_grad():
            expected = frozen.encoder(pixels).last_hidden_state
        found = torch.from_numpy(np.array(cells)).float()
        assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3)  # of half precision
    assert not np.array_equal(plain, cells)


def test_cells_from_a_stage_are_those_from_the_image(frozen, processor, rows, cache):
    inputs = cache(rows, stage=3)
    assert inputs.dtype == np.float16 and inputs.shape == (len(rows), 48, 8, 8)
    later = copy.deepcopy(frozen)
    for parameter in later.encoder.part.body.layer4.parameters():
        parameter.data.mul_(1.5)
    keys = [cells_key(model.encoder, processor.image_processor, rows, 3) for model in (frozen, later)]
    assert keys[0] == keys[1]  # trained stages play no role
    assert cells_key(frozen.encoder, processor.image_processor, rows, 2) != keys[0]
    from_stage = cached_cells(
        later.encoder, processor.image_processor, rows, cache_dir=cache.keywords["cache_dir"], through_stage=3
    )
    whole = cached_cells(later.encoder, processor.image_processor, rows, cache_dir=cache.keywords["cache_dir"])
    np.testing.assert_allclose(from_stage, whole, rtol=5e-3, atol=5e-3)  # of half precision, twice
    assert not np.allclose(whole, cache(rows), rtol=5e-2, atol=5e-3)


def zeroed(data: bytes, start: int, end: int | None = None) -> bytes:
    end = len(data) if end is None else end
    return data[:start] + bytes(end - start) + data[end:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-100], "mmap length"),
        (lambda data: data[:-2], "another size"),
        (lambda data: b"", "No data left"),
        (lambda data: zeroed(data, 0), "can't read|magic|pickled"),
        (lambda data: zeroed(data, 1000, 1100), "the cells of 1 images have changed"),
        (lambda data: zeroed(data, len(data) - 4), "the cells of 1 images have changed"),
        (lambda data: data[:-16], "no checksums"),  # as version 0.1.0 wrote it
    ],
)
def test_damaged_cells_are_told_and_encoded_again(rows, cache, tmp_path, caplog, damage, reason):
    plain = np.array(cache(rows))
    (file,) = (tmp_path / "cells").iterdir()
    data = file.read_bytes()
    file.write_bytes(damage(data))
    (tmp_path / "cells" / "abc.12345.partial").write_bytes(b"of a run that was killed")
    assert np.array_equal(cache(rows), plain) and file.read_bytes() == data
    (line,) = caplog.messages
    assert re.search(rf"The cached cells '.*' are not used: .*({reason}).* encoded again\.", line)
    assert list((tmp_path / "cells").iterdir()) == [file]


def test_key_of_cells_depends_on_weights_transform_and_images(frozen, processor, rows):
    def key(model: CaptionerModel = frozen, images: Any = processor.image_processor, kept: Any = (0, 1)) -> str:
        return cells_key(model.encoder, images, rows.select(kept))

    other_transform = copy.deepcopy(processor.image_processor)
    other_transform.crop_pct = 1.0
    other_weights = copy.deepcopy(frozen)
    other_weights.encoder.part.body.conv1[0].weight.data[0, 0, 0, 0] += 1e-3
    keys = [key(), key(other_weights), key(images=other_transform), key(kept=(1, 0)), key(kept=(0, 2))]
    assert len(set(keys)) == len(keys)
    assert key(copy.deepcopy(frozen)) == keys[0]


def test_the_sign_of_a_zero_changes_no_key_of_cells(frozen, processor, rows):
    """A running average of the weights makes 0.0 of -0.0, and the images would be encoded anew."""
    keys = []
    for zero in (0.0, -0.0):
        model = copy.deepcopy(frozen)
        model.encoder.part.body.conv1[0].weight.data[0, 0, 0, 0] = zero
        keys.append(cells_key(model.encoder, processor.image_processor, rows))
    assert keys[0] == keys[1]


def test_digests_tell_images_captions_and_ids_apart(rows, tmp_path):
    def changed(column: str, values: list) -> set[str]:
        other = rows.remove_columns(column).add_column(column, values, feature=rows.features[column])
        return {name for name, digest in data_digests(other).items() if digest != digests[name]}

    digests = data_digests(rows)
    files = [row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in rows]
    paths = [tmp_path / f"{n}" for n in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    as_paths = [{"bytes": None, "path": str(path)} for path in paths]
    assert changed("image", as_paths) == set()  # only the content counts
    assert changed("image", as_paths[::-1]) == {"images"}
    assert changed("captions", rows["captions"][:][::-1]) == {"captions"}
    assert changed("image_id", rows["image_id"][:][::-1]) == {"image ids"}
    with pytest.raises(ValueError, match="can't be read"):
        changed("image", [{"bytes": None, "path": str(tmp_path / "nowhere.png")}] * len(rows))


def test_full_disk_is_refused_before_anything_is_written(rows, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cells_module, "SPARE_BYTES", 2**60)  # more than any disk has free
    with pytest.raises(OSError, match=r"The cells need 0\.00 GiB in .*--cache_dir"):
        cache(rows)
    assert not list((tmp_path / "cells").iterdir())


def test_interrupted_encoding_leaves_no_file(rows_with_a_broken_image, cache, tmp_path):
    with pytest.raises(ValueError, match="photo3"):
        cache(rows_with_a_broken_image, batch_size=1)
    assert not list((tmp_path / "cells").iterdir())


PEAK_MEMORY_OF_A_WORKER = """
import resource, sys
import numpy as np, torch
from hf_captioner import CaptionerImageProcessor, load_captions
from hf_captioner.data.loading import StepLoader, StepSampler
from hf_captioner.data.rows import read_pixels, undecoded

def collate(batch):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
    return {"pixel_values": read_pixels(batch, processor), "peak": torch.tensor(peak)}

num_images = int(sys.argv[1])
torch.set_num_threads(1)
rows = undecoded(load_captions("shapes", "train", num_images=64)).select(np.arange(num_images) % 64)
processor = CaptionerImageProcessor(size={"height": 96, "width": 96})
loader = StepLoader(rows, StepSampler(num_images, 16, seed=0), collate, num_workers=1)
print(max(batch["peak"].item() for group in loader.steps(0) for batch in group))
"""


@pytest.mark.slow
def test_memory_of_a_worker_does_not_grow_with_the_data_set():
    script = [sys.executable, "-c", PEAK_MEMORY_OF_A_WORKER]
    few, many = (float(subprocess.check_output([*script, str(n)], text=True)) for n in (128, 1280))
    assert many - few < 60  # MiB; the pixel values of the additional images take 121 MiB
