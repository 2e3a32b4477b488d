"""Captioning with a folder written by `hf-captioner export`, by onnxruntime, numpy, Pillow and tokenizers alone.

The folder holds this module too, so neither hf_captioner nor torch nor transformers has to be installed:

    pip install -r FOLDER/requirements.txt
    python FOLDER/caption.py photo.jpg another.png
    python FOLDER/caption.py photo.jpg --num_captions 3 --json captions.json --attentions

In Python, with FOLDER on the path, it is `from onnx_captioner import OnnxCaptioner`.
"""

# B: images, K: beams of an image, T: words, P: image cells (rows x columns), H: height, W: width

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .folder_check import check_generation, check_links, one_line_errors, read_json, refuse_pointer
from .images import Box, ImageSource, OpenedImage, Size, open_as_used
from .onnx_search import Arrays, Captions, Settings, search
from .pixels import PixelTransform, check_settings, visible_box, write_pixels

Result = dict[str, Any]

FORMAT = 1  # version of the folder's layout


@dataclass(frozen=True)
class Pixels:
    """The transform of `CaptionerImageProcessor` without torch: resize, crop the centre, standardise.

    Images are resized by Pillow instead of torch, which changes some pixels by a few levels of 255.
    """

    size: tuple[int, int]  # height and width of the model's input
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        check_settings(self.size, self.interpolation, self.crop_pct, self.crop_mode, self.mean, self.std)

    def __call__(self, sources: Sequence[ImageSource]) -> tuple[np.ndarray, list[Size]]:
        """Return the pixel values of images, `(B, 3, H, W)`, and the width and height of each image."""
        pixel_values = np.empty((len(sources), 3, *self.size), np.float32)
        red, green, blue = (round(255 * value) if self.crop_mode == "border" else 0 for value in self.mean)
        transform = PixelTransform(self.resized, self.interpolation, (red, green, blue), self.mean, self.std)
        return pixel_values, write_pixels(pixel_values, map(self.open, sources), transform)

    def open(self, source: ImageSource) -> OpenedImage:
        """Open an image, a large JPEG file at a reduced size; see `open_as_used` for arguments and errors."""
        return open_as_used(source, self.resized)

    def resized(self, width: int, height: int) -> Size:
        """Return the width and height of an image before the crop, rounded as timm and torchvision do."""
        target_height, target_width = (math.floor(edge / self.crop_pct) for edge in self.size)
        if self.crop_mode == "squash":
            return target_width, target_height
        if self.crop_mode == "center" and target_height == target_width:
            longer = int(target_height * max(width, height) / min(width, height))
            return (target_width, longer) if width <= height else (longer, target_height)
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)


