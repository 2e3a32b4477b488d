"""Compare a captioner exported to ONNX with the original: captions, scores, speed and size, also with 8-bit weights.

    python benchmarks/export.py outputs/flickr8k outputs/exports --measure speed --out benchmarks/results/export.json
    python benchmarks/export.py outputs/flickr8k outputs/exports --measure scores --out benchmarks/results/export.json

Each command adds its part to the file; the exports are made if they are missing. Besides torch and the two exports of
`export_onnx`, in single precision (`float32`) and with 8-bit weights (`int8`), another choice is compared: matrix
products of the decoder that are computed with 8 bits (`int8_products`), which is faster and changes more captions.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from timing import seconds_of, write_result
from tqdm import tqdm

from hf_captioner import load_captions
from hf_captioner.cli import load_captioner
from hf_captioner.data.rows import open_row, undecoded
from hf_captioner.metrics import caption_metrics
from hf_captioner.model.encoder_model import CaptionerEncoderOutput
from hf_captioner.model.onnx_runner import OnnxCaptioner
from hf_captioner.publishing.export import export_onnx

SYSTEMS = ("float32", "int8", "int8_products")
NUM_COMPARED = 100
SCORES = ("bleu_4", "cider", "rouge_l")


class Torch:
    """The original captioner, with the same interface as `Onnx`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def encode(self, pixel_values: np.ndarray) -> Any:
        """Encode pixels `(B, 3, H, W)` into what `search` takes."""
        return self.model.encoder(torch.from_numpy(pixel_values)).last_hidden_state

    @torch.inference_mode()
    def search(self, encoded: Any) -> list[str]:
        """Return a caption for each image."""
        output = CaptionerEncoderOutput.of(encoded)
        return self.processor.batch_decode(self.model.generate(encoder_outputs=output))  # type: ignore[no-any-return]


class Onnx:
    """An exported captioner, with the size of its files."""

    def __init__(self, folder: Path) -> None:
        self.captioner = OnnxCaptioner(folder)
        self.bytes = {name: (folder / name).stat().st_size for name in ("encoder.onnx", "decoder.onnx")}

    def encode(self, pixel_values: np.ndarray) -> Any:
        """Encode pixels `(B, 3, H, W)` into what `search` takes."""
        return self.captioner.encode(pixel_values)

    def search(self, encoded: Any) -> list[str]:
        """Return a caption for each image."""
        words = self.captioner.search(*encoded).words[:, 0]
        return [self.captioner.tokenizer.decode(row.tolist()) for row in words]


def export(model: Any, processor: Any, folder: Path) -> None:
    """Export a captioner with every choice of what to quantize."""
    export_onnx(model, processor, folder / "float32")
    export_onnx(model, processor, folder / "int8", int8=True)
    shutil.copytree(folder / "int8", folder / "int8_products")
    quantize_dynamic(
        folder / "float32" / "decoder.onnx",
        folder / "int8_products" / "decoder.onnx",
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # else sums overflow on processors with AVX2 alone
    )


def scores(processor: Any, systems: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Score the captions of the validation images, and count how many equal those of torch."""
    rows = undecoded(load_captions(str(arguments.data), "validation"))
    if arguments.max_images is not None:
        rows = rows.select(range(arguments.max_images))
    captions: dict[str, list[str]] = {name: [] for name in systems}
    references: list[list[str]] = []
    for start in tqdm(range(0, len(rows), arguments.batch_size), unit="batch"):
        batch = [rows[index] for index in range(start, min(start + arguments.batch_size, len(rows)))]
        references += [row["captions"] for row in batch]
        pixels = processor(images=[open_row(row) for row in batch])["pixel_values"].numpy()
        for name, system in systems.items():
            captions[name] += system.search(system.encode(pixels))
    found: dict[str, Any] = {"images": len(rows)}
    for name, predictions in captions.items():
        all_scores = caption_metrics(predictions=predictions, references=references)
        equal = [a == b for a, b in zip(predictions, captions["torch"], strict=True)]
        found[name] = {
            **{score: value for score, value in all_scores.items() if score in SCORES},
            f"captions_of_torch_in_first_{NUM_COMPARED}": sum(equal[:NUM_COMPARED]),
            "captions_of_torch": sum(equal),
        }
    return found


def speed(processor: Any, systems: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure images per second of the encoder and of the search, seconds per single image, and sizes of files."""
    rows = undecoded(load_captions(str(arguments.data), "validation"))
    images = [open_row(rows[index]) for index in range(arguments.batch_size)]
    pixels = processor(images=images)["pixel_values"].numpy()
    jobs: dict[str, Callable[[], Any]] = {}
    for name, system in systems.items():
        encoded = system.encode(pixels)
        jobs[f"{name}/encoder"] = lambda system=system: system.encode(pixels)
        jobs[f"{name}/search"] = lambda system=system, encoded=encoded: system.search(encoded)
        one = pixels[:1]
        jobs[f"{name}/one_image"] = lambda system=system, one=one: system.search(system.encode(one))
    seconds = seconds_of(jobs, arguments.repeats)
    found: dict[str, Any] = {"repeats": arguments.repeats}
    for name, system in systems.items():
        encoder, search, one = (seconds[f"{name}/{job}"] for job in ("encoder", "search", "one_image"))
        found[name] = {
            "encoder_images_per_second": len(pixels) / encoder,
            "search_images_per_second": len(pixels) / search,
            "captions_per_second": len(pixels) / (encoder + search),
            "seconds_of_one_image": one,
            "bytes": getattr(system, "bytes", None),
        }
    return found


MEASURES = {"scores": scores, "speed": speed}


def main() -> None:
    """Export the captioner if necessary, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved captioner")
    parser.add_argument("exports", type=Path, help="folder of its exports, made if missing")
    parser.add_argument("--measure", choices=MEASURES, required=True)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="exports to compare with torch")
    parser.add_argument("--data", type=Path, default=Path("../shared/flickr8k"))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_beams", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max_images", type=int, help="score only this many images")
    parser.add_argument("--out", type=Path, help="add the result to this file")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
    model, processor = load_captioner(arguments.model)
    model.generation_config.num_beams = arguments.num_beams
    if not arguments.exports.exists():
        export(model, processor, arguments.exports)
    systems = {
        name: Torch(model, processor) if name == "torch" else Onnx(arguments.exports / name)
        for name in dict.fromkeys(("torch", *arguments.systems))
    }
    found = MEASURES[arguments.measure](processor, systems, arguments)
    settings = {"batch_size": arguments.batch_size, "num_beams": arguments.num_beams}
    known.pop("machine", None)
    write_result(arguments.out, {**known, arguments.measure: {**known.get(arguments.measure, {}), **settings, **found}})


if __name__ == "__main__":
    main()
