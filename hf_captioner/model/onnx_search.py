"""Greedy and beam search in numpy alone, for captioners that run without torch.

The captions and scores are those of `generate()`. The beam search is that of `beams.py` and `decoding.py` with the same
names, for a single group of beams. `tests/test_onnx_runner.py` holds the two equal.
"""

# B: images in the batch, K: beams of an image, N: captions, M: continuations considered, V: vocabulary, T: words so far
# L: longest caption, P: image cells, D: decoder state

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

WORST = -1e9  # the score of a beam that holds no caption yet, as in transformers
DROP_AT = 0.8  # images are dropped when at most this fraction of the batch remains, as in `decoding.py`

Arrays = list[np.ndarray]
# A function that reads one more word of each caption. Its arguments are the words (B, K), the arrays that hold the
# images (each with B in front), and the states (B, K, D) before. It returns log p of the next word (B, K, V), the
# attention weights with which it was predicted (B, K, P), and the states after.
Read = Callable[[np.ndarray, Arrays, Arrays], tuple[np.ndarray, np.ndarray, Arrays]]


@dataclass(frozen=True)
class Settings:
    """The arguments of `generate()` that the searches here support, with the same meaning."""

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
            raise ValueError(f"max_length is {self.max_length}; use at least 2, for <start> and one word.")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}; it must be at least 1 and at most num_beams, "
                f"which is {self.num_beams}."
            )

    def process(self, words: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """Return log p `(N, V)` of the next word after words `(N, T)`, with -inf where the settings forbid it."""
        log_probs = log_probs.copy()
        length = words.shape[1]
        log_probs[:, list(self.suppress_tokens)] = -np.inf
        if length == 1:
            log_probs[:, list(self.begin_suppress_tokens)] = -np.inf
        if length < self.min_length:
            log_probs[:, list(self.eos_token_id)] = -np.inf
        for *before, bad in self.bad_words_ids:
            if not before and bad in self.eos_token_id:  # transformers ignores a ban on ending at all
                continue
            if len(before) <= length:
                log_probs[(words[:, length - len(before) :] == before).all(1), bad] = -np.inf
        if 0 < self.no_repeat_ngram_size <= length:
            last = words[:, length - self.no_repeat_ngram_size + 1 :]
            for start in range(length - self.no_repeat_ngram_size + 1):
                end = start + self.no_repeat_ngram_size - 1
                rows = (words[:, start:end] == last).all(1).nonzero()[0]
                log_probs[rows, words[rows, end]] = -np.inf
        return log_probs


@dataclass
class Captions:
    """M captions of each of B images.

    Args:
        words: Token ids `(B, M, L)`, padded; the first is `<start>`.
        scores: Scores `(B, M)`: the sum of log p over the words of a running caption; that sum divided by
            `length ** length_penalty` for a finished one; 0 in greedy search.
        word_scores: log p of each word as the model predicts it, before words are forbidden, `(B, M, L)`; 0 after the
            caption's end.
        weights: Attention weights with which each word was predicted, `(B, M, L, P)`. P is 0 if they are not kept.
    """

    words: np.ndarray
    scores: np.ndarray
    word_scores: np.ndarray
    weights: np.ndarray

    @classmethod
    def start(cls, num_images: int, num_captions: int, num_cells: int, settings: Settings) -> Captions:
        """Return captions that hold nothing but `<start>`."""
        shape = (num_images, num_captions, settings.max_length)
        words = np.full(shape, settings.pad_token_id)
        words[..., 0] = settings.decoder_start_token_id
        scores, word_scores = np.zeros(shape[:2], np.float32), np.zeros(shape, np.float32)
        return cls(words, scores, word_scores, np.zeros((*shape, num_cells), np.float32))

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The four arrays: words, scores, word scores and attention weights."""
        return self.words, self.scores, self.word_scores, self.weights

    def select(self, index: np.ndarray) -> Captions:
        """Return a copy of captions `index[b]` of each image b; index `(B, M')`."""
        image = np.arange(len(index))[:, None]  # (B, 1)
        return Captions(*(part[image, index] for part in self.parts))

    def select_images(self, images: np.ndarray) -> Captions:
        """Return a copy of the captions of some images; images `(B',)`."""
        return Captions(*(part[images] for part in self.parts))

    def join(self, others: Captions) -> Captions:
        """Return these captions and, after them, other captions of the same images: `(B, M + M', …)`."""
        return Captions(*(np.concatenate(pair, 1) for pair in zip(self.parts, others.parts, strict=True)))

    def write_images(self, images: np.ndarray, captions: Captions) -> None:
        """Overwrite the captions of some images; images `(B',)`."""
        for part, new in zip(self.parts, captions.parts, strict=True):
            part[images] = new

    def write_word(self, position: int, words: np.ndarray, word_scores: np.ndarray, weights: np.ndarray) -> None:
        """Write the word at a position of each caption: words and scores `(B, M)`, attention weights `(B, M, P)`."""
        self.words[..., position], self.word_scores[..., position] = words, word_scores
        self.weights[..., position, :] = weights[..., : self.weights.shape[-1]]


def search(read: Read, memory: Arrays, state: Arrays, settings: Settings, *, num_cells: int = 0) -> Captions:
    """Return the `num_return_sequences` best captions of each image, the best first.

    `memory` holds the encoded images, in arrays with B in front, and `state` the states before the first word,
    `(B, 1, D)`. `num_cells` is P if the attention weights are to be kept, 0 if not.
    """
    find = greedy_search if settings.num_beams == 1 else beam_search
    captions = find(read, memory, state, settings, num_cells)
    best = np.arange(settings.num_return_sequences)
    return captions.select(np.tile(best, (len(captions.words), 1)))


def greedy_search(read: Read, memory: Arrays, state: Arrays, settings: Settings, num_cells: int) -> Captions:
    """Return a caption of each image, made of the likeliest word at each step; see `search` for the arguments."""
    captions = Captions.start(len(memory[0]), 1, num_cells, settings)  # of all images
    images = np.arange(len(memory[0]))  # those whose caption goes on
    for length in range(1, settings.max_length):
        words = captions.words[images, :, :length]  # (B, 1, T)
        log_probs, weights, state = read(words[..., -1], memory, state)
        chosen = settings.process(words[:, 0], log_probs[:, 0]).argmax(1)[:, None]  # (B, 1)
        extended = captions.select_images(images)
        extended.write_word(length, chosen, np.take_along_axis(log_probs[:, 0], chosen, 1), weights)
        captions.write_images(images, extended)
        remaining = (~np.isin(chosen[:, 0], settings.eos_token_id)).nonzero()[0]  # (B',), positions in the batch
        if len(remaining) == 0:
            break
        if len(remaining) < len(images):
            images = images[remaining]
            memory, state = [part[remaining] for part in memory], [part[remaining] for part in state]
    return captions


class Beams:
    """K running and up to K finished captions of each image."""

    def __init__(self, num_images: int, num_cells: int, settings: Settings) -> None:
        self.settings, self.num_beams = settings, settings.num_beams
        self.length = 1  # words of every running caption
        # So many that K captions go on even where the likeliest next word of every beam is an end token.
        self.num_continuations = max(2, 1 + len(settings.eos_token_id)) * self.num_beams
        self.running = Captions.start(num_images, self.num_beams, num_cells, settings)
        # All beams are alike at first. Only the first may be continued, or all would go on alike.
        self.running.scores[:, 1:] = WORST
        self.finished = Captions.start(num_images, self.num_beams, num_cells, settings)
        self.finished.scores[:] = WORST
        self.is_finished = np.zeros((num_images, self.num_beams), bool)  # (B, K), whether `finished` holds one
        self.can_improve = np.ones(num_images, bool)  # (B,), whether `finished` can

    def advance(self, log_probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Append a word to the running captions and move those that end to the finished ones.

        From log p of the next word `(B, K, V)` and its attention weights `(B, K, P)`, return for each caption now
        running the beam in [0, K) that it continues, `(B, K)`.
        """
        candidates, parents = self._extend(log_probs, weights)
        last_words = candidates.words[..., self.length - 1]
        is_over = np.isin(last_words, self.settings.eos_token_id) | (self.length == self.settings.max_length)  # (B, M)
        # The first K that go on. Captions that end fill up where fewer do, with a score that rules them out.
        selected = is_over.argsort(axis=1, kind="stable")[:, : self.num_beams]  # (B, K)
        self.running = candidates.select(selected)
        self.running.scores += np.float32(WORST) * np.take_along_axis(is_over, selected, 1)
        self._finish(candidates, is_over)
        self._update_can_improve()
        return np.take_along_axis(parents, selected, 1)

    def _extend(self, log_probs: np.ndarray, weights: np.ndarray) -> tuple[Captions, np.ndarray]:
        """Return the likeliest captions `(B, M)` that are a word longer, and the beams `(B, M)` that they continue."""
        num_images, _, vocab_size = log_probs.shape
        sequences = self.running.words[..., : self.length].reshape(-1, self.length)  # (B·K, T)
        processed = self.settings.process(sequences, log_probs.reshape(-1, vocab_size)).reshape(log_probs.shape)
        totals = (processed + self.running.scores[..., None]).reshape(num_images, -1)  # (B, K·V)
        best = _top(totals, self.num_continuations)  # (B, M)
        parents, words = best // vocab_size, best % vocab_size
        image = np.arange(num_images)[:, None]  # (B, 1)
        captions = self.running.select(parents)
        captions.scores = totals[image, best]
        captions.write_word(self.length, words, log_probs[image, parents, words], weights[image, parents])
        self.length += 1
        return captions, parents

    def _finish(self, candidates: Captions, is_over: np.ndarray) -> None:
        """Keep the best K of the captions finished before and of the candidates `(B, M)` that end now."""
        ends = is_over & self.can_improve[:, None]
        ends[:, self.num_beams :] = False  # the others are only there to go on in place of captions that end
        if self.settings.early_stopping is True:
            ends &= ~self.is_finished.all(1, keepdims=True)
        penalty = (self.length - 1) ** self.settings.length_penalty
        scores = np.where(ends, candidates.scores / penalty, 2 * WORST)
        pool = self.finished.join(replace(candidates, scores=scores))  # (B, K + M)
        best = _top(pool.scores, self.num_beams)  # (B, K)
        self.finished = pool.select(best)
        self.is_finished = np.take_along_axis(np.concatenate([self.is_finished, ends], 1), best, 1)

    def _update_can_improve(self) -> None:
        """Update which images, by transformers' rules, have running captions that may beat their worst finished one."""
        settings = self.settings
        may_gain_by_length = settings.early_stopping == "never" and settings.length_penalty > 0
        num_words = (settings.max_length if may_gain_by_length else self.length) - 1
        best_possible = self.running.scores[:, 0] / num_words**settings.length_penalty  # (B,)
        all_finished = self.is_finished.all(1)
        self.can_improve &= best_possible > np.where(all_finished, self.finished.scores.min(1), WORST)
        if settings.early_stopping is True:
            self.can_improve &= ~all_finished

    def keep_images(self, images: np.ndarray) -> None:
        """Drop all images of the batch but those at these positions, `(B',)`."""
        self.running, self.finished = self.running.select_images(images), self.finished.select_images(images)
        self.is_finished, self.can_improve = self.is_finished[images], self.can_improve[images]


def beam_search(read: Read, memory: Arrays, state: Arrays, settings: Settings, num_cells: int) -> Captions:
    """Return the finished captions of each image, the best first; see `search` for the arguments."""
    num_images, num_beams = len(memory[0]), settings.num_beams
    beams = Beams(num_images, num_cells, settings)
    finished = Captions.start(num_images, num_beams, num_cells, settings)  # of all images, also those dropped
    images = np.arange(num_images)  # those in the batch

    # The beams of an image begin alike, so `<start>` is read once per image.
    log_probs, weights, state = read(beams.running.words[:, :1, 0], memory, state)
    log_probs, weights, *state = (part.repeat(num_beams, 1) for part in (log_probs, weights, *state))
    for length in range(2, settings.max_length + 1):
        parents = beams.advance(log_probs, weights)  # (B, K)
        remaining = beams.can_improve.nonzero()[0]  # (B',), positions in the batch
        if len(remaining) > DROP_AT * len(images):
            remaining = np.arange(len(images))
        if len(remaining) == 0 or length == settings.max_length:
            break
        state = [part[remaining[:, None], parents[remaining]] for part in state]
        if len(remaining) < len(images):
            finished.write_images(images, beams.finished)
            images, memory = images[remaining], [part[remaining] for part in memory]
            beams.keep_images(remaining)
        log_probs, weights, state = read(beams.running.words[..., length - 1], memory, state)
    finished.write_images(images, beams.finished)
    return finished


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the highest scores of each row, the highest first: `(B, X) -> (B, count)`."""
    positions = np.argpartition(-scores, min(count, scores.shape[1]) - 1, axis=1)[:, :count]
    order = np.take_along_axis(-scores, positions, 1).argsort(axis=1, kind="stable")
    return np.take_along_axis(positions, order, 1)
