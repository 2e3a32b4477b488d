"""METEOR and SPICE, which are Java programs: run through pycocoevalcap, an optional extra."""

# N: images

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .ngrams import Predictions, References
from .scores import Tally

_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def coco_scorer(name: str) -> Any:
    """A class of pycocoevalcap that needs Java, such as `"meteor.meteor:Meteor"`.

    Raises:
        ImportError: pycocoevalcap is not installed.
        FileNotFoundError: there is no Java.
    """
    metric = name.rpartition(":")[2].upper()
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError(f'{metric} needs pycocoevalcap: pip install "hf_captioner[metrics]", and Java.')
    if shutil.which("java") is None:
        raise FileNotFoundError(f"{metric} needs Java: install a JRE so that `java` is on the path.")
    module, _, scorer = name.partition(":")
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)


def _keyed(predictions: Predictions, references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Captions as pycocoevalcap's scorers take them: references, then predictions."""
    wanted = {image: [" ".join(tokens) for tokens in captions] for image, captions in enumerate(references)}
    return wanted, {image: [" ".join(tokens)] for image, tokens in enumerate(predictions)}


def meteor(predictions: Predictions, references: References) -> Tally:
    """`meteor`, from 0 to 1: METEOR 1.5 for English (Denkowski and Lavie 2014), as pycocoevalcap 1.2 runs it.

    Java aligns the captions; from the figures of each alignment scores are computed here, so that they can be
    resampled.

    Raises:
        ImportError: pycocoevalcap is not installed.
        OSError: there is no Java, or it fails.
    """
    scorer = coco_scorer("meteor.meteor:Meteor")()
    lines: list[str] = []
    align = scorer._stat

    def recorded(*captions: Any) -> str:
        lines.append(align(*captions))
        return lines[-1]

    scorer._stat = recorded
    try:
        scorer.compute_score(*_keyed(predictions, references))
        rows = np.array([line.split() for line in lines], np.float64)
    except (OSError, ValueError) as e:
        with suppress(RuntimeError):
            scorer.lock.release()  # or its __del__ waits for ever
        raise OSError(f"METEOR's Java program failed ({e or type(e).__name__}). It takes 2 GB of memory.") from e
    # A prediction that is a reference word for word has no chunks to be penalised for.
    lengths, chunks, matched = rows[:, :2], rows[:, 20], rows[:, 21:]
    chunks[(chunks == 1) & (matched == lengths).all(1)] = 0
    return Tally(("meteor",), rows, _meteor)


# METEOR 1.5's parameters for English: weights of exact, stem, synonym and paraphrase matches, and the rest.
_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def _meteor(rows: np.ndarray) -> np.ndarray:
    """Denkowski and Lavie 2014, eq. 1 to 4. Columns: lengths of both captions, their function words, for each kind
    of match its content words and function words in both, chunks, matched words of both.
    """  # noqa: D205
    matches = rows[:, 4:20].reshape(-1, 4, 2, 2)  # (R, kinds, content or function words, prediction or reference)
    of_kinds = _DELTA * matches[:, :, 0] + (1 - _DELTA) * matches[:, :, 1]
    lengths = _DELTA * (rows[:, :2] - rows[:, 2:4]) + (1 - _DELTA) * rows[:, 2:4]
    precision, recall = _ratio(np.einsum("k,rks->rs", _WEIGHTS, of_kinds), lengths).T
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _ratio(rows[:, 20], rows[:, 21:].mean(1))
    return (mean * (1 - _GAMMA * fragmentation**_BETA))[:, None]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def spice(predictions: Predictions, references: References) -> Tally:
    """`spice`, from 0 to 1: SPICE 1.0 (Anderson et al. 2016), as pycocoevalcap 1.2 runs it; the mean over images.

    Raises:
        ImportError: pycocoevalcap is not installed.
        OSError: there is no Java, its parser's models have not been fetched, or it fails.
    """
    build = coco_scorer("spice.spice:Spice")
    folder = Path(importlib.import_module("pycocoevalcap.spice").__file__ or "").parent / "lib"
    if not all((folder / name).is_file() for name in _SPICE_MODELS):
        raise FileNotFoundError(
            "SPICE needs the models of Stanford CoreNLP 3.6.0, once: python -m pycocoevalcap.spice.get_stanford_models"
        )
    try:
        _, found = build().compute_score(*_keyed(predictions, references))
    except (subprocess.CalledProcessError, ValueError) as e:
        raise OSError(f"SPICE's Java program failed ({e}). It is written for Java 8 and takes 8 GB of memory.") from e
    # An image whose captions are all without meaning to the parser has no F-measure.
    return Tally.of_means("spice", np.nan_to_num([image["All"]["f"] for image in found]))


JAVA_METRICS: dict[str, Callable[[Predictions, References], Tally]] = {"meteor": meteor, "spice": spice}
