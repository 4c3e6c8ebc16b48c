"""One writer a folder: who is refused and told what, who waits, and which locks outlive nobody."""

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import cpmix, files, must, refused

from cpmix_cli.artifacts import locks
from cpmix_cli.artifacts.files import TEMPORARY
from cpmix_cli.artifacts.locks import LOCK, Owner, hold
from cpmix_cli.runtime import processes
from cpmix_cli.runtime.errors import EnvironmentFault, UnreadableError


def owner(**changes: object) -> Owner:
    """This process, outside Slurm, but for some fields."""
    return locks._this_process().model_copy(update={"slurm_job": "", **changes})


def leave_lock(folder: Path, by: Owner, *, silent: float = 0.0) -> Path:
    """A lock as another process would have left it, its last heartbeat some seconds ago."""
    folder.mkdir(exist_ok=True)
    path = folder / LOCK
    path.write_text(by.model_dump_json())
    os.utime(path, (time.time() - silent,) * 2)
    return path


def test_a_second_writer_is_refused_and_the_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with hold(tmp_path / "stage1"):
        by = rf"\({os.uname().nodename}, pid {os.getpid()}, Slurm job 4711\)"
        held = f"stage1 is being written by another process {by}, as its lock says: {tmp_path / 'stage1' / LOCK}"
        with pytest.raises(EnvironmentFault, match=held) as caught, hold(tmp_path / "stage1"):
            pass
        assert caught.value.exit_code == 4
        assert caught.value.fix == "wait until it has finished, or write elsewhere with --out FOLDER"
        with pytest.raises(EnvironmentFault, match=held):
            locks.refuse_if_held(tmp_path / "stage1")
        with hold(tmp_path / "stage2"):  # another phase of the same run
            pass
    with hold(tmp_path / "stage1"):
        pass
    assert files(tmp_path) == []


def test_an_unused_lock_leaves_no_file(tmp_path: Path) -> None:
    with hold(tmp_path / "a" / "b" / "stage1"):
        assert files(tmp_path) == [f"a/b/stage1/{LOCK}"]
    assert list(tmp_path.iterdir()) == []


DEAD = 2**22 - 1  # a pid beyond those in use
BOOT, PIDS = processes.split_kernel(processes.kernel())
EARLIER = "00000000-0000-4000-8000-000000000000"  # the boot id before a power cut


@pytest.mark.parametrize(
    ("left_by", "silent", "taken"),
    [
        ({}, 0, False),
        ({"pid": DEAD}, 0, True),
        ({"started": "1"}, 0, True),  # the pid is used again, by another process
        ({"kernel": "another"}, 0, False),  # nothing is known of it
        ({"kernel": f"{BOOT}pid:[7]"}, 0, False),  # another container of this name: its processes are out of sight
        ({"kernel": f"{BOOT}pid:[7]"}, 301, True),
        ({"kernel": EARLIER + PIDS}, 0, True),  # before this machine was started
        ({"kernel": f"{EARLIER}pid:[7]"}, 0, False),  # in a container, perhaps of another machine of this name
        ({"kernel": f"{EARLIER}pid:[7]"}, 301, True),
        ({"kernel": EARLIER + PIDS, "machine": "another"}, 0, False),  # another machine of this name
        ({"kernel": EARLIER + PIDS, "machine": "another"}, 301, True),
        ({"host": "elsewhere", "kernel": EARLIER + PIDS}, 0, False),
        ({"host": "elsewhere"}, -299, False),  # clocks differ a little
        ({"host": "elsewhere"}, -3600, True),  # the clock was set back: no living process left that
        ({"kernel": EARLIER + PIDS}, -3600, True),
        ({}, -3600, False),  # this process, alive
        ({"host": "elsewhere"}, 10, False),
        ({"host": "elsewhere"}, 299, False),
        ({"host": "elsewhere"}, 301, True),
        ({"host": "elsewhere", "slurm_job": "12"}, 10, False),
        ({"host": "elsewhere", "slurm_job": "11"}, 0, True),  # this job, before it was requeued
        ({"host": "elsewhere", "slurm_job": "11", "slurm_task": "0.4.1"}, 0, False),  # another task of this step
        ({"host": "elsewhere", "slurm_job": "11", "slurm_task": "0.3.1"}, 0, True),  # of an earlier step
        ({"slurm_job": "11"}, 0, False),  # this job, alive
    ],
)
def test_only_locks_of_dead_or_silent_processes_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_by: dict[str, object], silent: float, taken: bool
) -> None:
    for name, value in (("SLURM_JOB_ID", "11"), ("SLURM_STEP_ID", "4"), ("SLURM_PROCID", "0")):
        monkeypatch.setenv(name, value)
    folder = tmp_path / "stage1"
    leave_lock(folder, owner(**left_by), silent=silent)
    refusal = pytest.raises(EnvironmentFault, match="is being written by another process")
    with nullcontext() if taken else refusal, hold(folder) as lock:
        lock.check()
        assert files(folder) == [LOCK]
    assert files(folder.parent) == ([] if taken else [f"stage1/{LOCK}"])


