"""Self-critical training: captions that the model samples are weighted by their rewards (Rennie et al. 2017)."""

# B: images, K: reference captions of an image, S: captions sampled for an image, T: words, V: vocabulary
# P: image cells, C: channels of a cell

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.loading import Batch
from ..metrics.scores import CiderD, bleu, closest, match_ngrams
from ..metrics.tokenization import Tokens, tokenize_ptb
from ..model.captions import spaced
from ..model.decoder_interface import RecurrentCache
from ..model.decoding import DROP_AT, STEPS_BETWEEN_CHECKS, STEPS_BETWEEN_CHECKS_ON_ACCELERATORS
from ..model.encoder_model import CaptionerEncoderOutput
from ..model.modeling_captioner import CaptionerModel
from ..model.modes import in_evaluation
from ..model.objectives import IGNORED, cross_entropy, leave_one_out_mean, self_critical
from ..model.processing_captioner import CaptionerProcessor

END = "<end>"  # Counted as a word. Otherwise a caption would lose nothing by breaking off before its last noun.


class CaptionReward:
    """Rewards of sampled captions: a weighted sum of their CIDEr-D and BLEU-4 against the reference captions.

    The document frequencies of n-grams come from the reference captions themselves.

    Args:
        captions: Reference captions of each image of the training split.
        cider_weight: Weight of CIDEr-D, which lies in [0, 10].
        bleu_weight: Weight of the BLEU-4 of single captions, in [0, 1], smoothed (Lin and Och 2004).

    Raises:
        ValueError: There are no captions.
    """

    def __init__(
        self, captions: Sequence[Sequence[str]], *, cider_weight: float = 1.0, bleu_weight: float = 0.0
    ) -> None:
        self.references = [[(*tokenize_ptb(spaced(caption)), END) for caption in row] for row in captions]
        self.cider = CiderD(self.references)
        self.cider_weight, self.bleu_weight = cider_weight, bleu_weight

    def __call__(self, images: Sequence[int], captions: Sequence[Sequence[str]], ended: Tensor) -> Tensor:
        """Compute the rewards `(B, S)` of captions.

        Args:
            images: Indices of the B images in the training split.
            captions: S captions of each image.
            ended: Whether each caption reached `<end>`, `(B, S)`.
        """
        rewards = [
            [self._reward(caption, end, self.references[image]) for caption, end in zip(row, ends, strict=True)]
            for image, row, ends in zip(images, captions, ended.tolist(), strict=True)
        ]
        return torch.tensor(rewards)

    def _reward(self, caption: str, ended: bool, references: Sequence[Tokens]) -> float:
        """Compute the reward of one caption against the tokenized reference captions of its image."""
        words = tokenize_ptb(spaced(caption))
        tokens = (*words, END) if ended else words
        reward = self.cider_weight * self.cider.scores([tokens], [references])[0]
        if self.bleu_weight:
            matches = match_ngrams([tokens], [references], closest)
            reward += self.bleu_weight * bleu(matches, smooth=True)["bleu"]
        return reward


