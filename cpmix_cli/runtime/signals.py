"""Signals that ask a run to stop: they set a flag that the training loop looks at between steps.

Installed before all else is imported, so that a job preempted while it starts also ends cleanly; so nothing slow is
imported here. Exit 75 says that the same command goes on; 130 is left for Ctrl-C where there is nothing yet to go on
with.
"""

import os
import signal
import time
from types import FrameType

from cpmix_cli.runtime.errors import EXIT_CTRL_C, EXIT_INTERRUPTED, Interrupted

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

twice_seconds = 0.0
"""In which the same SIGTERM may come again and be the same request; ranks.py sets it."""

_pending: signal.Signals | None = None
_since = 0.0
_adopted = False
_in_loop = False
_has_state = False


class Stopped(SystemExit):
    """A signal outside the loop. Not an Exception: nothing that mends failures is to swallow it."""


def install() -> None:
    """Take over the signals of HANDLED."""
    for number in HANDLED:
        signal.signal(number, _handle)


def ignore() -> None:
    """The command is over: its exit code stands, whatever comes while Python takes itself down."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)


def state_is_saved() -> None:
    """From here on the same command has something on disk to go on with."""
    global _has_state
    _has_state = True


def _handle(number: int, frame: FrameType | None) -> None:
    global _pending, _since, _adopted
    if _adopted:  # this rank's own copy of what the ranks agreed on
        _adopted, _since = False, time.monotonic()
        return
    code = EXIT_CTRL_C if number == signal.SIGINT and not _has_state else EXIT_INTERRUPTED
    if number == _pending == signal.SIGTERM and time.monotonic() - _since < twice_seconds:
        return
    if _pending is not None:  # the second signal: leave at once, what was published stays
        os._exit(code)
    _pending, _since = signal.Signals(number), time.monotonic()
    if not _in_loop:
        raise Stopped(code)


def number() -> int:
    """Of the signal that asked to stop; 0 without one."""
    return 0 if _pending is None else int(_pending)


def adopt(number: int) -> bool:
    """Take over the signal that the ranks agreed on, a number or 0; whether there is one. What comes to this rank after
    it gave its own number waits for the next time.
    """
    global _pending, _adopted
    if _pending is None and number:
        _pending, _adopted = signal.Signals(number), True
    return number > 0


def pending() -> str | None:
    """Name of the signal that asked to stop, if one did."""
    return _pending.name if _pending is not None else None


def interrupted(where: str) -> Interrupted:
    """What to tell the user whom a signal interrupted."""
    return Interrupted(f"{pending()} received; {where}", fix="run the same command again to go on")


class in_loop:
    """While inside, a first signal waits for the loop to look at pending()."""

    def __enter__(self) -> None:
        global _in_loop
        _in_loop = True

    def __exit__(self, *_: object) -> None:
        global _in_loop
        _in_loop = False
