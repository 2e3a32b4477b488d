"""N-grams of one caption, and counts of the n-grams of a whole corpus in arrays."""

# N: images, C: captions (N predictions, then all references), M: different n-grams of the corpus,
# E: entries, one for each different n-gram of each caption

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from .tokenization import Tokens

Ngram = tuple[str, ...]
Predictions = Sequence[Tokens]
References = Sequence[Sequence[Tokens]]
EffectiveLength = Callable[[list[int], int], int]


def ngrams(tokens: Tokens, order: int) -> Iterator[Ngram]:
    """Return all n-grams of a caption, in order and with repetitions."""
    return zip(*(tokens[start:] for start in range(order)), strict=False)


class _Order(NamedTuple):
    """Counts of n-grams of one length, with the entries of all predictions before those of the references."""

    caption: np.ndarray  # index of the caption of each entry, (E,)
    ngram: np.ndarray  # number of the n-gram of each entry, below M, (E,)
    counts: np.ndarray  # how often the caption has the n-gram, (E,)
    # For each entry of a reference: the entry of the same n-gram in the prediction for the same image; -1 if none.
    partner: np.ndarray  # (E - entries of predictions,)
    document_frequency: np.ndarray  # number of images with the n-gram in a reference, (M,)


class NgramCounts:
    """Counts of each n-gram in each caption, from which BLEU and CIDEr of a corpus are computed.

    Words and n-grams are numbered, so that a few sorts count a whole corpus. `scores.CiderD` counts caption by caption
    and is the plain version; a test holds both equal.

    Args:
        predictions: One tokenized caption per image.
        references: Tokenized reference captions of each image, one or more.
        max_order: Length of the longest n-grams.

    Raises:
        ValueError: `max_order` is below 1.
    """

    def __init__(self, predictions: Predictions, references: References, max_order: int = 4) -> None:
        if max_order < 1:
            raise ValueError(f"max_order is {max_order}; it must be at least 1 (BLEU-1 counts single words).")
        self.max_order = max_order
        self.num_images = len(predictions)
        captions = [*predictions, *chain.from_iterable(references)]
        self.lengths = np.fromiter(map(len, captions), np.int64, len(captions))  # (C,)
        images = np.arange(self.num_images)
        self.num_references = np.fromiter(map(len, references), np.int64, self.num_images)  # (N,)
        self.image = np.concatenate([images, np.repeat(images, self.num_references)])  # (C,)
        numbers: defaultdict[str, int] = defaultdict()
        numbers.default_factory = numbers.__len__  # a new word gets the next number
        words = (numbers[word] for word in chain.from_iterable(captions))
        self._words = np.fromiter(words, np.int64, int(self.lengths.sum()))
        self._vocabulary_size = len(numbers)

    @cached_property
    def orders(self) -> list[_Order]:
        """Counts of 1-grams, 2-grams and so on.

        The n-gram at a word is numbered from the number of the (n-1)-gram there and the number of the n-th word.
        """
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)  # the caption of each word
        starts, ids, orders = np.arange(len(self._words)), self._words, []
        for order in range(1, self.max_order + 1):
            if order > 1:
                ends = starts + order - 1
                complete = ends < len(owner)
                complete[complete] = owner[ends[complete]] == owner[starts[complete]]
                starts = starts[complete]
                longer = ids[complete] * self._vocabulary_size + self._words[starts + order - 1]
                ids = np.unique(longer, return_inverse=True)[1]
            orders.append(self._count(owner[starts], ids))
        return orders

    def _count(self, owner: np.ndarray, ids: np.ndarray) -> _Order:
        """Return the counts of all n-grams of one length in each caption.

        Args:
            owner: Index of the caption of each occurrence of an n-gram, in ascending order.
            ids: Number of the n-gram at each occurrence; equal n-grams have equal numbers.
        """
        num_ngrams = int(ids.max(initial=0)) + 1
        keys, counts = np.unique(owner * num_ngrams + ids, return_counts=True)
        caption, ngram = np.divmod(keys, num_ngrams)
        split = np.searchsorted(caption, self.num_images)  # number of entries of predictions
        predicted, referenced = keys[:split], self.image[caption[split:]] * num_ngrams + ngram[split:]
        partner = np.searchsorted(predicted, referenced)
        exists = partner < split
        exists[exists] = predicted[partner[exists]] == referenced[exists]
        referenced.sort()  # numpy's unique, without counts, hashes such keys slowly
        first = np.diff(referenced, prepend=-1) > 0  # an image counts once, however many references have the n-gram
        document_frequency = np.bincount(referenced[first] % num_ngrams, minlength=num_ngrams)
        return _Order(caption, ngram, counts, np.where(exists, partner, -1), document_frequency)

    def matches(self, effective_length: EffectiveLength) -> np.ndarray:
        """Return the counts that BLEU needs of each image, `(N, 2 max_order + 2)`.

        The columns are: for each order, the number of n-grams that the prediction shares with references, clipped to
        the largest count in one reference (Papineni et al. 2002, section 2.1.1); for each order, the number of n-grams
        of the prediction; the length of the prediction; the effective reference length, which `scores.shortest` or
        `scores.closest` chooses. `scores.NgramMatches` names the columns.
        """
        matches, totals = [], []
        lengths = self.lengths[: self.num_images]
        for order, (caption, _, counts, partner, _) in enumerate(self.orders):
            split = len(counts) - len(partner)
            shared = partner >= 0
            allowed = np.zeros(split, np.int64)
            np.maximum.at(allowed, partner[shared], counts[split:][shared])
            clipped = np.minimum(allowed, counts[:split])
            matches.append(np.bincount(caption[:split], clipped, self.num_images))
            totals.append(np.maximum(lengths - order, 0))
        ends = self.num_images + np.cumsum(self.num_references)
        all_lengths = self.lengths.tolist()
        effective = [
            effective_length(all_lengths[end - number : end], length)
            for end, number, length in zip(ends.tolist(), self.num_references.tolist(), all_lengths, strict=False)
        ]
        return np.stack([*matches, *totals, lengths, np.array(effective)], axis=1).astype(np.float64)

    def similarities(self, *, clip: bool, sigma: float | None) -> np.ndarray:
        """Return CIDEr of each image, `(N,)`, from 0 to 10 (Vedantam et al. 2015, eq. 1 to 5, without stemming).

        Document frequencies are those of the references. As in the authors' code, an n-gram that no reference has
        counts as if one image had it.

        Args:
            clip: Count an n-gram no more often than the reference has it, as CIDEr-D does.
            sigma: Width of the penalty on differing lengths, in words, 6 in CIDEr-D; None for no penalty.
        """
        of_reference = self.image[self.num_images :]  # the image of each reference
        total = np.zeros(len(of_reference))
        for caption, ngram, counts, partner, document_frequency in self.orders:
            split = len(counts) - len(partner)
            weight = counts * np.log(self.num_images / np.maximum(document_frequency, 1))[ngram]
            norm = np.sqrt(np.bincount(caption, weight**2, len(self.lengths)))
            shared = partner >= 0
            predicted, referenced = weight[:split][partner[shared]], weight[split:][shared]
            product = (np.minimum(predicted, referenced) if clip else predicted) * referenced
            overlap = np.bincount(caption[split:][shared] - self.num_images, product, len(of_reference))
            scale = norm[: self.num_images][of_reference] * norm[self.num_images :]
            total += np.divide(overlap, scale, out=np.zeros_like(scale), where=scale > 0)
        if sigma is not None:
            difference = self.lengths[: self.num_images][of_reference] - self.lengths[self.num_images :]
            total *= np.exp(-(difference**2) / (2 * sigma**2))
        return 10 * np.bincount(of_reference, total, self.num_images) / (self.max_order * self.num_references)
