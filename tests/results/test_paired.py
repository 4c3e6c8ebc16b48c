"""compare, run by run: differences paired by seed, their t intervals, error shift, and the ranking on val."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import must, refused
from scipy import stats

from cpmix_cli.evaluation.error_shift import most_confused_pairs, split_errors
from cpmix_cli.results.comparison import ComparisonRow, evaluations_of, in_rows
from cpmix_cli.results.paired import paired_rows, t_quantile

T_975 = {1: 12.706204736, 2: 4.302652730}
"""0.975 quantile of Student's t by degrees of freedom, from a printed table."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Cross entropy of seeds 0, 1 and 2 and Balanced Softmax of seeds 2 and 1, the last with its finetune.

    All are evaluated on test, and those of seed 2 on val.
    """
    folder = tmp_path_factory.mktemp("paired")
    data = folder / "data"
    must("build-lt", "digits", "--val-per-class", 20, "--val-capped", "--out", data)
    found = {}
    for name in ("ce-0", "ce-1", "ce-2", "bs-2", "bs-1"):
        run, seed = folder / name, name[-1]
        recipe = "digits/cross-entropy" if name.startswith("ce") else "digits/balanced-softmax"
        must("train-stage1", "--data", data, "--recipe", recipe, "--seed", seed, "--epochs", 3, "--out", run)
        if name.startswith("bs"):
            must("train-stage2", "--from", run)
        must("evaluate", "--from", run)
        if seed == "2":
            must("evaluate", "--from", run, "--split", "val")
        found[name] = run
    must("finetune", "--from", found["bs-1"])
    must("evaluate", "--from", found["bs-1"])
    return found


def number(run: Path, phase: str, measure: str) -> float:
    return float(json.loads((run / "evaluation" / phase / "metrics.json").read_text())[measure])


def confused_pairs(run: Path, phase: str) -> set[tuple[int, int]]:
    """Pairs of classes with half of each class's training confusions, the most frequent first."""
    table = pd.read_parquet(run / phase / "confusion_pairs.parquet")
    found = set()
    for true in range(10):
        rows = table[table["true_class"] == true].sort_values(["count", "predicted_class"], ascending=[False, True])
        taken = 0
        for predicted, count in zip(rows["predicted_class"], rows["count"], strict=True):
            if taken >= rows["count"].sum() / 2:
                break
            found.add((true, predicted))
            taken += count
    return found


def errors(run: Path, phase: str, pairs: set[tuple[int, int]]) -> tuple[float, float]:
    """Errors on the pairs and other errors, in per cent of the test images."""
    table = pd.read_parquet(run / "evaluation" / phase / "predictions.parquet")
    wrong = [(true, found) for true, found in zip(table["label"], table["predicted"], strict=True) if true != found]
    on_pairs = sum(pair in pairs for pair in wrong)
    return 100 * on_pairs / len(table), 100 * (len(wrong) - on_pairs) / len(table)


def mean_difference(values: list[float]) -> dict[str, Any]:
    half = T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": pytest.approx(fmean(values)), "half_width": half and pytest.approx(half)}


def test_rows_are_compared_by_seed_with_the_first_run_and_after_with_before(runs: dict[str, Path]) -> None:
    result = must("compare", *runs.values(), "--split", "test", "--json").json
    assert [(r["method"], r["finetune"], r["seeds"]) for r in result["rows"]] == [
        ("Balanced Softmax", "before", [2, 1]),
        ("Balanced Softmax", "after", [1]),
        ("Cross Entropy", "before", [0, 1, 2]),
    ]
    finetune, method = result["paired"]
    assert [finetune[key] for key in ("row", "minus_row", "n", "seeds")] == [2, 1, 1, [1]]
    assert [method[key] for key in ("row", "minus_row", "n", "seeds")] == [1, 3, 2, [1, 2]]
    for measure in ("top1", "many", "medium", "few"):
        after, before = (number(runs["bs-1"], phase, measure) for phase in ("finetune", "stage2"))
        assert finetune[measure] == mean_difference([after - before])
        differences = [
            number(runs[f"bs-{seed}"], "stage2", measure) - number(runs[f"ce-{seed}"], "stage1", measure)
            for seed in (1, 2)
        ]
        assert method[measure] == mean_difference(differences)


def test_error_shift_splits_all_errors_by_the_pairs_that_the_subtracted_run_confused(runs: dict[str, Path]) -> None:
    finetune, method = must("compare", *runs.values(), "--split", "test", "--json").json["paired"]
    pairs = {seed: confused_pairs(runs[f"ce-{seed}"], "stage1") for seed in (1, 2)}
    before = [errors(runs[f"ce-{seed}"], "stage1", pairs[seed]) for seed in (1, 2)]
    after = [errors(runs[f"bs-{seed}"], "stage2", pairs[seed]) for seed in (1, 2)]
    for part, name in enumerate(("most_confused_pairs", "other_pairs")):
        assert method["errors"][name] == {
            "before": pytest.approx(fmean(found[part] for found in before)),
            "after": pytest.approx(fmean(found[part] for found in after)),
            "change": mean_difference([new[part] - old[part] for new, old in zip(after, before, strict=True)]),
        }
    assert sum(finetune["errors"][name]["after"] for name in finetune["errors"]) == pytest.approx(
        100 - number(runs["bs-1"], "finetune", "top1")
    )


