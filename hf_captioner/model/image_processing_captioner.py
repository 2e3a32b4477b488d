"""The image processor of a captioner: timm's evaluation transform for images of any kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

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

from .images import Box, ImageSource, OpenedImage, Size, open_as_used
from .pixels import (
    PIXELS_AT_ONCE,
    Crop,
    PixelTransform,
    check_settings,
    resize_and_crop,
    shortened_strip,
    visible_box,
    write_pixels,
)

# B: images, H: height, W: width

_TORCH_FILTERS = ("bilinear", "bicubic")
# If the crop keeps at least this fraction of the image, torch resizes the whole faster than Pillow a part.
_LEAST_KEPT = 0.4


# Cached outside the processor, because all attributes of a processor are saved as JSON.
@functools.lru_cache(maxsize=16)
def _eval_transform(
    size: tuple[int, int], crop_pct: float, crop_mode: str, mean: tuple[float, ...]
) -> tuple[Callable[[Tensor], Tensor], Any]:
    """Return the first two steps of timm's evaluation transform: the resize, and the crop or padding."""
    # The resize is used to compute sizes only, without pixels, for which torchvision needs a usual interpolation.
    transform = create_transform(
        (3, *size), interpolation="bilinear", crop_pct=crop_pct, crop_mode=crop_mode, mean=mean
    )
    return transform.transforms[0], transform.transforms[1]


@functools.lru_cache(maxsize=1024)
def _resized_size(resize: Any, width: int, height: int) -> Size:
    try:
        resized = resize(torch.empty(3, height, width, device="meta"))  # has a shape and no pixels
    except RuntimeError:  # crop mode "border" fits the longer edge and rounds the shorter one of a strip to 0 pixels
        ratio = max(width / resize.size[1], height / resize.size[0])
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    return resized.shape[2], resized.shape[1]


def _resize_and_crop(image: Image.Image, size: Size, crop: Crop, interpolation: str) -> np.ndarray:
    """Do the same as `pixels.resize_and_crop`, with torch's antialiasing filters where they are faster.

    Torch uses vector instructions that Pillow's wheels do not, which is at least twice as fast. Its filter weights have
    16 bits, which changes a few pixels by a level of 255. It always resizes horizontally first, where Pillow may begin
    vertically: in noise, which bicubic interpolation overshoots, this changes pixels by many levels. It resizes the
    whole image: if most of the image is cropped away, as from a panorama, Pillow does less work and needs less memory.
    """
    left, top, right, bottom = crop
    kept = (right - left) * (bottom - top) / (size[0] * size[1])
    if interpolation not in _TORCH_FILTERS or kept < _LEAST_KEPT:
        return resize_and_crop(image, size, crop, interpolation)
    image = shortened_strip(image, size, interpolation)
    num_rows = PIXELS_AT_ONCE // image.width
    if num_rows >= image.height:
        pixels = _pixels(image)
    else:  # The same numbers, without a copy of a large image: the horizontal resize comes first anyway.
        tops = range(0, image.height, max(1, num_rows))
        parts = (_pixels(image.crop((0, top, image.width, min(top + tops.step, image.height)))) for top in tops)
        resized_parts = [
            interpolate(part, (part.shape[2], size[0]), mode=interpolation, antialias=True) for part in parts
        ]
        pixels = torch.cat(resized_parts, 2)
    resized = interpolate(pixels, size[::-1], mode=interpolation, antialias=True)
    return resized[0, :, top:bottom, left:right].permute(1, 2, 0).numpy()


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)


