"""Encoders: photographs in, a grid of image cells out.

A part is a `torch.nn.Module`, built as `part(name, **kwargs)`, with `hidden_size` (C), `grid_size(height, width)`,
`data_config` and `forward((B, 3, H, W)) -> (B, P, C)`. For trained weights, or where the user knows better what pixels
they want, it is given `pretrained` and `pretrained_cfg_overlay` as `timm.create_model` takes them. It may have

- `grid_box(height, width)`: at which parts of the image its cells look, if not at equal parts of all of it,
- `stages()`, to be trained in part, and `checkpoint_gradients()`, to be trained in little memory.
"""

# B: images, H, W: pixels, P: image cells (rows x columns of the grid), C: channels of a cell

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional

from .modes import in_evaluation
from .registry import Registry

Box = tuple[float, float, float, float]

ENCODERS = Registry("encoders", {"timm": f"{__name__}:TimmEncoder", "timm_pooled": f"{__name__}:PooledTimmEncoder"})

NUM_PROBES = 4  # images of noise by which is measured where cells look


class TimmEncoder(nn.Module):
    """Any timm model whose last features form a grid: CNNs, Swin-like models and ViTs.

    Args:
        name: timm architecture, `"resnet101"` or `"resnet101.a1_in1k"`.
        pretrained: load timm's weights for it, from the Hub or from the file named in
            `pretrained_cfg_overlay={"file": ...}`.
        kwargs: further arguments of `timm.create_model` (`output_stride=16`, `img_size=384`, ...).

    Raises:
        ValueError: timm has no such model, or refuses the arguments.
    """

    def __init__(self, name: str, *, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.name = name
        self.body = _create_body(name, pretrained=pretrained, **kwargs)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._boxes: dict[tuple[int, int], Box] = {}

    @property
    def hidden_size(self) -> int:
        """C, channels of a cell."""
        return int(self.body.num_features)  # type: ignore[arg-type]

    @property
    def data_config(self) -> dict[str, Any]:
        """Timm's own account of the pixels that the weights want: size, crop, interpolation, mean, std."""
        return dict(resolve_model_data_config(self.body))

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid for photographs of `height` x `width` pixels.

        Found once per size by encoding an empty photograph: every architecture rounds in its own way.

        Raises:
            ValueError: the model gives no grid, or can't take photographs of this size.
        """
        size = (height, width)
        if size not in self._grids:
            try:
                parameter = next(self.body.parameters())
                with in_evaluation(self), torch.no_grad():
                    features = self.body.forward_features(parameter.new_zeros(1, 3, height, width))  # type: ignore[operator]
            except (AssertionError, RuntimeError) as e:
                raise ValueError(f"Encoder {self.name!r} can't take images of {height}x{width} pixels: {e}") from e
            self._grids[size] = self._grid_of(features, height, width)
        return self._grids[size]

    def grid_box(self, height: int, width: int) -> Box:
        """Where the grid lies: `(left, top, right, bottom)` in pixels of what the encoder takes.

        The middle of a cell of this box is the middle of what the cell sees. Convolutions of odd width with stride 2
        put it half a step further up and left each time: in a ResNet half a cell in all, in a ViT or ConvNeXt nothing.

        Measured once per size, in the middle of the grid: the centroid of the effective receptive field (Luo et al.
        2016, sec. 2), by the squared gradient of the middle cells for noise.

        Raises:
            ValueError: see `grid_size`.
        """
        size = (height, width)
        if size not in self._boxes:
            rows, columns = self.grid_size(height, width)
            # Pipelines run without gradients.
            with in_evaluation(self), torch.inference_mode(False), torch.enable_grad():
                down, across = self._displacement(height, width, rows, columns)
            self._boxes[size] = (across, down, width + across, height + down)
        return self._boxes[size]

    def _displacement(self, height: int, width: int, rows: int, columns: int) -> tuple[float, float]:
        """How far down and to the right of their places in the image the middle cells look, in pixels."""
        parameter = next(self.body.parameters())
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(NUM_PROBES, 3, height, width, generator=generator).to(parameter).requires_grad_()
        cells = self(pixels).unflatten(1, (rows, columns))  # (B, rows, columns, C)
        if not cells.requires_grad:  # a quantised encoder, say
            return 0.0, 0.0
        middles = [cells[:, row, column] for row in _middle(rows) for column in _middle(columns)]
        energy = torch.zeros(height, width)
        for middle in middles:
            direction = torch.randn(middle.shape, generator=generator).to(middle)
            (gradient,) = torch.autograd.grad(middle, pixels, direction, retain_graph=True)
            energy += gradient.float().square().sum((0, 1)).cpu()
        centroids = []
        for length, along in ((height, energy.sum(1)), (width, energy.sum(0))):
            places = torch.arange(length) + 0.5
            centroids.append(float(along @ places / along.sum()) - length / 2)
        return centroids[0], centroids[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, P, C)`, cells row by row from the top left."""
        # Convolutions take half as long again with channels first, on CPUs and in half precision on GPUs.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.body.forward_features(pixel_values)  # type: ignore[operator]
        if features.ndim == 3:
            return features[:, self._num_prefix_tokens :]  # (B, P, C)
        if self._channels_last(features):
            return features.flatten(1, 2)  # (B, P, C)
        return features.flatten(2).transpose(1, 2)  # (B, P, C)

    def stages(self) -> list[list[nn.Parameter]]:
        """Its parameters from the images to the cells, the stem first, as timm groups them."""
        groups = group_parameters(self.body, self.body.group_matcher(coarse=True))  # type: ignore[operator]
        named = dict(self.body.named_parameters())
        return [[named[name] for name in groups[number]] for number in sorted(groups)]

    def checkpoint_gradients(self) -> None:
        """Keep little of what is computed and compute it again for the gradients.

        Raises:
            ValueError: timm can't with this model.
        """
        try:
            self.body.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError) as e:
            raise ValueError(f"timm's {self.name!r} knows no gradient checkpointing: set it to false.") from e

    @property
    def _num_prefix_tokens(self) -> int:
        return int(getattr(self.body, "num_prefix_tokens", 0))

    def _channels_last(self, features: Tensor) -> bool:
        layout = str(getattr(self.body, "output_fmt", "NCHW")).rpartition(".")[2]
        return layout == "NHWC" and features.shape[-1] == self.hidden_size

    def _grid_of(self, features: Any, height: int, width: int) -> tuple[int, int]:
        if isinstance(features, Tensor) and features.ndim == 4:
            channels_last = self._channels_last(features)
            grid = tuple(features.shape[1:3]) if channels_last else tuple(features.shape[2:4])
            channels = features.shape[-1 if channels_last else 1]
        elif isinstance(features, Tensor) and features.ndim == 3:
            num_cells, channels = features.shape[1] - self._num_prefix_tokens, features.shape[2]
            # Tokens lose the grid's shape; square photographs give square grids, others keep their ratio.
            rows = round(math.sqrt(num_cells * height / width))
            grid = (rows, num_cells // max(rows, 1))
            if rows * grid[1] != num_cells:
                channels = -1
        else:
            channels = -1
        if channels != self.hidden_size:
            raise ValueError(
                f"Encoder {self.name!r} gives no grid of image cells (its features are "
                f"{_shape_of(features)}). Choose a timm CNN, Swin-like model or ViT, such as 'resnet101'."
            )
        return int(grid[0]), int(grid[1])


class PooledTimmEncoder(TimmEncoder):
    """Cells of a timm model, averaged or spread to a grid of the same size for all images.

    Args:
        name: timm architecture.
        pooled_size: rows, and columns, of the grid.
        kwargs: see `TimmEncoder`.

    Raises:
        ValueError: no rows, or see `TimmEncoder`.
    """

    def __init__(self, name: str, *, pooled_size: int = 14, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        if pooled_size < 1:
            raise ValueError(f"pooled_size is {pooled_size}, but a grid has at least 1 row.")
        self.pooled_size = pooled_size

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid, whatever the size of the image; see `TimmEncoder`."""
        super().grid_size(height, width)
        return self.pooled_size, self.pooled_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, P, C)`, cells row by row from the top left."""
        height, width = pixel_values.shape[-2:]
        grid = super().grid_size(height, width)
        features = super().forward(pixel_values).transpose(1, 2).unflatten(2, grid)  # (B, C, rows, columns)
        return functional.adaptive_avg_pool2d(features, self.pooled_size).flatten(2).transpose(1, 2)


def _middle(count: int) -> range:
    """The one or two in the middle of `count` cells."""
    return range((count - 1) // 2, count // 2 + 1)


def _create_body(name: str, **kwargs: Any) -> nn.Module:
    try:
        # num_classes=0: the classifier would be saved and never used.
        return timm.create_model(name, num_classes=0, **kwargs)
    except RuntimeError as e:
        if "Unknown model" not in str(e):
            raise
        similar = timm.list_models(f"*{name.split('.')[0].rstrip('0123456789')}*")[:5]
        hint = f" Similar: {', '.join(similar)}." if similar else ""
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}.{hint} See timm.list_models() for all names."
        ) from e
    except TypeError as e:
        raise ValueError(f"timm's {name!r} refuses the arguments {kwargs}: {e}. Check encoder_kwargs.") from e


def _shape_of(features: Any) -> str:
    return str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
