"""Caption scores, computed on tokenized captions.

In every function, `predictions` holds one tokenized caption per image, and `references` one or more tokenized captions
per image, as `tokenize_captions` returns them.

The contributions of an image to a score are a row of a `Tally`. The score of one row is that of the image, the score of
the sum of all rows is that of the corpus, and sums of rows drawn at random give a confidence interval.
"""

# N: images, R: rows to score, F: values of a row

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

import numpy as np

from .ngrams import EffectiveLength, Ngram, NgramCounts, Predictions, References, ngrams
from .tokenization import Tokens


class Tally(NamedTuple):
    """Additive contributions of each image to one or more scores.

    Args:
        names: Names of the scores.
        rows: Contributions of each image, `(N, F)`.
        score: Function from rows or sums of rows, `(R, F)`, to scores, `(R, len(names))`.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of_means(cls, name: str, scores: Sequence[float] | np.ndarray) -> Tally:
        """Make the tally of a score that is the mean of the images' scores."""
        values = np.asarray(scores, np.float64)
        return cls((name,), np.stack([values, np.ones_like(values)], axis=1), _mean)

    def of_corpus(self) -> dict[str, float]:
        """Return the scores of all images together."""
        return dict(zip(self.names, self.score(self.rows.sum(0, keepdims=True))[0].tolist(), strict=True))

    def of_images(self) -> dict[str, list[float]]:
        """Return the scores of each image, as `<name>_per_image`."""
        scores = self.score(self.rows).T.tolist()
        return {f"{name}_per_image": column for name, column in zip(self.names, scores, strict=True)}

    def result(self, per_image: bool = False) -> dict[str, Any]:
        """Return the scores of the corpus and, on request, of each image."""
        return {**self.of_corpus(), **(self.of_images() if per_image else {})}


def _mean(rows: np.ndarray) -> np.ndarray:
    """Divide the first column, a sum of scores, by the second, the number of images."""
    return rows[:, :1] / rows[:, 1:]


class NgramMatches(NamedTuple):
    """Counts that determine the BLEU of a corpus. Lists have an entry per order, 1-grams first."""

    matches: list[int]  # n-grams shared with references
    totals: list[int]  # n-grams of the predictions
    prediction_length: int
    reference_length: int  # sum of the effective lengths


def shortest(lengths: list[int], prediction_length: int) -> int:
    """Return the effective reference length of the official BLEU, that of the shortest reference."""
    return min(lengths)


def closest(lengths: list[int], prediction_length: int) -> int:
    """Return the effective reference length of COCO's BLEU: the closest to the prediction's, the shorter of a tie."""
    return min(lengths, key=lambda length: (abs(length - prediction_length), length))


def match_ngrams(
    predictions: Predictions, references: References, effective_length: EffectiveLength, max_order: int = 4
) -> NgramMatches:
    """Count n-grams that predictions share with references, clipped to the largest count in one reference.

    Raises:
        ValueError: `max_order`, the length of the longest n-grams, is below 1.
    """
    return matches_of(NgramCounts(predictions, references, max_order).matches(effective_length).sum(0))


def matches_of(row: np.ndarray) -> NgramMatches:
    """Return a row of `NgramCounts.matches`, or a sum of rows, with its columns as named fields."""
    *counts, prediction_length, reference_length = row.astype(int).tolist()
    max_order = len(counts) // 2
    return NgramMatches(counts[:max_order], counts[max_order:], prediction_length, reference_length)


class Bleu(TypedDict):
    """Fields of the official BLEU; `precisions` has one entry per order."""

    bleu: float
    precisions: list[float]
    brevity_penalty: float
    length_ratio: float
    translation_length: int
    reference_length: int


