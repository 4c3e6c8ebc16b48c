"""Measuring predictions: accuracy by class and group, calibration. Nothing here selects anything.

Shapes: N test images, C classes. Own code and not torchmetrics, which counts a class absent from the test set as
recall 0 and loses confidence 1.0 from the calibration error (reference/ecosystem_reliability.md, finding 8).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cpmix_cli.data.batches import make_batches
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.engine import predict
from cpmix_cli.ensembles import combined
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import Evaluation, Recipe

NUM_ECE_BINS = 15


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Test images of true class i (row) predicted as j (column): [C, C] int64, diagonal included. Paper: Eq. (5)."""
    pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Fraction of each class's test images that are right [C] float64; NaN where it has none."""
    return matrix.diagonal().double() / matrix.sum(1).double()


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean |accuracy - confidence| over 15 equal bins (0, 1/15], ..., weighted by their images; a fraction.

    Args:
        logits: [N, C]; the confidence is the largest softmax probability.
        labels: [N].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    bins = (confidence * NUM_ECE_BINS).ceil().long().clamp(1, NUM_ECE_BINS) - 1
    zeros = torch.zeros(NUM_ECE_BINS, dtype=torch.float64)
    gap = zeros.index_add(0, bins, right - confidence)
    return float(gap.abs().sum() / len(labels))


def summary(logits: Tensor, labels: Tensor, groups: list[str]) -> dict[str, Any]:
    """The numbers of metrics.json: percent, null for a group without classes.

    Args:
        logits: raw, [N, C].
        labels: [N].
        groups: many, medium or few for each class [C].

    Groups and balanced accuracy are means of class accuracies; classes without test images are left out and counted.
    """
    accuracy = class_accuracy(confusion_matrix(labels, logits.argmax(1), len(groups)))
    tested = ~accuracy.isnan()

    def mean(chosen: Tensor) -> float | None:
        return round(100 * float(accuracy[chosen & tested].mean()), 2) if (chosen & tested).any() else None

    numbers: dict[str, Any] = {"top1": round(100 * float((logits.argmax(1) == labels).double().mean()), 2)}
    for group in GROUPS:
        numbers[group] = mean(torch.tensor([g == group for g in groups]))
    return numbers | {
        "balanced_accuracy": mean(tested),
        "num_test": len(labels),
        "num_classes_without_test": int((~tested).sum()),
        "ece": round(100 * expected_calibration_error(logits, labels), 2),
    }


def adjusted(logits: Tensor, class_counts: Tensor, tau: float) -> Tensor:
    """Post-hoc logit adjustment z - tau log(n_c / N) [N, C]. Source: Menon et al., Long-tail learning via logit
    adjustment.
    """
    return logits - tau * torch.log(class_counts.double() / class_counts.sum()).to(logits.dtype)


def post_hoc(expert_logits: Tensor, model: Classifier, class_counts: Tensor, recipe: Evaluation) -> Tensor:
    """The logits [N, C] that are evaluated, as [evaluation] says, from those of each expert [E, N, C]."""
    logits = combined(expert_logits, recipe.aggregate, model, class_counts)
    return adjusted(logits, class_counts, recipe.logit_adjustment) / recipe.temperature


def tau_normalised(model: Classifier, tau: float) -> None:
    """Divide each class vector of a head by its norm ** tau, in place; biases stay.

    Source: Kang et al., Decoupling.
    """
    for head in model.heads:
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight /= head.weight.norm(dim=1, keepdim=True) ** tau


def predictions_of(
    dataset: Dataset, split: str, recipe: Recipe, model: Classifier, device: torch.device
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that gives labels [N] and predictions [N] of the model as it is then, on a split held ready."""
    inputs, labels = dataset.read(split)
    batches = make_batches(inputs.to(device), recipe.data, dataset.record["mean"], dataset.record["std"])

    def measure() -> tuple[Tensor, Tensor]:
        return labels, predict(model, batches, len(labels), recipe.evaluation.batch_size).mean(0).argmax(1)

    return measure


def accuracy_on_test(dataset: Dataset, recipe: Recipe, model: Classifier, device: torch.device) -> Callable[[], float]:
    """A function that measures the model's fraction of test images right, for --eval-every."""
    predictions = predictions_of(dataset, "test", recipe, model, device)

    def measure() -> float:
        labels, predicted = predictions()
        return float((predicted == labels).double().mean())

    return measure


def confusion_on(
    dataset: Dataset, split: str, recipe: Recipe, model: Classifier, device: torch.device
) -> Callable[[], Tensor]:
    """A function that counts the model's confusions on a split, [C, C] float64 with a zero diagonal.

    Raises:
        InputError: the data set has no such split.
    """
    dataset.require(split, needed_by=f'confusion.source = "{recipe.confusion.source}"')
    predictions = predictions_of(dataset, split, recipe, model, device)

    def measure() -> Tensor:
        labels, predicted = predictions()
        return confusion_matrix(labels, predicted, dataset.num_classes).double().fill_diagonal_(0)

    return measure
