"""Run folders: which phases are done, stale or interrupted, and who may write where.

A run folder holds one folder a phase. run.json is written last and its presence means done; it records the hashes of
what went in and what came out, so a phase knows by itself whether it still belongs to the files beside it. Nothing is
guessed from file times.
"""

import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pyarrow as pa
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor

from cpmix_cli import __version__, artifacts, console
from cpmix_cli.data.dataset import Dataset, FileName, Shaped, Storage, open_dataset
from cpmix_cli.errors import EnvironmentFault, InputError, UsageError
from cpmix_cli.locks import Lock
from cpmix_cli.recipe import Recipe, differences, load

TrainingPhase = Literal["stage1", "stage2", "finetune"]
PHASES: tuple[str, ...] = get_args(TrainingPhase)
COMMANDS = {"stage1": "train-stage1", "stage2": "train-stage2", "finetune": "finetune"}

Status = Literal["absent", "interrupted", "done", "stale"]


@dataclass(frozen=True)
class PhaseFolder:
    """The folder of one training phase in a run folder."""

    run: Path
    phase: str

    @property
    def path(self) -> Path:
        """RUN/PHASE."""
        return self.run / self.phase

    @property
    def done(self) -> bool:
        """run.json is there, whatever it is.

        Raises:
            InputError: the folder cannot be looked into.
        """
        return artifacts.is_there(self.path / artifacts.RUN)

    @property
    def is_begun(self) -> bool:
        """Done, or a training state is there."""
        return self.done or artifacts.is_there(self.path / artifacts.TRAINING_STATE)

    def record(self) -> dict[str, Any]:
        """run.json, verified.

        Raises:
            InputError: the phase is not done, or its record is damaged, or of another phase.
        """
        return self._own(artifacts.RUN, read_run(self.path, PhaseEntry))

    def _own(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        """A record of this phase; a folder may have been copied under another's name.

        Raises:
            InputError: of another.
        """
        if record["phase"] != self.phase:
            raise InputError(f"{self.path / name} is of {record['phase']}, and not of {self.phase}")
        return record

    def files(self, *names: str) -> list[Path]:
        """Those of these files that are there."""
        return [self.path / name for name in names if (self.path / name).is_file()]

    def output(self, name: str) -> tuple[Path, str]:
        """Path and recorded hash of one of the phase's files."""
        return output_of(self.path, self.record(), name)

    def begun(self) -> dict[str, Any]:
        """Source, data set and inputs of a done or interrupted phase: its record, or its training state's metadata.

        Raises:
            InputError: that is damaged.
        """
        if self.done:
            return self.record()
        path = self.path / artifacts.TRAINING_STATE
        return self._own(path.name, _state_entry(path, artifacts.check_seal(path, artifacts.read_header(path)[1])))

    def recipe(self) -> Recipe:
        """The resolved recipe of a done or interrupted phase, verified.

        Raises:
            InputError: recipe.toml is missing or damaged.
        """
        path = self.path / artifacts.RECIPE
        sha = self.output(artifacts.RECIPE)[1] if self.done else self.begun()["recipe_sha256"]
        artifacts.read_bytes(path, sha)
        try:
            return load(str(path))
        except UsageError as fault:  # nobody's --recipe: a file of the run folder
            raise InputError(fault.message, fix="restore it, or start the phase again with --overwrite") from fault

    def origin(self) -> "PhaseFolder | None":
        """The phase that a done or interrupted one started from, wherever that is; None for stage 1.

        Raises:
            InputError: what says so is damaged.
        """
        source = self.begun().get("source")
        return PhaseFolder(beside(self.run, source["run"]), source["phase"]) if source else None

    def stale_because(self) -> str | None:
        """Why a done or interrupted phase no longer belongs to its input, or None.

        An input that is out of reach (its run was deleted or left behind in a move) says nothing against the phase.
        """
        origin = self.origin()
        if origin is None or not origin.path.is_dir():
            return None
        if not origin.done:
            return f"{origin.phase} is being trained again"
        if origin.output(artifacts.TRAINING_STATE)[1] != self.begun()["source"]["sha256"]:
            return f"{origin.phase} was trained again since"
        return origin.stale_because()

    def status(self) -> Status:
        """absent, interrupted, done or stale."""
        if self.done:
            return "stale" if self.stale_because() else "done"
        return "interrupted" if self.is_begun else "absent"


def _place(path: str) -> str:
    """A path as it may be; checked here and not by a pattern, which takes no bytes that are not UTF-8."""
    if not path or "\0" in path or len(path) > 4096:
        raise ValueError("no path")
    return path


Place = Annotated[str, AfterValidator(_place)]


class DatasetEntry(Shaped):
    """How a record names its data set; see dataset_entry()."""

    name: str
    relative: Place
    absolute: Place
    fingerprint: str
    storage: Storage = "tensors"


class SourceEntry(BaseModel):
    """The checkpoint that something was made from."""

    model_config = ConfigDict(strict=True)

    phase: TrainingPhase
    sha256: str
    run: Place = "."


class RunEntry(BaseModel):
    """What readers of any run.json count on."""

    model_config = ConfigDict(strict=True)

    phase: str
    made_from: dict[str, Any]
    outputs: dict[FileName, str]


class PhaseEntry(RunEntry):
    """What readers of a training phase's run.json count on."""

    phase: TrainingPhase
    source: SourceEntry | None
    dataset: DatasetEntry
    device: str
    precision: Literal["fp32", "bf16"]
    threads: int
    ranks: int = 1
    num_parameters: int
    epochs: int
    training_seconds: float
    gpu_hours: float


class EvaluationEntry(RunEntry):
    """What readers of an evaluation's run.json count on."""

    source: SourceEntry
    dataset: DatasetEntry
    data_root: Place | None = None


class ReportEntry(RunEntry):
    """What readers of a report's run.json count on."""

    page: str
    picture: str


class StateEntry(BaseModel):
    """What readers of a training state's metadata count on."""

    model_config = ConfigDict(strict=True)

    phase: TrainingPhase
    made_from: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    threads: int
    ranks: int = 1
    epoch: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=0)]
    columns: list[str]
    source: SourceEntry | None
    dataset: DatasetEntry
    inputs: dict[str, str]
    recipe_sha256: str
    tensors_digest: str


