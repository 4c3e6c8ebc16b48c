"""Files on disk: names, JSON, hashes, atomic publishing, checked reading.

A file is published whole: temporary file in the same folder, fsync, rename, fsync of the folder. Its hash is checked
when it is read. Tensors are safetensors, tables are Parquet, records are JSON with a digest of their own content. No
file is a pickle.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UnreadableError
from cpmix_cli.runtime.processes import is_alive

TrainingPhase = Literal["stage1", "stage2", "finetune"]
PHASES: tuple[str, ...] = get_args(TrainingPhase)
"""Training phases in their order. A run folder has one folder per phase."""

DATASET = "dataset.json"
RUN = "run.json"
RECIPE = "recipe.toml"
MODEL = "model.safetensors"
TRAINING_STATE = "training_state.safetensors"
CONFUSION_PAIRS = "confusion_pairs.parquet"
CLASS_COUNTS = "class_counts.parquet"
METRICS = "metrics.parquet"
EVALUATION = "metrics.json"
PER_CLASS = "per_class.parquet"
PREDICTIONS = "predictions.parquet"
LOGITS = "logits.safetensors"
SAMPLES = "samples.parquet"
THRESHOLDS = "thresholds.parquet"
HASHES = "hashes.parquet"
SEEN = "seen.parquet"
LEFT_OUT = "left_out.txt"
CONFUSION_MATRIX = "confusion_matrix.parquet"
CONFUSED_PAIRS = "confused_pairs.parquet"


# -- JSON and hashes ---------------------------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """Return a JSON value as indented text. Bytes of file names that are not UTF-8 are escaped."""
    return utf8_text(json.dumps(value, indent=1, ensure_ascii=False))


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces, so that equal values give equal text. Escapes as json_text()."""
    return utf8_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def utf8_text(text: str) -> str:
    """Escape lone surrogates in text, which represent bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object, as object_pairs_hook of json.loads().

    Raises:
        ValueError: a name occurs twice; json.loads() would keep only the last value.
    """
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def sha256(data: bytes) -> str:
    """Return the sha256 of bytes as hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value's canonical text as hex digits."""
    return sha256(canonical_json(value).encode())


# -- writing -----------------------------------------------------------------------------------------------------------

TEMPORARY = ".cpmix-tmp-"
_STAGING = f"{TEMPORARY}new"  # folder of staging()


def temporary_for(path: Path) -> Path:
    """Return the file that this process writes and then renames to `path`.

    Its name does not contain the name of `path`, which may be as long as the file system allows.
    """
    return path.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{sha256(os.fsencode(path.name))[:8]}")


def write_fault(path: Path, fault: OSError, *, needed_bytes: int = 0) -> EnvironmentFault:
    """Return the error for a file or folder that cannot be written.

    Args:
        path: file or folder.
        fault: error of the operating system.
        needed_bytes: bytes to be written. The message compares them with the free space or the limit.
    """
    if path.parent.name == _STAGING:
        path = path.parent.parent / path.name
    reason = fault.strerror or str(fault)
    fix = "choose a folder you can write to with --out"
    if fault.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        place = os.statvfs(_existing(path))
        room = f"{place.f_bavail * place.f_frsize:,} are free on the disk"
        fix = f"free at least {needed_bytes:,} bytes there"
        if fault.errno == errno.ENOSPC and _lacks_inodes(place):
            reason += " for another file: the disk has as many files (inodes) as it takes; see df -i"
            fix = "delete files there that you do not need, then run the same command again"
            return EnvironmentFault(f"cannot write {path}: {reason}", fix=fix)
        if fault.errno == errno.EFBIG:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            room = f"a file may have {limit:,} here (ulimit -f)" if limit >= 0 else "the file system takes less"
            fix = "raise the limit, or choose another folder with --out"
        elif fault.errno == errno.EDQUOT:
            room += ", but your quota of bytes or of files is used up (see: quota -s)"
        reason += f": {needed_bytes:,} bytes are needed, {room}"
        fix += ", then run the same command again"
    return EnvironmentFault(f"cannot write {path}: {reason}", fix=fix)


def _lacks_inodes(place: os.statvfs_result) -> bool:
    """Return whether a file system takes no other file. Those without a fixed number of files have f_files = 0."""
    return place.f_files > 0 and place.f_favail == 0


