"""Terms of the training loss, and schedules of training.

Every loss is a mean over the words, or over the captions, of a batch. If the batch is only a part of an optimizer step,
because of gradient accumulation or of several processes, pass the number of words or captions of the whole step: it is
divided by instead, and the losses of all parts add up to the loss of the step.
"""

# N: captions, T: words, V: vocabulary, P: image cells, B: images, S: captions sampled for an image

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label of positions that hold no word

Count = Tensor | int | None  # words or captions in the whole optimizer step; None if the batch is the whole step


def words_before(labels: Tensor, start: int, pad: int) -> Tensor:
    """Return the id that is read before each label `(N, T)`: `start`, then all labels but the last, `pad` for -100."""
    words = labels.masked_fill(labels == IGNORED, pad)
    return torch.cat([torch.full_like(words[:, :1], start), words[:, :-1]], 1)


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, num_items_in_batch: Count = None
) -> Tensor:
    """Return the mean negative log-likelihood of the words in labels, in nats.

    Args:
        logits: Logits `(N, T, V)`.
        labels: Word ids `(N, T)`, -100 where there is no word.
        label_smoothing: Probability in [0, 1) that is spread evenly over the vocabulary (Szegedy et al. 2016).
        num_items_in_batch: Number of words in the whole optimizer step, if this batch is a part of it.
    """
    logits, labels, _ = _select_words(logits, labels)
    total = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    return _mean(total, len(labels), num_items_in_batch)


_REDUCE_CELLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda shortfall: shortfall.mean(-1),
    "sum": lambda shortfall: shortfall.sum(-1),
}


def doubly_stochastic(weights: Tensor, labels: Tensor, reduction: str = "mean", num_captions: Count = None) -> Tensor:
    """Return the penalty on image cells that a caption attends to too much or too little (Xu et al. 2015, eq. 14).

    For each cell p and each caption it is `(1 - Σ_t α_tp)²`. It is reduced over cells, then averaged over captions.

    Args:
        weights: Attention weights `(N, T, P)`.
        labels: `(N, T)`, -100 where there is no word. Captions without a word are not counted.
        reduction: `"sum"` over cells as in the paper, or `"mean"`.
        num_captions: Number of captions in the whole optimizer step, if this batch is a part of it.
    """
    is_word = labels != IGNORED
    shortfall = (1 - weights.float().masked_fill(~is_word.unsqueeze(2), 0).sum(1)).square()  # (N, P)
    has_words = is_word.any(1).to(shortfall.dtype)  # (N,)
    total = (_REDUCE_CELLS[reduction](shortfall) * has_words).sum()
    return _mean(total, has_words.sum(), num_captions)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p of every word in nats, 0 where there is no word: `(N, T, V), (N, T) -> (N, T)`."""
    word_logits, word_labels, positions = _select_words(logits, labels)
    scores = -functional.cross_entropy(word_logits, word_labels, reduction="none")
    return scores.new_zeros(labels.numel()).index_copy(0, positions, scores).view_as(labels)


def reinforce(
    scores: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    baseline: Tensor | float,
    num_items_in_batch: Count = None,
) -> Tensor:
    """Return the REINFORCE loss of an attention that samples image cells (Xu et al. 2015, sec. 4.1, second term).

    For a caption y of T words, with one image cell s_t sampled for each word, it is
    `-(log p(y|s) - T b) Σ_t log p(s_t)`, summed over captions and divided by the number of words. Added to
    `cross_entropy` it has, in expectation, the gradient of `-log p(y|s)` averaged over s, whatever the baseline b; a b
    close to the mean score keeps the variance low.

    Departure: b is the moving average of the score of a word, as in the authors' code, and not of a caption. The
    average over captions would mainly distinguish long captions from short ones.

    Args:
        scores: log p of every word given the sampled cells, `(N, T)`, 0 where there is no word. No gradient flows
            through it.
        log_probs: log p of the sampled cells, `(N, T)`, 0 where none was sampled.
        labels: `(N, T)`, -100 where there is no word.
        baseline: Baseline b, close to the mean score of a word.
        num_items_in_batch: Number of words in the whole optimizer step, if this batch is a part of it.
    """
    is_word = labels != IGNORED
    advantages = ((scores.detach() - baseline) * is_word).sum(1)  # (N,)
    total = -(advantages * (log_probs.float() * is_word).sum(1)).sum()
    return _mean(total, is_word.sum(), num_items_in_batch)


def attention_entropy(weights: Tensor, labels: Tensor, num_items_in_batch: Count = None) -> Tensor:
    """Return the entropy of the attention, `-Σ_p α_p log α_p` in nats, as a mean over words.

    Xu et al. 2015, sec. 4.1, third term.

    Args:
        weights: Attention weights `(N, T, P)`.
        labels: `(N, T)`, -100 where there is no word.
        num_items_in_batch: Number of words in the whole optimizer step, if this batch is a part of it.
    """
    weights = weights[labels != IGNORED].float()  # (words, P)
    # A weight of 0 adds nothing to the entropy, but the gradient of its logarithm would be infinite.
    entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)
    return _mean(entropy.sum(), len(entropy), num_items_in_batch)


def moving_average(baseline: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Return the next baseline of `reinforce`, `b_k = 0.9 b_{k-1} + 0.1 log p` (Xu et al. 2015, sec. 4.1).

    log p is the mean over words of their scores `(N, T)`, which are 0 where labels `(N, T)` are -100.
    """
    mean = scores.detach().sum() / (labels != IGNORED).sum().clamp(min=1)
    return torch.lerp(baseline, mean.to(baseline.dtype), 0.1)


