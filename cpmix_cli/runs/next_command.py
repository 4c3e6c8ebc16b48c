"""The next command for a run folder, from the phases and evaluations that it contains."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cpmix_cli.artifacts.files import DATASET, PHASES, RECIPE, RUN
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder, beside, find_dataset
from cpmix_cli.runs.plugin_needs import plugin_words_of
from cpmix_cli.runs.run_json import BegunRecord, DatasetReference, EvaluationRecord, RunRecord
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.text import quoted

TRAINING_COMMANDS = {"stage1": "train-stage1", "stage2": "train-stage2", "finetune": "finetune"}


@dataclass(frozen=True)
class BegunRun:
    """Run folder with at least one begun phase."""

    root: Path
    begun: list[PhaseFolder]
    """Phases that are done, stale or interrupted, from stage 1 to finetune."""
    last: PhaseFolder
    """Last begun phase that is not stale; if all are stale, the last one."""
    recipe: Recipe
    """Recipe of `last`. Stale phases may have another one, if stage 1 was trained again with a new recipe."""

    def phases(self) -> list[tuple[PhaseFolder, Path | None]]:
        """Return the phases of the run: begun ones and those of its recipe.

        A phase before the first begun one may be in another run: then that run's folder is the second value, else None.
        """
        origin = self.begun[0].origin()
        elsewhere = origin.run if origin and origin.run.resolve() != self.root.resolve() else None
        first = PHASES.index(self.begun[0].phase)
        return [
            (folder, elsewhere if number < first else None)
            for number, folder in enumerate(PhaseFolder(self.root, phase) for phase in PHASES)
            if self.recipe.epochs_of(folder.phase) or folder in self.begun
        ]

    def unfinished(self) -> list[PhaseFolder]:
        """Return the phases of the recipe that are not done, from the first begun one, except those in another run."""
        here = [folder for folder, elsewhere in self.phases() if elsewhere is None]
        here = here[here.index(self.begun[0]) :]
        return [folder for folder in here if self.recipe.epochs_of(folder.phase) and folder.status() != "done"]

    def next_command(self) -> str | None:
        """Return the next command: continue training, evaluate, then confusion-report.

        None if all are done, or another process is writing a phase.
        """
        for folder, elsewhere in self.phases():
            if elsewhere is None and folder.status() == "running":
                return None  # the lock would refuse the command
        if unfinished := self.unfinished():
            return _with_plugin(_to_continue(unfinished[0], self.recipe), unfinished[0], self.last)
        evaluation = self.last.evaluation()
        try:
            evaluated = run_json.read_run(evaluation, EvaluationRecord) if (evaluation / RUN).is_file() else None
        except InputError:  # its record is damaged
            return _with_plugin(console.typed("evaluate", "--from", self.root, "--overwrite"), self.last)
        if evaluated is None or not self.last.is_source_of(evaluated):
            return _with_plugin(console.typed("evaluate", "--from", self.root), self.last)
        return None if self._is_reported(evaluated) else console.typed("confusion-report", "--from", self.root)

    def _is_reported(self, evaluated: EvaluationRecord) -> bool:
        """Return whether there is a report of the last phase, or, since its evaluation, of one that was preferred."""
        if (self.root / "confusion" / self.last.phase / RUN).is_file():
            return True
        for folder in self.begun:
            with suppress(InputError):
                report = run_json.read_run(self.root / "confusion" / folder.phase, RunRecord)
                if report.finished >= evaluated.finished:
                    return True
        return False


def begun_phases(run: Path) -> list[PhaseFolder]:
    """Return the phases of a run that are done, stale, interrupted or running, from stage 1 to finetune.

    Raises:
        InputError: the run has no such phase, or none with a saved state yet; or a record is damaged.
    """
    phases = [PhaseFolder(run, phase) for phase in PHASES]
    if begun := [folder for folder in phases if folder.is_begun]:
        return begun
    for folder in phases:
        if folder.writer is not None:
            raise InputError(
                f"{folder.path} {folder.unusable_because()}; no state of it is saved yet",
                fix=f"wait for the end of its first epoch, then: {console.typed('status', run)}",
            )
    raise InputError(f"{run} holds no phase of a run", fix=_begin(run))


def read_run(run: Path) -> BegunRun:
    """Read the phases and the recipe of a run folder.

    Raises:
        InputError: the folder has no phase, or a record is damaged.
    """
    begun = begun_phases(run)
    last = ([folder for folder in begun if not folder.stale_because()] or begun)[-1]
    return BegunRun(run, begun, last, last.recipe())


def next_command(run: Path, *, data: Path | None = None, data_root: Path | None = None) -> str:
    """Return the next command for a run: command_ahead().

    If the run is complete, damaged or being written, that is `cpmix status`, which shows the details.
    """
    phases = [PhaseFolder(run, phase) for phase in PHASES]
    if not any(folder.is_begun or folder.writer for folder in phases):  # status() fails if a record is damaged
        return _begin(run)
    return command_ahead(run, data=data, data_root=data_root) or console.typed("status", run)


def command_ahead(run: Path, *, data: Path | None = None, data_root: Path | None = None) -> str | None:
    """Return the next command for a run; None if the run is complete, damaged or being written.

    Args:
        run: folder of the run.
        data: --data as typed; the folder in the run's records may not be there.
        data_root: --data-root as typed.
    """
    with suppress(InputError):
        if (command := read_run(run).next_command()) is not None:
            return with_data(command, data, data_root)
    return None


def with_data(command: str, data: Path | None, data_root: Path | None) -> str:
    """Return a command of a run with --data and --data-root as typed, unless it names its own."""
    for flag, place in (("--data", data), ("--data-root", data_root)):
        if place is not None and f" {flag} " not in command:
            command += f" {quoted(flag, place)}"
    return command


def _with_plugin(command: str, *phases: PhaseFolder) -> str:
    """Return a command with the plugin of the first of these phases that has one."""
    words: list[str] = next(filter(None, map(plugin_words_of, phases)), [])
    return " ".join(filter(None, [command, quoted(*words)]))


def _begin(run: Path) -> str:
    """Return a hint how to start a run: no full command, since the data set folder is unknown, unless it is given."""
    if (run / DATASET).is_file():
        command = console.typed("train-stage1", "--data", run, "--out", Path("ckpt") / run.resolve().name)
        return f"{run} is a data set folder; give the folder of a run, which this makes: {command}"
    return f"train its stage 1: train-stage1 takes a data set folder as --data, and {run} as --out"


def _to_continue(folder: PhaseFolder, recipe: Recipe) -> str:
    """Return the command that trains or resumes `folder`, the first phase of `recipe` that is not done."""
    root, phase, command = folder.run, folder.phase, TRAINING_COMMANDS[folder.phase]
    if folder.status() == "absent":
        earlier = (PhaseFolder(root, name) for name in PHASES[: PHASES.index(phase)])
        return _begin(root) if all(f.status() == "absent" for f in earlier) else console.typed(command, "--from", root)
    begun, origin = folder.begun(), folder.origin()
    again = folder.stale_because() is not None
    if origin is not None:
        if not recipe.epochs_of(origin.phase):  # stage 2, which the recipe no longer has
            origin = PhaseFolder(origin.run, "stage1")
        if not origin.done and origin.status() != "running":
            return _to_train_first(origin, folder)
        if origin.status() == "stale":  # it is in another run, and must be trained first
            return _to_continue(origin, origin.recipe())
    words = training_words(folder, begun, origin, has_stage2=recipe.stage2 is not None)
    if not again or (origin is not None and origin.done and _keeps_recipe(folder, origin)):
        words += ["--recipe", str(folder.path / RECIPE)]
        if again and origin is not None and (seed := origin.recipe().seed) != folder.recipe().seed:
            words += ["--seed", str(seed)]
    return console.typed(*words, *(["--overwrite"] if again else []))


def _to_train_first(origin: PhaseFolder, folder: PhaseFolder) -> str:
    """Return the command that trains or resumes `origin`, from which `folder` started, and whose files were deleted."""
    if origin.is_begun:
        return _to_continue(origin, origin.recipe())
    stage1 = PhaseFolder(origin.run, "stage1")
    if origin.phase != "stage1" and not stage1.done:
        return _to_train_first(stage1, folder)
    recipe = ("--recipe", folder.path / RECIPE)  # of both: the tables of earlier phases were equal when it began
    if origin.phase != "stage1":
        return console.typed(TRAINING_COMMANDS[origin.phase], "--from", origin.run, *recipe)
    known = folder.begun().dataset
    data = _data_folder(folder.run, known) or known.absolute
    return console.typed("train-stage1", "--data", data, "--out", origin.run, *recipe)


def training_words(
    folder: PhaseFolder, begun: BegunRecord, origin: PhaseFolder | None, *, has_stage2: bool
) -> list[str]:
    """Return the words of the command that trains a phase from the inputs in its record, without --recipe.

    Args:
        folder: the phase.
        begun: record of the phase.
        origin: phase to start from; None for stage 1.
        has_stage2: True if the recipe has a stage 2, so that a finetune of stage 1 has to name its phase.

    Raises:
        InputError: the record of `origin` is damaged.
    """
    root, words = folder.run, [TRAINING_COMMANDS[folder.phase]]
    if origin is None:
        words += ["--data", str(_data_folder(root, begun.dataset) or begun.dataset.absolute), "--out", str(root)]
        for flag, path in begun.inputs.items():
            words += [f"--{flag}", path]
        return words
    words += ["--from", str(origin.run)]
    if folder.phase == "finetune" and origin.phase == "stage1" and has_stage2:
        words += ["--phase", "stage1"]
    if origin.run.resolve() != root.resolve():
        words += ["--out", str(root)]
    if origin.done and _data_folder(origin.run, origin.record().dataset) is None:
        data = _data_folder(root, begun.dataset)
        words += ["--data", str(data)] if data else []
    return words


def _keeps_recipe(folder: PhaseFolder, origin: PhaseFolder) -> bool:
    """Return whether a stale phase is trained again with its own recipe, not with the recipe of its source phase.

    If both its own table and the earlier tables differ, its own recipe is used. The command then fails and lists the
    keys; with the other recipe it would train another method without notice.
    """
    recipe = folder.recipe()
    if origin.record().made_from.recipe == recipe.tables_of(origin.phase):
        return True
    mine, theirs = (r.tables().get(folder.phase, {}) for r in (recipe, origin.recipe()))
    return {**mine, "epochs": None} != {**theirs, "epochs": None}  # --epochs may have rescaled finetune.epochs


def _data_folder(run: Path, known: DatasetReference) -> Path | None:
    """Return the data set folder at the path that the phase recorded, or None if it is not there."""
    try:
        folder = find_dataset(run, known, None).folder
    except InputError:
        return None
    near = beside(run, known.relative)
    return near if near.resolve() == folder.resolve() else folder
