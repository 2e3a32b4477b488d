"""Opening images: all kinds of files, arrays and sources, and the errors for broken ones."""

from __future__ import annotations

import base64
import gzip
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from hf_captioner.model import image_limits, image_metadata, image_sources
from hf_captioner.model.image_processing_captioner import CaptionerImageProcessor
from hf_captioner.model.images import IMAGE_FORMATS, IMAGE_SUFFIXES, is_image_name, open_as_used, open_image

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


# Fields of an EXIF directory: tag, type, count and value.
def tiff_header(*entries: bytes) -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


RESOLUTION_AS_TEXT = tiff_header(struct.pack("<HHIHH", 0x112, 3, 1, 3, 0), struct.pack("<HHI", 0x11A, 2, 4) + b"72\0\0")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + RESOLUTION_AS_TEXT]
)
def test_broken_exif_is_no_broken_picture(tmp_path, suffix, exif, recwarn):
    path = tmp_path / f"photo.{suffix}"
    COLOURS.save(path, quality=95)
    if suffix == "jpg":
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    elif suffix != "avif":  # which Pillow does not write with such metadata
        COLOURS.save(path, quality=95, exif=exif)
    expected = quadrants()[::-1, ::-1] if exif.endswith(RESOLUTION_AS_TEXT) and suffix != "avif" else quadrants()
    assert_close(open_image(path), expected, tolerance=5)
    assert not recwarn


def test_broken_exif_is_reported_once_for_an_image_and_for_few_images(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(image_metadata, "_reported", set())
    for number in range(30):
        COLOURS.save(tmp_path / f"{number}.png", exif=b"Exif\0\0garbage")
        open_image(tmp_path / f"{number}.png")
        open_image(tmp_path / f"{number}.png")
    assert len(caplog.messages) == image_metadata.MAX_REPORTS
    assert caplog.messages[0] == f"{tmp_path / '0.png'}: its EXIF data are broken, so it is not rotated."
    assert caplog.messages[-1].endswith("Further images like this are not named.")


def with_chunk(name: bytes, body: bytes) -> bytes:
    """Return a PNG with one more chunk, with a right checksum."""
    file = io.BytesIO()
    COLOURS.save(file, "PNG")
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return file.getvalue()[:33] + chunk + file.getvalue()[33:]


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7))),
        with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))),
        with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(10**7))),
        with_chunk(b"tEXt", b"a\0b").replace(b"a\0b", b"a\0c"),  # a wrong checksum
    ],
)
def test_huge_and_broken_metadata_are_ignored(data):
    assert_close(open_image(data), quadrants(), tolerance=0)


