"""Locks: one writer per folder, named in a lock file that expires soon after its process ends.

The lock file is written and synced under another name and linked into place, so that it is never incomplete, even on
network file systems. A writer on this machine is alive if its process is, and dead if the machine was started since. A
writer that cannot be seen, on another machine or in another container, is alive if its heartbeat is recent: the
modification time of the lock file, by the file system's clock.
"""

import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.records import Record
from cpmix_cli.runtime import console, processes
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UnreadableError
from cpmix_cli.runtime.text import quoted

LOCK = ".cpmix-lock"
HEARTBEAT_SECONDS = 30.0
_STALE_SECONDS = 300.0
"""A writer that cannot be seen counts as dead after this time without a heartbeat."""
_EMPTY_SECONDS = 2.0
"""Age at which a lock without content is taken over. Without hard links, a new lock is empty for a moment."""
_POLL_SECONDS = 0.2


class Owner(Record):
    """Identity of a process, unique among machines and restarts: the content of a lock file."""

    model_config = ConfigDict(extra="forbid")

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    kernel: str
    """See processes.kernel()."""
    started: str
    """See processes.start_of()."""
    slurm_job: str
    """Slurm job id; "" outside Slurm."""
    slurm_task: str
    """Restart count, step and task: RESTART.STEP.TASK. It differs between the tasks of one `srun`."""
    serial: int
    """Count of the locks that this process has taken, to distinguish them."""
    machine: str = ""
    """See processes.machine(). Locks of older versions lack it."""

    @property
    def name(self) -> str:
        """Host, pid and job, for messages."""
        if not self.host:
            return "an unknown process"
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
            if (alive := processes.is_alive(self.pid, self.started)) is not None:
                return alive
        elif self._was_before_the_start_of(asking):
            return False
        if self.slurm_job and self.slurm_job == asking.slurm_job:
            (step, task), (step_, task_) = (owner.slurm_task.rsplit(".", 1) for owner in (self, asking))
            if step != step_ or task == task_:
                return False
        return _is_recent(silent_seconds)

    def _was_before_the_start_of(self, asking: "Owner") -> bool:
        """Return whether the machine of both was started since, by their boot ids.

        Two machines may have one name: they differ in their ids, and their containers mostly in the namespace.
        """
        if self.host != asking.host or (self.machine and asking.machine and self.machine != asking.machine):
            return False
        (boot, pids), (boot_, pids_) = (processes.split_kernel(owner.kernel) for owner in (self, asking))
        return bool(boot and boot_) and boot != boot_ and pids == pids_

    def is_seen_by(self, asking: "Owner") -> bool:
        """Return whether the process of `asking` can see this one, or that it is gone."""
        return self.host == asking.host and self.kernel == asking.kernel


def _is_recent(silent_seconds: float) -> bool:
    """Return whether a heartbeat is recent. One from the future is not: the clock was set back since."""
    return abs(silent_seconds) < _STALE_SECONDS


_serial = 0


