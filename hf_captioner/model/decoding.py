"""Beam search that spends no work on images whose captions are finished.

The plain version is transformers' own beam search (`GenerationMixin._beam_search`), which keeps every image in the
batch until the last caption is finished. The search below returns the same sequences and scores in less time, because

- the beams of an image begin with the same prefix, which is read once per image instead of once per beam;
- images whose captions can no longer improve are dropped from the batch.

`tests/test_decoding.py` holds the two equal, and both equal to a search for a single image in plain Python
(`tests/reference_search.py`). `onnx_search.py` is the same search in numpy.

`CaptionerModel` calls `beam_search` wherever `can_drop_images` allows it and leaves everything else, greedy search
included, to transformers. The searches of `guided_decoding.py` are built on `search`, too.
"""

# B: images in the batch, G: groups of beams (1 but in diverse beam search), K: beams of an image in one group
# N = B·G·K: rows of the batch, M: continuations considered, V: vocabulary, T: words so far, L: longest caption

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from .beams import Beams, Captions, Continuations

if TYPE_CHECKING:
    from .decoder_interface import RecurrentCache

Model = Callable[..., Any]  # a CaptionerModel, of which a search only calls forward()

# Processors and criteria that judge each caption by its words alone. Others may count on an image keeping its rows.
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


class StopStrings(StoppingCriteria):
    """Ends a caption as soon as its last word completes one of some strings.

    Args:
        strings: One string or several.
        tokenizer: Tokenizer that turns ids into text.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether each caption ends, `(N, T) -> (N,)`."""
        texts = [self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (input_ids[:, :-1], input_ids)]
        is_done = [
            any(string in text[max(0, len(before) - len(string) + 1) :] for string in self.strings)
            for before, text in zip(*texts, strict=True)
        ]
        return torch.tensor(is_done, device=input_ids.device)


# Dropping images copies the memory of those that remain, so it waits until at most this fraction does.
DROP_AT = 0.8
# Counting the images that remain makes the program wait for an accelerator, so there it is done less often.
STEPS_BETWEEN_CHECKS = {"cpu": 1}
STEPS_BETWEEN_CHECKS_ON_ACCELERATORS = 8


def can_drop_images(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    arguments: dict[str, Any],
) -> bool:
    """Return whether `beam_search` can replace transformers' own, given the settings of a call of `generate()`.

    `arguments` are the other arguments that transformers' beam search would get.
    """
    returns_every_step = config.return_dict_in_generate and (
        config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states
    )
    return (
        not (config.do_sample or returns_every_step)
        and bool(config.use_cache)
        and not any(arguments.get(name) for name in ("streamer", "synced_gpus", "cache"))
        and all(type(processor) in ROWWISE_PROCESSORS for processor in processors)
        and all(type(criterion) in ROWWISE_CRITERIA for criterion in criteria)
    )


# Chooses how the beams of a group go on, given log p of the next word (B, K, V), the beams, and the continuations that
# earlier groups have chosen at the same step.
Choice = Callable[[Tensor, Beams, Sequence[Continuations]], Continuations]


def best_continuations(log_probs: Tensor, beams: Beams, earlier: Sequence[Continuations] = ()) -> Continuations:
    """Return the likeliest continuations, the choice of plain beam search; see `Choice` for the arguments."""
    totals = beams.totals(log_probs)
    return Continuations.at(totals.flatten(1).topk(beams.num_continuations)[1], totals)


