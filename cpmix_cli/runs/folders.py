"""Run folders: which phases are done, stale or interrupted, and who may write where.

A run folder holds one folder a phase. run.json is written last and its presence means done; it records the hashes of
what went in and what came out, so a phase knows by itself whether it still belongs to the files beside it. Nothing is
guessed from file times.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cpmix_cli.artifacts.files import MODEL, RECIPE, RUN, TRAINING_STATE, is_there, read_bytes
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Recipe, differences
from cpmix_cli.runs import run_json
from cpmix_cli.runs.run_json import BegunRecord, DatasetReference, EvaluationRecord, PhaseRecord, StateRecord
from cpmix_cli.runtime.errors import InputError, UsageError

Status = Literal["absent", "interrupted", "done", "stale"]
_Begun = TypeVar("_Begun", bound=BegunRecord)


@dataclass(frozen=True)
class PhaseFolder:
    """The folder of one training phase in a run folder.

    What reads it raises InputError where it cannot be looked into, or is damaged.
    """

    run: Path
    phase: str

    @property
    def path(self) -> Path:
        """RUN/PHASE."""
        return self.run / self.phase

    @property
    def done(self) -> bool:
        """run.json is there, whatever it is."""
        return is_there(self.path / RUN)

    @property
    def is_begun(self) -> bool:
        """Done, or a training state is there."""
        return self.done or is_there(self.path / TRAINING_STATE)

    def record(self) -> PhaseRecord:
        """Read run.json of a done phase."""
        return self._own(RUN, run_json.read_run(self.path, PhaseRecord))

    def _own(self, name: str, record: _Begun) -> _Begun:
        """Refuse the record of another phase, whose folder was copied under this name."""
        if record.phase != self.phase:
            raise InputError(f"{self.path / name} is of {record.phase}, and not of {self.phase}")
        return record

    def output(self, name: str) -> tuple[Path, str]:
        """Path and recorded hash of one of the phase's files."""
        return run_json.output_of(self.path, self.record(), name)

    def state(self) -> StateRecord:
        """Read the metadata of the training state."""
        return self._own(TRAINING_STATE, run_json.read_state_record(self.path / TRAINING_STATE))

    def begun(self) -> BegunRecord:
        """Read what is recorded of a done or interrupted phase: its run.json, or its training state's metadata."""
        return self.record() if self.done else self.state()

    def recipe(self) -> Recipe:
        """The resolved recipe of a done or interrupted phase, verified."""
        path = self.path / RECIPE
        sha = self.output(RECIPE)[1] if self.done else self.state().recipe_sha256
        read_bytes(path, sha)
        try:
            return load(str(path))
        except UsageError as fault:  # nobody's --recipe: a file of the run folder
            raise InputError(fault.message, fix="restore it, or start the phase again with --overwrite") from fault

    def origin(self) -> "PhaseFolder | None":
        """The phase that a done or interrupted one started from, wherever that is; None for stage 1."""
        source = self.begun().source
        return PhaseFolder(beside(self.run, source.run), source.phase) if source else None

    def stale_because(self) -> str | None:
        """Return why a done or interrupted phase no longer belongs to its input, or None.

        An input that is out of reach (its run was deleted or left behind in a move) says nothing against the phase.
        """
        source, origin = self.begun().source, self.origin()
        if source is None or origin is None or not origin.path.is_dir():
            return None
        if not origin.done:
            return f"{origin.phase} is being trained again"
        if origin.output(TRAINING_STATE)[1] != source.sha256:
            return f"{origin.phase} was trained again since"
        return origin.stale_because()

    def evaluation(self, label: str | None = None) -> Path:
        """The folder of its evaluation: RUN/evaluation/PHASE or RUN/evaluation/PHASE-LABEL."""
        return self.run / "evaluation" / (self.phase if label is None else f"{self.phase}-{label}")

    def is_source_of(self, evaluation: EvaluationRecord) -> bool:
        """Whether an evaluation is of the present checkpoint of this phase."""
        return evaluation.source.sha256 == self.output(MODEL)[1]

    def status(self) -> Status:
        """absent, interrupted, done or stale."""
        if self.done:
            return "stale" if self.stale_because() else "done"
        return "interrupted" if self.is_begun else "absent"


def beside(run: Path, relative: str) -> Path:
    """A path recorded relative to a run folder, as it can be typed; whole where a symbolic link is in the way."""
    typed, real = Path(os.path.normpath(run / relative)), (run / relative).resolve()
    return typed if typed.resolve() == real else real


def find_dataset(run: Path, known: DatasetReference, given: Path | None, *, data_root: Path | None = None) -> Dataset:
    """Open the data set of a run: that of --data, else from where the run recorded it.

    Raises:
        InputError: none of them holds the data set with the recorded fingerprint, or `data_root` not its images.
        UsageError: see open_dataset().
    """
    places = [given] if given is not None else [run / known.relative, Path(known.absolute)]
    seen = []
    for place in places:
        try:
            found = open_dataset(place)
        except InputError as fault:
            seen.append(fault.message)
            continue
        if found.fingerprint == known.fingerprint:
            return found if data_root is None else open_dataset(place, data_root=data_root)
        seen.append(f"{place} holds another data set ({found.name})")
    raise InputError(
        f"the data set {known.name} of {run} is not found: {'; '.join(dict.fromkeys(seen))}",
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
        "mean": dataset.record.mean,
        "std": dataset.record.std,
        **({} if dataset.storage == "tensors" else {"storage": dataset.storage}),
    }


def require_same_upstream(folder: PhaseFolder, recipe: Recipe, *, origin: str) -> None:
    """Refuse a recipe under which `folder` would have been trained differently.

    Raises:
        InputError: with the keys that differ.
    """
    changed = differences(folder.record().made_from.recipe, recipe.tables_of(folder.phase))
    if changed:
        raise InputError(
            f"{folder.path} was trained differently from {origin}:\n    " + "\n    ".join(changed),
            fix=f"train {folder.phase} with that recipe into another folder, or drop the changed keys",
        )
