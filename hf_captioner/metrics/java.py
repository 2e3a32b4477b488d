"""METEOR and SPICE: Java programs, run by pycocoevalcap, which is an optional dependency."""

# R: rows, each an image or a sum of images

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .ngrams import Predictions, References
from .scores import Tally

_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def coco_scorer(name: str) -> Any:
    """Return a scorer class of pycocoevalcap that runs Java, such as `"meteor.meteor:Meteor"`.

    Raises:
        ImportError: pycocoevalcap is not installed.
        FileNotFoundError: Java is not installed.
    """
    metric = name.rpartition(":")[2].upper()
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError(f'{metric} needs pycocoevalcap: pip install "hf_captioner[metrics]", and Java.')
    if shutil.which("java") is None:
        raise FileNotFoundError(f"{metric} needs Java: install a JRE so that `java` is on the path.")
    module, _, scorer = name.partition(":")
    return getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)


def _keyed(predictions: Predictions, references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and predictions in the form that pycocoevalcap's scorers take: captions by image."""
    reference_texts = {image: [" ".join(tokens) for tokens in captions] for image, captions in enumerate(references)}
    return reference_texts, {image: [" ".join(tokens)] for image, tokens in enumerate(predictions)}


def meteor(predictions: Predictions, references: References) -> Tally:
    """Return each image's contributions to `meteor`, from 0 to 1.

    This is METEOR 1.5 for English (Denkowski and Lavie 2014), as pycocoevalcap 1.2 runs it. The Java program aligns
    captions with references; scores are computed here from the counts of its alignments, so that they can be resampled.

    Raises:
        ImportError: pycocoevalcap is not installed.
        OSError: Java is not installed, or the program fails.
    """
    scorer = coco_scorer("meteor.meteor:Meteor")()
    lines: list[str] = []
    align = scorer._stat  # asks the Java program for the counts of one image's alignment

    def align_and_record(*captions: Any) -> str:
        lines.append(align(*captions))
        return lines[-1]

    scorer._stat = align_and_record
    try:
        scorer.compute_score(*_keyed(predictions, references))
        rows = np.array([line.split() for line in lines], np.float64)
    except (OSError, ValueError) as e:
        with suppress(RuntimeError):
            scorer.lock.release()  # otherwise its __del__ waits forever
        raise OSError(f"METEOR's Java program failed ({e or type(e).__name__}). It takes 2 GB of memory.") from e
    counts = _AlignmentCounts.of_rows(rows)
    # The chunk penalty does not apply to a prediction that equals a reference word for word.
    counts.chunks[(counts.chunks == 1) & (counts.matched_words == counts.words).all(1)] = 0
    return Tally(("meteor",), rows, _meteor)


class _AlignmentCounts(NamedTuple):
    """Counts of alignments between captions, as views of the numbers that METEOR prints.

    Where the last axis has 2 entries, they are for the prediction and for the reference.
    """

    words: np.ndarray  # (R, 2)
    function_words: np.ndarray  # such as "the", (R, 2)
    matches: np.ndarray  # exact, stem, synonym or paraphrase; of content words or function words, (R, 4, 2, 2)
    chunks: np.ndarray  # runs of matched words that are adjacent in both captions, (R,)
    matched_words: np.ndarray  # of any kind, (R, 2)

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> _AlignmentCounts:
        """Return the rows that METEOR prints, `(R, 23)`, with their columns as named fields."""
        words, function_words, matches, chunks, matched_words = np.split(rows, np.cumsum([2, 2, 4 * 2 * 2, 1]), axis=1)
        return cls(words, function_words, matches.reshape(-1, 4, 2, 2), chunks[:, 0], matched_words)


# Parameters of METEOR 1.5 for English, by their names in Denkowski and Lavie 2014.
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def _meteor(rows: np.ndarray) -> np.ndarray:
    """Return METEOR of rows of alignment counts, `(R, 23) -> (R, 1)` (Denkowski and Lavie 2014, eq. 1 to 4)."""
    counts = _AlignmentCounts.of_rows(rows)
    matches = _DELTA * counts.matches[:, :, 0] + (1 - _DELTA) * counts.matches[:, :, 1]  # (R, 4, 2)
    lengths = _DELTA * (counts.words - counts.function_words) + (1 - _DELTA) * counts.function_words
    precision, recall = _ratio(np.einsum("k,rks->rs", _MATCH_WEIGHTS, matches), lengths).T
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _ratio(counts.chunks, counts.matched_words.mean(1))
    return (mean * (1 - _GAMMA * fragmentation**_BETA))[:, None]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return `part / whole`, and 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def spice(predictions: Predictions, references: References) -> Tally:
    """Return each image's contributions to `spice`, the mean over images, from 0 to 1.

    This is SPICE 1.0 (Anderson et al. 2016), as pycocoevalcap 1.2 runs it.

    Raises:
        ImportError: pycocoevalcap is not installed.
        OSError: Java is not installed, the models of the parser have not been downloaded, or the program fails.
    """
    build = coco_scorer("spice.spice:Spice")
    folder = Path(importlib.import_module("pycocoevalcap.spice").__file__ or "").parent / "lib"
    if not all((folder / name).is_file() for name in _SPICE_MODELS):
        raise FileNotFoundError(
            "SPICE needs the models of Stanford CoreNLP 3.6.0. Download them once: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    try:
        _, images = build().compute_score(*_keyed(predictions, references))
    except (subprocess.CalledProcessError, ValueError) as e:
        raise OSError(f"SPICE's Java program failed ({e}). It is written for Java 8 and takes 8 GB of memory.") from e
    # There is no F-measure for an image in whose captions the parser finds no object, attribute or relation.
    return Tally.of_means("spice", np.nan_to_num([image["All"]["f"] for image in images]))


JAVA_METRICS: dict[str, Callable[[Predictions, References], Tally]] = {"meteor": meteor, "spice": spice}
