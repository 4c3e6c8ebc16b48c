"""status: where runs stand and what to type next. Reads records and headers; writes nothing."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cpmix_cli.artifacts import files, locks
from cpmix_cli.evaluation.saved import read_numbers
from cpmix_cli.flags import StatusOptions
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import read_run
from cpmix_cli.runs.phase_choice import locate
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EXIT_INTERRUPTED


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
    run = read_run(locate(folder)[0])
    phases = []
    for at, elsewhere in run.phases():
        total = run.recipe.epochs_of(at.phase)
        if elsewhere is None:
            phases.append(inspect_phase(at, total))
        else:
            phases.append(PhaseStatus(at.phase, "elsewhere", total, total, None, f"in {elsewhere}"))
    return RunStatus(str(folder), "continue" if run.unfinished() else "done", phases, run.next_command())


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
        total = folder.recipe().epochs_of(folder.phase)
        return PhaseStatus(folder.phase, shown, epochs, total, None, because)
    epochs = folder.record().epochs
    return PhaseStatus(folder.phase, status, epochs, epochs, accuracy(folder), because)


def accuracy(folder: PhaseFolder) -> float | None:
    """top1 of the plain evaluation, if it is of this checkpoint."""
    evaluation = folder.evaluation()
    if not (evaluation / files.RUN).is_file():
        return None
    if not folder.is_source_of(run_json.read_run(evaluation, run_json.EvaluationRecord)):
        return None
    return read_numbers(evaluation).top1
