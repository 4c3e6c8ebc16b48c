"""Precision, recall, F1 and intervals of classes against scikit-learn; evaluations of older versions are read."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import contents, edit_record, must, write_photos
from sklearn import metrics

from cpmix_cli.artifacts import tables
from cpmix_cli.artifacts.files import sha256
from cpmix_cli.evaluation.per_class import class_columns, totals


def predictions(seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions and confusion matrix: class 5 has no test image, class 4 is never predicted."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, 300)
    found = np.where(generator.random(300) < 0.6, labels, generator.integers(0, 6, 300))
    found[found == 4] = 0
    return labels, found, metrics.confusion_matrix(labels, found, labels=range(6))


def test_columns_equal_scikit_learn_s_where_these_are_defined() -> None:
    labels, found, matrix = predictions()
    columns = class_columns(matrix)
    expected = metrics.precision_recall_fscore_support(labels, found, labels=range(5), zero_division=np.nan)
    for name, values in zip(("precision", "accuracy", "f1", "num_test"), expected, strict=True):
        scale = 1 if name == "num_test" else 100
        np.testing.assert_allclose(columns[name][:5], scale * values, equal_nan=True)
    assert np.isnan(columns["precision"][4])
    assert columns["f1"][4] == 0
    assert columns["num_predicted"].tolist() == np.bincount(found, minlength=6).tolist()
    assert columns["num_predicted"][5] > 0
    assert np.isnan([columns[name][5] for name in ("precision", "accuracy", "f1", "recall_low", "recall_high")]).all()


def test_macro_f1_is_scikit_learn_s_over_the_classes_with_test_images() -> None:
    labels, found, matrix = predictions()
    expected = metrics.f1_score(labels, found, labels=range(5), average="macro", zero_division=0)
    assert totals(matrix, ["many"] * 6)["macro_f1"] == pytest.approx(100 * expected, abs=0.005)


def test_a_long_tailed_test_set_changes_precision_but_not_recall() -> None:
    matrix = np.array([[8, 2], [1, 9]])
    plain, rare = class_columns(matrix), class_columns(matrix, np.array([10, 1]))
    assert rare["accuracy"].tolist() == plain["accuracy"].tolist() == [80, 90]
    assert rare["precision"] == pytest.approx([100 * 8 / 8.1, 100 * 0.9 / 2.9])
    assert rare["f1"] == pytest.approx([100 * 16 / 18.1, 100 * 1.8 / 3.9])


def test_evaluate_gives_classes_and_intervals(digits_run: Path) -> None:
    found = must("evaluate", "--from", digits_run, "--json").json
    table = pd.read_parquet(digits_run / "evaluation" / "finetune" / "predictions.parquet")
    precision, recall, f1, support = metrics.precision_recall_fscore_support(table["label"], table["predicted"])
    for c, row in enumerate(found["classes"]):
        expected = (*(round(100 * x[c], 2) for x in (precision, recall, f1)), support[c])
        assert (row["precision"], row["recall"], row["f1"], row["num_test"]) == expected
        low, high = row["recall_interval"]
        assert low < row["recall"] <= high
    assert found["macro_f1"] == round(100 * f1.mean(), 2)
    for name in ("top1", "many", "medium", "few", "balanced_accuracy"):
        low, high = found["intervals"][name]
        assert low < found[name] <= high
        assert high - low < 35
    shown = must("evaluate", "--from", digits_run).stdout.splitlines()
    (place,) = [number for number, line in enumerate(shown) if line.startswith("finetune ")]
    assert shown[place + 1].split()[:4] == ["95", "%", "interval", "{:.1f}-{:.1f}".format(*found["intervals"]["top1"])]
    title = f"classes, per cent; macro F1 {found['macro_f1']:.2f}"
    last = found["classes"][-1]
    numbers = [last["num_train"], last["num_test"], f"{last['precision']:.2f}", f"{last['recall']:.2f}"]
    interval = "{:.1f}-{:.1f}".format(*last["recall_interval"])
    assert shown[shown.index(title) + 12].split() == ["9", *map(str, numbers), interval, f"{last['f1']:.2f}"]


def test_an_evaluation_of_an_older_version_is_up_to_date_and_shown(digits_run: Path) -> None:
    """Its table of classes ends with the accuracy, and its metrics have no intervals."""
    folder = digits_run / "evaluation" / "finetune"
    new = contents(folder)
    numbers = json.loads((folder / "metrics.json").read_text())
    del numbers["intervals"], numbers["macro_f1"]
    old = {
        "metrics.json": (json.dumps(numbers, indent=1) + "\n").encode(),
        "per_class.parquet": tables.table_bytes(
            tables.OLDER_PER_CLASS_SCHEMA, dict(pd.read_parquet(folder / "per_class.parquet").items())
        ),
    }
    for name, data in old.items():
        (folder / name).write_bytes(data)
    outputs = json.loads((folder / "run.json").read_text())["outputs"]
    edit_record(folder / "run.json", outputs=outputs | {name: sha256(data) for name, data in old.items()})
    result = must("evaluate", "--from", digits_run, "--json")
    assert result.json["status"] == "up to date"
    assert "intervals" not in result.json
    assert "is of an older version, without precision, F1 and intervals; --overwrite adds them\n" in result.stderr
    first = result.json["classes"][0]
    assert (first["recall"] > 50, first["precision"], first["recall_interval"]) == (True, None, [None, None])
    assert "95 % interval" not in must("evaluate", "--from", digits_run).stdout
    assert must("status", digits_run).code == 0
    must("compare", digits_run)
    must("confusion-report", "--from", digits_run, "--overwrite")
    must("evaluate", "--from", digits_run, "--overwrite")
    assert contents(folder) == new


def test_a_small_test_split_is_named_when_it_is_made_and_when_it_is_measured(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 30, "green": 12, "blue": 6})
    data = tmp_path / "data"
    said = (
        "warning: 2 of 2 classes with few training images have fewer than 10 test images: blue (1), green (2); a "
        "recall of 50 % is uncertain there by 41 points or more, and the accuracy of few by 38"
    )
    build = ("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--image-size", 16, "--out", data)
    assert f"{said}; add images, or hold out more with --test-per-class\n" in must(*build).stderr
    assert said not in must(*build).stderr  # up to date: nothing was made
    recipe = ("--recipe", "digits/cross-entropy", "--epochs", 1)
    must("train-stage1", "--data", data, "--out", tmp_path / "run", *recipe)
    result = must("evaluate", "--from", tmp_path / "run")
    assert f"{said}\n" in result.stderr
    assert "\n1 class has 1 test image, so the recall can only be 0 or 100: blue\n" in result.stdout
