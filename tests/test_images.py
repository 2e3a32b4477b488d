"""Opening images: all kinds of files, arrays and sources, and the errors for broken ones."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from hf_captioner.model.image_processing_captioner import CaptionerImageProcessor
from hf_captioner.model.images import open_image

RED, GREEN, BLUE, WHITE = (220, 30, 20), (20, 200, 40), (30, 40, 210), (255, 255, 255)
HEIGHT, WIDTH = 32, 48


def quadrants() -> np.ndarray:
    """Return `(32, 48, 3)` with a red, a green, a blue and a white quadrant, row by row."""
    array = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    top, left = slice(HEIGHT // 2), slice(WIDTH // 2)
    array[:], array[top], array[:, left], array[top, left] = WHITE, GREEN, BLUE, RED
    return array


def grey(dtype: type = np.uint8) -> np.ndarray:
    """Return a `(32, 48)` ramp from 0 to the maximum of the type."""
    return np.linspace(0, np.iinfo(dtype).max, HEIGHT * WIDTH).astype(dtype).reshape(HEIGHT, WIDTH)


def ramp(height: int = 75, width: int = 100, seed: int = 0) -> Image.Image:
    """Return an image of smooth gradients with noise, for which interpolations differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    array = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], -1)
    return Image.fromarray((array + rng.integers(0, 60, array.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


def half_transparent(mode: str) -> Image.Image:
    """Return an image that is red (or the same grey), with a transparent right half."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), (*RED, 255))
    image.paste((0, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return image.convert(mode)


def assert_close(image: Image.Image, expected: np.ndarray, tolerance: float) -> None:
    """Compare by the mean absolute difference, which tolerates ringing of lossy formats along edges."""
    assert image.mode == "RGB"
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image, float) - expected).mean() <= tolerance


# For each EXIF orientation (tag 0x0112), the transform of an upright image to the array that a file stores.
STORED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


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


RED_AS_GREY = np.asarray(Image.new("RGB", (1, 1), RED).convert("L")).item()
COLOURS, GREYS, GREYS_16 = (Image.fromarray(array) for array in (quadrants(), grey(), grey(np.uint16)))
COLOUR_KEY = COLOURS.copy()
COLOUR_KEY.info["transparency"] = BLUE
GREYS_OF_16_BITS = rgb(grey(np.uint16) / 257)
FILES = {
    **dict.fromkeys(("plain.png", "plain.bmp"), (COLOURS, quadrants(), 0)),
    "cmyk.jpg": (COLOURS.convert("CMYK"), quadrants(), 4),
    "cmyk.tif": (COLOURS.convert("CMYK"), quadrants(), 2),
    "grey.jpg": (GREYS, rgb(grey()), 3),
    "grey_alpha.png": (half_transparent("LA"), on_white(RED_AS_GREY), 1),
    "alpha.png": (half_transparent("RGBA"), on_white(RED), 0),
    "alpha.webp": (half_transparent("RGBA"), on_white(RED), 3),
    "colour_key.png": (COLOUR_KEY, np.where((quadrants() == BLUE).all(-1, keepdims=True), WHITE, quadrants()), 0),
    "palette.png": (COLOURS.quantize(8), quadrants(), 1),
    "palette_alpha.png": (half_transparent("RGBA").quantize(8), on_white(RED), 1),
    "palette_alpha.gif": (half_transparent("RGBA"), on_white(RED), 1),
    "one_bit.png": (Image.fromarray(grey() > 99), rgb((grey() > 99) * np.uint8(255)), 0),
    **dict.fromkeys(("16_bit.png", "16_bit.tif", "16_bit.pgm"), (GREYS_16, GREYS_OF_16_BITS, 0.5)),
    "16_bit_big_endian.tif": (Image.fromarray(grey(np.uint16).astype(">u2")), GREYS_OF_16_BITS, 0.5),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds_of_files(tmp_path, name):
    image, expected, tolerance = FILES[name]
    image.save(tmp_path / name)
    assert_close(open_image(tmp_path / name), expected, tolerance)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"animation.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    assert_close(open_image(path), np.full((HEIGHT, WIDTH, 3), RED), tolerance=4)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (grey(), rgb(grey())),
        (quadrants(), quadrants()),
        (np.asarray(half_transparent("RGBA")), on_white(RED)),
        (grey(np.uint16), GREYS_OF_16_BITS),
        (grey(np.uint16).astype(">u2"), GREYS_OF_16_BITS),
        (quadrants().astype(np.uint16) * 257, quadrants()),
        (quadrants()[:, ::-1], quadrants()[:, ::-1]),  # not contiguous
    ],
)
def test_arrays(array, expected):
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


def test_urls():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for path in ("photo.png", "moved"):
            assert_close(open_image(f"{url}/{path}"), on_white(RED), tolerance=0)
        with pytest.raises(ConnectionError, match=r"127.0.0.1:\d+/none.png cannot be downloaded: .*404"):
            open_image(f"{url}/none.png")
        server.shutdown()
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1/a.png cannot be downloaded"):
        open_image("http://127.0.0.1:1/a.png")


@pytest.mark.parametrize("convert", [str, Path, Path.read_bytes, Image.open])
def test_sources(tmp_path, convert):
    COLOURS.save(tmp_path / "photo.png")
    assert_close(open_image(convert(tmp_path / "photo.png")), quadrants(), tolerance=0)


@pytest.mark.parametrize("image", [half_transparent("RGBA"), COLOURS], ids=["RGBA", "RGB"])
def test_a_given_pil_image_is_left_alone(tmp_path, image):
    image.save(tmp_path / "photo.png")
    for given in (Image.open(tmp_path / "photo.png"), image.copy()):
        open_image(given).paste(BLUE, (0, 0, WIDTH, HEIGHT))
        assert given.mode == image.mode and np.array_equal(np.asarray(given), np.asarray(image))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, fraction):
    path = tmp_path / f"cut.{suffix}"
    ramp().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} is not a readable image: \S"):
        open_image(path)
    with pytest.raises(ValueError, match=r"^The given bytes object is not a readable image: \S"):
        open_image(path.read_bytes())


@pytest.mark.parametrize("content", [b"", b"a dog runs", b"\xff\xd8\xff\xe0 not a JPEG"])
def test_other_files_named_as_images(tmp_path, content):
    (tmp_path / "text.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.jpg is not a readable image: .*") as error:
        open_image(tmp_path / "text.jpg")
    assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist\.$"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match=r"is not a readable image: .*directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("read", [open_image, CaptionerImageProcessor()], ids=["open_image", "processor"])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch, suffix, read):
    path = tmp_path / f"bomb.{suffix}"
    Image.new("L", (300, 200)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=rf"bomb\.{suffix} has more pixels than is safe to open: .*60000 pix") as e:
        read(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Image.new("F", (4, 4), 0.5), ValueError, "PIL image is not a readable image: .* floating-point"),
        (Image.new("I", (4, 4), 70000), ValueError, "range from 70000 to 70000, beyond 16 bits"),
        (Image.new("I", (4, 4), -1), ValueError, "beyond 16 bits"),
        (np.zeros((4, 4, 3)), ValueError, r"shape \(4, 4, 3\) and dtype float64; .* uint8 or uint16"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"shape \(3, 8, 8\)"),
        (np.zeros((0, 4), np.uint8), ValueError, r"shape \(0, 4\)"),
        (np.zeros((4, 4), np.uint32), ValueError, "dtype uint32"),
        (torch.zeros(3, 4, 4), TypeError, "cannot be read from Tensor; give a path"),
        (None, TypeError, "cannot be read from NoneType"),
    ],
)
def test_unusable_sources(source, error, message):
    with pytest.raises(error, match=message):
        open_image(source)
