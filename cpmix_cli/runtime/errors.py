"""User errors and the exit code of each.

A CpmixError is something the user can mend: it is shown as three lines (what is wrong, who needs it, the command that
fixes it) and never as a traceback. A ValueError is a wrong call from Python, an assert our own invariant.
"""

from collections.abc import Iterable, Sequence

EXIT_BUG = 1
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130


class CpmixError(Exception):
    """Base of every error a user can cause.

    Args:
        message: what is wrong, with the value and the file it stands in.
        needed_by: what needs it, if not the command that runs: a flag, a phase.
        fix: the command (or the change) that mends it.
    """

    exit_code = EXIT_BUG
    word = "error"

    def __init__(self, message: str, *, needed_by: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.needed_by = needed_by
        self.fix = fix

    def __str__(self) -> str:
        lines = [f"{self.word}: {self.message}"]
        if self.needed_by:
            lines.append(f"  needed by: {self.needed_by}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(CpmixError):
    """A bad flag or recipe."""

    exit_code = 2


class InputError(CpmixError):
    """A missing, bad or damaged input."""

    exit_code = 3


class EnvironmentFault(CpmixError):
    """The machine or the output place: disk, permission, device, an output that belongs to another recipe."""

    exit_code = 4


class Diverged(CpmixError):
    """The loss became NaN or infinite."""

    exit_code = 5


class Interrupted(CpmixError):
    """A signal stopped the run; its state is published and the same command goes on."""

    exit_code = EXIT_INTERRUPTED
    word = "interrupted"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 file" or "2,000 files"; the plural is noun + "s" unless given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shortened(items: Sequence[str], limit: int, separator: str = ", ") -> str:
    """Return "a, b and 3 more": the first `limit` items, and how many are left out."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def indented(items: Sequence[str], limit: int | None = None) -> str:
    """Return the first `limit` items (None: all), each on a line of its own below the message, and how many are left
    out.
    """
    left_out = 0 if limit is None else max(0, len(items) - limit)
    return "".join(f"\n    {item}" for item in [*items[:limit], *([f"... and {left_out:,} more"] if left_out else [])])


def suggest(wrong: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest known name, and the list of all of them if they are not too many."""
    import difflib  # not while signals.py is imported, which must take no time

    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return f"{hint} Known: {', '.join(names)}." if 0 < len(names) <= 20 else hint
