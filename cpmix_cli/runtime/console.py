"""Output of all commands: results on stdout, progress and errors on stderr; the only file that prints.

stdout contains only the result: a short table, or with --json exactly one JSON object. All other output is plain lines
on stderr, with a live view below them if stderr is a terminal. Control codes in names of files or classes are escaped.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TextIO

from cpmix_cli.runtime import layout
from cpmix_cli.runtime.errors import CpmixError, EnvironmentFault, InputError, UsageError, counted
from cpmix_cli.runtime.screen import Foot, foot
from cpmix_cli.runtime.text import encodable, on_a_line, printable, quoted

as_json = False  # set by the command line, before a command runs
command = ""
"""Command that runs, such as "evaluate" or "figure 3"; set by the command line. Errors of inputs and flags name it."""
_muted = False
_step: "_Step | None" = None


def mute(muted: bool) -> None:
    """Turn all output of this process off or on. Of several ranks, only one prints."""
    global _muted
    _muted = muted


@dataclass
class _Step:
    """Command that `cpmix run` does as one of several."""

    results: list[dict[str, Any]]
    quiet: bool


@contextmanager
def step(name: str, words: Sequence[str], *, quiet: bool) -> Iterator[list[dict[str, Any]]]:
    """Context of one of several commands in a process; yields the list that its JSON results are added to.

    Its next command is not printed. Its table goes to stdout, unless `quiet` or with --json. run.json records its
    words as the command. After an error, `command` stays its name, which the error needs.

    Args:
        name: name of the command.
        words: words of its command line.
        quiet: print nothing of its result.
    """
    global command, _step
    outer, typed_words = command, sys.argv
    command, _step = name, _Step([], quiet or as_json)
    sys.argv = [*typed_words[:1], *words]
    try:
        yield _step.results
        command = outer
    finally:
        _step, sys.argv = None, typed_words


def set_up() -> None:
    """Make both streams accept any text. File names may have bytes that are not UTF-8; a terminal may be ASCII only."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: the parent process closed the stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def note(text: str) -> None:
    """Print one line of progress on stderr. Errors of writing are ignored, so that a full disk does not stop a run.

    A terminal gets it broken at words, unless it holds a command, which is copied from there.
    """
    lines = [printable(text)] if "\n" in text or "cpmix " in text else layout.prose([text], columns(sys.stderr))
    _note("\n".join(lines))


def insist(text: str) -> None:
    """Print one line as note() does, also if this process is muted: the one that should speak may be missing."""
    _note(printable(text), always=True)


def _note(text: str, *, always: bool = False) -> None:
    if sys.stderr is not None and (always or not _muted):
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def drop_unwritten_notes() -> None:
    """Drop the notes that could not be written to stderr; called last."""
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds to nowhere. Python flushes it again at exit, and would exit with 120."""
    with suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _out(text: str) -> None:
    """Print one line of the result on stdout; raises as flush()."""
    if sys.stdout is not None and not _muted and (_step is None or not _step.quiet):
        with _writing():
            print(encodable(text, sys.stdout.encoding), flush=True)


def raw(text: str) -> None:
    """Print text on stdout as it is, for a shell to read; raises as flush()."""
    _out(text)


def flush() -> None:
    """Flush stdout, for text that other code printed, such as click's help.

    Raises:
        BrokenPipeError: the reader closed the pipe.
        EnvironmentFault: stdout cannot be written.
    """
    if sys.stdout is not None:
        with _writing():
            sys.stdout.flush()


@contextmanager
def _writing() -> Iterator[None]:
    """Convert an OSError of writing to stdout; raises as flush()."""
    try:
        yield
    except OSError as fault:
        _discard(sys.stdout)
        if isinstance(fault, BrokenPipeError):
            raise
        raise EnvironmentFault(
            f"cannot write the result to standard output: {fault.strerror}",
            fix="free the disk that the output goes to, or send it elsewhere; then run the same command again",
        ) from fault


def typed(*words: object) -> str:
    """Return a cpmix command line of these words, quoted for the shell."""
    return quoted("cpmix", *words)


def follow(command: str) -> None:
    """Print the command to type next, on stderr; not that of a step, which is not the user's to type."""
    if _step is None:
        note(f"next: {command}")


def warn(text: str) -> None:
    """Print a warning on stderr."""
    note(f"warning: {text}")


def result(
    fields: dict[str, Any],
    *,
    rows: Sequence[Sequence[str]] = (),
    header: Sequence[str] = (),
    title: str = "",
    lines: Sequence[str] = (),
) -> None:
    """Print the result of a command on stdout: a JSON object with --json, else a table and lines.

    Args:
        fields: JSON object, printed with the command as its first field.
        rows: cells of the table, row by row, see table_lines(). Without rows no table is printed.
        header: column names; a column whose name starts with ">" is right-aligned.
        title: line above the table.
        lines: plain lines below the table, as they are.

    Raises:
        BrokenPipeError: the reader closed the pipe.
        EnvironmentFault: stdout cannot be written.
    """
    if _step is not None:
        _step.results.append(with_command(fields))
    if as_json:
        _out(json.dumps(with_command(fields), allow_nan=False))
        return
    if rows:
        table(header, rows, title=title)
    for line in lines:
        _out(printable(line))


