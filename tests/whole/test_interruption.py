"""Signals at any moment: the exit code, what is saved, and that the same command ends in the bytes of a whole run."""

import os
import pty
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    contents,
    ended,
    files,
    hooked,
    must,
    on_event,
    quick_first,
    refused,
    run_to_the_end,
    setting,
    signalled,
    write_image,
    write_photos,
)

from cpmix_cli.artifacts import files as artifacts
from cpmix_cli.artifacts.files import TRAINING_STATE, temporary_for
from cpmix_cli.mixing import MixingState
from cpmix_cli.training.batch_slices import BatchSlice
from cpmix_cli.training.objective import TermBatch
from cpmix_cli.training.randomness import Draws, map_tensors
from cpmix_cli.training.step import Step

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


class Trace:
    """What every optimizer step was made of; raises SIGTERM after each step where `stops` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stops: bool) -> None:
        self.steps: list[tuple[object, ...]] = []
        real_step, real_batches = Step.__call__, Step._batches

        def batches(step: Step, draws: Draws, part: BatchSlice, state: MixingState) -> list[TermBatch]:
            found = real_batches(step, draws, part, state)
            self.steps[-1] += tuple(_listed(batch) for batch in found)
            return found

        def call(step: Step, number: int) -> None:
            row = map_tensors(step.inputs.epoch, lambda values: values[number].tolist())  # type: ignore[arg-type, return-value]
            self.steps.append((step._plan.phase, number, row, step._state.confusion.tolist()))
            real_step(step, number)
            if stops:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Step, "__call__", call)
        monkeypatch.setattr(Step, "_batches", batches)


def _listed(batch: TermBatch) -> object:
    """Images, both labels and lambdas of a batch, as exact values."""
    return {name: value.tolist() for name, value in vars(batch).items() if hasattr(value, "tolist")}


@pytest.mark.parametrize(
    "settings", quick_first({"": (), "averaged": ("--set", "optimizer.ema_epochs=60")}, pytest.mark.slow)
)
def test_a_run_stopped_after_every_step_ends_in_the_same_bytes(
    settings: Sequence[str], handlers: object, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages and the finetune, with learning rates, sample order, draws, lambdas and pairs traced."""

    def phases(run: Path) -> list[int]:
        flags = ("--epochs", 3, "--set", "optimizer.batch_size=128", "--set", "finetune.batch_size=256", *settings)
        return [
            run_to_the_end("train-stage1", "--data", digits, "--out", run, *flags),
            run_to_the_end("train-stage2", "--from", run),
            run_to_the_end("finetune", "--from", run),
        ]

    with monkeypatch.context() as patched:
        whole = Trace(patched, stops=False)
        assert phases(tmp_path / "whole") == [0, 0, 0]
    with monkeypatch.context() as patched:
        stopped = Trace(patched, stops=True)
        assert phases(tmp_path / "stopped") == [8, 4, 2]  # steps of 2, 1 and 1 epochs
    assert len(whole.steps) == 14
    assert whole.steps[9][2].draws.terms[1].mixing.ratio  # type: ignore[attr-defined]
    assert stopped.steps == whole.steps
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "settings"),
    [("torchvision/mnasnet0_5", []), ("timm/test_vit", ["model.drop_path=0.5", "optimizer.ema_epochs=2"])],
    ids=["dropout", "drop-path"],
)
def test_a_network_that_draws_by_itself_resumes_in_the_same_bytes(
    name: str, settings: list[str], handlers: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos", {"red": 10, "green": 6})
    must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "d", "--image-size", 64)
    flags = setting(f"model.name={name}", "data.normalisation=network", "optimizer.batch_size=8", *settings)
    flags += ["--epochs", 2]

    def train(run: str) -> list[int]:
        stage1 = run_to_the_end("train-stage1", "--data", tmp_path / "d", "--out", tmp_path / run, *flags)
        return [stage1, run_to_the_end("train-stage2", "--from", tmp_path / run)]

    with monkeypatch.context() as patched:
        whole = Trace(patched, stops=False)
        assert train("whole") == [0, 0]
    with monkeypatch.context() as patched:
        Trace(patched, stops=True)
        torch.manual_seed(1)
        assert sum(train("stopped")) == len(whole.steps)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["stage1", "stage2"])
