"""Signals that stop a run: they set a flag that the training loop reads between steps.

The handlers are installed before all other imports, so that a job that is preempted while it starts also ends cleanly.
This module therefore imports nothing slow. Exit code 75 means that the same command resumes the run. Exit code 130
means Ctrl-C before any state was saved.
"""

import os
import signal
import time
from types import FrameType

from cpmix_cli.runtime.errors import EXIT_CTRL_C, EXIT_INTERRUPTED, Interrupted

HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

twice_seconds = 0.0
"""Time in seconds within which a second SIGTERM counts as the same request; set by ranks.py."""

_pending: signal.Signals | None = None
_since = 0.0
_adopted = False
_in_loop = False
_has_state = False


class Stopped(SystemExit):
    """Exit by a signal outside the training loop. `except Exception` does not catch it."""


def install() -> None:
    """Install the handler for the signals of HANDLED. Under nohup, SIGHUP stays ignored."""
    for number in HANDLED:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def ignore() -> None:
    """Ignore all signals from now on, so that none changes the exit code while Python shuts down."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)


def state_is_saved() -> None:
    """Record that there is state on disk from which the same command can resume. Ctrl-C then exits with code 75."""
    global _has_state
    _has_state = True


def _handle(number: int, frame: FrameType | None) -> None:
    global _pending, _since, _adopted
    if _adopted:  # this rank's copy of the signal on which the ranks agreed
        _adopted, _since = False, time.monotonic()
        return
    # A terminal that closes sends several SIGHUP, or one beside a SIGTERM: together they are one request.
    if _pending is not None and signal.SIGHUP in (number, _pending):
        if number != signal.SIGHUP:
            _pending, _since = signal.Signals(number), time.monotonic()
        return
    code = EXIT_CTRL_C if number == signal.SIGINT and not _has_state else EXIT_INTERRUPTED
    if number == _pending == signal.SIGTERM and time.monotonic() - _since < twice_seconds:
        return
    if _pending is not None:  # a second signal: exit at once; published files remain
        os._exit(code)
    _pending, _since = signal.Signals(number), time.monotonic()
    if not _in_loop:
        raise Stopped(code)


def number() -> int:
    """Return the number of the pending signal; 0 if there is none."""
    return 0 if _pending is None else int(_pending)


def adopt(number: int) -> bool:
    """Make the signal on which the ranks agreed pending at this rank; return whether there is one.

    A signal that reaches this rank after it sent its own number is handled at the next agreement.

    Args:
        number: number of the signal; 0 for none.
    """
    global _pending, _adopted
    if _pending is None and number:
        _pending, _adopted = signal.Signals(number), True
    return number > 0


def pending() -> str | None:
    """Return the name of the pending signal; None if there is none."""
    return _pending.name if _pending is not None else None


def interrupted(where: str) -> Interrupted:
    """Return the error for a run that a signal interrupted; `where` describes the state of the run."""
    return Interrupted(f"{pending()} received; {where}", fix="run the same command again to go on")


class in_loop:
    """Context of the training loop: inside it, a first signal only becomes pending(), and the loop stops the run."""

    def __enter__(self) -> None:
        global _in_loop
        _in_loop = True

    def __exit__(self, *_: object) -> None:
        global _in_loop
        _in_loop = False
