"""Timings: loops that take turns, round after round, their memory, and what surrounds them."""

import ctypes
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cpmix_cli.artifacts.files import PHASES
from cpmix_cli.bench.loops import TimedLoop
from cpmix_cli.confusion import confusion_codes, count_confusions, draw_confused
from cpmix_cli.data.batches import make_batches
from cpmix_cli.data.dataset import Dataset, open_dataset, unwritten_dataset
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.flags import BenchOptions
from cpmix_cli.recipe import loading as recipes
from cpmix_cli.runtime import console, hardware
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.cuda_graphs import synchronize
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.objective import compile_stage
from cpmix_cli.training.plan import PhaseContext, Plan

PAIR_CLASSES = (100, 1000, 8142)  # CIFAR-100, ImageNet-LT, iNaturalist 2018
_MIN_STEPS = 3  # of a loop in a round
MIB = 2**20


@dataclass
class Timing:
    """Speeds of a loop."""

    loop: TimedLoop
    peak_bytes: int | None
    """Memory that building and warming it up took, without the resident images and without loader processes."""
    num_steps: int
    """In a round."""
    images_per_second: list[float] = field(default_factory=list)
    """Round by round."""

    def turn(self) -> None:
        """Time a round."""
        seconds, images = self.loop.timed(self.num_steps)
        self.images_per_second.append(images / seconds)

    @property
    def median(self) -> float:
        """Images a second."""
        return statistics.median(self.images_per_second)

    def ratio_to(self, other: "Timing") -> float:
        """Median over the rounds of this loop's speed over the other's in the same round."""
        pairs = zip(self.images_per_second, other.images_per_second, strict=True)
        return statistics.median(mine / others for mine, others in pairs)


def training_set(folder: Path | None, data_root: Path | None) -> Dataset:
    """The data set of a folder; without one, an unwritten one like CIFAR-100-LT at rho 200.

    Raises:
        InputError: no data set there, damaged, or points.
        UsageError: --data-root without --data.
    """
    if folder is not None:
        dataset = open_dataset(folder, data_root=data_root)
        if len(dataset.shape) != 3:
            raise InputError(f"{folder} holds points; the loop to compare with takes images")
        return dataset
    if data_root is not None:
        raise UsageError("--data-root is of a data set: give --data too")
    counts = exponential_counts(500, 100, 200)
    return unwritten_dataset(
        "random images", counts, [32, 32, 3], recipe="cifar100-lt/cpmix", rho=200.0, storage="tensors"
    )


def prepare(options: BenchOptions, dataset: Dataset) -> tuple[str, PhaseContext, list[str]]:
    """The name of the recipe to time, what its plans are made from, and its phases.

    Raises:
        EnvironmentFault: the device is not there.
        UsageError: faults of the recipe, or it does not fit the data set, or requires a teacher.
    """
    device = hardware.use_device(options.device)
    name = options.recipe or dataset.record.recipe
    recipe = recipes.load(name, settings=options.settings, epochs=options.epochs, rho=dataset.record.rho)
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    if any("teacher" in term.functions for term in compile_stage(recipe.stage1)):
        raise UsageError(f"{name} learns from a teacher, which bench has not")
    precision = hardware.resolve_precision(recipe.model.precision, device)
    phases = [phase for phase in PHASES if getattr(recipe, phase) is not None]
    return name, PhaseContext(recipe, dataset, device, precision, {}), phases


def random_images(count: int, shape: Sequence[int]) -> Tensor:
    """Random pixels, the same each time: uint8 [count, *shape]."""
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_data(context: PhaseContext, labels: Tensor) -> TrainingData:
    """random_images() with these labels [N], resident on the device."""
    dataset, device = context.dataset, context.device
    images = random_images(len(labels), dataset.shape).to(device)
    batches = make_batches(images, context.recipe.data, dataset.record)
    return TrainingData(batches, labels.to(device), torch.tensor(dataset.class_counts, device=device))


def measure(
    loops: Mapping[str, Callable[[], TimedLoop]], rounds: int, seconds: float, memory: "Memory"
) -> dict[str, Timing]:
    """Time loops in turn, each for so many seconds per round."""
    timings = {}
    expected = 0.0
    for name, build in loops.items():
        memory.restart()
        loop = build()
        loop.warm_up()
        taken = loop.timed(_MIN_STEPS)[0] / _MIN_STEPS
        timings[name] = Timing(loop, memory.peak(), max(_MIN_STEPS, math.ceil(seconds / taken)))
        expected += rounds * timings[name].num_steps * taken
    console.note(f"bench: {rounds} round{'s' if rounds > 1 else ''}, {console.duration(expected)} and more")
    for number in range(rounds):
        for timing in reversed(timings.values()) if number % 2 else timings.values():  # who comes first alternates
            timing.turn()
    return timings


class Memory:
    """Peak memory of a device above what there was at restart(): reserved on CUDA, else resident in this process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._before: int | None = None

    def restart(self) -> None:
        """Give back what the allocator keeps, and forget the peak so far."""
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_reserved()
            return
        self._before = None  # the peak so far stays, unless the system can forget it
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _of_this_process("VmRSS")

    def peak(self) -> int | None:
        """Bytes; None where the system does not say."""
        if self._before is None:
            return None
        return (torch.cuda.max_memory_reserved() if self._cuda else _of_this_process("VmHWM")) - self._before


def _of_this_process(name: str) -> int:
    """Bytes, by the name that /proc has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def start_up_seconds() -> float:
    """Median of five runs of `cpmix --help`, as a process."""
    command = [sys.executable, "-m", "cpmix_cli", "--help"]
    return _median_seconds(
        lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), 5, torch.device("cpu")
    )


def _median_seconds(function: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that a call takes, until the device is done with it."""
    taken = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def pair_costs(num_classes: int, batch_size: int, device: torch.device) -> dict[str, float]:
    """Seconds to count a batch's confusions and to draw as many pairs, with 50 confused classes a row."""
    generator = torch.Generator().manual_seed(0)

    def classes(*shape: int) -> Tensor:
        return torch.randint(0, num_classes, shape, generator=generator).to(device)

    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
    counts.scatter_(1, classes(num_classes, 50), 1.0)
    labels, predictions = classes(batch_size), classes(batch_size)
    uniforms = torch.rand(batch_size, dtype=torch.float64, generator=generator).to(device)
    counted = torch.ones((), dtype=torch.bool, device=device)

    def count() -> None:
        count_confusions(counts, confusion_codes(labels, predictions, counted, num_classes))

    return {
        "num_classes": num_classes,
        "count_seconds": _median_seconds(count, 10, device),
        "draw_seconds": _median_seconds(lambda: draw_confused(counts, labels, uniforms), 10, device),
    }


def not_projected(plans: Iterable[Plan]) -> list[str]:
    """What a recipe also takes time for, and nothing here times."""
    matches = any(term.recipe.match is not None for plan in plans for term in plan.terms)
    return ["the matching of partners"] if matches else []
