"""The photograph with heat where the model looked and its caption beneath: one picture, or word by word in motion."""

# T: words, H, W: height and width of a photograph in pixels; lengths without a unit are pixels

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..model.images import ImageSource, open_image
from .fonts import font_file
from .maps import FAINT, HEAT, OPACITY, Box, checked_maps, relative_box, scaled, settled, spread, stretched

PICTURE, ANIMATION = 720, 320  # longer edge of the photograph
COLOURS = 256  # of an animation
DITHER = 10  # range, of 256 levels, over which its pixels are moved before they get one of these colours

PAPER, INK, FADED, MARK = (255, 255, 255), (34, 34, 34), (120, 120, 120), (255, 213, 128)
BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])

STEADY, PLAIN = 650, 1100  # milliseconds that a word's map, and the photograph without one, stand still
STEPS, STEP = 3, 60  # pictures between one map and the next, and milliseconds of each


def attention_overlay(
    image: ImageSource,
    words: Sequence[str],
    maps: np.ndarray,
    box: Box | None = None,
    *,
    chosen: Collection[str | int] | None = None,
) -> Image.Image:
    """The photograph once, with heat where the model looked over the whole caption or for some of its words.

    The heat is the mean of the words' maps, scaled from its own least to its own greatest weight; a map
    without differences leaves the photograph as it is. The caption stands beneath, the chosen words marked.

    Args:
        image: anything that `open_image` reads; shown upright, whole, with its own aspect ratio.
        words: of the caption.
        maps: `(T, rows, columns)`, attention weights of each word.
        box: `(left, top, right, bottom)` of what the maps cover in pixels of the image, as the pipeline gives it;
            None for the whole image.
        chosen: words, or places of words from 0; None for the whole caption.

    Raises:
        ValueError: maps of another shape or number, or a chosen word that is not there; see `open_image` for its
            errors.
    """
    maps = checked_maps(words, maps)
    places = _places(words, chosen)
    original = open_image(image)
    photo = scaled(original, PICTURE)
    maps, box = settled(maps, relative_box(box, original.size))
    if places:
        photo_with_heat = _heated(photo, spread(stretched(maps[places].mean(0), even=0), photo.size, box))
    else:
        photo_with_heat = photo
    return _Page(photo, words).draw(photo_with_heat, marked=() if chosen is None else places)


def attention_animation(image: ImageSource, words: Sequence[str], maps: np.ndarray, box: Box | None = None) -> bytes:
    """An animated GIF: heat moves over the photograph word by word, and the present word is marked beneath.

    It starts with the plain photograph, and repeats for ever. Write it with `Path("attention.gif").write_bytes(…)`.

    Args:
        image: anything that `open_image` reads.
        words: of the caption.
        maps: `(T, rows, columns)`, attention weights of each word, scaled as in `attention_overlay`.
        box: of what the maps cover in pixels of the image; None for the whole image.

    Raises:
        ValueError: maps of another shape or number; see `open_image` for its errors.
    """
    maps = checked_maps(words, maps)
    original = open_image(image)
    photo = scaled(original, ANIMATION)
    maps, box = settled(maps, relative_box(box, original.size))
    lights = [spread(stretched(weights, even=0), photo.size, box) for weights in maps]
    pictures, durations = zip(*_scenes(photo, words, lights), strict=True)
    frames = _quantized(pictures)
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=list(durations), loop=0)
    return file.getvalue()


def _places(words: Sequence[str], chosen: Collection[str | int] | None) -> list[int]:
    if chosen is None:
        return list(range(len(words)))
    if missing := [word for word in chosen if word not in words and word not in range(len(words))]:
        raise ValueError(
            f"The caption has no word {missing[0]!r}; choose among its words, {', '.join(words)}, "
            f"or their places, 0 to {len(words) - 1}."
        )
    return [place for place, word in enumerate(words) if word in chosen or place in chosen]


