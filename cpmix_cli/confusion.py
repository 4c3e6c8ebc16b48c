"""Confusion counts and the pair distribution drawn from them: the core of CP-Mix.

K [C, C] counts how often training images of class i (row) were predicted as class j (column); its diagonal is always
zero. It is float64 so that `confusion.decay` can scale it; without decay every value is an integer, exact up to 2^53.
All functions are tensor code without a host synchronisation.
"""

import torch
from torch import Tensor

_NOT_COUNTED = -1


def prediction_codes(labels: Tensor, predictions: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Encode each counted prediction as C * true + predicted [B] int64; -1 for other images.

    Args:
        labels: true classes [B] int64.
        predictions: argmax of the raw logits [B] int64.
        counted: whether predictions are counted, bool, per image [B] or for all images ([1] or a scalar).
        num_classes: C.

    Paper: Eq. (6).
    """
    return torch.where(counted, labels * num_classes + predictions, _NOT_COUNTED)


def count_confusions(counts: Tensor, codes: Tensor) -> Tensor:
    """Add the errors among the codes of prediction_codes() [n] to K [C, C] in place; return their number.

    Paper: over all epochs (Sec. 4.1).
    """
    num_classes = len(counts)
    is_error = (codes != _NOT_COUNTED) & (codes // num_classes != codes % num_classes)
    counts.view(-1).index_add_(0, codes.clamp(min=0), is_error.to(counts.dtype))
    return is_error.sum()


def count_images(counts: Tensor, codes: Tensor) -> None:
    """Add the images among the codes of prediction_codes() [n], right or wrong, to their class's count [C] in place."""
    counts.index_add_(0, codes.clamp(min=0) // len(counts), (codes != _NOT_COUNTED).to(counts.dtype))


def draw_confused(counts: Tensor, classes: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample partner classes c_m ~ K[c_t] / sum K[c_t] by inverse CDF.

    Fallbacks for an empty row of K: the column, that is classes predicted as c_t; if it is empty too, a uniform draw
    over the other classes.

    Args:
        counts: K [C, C] float64.
        classes: c_t [B] int64.
        uniforms: random numbers in [0, 1) [B] float64.

    Returns:
        c_m [B] int64, and whether a fallback was used [B] bool.

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
    """Sample one column index per row [B] int64, proportional to non-negative weights [B, C], by inverse CDF.

    `uniforms` are random numbers in [0, 1) [B] float64. A column of weight zero is never drawn.
    """
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # u * total can round up to total, beyond the last non-zero weight. The largest value below total prevents it.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)
