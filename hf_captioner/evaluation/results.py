"""Results of an evaluation as files: `results.json`, `predictions.jsonl` and `comparison.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .protocol import Protocol
from .scoring import Comparison, Evaluation

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"
COMPARISON = "comparison.json"


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

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Results:
        """Rebuild results from what `Evaluation.as_dict` returned.

        Version 0.1.0 wrote `scores.json` after training: scores at the top level, and a sentence as the protocol.

        Raises:
            ValueError: There are no scores, or the protocol is incomplete.
        """
        if isinstance(record.get("scores"), Mapping) and isinstance(record.get("protocol"), Mapping):
            protocol = Protocol.from_dict(record["protocol"])
            return cls(record["scores"], record.get("intervals", {}), protocol, protocol.description)
        scores = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if not scores:
            raise ValueError("results hold no scores. Give what hf-captioner evaluate or hf-captioner train writes.")
        return cls(scores, {}, None, str(record.get("protocol", "")))


def read_results(source: Evaluation | Mapping[str, Any] | str | Path) -> Results:
    """Read results from whatever holds them.

    Args:
        source: An evaluation, a record that its `as_dict` returned, or the path of a `results.json`, or of a
            `scores.json` of version 0.1.0.

    Raises:
        ValueError: The source holds no scores, or is not JSON.
        FileNotFoundError: There is no such file.
    """
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise FileNotFoundError(f"No results at {str(source)!r}. Give a results.json.")
        try:
            record = json.loads(Path(source).read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            raise ValueError(f"The results {str(source)!r} are not JSON: {e}") from e
    else:
        # Through JSON, so that tuples become lists, as in files.
        record = json.loads(json.dumps(source.as_dict() if isinstance(source, Evaluation) else dict(source)))
    if not isinstance(record, dict):
        raise ValueError(f"results hold no scores: {str(source)!r} is a {type(record).__name__}, not a record.")
    return Results.from_dict(record)


def find_results(folder: str | Path) -> Path | None:
    """Return the results of a captioner: those of `hf-captioner evaluate`, else those written after training.

    Args:
        folder: Folder of the captioner.
    """
    names = (f"evaluation/{RESULTS}", RESULTS, "scores.json")  # the last one by version 0.1.0
    return next((path for name in names if (path := Path(folder, name)).is_file()), None)


def write_results(evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Write `results.json`, and `predictions.jsonl` with the caption and the scores of each image; return the paths.

    Args:
        evaluation: What to write.
        folder: Where to; made if it does not exist.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    records = [asdict(prediction) for prediction in evaluation.predictions]
    for index, record in enumerate(records):
        record["scores"] = {name: column[index] for name, column in evaluation.image_scores.items()}
    predictions = Path(folder, PREDICTIONS)
    predictions.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return [_write_json(Path(folder, RESULTS), evaluation.as_dict()), predictions]


def write_comparison(comparison: Comparison, folder: str | Path) -> Path:
    """Write `comparison.json` and return its path."""
    return _write_json(Path(folder, COMPARISON), comparison.as_dict())


def _write_json(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
