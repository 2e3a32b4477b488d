"""Turn a captioner into a folder that captions by onnxruntime alone, without torch.

    python -m hf_captioner.publishing.export outputs/shapes outputs/shapes_onnx
    python -m hf_captioner.publishing.export outputs/shapes outputs/shapes_int8 --int8
    python outputs/shapes_onnx/caption.py photo.jpg

The folder holds all that is needed: `encoder.onnx` (pixels to what is computed once an image), `decoder.onnx` (one
word for each of K captions or beams of B images; both numbers are free), the tokenizer, the settings, and the program
with its requirements.txt. Greedy and beam search give the captions of `generate()`.

Not exported are sampling and the searches of `guided_decoding`. Hard attention takes its expectation, as always
outside training. Parts of other packages are exported if their decoder has `initial_state` as those here have it, and
if torch can trace them. Whatever is exported is run and held against the captioner before it counts.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import GenerationConfig

from .. import model as model_folder
from ..model.decoders import Memory
from ..model.image_processing_captioner import CaptionerImageProcessor
from ..model.modeling_captioner import CaptionerModel
from ..model.onnx_runner import FORMAT, OnnxCaptioner
from ..model.onnx_search import Settings
from ..model.processing_captioner import CaptionerProcessor

NEEDED = ("onnx", "onnxscript", "onnxruntime")
MODEL_FOLDER = Path(model_folder.__path__[0])
RUNTIME = ("images", "onnx_search", "onnx_runner")  # modules that go along, as the package `onnx_captioner`
REQUIREMENTS = ("numpy>=2", "onnxruntime>=1.20", "pillow>=11", "tokenizers>=0.21")

PROGRAM = '''"""Caption image files: `python caption.py photo.jpg`; `--help` says more."""

import sys
from pathlib import Path

from onnx_captioner.onnx_runner import main

main(Path(__file__).resolve().parent, sys.argv[1:])
'''

# What a generation config may hold besides `Settings` without an effect on greedy and beam search.
WITHOUT_EFFECT = {
    *("bos_token_id", "transformers_version", "use_cache", "return_dict_in_generate", "temperature", "top_k", "top_p"),
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "_from_model_config"),
}

TOLERANCE = 1e-3  # of log p in single precision: sums come in another order
SIZES = ((2, 3), (3, 1))  # images and captions of each: those traced, and others to check that they are free


def export_onnx(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    folder: str | Path,
    *,
    int8: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a folder that captions by onnxruntime alone; `OnnxCaptioner` reads it.

    Args:
        model: the captioner, which stays as it is. Whatever its precision, the export is in single precision.
        processor: of the model.
        folder: must not hold anything yet; it appears when all is in it.
        int8: quantise the weights of matrix products to 8 bits, and what they are multiplied by as it comes.
            Convolutions stay as they are.
        report: told of each step.

    Raises:
        ValueError: a part, the processor or a generation setting that can't be exported, or missing libraries.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"Exporting needs {', '.join(missing)}: run `pip install 'hf_captioner[export]'`.")
    folder = Path(folder)
    check_folder(folder)
    model = copy.deepcopy(model).float().cpu().eval()
    config = _describe(model, processor)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary) / "export"
        unfinished.mkdir()
        (unfinished / "captioner.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        processor.tokenizer.backend_tokenizer.save(str(unfinished / "tokenizer.json"))
        _write_program(unfinished)
        examples = [_example(model, config["pixels"]["size"], *sizes) for sizes in SIZES]
        _export_graphs(model, unfinished, examples[0], report)
        error = _error(model, OnnxCaptioner(unfinished), *examples[1])
        if not error <= TOLERANCE:
            raise ValueError(
                f"The exported captioner is off by {error:.2g} in log p: a part of it does something when traced that "
                "it does not do otherwise, or the other way round."
            )
        if int8:
            for name in ("encoder.onnx", "decoder.onnx"):
                _quantize(unfinished / name)
                report(f"In 8 bits: {_size_of(unfinished / name)}")
            error = _error(model, OnnxCaptioner(unfinished), *examples[1])
            report(f"In 8 bits, log p of a word is off by up to {error:.2g}.")
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)


def check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists already; name a folder that does not.")


def _describe(model: CaptionerModel, processor: CaptionerProcessor) -> dict[str, Any]:
    """What `captioner.json` holds."""
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    if not isinstance(image_processor, CaptionerImageProcessor):
        raise ValueError(
            f"The image processor is a {type(image_processor).__name__}, whose transform is not known without torch; "
            "only CaptionerImageProcessor is exported."
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"The tokenizer is a {type(tokenizer).__name__}; only those of `tokenizers` are exported.")
    part = model.encoder.part
    height, width = size = (image_processor.size["height"], image_processor.size["width"])
    grid = part.grid_size(height, width)
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
        "grid": grid,
        "grid_box": part.grid_box(height, width) if hasattr(part, "grid_box") else None,
        "special_ids": tokenizer.all_special_ids,
        "generation": generation_settings(model.generation_config),
    }


def generation_settings(config: GenerationConfig) -> dict[str, Any]:
    """The fields of `Settings` that a generation config sets.

    Raises:
        ValueError: it sets something else that matters, or no length.
    """
    changed = config.to_diff_dict().items()
    given = {name: value for name, value in changed if value is not None and value is not False}
    if given.pop("do_sample", False):
        raise ValueError("The generation config has do_sample, but sampling is not exported; set it to False.")
    if (num_words := given.pop("max_new_tokens", None)) is not None:
        given["max_length"] = num_words + 1  # with <start>
    if (num_words := given.pop("min_new_tokens", None)) is not None:
        given["min_length"] = num_words + 1
    if given.get("repetition_penalty") == 1:  # none
        del given["repetition_penalty"]
    known = Settings.__dataclass_fields__
    needed = ("max_length", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"The generation config has no {missing[0]}; begin with model.default_generation_config().")
    if unknown := [name for name in given if name not in known and name not in WITHOUT_EFFECT]:
        raise ValueError(
            f"The generation config has {unknown[0]}={given[unknown[0]]!r}, which is not exported; unset it. Known are "
            f"{', '.join(known)}."
        )
    settings = {name: value for name, value in given.items() if name in known}
    end = settings["eos_token_id"]
    settings["eos_token_id"] = end if isinstance(end, list) else [end]
    return settings


def _write_program(folder: Path) -> None:
    package = folder / "onnx_captioner"
    package.mkdir()
    for name in RUNTIME:
        shutil.copy(MODEL_FOLDER / f"{name}.py", package)
    (package / "__init__.py").write_text('from .onnx_runner import OnnxCaptioner\n\n__all__ = ["OnnxCaptioner"]\n')
    (folder / "caption.py").write_text(PROGRAM)
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")


class _EncoderGraph(nn.Module):
    """Pixels `(B, 3, H, W)` to all that is computed once an image; first states `(B, 1, D)`."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder.part, model.decoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        memory: Memory = self.decoder.prepare(self.encoder(pixel_values))
        state = self.decoder.initial_state(memory, 1)
        return memory.cells, memory.keys, memory.mean, *(part.unsqueeze(1) for part in state)


