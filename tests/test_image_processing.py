from __future__ import annotations

import io
import json
import pickle
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFile
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor, PreTrainedConfig

from hf_captioner.image_processing_captioner import CaptionerImageProcessor
from hf_captioner.images import REDUCTION_GAP, open_image

RED, GREEN, BLUE, WHITE = (220, 30, 20), (20, 200, 40), (30, 40, 210), (255, 255, 255)
HEIGHT, WIDTH = 32, 48


def quadrants() -> np.ndarray:
    """(32, 48, 3): red, green over blue, white."""
    array = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    top, left = slice(HEIGHT // 2), slice(WIDTH // 2)
    array[:], array[top], array[:, left], array[top, left] = WHITE, GREEN, BLUE, RED
    return array


def grey(dtype: type = np.uint8) -> np.ndarray:
    """(32, 48) ramp from 0 to the largest number of the type."""
    return np.linspace(0, np.iinfo(dtype).max, HEIGHT * WIDTH).astype(dtype).reshape(HEIGHT, WIDTH)


def ramp(height: int = 75, width: int = 100, seed: int = 0) -> Image.Image:
    """Smooth gradients with noise, so that interpolations differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    array = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], -1)
    return Image.fromarray((array + rng.integers(0, 60, array.shape)).clip(0, 255).astype(np.uint8))


def half_transparent(mode: str) -> Image.Image:
    """Red (or its grey), with a transparent right half."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), (*RED, 255))
    image.paste((0, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return image.convert(mode)


def with_colour_key() -> Image.Image:
    """RGB whose blue is declared transparent."""
    image = Image.fromarray(quadrants())
    image.info["transparency"] = BLUE
    return image


def assert_close(image: Image.Image, expected: np.ndarray, tolerance: float) -> None:
    """Mean absolute difference, which ignores the ringing of lossy formats along edges."""
    assert image.mode == "RGB"
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image, float) - expected).mean() <= tolerance


# What the stored picture is, so that the orientation makes it upright (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation(tmp_path, orientation, suffix):
    path = tmp_path / f"photo.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](quadrants()))
    Image.fromarray(stored).save(path, exif=exif, quality=95)
    assert_close(open_image(path), quadrants(), tolerance=4)


def rgb(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1)


def on_white(colour: tuple[int, int, int] | int) -> np.ndarray:
    expected = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    expected[:, : WIDTH // 2] = colour
    return expected


def keyed() -> np.ndarray:
    expected = quadrants()
    expected[HEIGHT // 2 :, : WIDTH // 2] = WHITE
    return expected


RED_AS_GREY = np.asarray(Image.new("RGB", (1, 1), RED).convert("L")).item()
FILES = {
    "plain.png": (lambda: Image.fromarray(quadrants()), quadrants(), 0),
    "plain.bmp": (lambda: Image.fromarray(quadrants()), quadrants(), 0),
    "cmyk.jpg": (lambda: Image.fromarray(quadrants()).convert("CMYK"), quadrants(), 4),
    "cmyk.tif": (lambda: Image.fromarray(quadrants()).convert("CMYK"), quadrants(), 2),
    "grey.jpg": (lambda: Image.fromarray(grey()), rgb(grey()), 3),
    "grey_alpha.png": (lambda: half_transparent("LA"), on_white(RED_AS_GREY), 1),
    "alpha.png": (lambda: half_transparent("RGBA"), on_white(RED), 0),
    "alpha.webp": (lambda: half_transparent("RGBA"), on_white(RED), 3),
    "colour_key.png": (with_colour_key, keyed(), 0),
    "palette.png": (lambda: Image.fromarray(quadrants()).quantize(8), quadrants(), 1),
    "palette_alpha.png": (lambda: half_transparent("RGBA").quantize(8), on_white(RED), 1),
    "palette_alpha.gif": (lambda: half_transparent("RGBA"), on_white(RED), 1),
    "one_bit.png": (
        lambda: Image.fromarray(grey() > 99),
        rgb((grey() > 99) * np.uint8(255)),
        0,
    ),
    "16_bit.png": (lambda: Image.fromarray(grey(np.uint16)), rgb(grey(np.uint16) / 257), 0.5),
    "16_bit.tif": (lambda: Image.fromarray(grey(np.uint16)), rgb(grey(np.uint16) / 257), 0.5),
    "16_bit_big_endian.tif": (
        lambda: Image.fromarray(grey(np.uint16).astype(">u2")),
        rgb(grey(np.uint16) / 257),
        0.5,
    ),
    "16_bit.pgm": (lambda: Image.fromarray(grey(np.uint16)), rgb(grey(np.uint16) / 257), 0.5),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_files(tmp_path, name):
    make, expected, tolerance = FILES[name]
    make().save(tmp_path / name)
    assert_close(open_image(tmp_path / name), expected, tolerance)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"animation.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    assert_close(open_image(path), np.full((HEIGHT, WIDTH, 3), RED), tolerance=4)


ARRAYS = {
    "grey": (grey(), rgb(grey())),
    "rgb": (quadrants(), quadrants()),
    "rgba": (np.asarray(half_transparent("RGBA")), on_white(RED)),
    "grey 16 bits": (grey(np.uint16), rgb(grey(np.uint16) / 257)),
    "grey 16 bits big-endian": (grey(np.uint16).astype(">u2"), rgb(grey(np.uint16) / 257)),
    "rgb 16 bits": (quadrants().astype(np.uint16) * 257, quadrants()),
    "not contiguous": (quadrants()[:, ::-1], quadrants()[:, ::-1]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    array, expected = ARRAYS[name]
    assert_close(open_image(array), expected, tolerance=0.5)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        moved, found = self.path == "/moved", self.path == "/photo.png"
        self.send_response(302 if moved else 200 if found else 404)
        self.send_header("Location", "/photo.png")
        self.end_headers()
        if found:
            half_transparent("RGBA").save(self.wfile, "PNG")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["photo.png", "moved"])
def test_url(url, path):
    assert_close(open_image(f"{url}/{path}"), on_white(RED), tolerance=0)


def test_url_errors(url):
    with pytest.raises(ConnectionError, match=r"127.0.0.1:\d+/none.png cannot be downloaded: .*404"):
        open_image(f"{url}/none.png")
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1/a.png cannot be downloaded"):
        open_image("http://127.0.0.1:1/a.png")


@pytest.mark.parametrize("convert", [str, Path, Path.read_bytes, Image.open])
def test_sources(tmp_path, convert):
    path = tmp_path / "photo.png"
    Image.fromarray(quadrants()).save(path)
    assert_close(open_image(convert(path)), quadrants(), tolerance=0)


def test_a_given_pil_image_is_left_alone(tmp_path):
    path = tmp_path / "photo.png"
    half_transparent("RGBA").save(path)
    given = Image.open(path)
    opened = open_image(given)
    opened.paste(BLUE, (0, 0, WIDTH, HEIGHT))
    assert given.mode == "RGBA"
    assert np.array_equal(np.asarray(given), np.asarray(half_transparent("RGBA")))

    given = Image.fromarray(quadrants())
    open_image(given).paste(BLUE, (0, 0, WIDTH, HEIGHT))
    assert np.array_equal(np.asarray(given), quadrants())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist\.$"):
        open_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    ramp().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} is not a readable image: \S"):
        open_image(path)
    with pytest.raises(ValueError, match=r"^The given bytes object is not a readable image: \S"):
        open_image(path.read_bytes())


@pytest.mark.parametrize("content", [b"", b"a dog runs", b"\xff\xd8\xff\xe0 not a JPEG"])
def test_other_files_named_as_images(tmp_path, content):
    path = tmp_path / "text.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.jpg is not a readable image: .*") as error:
        open_image(path)
    assert "\n" not in str(error.value)


def test_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is not a readable image: .*directory"):
        open_image(tmp_path)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(ValueError, match=r"bomb\.png has more pixels than is safe to open: .*60000 pixels"):
        open_image(path)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file of so many pixels, which says all about its size."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()[:16] + width.to_bytes(4) + height.to_bytes(4) + file.getvalue()[24:]


def jpeg_header(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


@pytest.mark.parametrize("make", [png_header, jpeg_header])
def test_bombs_are_refused_by_what_their_header_says(tmp_path, monkeypatch, make):
    path = tmp_path / "bomb.jpg"
    content = make(60_000, 50_000)
    path.write_bytes(content if make is jpeg_header else with_checksum(content))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for read in (open_image, CaptionerImageProcessor()):
        with pytest.raises(ValueError, match=r"bomb\.jpg has more pixels than is safe to open: .*3000000000 pix") as e:
            read(path)
        assert "\n" not in str(e.value)


def with_checksum(png: bytes) -> bytes:
    return png[:29] + zlib.crc32(png[12:29]).to_bytes(4) + png[33:]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Image.new("F", (4, 4), 0.5), ValueError, "PIL image is not a readable image: .* floating-point"),
        (Image.new("I", (4, 4), 70000), ValueError, "go from 70000 to 70000, beyond 16 bits"),
        (Image.new("I", (4, 4), -1), ValueError, "beyond 16 bits"),
        (np.zeros((4, 4, 3)), ValueError, r"shape \(4, 4, 3\) and dtype float64; .* uint8 or uint16"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"shape \(3, 8, 8\)"),
        (np.zeros((0, 4), np.uint8), ValueError, r"shape \(0, 4\)"),
        (np.zeros((4, 4), np.uint32), ValueError, "dtype uint32"),
        (torch.zeros(3, 4, 4), TypeError, "cannot be read from Tensor; give a path"),
        (None, TypeError, "cannot be read from NoneType"),
    ],
    ids=lambda value: None,
)
def test_unusable_sources(source, error, message):
    with pytest.raises(error, match=message):
        open_image(source)


def data_config(name: str = "resnet101", **changes: object) -> dict[str, object]:
    return {**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()), **changes}


