"""Greedy and beam search that spend nothing on images whose captions are done.

They give the sequences and scores of transformers' own loops, which carry every image along until the last caption of
the batch ends. `CaptionerModel` uses them for plain greedy and beam search; what they don't serve (sampling,
streamers, outputs of every step) stays with transformers.
"""

# B: images, K: beams of an image, N = B·K, M: continuations considered, V: vocabulary, L: longest caption

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

if TYPE_CHECKING:
    from .decoders import RecurrentCache

Model = Callable[..., Any]  # a captioner, of which a search needs forward() alone

# What judges each caption by its own words. Of others, rows may have to stay where they are.
ROWWISE_PROCESSORS = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
ROWWISE_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)

WORST = -1e9  # the score of no caption, as in transformers
# Asking an accelerator whether captions are done makes it wait, so it is asked once in so many words.
WORDS_BETWEEN_CHECKS = {"cpu": 1}
WORDS_BETWEEN_CHECKS_ELSEWHERE = 8
# Leaving costs a copy of the remaining images' memory.
CROWD = 0.8  # share of images still running at which the others leave


def can_drop_images(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    arguments: dict[str, Any],
) -> bool:
    """Whether the searches of this module can stand in for transformers' with these settings and other arguments."""
    outputs_of_steps = config.return_dict_in_generate and (
        config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states
    )
    return (
        not (config.do_sample or outputs_of_steps)
        and bool(config.use_cache)
        and not any(arguments.get(name) for name in ("streamer", "synced_gpus", "cache"))
        and all(type(processor) in ROWWISE_PROCESSORS for processor in processors)
        and all(type(criterion) in ROWWISE_CRITERIA for criterion in criteria)
    )


@dataclass
class Captions:
    """M captions of each of B images.

    Args:
        words: `(B, M, L)`, padded.
        scores: `(B, M)`, of whatever kind.
        path: `(B, M, L)`, for every word but the prefix's the beam, of all N, that it continued; -1 after the end.
    """

    words: Tensor
    scores: Tensor
    path: Tensor

    def take(self, index: Tensor) -> Captions:
        """Of image b, captions `index[b]`: `(B, M')`."""
        rows = torch.arange(len(index), device=index.device).unsqueeze(1)
        return Captions(self.words[rows, index], self.scores.gather(1, index), self.path[rows, index])

    def of(self, images: Tensor) -> Captions:
        """The captions of some images."""
        return Captions(self.words[images], self.scores[images], self.path[images])

    def put(self, images: Tensor, captions: Captions) -> None:
        """Overwrite the captions of some images."""
        self.words[images], self.scores[images], self.path[images] = captions.words, captions.scores, captions.path


@dataclass
class Continuations:
    """M words that may come next in captions of each image, in order of preference.

    Args:
        scores: `(B, M)`, of the captions they lead to: log p of all words.
        parents: `(B, M)`, the beams of the image that they continue.
        words: `(B, M)`.
        may_end: `(B, M)`, whether a caption that ends here may be returned; None if any may.
    """

    scores: Tensor
    parents: Tensor
    words: Tensor
    may_end: Tensor | None = None


# Chooses continuations from log p of the next word (B, K, V) and the beams as they are.
Choice = Callable[[Tensor, "Beams"], Continuations]


