"""The state of a beam search: the captions of each image that are running and those that are finished.

`Beams.advance` is one step. It follows the rules of transformers' `GenerationMixin._beam_search` (steps c to g there),
which is the plain version to compare with; `decoding.py` calls it in a loop.
"""

# B: images in the batch, K: beams of an image (in one group), N: rows of the batch, which are the beams of all images
# M: continuations considered, V: vocabulary, T: words so far, L: longest caption

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

WORST = -1e9  # the score of a beam that holds no caption yet, as in transformers


@dataclass
class Captions:
    """M captions of each of B images.

    Args:
        words: Token ids `(B, M, L)`, padded.
        scores: Scores `(B, M)`: the sum of log p over the words of a running caption; that sum divided by
            `length ** length_penalty` for a finished one.
        beam_indices: Row in [0, N) of the beam that each word after the prefix was appended to,
            `(B, M, L - prefix)`; -1 after the caption's end. This is `beam_indices` of transformers.
    """

    words: Tensor
    scores: Tensor
    beam_indices: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors: words, scores and beam indices."""
        return self.words, self.scores, self.beam_indices

    def select(self, index: Tensor) -> Captions:
        """Return a copy of captions `index[b]` of each image b; index `(B, M')`."""
        image = torch.arange(len(index), device=index.device).unsqueeze(1)  # (B, 1)
        return Captions(*(part[image, index] for part in self.parts))

    def select_images(self, images: Tensor) -> Captions:
        """Return a copy of the captions of some images; images `(B',)`."""
        return Captions(*(part[images] for part in self.parts))

    def join(self, others: Captions) -> Captions:
        """Return these captions and, after them, other captions of the same images: `(B, M + M', …)`."""
        return Captions(*(torch.cat(pair, 1) for pair in zip(self.parts, others.parts, strict=True)))


@dataclass
class Continuations:
    """M possible continuations, each by one word, of the running captions of each image, the most preferred first.

    Args:
        scores: Sum of log p over the words of the caption that a continuation leads to, `(B, M)`.
        parents: Beam in [0, K) that a continuation appends a word to, `(B, M)`.
        words: Id of that word, `(B, M)`.
        may_end: Whether the caption may be returned if it ends with that word, `(B, M)`; None if all may.
    """

    scores: Tensor
    parents: Tensor
    words: Tensor
    may_end: Tensor | None = None

    @classmethod
    def at(cls, index: Tensor, totals: Tensor) -> Continuations:
        """Return the continuations at positions `(B, M)` of the flattened scores `(B, K, V)` of all."""
        vocab_size = totals.shape[2]
        return cls(totals.flatten(1).gather(1, index), index // vocab_size, index % vocab_size)


class Beams:
    """K running and up to K finished captions of each image.

    Args:
        prefix: Prefix of the captions, `(B, K, T)`, the same for all K beams.
        config: Generation config of the search.
        criteria: Stopping criteria, which decide whether a caption ends.
        first_rows: Row in [0, N) of the first of each image's K beams, `(B,)`.
    """

    def __init__(
        self, prefix: Tensor, config: GenerationConfig, criteria: StoppingCriteriaList, first_rows: Tensor
    ) -> None:
        num_images, self.num_beams, self.prefix_length = prefix.shape
        self.config, self.criteria, self.first_rows = config, criteria, first_rows
        self.max_length = int(config.max_length)  # type: ignore[arg-type]
        self.length = self.prefix_length  # words of every running caption
        # So many that K captions go on even where the likeliest next word of every beam is an end token.
        end_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.num_continuations = max(2, 1 + len(end_ids)) * self.num_beams

        shape, device = (num_images, self.num_beams), prefix.device
        words = torch.full((*shape, self.max_length), config.pad_token_id, device=device)  # type: ignore[arg-type]
        words[..., : self.length] = prefix
        beam_indices = torch.full((*shape, self.max_length - self.length), -1, device=device)
        self.running = Captions(words, torch.zeros(shape, device=device), beam_indices)
        # All beams are alike at first. Only the first may be continued, or all would go on alike.
        self.running.scores[:, 1:] = WORST
        self.finished = Captions(words.clone(), torch.full(shape, WORST, device=device), beam_indices.clone())
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)  # (B, K), whether `finished` holds one
        self.can_improve = torch.ones(num_images, dtype=torch.bool, device=device)  # (B,), whether `finished` can

    def totals(self, log_probs: Tensor) -> Tensor:
        """Return the scores of the running captions with each next word, from its log p: `(B, K, V) -> (B, K, V)`."""
        return log_probs + self.running.scores.unsqueeze(2)

    def advance(self, continuations: Continuations) -> Tensor:
        """Append a word to the running captions and move those that end to the finished ones.

        Return for each caption now running the beam in [0, K) that it continues, `(B, K)`.
        """
        candidates = self._extend(continuations)
        words = candidates.words[..., : self.length]  # (B, M, T)
        is_over = self.criteria(words.flatten(0, 1), None).view(words.shape[:2])  # type: ignore[arg-type]
        # The first K that go on. Captions that end fill up where fewer do, with a score that rules them out.
        selected = is_over.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_beams]  # (B, K)
        self.running = candidates.select(selected)
        self.running.scores += WORST * is_over.gather(1, selected)
        self._finish(candidates, is_over, continuations.may_end)
        self._update_can_improve()
        return continuations.parents.gather(1, selected)

    def _extend(self, continuations: Continuations) -> Captions:
        """Return the captions `(B, M)` that continuations lead to, which are a word longer."""
        captions = self.running.select(continuations.parents)
        captions.scores = continuations.scores
        captions.words[..., self.length] = continuations.words
        rows = self.first_rows.unsqueeze(1) + continuations.parents
        captions.beam_indices[..., self.length - self.prefix_length] = rows
        self.length += 1
        return captions

    def _finish(self, candidates: Captions, is_over: Tensor, may_end: Tensor | None) -> None:
        """Keep the best K of the captions finished before and of the candidates `(B, M)` that end now."""
        ends = is_over & self.can_improve.unsqueeze(1)
        ends[:, self.num_beams :] = False  # the others are only there to go on in place of captions that end
        if may_end is not None:
            ends &= may_end
        if self.config.early_stopping is True:
            ends &= ~self.is_finished.all(1, keepdim=True)
        penalty = (self.length - self.prefix_length) ** self.config.length_penalty
        scores = torch.where(ends, candidates.scores / penalty, 2 * WORST)
        pool = self.finished.join(replace(candidates, scores=scores))  # (B, K + M)
        best = pool.scores.topk(self.num_beams)[1]  # (B, K)
        self.finished = pool.select(best)
        self.is_finished = torch.cat([self.is_finished, ends], 1).gather(1, best)

    def _update_can_improve(self) -> None:
        """Update which images, by transformers' rules, have running captions that may beat their worst finished one."""
        config = self.config
        may_gain_by_length = config.early_stopping == "never" and config.length_penalty > 0
        num_words = (self.max_length if may_gain_by_length else self.length) - self.prefix_length
        best_possible = self.running.scores[:, 0] / num_words**config.length_penalty  # (B,)
        all_finished = self.is_finished.all(1)
        self.can_improve &= best_possible > torch.where(all_finished, self.finished.scores.amin(1), WORST)
        if config.early_stopping is True:
            self.can_improve &= ~all_finished

    def keep_images(self, images: Tensor) -> None:
        """Drop all images of the batch but those at these positions, `(B',)`."""
        self.running, self.finished = self.running.select_images(images), self.finished.select_images(images)
        self.is_finished, self.can_improve = self.is_finished[images], self.can_improve[images]
        self.first_rows = self.first_rows[images]
