"""Captions by onnxruntime, numpy, Pillow and tokenizers alone, from a folder that `hf_captioner.publishing.export` has written.

The folder holds this module too, so that nothing of hf_captioner, torch or transformers need be installed:

    pip install -r FOLDER/requirements.txt
    python FOLDER/caption.py photo.jpg another.png
    python FOLDER/caption.py photo.jpg --num_captions 3 --json captions.json --attentions

or, with FOLDER on the path, `from onnx_captioner import OnnxCaptioner`.
"""

# B: images, K: beams of an image, S: captions returned for an image, T: words, P: image cells (rows x columns)

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .images import Box, ImageSource, Size, open_as_used
from .onnx_search import Arrays, Captions, Settings, search
from .pixels import PixelTransform, visible_box, write_pixels

Result = dict[str, Any]

FORMAT = 1  # of the folder


@dataclass(frozen=True)
class Pixels:
    """The transform of `CaptionerImageProcessor`, to the same pixels but for levels of 255 here and there.

    It resizes by torch, and this without it, by Pillow.

    Args:
        size: height and width of what the model gets.
        interpolation: a name of Pillow's, in lower case.
        crop_pct: the image is resized to `size / crop_pct`, then its centre of `size` is taken.
        crop_mode: `"center"`, `"squash"` or `"border"`.
        mean: of red, green and blue on the scale from 0 to 1, subtracted.
        std: of the three, divided by.
    """

    size: tuple[int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, sources: Sequence[ImageSource]) -> tuple[np.ndarray, list[Size]]:
        """Images to `(B, 3, H, W)`, and the width and height of each."""
        pixel_values = np.empty((len(sources), 3, *self.size), np.float32)
        red, green, blue = (round(255 * value) if self.crop_mode == "border" else 0 for value in self.mean)
        transform = PixelTransform(self.resized, self.interpolation, (red, green, blue), self.mean, self.std)
        images = (open_as_used(source, self.resized) for source in sources)
        return pixel_values, write_pixels(pixel_values, images, transform)

    def resized(self, width: int, height: int) -> Size:
        """Width and height before the crop, as timm and torchvision round them."""
        target_height, target_width = (math.floor(edge / self.crop_pct) for edge in self.size)
        if self.crop_mode == "squash":
            return target_width, target_height
        if self.crop_mode == "center" and target_height == target_width:
            longer = int(target_height * max(width, height) / min(width, height))
            return (target_width, longer) if width <= height else (longer, target_height)
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(width / ratio), round(height / ratio)


