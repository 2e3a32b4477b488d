"""Training on captions that the model samples itself, by what they are worth (Rennie et al. 2017)."""

# B: images, S: captions sampled for an image

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.loading import Batch
from ..metrics.scores import CiderD, bleu, closest, match_ngrams
from ..metrics.tokenization import Tokens, tokenize_ptb
from ..model.captions import spaced
from ..model.modeling_captioner import CaptionerEncoderOutput, CaptionerModel
from ..model.modes import in_evaluation
from ..model.objectives import IGNORED, cross_entropy, others_mean, self_critical
from ..model.processing_captioner import CaptionerProcessor

END = "<end>"  # counts as a word, or captions that break off before their last noun would lose nothing


class CaptionReward:
    """CIDEr-D and BLEU-4 of sampled captions against the captions people wrote.

    N-grams get their document frequencies from the captions given, the training split's; no file from elsewhere is
    needed.

    Args:
        captions: of each image of the training split.
        cider_weight: weight of CIDEr-D, which lies in [0, 10].
        bleu_weight: weight of BLEU-4 of single captions, in [0, 1], smoothed (Lin and Och 2004).

    Raises:
        ValueError: no captions.
    """

    def __init__(
        self, captions: Sequence[Sequence[str]], *, cider_weight: float = 1.0, bleu_weight: float = 0.0
    ) -> None:
        self.references = [[(*tokenize_ptb(spaced(caption)), END) for caption in row] for row in captions]
        self.cider = CiderD(self.references)
        self.cider_weight, self.bleu_weight = cider_weight, bleu_weight

    def __call__(self, images: Sequence[int], captions: Sequence[Sequence[str]], ended: Tensor) -> Tensor:
        """Rewards `(B, S)`.

        Args:
            images: rows of the training split.
            captions: S captions of each.
            ended: `(B, S)`, whether they reached `<end>`.
        """
        rewards = [
            [self._reward(caption, end, self.references[image]) for caption, end in zip(row, ends, strict=True)]
            for image, row, ends in zip(images, captions, ended.tolist(), strict=True)
        ]
        return torch.tensor(rewards)

    def _reward(self, caption: str, ended: bool, references: Sequence[Tokens]) -> float:
        words = tokenize_ptb(spaced(caption))
        tokens = (*words, END) if ended else words
        reward = self.cider_weight * self.cider.scores([tokens], [references])[0]
        if self.bleu_weight:
            matches = match_ngrams([tokens], [references], closest)
            reward += self.bleu_weight * bleu(matches, smooth=True)["bleu"]
        return reward


@torch.no_grad()
def sample_captions(model: CaptionerModel, cells: Tensor, num_samples: int, *, top_k: int, max_length: int) -> Tensor:
    """Captions drawn word by word as the model finds them likely, without dropout.

    Args:
        model: its mode is restored.
        cells: `(B, P, C)`.
        num_samples: S, captions of each image.
        top_k: words to draw from each time, the likeliest; 0 for all. Label smoothing leaves some probability to every
            word: drawn now and then and always punished, rare words would be forgotten altogether.
        max_length: longest caption, `<start>` and `<end>` included.

    Returns:
        Labels `(B, S, T)`: words and `<end>`, then -100.
    """
    with in_evaluation(model):
        sequences = model.generate(
            encoder_outputs=CaptionerEncoderOutput.of(cells),
            do_sample=True, num_beams=1, num_return_sequences=num_samples, top_k=top_k, max_length=max_length,
            # A reward is for what the model would say by itself.
            no_repeat_ngram_size=0, bad_words_ids=None,
        )[:, 1:]  # fmt: skip
    is_end = sequences == model.config.eos_token_id
    over = is_end.cumsum(1) - is_end.int() > 0  # after the first <end>
    return sequences.masked_fill(over, IGNORED).unflatten(0, (-1, num_samples))


# What a caption's reward is held against: the fewest samples it takes, and how it comes from the rewards (B, S) of the
# captions drawn and, computed when asked for, that (B, 1) of the likeliest caption word by word.
BASELINES: dict[str, tuple[int, Callable[[Tensor, Callable[[], Tensor]], Tensor]]] = {
    "others": (2, lambda rewards, likeliest: others_mean(rewards)),
    "greedy": (1, lambda rewards, likeliest: likeliest()),
}


