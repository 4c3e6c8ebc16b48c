"""All six commands for real on digits and toy: exact files, JSON, bytes, and what each phase refuses or skips."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from helpers import contents, files, must, refused, unchanged

from cpmix_cli.artifacts import tables
from cpmix_cli.artifacts.files import sha256
from cpmix_cli.artifacts.tensors import read_tensors

TRAINING = ["class_counts.parquet", "confusion_pairs.parquet", "metrics.parquet", "model.safetensors"]
TRAINING += ["recipe.toml", "run.json", "training_state.safetensors"]
EVALUATION = ["logits.safetensors", "metrics.json", "per_class.parquet", "predictions.parquet", "run.json"]
PICTURES = ["class_accuracy", "confusion_histogram", "confusion_matrix"]
REPORT = [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
REPORT += ["confused_pairs.parquet", "confusion_matrix.parquet", "run.json"]


def written(phases: list[str], last: str, pictures: list[str]) -> list[str]:
    """Files of a run that is trained, evaluated and reported."""
    found = [f"{phase}/{name}" for phase in phases for name in TRAINING]
    found += [f"evaluation/{last}/{name}" for name in EVALUATION]
    return sorted([*found, *(f"confusion/{last}/{name}" for name in pictures), "confusion/index.html"])


def test_runs_leave_exactly_these_files(digits_run: Path, toy_run: Path) -> None:
    assert files(digits_run) == written(["stage1", "stage2", "finetune"], "finetune", REPORT)
    regions = [*REPORT, "decision_regions.png", "decision_regions.svg"]
    assert files(toy_run) == written(["stage1", "stage2"], "stage2", regions)


def test_cpmix_improves_the_minority_classes_of_the_toy(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    """Fig. 2: cross entropy gives the minorities' regions away, CP-Mix does not."""
    erm = tmp_path / "erm"
    must("train-stage1", "--data", toy, "--recipe", "toy/cross-entropy", "--out", erm)
    plain = must("evaluate", "--from", erm, "--json").json
    ours = must("evaluate", "--from", toy_run, "--json").json
    assert ours["medium"] > plain["medium"] + 3
    assert ours["balanced_accuracy"] > plain["balanced_accuracy"]


