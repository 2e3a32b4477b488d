"""Captions of a data set's images: decoded by a model, or read from a file."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..data.loading import read_ahead
from ..data.rows import read_pixels, undecoded
from ..files import is_utf8, parse_json, read_json
from ..model.encoder_model import CaptionerEncoderOutput
from ..model.modeling_captioner import CaptionerModel
from ..model.modes import in_evaluation
from ..model.processing_captioner import CaptionerProcessor

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Arguments of generate() that would show the model the words it has to predict.
TEACHER_FORCING = ("labels", "captions", "decoder_input_ids", "decoder_inputs_embeds")


EXAMPLE = '{"image_id": 42, "caption": "a dog"}'


@dataclass(frozen=True)
class Prediction:
    """The caption of one image.

    Args:
        index: Index of the image in its data set.
        image_id: Id of the image.
        caption: The predicted caption.
        ended: Whether decoding reached `<end>` rather than the maximum length; None if unknown.
        references: Reference captions of the image.
    """

    index: int
    image_id: str
    caption: str
    ended: bool | None
    references: list[str]


@torch.no_grad()
def decode_captions(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    cells: np.ndarray | None = None,
    from_stage: int | None = None,
    batch_size: int = 32,
    description: str = "Decoding captions",
    **generate_kwargs: Any,
) -> list[Prediction]:
    """Caption every image of a data set once, whatever the number of processes. Collective.

    Process r of n captions images r, r + n, r + 2n, …, so that process loads differ by at most one image and no image
    is decoded twice.

    Args:
        model: Captioner, not wrapped for distribution. Its training mode is restored afterwards.
        processor: Processor of the model.
        dataset: Rows as `load_captions` returns them.
        accelerator: Accelerator that knows this process and the others.
        cells: Image cells computed earlier, `(images, P, C)`, to be used in place of the images; with `from_stage`,
            what enters that stage of the encoder, `(images, …)`.
        from_stage: Stage of the encoder that reads `cells`; None if they are image cells.
        batch_size: Number of images decoded at once by each process.
        description: Label of the progress bar.
        generate_kwargs: Arguments of `model.generate`, such as `num_beams`.

    Returns:
        Predictions in the order of the data set, the same on every process.

    Raises:
        ValueError: `generate_kwargs` would show the model the words it has to predict.
    """
    if shown := [name for name in TEACHER_FORCING if name in generate_kwargs]:
        raise ValueError(f"{shown[0]} is given: teacher-forced captions are not scored. Let the model choose words.")
    if cells is None:
        dataset = undecoded(dataset)  # so that images are opened by the threads that read ahead
    own_indices = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    texts = dataset.select_columns(["image_id", "captions"])
    predictions: list[Prediction] = []

    def read(indices: range) -> tuple[range, Tensor]:
        if cells is not None:
            return indices, torch.from_numpy(np.stack([cells[i] for i in indices]))
        return indices, read_pixels(dataset.__getitems__(list(indices)), processor.image_processor)

    batches = (own_indices[start : start + batch_size] for start in range(0, len(own_indices), batch_size))
    hidden = None if accelerator.is_local_main_process else True  # None hides the bar unless stderr is a terminal
    bar = tqdm(total=len(own_indices), desc=description, unit="image", disable=hidden, leave=False)
    for indices, batch in read_ahead(read, batches):
        batch = batch.to(accelerator.device, model.dtype)
        with in_evaluation(model):
            if cells is None:
                inputs: dict[str, Any] = {"pixel_values": batch}
            elif from_stage is None:
                inputs = {"encoder_outputs": CaptionerEncoderOutput.of(batch)}
            else:
                inputs = {"encoder_outputs": model.encoder.forward_from(batch, from_stage)}
            sequences = model.generate(**inputs, **generate_kwargs).cpu()
        ended = (sequences == processor.tokenizer.eos_token_id).any(1).tolist()
        captions = processor.batch_decode(sequences)
        for index, caption, end in zip(indices, captions, ended, strict=True):
            text = texts[index]
            predictions.append(Prediction(index, text["image_id"], caption, end, text["captions"]))
        bar.update(len(indices))
    bar.close()
    gathered = gather_object(predictions) if accelerator.num_processes > 1 else predictions
    predictions = sorted(gathered, key=lambda prediction: prediction.index)
    assert [prediction.index for prediction in predictions] == list(range(len(dataset)))
    return predictions


def read_predictions(path: str | Path, dataset: Dataset, *, allow_missing: bool = False) -> list[Prediction]:
    """Read any system's captions of a data set's images from a file in COCO's result format.

    Captions of other images are ignored, with a warning.

    Args:
        path: JSON list of `{"image_id": …, "caption": …}`, or one such record per line (`.jsonl`). Ids are those of
            the data set, or the numbers at the end of its ids, as in COCO.
        dataset: Rows with `image_id` and `captions`.
        allow_missing: Whether images may have no caption; they are left out, with a warning.

    Returns:
        Predictions in the order of the data set.

    Raises:
        ValueError: The file has another format, or captions marked as teacher-forced; an id occurs twice in the file
            or in the data set; or an image has no caption.
        OSError: The file can't be read.
    """
    records: dict[str, dict[str, Any]] = {}
    for record in _read_records(Path(path)):
        image_id = str(record["image_id"])
        if image_id in records:
            raise ValueError(f"{str(path)!r} has image {image_id!r} more than once; give one caption per image.")
        if record.get("teacher_forced"):
            raise ValueError(f"The caption of image {image_id!r} is teacher-forced and can't be scored: decode it.")
        records[image_id] = record
    image_ids = [str(image_id) for image_id in dataset["image_id"][:]]
    keys = _matching_keys(image_ids, records.keys())
    missing = [image_id for image_id, key in zip(image_ids, keys, strict=True) if key not in records]
    if missing and allow_missing and len(missing) < len(image_ids):
        logger.warning(f"{len(missing)} of {len(image_ids)} images have no caption in {path} and are left out.")
    elif missing:
        raise ValueError(
            f"{str(path)!r} has no caption for {len(missing)} of {len(image_ids)} images, such as {missing[0]!r}; it "
            f"has {len(records)}, such as {next(iter(records), 'none')!r}. Name the data set and split it belongs to, "
            "or leave these images out by --allow_missing."
        )
    if foreign := len(records.keys() - set(keys)):
        logger.warning(f"{foreign} captions of {path} are of other images and are ignored.")
    rows = zip(image_ids, keys, dataset["captions"][:], strict=True)
    return [
        Prediction(index, image_id, records[key]["caption"], records[key].get("ended"), list(references))
        for index, (image_id, key, references) in enumerate(rows)
        if key in records
    ]


def _matching_keys(image_ids: list[str], ids_of_file: Collection[str]) -> list[str]:
    """Return, for each image of a data set, the id under which a file of captions lists it.

    It is the image's id in the data set or, if the file has none of these ids, the number at the end of that id without
    leading zeros: COCO lists `42` for `COCO_val2014_000000000042.jpg`.
    """
    if len(set(image_ids)) < len(image_ids):
        twice = next(image_id for image_id in image_ids if image_ids.count(image_id) > 1)
        raise ValueError(f"The data set has the image id {twice!r} more than once; captions can't be matched by id.")
    if not set(image_ids).isdisjoint(ids_of_file):
        return image_ids
    numbers = [re.search(r"(\d+)(?:\.\w+)?$", image_id) for image_id in image_ids]
    keys = ["" if number is None else number[1].lstrip("0") or "0" for number in numbers]
    return keys if len(set(keys)) == len(keys) else image_ids


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON or JSON Lines file, each with at least `image_id` and `caption`.

    Raises:
        ValueError: The file is not JSON, or one of its records has not these fields. The error names the record.
    """
    if path.suffix == ".jsonl":
        lines = enumerate(path.read_bytes().split(b"\n"), start=1)
        named = [(f"{str(path)!r}, line {number}", line) for number, line in lines if line.strip()]
        records = [(name, parse_json(line, f"{name},")) for name, line in named]
    else:
        found = read_json(path, "The file of captions")
        if not isinstance(found, list):
            raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, not a list of records like {EXAMPLE}.")
        records = [(f"{str(path)!r}, record {number}", record) for number, record in enumerate(found, start=1)]
    for name, record in records:
        if not isinstance(record, dict) or not {"image_id", "caption"} <= record.keys():
            raise ValueError(f"{name}: this is not a record like {EXAMPLE}.")
        for field, kinds in (("image_id", (str, int)), ("caption", str), ("ended", (bool, type(None)))):
            value = record.get(field)
            if not isinstance(value, kinds) or (isinstance(value, bool) and field == "image_id"):
                raise ValueError(f"{name}: the {field} is {value!r:.40}, a {type(value).__name__}. Right is {EXAMPLE}.")
            if isinstance(value, str) and not is_utf8(value):
                raise ValueError(f"{name}: the {field} has half a character (a lone surrogate).")
    return [record for _, record in records]