class _DecoderGraph(nn.Module):
    """Words `(B, K)`, the memory and states `(B, K, D)` to log p `(B, K, V)`, weights `(B, K, P)` and states."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, words: Tensor, cells: Tensor, keys: Tensor, mean: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        flat = tuple(part.flatten(0, 1) for part in state)
        output = self.decoder(words.reshape(-1, 1), Memory(cells, keys, mean), flat)
        parts = torch.log_softmax(output.logits[:, 0], -1), output.weights[:, 0], *output.state
        return tuple(part.unflatten(0, words.shape) for part in parts)


@torch.no_grad()
def _export_graphs(
    model: CaptionerModel, folder: Path, example: tuple[Tensor, Tensor], report: Callable[[str], None]
) -> None:
    if not hasattr(model.decoder, "initial_state"):
        raise ValueError(f"The decoder {model.config.decoder_type!r} has no initial_state, which exporting needs.")
    encoder, decoder = _EncoderGraph(model), _DecoderGraph(model)
    # Named dimensions lose one of four states in torch 2.15: it keeps the size that it was traced with.
    images = captions = Dim.DYNAMIC
    pixels, words = example
    *memory, state = _encoded(encoder, pixels, words)
    states = [f"state_{number}" for number in range(len(state))]
    _export(
        encoder, (pixels,), folder / "encoder.onnx",
        what=f"encoder {model.config.encoder_name!r}",
        dynamic_shapes=({0: images},),
        input_names=["pixel_values"],
        output_names=["cells", "keys", "mean", *states],
    )  # fmt: skip
    report(f"Encoder: {_size_of(folder / 'encoder.onnx')}")
    _export(
        decoder, (words, *memory, state), folder / "decoder.onnx",
        what=f"decoder {model.config.decoder_type!r} with attention {model.config.attention_type!r}",
        dynamic_shapes=({0: images, 1: captions}, *({0: images},) * 3, ({0: images, 1: captions},) * len(state)),
        input_names=["words", "cells", "keys", "mean", *states],
        output_names=["log_probs", "weights", *(f"next_{name}" for name in states)],
    )  # fmt: skip
    report(f"Decoder: {_size_of(folder / 'decoder.onnx')}")


def _example(model: CaptionerModel, size: tuple[int, int], num_images: int, num_captions: int) -> tuple[Tensor, Tensor]:
    """Noise for pixels and words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(model.config.vocab_size, (num_images, num_captions), generator=generator)
    return torch.randn(num_images, 3, *size, generator=generator), words


