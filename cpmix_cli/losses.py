"""Losses: add one here.

Shapes: B batch, C classes. A loss is

    loss(logits [B, C], labels [B], weights [B], class_counts [C], *, parameters) -> scalar

with hard labels. A mixed batch calls it twice, L(y1, lam) + L(y2, 1 - lam), so no loss knows of mixing. `weights` are
the mixing weights; the scalar is their weighted sum over B, divided by B. Keyword-only parameters become recipe keys
of a term.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor) -> Tensor:
    """(1/B) sum_b w_b (-z_y + log sum_c exp z_c). Paper: Eq. (1) with l = cross entropy."""
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


def balanced_softmax(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor) -> Tensor:
    """Cross entropy of z + log n: the softmax under the training prior. The raw logits are used at test time.

    Paper: l_ERM, Sec. 4.3 (from Ren et al., Balanced Meta-Softmax). With equal counts it is cross entropy.
    """
    return cross_entropy(logits + class_counts.to(logits.dtype).log(), labels, weights, class_counts)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": cross_entropy,
    "balanced-softmax": balanced_softmax,
}