def best_continuations(log_probs: Tensor, beams: Beams) -> Continuations:
    """The likeliest, enough of them that K are left where every beam's best word ends its caption."""
    total = (log_probs + beams.running.scores.unsqueeze(2)).flatten(1)  # (B, K·V)
    scores, index = total.topk(beams.num_continuations)
    vocab_size = log_probs.shape[2]
    return Continuations(scores, index // vocab_size, index % vocab_size)


class Beams:
    """Captions under way and captions done, K of each for every image.

    Args:
        prefix: `(B, K, T)`, first words.
        config: of the search.
        criteria: say when a caption is done.
        first_beam: where the first of these K stands among all beams of its image.
        all_beams: beams of an image.
    """

    def __init__(
        self,
        prefix: Tensor,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        first_beam: int = 0,
        all_beams: int | None = None,
    ) -> None:
        num_images, num_beams, self.prefix_length = prefix.shape
        self.config, self.criteria = config, criteria
        self.max_length = int(config.max_length)  # type: ignore[arg-type]
        self.length = self.prefix_length
        self.num_beams = num_beams
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.num_continuations = max(2, 1 + len(ends)) * num_beams
        device = prefix.device
        shape = (num_images, num_beams, self.max_length)
        self.running = Captions(
            torch.full(shape, config.pad_token_id, device=device),  # type: ignore[arg-type]
            torch.zeros(shape[:2], device=device),
            torch.full((*shape[:2], self.max_length - self.length), -1, device=device),
        )
        self.running.words[..., : self.length] = prefix
        # All beams are alike at first: only the first may be continued.
        self.running.scores[:, 1:] = WORST
        nothing = torch.full(shape[:2], WORST, device=device)
        self.done = Captions(self.running.words.clone(), nothing, self.running.path.clone())
        self.is_done = torch.zeros(shape[:2], dtype=torch.bool, device=device)  # (B, K), whether `done` holds one
        self.is_open = torch.ones(num_images, dtype=torch.bool, device=device)  # (B,), whether `done` can change
        offsets = torch.arange(num_images, device=device) * (all_beams or num_beams) + first_beam
        self.offsets = offsets.unsqueeze(1)  # (B, 1), of an image's first beam among all N

    def advance(self, continuations: Continuations) -> Tensor:
        """Add a word to every caption under way.

        Returns:
            `(B, K)`: the beam of its image that each caption under way has continued.
        """
        config, parents = self.config, continuations.parents
        candidates = self.running.take(parents)
        candidates.scores = continuations.scores
        candidates.words[..., self.length] = continuations.words
        candidates.path[..., self.length - self.prefix_length] = self.offsets + parents
        self.length += 1
        over = self.criteria(candidates.words[..., : self.length].flatten(0, 1), None).view(parents.shape)  # type: ignore[arg-type]

        # The first K that go on; those that are over follow only if there are no others.
        going = over.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_beams]
        self.running = candidates.take(going)
        self.running.scores = self.running.scores + WORST * over.gather(1, going)

        ends = over & self.is_open.unsqueeze(1)
        ends[:, self.num_beams :] = False  # the others only stand by
        if continuations.may_end is not None:
            ends &= continuations.may_end
        if config.early_stopping is True:
            ends &= ~self.is_done.all(1, keepdim=True)
        num_words = self.length - self.prefix_length
        candidates.scores = torch.where(ends, candidates.scores / num_words**config.length_penalty, 2 * WORST)
        known = Captions(*(torch.cat(pair, 1) for pair in zip(_parts(self.done), _parts(candidates), strict=True)))
        best = known.scores.topk(self.num_beams)[1]
        self.done = known.take(best)
        self.is_done = torch.cat([self.is_done, ends], 1).gather(1, best)
        self._close()
        return parents.gather(1, going)

    def _close(self) -> None:
        """Close images whose captions under way can't get better than those done, by transformers' rules."""
        config = self.config
        num_words = (self.max_length if self._may_gain_by_length else self.length) - self.prefix_length
        hope = self.running.scores[:, 0] / num_words**config.length_penalty  # (B,)
        worst = torch.where(self.is_done.all(1), self.done.scores.amin(1), WORST)
        self.is_open &= hope > worst
        if config.early_stopping is True:
            self.is_open &= ~self.is_done.all(1)

    @property
    def _may_gain_by_length(self) -> bool:
        return self.config.early_stopping == "never" and self.config.length_penalty > 0

    def keep(self, images: Tensor) -> None:
        """Go on with some of the images."""
        self.running, self.done = self.running.of(images), self.done.of(images)
        self.is_done, self.is_open, self.offsets = self.is_done[images], self.is_open[images], self.offsets[images]


def _parts(captions: Captions) -> tuple[Tensor, Tensor, Tensor]:
    return captions.words, captions.scores, captions.path