class OnnxCaptioner:
    """An exported captioner: `OnnxCaptioner(FOLDER)("photo.jpg")[0]["generated_text"]`.

    Args:
        folder: Folder that `hf-captioner export` has written.
        num_threads: Threads of onnxruntime (default: one per core).
        providers: Execution providers of onnxruntime, such as `["CUDAExecutionProvider"]` (default: the CPU's).

    Raises:
        FileNotFoundError: The folder does not exist or holds no exported captioner.
        ValueError: The folder was written by a version of hf_captioner with another format.
    """

    def __init__(
        self, folder: str | Path, *, num_threads: int | None = None, providers: Sequence[str] | None = None
    ) -> None:
        import onnxruntime

        folder = Path(folder)
        if not (folder / "captioner.json").is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no exported captioner: it has no captioner.json.")
        check_links(folder)
        config = read_json(folder / "captioner.json")
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{str(folder)!r} has format {config.get('format')}, but this program reads {FORMAT}; export it again."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        # Threads that wait in a loop for the next small step take their time from each other and from other programs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Weights that the file holds in 8 bits become single precision now, not again at every step.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # takes less memory

        def load(name: str) -> Any:
            graph = _checked_graph(folder / name)
            return onnxruntime.InferenceSession(graph, options, providers=providers or ["CPUExecutionProvider"])

        with one_line_errors(folder):
            self.pixels = Pixels(**{**config["pixels"], "size": tuple(config["pixels"]["size"])})
            self.grid: tuple[int, int] = tuple(config["grid"])
            self.grid_box: Box | None = config["grid_box"] and tuple(config["grid_box"])
            self.settings = Settings(**config["generation"])
            self.special_ids: list[int] = config["special_ids"]
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            check_generation(config["generation"], self.tokenizer.get_vocab_size())
            with ThreadPoolExecutor() as pool:
                self.encoder, self.decoder = pool.map(load, ("encoder.onnx", "decoder.onnx"))
            self._check_graphs()
        self._num_states = len(self.decoder.get_inputs()) - 4

    def _check_graphs(self) -> None:
        """Raise a ValueError if the graphs' inputs and outputs aren't those of an export with these settings."""
        pixels, *others = self.encoder.get_inputs()
        _, cells, *_ = self.decoder.get_inputs()
        names = [value.name for value in self.decoder.get_inputs()]
        states = [f"state_{number}" for number in range(len(names) - 4)]
        if (
            (pixels.name, list(pixels.shape[1:]), others) != ("pixel_values", [3, *self.pixels.size], [])
            or (names, bool(states)) != (["words", "cells", "keys", "mean", *states], True)
            or [value.name for value in self.encoder.get_outputs()] != ["cells", "keys", "mean", *states]
            or len(self.decoder.get_outputs()) != 2 + len(states)
            or self.grid != (int(self.grid[0]), int(self.grid[1]))
            or cells.shape[1] != math.prod(self.grid)
            or not all(type(token) is int for token in self.special_ids)
            or not (self.grid_box is None or [isinstance(edge, float | int) for edge in self.grid_box] == [True] * 4)
        ):
            raise ValueError("captioner.json, encoder.onnx and decoder.onnx do not belong together. Export it again.")

    def __call__(self, images: ImageSource | Sequence[ImageSource], **options: Any) -> list[Any]:
        """Caption images.

        Args:
            images: An image or a list of images, each a path, bytes, a PIL image or an array (or a URL, if
                huggingface_hub is installed).
            options: Arguments of `stream`.

        Returns:
            For an image, a list of `num_return_sequences` dicts, the best caption first; for a list of images, a list
            of such lists. As with the pipeline `image-captioning`, a dict has

            - `generated_text`, the caption;
            - `words`, and `word_scores`, log p of each of them;
            - `score`, the mean log p of the words, `<end>` included;
            - `attentions`, one map per word, `(T, rows, columns)`, and `box`, `(left, top, right, bottom)` of what
              the maps cover, in pixels of the upright image.

        Raises:
            ValueError: A setting is unknown or an image is not readable. `open_image` lists other errors.
        """
        if isinstance(images, list | tuple):
            return list(self.stream(images, **options))
        return next(self.stream([images], **options))  # type: ignore[list-item]

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 8,
        return_scores: bool = False,
        return_attentions: bool = False,
        **settings: Any,
    ) -> Iterator[list[Result]]:
        """Caption images, and yield the captions of each as soon as its batch is decoded.

        Args:
            images: Images of any number, opened when their batch is due.
            batch_size: Number of images to caption at once.
            return_scores: Add `words`, `word_scores` and `score` to the results.
            return_attentions: Add `words`, `attentions` and `box` to the results.
            settings: Fields of `Settings`, such as `num_beams`, that replace the exported ones.
        """
        known = [field.name for field in fields(Settings)]
        if unknown := settings.keys() - set(known):
            raise ValueError(f"Unknown settings: {', '.join(sorted(unknown))}. Choose from {', '.join(known)}.")
        search_settings = replace(self.settings, **settings)
        images = iter(images)
        while batch := list(islice(images, batch_size)):
            pixel_values, sizes = self.pixels(batch)
            memory, state = self.encode(pixel_values)
            captions = self.search(memory, state, search_settings, attentions=return_attentions)
            for index, size in enumerate(sizes):
                yield self._describe(captions.select_images(np.array([index])), return_scores, size)

    def encode(self, pixel_values: np.ndarray) -> tuple[Arrays, Arrays]:
        """Return cells, attention keys and mean cells of images `(B, 3, H, W)`, and the first states `(B, 1, D)`."""
        outputs = self.encoder.run(None, {"pixel_values": pixel_values})
        return outputs[: -self._num_states], outputs[-self._num_states :]

    def search(
        self, memory: Arrays, state: Arrays, settings: Settings | None = None, *, attentions: bool = False
    ) -> Captions:
        """Return the captions of encoded images; the first two arguments are the results of `encode`."""
        num_cells = math.prod(self.grid) if attentions else 0
        return search(self.read, memory, state, settings or self.settings, num_cells=num_cells)

    def read(self, words: np.ndarray, memory: Arrays, state: Arrays) -> tuple[np.ndarray, np.ndarray, Arrays]:
        """Run the decoder for one more word of each caption; see `onnx_search.Read` for arguments and results."""
        inputs = zip(self.decoder.get_inputs(), (words, *memory, *state), strict=True)
        log_probs, weights, *state = self.decoder.run(None, {value.name: array for value, array in inputs})
        return log_probs, weights, state

    def _describe(self, captions: Captions, with_scores: bool, image_size: Size) -> list[Result]:
        """Return the results for one image, whose captions are the only ones given."""
        results = []
        for number in range(captions.words.shape[1]):
            ids = captions.words[0, number, 1:].tolist()  # without <start>
            weights, word_scores = captions.weights[0, number, 1:], captions.word_scores[0, number, 1:]
            positions = [position for position, token in enumerate(ids) if token not in self.special_ids]
            result: Result = {"generated_text": self.tokenizer.decode(ids, skip_special_tokens=True)}
            if with_scores or weights.size:
                result["words"] = [self.tokenizer.id_to_token(ids[position]) for position in positions]
            if with_scores:
                ends = [position for position, token in enumerate(ids) if token in self.settings.eos_token_id]
                result["score"] = float(word_scores[: ends[0] + 1 if ends else len(ids)].mean())
                result["word_scores"] = word_scores[positions].tolist()
            if weights.size:
                maps = weights[positions].reshape(-1, *self.grid)
                total = maps.sum((1, 2), keepdims=True)  # below 1 if an attention also looks away from the image
                result["attentions"] = maps / total.clip(min=np.finfo(np.float32).tiny)
                crop = self.pixels.size[::-1]
                result["box"] = visible_box(image_size, self.pixels.resized(*image_size), crop, self.grid_box)
            results.append(result)
        return results


