"""Greedy and beam search in numpy alone, with the results of `decoding.py` and so of `generate()`."""

# B: images, K: beams of an image, M: continuations considered, V: vocabulary, L: longest caption, P: image cells

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WORST = -1e9  # the score of no caption, as in transformers
CROWD = 0.8  # share of images still running at which the others leave

# Read a word of each caption: words (B, K), what is known of the images, the states (B, K, D) before; gives
# log p of the next word (B, K, V), attention weights (B, K, P) and the states after.
Arrays = list[np.ndarray]
Read = Callable[[np.ndarray, Arrays, Arrays], tuple[np.ndarray, np.ndarray, Arrays]]


@dataclass(frozen=True)
class Settings:
    """Those arguments of `generate()` that the searches here know; None as there.

    Raises:
        ValueError: one is out of its range.
    """

    decoder_start_token_id: int
    eos_token_id: Sequence[int]
    pad_token_id: int
    max_length: int
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_length: int = 0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}, but captions have at least <start> and a word: give 2.")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"{self.num_return_sequences} captions an image need at least as many beams, and one; "
                f"num_beams is {self.num_beams}."
            )

    def judge(self, words: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Rule out words that may not follow: captions `(N, T)`, scores of the next word `(N, V)`."""
        scores = scores.copy()
        num_words = words.shape[1]
        scores[:, [*self.suppress_tokens, *(self.begin_suppress_tokens if num_words == 1 else ())]] = -np.inf
        if num_words < self.min_length:
            scores[:, list(self.eos_token_id)] = -np.inf
        for *before, bad in self.bad_words_ids:
            if not before and bad in self.eos_token_id:  # transformers lets captions end whatever is said
                continue
            if len(before) <= num_words:
                scores[(words[:, num_words - len(before) :] == before).all(1), bad] = -np.inf
        if 0 < self.no_repeat_ngram_size <= num_words:
            last = words[:, num_words - self.no_repeat_ngram_size + 1 :]
            for start in range(num_words - self.no_repeat_ngram_size + 1):
                end = start + self.no_repeat_ngram_size - 1
                rows = (words[:, start:end] == last).all(1).nonzero()[0]
                scores[rows, words[rows, end]] = -np.inf
        return scores


@dataclass
class Captions:
    """M captions of each of B images.

    Args:
        words: `(B, M, L)`, padded; the first is `<start>`.
        scores: `(B, M)`, of whatever kind.
        word_scores: `(B, M, L)`, log p of each word by the model itself; 0 after the end.
        weights: `(B, M, L, P)`, attention that chose each word; P is 0 where it is not asked for.
    """

    words: np.ndarray
    scores: np.ndarray
    word_scores: np.ndarray
    weights: np.ndarray

    @classmethod
    def empty(cls, num_images: int, num_captions: int, num_cells: int, settings: Settings) -> Captions:
        """Nothing but `<start>`."""
        shape = (num_images, num_captions, settings.max_length)
        words = np.full(shape, settings.pad_token_id)
        words[..., 0] = settings.decoder_start_token_id
        zeros = np.zeros((*shape, 1 + num_cells), np.float32)
        return cls(words, np.zeros(shape[:2], np.float32), zeros[..., 0].copy(), zeros[..., 1:].copy())

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """All arrays."""
        return self.words, self.scores, self.word_scores, self.weights

    def take(self, index: np.ndarray) -> Captions:
        """Of image b, captions `index[b]`: `(B, M')`."""
        rows = np.arange(len(index))[:, None]
        return Captions(*(part[rows, index] for part in self.parts))

    def of(self, images: np.ndarray) -> Captions:
        """The captions of some images."""
        return Captions(*(part[images] for part in self.parts))

    def put(self, images: np.ndarray, captions: Captions) -> None:
        """Overwrite the captions of some images."""
        for mine, part in zip(self.parts, captions.parts, strict=True):
            mine[images] = part

    def add(self, place: int, words: np.ndarray, word_scores: np.ndarray, weights: np.ndarray) -> None:
        """Write the word of each caption at a place: `(B, M)`, `(B, M)`, `(B, M, P)`."""
        self.words[..., place], self.word_scores[..., place] = words, word_scores
        self.weights[..., place, :] = weights[..., : self.weights.shape[-1]]


def search(read: Read, memory: Arrays, state: Arrays, settings: Settings, *, num_cells: int = 0) -> Captions:
    """The best captions of each image, `num_return_sequences` of them, the best first.

    Args:
        read: see `Read`.
        memory: arrays with the B images in front, of which the first are the cells.
        state: states `(B, 1, D)` before the first word.
        settings: of the search.
        num_cells: P to keep the attention weights of, 0 to keep none.
    """
    find = greedy_search if settings.num_beams == 1 else beam_search
    captions = find(read, memory, state, settings, num_cells)
    best = np.arange(settings.num_return_sequences)
    return captions.take(np.tile(best, (len(captions.words), 1)))


def greedy_search(read: Read, memory: Arrays, state: Arrays, settings: Settings, num_cells: int) -> Captions:
    """The likeliest word each time."""
    result = Captions.empty(len(memory[0]), 1, num_cells, settings)
    images = np.arange(len(memory[0]))  # those still here
    for place in range(1, settings.max_length):
        log_probs, weights, state = read(result.words[images, :, place - 1], memory, state)
        scores = settings.judge(result.words[images, 0, :place], log_probs[:, 0])
        word = scores.argmax(1)[:, None]  # (B, 1)
        captions = result.of(images)
        captions.add(place, word, np.take_along_axis(log_probs[:, 0], word, 1), weights)
        result.put(images, captions)
        going = (~np.isin(word[:, 0], settings.eos_token_id)).nonzero()[0]
        if not len(going):
            break
        if len(going) < len(images):
            images, memory, state = images[going], [part[going] for part in memory], [part[going] for part in state]
    return result


class Beams:
    """Captions under way and captions done, K of each for every image.

    Args:
        num_images: B.
        num_cells: see `search`.
        settings: of the search.
    """

    def __init__(self, num_images: int, num_cells: int, settings: Settings) -> None:
        self.settings, self.num_beams = settings, settings.num_beams
        self.length = 1
        self.running = Captions.empty(num_images, self.num_beams, num_cells, settings)
        self.running.scores[:, 1:] = WORST  # all beams are alike at first: only the first may be continued
        self.done = Captions.empty(num_images, self.num_beams, num_cells, settings)
        self.done.scores[:] = WORST
        self.is_done = np.zeros((num_images, self.num_beams), bool)  # (B, K), whether `done` holds one
        self.is_open = np.ones(num_images, bool)  # (B,), whether `done` can change

    def advance(self, log_probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Add a word to every caption under way, from log p `(B, K, V)` of the next word and its attention.

        Returns:
            `(B, K)`: the beam of its image that each caption under way has continued.
        """
        settings, num_beams = self.settings, self.num_beams
        num_images, _, vocab_size = log_probs.shape
        words = self.running.words[..., : self.length].reshape(-1, self.length)
        scores = settings.judge(words, log_probs.reshape(-1, vocab_size)).reshape(log_probs.shape)
        total = (self.running.scores[..., None] + scores).reshape(num_images, -1)  # (B, K·V)
        best = _top(total, max(2, 1 + len(settings.eos_token_id)) * num_beams)  # (B, M)
        parents, chosen = best // vocab_size, best % vocab_size
        rows = np.arange(num_images)[:, None]
        candidates = self.running.take(parents)
        candidates.scores = total[rows, best]
        candidates.add(self.length, chosen, log_probs[rows, parents, chosen], weights[rows, parents])
        num_words = self.length  # without <start>
        self.length += 1
        over = np.isin(chosen, settings.eos_token_id) | (self.length == settings.max_length)

        # The first K that go on; those that are over follow only if there are no others.
        going = over.argsort(axis=1, kind="stable")[:, :num_beams]
        self.running = candidates.take(going)
        self.running.scores += np.float32(WORST) * over[rows, going]

        ends = over & self.is_open[:, None]
        ends[:, num_beams:] = False  # the others only stand by
        if settings.early_stopping is True:
            ends &= ~self.is_done.all(1, keepdims=True)
        candidates.scores = np.where(ends, candidates.scores / num_words**settings.length_penalty, 2 * WORST)
        pairs = zip(self.done.parts, candidates.parts, strict=True)
        known = Captions(*(np.concatenate(pair, 1) for pair in pairs))
        best = _top(known.scores, num_beams)
        self.done = known.take(best)
        self.is_done = np.concatenate([self.is_done, ends], 1)[rows, best]
        self._close(num_words)
        return parents[rows, going]

    def _close(self, num_words: int) -> None:
        """Close images whose captions under way can't get better than those done, by transformers' rules."""
        settings = self.settings
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            num_words = settings.max_length - 1
        hope = self.running.scores[:, 0] / num_words**settings.length_penalty
        self.is_open &= hope > np.where(self.is_done.all(1), self.done.scores.min(1), WORST)
        if settings.early_stopping is True:
            self.is_open &= ~self.is_done.all(1)

    def keep(self, images: np.ndarray) -> None:
        """Go on with some of the images."""
        self.running, self.done = self.running.of(images), self.done.of(images)
        self.is_done, self.is_open = self.is_done[images], self.is_open[images]


def beam_search(read: Read, memory: Arrays, state: Arrays, settings: Settings, num_cells: int) -> Captions:
    """Beam search; images whose captions are done leave the batch."""
    beams = Beams(len(memory[0]), num_cells, settings)
    result = Captions.empty(len(memory[0]), settings.num_beams, num_cells, settings)
    images = np.arange(len(memory[0]))  # those still here
    words = beams.running.words[:, :1, 0]  # all beams of an image begin alike, so one of them is read
    for place in range(1, settings.max_length):
        log_probs, weights, state = read(words, memory, state)
        if place == 1:
            log_probs, weights = (part.repeat(settings.num_beams, 1) for part in (log_probs, weights))
            state = [part.repeat(settings.num_beams, 1) for part in state]
        parents = beams.advance(log_probs, weights)
        kept = np.arange(len(images))
        if beams.is_open.sum() <= CROWD * len(images):
            result.put(images, beams.done)
            kept = beams.is_open.nonzero()[0]
        if not len(kept):
            return result
        if len(kept) < len(images):
            beams.keep(kept)
            images, memory = images[kept], [part[kept] for part in memory]
        state = [part[kept[:, None], parents[kept]] for part in state]
        words = beams.running.words[..., place]
    result.put(images, beams.done)
    return result


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the greatest of each row, the greatest first: `(B, X) -> (B, count)`."""
    places = np.argpartition(-scores, min(count, scores.shape[1]) - 1, axis=1)[:, :count]
    order = np.take_along_axis(-scores, places, 1).argsort(axis=1, kind="stable")
    return np.take_along_axis(places, order, 1)
