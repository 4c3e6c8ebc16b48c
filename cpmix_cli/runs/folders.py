"""Run folders: phases that are done, stale or interrupted; the data set and the recipe of a run.

A run folder has one folder per phase. run.json is written last: a phase is done if it exists. It records the hashes of
the phase's inputs and outputs. By these hashes, not by file times, cpmix detects that a phase is stale.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cpmix_cli.artifacts import locks
from cpmix_cli.artifacts.files import MODEL, PHASES, RECIPE, RUN, TRAINING_STATE, is_there, read_bytes
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.recipe import plugins
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Recipe, differences
from cpmix_cli.runs import run_json
from cpmix_cli.runs.run_json import BegunRecord, DatasetReference, EvaluationRecord, PhaseRecord, StateRecord
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UnreadableError, UsageError

SEARCH_LEVELS = 3
"""Levels of folders that find_runs() looks at: ckpt/STUDY/RUN/seed-0."""
SEARCH_LIMIT = 5000
"""Folders that find_runs() looks at."""
Status = Literal["absent", "interrupted", "running", "done", "stale"]
_Begun = TypeVar("_Begun", bound=BegunRecord)


@dataclass(frozen=True)
class PhaseFolder:
    """Folder of one training phase in a run folder.

    Methods that read it raise InputError if the folder cannot be read, or a file in it is damaged.
    """

    run: Path
    phase: str

    @property
    def path(self) -> Path:
        """Path RUN/PHASE."""
        return self.run / self.phase

    @property
    def done(self) -> bool:
        """True if run.json exists; its content is not checked."""
        return is_there(self.path / RUN)

    @property
    def is_begun(self) -> bool:
        """True if the phase is done, or a training state exists."""
        return self.done or is_there(self.path / TRAINING_STATE)

    def record(self) -> PhaseRecord:
        """Return the content of run.json."""
        return self._own(RUN, run_json.read_run(self.path, PhaseRecord))

    def _own(self, name: str, record: _Begun) -> _Begun:
        """Return the record, or raise if it is of another phase, whose folder was copied under this name."""
        if record.phase != self.phase:
            path = self.path / name
            raise InputError(f"{path} is the record of {record.phase}, not of {self.phase}", path=path)
        return record

    def output(self, name: str) -> tuple[Path, str]:
        """Return the path and the recorded sha256 of one of the phase's output files."""
        return run_json.output_of(self.path, self.record(), name)

    def state(self) -> StateRecord:
        """Return the metadata of the training state."""
        return self._own(TRAINING_STATE, run_json.read_state_record(self.path / TRAINING_STATE))

    def begun(self) -> BegunRecord:
        """Return the record of the phase: run.json if it is done, else the metadata of its training state."""
        return self.record() if self.done else self.state()

    def recipe(self) -> Recipe:
        """Return the resolved recipe of a done or interrupted phase; the file's hash is verified.

        If it names functions of a plugin that is not given, they are not checked: see plugin_needs.py.
        """
        path = self.path / RECIPE
        sha = self.output(RECIPE)[1] if self.done else self.state().recipe_sha256
        read_bytes(path, sha)
        plugin, given = self.begun().plugin, plugins.current()
        try:
            return load(str(path), as_record=plugin is not None and (given is None or given.sha256 != plugin.sha256))
        except UsageError as fault:  # the file is not from --recipe, so it is no usage error
            raise InputError(fault.message, path=path) from fault

    def origin(self) -> "PhaseFolder | None":
        """Return the phase that this one started from, in this run or in another; None for stage 1."""
        source = self.begun().source
        return PhaseFolder(beside(self.run, source.run), source.phase) if source else None

    def stale_because(self) -> str | None:
        """Return why a done or interrupted phase is stale, or None if it is not.

        If the input run is missing (deleted, or not moved together), the phase does not count as stale.
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
        """Return the folder of the phase's evaluation: RUN/evaluation/PHASE or RUN/evaluation/PHASE-LABEL."""
        return self.run / "evaluation" / (self.phase if label is None else f"{self.phase}-{label}")

    def is_source_of(self, evaluation: EvaluationRecord) -> bool:
        """Return whether an evaluation was made from the current weights of this phase."""
        return evaluation.source.sha256 == self.output(MODEL)[1]

    @property
    def writer(self) -> locks.Owner | None:
        """Living process that holds the folder's lock; None if no process holds it."""
        return locks.holder(self.path)

    def status(self) -> Status:
        """Return absent, interrupted, running (a process trains it), done or stale."""
        if self.done:
            return "stale" if self.stale_because() else "done"
        if self.writer is not None:
            return "running"
        return "interrupted" if self.is_begun else "absent"

    def unusable_because(self) -> str | None:
        """Return why the phase cannot be used, as the rest of a sentence about it; None if it is done."""
        match self.status():
            case "absent":
                return "is not trained yet"
            case "interrupted":
                return "is not finished"
            case "running":
                return f"is being trained by {writer.name}" if (writer := self.writer) else "is being trained"
            case "stale":
                return f"is stale ({self.stale_because()})"
        return None