def _scenes(
    photo: Image.Image, words: Sequence[str], lights: Sequence[np.ndarray]
) -> Iterator[tuple[Image.Image, int]]:
    """The pictures of an animation, each with its milliseconds."""
    page = _Page(photo, words)
    stills = [(np.zeros(photo.size[::-1]), ()), *((light, (place,)) for place, light in enumerate(lights))]
    for (light, marked), (next_light, next_marked) in zip(stills, [*stills[1:], stills[0]], strict=True):
        yield page.draw(_dithered(_heated(photo, light)), marked), STEADY if marked else PLAIN
        for step in range(1, STEPS + 1):
            share = step / (STEPS + 1)
            share = share * share * (3 - 2 * share)  # starts and ends gently
            # The word is marked as soon as the heat sets out for its place.
            heated = _heated(photo, (1 - share) * light + share * next_light)
            yield page.draw(_dithered(heated), next_marked), STEP


def _heated(photo: Image.Image, light: np.ndarray) -> Image.Image:
    """Heat over a photograph of W x H pixels from a map `(H, W)` of 0 to 1."""
    heat = ((light - FAINT) / (1 - FAINT)).clip(0, 1)
    shares = [share for share, _ in HEAT]
    channels = zip(*(colour for _, colour in HEAT), strict=True)
    colour = np.stack([np.interp(heat, shares, channel) for channel in channels], axis=-1)  # (H, W, 3)
    opacity = OPACITY * (heat * (2 - heat))[..., None]
    pixels = np.asarray(photo, dtype=np.float32)
    return Image.fromarray((opacity * colour + (1 - opacity) * pixels).round().astype(np.uint8))


def _dithered(picture: Image.Image) -> Image.Image:
    """A picture in which few colours will do for many.

    By a fixed pattern: error diffusion would make the photograph flicker wherever heat comes near.
    """
    rows, columns = (-(-length // 4) for length in (picture.height, picture.width))
    noise = DITHER * np.tile((BAYER + 0.5) / 16 - 0.5, (rows, columns))[: picture.height, : picture.width, None]
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def _quantized(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures in colours that they share, so that what stands still needs no new pixels."""
    stills = np.concatenate([np.asarray(picture.reduce(3)) for picture in pictures[:: STEPS + 1]])
    palette = Image.fromarray(stills).quantize(COLOURS - 1, method=Image.Quantize.MEDIANCUT, kmeans=1)
    palette.putpalette([*palette.getpalette()[: 3 * (COLOURS - 1)], *PAPER])  # type: ignore[index]
    return [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]


class _Page:
    """White paper with a photograph and its caption in lines beneath, the marked words on colour.

    Args:
        photo: as large as it is to be.
        words: of the caption.
    """

    def __init__(self, photo: Image.Image, words: Sequence[str]) -> None:
        size = max(15, round(max(photo.size) / 26))
        self.font = _font(font_file("".join(words)), size)
        self.words = words
        self.pad = round(size * 0.26)
        self.margin = size
        # A tall photograph gets the room of a square one, or its caption would be a column of single words.
        width = max(photo.width, round(0.75 * photo.height))
        self.corner = (self.margin + (width - photo.width) // 2, self.margin)
        gap, line = round(size * 0.05), round(size * 1.75)
        left, top = self.margin, self.margin + photo.height + round(size * 0.6)
        self.boxes = []
        for word in words:
            length = round(self.font.getlength(word)) + 2 * self.pad
            if left > self.margin and left + length > self.margin + width:
                left, top = self.margin, top + line
            self.boxes.append((left, top, left + length, top + line - 2 * self.pad))
            left += length + gap
        self.size = (width + 2 * self.margin, top + line + round(size * 0.3))

    def draw(self, photo: Image.Image, marked: Collection[int]) -> Image.Image:
        """The page with this photograph in it, and the words at these places marked."""
        page = Image.new("RGB", self.size, PAPER)
        page.paste(photo, self.corner)
        pen = ImageDraw.Draw(page)
        for place, (word, box) in enumerate(zip(self.words, self.boxes, strict=True)):
            if place in marked:
                pen.rounded_rectangle(box, radius=self.pad, fill=MARK)
            middle = (box[1] + box[3]) / 2
            ink = INK if place in marked or not marked else FADED
            pen.text((box[0] + self.pad, middle), word, fill=ink, font=self.font, anchor="lm")
        return page


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
