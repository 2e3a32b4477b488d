"""What a captioner returns."""

# B: images, K: captions of an image, N = B·K: captions (or beams), T: words, V: vocabulary, P: image cells
# D: decoder state

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .decoder_interface import RecurrentCache


@dataclass
class CaptionerOutput(ModelOutput):
    """Output of a `CaptionerModel`.

    Args:
        loss: Scalar, if labels are given.
        logits: `(B, T, V)`, or `(B, K, T, V)` for labels `(B, K, T)`; zero after the end of a caption.
        cache: State after the last word, if no labels are given and `use_cache` is not False.
        cross_attentions: One tensor `(B, K, T, P)`, the attention weights with which each word was predicted.
        decoder_hidden_states: One tensor of decoder states, shaped like `logits` with D in place of V. None if the
            decoder does not return them.
        encoder_hidden_states: One tensor of image cells, `(B, P, C)`, if they were not taken from a cache.
        decoder_attentions: Always None, because a recurrent decoder has no self-attention.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: RecurrentCache | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CaptionerScores(ModelOutput):
    """Log-probabilities (natural logarithm) of captions.

    Args:
        scores: `(B, K)`, log p(caption | image), the sum over the caption's words and `<end>`.
        word_scores: `(B, K, T)`, log p(word | previous words, image); 0 after the end of a caption.
    """

    scores: Tensor | None = None
    word_scores: Tensor | None = None
