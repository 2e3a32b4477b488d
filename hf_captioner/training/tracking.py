"""Log the values, captions and attention pictures of each epoch to TensorBoard or Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator

from ..data.rows import open_row
from ..evaluation.predictions import Prediction
from ..model.modes import in_evaluation
from ..model.pipeline_captioner import ImageCaptioningPipeline
from ..model.processing_captioner import CaptionerProcessor
from .run import Run

if TYPE_CHECKING:
    from datasets import Dataset

NUM_CAPTIONS = 8
NUM_PICTURES = 2
TRAINING_VALUES = ("loss", "reward", "learning_rate", "captions_per_second", "train_seconds")
TRACKERS = {"auto": ("tensorboard",), "tensorboard": ("tensorboard",), "wandb": ("wandb",), "none": ()}


def tracker_names(choice: str) -> list[str]:
    """Return Accelerate's names of the trackers for a value of the recipe's option `tracking`.

    Raises:
        ValueError: A tracker that was chosen by name is not installed.
    """
    names = [name for name in TRACKERS[choice] if choice != "auto" or find_spec(name)]
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"tracking is {choice!r}, but {name} is not installed: run `pip install {name}`.")
    return names


def start_trackers(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Start the accelerator's trackers, if it has any, with the settings of the run."""
    if accelerator.log_with:
        plain = {name: str(value) if value is None else value for name, value in settings.items()}
        accelerator.init_trackers("logs", config=plain)


def log_epoch(run: Run, processor: CaptionerProcessor, predictions: Sequence[Prediction], rows: Dataset) -> None:
    """Log the values of the last epoch, with captions and attention pictures of a few validation images.

    Args:
        run: Run whose log has the epoch. Call this function on the main process alone.
        processor: Processor of the model.
        predictions: Captions of the validation images.
        rows: The validation images, undecoded.
    """
    accelerator = run.accelerator
    if not accelerator.trackers:
        return
    record = run.progress.log[-1]
    step = record["epoch"]
    values = {name: value for name, value in record.items() if name not in ("epoch", "stage")}
    # TensorBoard makes a section of what stands before the slash.
    sections = {name: "train" if name in TRAINING_VALUES else "validation" for name in values}
    accelerator.log({f"{sections[name]}/{name}": value for name, value in values.items()}, step=step)
    chosen = predictions[:: max(1, len(predictions) // NUM_CAPTIONS)][:NUM_CAPTIONS]
    lines = [f"- {prediction.image_id}: {prediction.caption}" for prediction in chosen]
    shown = [prediction for prediction in chosen if prediction.caption][:NUM_PICTURES]
    with in_evaluation(run.validated_model):
        captioner = ImageCaptioningPipeline(run.validated_model, processor=processor, device=accelerator.device)
        pictures = [_attention_picture(captioner, rows[prediction.index]) for prediction in shown]
    for tracker in accelerator.trackers:
        tracker.log({"captions": "\n".join(lines)}, step=step)
        for prediction, picture in zip(shown, pictures, strict=True):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({f"attention/{prediction.image_id}": picture[None]}, step=step, **layout)


def _attention_picture(captioner: ImageCaptioningPipeline, row: dict[str, Any]) -> np.ndarray:
    """Draw the attention of a caption; return pixels `(height, width, 3)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..visualization.figures import attention_figure

    image = open_row(row)
    caption = captioner(image, return_attentions=True, num_beams=1)[0]
    figure = attention_figure(image, caption["words"], caption["attentions"], box=caption["box"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
