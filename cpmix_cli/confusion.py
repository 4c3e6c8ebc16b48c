"""Confusion counts and the pair distribution drawn from them: the core of CP-Mix.

K [C, C] holds how often an image of class i (row) was predicted as class j (column) in training, diagonal always
zero. It is float64 so that `confusion.decay` can act on it; without decay every value is a whole number, exact up to
2^53. Everything here is plain tensor code without a host synchronisation.
"""

import torch
from torch import Tensor

NO_ERROR = -1


def confusion_codes(labels: Tensor, predictions: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Misclassifications as single numbers, C true + predicted [B] int64; NO_ERROR where there is none to count.

    Args:
        labels: true classes [B] int64.
        predictions: argmax of the raw logits [B] int64.
        counted: whether an image's error counts, [B] or for all of them [1] or a scalar, bool.
        num_classes: C.

    Paper: Eq. (6).
    """
    return torch.where((labels != predictions) & counted, labels * num_classes + predictions, NO_ERROR)


def count_confusions(counts: Tensor, codes: Tensor) -> None:
    """Add misclassifications, as confusion_codes() has them [n], to K in place. Paper: over all epochs (Sec. 4.1)."""
    counts.view(-1).index_add_(0, codes.clamp(min=0), (codes != NO_ERROR).to(counts.dtype))


def draw_confused(counts: Tensor, classes: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Partner classes c_m ~ K[c_t] / sum K[c_t], by inverse CDF.

    A class that was never confused (empty row) falls back to the classes confused as it (its column), and if there
    are none to a uniform draw over the other classes.

    Args:
        counts: K [C, C] float64.
        classes: c_t [B] int64.
        uniforms: one number of [0, 1) each [B] float64.

    Returns:
        c_m [B] int64, and where a fall-back was taken [B] bool.

    Paper: Algorithm 1, Sec. 4.3. Differs: the paper leaves the empty row open.
    """
    rows = counts[classes]  # [B, C]
    columns = counts.t()[classes]  # [B, C]
    fell_back = rows.sum(1) == 0
    weights = torch.where(fell_back[:, None], columns, rows)
    others = torch.ones_like(weights).scatter_(1, classes[:, None], 0.0)
    weights = torch.where(weights.sum(1, keepdim=True) == 0, others, weights)
    return draw_weighted(weights, uniforms), fell_back


def draw_weighted(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw of one column a row, proportional to non-negative weights [B, C]; zero weights are never drawn.

    Returns:
        Column indices [B] int64.
    """
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # u < 1, yet u * total can round up to total: stay below it, where the last non-zero weight is.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)
