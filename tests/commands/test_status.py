"""status and recipes: what stands where, and the command that goes on."""

import json
import shlex
import shutil
import signal
import tomllib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import Result, cpmix, fix_of, flip, must, refused, signalled, unchanged

from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.runtime.text import sparkline


def follow(command: str) -> None:
    """Type a command that cpmix has printed."""
    words = shlex.split(command.removeprefix("next: "))
    assert words[0] == "cpmix"
    must(*words[1:])


def next_of(run: Path) -> str:
    """The one command that status prints for a run that can go on."""
    (following,) = printed(refused(75, (), "status", run))
    return following


def printed(result: Result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith("next: ")]


def phases_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cpmix("status", run, "--json").json["runs"][0]["phases"]
    return found


def test_the_table_shows_finished_and_unfinished_runs(digits_run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "my run"  # a shell would take this for two words
    shutil.copytree(digits_run / "stage1", begun / "stage1")
    top1 = f"{json.loads((digits_run / 'evaluation/finetune/metrics.json').read_text())['top1']:.2f}"
    result = refused(75, (), "status", digits_run, begun)
    width = len(str(begun))
    finished = str(digits_run).ljust(width)
    assert result.stdout.splitlines() == [
        f"{'run'.ljust(width)}  phase     status  epochs  top-1",
        f"{'-' * width}  --------  ------  ------  -----",
        f"{finished}  stage1    done       4/4      -",
        f"{finished}  stage2    done       2/2      -",
        f"{finished}  finetune  done       1/1  {top1}",
        f"{begun}  stage1    done       4/4      -",
        f"{begun}  stage2    absent     0/2      -",
        f"{begun}  finetune  absent     0/1      -",
        "",
        f"next: cpmix train-stage2 --from '{begun}'",
    ]
    assert must("status", digits_run).stdout.endswith(f"done       1/1  {top1}\n")
    follow(next_of(begun))
    assert next_of(begun) == f"next: cpmix finetune --from '{begun}'"


def test_status_shows_a_finished_run_as_done_and_changes_nothing(digits_run: Path) -> None:
    with unchanged(digits_run):
        found = must("status", digits_run, "--json").json
    assert found["status"] == "done"
    (run,) = found["runs"]
    assert run["run"] == str(digits_run)
    phases = [(p["phase"], p["status"]) for p in run["phases"]]
    assert phases == [("stage1", "done"), ("stage2", "done"), ("finetune", "done")]
    for phase in run["phases"]:
        assert phase["epochs"] == phase["total_epochs"] > 0
        evaluation = digits_run / "evaluation" / phase["phase"] / "metrics.json"
        expected = json.loads(evaluation.read_text())["top1"] if evaluation.exists() else None
        assert phase["top1"] == expected


@pytest.mark.slow
def test_the_printed_commands_lead_from_stage1_to_the_report(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    must("train-stage1", "--data", toy, "--out", run, "--epochs", 2, "--recipe", "toy/balanced-softmax")
    seen = []
    for _ in range(5):
        result = cpmix("status", run)
        following = printed(result)
        seen.append((result.code, [line.split()[2] for line in following]))
        if not following:
            break
        follow(following[0])
    assert seen == [(75, ["train-stage2"]), (0, ["evaluate"]), (0, ["confusion-report"]), (0, [])]
    lines = [line.removeprefix(str(run)).split()[:3] for line in result.stdout.splitlines()[2:]]
    assert lines == [["stage1", "done", "1/1"], ["stage2", "done", "1/1"]]


def test_a_stale_phase_is_rerun_by_its_own_recipe(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "random"
    must("train-stage2", "--from", digits_run, "--set", "stage2.terms.cp.partner=random", "--out", other)
    again = ["train-stage1", "--data", digits, "--out", digits_run, "--overwrite"]
    must(*again, "--epochs", 6)
    recipe = other / "stage2" / "recipe.toml"
    command = f"next: cpmix train-stage2 --from {digits_run} --out {other} --recipe {recipe} --overwrite"
    assert next_of(other) == command
    follow(command)
    assert load(str(recipe)).tables()["stage2"]["terms"]["cp"]["partner"] == "random"

    must(*again, "--epochs", 6, "--seed", 5)
    assert next_of(other) == f"{command.removesuffix(' --overwrite')} --seed 5 --overwrite"
    follow(next_of(other))
    trained = load(str(recipe)).tables()
    assert (trained["seed"], trained["stage2"]["terms"]["cp"]["partner"]) == (5, "random")

    must(*again, "--epochs", 6, "--set", "optimizer.lr=0.05")  # now neither recipe fits: no CP-Mix under this name
    refused(3, "optimizer.lr: 0.05 -> 0.1", *shlex.split(next_of(other))[2:])


def test_stage1_trained_again_makes_later_phases_stale(digits: Path, digits_run: Path) -> None:
    again = ["train-stage1", "--data", digits, "--out", digits_run, "--overwrite"]
    must(*again, "--epochs", 12)
    found = [(p["status"], p["epochs"], p["total_epochs"]) for p in phases_of(digits_run)]
    assert found == [("done", 8, 8), ("stale", 2, 2), ("stale", 1, 1)]
    assert "stale (stage1 was trained again since)" in cpmix("status", digits_run).stdout
    assert next_of(digits_run) == f"next: cpmix train-stage2 --from {digits_run} --overwrite"
    must(*again, "--epochs", 4, "--recipe", "digits/cross-entropy")
    assert next_of(digits_run) == f"next: cpmix finetune --from {digits_run} --overwrite"  # stage 2 is no part of it
    follow(next_of(digits_run))
    (run,) = must("status", digits_run, "--json").json["runs"]
    assert [p["status"] for p in run["phases"]] == ["done", "stale", "done"]
    assert run["next"] == f"cpmix evaluate --from {digits_run}"


def test_status_finds_the_stage1_of_another_run(digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    must("train-stage2", "--from", digits_run, "--set", "stage2.terms.cp.partner=random", "--out", other)
    result = refused(75, (), "status", digits_run, other, "--json")
    phases = result.json["runs"][1]["phases"]
    found = [(p["phase"], p["status"]) for p in phases]
    assert found == [("stage1", "elsewhere"), ("stage2", "done"), ("finetune", "absent")]
    assert phases[0]["because"] == f"in {digits_run}"
    assert result.json["runs"][1]["next"] == f"cpmix finetune --from {other}"
    shutil.rmtree(digits_run)  # the second run is complete without the first
    follow(result.json["runs"][1]["next"])
    assert cpmix("status", other).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["stage1", "stage2"])
@pytest.mark.long
def test_the_printed_command_resumes_an_interrupted_phase(phase: str, digits: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    command = ["train-stage1", "--data", str(digits), "--out", str(run), "--epochs", "90"]
    if phase == "stage2":
        must(*command)
        command = ["train-stage2", "--from", str(run), "--out", str(other)]
    at = "epoch=3/" if phase == "stage1" else "epoch=63/"
    assert signalled(signal.SIGTERM, at, *command).code == 75
    place = run if phase == "stage1" else other
    (found,) = [p for p in phases_of(place) if p["phase"] == phase]
    assert found["status"] == "interrupted"
    assert 3 <= found["epochs"] < found["total_epochs"]
    follow(next_of(place))
    assert phases_of(place)[phase == "stage2"]["status"] == "done"


@pytest.mark.slow
def test_all_commands_name_the_same_next_command(digits: Path, tmp_path: Path) -> None:
    run, phases = tmp_path / "run", ("stage1", "stage2", "finetune")
    commands = [("train-stage1", "--data", digits, "--out", run, "--epochs", 6)]
    commands += [("train-stage2", "--from", run), ("finetune", "--from", run)]
    for phase, command in zip(phases, commands, strict=True):
        ahead = must(*command).stderr.splitlines()[-1]
        for name in ("evaluate", "confusion-report") if phase != "finetune" else ():
            assert must(name, "--from", run).stderr.splitlines()[-1] == ahead == next_of(run)
    assert ahead == f"next: cpmix evaluate --from {run}"
    for _ in range(2):  # also if it is up to date
        assert must("evaluate", "--from", run).stderr.splitlines()[-1] == f"next: cpmix confusion-report --from {run}"
    asked = must("evaluate", "--from", run, "--phase", "stage1").stderr.splitlines()[-1]
    assert asked == f"next: cpmix confusion-report --from {run} --phase stage1"
    assert "next: " not in must("confusion-report", "--from", run).stderr
    assert "next: " not in must("status", run).stdout


def test_next_commands_keep_the_place_of_a_moved_data_set(digits: Path, tmp_path: Path) -> None:
    data, moved, run = tmp_path / "data", tmp_path / "elsewhere" / "data", tmp_path / "run"
    shutil.copytree(digits, data)
    must("train-stage1", "--data", data, "--out", run, "--epochs", 6)
    moved.parent.mkdir()
    data.rename(moved)
    trained = must("evaluate", "--from", run, "--data", moved).stderr.splitlines()[-1]
    assert trained == f"next: cpmix train-stage2 --from {run} --data {moved}"
    report = ("confusion-report", "--from", run, "--data", moved)
    assert must(*report).stderr.splitlines()[-1] == trained
    labelled = must("evaluate", "--from", run, "--data", moved, "--label", "again").stderr.splitlines()[-1]
    assert labelled == f"next: cpmix misclassified --from {run} --phase stage1 --label again --data {moved}"
    for line in (labelled, trained):
        follow(line)
    assert next_of(run) == f"next: cpmix finetune --from {run}"  # stage 2 recorded the new place


def test_an_interrupted_phase_restarts_if_its_input_was_retrained(digits: Path, digits_run: Path) -> None:
    (digits_run / "stage2" / "run.json").unlink()  # as if stopped after its last epoch
    recipe = digits_run / "stage2" / "recipe.toml"
    assert next_of(digits_run) == f"next: cpmix train-stage2 --from {digits_run} --recipe {recipe}"
    must("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 5, "--overwrite")
    phase = phases_of(digits_run)[1]
    assert (phase["status"], phase["because"]) == ("interrupted", "stage1 was trained again since")
    assert next_of(digits_run) == f"next: cpmix train-stage2 --from {digits_run} --overwrite"
    follow(next_of(digits_run))
    assert phases_of(digits_run)[1]["status"] == "done"


def test_the_next_command_completes_the_source_phase_first(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    must("train-stage2", "--from", digits_run, "--out", other)
    (digits_run / "stage1" / "run.json").unlink()
    result = cpmix("status", other, "--json").json["runs"][0]
    assert result["phases"][1]["because"] == "stage1 is being trained again"
    recipe = digits_run / "stage1" / "recipe.toml"
    assert result["next"] == f"cpmix train-stage1 --data {digits} --out {digits_run} --recipe {recipe}"
    follow(result["next"])
    assert next_of(other) == f"next: cpmix finetune --from {other}"  # stage 1 ended in the same bytes
    for name in ("run.json", "training_state.safetensors"):  # begun again, and killed before anything was saved
        (digits_run / "stage1" / name).unlink()
    recipe = other / "stage2" / "recipe.toml"
    assert next_of(other) == f"next: cpmix train-stage1 --data {digits} --out {digits_run} --recipe {recipe}"
    for _ in range(2):  # stage 1, then stage 2, which started from the stage 1 that was deleted
        follow(next_of(other))
    assert next_of(other) == f"next: cpmix finetune --from {other}"


def test_the_next_command_names_data_that_only_the_interrupted_phase_knows(digits: Path, tmp_path: Path) -> None:
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(digits, here)
    must("train-stage1", "--data", here, "--out", run, "--epochs", 6)
    here.rename(there)
    must("train-stage2", "--from", run, "--data", there)
    (run / "stage2" / "run.json").unlink()
    recipe = run / "stage2" / "recipe.toml"
    assert next_of(run) == f"next: cpmix train-stage2 --from {run} --data {there} --recipe {recipe}"
    follow(next_of(run))
    follow(next_of(run))
    assert cpmix("status", run).code == 0


def test_a_run_behind_a_symbolic_link_is_resumed_there(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    must("train-stage2", "--from", digits_run, "--out", tmp_path / "deep" / "other")
    (tmp_path / "deep" / "other" / "stage2" / "run.json").unlink()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep" / "other")
    assert next_of(link).startswith(f"next: cpmix train-stage2 --from {digits_run.resolve()} --out {link} ")
    follow(next_of(link))


def test_damage_to_an_interrupted_phase_is_noticed(digits_run: Path) -> None:
    stage2 = digits_run / "stage2"
    (stage2 / "run.json").unlink()
    state, recipe = stage2 / "training_state.safetensors", stage2 / "recipe.toml"
    data, text = state.read_bytes(), recipe.read_text()
    size = 8 + int.from_bytes(data[:8], "little")
    start, seal = data.index(b"__metadata__"), data.index(b'"digest')
    said = range(start, data.index(b'}"}', start))
    damaged = [data[:n] for n in range(0, size, 997)]
    # Without its seal a state is read as it stands: what was sealed is whole.
    hit = [n for n in said[::17] if n not in range(seal + 1, seal + 7) and data[n : n + 1] != b"~"]
    damaged += [data[:n] + b"~" + data[n + 1 :] for n in hit]
    assert len(hit) > 50
    for bad in damaged:
        state.write_bytes(bad)
        refused(3, str(state), "status", digits_run)
    state.write_bytes(data)
    for content in ("seed = = 3", text.replace("[stage1", "[stage9")):
        recipe.write_text(content)
        refused(3, str(recipe), "status", digits_run)
    recipe.unlink()
    refused(3, f"cannot read {recipe}", "status", digits_run)


def test_folders_that_are_no_runs_are_refused(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "no run folder"), (digits, "holds no phase of a run")):
        assert message in refused(3, (), "status", folder, "--json").json["error"]
    for command in (("status",), ("evaluate", "--from"), ("compare",)):
        fix = fix_of(refused(3, (), *command, digits))
        said = f"{digits} is a data set folder; give the folder of a run, which this makes: "
        assert fix == f"{said}cpmix train-stage1 --data {digits} --out ckpt/{digits.name}"
    record = digits_run / "stage2" / "run.json"
    record.write_text(record.read_text().replace('"epochs"', '"epoch"'))
    refused(3, f"{record} was changed after it was written", "status", digits_run)


def test_a_damaged_phase_does_not_hide_that_another_one_is_missing(toy_run: Path) -> None:
    flip(toy_run / "stage1" / "run.json")
    shutil.rmtree(toy_run / "stage2")
    result = refused(3, f"{toy_run / 'stage2'} is not trained yet", "evaluate", "--from", toy_run, "--phase", "stage2")
    assert fix_of(result) == f"cpmix status {toy_run}"


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_descriptions() -> None:
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
    assert must("recipes", tmp_path / "mine.toml", "--json").json["recipe"] == mine.tables()


def test_a_recipe_is_shown_at_another_imbalance(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(load("toy/cpmix").to_toml() + "\n[by_rho.200.optimizer]\nlr = 0.03\n")
    assert must("recipes", mine, "--rho", 200, "--json").json["recipe"]["optimizer"]["lr"] == 0.03
    lr = load("toy/cpmix").optimizer.lr
    assert must("recipes", mine, "--rho", 50, "--json").json["recipe"]["optimizer"]["lr"] == lr
    fields = must("recipes", "toy/cpmix", mine, "--rho", 200, "--json").json
    assert (fields["command"], fields["names"]) == ("recipes", ["toy/cpmix", str(mine)])
    assert fields["differences"] == [f"optimizer.lr: {lr} -> 0.03"]


def test_recipes_command_lists_differences_of_two_recipes() -> None:
    lines = must("recipes", "digits/cpmix", "digits/balanced-softmax").stdout.splitlines()
    assert lines == ["stage2.terms.cp: (table) -> (none)", "stage2.terms.mix: (table) -> (none)"]
    assert must("recipes", "toy/cpmix", "toy/cpmix").stdout == "no difference\n"
    refused(2, "fix: give digits/cpmix in place of digits/cp-mix, or ", "recipes", "digits/cp-mix", "toy/cpmix")


def test_status_shows_a_run_with_a_bad_evaluation(toy_run: Path) -> None:
    evaluation = toy_run / "evaluation" / "stage2"
    flip(evaluation / "metrics.json")
    result = must("status", toy_run)
    assert f"warning: {evaluation} is left out: {evaluation / 'metrics.json'} is damaged" in result.stderr
    flip(evaluation / "run.json")
    result = must("status", toy_run)
    assert f"next: cpmix evaluate --from {toy_run} --overwrite" in result.stdout
    must("evaluate", "--from", toy_run, "--overwrite")
    assert "warning" not in must("status", toy_run).stderr


def test_without_folders_status_shows_the_runs_in_ckpt_and_below(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = refused(3, (), "status")
    assert result.stderr.splitlines() == [
        "error: ckpt holds no run",
        "  needed by: status",
        "  fix: name the folders of your runs, or begin one: cpmix run digits --out ckpt/digits",
    ]
    runs = [f"ckpt/{name}" for name in ("a", "study/b/seed-9", "study/b/seed-10")]
    for run in runs:
        shutil.copytree(toy_run, run)
    (tmp_path / "ckpt" / "study" / "back").symlink_to(tmp_path / "ckpt")  # a loop, and other names of the same runs
    (tmp_path / "ckpt" / "0").symlink_to("a")
    shutil.copytree(toy_run, "ckpt/1/2/3/too-deep")
    table = must("status")
    assert [line.split()[0] for line in table.stdout.splitlines()[2:] if " stage1 " in line] == runs
    assert [run["run"] for run in must("status", "ckpt/study/b", "--json").json["runs"]] == runs[1:]
    assert must("status", "ckpt/study/b").stdout == must("status", *runs[1:]).stdout

    flip(tmp_path / runs[1] / "stage1" / "run.json")
    (tmp_path / runs[2] / "stage2" / "run.json").unlink()
    result = refused(3, f"warning: {runs[1]}/stage1/run.json ", "status", "--json")
    found = {run["run"]: (run["status"], run["next"] and run["next"].split()[1]) for run in result.json["runs"]}
    assert found == {runs[0]: ("done", None), runs[1]: ("error", None), runs[2]: ("continue", "train-stage2")}
    assert result.json["status"] == "error"
    assert result.json["runs"][1]["fix"].startswith("rm ")
    refused(75, (), "status", runs[0], runs[2])
    refused(3, "error: ", "status", runs[0], runs[1])  # one that is named


def test_curves_show_the_course_of_each_phase(digits_run: Path) -> None:
    """By hand from metrics.parquet: first, last and best value, and the epoch of the best."""
    shown = must("status", digits_run, "--curves").stdout
    found = must("status", digits_run, "--curves", "--json").json["runs"][0]["phases"]
    assert [phase["curves"]["epoch"] for phase in found] == [[1, 2, 3, 4], [5, 6], [1]]
    for phase in found:
        metrics = pq.read_table(digits_run / phase["phase"] / "metrics.parquet").to_pydict()
        assert phase["curves"] == metrics
        _, _, table = shown.partition(
            f"{digits_run}: {phase['phase']}, done, {phase['epochs']}/{phase['epochs']} epochs\n"
        )
        lines = table.partition("\n\n")[0].splitlines()
        rows = {line[:13].strip(): line[13:].split() for line in lines[2:]}
        losses, accuracies = metrics["loss"], [100 * share for share in metrics["train_accuracy"]]
        for name, values, best, form in (("loss", losses, min, ".4f"), ("train acc, %", accuracies, max, ".2f")):
            at = metrics["epoch"][values.index(best(values))]
            numbers = [f"{value:{form}}" for value in (values[0], values[-1], best(values))]
            assert rows[name] == [sparkline(values, 24), *numbers, str(at)]
        assert "test acc, %" not in rows and rows["learning rate"][-2:] == ["-", "-"]
        assert ("mix" in rows) == (phase["phase"] == "stage2")
    assert all(len(line) <= 80 for line in shown.partition("\n\n")[2].splitlines() if str(digits_run) not in line)
    assert "curves" not in must("status", digits_run, "--json").json["runs"][0]["phases"][0]


def test_curves_of_an_interrupted_phase_are_those_of_its_state(digits_run: Path) -> None:
    metrics = pq.read_table(digits_run / "stage2" / "metrics.parquet").to_pydict()
    for name in ("run.json", "metrics.parquet"):
        (digits_run / "stage2" / name).unlink()
    stage2 = refused(75, (), "status", digits_run, "--curves", "--json").json["runs"][0]["phases"][1]
    assert (stage2["status"], stage2["curves"]) == ("interrupted", metrics)


@pytest.mark.slow
def test_curves_name_a_phase_that_has_no_finished_epoch(digits: Path, tmp_path: Path) -> None:
    run, small = tmp_path / "run", ("--set", "optimizer.batch_size=4")
    signalled(signal.SIGTERM, "projected", "train-stage1", "--data", digits, "--out", run, "--epochs", 90, *small)
    result = refused(75, (), "status", run, "--curves")
    assert f"{run}: stage1, interrupted, 0/60 epochs; none is finished yet" in result.stdout.splitlines()
    stage1, *later = refused(75, (), "status", run, "--curves", "--json").json["runs"][0]["phases"]
    assert set(map(len, stage1["curves"].values())) <= {0} and all(phase["curves"] is None for phase in later)


def test_curves_of_a_phase_whose_metrics_are_missing_are_an_error(digits_run: Path) -> None:
    (digits_run / "stage1" / "metrics.parquet").unlink()
    refused(3, "stage1/metrics.parquet", "status", digits_run, "--curves")
    must("status", digits_run)