DATA_CONFIGS = {
    "resnet101": data_config(),
    "vit": data_config("vit_base_patch16_224"),
    "swin": data_config("swin_tiny_patch4_window7_224"),
    "convnext squash": data_config("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384"),
    "sapiens squash 1024x768": data_config("vit_base_patch16_sapiens2.fb", input_size=(3, 102, 76)),
    "mobilenetv2 squash": data_config("mobilenetv2_100", crop_mode="squash", crop_pct=1.0),
    "border": data_config(crop_mode="border", input_size=(3, 96, 96), crop_pct=1.0),
    "border cut": data_config(crop_mode="border", input_size=(3, 64, 80), crop_pct=0.8),
    "center 48x96": data_config(input_size=(3, 48, 96)),
    "center odd": data_config(input_size=(3, 61, 61), crop_pct=0.77),
} | {
    interpolation: data_config(input_size=(3, 56, 56), interpolation=interpolation)
    for interpolation in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}


def assert_same_but_for_roundings(values: torch.Tensor, expected: torch.Tensor, config: dict[str, object]) -> None:
    """Equal; where something is cut off an image resized by the usual filters but for levels of 255 here and there."""
    is_cut = config["crop_mode"] == "center" or config["crop_pct"] < 1
    most, mean = (6, 0.3) if is_cut and config["interpolation"] in ("bilinear", "hamming", "bicubic") else (0, 0)
    level = 1 / (255 * min(config["std"]))
    torch.testing.assert_close(values, expected, rtol=0, atol=most * level + 1e-6)
    assert (values - expected).abs().mean() < mean * level + 1e-6