def flat_png(width: int, height: int, colour: int = 2) -> bytes:
    """Return a PNG of zeros; `colour` is PNG's number for its channels, 0, 2 or 6."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour])
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0), b"IDAT": pixels, b"IEND": b""}
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge_gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    block = b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + block + b";"


def resized_jpeg(width: int, height: int, **options: object) -> bytes:
    """Return a small JPEG whose header says that it is large."""
    file = io.BytesIO()
    COLOURS.save(file, "JPEG", **options)
    return file.getvalue().replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", height, width))


def many_scans() -> bytes:
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * 20_000 + data[-2:]


def tiff_of_many_strips() -> bytes:
    tags = [struct.pack("<HHII", *tag) for tag in [(256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 2**20, 8)]]
    return tiff_header(*tags) + bytes(2**22)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (flat_png(9400, 9400, 6), "is too large: its 9400 x 9400 pixels .PNG. would take about 67. MiB"),
        (flat_png(1, 300_000), "an edge may have 262,144"),
        (
            huge_gif(13_000, 13_000, (13_000, 13_000)),
            "is too large: .* raise MAX_MEMORY or MAX_SECONDS in hf_captioner",
        ),
        (huge_gif(5, 5, (13_000, 13_000)), "is too large"),
        (huge_gif(65_535, 65_535, (5, 5)), "more pixels than is safe"),
        (resized_jpeg(9400, 9400, progressive=True, subsampling=0), "is too large"),
        (many_scans(), "is too large"),
        (tiff_of_many_strips(), "its tag 273 has 1048576 values"),
        (b"P3 3000 3000 255\n" + b"1 " * 9_000_000, "is too large"),
    ],
)
def test_images_that_need_too_much_are_refused_before_decoding(data, message, monkeypatch, recwarn):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=message) as error:
        open_image(data)
    assert "\n" not in str(error.value) and not recwarn


def test_a_limit_can_be_raised(monkeypatch):
    data = flat_png(300, 200)
    monkeypatch.setattr(image_limits, "MAX_MEMORY", 100_000)
    with pytest.raises(ValueError, match="is too large"):
        open_image(data)
    monkeypatch.setattr(image_limits, "MAX_MEMORY", 1_000_000)
    assert open_image(data).size == (300, 200)


def test_a_jpeg_of_100_megapixels_is_decoded_at_reduced_size():
    file = io.BytesIO()
    Image.new("L", (11_648, 8736), 99).save(file, "JPEG")
    opened = open_as_used(file, lambda width, height: (224, 224))
    assert opened.size == (11_648, 8736) and opened.image.size == (1456, 1092)


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", b"%PDF-1.4\n", b"SIMPLE  =" + b" " * 2871]
)
def test_other_formats_are_not_opened(tmp_path, data, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "image.jpg").write_bytes(data)
    with pytest.raises(ValueError, match="in none of the formats JPEG, PNG"):
        open_image(tmp_path / "image.jpg")
    if data.startswith(b"%!"):
        with pytest.raises(ValueError, match="its format is EPS"):
            open_image(Image.open(io.BytesIO(data)))


def test_heif_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="install pillow-heif"):
        open_image(b"\0\0\0\x18ftypheic" + bytes(99))


@pytest.mark.parametrize("suffix", [suffix for suffix in IMAGE_SUFFIXES if not suffix.startswith(".h")])
def test_suffixes_are_those_of_formats_that_are_read(tmp_path, suffix):
    Image.init()
    assert Image.registered_extensions().get(suffix, "MPO" if suffix == ".mpo" else "BMP") in (
        *IMAGE_FORMATS,
        "MPO",
        "DIB",
    )
    assert is_image_name(f"A{suffix.upper()}") and not is_image_name(f"a{suffix}.txt")


def test_open_files_and_data_uris(tmp_path):
    COLOURS.save(tmp_path / "photo.png")
    data = (tmp_path / "photo.png").read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    with open(tmp_path / "photo.png", "rb") as file:
        at_end = io.BytesIO(data)
        at_end.read()
        for source in (io.BytesIO(data), at_end, file, bytearray(data), memoryview(data), uri):
            assert_close(open_image(source), quadrants(), tolerance=0)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (io.StringIO("text"), ValueError, "opened as text; open it with mode 'rb'"),
        ("data:image/png," + "A" * 10**6, ValueError, "data URI"),
        ("data:image/png;base64," + "A" * 10**6, ValueError, "data URI"),
        ("A" * 10**6, ValueError, "…"),
        ("\0" * 9, FileNotFoundError, "does not exist"),
        ("two\nlines", FileNotFoundError, r"two\\nlines"),
        ("/dev/zero", ValueError, "device or socket"),
        ("file:///etc/passwd", ConnectionError, "only http and https"),
        ("http://user:secret@127.0.0.1:1/a.png?token=secret", ConnectionError, r"http://127.0.0.1:1/a.png\?… cannot"),
    ],
)
def test_errors_are_short_and_keep_secrets(source, error, message):
    with pytest.raises(error, match=message) as e:
        open_image(source)
    assert len(str(e.value)) < 300 and "\n" not in str(e.value) and "secret" not in str(e.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="is a pipe"):
        open_image(tmp_path / "pipe.jpg")


class SlowHandler(BaseHTTPRequestHandler):
    """A server of answers that are too slow, too large, packed, or lead away or round in a circle."""

    def do_GET(self) -> None:
        kind = self.path[1:]
        if kind == "header":
            with suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"H")
                    time.sleep(0.05)
            return
        self.send_response(302 if kind in ("circle", "away") else 200)
        self.send_header("Location", "file:///etc/passwd" if kind == "away" else "/circle")
        self.send_header("Content-Encoding", {"packed": "gzip", "brotli": "br"}.get(kind, "identity"))
        self.end_headers()
        with suppress(OSError):
            for _ in range(100):
                self.wfile.write(gzip.compress(bytes(10**7)) if kind == "packed" else b"x" * 10_000)
                time.sleep(0.05 if kind == "body" else 0)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("header", "takes more than"),
        ("body", "takes more than"),
        ("large", "more than 0 MiB"),
        ("packed", "more than 0 MiB"),
        ("brotli", "encoded as 'br'"),
        ("circle", "redirects"),
        ("away", "protocol"),
    ],
)
def test_downloads_are_limited(kind, message, monkeypatch):
    monkeypatch.setattr(image_sources, "DOWNLOAD_TIMEOUT", 1.0)
    monkeypatch.setattr(image_sources, "MAX_DOWNLOAD", 500_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowHandler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=f"cannot be downloaded: .*{message}"):
            open_image(f"http://127.0.0.1:{server.server_port}/{kind}")
        assert time.monotonic() - start < 4
        server.shutdown()
