"""--tracker tensorboard: curves that equal metrics.parquet, and that nothing of a run depends on."""

import errno
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import contents, file_limit, files, must, refused, run_to_the_end
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from cpmix_cli.runtime import signals
from cpmix_cli.training import loop
from cpmix_cli.training.tensorboard import EVENTS, Tracker

TRACKED = ("--tracker", "tensorboard")


def curves(folder: Path) -> list[Event]:
    (path,) = folder.glob(f"{EVENTS}*")
    return [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]


def without_curves(folder: Path) -> dict[str, bytes]:
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


def test_curves_equal_the_metrics_and_other_files_are_unchanged(digits: Path, digits_run: Path, tmp_path: Path) -> None:
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


def test_each_epoch_has_one_point(handlers: object, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    refused(5, (), *command, *TRACKED, "--overwrite", "--set", "stage1.terms.erm.weight=3e38")
    assert contents(tmp_path) == before
    must(*command, *TRACKED, "--overwrite", "--seed", 3)
    assert without_curves(tmp_path / "stage1") != {n: d for n, d in before.items() if EVENTS not in n}
    check_curves(tmp_path / "stage1")
    must(*command, "--overwrite")
    assert not list(tmp_path.glob(f"stage1/{EVENTS}*"))


def test_event_files_of_a_user_are_kept(toy: Path, tmp_path: Path) -> None:
    command = ("train-stage1", "--data", toy, "--out", tmp_path, "--epochs", 6)
    must(*command, *TRACKED)
    (own,) = tmp_path.glob(f"stage1/{EVENTS}*")
    other = own.with_name(f"{EVENTS}1700000000.mine.1.0")
    other.write_bytes(own.read_bytes()[:40])
    (tmp_path / "stage1" / f"{EVENTS}folder").mkdir()
    must(*command, "--overwrite")
    assert sorted(path.name for path in tmp_path.glob(f"stage1/{EVENTS}*")) == [other.name, f"{EVENTS}folder"]


def warnings(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("warning: --tracker")]


Breaks = Callable[[pytest.MonkeyPatch, Path], None]


def package(code: str | None) -> Breaks:
    """A package tensorboard of this code, or none."""

    def replace(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
            monkeypatch.delitem(sys.modules, name)
        if code is None:
            monkeypatch.setitem(sys.modules, "tensorboard", None)
            return
        (folder / "packages" / "tensorboard").mkdir(parents=True)
        (folder / "packages" / "tensorboard" / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(folder / "packages")

    return replace


def writer(fault: Exception, after: int) -> Breaks:
    """A writer that fails after some records, and must not be asked again."""

    def replace(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        real, calls = RecordWriter.write, []

        def write(self: RecordWriter, data: bytes) -> None:
            calls.append(data)
            if len(calls) > after + 1:
                pytest.fail("asked again")
            if len(calls) > after:
                raise fault
            real(self, data)

        monkeypatch.setattr(RecordWriter, "write", write)

    return replace


EXTRA = "is not installed (pip install 'cpmix[tensorboard]')"
FULL, BUG = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug")
FAILURES = [
    (package(None), f": tensorboard {EXTRA}"),
    (package("import nowhere_to_be_found"), f": nowhere_to_be_found {EXTRA}"),
    (package("raise TypeError('no descriptors')"), ": tensorboard cannot be imported: no descriptors"),
    *((writer(FULL, after), ": No space left on device") for after in (0, 3)),
    *((writer(BUG, after), ": a bug") for after in (0, 3)),
]


@pytest.mark.parametrize(("breaks", "why"), FAILURES)
def test_a_failing_tracker_does_not_stop_the_run(
    breaks: Breaks, why: str, toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch, tmp_path)
    command = ("train-stage1", "--data", toy, *TRACKED, "--out")
    result = must(*command, tmp_path / "run")
    stage1 = tmp_path / "run" / "stage1"
    (line,) = warnings(result.stderr)
    assert line.startswith("warning: --tracker tensorboard: ")
    assert line.endswith(f"{why}; the run goes on without")
    assert without_curves(stage1) == contents(toy_run / "stage1")
    if "cannot write" in line:
        assert f"cannot write {stage1 / EVENTS}" in line
        return
    assert line in result.stderr.partition("epoch=")[0]
    assert warnings(must(*command, tmp_path / "dry", "--dry-run").stderr) == [line]


def rows(*epochs: int) -> Sequence[dict[str, float | None]]:
    return [{"epoch": epoch, "loss": 2.5, "test_accuracy": None, "seconds": 1.0} for epoch in epochs]


def test_places_that_cannot_be_written_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    full = Tracker(tmp_path / "full")
    full.write(rows(1))
    places = ((Tracker(tmp_path / "nowhere"), "No such file or directory"), (full, "File too large"))
    for tracker, why in (*places, (Tracker(tmp_path / "file"), "Not a directory")):
        with file_limit(100):
            for last in (2, 3):
                tracker.write(rows(*range(1, last + 1)))
        (line,) = warnings(capsys.readouterr().err)
        assert line.endswith(f": {why}; the run goes on without")
    assert [e.step for e in curves(tmp_path / "full")] == [0, 1]  # what is whole can be read
