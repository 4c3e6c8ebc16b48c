"""status: where runs stand and what to type next. Reads records and headers; writes nothing."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cpmix_cli.artifacts import files, locks
from cpmix_cli.evaluation.saved import read_numbers
from cpmix_cli.flags import StatusOptions
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder, begun_phases, beside, epochs_of, find_dataset, locate
from cpmix_cli.runs.following import COMMANDS, next_command, remake
from cpmix_cli.runs.run_json import PHASES
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EXIT_INTERRUPTED, InputError


@dataclass(frozen=True)
class PhaseStatus:
    """One phase of a run."""

    phase: str
    status: str
    """done, stale, interrupted, absent; running: another process writes it now; or elsewhere: done in the run that this
    one started from."""
    epochs: int
    total_epochs: int
    top1: float | None
    """Of the evaluation of this very checkpoint, per cent."""
    because: str | None
    """Why it no longer belongs to its input, where else it is, or who writes it."""


@dataclass(frozen=True)
class RunStatus:
    """A run folder."""

    run: str
    status: str
    """done: every phase of its recipe is; else continue."""
    phases: list[PhaseStatus]
    next: str | None


def run(options: StatusOptions) -> int:
    """Show runs.

    Returns:
        The exit code: 0 when all are done, 75 when one can go on.

    Raises:
        InputError: a folder that holds no run, or a damaged record.
    """
    found = [inspect(folder) for folder in options.folders]
    status = "done" if all(r.status == "done" for r in found) else "continue"
    rows = [
        [
            r.run,
            p.phase,
            p.status + (f" ({p.because})" if p.because else ""),
            f"{p.epochs}/{p.total_epochs}",
            "-" if p.top1 is None else f"{p.top1:.2f}",
        ]
        for r in found
        for p in r.phases
    ]
    lines = ["", *(f"next: {r.next}" for r in found if r.next)]
    fields = {"status": status, "runs": [asdict(r) for r in found]}
    header = ("run", "phase", "status", ">epochs", ">top-1")
    console.result(fields, header=header, rows=rows, lines=lines if len(lines) > 1 else [])
    return 0 if status == "done" else EXIT_INTERRUPTED


def inspect(folder: Path) -> RunStatus:
    """The state of one run folder, by the recipe of its latest phase that is not stale.

    Raises:
        InputError: it holds no phase, or a record is damaged.
    """
    root, _ = locate(folder)
    begun = begun_phases(root)
    # After stage 1 was trained by another recipe, the stale phases' recipe is no longer the run's.
    last = ([f for f in begun if not f.stale_because()] or begun)[-1]
    recipe = last.recipe()
    totals = epochs_of(recipe)
    origin = begun[0].origin()
    place = f"in {origin.run}" if origin and origin.run.resolve() != root.resolve() else None
    phases = []
    for phase in PHASES:
        at = PhaseFolder(root, phase)
        if PHASES.index(phase) < PHASES.index(begun[0].phase):
            if totals[phase] and place:
                phases.append(PhaseStatus(phase, "elsewhere", totals[phase], totals[phase], None, place))
            elif totals[phase]:  # it was here, and is gone
                phases.append(inspect_phase(at, totals[phase]))
        elif totals[phase] or at in begun:
            phases.append(inspect_phase(at, totals[phase]))
    unfinished = [p.phase for p in phases if p.status not in ("done", "elsewhere") and totals[p.phase]]
    following = to_continue(PhaseFolder(root, unfinished[0]), recipe) if unfinished else to_finish(root, last)
    if any(p.status == "running" for p in phases):
        following = None  # it would be refused
    return RunStatus(str(folder), "continue" if unfinished else "done", phases, following)


def inspect_phase(folder: PhaseFolder, total: int) -> PhaseStatus:
    """The state of one phase folder; `total` epochs are to be where it is absent, else it says so itself."""
    status = folder.status()
    writer = locks.holder(folder.path) if status in ("absent", "interrupted") else None
    shown, because = ("running", f"by {writer.name}") if writer else (status, None)
    if status == "absent":
        return PhaseStatus(folder.phase, shown, 0, total, None, because)
    because = because or folder.stale_because()
    if status == "interrupted":
        tensors, _ = run_json.read_state(folder.path / files.TRAINING_STATE)  # whole: what is damaged cannot go on
        epochs = len(tensors.get("history", ()))
        total = epochs_of(folder.recipe())[folder.phase]
        return PhaseStatus(folder.phase, shown, epochs, total, None, because)
    epochs = folder.record().epochs
    return PhaseStatus(folder.phase, status, epochs, epochs, accuracy(folder), because)


def accuracy(folder: PhaseFolder) -> float | None:
    """top1 of the plain evaluation, if it is of this checkpoint."""
    evaluation = folder.run / "evaluation" / folder.phase
    if not (evaluation / files.RUN).is_file():
        return None
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    if record.source.sha256 != folder.output(files.MODEL)[1]:
        return None
    return read_numbers(evaluation).top1


def to_continue(folder: PhaseFolder, recipe: Recipe) -> str:
    """The command that makes or finishes a phase of a run with this recipe."""
    root, phase, status = folder.run, folder.phase, folder.status()
    if status == "absent":
        before = [p for p in PHASES[: PHASES.index(phase)] if PhaseFolder(root, p).status() != "absent"]
        if not before:
            return remake(root, "stage1", "absent")
        return next_command(root, before[-1], recipe)
    begun, origin = folder.begun(), folder.origin()
    again = folder.stale_because() is not None
    words = [COMMANDS[phase]]
    if origin is None:
        words += ["--data", str(data_folder(root, begun.dataset) or begun.dataset.absolute), "--out", str(root)]
        for flag, path in begun.inputs.items():
            words += [f"--{flag}", path]
    else:
        if not epochs_of(recipe)[origin.phase]:  # stage 2, which the run no longer has
            origin = PhaseFolder(origin.run, "stage1")
        if origin.status() in ("interrupted", "stale"):  # in another run, and first
            return to_continue(origin, origin.recipe())
        words += ["--from", str(origin.run)]
        if phase == "finetune" and origin.phase == "stage1" and recipe.stage2 is not None:
            words += ["--phase", "stage1"]
        if origin.run.resolve() != root.resolve():
            words += ["--out", str(root)]
        if origin.done and data_folder(origin.run, origin.record().dataset) is None:
            data = data_folder(root, begun.dataset)
            words += ["--data", str(data)] if data else []
    if not again or (origin is not None and origin.done and keeps_recipe(folder, origin)):
        words += ["--recipe", str(folder.path / files.RECIPE)]
    return console.typed(*words, *(["--overwrite"] if again else []))


def keeps_recipe(folder: PhaseFolder, origin: PhaseFolder) -> bool:
    """Whether a stale phase is made again by its own recipe, and not by that of the phase it starts from.

    Where its own table and what comes before both differ, the command is refused with the keys: better than another
    method without a word.
    """
    recipe = folder.recipe()
    if origin.record().made_from.recipe == recipe.tables_of(origin.phase):
        return True
    mine, theirs = (r.tables().get(folder.phase, {}) for r in (recipe, origin.recipe()))
    return {**mine, "epochs": None} != {**theirs, "epochs": None}  # --epochs rescales those of finetune


def data_folder(run: Path, known: run_json.DatasetReference) -> Path | None:
    """Where the data set of a phase is, if it still is where the phase says."""
    try:
        folder = find_dataset(run, known, None).folder
    except InputError:
        return None
    near = beside(run, known.relative)
    return near if near.resolve() == folder.resolve() else folder


def to_finish(root: Path, last: PhaseFolder) -> str | None:
    """What a trained run still lacks: the evaluation, then the report."""
    if accuracy(last) is None:
        return console.typed("evaluate", "--from", root)
    if not (root / "confusion" / last.phase / files.RUN).is_file():
        return console.typed("confusion-report", "--from", root)
    return None
