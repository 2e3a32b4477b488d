"""Beam searches that look for more than the likeliest caption, for `generate(custom_generate=…)`.

model.generate(**inputs, custom_generate=diverse_beam_search, num_beams=6, num_beam_groups=3, num_return_sequences=6)
words = processor.tokenizer(["dog", "red ball"], add_special_tokens=False).input_ids
model.generate(**inputs, custom_generate=constrained_beam_search, num_beams=6, force_words_ids=words)
"""

# B: images, K: beams of an image or of a group, N: beams of all images, M: continuations, V: vocabulary
# T: words so far, F: phrases

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from .decoding import WORST, Beams, Captions, Continuations, Model, beam_output, best_continuations, search

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
    """Groups of beams that avoid each other's words (Vijayakumar et al. 2016, Algorithm 1, Hamming diversity).

    At each step the groups choose one after the other; a word that beams of earlier groups have chosen at this step
    counts `diversity_penalty` less for each of them. As in the paper the penalty decides which words are chosen, and
    the scores of captions remain log p. (The older search of transformers adds it to the scores for good.)

    Of each group the best captions are returned, equally many of every group where `num_return_sequences` allows,
    all of them sorted by score.

    Args:
        model: given by `generate()`, as are all that follow but the last two.
        input_ids: `(N, T)`.
        logits_processor: change log p of the next words.
        stopping_criteria: say when a caption is done.
        generation_config: settings of the search.
        num_beam_groups: groups that `num_beams` is divided into. One is plain beam search.
        diversity_penalty: λ >= 0, in units of log p.
        model_kwargs: with `encoder_outputs`.

    Raises:
        ValueError: beams that can't be divided so, or a negative penalty.
    """
    num_beams = require_beams(generation_config, "diverse_beam_search")
    if num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(
            f"num_beam_groups is {num_beam_groups}, but must divide num_beams={num_beams}, such as 3 groups of 6 beams."
        )
    if diversity_penalty < 0:
        raise ValueError(f"diversity_penalty is {diversity_penalty}, but must not be negative.")
    chosen: list[Tensor] = []  # of each group so far, the words of this step (B, K)

    def choose(log_probs: Tensor, beams: Beams) -> Continuations:
        if len(chosen) == num_beam_groups:
            chosen.clear()
        total = log_probs + beams.running.scores.unsqueeze(2)  # (B, K, V)
        preference = total
        if chosen:
            words = torch.cat(chosen, 1)  # (B, K')
            counts = total.new_zeros(len(total), total.shape[2]).scatter_add_(1, words, total.new_ones(words.shape))
            preference = total - diversity_penalty * counts.unsqueeze(1)
        index = preference.flatten(1).topk(beams.num_continuations)[1]  # (B, M)
        continuations = Continuations(
            total.flatten(1).gather(1, index), index // total.shape[2], index % total.shape[2]
        )
        chosen.append(continuations.words[:, : beams.num_beams])
        return continuations

    encoder_outputs = model_kwargs["encoder_outputs"]
    done, cache = search(
        model, input_ids, logits_processor, stopping_criteria, generation_config, encoder_outputs,
        choices=[choose] * num_beam_groups,
    )  # fmt: skip
    # The best of every group, then the second best of every group, and so on.
    together = Captions(
        *(torch.stack([getattr(part, name) for part in done], 2).flatten(1, 2) for name in ("words", "scores", "path"))
    )
    count = generation_config.num_return_sequences
    best = together.scores[:, :count].argsort(dim=1, descending=True, stable=True)
    return beam_output(together.take(best), generation_config, input_ids.shape[1], cache)


