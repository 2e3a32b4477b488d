"""The arithmetic of caption scores, on captions that are already lists of tokens.

In every function here `predictions` holds one tokenized caption an image and `references` the tokenized
captions of each image, at least one, as `tokenize_captions` returns them.

What a score needs to know of each image is a row of a `Tally`. Scoring one row scores an image, scoring the sum of all
rows the corpus, and scoring sums of rows drawn at random says how sure that score is.
"""

# N: images, R: rows to score, F: figures of a row

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
    """Figures of each image that add up, and what they amount to.

    Args:
        names: of the scores.
        rows: `(N, F)`.
        score: turns rows or sums of them, `(R, F)`, into scores, `(R, len(names))`.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of_means(cls, name: str, scores: Sequence[float] | np.ndarray) -> Tally:
        """A score that is the mean of its images' scores."""
        values = np.asarray(scores, np.float64)
        return cls((name,), np.stack([values, np.ones_like(values)], axis=1), _mean)

    def of_corpus(self) -> dict[str, float]:
        """The scores of all images together."""
        return dict(zip(self.names, self.score(self.rows.sum(0, keepdims=True))[0].tolist(), strict=True))

    def of_images(self) -> dict[str, list[float]]:
        """The scores of each image, as `<name>_per_image`."""
        scores = self.score(self.rows).T.tolist()
        return {f"{name}_per_image": column for name, column in zip(self.names, scores, strict=True)}

    def result(self, per_image: bool = False) -> dict[str, Any]:
        """The scores of the corpus and, on request, of each image."""
        return {**self.of_corpus(), **(self.of_images() if per_image else {})}


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows[:, :1] / rows[:, 1:]


class NgramMatches(NamedTuple):
    """What BLEU needs to know of a corpus. The lists have one entry an order, 1-grams first."""

    matches: list[int]
    totals: list[int]
    prediction_length: int
    reference_length: int


def shortest(lengths: list[int], prediction_length: int) -> int:
    """The reference length of the official BLEU."""
    return min(lengths)


def closest(lengths: list[int], prediction_length: int) -> int:
    """The reference length of COCO's BLEU: nearest to the prediction's, the shorter one of two as near."""
    return min(lengths, key=lambda length: (abs(length - prediction_length), length))


def match_ngrams(
    predictions: Predictions, references: References, effective_length: EffectiveLength, max_order: int = 4
) -> NgramMatches:
    """Count n-grams that predictions share with references, clipped to the largest count in one reference.

    Args:
        predictions: one tokenized caption an image.
        references: tokenized captions of each image.
        effective_length: reduces an image's reference lengths to one, given the prediction's: `shortest` or
            `closest`.
        max_order: longest n-gram counted.

    Raises:
        ValueError: `max_order` is below 1.
    """
    return matches_of(NgramCounts(predictions, references, max_order).matches(effective_length).sum(0))


def matches_of(row: np.ndarray) -> NgramMatches:
    """A row of `NgramCounts.matches`, or a sum of rows, by name."""
    *counts, prediction_length, reference_length = row.astype(int).tolist()
    max_order = len(counts) // 2
    return NgramMatches(counts[:max_order], counts[max_order:], prediction_length, reference_length)


class Bleu(TypedDict):
    """The fields of the official BLEU; `precisions` has one entry an order."""

    bleu: float
    precisions: list[float]
    brevity_penalty: float
    length_ratio: float
    translation_length: int
    reference_length: int


def bleu(counts: NgramMatches, max_order: int = 4, smooth: bool = False) -> Bleu:
    """BLEU as Google's NMT code and the official `evaluate` module compute it.

    Where those divide by zero, this gives a length ratio of 0 for empty predictions and infinity for
    references that are all empty.

    Args:
        counts: counted with `shortest`, up to `max_order` or further.
        max_order: longest n-gram.
        smooth: add one to matches and totals of 2-grams and longer (Lin and Och 2004).
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
    """`evaluate_bleu_1` and so on: what `evaluate`'s module gives for every `max_order`."""
    orders = range(1, counts.max_order + 1)

    def score(rows: np.ndarray) -> np.ndarray:
        return np.array([[bleu(matches_of(row), order, smooth)["bleu"] for order in orders] for row in rows])

    return Tally(tuple(f"evaluate_bleu_{order}" for order in orders), counts.matches(shortest), score)