def test_a_lock_of_an_older_version_is_read(tmp_path: Path) -> None:
    for pid, taken in ((os.getpid(), False), (DEAD, True)):
        fields = owner(pid=pid).model_dump()
        del fields["machine"]
        (tmp_path / LOCK).write_text(json.dumps(fields))
        refusal = pytest.raises(EnvironmentFault, match=f"pid {pid}")
        with nullcontext() if taken else refusal, hold(tmp_path):
            pass


@pytest.mark.parametrize("content", ["{}", "[1]", '{"host": 3}', "\x00\xff"])
def test_a_damaged_lock_expires_like_a_silent_one(tmp_path: Path, content: str) -> None:
    path = leave_lock(tmp_path, owner())
    path.write_text(content)
    with pytest.raises(EnvironmentFault, match="an unknown process") as caught, hold(tmp_path):
        pass
    assert caught.value.fix.endswith(
        f"; the lock of a process that is gone expires after 5 minutes, or remove it: rm {path}"
    )
    os.utime(path, (time.time() - 301,) * 2)
    with hold(tmp_path) as lock:
        lock.check()


@pytest.mark.parametrize("content", [b"", bytes(300)])
def test_a_lock_that_a_power_cut_emptied_costs_seconds(tmp_path: Path, content: bytes) -> None:
    path = leave_lock(tmp_path, owner())
    path.write_bytes(content)
    started = time.monotonic()
    with hold(tmp_path) as lock:
        lock.check()
    assert time.monotonic() - started < 10


