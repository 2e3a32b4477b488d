"""The training loss of a captioner: cross-entropy, and the terms that its configuration adds."""

# N: captions, T: words

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .configuration_captioner import CaptionerConfig
from .decoder_interface import DecoderOutput
from .objectives import (
    IGNORED,
    attention_entropy,
    cross_entropy,
    doubly_stochastic,
    log_likelihood,
    moving_average,
    reinforce,
)


def captioning_loss(
    output: DecoderOutput,
    labels: Tensor,
    decoder: nn.Module,
    config: CaptionerConfig,
    num_items_in_batch: Tensor | int | None,
    num_captions: Tensor | int | None,
) -> Tensor:
    """Return the training loss, a scalar.

    It is the cross-entropy, plus the doubly stochastic term if its weight is not 0, plus the REINFORCE and entropy
    terms if the attention samples image cells. The baseline of such an attention is updated.

    Labels are `(N, T)`; `num_items_in_batch` and `num_captions` are those of `CaptionerModel.forward`.
    """
    if output.packed is None:
        loss = cross_entropy(output.logits, labels, config.label_smoothing, num_items_in_batch)
    else:  # logits of the words alone, so that padding costs nothing
        logits, positions = output.packed
        word_labels = labels.flatten()[positions]
        loss = cross_entropy(logits[None], word_labels[None], config.label_smoothing, num_items_in_batch)
    if config.doubly_stochastic_weight:
        if num_captions is None and num_items_in_batch is not None:
            num_captions = _estimated_captions(labels, num_items_in_batch)
        term = doubly_stochastic(output.weights, labels, config.doubly_stochastic_reduction, num_captions)
        loss = loss + config.doubly_stochastic_weight * term
    if output.log_probs is not None:
        attention: Any = decoder.attention
        scores = log_likelihood(output.logits.detach(), labels)
        term = reinforce(scores, output.log_probs, labels, attention.baseline, num_items_in_batch)
        loss = loss + attention.reinforce_weight * term
        loss = loss - attention.entropy_weight * attention_entropy(output.weights, labels, num_items_in_batch)
        attention.baseline.copy_(moving_average(attention.baseline, scores, labels))
    return loss


def _estimated_captions(labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Estimate the number of captions in a whole batch from its number of words.

    The estimate assumes that its captions have as many words on average as those in `labels` `(N, T)`, which are a part
    of the batch.
    """
    words = labels != IGNORED
    return words.any(1).sum().clamp(min=1) * num_items_in_batch / words.sum().clamp(min=1)
