"""What goes wrong in a user's data, disk or hand ends with its exit code and message, and loses nothing."""

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    Result,
    edit_record,
    ended,
    exact_contents,
    files,
    hooked,
    must,
    process,
    refused,
    unchanged,
    without_gpu,
)

from cpmix_cli.artifacts import records
from cpmix_cli.artifacts.files import TEMPORARY, TRAINING_STATE, check_place
from cpmix_cli.artifacts.tensors import publish_tensors, read_tensors
from cpmix_cli.runtime.errors import EnvironmentFault


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "data"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-100, "train.safetensors has labels -100 to 9; expected 0 to 9"),
        (-1, "train.safetensors has labels -1 to 9; expected 0 to 9"),
        (10, "train.safetensors has labels 0 to 10; expected 0 to 9"),
        (9, "class_counts.parquet has other counts than the training labels"),
    ],
)
def test_labels_of_a_data_set_made_by_hand_are_checked(data: Path, tmp_path: Path, label: int, message: str) -> None:
    """The hashes are right, the labels are not."""
    tensors, _ = read_tensors(data / "train.safetensors")
    tensors["labels"][0] = label
    sha = publish_tensors(data / "train.safetensors", tensors)
    recorded = records.read_fields(data / "dataset.json")["files"]
    edit_record(data / "dataset.json", files={**recorded, "train.safetensors": sha})
    refused(3, (str(data), message), "train-stage1", "--data", data, "--out", tmp_path / "run")


@pytest.mark.parametrize("command", ["train-stage2", "finetune", "evaluate"])
@pytest.mark.parametrize("damage", ["other", "no toml", "missing", "folder", "device"])
def test_a_damaged_recipe_of_the_run_is_reported_despite_flags(digits_run: Path, command: str, damage: str) -> None:
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
    refused(3, str(path), command, "--from", digits_run, "--out", digits_run.parent / "out", "--set", key, *more)
    assert not (digits_run.parent / "out").exists()


@pytest.mark.parametrize("command", ["train-stage2", "finetune", "evaluate", "confusion-report", "predict x.png"])
def test_from_a_folder_that_holds_no_run_names_the_first_command(command: str, digits: Path) -> None:
    with unchanged(digits):
        said = f"which this makes: cpmix train-stage1 --data {digits} --out ckpt/{digits.name}\n"
        refused(3, said, *command.split(), "--from", digits)


def test_stage_2_before_stage_1_is_refused_and_names_stage_1(tmp_path: Path) -> None:
    result = refused(3, (), "train-stage2", "--from", tmp_path)
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'stage1'} is not trained yet",
        "  needed by: train-stage2",
        f"  fix: train its stage 1: train-stage1 takes a data set folder as --data, and {tmp_path} as --out",
    ]


