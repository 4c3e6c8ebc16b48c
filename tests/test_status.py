"""status and recipes: what stands where, and the command that goes on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import cpmix, files, must

from cpmix_cli.recipe import load, recipe_names


def follow(command: str) -> None:
    """Type a command that cpmix has printed."""
    words = shlex.split(command.removeprefix("next: "))
    assert words[0] == "cpmix"
    must(*words[1:])


def test_a_finished_run(digits_run: Path) -> None:
    before = {name: (digits_run / name).read_bytes() for name in files(digits_run)}
    result = cpmix("status", digits_run, "--json")
    assert result.code == 0
    assert result.json["status"] == "done"
    (run,) = result.json["runs"]
    assert run["run"] == str(digits_run)
    assert [(p["phase"], p["status"]) for p in run["phases"]] == [
        ("stage1", "done"),
        ("stage2", "done"),
        ("finetune", "done"),
    ]
    for phase in run["phases"]:
        assert phase["epochs"] == phase["total_epochs"] > 0
        evaluation = digits_run / "evaluation" / phase["phase"] / "metrics.json"
        expected = json.loads(evaluation.read_text())["top1"] if evaluation.exists() else None
        assert phase["top1"] == expected
    assert {name: (digits_run / name).read_bytes() for name in files(digits_run)} == before


def test_the_printed_commands_lead_from_stage1_to_the_report(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    must("train-stage1", "--data", toy, "--out", run, "--epochs", 2, "--recipe", "toy/balanced-softmax")
    seen = []
    for _ in range(5):
        result = cpmix("status", run)
        following = [line for line in result.stdout.splitlines() if line.startswith("next: ")]
        seen.append((result.code, [line.split()[2] for line in following]))
        if not following:
            break
        follow(following[0])
    assert seen == [(75, ["train-stage2"]), (0, ["evaluate"]), (0, ["confusion-report"]), (0, [])]
    lines = result.stdout.splitlines()
    assert [line.removeprefix(str(run)).split()[:3] for line in lines[2:]] == [["stage1", "done", "1/1"], ["stage2", "done", "1/1"]]


def test_a_stale_phase(toy_run: Path) -> None:
    stage1 = toy_run / "stage1" / "recipe.toml"
    changed = load(str(stage1)).to_toml().replace("seed = 0", "seed = 5")
    stage1.with_name("seed5.toml").write_text(changed)
    data = json.loads((toy_run / "stage1" / "run.json").read_text())["dataset"]["absolute"]
    again = [
        "train-stage1",
        "--data",
        data,
        "--out",
        toy_run,
        "--recipe",
        stage1.with_name("seed5.toml"),
        "--overwrite",
    ]
    must(*again)
    result = cpmix("status", toy_run)
    assert result.code == 75
    assert "stale (stage1 was trained again since)" in result.stdout
    (following,) = [line for line in result.stdout.splitlines() if line.startswith("next: ")]
    assert following == f"next: cpmix train-stage2 --from {toy_run} --overwrite"
    follow(following)
    assert cpmix("status", toy_run, "--json").json["runs"][0]["phases"][1]["status"] == "done"


def test_a_second_run_from_one_stage1(digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    must("train-stage2", "--from", digits_run, "--set", "stage2.terms.cp.partner=random", "--out", other)
    result = cpmix("status", digits_run, other, "--json")
    assert result.code == 75
    phases = result.json["runs"][1]["phases"]
    assert [(p["phase"], p["status"]) for p in phases] == [
        ("stage1", "elsewhere"),
        ("stage2", "done"),
        ("finetune", "absent"),
    ]
    assert phases[0]["because"] == f"in {digits_run}"
    assert result.json["runs"][1]["next"] == f"cpmix finetune --from {other}"
    shutil.rmtree(digits_run)  # the second run is complete without the first
    follow(result.json["runs"][1]["next"])
    assert cpmix("status", other).code == 0


@pytest.mark.parametrize("phase", ["stage1", "stage2"])
def test_the_printed_command_goes_on_with_an_interrupted_phase(phase: str, digits: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    command = ["train-stage1", "--data", str(digits), "--out", str(run), "--epochs", "90"]
    if phase == "stage2":
        must(*command)
        command = ["train-stage2", "--from", str(run), "--out", str(other)]
    at = "epoch=3/" if phase == "stage1" else "epoch=63/"
    with subprocess.Popen([sys.executable, "-m", "cpmix_cli", *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if at in line:
                os.kill(process.pid, signal.SIGTERM)
                break
        process.stderr.read()
    assert process.returncode == 75
    place = run if phase == "stage1" else other
    result = cpmix("status", place, "--json")
    assert result.code == 75
    (found,) = [p for p in result.json["runs"][0]["phases"] if p["phase"] == phase]
    assert found["status"] == "interrupted"
    assert 3 <= found["epochs"] < found["total_epochs"]
    follow(result.json["runs"][0]["next"])
    assert cpmix("status", place, "--json").json["runs"][0]["phases"][phase == "stage2"]["status"] == "done"


def test_folders_that_are_no_runs(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "no run folder"), (digits, "holds no phase of a run")):
        result = cpmix("status", folder, "--json")
        assert result.code == 3
        assert message in result.json["error"]
    record = digits_run / "stage2" / "run.json"
    record.write_text(record.read_text().replace('"epochs"', '"epoch"'))
    result = cpmix("status", digits_run)
    assert result.code == 3
    assert f"{record} was changed after it was written" in result.stderr


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_what_they_are() -> None:
    listed = must("recipes", "--json").json["recipes"]
    assert [entry["name"] for entry in listed] == recipe_names()
    assert all(len(entry["description"]) > 20 for entry in listed)
    lines = must("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == recipe_names()


def test_a_recipe_is_shown_resolved_and_can_be_used(tmp_path: Path) -> None:
    shown = must("recipes", "digits/cpmix", "--epochs", 6, "--seed", 3, "--set", "optimizer.lr=0.05").stdout
    assert tomllib.loads(shown)["optimizer"]["lr"] == 0.05
    (tmp_path / "mine.toml").write_text(shown)
    mine = load(str(tmp_path / "mine.toml"))
    assert mine == load("digits/cpmix", settings=["optimizer.lr=0.05"], epochs=6, seed=3)
    fields = must("recipes", tmp_path / "mine.toml", "--json").json
    assert fields["recipe"] == mine.tables()


def test_two_recipes_are_told_apart() -> None:
    lines = must("recipes", "digits/cpmix", "digits/balanced-softmax").stdout.splitlines()
    assert lines == ["stage2.terms.cp: (table) -> (none)", "stage2.terms.mix: (table) -> (none)"]
    assert must("recipes", "toy/cpmix", "toy/cpmix").stdout == "no difference\n"
    result = cpmix("recipes", "digits/cp-mix", "toy/cpmix")
    assert result.code == 2
    assert 'Did you mean "digits/cpmix"?' in result.stderr