def _encoded(encoder: nn.Module, pixels: Tensor, words: Tensor) -> tuple[Any, ...]:
    # Contiguous: of views, such as tokens without the first of them, strides would be traced, which ONNX doesn't have.
    cells, keys, mean, *state = (part.contiguous() for part in encoder(pixels))
    return cells, keys, mean, tuple(part.repeat(1, words.shape[1], 1) for part in state)


def _export(graph: nn.Module, inputs: tuple[Any, ...], path: Path, *, what: str, **kwargs: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(graph, inputs, dynamo=True, verbose=False, external_data=False, **kwargs)
        assert program is not None
        program.save(path)
    except Exception as e:  # tracing meets anything that a part may do
        reason = e
        while reason.__cause__ is not None:
            reason = reason.__cause__  # type: ignore[assignment]
        line = str(reason).strip().partition("\n")[0]
        raise ValueError(f"The {what} can't be exported to ONNX: {type(reason).__name__}: {line}") from e


@torch.no_grad()
def _error(model: CaptionerModel, captioner: OnnxCaptioner, pixels: Tensor, words: Tensor) -> float:
    """By how much what was exported is off in log p of the word after the first."""
    *memory, state = _encoded(_EncoderGraph(model), pixels, words)
    expected, *_ = _DecoderGraph(model)(words, *memory, state)
    arrays, states = captioner.encode(pixels.numpy())
    found, *_ = captioner.read(words.numpy(), arrays, [part.repeat(words.shape[1], 1) for part in states])
    return (torch.from_numpy(found) - expected).abs().max().item()


def _quantize(path: Path) -> None:
    """Weights of matrix products in 8 bits, of which 7 are used, a scale for each column.

    Processors with AVX2, but without instructions for products of 8 bits (VNNI), add two of them up in 16 bits, which
    overflow where weights use all 8 (ONNX Runtime, "Quantize ONNX models"): log p would be off by more than 2.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path).graph
    # Columns are what a vector does not have, such as that of additive attention's scores; it is small, too.
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) < 2}
    excluded = [node.name for node in graph.node if node.op_type == "MatMul" and vectors.intersection(node.input)]
    quantize_dynamic(
        path,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        nodes_to_exclude=excluded,
    )


def _size_of(path: Path) -> str:
    return f"{path.name}, {path.stat().st_size / 1e6:.3g} MB"
