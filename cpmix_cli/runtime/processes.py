"""Processes of this machine: whether one is alive, and which one a number means."""

from pathlib import Path


def start_of(pid: int | str) -> str:
    """Return the start of a living process in clock ticks since boot: a number that is used again has another start.

    "" if there is no such process, or it has ended and nobody has asked how (a zombie).
    """
    try:
        # The name, in brackets, may hold anything; state and start time are the 3rd and the 22nd field.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""
