"""Export of captioners to ONNX: a folder that captions images with onnxruntime, without torch.

The folder holds `encoder.onnx` (everything that is computed once per image), `decoder.onnx` (one step for K captions
or beams of each of B images; both numbers are free), the tokenizer, the settings, and a program with its
requirements.txt. Greedy and beam search give the captions of `generate()`.

Sampling and the searches of `guided_decoding` are not exported. Hard attention uses its expectation, as it always does
outside training. Decoders of other packages can be exported if they have `initial_state` like the built-in ones and if
torch can trace them. Every export is run and compared with the captioner before it is put in place.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import GenerationConfig
from transformers.utils import logging

from ..model.decoder_interface import Memory, run_decoder
from ..model.modeling_captioner import CaptionerModel
from ..model.onnx_runner import FORMAT, OnnxCaptioner
from ..model.onnx_search import Settings
from ..model.processing_captioner import CaptionerProcessor
from .exported import BESIDE, CONFIG, fingerprints
from .folders import MODEL_FOLDER, require_empty
from .quantization import store_in_8_bits

logger = logging.get_logger(__name__)

NEEDED_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
# Modules of model/ that are copied into the export as the package `onnx_captioner`.
IMAGE_MODULES = ("images", "image_limits", "image_metadata", "image_sources", "pixels")
RUNNER_MODULES = (*IMAGE_MODULES, "folder_check", "onnx_search", "onnx_runner")
REQUIREMENTS = ("numpy>=2", "onnxruntime>=1.20", "pillow>=11.3", "tokenizers>=0.21")

PROGRAM = '''"""Caption image files: `python caption.py photo.jpg`; `--help` lists the options."""

import sys
from pathlib import Path

from onnx_captioner.onnx_runner import main

main(Path(__file__).resolve().parent, sys.argv[1:])
'''

# Fields of a generation config that are not in `Settings` and do not affect greedy and beam search.
FIELDS_WITHOUT_EFFECT = {
    *("bos_token_id", "transformers_version", "use_cache", "return_dict_in_generate", "temperature", "top_k", "top_p"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "_from_model_config"),
}

# Largest accepted difference of a log-probability: single precision sums in another order.
TOLERANCE = 1e-3
# Numbers of images and of captions per image: the graphs are traced with the first pair, and tested with the second to
# make sure that both numbers are free.
TRACED_SIZES, TESTED_SIZES = (2, 3), (3, 1)


def export_onnx(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    folder: str | Path,
    *,
    int8: bool = False,
    beside: bool = False,
) -> None:
    """Write a folder that captions images with onnxruntime alone, for `OnnxCaptioner` to read.

    Args:
        model: The captioner, which is left unchanged. The export is in single precision, whatever the model's own.
        processor: The model's processor.
        folder: Folder to write, which must be new or empty. It appears once the export is complete.
        int8: Store large weights in 8 bits and others in half precision, to be computed with in single precision.
        beside: The folder is `onnx` within the folder of the saved captioner, where `hf-captioner caption` finds it. It
            replaces an earlier export, is made without a program, and is used as long as the captioner's files are as
            they are now.

    Raises:
        ValueError: A part, the processor or a generation setting cannot be exported, or libraries are missing.
    """
    if missing := [name for name in NEEDED_LIBRARIES if find_spec(name) is None]:
        raise ValueError(f"Exporting needs {', '.join(missing)}: run `pip install 'hf_captioner[export]'`.")
    folder = Path(folder)
    if beside and (folder.name != BESIDE or not (folder.parent / "config.json").is_file()):
        raise ValueError(f"An export beside a captioner is the folder {BESIDE!r} within the captioner's, not {folder}.")
    if not (beside and (folder / CONFIG).is_file()):
        require_empty(folder)
    model = copy.deepcopy(model).float().cpu().eval()
    config = _runner_config(model, processor) | ({"source": fingerprints(folder.parent)} if beside else {})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary) / "export"
        unfinished.mkdir()
        (unfinished / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        processor.tokenizer.backend_tokenizer.save(str(unfinished / "tokenizer.json"))
        if not beside:
            _write_program(unfinished)
        size = config["pixels"]["size"]
        _export_graphs(model, unfinished, *_random_inputs(model, size, *TRACED_SIZES))
        tested = _random_inputs(model, size, *TESTED_SIZES)
        difference = _largest_difference(model, OnnxCaptioner(unfinished), *tested)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The exported captioner differs from the model by {difference:.2g} in a log-probability: one of its "
                "parts computes something else when torch traces it. Remove what depends on tracing from that part."
            )
        if int8:
            for name in ("encoder.onnx", "decoder.onnx"):
                store_in_8_bits(unfinished / name)
                logger.info(f"In 8 bits: {_described_size(unfinished / name)}")
            difference = _largest_difference(model, OnnxCaptioner(unfinished), *tested)
            logger.info(f"In 8 bits, log-probabilities differ from the model's by up to {difference:.2g}.")
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        unfinished.rename(folder)


def _runner_config(model: CaptionerModel, processor: CaptionerProcessor) -> dict[str, Any]:
    """Return the content of `captioner.json`: what `OnnxCaptioner` needs besides graphs and tokenizer."""
    image_processor = processor.image_processor
    encoder = model.encoder.part
    height, width = size = (image_processor.size["height"], image_processor.size["width"])
    return {
        "format": FORMAT,
        "encoder": model.config.encoder_name,
        "pixels": {
            "size": size,
            "interpolation": image_processor.interpolation,
            "crop_pct": image_processor.crop_pct,
            "crop_mode": image_processor.crop_mode,
            "mean": image_processor.image_mean,
            "std": image_processor.image_std,
        },
        "grid": encoder.grid_size(height, width),
        "grid_box": encoder.grid_box(height, width) if hasattr(encoder, "grid_box") else None,
        "special_ids": processor.tokenizer.all_special_ids,
        "generation": generation_settings(model.generation_config),
    }


def generation_settings(config: GenerationConfig) -> dict[str, Any]:
    """Return those settings of a generation config that greedy and beam search depend on, as fields of `Settings`.

    Raises:
        ValueError: A setting is missing, or has an effect that is not exported.
    """
    given = {name: value for name, value in config.to_diff_dict().items() if value is not None and value is not False}
    if given.pop("do_sample", False):
        raise ValueError("The generation config has do_sample, but sampling is not exported. Set it to False.")
    for bound in ("max", "min"):
        if (num_new_tokens := given.pop(f"{bound}_new_tokens", None)) is not None:
            given[f"{bound}_length"] = num_new_tokens + 1  # lengths count <start>
    # Trainers of transformers write down all defaults of `generate()`, most of which have no effect.
    defaults = config._get_default_generation_params()
    known = Settings.__dataclass_fields__
    required = ("max_length", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"The generation config has no {missing[0]}. Start from model.default_generation_config().")
    others = given.keys() - known.keys() - FIELDS_WITHOUT_EFFECT
    if unknown := sorted(name for name in others if given[name] != defaults.get(name)):
        raise ValueError(
            f"The generation config has {unknown[0]}={given[unknown[0]]!r}, which is not exported. Unset it. These "
            f"settings are exported: {', '.join(known)}."
        )
    settings = {name: value for name, value in given.items() if name in known}
    end = settings["eos_token_id"]
    settings["eos_token_id"] = end if isinstance(end, list) else [end]
    return settings


def _write_program(folder: Path) -> None:
    """Write `caption.py`, the package that it uses and `requirements.txt`."""
    package = folder / "onnx_captioner"
    package.mkdir()
    for name in RUNNER_MODULES:
        shutil.copy(MODEL_FOLDER / f"{name}.py", package)
    (package / "__init__.py").write_text('from .onnx_runner import OnnxCaptioner\n\n__all__ = ["OnnxCaptioner"]\n')
    (folder / "caption.py").write_text(PROGRAM)
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")


class _EncoderGraph(nn.Module):
    """Module exported as `encoder.onnx`: from pixels to everything that is computed once per image."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode pixels; return the fields of a `Memory` and the decoder's first state, tensors `(B, 1, D)`."""
        memory = self.model.prepare_memory(self.model.encoder.part(pixel_values))
        state = self.model.decoder.initial_state(memory, 1)
        return memory.cells, memory.keys, memory.mean, *(tensor.unsqueeze(1) for tensor in state)


