"""Measuring predictions: accuracy by class and group, calibration. Nothing here selects anything.

Shapes: N test images, C classes. Own code and not torchmetrics, which counts a class absent from the test set as
recall 0 and loses confidence 1.0 from the calibration error.
"""

from typing import Any

import torch
from torch import Tensor

from cpmix_cli.data.longtail import GROUPS, exponential_counts

_NUM_BINS = 15


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Test images of true class i (row) predicted as j (column): [C, C] int64, diagonal included. Paper: Eq. (5)."""
    pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Fraction of each class's test images that are right [C] float64; NaN where it has none."""
    return matrix.diagonal().double() / matrix.sum(1).double()


def reliability(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Images, mean confidence and share that is right in 15 equal bins (0, 1/15], ... [15, 3]; NaN in empty ones.

    Args:
        confidence: the largest softmax probability [N] float64.
        right: [N] bool.
        weights: see sample_weights(); None: each image counts one.
    """
    weights = torch.ones(len(confidence), dtype=torch.float64) if weights is None else weights
    bins = (confidence * _NUM_BINS).ceil().long().clamp(1, _NUM_BINS) - 1
    columns = torch.stack([weights, weights * confidence, weights * right], 1)
    sums = torch.zeros(_NUM_BINS, 3, dtype=torch.float64).index_add(0, bins, columns)
    return torch.cat([sums[:, :1], sums[:, 1:] / sums[:, :1]], 1)


def expected_calibration_error(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Mean |accuracy - confidence| over the bins of reliability(), weighted by their images, as a fraction: of logits
    [N, C] and labels [N].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    images, confidences, accuracies = reliability(confidence, predicted == labels, weights).unbind(1)
    return float((images * (accuracies - confidences).abs()).nansum() / images.sum())


def shifted_profile(class_counts: Tensor, num_test: Tensor, distribution: str, ratio: float) -> Tensor:
    """Test images of each class [C] of a long-tailed test set, as many as the balanced one of num_test [C] allows.

    Args:
        class_counts: training images per class [C], which give the order.
        distribution: "forward", the class with most training images has most test images; "backward", the fewest.
        ratio: of the largest class to the smallest.

    Source: Zhang et al., SADE, Sec. 5.3: the same exponential profile as in training.
    """
    profile = torch.from_numpy(exponential_counts(int(num_test.min()), len(class_counts), ratio))
    order = class_counts.argsort(descending=distribution == "forward", stable=True)
    return torch.empty_like(profile).scatter(0, order, profile)


def sample_weights(labels: Tensor, profile: Tensor | None) -> Tensor:
    """How many images of a test set each one of N stands for [N] float64: one, or with a profile [C] (see
    shifted_profile()) its part of those of its class, which is what is expected of a random subset.
    """
    if profile is None:
        return torch.ones(len(labels), dtype=torch.float64)
    return (profile / torch.bincount(labels, minlength=len(profile)))[labels].double()


def summary(logits: Tensor, labels: Tensor, groups: list[str], profile: Tensor | None = None) -> dict[str, Any]:
    """The numbers of metrics.json from logits [N, C], labels [N], the group of each class [C] and a profile (see
    sample_weights()): percent, null for a group without classes.

    Groups and balanced accuracy are means of class accuracies; classes without test images are left out and counted.
    """
    found = logits.argmax(1)
    accuracy = class_accuracy(confusion_matrix(labels, found, len(groups)))
    tested = ~accuracy.isnan()
    weights = sample_weights(labels, profile)

    def mean(chosen: Tensor) -> float | None:
        return round(100 * float(accuracy[chosen & tested].mean()), 2) if (chosen & tested).any() else None

    numbers: dict[str, Any] = {"top1": round(100 * float((weights * (found == labels)).sum() / weights.sum()), 2)}
    for group in GROUPS:
        numbers[group] = mean(torch.tensor([g == group for g in groups]))
    return numbers | {
        "balanced_accuracy": mean(tested),
        "num_test": len(labels),
        "num_classes_without_test": int((~tested).sum()),
        "ece": round(100 * expected_calibration_error(logits, labels, weights), 2),
    }
