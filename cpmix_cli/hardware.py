"""What a run computes on: the device, its precision, and the threads of the CPU."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from cpmix_cli import ranks
from cpmix_cli.errors import EnvironmentFault


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
    torch.set_num_threads(num_threads(os.environ, Path("/sys/fs/cgroup"), here.local_size))
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


def num_threads(environment: Mapping[str, str], cgroup: Path, local_size: int = 1) -> int:
    """Cores that this process may use: those it is bound to (its share of all, where several ranks are bound to none),
    or fewer where OMP_NUM_THREADS, SLURM_CPUS_PER_TASK or the quota of its control group (a container's --cpus) says
    so.

    More threads than that stop each other at every step.

    Args:
        environment: os.environ.
        cgroup: where the control group's files are mounted.
        local_size: ranks on this machine.
    """
    limits = [len(os.sched_getaffinity(0))]
    if limits[0] == os.cpu_count():
        limits.append(limits[0] // local_size)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        value = environment.get(name, "").split(",")[0]  # OMP_NUM_THREADS may give a number for each nesting level
        if value.isdigit():
            limits.append(int(value))
    limits += [math.ceil(quota) for quota in (_quota_v2(cgroup), _quota_v1(cgroup)) if quota is not None]
    return max(1, min(limits))


def _quota_v2(cgroup: Path) -> float | None:
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(cgroup: Path) -> float | None:
    try:
        quota = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        period = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
