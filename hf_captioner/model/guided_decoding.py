"""Beam searches that look for more than the likeliest captions, for `generate(custom_generate=...)`.

    model.generate(**inputs, custom_generate=diverse_beam_search, num_beams=6, num_beam_groups=3)
    words = processor.tokenizer(["dog", "red ball"], add_special_tokens=False).input_ids
    model.generate(**inputs, custom_generate=constrained_beam_search, num_beams=6, force_words_ids=words)

Both call `search` of decoding.py with a different rule for choosing the continuations of captions.
"""

# B: images, K: beams of an image (in one group), N: beams of all images, M: continuations considered, V: vocabulary
# T: words so far, F: forced phrases of all constraints together

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from .beams import WORST, Beams, Captions, Continuations
from .decoding import Model, best_continuations, generate_output, search

Phrase = list[int]


def diverse_beam_search(
    model: Model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.5,
    **model_kwargs: Any,
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """Search with groups of beams that avoid each other's words (Vijayakumar et al. 2016, Algorithm 1).

    The beams of an image are divided into `num_beam_groups` groups; one group is plain beam search. `diversity_penalty`
    is what each use of a word by earlier groups costs, at least 0, in units of log p. `generate()` passes the other
    arguments, see `beam_search`.

    Returned are the best captions of every group, equally many of each where `num_return_sequences` allows, sorted by
    score.

    Raises:
        ValueError: The beams can't be divided into so many groups, or the penalty is negative.
    """
    num_beams = _require_beams(generation_config, "diverse_beam_search")
    if num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(
            f"num_beam_groups is {num_beam_groups}, but must divide num_beams={num_beams}, such as 3 groups of 6 beams."
        )
    if diversity_penalty < 0:
        raise ValueError(f"diversity_penalty is {diversity_penalty}, but must not be negative.")
    settings = (logits_processor, stopping_criteria, generation_config)
    choose = partial(diverse_continuations, penalty=diversity_penalty)
    groups = search(model, input_ids, *settings, model_kwargs["encoder_outputs"], choose, num_beam_groups)
    captions = _take_turns(groups)
    best = captions.scores[:, : generation_config.num_return_sequences].argsort(dim=1, descending=True, stable=True)
    return generate_output(captions.select(best), generation_config, input_ids.shape[1])


def diverse_continuations(
    log_probs: Tensor, beams: Beams, earlier: Sequence[Continuations], penalty: float
) -> Continuations:
    """Return the likeliest continuations with a penalty on words that earlier groups use (Hamming diversity).

    As in the paper the penalty decides which continuations are chosen, and the scores of captions remain log p. (The
    older diverse search of transformers adds the penalty to the scores for good.) See `Choice` for the other arguments.
    """
    totals = beams.totals(log_probs)  # (B, K, V)
    num_uses = torch.zeros_like(totals[:, 0])  # (B, V)
    for continuations in earlier:
        words = continuations.words[:, : beams.num_beams]
        num_uses.scatter_add_(1, words, torch.ones_like(words, dtype=num_uses.dtype))
    preferences = totals - penalty * num_uses.unsqueeze(1)
    return Continuations.at(preferences.flatten(1).topk(beams.num_continuations)[1], totals)


def _take_turns(groups: Sequence[Captions]) -> Captions:
    """Return the best caption of every group, then the second best of every group, and so on: `(B, G·K, ...)`."""
    parts = zip(*(group.parts for group in groups), strict=True)
    return Captions(*(torch.stack(part, 2).flatten(1, 2) for part in parts))


def constrained_beam_search(
    model: Model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    force_words_ids: Sequence[Phrase | Sequence[Phrase]] = (),
    **model_kwargs: Any,
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """Search for captions in which given words occur (dynamic beam allocation, Post and Vilar 2018).

    `force_words_ids` has an entry per constraint: the token ids of a phrase that must occur, `[dog]` or `[red, shirt]`,
    or a list of phrases of which one must occur, `[[dog], [dogs]]`. `generate()` passes the other arguments, see
    `beam_search`.

    Raises:
        ValueError: No constraints are given, max_length is too short for them, or too few captions meet them.
    """
    num_beams = _require_beams(generation_config, "constrained_beam_search")
    phrases = [_as_phrases(constraint) for constraint in force_words_ids]
    num_needed = sum(min(map(len, alternatives)) for alternatives in phrases) + 1  # and an end token
    room = int(generation_config.max_length) - input_ids.shape[1]  # type: ignore[arg-type]
    if not phrases or num_needed > room:
        raise ValueError(
            f"force_words_ids holds {len(phrases)} constraints, which with the end token take {num_needed} words, and "
            f"captions have room for {room}. Give at least one constraint, and raise max_length for longer captions."
        )
    settings = (logits_processor, stopping_criteria, generation_config)
    constraints = [Constraint(alternatives, input_ids.device) for alternatives in phrases]
    choose = partial(constrained_continuations, constraints=constraints)
    (captions,) = search(model, input_ids, *settings, model_kwargs["encoder_outputs"], choose)
    num_found = int((captions.scores > WORST).sum(1).min())
    if num_found < generation_config.num_return_sequences:
        raise ValueError(
            f"For some image only {num_found} captions hold all words of force_words_ids={list(force_words_ids)}, but "
            f"num_return_sequences is {generation_config.num_return_sequences}. Use more than {num_beams} beams or a "
            "longer max_length, or stop forbidding these words (bad_words_ids, suppress_tokens, no_repeat_ngram_size)."
        )
    return generate_output(captions, generation_config, input_ids.shape[1])


class Constraint:
    """A constraint of `constrained_beam_search`: phrases of which one must occur in a caption."""

    def __init__(self, phrases: Sequence[Phrase], device: torch.device) -> None:
        self.phrases = [torch.tensor(phrase, device=device) for phrase in phrases]
        self.num_words = max(map(len, phrases))  # as many words a met constraint counts, whichever phrase occurs

    def is_met(self, words: Tensor) -> Tensor:
        """Return whether a phrase occurs in captions: `(..., T) -> (...)`."""
        is_met = torch.zeros(words.shape[:-1], dtype=torch.bool, device=words.device)
        for phrase in self.phrases:
            if len(phrase) <= words.shape[-1]:
                is_met |= (words.unfold(-1, len(phrase), 1) == phrase).all(-1).any(-1)
        return is_met

    def num_begun(self, words: Tensor) -> list[Tensor]:
        """Return for each phrase how many of its words, but not all, captions end with: `(..., T) -> (...)`."""
        counts = []
        for phrase in self.phrases:
            count = torch.zeros(words.shape[:-1], dtype=torch.long, device=words.device)
            for length in range(1, min(len(phrase), words.shape[-1] + 1)):
                count = torch.where((words[..., -length:] == phrase[:length]).all(-1), length, count)
            counts.append(count)
        return counts

    def num_held(self, words: Tensor) -> Tensor:
        """Return how many words of the constraint captions satisfy, begun phrases included: `(..., T) -> (...)`."""
        begun = torch.stack(self.num_begun(words)).amax(0)
        return torch.where(self.is_met(words), self.num_words, begun)

    def next_words(self, words: Tensor) -> Tensor:
        """Return the next word of each phrase, -1 where the constraint is already met: `(..., T) -> (..., F)`."""
        following = [phrase[count] for phrase, count in zip(self.phrases, self.num_begun(words), strict=True)]
        return torch.where(self.is_met(words).unsqueeze(-1), -1, torch.stack(following, -1))


def constrained_continuations(
    log_probs: Tensor, beams: Beams, earlier: Sequence[Continuations], constraints: Sequence[Constraint]
) -> Continuations:
    """Return continuations by dynamic beam allocation (Post and Vilar 2018).

    Each count of satisfied constraint words gets an equal share of the beam slots. Otherwise captions that work towards
    the constraints would be crowded out by likelier ones that ignore them. A caption may end only if it meets all
    constraints. `earlier`, the continuations that earlier groups of beams chose at this step, is not used, as there is
    only one group. See `Choice` in decoding.py for the other arguments.
    """
    totals = beams.totals(log_probs)  # (B, K, V)
    sequences = beams.running.words[..., : beams.length]  # (B, K, T)
    proposed = _propose(totals, sequences, best_continuations(log_probs, beams), constraints)
    image = torch.arange(len(totals), device=totals.device).unsqueeze(1)  # (B, 1)
    extended = torch.cat([sequences[image, proposed.parents], proposed.words.unsqueeze(2)], 2)  # (B, M, T + 1)
    num_held = torch.stack([constraint.num_held(extended) for constraint in constraints]).sum(0)  # (B, M)
    all_met = num_held == sum(constraint.num_words for constraint in constraints)
    is_end = torch.isin(proposed.words, torch.tensor(beams.config.eos_token_id, device=totals.device))
    scores = proposed.scores.masked_fill(is_end & ~all_met, -torch.inf)

    # Copies of the first beam, as all beams are at the start, have scores near WORST and are as little use.
    is_possible = scores > WORST / 2
    index = _share_out(scores, num_held, is_possible)[:, : beams.num_continuations]
    return Continuations(
        scores.gather(1, index).clamp(min=WORST),
        proposed.parents.gather(1, index),
        proposed.words.gather(1, index).clamp(min=0),
        may_end=(all_met & is_possible).gather(1, index),
    )


def _propose(
    totals: Tensor, sequences: Tensor, likeliest: Continuations, constraints: Sequence[Constraint]
) -> Continuations:
    """Return the likeliest continuations, the likeliest of each beam, and all that add the next word of a phrase.

    `totals` are the scores of all continuations, `(B, K, V)`, and `sequences` the running captions, `(B, K, T)`. A
    continuation proposed before gets the score -inf, and so does the word -1.
    """
    num_images, num_beams, vocab_size = totals.shape
    forced = torch.cat([constraint.next_words(sequences) for constraint in constraints], -1)  # (B, K, F)
    beam = torch.arange(num_beams, device=totals.device).expand(num_images, -1)  # (B, K)
    parents = torch.cat([likeliest.parents, beam, beam.repeat_interleave(forced.shape[2], 1)], 1)  # (B, M)
    words = torch.cat([likeliest.words, totals.argmax(2), forced.flatten(1)], 1)  # (B, M)

    index = parents * vocab_size + words.clamp(min=0)
    is_word = words >= 0
    is_same = (index.unsqueeze(2) == index.unsqueeze(1)) & is_word.unsqueeze(1)  # (B, M, M)
    is_repeated = is_same.tril(-1).any(2)
    scores = totals.flatten(1).gather(1, index).masked_fill(is_repeated | ~is_word, -torch.inf)
    return Continuations(scores, parents, words)


def _share_out(scores: Tensor, num_held: Tensor, is_possible: Tensor) -> Tensor:
    """Return the order in which to choose continuations so that each count of satisfied constraint words has its share.

    First come the likeliest continuations for each count of constraint words, then the second likeliest for each, and
    so on; among these, those with more constraint words come first. The impossible ones come last.
    """
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    num_held, is_possible = num_held.gather(1, by_score), is_possible.gather(1, by_score)
    rank = (num_held.unsqueeze(2) == num_held.unsqueeze(1)).tril(-1).sum(2)  # likelier ones with as many forced words
    levels = num_held.amax() + 1
    key = rank * levels + (levels - 1 - num_held)  # ascending by rank, then descending by forced words
    key = key.masked_fill(~is_possible, torch.iinfo(key.dtype).max)
    return by_score.gather(1, key.argsort(dim=1, stable=True))


def _as_phrases(constraint: Any) -> list[Phrase]:
    """Return the phrases of a constraint: `[[dog]]` for `[dog]`. Raise a ValueError if it has another form."""
    phrases = [constraint] if constraint and isinstance(constraint[0], int) else constraint
    if not phrases or not all(phrase and all(isinstance(word, int) for word in phrase) for phrase in phrases):
        raise ValueError(
            f"force_words_ids holds {constraint!r}; a constraint is a list of word ids, or a list of such lists."
        )
    return [list(phrase) for phrase in phrases]


def _require_beams(config: GenerationConfig, name: str) -> int:
    """Return the number of beams, or raise a ValueError if there is only one or if words are to be sampled."""
    if not config.num_beams or config.num_beams < 2 or config.do_sample:
        raise ValueError(
            f"{name} needs num_beams of at least 2 and do_sample=False; "
            f"given are num_beams={config.num_beams} and do_sample={config.do_sample}."
        )
    return int(config.num_beams)
