"""Batches of a captioned data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.images import Size
from .rows import Row, open_row, read_pixels

if TYPE_CHECKING:
    from PIL.Image import Image


class CaptionCollator:
    """Rows of a captioned data set to a batch: every image once, with all its captions.

    Args:
        processor: a `CaptionerProcessor`.
        cells: image cells computed earlier, `(images, P, C)`; rows then carry their `index`, and images stay shut.
        mirror: show every other image mirrored left to right; which ones is drawn by the `draw` that rows carry (see
            `loading.py`), or else by torch's generator.
        mirrored_cells: cells of the mirrored images; needed to mirror where there are cells.
        max_words: longer captions are cut, `<end>` included, so that one rambling caption does not stretch a batch.
        augment: crop images a little and change their brightness, contrast and saturation, as `draw` has it.

    Returns a dict with `labels` `(B, K, T)`, padded with -100; either `pixel_values` `(B, 3, H, W)` or `cells`
    `(B, P, C)`; and `index` `(B,)` if rows have one.
    """

    def __init__(
        self,
        processor: Any,
        *,
        cells: np.ndarray | None = None,
        mirror: bool = False,
        mirrored_cells: np.ndarray | None = None,
        max_words: int = 30,
        augment: bool = False,
    ) -> None:
        assert not mirror or (cells is None) == (mirrored_cells is None), "mirrored cells go with cells"
        self.processor = processor
        self.mirror = mirror
        self.mirrored_cells = mirrored_cells
        self.cells = cells
        self.max_words = max_words
        self.augment = augment and cells is None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate rows with `captions` and `image` or `index`, or both."""
        labels = self.processor(text=[row["captions"] for row in rows])["labels"]
        batch = {"labels": labels[..., : self.max_words]}
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        mirrored = torch.tensor([self.mirror and _generator(row).random() < 0.5 for row in rows])
        if self.cells is not None:
            views = (self.cells, self.cells if self.mirrored_cells is None else self.mirrored_cells)
            cells = np.stack([views[flag][row["index"]] for flag, row in zip(mirrored.tolist(), rows, strict=True)])
            return batch | {"cells": torch.from_numpy(cells).float()}
        image_processor = self.processor.image_processor
        if self.augment:
            pixel_values = image_processor([_augmented(row, image_processor) for row in rows])["pixel_values"]
        else:
            pixel_values = read_pixels(rows, image_processor)
        pixel_values[mirrored] = pixel_values[mirrored].flip(-1)
        return batch | {"pixel_values": pixel_values}


LEAST_CROP = 0.8  # share of an image's width, and of its height, that augmentation leaves at least


def _augmented(row: Row, image_processor: CaptionerImageProcessor) -> Image:
    """The image of a row as its draw has it."""
    from torchvision.transforms import v2

    def used_size(width: int, height: int) -> Size:
        """An image of which a part will be resized is used as if it were resized to more."""
        width, height = image_processor.resized_size(width, height)
        return math.ceil(width / LEAST_CROP), math.ceil(height / LEAST_CROP)

    image = open_row(row, used_size=used_size)
    with torch.random.fork_rng(devices=[]):  # what is drawn here is the image's own affair
        torch.manual_seed(int(_generator(row).integers(2**62)))
        sizes = torch.tensor([image.height, image.width]) * (LEAST_CROP + (1 - LEAST_CROP) * torch.rand(2))
        # Mild: what a caption names must stay in sight and keep its colour.
        change_colours = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        return change_colours(v2.RandomCrop(sizes.ceil().int().tolist())(image))


def _generator(row: Row) -> np.random.Generator:
    """What is drawn for an image as it is shown this once."""
    return np.random.default_rng(row["draw"] if "draw" in row else int(torch.randint(2**62, ())))
