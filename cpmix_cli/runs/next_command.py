"""The command to type next, from what a run folder holds."""

from dataclasses import dataclass
from pathlib import Path

from cpmix_cli.artifacts import locks
from cpmix_cli.artifacts.files import PHASES, RECIPE, RUN
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder, beside, find_dataset
from cpmix_cli.runs.run_json import DatasetReference, EvaluationRecord
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

_COMMANDS = {"stage1": "train-stage1", "stage2": "train-stage2", "finetune": "finetune"}


@dataclass(frozen=True)
class BegunRun:
    """A run folder in which training has begun."""

    root: Path
    begun: list[PhaseFolder]
    """Phases that are done, stale or interrupted, in their order."""
    last: PhaseFolder
    """The latest of them that is not stale."""
    recipe: Recipe
    """That of `last`: after stage 1 was trained by another recipe, the stale phases' is no longer the run's."""

    def phases(self) -> list[tuple[PhaseFolder, Path | None]]:
        """Return the phases that the run has or is to have, and the other run that holds one, if one does."""
        origin = self.begun[0].origin()
        elsewhere = origin.run if origin and origin.run.resolve() != self.root.resolve() else None
        first = PHASES.index(self.begun[0].phase)
        return [
            (folder, elsewhere if number < first else None)
            for number, folder in enumerate(PhaseFolder(self.root, phase) for phase in PHASES)
            if self.recipe.epochs_of(folder.phase) or folder in self.begun
        ]

    def unfinished(self) -> list[PhaseFolder]:
        """Return the phases of the recipe that are not done, here or elsewhere."""
        here = [folder for folder, elsewhere in self.phases() if elsewhere is None]
        return [folder for folder in here if self.recipe.epochs_of(folder.phase) and folder.status() != "done"]

    def next_command(self) -> str | None:
        """Return the command that continues the run, or evaluates or reports it; None if there is nothing to do, or
        another process writes a phase now.
        """
        for folder, elsewhere in self.phases():
            if elsewhere is None and folder.status() in ("absent", "interrupted") and locks.holder(folder.path):
                return None  # it would be refused
        if unfinished := self.unfinished():
            return _to_continue(unfinished[0], self.recipe)
        evaluation = self.last.evaluation()
        if not (
            (evaluation / RUN).is_file() and self.last.is_source_of(run_json.read_run(evaluation, EvaluationRecord))
        ):
            return console.typed("evaluate", "--from", self.root)
        if not (self.root / "confusion" / self.last.phase / RUN).is_file():
            return console.typed("confusion-report", "--from", self.root)
        return None


def begun_phases(run: Path) -> list[PhaseFolder]:
    """Return the phases of a run that are done, stale or interrupted, in their order.

    Raises:
        InputError: there are none, or a record is damaged.
    """
    begun = [folder for folder in (PhaseFolder(run, phase) for phase in PHASES) if folder.status() != "absent"]
    if not begun:
        raise InputError(f"{run} holds no phase of a run", fix=_begin(run))
    return begun


def read_run(run: Path) -> BegunRun:
    """Read what stands where in a run folder.

    Raises:
        InputError: it holds no phase, or a record is damaged.
    """
    begun = begun_phases(run)
    last = ([folder for folder in begun if not folder.stale_because()] or begun)[-1]
    return BegunRun(run, begun, last, last.recipe())


def next_command(run: Path) -> str:
    """Return the command to type next for a run, whatever its folder holds: `cpmix status` tells more where it is
    complete, is being written, or is damaged.
    """
    try:
        if not any(PhaseFolder(run, phase).is_begun for phase in PHASES):
            return _begin(run)
        command = read_run(run).next_command()
    except InputError:
        command = None
    return command or console.typed("status", run)


def _begin(run: Path) -> str:
    """Return what begins a run of which nothing is known: no command, since the data set is not."""
    return f"train its stage 1: train-stage1 takes a data set folder as --data, and {run} as --out"


def _to_continue(folder: PhaseFolder, recipe: Recipe) -> str:
    """Return the command that makes or finishes a phase of a run with this recipe, the first that is not done."""
    root, phase, command = folder.run, folder.phase, _COMMANDS[folder.phase]
    if folder.status() == "absent":
        earlier = (PhaseFolder(root, name) for name in PHASES[: PHASES.index(phase)])
        return _begin(root) if all(f.status() == "absent" for f in earlier) else console.typed(command, "--from", root)
    begun, origin = folder.begun(), folder.origin()
    again = folder.stale_because() is not None
    words = [command]
    if origin is None:
        words += ["--data", str(_data_folder(root, begun.dataset) or begun.dataset.absolute), "--out", str(root)]
        for flag, path in begun.inputs.items():
            words += [f"--{flag}", path]
    else:
        if not recipe.epochs_of(origin.phase):  # stage 2, which the run no longer has
            origin = PhaseFolder(origin.run, "stage1")
        if origin.status() in ("interrupted", "stale"):  # in another run, and first
            return _to_continue(origin, origin.recipe())
        words += ["--from", str(origin.run)]
        if phase == "finetune" and origin.phase == "stage1" and recipe.stage2 is not None:
            words += ["--phase", "stage1"]
        if origin.run.resolve() != root.resolve():
            words += ["--out", str(root)]
        if origin.done and _data_folder(origin.run, origin.record().dataset) is None:
            data = _data_folder(root, begun.dataset)
            words += ["--data", str(data)] if data else []
    if not again or (origin is not None and origin.done and _keeps_recipe(folder, origin)):
        words += ["--recipe", str(folder.path / RECIPE)]
    return console.typed(*words, *(["--overwrite"] if again else []))


def _keeps_recipe(folder: PhaseFolder, origin: PhaseFolder) -> bool:
    """Whether a stale phase is made again by its own recipe, and not by that of the phase it starts from.

    Where its own table and what comes before both differ, the command is refused with the keys: better than another
    method without a word.
    """
    recipe = folder.recipe()
    if origin.record().made_from.recipe == recipe.tables_of(origin.phase):
        return True
    mine, theirs = (r.tables().get(folder.phase, {}) for r in (recipe, origin.recipe()))
    return {**mine, "epochs": None} != {**theirs, "epochs": None}  # --epochs rescales those of finetune


def _data_folder(run: Path, known: DatasetReference) -> Path | None:
    """Where the data set of a phase is, if it still is where the phase says."""
    try:
        folder = find_dataset(run, known, None).folder
    except InputError:
        return None
    near = beside(run, known.relative)
    return near if near.resolve() == folder.resolve() else folder