@pytest.mark.slow
def test_an_evaluation_written_elsewhere_can_be_reported(digits_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(digits_run / "evaluation")
    other = tmp_path / "other"
    result = must("evaluate", "--from", digits_run, "--phase", "stage1", "--out", other)
    assert result.stderr.endswith(f"next: cpmix confusion-report --from {digits_run} --phase stage1 --out {other}\n")
    must("confusion-report", "--from", digits_run, "--phase", "stage1", "--out", other)
    assert files(other) == written([], "stage1", REPORT)


def test_evaluation_json_and_files_agree(digits: Path, digits_run: Path) -> None:
    result = must("evaluate", "--from", digits_run, "--json")
    numbers = result.json
    assert numbers["status"] == "up to date"
    required = {"phase", "top1", "many", "medium", "few", "balanced_accuracy", "num_test", "ece"}
    assert {*required, "checkpoint_sha256"} <= numbers.keys()
    folder = digits_run / "evaluation" / "finetune"
    stored = json.loads((folder / "metrics.json").read_text())
    assert {k: numbers[k] for k in stored} == stored
    weights = (digits_run / "finetune" / "model.safetensors").read_bytes()
    assert numbers["checkpoint_sha256"] == sha256(weights)

    table = tables.read_table(folder / "predictions.parquet", tables.PREDICTIONS_SCHEMA)
    assert numbers["num_test"] == len(table) == 500
    right = table["label"] == table["predicted"]
    assert numbers["top1"] == pytest.approx(100 * right.mean(), abs=0.005)
    classes = tables.read_table(folder / "per_class.parquet", tables.PER_CLASS_SCHEMA)
    assert classes["num_correct"].tolist() == right.groupby(table["label"]).sum().tolist()
    for group in ("many", "medium", "few"):
        chosen = classes["accuracy"][classes["group"] == group]
        assert numbers[group] == pytest.approx(chosen.mean(), abs=0.005)
    tensors, _ = read_tensors(folder / "logits.safetensors")
    assert tensors["logits"].argmax(1).tolist() == table["predicted"].tolist()
    counts = (digits_run / "finetune" / "class_counts.parquet").read_bytes()
    assert counts == (digits / "class_counts.parquet").read_bytes()


def test_report_matrix_equals_the_counts_of_the_predictions(digits_run: Path) -> None:
    table = pd.read_parquet(digits_run / "evaluation" / "finetune" / "predictions.parquet")
    expected = table.groupby(["label", "predicted"]).size()
    path = digits_run / "confusion" / "finetune" / "confusion_matrix.parquet"
    matrix = tables.read_table(path, tables.CONFUSION_SCHEMA)
    assert matrix["count"].tolist() == expected.tolist()
    assert list(zip(matrix["true_class"], matrix["predicted_class"], strict=True)) == list(expected.index)
    result = must("confusion-report", "--from", digits_run, "--json")
    assert result.json["num_wrong"] == (table["label"] != table["predicted"]).sum()
    assert Path(result.json["picture"]).read_bytes().startswith(b"\x89PNG")


def test_metrics_and_confusion_pairs_add_up_over_stages(digits_run: Path) -> None:
    phases = ("stage1", "stage2", "finetune")
    one, two, tuned = (pd.read_parquet(digits_run / phase / "metrics.parquet") for phase in phases)
    assert one["epoch"].tolist() == [1, 2, 3, 4]
    assert two["epoch"].tolist() == [5, 6]
    assert [c for c in two.columns if c.startswith("loss")] == ["loss", "loss_erm", "loss_cp", "loss_mix"]
    total = two["loss_erm"] + two["loss_cp"] + two["loss_mix"]
    assert two["loss"].tolist() == pytest.approx(total.tolist())

    pairs = [pd.read_parquet(digits_run / p / "confusion_pairs.parquet") for p in ("stage1", "stage2")]
    errors = ((1 - one["train_accuracy"]) * 417).round().sum()
    assert pairs[0]["count"].sum() == one["num_confusions"].sum() == errors
    assert pairs[1]["count"].sum() == errors + two["num_confusions"].sum()
    assert (pairs[1]["true_class"] != pairs[1]["predicted_class"]).all()
    assert (pairs[1]["count"] > 0).all()
    assert not pairs[1].duplicated(["true_class", "predicted_class"]).any()
    copied = (digits_run / "finetune" / "confusion_pairs.parquet").read_bytes()
    assert copied == (digits_run / "stage2" / "confusion_pairs.parquet").read_bytes()
    assert tuned["num_confusions"].isna().all()


def test_finetune_changes_only_the_head(digits_run: Path) -> None:
    before, _ = read_tensors(digits_run / "stage2" / "model.safetensors")
    after, _ = read_tensors(digits_run / "finetune" / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {"head.weight", "head.bias"}


def test_finetune_can_reinitialise_the_head(digits_run: Path, tmp_path: Path) -> None:
    flags = ("--set", "finetune.head=reinit", "--set", "finetune.lr=1e-9")
    must("finetune", "--from", digits_run, *flags, "--out", tmp_path / "crt")
    before, _ = read_tensors(digits_run / "stage2" / "model.safetensors")
    after, _ = read_tensors(tmp_path / "crt" / "finetune" / "model.safetensors")
    assert (before["head.weight"] - after["head.weight"]).abs().mean() > 0.05


@pytest.mark.parametrize("phase", ["stage1", "stage2", "finetune"])
def test_a_phase_rerun_alone_gives_the_same_bytes(phase: str, digits: Path, digits_run: Path) -> None:
    before = contents(digits_run / phase)
    others = {p: contents(digits_run / p) for p in ("stage1", "stage2", "finetune") if p != phase}
    first = ["--data", digits, "--out", digits_run, "--epochs", 6]
    where = first if phase == "stage1" else ["--from", digits_run]
    must(phase if phase == "finetune" else f"train-{phase}", *where, "--overwrite")
    assert contents(digits_run / phase) == before
    assert {p: contents(digits_run / p) for p in others} == others


def test_a_later_phase_needs_only_the_files_of_the_one_before(digits_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(digits_run / "stage2", alone / "stage2")
    must("finetune", "--from", alone)
    assert contents(alone / "finetune") == contents(digits_run / "finetune")


def test_the_same_command_twice_is_up_to_date(digits: Path, digits_run: Path) -> None:
    later = ("train-stage2", "finetune", "evaluate", "confusion-report")
    first = ("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6)
    with unchanged(digits_run):
        for command in (first, *((name, "--from", digits_run) for name in later)):
            assert "up to date: " in must(*command).stdout
            assert must(*command, "--json").json["status"] == "up to date"


def test_another_recipe_on_a_finished_phase_is_refused_with_the_difference(digits: Path, digits_run: Path) -> None:
    flags = ("--epochs", 6, "--set", "optimizer.lr=0.05", "--seed", 3)
    command = ("train-stage1", "--data", digits, "--out", digits_run, *flags)
    with unchanged(digits_run):
        refused(4, ("optimizer.lr: 0.1 -> 0.05", "seed: 0 -> 3", "--overwrite"), *command)


@pytest.mark.slow
def test_two_stage_2s_start_from_one_stage_1(digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "bs"
    flags = ("--recipe", "digits/balanced-softmax", "--epochs", 6, "--out", other)
    first_stage = contents(digits_run / "stage1")
    must("train-stage2", "--from", digits_run, *flags)
    assert files(other) == [f"stage2/{name}" for name in TRAINING]
    assert contents(digits_run / "stage1") == first_stage
    shutil.rmtree(digits_run)  # the new folder is complete without the first
    must("finetune", "--from", other)
    must("evaluate", "--from", other)
    must("confusion-report", "--from", other)


def test_a_stage_2_under_another_stage_1_recipe_is_refused(digits_run: Path, tmp_path: Path) -> None:
    flags = ("--recipe", "digits/balanced-softmax", "--out", tmp_path / "o")  # without --epochs 6
    refused(3, "schedule.epochs: 6 -> 60", "train-stage2", "--from", digits_run, *flags)
    refused(3, "seed: 0 -> 1", "train-stage2", "--from", digits_run, "--seed", 1, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()
    flags = ("--set", "stage2.terms.cp.t=1.0", "--out", tmp_path / "o")
    must("train-stage2", "--from", digits_run, *flags)


def test_a_stale_phase_is_named_and_never_chosen(digits: Path, digits_run: Path) -> None:
    must("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 9, "--overwrite")
    result = must("evaluate", "--from", digits_run)
    assert "evaluate: takes stage1" in result.stderr
    assert "stage2 is stale (stage1 was trained again since) and is not used" in result.stderr
    assert "finetune is stale (stage1 was trained again since) and is not used" in result.stderr
    assert json.loads((digits_run / "evaluation/stage1/metrics.json").read_text())["phase"] == "stage1"
    refused(3, "is stale (stage1 was trained again since)", "evaluate", "--from", digits_run, "--phase", "finetune")
    refused(3, "cpmix train-stage2 --from", "finetune", "--from", digits_run)
    refused(4, (), "train-stage2", "--from", digits_run)  # its stage 2 came from another stage 1: not replaced unasked
    must("train-stage2", "--from", digits_run, "--overwrite")
    must("finetune", "--from", digits_run, "--overwrite")
    assert "takes finetune" in must("evaluate", "--from", digits_run).stderr
    assert "takes finetune" in must("confusion-report", "--from", digits_run).stderr


def test_finetune_after_stage_1_only_must_be_requested(digits_run: Path) -> None:
    shutil.rmtree(digits_run / "stage2")
    shutil.rmtree(digits_run / "finetune")
    refused(3, "only stage 1 is done", "finetune", "--from", digits_run)
    must("finetune", "--from", digits_run, "--phase", "stage1")
    assert must("evaluate", "--from", digits_run / "stage1", "--json").json["phase"] == "stage1"


def test_a_phase_that_the_recipe_lacks_is_skipped(digits: Path, toy_run: Path, tmp_path: Path) -> None:
    flags = ("--recipe", "digits/cross-entropy", "--epochs", 2)
    must("train-stage1", "--data", digits, "--out", tmp_path, *flags)
    before = files(tmp_path)
    result = must("train-stage2", "--from", tmp_path, "--json")
    assert result.json["skipped"] is True
    assert files(tmp_path) == before
    must("finetune", "--from", tmp_path)
    assert "nothing to do: the recipe has no finetune" in must("finetune", "--from", toy_run).stdout
    assert not (toy_run / "finetune").exists()


def test_test_accuracy_in_training_does_not_change_the_weights(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    flags = ("--data", digits, "--epochs", 6, "--eval-every", 2)
    result = must("train-stage1", *flags, "--out", tmp_path)
    curve = pd.read_parquet(tmp_path / "stage1" / "metrics.parquet")["test_accuracy"]
    assert curve.isna().tolist() == [True, False, True, False]
    assert result.stderr.count("test_acc=") == 2
    last = must("evaluate", "--from", tmp_path, "--json").json["top1"]
    assert curve.iloc[-1] * 100 == pytest.approx(last, abs=0.005)
    weights = (tmp_path / "stage1" / "model.safetensors").read_bytes()
    assert weights == (digits_run / "stage1" / "model.safetensors").read_bytes()


def test_a_moved_run_finds_its_data(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    here, moved = tmp_path / "here", tmp_path / "there" / "a" / "run"
    shutil.copytree(digits, here / "set")
    must("train-stage1", "--data", here / "set", "--out", here / "a" / "run", "--epochs", 6)
    here.rename(tmp_path / "there")  # both moved: the relative path still holds
    must("train-stage2", "--from", moved)
    shutil.move(tmp_path / "there" / "set", tmp_path / "away")
    refused(3, "--data FOLDER", "finetune", "--from", moved)
    must("finetune", "--from", moved, "--data", tmp_path / "away")


def test_another_data_set_is_refused(toy: Path, digits_run: Path) -> None:
    refused(3, "holds another data set (toy-lt-rho20)", "evaluate", "--from", digits_run, "--data", toy)


@pytest.mark.slow
def test_a_report_needs_a_current_evaluation(digits_run: Path) -> None:
    command = ("confusion-report", "--from", digits_run, "--phase", "stage1")
    refused(3, f"fix: cpmix evaluate --from {digits_run} --phase stage1", *command)
    must("finetune", "--from", digits_run, "--set", "finetune.lr=0.01", "--overwrite")
    refused(3, "is of an older checkpoint", "confusion-report", "--from", digits_run)
    assert "its input changed, so it is made again" in must("evaluate", "--from", digits_run).stderr
    must("confusion-report", "--from", digits_run)


def test_a_labelled_evaluation_is_kept_beside_the_plain_one(digits_run: Path) -> None:
    must("evaluate", "--from", digits_run, "--label", "small", "--set", "evaluation.batch_size=7")
    first, second = (digits_run / "evaluation" / name / "metrics.json" for name in ("finetune", "finetune-small"))
    assert json.loads(first.read_text()) == json.loads(second.read_text())
    command = ("evaluate", "--from", digits_run, "--set", "optimizer.lr=1.0")
    refused(2, "was trained with: optimizer.lr: 0.1 -> 1.0", *command)
    refused(4, "few_inclusive: False -> True", "evaluate", "--from", digits_run, "--few-inclusive")
