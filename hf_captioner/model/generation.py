"""The methods of a captioner that `generate()` of transformers calls, with checks of its arguments."""

# B: images, N: captions or beams of all images, T: words, P: image cells, C: channels of a cell

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList

from .decoder_interface import RecurrentCache
from .decoding import StopStrings
from .encoder_model import CaptionerEncoderOutput
from .model_inputs import check_images, prompt_ids


class CaptionerGenerationMixin(GenerationMixin):
    """Decoding of a captioner by `generate()`; see the methods of transformers' `GenerationMixin` for the arguments."""

    _is_stateful = True

    def _prepare_model_inputs(self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
        """Check the images, or take image cells in their place, in any of the forms that `forward` takes."""
        model: Any = self
        outputs, cells = model_kwargs.get("encoder_outputs"), model_kwargs.pop("cells", None)
        if outputs is not None or cells is not None:
            model_kwargs["encoder_outputs"] = CaptionerEncoderOutput.of(model.image_cells(None, outputs, cells))
        else:
            images = model_kwargs.get("pixel_values") if inputs is None else inputs
            if images is None:
                raise ValueError("No image is given. Pass pixel_values from the processor, or cells computed earlier.")
            check_images(images)
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_decoder_input_ids_for_generation(
        self,
        batch_size: int,
        model_input_name: str,
        model_kwargs: dict[str, Any],
        decoder_start_token_id: Tensor,
        device: torch.device | None = None,
    ) -> Any:
        """Begin captions with the words of a prompt, without the `<end>` that a tokenizer gives them."""
        config: Any = self.config
        if model_kwargs.get("decoder_input_ids") is not None:
            model_kwargs.pop("input_ids", None)  # the same words, from the processor
        for name in ("decoder_input_ids", "input_ids"):
            if model_kwargs.get(name) is not None:
                model_kwargs[name] = prompt_ids(model_kwargs[name], batch_size, decoder_start_token_id, config)
        return super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, decoder_start_token_id, device
        )

    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        """Let `max_new_tokens` overrule the stored `max_length` silently; transformers warns of it at every call."""
        for bound in ("max", "min"):
            given, length = getattr(generation_config, f"{bound}_new_tokens"), f"{bound}_length"
            if given is not None and getattr(generation_config, length) == getattr(self.generation_config, length):
                kwargs[f"has_default_{length}"] = True
        return super()._prepare_generated_length(generation_config=generation_config, **kwargs)

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: Any = None,
    ) -> StoppingCriteriaList:
        """Stop at strings in a way that suits tokenizers of whole words, which transformers' own can't read."""
        if generation_config.stop_strings is not None and tokenizer is not None:
            own = StopStrings(generation_config.stop_strings, tokenizer)
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), own])
            generation_config.stop_strings = None  # `generate()` has made a copy for this call
        return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """Refuse classifier-free guidance, which is made for models of text alone."""
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale is {generation_config.guidance_scale}, but captions can't be guided by another "
                "prompt; leave it out."
            )
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: RecurrentCache | None = None,
        encoder_outputs: CaptionerEncoderOutput | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for one step of `generate()`.

        The words to read are those that have not been read yet: a given prefix, or the word chosen last. A mask is
        known by name only, so that `generate()` takes all that the processor returns.
        """
        num_read = 0 if cache is None else cache.get_seq_length()
        forwarded = ("use_cache", "output_attentions", "output_hidden_states")
        return {
            "decoder_input_ids": input_ids[:, num_read:],
            "cache": cache,
            "encoder_outputs": encoder_outputs,
            **{name: kwargs[name] for name in forwarded if name in kwargs},
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The cache is a RecurrentCache, made by the first step, not keys and values of transformer layers.
        return False
