"""run: the six commands in one, with their bytes, their exit codes and their refusals."""

import contextlib
import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from helpers import (
    Result,
    contents,
    cpmix,
    ended,
    files,
    forget_signals,
    must,
    process,
    refused,
    run_to_the_end,
    signalled,
    unchanged,
    write_photos,
)

from cpmix_cli.commands.run import OVERWRITING
from cpmix_cli.data.sources import SOURCES
from cpmix_cli.flags import SOURCE_NAMES
from cpmix_cli.training.step import Step

WHOLE = ("run", "digits", "--epochs", 3, "--out", "run")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def commands(stderr: str) -> list[str]:
    """The command lines that run printed as it did them."""
    return [line.removeprefix("$ cpmix ") for line in stderr.splitlines() if line.startswith("$ cpmix ")]


def statuses(result: dict[str, object]) -> list[object]:
    return [step["status"] for step in result["steps"]]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        return folder, must(*WHOLE)


@pytest.fixture
def whole(_whole: tuple[Path, Result], tmp_path: Path) -> Result:
    """A finished run in run/, its data set in data/, in the folder of the test; what its command printed."""
    shutil.copytree(_whole[0], tmp_path, dirs_exist_ok=True)
    return _whole[1]


def test_it_makes_the_bytes_of_the_six_commands_typed_by_hand(
    whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = commands(whole.stderr)
    assert lines == [
        "build-lt digits",
        "train-stage1 --epochs 3 --data data/digits-lt-rho20 --out run",
        "evaluate --from run --phase stage1",
        "train-stage2 --from run",
        "evaluate --from run --phase stage2",
        "finetune --from run",
        "evaluate --from run --phase finetune",
        "confusion-report --from run --phase finetune",
    ]
    assert [line for line in whole.stderr.splitlines() if line.startswith("next: ")] == [
        "next: cpmix misclassified --from run --phase finetune"
    ]
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    monkeypatch.chdir(by_hand)
    for line in lines:
        must(*shlex.split(line))
    assert contents(by_hand) == {
        name: data for name, data in contents(tmp_path).items() if not name.startswith("by hand/")
    }
    argv = json.loads((tmp_path / "run" / "stage2" / "run.json").read_text())["argv"]
    assert argv[1:] == ["train-stage2", "--from", "run"]  # what repairs it, if it is damaged


def test_the_same_command_again_says_up_to_date_and_writes_nothing(whole: Result, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        again = must(*WHOLE, "--json")
        status = must("status", "run")
    assert again.stdout.count("\n") == 1
    assert (again.json["command"], again.json["status"]) == ("run", "up to date")
    assert [step["command"] for step in again.json["steps"]] == [
        *("build-lt", "train-stage1", "evaluate", "train-stage2", "evaluate", "finetune", "evaluate"),
        "confusion-report",
    ]
    assert statuses(again.json) == ["up to date"] * 8
    assert "next: " not in status.stdout


@pytest.mark.slow
@pytest.mark.long
def test_stopped_after_every_step_it_ends_in_the_same_bytes(
    handlers: object, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--epochs", 3, "--set", "optimizer.batch_size=128", "--set", "finetune.batch_size=256")
    must("run", digits, "--out", "whole", *flags)
    real = Step.__call__

    def call(step: Step, number: int) -> None:
        real(step, number)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", call)
    assert run_to_the_end("run", digits, "--out", "stopped", *flags) == 14  # all steps of the three phases
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "at", "code"),
    [
        (signal.SIGINT, "$ cpmix build-lt", 130),
        (signal.SIGTERM, "$ cpmix build-lt", 75),
        (signal.SIGTERM, "stage1 epoch=1/", 75),
        (signal.SIGHUP, "stage2 epoch=3/", 75),
        (signal.SIGINT, "$ cpmix evaluate --from run --phase stage2", 75),
        (signal.SIGINT, "finetune: digits-lt-rho20", 75),
        (signal.SIGTERM, "$ cpmix confusion-report", 75),
    ],
)
@pytest.mark.long
def test_a_signal_in_any_step_leaves_what_the_same_command_completes(
    number: signal.Signals, at: str, code: int, _whole: tuple[Path, Result], tmp_path: Path
) -> None:
    stopped = ended(signalled(number, at, *WHOLE), code, f"{number.name} received")
    assert "fix: run the same command again to go on" in stopped.stderr
    assert must(*WHOLE, "--json").json["status"] == "done"
    assert contents(tmp_path / "run") == contents(_whole[0] / "run")


@pytest.mark.slow
def test_a_signal_at_the_end_of_a_step_stops_before_the_next(
    handlers: object, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Step.__call__

    def call(step: Step, number: int) -> None:
        real(step, number)
        if step._plan.phase == "stage1" and step._state.epoch == step._plan.last_epoch and number == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", call)
    command = ("run", digits, "--epochs", 3, "--out", "run")
    assert "$ cpmix evaluate" not in refused(75, "SIGTERM received", *command).stderr
    forget_signals()
    must(*command)


@pytest.mark.slow
@pytest.mark.long
def test_val_decides_which_phase_to_use_and_the_report_is_of_that(tmp_path: Path) -> None:
    flags = ("--epochs", 12, "--out", "run", "--val-per-class", 2, "--set", "finetune.lr=40")
    found = must("run", "digits", *flags)
    numbers = {
        phase: json.loads((tmp_path / f"run/evaluation/{phase}-val/metrics.json").read_text())["balanced_accuracy"]
        for phase in ("stage1", "stage2", "finetune")
    }
    assert numbers["stage1"] <= numbers["stage2"] > numbers["finetune"]
    why = "no other is better" if numbers["stage1"] == numbers["stage2"] else "it is best"
    listed = ", ".join(f"{phase} {number:.2f}" for phase, number in numbers.items())
    assert found.stdout.splitlines()[-4:] == [
        f"balanced accuracy on val (20 images): {listed}",
        f"the finetune does not help ({numbers['finetune'] - numbers['stage2']:+.2f}) on val, after stage2",
        f"use stage2: {why} on val",
        "done: run",
    ]
    assert found.stderr.splitlines()[-1] == "next: cpmix misclassified --from run --phase stage2"
    assert [path.name for path in (tmp_path / "run" / "confusion").iterdir() if path.is_dir()] == ["stage2"]
    assert "next: " not in must("status", "run").stdout
    again = must("run", "digits", *flags, "--json").json
    assert (again["phase"], again["decided_on"], again["status"]) == ("stage2", "val", "up to date")
    must("evaluate", "--from", "run", "--overwrite")  # later than the report: status asks for the last phase's again
    assert "next: cpmix confusion-report --from run" in must("status", "run").stdout


def test_without_val_no_phase_is_chosen(whole: Result) -> None:
    assert whole.stdout.splitlines()[-2] == (
        "which phase to use is not decided: there is no val split, and test may not choose (--val-per-class N holds "
        "one out); the report is of finetune, the last phase"
    )
    fields = must(*WHOLE, "--json").json
    assert (fields["phase"], fields["decided_on"], fields["reported"]) == (None, None, "finetune")


@pytest.mark.slow
def test_recipes_without_stage_2_or_finetune_have_fewer_steps(digits: Path) -> None:
    found = must("run", digits, "--recipe", "cross-entropy", "--epochs", 2, "--out", "run")
    assert "nothing to do: the recipe has no stage 2" in found.stdout
    again = must("run", digits, "--recipe", "cross-entropy", "--epochs", 2, "--out", "run", "--json").json
    assert again["runs"][0]["phases"] == ["stage1", "finetune"]
    assert [step["status"] for step in again["steps"]] == [*["up to date"] * 2, "skipped", *["up to date"] * 3]


@pytest.mark.slow
@pytest.mark.long
def test_several_seeds_have_a_run_each_and_end_in_one_line(
    _whole: tuple[Path, Result], digits: Path, tmp_path: Path
) -> None:
    command = ("run", digits, "--epochs", 3, "--out", "run", "--seeds", "0,1")
    found = must(*command)
    assert [line.partition("--seed ")[2].partition(" ")[0] for line in commands(found.stderr) if "--seed " in line] == [
        "0",
        "1",
    ]
    assert commands(found.stderr)[-1] == "compare run/seed-0 run/seed-1 --split test"
    lines = found.stdout.splitlines()
    tests = [
        json.loads((tmp_path / f"run/seed-{seed}/evaluation/finetune/metrics.json").read_text())["balanced_accuracy"]
        for seed in (0, 1)
    ]
    spread = abs(tests[0] - tests[1]) / 2**0.5
    assert f"2 seeds, finetune: balanced accuracy on test {sum(tests) / 2:.2f} +- {spread:.2f}" in lines
    assert "#  method  finetune        n" in found.stdout
    assert lines[-3:] == ["page: run/seed-0/confusion/index.html", "page: run/seed-1/confusion/index.html", "done: run"]
    with unchanged(tmp_path / "run"):
        assert must(*command, "--json").json["status"] == "up to date"
    assert contents(tmp_path / "run" / "seed-0") == contents(_whole[0] / "run")


@pytest.mark.slow
def test_overwrite_goes_on_where_it_was_interrupted(
    handlers: object, whole: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*WHOLE, "--json")
    real = Step.__call__

    def call(step: Step, number: int) -> None:
        real(step, number)
        if step._plan.phase == "stage2" and number == 0:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "__call__", call)
        stopped = refused(75, "SIGTERM received", *command, "--overwrite")
    assert "stage1 epoch=1/" in stopped.stderr
    forget_signals()
    assert Path("run", OVERWRITING).is_file()
    found = must(*command, "--overwrite")
    assert statuses(found.json) == [*["up to date"] * 3, *["done"] * 5]
    assert "stage1 epoch=" not in found.stderr
    assert not Path("run", OVERWRITING).exists()


def test_a_users_file_of_the_marker_s_name_stays(digits: Path, tmp_path: Path) -> None:
    own = tmp_path / "run" / OVERWRITING
    own.parent.mkdir()
    own.write_text("mine")
    said = f"run/{OVERWRITING} is damaged, or a file that cpmix did not write"
    refused(4, said, "run", digits, "--out", "run", "--overwrite")
    assert own.read_text() == "mine"


def test_a_dry_run_takes_a_step_of_each_phase_and_writes_nothing(tmp_path: Path) -> None:
    found = must("run", "digits", "--epochs", 3, "--out", "run", "--dry-run", "--json")
    assert files(tmp_path) == []
    assert (found.json["status"], found.json["data"]) == ("dry run", None)
    assert found.json["steps"][1]["phases_tried"] == ["stage1", "stage2", "finetune"]
    must("build-lt", "digits")
    must("train-stage1", "--data", "data/digits-lt-rho20", "--out", "run", "--epochs", 3)
    with unchanged(tmp_path):
        found = must("run", "data/digits-lt-rho20", "--epochs", 3, "--out", "run", "--dry-run", "--json")
    assert statuses(found.json) == ["up to date", "dry run"]
    assert found.json["steps"][1]["phases_tried"] == ["stage2", "finetune"]


def test_a_changed_flag_is_refused_as_by_the_commands(whole: Result, digits: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        said = ("run/stage1 was made from something else", "schedule.epochs: 3 -> 4", "needed by: train-stage1")
        refused(4, said, "run", digits, "--epochs", 4, "--out", "run")
        said = ("run/finetune was made from something else", "finetune.lr: 0.1 -> 0.2", "needed by: finetune")
        command = ("run", digits, "--epochs", 3, "--out", "run", "--set", "finetune.lr=0.2")
        told = refused(4, said, *command, "--json")
    assert told.json["exit_code"] == 4  # one object, though steps before it were fine
    assert "needed by: finetune" in told.json["error"]


def test_errors_of_the_data_set_name_the_flag_of_run(digits: Path) -> None:
    must("build-lt", "digits", "--rho", 5, "--out", "mine")
    told = refused(4, "mine holds another data set", "run", "digits", "--data", "mine", "--out", "run")
    assert "fix: write elsewhere with --data FOLDER, or replace it with --overwrite" in told.stderr


def test_a_word_that_is_both_is_the_source(tmp_path: Path) -> None:
    must("build-lt", "digits", "--rho", 5, "--out", "digits")
    said = "run: digits is the source; the data set folder of that name is ./digits"
    found = must("run", "digits", "--dry-run", "--epochs", 3)
    assert said in found.stderr
    assert found.stdout.splitlines()[-1] == "dry run: ckpt/digits-lt-rho20"
    found = must("run", "./digits", "--dry-run", "--epochs", 3)
    assert said not in found.stderr
    assert found.stdout.splitlines()[-1] == "dry run: ckpt/digits-lt-rho5"


@pytest.mark.parametrize(
    ("line", "code", "lines"),
    [
        (
            "run photos",
            2,
            [
                "error: photos is no source but a folder; the source of a folder of images is image-folder",
                "  needed by: run",
                "  fix: build a data set of it: cpmix run image-folder --data-root photos",
            ],
        ),
        (
            "build-lt photos",
            2,
            [
                "error: photos is no source but a folder; the source of a folder of images is image-folder",
                "  needed by: build-lt",
                "  fix: build a data set of it: cpmix build-lt image-folder --data-root photos",
            ],
        ),
        (
            "train-stage1 --data photos",
            3,
            [
                "error: no data set in photos (dataset.json is missing)",
                "  needed by: train-stage1",
                "  fix: give --data a folder that cpmix build-lt has written; to make one of these images: "
                "cpmix build-lt image-folder --data-root photos",
            ],
        ),
        (
            "build-lt {data}",
            2,
            [
                "error: {data} is no source but a data set folder, which is built already",
                "  needed by: build-lt",
                "  fix: train on it: cpmix train-stage1 --data {data} --out ckpt/digits-lt-rho20",
            ],
        ),
        (
            "run digit",
            2,
            [
                'error: run has no source "digit"',
                "  needed by: run",
                "  fix: give digits, or one of cifar10, cifar100, fashion-mnist, image-folder, imagenet-lt, "
                "inaturalist2018, parquet, places-lt, toy",
            ],
        ),
        (
            "run {data} --rho 3 --data mine",
            2,
            [
                "error: {data} is a data set folder, which is built already; --rho, --data would build one",
                "  needed by: run",
                "  fix: drop --rho --data, or name a source in place of {data}",
            ],
        ),
        (
            "run digits --seed 1 --seeds 1,2",
            2,
            ["error: --seed and --seeds are both given", "  needed by: run", "  fix: drop one of the two flags"],
        ),
        (
            "run digits --seeds 1,1",
            2,
            [
                'error: --seeds "1,1" is no list of different seeds',
                "  needed by: run",
                "  fix: give --seeds 0,1,2 or the like",
            ],
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    line: str, code: int, lines: list[str], digits: Path, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", {"red": 3, "blue": 3})
    with unchanged(tmp_path):
        found = cpmix(*line.format(data=digits).split())
    assert (found.code, found.stdout) == (code, "")
    assert found.stderr.splitlines() == [text.format(data=digits) for text in lines]


def test_several_ranks_are_refused(digits: Path) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    found = ended(process("run", digits, "--out", "run", env=ranks), 2)
    assert found.stderr.splitlines() == [
        "error: run does its steps in one process, and 2 ranks were started",
        "  needed by: run",
        "  fix: train the phases with torchrun or srun, each by its command; then give the run command in one process, "
        "which evaluates and reports them",
    ]
    assert ended(process("run", digits, "--out", "run", env=ranks | {"RANK": "1"}), 0).stderr == ""
    assert not Path("run").exists()


@pytest.mark.slow
def test_it_goes_on_with_a_run_begun_by_hand_and_with_data_that_moved(
    _whole: tuple[Path, Result], tmp_path: Path
) -> None:
    must("build-lt", "digits", "--out", "data")
    must("train-stage1", "--data", "data", "--out", "run", "--epochs", 3)
    Path("data").rename("moved")
    found = must("run", "moved", "--out", "run", "--epochs", 3)
    assert "train-stage2 --from run --data moved" in commands(found.stderr)
    assert contents(tmp_path / "run") == contents(_whole[0] / "run")


def test_a_folder_of_photos_becomes_a_reported_run(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 24, "green": 12, "blue": 6})
    flags = ("--image-size", 8, "--val-per-class", 1, "--set", "optimizer.batch_size=8", "--epochs", 2)
    found = must("run", "image-folder", "--data-root", "photos", *flags, "--set", "model.name=resnet8")
    assert found.stdout.splitlines()[-1] == "done: ckpt/image-folder-photos-8px-val1"
    assert "build-lt image-folder --data-root photos --val-per-class 1 --image-size 8" in commands(found.stderr)
    assert Path("ckpt/image-folder-photos-8px-val1/confusion/index.html").is_file()


@pytest.mark.slow
def test_settings_that_the_images_need_are_added_as_build_lt_s_next_line_does(toy: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 12, "blue": 6})
    command = ("run", "image-folder", "--data-root", "photos", "--image-size", 8, "--dry-run")
    found = must(*command)
    assert "--set model.name=resnet32" in commands(found.stderr)[1]
    assert "resnet8, " in must(*command, "--set", "model.name=resnet8").stderr
    assert must("run", toy, "--epochs", 3, "--out", "run").stdout.endswith("done: run\n")


def test_the_sources_of_the_help_are_those_that_there_are() -> None:
    assert set(SOURCE_NAMES) == set(SOURCES)


@pytest.mark.slow
def test_with_pretrained_weights_an_image_folder_is_built_and_trained_as_they_need(tmp_path: Path) -> None:
    """The network and its size from the file; a short finetuning in two stages. --image-size goes before that."""
    write_photos(tmp_path / "old", dict.fromkeys(["red", "green", "yellow"], 8))
    write_photos(tmp_path / "photos", dict.fromkeys(["blue", "purple"], 8))
    must("build-lt", "image-folder", "--data-root", "old", "--image-size", 8, "--out", "old-data")
    must("train-stage1", "--data", "old-data", "--recipe", "digits/cpmix", "--epochs", 2, "--out", "old-run")
    weights = shutil.copy("old-run/stage1/model.safetensors", "weights.safetensors")
    result = must("run", "image-folder", "--data-root", "photos", "--epochs", 2, "--init", weights)
    assert "images of 8 x 8 pixels, as --init is given: the weights are those of a resnet8\n" in result.stderr
    data = "--set data.crop=0 --set data.augment=crop-flip --set data.padding=1"
    recipe = f"--recipe image-folder/pretrained --set model.name=resnet8 {data}"
    name = "image-folder-photos-8px"
    assert commands(result.stderr) == [
        "build-lt image-folder --data-root photos --image-size 8",
        f"train-stage1 {recipe} --epochs 2 --data data/{name} --out ckpt/{name} --init weights.safetensors",
        f"evaluate --from ckpt/{name} --phase stage1",
        f"train-stage2 --from ckpt/{name}",
        f"evaluate --from ckpt/{name} --phase stage2",
        f"finetune --from ckpt/{name}",
        f"confusion-report --from ckpt/{name} --phase stage2",
    ]
    again = must("run", "image-folder", "--data-root", "photos", "--epochs", 2, "--init", weights, "--json").json
    assert set(statuses(again)) == {"up to date", "skipped"}
    larger = must("run", "image-folder", "--data-root", "photos", "--image-size", 16, "--init", weights, "--dry-run")
    assert commands(larger.stderr)[0].endswith(" --data-root photos --image-size 16")