def with_command(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON result, with the command as the first field."""
    return {"command": command.split()[0], **fields} if command else fields


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print a table on stdout.

    Args:
        header: as for table_lines().
        rows: as for table_lines().
        title: as for table_lines().

    Raises:
        BrokenPipeError: the reader closed the pipe.
        EnvironmentFault: stdout cannot be written.
    """
    for line in table_lines(header, rows, title=title):
        _out(line)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> list[str]:
    """Return a table as layout.table_lines() makes it for the terminal of stdout."""
    return layout.table_lines(header, rows, title=title, width=columns())


def prose(lines: Sequence[str]) -> list[str]:
    """Return sentences as layout.prose() breaks them for the terminal of stdout."""
    return layout.prose(lines, columns())


def columns(stream: TextIO | None = None) -> int | None:
    """Return the columns of the terminal that a stream is, by default stdout; None if it is none, or has no size."""
    with suppress(OSError, ValueError, AttributeError):  # no terminal, no file, no stream
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or None
    return None


def error(fault: CpmixError) -> None:
    """Print a user error on stderr, and with --json also as the JSON object on stdout."""
    if isinstance(fault, InputError | UsageError):
        fault.needed_by = fault.needed_by or command
    _note(str(fault))
    if as_json:
        with suppress(OSError, EnvironmentFault):
            _out(json.dumps({"error": str(fault), "exit_code": fault.exit_code}))


def duration(seconds: float) -> str:
    """Return a time as text: "under 1 s", "8 s", "3 min 20 s", "5 h 06 min"."""
    total = round(seconds)
    if total < 1:
        return "under 1 s"
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def histogram(counts: Sequence[int], names: Sequence[str], *, width: int = 40) -> list[str]:
    """Return class counts as lines with bars. Of more than 20 classes, every k-th is shown.

    Args:
        counts: images per class [C].
        names: class names [C].
        width: length of the longest bar, in characters.
    """
    names = [on_a_line(name) for name in names]
    stride = -(-len(counts) // 20)
    chosen = range(0, len(counts), stride)
    label_width = max(len(names[c]) for c in chosen)
    top = max(1, *counts)
    lines = [f"{names[c]:<{label_width}} {counts[c]:>7} {'#' * max(1, round(width * counts[c] / top))}" for c in chosen]
    if stride > 1:
        lines.append(f"(every {stride}th of {len(counts)} classes)")
    return lines


class Progress:
    """Progress of work on many items, as a context: a bar on a terminal, else a line every LINE_SECONDS.

    Args:
        doing: label, such as "packed train images".
        total: number of items.
        done: number of items that an earlier run finished.
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
        """Count more items as finished."""
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
    """Progress of a training phase: one line per epoch, and on a terminal a live view below the lines.

    The projected time is printed once, after TIMED_STEPS steps. The view is drawn every VIEW_SECONDS, or less often so
    that drawing takes at most VIEW_SHARE of the time.
    """

    phase: str
    num_steps: int
    """Steps of the whole phase."""
    first_step: int
    """Steps that an earlier run finished."""
    warm_up: int
    """First steps of this run that are not timed, because they include setup."""
    synchronize: Callable[[], None]
    """Wait for the device; called before the clock is read."""
    look: Callable[[], Sequence[Sequence[str]]] = list
    """Return the rows of the view: the heading, then the most important rows first."""

    TIMED_STEPS: ClassVar = 5
    VIEW_SECONDS: ClassVar = 1.0
    VIEW_SHARE: ClassVar = 0.005

    def __post_init__(self) -> None:
        self._started = self._next_view = 0.0
        self._view = _View(self.phase, self.num_steps, " steps")

    @property
    def has_view(self) -> bool:
        """True if stderr is a terminal that can show the view."""
        return self._view.live is not None

    def step(self, done: int) -> None:
        """Report that `done` steps of the phase are finished, counted from its first epoch."""
        timed = done - self.first_step - self.warm_up
        if timed == 0:
            self.synchronize()
            self._started = time.perf_counter()
        elif timed == self.TIMED_STEPS:
            per_step, left = self._seconds_per_step(timed), self.num_steps - done
            pace = f"{1000 * per_step:.{0 if per_step >= 0.01 else 1}f} ms a step"
            note(f"{self.phase}: projected {duration(per_step * left)} for {counted(left, 'more step')} ({pace})")
        if self.has_view and time.perf_counter() >= self._next_view:
            per_step = self._seconds_per_step(timed)  # waits for queued steps, which is no cost of the view
            began = time.perf_counter()
            seconds = per_step * (self.num_steps - done) if timed >= self.TIMED_STEPS else None
            self._view.draw(done, seconds, self.look())
            ended = time.perf_counter()
            # The first drawing waits for more than a later one, so its time is not used.
            pause = (ended - began) / self.VIEW_SHARE if timed > 0 else 0.0
            self._next_view = ended + max(self.VIEW_SECONDS, pause)

    def _seconds_per_step(self, timed: int) -> float:
        self.synchronize()
        return (time.perf_counter() - self._started) / max(1, timed)

    def close(self) -> None:
        """Remove the view."""
        self._view.close()


class _View:
    """Bar and table at the foot of the terminal. `live` is None if stderr is not a terminal that can redraw."""

    live: Foot | None = None

    def __init__(self, doing: str, total: int, unit: str = "") -> None:
        self._doing = doing
        self._total = total
        self._unit = unit
        if not _muted:
            self.live = foot()

    def draw(self, done: int, seconds_left: float | None, rows: Sequence[Sequence[str]] = ()) -> None:
        """Redraw the bar and as many rows as fit, the heading first. The time left may be unknown (None)."""
        if self.live is None:
            return
        count = f"{done:,}/{self._total:,}"
        named = f"{count}{self._unit}"
        left = [] if seconds_left is None else [f"{named}, {duration(seconds_left)} left"]
        try:
            self.live.draw((self._doing, done, self._total), [*left, named, count], rows)
        except (OSError, ValueError):  # the terminal was closed; the run continues
            self.close()

    def close(self) -> None:
        """Remove the view from the terminal."""
        live, self.live = self.live, None
        if live is not None:
            live.close()
