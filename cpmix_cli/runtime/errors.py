"""User errors and their exit codes.

A CpmixError is an error that the user can repair. It is shown as three lines (what is wrong, what needs it, how to fix
it) without a traceback. A ValueError is a wrong call from Python. An assert checks an invariant of this package.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cpmix_cli.runtime.text import on_a_line, printable, quoted

EXIT_BUG = 1
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130


class CpmixError(Exception):
    """Base class of all errors that a user can cause.

    Args:
        message: what is wrong, with the value and the file that contains it.
        needed_by: flag or phase that needs the value, if it is not the command that runs.
        fix: command or change that repairs the error.
    """

    exit_code = EXIT_BUG
    word = "error"

    def __init__(self, message: str, *, needed_by: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.needed_by = needed_by
        self.fix = fix

    def __str__(self) -> str:
        lines = [printable(f"{self.word}: {self.message}")]
        if self.needed_by:
            lines.append(f"  needed by: {on_a_line(self.needed_by)}")
        if self.fix:
            lines.append(f"  fix: {on_a_line(self.fix)}")
        return "\n".join(lines)


class UsageError(CpmixError):
    """Invalid flag or recipe."""

    exit_code = 2


class InputError(CpmixError):
    """Missing, invalid or damaged input.

    Args:
        message, needed_by, fix: see CpmixError.
        path: the damaged file, instead of `fix`, if the fix depends on the folder of the file; see runs/repair.py.
    """

    exit_code = 3

    def __init__(self, message: str, *, needed_by: str = "", fix: str = "", path: Path | None = None) -> None:
        super().__init__(message, needed_by=needed_by, fix=fix)
        self.path = path


class UnreadableError(InputError):
    """Input that the system does not let be read now, such as EIO, ESTALE or EACCES: it may be there and whole.

    No command takes it for missing or damaged, which could be a reason to make it anew.
    """

    exit_code = 4


class EnvironmentFault(CpmixError):
    """Error of the machine or the output folder: disk, permission, device, an output of another recipe."""

    exit_code = 4


class Diverged(CpmixError):
    """Loss that became NaN or infinite."""

    exit_code = 5


class Interrupted(CpmixError):
    """Run that a signal stopped. Its state is published, and the same command resumes it."""

    exit_code = EXIT_INTERRUPTED
    word = "interrupted"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 file", "2,000 files".

    Args:
        number: number of items.
        noun: singular of the noun.
        plural: plural of the noun; "" adds "s" to the singular.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shortened(items: Sequence[str], limit: int, separator: str = ", ") -> str:
    """Return the first items and the number of the others: "a, b and 3 more".

    Args:
        items: texts.
        limit: largest number of items in the result.
        separator: text between two items.
    """
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def indented(items: Sequence[str], limit: int | None = None) -> str:
    """Return the first `limit` items (None: all) as indented lines below a message, and how many are left out."""
    left_out = 0 if limit is None else max(0, len(items) - limit)
    return "".join(
        f"\n    {on_a_line(item)}" for item in [*items[:limit], *([f"... and {left_out:,} more"] if left_out else [])]
    )


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Return the hint ' Did you mean "x"?' with the most similar known name, and all known names if at most 20."""
    names = sorted(known)
    near = nearest(wrong, names)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return f"{hint} Known: {', '.join(names)}." if 0 < len(names) <= 20 else hint


def give_one_of(wrong: str, known: Iterable[str], flag: str = "") -> str:
    """Return the fix line of a wrong name: "give --device cpu, or one of auto, cuda".

    Args:
        wrong: name that was given.
        known: names that can be given; at most 20 are listed.
        flag: flag of the name; "" for an argument.
    """
    names = sorted(known)
    near = nearest(wrong, names) if len(names) > 1 else names
    give, others = (quoted("give", *filter(None, [flag]), *near), shortened([n for n in names if n not in near], 20))
    return f"{give}{', or' if near else ''} one of {others}" if others else give


def nearest(wrong: str, known: Iterable[str]) -> list[str]:
    """Return the name that is most similar to a wrong one; an empty list if none is similar."""
    import difflib  # imported here: signals.py imports this module first, and that must be fast

    by_lower = {name.lower(): name for name in sorted(known)}
    return [by_lower[name] for name in difflib.get_close_matches(wrong.lower(), by_lower, n=1, cutoff=0.5)]