class CaptionerImagesKwargs(TypedDict, total=False):
    """Arguments of `CaptionerImageProcessor`, which `from_pretrained` may override."""

    size: dict[str, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    image_mean: list[float]
    image_std: list[float]


class CaptionerImageProcessor(BaseImageProcessor):
    """Turn images into pixel values with the evaluation transform of a timm model.

    Args:
        size: `{"height": H, "width": W}` of the pixel values.
        interpolation: One of `pixels.INTERPOLATIONS`.
        crop_pct: Fraction above 0, usually at most 1. The image is resized to `size / crop_pct`, then its centre of
            `size` is cropped.
        crop_mode: `"center"` fits the shorter edge and crops the ends of the longer one, `"squash"` fits both edges
            and changes the aspect ratio, `"border"` fits the longer edge and pads the shorter one.
        image_mean: Mean of red, green and blue on the scale from 0 to 1, which is subtracted.
        image_std: Standard deviation of the three, by which they are divided.

    Raises:
        ValueError: An argument is out of its range.
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
        self.size = {"height": 224, "width": 224} if size is None else dict(size) if isinstance(size, Mapping) else {}
        self.interpolation, self.crop_pct, self.crop_mode = interpolation, crop_pct, crop_mode
        if self.size.keys() != {"height", "width"}:
            raise ValueError(f'size is {size}; give {{"height": H, "width": W}} in pixels.')
        edges = [self.size["height"], self.size["width"]]
        check_settings(edges, interpolation, crop_pct, crop_mode, image_mean, image_std)
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def from_data_config(cls, data_config: Mapping[str, Any]) -> CaptionerImageProcessor:
        """Build the processor with which a timm model was evaluated, from `timm.data.resolve_model_data_config(model)`.

        Raises:
            ValueError: A key is missing, or the model does not take three channels.
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
        size, mean, std = {"height": height, "width": width}, data_config["mean"], data_config["std"]
        others = {name: data_config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
        return cls(size, image_mean=mean, image_std=std, **others)

    def _resize_and_padding(self) -> tuple[Callable[[Tensor], Tensor], tuple[int, int, int]]:
        """Return timm's resize, and the colour with which it pads."""
        size = self.size["height"], self.size["width"]
        resize, crop = _eval_transform(size, self.crop_pct, self.crop_mode, tuple(self.image_mean))
        return resize, tuple(getattr(crop, "fill", (0, 0, 0)))

    def resized_size(self, width: int, height: int) -> Size:
        """Return the width and height to which an upright image of this size is resized before the crop."""
        return _resized_size(self._resize_and_padding()[0], width, height)

    def preprocess(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Open images and turn them into pixel values.

        Args:
            images: One image, a list or a generator of them, each of any kind that `open_image` reads and of any size.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `pixel_values` `(B, 3, H, W)`, float32.

        Raises:
            ValueError: There are no images, or one is not readable; see `open_image` for its other errors.
        """
        given: Any = images
        is_stream = isinstance(given, Iterator) and not hasattr(given, "read")  # which open files have
        sources: list[Any] = list(given) if isinstance(given, list | tuple) or is_stream else [given]
        if not sources:
            raise ValueError("images is empty; give at least one image.")
        pixel_values, _ = self.read(sources)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def read(
        self, sources: Sequence[Any], open_source: Callable[[Any], OpenedImage] | None = None
    ) -> tuple[Tensor, list[Size]]:
        """Read pixel values `(B, 3, H, W)` of images, and their full sizes. Pipeline, training and evaluation use it.

        The pixel values are those of timm's evaluation transform, but for small differences from decoding large JPEG
        files at reduced size (see `images.REDUCTION_GAP`) and from faster filters (see `_resize_and_crop`). Each source
        is opened by `open_source`, which calls `open`; `open` itself is the default.
        """
        padding, mean, std = self._resize_and_padding()[1], self.image_mean, self.image_std
        transform = PixelTransform(self.resized_size, self.interpolation, padding, mean, std, _resize_and_crop)
        pixel_values = self._empty(len(sources))
        sizes = write_pixels(pixel_values.numpy(), map(open_source or self.open, sources), transform)
        return pixel_values, sizes

    def open(self, source: ImageSource) -> OpenedImage:
        """Open an image for `read`: a large JPEG file may be decoded at reduced size. For errors see `open_image`."""
        return open_as_used(source, self.resized_size)

    def _empty(self, num_images: int) -> Tensor:
        """Return an uninitialised tensor `(B, 3, H, W)`, in a DataLoader's worker in the shared memory of batches."""
        shape = (num_images, 3, self.size["height"], self.size["width"])
        if get_worker_info() is None:
            return torch.empty(shape)
        num_bytes = math.prod(shape) * torch.float32.itemsize
        storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")
        return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]

    def visible_box(self, width: int, height: int, part: Box | None = None) -> Box:
        """Return the box of an image, upright after its EXIF rotation, that the model sees, to draw attention maps on.

        The box is `(left, top, right, bottom)` in pixels of the image, where (0, 0) is the upper left corner of its
        first pixel. It exceeds the image where the model sees padding. `part` is such a box in the pixel values, as an
        encoder's `grid_box`; by default all of them.
        """
        size = (self.size["width"], self.size["height"])
        return visible_box((width, height), self.resized_size(width, height), size, part)
