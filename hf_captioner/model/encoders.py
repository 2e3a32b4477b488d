"""Encoders, which turn an image into cells: the feature vectors at the positions of a grid over the image.

An encoder is a `torch.nn.Module` that is built with the configuration's `encoder_name` and, as keyword arguments, its
`encoder_kwargs`. It has

- `forward(pixel_values (B, 3, H, W)) -> cells (B, P, C)`, cells row by row from the top left;
- `hidden_size`, the number of channels C;
- `grid_size(height, width)`, the rows and columns of the grid for images of this size;
- `data_config`, timm's description of the pixels that the weights expect: size, crop, interpolation, mean and std.

If trained weights are to be loaded, or the user overrides `data_config`, it is also given `pretrained` and
`pretrained_cfg_overlay`, as `timm.create_model` takes them. An encoder may also have

- `grid_box(height, width)`, the box in the image that the grid covers, if that isn't the whole image;
- `stages()`, its parameters in groups from the images to the cells, so that it can be trained in part;
- beside that `input_of_stage(pixel_values, stage)` and `forward_from(stage_inputs, stage)`, which compute what enters a
  stage, and the cells from that; and `names_from(stage)`, the names in the state dict that belong to this stage and the
  later ones. If those alone are trained, what the others compute is kept on the disk;
- `checkpoint_gradients()`, which makes training take less memory.
"""

# B: images, H, W: pixels, P: image cells (rows x columns of the grid), C: channels of a cell

from __future__ import annotations

import copy
import math
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional

from .images import Box
from .modes import in_evaluation
from .receptive_field import receptive_field_offset
from .registry import Registry

ENCODERS = Registry("encoders", {"timm": f"{__name__}:TimmEncoder", "timm_pooled": f"{__name__}:PooledTimmEncoder"})

MAX_POOLED_SIZE = 128  # rows, and columns, of a grid