def test_rarer_checkpoints_change_only_where_a_run_resumes(
    handlers: object, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    saved = []
    real = artifacts.publish

    def publish(path: Path, data: bytes) -> str:
        if path.name == TRAINING_STATE:
            saved.append(path.parent.name)
        return real(path, data)

    monkeypatch.setattr(artifacts, "publish", publish)
    for name, flags in (("each", []), ("third", ["--checkpoint-every", 3])):
        must("train-stage1", "--data", toy, "--out", tmp_path / name, "--epochs", 20, *flags)
        must("train-stage2", "--from", tmp_path / name, *flags)
    assert contents(tmp_path / "each" / phase) == contents(tmp_path / "third" / phase)
    epochs = {p: len(pd.read_parquet(tmp_path / "each" / p / "metrics.parquet")) for p in ("stage1", "stage2")}
    last = {"stage1": epochs["stage1"], "stage2": 20}
    first = {"stage1": 1, "stage2": epochs["stage1"] + 1}
    thirds = sum(e % 3 == 0 or e == last[phase] for e in range(first[phase], last[phase] + 1))
    assert saved.count(phase) == epochs[phase] + thirds


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_torch_is_imported_ends_the_command(
    digits: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    result = hooked(on_event("import", "args[0] == 'torch'", number), "train-stage1", "--data", digits, "--out", out)
    ended(result, 130 if number == signal.SIGINT else 75)
    assert result.stderr.splitlines() == [
        "train-stage1: loading torch",
        f"interrupted: {number.name} received; what was published stays",
        "  fix: run the same command again to go on",
    ]
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_exits_with_code_75(digits: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = ["train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 600]
    said = (f"{number.name} received; stage1 is saved at epoch", "run the same command again")
    ended(signalled(number, "epoch=3/", *command), 75, said)
    assert files(tmp_path) == ["stage1/recipe.toml", "stage1/training_state.safetensors"]
    if number != signal.SIGINT:
        return
    refused(3, "stage1 is not finished", "evaluate", "--from", tmp_path)
    shorter = ("train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 6)
    refused(4, "schedule.epochs: 600 -> 6", *shorter)
    # There is a state now, so Ctrl-C while the data are read is 75 too: the same command goes on.
    result = hooked(on_event("open", "str(args[0]).endswith('train.safetensors')", number), *command)
    ended(result, 75, "SIGINT received; what was published stays")
    assert files(tmp_path) == ["stage1/recipe.toml", "stage1/training_state.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(digits: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    hook = (
        "import cpmix_cli.training.step as step\n"
        "def call(self, number, real=step.Step.__call__):\n"
        f"    os.kill(os.getpid(), {int(number)}); os.kill(os.getpid(), {int(number)})\n"
        "    raise AssertionError('still here')\n"
        "step.Step.__call__ = call"
    )
    command = ("train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 6)
    ended(hooked(hook, *command), code)
    assert files(tmp_path) == ["stage1/.cpmix-lock", "stage1/recipe.toml"]
    must(*command)  # the lock is a dead process's
    assert ".cpmix-lock" not in " ".join(files(tmp_path))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_while_images_are_read_ends_once(tmp_path: Path) -> None:
    """As Slurm and a terminal send it; the threads that read images get it too."""
    generator = np.random.default_rng(0)
    for i in range(300):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        write_image(tmp_path / "mine" / "ab"[i % 2] / f"{i}.png", pixels)
    arguments = ("build-lt", "image-folder", "--data-root", tmp_path / "mine", "--image-size", 16, "--out")
    hook = on_event("open", "str(args[0]).endswith('150.png')", signal.SIGTERM)
    ended(hooked(hook, *arguments, tmp_path / "set"), 75)
    assert not (tmp_path / "set").exists()
    must(*arguments, tmp_path / "set")
    must(*arguments, tmp_path / "other")
    assert contents(tmp_path / "set") == contents(tmp_path / "other")


@pytest.mark.slow
def test_missing_files_are_written_after_a_signal_past_the_last_epoch(digits: Path, tmp_path: Path) -> None:
    """The derived files are missing; the same command makes them from the state."""
    command = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 6)
    hash_of_name = temporary_for(Path("metrics.parquet")).name.rsplit("-", 1)[1]
    ended(hooked(on_event("open", f"{hash_of_name!r} in str(args[0])", signal.SIGINT), *command), 75)
    made = ["class_counts.parquet", "confusion_pairs.parquet", "model.safetensors", "recipe.toml", TRAINING_STATE]
    assert files(tmp_path / "run") == [f"stage1/{name}" for name in made]
    must(*command)
    must("train-stage1", "--data", digits, "--out", tmp_path / "whole", "--epochs", 6)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("flags", "code"), [([], 75), (["--overwrite"], 130)])
def test_ctrl_c_during_the_torch_import_reports_if_a_phase_has_begun(
    tmp_path: Path, flags: list[str], code: int
) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "training_state.safetensors").touch()
    hook = on_event("import", "args[0] == 'torch'", signal.SIGINT)
    ended(hooked(hook, "train-stage1", "--data", "x", "--out", tmp_path, *flags), code)


def test_a_signal_after_the_command_is_over_changes_nothing() -> None:
    hook = "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    result = hooked(hook, "--version")
    assert (result.code, result.stderr) == (0, "")


def test_ctrl_c_while_the_first_modules_are_imported_shows_no_traceback() -> None:
    ended(hooked(on_event("import", "args[0] == 'cpmix_cli.runtime.console'", signal.SIGINT), "--version"), 130)


@pytest.mark.slow
def test_a_terminal_that_is_closed_costs_no_epoch(digits: Path, tmp_path: Path) -> None:
    """The hang-up comes more than once, and the terminal can be written no more."""
    command = ["train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 600]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "cpmix_cli", *map(str, command)])
    shown = b""
    while b"epoch" not in shown or not (tmp_path / "stage1" / TRAINING_STATE).exists():
        shown += os.read(terminal, 4096)
    os.close(terminal)
    os.kill(pid, signal.SIGHUP)  # as a shell that ends does it, after the terminal
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert files(tmp_path) == ["stage1/recipe.toml", "stage1/training_state.safetensors"]


@pytest.mark.slow
@pytest.mark.long
def test_nohup_keeps_a_run_from_a_closed_terminal(digits: Path, tmp_path: Path) -> None:
    command = ["train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 6]
    hook = (
        "import os, signal, cpmix_cli.training.step as step\n"
        "def call(self, number, real=step.Step.__call__):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    real(self, number)\n"
        "step.Step.__call__ = call"
    )
    ended(hooked(f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{hook}", *command), 0)
    ended(hooked(hook, *command, "--overwrite"), 75, "SIGHUP received; stage1 is saved at epoch 1, step 1")


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_hang_up_is_no_second_signal(digits: Path, tmp_path: Path, first: signal.Signals) -> None:
    """A login that ends sends both, in either order; the state is saved."""
    others = {signal.SIGHUP, signal.SIGTERM} - {first}
    hook = (
        "import os, signal, cpmix_cli.training.step as step\n"
        "def call(self, number, real=step.Step.__call__):\n"
        f"    for sent in ({int(first)}, {int(others.pop())}, signal.SIGHUP): os.kill(os.getpid(), sent)\n"
        "    real(self, number)\n"
        "step.Step.__call__ = call"
    )
    command = ("train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 6)
    ended(hooked(hook, *command), 75, "stage1 is saved at epoch 1, step 1")
