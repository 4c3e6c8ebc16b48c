"""status: show the state of runs and the next command. Reads records and headers, writes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpmix_cli.evaluation.saved import read_current_numbers
from cpmix_cli.flags import StatusOptions
from cpmix_cli.runs.folders import PhaseFolder, find_runs
from cpmix_cli.runs.next_command import BegunRun, read_run
from cpmix_cli.runs.phase_choice import locate
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EXIT_INTERRUPTED, InputError
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import sparkline
from cpmix_cli.training.metrics import read_history

RUNS = Path("ckpt")
"""Folder that is looked at if none is given."""
_BESIDE_CURVES = 56
"""Columns of a terminal that the labels and numbers beside a curve take."""


def run(options: StatusOptions) -> int:
    """Show the state of runs: those that are given, and those in the given folders, or in RUNS.

    Returns:
        Exit code: 0 if all are done, 75 if one can continue; if one of several that were found cannot be read, that of
        its error.

    Raises:
        InputError: a folder holds no run, or the record of a run that is given is damaged.
    """
    runs: list[dict[str, Any]] = []
    rows, code = [], 0
    for given, root in _places(options):
        try:
            run = read_run(root)
            phases = [_phase_fields(*phase, run, curves=options.curves) for phase in run.phases()]
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
            top1 = "-" if p["top1"] is None else percent(p["top1"], 2)
            rows.append([str(given), p["phase"], state, f"{p['epochs']}/{p['total_epochs']}", top1])
    status = next((s for s in ("error", "continue") if any(run["status"] == s for run in runs)), "done")
    lines = [f"next: {run['next']}" for run in runs if run["next"]]
    drawn = [line for run in runs for phase in run["phases"] for line in _curve_lines(run["run"], phase)]
    header = ("run", "phase", "status", ">epochs", ">top-1")
    console.result(
        {"status": status, "runs": runs}, header=header, rows=rows, lines=[*drawn, *(["", *lines] if lines else [])]
    )
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


def _phase_fields(folder: PhaseFolder, elsewhere: Path | None, run: BegunRun, *, curves: bool) -> dict[str, Any]:
    """Return the fields of a phase for --json; with `curves`, also the metrics of its finished epochs.

    Its status is done, stale, interrupted, absent, running (a process writes it now) or elsewhere (done in the run that
    this one started from).
    """
    status: str = folder.status() if elsewhere is None else "elsewhere"
    epochs, total = 0, run.recipe.epochs_of(folder.phase)
    top1 = because = history = None
    if elsewhere is not None:
        because, epochs = f"in {elsewhere}", total
    elif status in ("done", "stale"):
        because = folder.stale_because()
        epochs = total = folder.record().epochs
        top1 = _accuracy(folder)
        history = read_history(folder) if curves else None
    else:
        if folder.is_begun:
            because = folder.stale_because()
            history = read_history(folder)  # verifies the state, because a damaged one cannot be resumed
            epochs, total = len(history.get("epoch", ())), folder.recipe().epochs_of(folder.phase)
        if writer := folder.writer:
            status, because = "running", f"by {writer.name}"
    return {
        "phase": folder.phase,
        "status": status,
        "epochs": epochs,
        "total_epochs": total,
        "top1": top1,
        "because": because,
        **({"curves": history} if curves else {}),
    }


def _curve_lines(run: str, phase: Mapping[str, Any]) -> list[str]:
    """Return the curves of a phase as a table after an empty line; no line for a phase without any."""
    if (curves := phase.get("curves")) is None:
        return []
    title = f"\n{run}: {phase['phase']}, {phase['status']}, {phase['epochs']}/{phase['total_epochs']} epochs"
    if not (epochs := curves.get("epoch")):
        return ["", f"{title.strip()}; none is finished yet"]
    terms = [name for name in curves if name.startswith("loss_")]
    shown = {"loss": "loss", **({name: f"  {name.removeprefix('loss_')}" for name in terms} if terms[1:] else {})}
    shown |= {"train_accuracy": "train acc, %", "test_accuracy": "test acc, %", "learning_rate": "learning rate"}
    width = console.columns()
    room = min(32, max(8, (width or 80) - _BESIDE_CURVES))
    rows = []
    for name, label in shown.items():
        share = 100 if name.endswith("accuracy") else 1
        known = [(share * value, epoch) for value, epoch in zip(curves[name], epochs, strict=True) if value is not None]
        if not known:
            continue
        form = {"learning_rate": ".4g"}.get(name, ".2f" if share == 100 else ".4f")
        first, last = (f"{value:{form}}" for value, _ in (known[0], known[-1]))
        best, at = (max if share == 100 else min)(known, key=lambda entry: entry[0])
        ends = ["-", "-"] if name == "learning_rate" else [f"{best:{form}}", str(at)]
        rows.append([label, sparkline(curves[name], room), first, last, *ends])
    header = ("", f"epochs {epochs[0]} to {epochs[-1]}" if epochs[1:] else f"epoch {epochs[0]}")
    return console.table_lines((*header, ">first", ">last", ">best", ">at epoch"), rows, title=title)


def _accuracy(folder: PhaseFolder) -> float | None:
    """Return top1 of the plain evaluation; None if it is missing or of another checkpoint, or damaged (a warning)."""
    evaluation = folder.evaluation()
    try:
        numbers = read_current_numbers(folder, evaluation)
        return None if numbers is None else numbers.top1
    except InputError as fault:
        console.warn(f"{evaluation} is left out: {fault.message}; to repair it: {fix_of(fault)}")
        return None
