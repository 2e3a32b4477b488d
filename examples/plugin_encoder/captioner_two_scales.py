"""Image cells of the last two stages of a timm CNN, side by side: coarse features and finer ones."""

import math

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional


class TwoScaleEncoder(nn.Module):
    """A timm CNN whose cells have the features of the last stage, and those of the stage before pooled to its grid."""

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(-2, -1), **kwargs)

    @property
    def hidden_size(self) -> int:
        """Number of channels of both stages together."""
        return sum(self.body.feature_info.channels())

    @property
    def data_config(self) -> dict[str, object]:
        """Size, normalisation and interpolation of the pixels that the weights were trained on."""
        return resolve_model_data_config(self.body)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the grid for images of `height` x `width` pixels."""
        stride = self.body.feature_info.reduction()[-1]
        return math.ceil(height / stride), math.ceil(width / stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images `(B, 3, H, W)` as cells `(B, P, C)`, row by row from the top left."""
        fine, coarse = self.body(pixel_values)
        fine = functional.adaptive_avg_pool2d(fine, coarse.shape[-2:])
        return torch.cat([fine, coarse], 1).flatten(2).transpose(1, 2)