def beam_search(
    model: Model,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """Return the captions of transformers' beam search, for settings that `can_drop_images` allows.

    `generate()` passes the arguments: `input_ids` is the prefix of every beam, `(N, T)`, and of `model_kwargs`
    only `encoder_outputs` is used.
    """
    settings = (logits_processor, stopping_criteria, generation_config)
    (captions,) = search(model, input_ids, *settings, model_kwargs["encoder_outputs"])
    return generate_output(captions, generation_config, input_ids.shape[1])


@torch.no_grad()
def search(
    model: Model,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    encoder_outputs: Any,
    choose: Choice = best_continuations,
    num_groups: int = 1,
) -> list[Captions]:
    """Run a beam search and return the finished captions of each group of beams, the best caption first.

    The beams of an image are divided into `num_groups` groups. At each step, `choose` is called once per
    group, and returns the continuations of that group. The other arguments are those of `beam_search`.
    """
    prefix = input_ids.unflatten(0, (-1, int(config.num_beams)))  # type: ignore[arg-type]  # (B, G·K, T)
    num_images, num_beams, prefix_length = prefix.shape
    max_length = int(config.max_length)  # type: ignore[arg-type]
    groups = _start_groups(prefix, criteria, config, num_groups)
    finished = [group.finished for group in groups]  # of all images, also those dropped
    images = torch.arange(num_images, device=input_ids.device)  # those in the batch
    interval = STEPS_BETWEEN_CHECKS.get(input_ids.device.type, STEPS_BETWEEN_CHECKS_ON_ACCELERATORS)

    logits, cache = _read_prefix(model, prefix, encoder_outputs)
    for length in range(prefix_length + 1, max_length + 1):
        log_probs = _process(logits, groups, processors)  # (B, G·K, V)
        parents = _advance(groups, log_probs, choose)  # (B, G·K)
        remaining = torch.arange(len(images), device=images.device)
        if (length - prefix_length) % interval == 0:
            remaining = _remaining_images(groups)  # (B',), positions in the batch
        if len(remaining) == 0 or length == max_length:
            break
        rows = remaining.unsqueeze(1) * num_beams + parents[remaining]  # (B', G·K)
        cache.reorder_cache(rows.flatten())
        if len(remaining) < len(images):
            _write_finished(finished, groups, images)
            images = images[remaining]
            cache.keep_images(remaining)
            for group in groups:
                group.keep_images(remaining)
        words = torch.cat([group.running.words[..., length - 1] for group in groups], 1)  # (B, G·K)
        output = model(decoder_input_ids=words.flatten().unsqueeze(1), cache=cache, return_dict=True)
        logits, cache = output.logits[:, -1], output.cache
    _write_finished(finished, groups, images)
    return finished


def _start_groups(
    prefix: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig, num_groups: int
) -> list[Beams]:
    """Return the groups into which the beams of each image are divided, all starting with the prefix `(B, G·K, T)`."""
    num_images, num_beams, _ = prefix.shape
    rows = torch.arange(num_images * num_beams, device=prefix.device).view(num_images, num_beams)
    group_size = num_beams // num_groups
    return [
        Beams(prefix[:, first : first + group_size], config, criteria, first_rows=rows[:, first])
        for first in range(0, num_beams, group_size)
    ]


def _read_prefix(model: Model, prefix: Tensor, encoder_outputs: Any) -> tuple[Tensor, RecurrentCache]:
    """Read the prefix `(B, G·K, T)` once per image, and return the logits `(N, V)` and the state of all beams."""
    num_images, num_beams, _ = prefix.shape
    output = model(decoder_input_ids=prefix[:, 0], encoder_outputs=encoder_outputs, return_dict=True)
    output.cache.reorder_cache(torch.arange(num_images, device=prefix.device).repeat_interleave(num_beams))
    return output.logits[:, -1].repeat_interleave(num_beams, 0), output.cache


def _process(logits: Tensor, groups: Sequence[Beams], processors: LogitsProcessorList) -> Tensor:
    """Return log p of the next word after the logits processors: `(N, V) -> (B, G·K, V)`."""
    words = torch.stack([group.running.words[..., : group.length] for group in groups], 1)  # (B, G, K, T)
    log_probs = torch.log_softmax(logits.float(), -1)
    log_probs = processors(words.flatten(0, 2), log_probs)  # type: ignore[arg-type]
    return log_probs.unflatten(0, (len(words), -1))


def _advance(groups: Sequence[Beams], log_probs: Tensor, choose: Choice) -> Tensor:
    """Append a word to the captions of each group in turn; return which beams in [0, G·K) they continue, `(B, G·K)`."""
    chosen: list[Continuations] = []
    parents: list[Tensor] = []
    for number, (group, own_log_probs) in enumerate(zip(groups, log_probs.chunk(len(groups), 1), strict=True)):
        chosen.append(choose(own_log_probs, group, chosen))
        parents.append(number * group.num_beams + group.advance(chosen[-1]))
    return torch.cat(parents, 1)


def _remaining_images(groups: Sequence[Beams]) -> Tensor:
    """Return the positions `(B',)` of the images to keep in the batch.

    These are the images whose captions can still improve, or all images if they are more than the fraction `DROP_AT`.
    """
    can_improve = torch.stack([group.can_improve for group in groups]).any(0)  # (B,)
    if int(can_improve.sum()) > DROP_AT * len(can_improve):
        return torch.arange(len(can_improve), device=can_improve.device)
    return can_improve.nonzero().squeeze(1)


def _write_finished(finished: Sequence[Captions], groups: Sequence[Beams], images: Tensor) -> None:
    """Copy the finished captions of the images `(B',)` in the batch to the captions of all images."""
    for captions, group in zip(finished, groups, strict=True):
        for part, new in zip(captions.parts, group.finished.parts, strict=True):
            part[images] = new


def generate_output(
    captions: Captions, config: GenerationConfig, prefix_length: int
) -> GenerateBeamEncoderDecoderOutput | Tensor:
    """Return the first `num_return_sequences` captions of each image in the form that `generate()` returns."""
    count = config.num_return_sequences
    words, scores, beam_indices = (part[:, :count].flatten(0, 1) for part in captions.parts)  # (B·count, …)
    num_words = int((beam_indices >= 0).sum(1).max())
    words, beam_indices = words[:, : prefix_length + num_words], beam_indices[:, :num_words]
    if not config.return_dict_in_generate:
        return words
    return GenerateBeamEncoderDecoderOutput(
        sequences=words,  # type: ignore[arg-type]
        sequences_scores=scores,  # type: ignore[arg-type]
        beam_indices=beam_indices,  # type: ignore[arg-type]
    )