@torch.no_grad()
def sample_captions(model: CaptionerModel, cells: Tensor, num_samples: int, *, top_k: int, max_length: int) -> Tensor:
    """Sample captions word by word from the model's distribution, without dropout.

    It is what `generate(do_sample=True)` does, in less time: `<start>` is read once for each image, a word is drawn
    from the `top_k` words alone, and captions that are over leave the batch. The constraints of decoding that the
    generation configuration holds play no role, except that words in `suppress_tokens` are never sampled.

    Args:
        model: Captioner; its training mode is restored afterwards.
        cells: Image cells `(B, P, C)`.
        num_samples: Number of captions per image, S.
        top_k: Number of likeliest words to sample from at each position; 0 for all. With label smoothing every word
            has some probability: rare words would be sampled now and then, always punished, and forgotten.
        max_length: Longest caption, `<start>` and `<end>` included.

    Returns:
        Labels `(B, S, T)`: words and `<end>`, then -100.
    """
    device, end = cells.device, cast(int, model.config.eos_token_id)
    check_interval = STEPS_BETWEEN_CHECKS.get(device.type, STEPS_BETWEEN_CHECKS_ON_ACCELERATORS)
    captions = torch.arange(len(cells) * num_samples, device=device)  # (N,), those in the batch
    words = torch.full((len(captions), max_length), IGNORED, device=device)
    words[:, 0] = model.config.decoder_start_token_id

    with in_evaluation(model):
        output = model(decoder_input_ids=words[::num_samples, :1], encoder_outputs=CaptionerEncoderOutput.of(cells))
        words[:, 1] = _draw(model, output.logits[:, -1], top_k, num_samples).flatten()
        memory, cache = output.cache.memory, output.cache
        cache.reorder_cache(captions // num_samples)
        for length in range(2, max_length):
            if length % check_interval == 0:
                rows = (words[captions, 1:length] != end).all(1).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                if len(rows) <= DROP_AT * len(captions):
                    # Images then differ in their number of captions, so each caption gets a memory of its own.
                    captions, state = captions[rows], tuple(part[rows] for part in cache.state)
                    cache = RecurrentCache(memory.take(captions // num_samples), state, cache.length)
            output = model(decoder_input_ids=words[captions, length - 1 : length], cache=cache)
            words[captions, length] = _draw(model, output.logits[:, -1], top_k).squeeze(1)
            cache = output.cache

    labels = words[:, 1:]
    is_end = labels == end
    labels = labels.masked_fill(is_end.cumsum(1) - is_end.int() > 0, IGNORED)  # after the first <end>
    is_read = (labels != IGNORED).any(0)
    return labels[:, is_read].unflatten(0, (-1, num_samples))


def _draw(model: CaptionerModel, logits: Tensor, top_k: int, num_draws: int = 1) -> Tensor:
    """Draw words from their logits, `(N, V) -> (N, num_draws)`; see `sample_captions` for `top_k`."""
    logits = logits.float()
    if suppressed := model.generation_config.suppress_tokens:
        logits[:, suppressed] = -torch.inf
    if not top_k:
        return logits.softmax(1).multinomial(num_draws, replacement=True)
    logits, words = logits.topk(min(top_k, logits.shape[1]))
    return words.gather(1, logits.softmax(1).multinomial(num_draws, replacement=True))


# Baselines by name: the smallest number of samples that each needs, and a function that computes it from the rewards
# (B, S) of the samples and from a function that computes the reward (B, 1) of the greedy caption.
BASELINES: dict[str, tuple[int, Callable[[Tensor, Callable[[], Tensor]], Tensor]]] = {
    "others": (2, lambda rewards, greedy_reward: leave_one_out_mean(rewards)),
    "greedy": (1, lambda rewards, greedy_reward: greedy_reward()),
}


class Rewards:
    """Objective: rewards of sampled captions, by self-critical training (Rennie et al. 2017; Luo 2020).

    The likelihood of the reference captions may be added, so that the model does not stray far from them (as in
    Paulus et al. 2018, eq. 16).

    Departure from the papers: captions are sampled without dropout, as the model will write them, while their gradient
    is computed with dropout, without which the model soon overfits to a few thousand images.

    Args:
        captioner: The model, not wrapped by Accelerate.
        processor: Processor of the model.
        reward: Reward of captions of the training split.
        num_samples: Number of captions sampled per image, S.
        top_k: Number of likeliest words to sample from, see `sample_captions`.
        max_length: Longest sampled caption, `<start>` and `<end>` included.
        baseline: Baseline, the reward above which training makes a caption likelier: `"others"`, the mean reward of the
            image's other samples (Luo 2020, eq. 5), or `"greedy"`, that of its greedy caption (Rennie et al. 2017, eq.
            9).
        likelihood_weight: Weight of the cross-entropy of the reference captions, at least 0.

    Raises:
        ValueError: The baseline is unknown, it needs more samples, or the weight is negative.
    """

    metric = "reward"

    def __init__(
        self,
        captioner: CaptionerModel,
        processor: CaptionerProcessor,
        reward: CaptionReward,
        *,
        num_samples: int,
        top_k: int,
        max_length: int,
        baseline: str = "others",
        likelihood_weight: float = 0.0,
    ) -> None:
        if baseline not in BASELINES:
            raise ValueError(f"reward_baseline is {baseline!r}; choose from {', '.join(BASELINES)}.")
        min_samples, self.baseline = BASELINES[baseline]
        if num_samples < min_samples:
            raise ValueError(
                f"reward_samples is {num_samples}; with reward_baseline {baseline!r} it must be at least {min_samples}."
            )
        if likelihood_weight < 0:
            raise ValueError(f"reward_likelihood_weight is {likelihood_weight}; it must not be negative.")
        self.captioner, self.processor, self.reward = captioner, processor, reward
        self.num_samples, self.top_k, self.max_length = num_samples, top_k, max_length
        self.likelihood_weight = likelihood_weight

    def prepare(self, batch: Batch, progress: float) -> Batch:
        """Sample captions for the images of a batch, and compute their rewards.

        `progress`, the fraction of the stage's optimizer steps that are done, plays no role for this objective.

        Returns:
            The images, with the sampled captions as `labels` `(B, S, T)`, their `rewards` and `advantages` `(B, S)`
            and, if `likelihood_weight` is above 0, the reference captions as `reference_labels` `(B, K, T)`.
        """
        inputs: dict[str, Any] = {name: batch[name] for name in ("pixel_values", "cells") if name in batch}
        images = batch["index"].tolist()
        cells = inputs["cells"] if "cells" in inputs else self._encode(inputs["pixel_values"])
        labels, rewards = self._sample(images, cells, self.num_samples, self.top_k)
        baseline = self.baseline(rewards, lambda: self._sample(images, cells, num_samples=1, top_k=1)[1])
        references = {"reference_labels": batch["labels"]} if self.likelihood_weight else {}
        return {**inputs, "labels": labels, "rewards": rewards, "advantages": rewards - baseline, **references}

    @torch.no_grad()
    def _encode(self, pixel_values: Tensor) -> Tensor:
        """Compute the image cells `(B, P, C)` without dropout, for sampling."""
        with in_evaluation(self.captioner):
            cells: Tensor = self.captioner.encoder(pixel_values).last_hidden_state
        return cells

    def _sample(self, images: Sequence[int], cells: Tensor, num_samples: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Sample captions; return them as labels `(B, S, T)`, with their rewards `(B, S)`."""
        labels = sample_captions(self.captioner, cells, num_samples, top_k=top_k, max_length=self.max_length)
        tokenizer = self.processor.tokenizer
        captions = [self.processor.batch_decode(row) for row in labels.clamp(min=tokenizer.pad_token_id)]
        ended = (labels == tokenizer.eos_token_id).any(2)
        return labels, self.reward(images, captions, ended).to(labels.device)

    def loss(self, model: nn.Module, batch: Batch, num_items_in_batch: int, num_captions: int) -> tuple[Tensor, Tensor]:
        """Compute the batch's contributions to the loss and to the mean reward."""
        model.train()
        inputs = dict(batch)
        sampled, rewards, advantages = (inputs.pop(name) for name in ("labels", "rewards", "advantages"))
        references = inputs.pop("reference_labels", None)
        labels = sampled if references is None else _concatenate(sampled, references)
        # Sampled and reference captions share one pass, because they share the attention's keys.
        logits = model(**inputs, labels=labels).logits  # (B, S + K, T, V)
        sizes = [sampled.shape[1], labels.shape[1] - sampled.shape[1]]
        (logits, reference_logits), (sampled, references) = logits.split(sizes, 1), labels.split(sizes, 1)
        loss = self_critical(logits.flatten(0, 1), sampled.flatten(0, 1), advantages.flatten(), num_items_in_batch)
        if self.likelihood_weight:
            smoothing = self.captioner.config.label_smoothing
            loss = loss + self.likelihood_weight * cross_entropy(
                reference_logits.flatten(0, 1), references.flatten(0, 1), smoothing, num_items_in_batch
            )
        return loss, rewards.sum() / num_captions


def _concatenate(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate labels `(B, S, T)` and `(B, K, U)` to `(B, S + K, max(T, U))`, padded with -100."""
    num_words = max(first.shape[2], second.shape[2])
    return torch.cat([functional.pad(x, (0, num_words - x.shape[2]), value=IGNORED) for x in (first, second)], 1)
