"""Damaged image files, and small ones that ask for much memory, opened as captioning opens them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from .mutations import MUTATIONS
from .pool import Case, Outcome

NAME = "image.bin"
WIDTH, HEIGHT = 53, 47  # distinct numbers, to be found in headers
HUGE_SIZES = (0, 20_000, 65_535, 10**6, 2**31 - 1, 2**32 - 1)


def cases(count: int, seed: int) -> list[Case]:
    """Return the crafted images, at most as a quarter of all, then damaged ones of all formats."""
    rng = random.Random(seed)
    crafted = [Case("images", f"crafted/{name}", 0) for name in rng.sample([*CRAFTED], min(len(CRAFTED), count // 4))]
    formats, mutations = sorted(intact_images()), [*MUTATIONS, "huge_size"]
    damaged = [
        Case("images", f"{formats[i % len(formats)]}/{rng.choice(mutations)}", seed * 10**6 + i)
        for i in range(count - len(crafted))
    ]
    return crafted + damaged


def prepare(case: Case, folder: Path) -> Callable[[Outcome], None]:
    """Write the image of a case, and return the job that opens it."""
    kind, name = case.name.split("/")
    if kind == "crafted":
        (folder / NAME).write_bytes(CRAFTED[name]())
        return lambda outcome: _open(folder / NAME, outcome)
    intact, rng = intact_images()[kind], random.Random(case.seed)
    damaged = huge_size(intact, rng) if name == "huge_size" else MUTATIONS[name](intact, rng)
    if intact.startswith(b"\x89PNG") and rng.random() < 0.5:
        damaged = _with_checksums(damaged)
    (folder / NAME).write_bytes(damaged)
    expected = _pixels(intact) if name == "cut_end" else None
    return lambda outcome: _open(folder / NAME, outcome, expected)


def _open(path: Path, outcome: Outcome, expected: bytes | None = None) -> None:
    """Open an image as a path and as bytes, alone and as pixel values with several filters."""
    from hf_captioner import CaptionerImageProcessor, open_image

    with outcome.watch([path.name]):
        image = open_image(path)
        if expected is not None and image.tobytes() != expected:
            outcome.faults["silent"] = "a file whose end is missing was read with other pixels"
        del image
    for arguments in ({}, {"interpolation": "lanczos", "crop_pct": 1.0, "crop_mode": "border"}):
        with outcome.watch(["bytes"]):
            CaptionerImageProcessor(**arguments)(path.read_bytes())


def huge_size(data: bytes, rng: random.Random) -> bytes:
    """Replace the width or the height by a huge one, wherever it stands near the beginning."""
    old, new = rng.choice((WIDTH, HEIGHT)), rng.choice(HUGE_SIZES)
    changed = data
    for form in ("<I", ">I", "<H", ">H"):
        limit = 256 ** struct.calcsize(form) - 1
        pattern, start = struct.pack(form, old), changed.find(struct.pack(form, old), 0, 600)
        if start >= 0:
            changed = changed[:start] + struct.pack(form, min(new, limit)) + changed[start + len(pattern) :]
    text = str(old).encode()
    return changed if changed != data else data.replace(text, str(new).encode(), 1)


def _with_checksums(png: bytes) -> bytes:
    """Return a PNG whose chunks have right checksums, so that damage gets past them."""
    parts, start = [png[:8]], 8
    while start + 12 <= len(png):
        length = struct.unpack(">I", png[start : start + 4])[0]
        body = png[start + 4 : start + 8 + length]
        parts.append(png[start : start + 4] + body + struct.pack(">I", zlib.crc32(body)))
        start += 12 + length
    return b"".join(parts) + png[start:]


def _pixels(data: bytes) -> bytes:
    from hf_captioner import open_image

    return open_image(data).tobytes()


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the file of an image."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Draw an image of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def exif_of(orientation: int = 6) -> Image.Exif:
    """Return metadata with an orientation."""
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = orientation, "camera"
    return exif


@cache
def intact_images() -> dict[str, bytes]:
    """Return an image of every format that is read, of each in several kinds."""
    frames = [picture(seed=seed) for seed in (1, 2)]
    animation = {"save_all": True, "append_images": frames, "duration": 50}
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "jpeg": ("JPEG", "RGB", {}),
        "jpeg_grey": ("JPEG", "L", {}),
        "jpeg_cmyk": ("JPEG", "CMYK", {}),
        "jpeg_progressive": ("JPEG", "RGB", {"progressive": True}),
        "jpeg_sideways": ("JPEG", "RGB", {"exif": exif_of()}),
        "png": ("PNG", "RGB", {}),
        "png_16_bit": ("PNG", "I;16", {}),
        "png_1_bit": ("PNG", "1", {}),
        "png_palette": ("PNG", "P", {"transparency": 3}),
        "png_transparent": ("PNG", "RGBA", {"exif": exif_of()}),
        "png_animated": ("PNG", "RGB", animation),
        "webp": ("WEBP", "RGB", {"exif": exif_of()}),
        "webp_lossless": ("WEBP", "RGBA", {"lossless": True}),
        "webp_animated": ("WEBP", "RGB", animation),
        "gif": ("GIF", "P", {}),
        "gif_animated": ("GIF", "RGB", animation),
        "bmp": ("BMP", "RGB", {}),
        "bmp_palette": ("BMP", "P", {}),
        **{f"tiff_{name}": ("TIFF", "RGB", {"compression": name}) for name in ("raw", "tiff_lzw", "packbits", "jpeg")},
        "tiff_deflate": ("TIFF", "RGBA", {"compression": "tiff_adobe_deflate"}),
        "tiff_fax": ("TIFF", "1", {"compression": "group4"}),
        "tiff_16_bit": ("TIFF", "I;16", {}),
        "tiff_pages": ("TIFF", "L", {"save_all": True, "append_images": frames}),
        "mpo": ("MPO", "RGB", {"save_all": True, "append_images": frames}),
        "jpeg2000": ("JPEG2000", "RGB", {}),
        "jpeg2000_lossy": ("JPEG2000", "RGB", {"irreversible": True, "no_jp2": True}),
        "ppm": ("PPM", "RGB", {}),
        "pgm_16_bit": ("PPM", "I;16", {}),
        "pbm": ("PPM", "1", {}),
    }
    if features.check("avif"):
        kinds["avif"] = ("AVIF", "RGB", {"exif": exif_of()})
    images = {name: saved(picture(mode), format, **options) for name, (format, mode, options) in kinds.items()}
    images["png_interlaced"] = _interlaced_png()
    return images


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, depth: int, colour: int, pixels: bytes, *more: bytes, interlaced: bool = False
) -> bytes:
    """Return a PNG of compressed pixels, with more chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [chunk(b"IHDR", header), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _interlaced_png() -> bytes:
    """Return a grey PNG in Adam7's seven passes, which Pillow does not write."""
    pixels = np.asarray(picture("L"))
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row for y, x, dy, dx in starts for row in pixels[y::dy, x::dx]]
    return png(WIDTH, HEIGHT, 8, 0, zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), interlaced=True)