class Rewards:
    """Captions that the model draws, held against people's (self-critical, Rennie et al. 2017; Luo 2020).

    An objective as `stages.py` describes them. The likelihood of people's captions may be added to it, from which the
    model then does not stray far (as in Paulus et al. 2018, eq. 16).

    Departure: captions are drawn without dropout, as the model will write them, and their gradient is taken with it,
    without which a few thousand images are soon learned by heart.

    Args:
        captioner: the model, not wrapped for distribution.
        processor: its processor.
        reward: of captions of the training split.
        num_samples: S, captions drawn for each image.
        baseline: what each one's reward must exceed for it to become likelier: the mean reward of the `"others"`
            drawn for the image (Luo 2020, eq. 5), or that of `"greedy"` decoding (Rennie et al. 2017, eq. 9).
        top_k: words to draw from each time, see `sample_captions`.
        max_length: longest caption drawn, `<start>` and `<end>` included.
        likelihood_weight: weight, at least 0, of the cross-entropy of people's captions.

    Raises:
        ValueError: another baseline, too few samples (one has no others), or a negative weight.
    """

    figure = "reward"

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
        fewest, self.baseline = BASELINES[baseline]
        if num_samples < fewest:
            raise ValueError(
                f"reward_samples is {num_samples}; with reward_baseline {baseline!r} it must be at least {fewest}."
            )
        if likelihood_weight < 0:
            raise ValueError(f"reward_likelihood_weight is {likelihood_weight}; it must not be negative.")
        self.captioner, self.processor, self.reward = captioner, processor, reward
        self.num_samples, self.top_k, self.max_length = num_samples, top_k, max_length
        self.likelihood_weight = likelihood_weight

    def prepare(self, batch: Batch, share: float) -> Batch:
        """The images with captions drawn for them, `labels` `(B, S, T)`, their `rewards` and `advantages` `(B, S)`.

        With a weight for their likelihood also people's captions, `peoples` `(B, K, T)`.
        """
        inputs: dict[str, Any] = {name: batch[name] for name in ("pixel_values", "cells") if name in batch}
        images = batch["index"].tolist()
        cells = inputs["cells"] if "cells" in inputs else self._encoded(inputs["pixel_values"])
        labels, rewards = self._draw(images, cells, self.num_samples, self.top_k)
        baseline = self.baseline(rewards, lambda: self._draw(images, cells, num_samples=1, top_k=1)[1])
        peoples = {"peoples": batch["labels"]} if self.likelihood_weight else {}
        return {**inputs, "labels": labels, "rewards": rewards, "advantages": rewards - baseline, **peoples}

    @torch.no_grad()
    def _encoded(self, pixel_values: Tensor) -> Tensor:
        """The cells `(B, P, C)` that captions are drawn for, as the model will see them."""
        with in_evaluation(self.captioner):
            cells: Tensor = self.captioner.encoder(pixel_values).last_hidden_state
        return cells

    def _draw(self, images: Sequence[int], cells: Tensor, num_samples: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Captions drawn for images, as labels `(B, S, T)`, and their rewards `(B, S)`."""
        labels = sample_captions(self.captioner, cells, num_samples, top_k=top_k, max_length=self.max_length)
        tokenizer = self.processor.tokenizer
        captions = [self.processor.batch_decode(row) for row in labels.clamp(min=tokenizer.pad_token_id)]
        ended = (labels == tokenizer.eos_token_id).any(2)
        return labels, self.reward(images, captions, ended).to(labels.device)

    def loss(self, model: nn.Module, batch: Batch, num_items_in_batch: int, num_captions: int) -> tuple[Tensor, Tensor]:
        """This batch's part of the loss, and of the mean reward."""
        model.train()
        inputs = dict(batch)
        drawn, rewards, advantages = (inputs.pop(name) for name in ("labels", "rewards", "advantages"))
        peoples = inputs.pop("peoples", None)
        labels = drawn if peoples is None else _beside(drawn, peoples)
        logits = model(**inputs, labels=labels).logits  # (B, S + K, T, V): one pass, for the keys are the same
        by_source = [drawn.shape[1], labels.shape[1] - drawn.shape[1]]
        (logits, peoples_logits), (drawn, peoples) = logits.split(by_source, 1), labels.split(by_source, 1)
        loss = self_critical(logits.flatten(0, 1), drawn.flatten(0, 1), advantages.flatten(), num_items_in_batch)
        if self.likelihood_weight:
            smoothing = self.captioner.config.label_smoothing
            term = cross_entropy(peoples_logits.flatten(0, 1), peoples.flatten(0, 1), smoothing, num_items_in_batch)
            loss = loss + self.likelihood_weight * term
        return loss, rewards.sum() / num_captions


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """Labels `(B, S, T)` and `(B, K, U)` as `(B, S + K, max(T, U))`."""
    num_words = max(first.shape[2], second.shape[2])
    return torch.cat([functional.pad(x, (0, num_words - x.shape[2]), value=IGNORED) for x in (first, second)], 1)
