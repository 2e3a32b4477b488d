"""What a training tells: its log, a line an epoch, a table of its stages, and the best model's captions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.rows import open_row
from ..evaluation.predictions import Prediction, prediction_records, score_captions
from .checkpoints import said_if_full
from .run import Run

if TYPE_CHECKING:
    from datasets import Dataset

NUM_CAPTIONS = 5


def write_log(folder: Path, run: Run) -> None:
    """`log.jsonl`, a line an epoch, whole or as it was, and `curves.png` once there is an epoch."""
    from ..visualization.figures import curves_figure

    partial = folder / ".log.partial"
    with said_if_full("The log", folder):
        partial.write_text("".join(json.dumps(record) + "\n" for record in run.progress.log))
        os.replace(partial, folder / "log.jsonl")
        if run.progress.log:
            curves_figure(run.progress.log).savefig(folder / "curves.png")


def epoch_line(run: Run, *, is_best: bool) -> str:
    """The last epoch in one line."""
    assert run.stage is not None
    record, figure = run.progress.log[-1], run.stage.objective.figure
    scores = f"BLEU-4 {record['bleu_4']:.3f}  CIDEr {record['cider']:.3f}"
    return (
        f"{run.stage.name} {run.progress.epoch:>2}/{run.stage.epochs}  {figure} {record[figure]:.3f}  {scores}  "
        f"{record['train_seconds'] + record['validation_seconds']:.0f} s{'  (best so far)' if is_best else ''}"
    )


def summary(run: Run, select_by: str) -> str:
    """A table of the stages: epochs, the best of them, its scores, and the time."""
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


def report_best(folder: Path, predictions: Sequence[Prediction], rows: Dataset, protocol: str) -> None:
    """Write and print what the best model, saved in the folder, is worth, with some captions and an attention picture.

    Args:
        folder: where `scores.json`, `predictions.json` and `attention.png` go.
        predictions: of the best model.
        rows: what it captioned, undecoded.
        protocol: how, in a line.
    """
    from transformers import pipeline

    from ..visualization.figures import attention_figure

    scores = score_captions(predictions)
    files = {"scores.json": {"protocol": protocol, **scores}, "predictions.json": prediction_records(predictions)}
    with said_if_full("Scores and captions", folder):
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nScores of the best model on {protocol}:")
    for name, value in scores.items():
        print(f"  {name:<18} {value:.4f}")
    print("\nA few captions:")
    for prediction in predictions[:: max(1, len(predictions) // NUM_CAPTIONS)][:NUM_CAPTIONS]:
        print(f"  {prediction.image_id}: {prediction.caption}")

    image = open_row(rows[0])
    captioner = pipeline("image-captioning", model=str(folder), device="cpu")
    caption = captioner(image, return_attentions=True)[0]
    figure = attention_figure(image, caption["words"], caption["attentions"], box=caption["box"])
    with said_if_full("The attention picture", folder):
        figure.savefig(folder / "attention.png")
    print(f"\nModel: {folder}\nAttention picture: {folder / 'attention.png'}")
