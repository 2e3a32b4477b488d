"""N-grams of captions: of one caption, and of a whole corpus counted at once in arrays."""

# N: images, C: captions (N predictions, then all references), E: different n-grams of each caption, M: of the corpus

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
    """The n-grams of a caption, repeated ones repeatedly."""
    return zip(*(tokens[start:] for start in range(order)), strict=False)


class _Order(NamedTuple):
    """Counts of n-grams of one length, captions one after the other."""

    caption: np.ndarray  # (E,)
    ngram: np.ndarray  # (E,), below M
    counts: np.ndarray  # (E,)
    # Of each n-gram of a reference: that n-gram's row among those of the prediction, -1 where it isn't there.
    partner: np.ndarray  # (E - rows of predictions,)
    frequency: np.ndarray  # (M,), images with the n-gram in a reference


class NgramCounts:
    """How often each n-gram is in each caption: what BLEU and CIDEr of a corpus are made of.

    Words and n-grams become numbers, so that a corpus is counted by a few sorts rather than caption by caption.

    Args:
        predictions: one tokenized caption an image.
        references: tokenized captions of each image, one or more.
        max_order: longest n-gram.

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
        numbers.default_factory = numbers.__len__
        words = (numbers[word] for word in chain.from_iterable(captions))
        self._words = np.fromiter(words, np.int64, int(self.lengths.sum()))
        self._num_words = len(numbers)

    @cached_property
    def orders(self) -> list[_Order]:
        """Counts of 1-grams, 2-grams and so on."""
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)  # the caption of each word
        starts, ids, found = np.arange(len(self._words)), self._words, []
        for order in range(1, self.max_order + 1):
            if order > 1:
                ends = starts + order - 1
                whole = ends < len(owner)
                whole[whole] = owner[ends[whole]] == owner[starts[whole]]
                starts = starts[whole]
                longer = ids[whole] * self._num_words + self._words[starts + order - 1]
                ids = np.unique(longer, return_inverse=True)[1]
            found.append(self._count(owner[starts], ids))
        return found

    def _count(self, owner: np.ndarray, ids: np.ndarray) -> _Order:
        num_ngrams = int(ids.max(initial=0)) + 1
        keys, count = np.unique(owner * num_ngrams + ids, return_counts=True)
        caption, ngram = np.divmod(keys, num_ngrams)
        split = np.searchsorted(caption, self.num_images)
        mine, wanted = keys[:split], self.image[caption[split:]] * num_ngrams + ngram[split:]
        partner = np.searchsorted(mine, wanted)
        there = partner < split
        there[there] = mine[partner[there]] == wanted[there]
        wanted.sort()  # numpy's unique, without counts, hashes such keys slowly
        first = np.diff(wanted, prepend=-1) > 0
        frequency = np.bincount(wanted[first] % num_ngrams, minlength=num_ngrams)
        return _Order(caption, ngram, count, np.where(there, partner, -1), frequency)

    def matches(self, effective_length: EffectiveLength) -> np.ndarray:
        """What BLEU needs to know of each image, `(N, 2 max_order + 2)`.

        Columns: n-grams that the prediction shares with references, clipped to the largest count in one reference
        (Papineni et al. 2002, section 2.1.1), one column an order; its n-grams, one column an order; its length; the
        references' length, reduced to one by `effective_length(lengths, prediction_length)`.
        """
        matches, totals = [], []
        lengths = self.lengths[: self.num_images]
        for order, (caption, _, count, partner, _) in enumerate(self.orders):
            split = len(count) - len(partner)
            shared = partner >= 0
            allowed = np.zeros(split, np.int64)
            np.maximum.at(allowed, partner[shared], count[split:][shared])
            clipped = np.minimum(allowed, count[:split])
            matches.append(np.bincount(caption[:split], clipped, self.num_images))
            totals.append(np.maximum(lengths - order, 0))
        ends = self.num_images + np.cumsum(self.num_references)
        listed = self.lengths.tolist()
        effective = [
            effective_length(listed[end - number : end], length)
            for end, number, length in zip(ends.tolist(), self.num_references.tolist(), listed, strict=False)
        ]
        return np.stack([*matches, *totals, lengths, np.array(effective)], axis=1).astype(np.float64)

    def similarities(self, *, clip: bool, sigma: float | None) -> np.ndarray:
        """CIDEr of each image, `(N,)`, from 0 to 10 (Vedantam et al. 2015, eq. 1 to 5, without stemming).

        N-grams get their document frequencies from the references; an n-gram of no image counts as one of a single
        image, as in the authors' code.

        Args:
            clip: count an n-gram no more often than a reference has it; CIDEr-D does.
            sigma: width of the penalty on differing lengths, in words; None for no penalty. CIDEr-D has 6.
        """
        of_reference = self.image[self.num_images :]  # the image of each reference
        total = np.zeros(len(of_reference))
        for caption, ngram, count, partner, frequency in self.orders:
            split = len(count) - len(partner)
            weight = count * np.log(self.num_images / np.maximum(frequency, 1))[ngram]
            norm = np.sqrt(np.bincount(caption, weight**2, len(self.lengths)))
            shared = partner >= 0
            mine, theirs = weight[:split][partner[shared]], weight[split:][shared]
            product = (np.minimum(mine, theirs) if clip else mine) * theirs
            overlap = np.bincount(caption[split:][shared] - self.num_images, product, len(of_reference))
            scale = norm[: self.num_images][of_reference] * norm[self.num_images :]
            total += np.divide(overlap, scale, out=np.zeros_like(scale), where=scale > 0)
        if sigma is not None:
            difference = self.lengths[: self.num_images][of_reference] - self.lengths[self.num_images :]
            total *= np.exp(-(difference**2) / (2 * sigma**2))
        return 10 * np.bincount(of_reference, total, self.num_images) / (self.max_order * self.num_references)