def test_a_difference_of_one_pair_has_no_interval(runs: dict[str, Path]) -> None:
    lines = must("compare", runs["ce-1"], runs["bs-1"]).stdout.splitlines()
    at = lines.index("paired differences, per cent points")
    assert lines[at + 1].split() == ["rows", "n", "top-1", "many", "medium", "few"]
    top1 = number(runs["bs-1"], "stage2", "top1") - number(runs["ce-1"], "stage1", "top1")
    assert lines[at + 4].split()[:5] == ["1", "-", "3", "1", f"{top1:+.2f}"]
    assert "+-" not in "\n".join(lines)
    assert "paired differences" not in must("compare", runs["ce-1"]).stdout


def test_a_seed_that_a_row_has_twice_is_not_paired(runs: dict[str, Path]) -> None:
    rows = in_rows([run for folder in runs.values() for run in evaluations_of(folder, None)[0] if not run.label])
    bs, _, ce = rows
    twice = ComparisonRow([*ce.runs, replace(ce.runs[2], checkpoint="another")])
    (pair,) = paired_rows([twice, bs], runs["ce-0"])
    assert [run.seed for run, _ in pair.pairs] == [1]


def test_val_ranks_the_rows_and_names_the_winners_curse(runs: dict[str, Path]) -> None:
    result = must("compare", *runs.values(), "--split", "val")
    lines = result.stdout.splitlines()
    found = {
        name: number(runs[name], f"{phase}-val", "top1") for name, phase in (("ce-2", "stage1"), ("bs-2", "stage2"))
    }
    first, second = sorted(found.values(), reverse=True)
    assert [line.split()[-5] for line in lines[3:5]] == [f"{first:.2f}", f"{second:.2f}"]
    assert lines[5] == (
        "ranked by val. The best of several on val is in part luck, so its val number is too high: "
        "measure it once on test"
    )
    folders = ", ".join(str(runs[name]) for name in ("ce-0", "ce-1"))
    told = [f"error: no evaluation of the val split in {folders}", "  needed by: compare --split val"]
    told.append(f"  fix: cpmix evaluate --from {runs['ce-0']} --split val")
    refused(3, told, "compare", runs["ce-0"], runs["ce-1"], "--split", "val")


def test_most_confused_takes_the_fewest_classes_that_make_up_half() -> None:
    confusions = np.array([[0, 3, 2, 1], [2, 0, 2, 2], [0, 0, 0, 0], [1, 9, 1, 0]])
    # Row 0: 3 of 6 are half. Row 1: 2 of 6 are not, so a second class is needed; ties go by class id.
    expected = [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert most_confused_pairs(confusions).astype(int).tolist() == expected
    matrix = np.array([[9, 3, 2, 1], [2, 9, 1, 0], [0, 0, 9, 4], [1, 5, 0, 9]])
    assert split_errors(matrix, most_confused_pairs(confusions)) == (3 + 2 + 1 + 5, 2 + 1 + 4 + 1)


def test_t_quantiles_equal_scipys() -> None:
    assert [t_quantile(n) for n in range(1, 40)] == pytest.approx(stats.t.ppf(0.975, range(1, 40)), abs=1e-6)


def test_the_verdict_on_the_confusion_partner_follows_from_the_rows() -> None:
    """The table of paired differences in RESULTS.md, by scipy from results.csv."""
    recipes = Path(__file__).parents[2] / "recipes"
    rows = pd.read_csv(recipes / "results.csv").query("study == 'cifar100-lt-200-40-controls'")
    rows["method"] = rows["method"].str.removeprefix("CP-Mix, ")
    top1 = rows.pivot(index=["phase", "seed"], columns="method", values="top1")
    text = (recipes / "RESULTS.md").read_text(encoding="utf-8")
    for one, other in (("CP-Mix", "random"), ("CP-Mix", "class-uniform"), ("class-uniform", "random")):
        columns = [name if name in top1 else f"{name} partner" for name in (one, other)]
        cells = []
        for phase in ("stage2", "finetune"):
            found = (top1[columns[0]] - top1[columns[1]])[phase].dropna()
            half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
            cells.append(f"{found.mean():+.2f} ± {half:.2f} ({len(found)}")
        line = next(line for line in text.splitlines() if line.startswith(f"| {one} - {other} partner |"))
        assert [cell in line for cell in cells] == [True, True], cells
