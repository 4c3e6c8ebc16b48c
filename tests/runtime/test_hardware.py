"""Threads, precision and device."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import must, process

from cpmix_cli.artifacts.files import RUN
from cpmix_cli.commands import evaluate
from cpmix_cli.flags import EvaluateOptions
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runtime import hardware
from cpmix_cli.runtime.hardware import (
    busy_cores,
    fits,
    free_memory,
    has_own_cores,
    num_readers,
    num_threads,
    resolve_precision,
    use_device,
)

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, CORES),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1,4"}, 1),
        ({"OMP_NUM_THREADS": "many", "SLURM_CPUS_PER_TASK": ""}, CORES),
        ({"OMP_NUM_THREADS": "\N{SUPERSCRIPT TWO}", "SLURM_CPUS_PER_TASK": "9" * 5000}, CORES),
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"SLURM_CPUS_PER_TASK": "4096"}, CORES),  # more than it is bound to
    ],
)
def test_threads_follow_the_environment(environment: dict[str, str], expected: int) -> None:
    assert num_threads(environment) == expected


def test_threads_stay_within_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.joblib, "cpu_count", lambda: 1)  # what joblib makes of a control group's quota
    assert num_threads({}) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": ""}, False),
        ({"OMP_NUM_THREADS": "many"}, False),
        ({"OMP_NUM_THREADS": "4,1"}, True),
        ({"SLURM_CPUS_PER_TASK": "4"}, True),
        ({"SLURM_JOB_ID": "7"}, True),
    ],
)
def test_cores_are_given_by_the_user_or_by_slurm(environment: dict[str, str], expected: bool) -> None:
    assert has_own_cores(environment) == expected


IDLE = "0 0 0 100 0 0 0 0 0 0"
BUSY = "100 0 0 0 0 0 0 0 0 0"


@pytest.mark.parametrize(
    ("after", "cores", "expected"),
    [
        ([IDLE, IDLE], {0, 1}, 0),
        ([BUSY, IDLE], {0, 1}, 1),
        ([BUSY, IDLE], {1}, 0),  # only the cores that this process may use count
        ([BUSY, BUSY], {0, 1}, 2),
        (["45 0 0 55 0 0 0 0 0 0", IDLE], {0, 1}, 0),
        (["55 0 0 45 0 0 0 0 0 0", IDLE], {0, 1}, 1),
        (["50 0 0 50 0 0 0 0 0 0", "40 0 0 60 0 0 0 0 0 0"], {0, 1}, 1),  # a process that changed its core
        (["0 100 0 0 0 0 0 0 0 100", IDLE], {0, 1}, 1),  # of low priority; its time as a guest is not counted twice
        (["0 0 60 0 40 0 0 0", IDLE], {0, 1}, 1),  # the kernel, and waiting for the disk
        (["0 0 0 10 90 0 0 0", IDLE], {0, 1}, 0),
        (["0 0 0 10 0 0 0 90", IDLE], {0, 1}, 1),  # taken by another virtual machine
        (["0 0 0 100", IDLE], {0, 1}, 0),  # an old kernel
        ([BUSY, IDLE], {0, 1, 2}, 0),  # a container that shows other cores
        (["0 0 0 0 0 0 0 0 0 0", BUSY], {0, 1}, 0),  # one that shows no time
        (["a b c d", BUSY], {0, 1}, 0),
    ],
)
def test_busy_cores_are_those_used_between_two_readings(
    after: list[str], cores: set[int], expected: int, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"

    def write(times: list[str]) -> None:
        lines = [f"cpu{core} {ticks}" for core, ticks in enumerate(times)]
        stat.write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 1 2 3", ""]))

    write(["0 0 0 0 0 0 0 0 0 0"] * len(after))
    assert busy_cores(tmp_path, cores, lambda: write(after)) == expected
    assert busy_cores(tmp_path / "none", cores, lambda: None) == 0


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.long
def test_a_command_on_a_busy_machine_takes_one_thread_and_says_so(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as running:
        for _ in range(CORES):
            busy = running.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            running.callback(busy.kill)
        found = process("train-stage1", "--data", toy, "--out", tmp_path / "run", "--dry-run")
    assert found.code == 0, found.stderr
    uses = "both" if CORES == 2 else "all"
    assert f"1 thread: {CORES} of {CORES} cores are busy; --threads {CORES} uses {uses}\n" in found.stderr
    assert "1 thread\n" in found.stderr


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_flag_goes_before_the_environment(threads_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And may ask for more threads than cores, to resume a run of another machine bit for bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for asked, expected in ((None, 1), (CORES + 1, CORES + 1), (None, 1)):
        use_device("cpu", asked)
        assert torch.get_num_threads() == expected


def test_threads_are_recorded_and_a_resume_with_others_says_so(
    toy: Path, tmp_path: Path, threads_restored: None
) -> None:
    must("train-stage1", "--data", toy, "--out", tmp_path, "--threads", 3)
    assert PhaseFolder(tmp_path, "stage1").record().threads == 3
    (tmp_path / "stage1" / RUN).unlink()  # as if it was interrupted after its last epoch
    resumed = must("train-stage1", "--data", toy, "--out", tmp_path, "--threads", 1)
    assert "begun with 3 threads, going on with 1: not bit for bit without --threads 3" in resumed.stderr
    evaluate.run(EvaluateOptions(from_folder=tmp_path, threads=2))  # must() may run the next command after it
    assert torch.get_num_threads() == 2


def test_requested_precision_is_kept() -> None:
    cpu = torch.device("cpu")
    assert [resolve_precision(p, cpu) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")


def test_the_best_device_is_chosen_and_float32_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And cuDNN chooses the same algorithms at each start, whatever was set before."""
    cudnn = torch.backends.cudnn
    assert use_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    own = cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision
    try:
        cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = True, False, "tf32"
        assert use_device("cpu").type == "cpu"
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision) == (True, False, "tf32")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert use_device("auto").type == "cuda"
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision) == (False, True, "ieee")
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = own


def test_number_of_readers_ignores_omp_num_threads() -> None:
    assert num_readers({"OMP_NUM_THREADS": "1"}) == CORES
    assert num_readers({"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert num_readers({}, local_size=CORES) == (1 if os.cpu_count() == CORES else CORES)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        ({"memory.max": "max", "memory.current": "300"}, 1_024_000),
        ({"memory.max": "5000", "memory.current": "3000"}, 2000),
        ({"memory.max": "5000", "memory.current": "4900", "memory.stat": "anon 7\ninactive_file 800\nfile 900"}, 900),
        ({"memory.max": "5000", "memory.current": "6000"}, 0),
        ({"memory/memory.limit_in_bytes": "800", "memory/memory.usage_in_bytes": "100"}, 700),
    ],
)
def test_free_memory_is_limited_by_the_machine_or_its_control_group(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    proc, group = tmp_path / "proc", tmp_path / "group"
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:   1000 kB\n")
    for name, text in files.items():
        (group / name).parent.mkdir(parents=True, exist_ok=True)
        (group / name).write_text(f"{text}\n")
    assert free_memory(proc, group) == expected
    assert free_memory(tmp_path / "none", group) == 0


def test_images_stay_resident_up_to_a_quarter_of_free_memory() -> None:
    cpu = torch.device("cpu")
    free = free_memory(Path("/proc"), Path("/sys/fs/cgroup"))
    assert fits(1_000_000, cpu)
    assert not fits(free // 2, cpu)
