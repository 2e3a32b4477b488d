"""Measurement of where in an image the grid cells of an encoder look."""

# B: images, H, W: pixels

from __future__ import annotations

import torch
from torch import Tensor, nn

from .modes import in_evaluation

NUM_NOISE_IMAGES = 4


def receptive_field_offset(
    encoder: nn.Module, image_size: tuple[int, int], grid_size: tuple[int, int]
) -> tuple[float, float]:
    """Measure how far the cells of an encoder look away from their position in the image.

    An encoder divides an image into a grid of equal cells, but a cell need not look at the middle of its part of the
    image. Convolutions of odd width with stride 2, for example, look half a step further up and left each time, which
    in a ResNet adds up to half a cell. Attention maps drawn without this offset would be off by as much.

    The effective receptive field of a cell is the square of the gradient of its features by each pixel (Luo et al.
    2016, sec. 2). Measured for the cells in the middle of the grid, on images of noise and along a random direction of
    the features, its centre of mass lies at the middle of the image plus the offset.

    Args:
        encoder: Module that encodes images `(B, 3, H, W)` as cells `(B, rows · columns, C)`. Its mode and gradients
            are left as they are.
        image_size: Height and width of the images in pixels.
        grid_size: Rows and columns of the grid of cells.

    Returns:
        The offset in pixels down and in pixels to the right. Both are 0 if the encoder has no gradients, as when it is
        quantised.
    """
    parameter = next(encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    # Pipelines run in inference mode, where there are no gradients.
    with in_evaluation(encoder), torch.inference_mode(False), torch.enable_grad():
        images = torch.randn(NUM_NOISE_IMAGES, 3, *image_size, generator=generator).to(parameter).requires_grad_()
        cells = encoder(images).unflatten(1, grid_size)  # (B, rows, columns, C)
        if not cells.requires_grad:
            return 0.0, 0.0
        field = torch.zeros(image_size)
        for row in _middle(grid_size[0]):
            for column in _middle(grid_size[1]):
                features = cells[:, row, column]  # (B, C)
                direction = torch.randn(features.shape, generator=generator).to(features)
                (gradient,) = torch.autograd.grad(features, images, direction, retain_graph=True)
                field += gradient.float().square().sum((0, 1)).cpu()
    height, width = image_size
    return _centre_of_mass(field.sum(1)) - height / 2, _centre_of_mass(field.sum(0)) - width / 2


def _middle(count: int) -> range:
    """Return the index of the middle one of `count` rows or columns, or both indices if their number is even."""
    return range((count - 1) // 2, count // 2 + 1)


def _centre_of_mass(mass: Tensor) -> float:
    """Return the centre of mass of `(pixels,)` in pixels from the start; pixel i has its mass at i + 0.5."""
    positions = torch.arange(len(mass)) + 0.5
    return float(mass @ positions / mass.sum())
