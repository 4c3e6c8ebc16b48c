"""Metrics of predictions: accuracy per class and group, calibration. No function here selects a model.

Shapes: N test images, C classes. Not torchmetrics: it gives recall 0 to a class without test images, and its
calibration error drops predictions of confidence 1.0.
"""

from typing import Any

import torch
from torch import Tensor

from cpmix_cli.data.longtail import GROUPS, exponential_counts
from cpmix_cli.runtime.rounding import rounded

_NUM_BINS = 15


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count test images of true class i (row) predicted as class j (column).

    Args:
        labels: true classes [N] int64.
        predicted: predicted classes [N] int64.
        num_classes: C.

    Returns:
        Counts [C, C] int64, with correct predictions on the diagonal.

    Paper: Eq. (5).
    """
    pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Compute the accuracy of each class, a fraction: [C, C] -> [C] float64; NaN for a class without test images."""
    return matrix.diagonal().double() / matrix.sum(1).double()


def reliability(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the reliability diagram over 15 equal bins of confidence, (0, 1/15], (1/15, 2/15] and so on.

    Args:
        confidence: largest softmax probability per image [N] float64.
        right: whether the prediction is correct [N] bool.
        weights: weight per image [N] float64, see sample_weights(); None: each image has weight 1.

    Returns:
        Images, mean confidence and accuracy per bin [15, 3] float64; the means are NaN in empty bins.
    """
    weights = torch.ones(len(confidence), dtype=torch.float64) if weights is None else weights
    bins = (confidence * _NUM_BINS).ceil().long().clamp(1, _NUM_BINS) - 1
    columns = torch.stack([weights, weights * confidence, weights * right], 1)
    sums = torch.zeros(_NUM_BINS, 3, dtype=torch.float64).index_add(0, bins, columns)
    return torch.cat([sums[:, :1], sums[:, 1:] / sums[:, :1]], 1)


def expected_calibration_error(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Compute the expected calibration error: mean |accuracy - confidence| over the bins of reliability().

    Bins are weighted by their images.

    Args:
        logits: logits [N, C].
        labels: true classes [N] int64.
        weights: weight per image [N] float64, see sample_weights(); None: each image has weight 1.

    Returns:
        A fraction from 0 to 1.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    images, confidences, accuracies = reliability(confidence, predicted == labels, weights).unbind(1)
    return float((images * (accuracies - confidences).abs()).nansum() / images.sum())


def shifted_profile(class_counts: Tensor, num_test: Tensor, distribution: str, ratio: float) -> Tensor:
    """Return the images per class [C] int64 of a long-tailed subset of the test set.

    Args:
        class_counts: training images per class [C], which give the order of the classes.
        num_test: test images per class [C]; the smallest is the size of the subset's largest class.
        distribution: "forward": the class with most training images has most test images. "backward": it has fewest.
            Among classes of equal count, the larger id counts as the rarer class.
        ratio: imbalance factor of the subset, largest class / smallest class.

    Source: Zhang et al., SADE, Sec. 5.3: the same exponential profile as in training.
    """
    profile = torch.from_numpy(exponential_counts(int(num_test.min()), len(class_counts), ratio))
    order = class_counts.argsort(descending=True, stable=True)
    return torch.empty_like(profile).scatter(0, order if distribution == "forward" else order.flip(0), profile)


def sample_weights(labels: Tensor, profile: Tensor | None) -> Tensor:
    """Return the weight of each test image: labels [N] -> [N] float64.

    Without a profile [C], see shifted_profile(), all weights are 1. With it, a weight is the class's images in the
    profile / its test images. So weighted metrics are those expected over random subsets of that profile.
    """
    if profile is None:
        return torch.ones(len(labels), dtype=torch.float64)
    return (profile / torch.bincount(labels, minlength=len(profile)))[labels].double()


def summary(logits: Tensor, labels: Tensor, groups: list[str], profile: Tensor | None = None) -> dict[str, Any]:
    """Compute the accuracies of metrics.json, in percent; None for a group without tested classes.

    Group accuracies and balanced accuracy are means of class accuracies. Classes without test images are excluded, and
    their number is `num_classes_without_test`.

    Args:
        logits: logits [N, C].
        labels: true classes [N] int64.
        groups: group of each class, C names of longtail.GROUPS.
        profile: images per class [C] of a long-tailed test set, see sample_weights(); None: the test set as it is.
    """
    found = logits.argmax(1)
    accuracy = class_accuracy(confusion_matrix(labels, found, len(groups)))
    tested = ~accuracy.isnan()
    weights = sample_weights(labels, profile)

    def mean(chosen: Tensor) -> float | None:
        return rounded(100 * float(accuracy[chosen & tested].mean()), 2) if (chosen & tested).any() else None

    numbers: dict[str, Any] = {"top1": rounded(100 * float((weights * (found == labels)).sum() / weights.sum()), 2)}
    for group in GROUPS:
        numbers[group] = mean(torch.tensor([g == group for g in groups]))
    return numbers | {
        "balanced_accuracy": mean(tested),
        "num_test": len(labels),
        "num_classes_without_test": int((~tested).sum()),
        "ece": rounded(100 * expected_calibration_error(logits, labels, weights), 2),
    }