_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against dividing by zero; they show in scores near zero


def coco_bleu(counts: NgramCounts) -> Tally:
    """`bleu_1` to `bleu_4` (pycocoevalcap 1.2, `Bleu`)."""
    orders = np.arange(1, counts.max_order + 1)

    def score(rows: np.ndarray) -> np.ndarray:
        matches, totals, [predicted, wanted] = np.split(rows.T, [len(orders), 2 * len(orders)])
        ratio = (predicted + _TINY) / (wanted + _SMALL)
        penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
        products = np.cumprod((matches + _TINY) / (totals + _SMALL), axis=0)
        return (products ** (1 / orders[:, None]) * penalty).T

    return Tally(tuple(f"bleu_{order}" for order in orders), counts.matches(closest), score)


def cider(counts: NgramCounts) -> Tally:
    """`cider`, from 0 to 10: CIDEr-D, which pycocoevalcap 1.2 calls CIDEr (Vedantam et al. 2015, eq. 5)."""
    return Tally.of_means("cider", counts.similarities(clip=True, sigma=6.0))


def plain_cider(counts: NgramCounts) -> Tally:
    """`plain_cider`, from 0 to 10: CIDEr without what makes it CIDEr-D (Vedantam et al. 2015, eq. 2 and 3)."""
    return Tally.of_means("plain_cider", counts.similarities(clip=False, sigma=None))


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) of any captions, with the document frequencies of others: for rewards.

    With the frequencies of the references scored it equals `cider`, which counts a whole corpus faster.

    Args:
        references: tokenized captions of each image, from which n-grams get their document frequencies, such as
            those of the training split.
        max_order: longest n-gram.
        sigma: width of the penalty on differing lengths, in tokens.

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
        self._unseen = weights[1]  # as in pycocoevalcap, where an n-gram of no image counts as one of a single image

    def scores(self, predictions: Predictions, references: References) -> list[float]:
        """The score of each image, from 0 to 10; a corpus scores their mean."""
        return [self._score(*pair) for pair in zip(predictions, references, strict=True)]

    def _score(self, prediction: Tokens, captions: Sequence[Tokens]) -> float:
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
        """One TF-IDF vector an order."""
        weight, unseen = self._weights.get, self._unseen
        for n in self.orders:
            counts = Counter(ngrams(tokens, n))
            yield {ngram: count * weight(ngram, unseen) for ngram, count in counts.items()}


def _norm(vector: dict[Ngram, float]) -> float:
    return math.sqrt(sum(w * w for w in vector.values()))


def common_subsequence_length(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence, bit-parallel over the tokens of `first` (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for place, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << place
    row = everything = (1 << len(first)) - 1
    for token in second:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - row.bit_count()


def rouge_l(predictions: Predictions, references: References, beta: float = 1.2) -> Tally:
    """`rouge_l`: the mean over images (Lin 2004; pycocoevalcap 1.2, `Rouge`).

    Precision and recall of an image are each the best over its references, not those of one reference.

    Args:
        predictions: one tokenized caption an image.
        references: tokenized captions of each image.
        beta: weight of recall over precision.
    """
    scores = []
    for prediction, captions in zip(predictions, references, strict=True):
        prediction = prediction or [""]  # pycocoevalcap sees one empty word in an empty caption
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
    """How much captions differ, without references.

    Args:
        predictions: tokenized captions.
        training: tokenized captions that the model was trained on.
        ended: of each caption, whether decoding reached `<end>`.

    Returns:
        `distinct_captions`, the share of different captions; `distinct_1` and `distinct_2`, different n-grams over all
        n-grams (Li et al. 2016); `vocabulary`, the number of different words; `length`, the mean number of words;
        with `training`, `novel_captions`, the share of captions not among them; with `ended`, `endless_captions`.

    Raises:
        ValueError: `ended` is not as long as `predictions`.
    """
    captions = [tuple(prediction) for prediction in predictions]
    scores: dict[str, float] = {"distinct_captions": len(set(captions)) / len(captions)}
    for order in (1, 2):
        found = [ngram for caption in captions for ngram in ngrams(caption, order)]
        scores[f"distinct_{order}"] = len(set(found)) / max(1, len(found))
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
