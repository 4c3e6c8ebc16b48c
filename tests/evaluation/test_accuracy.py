"""Accuracy, groups and calibration against scikit-learn and hand-worked cases."""

import math
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import must
from sklearn import metrics

from cpmix_cli.artifacts import files
from cpmix_cli.evaluation.accuracy import class_accuracy, confusion_matrix, expected_calibration_error, summary
from cpmix_cli.evaluation.prediction import Predicted, check_finite
from cpmix_cli.recipe import loading
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runtime.errors import InputError


def test_matrix_and_class_accuracy_agree_with_scikit_learn(generator: torch.Generator) -> None:
    labels = torch.randint(0, 6, (500,), generator=generator)
    predicted = torch.randint(0, 7, (500,), generator=generator)  # class 6 has no test image
    matrix = confusion_matrix(labels, predicted, 7)
    assert matrix.tolist() == metrics.confusion_matrix(labels, predicted, labels=range(7)).tolist()
    found = class_accuracy(matrix)
    assert math.isnan(found[6])
    expected = metrics.recall_score(labels, predicted, labels=range(6), average=None)
    assert found[:6].tolist() == pytest.approx(expected.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of class 6, and leaves it out as we do
        balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert found[:6].mean().item() == pytest.approx(balanced)


def test_groups_are_means_of_class_accuracies() -> None:
    # class 0 (many): 1 of 2 right; 1 (medium): 3 of 3; 2 (medium): 0 of 1; 3 (few): no test image
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    predicted = torch.tensor([0, 1, 1, 1, 1, 0])
    logits = torch.nn.functional.one_hot(predicted, 4).float() * 9
    found = summary(logits, labels, ["many", "medium", "medium", "few"])
    assert found["top1"] == 66.67
    assert (found["many"], found["medium"], found["few"]) == (50.0, 50.0, None)
    assert found["balanced_accuracy"] == 50.0
    assert (found["num_test"], found["num_classes_without_test"]) == (6, 1)


@pytest.mark.parametrize(
    ("confidences", "labels", "expected"),
    [
        # Bin (0.6, 0.667]: 0.62 and 0.66, one right: |1 - 1.28| = 0.28; bin (0.867, 0.933]: 0.9, right: 0.1.
        ([0.62, 0.66, 0.9], [0, 1, 0], (0.28 + 0.1) / 3),
        # 0.95 wrong and 1.0 right share the last bin: |1 - 1.95| / 2, by the definition; torchmetrics 1.9 has not.
        ([0.95, 1.0], [1, 0], 0.475),
        ([0.5] * 10, [0, 1] * 5, 0.0),
    ],
)
def test_calibration_error_equals_that_by_hand(confidences: list[float], labels: list[int], expected: float) -> None:
    p = torch.tensor(confidences, dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).clamp_min(1e-300).log()], 1)
    found = expected_calibration_error(logits, torch.tensor(labels))
    assert found == pytest.approx(expected, abs=1e-12)


def test_evaluate_uses_the_few_border_of_the_data_set(tmp_path: Path) -> None:
    """124 / 6.2 = 20 training images are few without a flag of evaluate's, where build-lt was told so."""
    run = tmp_path / "run"
    must("build-lt", "digits", "--rho", 6.2, "--few-inclusive", "--out", tmp_path / "data")
    must("train-stage1", "--data", tmp_path / "data", "--out", run, "--recipe", "digits/cross-entropy", "--epochs", 1)
    must("evaluate", "--from", run)
    last = pd.read_parquet(run / "evaluation" / "stage1" / files.PER_CLASS).iloc[-1]
    assert (last["num_train"], last["group"]) == (20, "few")


def test_logits_that_are_not_finite_are_refused(digits_run: Path) -> None:
    """Norms of a head below 1 to the power of 100 are 0 in float32, for one."""
    source = PhaseFolder(digits_run, "stage1")
    recipe = loading.load(str(source.path / files.RECIPE), settings=["evaluation.tau_norm=100"])
    logits = torch.tensor([[0.0, torch.inf]])
    with pytest.raises(InputError, match=r"stage1/model.safetensors gives logits that are not finite with") as caught:
        check_finite(Predicted(logits, logits[None], None), recipe, source)
    assert caught.value.message.endswith("with evaluation.tau_norm = 100")
    assert caught.value.fix.startswith("give evaluate --set evaluation.temperature=1 --set ")
