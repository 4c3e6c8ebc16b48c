"""Processes of this machine: identified by pid and start time, because pids are reused."""

from pathlib import Path


def start_of(pid: int | str) -> str:
    """Return the start time of a living process in clock ticks since boot; "" if it does not exist or is a zombie.

    Two processes with the same pid have different start times.
    """
    try:
        # Fields are read after the last bracket, since the name in brackets may contain spaces. The 3rd field is the
        # state, the 22nd the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""
