"""What a run computes on: the device, its precision, and the threads of the CPU."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import joblib
import torch

from cpmix_cli.runtime import ranks
from cpmix_cli.runtime.errors import EnvironmentFault

RESIDENT_SHARE = {"cuda": 1 / 2, "cpu": 1 / 4}
"""Of the memory that is free, for images that are kept there."""


def use_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device that is there, set up for this process: threads, and float32 that is float32. Each
    of several ranks on a machine gets its own GPU.

    Raises:
        EnvironmentFault: cuda was asked for and is not there, or has fewer GPUs than the machine has ranks.
    """
    here = ranks.current()
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(f"device cuda is not there (torch {torch.__version__})", fix="use --device cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(num_threads(os.environ, here.local_size))
    # cuDNN's default rounds the factors of a float32 convolution to 10 bits (TF32).
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    if name == "cpu" or here.size == 1:
        return torch.device(name)
    there = torch.cuda.device_count()
    if 1 < there < here.local_size or (there == 1 < here.local_size and "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise EnvironmentFault(
            f"{here.local_size} ranks on a machine with {there} GPU{'s' if there > 1 else ''}",
            fix="start one rank for each GPU",
        )
    device = torch.device("cuda", here.local_rank % there)  # Slurm may show each task its own GPU alone
    torch.cuda.set_device(device)
    return device


def resolve_precision(asked: str, device: torch.device) -> str:
    """auto -> bf16 where the hardware multiplies it, else fp32; anything else stays."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def num_threads(environment: Mapping[str, str], local_size: int = 1) -> int:
    """Cores that this process may use: those it is bound to (its share of all, where several ranks are bound to none),
    or fewer where OMP_NUM_THREADS, SLURM_CPUS_PER_TASK or the quota of its control group (a container's --cpus) says
    so. More threads than that stop each other at every step.
    """
    return _cores(environment, local_size, ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"))


def num_readers(environment: Mapping[str, str], local_size: int = 1) -> int:
    """Threads that read images: as num_threads(), but for OMP_NUM_THREADS, which torchrun sets to 1."""
    return _cores(environment, local_size, ("SLURM_CPUS_PER_TASK",))


def _cores(environment: Mapping[str, str], local_size: int, names: Sequence[str]) -> int:
    limits: list[int] = [joblib.cpu_count()]  # looks at the binding and at quotas
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        limits.append(limits[0] // local_size)
    for name in names:
        value = environment.get(name, "").split(",")[0]  # OMP_NUM_THREADS may give a number for each nesting level
        if value.isdigit():
            limits.append(int(value))
    return max(1, min(limits))


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether images of so many bytes may stay on a device: RESIDENT_SHARE of what is free there holds them. On the CPU
    the ranks of a machine share its memory.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory(Path("/proc"), Path("/sys/fs/cgroup")) // ranks.current().local_size
    return num_bytes <= RESIDENT_SHARE[device.type] * free


def free_memory(proc: Path, cgroup: Path) -> int:
    """Bytes that this machine can still give, or its control group if that has less; 0 where nothing says so."""
    free = 1024 * _number_after(proc / "meminfo", "MemAvailable:")
    for place, limit, used, files in (
        (cgroup, "memory.max", "memory.current", "inactive_file "),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        with suppress(OSError, ValueError):  # no such group, or no limit: "max"
            room = int((place / limit).read_text()) - int((place / used).read_text())
            # What was read from files counts as used, but is given up for what is needed.
            free = min(free, room + _number_after(place / "memory.stat", files))
    return max(0, free)


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _value_after(Path("/proc/cpuinfo"), "model name").removeprefix(":").strip() or "cpu"


def _number_after(path: Path, word: str) -> int:
    return int((_value_after(path, word) or "0").split()[0])


def _value_after(path: Path, word: str) -> str:
    """The rest of the first line that begins with a word; "" without such a line or file."""
    with suppress(OSError):
        return next((x.removeprefix(word).strip() for x in path.read_text().splitlines() if x.startswith(word)), "")
    return ""
