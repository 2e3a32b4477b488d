"""The encoder of a captioner as a transformers model, and the class of its output."""

# B: images, H, W: pixels, P: image cells, C: channels of a cell

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_captioner import CaptionerConfig
from .encoders import ENCODERS
from .model_inputs import check_pixel_values, in_precision_of
from .modes import in_evaluation
from .parts import find_part


class SharedCells:
    """Image cells `(B, P, C)` that all beams of an image share.

    `generate()` repeats every tensor in an encoder's output for each beam. This wrapper is not a tensor, so the cells
    stay as they are.
    """

    def __init__(self, cells: Tensor) -> None:
        self.cells = cells


@dataclass
class CaptionerEncoderOutput(ModelOutput):
    """Output of the encoder: image cells, wrapped such that `generate()` does not copy them for each beam.

    To caption cells that were computed earlier, call `generate(encoder_outputs=CaptionerEncoderOutput.of(cells))`.
    """

    shared: SharedCells | None = None

    @classmethod
    def of(cls, cells: Tensor) -> CaptionerEncoderOutput:
        """Build the encoder's output from image cells `(B, P, C)`."""
        return cls(shared=SharedCells(cells))

    @property
    def last_hidden_state(self) -> Tensor:
        """The image cells `(B, P, C)`, under the name that transformers looks for."""
        assert self.shared is not None
        return self.shared.cells


class CaptionerEncoder(PreTrainedModel):
    """An encoder from `ENCODERS`, as a transformers model with its own `_init_weights`.

    Therefore initialising a captioner leaves pretrained weights alone.

    Args:
        config: Configuration of the captioner.
        kwargs: `pretrained` and `pretrained_cfg_overlay` for the encoder, as `timm.create_model` takes them.
    """

    config: CaptionerConfig
    config_class = CaptionerConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: CaptionerConfig, **kwargs: Any) -> None:
        super().__init__(config)
        self.part: Any = self._build_part(**kwargs)
        self._is_built_empty = any(tensor.is_meta for tensor in self.part.state_dict().values())
        self.post_init()

    def _build_part(self, **kwargs: Any) -> nn.Module:
        config = self.config
        part: nn.Module = find_part(ENCODERS, config.encoder_type, config.packages)(
            config.encoder_name, **(config.encoder_kwargs or {}), **kwargs
        )
        return part

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The part has initialised its weights when it was built. But from_pretrained builds models on the meta device,
        # without values: buffers that no checkpoint holds are then computed again, and weights that it lacks are those
        # of another new part, since only a part knows how to initialise its own.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]
        if self._is_built_empty and any(_is_missing(tensor) for tensor in _own_tensors(module)):
            weights = self.part.state_dict(keep_vars=True)
            missing = {name: weight for name, weight in weights.items() if _is_missing(weight)}
            initial = self._build_part().state_dict() if missing else {}
            for name, weight in missing.items():
                weight.copy_(initial[name])
                weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CaptionerEncoderOutput:
        """Encode images `(B, 3, H, W)` to cells `(B, P, C)`, in the precision of the encoder's weights.

        `generate()` passes the other arguments to every encoder; this one ignores them.

        Raises:
            ValueError: The images have another form.
        """
        return CaptionerEncoderOutput.of(self.part(in_precision_of(self, check_pixel_values(pixel_values))))

    def forward_from(self, stage_inputs: Tensor, stage: int) -> CaptionerEncoderOutput:
        """Compute cells from what enters a stage of the encoder, `(B, …)`, which was computed earlier."""
        return CaptionerEncoderOutput.of(self.part.forward_from(in_precision_of(self, stage_inputs), stage))

    @torch.no_grad()
    def can_divide(self, stage: int) -> bool:
        """Return whether cells can be computed in two steps, first what enters a stage and then the rest.

        That is tried with a random image: a model that does more than to call its modules one after the other, or a
        part of another package without the methods, can't be divided.
        """
        if not stage or not hasattr(self.part, "forward_from"):
            return False
        size = self.part.data_config["input_size"]
        pixel_values = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        pixel_values = pixel_values.to(next(self.parameters()))
        with in_evaluation(self):
            expected = self.part(pixel_values)
            try:
                found = self.part.forward_from(self.part.input_of_stage(pixel_values, stage), stage)
            except (ValueError, TypeError, RuntimeError, AttributeError):
                return False
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)

    def freeze(self) -> None:
        """Stop training the encoder and put it into evaluation mode, in which it stays."""
        self.requires_grad_(False).eval()

    def unfreeze(self, *, from_stage: int = 0, freeze_batch_norm: bool = True) -> None:
        """Train the encoder, or only its last stages.

        Args:
            from_stage: First stage to train, counted from 0, the stem.
            freeze_batch_norm: Whether to keep the statistics, scales and shifts of batch norms as they are. Statistics
                of a few images are a poor replacement for those of ImageNet.

        Raises:
            ValueError: The encoder has no such stage, or no stages.
        """
        # An encoder that is trained as a whole needs no stages.
        stages = self.part.stages() if from_stage else [[*self.parameters()]]
        self.requires_grad_(False)
        if not 0 <= from_stage < len(stages):
            raise ValueError(
                f"encoder_from_stage is {from_stage}; {self.config.encoder_name!r} has the stages 0 (the stem) to "
                f"{len(stages) - 1}."
            )
        for parameter in (parameter for stage in stages[from_stage:] for parameter in stage):
            parameter.requires_grad_(True)
        if freeze_batch_norm:
            for norm in self._batch_norms():
                norm.requires_grad_(False)

    def train(self, mode: bool = True) -> CaptionerEncoder:
        """Set training or evaluation mode; a frozen encoder and frozen batch norms stay in evaluation mode."""
        super().train(mode and _is_trained(self))
        for norm in self._batch_norms():
            if not _is_trained(norm):
                norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _is_trained(module: nn.Module) -> bool:
    """Return whether any parameter of a module requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_missing(tensor: Tensor) -> bool:
    """Return whether a tensor has memory, but no values were loaded for it; transformers marks those that it loads."""
    return not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
