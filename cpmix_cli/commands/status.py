"""status: show the state of runs and the next command. Reads records and headers, writes nothing."""

from pathlib import Path
from typing import Any

from cpmix_cli.artifacts import files
from cpmix_cli.evaluation.saved import read_current_numbers
from cpmix_cli.flags import StatusOptions
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder, find_runs
from cpmix_cli.runs.next_command import BegunRun, read_run
from cpmix_cli.runs.phase_choice import locate
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EXIT_INTERRUPTED, InputError

RUNS = Path("ckpt")
"""Folder that is looked at if none is given."""


def run(options: StatusOptions) -> int:
    """Show the state of runs: those that are given, and those in the given folders, or in RUNS.

    Returns:
        Exit code: 0 if all are done, 75 if one can continue; if one of several that were found cannot be read, that of
        its error.

    Raises:
        InputError: a folder holds no run, or the record of a run that is given is damaged.
    """
    runs, rows, code = [], [], 0
    for given, root in _places(options):
        try:
            run = read_run(root)
            phases = [_phase_fields(folder, elsewhere, run) for folder, elsewhere in run.phases()]
            status = "continue" if run.unfinished() else "done"
            runs.append({"run": str(given), "status": status, "phases": phases, "next": run.next_command()})
        except InputError as fault:
            if root in options.folders:
                raise
            code = code or fault.exit_code
            error = {"error": fault.message, "fix": fix_of(fault)}
            runs.append({"run": str(given), "status": "error", "phases": [], "next": None, **error})
            rows.append([str(given), "-", "cannot be read", "-", "-"])
            console.warn(f"{fault.message}; to repair it: {error['fix']}")
            continue
        for p in phases:
            state = p["status"] + (f" ({p['because']})" if p["because"] else "")
            top1 = "-" if p["top1"] is None else f"{p['top1']:.2f}"
            rows.append([str(given), p["phase"], state, f"{p['epochs']}/{p['total_epochs']}", top1])
    status = next((s for s in ("error", "continue") if any(run["status"] == s for run in runs)), "done")
    lines = [f"next: {run['next']}" for run in runs if run["next"]]
    header = ("run", "phase", "status", ">epochs", ">top-1")
    console.result({"status": status, "runs": runs}, header=header, rows=rows, lines=["", *lines] if lines else [])
    return {"done": 0, "continue": EXIT_INTERRUPTED, "error": code}[status]


def _places(options: StatusOptions) -> list[tuple[Path, Path]]:
    """Return the runs to show: the path to show, and the run folder. A folder that is no run must exist."""
    if not options.folders:
        if found := find_runs(RUNS):
            return [(path, path) for path in found]
        begin = console.typed("run", "digits", "--out", RUNS / "digits")
        raise InputError(f"{RUNS} holds no run", fix=f"name the folders of your runs, or begin one: {begin}")
    places: list[tuple[Path, Path]] = []
    for given in options.folders:
        root, phase = locate(given)
        found = find_runs(root) if phase is None else []
        places += [(path, path) for path in found] or [(given, root)]
    return list(dict.fromkeys(places))


def _phase_fields(folder: PhaseFolder, elsewhere: Path | None, run: BegunRun) -> dict[str, Any]:
    """Return the fields of a phase for --json.

    Its status is done, stale, interrupted, absent, running (a process writes it now) or elsewhere (done in the run that
    this one started from).
    """
    status: str = folder.status() if elsewhere is None else "elsewhere"
    epochs, total = 0, run.recipe.epochs_of(folder.phase)
    top1 = because = None
    if elsewhere is not None:
        because, epochs = f"in {elsewhere}", total
    elif status in ("done", "stale"):
        because = folder.stale_because()
        epochs = total = folder.record().epochs
        top1 = _accuracy(folder)
    else:
        if folder.is_begun:
            because = folder.stale_because()
            # Verifies the state, because a damaged one cannot be resumed.
            epochs, total = (
                run_json.verify_state(folder.path / files.TRAINING_STATE)[1],
                folder.recipe().epochs_of(folder.phase),
            )
        if writer := folder.writer:
            status, because = "running", f"by {writer.name}"
    return {
        "phase": folder.phase,
        "status": status,
        "epochs": epochs,
        "total_epochs": total,
        "top1": top1,
        "because": because,
    }


def _accuracy(folder: PhaseFolder) -> float | None:
    """Return top1 of the plain evaluation; None if it is missing or of another checkpoint, or damaged (a warning)."""
    evaluation = folder.evaluation()
    try:
        numbers = read_current_numbers(folder, evaluation)
        return None if numbers is None else numbers.top1
    except InputError as fault:
        console.warn(f"{evaluation} is left out: {fault.message}; to repair it: {fix_of(fault)}")
        return None