def beam_search(
    model: Model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """Beam search as `generate()` has it, for settings that `can_drop_images` says yes to.

    Args:
        model: the captioner.
        input_ids: `(N, T)`, first words of every beam.
        logits_processor: change log p of the next words.
        stopping_criteria: say when a caption is done.
        generation_config: settings of the search.
        model_kwargs: with `encoder_outputs`.
    """
    done, cache = search(
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs["encoder_outputs"],
        choices=[best_continuations],
    )  # fmt: skip
    return beam_output(done[0], generation_config, input_ids.shape[1], cache)


@torch.no_grad()
def search(
    model: Model,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    encoder_outputs: Any,
    choices: list[Choice],
) -> tuple[list[Captions], RecurrentCache]:
    """Search with beams in as many equal groups as there are choices, in which the groups choose one after the other.

    Returns:
        Finished captions of each group, the best first, and the state.
    """
    num_beams, num_groups = int(config.num_beams), len(choices)  # type: ignore[arg-type]
    group_size = num_beams // num_groups
    prefix = input_ids.unflatten(0, (-1, num_beams))  # (B, K, T)
    groups = [
        Beams(prefix[:, first : first + group_size], config, criteria, first, num_beams)
        for first in range(0, num_beams, group_size)
    ]
    results = [Captions(*(part.clone() for part in _parts(beams.done))) for beams in groups]
    images = torch.arange(len(prefix), device=input_ids.device)  # those still here
    words_between_checks = WORDS_BETWEEN_CHECKS.get(input_ids.device.type, WORDS_BETWEEN_CHECKS_ELSEWHERE)

    # All beams of an image begin alike, so one of them is read.
    output = model(decoder_input_ids=prefix[:, 0], encoder_outputs=encoder_outputs)
    cache = output.cache
    cache.reorder_cache(images.repeat_interleave(num_beams))
    logits = output.logits[:, -1].repeat_interleave(num_beams, 0)  # (N, V)
    for num_words in range(1, int(config.max_length) - input_ids.shape[1] + 1):  # type: ignore[arg-type]
        log_probs = torch.log_softmax(logits.float(), -1)
        sequences = torch.stack([beams.running.words[..., : beams.length] for beams in groups], 1)  # (B, G, K/G, T)
        log_probs = processors(sequences.flatten(0, 2), log_probs)  # type: ignore[arg-type]
        log_probs = log_probs.unflatten(0, (len(images), num_beams))  # (B, K, V)
        parents: list[Tensor] = []
        for beams, choose, share in zip(groups, choices, log_probs.split(group_size, 1), strict=True):
            first = len(parents) * group_size
            parents.append(first + beams.advance(choose(share, beams)))
        is_open = torch.stack([beams.is_open for beams in groups]).any(0)  # (B,)
        kept = torch.arange(len(images), device=images.device)
        if num_words % words_between_checks == 0:
            num_open = int(is_open.sum())
            if num_open == 0:
                break
            if num_open <= CROWD * len(images):
                _put_all(results, groups, images)
                kept = is_open.nonzero().squeeze(1)
        beam_of = (kept.unsqueeze(1) * num_beams + torch.cat(parents, 1)[kept]).flatten()  # (N,)
        cache.reorder_cache(beam_of)
        words = torch.cat([beams.running.words[..., beams.length - 1] for beams in groups], 1)[kept]
        if len(kept) < len(images):
            cache.keep_images(kept)
            images = images[kept]
            for beams in groups:
                beams.keep(kept)
        if num_words + input_ids.shape[1] < int(config.max_length):  # type: ignore[arg-type]
            output = model(decoder_input_ids=words.flatten().unsqueeze(1), cache=cache)
            logits, cache = output.logits[:, -1], output.cache
    _put_all(results, groups, images)
    return results, cache


def _put_all(results: list[Captions], groups: list[Beams], images: Tensor) -> None:
    for result, beams in zip(results, groups, strict=True):
        result.put(images, beams.done)


def beam_output(
    done: Captions,
    config: GenerationConfig,
    prefix_length: int,
    cache: RecurrentCache,
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """The best captions of each image as `generate()` returns them."""
    count = config.num_return_sequences
    words, path = done.words[:, :count].flatten(0, 1), done.path[:, :count].flatten(0, 1)  # (B·S, L)
    num_words = int((path >= 0).sum(1).max())
    words, path = words[:, : prefix_length + num_words], path[:, :num_words]
    if not config.return_dict_in_generate:
        return words
    return GenerateBeamEncoderDecoderOutput(
        sequences=words,  # type: ignore[arg-type]
        sequences_scores=done.scores[:, :count].flatten(),  # type: ignore[arg-type]
        beam_indices=path,  # type: ignore[arg-type]
        cache=cache,  # type: ignore[arg-type]
    )
