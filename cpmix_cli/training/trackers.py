"""--tracker: the rows of metrics.parquet as curves of TensorBoard, Weights & Biases or MLflow.

Rows are written each time the state is saved, from its history. So the curves have saved epochs only, and a resumed run
has each epoch once. No record names what a tracker writes, and cpmix never reads it. Any error of a tracker is one
warning, and training continues.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cpmix_cli.artifacts.files import open_file
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runtime import console, signals
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training import tensorboard

Row = Mapping[str, float | None]
"""Row of metrics.parquet. It may have numbers of evaluations too, such as "val/top1"."""
REMOTE = ("wandb", "mlflow")
"""Trackers that have a process of their own."""
SILENT_SECONDS = 30.0
"""Time at the end of a phase that a tracker may take without a sign of progress."""
END_SECONDS = 60.0
"""Time at the end of a phase that a tracker may take at all."""
_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "train_accuracy": "train/top1",
    "test_accuracy": "test/top1",
}
"""Column of metrics.parquet -> name of its curve, if that is not train/COLUMN. top1 is in per cent."""
_MARK = b'{"cpmix": "tracker"'


class Tracker(Protocol):
    """Writer of the curves of one phase. No method raises an error of the tracker."""

    def begin(self) -> None:
        """Prepare to write; nothing is written yet."""

    def write(self, history: Sequence[Row]) -> None:
        """Write the rows that were not written before."""

    def end(self, *, finished: bool) -> None:
        """Complete what was written; `finished`: the phase is trained to its end."""


@dataclass(frozen=True)
class Description:
    """Description of a phase for trackers."""

    folder: Path
    """Folder RUN/PHASE."""
    recipe: Recipe
    dataset: str
    """Name of the data set."""

    def fields(self) -> dict[str, Any]:
        """Return the names, and the recipe as nested tables and as flat texts."""
        run = self.folder.resolve().parent
        name = f"{run.parent.name}/{run.name}" if run.name.startswith("seed-") else run.name
        config = {**self.recipe.tables(), "dataset": self.dataset, "phase": self.folder.name}
        return {
            "folder": str(self.folder.resolve()),
            "run": name,
            "phase": self.folder.name,
            "name": f"{name}/{self.folder.name}",
            "config": config,
            "parameters": dict(_flat(config)),
        }


def make_trackers(names: str | None, phase: Description) -> list[Tracker]:
    """Return the trackers of --tracker; warn of those whose package is not installed."""
    wanted = dict.fromkeys(names.split(",")) if names else ()
    return [tensorboard.Tracker(phase.folder) if name == "tensorboard" else _Remote(name, phase) for name in wanted]


@contextmanager
def running(trackers: Sequence[Tracker]) -> Iterator[None]:
    """Context of a phase in which trackers are written."""
    finished = False
    try:
        for tracker in trackers:
            tracker.begin()
        yield
        finished = True
    finally:
        for tracker in trackers:
            tracker.end(finished=finished)


def forget(folder: Path) -> None:
    """Delete what trackers keep in a phase's folder of a run that is being replaced: the next has its own curves."""
    tensorboard.forget(folder)
    for name in REMOTE:
        path = folder / _file_of(name)
        with suppress(InputError, OSError), open_file(path) as file:
            if file.read(len(_MARK)) == _MARK:
                path.unlink()


def _file_of(name: str) -> str:
    return f"tracker-{name}.json"


