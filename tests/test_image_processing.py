"""The image processor: equal to timm's evaluation transform, for images of any kind."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_images import RED, jpeg, ramp
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor

from hf_captioner.model import image_processing_captioner
from hf_captioner.model.image_processing_captioner import CaptionerImageProcessor
from hf_captioner.model.images import REDUCTION_GAP, open_image
from hf_captioner.model.pixels import AT_ONCE, PIXELS_AT_ONCE

LEVELS = {"image_mean": [0] * 3, "image_std": [1 / 255] * 3}  # with which pixel values are levels of 255


def data_config(name: str = "resnet101", **changes: object) -> dict[str, object]:
    return {**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()), **changes}


DATA_CONFIGS = {
    "resnet101": data_config(),
    "vit": data_config("vit_base_patch16_224"),
    "swin": data_config("swin_tiny_patch4_window7_224"),
    "convnext squash": data_config("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384"),
    "sapiens squash 1024x768": data_config(
        input_size=(3, 102, 76), interpolation="bilinear", crop_pct=1.0, crop_mode="squash"
    ),
    "border cut": data_config(crop_mode="border", input_size=(3, 64, 80), crop_pct=0.8),
}


def assert_same_but_for_roundings(values: torch.Tensor, expected: torch.Tensor, config: dict[str, object]) -> None:
    """Check that pixel values are equal, but for a few levels of 255 with filters that do not resize whole images."""
    is_cut = config["crop_mode"] == "center" or config["crop_pct"] < 1
    forgiven = ("bilinear", "bicubic", "hamming") if is_cut else ("bilinear", "bicubic")
    most, mean = (6, 0.3) if config["interpolation"] in forgiven else (0, 0)
    level = 1 / (255 * min(config["std"]))
    torch.testing.assert_close(values, expected, rtol=0, atol=most * level + 1e-6)
    assert (values - expected).abs().mean() < mean * level + 1e-6


@pytest.mark.parametrize("config", DATA_CONFIGS.values(), ids=DATA_CONFIGS)
def test_equals_the_evaluation_transform_of_timm(config):
    images = [ramp(75, 100), ramp(131, 83, seed=1), ramp(40, 40, seed=2)]
    pixel_values = CaptionerImageProcessor.from_data_config(config)(images).pixel_values
    expected = torch.stack([*map(create_transform(**config, is_training=False), images)])
    assert pixel_values.dtype == torch.float32 and pixel_values.shape == (3, *config["input_size"])
    assert_same_but_for_roundings(pixel_values, expected, config)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_resizing_only_what_the_crop_keeps_makes_no_difference(interpolation):
    rng = np.random.default_rng(0)
    for case in range(20):
        width, height = rng.integers(40, 400, 2).tolist()
        config = data_config(
            input_size=(3, 224, 224) if case % 2 else (3, *rng.integers(30, 120, 2).tolist()),
            crop_pct=[0.875, 1.0, 0.9, 0.77, 1.3][case % 5],
            crop_mode=["center", "squash", "border"][case % 3],
            interpolation=interpolation,
        )
        image = ramp(height, width, seed=case)
        values = CaptionerImageProcessor.from_data_config(config)(image).pixel_values[0]
        assert_same_but_for_roundings(values, create_transform(**config)(image), config)


def test_a_batch_is_its_images_one_by_one():
    """Check it with more images than are opened at once, some of them so large that fewer are."""
    processor = CaptionerImageProcessor(size={"height": 32, "width": 48})
    images = [ramp(30 + seed, 90 - seed, seed) for seed in range(2 * AT_ONCE)]
    images[3:6] = [ramp(PIXELS_AT_ONCE // 1024, 1100, seed) for seed in range(3)]
    pixel_values = processor(images).pixel_values
    assert torch.equal(pixel_values, torch.cat([processor(image).pixel_values for image in images]))
    assert len(torch.unique(pixel_values, dim=0)) == len(images)


def test_only_the_visible_part_of_a_panorama_is_resized(monkeypatch):
    """Check it with a panorama whose whole would need 5 GB when resized."""
    monkeypatch.setattr(image_processing_captioner, "interpolate", None)
    processor = CaptionerImageProcessor(crop_pct=1.0, **LEVELS)
    colours = np.zeros((3, 100_000, 3), np.uint8)
    colours[:, 49_995:50_005] = RED
    values = processor(Image.fromarray(colours)).pixel_values[0]
    assert (values.round() == torch.tensor(RED)[:, None, None]).all()


@pytest.fixture(scope="module")
def camera() -> Image.Image:
    """Return an image with detail at all scales, of half the strength at each finer scale, as in photographs."""
    rng = np.random.default_rng(0)
    total = np.zeros((825, 1100, 3))
    for octave in range(2, 11):
        noise = rng.uniform(-1, 1, (3, 2**octave * 3 // 4, 2**octave)) * 2.0**-octave
        bands = [Image.fromarray(band).resize((1100, 825), Image.Resampling.BICUBIC) for band in noise]
        total += np.stack(bands, -1)
    return Image.fromarray((128 + 200 * total).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_decoding_a_large_jpeg_at_reduced_size_changes_little(camera, crop_mode, orientation):
    processor = CaptionerImageProcessor(size={"height": 160, "width": 96}, crop_mode=crop_mode, **LEVELS)
    data = jpeg(camera, orientation)
    whole, reduced = open_image(data), open_image(data, used_size=processor.resized_size)
    assert whole.size == ((825, 1100) if orientation == 6 else (1100, 825))
    width, height = processor.resized_size(*whole.size)
    assert whole.width > reduced.width >= REDUCTION_GAP * width
    assert whole.height > reduced.height >= REDUCTION_GAP * height
    expected = processor(whole).pixel_values
    difference = (processor(data).pixel_values - expected).abs()  # in levels of 255
    assert 0 < difference.mean() < 1 and difference.max() < 12 and expected.std() > 20


def test_a_jpeg_of_odd_size_is_not_shifted_by_decoding_it_at_reduced_size():
    """Check it, because attention maps are drawn in a box that is computed from the full size."""
    processor = CaptionerImageProcessor(size={"height": 64, "width": 64}, **LEVELS)
    for width, height in [(1001, 333), (517, 1033), (301, 307)]:
        ramps = np.zeros((height, width, 3), np.uint8)
        ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
        data = jpeg(Image.fromarray(ramps))
        assert open_image(data, used_size=processor.resized_size).width < width
        assert (processor(data).pixel_values - processor(open_image(data)).pixel_values).abs().mean() < 1


def test_other_formats_and_small_jpegs_are_decoded_whole(camera):
    processor = CaptionerImageProcessor(size={"height": 64, "width": 64})
    file = io.BytesIO()
    camera.save(file, "PNG")
    for data in (file.getvalue(), jpeg(camera.resize((140, 140)))):
        whole = open_image(data)
        assert open_image(data, used_size=processor.resized_size).size == whole.size
        assert torch.equal(processor(data).pixel_values, processor(whole).pixel_values)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.98])
def test_the_error_for_a_truncated_large_jpeg_names_the_file(camera, tmp_path, fraction):
    path = tmp_path / "half.jpg"
    data = jpeg(camera)
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=r"half\.jpg is not a readable image: \S") as error:
        CaptionerImageProcessor(size={"height": 64, "width": 64})(path)
    assert "\n" not in str(error.value)


def test_inputs_and_outputs(tmp_path):
    path = tmp_path / "photo.png"
    ramp().save(path)
    processor = CaptionerImageProcessor.from_data_config(data_config(input_size=(3, 24, 32)))
    batch = processor([path, str(path), path.read_bytes(), ramp(), np.asarray(ramp())])
    assert set(batch) == {"pixel_values"} and batch.pixel_values.shape == (5, 3, 24, 32)
    assert all(torch.equal(values, batch.pixel_values[0]) for values in batch.pixel_values)
    one = processor.preprocess(path, return_tensors="np").pixel_values
    assert isinstance(one, np.ndarray) and np.array_equal(one, batch.pixel_values[:1].numpy())
    with pytest.raises(ValueError, match="images is empty"):
        processor([])
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        processor([path, tmp_path / "none.png"])


def test_round_trip(tmp_path):
    processor = CaptionerImageProcessor.from_data_config(DATA_CONFIGS["border cut"])
    before = processor(ramp()).pixel_values  # caches the transform, which must not be saved
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    fields = {"size", "interpolation", "crop_pct", "crop_mode", "image_mean", "image_std"}
    assert saved.keys() == {*fields, "image_processor_type"}
    autos = [AutoImageProcessor.from_pretrained(tmp_path, backend=backend) for backend in (None, "pil", "torchvision")]
    for loaded in (CaptionerImageProcessor.from_pretrained(tmp_path), *autos):
        assert type(loaded) is CaptionerImageProcessor and loaded.to_dict() == processor.to_dict()
        assert torch.equal(loaded(ramp()).pixel_values, before)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(ramp()).pixel_values, before)
    loaded.crop_pct = 0.5
    assert not torch.equal(loaded(ramp()).pixel_values, before)

    other = CaptionerImageProcessor.from_pretrained(tmp_path, crop_mode="squash", size={"height": 8, "width": 9})
    assert other.crop_mode == "squash" and other(ramp()).pixel_values.shape == (1, 3, 8, 9)
    with pytest.raises(ValueError, match="crop_mode is 'centre'"):
        CaptionerImageProcessor.from_pretrained(tmp_path, crop_mode="centre")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_mode": "centre"}, "crop_mode is 'centre'; choose from center, squash, border"),
        ({"interpolation": "random"}, "interpolation is 'random'; choose from"),
        ({"crop_pct": 0}, "crop_pct is 0; it must be from"),
        ({"size": {"shortest_edge": 224}}, 'give {"height": H, "width": W}'),
        ({"size": {"height": 0, "width": 8}}, "size is"),
        ({"image_mean": [0.5]}, "give three numbers each"),
        ({"image_std": [0.5, 0, 0.5]}, "deviations above 0"),
    ],
)
def test_field_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        CaptionerImageProcessor(**arguments)


def test_data_config_errors():
    config = data_config()
    with pytest.raises(ValueError, match="takes 1 channels"):
        CaptionerImageProcessor.from_data_config({**config, "input_size": (1, 28, 28)})
    del config["crop_mode"], config["mean"]
    with pytest.raises(ValueError, match="data_config has no crop_mode, mean; give it as"):
        CaptionerImageProcessor.from_data_config(config)


@pytest.mark.parametrize(("width", "height"), [(200, 150), (120, 250), (100, 100), (97, 61), (41, 29)])
@pytest.mark.parametrize("size", [(64, 64), (96, 40)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.6])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_visible_box_is_where_each_pixel_value_comes_from(crop_mode, crop_pct, size, width, height):
    fields = {"interpolation": "bilinear", "crop_pct": crop_pct, "crop_mode": crop_mode}
    processor = CaptionerImageProcessor(size={"height": size[0], "width": size[1]}, **fields, **LEVELS)
    # Red encodes the column of a pixel and green its row, in steps as large as 8 bits allow.
    step_x, step_y = 255 // width, 255 // height
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width) * step_x
    image[..., 1] = np.arange(height)[:, None] * step_y
    red, green, _ = processor(image).pixel_values[0].numpy()

    left, top, right, bottom = processor.visible_box(width, height)
    scale_x, scale_y = (right - left) / size[1], (bottom - top) / size[0]
    column = left + (np.arange(size[1]) + 0.5) * scale_x - 0.5
    row = top + (np.arange(size[0]) + 0.5) * scale_y - 0.5
    # Pixels at the borders of the image and in the padding do not follow the ramp.
    columns = (column > scale_x + 1) & (column < width - scale_x - 2)
    rows = (row > scale_y + 1) & (row < height - scale_y - 2)
    assert columns.sum() > 5 and rows.sum() > 5
    inner = np.ix_(rows, columns)
    assert np.abs(red[inner] / step_x - column[columns]).max() < 1.2 / step_x
    assert np.abs(green[inner] / step_y - row[rows, None]).max() < 1.2 / step_y


@pytest.mark.parametrize(
    ("crop_mode", "expected"),
    [
        ("center", (50, 0, 150, 100)),  # the middle square
        ("squash", (0, 0, 200, 100)),  # all of it
        ("border", (0, -50, 200, 150)),  # all of it between two stripes
    ],
)
def test_visible_box_of_a_wide_image(crop_mode, expected):
    size = {"height": 40, "width": 40}
    processor = CaptionerImageProcessor(size=size, crop_pct=1.0, crop_mode=crop_mode, interpolation="lanczos")
    assert processor.visible_box(200, 100) == expected
    left, top, right, bottom = expected
    x, y = (right - left) / 2, (bottom - top) / 2
    lower_right = (20, 20, 60, 60)  # of the 40 x 40 pixels and their continuation
    assert processor.visible_box(200, 100, lower_right) == (left + x, top + y, right + x, bottom + y)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 70_000)])
def test_a_long_strip_needs_little_memory(interpolation, crop_mode, size, monkeypatch):
    """Check it by the sizes that Pillow and torch are asked for, in pixels."""
    resize, asked = Image.Image.resize, []

    def recorded(image, new_size, *args, **kwargs):
        asked.append(new_size[0] * max(new_size[1], image.height if len(args) < 2 else 1))
        return resize(image, new_size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    processor = CaptionerImageProcessor(interpolation=interpolation, crop_mode=crop_mode, crop_pct=1.0, **LEVELS)
    values = processor(Image.new("RGB", size, RED)).pixel_values
    assert values.shape == (1, 3, 224, 224) and max(asked, default=0) <= 2**24
    assert (values[0, :, 112, 112].round() == torch.tensor(RED)).all() or crop_mode == "border"


def test_a_large_image_is_resized_in_parts_to_the_same_pixels(monkeypatch):
    image, processor = ramp(700, 500), CaptionerImageProcessor(**LEVELS)
    expected = processor(image).pixel_values
    monkeypatch.setattr(image_processing_captioner, "PIXELS_AT_ONCE", 500 * 33)
    assert torch.equal(processor(image).pixel_values, expected)


def test_a_generator_of_images():
    processor, images = CaptionerImageProcessor(), [ramp(30, 40), ramp(40, 30)]
    assert torch.equal(processor(image for image in images).pixel_values, processor(images).pixel_values)