def constrained_beam_search(
    model: Model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    force_words_ids: Sequence[Phrase | Sequence[Phrase]] = (),
    **model_kwargs: Any,
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """Beam search for captions in which given words occur (dynamic beam allocation, Post and Vilar 2018).

    Beams are shared out evenly among numbers of forced words that they hold already, so that captions on their way to
    the constraints aren't crowded out by likelier ones that ignore them. Captions end only with all constraints met.

    Args:
        model: given by `generate()`, as are all that follow but the last two.
        input_ids: `(N, T)`.
        logits_processor: change log p of the next words.
        stopping_criteria: say when a caption is done.
        generation_config: settings of the search.
        force_words_ids: of each constraint the ids of a phrase, `[dog]` or `[red, shirt]`, or a list of phrases of
            which one must occur, `[[dog], [dogs]]`.
        model_kwargs: with `encoder_outputs`.

    Raises:
        ValueError: no constraints, or ones that no caption of this length can meet.
    """
    num_beams = require_beams(generation_config, "constrained_beam_search")
    constraints = [as_phrases(constraint) for constraint in force_words_ids]
    shortest = sum(min(len(phrase) for phrase in phrases) for phrases in constraints)
    room = int(generation_config.max_length) - input_ids.shape[1]  # type: ignore[arg-type]
    if not constraints or shortest + 1 > room:
        raise ValueError(
            f"force_words_ids holds {len(constraints)} constraints of {shortest} words in all; give at least one, and "
            f"no more words than fit: with <end> there is room for {room}. Raise max_length for more."
        )
    choose = partial(constrained_continuations, targets=Targets(constraints, input_ids.device))
    encoder_outputs = model_kwargs["encoder_outputs"]
    done, cache = search(
        model, input_ids, logits_processor, stopping_criteria, generation_config, encoder_outputs, choices=[choose]
    )
    found = int((done[0].scores > WORST).sum(1).min())
    if found < generation_config.num_return_sequences:
        raise ValueError(
            f"{found} captions hold all words of force_words_ids={list(force_words_ids)} for some image, but "
            f"{generation_config.num_return_sequences} are asked for. Give more than {num_beams} beams, a longer "
            "max_length, or take back what forbids these words (bad_words_ids, suppress_tokens, no_repeat_ngram_size)."
        )
    return beam_output(done[0], generation_config, input_ids.shape[1], cache)


class Targets:
    """What must occur in a caption.

    Args:
        constraints: of each the phrases of which one must occur.
        device: where captions are.
    """

    def __init__(self, constraints: Sequence[Sequence[Phrase]], device: torch.device) -> None:
        self.constraints = [[torch.tensor(phrase, device=device) for phrase in phrases] for phrases in constraints]
        self.num_words = sum(max(map(len, phrases)) for phrases in constraints)

    def held(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """How far captions have come.

        Args:
            words: `(…, T)`.

        Returns:
            Forced words that a caption holds or has begun to hold, `(…)`, at most `num_words`; and
            for each phrase of each constraint the word that would take it further, `(…, F)`, -1 where its constraint is
            met.
        """
        total = torch.zeros(words.shape[:-1], dtype=torch.long, device=words.device)
        next_words = []
        for phrases in self.constraints:
            met = torch.zeros_like(total, dtype=torch.bool)
            progress = torch.zeros_like(total)
            following = []
            for phrase in phrases:
                if words.shape[-1] >= len(phrase):
                    met |= (words.unfold(-1, len(phrase), 1) == phrase).all(-1).any(-1)
                begun = torch.zeros_like(total)
                for length in range(1, min(len(phrase), words.shape[-1] + 1)):
                    begun = torch.where((words[..., -length:] == phrase[:length]).all(-1), length, begun)
                progress = torch.maximum(progress, begun)
                following.append(phrase[begun])
            total += torch.where(met, max(map(len, phrases)), progress)
            next_words += [torch.where(met, -1, word) for word in following]
        return total, torch.stack(next_words, -1)


def constrained_continuations(log_probs: Tensor, beams: Beams, targets: Targets) -> Continuations:
    """The likeliest continuations, the likeliest of each beam and all that take a constraint further, shared out.

    With r the rank of a continuation by log p among those with as many forced words, all with r = 0 come first, those
    with most forced words in front; then all with r = 1, and so on.
    """
    num_images, num_beams, vocab_size = log_probs.shape
    scores = beams.running.scores
    words_so_far = beams.running.words[..., : beams.length]  # (B, K, T)
    _, wanted = targets.held(words_so_far)  # (B, K, F)
    total = log_probs + scores.unsqueeze(2)  # (B, K, V)
    likeliest = best_continuations(log_probs, beams)
    each = torch.arange(num_beams, device=total.device).expand(num_images, -1)  # (B, K)
    parents = torch.cat([likeliest.parents, each, each.repeat_interleave(wanted.shape[2], 1)], 1)  # (B, M)
    words = torch.cat([likeliest.words, total.argmax(2), wanted.flatten(1)], 1)
    place = parents * vocab_size + words.clamp(min=0)
    values = total.flatten(1).gather(1, place)
    # A continuation found in more than one way counts once, one that is not wanted never.
    twice = (place.unsqueeze(2) == place.unsqueeze(1)).tril(-1) & (words >= 0).unsqueeze(1)
    values = values.masked_fill(twice.any(2) | (words < 0), -torch.inf)

    rows = torch.arange(num_images, device=total.device).unsqueeze(1)
    extended = torch.cat([words_so_far[rows, parents], words.unsqueeze(2)], 2)  # (B, M, T + 1)
    held, _ = targets.held(extended)  # (B, M)
    met = held == targets.num_words
    ends = beams.config.eos_token_id
    is_end = torch.isin(words, torch.tensor(ends, device=words.device))
    values = values.masked_fill(is_end & ~met, -torch.inf)

    order = values.argsort(dim=1, descending=True, stable=True)
    values, held, met = (part.gather(1, order) for part in (values, held, met))
    rank = (held.unsqueeze(2) == held.unsqueeze(1)).tril(-1).sum(2)  # (B, M)
    possible = values > WORST / 2  # and no copy of the first beam, as all are at the start
    key = torch.where(possible, rank * (targets.num_words + 1) + targets.num_words - held, torch.iinfo(rank.dtype).max)
    shared = key.argsort(dim=1, stable=True)[:, : beams.num_continuations]
    taken = order.gather(1, shared)
    return Continuations(
        values.gather(1, shared).clamp(min=WORST),
        parents.gather(1, taken),
        words.gather(1, taken).clamp(min=0),
        may_end=(met & possible).gather(1, shared),
    )


def as_phrases(constraint: Any) -> list[Phrase]:
    """The phrases of a constraint: `[dog]` -> `[[dog]]`.

    Raises:
        ValueError: neither a list of ids nor a list of such lists, or an empty one.
    """
    phrases = [constraint] if constraint and isinstance(constraint[0], int) else constraint
    if not phrases or not all(phrase and all(isinstance(word, int) for word in phrase) for phrase in phrases):
        raise ValueError(
            f"force_words_ids holds {constraint!r}; a constraint is a list of word ids, or a list of such lists."
        )
    return [list(phrase) for phrase in phrases]


def require_beams(config: GenerationConfig, name: str) -> int:
    """The number of beams.

    Raises:
        ValueError: there is only one, or words are to be sampled.
    """
    if not config.num_beams or config.num_beams < 2 or config.do_sample:
        raise ValueError(
            f"{name} needs num_beams of at least 2 and do_sample=False; "
            f"given are num_beams={config.num_beams} and do_sample={config.do_sample}."
        )
    return int(config.num_beams)
