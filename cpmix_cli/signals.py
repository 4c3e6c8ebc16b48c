"""Signals that ask a run to stop: they set a flag that the training loop looks at between steps.

Installed before torch is imported, so that a job preempted while it starts also ends cleanly.
"""

import os
import signal
from types import FrameType

from cpmix_cli.errors import EXIT_CTRL_C, EXIT_INTERRUPTED

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_pending: signal.Signals | None = None
_in_loop = False


def install() -> None:
    """Take over the signals of HANDLED."""
    for number in HANDLED:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _pending
    code = EXIT_CTRL_C if number == signal.SIGINT else EXIT_INTERRUPTED
    if _in_loop and _pending is None:
        _pending = signal.Signals(number)
        return
    if _pending is not None:  # the second signal: leave at once, what was published stays
        os._exit(EXIT_INTERRUPTED)
    raise SystemExit(code)


def pending() -> str | None:
    """Name of the signal that asked the loop to stop, if one did."""
    return _pending.name if _pending is not None else None


class in_loop:
    """While inside, a first signal waits for the loop to look at pending()."""

    def __enter__(self) -> None:
        global _in_loop
        _in_loop = True

    def __exit__(self, *_: object) -> None:
        global _in_loop
        _in_loop = False