def _inverse_sigmoid(progress: float) -> float:
    low, value, high = (1 / (1 + math.exp(-10 * (x - 0.5))) for x in (0.0, progress, 1.0))
    return (value - low) / (high - low)


# How a probability rises from 0 to its highest value with the progress of training, both in [0, 1].
_COURSES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, highest: highest,
    "linear": lambda progress, highest: highest * progress,
    "exponential": lambda progress, highest: 1 - (1 - highest) ** progress,
    "inverse_sigmoid": lambda progress, highest: highest * _inverse_sigmoid(progress),
}


def sampling_probability(progress: float, highest: float, course: str) -> float:
    """Return the probability of reading the model's own word in scheduled sampling.

    Bengio et al. 2015, sec. 2.4 and figure 1. Departure: the constants of a course are chosen such that the highest
    probability is reached at the end, however long the training.

    Args:
        progress: Fraction of the optimizer steps that are done, in [0, 1].
        highest: Probability at the end, in [0, 1).
        course: Shape of the rise: `"linear"`, `"exponential"`, `"inverse_sigmoid"`, or `"constant"` for not at all.
    """
    return _COURSES[course](progress, highest)


def leave_one_out_mean(rewards: Tensor) -> Tensor:
    """Return, for each sampled caption, the mean reward of the image's other samples: `(B, S) -> (B, S)`, S >= 2.

    It serves as the baseline of that sample (Luo 2020, eq. 5).
    """
    assert rewards.shape[1] > 1, "a single sample has no others"
    return (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def self_critical(logits: Tensor, labels: Tensor, advantages: Tensor, num_items_in_batch: Count = None) -> Tensor:
    """Return the REINFORCE loss of sampled captions with advantage a: `-Σ a log p(word)`, divided by the words.

    Rennie et al. 2017, eq. 7. Departure: the mean over words, as in the authors' later code, and not the sum over those
    of a caption, so that long captions do not outweigh short ones.

    Args:
        logits: `(N, T, V)`.
        labels: Sampled words `(N, T)`, -100 after their end.
        advantages: Reward of each caption minus its baseline, `(N,)`.
        num_items_in_batch: Number of words in the whole optimizer step, if this batch is a part of it.
    """
    total = -(log_likelihood(logits, labels) * advantages.unsqueeze(1)).sum()
    return _mean(total, (labels != IGNORED).sum(), num_items_in_batch)


def _mean(total: Tensor, count: Tensor | int, count_in_step: Count) -> Tensor:
    """Divide a total by the number of words or captions here, or by that of the whole optimizer step if it is given."""
    return total / (torch.as_tensor(count).clamp(min=1) if count_in_step is None else count_in_step)


def _select_words(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits `(W, V)`, labels `(W,)` and positions `(W,)` in N·T of the W words that are not padding.

    About half of the positions are padding, for which a softmax would be computed in vain.
    """
    labels = labels.flatten()
    positions = (labels != IGNORED).nonzero().squeeze(1)
    if len(positions) == len(labels):
        return logits.flatten(0, 1).float(), labels, positions
    return logits.flatten(0, 1).index_select(0, positions).float(), labels[positions], positions
