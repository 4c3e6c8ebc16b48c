"""compare: runs in one table, what parts them, the paper's tables with ours in them, and the formats."""

import csv
import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import files, fix_of, must, refused, setting, trained, write_cifar

from cpmix_cli.commands.compare import _accuracy_lines, _accuracy_sheet, _cost_sheet, _letter_of, _listed, _paper_sheet
from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.results.comparison import COST_KEYS, ComparisonRow, EvaluatedRun, evaluations_of
from cpmix_cli.results.methods import recognised
from cpmix_cli.results.paper import PAPER_TABLES
from cpmix_cli.results.table_formats import Sheet, csv_text, latex, markdown, plain

SHORT = ("--epochs", 3)  # 2 + 1, finetune 1
PLAIN = ("--recipe", "digits/cross-entropy", *SHORT)


def numbers(run: Path, evaluation: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation" / evaluation / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def seeds(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Cross entropy on digits with three seeds; seed 1 has its finetune too."""
    folder = tmp_path_factory.mktemp("seeds")
    runs = [trained(digits, folder / f"ce-{seed}", *PLAIN, "--seed", seed) for seed in range(3)]
    must("finetune", "--from", runs[1])
    must("evaluate", "--from", runs[1])
    return runs


def test_compare_shows_mean_and_deviation_over_seeds(seeds: list[Path]) -> None:
    found = [numbers(run, "stage1") for run in seeds]
    a, b, c = (n["top1"] for n in found)
    mean = (a + b + c) / 3
    deviation = math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2)
    assert deviation > 0
    group = {key: sum(n[key] for n in found) / 3 for key in ("many", "medium", "few", "ece")}
    after = numbers(seeds[1], "finetune")
    lines = must("compare", *seeds).stdout.splitlines()
    top1 = f"{mean:.2f} +- {deviation:.2f}"
    assert lines[0] == "digits-lt-rho20, per cent"
    assert lines[1].split() == ["#", "method", "finetune", "n", "top-1", "many", "medium", "few", "ECE"]
    assert re.split(r"  +", lines[3]) == [
        *("1", "Cross Entropy", "before", "3", top1),
        *(f"{group[key]:.2f}" for key in ("many", "medium", "few", "ece")),
    ]
    assert re.split(r"  +", lines[4]) == [
        *("2", "Cross Entropy", "after", "1"),
        *(f"{after[key]:.2f}" for key in ("top1", "many", "medium", "few", "ece")),
    ]
    assert lines[5:7] == ["+-: sample standard deviation of n runs (other columns: --format csv)", ""]
    assert all(len(line) <= 100 for line in lines)

    result = must("compare", *seeds, "--json").json
    assert result.keys() == {"command", "rows", "differences", "paired", "left_out"}
    assert (result["differences"], result["left_out"]) == ([], [])
    first, second = result["rows"]
    assert first["top1"] == pytest.approx({"mean": mean, "std": deviation})
    assert second["top1"] == {"mean": after["top1"], "std": None}
    assert (first["seeds"], first["runs"]) == ([0, 1, 2], [str(run) for run in seeds])
    assert (first["epochs"], second["epochs"], first["full_epochs"]) == ([3], [3, 1], 60)
    assert (first["paper"], first["difference"], first["recipe"]) == (None, None, "digits/cross-entropy")
    assert must("compare", *seeds, "--format", "json").json == result


def test_compare_shows_speed_time_and_epochs_of_training(seeds: list[Path]) -> None:
    images = seconds = 0.0
    for phase in ("stage1", "finetune"):
        table = pd.read_parquet(seeds[1] / phase / "metrics.parquet")
        images += (table["images_per_second"] * table["seconds"]).sum()
        seconds += table["seconds"].sum()
    assert images == pytest.approx(417 * 4)  # one term, 3 + 1 epochs
    row = must("compare", seeds[1] / "finetune", "--json").json["rows"][0]
    assert row["images_per_second"] == pytest.approx(images / seconds)
    assert row["training_seconds"] == pytest.approx(seconds)
    assert row["gpu_hours"] is None
    assert row["device"].startswith("cpu, ")
    lines = must("compare", seeds[1]).stdout.splitlines()
    at = lines.index("training")
    assert lines[at + 1].split() == ["#", "parameters", "epochs", "images/s", "training", "device"]
    assert [line.split()[:3] for line in lines[at + 3 : at + 5]] == [["1", "75,002", "3"], ["2", "75,002", "3+1"]]


def cost(*values: object) -> dict[str, Any]:
    return dict(zip(COST_KEYS, values, strict=True))