def zeros(count: int) -> bytes:
    """Return many zeros, compressed."""
    compressor = zlib.compressobj(1)
    parts = [compressor.compress(bytes(min(2**20, count - start))) for start in range(0, count, 2**20)]
    return b"".join(parts) + compressor.flush()


def solid_png(width: int, height: int, depth: int, colour: int) -> bytes:
    """Return a PNG of one colour; `colour` is PNG's number for its channels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    palette = (chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\0")) if colour == 3 else ()
    return png(width, height, depth, colour, zeros(height * (1 + (width * channels * depth + 7) // 8)), *palette)


def gif(width: int, height: int, *frames: tuple[int, int]) -> bytes:
    """Return a GIF of almost no data."""
    blocks = [b"\x2c" + struct.pack("<HHHHB", 0, 0, w, h, 0) + b"\x02\x02\x44\x01\0" for w, h in frames]
    return (
        b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + b"".join(blocks) + b";"
    )


def tiff(width: int, height: int, *more: tuple[int, int, int, int], channels: int = 3, bits: int = 8) -> bytes:
    """Return a TIFF of zeros in one compressed strip; `more` are tags: number, type, count, value."""
    data = zeros(width * height * channels * bits // 8)
    photometric = 2 if channels > 1 else 1
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, bits), 259: (3, 1, 8), 262: (3, 1, photometric)}
    tags |= {273: (4, 1, 8), 277: (3, 1, channels), 278: (4, 1, height), 279: (4, 1, len(data))}
    tags |= {number: rest for number, *rest in more}  # type: ignore[misc]
    entries = b"".join(struct.pack("<HHII", number, *tags[number]) for number in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(width: int, height: int, bits: int) -> bytes:
    """Return a BMP with few of the pixels that it says it has."""
    header = struct.pack("<IIIIiiHHIIIIII", 70, 0, 54, 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)
    return b"BM" + header + bytes(2_000)


def with_exif(format: str, exif: bytes) -> bytes:
    """Return an image with given bytes for its metadata."""
    if format != "JPEG":
        return saved(picture(), format, exif=b"Exif\0\0" + exif)
    body = b"Exif\0\0" + exif
    data = saved(picture(), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def loop_of_directories() -> bytes:
    """Return TIFF metadata whose directory is followed by itself, and holds wrong types and sizes."""
    tags = struct.pack("<HHII", 0x112, 2, 2**32 - 1, 8) + struct.pack("<HHII", 0x8769, 4, 1, 8)
    return b"II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 8)


EXIF = {
    "garbage": lambda: b"garbage" * 9,
    "empty": lambda: b"",
    "loop": loop_of_directories,
    "cut": lambda: exif_of().tobytes()[6:20],
    "no_orientation": lambda: exif_of(99).tobytes()[6:],
}

# Functions that return images; the names say what is wrong with them.
CRAFTED: dict[str, Callable[[], bytes]] = {
    **{
        f"exif_{name}_{format}": lambda format=format, make=make: with_exif(format, make())
        for name, make in EXIF.items()
        for format in ("JPEG", "PNG", "WEBP")
    },
    "png_bits": lambda: solid_png(13_000, 13_000, 1, 0),
    "png_many_bits": lambda: solid_png(60_000, 60_000, 1, 0),
    "png_grey": lambda: solid_png(9_400, 9_400, 8, 0),
    "png_large_grey": lambda: solid_png(13_300, 13_300, 8, 0),
    "png_rgb": lambda: solid_png(9_400, 9_400, 8, 2),
    "png_rgba": lambda: solid_png(9_400, 9_400, 8, 6),
    "png_16_bit_grey": lambda: solid_png(9_400, 9_400, 16, 0),
    "png_16_bit_rgba": lambda: solid_png(9_400, 9_400, 16, 6),
    "png_palette": lambda: solid_png(9_400, 9_400, 1, 3),
    "png_grey_alpha": lambda: solid_png(9_400, 9_400, 8, 4),
    "png_column": lambda: solid_png(1, 20_000, 8, 2),
    "png_row": lambda: solid_png(20_000, 1, 8, 2),
    "png_long_column": lambda: solid_png(1, 2_000_000, 8, 0),
    "png_long_row": lambda: solid_png(2_000_000, 1, 8, 0),
    "png_strip": lambda: solid_png(3, 1_000_000, 8, 6),
    "png_interlaced": lambda: png(9_400, 9_400, 8, 2, zeros(10**6), interlaced=True),
    "png_zero_width": lambda: png(0, 5, 8, 2, zeros(9)),
    "png_texts": lambda: png(5, 5, 8, 0, zeros(30), *(40 * [chunk(b"zTXt", b"a\0\0" + zeros(10**6))])),
    "png_text": lambda: png(5, 5, 8, 0, zeros(30), chunk(b"zTXt", b"a\0\0" + zeros(10**9))),
    "png_international_text": lambda: png(5, 5, 8, 0, zeros(30), chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(10**9))),
    "png_profile": lambda: png(5, 5, 8, 0, zeros(30), chunk(b"iCCP", b"a\0\0" + zeros(10**9))),
    "png_frames": lambda: png(5, 5, 8, 0, zeros(30), chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "png_more_pixels_than_size": lambda: png(5, 5, 8, 0, zeros(10**9)),
    "png_no_pixels": lambda: png(5, 5, 8, 0, b""),
    "gif_canvas": lambda: gif(65_535, 65_535),
    "gif_frame": lambda: gif(13_000, 13_000, (13_000, 13_000)),
    "gif_medium_frame": lambda: gif(9_400, 9_400, (9_400, 9_400)),
    "gif_frame_beyond_canvas": lambda: gif(5, 5, (13_000, 13_000)),
    "gif_many_frames": lambda: gif(3_000, 3_000, *(2_000 * [(3_000, 3_000)])),
    "gif_column": lambda: gif(1, 65_535, (1, 65_535)),
    "tiff_rgb": lambda: tiff(9_400, 9_400),
    "tiff_16_bit_grey": lambda: tiff(9_400, 9_400, channels=1, bits=16),
    "tiff_32_bit_grey": lambda: tiff(9_400, 9_400, channels=1, bits=32),
    "tiff_column": lambda: tiff(1, 100_000),
    "tiff_row": lambda: tiff(100_000, 1),
    "tiff_rows_per_strip": lambda: tiff(50, 50, (278, 4, 1, 2**32 - 1)),
    "tiff_strips": lambda: tiff(50, 50, (273, 4, 2**31 - 1, 8), (279, 4, 2**31 - 1, 8)),
    "tiff_tile": lambda: tiff(50, 50, (322, 4, 1, 2**31), (323, 4, 1, 2**31), (324, 4, 1, 8)),
    "tiff_comment": lambda: tiff(50, 50, (270, 2, 2**32 - 1, 8)),
    "tiff_samples": lambda: tiff(50, 50, (277, 3, 1, 65_535)),
    "tiff_float": lambda: tiff(50, 50, (339, 3, 1, 3), channels=1, bits=32),
    "tiff_loop": loop_of_directories,
    "jpeg_size": lambda: _resized_jpeg(65_500, 65_500),
    "jpeg_progressive_size": lambda: _resized_jpeg(9_400, 9_400, progressive=True),
    "jpeg_cmyk_size": lambda: _resized_jpeg(9_400, 9_400, "CMYK", progressive=True),
    "jpeg_scans": lambda: _many_scans(20_000),
    "jpeg_column": lambda: saved(Image.new("L", (1, 60_000)), "JPEG"),
    "jpeg_profile": lambda: saved(picture(), "JPEG", icc_profile=bytes(10**7)),
    "webp_rgb": lambda: saved(Image.new("RGB", (9_400, 9_400)), "WEBP", lossless=True, method=0, quality=0),
    "webp_column": lambda: saved(Image.new("RGB", (1, 16_000)), "WEBP", lossless=True),
    "jpeg2000_rgb": lambda: saved(Image.new("RGB", (5_000, 5_000)), "JPEG2000"),
    "bmp_size": lambda: bmp(13_000, -13_000, 8),
    "bmp_negative": lambda: bmp(-5, -(2**31), 24),
    "ppm_size": lambda: b"P6 99999 99999 255\n",
    "ppm_long_number": lambda: b"P6 " + b"9" * 10**6 + b" 5 255\n",
    "ppm_text_pixels": lambda: b"P3 9400 9400 255\n" + b"1 " * 10**6,
    "ppm_comment": lambda: b"P6 #" + b"x" * 10**7,
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n",
    "pdf": lambda: b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="5" height="5"/>',
    "psd_size": lambda: b"8BPS" + struct.pack(">H6xHIIHHIII", 1, 3, 9_400, 9_400, 8, 3, 0, 0, 0) + bytes(2_000),
    "fits": lambda: b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "ico_of_large_png": lambda: struct.pack("<7HII", 0, 1, 1, 0, 0, 1, 32, 10**6, 22) + solid_png(9_400, 9_400, 8, 6),
    "empty": lambda: b"",
    "one_byte": lambda: b"\xff",
    "text": lambda: b"hello\n",
    "html": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "git_lfs_pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n",
}  # fmt: skip


def _resized_jpeg(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """Return a small JPEG that says it is large."""
    data = saved(picture(mode), "JPEG", **options)
    return data.replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", height, width))


def _many_scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated many times."""
    data = saved(Image.new("L", (2_000, 2_000)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]