def test_a_lock_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    with hold(tmp_path):
        assert calls == ["fsync", "link"]


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Let the first call of an os function fail."""
    real, calls = getattr(os, name), []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(name)
        if len(calls) == 1:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("fails", ["", "fsync"])
def test_a_lock_without_hard_links_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    with monkeypatch.context() as patched:
        fail_once(patched, "link", errno.EPERM)
        real, calls = os.fsync, []

        def fsync(descriptor: int) -> None:
            calls.append(descriptor)
            if fails and len(calls) == 2:  # the second is that of the lock itself
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        patched.setattr(os, "fsync", fsync)
        with pytest.raises(EnvironmentFault) if fails else nullcontext(), hold(tmp_path) as lock:
            lock.check()
    assert files(tmp_path) == []


def hide(monkeypatch: pytest.MonkeyPatch, *, answer: int = 0) -> None:
    """Hide all processes from /proc, as hidepid does; kill(pid, 0) answers with an error, if one is given."""
    monkeypatch.setattr(processes, "_stat", lambda pid: ("X", ""))
    if answer:

        def kill(pid: int, number: int) -> None:
            raise OSError(answer, os.strerror(answer))

        monkeypatch.setattr(os, "kill", kill)


@pytest.mark.parametrize(
    ("pid", "answer", "silent", "taken"),
    [
        (os.getppid(), errno.EPERM, 10, False),  # another user's, alive
        (os.getppid(), errno.EPERM, 301, True),  # the pid is used again
        (DEAD, errno.ESRCH, 0, True),
        (os.getppid(), 0, 10, False),  # where there is no /proc, such as on macOS
        (DEAD, 0, 0, True),
    ],
)
def test_an_owner_that_proc_does_not_show_is_asked_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int, answer: int, silent: float, taken: bool
) -> None:
    hide(monkeypatch, answer=answer)
    monkeypatch.setattr(processes, "kernel", lambda: "")
    leave_lock(tmp_path, owner(pid=pid, started="" if answer == 0 else "77"), silent=silent)
    with nullcontext() if taken else pytest.raises(EnvironmentFault, match=f"pid {pid}"), hold(tmp_path):
        pass


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(tmp_path) as lock:
        with monkeypatch.context() as patched:
            fail_once(patched, "open", errno.ESTALE)
            with pytest.raises(UnreadableError, match=f"cannot read {tmp_path / LOCK}: Stale file handle"):
                lock.check()
        lock.check()


def test_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    (tmp_path / f"{TEMPORARY}elsewhere-1-abc").write_bytes(b"half")
    (tmp_path / f"{LOCK}-elsewhere-1-1").write_text(owner(pid=DEAD).model_dump_json())
    waiting = f"{LOCK}-elsewhere-2-1"  # of a process that is just about to ask
    (tmp_path / waiting).write_text(owner(host="elsewhere").model_dump_json())
    with hold(tmp_path):
        assert files(tmp_path) == [LOCK, waiting, "model.safetensors"]


def test_a_lost_lock_stops_the_writer(tmp_path: Path) -> None:
    """A process that was stopped for longer than a lock lasts finds another in its place."""
    with hold(tmp_path) as lock:
        lock.check()
        leave_lock(tmp_path, owner(host="elsewhere", pid=5))
        with pytest.raises(EnvironmentFault, match="was taken over by elsewhere, pid 5; nothing more is written"):
            lock.check()
    assert files(tmp_path) == [LOCK]  # it is the other's


def test_a_held_lock_renews_its_timestamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    with hold(tmp_path):
        path = tmp_path / LOCK
        os.utime(path, (0, 0))
        until = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


CONTEND = """
import sys, time
from pathlib import Path
from cpmix_cli.artifacts.locks import hold
folder = Path(sys.argv[1])
for _ in range(25):
    with hold(folder, wait=True) as lock:
        count = int((folder / "count").read_text())
        time.sleep(0.001)
        lock.check()
        (folder / "count").write_text(str(count + 1))
"""


def test_only_one_process_holds_the_lock_at_once(tmp_path: Path) -> None:
    """Six processes count up by hand, over a dead one's lock to begin with."""
    leave_lock(tmp_path, owner(pid=DEAD))
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", CONTEND, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(6)]
    for process in processes:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()
    assert (tmp_path / "count").read_text() == "150"
    assert files(tmp_path) == ["count"]


def test_a_waiting_writer_gets_its_folder_after_an_empty_release(tmp_path: Path) -> None:
    """It takes away the folders that it made."""
    folder = tmp_path / "a" / "b"
    with hold(folder):
        command = [sys.executable, "-c", WAIT, str(folder)]
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "waits for" in waiting.stderr.readline()
    stdout, stderr = waiting.communicate()
    assert (waiting.returncode, stdout) == (0, "held\n"), stderr


WAIT = """
import sys
from pathlib import Path
from cpmix_cli.artifacts.locks import hold
with hold(Path(sys.argv[1]), wait=True) as lock:
    lock.check()
    print("held")
"""


FORGED = {"deep": "[" * 200_000, "NUL": "\0x" * 99, "types": '{"host": 3, "pid": "a"}', "long": "x" * 9_000_000}
FORGED |= {"pid": owner().model_dump_json().replace(f'"pid":{os.getpid()}', '"pid":-1')}


