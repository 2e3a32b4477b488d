"""What training minimises."""

# N: captions, T: words, V: vocabulary, P: image cells

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label of no word

_OVER_CELLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda shortfall: shortfall.mean(-1),
    "sum": lambda shortfall: shortfall.sum(-1),
}


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean negative log-likelihood of the words that are not -100.

    Args:
        logits: `(N, T, V)`.
        labels: `(N, T)`.
        label_smoothing: probability in [0, 1) spread evenly over the vocabulary (Szegedy et al. 2016).
    """
    labels = labels.flatten()
    words = (labels != IGNORED).nonzero().squeeze(1)  # softmax over the padding would be half the work
    logits = logits.flatten(0, 1).index_select(0, words)
    return functional.cross_entropy(logits.float(), labels[words], label_smoothing=label_smoothing)


def doubly_stochastic(weights: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """`(1 - Σ_t α_tp)²` over the cells of each caption, averaged over captions (Xu et al. 2015, eq. 14).

    Args:
        weights: `(N, T, P)`, zero where a caption is over.
        labels: `(N, T)`; captions without a single word do not count.
        reduction: `"sum"` over cells as in the paper, or `"mean"`.
    """
    shortfall = (1 - weights.float().sum(1)).square()  # (N, P)
    captions = (labels != IGNORED).any(1).to(shortfall.dtype)  # (N,)
    return (_OVER_CELLS[reduction](shortfall) * captions).sum() / captions.sum().clamp(min=1)