def bleu(counts: NgramMatches, max_order: int = 4, smooth: bool = False) -> Bleu:
    """Compute BLEU as Google's NMT code and the official `evaluate` module do.

    Where those divide by zero, the length ratio is 0 for empty predictions, and infinity if all references are empty.

    Args:
        counts: Counts made with `shortest`, of orders up to `max_order` or higher.
        max_order: Length of the longest n-grams.
        smooth: Add one to matches and totals of 2-grams and longer (Lin and Och 2004).
    """
    precisions = []
    for order, (matches, total) in enumerate(zip(counts.matches, counts.totals, strict=True), start=1):
        extra = int(smooth and order > 1)
        precisions.append((matches + extra) / (total + extra) if total + extra else 0.0)
    precisions = precisions[:max_order]
    mean = math.exp(fmean(map(math.log, precisions))) if min(precisions) > 0 else 0.0
    if not counts.prediction_length:
        ratio, penalty = 0.0, 0.0
    elif not counts.reference_length:
        ratio, penalty = math.inf, 1.0
    else:
        ratio = counts.prediction_length / counts.reference_length
        penalty = min(1.0, math.exp(1 - 1 / ratio))
    return Bleu(
        bleu=mean * penalty,
        precisions=precisions,
        brevity_penalty=penalty,
        length_ratio=ratio,
        translation_length=counts.prediction_length,
        reference_length=counts.reference_length,
    )


def official_bleu(counts: NgramCounts, smooth: bool = False) -> Tally:
    """Return each image's contributions to `evaluate_bleu_1` to `_4`: BLEU as the library `evaluate` computes it."""
    orders = range(1, counts.max_order + 1)

    def score(rows: np.ndarray) -> np.ndarray:
        return np.array([[bleu(matches_of(row), order, smooth)["bleu"] for order in orders] for row in rows])

    return Tally(tuple(f"evaluate_bleu_{order}" for order in orders), counts.matches(shortest), score)


_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against dividing by zero; they show in scores near zero


def coco_bleu(counts: NgramCounts) -> Tally:
    """Return contributions to `bleu_1`, `bleu_2` and so on (pycocoevalcap 1.2, `Bleu`)."""
    orders = np.arange(1, counts.max_order + 1)

    def score(rows: np.ndarray) -> np.ndarray:
        matches, totals, [prediction_length, reference_length] = np.split(rows.T, [len(orders), 2 * len(orders)])
        ratio = (prediction_length + _TINY) / (reference_length + _SMALL)
        penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
        products = np.cumprod((matches + _TINY) / (totals + _SMALL), axis=0)
        return (products ** (1 / orders[:, None]) * penalty).T

    return Tally(tuple(f"bleu_{order}" for order in orders), counts.matches(closest), score)


def cider(counts: NgramCounts) -> Tally:
    """Return contributions to `cider`, 0 to 10: CIDEr-D, pycocoevalcap's CIDEr (Vedantam et al. 2015, eq. 5)."""
    return Tally.of_means("cider", counts.similarities(clip=True, sigma=6.0))


def plain_cider(counts: NgramCounts) -> Tally:
    """Return contributions to `plain_cider`, 0 to 10: CIDEr without the D (Vedantam et al. 2015, eq. 2 and 3)."""
    return Tally.of_means("plain_cider", counts.similarities(clip=False, sigma=None))


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) with document frequencies from a fixed set of captions, as rewards need it.

    With the document frequencies of the references scored, it equals `cider`, which is faster for a whole corpus.

    Args:
        references: Tokenized captions of each image, such as those of the training split, for document frequencies.
        max_order: Length of the longest n-grams.
        sigma: Width of the penalty on differing lengths, in tokens.

    Raises:
        ValueError: `references` is empty.
    """

    def __init__(self, references: References, max_order: int = 4, sigma: float = 6.0) -> None:
        if not len(references):
            raise ValueError("references is empty; CIDEr needs captions to take document frequencies from.")
        self.orders = range(1, max_order + 1)
        self.sigma = sigma
        frequencies: Counter[Ngram] = Counter()
        for captions in references:
            frequencies.update({ngram for tokens in captions for n in self.orders for ngram in ngrams(tokens, n)})
        weights = [math.log(len(references) / max(1, count)) for count in range(len(references) + 1)]
        self._weights = {ngram: weights[count] for ngram, count in frequencies.items()}
        self._unseen = weights[1]  # as in pycocoevalcap, where an unseen n-gram counts as if one image had it

    def scores(self, predictions: Predictions, references: References) -> list[float]:
        """Return the score of each image, from 0 to 10. The score of a corpus is their mean."""
        return [self._score(*pair) for pair in zip(predictions, references, strict=True)]

    def _score(self, prediction: Tokens, captions: Sequence[Tokens]) -> float:
        """Return the score of one prediction against the reference captions of its image."""
        vectors = [(vector, _norm(vector)) for vector in self._vectors(prediction)]
        similarity = 0.0
        for caption in captions:
            penalty = math.exp(-((len(prediction) - len(caption)) ** 2) / (2 * self.sigma**2))
            for (vector, norm), other in zip(vectors, self._vectors(caption), strict=True):
                shared = ((w, other[ngram]) for ngram, w in vector.items() if ngram in other)
                overlap = sum(min(w, v) * v for w, v in shared)
                if overlap:
                    similarity += penalty * overlap / (norm * _norm(other))
        return 10 * similarity / (len(self.orders) * len(captions))

    def _vectors(self, tokens: Tokens) -> Iterator[dict[Ngram, float]]:
        """Yield the TF-IDF vector of a caption's n-grams, for each order."""
        weight, unseen = self._weights.get, self._unseen
        for n in self.orders:
            counts = Counter(ngrams(tokens, n))
            yield {ngram: count * weight(ngram, unseen) for ngram, count in counts.items()}