class _DecoderGraph(nn.Module):
    """Module exported as `decoder.onnx`: one step of the decoder for K captions of each image."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, words: Tensor, cells: Tensor, keys: Tensor, mean: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Read one word of each caption, `(B, K)`, given the fields of a `Memory` and the decoder's state `(B, K, D)`.

        Returns:
            Log-probabilities of the next word `(B, K, V)`, attention weights `(B, K, P)`, and the state after.
        """
        flat_state = tuple(tensor.flatten(0, 1) for tensor in state)
        output = run_decoder(self.decoder, words.reshape(-1, 1), Memory(cells, keys, mean), flat_state)
        flat_outputs = torch.log_softmax(output.logits[:, 0], -1), output.weights[:, 0], *output.state
        return tuple(tensor.unflatten(0, words.shape) for tensor in flat_outputs)


@torch.no_grad()
def _export_graphs(model: CaptionerModel, folder: Path, pixel_values: Tensor, words: Tensor) -> None:
    """Trace the encoder and the decoder with example pixels and words, and write `encoder.onnx` and `decoder.onnx`."""
    if not hasattr(model.decoder, "initial_state"):
        raise ValueError(f"The decoder {model.config.decoder_type!r} has no initial_state, which exporting needs.")
    encoder, decoder = _EncoderGraph(model), _DecoderGraph(model)
    # Not named dimensions: with those, torch 2.15 fixes one of four states to the size that it was traced with.
    images = captions = Dim.DYNAMIC
    *memory, state = _encoded(encoder, pixel_values, words)
    states = [f"state_{number}" for number in range(len(state))]
    _export(
        encoder, (pixel_values,), folder / "encoder.onnx",
        description=f"encoder {model.config.encoder_name!r}",
        dynamic_shapes=({0: images},),
        input_names=["pixel_values"],
        output_names=["cells", "keys", "mean", *states],
    )  # fmt: skip
    logger.info(f"Encoder: {_described_size(folder / 'encoder.onnx')}")
    _export(
        decoder, (words, *memory, state), folder / "decoder.onnx",
        description=f"decoder {model.config.decoder_type!r} with attention {model.config.attention_type!r}",
        dynamic_shapes=({0: images, 1: captions}, *({0: images},) * 3, ({0: images, 1: captions},) * len(state)),
        input_names=["words", "cells", "keys", "mean", *states],
        output_names=["log_probs", "weights", *(f"next_{name}" for name in states)],
    )  # fmt: skip
    logger.info(f"Decoder: {_described_size(folder / 'decoder.onnx')}")