def _existing(path: Path) -> Path:
    """Return the path itself, or the nearest parent folder that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_place(folder: Path, needed_bytes: int, *, largest_file: int = 0) -> None:
    """Check that an output folder can be written and has enough space, before hours of work.

    Args:
        folder: output folder; it need not exist.
        needed_bytes: bytes of all new files together.
        largest_file: bytes of the largest new file, to compare with the limit of `ulimit -f`.

    Raises:
        EnvironmentFault: the folder cannot be written or lacks space. A quota is not visible in advance.
    """
    place = _existing(folder)
    code = 0
    if not place.is_dir():
        code = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    elif shutil.disk_usage(place).free < needed_bytes or _lacks_inodes(os.statvfs(place)):
        code = errno.ENOSPC
    elif 0 <= resource.getrlimit(resource.RLIMIT_FSIZE)[0] < largest_file:
        code, needed_bytes = errno.EFBIG, largest_file
    if code:
        raise write_fault(folder, OSError(code, os.strerror(code)), needed_bytes=needed_bytes)


def make_folder(path: Path) -> None:
    """Create a folder and its parents; raise EnvironmentFault if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise write_fault(path, fault, needed_bytes=4096) from fault


def publish(path: Path, data: bytes) -> str:
    """Publish a file whole and return its sha256. On failure, `path` keeps its earlier content.

    Raises:
        EnvironmentFault: a full disk, a permission or a quota prevents writing. No temporary file remains.
    """
    with publishing(path, len(data)) as file:
        file.write(data)
    return sha256(data)