def read_run(folder: Path, entry: type[RunEntry] = RunEntry) -> dict[str, Any]:
    """A folder's run.json, verified.

    Raises:
        InputError: missing or damaged, or a record of something else.
    """
    path = folder / artifacts.RUN
    return artifacts.checked(path, entry, artifacts.read_record(path))


def output_of(folder: Path, record: Mapping[str, Any], name: str) -> tuple[Path, str]:
    """Path and recorded hash of one of a folder's files.

    Raises:
        InputError: its run.json does not name the file.
    """
    if name not in record["outputs"]:
        raise InputError(f"{folder / artifacts.RUN} records no {name}")
    return folder / name, str(record["outputs"][name])


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an interrupted phase's training state, verified by what it says of itself.

    Raises:
        InputError: missing or damaged.
    """
    tensors, metadata = artifacts.read_tensors(path)
    return tensors, _state_entry(path, artifacts.check_seal(path, metadata, tensors))


def _state_entry(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    artifacts.check_format(path, metadata)
    return artifacts.checked(path, StateEntry, metadata)


def beside(run: Path, relative: str) -> Path:
    """A path recorded relative to a run folder, as it can be typed; whole where a symbolic link is in the way."""
    typed, real = Path(os.path.normpath(run / relative)), (run / relative).resolve()
    return typed if typed.resolve() == real else real


def locate(source: Path, *, needed_by: str = "--from") -> tuple[Path, str | None]:
    """FOLDER -> run folder, and the phase where FOLDER is a phase's own folder.

    Raises:
        InputError: FOLDER does not exist.
    """
    if not source.is_dir():
        raise InputError(
            f"no run folder {source}",
            needed_by=needed_by,
            fix=remake(source, "stage1", "absent"),
        )
    if source.resolve().name in PHASES and PhaseFolder(source.parent, source.resolve().name).done:
        return source.parent, source.resolve().name
    return source, None


def begun_phases(run: Path, *, needed_by: str) -> list[PhaseFolder]:
    """The phases of a run that are done, stale or interrupted, in their order.

    Raises:
        InputError: there are none, or a record is damaged.
    """
    begun = [folder for folder in (PhaseFolder(run, phase) for phase in PHASES) if folder.status() != "absent"]
    if not begun:
        raise InputError(f"{run} holds no phase of a run", needed_by=needed_by, fix=remake(run, "stage1", "absent"))
    return begun


def choose_phase(run: Path, wanted: str | None, candidates: tuple[str, ...], *, needed_by: str) -> PhaseFolder:
    """The phase a later command takes: the one named, else the last that is done and not stale; says which.

    Raises:
        UsageError: no such phase.
        InputError: it is not done, or stale.
    """
    if wanted is not None:
        if wanted not in candidates:
            raise UsageError(f"{needed_by} takes no phase {wanted}: one of {', '.join(candidates)}")
        folder = PhaseFolder(run, wanted)
        if not folder.is_begun:  # the job before may have ended on another machine, a moment ago
            artifacts.wait_for(folder.path / artifacts.RUN)
        status = folder.status()
        if status != "done":
            why = folder.stale_because() if status == "stale" else None
            raise InputError(
                f"{folder.path} is {status}{f': {why}' if why else ''}",
                needed_by=needed_by,
                fix=remake(run, wanted, status),
            )
        return folder
    passed_over: list[str] = []
    for phase in reversed(candidates):
        folder = PhaseFolder(run, phase)
        status = folder.status()
        if status == "done":
            for line in passed_over:
                console.warn(line)
            console.note(f"{needed_by}: takes {phase} of {run}")
            return folder
        if status == "stale":
            passed_over.append(f"{phase} is stale ({folder.stale_because()}) and is not used")
        elif status == "interrupted":
            passed_over.append(f"{phase} is not finished and is not used")
    detail = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise InputError(
        f"{run} holds no finished {' or '.join(candidates)}{detail}",
        needed_by=needed_by,
        fix=remake(run, candidates[0], "absent"),
    )


def remake(run: Path, phase: str, status: str) -> str:
    """The command that makes a phase."""
    if phase == "stage1":
        return console.typed(COMMANDS[phase], "--data", "DATA", "--out", run)
    return console.typed(COMMANDS[phase], "--from", run, *(["--overwrite"] if status == "stale" else []))


def find_dataset(
    run: Path, record: dict[str, Any], given: Path | None, *, needed_by: str, data_root: Path | None = None
) -> Dataset:
    """The data set a run was made from: --data, the recorded relative path, or the recorded absolute one; `data_root`
    see open_dataset().

    Raises:
        InputError: none of them holds the data set with the recorded fingerprint, or `data_root` not its images.
        UsageError: see open_dataset().
    """
    known = record["dataset"]
    places = [given] if given is not None else [run / known["relative"], Path(known["absolute"])]
    seen = []
    for place in places:
        try:
            found = open_dataset(place, needed_by=needed_by)
        except InputError as fault:
            seen.append(fault.message)
            continue
        if found.fingerprint == known["fingerprint"]:
            return found if data_root is None else open_dataset(place, needed_by=needed_by, data_root=data_root)
        seen.append(f"{place} holds another data set ({found.name})")
    raise InputError(
        f"the data set {known['name']} of {run} is not found: {'; '.join(dict.fromkeys(seen))}",
        needed_by=needed_by,
        fix="give its folder with --data FOLDER",
    )


def dataset_entry(dataset: Dataset, run: Path) -> dict[str, Any]:
    """How run.json names a data set: relative to the run folder, absolute, by fingerprint; and what `predict` needs."""
    return {
        "name": dataset.name,
        "relative": os.path.relpath(dataset.folder.resolve(), run.resolve()),
        "absolute": str(dataset.folder.resolve()),
        "fingerprint": dataset.fingerprint,
        "shape": dataset.shape,
        "mean": dataset.record["mean"],
        "std": dataset.record["std"],
        **({} if dataset.storage == "tensors" else {"storage": dataset.storage}),
    }


def decide(
    folder: Path, made_from: dict[str, Any], *, overwrite: bool, refresh: bool = False
) -> Literal["fresh", "resume", "done"]:
    """What a command has to do in its output folder; writes nothing.

    Args:
        folder: the output folder.
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
    found: dict[str, Any] | None = None
    state: Literal["resume", "done"] = "done"
    outputs: dict[str, str] = {}
    if overwrite:
        if not artifacts.is_there(folder / artifacts.RUN):
            with suppress(InputError):
                if read_state(folder / artifacts.TRAINING_STATE)[1]["made_from"] == made_from:
                    return "resume"
    else:
        if artifacts.is_there(folder / artifacts.RUN):
            record = read_run(folder)
            found, outputs = record["made_from"], record["outputs"]
        elif artifacts.is_there(path := folder / artifacts.TRAINING_STATE):
            found, state = read_state(path)[1]["made_from"], "resume"
    if found is None:
        return "fresh"
    if found == made_from:
        artifacts.verify(folder, outputs)
        return state
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
    artifacts.make_folder(folder)
    try:
        (folder / artifacts.RUN).unlink(missing_ok=True)
    except OSError as fault:
        raise artifacts.write_fault(folder, fault) from fault


