"""Which phase of a run folder a command takes, and what to type first if there is none."""

from pathlib import Path

from cpmix_cli.artifacts.files import PHASES, RUN, wait_for
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import next_command
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError


def locate(source: Path) -> tuple[Path, str | None]:
    """Return the run folder that a path means, and the phase if the path is that of a phase's folder.

    Raises:
        InputError: the path is no folder.
    """
    if not source.is_dir():
        raise InputError(f"no run folder {source}", fix=next_command(source))
    if source.resolve().name in PHASES and PhaseFolder(source.parent, source.resolve().name).done:
        return source.parent, source.resolve().name
    return source, None


def choose(given: Path, phase: str | None = None) -> PhaseFolder:
    """Return the finished phase that --from and --phase mean, see choose_phase().

    Raises:
        UsageError, InputError: see locate() and choose_phase().
    """
    run, named = locate(given)
    return choose_phase(run, phase or named, PHASES)


def choose_phase(run: Path, wanted: str | None, candidates: tuple[str, ...]) -> PhaseFolder:
    """Return the wanted phase, else the last candidate that is done and not stale, and print which.

    Raises:
        UsageError: no such phase.
        InputError: it is not done, or stale.
    """
    passed_over: list[str] = []
    if wanted is not None:
        if wanted not in candidates:
            raise UsageError(f"{console.command} takes no phase {wanted}: one of {', '.join(candidates)}")
        folder = PhaseFolder(run, wanted)
        if not folder.is_begun:  # the job before may have ended on another machine, a moment ago
            wait_for(folder.path / RUN)
        if (status := folder.status()) == "done":
            return folder
        why = f": {folder.stale_because()}" if status == "stale" else ""
        raise InputError(f"{folder.path} is {status}{why}", fix=next_command(run))
    for phase in reversed(candidates):
        folder = PhaseFolder(run, phase)
        status = folder.status()
        if status == "done":
            for line in passed_over:
                console.warn(line)
            console.note(f"{console.command}: takes {phase} of {run}")
            return folder
        if status == "stale":
            passed_over.append(f"{phase} is stale ({folder.stale_because()}) and is not used")
        elif status == "interrupted":
            passed_over.append(f"{phase} is not finished and is not used")
    detail = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise InputError(f"{run} holds no finished {' or '.join(candidates)}{detail}", fix=next_command(run))