def limited(*command: object, size: int) -> Result:
    """cpmix in a process that may write no file beyond `size` bytes: what a full disk does to it, without one."""
    return process(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


@pytest.mark.slow
def test_a_limit_on_files_is_seen_before_the_first_batch(digits: Path, digits_run: Path) -> None:
    again = ["train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 1, "--overwrite"]
    said = (f"cannot write {digits_run / 'stage1'}: File too large", "a file may have 100,000 here (ulimit -f)")
    with unchanged(digits_run):
        result = ended(limited(*again, size=100_000), 4, said)
    assert "epoch=" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["diverges", "finds no room", "is killed"])
def test_overwritten_results_are_kept_until_new_ones_exist(digits: Path, digits_run: Path, ends: str) -> None:
    """The finished stage 1 outlives a new one that comes to nothing."""
    before = exact_contents(digits_run)
    command = ["train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--seed", 1, "--overwrite"]
    if ends == "diverges":
        words = (*command, "--set", "optimizer.lr=1e30")
        refused(5, f"no state was saved before; {digits_run / 'stage1'} is left as it was", *words)
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
        ended(hooked(hook, *command), 4 if ends == "finds no room" else -9)
        found = exact_contents(digits_run)
        assert {name: found[name] for name in found if "/.cpmix-" not in name} == before
        must("evaluate", "--from", digits_run, "--phase", "stage1")
        shutil.rmtree(digits_run / "evaluation" / "stage1")
        must("train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6)  # removes what a dead process left
    assert exact_contents(digits_run) == before


@pytest.mark.slow
def test_a_preempted_overwrite_is_resumed(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    """A job that is queued again has its flag again."""
    flags = ["--data", digits, "--epochs", 30, "--seed", 3]
    command = ["train-stage1", *flags, "--out", digits_run, "--overwrite"]
    hook = (
        "import os, signal, cpmix_cli.training.step as step\n"
        "def call(self, number, real=step.Step.__call__):\n"
        "    real(self, number)\n"
        "    if self._state.epoch == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
        "step.Step.__call__ = call"
    )
    ended(hooked(hook, *command), 75, "stage1 is saved at epoch 5, step 1")
    result = must(*command)
    assert "stage1: goes on after epoch 5, step 1" in result.stderr
    must("train-stage1", *flags, "--out", tmp_path / "whole")
    ours, whole = (run / "stage1" / "model.safetensors" for run in (digits_run, tmp_path / "whole"))
    assert ours.read_bytes() == whole.read_bytes()
    result = must(*command)  # it is done, and so overwritten
    assert "goes on" not in result.stderr


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("number", [1, 2])
def test_a_state_that_cannot_be_read_for_a_moment_is_no_fresh_start(
    digits: Path, digits_run: Path, monkeypatch: pytest.MonkeyPatch, code: int, number: int
) -> None:
    (digits_run / "stage1" / "run.json").unlink()  # preempted under --overwrite
    state, real, left = digits_run / "stage1" / TRAINING_STATE, os.open, [number]

    def opened(path: object, *rest: Any, **more: Any) -> int:
        left[0] -= path == state
        if path == state and left[0] == 0:
            raise OSError(code, os.strerror(code))
        return real(path, *rest, **more)  # type: ignore[arg-type]

    command = ["train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6, "--overwrite"]
    with unchanged(digits_run), monkeypatch.context() as patched:
        patched.setattr(os, "open", opened)
        refused(4, f"error: cannot read {state}: {os.strerror(code)}", *command)
    assert "goes on after" in must(*command, "--dry-run").stderr


@pytest.mark.slow
def test_a_build_without_room_fails_and_can_be_rerun(tmp_path: Path) -> None:
    said = ("a file may have 10,000 here (ulimit -f)", "fix: raise the limit, or choose another folder with --out")
    ended(limited("build-lt", "digits", "--out", tmp_path / "d", size=10_000), 4, said)
    assert "dataset.json" not in files(tmp_path)
    must("build-lt", "digits", "--out", tmp_path / "d")


def test_too_little_room_shows_before_the_first_batch(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b", 1000)
    said = r"cannot write .*a/b: No space left on device: .* bytes are needed, .* are free"
    with pytest.raises(EnvironmentFault, match=said):
        check_place(tmp_path / "a" / "b", 2 * shutil.disk_usage(tmp_path).free)
    assert files(tmp_path) == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_an_output_below_a_file_is_refused(digits: Path, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    result = refused(4, "Not a directory", "train-stage1", "--data", digits, "--out", tmp_path / "file" / "run", *flags)
    assert "epoch=" not in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        refused(4, "Permission denied", "train-stage1", "--data", digits, "--out", tmp_path / "run", "--dry-run")
    finally:
        tmp_path.chmod(0o755)


@without_gpu
def test_a_missing_device_is_refused_and_changes_nothing(digits: Path, digits_run: Path) -> None:
    start = {"train-stage1": ("--data", digits, "--out", digits_run)}
    with unchanged(digits_run):
        for command in ("train-stage1", "train-stage2", "finetune", "evaluate"):
            flags = start.get(command, ("--from", digits_run))
            refused(4, "device cuda is not there", command, *flags, "--device", "cuda", "--overwrite")
