"""Cells of two stages of a timm CNN side by side: what is there, and how it looks from close by."""

import math

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional


class TwoScaleEncoder(nn.Module):
    """The last stage decides the grid; the one before is pooled to it."""

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(-2, -1), **kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of both stages."""
        return sum(self.body.feature_info.channels())

    @property
    def data_config(self) -> dict[str, object]:
        """What timm says of the pixels."""
        return resolve_model_data_config(self.body)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns."""
        stride = self.body.feature_info.reduction()[-1]
        return math.ceil(height / stride), math.ceil(width / stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, P, C)`."""
        fine, coarse = self.body(pixel_values)
        fine = functional.adaptive_avg_pool2d(fine, coarse.shape[-2:])
        return torch.cat([fine, coarse], 1).flatten(2).transpose(1, 2)
