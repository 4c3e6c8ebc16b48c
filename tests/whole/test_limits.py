"""Limits of the machine, set for real: memory (RLIMIT_AS) and files of a disk (a tmpfs). Exit 4, and what to lower."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import Result, ended, hooked, must, save, setting, unchanged, write_photos

from cpmix_cli.runtime import memory

MIB = 2**20
LIMITED = """
import resource
import torch, pandas, pyarrow.parquet, torchvision
import cpmix_cli.commands.{module}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room}, used + {room}))
"""


def limited(room: float, command: str, *words: object) -> Result:
    """Run a command that may take `room` MiB more than its imports."""
    hook = LIMITED.format(module=command.replace("-", "_"), room=int(room * MIB))
    return hooked(hook, command, *words)


def check(result: Result, fix: str) -> None:
    """Check the error of a command without memory: no file is called damaged or is to be deleted."""
    ended(result, 4, f"\n  fix: {fix}")
    said = r"error: (out of memory: that of the CPU is used up.* \(ulimit -v allows |no thread can be started: memory)"
    assert re.search(said, result.stderr)  # which of them comes first depends on the libraries
    assert "damaged" not in result.stderr
    assert "rm " not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("room", [2, 40])
def test_training_without_memory_names_what_to_lower(room: int, digits: Path, tmp_path: Path) -> None:
    """The second limit is reached in the first step."""
    changes = setting("optimizer.batch_size=417", "model.name=resnet32")
    result = limited(room, "train-stage1", "--data", digits, "--out", tmp_path / "run", "--epochs", 2, *changes)
    check(result, "train with --set optimizer.micro_batches=2 or more")
    assert ("an epoch has only" in result.stderr) == (room == 40)


@pytest.mark.slow
def test_evaluating_without_memory_names_what_to_lower(digits_run: Path) -> None:
    with unchanged(digits_run):
        result = limited(3, "evaluate", "--from", digits_run, "--overwrite")
    check(result, "lower evaluation.batch_size: --set evaluation.batch_size=50")


@pytest.mark.slow
def test_building_without_memory_calls_no_image_unreadable(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", {"red": 40, "green": 30})
    words = ("image-folder", "--data-root", tmp_path / "photos", "--image-size", 512, "--out", tmp_path / "data")
    result = limited(48, "build-lt", *words)
    check(result, "pack the images into shards, which may exceed the memory: --pack S")
    assert "cannot be read as an image" not in result.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_checkpoint_larger_than_memory_is_not_called_damaged(tmp_path: Path) -> None:
    sha = save({"a": torch.zeros(20 * MIB)}, tmp_path / "w.pth")
    check(limited(60, "import-weights", tmp_path / "w.pth", "--sha256", sha), "close other programs")
    assert must("import-weights", tmp_path / "w.pth", "--sha256", sha).code == 0


@pytest.mark.parametrize(
    ("fault", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (OSError(5, "Input/output error"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_exhausted_memory_is_told_from_other_errors(fault: Exception, is_memory: bool) -> None:
    assert memory.is_exhausted(fault) == is_memory


@pytest.mark.slow
def test_a_disk_without_inodes_is_told_from_one_without_bytes(toy: Path, tmp_path: Path) -> None:
    place, script = tmp_path / "disk", tmp_path / "run.sh"
    place.mkdir()
    script.write_text(
        f'mount -t tmpfs -o size=64m,nr_inodes=3 tmpfs {place} || exit 99\ntouch {place}/a {place}/b\n"$@"\n'
    )
    train: Sequence[object] = ("train-stage1", "--data", toy, "--out", place / "run", "--epochs", 2)
    command = ["unshare", "-Urm", "sh", script, sys.executable, "-m", "cpmix_cli", *train]
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ)
    if found.returncode in (1, 99) and "cpmix" not in found.stderr and "error" not in found.stderr:
        pytest.skip("no tmpfs can be mounted here")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    said = "No space left on device for another file: the disk has as many files (inodes) as it takes; see df -i\n"
    result = ended(Result(found.returncode, found.stdout, found.stderr), 4, said)
    assert "  fix: delete files there that you do not need, then run the same command again\n" in result.stderr