def _norm(vector: dict[Ngram, float]) -> float:
    """Return the Euclidean norm of a sparse vector."""
    return math.sqrt(sum(w * w for w in vector.values()))


def common_subsequence_length(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence of two captions.

    A row of the usual table of lengths is one integer with a bit per token of `first`; a bit is 0 where the length
    grows (Hyyrö 2004). A test holds it equal to the table.
    """
    positions: dict[str, int] = {}  # bits of the positions at which `first` has a token
    for position, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << position
    row = all_bits = (1 << len(first)) - 1
    for token in second:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & all_bits
    return len(first) - row.bit_count()


def rouge_l(predictions: Predictions, references: References, beta: float = 1.2) -> Tally:
    """Return contributions to `rouge_l`, the mean over images (Lin 2004; pycocoevalcap 1.2, `Rouge`).

    Precision and recall of an image are each the maximum over its references, not those of one reference. `beta` is
    the weight of recall relative to precision.
    """
    scores = []
    for prediction, captions in zip(predictions, references, strict=True):
        prediction = prediction or [""]  # to pycocoevalcap, an empty caption has one empty word
        precision = recall = 0.0
        for caption in captions:
            length = common_subsequence_length(prediction, caption or [""])
            precision = max(precision, length / len(prediction))
            recall = max(recall, length / (len(caption) or 1))
        weighted = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / weighted if weighted else 0.0)
    return Tally.of_means("rouge_l", scores)


def diversity(
    predictions: Predictions, *, training: Iterable[Tokens] | None = None, ended: Sequence[bool] | None = None
) -> dict[str, float]:
    """Measure how much captions differ from each other, without references.

    Args:
        predictions: Tokenized captions.
        training: Tokenized captions that the model was trained on.
        ended: Whether decoding reached `<end>`, for each caption.

    Returns:
        `distinct_captions`, the fraction of different captions; `distinct_1` and `distinct_2`, different n-grams over
        all n-grams (Li et al. 2016); `vocabulary`, the number of different words; `length`, the mean number of words;
        with `training`, `novel_captions`, the fraction of captions not among them; with `ended`, `endless_captions`,
        the fraction without `<end>`.

    Raises:
        ValueError: `ended` is not as long as `predictions`.
    """
    captions = [tuple(prediction) for prediction in predictions]
    scores: dict[str, float] = {"distinct_captions": len(set(captions)) / len(captions)}
    for order in (1, 2):
        all_ngrams = [ngram for caption in captions for ngram in ngrams(caption, order)]
        scores[f"distinct_{order}"] = len(set(all_ngrams)) / max(1, len(all_ngrams))
    scores["vocabulary"] = len({word for caption in captions for word in caption})
    scores["length"] = fmean(map(len, captions))
    if training is not None:
        known = set(map(tuple, training))
        scores["novel_captions"] = sum(caption not in known for caption in captions) / len(captions)
    if ended is not None:
        if len(ended) != len(captions):
            raise ValueError(f"ended has {len(ended)} entries for {len(captions)} predictions; it needs one each.")
        scores["endless_captions"] = sum(not end for end in ended) / len(captions)
    return scores
