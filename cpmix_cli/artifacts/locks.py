"""Locks: one writer per folder, named in a lock file that expires soon after its process ends.

The lock file is written under another name and linked into place, so that it is never incomplete, even on network file
systems. A writer on this machine is alive if its process is. A writer on another machine is alive if its heartbeat is
recent: the modification time of the lock file, by the file system's clock.
"""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from pydantic import ConfigDict

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.records import Record
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError
from cpmix_cli.runtime.processes import start_of

LOCK = ".cpmix-lock"
HEARTBEAT_SECONDS = 30.0
_STALE_SECONDS = 300.0
"""A writer on another machine counts as dead after this time without a heartbeat."""
_POLL_SECONDS = 0.2


class Owner(Record):
    """Identity of a process, unique among machines and restarts: the content of a lock file."""

    model_config = ConfigDict(extra="forbid")

    host: str
    pid: int
    kernel: str
    """Boot id and pid namespace. Processes in the same namespace see the same pids."""
    started: str
    """Start of the process in clock ticks since boot."""
    slurm_job: str
    """Slurm job id; "" outside Slurm."""
    slurm_task: str
    """Restart count, step and task: RESTART.STEP.TASK. It differs between the tasks of one `srun`."""
    serial: int
    """Count of the locks that this process has taken, to distinguish them."""

    @property
    def name(self) -> str:
        """Host, pid and job, for messages."""
        return f"{self.host}, pid {self.pid}" + (f", Slurm job {self.slurm_job}" if self.slurm_job else "")

    def is_alive(self, silent_seconds: float, asking: "Owner") -> bool:
        """Return whether the owner may still write.

        A requeued Slurm job keeps its id. A lock with the id of `asking` was left by the job's earlier run, unless its
        owner is another task of the same step.

        Args:
            silent_seconds: seconds since the owner's last heartbeat.
            asking: the process that needs the lock.
        """
        if self.host == asking.host and self.kernel == asking.kernel:
            return start_of(self.pid) == self.started
        if self.slurm_job and self.slurm_job == asking.slurm_job:
            (step, task), (step_, task_) = (owner.slurm_task.rsplit(".", 1) for owner in (self, asking))
            if step != step_ or task == task_:
                return False
        return silent_seconds < _STALE_SECONDS


@cache
def _kernel() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return ""


_serial = 0


