"""Everything cpmix shows; the only file that prints.

stdout carries the result alone: a short table, or with --json exactly one JSON object. All else goes to stderr, one
plain line at a time; a live view of the training stands below the lines only where stderr is a terminal. Control codes
that stand in a file's or a class's name are shown, never obeyed.
"""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, InputError, UsageError

if TYPE_CHECKING:
    from rich.live import Live

as_json = False  # set by the command line, before a command runs
command = ""
"""What runs, such as evaluate or figure 3; set by the command line. Errors of inputs and flags name it."""
_muted = False


def mute(muted: bool) -> None:
    """Show nothing from here on, or again: of several ranks one speaks."""
    global _muted
    _muted = muted


def set_up() -> None:
    """Make both streams take any text: a file name may hold bytes that are no UTF-8, a terminal may know ASCII only."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started us
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def printable(text: str) -> str:
    """Text with its control codes spelled out, but for line ends and tabs."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def on_a_line(text: str) -> str:
    """Text for a cell of a table, which a line end would break."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def note(text: str) -> None:
    """One line of progress on stderr. A log that cannot be written (its reader left, its disk is full) stops no run."""
    if sys.stderr is not None and not _muted:
        with suppress(OSError, ValueError):
            print(printable(text), file=sys.stderr, flush=True)


def _out(text: str) -> None:
    """A line of the result; raises as flush() does."""
    if sys.stdout is not None and not _muted:
        with _writing():
            print(text, flush=True)


def flush() -> None:
    """What others (click's help) could not write to stdout.

    Raises:
        BrokenPipeError: the reader left.
        EnvironmentFault: it cannot be written.
    """
    if sys.stdout is not None:
        with _writing():
            sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    """While something is written to stdout; raises as flush() does."""
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


def follow(command: str) -> None:
    """The command to type next, on stderr."""
    note(f"next: {command}")


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
        fields: what --json prints, after the command.
        rows: table cells, row by row; nothing is drawn without rows.
        header: column names; a name that starts with ">" is right-aligned.
        title: a line above the table.
        lines: plain lines below the table.
    """
    if as_json:
        _out(json.dumps(with_command(fields), allow_nan=False))
        return
    if rows:
        table(header, rows, title=title)
    for line in lines:
        _out(printable(line))


def with_command(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a result as JSON has them: the command comes first."""
    return {"command": command.split()[0], **fields} if command else fields


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table on stdout, see table_lines()."""
    for line in table_lines(header, rows, title=title):
        _out(line)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> list[str]:
    """A table as lines, columns padded with spaces; plain text, so that logs and pipes stay readable.

    The terminal's width is not consulted: a folded number is worse than a long line.
    """
    named = [name.removeprefix(">") for name in header]
    cells = [[on_a_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(named, *cells, strict=True)]
    sides = [">" if name.startswith(">") else "<" for name in header]
    lines = [printable(title)] if title else []
    for row in (named, ["-" * width for width in widths], *cells):
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return lines


def error(fault: CpmixError) -> None:
    """A user error on stderr, and as the one JSON object of a --json command."""
    if isinstance(fault, InputError | UsageError):
        fault.needed_by = fault.needed_by or command
    note(str(fault))
    if as_json:
        with suppress(OSError, EnvironmentFault):
            _out(json.dumps({"error": str(fault), "exit_code": fault.exit_code}))


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


class Progress:
    """Progress of work on many alike things, as a context: a bar on a terminal, elsewhere a line every LINE_SECONDS.

    It is called `doing`, such as "packed train images"; `done` of the `total` were done in an earlier run.
    """

    LINE_SECONDS = 10.0
    VIEW_SECONDS = 0.5

    def __init__(self, doing: str, total: int, done: int = 0) -> None:
        self._doing = doing
        self._total = total
        self._first = self._done = done
        self._view = _View(doing, total)
        self._pause = self.VIEW_SECONDS if self._view.live else self.LINE_SECONDS
        self._started = time.perf_counter()
        self._next = self._started + self._pause

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._view.close()

    def step(self, count: int = 1) -> None:
        """`count` more are done."""
        self._done += count
        if (now := time.perf_counter()) < self._next:
            return
        self._next = now + self._pause
        rate = (self._done - self._first) / (now - self._started)
        left = (self._total - self._done) / rate
        if self._view.live:
            self._view.draw(self._done, left)
        else:
            done = f"{self._doing}: {self._done:,} of {self._total:,}"
            note(f"{done}, {rate:,.0f} a second, {duration(left)} left")


@dataclass
class EpochProgress:
    """Progress of a training phase: one line an epoch everywhere, and below the lines a live view on a terminal.

    The projected time is printed once, when enough steps have been timed. The view is drawn once a second, and less
    often where that would take more than VIEW_SHARE of the time.
    """

    phase: str
    num_steps: int
    """Of the whole phase."""
    first_step: int
    """Steps that were done in an earlier run."""
    warm_up: int
    """Steps that also pay for setting up, and are not timed."""
    synchronize: Callable[[], None]
    """Waits for the device, before the clock is read."""
    look: Callable[[], Sequence[Sequence[str]]] = list
    """Gives the rows of the view, the heading first and the most telling next."""

    TIMED_STEPS: ClassVar = 5
    VIEW_SECONDS: ClassVar = 1.0
    VIEW_SHARE: ClassVar = 0.005

    def __post_init__(self) -> None:
        self._started = self._next_view = 0.0
        self._view = _View(self.phase, self.num_steps)

    @property
    def has_view(self) -> bool:
        """stderr is a terminal that can show it."""
        return self._view.live is not None

    def step(self, done: int) -> None:
        """`done` steps of the phase are finished (counted from its first epoch)."""
        timed = done - self.first_step - self.warm_up
        if timed == 0:
            self.synchronize()
            self._started = time.perf_counter()
        elif timed == self.TIMED_STEPS:
            per_step = self._seconds_per_step(timed)
            self.line(
                f"{self.phase}: projected {duration(per_step * (self.num_steps - done))} for "
                f"{self.num_steps - done} more steps ({1000 * per_step:.{0 if per_step >= 0.01 else 1}f} ms a step)"
            )
        if self.has_view and time.perf_counter() >= self._next_view:
            per_step = self._seconds_per_step(timed)  # waiting for the steps is no cost of the view
            began = time.perf_counter()
            left = per_step * (self.num_steps - done) if timed >= self.TIMED_STEPS else None
            self._view.draw(done, left, self.look())
            ended = time.perf_counter()
            # The first drawing also loads what it draws with.
            pause = (ended - began) / self.VIEW_SHARE if timed > 0 else 0.0
            self._next_view = ended + max(self.VIEW_SECONDS, pause)

    def _seconds_per_step(self, timed: int) -> float:
        self.synchronize()
        return (time.perf_counter() - self._started) / max(1, timed)

    def line(self, text: str) -> None:
        """One plain line; where there is a view, above it."""
        if self._view.live is None:
            note(text)
            return
        try:
            self._view.live.console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
        except (OSError, ValueError):  # the terminal is gone; the run is not
            self.close()

    def close(self) -> None:
        """Take the view away."""
        self._view.close()


class _View:
    """A bar and a table at the foot of the terminal; `live` is None where stderr is none, or can only print lines."""

    WIDTH = 76
    live: "Live | None" = None

    def __init__(self, doing: str, total: int) -> None:
        self._doing = doing
        self._total = total
        if sys.stderr is None or _muted or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        screen = Console(stderr=True)
        if not screen.is_interactive:
            return
        # No refresh thread: it would take CPU time in the middle of a training step.
        live = Live(console=screen, auto_refresh=False, transient=True, redirect_stdout=False, vertical_overflow="crop")
        with suppress(OSError):
            live.start()
            screen.show_cursor(True)  # a process that is killed could not give it back
            self.live = live

    def draw(self, done: int, seconds_left: float | None, rows: Sequence[Sequence[str]] = ()) -> None:
        """Draw anew: the bar, and below it as many rows as there is room for, the heading first; None: nobody knows."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        if self.live is None:
            return
        width, height = self.live.console.size
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        bar = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1))
        bar.add_row(Text(self._doing), ProgressBar(self._total, done), Text(f"{done}/{self._total}{left}"))
        shown = list(rows[: max(0, height - 3)])  # the bar, a line of the log and the cursor's have theirs
        while shown and not any(shown[-1][1:]):  # a heading whose rows have none
            shown.pop()
        numbers = [Column(justify="right", no_wrap=True) for _ in rows[0][1:]] if rows else []
        table = Table.grid(Column(ratio=1, no_wrap=True, overflow="ellipsis"), *numbers, padding=(0, 2))
        for number, row in enumerate(shown):
            table.add_row(*(Text(on_a_line(cell)) for cell in row), style="" if number else "bold")
        bar.width = table.width = min(width, self.WIDTH)
        try:
            self.live.update(Group(bar, table), refresh=True)
        except (OSError, ValueError):  # the terminal is gone; the run is not
            self.close()

    def close(self) -> None:
        """Take it away."""
        live, self.live = self.live, None
        if live is not None:
            with suppress(OSError, ValueError):
                live.stop()
