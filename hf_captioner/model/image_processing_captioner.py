"""Photographs in, pixels out: timm's own evaluation transform for images of any kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .images import Box, ImageSource, OpenedImage, Size, open_as_used, resize_and_crop, visible_box, write_pixels

# B: images, H: height, W: width

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_TORCH_FILTERS = ("bilinear", "bicubic")
_LEAST_KEPT = 0.4  # share of a resized image that a crop keeps, from which on it is faster to resize all by torch


# Cached outside the processor, which is saved as JSON.
@functools.lru_cache(maxsize=16)
def _eval_transform(
    size: tuple[int, int], crop_pct: float, crop_mode: str, mean: tuple[float, ...]
) -> tuple[Callable[[Tensor], Tensor], Any]:
    """How timm resizes, and how it crops or pads."""
    # What it resizes here is a shape alone, which some interpolations would refuse.
    transform = create_transform(
        (3, *size), interpolation="bilinear", crop_pct=crop_pct, crop_mode=crop_mode, mean=mean
    )
    return transform.transforms[0], transform.transforms[1]


@functools.lru_cache(maxsize=1024)
def _resized_size(resize: Callable[[Tensor], Tensor], width: int, height: int) -> Size:
    resized = resize(torch.empty(3, height, width, device="meta"))  # computed without pixels
    return resized.shape[2], resized.shape[1]


def _resize_and_crop(image: Image.Image, size: Size, crop: tuple[int, int, int, int], interpolation: str) -> np.ndarray:
    """`images.resize_and_crop`, where it can by torch's antialiasing filters.

    They use vector instructions where Pillow's wheels have none, which is twice as fast or more. Their weights have 16
    bits, which is a level of 255 here and there, and they always go across first, where Pillow may go upright first:
    in noise, which bicubic overshoots, that can be many levels. They resize the whole image: where most of it is
    cropped away, as from a panorama, Pillow's way is less work, and takes no memory for what nobody sees.
    """
    left, top, right, bottom = crop
    kept = (right - left) * (bottom - top) / (size[0] * size[1])
    if interpolation not in _TORCH_FILTERS or kept < _LEAST_KEPT:
        return resize_and_crop(image, size, crop, interpolation)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = interpolate(pixels, size[::-1], mode=interpolation, antialias=True)
    return resized[0, :, top:bottom, left:right].permute(1, 2, 0).numpy()


class CaptionerImagesKwargs(TypedDict, total=False):
    """What `from_pretrained` may override: the arguments of `CaptionerImageProcessor`."""

    size: dict[str, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    image_mean: list[float]
    image_std: list[float]


class CaptionerImageProcessor(BaseImageProcessor):
    """Turns images into pixel values with the evaluation transform of a timm model.

    Args:
        size: `{"height": H, "width": W}` of the pixels that the model gets.
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: the image is resized to `size / crop_pct`, then its centre of `size` is taken. Above 0.
        crop_mode: `"center"` fits the shorter edge and loses the ends of the longer one, `"squash"` fits both
            edges and loses the aspect ratio, `"border"` fits the longer edge and pads the shorter one.
        image_mean: mean of red, green and blue on the scale from 0 to 1, subtracted.
        image_std: standard deviation of the three, divided by.

    Raises:
        ValueError: an argument is out of its range.
    """

    valid_kwargs = CaptionerImagesKwargs  # type: ignore[assignment]

    def __init__(
        self,
        size: Mapping[str, int] | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = DEFAULT_CROP_PCT,
        crop_mode: str = "center",
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"height": 224, "width": 224} if size is None else dict(size)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.crop_mode = crop_mode
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self._check()

    def _check(self) -> None:
        if self.size.keys() != {"height", "width"} or min(self.size.values()) < 1:
            raise ValueError(f'size is {self.size}; give {{"height": H, "width": W}} in pixels.')
        # timm takes an unknown crop mode for "center".
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode is {self.crop_mode!r}; choose from {', '.join(CROP_MODES)}.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; choose from {', '.join(INTERPOLATIONS)}.")
        if self.crop_pct <= 0:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0, and is at most 1 as a rule.")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}; give three numbers each, "
                "for red, green and blue, and deviations above 0."
            )

    @classmethod
    def from_data_config(cls, data_config: Mapping[str, Any]) -> CaptionerImageProcessor:
        """Build the processor that a timm model was evaluated with.

        Args:
            data_config: what `timm.data.resolve_model_data_config(model)` returns.

        Raises:
            ValueError: a key is missing, or the model does not take three channels.
        """
        keys = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
        if missing := keys - data_config.keys():
            raise ValueError(
                f"data_config has no {', '.join(sorted(missing))}; give it as "
                "timm.data.resolve_model_data_config(model) returns it."
            )
        channels, height, width = data_config["input_size"]
        if channels != 3:
            raise ValueError(f"The model takes {channels} channels; choose an encoder that takes 3, for RGB.")
        return cls(
            size={"height": height, "width": width},
            interpolation=data_config["interpolation"],
            crop_pct=data_config["crop_pct"],
            crop_mode=data_config["crop_mode"],
            image_mean=data_config["mean"],
            image_std=data_config["std"],
        )

    def _geometry(self) -> tuple[Callable[[Tensor], Tensor], Any]:
        size = self.size["height"], self.size["width"]
        return _eval_transform(size, self.crop_pct, self.crop_mode, tuple(self.image_mean))

    def resized_size(self, width: int, height: int) -> Size:
        """Width and height to which an upright image of so many pixels is resized, before it is cropped or padded."""
        return _resized_size(self._geometry()[0], width, height)

    def preprocess(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Open images and turn them into pixel values.

        Args:
            images: one image or a list of them, each anything that `open_image` reads, of any size.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `pixel_values` `(B, 3, H, W)`, float32.

        Raises:
            ValueError: there are no images, or one is not readable; see `open_image` for its other errors.
        """
        sources = images if isinstance(images, list | tuple) else [cast(ImageSource, images)]
        if not sources:
            raise ValueError("images is empty; give at least one image.")
        pixel_values = self.empty(len(sources))
        self.write(map(self.open, sources), pixel_values)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def empty(self, num_images: int) -> Tensor:
        """Room for the pixel values `(B, 3, H, W)` of so many images, to be filled by `write`.

        In a worker of a DataLoader it is in shared memory, where the batch would be copied to otherwise.
        """
        shape = (num_images, 3, self.size["height"], self.size["width"])
        if get_worker_info() is None:
            return torch.empty(shape)
        num_bytes = math.prod(shape) * torch.float32.itemsize
        storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")
        return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]

    def open(self, source: ImageSource) -> OpenedImage:
        """Open an image to `write` its pixel values: a large JPEG file may be decoded at reduced size.

        Raises:
            ValueError: it is not readable; see `open_image` for its other errors.
        """
        return open_as_used(source, self.resized_size)

    def write(self, images: Iterable[OpenedImage], pixel_values: Tensor) -> None:
        """Write the pixel values of images.

        This is timm's evaluation transform, but for what saves time and changes little (see `_resize_and_crop`, and
        `images.REDUCTION_GAP`).

        Args:
            images: what `open` returns of B images, asked for as they are needed.
            pixel_values: `(B, 3, H, W)` on the CPU, overwritten.
        """
        padding: Any = getattr(self._geometry()[1], "fill", (0, 0, 0))
        write_pixels(
            pixel_values.numpy(),
            images,
            self.resized_size,
            self.interpolation,
            tuple(padding),
            self.image_mean,
            self.image_std,
            _resize_and_crop,
        )

    def visible_box(self, width: int, height: int, part: Box | None = None) -> Box:
        """Where in the original image lies what the model sees, to draw attention maps on the original.

        Args:
            width: width of the upright original (after EXIF rotation) in pixels.
            height: its height in pixels.
            part: `(left, top, right, bottom)` of the part asked for, in pixels of what the processor gives, such as
                an encoder's `grid_box`; None for all.

        Returns:
            `(left, top, right, bottom)` in pixels of the original, (0, 0) being the upper left corner of its
            first pixel. The box exceeds the image where the model sees padding.
        """
        size = (self.size["width"], self.size["height"])
        return visible_box((width, height), self.resized_size(width, height), size, part)
