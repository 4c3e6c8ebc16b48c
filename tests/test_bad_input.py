"""What goes wrong in a user's data, disk or hand ends with its exit code and message, and loses nothing."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cpmix, files, must
from test_interruption import hooked

from cpmix_cli.artifacts import records
from cpmix_cli.artifacts.files import TEMPORARY, check_place
from cpmix_cli.artifacts.tensors import publish_tensors, read_tensors
from cpmix_cli.runtime.errors import EnvironmentFault


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {name: (folder / name).read_bytes() for name in files(folder)}


# -- data set folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    """A private copy of the digits data set."""
    return Path(shutil.copytree(digits, tmp_path / "data"))


DATA_FILES = ["class_counts.parquet", "dataset.json", "train.safetensors"]


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped", "a folder"])
def test_damaged_data_files(data: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = data / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": whole[:middle], "flipped": flipped}[damage])
    result = cpmix("train-stage1", "--data", data, "--out", tmp_path / "run")
    assert result.code == 3
    assert name in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["test.safetensors", "test.parquet"])
def test_a_damaged_test_split_stops_the_evaluation_alone(
    digits_run: Path, data: Path, tmp_path: Path, name: str
) -> None:
    (data / name).write_bytes(b"")
    before = contents(digits_run)
    result = cpmix("evaluate", "--from", digits_run, "--data", data, "--overwrite")
    assert result.code == 3
    assert f"{data / name} is damaged" in result.stderr
    assert contents(digits_run) == before


@pytest.mark.parametrize("label", [-100, -1, 10])
def test_labels_out_of_range_in_a_data_set_made_by_hand(data: Path, tmp_path: Path, label: int) -> None:
    """The hashes are right, the labels are not."""
    record = records.read_record(data / "dataset.json")
    tensors, _ = read_tensors(data / "train.safetensors")
    tensors["labels"][3] = label
    sha = publish_tensors(data / "train.safetensors", tensors)
    records.publish_record(data / "dataset.json", {**record, "files": {**record["files"], "train.safetensors": sha}})
    result = cpmix("train-stage1", "--data", data, "--out", tmp_path / "run")
    assert result.code == 3
    low, high = min(label, 0), max(label, 9)
    assert f"{data / 'train.safetensors'} has labels {low} to {high}; expected 0 to 9" in result.stderr


def test_labels_that_do_not_give_the_recorded_counts(data: Path, tmp_path: Path) -> None:
    record = records.read_record(data / "dataset.json")
    tensors, _ = read_tensors(data / "train.safetensors")
    tensors["labels"][0] = 9
    sha = publish_tensors(data / "train.safetensors", tensors)
    records.publish_record(data / "dataset.json", {**record, "files": {**record["files"], "train.safetensors": sha}})
    result = cpmix("train-stage1", "--data", data, "--out", tmp_path / "run")
    assert result.code == 3
    assert "class_counts.parquet does not count the training labels" in result.stderr


# -- checkpoints -------------------------------------------------------------------------------------------------------

STATE = "stage1/training_state.safetensors"


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "of other classes"])
def test_a_stage_1_that_cannot_be_continued(digits_run: Path, toy_run: Path, tmp_path: Path, damage: str) -> None:
    path = digits_run / STATE
    whole = path.read_bytes()
    path.unlink()
    if damage == "of other classes":
        shutil.copy(toy_run / STATE, path)
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else whole[:-100])
    before = contents(digits_run)
    result = cpmix("train-stage2", "--from", digits_run, "--out", tmp_path / "o")
    assert result.code == 3
    assert str(path) in result.stderr
    assert contents(digits_run) == before
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["train-stage2", "finetune", "evaluate"])
@pytest.mark.parametrize("damage", ["other", "no toml", "missing", "folder", "device"])
def test_flags_do_not_hide_that_a_runs_own_recipe_is_damaged(digits_run: Path, command: str, damage: str) -> None:
    path = digits_run / ("stage1" if command == "train-stage2" else "stage2") / "recipe.toml"
    text = path.read_text()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage != "missing":
        path.write_text(text.replace("alpha = ", "alpha = 9") if damage == "other" else "[")
    key = "evaluation.tau_norm=1" if command == "evaluate" else "finetune.terms.erm.weight=2"
    more = ["--phase", "stage2"] if command == "evaluate" else ["--epochs", 6]
    result = cpmix(command, "--from", digits_run, "--out", digits_run.parent / "out", "--set", key, *more)
    assert result.code == 3, result.stderr
    assert str(path) in result.stderr
    assert not (digits_run.parent / "out").exists()


def test_weights_of_other_classes_under_the_right_hash(digits_run: Path, toy_run: Path) -> None:
    """A record made by hand does not get a foreign network through."""
    tensors, _ = read_tensors(toy_run / "stage2" / "model.safetensors")
    record = records.read_record(digits_run / "finetune" / "run.json")
    sha = publish_tensors(digits_run / "finetune" / "model.safetensors", tensors)
    outputs = {**record["outputs"], "model.safetensors": sha}
    records.publish_record(digits_run / "finetune" / "run.json", {**record, "outputs": outputs})
    result = cpmix("evaluate", "--from", digits_run)
    assert result.code == 3
    assert "does not fit the network" in result.stderr


@pytest.mark.parametrize("command", ["train-stage2", "finetune", "evaluate", "confusion-report", "predict x.png"])
def test_from_a_folder_that_holds_no_run(command: str, digits: Path) -> None:
    before = contents(digits)
    result = cpmix(*command.split(), "--from", digits)
    assert result.code == 3
    assert f"cpmix train-stage1 --data DATA --out {digits}" in result.stderr
    assert contents(digits) == before


def test_stage_2_before_stage_1(tmp_path: Path) -> None:
    result = cpmix("train-stage2", "--from", tmp_path)
    assert result.code == 3
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'stage1'} is absent",
        "  needed by: train-stage2",
        f"  fix: cpmix train-stage1 --data DATA --out {tmp_path}",
    ]


# -- the disk ----------------------------------------------------------------------------------------------------------


def limited(*command: object, size: int) -> subprocess.CompletedProcess[str]:
    """cpmix in a process that may write no file beyond `size` bytes: what a full disk does to it, without one."""
    return subprocess.run(
        [sys.executable, "-m", "cpmix_cli", *map(str, command)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_limit_on_files_is_seen_before_the_first_batch(digits: Path, digits_run: Path) -> None:
    again = ["train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 1, "--overwrite"]
    before = contents(digits_run)
    result = limited(*again, size=100_000)
    assert result.returncode == 4
    assert f"cannot write {digits_run / 'stage1'}: File too large" in result.stderr
    assert "a file may have 100,000 here (ulimit -f)" in result.stderr
    assert "epoch=" not in result.stderr
    assert contents(digits_run) == before


@pytest.mark.parametrize("ends", ["diverges", "finds no room", "is killed"])
def test_what_is_overwritten_stays_until_there_is_something_in_its_place(
    digits: Path, digits_run: Path, ends: str
) -> None:
    """The finished stage 1 outlives a new one that comes to nothing."""
    before = contents(digits_run)
    command = ["train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 1, "--overwrite"]
    if ends == "diverges":
        result = cpmix(*command, "--set", "optimizer.lr=1e30")
        assert result.code == 5
        assert f"no state was saved before; {digits_run / 'stage1'} is left as it was" in result.stderr
    else:
        doing = "raise OSError(28, 'No space left on device')" if ends == "finds no room" else "os.kill(os.getpid(), 9)"
        hook = (
            "import os, pathlib\n"
            "def opened(path, *rest, real=pathlib.Path.open, **more):\n"
            f"    if path.name.startswith({TEMPORARY!r}): {doing}\n"
            "    return real(path, *rest, **more)\n"
            "import cpmix_cli.artifacts\n"
            "pathlib.Path.open = opened"
        )
        result = hooked(hook, *command)
        assert result.returncode == (4 if ends == "finds no room" else -9), result.stderr
        assert (digits_run / "stage1" / "run.json").exists() is False  # it was to be replaced that moment
        must("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6)  # as it was made: nothing is lost
    assert {n: d for n, d in contents(digits_run).items() if "run.json" not in n} == {
        n: d for n, d in before.items() if "run.json" not in n
    }


def test_a_preempted_overwrite_goes_on(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    """A job that is queued again has its flag again."""
    flags = ["--data", digits, "--epochs", 200, "--seed", 3]
    command = ["train-stage1", *flags, "--out", digits_run, "--overwrite"]
    hook = (
        "import os, signal, cpmix_cli.training.step as step\n"
        "def call(self, number, real=step.Step.__call__):\n"
        "    real(self, number)\n"
        "    if self._state.epoch == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
        "step.Step.__call__ = call"
    )
    result = hooked(hook, *command)
    assert result.returncode == 75
    assert "stage1 is saved at epoch 5, step 1" in result.stderr
    result = must(*command)
    assert "stage1: goes on after epoch 5, step 1" in result.stderr
    must("train-stage1", *flags, "--out", tmp_path / "whole")
    ours, whole = (run / "stage1" / "model.safetensors" for run in (digits_run, tmp_path / "whole"))
    assert ours.read_bytes() == whole.read_bytes()
    result = must(*command)  # it is done, and so overwritten
    assert "goes on" not in result.stderr


def test_a_full_disk_while_building(tmp_path: Path) -> None:
    result = limited("build-lt", "digits", "--out", tmp_path / "d", size=10_000)
    assert result.returncode == 4
    assert "a file may have 10,000 here (ulimit -f)" in result.stderr
    assert "fix: raise the limit, or choose another folder with --out" in result.stderr
    assert "dataset.json" not in files(tmp_path)
    must("build-lt", "digits", "--out", tmp_path / "d")


def test_too_little_room_shows_before_the_first_batch(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_place(tmp_path / "a" / "b", 1000)
    with pytest.raises(
        EnvironmentFault, match=r"cannot write .*a/b: No space left on device: .* bytes are needed, .* are free"
    ):
        check_place(tmp_path / "a" / "b", 2 * free)
    assert files(tmp_path) == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_an_output_below_a_file(digits: Path, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    result = cpmix("train-stage1", "--data", digits, "--out", tmp_path / "file" / "run", *flags)
    assert result.code == 4
    assert "Not a directory" in result.stderr
    assert "epoch=" not in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(digits: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        result = cpmix("train-stage1", "--data", digits, "--out", tmp_path / "run", "--dry-run")
    finally:
        tmp_path.chmod(0o755)
    assert result.code == 4
    assert "Permission denied" in result.stderr


# -- the hand ----------------------------------------------------------------------------------------------------------


def test_all_faults_of_a_recipe_and_its_settings_at_once(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'seed = -1\n[optimizer]\nlr = "fast"\nmomentun = 0.9\n[schedule]\nepochs = 2.5\n[stage1.terms.erm]\nloss = 3\n'
    )
    result = cpmix("train-stage1", "--data", digits, "--out", tmp_path / "r", "--recipe", tmp_path / "mine.toml")
    assert result.code == 2
    for line in (
        "has 5 faults",
        "seed = -1: Input should be greater than or equal to 0",
        "optimizer.lr = 'fast': Input should be a valid number",
        'optimizer.momentun: unknown key. Did you mean "momentum"?',
        "schedule.epochs = 2.5: Input should be a valid integer",
        "stage1.terms.erm.loss = 3: Input should be a valid string",
    ):
        assert line in result.stderr
    assert files(tmp_path) == ["mine.toml"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "Invalid value for '--epochs'"),
        (["--epochs", "two"], "Invalid value for '--epochs'"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--epochs", "1"], "this recipe has 2 stages, one epoch each at least"),
        (["--set", "optimizer.lr"], "is not table.key=value"),
        (["--set", "optimizer.lr=nan"], "optimizer.lr"),
        (["--set", "nothing.at=all"], "nothing: unknown key"),
        (["--bad-flag"], "No such option"),
        (["--recipe", "digits/cpmx"], 'Did you mean "digits/cpmix"?'),
        (["--recipe", "none.toml"], "no file none.toml"),
    ],
)
def test_flags_of_the_wrong_type_or_range(flags: list[str], message: str, digits: Path, tmp_path: Path) -> None:
    result = cpmix("train-stage1", "--data", digits, "--out", tmp_path / "run", *flags)
    assert result.code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_loses_nothing(digits_run: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    before = contents(digits_run)
    for command in ("train-stage2", "finetune", "evaluate"):
        result = cpmix(command, "--from", digits_run, "--device", "cuda", "--overwrite")
        assert result.code == 4
        assert "device cuda is not there" in result.stderr
    assert contents(digits_run) == before
