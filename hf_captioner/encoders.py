"""Encoders: photographs in, a grid of image cells out.

A part is a `torch.nn.Module` with `hidden_size` (C), `grid_size(height, width)`, `data_config` and
`forward((B, 3, H, W)) -> (B, P, C)`. To be trained in part it needs `stages()` too, and `checkpoint_gradients()` to be
trained in little memory.
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

from .registry import Registry

ENCODERS = Registry("encoders", {"timm": f"{__name__}:TimmEncoder"})


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
            was_training = self.training
            self.eval()  # batch statistics must not see the empty photograph
            try:
                parameter = next(self.body.parameters())
                with torch.no_grad():
                    features = self.body.forward_features(parameter.new_zeros(1, 3, height, width))  # type: ignore[operator]
            except (AssertionError, RuntimeError) as e:
                raise ValueError(f"Encoder {self.name!r} can't take images of {height}x{width} pixels: {e}") from e
            finally:
                self.train(was_training)
            self._grids[size] = self._grid_of(features, height, width)
        return self._grids[size]

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