def test_evaluations_of_one_checkpoint_cost_once_and_gpus_have_hours(seeds: list[Path]) -> None:
    (measured,), _ = evaluations_of(seeds[0], None)
    hours = [replace(measured, cost=cost(2.0, 3600.0 * h, float(h), "H100")) for h in (1, 3)]
    rows = [ComparisonRow(hours), ComparisonRow(hours), ComparisonRow([measured])]
    sheet = _cost_sheet(rows)
    assert sheet.rows[0] == ["1 and 2", "75,002", "3", "2", "2 h 00 min", "2.00", "H100"]
    assert sheet.rows[1][0] == "3"
    assert sheet.rows[1][5] == "-"
    mixed = ComparisonRow([hours[0], replace(hours[1], cost=cost(1.0, 1.0, 0.5, "A100"))]).cost()
    assert mixed == {"images_per_second": None, "training_seconds": None, "gpu_hours": 0.75, "device": "A100, H100"}
    unknown = _cost_sheet([ComparisonRow([replace(measured, cost=cost(None, None, None, None))])])
    assert unknown.rows == [["1", "75,002", "3", "-", "-", "-"]]
    assert unknown.lines[-1] == "-: unknown, a phase is missing"


def test_compare_separates_phases_and_follows_a_stage_1_elsewhere(digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    must("train-stage2", "--from", digits_run, "--recipe", "digits/balanced-softmax", "--epochs", 6, "--out", other)
    must("evaluate", "--from", other)
    must("evaluate", "--from", digits_run, "--phase", "stage1")
    must("evaluate", "--from", digits_run, "--phase", "stage2", "--split", "train")
    rows = must("compare", digits_run, other, "--json").json["rows"]
    assert [(row["method"], row["finetune"], row["epochs"]) for row in rows] == [
        ("Balanced Softmax", "before", [4, 2]),
        ("CP-Mix", "before stage 2", [4]),
        ("CP-Mix", "before, train", [4, 2]),
        ("CP-Mix", "after", [4, 2, 1]),
    ]
    assert rows[0]["training_seconds"] is not None
    shutil.rmtree(digits_run)  # what it took is not known any more, what came out is
    (row,) = must("compare", other, "--json").json["rows"]
    assert (row["training_seconds"], row["images_per_second"], row["device"]) == (None, None, None)
    assert (row["method"], row["epochs"], row["conditions"]["init"]) == ("Balanced Softmax", [4, 2], "unknown")
    assert must("compare", other).stdout.splitlines()[-1] == "-: unknown, a phase is missing"


def test_a_changed_table_is_nearer_than_a_missing_one() -> None:
    """Balanced Softmax lacks a table of CP-Mix: one entry of a comparison, but all keys of the table."""
    settings = ["stage2.terms.cp.t=0.7", "stage2.terms.cp.alpha=0.3"]
    found = recognised(load("digits/cpmix", settings=settings), "stage2", "digits", 20)
    assert (found.recipe, found.changed) == ("digits/cpmix", {"stage2.terms.cp.t": 0.7, "stage2.terms.cp.alpha": 0.3})


def test_every_recipe_is_recognised() -> None:
    twins = {"ablation-1": "cross-entropy", "ablation-2": "balanced-softmax"}
    twins |= {"ablation-8": "cpmix", "ablation-9": "cpmix"}
    for name in recipe_names():
        family, _, method = name.rpartition("/")
        recipe = load(name, epochs=20, rho=100, seed=5)
        phase = "finetune" if recipe.finetune else "stage2" if recipe.stage2 else "stage1"
        found = recognised(recipe, phase, family, 100)
        assert found.changed == {}, name
        assert name in found.exact
        assert found.recipe == f"{family}/{twins.get(method, method)}"
    found = recognised(load("cifar100-lt/cpmix", settings=["model.precision=fp32"]), "finetune", "cifar100-lt", 200)
    assert {"cifar100-lt/cpmix", "cifar100-lt/ablation-8", "cifar100-lt/ablation-9"} == set(found.exact)
    # Without its finetune, cRT is cross entropy.
    found = recognised(load("cifar100-lt/crt"), "stage1", "cifar100-lt", 200)
    assert found.recipe == "cifar100-lt/crt"
    assert "cifar100-lt/cross-entropy" in found.exact


def test_a_changed_method_is_named_by_its_keys_or_its_file(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["optimizer.lr=0.05", "data.augment=none", "optimizer.batch_size=32", "optimizer.nesterov=true"]
    some = trained(digits, tmp_path / "some", *PLAIN, "--set", settings[0])
    more = trained(digits, tmp_path / "more", *PLAIN, *setting(*settings))
    recipe, mine = tmp_path / "mine.toml", tmp_path / "run"
    recipe.write_text(load("digits/cross-entropy", settings=settings).to_toml())
    monkeypatch.setattr("sys.argv", ["cpmix", "train-stage1", "--recipe", str(recipe)])  # as typed in a shell
    must("train-stage1", "--data", digits, "--out", mine, "--recipe", recipe, *SHORT, "--seed", 1)
    must("evaluate", "--from", mine)
    first, second = must("compare", some, more, mine, "--json").json["rows"]
    assert (first["method"], first["changed"]) == ("Cross Entropy, optimizer.lr=0.05", {"optimizer.lr": 0.05})
    assert re.fullmatch(r"recipe [0-9a-f]{8}", second["method"])
    assert (second["recipe"], second["n"]) == ("digits/cross-entropy", 2)  # however it was asked for
    lines = must("compare", some, more).stdout.splitlines()
    keys = "data.augment=none, optimizer.batch_size=32, optimizer.lr=0.05, optimizer.nesterov=true"
    assert f"{second['method']}: digits/cross-entropy but for {keys}" in lines
    differ = [line for line in lines if line.startswith("rows 1 and 2 differ in ")]
    assert differ == [
        "rows 1 and 2 differ in data.augment: crop, none; optimizer.nesterov: false, true; optimizer.batch_size: 64, 32"
    ]
    records = csv.DictReader(io.StringIO(must("compare", some, more, "--format", "csv").stdout))
    assert [record["differs"] for record in records] == [
        "data.augment=crop; optimizer.nesterov=false; optimizer.batch_size=64",
        "data.augment=none; optimizer.nesterov=true; optimizer.batch_size=32",
    ]
    assert must("compare", mine, "--json").json["rows"][0]["method"] == "mine"


def method_of(run: Path) -> str:
    (row,) = must("compare", run, "--json").json["rows"]
    return str(row["method"])


def test_a_variant_is_named_by_its_own_recipe(digits: Path, tmp_path: Path) -> None:
    """Not by the recipe that is most similar: without its label rule, the CP-Mix of the digits has 2 of them."""
    run = tmp_path / "run"
    must("train-stage1", "--data", digits, "--out", run, *SHORT)
    label = ("--set", "stage2.terms.cp.label=lambda")
    must("train-stage2", "--from", run, *label)
    must("evaluate", "--from", run)
    assert method_of(run) == "CP-Mix, stage2.terms.cp.label=lambda"
    # The recipe that a run has written still has its name, as in the next command of an interrupted run.
    again = tmp_path / "again"
    must("train-stage1", "--data", digits, "--out", again, "--recipe", run / "stage2" / "recipe.toml")
    must("train-stage2", "--from", again)
    must("evaluate", "--from", again)
    assert method_of(again) == "CP-Mix, stage2.terms.cp.label=lambda"


def test_a_method_of_a_user_has_the_name_of_its_about_table(digits: Path, tmp_path: Path) -> None:
    mine, run = tmp_path / "mine.toml", tmp_path / "run"
    text = 'extends = "digits/cross-entropy"\n[optimizer]\nlr = 0.07\n'
    mine.write_text(text)
    trained(digits, run, "--recipe", mine, *SHORT)
    assert method_of(run) == "mine"
    before = (run / "stage1" / "run.json").read_bytes(), (run / "stage1" / "recipe.toml").read_bytes()
    mine.write_text(text.replace("[", '[about]\nmethod = "Own Loss"\nkind = "loss"\n[', 1))
    # A name changes no result: the run is up to date, and stays as it is.
    assert "up to date" in must("train-stage1", "--data", digits, "--out", run, "--recipe", mine, *SHORT).stdout
    assert before == ((run / "stage1" / "run.json").read_bytes(), (run / "stage1" / "recipe.toml").read_bytes())
    (run / "stage1" / "run.json").unlink()  # as if stopped after its last epoch: it goes on, with its recipe as it is
    must("train-stage1", "--data", digits, "--out", run, "--recipe", mine, *SHORT)
    assert (run / "stage1" / "recipe.toml").read_bytes() == before[1]
    assert method_of(run) == "mine"
    trained(digits, tmp_path / "named", "--recipe", mine, *SHORT)
    assert method_of(tmp_path / "named") == "Own Loss"
    trained(digits, tmp_path / "changed", "--recipe", mine, *SHORT, "--set", "optimizer.momentum=0.8")
    assert method_of(tmp_path / "changed") == "Own Loss, optimizer.momentum=0.8"
    mine.unlink()
    assert method_of(tmp_path / "named") == "Own Loss"
    flags = ("--recipe", "digits/cross-entropy", *SHORT, "--set", "about.method=Flag", "--set", "optimizer.lr=0.07")
    trained(digits, tmp_path / "flag", *flags)
    assert method_of(tmp_path / "flag") == "Flag, optimizer.lr=0.07"


def test_rows_state_how_they_differ(seeds: list[Path], digits: Path, tmp_path: Path) -> None:
    must("build-lt", "digits", "--subset-seed", 3, "--out", tmp_path / "subset")
    runs = [
        seeds[0],
        trained(digits, tmp_path / "bf16", *PLAIN, "--set", "model.precision=bf16"),
        trained(digits, tmp_path / "long", *PLAIN, "--epochs", 4),
        trained(tmp_path / "subset", tmp_path / "other", *PLAIN),
    ]
    must("evaluate", "--from", seeds[0], "--few-inclusive", "--out", tmp_path / "few")
    shutil.copytree(seeds[0], tmp_path / "inclusive")
    shutil.rmtree(tmp_path / "inclusive" / "evaluation")
    shutil.copytree(tmp_path / "few" / "evaluation", tmp_path / "inclusive" / "evaluation")
    refused(3, f"{tmp_path / 'few'} holds evaluations, but not the run that they are of", "compare", tmp_path / "few")
    result = must("compare", *runs, tmp_path / "inclusive", "--json").json
    rows = {Path(row["runs"][0]).name: number for number, row in enumerate(result["rows"], start=1)}
    assert len(rows) == len(result["rows"]) == 5
    assert rows["other"] == 5  # another data set, another table
    (difference,) = result["differences"]
    assert difference["rows"] == [1, 2, 3, 4, 5]
    found = {key: dict(zip(rows, values, strict=True)) for key, values in difference["keys"].items()}
    assert found.keys() == {"data set", "subset", "precision", "schedule.epochs", "few_inclusive"}
    assert found["precision"] == {"ce-0": "fp32", "bf16": "bf16", "long": "fp32", "inclusive": "fp32", "other": "fp32"}
    assert found["schedule.epochs"] == {"ce-0": 3, "bf16": 3, "long": 4, "inclusive": 3, "other": 3}
    assert {run for run, value in found["few_inclusive"].items() if value} == {"inclusive"}
    lines = must("compare", seeds[0], runs[1]).stdout.splitlines()
    assert "rows 1 and 2 differ in precision: fp32, bf16" in lines
    lines = must("compare", *runs[:3]).stdout.splitlines()
    differ = "precision: fp32 (1, 3), bf16 (2); schedule.epochs: 3 (1, 2), 4 (3)"
    assert f"rows 1, 2 and 3 differ in {differ}" in lines
    lines = must("compare", seeds[0], runs[3]).stdout.splitlines()
    titles = [line for line in lines if line.endswith(", per cent")]
    assert titles == ["digits-lt-rho20, per cent", "digits-lt-rho20-seed3, per cent"]


def test_evaluations_under_other_conditions_get_their_own_rows(seeds: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(seeds[1], tmp_path / "run"))
    must("evaluate", "--from", run, "--phase", "stage1", "--test-distribution", "forward", "--ratio", 5)
    must("evaluate", "--from", run, "--phase", "stage1", "--set", "evaluation.logit_adjustment=1")
    must("evaluate", "--from", run, "--phase", "stage1", "--label", "again")
    stages = [row["finetune"] for row in must("compare", run, "--json").json["rows"]]
    assert stages == ["before", "before, again", "before, forward-5", "before, logit-adjustment-1", "after"]
    assert must("compare", run / "finetune", "--json").json["rows"][0]["finetune"] == "after"
    line = must("compare", run).stdout.split("training\n")[1].splitlines()[2]
    assert line.startswith("1, 2, 3 and 4  ")


def test_one_run_given_twice_counts_once(seeds: list[Path], tmp_path: Path) -> None:
    twin = shutil.copytree(seeds[0], tmp_path / "twin")
    result = must("compare", seeds[0], f"{seeds[0]}/", twin, seeds[2], seeds[2] / "stage1", "--json")
    assert [row["n"] for row in result.json["rows"]] == [2]
    assert f"compare: {seeds[0]} is given twice, and counted once" in result.stderr
    what = "(Cross Entropy, finetune before): counted once"
    assert f"compare: {twin} holds a checkpoint of {seeds[0]} {what}" in result.stderr
    assert f"compare: {seeds[2]} is given twice {what}" in result.stderr


def test_two_runs_of_one_seed_are_noted(seeds: list[Path]) -> None:
    (measured,), _ = evaluations_of(seeds[0], None)
    row = ComparisonRow([measured, replace(measured, checkpoint="other")])
    lines = _accuracy_lines([(4, row)], with_deviations=True)
    assert lines[1:] == ["row 4 has several runs of seed 0: its +- is not that of 2 seeds"]
    assert lines[0] == "+-: sample standard deviation of n runs"


def test_stale_and_older_evaluations_are_left_out(digits: Path, digits_run: Path) -> None:
    must("evaluate", "--from", digits_run, "--phase", "stage1")
    must("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 7, "--overwrite")
    evaluation, why = digits_run / "evaluation", "finetune is stale (stage1 was trained again since)"
    said = (
        f"warning: {evaluation}/stage1 is left out: it is of an older checkpoint of stage1",
        f"warning: {evaluation}/finetune is left out: {why}",
        f"error: no evaluation of use in {digits_run}\n",
        f"fix: cpmix status {digits_run}\n",
    )
    refused(3, said, "compare", digits_run)
    must("evaluate", "--from", digits_run, "--phase", "stage1")
    result = must("compare", digits_run, "--json")
    assert [row["finetune"] for row in result.json["rows"]] == ["before stage 2"]
    assert result.json["left_out"] == [f"{evaluation}/finetune is left out: {why}"]
    for name in ("run.json", "model.safetensors"):
        (digits_run / "stage1" / name).unlink()
    refused(3, "stage1 is being trained again", "compare", digits_run)


def test_unusable_folders_are_refused_or_left_out(
    digits: Path, toy_run: Path, seeds: list[Path], tmp_path: Path
) -> None:
    for folder, message in ((tmp_path / "none", "no run folder"), (digits, "holds no phase of a run")):
        error = refused(3, (), "compare", seeds[0], folder, "--json").json["error"]
        assert message in error and "needed by: compare" in error
    shutil.rmtree(toy_run / "evaluation")
    assert refused(3, (), "compare", toy_run / "stage2").stderr == (
        f"warning: {toy_run} is left out: it holds no evaluation of stage2\n"
        f"error: no evaluation of use in {toy_run / 'stage2'}\n  needed by: compare\n"
        f"  fix: cpmix status {toy_run / 'stage2'}\n"
    )
    result = must("compare", seeds[0], toy_run, "--json")  # one that is not evaluated does not take the others away
    assert result.json["left_out"] == [f"{toy_run} is left out: it holds no evaluation"]
    assert {run for row in result.json["rows"] for run in row["runs"]} == {str(seeds[0])}


def test_damaged_or_renamed_evaluations_are_refused(seeds: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(seeds[0], tmp_path / "run"))
    metrics = run / "evaluation" / "stage1" / "metrics.json"
    text = metrics.read_text()
    metrics.write_text(text.replace("top1", "top2"))
    refused(3, f"{metrics} is damaged", "compare", run)
    metrics.write_text(text)
    (run / "evaluation" / "stage1").rename(run / "evaluation" / "stage1-mine")
    refused(3, "is the record of evaluation/stage1, not of evaluation/stage1-mine", "compare", run)


def test_one_bad_evaluation_does_not_take_the_others_away(seeds: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(seeds[0], tmp_path / "run"))
    must("evaluate", "--from", run, "--phase", "stage1", "--label", "nan")
    metrics = run / "evaluation" / "stage1-nan" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"top1": ', '"top1": NaN, "was": '))
    result = must("compare", run, seeds[0], "--json")
    assert [line.split(" is left out: ")[0] for line in result.json["left_out"]] == [str(metrics.parent)]
    assert f"{metrics} is damaged" in result.stderr and "; to repair it: run the evaluate command" in result.stderr


TOTALS_1 = [473.45, 513.04, 506.14, 420.3, 353.28, 151.7, 535.09, 422.1, 267.8, 541.47, 163.2, 167.3, 421.9, 541.52]
TOTALS_2 = [142.3, 159.8, 108.5, 117.2, 164.7, 119.1, 119.1, 127.1, 127.6, 168.3, 129.0, 113.8, 130.3, 168.5, 130.3]
OF_ROWS = {
    "table1": [*TOTALS_1, 548.87],
    "table2": TOTALS_2,
    "table3": [34.84, 38.01, 36.48, 37.21, 41.28, 41.26, 40.26, 42.77, 43.56],
    "table4": [45.5, 50.6, 46.8, 48.9, 51.8, 51.9, 52.3, 52.9, 53.9],
}


def test_tables_of_the_paper_have_the_published_sums() -> None:
    """Sums of columns and, of Tables 1 and 2, of rows."""
    sums = {
        "table1": (15, [328.21, 699.29, 760.69, 845.83, 531.95, 966.16, 921.86, 973.17]),
        "table2": (15, [686.0, 274.7, 1064.9]),
        "table3": (9, [355.67]),
        "table4": (9, [454.6]),
        "table7": (5, [310.6, 236.9, 145.0, 252.4]),
        "table8": (4, [174.9, 154.7, 118.8, 154.3]),
        "table9": (4, [271.4, 276.9, 270.5, 273.6]),
    }
    assert PAPER_TABLES.keys() == sums.keys()
    for key, (num_rows, totals) in sums.items():
        table = PAPER_TABLES[key]
        assert len(table.rows) == num_rows
        columns = zip(*(row.cells for row in table.rows), strict=True)
        assert [round(sum(float(cell) for cell in column if cell), 2) for column in columns] == totals, key
        assert all(f"cifar100-lt/{row.recipe}" in recipe_names() for row in table.rows)
    rows = {key: {row.name: row for row in table.rows} for key, table in PAPER_TABLES.items()}
    for key, totals in OF_ROWS.items():
        assert [round(sum(float(cell) for cell in row.cells if cell), 2) for row in rows[key].values()] == totals, key
    assert rows["table7"]["MiSLAS"].cells == ["61.7", "51.3", "35.8", "52.7"]
    assert rows["table9"]["CP-Mix"].cells == ["57.9", "72.9", "75.3", "72.3"]
    assert rows["table1"]["MiSLAS"].cells == [None, "47.0", "52.3", "63.2", None, "82.1", "85.7", "90.0"]
    copied = {key: [name for name, row in found.items() if row.copied] for key, found in rows.items()}
    assert (copied["table7"], copied["table8"], copied["table9"], copied["table3"]) == (["MiSLAS"], ["MiSLAS"], [], [])
    assert "LADE" in copied["table2"]
    assert not {"CP-Mix", "CP-Mix+RIDE", "RIDE", "Cross Entropy"} & set(copied["table2"])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CP-Mix on ten classes in CIFAR's shape, 3 of 300 epochs, before and after its finetune."""
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(folder)
    must("build-lt", "cifar10", "--rho", 10, "--data-root", folder, "--out", folder / "lt")
    run = folder / "run"
    must("train-stage1", "--data", folder / "lt", "--recipe", "cifar10-lt/cpmix", "--out", run, *SHORT)
    must("train-stage2", "--from", run)
    must("evaluate", "--from", run)
    must("finetune", "--from", run)
    must("evaluate", "--from", run)
    return run


def test_compare_shows_the_difference_to_the_paper(cifar: Path) -> None:
    top1 = numbers(cifar, "finetune")["top1"]
    lines = must("compare", cifar).stdout.splitlines()
    assert lines[1].split()[-2:] == ["paper", "diff"]
    assert lines[3].split()[-2:] == ["-", "-"]
    assert lines[4].split()[-2:] == ["89.87", f"{top1 - 89.87:+.2f}"]
    assert lines[5:7] == [
        "paper: top-1 in its Tables 1 to 4",
        "row 2: 3 of 300 epochs; diff is to the paper's full training",
    ]
    row = must("compare", cifar, "--json").json["rows"][1]
    assert (row["paper"], row["paper_copied"], row["epochs"], row["full_epochs"]) == (89.87, False, [2, 1, 1], 300)
    assert row["difference"] == pytest.approx(top1 - 89.87)


def test_copied_numbers_are_marked(cifar: Path) -> None:
    (_, measured), _ = sorted_evaluations(cifar)
    method = replace(measured.method, exact=("cifar10-lt/mislas",))
    row = ComparisonRow([replace(measured, method=method, numbers=measured.numbers.model_copy(update={"top1": 90.5}))])
    assert _accuracy_sheet("data", [(1, row)], with_deviations=False).rows[0][-2:] == ["90.0*", "+0.50"]
    assert _accuracy_lines([(1, row)], with_deviations=False)[1].startswith("* copied there from other papers: ")
    early = ComparisonRow([replace(row.first, forms=frozenset({False}))])  # the paper's MiSLAS is the finetuned one
    assert early.published() is None
    other = ComparisonRow([replace(row.first, data="cifar10-lt-rho10-seed1")])
    assert other.published() is None


def test_compare_paper_adds_our_rows_to_a_table(cifar: Path, seeds: list[Path]) -> None:
    result = must("compare", cifar, seeds[0], "--paper", "table1")
    top1 = numbers(cifar, "finetune")["top1"]
    lines = result.stdout.splitlines()
    assert lines[1].split()[:3] == ["method", "C100", "200"]
    paper = [line for line in lines[3:33] if " paper " in line]
    assert [re.split(r"  +", line)[0] for line in paper] == [
        row.name + "*" * row.copied for row in PAPER_TABLES["table1"].rows
    ]
    at = lines.index(paper[13]) + 1
    assert paper[13].split() == ["CP-Mix", "paper", *PAPER_TABLES["table1"].rows[13].printed.split()]
    assert lines[at].split() == ["ours", f"{top1:.2f}", "a"]
    assert len(lines[at]) == len(lines[1])  # in the last column
    assert all(line.split() == ["ours"] for line in lines[4:33:2] if line != lines[at])
    assert lines[33] == "a: 1 run of 3 of 300 epochs"
    assert lines[34].startswith("* copied there from other papers: ")
    assert lines[-1].startswith("OTMix+RIDE: ")
    assert "compare: in no cell of table1: CP-Mix, finetune before, cifar10-lt-rho10" in result.stderr
    assert f"Cross Entropy, finetune before, digits-lt-rho20 ({seeds[0]})" in result.stderr

    cells = must("compare", cifar, "--paper", "table1", "--json").json["cells"]
    assert len(cells) == 15 * 8
    ours = [cell for cell in cells if cell["n"]]
    assert [(c["method"], c["column"], c["paper"], c["ours_mean"]) for c in ours] == [("CP-Mix", "C10 10", 89.87, top1)]
    assert (ours[0]["epochs"], ours[0]["full_epochs"], ours[0]["runs"]) == (3, 300, str(cifar))
    records = list(csv.DictReader(io.StringIO(must("compare", cifar, "--paper", "table1", "--format", "csv").stdout)))
    assert len(records) == 15 * 8
    assert sum(record["ours_mean"] != "" for record in records) == 1
    for key in PAPER_TABLES:
        text = must("compare", cifar, "--paper", key).stdout
        assert text.count("ours") == len(PAPER_TABLES[key].rows)


def test_several_runs_in_one_cell_are_listed_with_notes(cifar: Path) -> None:
    (_, measured), _ = sorted_evaluations(cifar)
    longer = replace(measured, run=Path("longer"), conditions=measured.conditions | {"schedule.epochs": 30})
    whole, seed = (
        replace(measured, run=Path(run), full_epochs=None, numbers=measured.numbers.model_copy(update={"top1": top1}))
        for run, top1 in (("whole", 12.5), ("seed", 14.5))
    )
    sheet = _paper_sheet(
        PAPER_TABLES["table1"], [ComparisonRow(runs) for runs in ([measured], [longer], [whole, seed])]
    )
    top1 = f"{measured.numbers.top1:.2f}"
    assert sheet.rows[27] == ["", "ours", *[""] * 7, f"{top1} a / {top1} b / 13.50 +- 1.41 c"]
    assert sheet.lines[:3] == [
        f"a: 1 run of 3 of 300 epochs, {cifar}",
        "b: 1 run of 30 of 300 epochs, longer",
        "c: 2 runs, whole",
    ]


def sorted_evaluations(run: Path) -> tuple[list[EvaluatedRun], list[str]]:
    """The evaluations of a run, before the finetune and after."""
    found, left_out = evaluations_of(run, None)
    return sorted(found, key=lambda measured: measured.stage, reverse=True), left_out


def test_a_note_states_if_classes_of_20_images_are_medium(cifar: Path) -> None:
    """Table 8 counts classes of exactly 20 training images as few."""
    (_, measured), _ = sorted_evaluations(cifar)
    method = replace(measured.method, exact=("places-lt/cpmix",))
    ours = replace(measured, data="places-lt", method=method, full_epochs=None)
    inclusive = replace(ours, conditions=ours.conditions | {"few_inclusive": True})
    lines = _paper_sheet(PAPER_TABLES["table8"], [ComparisonRow([ours])]).lines
    assert lines[:2] == ["a: 1 run, classes of 20 images are medium", "b: 1 run"]
    assert _paper_sheet(PAPER_TABLES["table8"], [ComparisonRow([inclusive])]).lines[0] == "a: 1 run"


ODD = Sheet(
    "a_b & 50 %", ["name", ">top-1"], [["x|y_{1}\n*<z>", "1.00 +- 0.50"], ["[1] ~^\\$#", "-2.50"]], ["+- & 3 %"]
)


def test_markdown_escapes_special_characters() -> None:
    assert markdown(ODD) == [
        "**a\\_b & 50 %**",
        "",
        "| name | top-1 |",
        "| --- | ---: |",
        r"| x\|y\_{1} \*\<z> | 1.00 ± 0.50 |",
        r"| \[1\] ~^\\$# | -2.50 |",
        "",
        "- ± & 3 %",
    ]


def test_latex_escapes_special_characters() -> None:
    assert latex(ODD) == [
        r"\begin{table}",
        r"  \centering",
        r"  \caption{a\_b \& 50 \%}",
        r"  \begin{tabular}{lr}",
        r"  \toprule",
        r"  name & top-1 \\",
        r"  \midrule",
        r"  x\textbar{}y\_\{1\} *\textless{}z\textgreater{} & 1.00 $\pm$ 0.50 \\",
        r"  {[1] \textasciitilde{}\textasciicircum{}\textbackslash{}\$\#} & $-$2.50 \\",
        r"  \bottomrule",
        r"  \end{tabular}",
        r"  \par\footnotesize $\pm$ \& 3 \%",
        r"\end{table}",
    ]


def test_plain_text_is_aligned_and_csv_is_quoted() -> None:
    lines = plain(replace(ODD, rows=[["x", "1.00"]]))
    assert lines == ["a_b & 50 %", "name  top-1", "----  -----", "x      1.00", "+- & 3 %"]
    assert csv_text([{"a": 1, "b": None}, {"a": "x,y", "b": 0.5}]) == ["a,b", "1,", '"x,y",0.5']
    assert [_letter_of(n) for n in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]
    assert [_listed(n) for n in ([1], [1, 2], [1, 2, 4])] == ["1", "1 and 2", "1, 2 and 4"]


def test_every_format_shows_the_same_numbers_of_real_runs(seeds: list[Path], tmp_path: Path) -> None:
    rows = must("compare", *seeds, "--json").json["rows"]
    records = list(csv.DictReader(io.StringIO(must("compare", *seeds, "--format", "csv").stdout)))
    assert [float(record["top1_mean"]) for record in records] == [row["top1"]["mean"] for row in rows]
    assert [record["top1_std"] for record in records] == [str(rows[0]["top1"]["std"]), ""]
    assert [(r["seeds"], r["epochs"], r["paper"]) for r in records] == [("0 1 2", "3", ""), ("1", "3+1", "")]
    assert [record["differs"] for record in records] == ["", ""]  # two methods
    piped = must("compare", *seeds, "--format", "markdown").stdout.splitlines()
    first = [line for line in piped[: piped.index("**paired differences, per cent points**")] if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in first} == {10}
    assert first[2].count("±") == 5  # in all columns
    tex = must("compare", *seeds, "--format", "latex").stdout
    assert tex.startswith("% \\usepackage{booktabs}\n\\begin{table}\n")
    assert tex.count("\\toprule") == tex.count("\\bottomrule") == tex.count("\\end{table}") == 4
    bodies = re.findall(r"tabular}{([lr]+)}(.*?)\\end{tabular}", tex, re.S)
    for columns, body in bodies:
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines() if " & " in line} == {len(columns) - 1}


def test_out_is_written_whole_and_never_over_another_file(seeds: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "table.md"
    shown = must("compare", *seeds, "--format", "markdown").stdout
    assert must("compare", *seeds, "--format", "markdown", "--out", out).stdout == f"done: {out}\n"
    assert out.read_text() == shown
    assert files(tmp_path) == ["deep/table.md"]
    refused(4, f"{out} exists", "compare", *seeds, "--out", out)
    assert out.read_text() == shown
    for form in ("csv", "latex", "table", "json", "markdown"):  # each over the one before
        must("compare", *seeds, "--format", form, "--out", out, "--overwrite")
        must("compare", *seeds, "--format", form, "--paper", "table1", "--out", out, "--overwrite")
    notes = tmp_path / "notes.md"
    notes.write_text("two years of work")
    result = refused(4, f"{notes} exists", "compare", *seeds, "--out", notes, "--overwrite")
    assert fix_of(result) == "write elsewhere, or move it away first, because cpmix did not write it"
    assert notes.read_text() == "two years of work"
    result = must("compare", *seeds, "--json", "--out", out, "--overwrite")
    assert result.json == {"command": "compare", "status": "done", "file": str(out)}
    assert json.loads(out.read_text()) == must("compare", *seeds, "--json").json
