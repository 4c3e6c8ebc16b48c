"""finetune: it reports val before and after, and warns where it makes val worse."""

import json
from pathlib import Path

import pytest
from helpers import must


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CP-Mix on digits with a val split, both stages."""
    folder = tmp_path_factory.mktemp("finetune")
    must("build-lt", "digits", "--val-per-class", 30, "--val-capped", "--out", folder / "data")
    must("train-stage1", "--data", folder / "data", "--epochs", 6, "--out", folder / "run")
    must("train-stage2", "--from", folder / "run")
    return folder / "run"


def balanced(run: Path, phase: str) -> float:
    must("evaluate", "--from", run, "--phase", phase, "--split", "val")
    return float(json.loads((run / "evaluation" / f"{phase}-val" / "metrics.json").read_text())["balanced_accuracy"])


@pytest.mark.parametrize(("lr", "gets_worse"), [(0.05, False), (30.0, True)])
def test_finetune_reports_val_and_warns_only_where_it_gets_worse(
    run: Path, tmp_path: Path, lr: float, gets_worse: bool
) -> None:
    out = tmp_path / "finetuned"
    told = must("finetune", "--from", run, "--set", f"finetune.lr={lr}", "--out", out).stderr
    before, after = balanced(run, "stage2"), balanced(out, "finetune")
    assert (after < before) is gets_worse
    assert f"finetune: balanced accuracy on val {before:.2f} before, {after:.2f} after\n" in told
    warning = (
        f"warning: the finetune makes val worse by {before - after:.2f} points. The network without it is in "
        f"{run / 'stage2'}: name it with --phase stage2\n"
    )
    assert (warning in told) is gets_worse
    assert ("warning: " in told) is gets_worse