@contextmanager
def publishing(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """Yield a file to write `num_bytes` to. It is published at the end of the context, but not after an exception.

    Raises:
        EnvironmentFault: as publish(). Any OSError inside the context counts as an error of writing.
    """
    temporary = temporary_for(path)
    try:
        # open() gives the user's usual permissions, unlike tempfile: the group may read a checkpoint.
        temporary.unlink(missing_ok=True)  # of a dead process with the same number, or put there by another user
        with temporary.open("xb") as file:  # never through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename([(temporary, path)])
    except OSError as fault:
        raise write_fault(path, fault, needed_bytes=num_bytes) from fault
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for new files that replace_together() moves to `folder`; it is removed at the end.

    The caller holds the lock of `folder`.

    Raises:
        EnvironmentFault: the folder cannot be made.
    """
    place = folder / _STAGING
    shutil.rmtree(place, ignore_errors=True)
    make_folder(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def replace_together(record: Path, new: Sequence[tuple[Path, Path]]) -> None:
    """Replace the files of an output by new ones, or, if a step fails, none.

    Args:
        record: the record whose existence says that the old output is whole: removed first.
        new: (file, path it is moved to), in this order. A new record is the last.

    Raises:
        EnvironmentFault: a file cannot be moved; all paths have their old files.
    """
    try:
        _rename([(None, record), *new])
    except OSError as fault:
        raise write_fault(record.parent, fault) from fault


def _rename(moves: Sequence[tuple[Path | None, Path]]) -> None:
    """Move files to their paths in this order, and fsync the folders; after an exception, all paths are as before.

    Args:
        moves: (file, its path); None removes what is at the path.

    Raises:
        OSError: a step failed.
    """
    undo: list[tuple[Path, Path | None]] = []  # path, and the name that its old file has meanwhile
    kept: list[Path] = []
    try:
        for file, path in moves:
            before = temporary_for(path).with_name(f"{temporary_for(path).name}-before{len(kept)}")
            before.unlink(missing_ok=True)
            kept.append(before)
            # Noted first, since a signal may come at any moment: to undo what was not done changes nothing.
            if file is None:
                undo.append((path, before))
                with suppress(FileNotFoundError):
                    path.rename(before)
            else:
                if (is_kept := _keep(path, before)) is not False:
                    undo.append((path, before if is_kept else None))
                file.replace(path)
        for folder in dict.fromkeys(path.parent for _, path in moves):
            _sync(folder)
    except BaseException:  # signals too
        for path, old in reversed(undo):
            with suppress(OSError):
                path.unlink() if old is None else old.replace(path)
        raise
    finally:
        for before in kept:
            with suppress(OSError):
                before.unlink(missing_ok=True)


def _keep(path: Path, before: Path) -> bool | None:
    """Give a file a second name, so that it can be restored.

    Returns:
        True: it has both names. None: there is no file. False: neither a link nor a copy could be made; a new file that
        takes its place is whole as well.
    """
    try:
        try:
            os.link(path, before, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(path, before, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError:
        return False
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno not in {errno.EINVAL, errno.ENOTSUP}:  # not a file system without fsync of folders
            raise
    finally:
        os.close(descriptor)


def refuse_existing(path: Path, is_own: Callable[[bytes], bool], *, overwrite: bool, why: str = "exists") -> None:
    """Refuse to replace the file of --out, unless --overwrite is given and cpmix wrote it.

    Args:
        path: the file; it need not exist.
        is_own: tells by the content of a file whether it is such an output of cpmix.
        overwrite: value of --overwrite.
        why: end of the message.

    Raises:
        EnvironmentFault: the file must not be replaced.
    """
    if not is_there(path):
        return
    known = path.is_file() and is_own(read_bytes(path))
    if not (known and overwrite):
        way = "replace it with --overwrite" if known else "move it away first, because cpmix did not write it"
        raise EnvironmentFault(f"{path} {why}", fix=f"write elsewhere, or {way}")


def publish_out(path: Path, data: bytes) -> None:
    """Publish the file of --out, whose folder is not locked; raises as publish().

    The folder is created if missing. Temporary files for the same path are removed if their process is dead.
    """
    make_folder(path.parent)
    remove_abandoned(path)
    publish(path, data)


def remove_abandoned(path: Path) -> None:
    """Remove temporary files and folders for this path that dead processes of this machine left."""
    *_, name = temporary_for(path).name.rpartition("-")
    for left in path.parent.glob(f"{TEMPORARY}{socket.gethostname()}-*-{name}*"):
        pid = left.name.removeprefix(f"{TEMPORARY}{socket.gethostname()}-").split("-")[0]
        if pid.isdecimal() and is_alive(int(pid)) is False:
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


# -- reading -----------------------------------------------------------------------------------------------------------

LATE_SECONDS = 5.0
"""Longest wait for a file that a record names. On network file systems a new file may appear late."""
MAX_RECORD = 2_000_000  # bytes; the record of a data set with ten thousand classes has half a million


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        InputError: the file is missing, or is not a regular file. A pipe could block for ever, and a device may have
            no end.
        UnreadableError: it may be there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise read_fault(path, fault) from fault
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(f"cannot read {path}: it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file", path=path)
    return os.fdopen(descriptor, "rb")


_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
"""Errors that say that there is no such file; others may be over in a moment."""


def read_fault(path: Path, fault: OSError) -> InputError:
    """Return the error for a file or folder that cannot be read."""
    message = f"cannot read {path}: {fault.strerror or fault}"
    if fault.errno in _ABSENT:
        return InputError(message, path=path)
    fix = "check the disk and its mount, then give the command again"
    if fault.errno in {errno.EACCES, errno.EPERM}:
        fix = f"give your user permission to read {path} and to enter the folders above it"
    return UnreadableError(message, fix=fix)


def is_there(path: Path) -> bool:
    """Return whether a path exists; a broken link counts. Raise UnreadableError if that cannot be found out."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as fault:
        raise read_fault(path, fault) from fault
    return True


def wait_for(path: Path) -> None:
    """Wait up to LATE_SECONDS for a file that has to exist. Do not wait if its folder is missing."""
    until = time.monotonic() + LATE_SECONDS
    while not os.path.lexists(path) and path.parent.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
        with suppress(OSError), os.scandir(path.parent) as entries:  # makes NFS refresh the folder
            next(entries, None)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Start of the small file that Git leaves in place of a large one that it did not fetch."""


def read_bytes(path: Path, sha: str | None = None, *, limit: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        path: file to read.
        sha: recorded sha256 that the bytes must have. With it, a missing file is waited for; see wait_for().
        limit: largest size in bytes.

    Raises:
        InputError: the file is missing, larger than `limit`, a Git LFS pointer, or has another sha256.
        UnreadableError: it cannot be read now.
    """
    if sha is not None:
        wait_for(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise InputError(f"{path} has {size:,} bytes; a file of its kind has at most {limit:,}", path=path)
        try:
            data = file.read()
        except OSError as fault:
            raise read_fault(path, fault) from fault
    if data.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself", fix="run git lfs pull in its repository")
    if sha is not None and sha256(data) != sha:
        raise InputError(
            f"{path} is damaged: its sha256 is {sha256(data)[:12]}..., recorded was {sha[:12]}...", path=path
        )
    return data


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise InputError if a file of a folder is missing or has another hash than recorded: name -> sha256."""
    for name, sha in hashes.items():
        read_bytes(folder / name, sha)
