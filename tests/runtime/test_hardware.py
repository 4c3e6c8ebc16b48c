"""Threads, precision and device."""

import os
from pathlib import Path

import pytest
import torch

from cpmix_cli.runtime import hardware
from cpmix_cli.runtime.hardware import fits, free_memory, num_readers, num_threads, resolve_precision, use_device

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


def test_requested_precision_is_kept() -> None:
    cpu = torch.device("cpu")
    assert [resolve_precision(p, cpu) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")


def test_the_best_device_is_chosen_and_float32_is_not_rounded_to_tf32() -> None:
    """And cuDNN chooses the same algorithms at each start, whatever was set before."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    assert use_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)


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
