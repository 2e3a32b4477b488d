"""The heat map: its colours, and how it is blended into an image. The web page (page.js) draws heat in the same way."""

# H, W: height and width of an image in pixels

from __future__ import annotations

import numpy as np
from PIL import Image

# Colours of the heat map: pairs of an attention value between 0 (least) and 1 (most) and its red, green and blue, with
# linear interpolation between them. These follow matplotlib's "inferno" without its blacks, which would hide the image;
# like it, they remain distinguishable in black-and-white print and for colour-blind readers.
HEAT_COLORS: tuple[tuple[float, tuple[int, int, int]], ...] = (
    (0.0, (70, 20, 110)),
    (0.35, (170, 40, 95)),
    (0.6, (230, 80, 40)),
    (0.8, (250, 150, 20)),
    (1.0, (255, 225, 90)),
)
HEAT_OPACITY = 0.75  # opacity of the hottest colour; colder ones are more transparent
HEAT_THRESHOLD = 0.15  # attention values up to this one leave the image as it is


def blend_heat(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """Return a copy of an image with heat where the attention is high.

    Args:
        image: RGB image of W x H pixels.
        attention: Attention of each pixel `(H, W)`, from 0 to 1.
    """
    heat = ((attention - HEAT_THRESHOLD) / (1 - HEAT_THRESHOLD)).clip(0, 1)
    stops = [stop for stop, _ in HEAT_COLORS]
    channels = zip(*(color for _, color in HEAT_COLORS), strict=True)
    colors = np.stack([np.interp(heat, stops, channel) for channel in channels], axis=-1)  # (H, W, 3)
    opacity = HEAT_OPACITY * (heat * (2 - heat))[..., None]  # (H, W, 1)
    pixels = np.asarray(image, dtype=np.float32)
    return Image.fromarray((opacity * colors + (1 - opacity) * pixels).round().astype(np.uint8))
