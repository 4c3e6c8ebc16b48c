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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from cpmix_cli import __version__, artifacts, console
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.errors import EnvironmentFault, InputError, UsageError
from cpmix_cli.recipe import Recipe, differences, load

PHASES = ("stage1", "stage2", "finetune")
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
        """run.json is there."""
        return (self.path / artifacts.RUN).is_file()

    def record(self) -> dict[str, Any]:
        """run.json, verified.

        Raises:
            InputError: the phase is not done, or its record is damaged.
        """
        return artifacts.read_record(self.path / artifacts.RUN)

    def output(self, name: str) -> tuple[Path, str]:
        """Path and recorded hash of one of the phase's files."""
        record = self.record()
        if name not in record["outputs"]:
            raise InputError(f"{self.path / artifacts.RUN} records no {name}")
        return self.path / name, str(record["outputs"][name])

    def begun(self) -> dict[str, Any]:
        """Source, data set and inputs of a done or interrupted phase: its record, or its training state's metadata.

        Raises:
            InputError: that is damaged.
        """
        if self.done:
            return self.record()
        path = self.path / artifacts.TRAINING_STATE
        metadata = artifacts.read_header(path)[1]
        if not isinstance(metadata, dict) or "dataset" not in metadata:
            raise InputError(f"{path} does not say what it is", fix="start the phase again with --overwrite")
        sealed = metadata.pop("digest", None)
        if sealed is not None and sealed != artifacts.digest(metadata):
            raise InputError(f"{path} is damaged", fix="start the phase again with --overwrite")
        return metadata

    def recipe(self) -> Recipe:
        """The resolved recipe of a done or interrupted phase, verified where the phase is done.

        Raises:
            InputError: recipe.toml is missing or damaged.
        """
        path, sha = self.output(artifacts.RECIPE) if self.done else (self.path / artifacts.RECIPE, None)
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
        return "interrupted" if (self.path / artifacts.TRAINING_STATE).is_file() else "absent"


def beside(run: Path, relative: str) -> Path:
    """A path recorded relative to a run folder, as it can be typed; whole where a symbolic link is in the way."""
    typed, real = Path(os.path.normpath(run / relative)), (run / relative).resolve()
    return typed if typed.resolve() == real else real


def locate(source: Path) -> tuple[Path, str | None]:
    """--from FOLDER -> run folder, and the phase where FOLDER is a phase's own folder.

    Raises:
        InputError: FOLDER does not exist.
    """
    if not source.is_dir():
        raise InputError(
            f"no run folder {source}",
            needed_by="--from",
            fix=remake(source, "stage1", "absent"),
        )
    if source.resolve().name in PHASES and (source / artifacts.RUN).is_file():
        return source.parent, source.resolve().name
    return source, None


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


def find_dataset(run: Path, record: dict[str, Any], given: Path | None, *, needed_by: str) -> Dataset:
    """The data set a run was made from: --data, the recorded relative path, or the recorded absolute one.

    Raises:
        InputError: none of them holds the data set with the recorded fingerprint.
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
            return found
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
    }


def class_counts(folder: PhaseFolder) -> tuple[Path, pa.Schema, str]:
    """Path, schema and hash of a phase's class_counts.parquet, as artifacts.read_table() takes them."""
    path, sha = folder.output(artifacts.CLASS_COUNTS)
    return path, artifacts.CLASS_COUNTS_SCHEMA, sha


def decide(
    folder: Path, made_from: dict[str, Any], *, overwrite: bool, refresh: bool = False
) -> Literal["fresh", "resume", "done"]:
    """What a command has to do in its output folder; writes nothing.

    Args:
        folder: the output folder.
        made_from: what the output depends on: "recipe" tables and hashes of inputs.
        overwrite: start again whatever is there.
        refresh: inputs that changed are reason enough to start again (for outputs that cost seconds).

    Returns:
        "done": it is there, made from the same. "resume": begun from the same. "fresh": nothing usable is there (any
        more).

    Raises:
        EnvironmentFault: the folder holds an output made from something else.
    """
    found: dict[str, Any] | None = None
    state: Literal["resume", "done"] = "done"
    if not overwrite:
        if (folder / artifacts.RUN).is_file():
            found = artifacts.read_record(folder / artifacts.RUN)["made_from"]
        elif (folder / artifacts.TRAINING_STATE).is_file():
            _, metadata = artifacts.read_tensors(folder / artifacts.TRAINING_STATE)
            found, state = (metadata or {}).get("made_from", {}), "resume"
    if found is None:
        return "fresh"
    if found == made_from:
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
    """Make the output folder, and take away what claims that it is done or begun; run.json goes first.

    Raises:
        EnvironmentFault: the folder cannot be made or written.
    """
    artifacts.make_folder(folder)
    try:
        for name in (artifacts.RUN, artifacts.TRAINING_STATE):
            (folder / name).unlink(missing_ok=True)
    except OSError as fault:
        raise artifacts.write_fault(folder, fault) from fault


class Recorder:
    """Collects what run.json says of one execution; finish() publishes it last."""

    def __init__(self, folder: Path, phase: str, made_from: dict[str, Any]) -> None:
        self._folder = folder
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

    def _record(self, name: str, sha: str) -> None:
        """Record a file of the folder by its hash."""
        self._outputs[name] = sha

    def publish(self, name: str, data: bytes) -> None:
        """Publish a file of the folder and record it."""
        self._record(name, artifacts.publish(self._folder / name, data))

    def publish_table(self, name: str, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
        """Publish a Parquet file of the folder and record it."""
        self._record(name, artifacts.publish_table(self._folder / name, schema, columns))

    def publish_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        """Publish a safetensors file of the folder and record it."""
        self._record(name, artifacts.publish_tensors(self._folder / name, tensors, metadata))

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