def _random_inputs(
    model: CaptionerModel, size: tuple[int, int], num_images: int, num_captions: int
) -> tuple[Tensor, Tensor]:
    """Draw pixels `(B, 3, H, W)` and word ids `(B, K)`, always the same ones for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(model.config.vocab_size, (num_images, num_captions), generator=generator)
    return torch.randn(num_images, 3, *size, generator=generator), words


def _encoded(encoder: nn.Module, pixel_values: Tensor, words: Tensor) -> tuple[Any, ...]:
    """Encode pixels; return the fields of a `Memory`, and the decoder's first state for each caption of `words`."""
    # Contiguous, because torch would trace the strides of a view (such as tokens without the first), and ONNX has none.
    cells, keys, mean, *state = (tensor.contiguous() for tensor in encoder(pixel_values))
    return cells, keys, mean, tuple(tensor.repeat(1, words.shape[1], 1) for tensor in state)


def _export(graph: nn.Module, inputs: tuple[Any, ...], path: Path, *, description: str, **kwargs: Any) -> None:
    """Trace a graph and write it as an ONNX file; an error of the tracing becomes a ValueError with its description."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(graph, inputs, dynamo=True, verbose=False, external_data=False, **kwargs)
        assert program is not None
        program.save(path)
    except Exception as e:  # a part of another package may raise anything while it is traced
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = str(cause).strip().partition("\n")[0]
        raise ValueError(f"The {description} can't be exported to ONNX: {type(cause).__name__}: {line}") from e


@torch.no_grad()
def _largest_difference(model: CaptionerModel, captioner: OnnxCaptioner, pixel_values: Tensor, words: Tensor) -> float:
    """Return the largest difference between model and export in a log-probability of the word that follows `words`."""
    *memory, state = _encoded(_EncoderGraph(model), pixel_values, words)
    expected, *_ = _DecoderGraph(model)(words, *memory, state)
    arrays, states = captioner.encode(pixel_values.numpy())
    found, *_ = captioner.read(words.numpy(), arrays, [array.repeat(words.shape[1], 1) for array in states])
    return (torch.from_numpy(found) - expected).abs().max().item()


def _described_size(path: Path) -> str:
    """Return the name and size of a file, such as "encoder.onnx, 9.3 MB"."""
    return f"{path.name}, {path.stat().st_size / 1e6:.3g} MB"