class Recorder:
    """Collects what run.json says of one execution; finish() publishes it last.

    Args:
        folder: where all of it goes.
        phase: what made it.
        made_from: see decide().
        lock: of the folder; nothing is written once it is lost.
    """

    def __init__(self, folder: Path, phase: str, made_from: dict[str, Any], lock: Lock) -> None:
        self._folder = folder
        self._lock = lock
        self._started = time.time()
        self._outputs: dict[str, str] = {}
        self._fields: dict[str, Any] = {
            "format": artifacts.FORMAT,
            "phase": phase,
            "made_from": made_from,
            "source": None,
        }

    def set(self, **fields: Any) -> None:
        """Add or replace fields."""
        self._fields |= fields

    def publish(self, name: str, data: bytes) -> str:
        """Publish a file of the folder and record it; returns its hash."""
        self._lock.check()
        self._outputs[name] = artifacts.publish(self._folder / name, data)
        return self._outputs[name]

    def publish_table(self, name: str, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
        """Publish a Parquet file of the folder and record it."""
        self.publish(name, artifacts.table_bytes(schema, columns))

    def publish_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        """Publish a safetensors file of the folder and record it."""
        self.publish(name, artifacts.tensor_bytes(tensors, metadata))

    def finish(self) -> dict[str, Any]:
        """Publish run.json and return what it says."""
        now = time.time()
        record = {
            **self._fields,
            "outputs": self._outputs,
            "argv": sys.argv,
            "versions": {
                "cpmix": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "host": socket.gethostname(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "started": _iso(self._started),
            "finished": _iso(now),
            "seconds": round(now - self._started, 3),
        }
        self._lock.check()
        artifacts.publish_record(self._folder / artifacts.RUN, record)
        return record


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def next_command(run: Path, phase: str, recipe: Recipe) -> str:
    """What to type after a phase."""
    command = "evaluate"
    if phase == "stage1" and recipe.stage2 is not None:
        command = "train-stage2"
    elif phase in ("stage1", "stage2") and recipe.finetune is not None:
        command = "finetune"
    return console.typed(command, "--from", run)


def require_same_upstream(folder: PhaseFolder, recipe: Recipe, *, needed_by: str, origin: str) -> None:
    """Refuse a recipe under which `folder` would have been trained differently.

    Raises:
        InputError: with the keys that differ.
    """
    changed = differences(folder.record()["made_from"]["recipe"], recipe.tables_of(folder.phase))
    if changed:
        raise InputError(
            f"{folder.path} was trained differently from {origin}:\n    " + "\n    ".join(changed),
            needed_by=needed_by,
            fix=f"train {folder.phase} with that recipe into another folder, or drop the changed keys",
        )
