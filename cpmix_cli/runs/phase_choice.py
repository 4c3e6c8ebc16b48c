"""The choice of the phase that a command reads, from --from, --phase and the phases that are done."""

import os
from collections.abc import Mapping
from pathlib import Path

from cpmix_cli.artifacts.files import PHASES, RUN, wait_for
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import next_command
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError


def locate(source: Path) -> tuple[Path, str | None]:
    """Return the run folder of a path RUN or RUN/PHASE, and the phase, or None for RUN.

    Raises:
        InputError: the path is no folder.
    """
    if not source.is_dir():
        if os.path.lexists(source):
            raise InputError(f"{source} is not a folder", fix="give the folder of a run, or of a phase in it")
        raise InputError(f"no run folder {source}", fix=next_command(source))
    if source.resolve().name in PHASES and PhaseFolder(source.parent, source.resolve().name).is_begun:
        return source.parent, source.resolve().name
    return source, None


def choose(given: Path, phase: str | None = None) -> PhaseFolder:
    """Return the finished phase of --from (`given`) and --phase (`phase`), see choose_phase().

    Raises:
        UsageError, InputError: see locate() and choose_phase().
    """
    run, named = locate(given)
    return choose_phase(run, phase or named, PHASES)


def choose_phase(run: Path, wanted: str | None, candidates: tuple[str, ...]) -> PhaseFolder:
    """Return the requested phase, else the last candidate that is done and not stale, and print its name.

    Args:
        run: the run folder.
        wanted: requested phase, or None.
        candidates: phases that the command can read, in the order of training.

    Raises:
        UsageError: `wanted` is not among the candidates.
        InputError: `wanted` is stale or not done; or no candidate is done.
    """
    passed_over: list[str] = []
    if wanted is not None:
        if wanted not in candidates:
            raise UsageError(
                f"--phase {wanted}: {_caller()} reads only {' or '.join(candidates)}",
                fix=f"give --phase {candidates[-1]}",
            )
        folder = PhaseFolder(run, wanted)
        if not folder.is_begun:  # a network file system may show the output of another machine's job with a delay
            wait_for(folder.path / RUN)
        if (why := folder.unusable_because()) is not None:
            raise InputError(f"{folder.path} {why}", fix=next_command(run))
        return folder
    for phase in reversed(candidates):
        folder = PhaseFolder(run, phase)
        if (why := folder.unusable_because()) is None:
            for line in passed_over:
                console.warn(line)
            console.note(f"{_caller()}: takes {phase} of {run}")
            return folder
        if folder.status() != "absent":
            passed_over.append(f"{phase} {why} and is not used")
    detail = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise InputError(f"{run} holds no finished {' or '.join(candidates)}{detail}", fix=next_command(run))


def best_phase(measured: Mapping[str, float]) -> str:
    """Return the phase with the highest accuracy; of equal ones the last, which other commands take too."""
    return max(reversed(list(measured)), key=lambda phase: measured[phase])


def _caller() -> str:
    return console.command or "cpmix"  # cpmix_cli.load() in Python
