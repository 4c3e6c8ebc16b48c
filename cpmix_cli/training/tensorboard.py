"""--tracker tensorboard: the rows of metrics.parquet as TensorBoard curves, in an event file of the phase's folder.

The curves are written from the history each time the state is saved. So they show saved epochs only, and a resumed run
has each epoch once. The event file is no output of the phase: no record names it, and cpmix never reads it. Any error
with it is one warning, and training continues.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cpmix_cli.artifacts.files import open_file
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

EVENTS = "events.out.tfevents."  # prefix by which TensorBoard finds its files
_START = 65536  # bytes; the curves of the first epoch are there
_TAGS = (b"gradient_norm", b"num_fallbacks", b"images_per_second")
"""Names of curves by which files of cpmix are told from others."""


class Tracker:
    """Writer of the curves of one phase. Imports tensorboard, and warns if that fails."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A new name per run: an open TensorBoard does not read a file again after it was replaced.
        self._path = folder / f"{EVENTS}{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._num_written = 0
        self._works = True
        try:
            import tensorboard.compat.proto.event_pb2
            import tensorboard.summary.writer.record_writer  # noqa: F401
        except ModuleNotFoundError as fault:
            missing = (fault.name or "tensorboard").partition(".")[0]
            self._give_up(f"{missing} is not installed (pip install 'cpmix[tensorboard]')")
        except Exception as fault:  # mismatched versions of protobuf and numpy raise any type
            self._give_up(f"tensorboard cannot be imported: {fault}")

    def begin(self) -> None:
        """Do nothing: the file is made with the first rows."""

    def end(self, *, finished: bool) -> None:
        """Do nothing: write() closes the file."""

    def write(self, history: Sequence[Mapping[str, float | None]]) -> None:
        """Append the new rows of metrics.parquet; the first call deletes old event files and writes all rows."""
        if not self._works or not history:
            return
        try:
            if self._num_written == 0:
                forget(self._folder)
            self._append(history)
            self._num_written = len(history)
        except Exception as fault:
            self._give_up(f"cannot write {self._path}: {getattr(fault, 'strerror', None) or fault}")

    def _append(self, history: Sequence[Mapping[str, float | None]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        # Not tensorboard's SummaryWriter, which has a thread: errors must be raised here, and the file closed.
        with self._path.open("ab" if self._num_written else "xb") as file:
            records = RecordWriter(file)
            if file.tell() == 0:
                records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            for number in range(self._num_written, len(history)):
                row = dict(history[number])
                ended = now - sum(later["seconds"] or 0.0 for later in history[number + 1 :])
                epoch = int(row.pop("epoch") or 0)
                values = [Summary.Value(tag=tag, simple_value=v) for tag, v in row.items() if v is not None]
                event = Event(wall_time=ended, step=epoch, summary=Summary(value=values))
                records.write(event.SerializeToString())

    def _give_up(self, why: str) -> None:
        self._works = False
        console.warn(f"--tracker tensorboard: {why}; the run goes on without")


def forget(folder: Path) -> None:
    """Delete the event files of cpmix in a phase's folder, which belong to a run that is being replaced."""
    for path in folder.glob(f"{EVENTS}*"):
        with suppress(InputError, OSError), open_file(path) as file:
            start = file.read(_START)
            if all(name in start for name in _TAGS):
                path.unlink()