def _flat(tables: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of nested tables as "table.key", with their values as text."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield _allowed(f"{before}{key}"), value if isinstance(value, str) else json.dumps(value)


def _allowed(name: str) -> str:
    """Return a name with characters that all trackers allow."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-./ ") else "_" for c in name)


def _curves(row: Row, seconds_ago: float) -> dict[str, Any]:
    """Return a row as tracker_process.py reads it."""
    named, evaluated = {}, {}
    for column, value in row.items():
        if value is None or column == "epoch":
            continue
        if "/" in column:
            evaluated[_allowed(column)] = value
        else:
            name = _NAMES.get(column, f"train/{_allowed(column)}")
            named[name] = 100 * value if column.endswith("accuracy") else value
    return {"seconds_ago": seconds_ago, "evaluated": evaluated, "values": named, "epoch": int(row["epoch"] or 0)}


class _Remote:
    """Tracker in a process of its own, see tracker_process.py.

    Nothing here waits for it before end(): a pipe that is full gets the rows later, from the history.
    """

    def __init__(self, name: str, phase: Description) -> None:
        self._name, self._phase = name, phase
        self._history: Sequence[Row] = ()
        self._num_sent = 0
        self._unsent = self._unread = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._works, self._is_done = True, False
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as one that wandb wrote, is no package
            self._give_up(f"{name} is not installed (pip install 'cpmix[{name}]')")

    def begin(self) -> None:
        if not self._works:
            return
        # -P: files beside the script, or in the working directory, are not imported in the place of packages.
        command = [sys.executable, "-P", str(Path(__file__).with_name("tracker_process.py"))]
        try:
            # A session of its own: Ctrl-C at a terminal is for the run, which then closes the pipe.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
            )
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
        except OSError as fault:
            self._give_up(f"its process cannot be started: {fault.strerror or fault}")
            return
        self._send({"tracker": self._name, "file": _file_of(self._name), **self._phase.fields()})

    def write(self, history: Sequence[Row]) -> None:
        self._history = history
        if self._process is None or not self._works:
            return
        self._flush()
        while not self._unsent and self._num_sent < len(history) and self._works:
            later = history[self._num_sent + 1 :]
            self._send(_curves(history[self._num_sent], sum(row["seconds"] or 0.0 for row in later)))
            self._num_sent += 1
        self._listen()

    def end(self, *, finished: bool) -> None:
        process, stopped = self._process, signals.pending() is not None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        began = self._heard = time.monotonic()
        while self._works and not stopped and (self._unsent or self._num_sent < len(self._history)):
            if not self._wait(began, process.stdin.fileno(), for_writing=True):
                break
            self.write(self._history)
        if self._works and not self._unsent:
            self._send({"finished": finished})
        process.stdin.close()
        if stopped:  # there is no time to wait: the process ends by itself
            process.stdout.close()
            process.returncode = 0  # as if it had ended: else Python warns that it still runs
            return
        while self._works and self._listen() and self._wait(began, process.stdout.fileno()):
            pass
        if self._num_sent and not self._is_done:
            self._give_up("its process ended")
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()

    def _wait(self, began: float, pipe: int, *, for_writing: bool = False) -> bool:
        """Wait until a pipe is ready; give up, and return False, when the time is over."""
        now = time.monotonic()
        left = min(self._heard + SILENT_SECONDS, began + END_SECONDS) - now
        if left <= 0:
            self._give_up(f"not done {now - began:.0f} s after the end of the phase, and stopped")
            return False
        select.select([] if for_writing else [pipe], [pipe] if for_writing else [], [], min(left, 1.0))
        return True

    def _send(self, fields: Mapping[str, Any]) -> None:
        self._unsent += (json.dumps(fields) + "\n").encode()
        self._flush()

    def _flush(self) -> None:
        """Write to the pipe what it takes now."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(BlockingIOError):
            while self._unsent and self._works:
                try:
                    self._unsent = self._unsent[os.write(self._process.stdin.fileno(), self._unsent) :]
                except BrokenPipeError:
                    self._listen()
                    self._give_up("its process ended")

    def _listen(self) -> bool:
        """Print what the process says; return whether it may say more."""
        assert self._process is not None and self._process.stdout is not None
        with suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), 1 << 16):
                self._heard = time.monotonic()
                *lines, self._unread = (self._unread + data).split(b"\n")
                for line in lines:
                    self._answer(*json.loads(line).popitem())
            return False
        return True

    def _answer(self, kind: str, text: str) -> None:
        if kind == "refused":
            self._give_up(text)
        elif kind == "warning":
            console.warn(f"--tracker {self._name}: {text}")
        elif kind == "note":
            self._is_done = True
            console.note(f"--tracker {self._name}: {text}")

    def _give_up(self, why: str) -> None:
        if self._works:
            console.warn(f"--tracker {self._name}: {why}; the run goes on without")
        self._works = False
