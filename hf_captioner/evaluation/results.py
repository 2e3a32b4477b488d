"""Results of an evaluation as files: `results.json`, `predictions.jsonl` and `comparison.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import read_json, write_atomically
from ..metrics.resampling import Difference
from .protocol import Protocol
from .scoring import Evaluation

RESULTS = "results.json"


@dataclass(frozen=True)
class Results:
    """Scores as read from a file.

    Args:
        scores: Scores by name.
        intervals: Lower and upper end of the 95 % confidence interval of each score, by name.
        protocol: Data, decoding and software behind the scores; None in files of version 0.1.0.
        description: Data set, split, number of images and of beams in a few words.
    """

    scores: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    protocol: Protocol | None
    description: str


def read_results(source: Evaluation | Mapping[str, Any] | str | Path) -> Results:
    """Read results from an evaluation, its `as_dict`, or a file.

    Version 0.1.0 wrote `scores.json` after training: scores at the top level, and a sentence as the protocol.

    Args:
        source: An evaluation, a record that its `as_dict` returned, or the path of a `results.json` or `scores.json`.

    Raises:
        ValueError: The source is not JSON, holds no scores, or its protocol is incomplete.
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise FileNotFoundError(f"No results at {str(source)!r}. Give a results.json.")
        record = read_json(source, "The file of results")
    else:
        # Through JSON, so that tuples become lists, as in files.
        record = json.loads(json.dumps(source.as_dict() if isinstance(source, Evaluation) else dict(source)))
    name = f"The file of results {str(source)!r}" if isinstance(source, str | Path) else "The record of results"
    record = record if isinstance(record, dict) else {}
    if isinstance(record.get("scores"), dict) and isinstance(record.get("protocol"), dict):
        scores, intervals = record["scores"], record.get("intervals", {})
        if wrong := [score for score, value in scores.items() if not _is_number(value)]:
            raise ValueError(f"{name} has the score {wrong[0]!r} {scores[wrong[0]]!r:.40}, which is no number.")
        is_interval = isinstance(intervals, dict) and all(
            isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)) for ends in intervals.values()
        )
        if not is_interval:
            raise ValueError(f"{name} has intervals that are not two numbers by the name of a score.")
        try:
            protocol = Protocol.from_dict(record["protocol"])
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e
        return Results(scores, intervals, protocol, protocol.description)
    scores = {name: value for name, value in record.items() if _is_number(value)}
    if not scores:
        raise ValueError(f"{name} holds no scores. Give what hf-captioner evaluate or hf-captioner train writes.")
    return Results(scores, {}, None, str(record.get("protocol", "")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_results(folder: str | Path) -> Path | None:
    """Return the results in a captioner's folder: those of `hf-captioner evaluate`, else those written by training."""
    names = (f"evaluation/{RESULTS}", RESULTS, "scores.json")  # the last one by version 0.1.0
    return next((path for name in names if (path := Path(folder, name)).is_file()), None)


def write_results(evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Write `results.json`, and `predictions.jsonl` with the caption and the scores of each image; return the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    records = [asdict(prediction) for prediction in evaluation.predictions]
    for index, record in enumerate(records):
        record["scores"] = {name: column[index] for name, column in evaluation.image_scores.items()}
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    predictions = write_atomically(Path(folder, "predictions.jsonl"), "".join(lines))
    return [_write_json(Path(folder, RESULTS), evaluation.as_dict()), predictions]


def write_comparison(
    first: Evaluation, second: Evaluation, differences: Mapping[str, Difference], folder: str | Path
) -> Path:
    """Write the protocols of two evaluations and the differences between their scores; return the path."""
    protocols = {"first": first.protocol.as_dict(), "second": second.protocol.as_dict()}
    records = {name: difference._asdict() for name, difference in differences.items()}
    return _write_json(Path(folder, "comparison.json"), {**protocols, "second_minus_first": records})


def _write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write a record as indented JSON and return the path."""
    return write_atomically(path, json.dumps(record, indent=2) + "\n")
