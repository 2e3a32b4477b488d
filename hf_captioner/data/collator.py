"""Collation of rows of a captioned data set into batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.nn import functional
from torchvision.transforms import v2

from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.images import Size
from ..model.objectives import IGNORED, words_before
from .rows import Row, open_row, read_pixels

MIN_CROP = 0.8  # smallest fraction of an image's width, and of its height, that augmentation keeps


class CaptionCollator:
    """Collates rows into a batch that contains every image once, with all its captions.

    Rows are best left undecoded (`undecoded`), so that a large JPEG can be opened at reduced size.

    Random augmentation of an image depends on `row["random_seed"]`, which `loading.StepLoader` adds, or without it on
    torch's global generator.

    Args:
        processor: `CaptionerProcessor`.
        cells: Cells that were computed earlier, `(images, P, C)`. Images then stay unopened, and rows need `index`.
            With `from_stage`, what enters that stage of the encoder, `(images, …)`.
        mirror: Whether to mirror each image left to right with probability 0.5.
        mirrored_cells: The same of the mirrored images; required for mirroring with `cells`.
        from_stage: Stage of the encoder that reads `cells`; None if they are image cells, which the decoder reads.
        max_words: Largest number of tokens of a caption, `<end>` included. Longer captions are cut, since a single
            very long one would lengthen the whole batch.
        pad_to_longest: Whether to pad labels to the longest caption of the batch only, which saves some work. By
            default they are `max_words + 1` long, as long as what `generate()` returns, since transformers' trainers
            can put batches together only if several captions of an image are equally long everywhere.
        read_words: Whether to add the words that are read before the labels. A model makes them from the labels, which
            transformers' Trainer keeps from it if it has a `label_smoothing_factor` or a `compute_loss_func`.
        augment: Whether to crop images slightly and to change their brightness, contrast and saturation. It has no
            effect on `cells`.

    Returns:
        A batch with `labels` `(B, K, T)`, padded with -100; `decoder_input_ids` likewise, unless `read_words` is False;
        either `pixel_values` `(B, 3, H, W)`, `cells` `(B, P, C)` or `stage_inputs` `(B, …)` and the number
        `from_stage`; and `index` `(B,)` if rows have it.
    """

    def __init__(
        self,
        processor: Any,
        *,
        cells: np.ndarray | None = None,
        mirror: bool = False,
        mirrored_cells: np.ndarray | None = None,
        from_stage: int | None = None,
        max_words: int = 30,
        pad_to_longest: bool = False,
        read_words: bool = True,
        augment: bool = False,
    ) -> None:
        assert not mirror or (cells is None) == (mirrored_cells is None), "mirrored cells go with cells"
        self.processor, self.max_words, self.augment = processor, max_words, augment and cells is None
        self.pad_to_longest, self.read_words = pad_to_longest, read_words
        self.cells, self.mirror, self.mirrored_cells = cells, mirror, mirrored_cells
        self.from_stage = from_stage

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Collate rows with `captions` and `image`, or with `captions` and `index`.

        Raises:
            ValueError: Rows have no such fields, an image can't be read, or a caption has no words.
        """
        needed = {"captions", "image" if self.cells is None else "index"}
        if missing := needed.difference(*rows[:1]):
            found = ", ".join(rows[0] if rows else []) or "nothing"
            raise ValueError(
                f"Rows have no {' and no '.join(sorted(missing))}, but {found}. Set remove_unused_columns=False in the "
                "arguments of a Trainer."
            )
        labels = self.processor(text=[row["captions"] for row in rows])["labels"][..., : self.max_words]
        if not self.pad_to_longest:
            labels = functional.pad(labels, (0, self.max_words + 1 - labels.shape[-1]), value=IGNORED)
        batch: dict[str, Any] = {"labels": labels}
        if self.read_words:
            tokenizer = self.processor.tokenizer
            words = words_before(labels.flatten(0, 1), tokenizer.bos_token_id, tokenizer.pad_token_id)
            batch["decoder_input_ids"] = words.view_as(labels)
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        is_mirrored = torch.tensor([self.mirror and _row_generator(row).random() < 0.5 for row in rows])
        if self.cells is not None:
            views = (self.cells, self.cells if self.mirrored_cells is None else self.mirrored_cells)
            cells = [views[flag][row["index"]] for flag, row in zip(is_mirrored.tolist(), rows, strict=True)]
            features = torch.from_numpy(np.stack(cells)).float()
            if self.from_stage is None:
                return batch | {"cells": features}
            return batch | {"stage_inputs": features, "from_stage": self.from_stage}
        image_processor = self.processor.image_processor
        if self.augment:
            pixel_values = image_processor([_augment(row, image_processor) for row in rows])["pixel_values"]
        else:
            pixel_values = read_pixels(rows, image_processor)
        pixel_values[is_mirrored] = pixel_values[is_mirrored].flip(-1)
        return batch | {"pixel_values": pixel_values}


def _augment(row: Row, image_processor: CaptionerImageProcessor) -> Image:
    """Open the image of a row, crop it and change its colours at random."""

    def used_size(width: int, height: int) -> Size:
        # What the crop leaves is resized to `resized_size`, so the whole image must be larger than that.
        width, height = image_processor.resized_size(width, height)
        return math.ceil(width / MIN_CROP), math.ceil(height / MIN_CROP)

    image = open_row(row, used_size=used_size)
    with torch.random.fork_rng(devices=[]):  # leaves torch's global generator as it was
        torch.manual_seed(int(_row_generator(row).integers(2**62)))
        sizes = torch.tensor([image.height, image.width]) * (MIN_CROP + (1 - MIN_CROP) * torch.rand(2))
        # Mild: what a caption names must stay visible and keep its colour.
        change_colours = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        return change_colours(v2.RandomCrop(sizes.ceil().int().tolist())(image))


def _row_generator(row: Row) -> np.random.Generator:
    """Return a random-number generator for the augmentation of a row."""
    return np.random.default_rng(row["random_seed"] if "random_seed" in row else int(torch.randint(2**62, ())))
