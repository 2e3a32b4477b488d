"""The image processor of a captioner: timm's evaluation transform for images of any kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
from transformers.processing_utils import ImagesKwargs

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


class CaptionerImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of `CaptionerImageProcessor`, which a call and `from_pretrained` may override."""

    interpolation: str
    crop_pct: float
    crop_mode: str


SWITCHES = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
}
SETTINGS = ("size", "interpolation", "crop_pct", "crop_mode", "image_mean", "image_std", *SWITCHES)


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
        kwargs: Any of transformers' `do_resize` (if false, images are only cropped or padded to `size`), `do_rescale`,
            `rescale_factor`, `do_normalize`, `do_convert_rgb` and `resample`, Pillow's number for `interpolation`.

    Raises:
        ValueError: An argument is out of its range, or is one of transformers' that this image processor lacks.
    """

    valid_kwargs = CaptionerImageProcessorKwargs
    do_resize: bool | None = True
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = True
    do_convert_rgb: bool | None = True

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
        if (resample := kwargs.pop("resample", None)) is not None:
            interpolation = Image.Resampling(resample).name.lower()
        if lacking := [name for name in ImagesKwargs.__annotations__ if kwargs.get(name) and name not in SWITCHES]:
            raise ValueError(
                f"{lacking[0]} is no argument of a captioner's image processor; it has {', '.join(SETTINGS)}."
            )
        # Those that are as usual are attributes of the class, so that files hold what is special alone.
        usual = [name for name, value in SWITCHES.items() if name in kwargs and kwargs[name] == value]
        super().__init__(**{name: value for name, value in kwargs.items() if name not in usual})
        self.size = _as_size(size)
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
        """Return timm's resize, or one that leaves sizes alone, and the colour with which it pads."""
        size = self.size["height"], self.size["width"]
        if not self.do_resize:
            return lambda image: image, (0, 0, 0)
        resize, crop = _eval_transform(size, self.crop_pct, self.crop_mode, tuple(self.image_mean))
        return resize, tuple(getattr(crop, "fill", (0, 0, 0)))

    def resized_size(self, width: int, height: int) -> Size:
        """Return the width and height to which an upright image of this size is resized before the crop."""
        if not self.do_resize:
            return width, height
        return _resized_size(self._resize_and_padding()[0], width, height)

    def preprocess(
        self, images: ImageSource | Sequence[ImageSource], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Open images and turn them into pixel values.

        Args:
            images: One image, a list or a generator of them, each of any kind that `open_image` reads and of any size.
                Arrays and tensors may have their channels first or last, and four dimensions for several images.
                Floating-point ones range from 0 to 255, or with `do_rescale=False` from 0 to 1.
            return_tensors: `"pt"` or `"np"`.
            kwargs: Arguments of this class for this call alone; `input_data_format` of arrays and tensors and
                `data_format` of the pixel values, `"channels_first"` or `"channels_last"`; `device`.

        Returns:
            `pixel_values` `(B, 3, H, W)`, float32.

        Raises:
            TypeError: There is an unknown argument.
            ValueError: There are no images, or one is not readable; see `open_image` for its other errors.
        """
        given: Any = images
        is_stream = isinstance(given, Iterator) and not hasattr(given, "read")  # which open files have
        sources: list[Any] = list(given) if isinstance(given, list | tuple) or is_stream else [given]
        if not sources:
            raise ValueError("images is empty; give at least one image.")
        layout, output_layout, device = (
            kwargs.pop(name, None) for name in ("input_data_format", "data_format", "device")
        )
        kwargs.pop("disable_grouping", None)  # which is about speed alone
        if unknown := kwargs.keys() - CaptionerImageProcessorKwargs.__annotations__.keys():
            raise TypeError(f"A captioner's image processor has no argument {min(unknown)!r}.")
        used = self
        if kwargs := {name: value for name, value in kwargs.items() if value is not None}:
            used = type(self)(**{**{name: getattr(self, name) for name in SETTINGS}, **kwargs})
        arrays = [array for source in sources for array in _as_arrays(source, layout)]
        pixel_values = used._read_arrays(arrays)
        if str(getattr(output_layout, "value", output_layout)) == "channels_last":
            pixel_values = pixel_values.permute(0, 2, 3, 1)
        return BatchFeature({"pixel_values": pixel_values.to(device)}, tensor_type=return_tensors)

    def _read_arrays(self, sources: list[Any]) -> Tensor:
        """Return pixel values of images, some of which may be arrays of any numbers, with all settings."""
        if not self.do_convert_rgb and (
            other := [found for found in map(_mode, sources) if found not in (None, "RGB")]
        ):
            raise ValueError(f"do_convert_rgb is False, but an image is {other[0]}, and a captioner takes RGB.")
        floats = [isinstance(source, np.ndarray) and source.dtype.kind == "f" for source in sources]
        if not self.do_rescale and any(floats) != all(floats):
            raise ValueError("do_rescale is False for images of floats and others together; give them apart.")
        pixel_values, _ = self.read([_as_bytes(source, bool(self.do_rescale)) for source in sources])
        # What `read` returns is (x / 255 - mean) / std.
        factor = float(self.rescale_factor) if self.do_rescale else 1 / 255 if all(floats) else 1.0
        is_usual = factor == 1 / 255 and self.do_normalize
        if is_usual:
            return pixel_values
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        levels = ((pixel_values * std + mean) * 255).round()
        return (levels * factor - mean) / std if self.do_normalize else levels * factor

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


def _as_size(size: Any) -> dict[str, int]:
    """Return a size given as a dict, as one edge of a square or as height and width, as a dict."""
    if size is None:
        return {"height": 224, "width": 224}
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    return dict(size) if isinstance(size, Mapping) else {}


def _as_arrays(source: Any, layout: Any) -> list[Any]:
    """Return the images of a source: arrays `(H, W)` or `(H, W, C)` of an array or a tensor, or else the source."""
    is_tensor = isinstance(source, Tensor)
    if is_tensor:
        source = source.detach().cpu().numpy()
    if not isinstance(source, np.ndarray) or source.ndim not in (3, 4):
        return [source]
    images = list(source) if source.ndim == 4 else [source]
    layout = str(getattr(layout, "value", layout))
    first, last = (images[0].shape[axis] in (1, 3, 4) for axis in (0, 2)) if images else (False, False)
    is_first = (
        first and (is_tensor or not last)
        if layout not in ("channels_first", "channels_last")
        else layout == "channels_first"
    )
    images = [image.transpose(1, 2, 0) if is_first else image for image in images]
    return [image[..., 0] if image.shape[2] == 1 else image for image in images]


def _as_bytes(source: Any, do_rescale: bool) -> Any:
    """Return an array of other numbers as one of levels from 0 to 255, if that is what they are.

    Raises:
        ValueError: They have another range.
    """
    if not isinstance(source, np.ndarray) or source.dtype.kind not in "if" or not source.size:
        return source
    is_float, low, high = source.dtype.kind == "f", float(source.min()), float(source.max())
    largest = 1 if is_float and not do_rescale else 255
    if not (low >= 0 and high <= largest) or (is_float and do_rescale and 0 < high <= 1):
        raise ValueError(
            f"An image of {source.dtype} ranges from {low:g} to {high:g}; give 0 to 255, or floats from 0 to 1 with "
            "do_rescale=False."
        )
    return (source * (255 // largest)).round().astype(np.uint8)


def _mode(source: Any) -> str | None:
    """Return the mode of an image that is open, or the number of channels of an array; None for files."""
    if isinstance(source, np.ndarray):
        return "RGB" if source.ndim == 3 and source.shape[2] == 3 else f"an array {source.shape}"
    return source.mode if isinstance(source, Image.Image) else None
