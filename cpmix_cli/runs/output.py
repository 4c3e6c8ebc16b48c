"""An output folder: what is to be done in it, and what is recorded of it."""

import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from cpmix_cli import __version__
from cpmix_cli.artifacts import files, records, tables
from cpmix_cli.artifacts.locks import Lock
from cpmix_cli.artifacts.tensors import tensor_bytes
from cpmix_cli.recipe.schema import differences
from cpmix_cli.runs.run_json import RunRecord, read_run, verify_state
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError


def decide(
    folder: Path, made_from: dict[str, Any], *, overwrite: bool, refresh: bool = False
) -> Literal["fresh", "resume", "done"]:
    """What a command has to do in its output folder; writes nothing.

    Args:
        folder: where it writes.
        made_from: what the output depends on: "recipe" tables and hashes of inputs.
        overwrite: start again whatever is there, but for what the same command began and did not finish: a job that
            is preempted and queued again has the flag each time.
        refresh: inputs that changed are reason enough to start again (for outputs that cost seconds).

    Returns:
        "done": it is there, made from the same. "resume": begun from the same. "fresh": nothing usable is there (any
        more).

    Raises:
        EnvironmentFault: the folder holds an output made from something else.
        InputError: what it holds is damaged.
    """
    path = folder / files.TRAINING_STATE
    is_done = files.is_there(folder / files.RUN)
    if overwrite:
        with suppress(InputError):
            if not is_done and verify_state(path)[0].made_from.inputs() == made_from:
                return "resume"
        return "fresh"
    outputs: dict[str, str] = {}
    if is_done:
        record = read_run(folder, RunRecord)
        found, outputs = record.made_from.inputs(), record.outputs
    elif files.is_there(path):
        found = verify_state(path)[0].made_from.inputs()
    else:
        return "fresh"
    if found == made_from:
        files.verify(folder, outputs)
        return "done" if is_done else "resume"
    changed = differences(found, made_from)
    if refresh and not any(line.startswith("recipe.") for line in changed):
        console.note(f"{folder}: its input changed, so it is made again")
        return "fresh"
    raise EnvironmentFault(
        f"{folder} was made from something else:\n    "
        + "\n    ".join(line.removeprefix("recipe.") for line in changed),
        fix="write elsewhere with --out FOLDER, or replace it with --overwrite",
    )


def clear(folder: Path) -> None:
    """Make the output folder, and take away what claims that it is done; what is left is replaced file by file.

    Raises:
        EnvironmentFault: the folder cannot be made or written.
    """
    files.make_folder(folder)
    try:
        (folder / files.RUN).unlink(missing_ok=True)
    except OSError as fault:
        raise files.write_fault(folder, fault) from fault


@dataclass
class Recorder:
    """Collects what run.json says of one execution; finish() publishes it last."""

    folder: Path
    """Where all of it goes."""
    phase: str
    """What made it."""
    made_from: dict[str, Any]
    """See decide()."""
    lock: Lock
    """Of the folder; nothing is written once it is lost."""
    _outputs: dict[str, str] = field(default_factory=dict)
    _started: float = field(default_factory=time.time)

    def publish(self, name: str, data: bytes) -> str:
        """Publish a file of the folder and record it; returns its hash."""
        self.lock.check()
        self._outputs[name] = files.publish(self.folder / name, data)
        return self._outputs[name]

    def publish_table(self, name: str, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
        """Publish a Parquet file of the folder and record it."""
        self.publish(name, tables.table_bytes(schema, columns))

    def publish_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        """Publish a safetensors file of the folder and record it."""
        self.publish(name, tensor_bytes(tensors, metadata))

    def finish(self, **fields: Any) -> None:
        """Publish run.json with more `fields`."""
        now = time.time()
        record = {
            "format": records.FORMAT,
            "phase": self.phase,
            "made_from": self.made_from,
            "source": None,
            **fields,
            "outputs": self._outputs,
            "argv": sys.argv,
            "versions": {"cpmix": __version__, "python": platform.python_version(), "torch": torch.__version__},
            "host": socket.gethostname(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "started": _iso(self._started),
            "finished": _iso(now),
            "seconds": round(now - self._started, 3),
        }
        self.lock.check()
        records.publish_record(self.folder / files.RUN, record)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