def _checked_graph(path: Path) -> bytes:
    """Return the content of an ONNX file, or raise a ValueError if it keeps weights in another file, of any name."""
    data = path.read_bytes()
    refuse_pointer(path, data)
    if b"\x0a\x08location\x12" in data:  # the first field of an entry of TensorProto.external_data
        raise ValueError(f"{str(path)!r} keeps weights in another file, which an export never does. It is not read.")
    return data


def main(folder: str | Path, argv: Sequence[str]) -> None:
    """Run the command line of an exported folder. Errors that users can fix end in one line and exit code 2."""
    arguments = _parse(argv)
    try:
        captioner = OnnxCaptioner(folder, num_threads=arguments.threads)
        num_beams = arguments.num_beams or max(captioner.settings.num_beams, arguments.num_captions)
        results = captioner.stream(
            arguments.images,
            batch_size=arguments.batch_size,
            return_scores=True,
            return_attentions=arguments.attentions,
            num_return_sequences=arguments.num_captions,
            num_beams=num_beams,
        )
        records = []
        for name, captions in zip(arguments.images, results, strict=True):
            records.append({"image": name, "captions": captions})
            for caption in captions:
                print(name, caption["generated_text"], sep="\t", flush=True)
        if arguments.json is not None:
            text = json.dumps(records, indent=1, ensure_ascii=False, default=lambda array: array.tolist())
            arguments.json.write_text(text + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="caption.py", description="Caption image files. Each line of the output is a file, a tab and its caption."
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="image files")
    add("--num_beams", type=_positive, metavar="N", help="number of beams (default: as exported)")
    add("--num_captions", type=_positive, metavar="N", default=1, help="captions per image, best first (default: 1)")
    add("--batch_size", type=_positive, metavar="N", default=8, help="images to caption at once (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="JSON file to write captions, their words and log-probabilities to")
    add("--attentions", action="store_true", help="include the attention map of each word in the JSON file")
    add("--threads", type=_positive, metavar="N", help="number of threads (default: one per core)")
    arguments = parser.parse_args(argv)
    if arguments.attentions and arguments.json is None:
        parser.error("--attentions needs --json FILE, the file that the maps are written to")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number