def _this_process() -> Owner:
    global _serial
    _serial += 1
    env, pid = os.environ, os.getpid()
    return Owner(
        host=socket.gethostname(),
        pid=pid,
        kernel=processes.kernel(),
        started=processes.start_of(pid),
        slurm_job=env.get("SLURM_JOB_ID", ""),
        slurm_task=".".join(
            [env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_STEP_ID", ""), env.get("SLURM_PROCID", "")]
        ),
        serial=_serial,
        machine=processes.machine(),
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
            UnreadableError: the lock cannot be read now.
        """
        if (found := _read(self._path, may_fail=True)) != self._owner:
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
            raise _refusal(folder, held_by, owner)
        if held_by.name != waits_for:
            console.note(f"{folder}: waits for {held_by.name}")
            waits_for = held_by.name
        time.sleep(_POLL_SECONDS)
    lock, released = Lock(folder, owner), threading.Event()
    try:
        _sweep(folder, owner)
        threading.Thread(target=lock._beat, args=(released,), name="cpmix-heartbeat", daemon=True).start()
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
        if not (found.is_alive(silence, owner) if found is not None else _is_recent(silence)):
            with suppress(OSError):
                path.unlink()
    for path in folder.glob(f"{files.TEMPORARY}*"):  # the lock is held, so their writers are dead
        with suppress(OSError):  # another user's file may not be removable
            path.unlink() if not path.is_dir() or path.is_symlink() else shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """Remove the temporary files of dead writers from a finished folder. They do no harm, so failures are ignored."""
    if next(folder.glob(".cpmix-*"), None) is not None:
        with suppress(EnvironmentFault, OSError), hold(folder):
            pass


def refuse_if_held(folder: Path) -> None:
    """Raise EnvironmentFault if another process holds the folder's lock, as hold() would, but do not take the lock."""
    if (found := holder(folder)) is not None:
        raise _refusal(folder, found, _this_process())


def holder(folder: Path) -> Owner | None:
    """Return the living process that holds a folder's lock; None if no process holds it."""
    path = folder / LOCK
    found = _read(path)
    alive = found is not None and found.is_alive(_silence(path, time.time()), _this_process())
    return found if alive else None


def _refusal(folder: Path, held_by: Owner, asking: Owner) -> EnvironmentFault:
    lock = folder / LOCK
    fix = "wait until it has finished, or write elsewhere with --out FOLDER"
    if not held_by.is_seen_by(asking):
        minutes = f"{_STALE_SECONDS / 60:g} minutes"
        fix += f"; the lock of a process that is gone expires after {minutes}, or remove it: {quoted('rm', lock)}"
    return EnvironmentFault(
        f"{folder} is being written by another process ({held_by.name}), as its lock says: {lock}", fix=fix
    )


def _try(folder: Path, owner: Owner) -> Owner | None:
    """Take the lock, possibly from a dead owner, and return None; or return the living owner."""
    files.make_folder(folder)  # at each attempt: a writer that wrote nothing removes the folder
    lock = folder / LOCK
    candidate = folder / f"{LOCK}-{owner.host}-{owner.pid}-{owner.serial}"
    try:
        candidate.unlink(missing_ok=True)
        _write(candidate, owner)
        while True:
            if _place(candidate, lock, owner):
                return None
            os.utime(candidate)
            now = candidate.stat().st_mtime  # the file system's clock, as for the heartbeat
            found, silence = _read(lock), _silence(lock, now)
            if found is not None and found.is_alive(silence, owner):
                return found
            if lock.is_dir() and not lock.is_symlink():
                raise EnvironmentFault(
                    f"{lock} is a folder, and a lock file belongs there", fix=f"remove it: {quoted('rm', '-r', lock)}"
                )
            if found is None and lock.exists() and _is_recent(silence):
                if not _is_empty(lock):  # damaged, or from another version
                    return owner.model_copy(update={"host": "", "slurm_job": ""})
                if abs(silence) < _EMPTY_SECONDS:
                    time.sleep(_POLL_SECONDS)
                    continue
            _set_aside(lock, found)
    except FileNotFoundError:  # another writer has just removed the folder
        return _try(folder, owner)
    except OSError as fault:
        raise files.write_fault(lock, fault, needed_bytes=4096) from fault
    finally:
        with suppress(OSError):
            candidate.unlink()


def _write(lock: Path, owner: Owner) -> None:
    """Write a lock; one that a power cut empties would tell nothing of its owner."""
    with lock.open("x") as file:  # never through a link
        file.write(owner.model_dump_json())
        file.flush()
        os.fsync(file.fileno())


def _is_empty(lock: Path) -> bool:
    """Return whether a lock has no content, or zeros: what a power cut leaves of a file that was not synced."""
    try:
        return not files.read_bytes(lock).strip(b"\0")
    except InputError:
        return False


def _place(candidate: Path, lock: Path, owner: Owner) -> bool:
    """Put the lock in place and return True; return False if a lock exists."""
    try:
        os.link(candidate, lock)
    except FileExistsError:
        return False
    except OSError as fault:
        if fault.errno not in {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        try:  # the file system has no hard links
            _write(lock, owner)
        except FileExistsError:
            return False
        except OSError:
            with suppress(OSError):
                lock.unlink()  # it was made here
            raise
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


def _read(lock: Path, *, may_fail: bool = False) -> Owner | None:
    """Return the owner in a lock file; None if it is missing or damaged, or, unless this may fail, unreadable."""
    try:
        return Owner.model_validate_json(files.read_bytes(lock))
    except (InputError, ValueError) as fault:
        if may_fail and isinstance(fault, UnreadableError):
            raise
        return None


def _silence(lock: Path, now: float) -> float:
    """Return the seconds since the last heartbeat."""
    try:
        return now - lock.stat().st_mtime
    except OSError:
        return _STALE_SECONDS
