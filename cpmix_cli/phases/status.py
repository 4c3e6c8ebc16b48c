"""status: where runs stand and what to type next. Reads records and headers; writes nothing."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpmix_cli import artifacts, console, runs
from cpmix_cli.errors import EXIT_INTERRUPTED, InputError
from cpmix_cli.recipe import Recipe, load
from cpmix_cli.runs import COMMANDS, PHASES, PhaseFolder


@dataclass(frozen=True)
class PhaseStatus:
    """One phase of a run."""

    phase: str
    status: str
    """done, stale, interrupted, absent, or elsewhere: done in the run that this one started from."""
    epochs: int
    total_epochs: int
    top1: float | None
    """Of the evaluation of this very checkpoint, per cent."""
    because: str | None
    """Why it is stale, or where else it is."""


@dataclass(frozen=True)
class RunStatus:
    """A run folder."""

    run: str
    status: str
    """done: every phase of its recipe is; else continue."""
    phases: list[PhaseStatus]
    next: str | None


def run(folders: list[Path]) -> int:
    """Show runs.

    Returns:
        The exit code: 0 when all are done, 75 when one can go on.

    Raises:
        InputError: a folder that holds no run, or a damaged record.
    """
    found = [inspect(folder) for folder in folders]
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
    fields = {"command": "status", "status": status, "runs": [asdict(r) for r in found]}
    header = ("run", "phase", "status", ">epochs", ">top-1")
    console.result(fields, header=header, rows=rows, lines=lines if len(lines) > 1 else [])
    return 0 if status == "done" else EXIT_INTERRUPTED


def inspect(folder: Path) -> RunStatus:
    """The state of one run folder, by the recipe of its latest phase.

    Raises:
        InputError: it holds no phase, or a record is damaged.
    """
    root, _ = runs.locate(folder)
    begun = [f for f in (PhaseFolder(root, phase) for phase in PHASES) if f.status() != "absent"]
    if not begun:
        raise InputError(
            f"{root} holds no phase of a run",
            needed_by="status",
            fix=runs.remake(root, "stage1", "absent"),
        )
    last = begun[-1]
    recipe = last.recipe() if last.done else load(str(last.path / artifacts.RECIPE))
    totals = {
        "stage1": recipe.schedule.stage1_epochs,
        "stage2": recipe.schedule.epochs - recipe.schedule.stage1_epochs,
        "finetune": recipe.finetune.epochs if recipe.finetune else 0,
    }
    origin = (origin_of(begun[0]) or {}).get("run")
    phases = []
    for phase in [phase for phase in PHASES if totals[phase]]:
        if PHASES.index(phase) < PHASES.index(begun[0].phase):
            place = f"in {os.path.normpath(root / origin)}" if origin else None
            phases.append(PhaseStatus(phase, "elsewhere", totals[phase], totals[phase], None, place))
        else:
            phases.append(inspect_phase(PhaseFolder(root, phase), totals[phase]))
    open_phases = [p for p in phases if p.status not in ("done", "elsewhere")]
    following = to_continue(root, open_phases[0], recipe) if open_phases else to_finish(root, last)
    return RunStatus(str(folder), "continue" if open_phases else "done", phases, following)


def inspect_phase(folder: PhaseFolder, total: int) -> PhaseStatus:
    """The state of one phase folder."""
    status = folder.status()
    if status == "absent":
        return PhaseStatus(folder.phase, status, 0, total, None, None)
    if status == "interrupted":
        shapes, _ = artifacts.read_header(folder.path / artifacts.TRAINING_STATE)
        return PhaseStatus(folder.phase, status, shapes.get("history", [0])[0], total, None, None)
    return PhaseStatus(folder.phase, status, folder.record()["epochs"], total, accuracy(folder), folder.stale_because())


def accuracy(folder: PhaseFolder) -> float | None:
    """top1 of the plain evaluation, if it is of this checkpoint."""
    evaluation = folder.run / "evaluation" / folder.phase
    if not (evaluation / artifacts.RUN).is_file():
        return None
    record = artifacts.read_record(evaluation / artifacts.RUN)
    if record["source"]["sha256"] != folder.output(artifacts.MODEL)[1]:
        return None
    numbers = json.loads(
        artifacts.read_bytes(evaluation / artifacts.EVALUATION, record["outputs"][artifacts.EVALUATION])
    )
    return float(numbers["top1"])


def begun_with(folder: PhaseFolder) -> dict[str, Any]:
    """What a phase says of its own beginning: its record, or the metadata of its training state."""
    if folder.done:
        return folder.record()
    return dict(artifacts.read_header(folder.path / artifacts.TRAINING_STATE)[1] or {})


def origin_of(folder: PhaseFolder) -> dict[str, Any] | None:
    """The run and phase that a phase started from."""
    source: dict[str, Any] | None = begun_with(folder).get("source")
    return source


def to_continue(root: Path, phase: PhaseStatus, recipe: Recipe) -> str:
    """The command that makes or finishes a phase."""
    folder = PhaseFolder(root, phase.phase)
    if phase.status == "absent":
        before = [p for p in PHASES[: PHASES.index(phase.phase)] if PhaseFolder(root, p).status() != "absent"]
        return runs.next_command(root, before[-1], recipe) if before else runs.remake(root, "stage1", "absent")
    begun = begun_with(folder)
    words = [COMMANDS[phase.phase]]
    if begun.get("source"):
        words += ["--from", os.path.normpath(root / begun["source"]["run"])]
        if phase.phase == "finetune" and begun["source"]["phase"] == "stage1" and recipe.stage2 is not None:
            words += ["--phase", "stage1"]
        if Path(words[2]).resolve() != root.resolve():
            words += ["--out", str(root)]
    else:
        data = begun.get("dataset", {"relative": "DATA", "absolute": "DATA"})
        near = Path(os.path.normpath(root / data["relative"]))
        words += ["--data", str(near if near.is_dir() else data["absolute"]), "--out", str(root)]
        for flag, path in begun.get("inputs", {}).items():
            words += [f"--{flag}", path]
    if phase.status == "stale":
        words += ["--overwrite"]
    else:
        words += ["--recipe", str(folder.path / artifacts.RECIPE)]
    return console.typed(*words)


def to_finish(root: Path, last: PhaseFolder) -> str | None:
    """What a trained run still lacks: the evaluation, then the report."""
    if accuracy(last) is None:
        return console.typed("evaluate", "--from", root)
    if not (root / "confusion" / last.phase / artifacts.RUN).is_file():
        return console.typed("confusion-report", "--from", root)
    return None