class TimmEncoder(nn.Module):
    """Any timm model whose last features form a grid: CNNs, Swin-like models and ViTs.

    Args:
        name: Name of a timm model, such as `"resnet101"` or `"resnet101.a1_in1k"`.
        pretrained: Whether to load timm's weights for it, from the Hub or from the file named in
            `pretrained_cfg_overlay={"file": ...}`.
        kwargs: Further arguments of `timm.create_model` (`output_stride=16`, `img_size=384`, ...).

    Raises:
        ValueError: timm has no such model, or refuses the arguments.
    """

    def __init__(self, name: str, *, pretrained: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.name = name
        self.body = _create_body(name, pretrained=pretrained, **kwargs)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._boxes: dict[tuple[int, int], Box] = {}
        self._stage_paths: dict[int, str] = {}

    @property
    def hidden_size(self) -> int:
        """Number of channels of a cell, C."""
        return int(self.body.num_features)  # type: ignore[arg-type]

    @property
    def data_config(self) -> dict[str, Any]:
        """Timm's description of the pixels that the weights expect: size, crop, interpolation, mean and std."""
        return dict(resolve_model_data_config(self.body))

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the grid for images of `height` x `width` pixels.

        Every architecture rounds in its own way, so the grid is found by encoding an empty image, once per size.

        Raises:
            ValueError: The model gives no grid of cells, or can't take images of this size.
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
        """Return where the grid lies in the image: `(left, top, right, bottom)` in pixels.

        The middle of a cell of this box is the middle of what the cell looks at. It is measured once per size, see
        `receptive_field_offset`. The errors are those of `grid_size`.
        """
        size = (height, width)
        if size not in self._boxes:
            down, right = receptive_field_offset(self, size, self.grid_size(height, width))
            self._boxes[size] = (right, down, width + right, height + down)
        return self._boxes[size]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images `(B, 3, H, W)` as image cells `(B, P, C)`, row by row from the top left."""
        # With channels first, convolutions take half as long again on CPUs, and in half precision on GPUs.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self._cells_of(self.body.forward_features(pixel_values))  # type: ignore[operator]

    def _cells_of(self, features: Tensor) -> Tensor:
        """Bring the model's features into the form `(B, P, C)`."""
        if features.ndim == 3:
            return features[:, self._num_prefix_tokens :]  # (B, P, C)
        if self._channels_last(features):
            return features.flatten(1, 2)  # (B, P, C)
        return features.flatten(2).transpose(1, 2)  # (B, P, C)

    def stages(self) -> list[list[nn.Parameter]]:
        """Return the parameters in timm's groups, from the images to the cells, the stem first."""
        groups = group_parameters(self.body, self.body.group_matcher(coarse=True))  # type: ignore[operator]
        named = dict(self.body.named_parameters())
        return [[named[name] for name in groups[number]] for number in sorted(groups)]

    def input_of_stage(self, pixel_values: Tensor, stage: int) -> Tensor:
        """Compute what enters a stage, `(B, 3, H, W) -> (B, …)`; the stages from there on are not run.

        Raises:
            ValueError: The model has no such stage, or more than a tensor enters it.
        """
        module = self.body.get_submodule(self._path_of_stage(stage))

        def stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _StageReached(*inputs)

        hook = module.register_forward_pre_hook(stop)
        try:
            self(pixel_values)
        except _StageReached as reached:
            if len(reached.args) == 1 and isinstance(reached.args[0], Tensor):
                return reached.args[0]
        finally:
            hook.remove()
        raise ValueError(f"Encoder {self.name!r} can't be divided at stage {stage}.")

    def forward_from(self, stage_inputs: Tensor, stage: int) -> Tensor:
        """Compute cells from what enters a stage, `(B, …) -> (B, P, C)`.

        It is right only if the model does nothing but call its modules one after the other; see
        `CaptionerEncoder.can_divide`.
        """
        if stage_inputs.ndim == 4:
            stage_inputs = stage_inputs.contiguous(memory_format=torch.channels_last)
        rest = _without_modules_before(self.body, self._path_of_stage(stage).split("."))
        return self._cells_of(rest.forward_features(stage_inputs))

    def names_from(self, stage: int) -> set[str]:
        """Return the names of the parameters and buffers of a stage and of all that follow."""
        owners = {id(parameter) for group in self.stages()[stage:] for parameter in group}
        modules = {name.rpartition(".")[0] for name, parameter in self.named_parameters() if id(parameter) in owners}
        return {name for name in self.state_dict() if name.rpartition(".")[0] in modules}

    def _path_of_stage(self, stage: int) -> str:
        """Return the name of the body's outermost module with which a stage begins, such as `"layer3"`.

        It is needed at every step of training, and found once.
        """
        if stage not in self._stage_paths:
            names = [*self.body.state_dict()]
            later = {name.removeprefix("body.") for name in self.names_from(stage)}
            parts = next(name for name in names if name in later).split(".")
            paths = (".".join(parts[:length]) for length in range(1, len(parts)))
            self._stage_paths[stage] = next(
                path for path in paths if all(name in later for name in names if name.startswith(f"{path}."))
            )
        return self._stage_paths[stage]

    def checkpoint_gradients(self) -> None:
        """Turn on gradient checkpointing: most activations are computed again in the backward pass, to save memory.

        Raises:
            ValueError: timm doesn't support this for the model.
        """
        try:
            self.body.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError) as e:
            raise ValueError(f"timm's {self.name!r} doesn't support gradient checkpointing: set it to false.") from e

    @property
    def _num_prefix_tokens(self) -> int:
        """Number of tokens, such as class tokens, that stand before those of the image."""
        return int(getattr(self.body, "num_prefix_tokens", 0))

    def _channels_last(self, features: Tensor) -> bool:
        """Return whether features with four dimensions are `(B, rows, columns, C)`, not `(B, C, rows, columns)`."""
        layout = str(getattr(self.body, "output_fmt", "NCHW")).rpartition(".")[2]
        return layout == "NHWC" and features.shape[-1] == self.hidden_size

    def _grid_of(self, features: Any, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the grid that the model's features form, or raise a ValueError."""
        if isinstance(features, Tensor) and features.ndim == 4:
            channels_last = self._channels_last(features)
            grid = tuple(features.shape[1:3]) if channels_last else tuple(features.shape[2:4])
            channels = features.shape[-1 if channels_last else 1]
        elif isinstance(features, Tensor) and features.ndim == 3:
            num_cells, channels = features.shape[1] - self._num_prefix_tokens, features.shape[2]
            # Tokens don't tell the shape of the grid; we assume that it has the proportions of the image.
            rows = round(math.sqrt(num_cells * height / width))
            grid = (rows, num_cells // max(rows, 1))
            if rows * grid[1] != num_cells:
                channels = -1
        else:
            channels = -1
        if channels != self.hidden_size:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"Encoder {self.name!r} gives no grid of image cells (its features are {shape}). "
                "Choose a timm CNN, Swin-like model or ViT, such as 'resnet101'."
            )
        return int(grid[0]), int(grid[1])


class PooledTimmEncoder(TimmEncoder):
    """Any timm model that `TimmEncoder` takes, with cells pooled to a square grid of a fixed size.

    Args:
        name: Name of a timm model.
        pooled_size: Number of rows, and of columns, of the grid.
        kwargs: Further arguments of `TimmEncoder`.

    Raises:
        ValueError: `pooled_size` is below 1, or `TimmEncoder` refuses the other arguments.
    """

    def __init__(self, name: str, *, pooled_size: int = 14, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        if not isinstance(pooled_size, int) or pooled_size < 1:
            raise ValueError(f"pooled_size is {pooled_size!r}, but a grid has at least 1 row.")
        if pooled_size > MAX_POOLED_SIZE:
            raise ValueError(f"pooled_size is {pooled_size}, but a grid has at most {MAX_POOLED_SIZE} rows.")
        self.pooled_size = pooled_size

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Return `(pooled_size, pooled_size)`, the rows and columns of the grid whatever the image size.

        Raises:
            ValueError: The model gives no grid of cells, or can't take images of this size.
        """
        super().grid_size(height, width)
        return self.pooled_size, self.pooled_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images `(B, 3, H, W)` as image cells `(B, P, C)`, row by row from the top left."""
        height, width = pixel_values.shape[-2:]
        grid = super().grid_size(height, width)
        features = super().forward(pixel_values).transpose(1, 2).unflatten(2, grid)  # (B, C, rows, columns)
        return functional.adaptive_avg_pool2d(features, self.pooled_size).flatten(2).transpose(1, 2)


class _StageReached(Exception):  # noqa: N818 (it is no error)
    """Raised with the inputs of a stage when a model's forward pass arrives there."""


def _without_modules_before(module: nn.Module, path: list[str]) -> Any:
    """Return a shallow copy of a module in which the children before the one at `path` pass on what they are given."""
    if not path:
        return module
    rest = copy.copy(module)
    rest._modules = {**module._modules, path[0]: _without_modules_before(module.get_submodule(path[0]), path[1:])}
    for name in module._modules:
        if name == path[0]:
            return rest
        rest._modules[name] = nn.Identity()
    raise AssertionError(f"no module {path[0]!r}")


def _create_body(name: str, **kwargs: Any) -> nn.Module:
    """Build a timm model without its classifier, or raise a ValueError if timm has no such model or refuses kwargs."""
    try:
        # num_classes=0: the classifier would be saved and never used.
        return timm.create_model(name, num_classes=0, **kwargs)
    except RuntimeError as e:
        if "Unknown model" not in str(e):
            if kwargs.get("pretrained"):
                raise
            raise _refused(name, kwargs, e) from e
        similar = timm.list_models(f"*{name.split('.')[0].rstrip('0123456789')}*")[:5]
        hint = f" Similar: {', '.join(similar)}." if similar else ""
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}.{hint} See timm.list_models() for all names."
        ) from e
    except (TypeError, AssertionError, AttributeError, LookupError, ArithmeticError) as e:
        raise _refused(name, kwargs, e) from e


def _refused(name: str, kwargs: dict[str, Any], error: Exception) -> ValueError:
    """Return the error for arguments with which timm can't build a model."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return ValueError(f"timm's {name!r} refuses the arguments {kwargs}: {reason}. Check encoder_kwargs.")
