"""What training minimises.

Means are over the words, or captions, of a batch. A batch that is one part of a larger one, on another process or of
another step of gradient accumulation, is given the larger one's number: then the parts' losses add up to its loss.
"""

# N: captions, T: words, V: vocabulary, P: image cells

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label of no word

_OVER_CELLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda shortfall: shortfall.mean(-1),
    "sum": lambda shortfall: shortfall.sum(-1),
}


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, num_words: int | None = None) -> Tensor:
    """Mean negative log-likelihood of the words that are not -100.

    Args:
        logits: `(N, T, V)`.
        labels: `(N, T)`.
        label_smoothing: probability in [0, 1) spread evenly over the vocabulary (Szegedy et al. 2016).
        num_words: by which to divide, in place of the words here.
    """
    logits, labels, _ = _words(logits, labels)
    total = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    return _divided(total, len(labels), num_words)


def doubly_stochastic(
    weights: Tensor, labels: Tensor, reduction: str = "mean", num_captions: int | None = None
) -> Tensor:
    """`(1 - Σ_t α_tp)²` over the cells of each caption, averaged over captions (Xu et al. 2015, eq. 14).

    Args:
        weights: `(N, T, P)`, zero where a caption is over.
        labels: `(N, T)`; captions without a single word do not count.
        reduction: `"sum"` over cells as in the paper, or `"mean"`.
        num_captions: by which to divide, in place of the captions here.
    """
    shortfall = (1 - weights.float().sum(1)).square()  # (N, P)
    captions = (labels != IGNORED).any(1).to(shortfall.dtype)  # (N,)
    total = (_OVER_CELLS[reduction](shortfall) * captions).sum()
    return _divided(total, captions.sum(), num_captions)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Log p of every word, natural: `(N, T, V), (N, T) -> (N, T)`, zero where there is no word."""
    word_logits, word_labels, words = _words(logits, labels)
    scores = -functional.cross_entropy(word_logits, word_labels, reduction="none")
    return scores.new_zeros(labels.numel()).index_copy(0, words, scores).view_as(labels)


def reinforce(
    scores: Tensor, log_probs: Tensor, labels: Tensor, baseline: Tensor | float, num_words: int | None = None
) -> Tensor:
    """Teaches an attention that samples by how likely the captions became (Xu et al. 2015, sec. 4.1, second term).

    `-(log p(y|s) - T b) Σ_t log p(s_t)` of each caption y of T words and the cells s taken for it, over all captions
    and divided by the number of words, as `cross_entropy` is. Their sum has in expectation the gradient of
    `-log p(y|s)` averaged over s, whatever b is; b close to the mean score keeps its variance low.

    Departure: b is the moving average of a word's score, as in the authors' code, not of a caption's, which would
    mostly tell long captions from short ones.

    Args:
        scores: `(N, T)`, log p of every word given the cells, zero where there is no word; taken as constants.
        log_probs: `(N, T)`, of the cells taken, zero where none was drawn.
        labels: `(N, T)`.
        baseline: b.
        num_words: by which to divide, in place of the words here.
    """
    words = labels != IGNORED
    advantage = ((scores.detach() - baseline) * words).sum(1)  # (N,)
    total = -(advantage * (log_probs.float() * words).sum(1)).sum()
    return _divided(total, words.sum(), num_words)


def attention_entropy(weights: Tensor, labels: Tensor, num_words: int | None = None) -> Tensor:
    """`-Σ_p α_p log α_p` in nats, averaged over words (Xu et al. 2015, sec. 4.1, third term).

    Args:
        weights: `(N, T, P)`.
        labels: `(N, T)`.
        num_words: by which to divide, in place of the words here.
    """
    weights = weights[labels != IGNORED].float()  # (words, P)
    # A weight of 0 adds nothing, but the slope of its logarithm would be infinite.
    entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)
    return _divided(entropy.sum(), len(entropy), num_words)


def moving_average(baseline: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """The next baseline `b_k = 0.9 b_{k-1} + 0.1 log p` (Xu et al. 2015, sec. 4.1), log p the mean of all words."""
    mean = scores.detach().sum() / (labels != IGNORED).sum().clamp(min=1)
    return torch.lerp(baseline, mean.to(baseline.dtype), 0.1)


def _inverse_sigmoid(share: float) -> float:
    low, at, high = (1 / (1 + math.exp(-10 * (x - 0.5))) for x in (0.0, share, 1.0))
    return (at - low) / (high - low)


# Courses from 0 to the highest probability, over the share of the steps that is done.
_COURSES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda share, highest: highest,
    "linear": lambda share, highest: highest * share,
    "exponential": lambda share, highest: 1 - (1 - highest) ** share,
    "inverse_sigmoid": lambda share, highest: highest * _inverse_sigmoid(share),
}


def sampling_probability(share: float, highest: float, course: str) -> float:
    """How often the model reads words of its own in scheduled sampling (Bengio et al. 2015, sec. 2.4, figure 1).

    Departure: constants are chosen such that the highest probability is reached at the end, for every course and
    length of a training.

    Args:
        share: of the steps, in [0, 1].
        highest: probability in [0, 1).
        course: `"linear"`, `"exponential"`, `"inverse_sigmoid"` or `"constant"`.
    """
    return _COURSES[course](share, highest)


def others_mean(rewards: Tensor) -> Tensor:
    """For each sample the mean reward of the image's other samples, its baseline (Luo 2020, eq. 5).

    Args:
        rewards: `(B, S)` of S >= 2 samples.
    """
    assert rewards.shape[1] > 1, "a single sample has no others"
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def self_critical(logits: Tensor, labels: Tensor, advantages: Tensor, num_words: int | None = None) -> Tensor:
    """REINFORCE over sampled captions: `-Σ a log p(word)` over their words, by the number of words.

    Rennie et al. 2017, eq. 7. Departure: the mean over words rather than the sum over a caption's, as in the
    authors' later code, so that long captions do not outweigh short ones.

    Args:
        logits: `(N, T, V)`.
        labels: `(N, T)`, sampled words, -100 after their end.
        advantages: `(N,)`, reward less baseline.
        num_words: by which to divide, in place of the words here.
    """
    total = -(log_likelihood(logits, labels) * advantages.unsqueeze(1)).sum()
    return _divided(total, (labels != IGNORED).sum(), num_words)


def _divided(total: Tensor, here: Tensor | int, in_step: int | None) -> Tensor:
    """By the words or captions of the whole step where their number is given, else by those here."""
    return total / (torch.as_tensor(here).clamp(min=1) if in_step is None else in_step)


def _words(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and places in N·T of the words alone: softmax over the padding would be half the work."""
    labels = labels.flatten()
    words = (labels != IGNORED).nonzero().squeeze(1)
    if len(words) == len(labels):
        return logits.flatten(0, 1).float(), labels, words
    return logits.flatten(0, 1).index_select(0, words).float(), labels[words], words