def _this_process() -> Owner:
    global _serial
    _serial += 1
    env, pid = os.environ, os.getpid()
    return Owner(
        host=socket.gethostname(),
        pid=pid,
        kernel=_kernel(),
        started=start_of(pid),
        slurm_job=env.get("SLURM_JOB_ID", ""),
        slurm_task=".".join(
            [env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_STEP_ID", ""), env.get("SLURM_PROCID", "")]
        ),
        serial=_serial,
    )


class Lock:
    """Lock on a folder that this process holds; see hold()."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._path = folder / LOCK
        self._owner = owner

    def check(self) -> None:
        """Check that the lock is still held. Call this before each write.

        A process that was suspended for longer than _STALE_SECONDS may have lost its lock.

        Raises:
            EnvironmentFault: another process has taken the lock.
        """
        if not self._is_own():
            found = _read(self._path)
            raise EnvironmentFault(
                f"{self._path.parent} was taken over by {found.name if found else 'another process'}; "
                "nothing more is written",
                fix="let that process finish, or stop it and run the same command again",
            )

    def _is_own(self) -> bool:
        return _read(self._path) == self._owner

    def _beat(self, released: threading.Event) -> None:
        while not released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                if self._is_own():
                    os.utime(self._path)

    def _release(self) -> None:
        with suppress(OSError):
            if self._is_own():
                self._path.unlink()


@contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[Lock]:
    """Lock a folder for writing, and remove the temporary files that dead writers left in it.

    The folder is created if missing, and removed at the end if it is still empty.

    Args:
        folder: folder to lock.
        wait: wait for another writer instead of raising.

    Raises:
        EnvironmentFault: another process holds the lock and `wait` is False, or the folder cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    owner = _this_process()
    waits_for = ""
    while (held_by := _try(folder, owner)) is not None:
        if not wait:
            raise _refusal(folder, held_by)
        if held_by.name != waits_for:
            console.note(f"{folder}: waits for {held_by.name}")
            waits_for = held_by.name
        time.sleep(_POLL_SECONDS)
    _sweep(folder, owner)
    lock, released = Lock(folder, owner), threading.Event()
    threading.Thread(target=lock._beat, args=(released,), name="cpmix-heartbeat", daemon=True).start()
    try:
        yield lock
    finally:
        released.set()
        lock._release()
        with suppress(OSError):  # a folder that is not empty stays
            for place in made:
                place.rmdir()


def _sweep(folder: Path, owner: Owner) -> None:
    now = (folder / LOCK).stat().st_mtime
    for path in folder.glob(f"{LOCK}-*"):
        found, silence = _read(path), _silence(path, now)
        if not (found.is_alive(silence, owner) if found is not None else silence < _STALE_SECONDS):
            with suppress(OSError):
                path.unlink()
    for path in folder.glob(f"{files.TEMPORARY}*"):  # the lock is held, so their writers are dead
        with suppress(OSError):  # another user's file may not be removable
            path.unlink()


def tidy(folder: Path) -> None:
    """Remove the temporary files of dead writers from a finished folder. They do no harm, so failures are ignored."""
    if next(folder.glob(".cpmix-*"), None) is not None:
        with suppress(EnvironmentFault, OSError), hold(folder):
            pass


def refuse_if_held(folder: Path) -> None:
    """Raise EnvironmentFault if another process holds the folder's lock, as hold() would, but do not take the lock."""
    if (found := holder(folder)) is not None:
        raise _refusal(folder, found)


def holder(folder: Path) -> Owner | None:
    """Return the living process that holds a folder's lock; None if no process holds it."""
    path = folder / LOCK
    found = _read(path)
    alive = found is not None and found.is_alive(_silence(path, time.time()), _this_process())
    return found if alive else None


def _refusal(folder: Path, held_by: Owner) -> EnvironmentFault:
    return EnvironmentFault(
        f"{folder} is being written by another process ({held_by.name})",
        fix="wait until it has finished, or write elsewhere with --out FOLDER",
    )


def _try(folder: Path, owner: Owner) -> Owner | None:
    """Take the lock, possibly from a dead owner, and return None; or return the living owner."""
    files.make_folder(folder)  # at each attempt: a writer that wrote nothing removes the folder
    lock = folder / LOCK
    candidate = folder / f"{LOCK}-{owner.host}-{owner.pid}-{owner.serial}"
    try:
        candidate.unlink(missing_ok=True)
        with candidate.open("x") as file:  # never through a link
            file.write(owner.model_dump_json())
        now = candidate.stat().st_mtime  # the file system's clock, as for the heartbeat
        while True:
            if _place(candidate, lock):
                return None
            found, silence = _read(lock), _silence(lock, now)
            if found is not None and found.is_alive(silence, owner):
                return found
            if found is None and lock.exists() and silence < _STALE_SECONDS:  # damaged, or from another version
                return owner.model_copy(update={"host": "an unknown process", "pid": 0, "slurm_job": ""})
            _set_aside(lock, found)
    except FileNotFoundError:  # another writer has just removed the folder
        return _try(folder, owner)
    except OSError as fault:
        raise files.write_fault(lock, fault, needed_bytes=4096) from fault
    finally:
        with suppress(OSError):
            candidate.unlink()


def _place(candidate: Path, lock: Path) -> bool:
    """Put the lock in place and return True; return False if a lock exists."""
    try:
        os.link(candidate, lock)
    except FileExistsError:
        return False
    except OSError as fault:
        if fault.errno not in {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        try:  # the file system has no hard links
            with lock.open("x") as file:
                file.write(candidate.read_text())
        except FileExistsError:
            return False
    return True


def _set_aside(lock: Path, dead: Owner | None) -> None:
    """Remove a dead owner's lock; put it back if another process has replaced it in the meantime."""
    aside = lock.with_name(f"{LOCK}-dead-{socket.gethostname()}-{os.getpid()}")
    with suppress(FileNotFoundError):
        lock.rename(aside)
        if _read(aside) != dead:
            with suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _read(lock: Path) -> Owner | None:
    """Return the owner in a lock file; None if the file is missing or unreadable."""
    try:
        return Owner.model_validate_json(files.read_bytes(lock))
    except (InputError, ValueError):
        return None


def _silence(lock: Path, now: float) -> float:
    """Return the seconds since the last heartbeat."""
    try:
        return now - lock.stat().st_mtime
    except OSError:
        return _STALE_SECONDS
