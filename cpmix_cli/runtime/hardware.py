"""Hardware of a run: device, precision, CPU threads and free memory."""

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import joblib
import torch

from cpmix_cli.runtime import console, ranks
from cpmix_cli.runtime.errors import EnvironmentFault, counted

MEASURED_SECONDS = 0.3
"""Time over which the use of the cores is measured; the kernel counts it in hundredths of a second."""
RESIDENT_SHARE = {"cuda": 1 / 2, "cpu": 1 / 4}
"""Largest fraction of a device's free memory for images that are kept there."""


def use_device(name: str, threads: int | None = None) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda", and set this process up for it.

    The setup is the number of CPU threads, and for convolutions on a GPU full float32 precision and cuDNN's
    deterministic algorithms. Each rank on a machine gets its own GPU.

    Args:
        name: the device.
        threads: number of CPU threads; None: num_threads(), and on the CPU no more than cores are idle now.

    Raises:
        EnvironmentFault: "cuda" is not available, or the machine has fewer GPUs than ranks.
    """
    here = ranks.current()
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(f"device cuda is not there (torch {torch.__version__})", fix="use --device cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if threads is None:
        threads = num_threads(os.environ, here.local_size)
        if threads > 1 and name == "cpu" and not has_own_cores(os.environ):
            threads = _idle_threads(threads, here.local_size)
    torch.set_num_threads(threads)
    if name == "cpu":  # nothing below is set, because torch.export refuses to work after the first
        return torch.device(name)
    # cuDNN's default rounds the factors of a float32 convolution to 10 bits (TF32).
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    # An algorithm chosen by timing, or one that adds in an order of chance, gives other bits after each start.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if here.size == 1:
        return torch.device(name)
    there = torch.cuda.device_count()
    if 1 < there < here.local_size or (there == 1 < here.local_size and "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise EnvironmentFault(
            f"{here.local_size} ranks on a machine with {there} GPU{'s' if there > 1 else ''}",
            fix="start one rank for each GPU",
        )
    device = torch.device("cuda", here.local_rank % there)  # under Slurm a task may see only its own GPU
    torch.cuda.set_device(device)
    return device


def resolve_precision(asked: str, device: torch.device) -> str:
    """Return the precision for "auto": "bf16" if the hardware multiplies it, else "fp32". Keep any other value."""
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
    """Return the largest number of CPU threads for this process. More threads than cores slow every step down.

    It is the number of cores to which the process is bound. If ranks on a machine are not bound, each gets an equal
    share of all cores. OMP_NUM_THREADS, SLURM_CPUS_PER_TASK and the CPU quota of the control group (a container's
    --cpus) can lower the number.
    """
    return _cores(environment, local_size, ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"))


def has_own_cores(environment: Mapping[str, str]) -> bool:
    """Return whether the number of cores to use is given: by OMP_NUM_THREADS, or by Slurm, which allocates them."""
    names = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID")
    return any(_number(environment.get(name, "")) is not None for name in names)


@cache  # what is idle when a command starts: later, this process itself uses the cores
def _idle_threads(most: int, local_size: int) -> int:
    """Return the number of threads for one of `local_size` ranks: its share of the idle cores, from 1 to `most`.

    A thread that waits for its core makes the other threads wait at the end of each operation. Two threads beside one
    busy process took 3 times as long as one thread.
    """
    cores = os.sched_getaffinity(0)
    busy = busy_cores(Path("/proc"), cores, partial(time.sleep, MEASURED_SECONDS))
    threads = max(1, min(most, (len(cores) - busy) // local_size))
    if threads < most:
        all_of_them = {2: "both"}.get(most, "all") if most == len(cores) else str(most)
        console.note(
            f"{counted(threads, 'thread')}: {busy} of {len(cores)} cores {'is' if busy == 1 else 'are'} busy; "
            f"--threads {most} uses {all_of_them}"
        )
    return threads


def busy_cores(proc: Path, cores: Collection[int], wait: Callable[[], object]) -> int:
    """Return how many cores are in use, rounded; 0 if unknown, such as in a container that does not show them.

    Processes of low priority count: beside one, two threads are slower than one thread too.

    Args:
        proc: the folder /proc.
        cores: numbers of the cores to look at.
        wait: waits between the two readings that are compared.
    """
    before = _core_times(proc)
    wait()
    after = _core_times(proc)
    if not all(core in before and core in after and after[core][1] > before[core][1] for core in cores):
        return 0
    idle = sum((after[core][0] - before[core][0]) / (after[core][1] - before[core][1]) for core in cores)
    return round(len(cores) - idle)


def _core_times(proc: Path) -> dict[int, tuple[int, int]]:
    """Return for each core the time that it was idle, and all its time, in ticks; an empty dict if unknown."""
    found = {}
    with suppress(OSError, ValueError, IndexError):
        for line in (proc / "stat").read_text().splitlines():
            name, *words = line.split()
            if name.startswith("cpu") and name != "cpu":
                # user, nice, system, idle, iowait, irq, softirq, steal; what follows is a part of user and nice.
                ticks = [int(word) for word in words[:8]]
                found[int(name[3:])] = (ticks[3] + ticks[4], sum(ticks))
    return found


def num_readers(environment: Mapping[str, str], local_size: int = 1) -> int:
    """Return the number of threads that read images: as num_threads(), without OMP_NUM_THREADS.

    torchrun sets OMP_NUM_THREADS to 1, which would leave a single reader.
    """
    return _cores(environment, local_size, ("SLURM_CPUS_PER_TASK",))


def _cores(environment: Mapping[str, str], local_size: int, names: Sequence[str]) -> int:
    limits: list[int] = [joblib.cpu_count()]  # respects the binding and quotas
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        limits.append(limits[0] // local_size)
    for name in names:
        if (number := _number(environment.get(name, ""))) is not None:
            limits.append(number)
    return max(1, min(limits))


def _number(text: str) -> int | None:
    """Return the number that a variable gives; None if it gives none."""
    value = text.split(",")[0]  # OMP_NUM_THREADS may list a number per nesting level
    return int(value) if value.isdecimal() and len(value) < 10 else None


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether images of `num_bytes` may stay on a device: they fit in RESIDENT_SHARE of its free memory.

    On the CPU, the ranks of a machine share its memory equally.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory(Path("/proc"), Path("/sys/fs/cgroup")) // ranks.current().local_size
    return num_bytes <= RESIDENT_SHARE[device.type] * free


def free_memory(proc: Path, cgroup: Path) -> int:
    """Return the free memory in bytes of the machine, or of its control group if that is less; 0 if unknown.

    Args:
        proc: the folder /proc.
        cgroup: the folder /sys/fs/cgroup.
    """
    free = 1024 * _number_after(proc / "meminfo", "MemAvailable:")
    for place, limit, used, files in (
        (cgroup, "memory.max", "memory.current", "inactive_file "),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        with suppress(OSError, ValueError):  # no such group, or no limit: "max"
            room = int((place / limit).read_text()) - int((place / used).read_text())
            # The file cache counts as used, but the kernel frees it when memory is needed.
            free = min(free, room + _number_after(place / "memory.stat", files))
    return max(0, free)


def cudnn_settings() -> dict[str, Any]:
    """Return the version and the settings of cuDNN, which computes the convolutions on a GPU."""
    cudnn = torch.backends.cudnn
    return {
        "version": cudnn.version(),  # type: ignore[no-untyped-call]
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
    }


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _value_after(Path("/proc/cpuinfo"), "model name").removeprefix(":").strip() or "cpu"


def _number_after(path: Path, word: str) -> int:
    return int((_value_after(path, word) or "0").split()[0])


def _value_after(path: Path, word: str) -> str:
    """Return the rest of the first line that starts with `word`; "" without such a line or file."""
    with suppress(OSError):
        return next((x.removeprefix(word).strip() for x in path.read_text().splitlines() if x.startswith(word)), "")
    return ""
