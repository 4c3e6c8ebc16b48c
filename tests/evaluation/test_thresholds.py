"""Thresholds: chosen on val against a search through all of them, measured on the test split, kept and refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import fix_of, must, refused, setting

from cpmix_cli.evaluation.thresholds import Scored, Target, choose, columns_of, target_of
from cpmix_cli.runtime.errors import UsageError


def scored(seed: int, size: int) -> Scored:
    """Random predictions of 4 classes with many equal confidences; class 3 is never predicted."""
    generator = np.random.default_rng(seed)
    labels, predicted = generator.integers(0, 4, size), generator.integers(0, 3, size)
    confidence = generator.integers(5, 20, size).astype(np.float32) / np.float32(20)
    right = generator.random(size) < confidence
    return Scored(labels, np.where(right & (labels < 3), labels, predicted), confidence)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
def test_chosen_threshold_is_the_best_of_all_that_reach_the_target(share: float) -> None:
    for seed in range(10):
        val = scored(seed, 120)
        for c in range(4):
            candidates = sorted({0.0, *val.confidence[val.predicted == c].tolist()})
            precise = [t for t in candidates if val.reached(c, t)[2] >= share]
            decided = val.reached(c, choose(Target("precision", share), val, c))[0]
            assert decided == (val.reached(c, precise[0])[0] if precise else 0)
            sensitive = [t for t in candidates if val.reached(c, t)[3] >= share]
            assert choose(Target("recall", share), val, c) == (sensitive[-1] if sensitive else 0)


def test_columns_count_what_is_decided() -> None:
    val, test = scored(1, 200), scored(2, 300)
    columns = columns_of(Target("precision", 0.6), list("abcd"), val, test)
    for c in range(3):
        decided = (test.predicted == c) & (test.confidence >= columns["threshold"][c])
        right = decided & (test.labels == c)
        assert (columns["num_decided"][c], columns["num_correct"][c]) == (decided.sum(), right.sum())
        assert columns["precision"][c] == pytest.approx(100 * right.sum() / decided.sum())
        assert columns["recall"][c] == pytest.approx(100 * right.sum() / (test.labels == c).sum())
        assert columns["val_precision"][c] >= 60
    assert (columns["threshold"][3], columns["num_decided"][3]) == (None, 0)


@pytest.mark.parametrize("text", ["", "precision", "precision=0", "precision=1.1", "f1=0.9", "recall=nan", "recall=-1"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is neither a precision nor a recall above 0 and up to 1"):
        target_of(text)


def test_evaluate_measures_thresholds_of_val_and_keeps_them(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    must("build-lt", "digits", "--val-per-class", 5, "--out", data)
    must("train-stage1", "--data", data, "--out", run, "--epochs", 4)
    plain = must("evaluate", "--from", run, "--json").json
    assert "thresholds" not in plain
    evaluate = ("evaluate", "--from", run, "--json")
    result = must(*evaluate, "--threshold-for", "precision=0.9")
    found = result.json.pop("thresholds")
    assert {**plain, "status": "done"} == {k: v for k, v in result.json.items() if k != "thresholds"}
    table = pd.read_parquet(run / "evaluation" / "stage1" / "thresholds.parquet")
    predictions = pd.read_parquet(run / "evaluation" / "stage1" / "predictions.parquet")
    limits = table["threshold"].fillna(np.inf).to_numpy(np.float32)[predictions["predicted"]]
    decided = predictions[predictions["confidence"].to_numpy() >= limits]
    assert found["num_decided"] == len(decided) == 500 - found["num_undecided"]
    right = 100 * (decided["label"] == decided["predicted"]).mean()
    assert found["accuracy_of_decided"] == pytest.approx(right, abs=0.005)
    assert right > plain["top1"]
    assert "warning: thresholds that rest on fewer than 10 val images, which say little: " in result.stderr
    missed = table["class_name"][table["threshold"].isna()].tolist()
    assert all(name in result.stderr.split("is not reached on val for ")[1].split(":")[0] for name in missed[:5])
    # The plain command keeps them; another target replaces them.
    kept = must(*evaluate).json
    assert (kept["status"], kept["thresholds"]) == ("up to date", found)
    must("confusion-report", "--from", run)
    other = must(*evaluate, "--threshold-for", "recall=0.5").json
    assert (other["status"], other["thresholds"]["for"]) == ("done", "recall=0.5")
    assert must("confusion-report", "--from", run, "--json").json["status"] == "up to date"
    shown = must("evaluate", "--from", run).stdout
    assert "\nthresholds for recall=0.5, chosen on val, measured here\n" in shown
    assert f"\n{other['thresholds']['num_decided']} of 500 images are decided, " in shown
    for flags in (("--split", "val"), ("--test-distribution", "forward")):
        refused(2, f"not {' '.join(flags)}", *evaluate, "--threshold-for", "recall=0.5", *flags)
    refused(2, '--threshold-for "0.9" is neither', *evaluate, "--threshold-for", "0.9")


def test_thresholds_need_a_val_split(digits_run: Path) -> None:
    result = refused(
        3, "has no val split to choose thresholds on", "evaluate", "--from", digits_run, "--threshold-for", "recall=0.9"
    )
    assert "train on it, such as: cpmix build-lt digits --rho 20 --val-per-class 5 --out " in fix_of(result)
    assert "-val-per-class5" in fix_of(result)
    must(*fix_of(result).partition(": cpmix ")[2].split())


def test_thresholds_follow_the_settings_of_the_evaluation(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    must("build-lt", "digits", "--val-per-class", 5, "--out", data)
    must("train-stage1", "--data", data, "--out", run, "--epochs", 4)
    flags = ("--from", run, "--threshold-for", "recall=0.5")
    must("evaluate", *flags)
    must("evaluate", *flags, *setting("evaluation.temperature=2"))
    plain, warm = (
        pd.read_parquet(run / "evaluation" / name / "thresholds.parquet") for name in ("stage1", "stage1-temperature-2")
    )
    assert (warm["threshold"] <= plain["threshold"]).all()
    assert (warm["threshold"] < plain["threshold"]).any()