def find_runs(top: Path) -> list[Path]:
    """Return the run folders at and up to SEARCH_LEVELS levels below a folder, in the order of their names.

    A run is a folder with the record, state or lock of a phase. Links are followed, but no folder is looked at twice.
    More than SEARCH_LIMIT folders are not looked at, with a warning.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    level = [top]
    for _ in range(SEARCH_LEVELS + 1):
        below: list[Path] = []
        for folder in level:
            if len(seen) == SEARCH_LIMIT:
                console.warn(
                    f"{SEARCH_LIMIT:,} folders below {top} were looked at, and no more: name those of the runs"
                )
                return sorted(found, key=_by_number)
            with suppress(OSError):  # it is gone, or may not be read
                place = folder.stat()
                if (place.st_dev, place.st_ino) in seen:
                    continue
                seen.add((place.st_dev, place.st_ino))
                if any(
                    is_there(folder / phase / name) for phase in PHASES for name in (RUN, TRAINING_STATE, locks.LOCK)
                ):
                    found.append(folder)
                entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_dir()]
                names = sorted((entry.is_symlink(), entry.name) for entry in entries)  # links after what they lead to
                below += [folder / name for _, name in names if name not in (*PHASES, "evaluation", "confusion")]
        level = below
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[str]:
    """Return a key that sorts seed-10 after seed-9."""
    return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+|/)", str(path))]


def beside(run: Path, relative: str) -> Path:
    """Return a path recorded relative to a run folder, as a user would type it; absolute if ".." crosses a symlink."""
    typed, real = os.path.normpath(run / relative), os.path.realpath(run / relative)  # resolve() refuses circles
    return Path(typed if os.path.realpath(typed) == real else real)


def find_dataset(run: Path, known: DatasetReference, given: Path | None, *, data_root: Path | None = None) -> Dataset:
    """Open the data set of a run.

    Args:
        run: the run folder.
        known: the record of the data set in the run.
        given: folder from --data; None: the recorded relative path, then the absolute one.
        data_root: folder of image files, if the data set leaves images in their files; None: the recorded one.

    Raises:
        InputError: no folder has a data set with the recorded fingerprint, or `data_root` does not have its images.
        UsageError: see open_dataset().
    """
    places = [given] if given is not None else [beside(run, known.relative), Path(known.absolute)]
    if places[0].resolve() == places[-1].resolve():
        places = places[:1]
    seen, damaged = [], None
    for place in places:
        try:
            found = open_dataset(place)
        except InputError as fault:
            if isinstance(fault, UnreadableError) and place == places[-1]:  # perhaps for a moment
                raise
            seen.append(fault.message)
            damaged = damaged or fault.path
            continue
        if found.fingerprint == known.fingerprint:
            return found if data_root is None else open_dataset(place, data_root=data_root)
        seen.append(f"{place} holds another data set ({found.name})")
    raise InputError(
        f"the data set {known.name} of {run} is not found: {'; '.join(dict.fromkeys(seen))}",
        fix="" if damaged else "give its folder with --data FOLDER",
        path=damaged,
    )


def dataset_entry(dataset: Dataset, run: Path) -> dict[str, Any]:
    """Return the record of a data set for run.json, see run_json.DatasetReference.

    The fingerprint identifies the data set; the image shape and the pixel statistics are for `predict`.
    """
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


def upstream_changes(folder: PhaseFolder, recipe: Recipe) -> list[str]:
    """Return one line "table.key: old -> new" per key with which a later recipe differs from a trained phase's."""
    return differences(folder.record().made_from.recipe, recipe.tables_of(folder.phase))
