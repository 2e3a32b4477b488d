"""Reports of a training: its log and curves, a line per epoch, and the scores of the best model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.rows import open_row
from ..evaluation.results import write_results
from ..evaluation.scoring import Evaluation
from ..files import explain_write_errors, write_atomically
from .checkpoints import HOW_TO_GO_ON
from .recipe import Recipe
from .run import Run

if TYPE_CHECKING:
    from datasets import Dataset

NUM_CAPTIONS = 5


def write_log(folder: Path, run: Run) -> None:
    """Write `log.jsonl`, one line per epoch, and `curves.png` once there is an epoch.

    Raises:
        OSError: A file can't be written. An earlier log remains as it was.
    """
    from ..visualization.figures import curves_figure

    with explain_write_errors("The log", folder, then=HOW_TO_GO_ON):
        lines = (json.dumps(record) + "\n" for record in run.progress.log)
        write_atomically(folder / "log.jsonl", "".join(lines))
        if run.progress.log:
            write_atomically(folder / "curves.png", curves_figure(run.progress.log).savefig)


def epoch_line(run: Run, *, is_best: bool) -> str:
    """Return a line with the metric, the scores and the time of the last epoch."""
    assert run.stage is not None
    record, metric = run.progress.log[-1], run.stage.objective.metric
    scores = f"BLEU-4 {record['bleu_4']:.3f}  CIDEr {record['cider']:.3f}"
    return (
        f"{run.stage.name} {run.progress.epoch:>2}/{run.stage.epochs}  {metric} {record[metric]:.3f}  {scores}  "
        f"{record['train_seconds'] + record['validation_seconds']:.0f} s{'  (best so far)' if is_best else ''}"
    )


def stage_table(run: Run, select_by: str) -> str:
    """Return a table with a row per stage: its number of epochs, the best epoch, the scores of that, and the time.

    Args:
        run: A run with at least one epoch in its log.
        select_by: Name of the score by which the best epoch is selected.
    """
    rows = [("stage", "epochs", "best", "BLEU-4", "CIDEr", "captions/s", "minutes")]
    for stage in run.stages:
        records = [record for record in run.progress.log if record["stage"] == stage.name]
        if not records:
            continue
        best = max(records, key=lambda record: record[select_by])
        seconds = sum(record["train_seconds"] + record["validation_seconds"] for record in records)
        speed = sum(record["captions_per_second"] for record in records) / len(records)
        scores = f"{best['bleu_4']:.3f}", f"{best['cider']:.3f}"
        rows.append((stage.name, str(len(records)), str(best["epoch"]), *scores, f"{speed:.0f}", f"{seconds / 60:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def report_best(folder: Path, evaluation: Evaluation, rows: Dataset, run: Run, recipe: Recipe) -> None:
    """Write and print the scores of the best model, with a few captions and an attention picture.

    Args:
        folder: Folder of the best model, to which results and picture are written.
        evaluation: Scores of the best model.
        rows: Undecoded rows of the images that the model captioned.
        run: The finished run.
        recipe: Recipe of the run.
    """
    with explain_write_errors("Scores and captions", folder, then=HOW_TO_GO_ON):
        write_results(evaluation, folder)
    print(f"\nScores of the best model on {evaluation.protocol.description}:")
    for line in evaluation.table():
        print(f"  {line}")
    print("\nA few captions:")
    predictions = evaluation.predictions
    for prediction in predictions[:: max(1, len(predictions) // NUM_CAPTIONS)][:NUM_CAPTIONS]:
        print(f"  {prediction.image_id}: {prediction.caption}")
    print(f"\nModel: {folder}\nAttention picture: {write_attention_picture(folder, rows)}")
    print(f"\n{stage_table(run, recipe.stages.select_by)}")


def write_attention_picture(folder: Path, rows: Dataset) -> Path:
    """Caption the first image by the model in a folder, and write `attention.png` there; return its path."""
    from transformers import pipeline

    from ..visualization.figures import attention_figure

    image = open_row(rows[0])
    captioner = pipeline("image-captioning", model=str(folder), device="cpu")
    caption = captioner(image, return_attentions=True)[0]
    figure = attention_figure(image, caption["words"], caption["attentions"], box=caption["box"])
    with explain_write_errors("The attention picture", folder, then=HOW_TO_GO_ON):
        return write_atomically(folder / "attention.png", figure.savefig)