class OnnxCaptioner:
    """Captions images: `OnnxCaptioner(FOLDER)("photo.jpg")[0]["generated_text"]`.

    Args:
        folder: that `hf_captioner.publishing.export` has written.
        num_threads: of onnxruntime; None for its own choice, a thread for each core.
        providers: of onnxruntime, such as `["CUDAExecutionProvider"]`; the CPU by default.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is of another version.
    """

    def __init__(
        self, folder: str | Path, *, num_threads: int | None = None, providers: Sequence[str] | None = None
    ) -> None:
        import onnxruntime

        folder = Path(folder)
        if not (folder / "captioner.json").is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no exported captioner: it has no captioner.json.")
        config = json.loads((folder / "captioner.json").read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(
                f"{str(folder)!r} has format {config['format']}, and this program reads {FORMAT}; export it anew."
            )
        self.pixels = Pixels(**{**config["pixels"], "size": tuple(config["pixels"]["size"])})
        self.grid: tuple[int, int] = tuple(config["grid"])
        self.grid_box: Box | None = config["grid_box"] and tuple(config["grid_box"])
        self.settings = Settings(**config["generation"])
        self.special_ids: list[int] = config["special_ids"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / name, options, providers=providers or ["CPUExecutionProvider"])
            for name in ("encoder.onnx", "decoder.onnx")
        )
        self._num_states = sum(value.name.startswith("state_") for value in self.decoder.get_inputs())

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 8,
        return_scores: bool = False,
        return_attentions: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """Caption images.

        Args:
            images: an image or a list of them, each a path, bytes, a PIL image or an array (a URL where
                huggingface_hub is installed).
            batch_size: images at once.
            return_scores: see below.
            return_attentions: see below.
            settings: fields of `Settings`, such as `num_beams`, in place of those that were exported.

        Returns:
            For an image a list of `num_return_sequences` dicts, the best caption first, and for a list of images a
            list of such lists. As with the pipeline `image-captioning`, they have `generated_text`; if asked for,
            `words`, and `word_scores` (log p of each), `score` (their mean, `<end>` included), `attentions`
            `(T, rows, columns)` and `box`, what these maps cover in pixels of the upright image.

        Raises:
            ValueError: an unknown setting, or an image that is not readable; see `open_image` for other errors.
        """
        single = not isinstance(images, list | tuple)
        sources: Sequence[Any] = [images] if single else images  # type: ignore[assignment]
        search_settings = self._settings(settings)
        results: list[list[Result]] = []
        for start in range(0, len(sources), batch_size):
            pixel_values, sizes = self.pixels(sources[start : start + batch_size])
            memory, state = self.encode(pixel_values)
            captions = self.search(memory, state, search_settings, attentions=return_attentions)
            for index, size in enumerate(sizes):
                results.append(self._describe(captions.of(np.array([index])), return_scores, size))
        return results[0] if single else results

    def encode(self, pixel_values: np.ndarray) -> tuple[Arrays, Arrays]:
        """All that is computed once an image: pixels `(B, 3, H, W)` to cells, keys and mean, and the first states."""
        outputs = self.encoder.run(None, {"pixel_values": pixel_values})
        return outputs[: -self._num_states], outputs[-self._num_states :]

    def search(
        self, memory: Arrays, state: Arrays, settings: Settings | None = None, *, attentions: bool = False
    ) -> Captions:
        """Captions of encoded images."""
        return search(
            self.read, memory, state, settings or self.settings, num_cells=math.prod(self.grid) if attentions else 0
        )

    def read(self, words: np.ndarray, memory: Arrays, state: Arrays) -> tuple[np.ndarray, np.ndarray, Arrays]:
        """Read a word of each caption; see `onnx_search.Read`."""
        given = zip(self.decoder.get_inputs(), (words, *memory, *state), strict=True)
        log_probs, weights, *state = self.decoder.run(None, {value.name: array for value, array in given})
        return log_probs, weights, state

    def _settings(self, changes: Mapping[str, Any]) -> Settings:
        known = [field.name for field in fields(Settings)]
        if unknown := changes.keys() - set(known):
            raise ValueError(f"Unknown: {', '.join(sorted(unknown))}. An exported captioner knows {', '.join(known)}.")
        return Settings(**{**vars(self.settings), **changes})

    def _describe(self, captions: Captions, with_scores: bool, image_size: tuple[int, int]) -> list[Result]:
        """The results of one image."""
        results = []
        for number in range(captions.words.shape[1]):
            ids = captions.words[0, number, 1:].tolist()  # without <start>
            places = [place for place, token in enumerate(ids) if token not in self.special_ids]
            result: Result = {"generated_text": self.tokenizer.decode(ids, skip_special_tokens=True)}
            weights, word_scores = captions.weights[0, number, 1:], captions.word_scores[0, number, 1:]
            if with_scores or weights.size:
                result["words"] = [self.tokenizer.id_to_token(ids[place]) for place in places]
            if with_scores:
                ends = [place for place, token in enumerate(ids) if token in self.settings.eos_token_id]
                result["score"] = float(word_scores[: ends[0] + 1 if ends else len(ids)].mean())
                result["word_scores"] = word_scores[places].tolist()
            if weights.size:
                maps = weights[places].reshape(-1, *self.grid)
                total = maps.sum((1, 2), keepdims=True)  # below 1 where an attention also looks away from the image
                result["attentions"] = maps / total.clip(min=np.finfo(np.float32).tiny)
                crop = self.pixels.size[::-1]
                result["box"] = visible_box(image_size, self.pixels.resized(*image_size), crop, self.grid_box)
            results.append(result)
        return results


def main(folder: str | Path, argv: Sequence[str]) -> None:
    """The command line of an exported folder; what the user can mend ends in one line and exit code 2."""
    arguments = _parse(argv)
    changes = {} if arguments.num_beams is None else {"num_beams": arguments.num_beams}
    try:
        captioner = OnnxCaptioner(folder, num_threads=arguments.threads)
        changes["num_beams"] = changes.get("num_beams") or max(captioner.settings.num_beams, arguments.num_captions)
        records = []
        for start in range(0, len(arguments.images), arguments.batch_size):
            names = arguments.images[start : start + arguments.batch_size]
            found = captioner(
                names,
                batch_size=len(names),
                return_scores=True,
                return_attentions=arguments.attentions,
                num_return_sequences=arguments.num_captions,
                **changes,
            )
            for name, captions in zip(names, found, strict=True):
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
        prog="caption.py", description="Caption image files: a line for each, the file and the caption, with a tab."
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", help="image files")
    add("--num_beams", type=_positive, metavar="N", help="beams (default: as exported)")
    add("--num_captions", type=_positive, metavar="N", default=1, help="captions for each image, the best first")
    add("--batch_size", type=_positive, metavar="N", default=8, help="images at once (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write captions, their words and log-probabilities here")
    add("--attentions", action="store_true", help="with the attention map of each word in that file")
    add("--threads", type=_positive, metavar="N", help="threads (default: one for each core)")
    arguments = parser.parse_args(argv)
    if arguments.attentions and arguments.json is None:
        parser.error("--attentions go to a file; name one with --json FILE")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number
