"""Contract test for authors of encoders: `check_encoder` checks preprocessing, grid, cells and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.encoders import ENCODERS
from ..model.image_processing_captioner import CaptionerImageProcessor
from .captioner import check_captioner
from .rules import B, noise, require, require_close, require_shape, seeded


@seeded
def check_encoder(
    part: Callable[..., nn.Module], encoder_name: str = "", *, image_size: tuple[int, int] | None = None, **kwargs: Any
) -> None:
    """Check that an encoder keeps the contract in `model/encoders.py`.

    Args:
        part: The class or function that `ENCODERS` would hold.
        encoder_name: Architecture, as in `encoder_name` of the configuration.
        image_size: Height and width of images in pixels; by default those of the encoder's `data_config`.
        kwargs: Further arguments of the part, as in `encoder_kwargs`.

    Raises:
        AssertionError: The part breaks the rule that the message names.
    """
    encoder: Any = part(encoder_name, **kwargs)
    channels: Any = getattr(encoder, "hidden_size", None)
    require(isinstance(channels, int) and channels > 0, "hidden_size is the number of channels of a cell", channels)
    try:
        CaptionerImageProcessor.from_data_config(encoder.data_config)
        height, width = image_size or encoder.data_config["input_size"][1:]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise AssertionError(f"Contract broken: data_config says what pixels the encoder wants. Found: {e!r}.") from e
    rows, columns = _grid_size(encoder, height, width)
    pixels = noise(B, 3, height, width).float()
    with torch.no_grad():
        _check_cells(encoder.eval(), pixels, rows, columns)
    if hasattr(encoder, "grid_box"):
        left, top, right, bottom = encoder.grid_box(height, width)
        require(left < right and top < bottom, "grid_box is (left, top, right, bottom)", (left, top, right, bottom))
    _check_gradients(encoder.train(), pixels)
    check_captioner(ENCODERS, part, kwargs, pixels, encoder_name=encoder_name)


def _grid_size(encoder: Any, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of the grid; check that computing them does not change the encoder."""
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    grid = encoder.train().grid_size(height, width)
    is_grid = isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
    require(is_grid, "grid_size(height, width) is (rows, columns)", grid)
    require(encoder.training, "grid_size leaves the mode of the encoder, training or evaluation, as it was")
    is_same = all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    require(is_same, "grid_size changes neither weights nor statistics")
    return grid


def _check_cells(encoder: Any, pixels: Tensor, rows: int, columns: int) -> None:
    """Check the shape and order of cells, and that the cells of an image depend on it alone."""
    cells = encoder(pixels)
    shape = B, rows * columns, encoder.hidden_size
    require_shape(cells, shape, "cells are (B, P, C): rows x columns of grid_size, hidden_size wide")
    require(torch.equal(encoder(pixels), cells), "in evaluation, the same images give the same cells")
    for index in range(B):
        alone = encoder(pixels[index : index + 1])[0]
        require_close(alone, cells[index], "images of a batch do not see each other", 1e-3)
    require(not torch.equal(cells[0], cells[1]), "different images have different cells")
    if rows > 1 and columns > 1:
        _check_order(encoder, pixels, cells, rows, columns)


def _check_order(encoder: Any, pixels: Tensor, cells: Tensor, rows: int, columns: int) -> None:
    """Check that other pixels at the top right change cells higher and further right than others at the bottom left."""
    height, width = pixels.shape[-2] // 2, pixels.shape[-1] // 2
    centres = []
    for corner in ((slice(None, height), slice(width, None)), (slice(height, None), slice(None, width))):
        changed = pixels.clone()
        changed[..., *corner] = changed[..., *corner].flip(0)
        change = (encoder(changed) - cells).square().sum((0, 2)).view(rows, columns)
        change /= change.sum()
        centres.append((change.sum(1) @ torch.arange(rows).float(), change.sum(0) @ torch.arange(columns).float()))
    (upper, right), (lower, left) = centres
    require(bool(upper < lower and left < right), "cells run row by row from the top left")


def _check_gradients(encoder: Any, pixels: Tensor) -> None:
    """Check that finite gradients reach the pixels and the weights."""
    pixels = pixels.clone().requires_grad_()
    cells = encoder(pixels)
    require(cells.requires_grad, "gradients flow from the cells")
    cells.square().mean().backward()
    is_reached = pixels.grad is not None and bool(torch.isfinite(pixels.grad).all()) and bool(pixels.grad.any())
    require(is_reached, "gradients flow from the cells to the pixels")
    trained = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
    gradients = [gradient for gradient in trained if gradient is not None]
    require(bool(gradients) or not trained, "gradients flow from the cells to the weights")
    require(all(bool(torch.isfinite(gradient).all()) for gradient in gradients), "gradients of the weights are finite")
