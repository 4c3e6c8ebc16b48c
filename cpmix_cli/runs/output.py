"""Output folders: deciding whether to start, resume or stop, and recording the outputs in run.json."""

import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from cpmix_cli import __version__
from cpmix_cli.artifacts import files, records, tables
from cpmix_cli.artifacts.locks import Lock
from cpmix_cli.artifacts.ownership import refuse_strangers
from cpmix_cli.artifacts.tensors import tensor_bytes
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import differences
from cpmix_cli.runs.run_json import RunRecord, read_run, verify_state
from cpmix_cli.runtime import console
from cpmix_cli.runtime.checkout import commit_of_code
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, InputError, UnreadableError, indented


def decide(
    folder: Path, made_from: dict[str, Any], writes: Iterable[str], *, overwrite: bool, refresh: bool = False
) -> Literal["fresh", "resume", "done"]:
    """Decide what a command does in its output folder; write nothing.

    Args:
        folder: output folder.
        made_from: inputs of the output: "recipe" tables, and hashes of the other inputs.
        writes: names of all files that the command may write into the folder.
        overwrite: replace any output, but resume one that the same inputs began. A preempted job that is queued again
            has the flag each time.
        refresh: replace the output if inputs other than the recipe changed, for outputs that take only seconds.

    Returns:
        "done": finished from the same inputs. "resume": begun from the same inputs. "fresh": start from the beginning.

    Raises:
        EnvironmentFault: the folder has an output of other inputs, or a file that cpmix did not write.
        InputError: the output is damaged.
        UnreadableError: a file of the output cannot be read now.
    """
    names = list(writes)
    is_known = files.RECIPE in names and _is_written(folder / files.RECIPE)
    refuse_strangers(folder, [n for n in names if n != files.RECIPE or not is_known], is_known=is_known)
    path = folder / files.TRAINING_STATE
    is_done = files.is_there(folder / files.RUN)
    if overwrite:
        try:
            resumes = not is_done and verify_state(path)[0].made_from.inputs() == made_from
        except UnreadableError:  # perhaps for a moment
            raise
        except InputError:
            resumes = False
        return "resume" if resumes else "fresh"
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
    changed = [line.removeprefix("recipe.") for line in changed]
    again = _flags_of(found["recipe"], [line.partition(":")[0] for line in changed])
    raise EnvironmentFault(
        f"{folder} was made from something else:{indented(changed)}",
        fix=(f"give {again}, as it was begun; or " if again else "")
        + "write elsewhere with --out FOLDER, or replace it with --overwrite",
    )


def _is_written(recipe: Path) -> bool:
    """Return whether a recipe is just as cpmix writes it: all that a phase leaves that ends before its first state."""
    try:
        return load(str(recipe), as_record=True).to_toml().encode() == files.read_bytes(recipe)
    except CpmixError:
        return False


def _flags_of(recipe: dict[str, Any], changed: Sequence[str]) -> str:
    """Return --epochs and --seed of a recorded recipe, if no other key changed; "" if they do not suffice."""
    schedule = recipe.get("schedule", {})
    lengths = {key for key in changed if "epoch" in key or "milestones" in key or key.endswith("rescaled_from")}
    if (lengths and not schedule.get("rescaled_from")) or lengths | {"seed"} != {*changed, "seed"}:
        return ""
    flags = [f"--epochs {schedule['epochs']}"] if lengths else []
    return " ".join(flags + ([f"--seed {recipe['seed']}"] if "seed" in changed else []))


@dataclass
class Recorder:
    """Publisher of the files of an output folder, which records their hashes; finish() writes run.json last."""

    folder: Path
    """Output folder."""
    phase: str
    """Phase or command that makes the output."""
    made_from: dict[str, Any]
    """Inputs of the output, see decide()."""
    lock: Lock
    """Lock of the folder; if it is lost, nothing more is written."""
    _place: Path = field(init=False)  # where new files are written
    _outputs: dict[str, str] = field(default_factory=dict)
    _started: float = field(default_factory=time.time)
    _commit: str | None = field(default_factory=commit_of_code)  # the code may change while it runs

    def __post_init__(self) -> None:
        self._place = self.folder

    @contextmanager
    def replacing(self, others: Mapping[str, Path] = MappingProxyType({})) -> Iterator[Path]:
        """Write the files of this context beside the old output; at its end all of them replace it, or none.

        Args:
            others: name -> path of files that belong outside the folder.

        Yields:
            Folder that the new files are in until then.

        Raises:
            EnvironmentFault: a file cannot be written.
        """
        with files.staging(self.folder) as self._place:
            yield self._place
            self.lock.check()
            written = sorted(self._place.iterdir(), key=lambda path: (path.name == files.RUN, path.name))
            new = [(path, others.get(path.name, self.folder / path.name)) for path in written]
            files.replace_together(self.folder / files.RUN, new)
        self._place = self.folder

    def publish(self, name: str, data: bytes) -> str:
        """Publish a file in the folder and record it; return its sha256."""
        self.lock.check()
        self._outputs[name] = files.publish(self._place / name, data)
        return self._outputs[name]

    def publish_table(self, name: str, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
        """Publish a Parquet file in the folder and record it.

        Args:
            name: file name.
            schema: names, types and nullability of the columns.
            columns: values by column name, all of one length.
        """
        self.publish(name, tables.table_bytes(schema, columns))

    def publish_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        """Publish a safetensors file in the folder and record it.

        Args:
            name: file name.
            tensors: tensors by name, on any device.
            metadata: JSON value for the file's header, or None.
        """
        self.publish(name, tensor_bytes(tensors, metadata))

    def finish(self, **fields: Any) -> None:
        """Publish run.json: inputs, outputs, versions, times and `fields`."""
        now = time.time()
        record = {
            "format": records.FORMAT,
            "phase": self.phase,
            "made_from": self.made_from,
            "source": None,
            **fields,
            "outputs": self._outputs,
            "argv": sys.argv,
            "versions": {
                "cpmix": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "commit": self._commit,
            },
            "host": socket.gethostname(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "started": _iso(self._started),
            "finished": _iso(now),
            "seconds": round(now - self._started, 3),
        }
        self.lock.check()
        records.publish_record(self._place / files.RUN, record)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
