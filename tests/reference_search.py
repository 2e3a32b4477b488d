"""Beam searches in plain Python for one image, to compare the package's with.

They follow the rules that transformers documents for its beam search, with a list of captions in place of tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Words = tuple[int, ...]
# Returns log p of every word of the vocabulary after some words.
Model = Callable[[Words], list[float]]


@dataclass(frozen=True)
class Settings:
    """Settings of `generate()`, with the same meaning; `end` is the end token."""

    num_beams: int
    max_length: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    end: int = 3


def beam_search(model: Model, start: Words, settings: Settings) -> list[tuple[float, Words]]:
    """Return the finished captions with their scores, the best first."""
    running: list[tuple[float, Words]] = [(0.0, start)]
    finished: list[tuple[float, Words]] = []
    while True:
        candidates = [
            (score + log_prob, (*words, word))
            for score, words in running
            for word, log_prob in enumerate(model(words))
            if log_prob > -math.inf
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates = candidates[: 2 * settings.num_beams]
        length = len(candidates[0][1])
        running = []
        for rank, (score, words) in enumerate(candidates):
            if words[-1] != settings.end and length < settings.max_length:
                running.append((score, words))
            elif rank < settings.num_beams:
                finished.append((score / (length - len(start)) ** settings.length_penalty, words))
        finished.sort(key=lambda caption: -caption[0])
        finished = finished[: settings.num_beams]
        running = running[: settings.num_beams]
        if length == settings.max_length:
            return finished
        if len(finished) == settings.num_beams:
            if settings.early_stopping is True:
                return finished
            longest = settings.early_stopping == "never" and settings.length_penalty > 0
            words_left = (settings.max_length if longest else length) - len(start)
            if running[0][0] / words_left**settings.length_penalty <= finished[-1][0]:
                return finished


def all_captions(model: Model, start: Words, settings: Settings) -> Iterator[tuple[float, Words]]:
    """Yield every possible caption with its score."""
    open_captions = [(0.0, start)]
    for length in itertools.count(len(start) + 1):
        grown = [
            (score + log_prob, (*words, word))
            for score, words in open_captions
            for word, log_prob in enumerate(model(words))
            if log_prob > -math.inf
        ]
        open_captions = []
        for score, words in grown:
            if words[-1] == settings.end or length == settings.max_length:
                yield score / (length - len(start)) ** settings.length_penalty, words
            else:
                open_captions.append((score, words))
        if not open_captions:
            return


def diverse_beam_search(
    model: Model, start: Words, settings: Settings, num_groups: int, penalty: float
) -> list[list[tuple[float, Words]]]:
    """Return the finished captions of each group (Vijayakumar et al. 2016, Algorithm 1), without early stopping."""
    size = settings.num_beams // num_groups
    running: list[list[tuple[float, Words]]] = [[(0.0, start)] for _ in range(num_groups)]
    finished: list[list[tuple[float, Words]]] = [[] for _ in range(num_groups)]
    for length in range(len(start) + 1, settings.max_length + 1):
        taken: list[int] = []
        for group in range(num_groups):
            candidates = [
                (score + log_prob - penalty * taken.count(word), score + log_prob, (*words, word))
                for score, words in running[group]
                for word, log_prob in enumerate(model(words))
                if log_prob > -math.inf
            ]
            candidates.sort(key=lambda candidate: -candidate[0])
            candidates = candidates[: 2 * size]
            running[group] = []
            for rank, (_, score, words) in enumerate(candidates):
                if words[-1] != settings.end and length < settings.max_length:
                    running[group].append((score, words))
                elif rank < size:
                    finished[group].append((score / (length - len(start)) ** settings.length_penalty, words))
            taken += [words[-1] for _, _, words in candidates[:size]]
            running[group] = running[group][:size]
            finished[group] = sorted(finished[group], key=lambda caption: -caption[0])[:size]
    return finished