@pytest.mark.parametrize("kind", [*FORGED, "pipe", "folder"])
def test_what_is_no_lock_of_cpmix_is_refused_with_the_command_that_removes_it(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "stage1"
    folder.mkdir()
    lock = folder / LOCK
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.write_text(FORGED[kind])
    assert locks.holder(folder) is None
    with pytest.raises(EnvironmentFault) as caught, hold(folder):
        pass
    held = f"{folder} is being written by another process (an unknown process), as its lock says: {lock}"
    assert caught.value.message == (f"{lock} is a folder, and a lock file belongs there" if kind == "folder" else held)
    removes = caught.value.fix.rpartition(": ")[2]
    assert removes in (f"rm {lock}", f"rm -r {lock}")
    subprocess.run(removes, shell=True, check=True)
    with hold(folder):
        assert files(folder) == [LOCK]


def test_status_shows_a_locked_phase_as_running(digits: Path, tmp_path: Path) -> None:
    must("train-stage1", "--data", digits, "--out", tmp_path, "--epochs", 6)
    leave_lock(tmp_path / "stage2", owner(host="node7", pid=77, slurm_job="4711"))
    result = refused(75, (), "status", tmp_path, "--json")
    (run,) = result.json["runs"]
    assert (run["phases"][1]["status"], run["phases"][1]["because"]) == ("running", "by node7, pid 77, Slurm job 4711")
    assert run["next"] is None
    said = f"error: {tmp_path / 'stage2'} is being trained by node7, pid 77, Slurm job 4711\n"
    result = refused(3, said, "evaluate", "--from", tmp_path, "--phase", "stage2")
    assert result.stderr.endswith(f"fix: cpmix status {tmp_path}\n")
    result = must("evaluate", "--from", tmp_path)
    assert result.stderr.splitlines()[0] == (
        "warning: stage2 is being trained by node7, pid 77, Slurm job 4711 and is not used"
    )
    assert result.stderr.splitlines()[-1] == f"next: cpmix confusion-report --from {tmp_path}"


def test_a_phase_without_a_saved_state_is_told_as_being_trained(tmp_path: Path) -> None:
    leave_lock(tmp_path / "stage1", owner(host="node7", pid=77))
    result = refused(3, (), "status", tmp_path)
    assert result.stderr.splitlines()[-3:] == [
        f"error: {tmp_path / 'stage1'} is being trained by node7, pid 77; no state of it is saved yet",
        "  needed by: status",
        f"  fix: wait for the end of its first epoch, then: cpmix status {tmp_path}",
    ]
    result = refused(3, f"{tmp_path} holds no finished stage1", "evaluate", "--from", tmp_path)
    assert result.stderr.endswith(f"fix: cpmix status {tmp_path}\n")


def test_a_phase_locked_by_another_process_is_refused(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    elsewhere = owner(host="node7", pid=77, slurm_job="4711")
    must("train-stage1", "--data", digits, "--out", other, "--epochs", 6)
    leave_lock(other / "stage2", elsewhere)
    for flags in ([], ["--dry-run"], ["--overwrite"]):
        result = refused(4, (), "train-stage2", "--from", other, *flags)
        assert result.stderr.splitlines()[-2:] == [
            f"error: {other / 'stage2'} is being written by another process (node7, pid 77, Slurm job 4711), "
            f"as its lock says: {other / 'stage2' / LOCK}",
            "  fix: wait until it has finished, or write elsewhere with --out FOLDER; "
            f"the lock of a process that is gone expires after 5 minutes, or remove it: rm {other / 'stage2' / LOCK}",
        ]
        assert files(other / "stage2") == [LOCK]
    leave_lock(digits_run / "evaluation" / "finetune", elsewhere)
    assert must("evaluate", "--from", digits_run).stdout.endswith("finetune\n")  # up to date: nothing to write
    assert cpmix("evaluate", "--from", digits_run, "--overwrite").code == 4
