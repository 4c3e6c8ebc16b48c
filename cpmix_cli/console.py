"""Everything cpmix shows; the only file that prints.

stdout carries the result alone: a short table, or with --json exactly one JSON object. All else goes to stderr, one
plain line at a time; a progress bar replaces the lines of an epoch only where stderr is a terminal. Control codes that
stand in a file's or a class's name are shown, never obeyed.
"""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cpmix_cli.errors import EnvironmentFault

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

as_json = False  # set by the command line, before a phase runs


def set_up() -> None:
    """Make both streams take any text: a file name may hold bytes that are no UTF-8, a terminal may know ASCII only."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started us
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def printable(text: str) -> str:
    """Text with its control codes spelled out, but for line ends and tabs."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def note(text: str) -> None:
    """One line of progress on stderr. A log that cannot be written (its reader left, its disk is full) stops no run."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(printable(text), file=sys.stderr, flush=True)


def _out(text: str) -> None:
    """A line of the result.

    Raises:
        BrokenPipeError: the reader left.
        EnvironmentFault: it cannot be written.
    """
    if sys.stdout is not None:
        with _writing():
            print(text, flush=True)


def flush() -> None:
    """What others (click's help) could not write to stdout.

    Raises:
        BrokenPipeError, EnvironmentFault: see _out().
    """
    if sys.stdout is not None:
        with _writing():
            sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    """While something is written to stdout; raises what _out() says."""
    try:
        yield
    except OSError as fault:
        # Python flushes stdout once more at exit: give what is left somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(fault, BrokenPipeError):
            raise
        raise EnvironmentFault(f"cannot write the result to standard output: {fault.strerror}") from fault


def typed(*words: object) -> str:
    """A cpmix command as one types it: quoted for the shell."""
    return shlex.join(["cpmix", *map(str, words)])


def warn(text: str) -> None:
    """A warning on stderr."""
    note(f"warning: {text}")


def result(
    fields: dict[str, Any],
    *,
    rows: Sequence[Sequence[str]] = (),
    header: Sequence[str] = (),
    title: str = "",
    lines: Sequence[str] = (),
) -> None:
    """The result of a command on stdout: `fields` as one JSON object, or a table and lines for a reader.

    Args:
        fields: what --json prints.
        rows: table cells, row by row; nothing is drawn without rows.
        header: column names; a name that starts with ">" is right-aligned.
        title: a line above the table.
        lines: plain lines below the table.
    """
    if as_json:
        _out(json.dumps(fields, allow_nan=False))
        return
    if rows:
        table(header, rows, title=title)
    for line in lines:
        _out(printable(line))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table on stdout, see table_lines()."""
    for line in table_lines(header, rows, title=title):
        _out(line)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> list[str]:
    """A table as lines, columns padded with spaces; plain text, so that logs and pipes stay readable.

    The terminal's width is not consulted: a folded number is worse than a long line.
    """
    right = [name.startswith(">") for name in header]
    named = [name.removeprefix(">") for name in header]
    # A line end within a cell would break the table.
    cells = [named, *[[printable(str(cell)).replace("\n", "\\n").replace("\t", "\\t") for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [printable(title)] if title else []
    for number, row in enumerate(cells):
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines


def error(text: str, exit_code: int) -> None:
    """A user error on stderr, and as the one JSON object of a --json command."""
    note(text)
    if as_json:
        with suppress(OSError, EnvironmentFault):
            _out(json.dumps({"error": text, "exit_code": exit_code}))


def duration(seconds: float) -> str:
    """Seconds as people say them: under 1 s, 8 s, 3 min 20 s, 5 h 06 min."""
    total = round(seconds)
    if total < 1:
        return "under 1 s"
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def histogram(counts: Sequence[int], names: Sequence[str], *, width: int = 40) -> list[str]:
    """Class counts as lines with bars; above 20 classes, every k-th class."""
    stride = -(-len(counts) // 20)
    chosen = range(0, len(counts), stride)
    label_width = max(len(names[c]) for c in chosen)
    top = max(1, *counts)
    lines = [f"{names[c]:<{label_width}} {counts[c]:>7} {'#' * max(1, round(width * counts[c] / top))}" for c in chosen]
    if stride > 1:
        lines.append(f"(every {stride}th of {len(counts)} classes)")
    return lines


class EpochProgress:
    """Progress of a training phase: a bar on a terminal, one line an epoch everywhere.

    The projected time is printed once, when enough steps have been timed.

    Args:
        phase: its name.
        num_steps: of the whole phase.
        first_step: those done in an earlier run.
        warm_up: steps that also pay for setting up, and are not timed.
        synchronize: waits for the device, before the clock is read.
    """

    TIMED_STEPS = 5

    def __init__(
        self, phase: str, num_steps: int, first_step: int, warm_up: int, synchronize: Callable[[], None]
    ) -> None:
        self._phase = phase
        self._num_steps = num_steps
        self._first_step = first_step
        self._warm_up = warm_up
        self._synchronize = synchronize
        self._started = time.perf_counter()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            import rich.console
            import rich.progress as bars

            self._bar = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(phase, total=num_steps, completed=first_step)
            self._bar.start()

    def step(self, done: int) -> None:
        """`done` steps of the phase are finished (counted from its first epoch)."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        timed = done - self._first_step - self._warm_up
        if timed == 0:
            self._synchronize()
            self._started = time.perf_counter()
        elif timed == self.TIMED_STEPS:
            self._synchronize()
            per_step = (time.perf_counter() - self._started) / self.TIMED_STEPS
            left = per_step * (self._num_steps - done)
            self.line(
                f"{self._phase}: projected {duration(left)} for {self._num_steps - done} more steps"
                f" ({1000 * per_step:.{0 if per_step >= 0.01 else 1}f} ms a step)"
            )

    def line(self, text: str) -> None:
        """One plain line, above the bar where there is one."""
        if self._bar is not None:
            with suppress(OSError):  # the terminal is gone; the run is not
                self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            note(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
