"""The arithmetic of BLEU, CIDEr and ROUGE-L, on captions that are already lists of tokens.

In every function here `predictions` holds one tokenized caption an image and `references` the tokenized
captions of each image, at least one, as `tokenize_captions` returns them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple, TypedDict

from .tokenization import Tokens

Ngram = tuple[str, ...]
Predictions = Sequence[Tokens]
References = Sequence[Sequence[Tokens]]


def ngrams(tokens: Tokens, order: int) -> Iterator[Ngram]:
    """The n-grams of a caption, repeated ones repeatedly."""
    return zip(*(tokens[start:] for start in range(order)), strict=False)


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
    predictions: Predictions,
    references: References,
    effective_length: Callable[[list[int], int], int],
    max_order: int = 4,
) -> NgramMatches:
    """Count n-grams that predictions share with references, clipped to the largest count in one reference.

    Source: Papineni et al. 2002, section 2.1.1.

    Args:
        predictions: one tokenized caption an image.
        references: tokenized captions of each image.
        effective_length: reduces an image's reference lengths to one, given the prediction's: `shortest` or
            `closest`.
        max_order: longest n-gram counted.

    Raises:
        ValueError: `max_order` is below 1.
    """
    if max_order < 1:
        raise ValueError(f"max_order is {max_order}; it must be at least 1 (BLEU-1 counts single words).")
    matches, totals = [0] * max_order, [0] * max_order
    prediction_length = reference_length = 0
    for prediction, captions in zip(predictions, references, strict=True):
        prediction_length += len(prediction)
        reference_length += effective_length([len(caption) for caption in captions], len(prediction))
        for order in range(1, min(max_order, len(prediction)) + 1):
            counts = Counter(ngrams(prediction, order))
            allowed: Counter[Ngram] = Counter()
            for caption in captions:
                allowed |= Counter(ngram for ngram in ngrams(caption, order) if ngram in counts)
            matches[order - 1] += (counts & allowed).total()
            totals[order - 1] += len(prediction) - order + 1
    return NgramMatches(matches, totals, prediction_length, reference_length)


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


_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against dividing by zero; they show in scores near zero


def coco_bleu(predictions: Predictions, references: References, max_order: int = 4) -> dict[str, float]:
    """`bleu_1` to `bleu_4` of a corpus (pycocoevalcap 1.2, `Bleu`)."""
    counts = match_ngrams(predictions, references, closest, max_order)
    ratio = (counts.prediction_length + _TINY) / (counts.reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for order, (matches, total) in enumerate(zip(counts.matches, counts.totals, strict=True), start=1):
        product *= (matches + _TINY) / (total + _SMALL)
        scores[f"bleu_{order}"] = product ** (1 / order) * penalty
    return scores


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) without stemming: what pycocoevalcap calls CIDEr.

    Args:
        references: tokenized captions of each image, from which n-grams get their document frequencies. To
            score a corpus these are the references scored (a single image then scores 0: all its n-grams are
            in every document); for a reward they are those of the training split.
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


def cider(predictions: Predictions, references: References) -> dict[str, float]:
    """`cider` of a corpus, from 0 to 10 (pycocoevalcap 1.2, `Cider`)."""
    return {"cider": fmean(CiderD(references).scores(predictions, references))}


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


def rouge_l(predictions: Predictions, references: References, beta: float = 1.2) -> dict[str, float]:
    """`rouge_l` of a corpus: the mean over images (Lin 2004; pycocoevalcap 1.2, `Rouge`).

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
    return {"rouge_l": fmean(scores)}