@pytest.mark.parametrize("name", DATA_CONFIGS)
def test_equals_the_evaluation_transform_of_timm(name):
    config = DATA_CONFIGS[name]
    images = [ramp(75, 100), ramp(131, 83, seed=1), ramp(40, 40, seed=2)]
    pixel_values = CaptionerImageProcessor.from_data_config(config)(images).pixel_values
    transform = create_transform(**config, is_training=False)
    expected = torch.stack([transform(image) for image in images])
    assert pixel_values.dtype == torch.float32
    assert pixel_values.shape == (3, *config["input_size"])
    assert_same_but_for_roundings(pixel_values, expected, config)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_what_a_crop_takes_away_makes_no_difference(interpolation):
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


def detailed(width: int, height: int) -> Image.Image:
    """Detail of all sizes, each half as strong as what is twice as large, as photographs have it."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for octave in range(2, 11):
        noise = rng.uniform(-1, 1, (2**octave * 3 // 4, 2**octave, 3)) * 2.0**-octave
        bands = [
            Image.fromarray(noise[..., band]).resize((width, height), Image.Resampling.BICUBIC) for band in range(3)
        ]
        total += np.stack(bands, -1)
    return Image.fromarray((128 + 200 * total).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def camera() -> Image.Image:
    return detailed(1100, 825)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_large_jpegs_decoded_at_reduced_size_come_out_alike(camera, crop_mode, orientation):
    processor = CaptionerImageProcessor(
        size={"height": 160, "width": 96}, crop_mode=crop_mode, image_mean=[0] * 3, image_std=[1 / 255] * 3
    )
    data = jpeg(camera, orientation)
    whole = open_image(data)
    assert whole.size == ((825, 1100) if orientation == 6 else (1100, 825))
    reduced = open_image(data, used_size=processor.resized_size)
    used = processor.resized_size(*whole.size)
    assert whole.width > reduced.width >= REDUCTION_GAP * used[0]
    assert whole.height > reduced.height >= REDUCTION_GAP * used[1]
    expected = processor(whole).pixel_values
    difference = (processor(data).pixel_values - expected).abs()  # in levels of 255
    assert 0 < difference.mean() < 1
    assert difference.max() < 12
    assert expected.std() > 20


def test_the_shape_of_a_reduced_jpeg_is_that_of_the_whole_one():
    """Odd sizes are rounded when they are halved; the box that attention maps are drawn in knows the whole size only."""
    processor = CaptionerImageProcessor(size={"height": 64, "width": 64}, image_mean=[0] * 3, image_std=[1 / 255] * 3)
    for width, height in [(1001, 333), (517, 1033), (301, 307)]:
        ramps = np.zeros((height, width, 3), np.uint8)
        ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
        data = jpeg(Image.fromarray(ramps))
        assert open_image(data, used_size=processor.resized_size).width < width
        difference = (processor(data).pixel_values - processor(open_image(data)).pixel_values).abs()
        assert difference.mean() < 1


def test_other_formats_and_small_jpegs_are_decoded_whole(camera):
    processor = CaptionerImageProcessor(size={"height": 64, "width": 64})
    file = io.BytesIO()
    camera.save(file, "PNG")
    for data in (file.getvalue(), jpeg(camera.resize((140, 140)))):
        whole = open_image(data)
        assert open_image(data, used_size=processor.resized_size).size == whole.size
        assert torch.equal(processor(data).pixel_values, processor(whole).pixel_values)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_half_a_large_jpeg_is_refused_by_name(camera, tmp_path, share):
    path = tmp_path / "half.jpg"
    data = jpeg(camera)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"half\.jpg is not a readable image: \S") as error:
        CaptionerImageProcessor(size={"height": 64, "width": 64})(path)
    assert "\n" not in str(error.value)


def test_takes_the_data_config_of_a_model():
    model = timm.create_model("test_vit", num_classes=0)
    config = timm.data.resolve_model_data_config(model)
    processor = CaptionerImageProcessor.from_data_config(config)
    pixel_values = processor(ramp()).pixel_values
    expected = create_transform(**config)(ramp())[None]
    assert_same_but_for_roundings(pixel_values, expected, config)
    assert model.forward_features(pixel_values).shape[0] == 1


def test_inputs_and_outputs(tmp_path):
    path = tmp_path / "photo.png"
    ramp().save(path)
    processor = CaptionerImageProcessor.from_data_config(data_config(input_size=(3, 24, 32)))
    batch = processor([path, str(path), path.read_bytes(), ramp(), np.asarray(ramp())])
    assert set(batch) == {"pixel_values"}
    assert batch.pixel_values.shape == (5, 3, 24, 32)
    assert all(torch.equal(values, batch.pixel_values[0]) for values in batch.pixel_values)
    one = processor.preprocess(path, return_tensors="np").pixel_values
    assert isinstance(one, np.ndarray)
    assert np.array_equal(one, batch.pixel_values[:1].numpy())
    with pytest.raises(ValueError, match="images is empty"):
        processor([])
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        processor([path, tmp_path / "none.png"])


def test_round_trip(tmp_path):
    processor = CaptionerImageProcessor.from_data_config(DATA_CONFIGS["border cut"])
    before = processor(ramp()).pixel_values  # builds the transform, which must not be saved
    processor.save_pretrained(tmp_path)
    loaded = CaptionerImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(loaded(ramp()).pixel_values, before)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(ramp()).pixel_values, before)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    fields = {"size", "interpolation", "crop_pct", "crop_mode", "image_mean", "image_std"}
    assert saved.keys() == {*fields, "image_processor_type"}


def test_overrides_on_loading(tmp_path):
    CaptionerImageProcessor().save_pretrained(tmp_path)
    loaded = CaptionerImageProcessor.from_pretrained(tmp_path, crop_mode="squash", size={"height": 8, "width": 9})
    assert loaded.crop_mode == "squash"
    assert loaded(ramp()).pixel_values.shape == (1, 3, 8, 9)
    with pytest.raises(ValueError, match="crop_mode is 'centre'"):
        CaptionerImageProcessor.from_pretrained(tmp_path, crop_mode="centre")


def test_a_changed_field_takes_effect():
    processor = CaptionerImageProcessor()
    before = processor(ramp()).pixel_values
    processor.crop_pct = 0.5
    assert not torch.equal(processor(ramp()).pixel_values, before)


@pytest.mark.parametrize("backend", [None, "pil", "torchvision"])
def test_auto_image_processor(tmp_path, backend):
    class Config(PreTrainedConfig):
        model_type = "image_processing_test"

    backends = {"torchvision": CaptionerImageProcessor, "pil": CaptionerImageProcessor}
    AutoImageProcessor.register(Config, image_processor_classes=backends, exist_ok=True)
    CaptionerImageProcessor(crop_pct=0.5).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is CaptionerImageProcessor
    assert loaded.crop_pct == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_mode": "centre"}, "crop_mode is 'centre'; choose from center, squash, border"),
        ({"interpolation": "random"}, "interpolation is 'random'; choose from"),
        ({"crop_pct": 0}, "crop_pct is 0; it must be above 0"),
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
def test_visible_box_says_where_each_output_pixel_comes_from(crop_mode, crop_pct, size, width, height):
    processor = CaptionerImageProcessor(
        size={"height": size[0], "width": size[1]},
        interpolation="bilinear",
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    )
    # Red tells a pixel's column and green its row, in steps as large as 8 bits allow.
    step_x, step_y = 255 // width, 255 // height
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width) * step_x
    image[..., 1] = np.arange(height)[:, None] * step_y
    red, green, _ = processor(image).pixel_values[0].numpy() * 255

    left, top, right, bottom = processor.visible_box(width, height)
    scale_x, scale_y = (right - left) / size[1], (bottom - top) / size[0]
    column = left + (np.arange(size[1]) + 0.5) * scale_x - 0.5
    row = top + (np.arange(size[0]) + 0.5) * scale_y - 0.5
    # Interpolation bends the ramp at the borders of the image, and padding has none.
    columns = (column > scale_x + 1) & (column < width - scale_x - 2)
    rows = (row > scale_y + 1) & (row < height - scale_y - 2)
    assert columns.sum() > 5
    assert rows.sum() > 5
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
    processor = CaptionerImageProcessor(
        size={"height": 40, "width": 40}, crop_pct=1.0, crop_mode=crop_mode, interpolation="lanczos"
    )
    assert processor.visible_box(200, 100) == expected
    left, top, right, bottom = expected
    half = (right - left) / 2, (bottom - top) / 2
    lower_right = (20, 20, 60, 60)  # from the middle of 40 x 40 pixels to as far beyond their end
    assert processor.visible_box(200, 100, lower_right) == (
        left + half[0],
        top + half[1],
        right + half[0],
        bottom + half[1],
    )
