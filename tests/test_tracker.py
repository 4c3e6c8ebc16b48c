"""--tracker tensorboard: curves that equal metrics.parquet, and that nothing of a run depends on."""

import errno
import json
import resource
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import cpmix, files, must
from equality import contents
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from test_interruption import handlers as handlers
from test_interruption import run_to_the_end

from cpmix_cli.runtime import signals
from cpmix_cli.training import loop
from cpmix_cli.training.tracker import EVENTS, Tracker

TRACKED = ("--tracker", "tensorboard")


def curves(folder: Path) -> list[Event]:
    """What stands in the one event file of a phase's folder."""
    (path,) = folder.glob(f"{EVENTS}*")
    return [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]


def without_curves(folder: Path) -> dict[str, bytes]:
    """All else in the folder."""
    return {name: data for name, data in contents(folder).items() if EVENTS not in name}


def check_curves(phase: Path) -> None:
    """They are metrics.parquet, each epoch once, nulls left out."""
    first, *events = curves(phase)
    assert first.file_version == "brain.Event:2"
    found = [{"epoch": e.step} | {v.tag: v.simple_value for v in e.summary.value} for e in events]
    table = pd.read_parquet(phase / "metrics.parquet")
    rows = [{k: v for k, v in row.items() if v == v} for row in table.to_dict("records")]
    assert found == [pytest.approx(row, rel=1e-6) for row in rows]
    ended = [e.wall_time for e in events]
    assert [b - a for a, b in pairwise(ended)] == [pytest.approx(s, abs=2) for s in table["seconds"][1:]]


def test_the_curves_are_the_metrics_and_all_else_is_as_without(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tracked"
    must("train-stage1", "--data", digits, "--out", run, "--epochs", 6, *TRACKED)
    must("train-stage2", "--from", run, *TRACKED)
    result = must("finetune", "--from", run, *TRACKED)
    assert "warning" not in result.stderr
    for phase in ("stage1", "stage2", "finetune"):
        check_curves(run / phase)
        assert without_curves(run / phase) == contents(digits_run / phase)
        record = json.loads((run / phase / "run.json").read_text())
        assert set(record["outputs"]) == set(files(digits_run / phase)) - {"run.json"}
    assert must("status", run, "--json").json["runs"][0]["next"].startswith("cpmix evaluate")
    before = contents(run)
    for flags in ((), TRACKED):
        assert "up to date" in must("train-stage1", "--data", digits, "--out", run, "--epochs", 6, *flags).stdout
    moved = run.rename(tmp_path / "moved")
    assert "up to date" in must("train-stage2", "--from", moved).stdout
    assert contents(moved) == before


def test_a_run_that_goes_on_has_each_epoch_once(
    handlers: object, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = loop.epoch_line, []

    def stops(plan: Any, row: dict[str, Any]) -> str:
        taken.append(int(row["epoch"]))
        if row["epoch"] in (2, 3, 7):
            signals._handle(signals.HANDLED[0], None)
        return real(plan, row)

    monkeypatch.setattr(loop, "epoch_line", stops)
    command = ("train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 15, "--checkpoint-every", 4)
    assert run_to_the_end(*command, *TRACKED) == 3
    assert taken == list(range(1, len(taken) + 1))
    check_curves(tmp_path / "stage1")


def test_overwriting_replaces_the_curves_when_it_replaces_the_run(toy: Path, tmp_path: Path) -> None:
    command = ("train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 6)
    must(*command, *TRACKED)
    before = contents(tmp_path)
    result = cpmix(*command, *TRACKED, "--overwrite", "--set", "stage1.terms.erm.weight=1e39")
    assert result.code == 5
    assert contents(tmp_path) == before
    must(*command, *TRACKED, "--overwrite", "--seed", 3)
    assert without_curves(tmp_path / "stage1") != {n: d for n, d in before.items() if EVENTS not in n}
    check_curves(tmp_path / "stage1")
    must(*command, "--overwrite")
    assert not list(tmp_path.glob(f"stage1/{EVENTS}*"))


# -- it never stops a run ----------------------------------------------------------------------------------------------


def warnings(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "tracker" in line]


def forget_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("package", "why"),
    [
        (None, "tensorboard is not installed (pip install 'cpmix[tensorboard]')"),
        ("import nowhere_to_be_found", "nowhere_to_be_found is not installed (pip install 'cpmix[tensorboard]')"),
        (
            "raise TypeError('Descriptors cannot be created')",
            "tensorboard cannot be imported: Descriptors cannot be created",
        ),
    ],
)
def test_a_package_that_is_missing_or_broken(
    package: str | None, why: str, toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_tensorboard(monkeypatch)
    if package is None:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    else:
        (tmp_path / "packages" / "tensorboard").mkdir(parents=True)
        (tmp_path / "packages" / "tensorboard" / "__init__.py").write_text(package)
        monkeypatch.syspath_prepend(tmp_path / "packages")
    result = must("train-stage1", "--data", toy, "--out", tmp_path / "run", *TRACKED)
    lines = result.stderr.splitlines()
    assert warnings(result.stderr) == [f"warning: --tracker tensorboard: {why}; the run goes on without"]
    assert lines.index(warnings(result.stderr)[0]) < min(i for i, line in enumerate(lines) if "epoch=" in line)
    assert contents(tmp_path / "run" / "stage1") == contents(toy_run / "stage1")
    dry = must("train-stage1", "--data", toy, "--out", tmp_path / "dry", "--dry-run", *TRACKED)
    assert warnings(dry.stderr) == warnings(result.stderr)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug")])
@pytest.mark.parametrize("after", [0, 3])
def test_a_writer_that_fails(
    fault: Exception, after: int, toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = RecordWriter.write, []

    def write(self: RecordWriter, data: bytes) -> None:
        calls.append(data)
        if len(calls) > after:
            raise fault
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    result = must("train-stage1", "--data", toy, "--out", tmp_path, *TRACKED)
    (line,) = warnings(result.stderr)
    assert line.startswith(f"warning: --tracker tensorboard: cannot write {tmp_path / 'stage1' / EVENTS}")
    assert line.endswith(f": {getattr(fault, 'strerror', None) or fault}; the run goes on without")
    assert len(calls) == after + 1
    assert without_curves(tmp_path / "stage1") == contents(toy_run / "stage1")


ROW = {"epoch": 1.0, "loss": 2.5, "test_accuracy": None, "seconds": 1.0}


def rows(*epochs: int) -> Sequence[dict[str, float | None]]:
    return [{**ROW, "epoch": epoch} for epoch in epochs]


def test_places_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for place, why in ((tmp_path / "nowhere", "No such file or directory"), (tmp_path / "file", "Not a directory")):
        tracker = Tracker(place)
        for last in (1, 2):
            tracker.write(rows(*range(1, last + 1)))
        (line,) = warnings(capsys.readouterr().err)
        assert line.endswith(f": {why}; the run goes on without")


def test_a_disk_that_fills_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path)
    tracker.write(rows(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for last in (2, 3):
            tracker.write(rows(*range(1, last + 1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = warnings(capsys.readouterr().err)
    assert line.endswith(": File too large; the run goes on without")
    assert [e.step for e in curves(tmp_path)] == [0, 1]  # what is whole can be read


def test_another_tracker_is_refused(toy: Path, tmp_path: Path) -> None:
    result = cpmix("train-stage1", "--data", toy, "--out", tmp_path, "--tracker", "tensorbord")
    assert result.code == 2
    assert result.stderr == 'error: --tracker "tensorbord". Did you mean "tensorboard"? Known: tensorboard.\n'
