"""Captions decoded for a data set, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .data import open_row
from .metrics import caption_metrics
from .modeling_captioner import CaptionerEncoderOutput, CaptionerModel
from .processing_captioner import CaptionerProcessor

if TYPE_CHECKING:
    from datasets import Dataset

# Below these shares the captions say more about the language of the data set than about the images.
FEW_DISTINCT = 0.1
MANY_ENDLESS = 0.1


@dataclass(frozen=True)
class Prediction:
    """The caption decoded for one image.

    Args:
        index: row of the image in its data set.
        image_id: its name.
        caption: decoded words.
        ended: whether decoding reached `<end>` rather than the longest length allowed.
        references: the captions people wrote.
    """

    index: int
    image_id: str
    caption: str
    ended: bool
    references: list[str]


@torch.no_grad()
def decode_captions(
    model: CaptionerModel,
    processor: CaptionerProcessor,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    cells: np.ndarray | None = None,
    batch_size: int = 32,
    description: str = "Decoding captions",
    **generate_kwargs: Any,
) -> list[Prediction]:
    """Caption every image of a data set once, whatever the number of processes.

    Process r of n takes the images r, r + n, r + 2n, …, so shares differ by at most one image, none is decoded
    twice, and no process has to know how the others are getting on.

    Args:
        model: not wrapped for distribution; its mode is restored.
        processor: of the model.
        dataset: undecoded rows with captions (see `data.undecoded`).
        accelerator: names this process and collects from the others.
        cells: image cells computed earlier, `(images, P, C)`, in place of the images.
        batch_size: images decoded at once.
        description: beside the progress bar.
        generate_kwargs: for `model.generate`, such as `num_beams`.

    Returns:
        Predictions in the order of the data set, the same on every process.
    """
    was_training = model.training
    model.eval()
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    texts = dataset.select_columns(["image_id", "captions"])
    predictions: list[Prediction] = []
    bar = tqdm(
        total=len(mine), desc=description, unit="image", disable=not accelerator.is_local_main_process, leave=False
    )
    for start in range(0, len(mine), batch_size):
        indices = list(mine[start : start + batch_size])
        if cells is not None:
            batch = torch.from_numpy(np.stack([cells[i] for i in indices])).to(accelerator.device, model.dtype)
            inputs: dict[str, Any] = {"encoder_outputs": CaptionerEncoderOutput.of(batch)}
        else:
            images = [open_row(dataset[i]) for i in indices]
            inputs = {"pixel_values": processor(images=images)["pixel_values"].to(accelerator.device, model.dtype)}
        sequences = model.generate(**inputs, **generate_kwargs).cpu()
        ended = (sequences == processor.tokenizer.eos_token_id).any(1).tolist()
        captions = processor.batch_decode(sequences)
        for index, caption, end in zip(indices, captions, ended, strict=True):
            text = texts[index]
            predictions.append(Prediction(index, text["image_id"], caption, end, text["captions"]))
        bar.update(len(indices))
    bar.close()
    model.train(was_training)
    gathered = gather_object(predictions) if accelerator.num_processes > 1 else predictions
    predictions = sorted(gathered, key=lambda prediction: prediction.index)
    assert [prediction.index for prediction in predictions] == list(range(len(dataset)))
    return predictions


def score_captions(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Scores of `caption_metrics`, and the share of distinct captions and of captions without `<end>`."""
    captions = [prediction.caption for prediction in predictions]
    scores = caption_metrics(captions, [prediction.references for prediction in predictions])
    scores["distinct_captions"] = len(set(captions)) / len(captions)
    scores["endless_captions"] = sum(not prediction.ended for prediction in predictions) / len(predictions)
    return scores


def collapse_warnings(scores: dict[str, float]) -> list[str]:
    """What to tell the user where captions have collapsed; empty where they have not."""
    warnings = []
    if scores["distinct_captions"] < FEW_DISTINCT:
        warnings.append(
            f"Captions have collapsed: only {scores['distinct_captions']:.1%} of them are distinct. "
            "Early epochs look like this; later, lower the learning rate or check that images reach the model."
        )
    if scores["endless_captions"] > MANY_ENDLESS:
        warnings.append(
            f"{scores['endless_captions']:.1%} of the captions never reach <end>. "
            "Train longer, or raise max_length if the references are that long."
        )
    return warnings


def prediction_records(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Predictions as plain records for JSON."""
    return [asdict(prediction) for prediction in predictions]
