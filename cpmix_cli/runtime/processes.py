"""Processes of this machine: identified by pid and start time, because pids are reused."""

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path


def start_of(pid: int | str) -> str:
    """Return the start time of a living process in clock ticks since boot.

    "" if it does not exist, is a zombie, or cannot be seen: /proc may be missing, or hide the processes of other users.
    Two processes with the same pid have different start times.
    """
    state, started = _stat(pid)
    return "" if state in "ZX" else started


def is_alive(pid: int, started: str = "") -> bool | None:
    """Return whether a process lives.

    Args:
        pid: its pid.
        started: its start_of(); "" if that was not visible.

    Returns:
        None if a process with this pid lives, but its start cannot be compared: it may be another one.
    """
    state, found = _stat(pid)
    if found:
        return False if state in "ZX" else (found == started if started else None)
    try:
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return None
    except (OSError, OverflowError):
        return False
    return None


def _stat(pid: int | str) -> tuple[str, str]:
    """Return state and start time of a process; "X" and "" if /proc does not show it."""
    try:
        # Fields are read after the last bracket, since the name in brackets may contain spaces. The 3rd field is the
        # state, the 22nd the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "X", ""


@cache
def kernel() -> str:
    """Return the boot id and the pid namespace, one after the other; "" if /proc is missing.

    Processes in the same namespace see the same pids.
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return ""


def split_kernel(name: str) -> tuple[str, str]:
    """Return the boot id and the pid namespace of a kernel(); "" twice for any other text."""
    found = re.fullmatch(r"([0-9a-f-]{36})(pid:\[\d+\])", name)
    return (found[1], found[2]) if found else ("", "")


@cache
def machine() -> str:
    """Return the id of this installation, which stays at a restart; "" if it has none. Containers may share one."""
    with suppress(OSError, ValueError):
        return Path("/etc/machine-id").read_text().strip()
    return ""
