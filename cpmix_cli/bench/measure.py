"""Timings: loops that run in turn, their peak memory, start-up time and the cost of confusion pairs."""

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
from cpmix_cli.confusion import count_confusions, draw_confused, prediction_codes
from cpmix_cli.data.batches import make_batches
from cpmix_cli.data.dataset import Dataset, open_dataset, unwritten_dataset
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.flags import BenchOptions
from cpmix_cli.recipe import loading as recipes
from cpmix_cli.runtime import console, hardware
from cpmix_cli.runtime.errors import InputError, UsageError, counted
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.cuda_graphs import synchronize
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.objective import compile_stage
from cpmix_cli.training.plan import PhaseContext, Plan

PAIR_CLASSES = (100, 1000, 8142)  # CIFAR-100, ImageNet-LT, iNaturalist 2018
_MIN_STEPS = 3  # per loop and round
MIB = 2**20


@dataclass
class Timing:
    """Timing of one loop."""

    loop: TimedLoop
    peak_bytes: int | None
    """Peak memory of building and warming up the loop, without resident images and loader processes; or None."""
    num_steps: int
    """Steps per round."""
    images_per_second: list[float] = field(default_factory=list)
    """Speed in each round, images per second."""

    def turn(self) -> None:
        """Run and time one round."""
        seconds, images = self.loop.timed(self.num_steps)
        self.images_per_second.append(images / seconds)

    @property
    def median(self) -> float:
        """Median speed over the rounds, images per second."""
        return statistics.median(self.images_per_second)

    def ratio_to(self, other: "Timing") -> float:
        """Return the median over the rounds of (this loop's speed / the other's speed in the same round)."""
        pairs = zip(self.images_per_second, other.images_per_second, strict=True)
        return statistics.median(mine / others for mine, others in pairs)


def training_set(folder: Path | None, data_root: Path | None) -> Dataset:
    """Return the data set in a folder; without a folder, one in memory with the counts of CIFAR-100-LT at rho 200.

    Raises:
        InputError: the folder has no data set, or a damaged one, or one of points.
        UsageError: --data-root without --data.
    """
    if folder is not None:
        dataset = open_dataset(folder, data_root=data_root)
        if len(dataset.shape) != 3:
            raise InputError(
                f"{folder} holds points, and the reference loop takes images", fix="give --data a data set of images"
            )
        return dataset
    if data_root is not None:
        raise UsageError(
            f"--data-root {data_root} has no data set whose images it holds", fix="give --data FOLDER as well"
        )
    counts = exponential_counts(500, 100, 200)
    return unwritten_dataset(
        "random images", counts, [32, 32, 3], recipe="cifar100-lt/cpmix", rho=200.0, storage="tensors"
    )


def prepare(options: BenchOptions, dataset: Dataset) -> tuple[str, PhaseContext, list[str]]:
    """Return the name of the recipe to time, the context of its plans, and its phases.

    Raises:
        EnvironmentFault: the device is missing.
        UsageError: the recipe has errors, does not fit the data set, or needs a teacher.
    """
    device = hardware.use_device(options.device, options.threads)
    name = options.recipe or dataset.record.recipe
    recipe = recipes.load(name, settings=options.settings, epochs=options.epochs, rho=dataset.record.rho)
    check_fits(
        recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics, settings=options.settings
    )
    if any("teacher" in term.functions for term in compile_stage(recipe.stage1)):
        raise UsageError(
            f"{name} learns from a teacher, and bench takes no --teacher",
            fix="give a recipe without a teacher, such as --recipe cifar100-lt/cpmix",
        )
    precision = hardware.resolve_precision(recipe.model.precision, device)
    phases = [phase for phase in PHASES if getattr(recipe, phase) is not None]
    return name, PhaseContext(recipe, dataset, device, precision, {}), phases


def random_images(count: int, shape: Sequence[int]) -> Tensor:
    """Return images of random pixels, the same at each call: [count, *shape] uint8."""
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_data(context: PhaseContext, labels: Tensor) -> TrainingData:
    """Return resident training data: N random_images() with the labels [N] int64."""
    dataset, device = context.dataset, context.device
    images = random_images(len(labels), dataset.shape).to(device)
    batches = make_batches(images, context.recipe.data, dataset.record)
    return TrainingData(batches, labels.to(device), torch.tensor(dataset.class_counts, device=device))


def measure(
    loops: Mapping[str, Callable[[], TimedLoop]], rounds: int, seconds: float, memory: "Memory"
) -> dict[str, Timing]:
    """Build and warm up loops, then time them in turn.

    Args:
        loops: name -> function that builds a loop.
        rounds: rounds; in each, every loop runs once.
        seconds: length of a loop's turn in seconds; it takes at least three steps.
        memory: measures the peak memory of each loop.

    Returns:
        The timing of each loop by name.
    """
    timings = {}
    expected = 0.0
    for name, build in loops.items():
        memory.restart()
        loop = build()
        loop.warm_up()
        taken = loop.timed(_MIN_STEPS)[0] / _MIN_STEPS
        timings[name] = Timing(loop, memory.peak(), max(_MIN_STEPS, math.ceil(seconds / taken)))
        expected += rounds * timings[name].num_steps * taken
    console.note(f"bench: {counted(rounds, 'round')}, {console.duration(expected)} and more")
    for number in range(rounds):
        for timing in reversed(timings.values()) if number % 2 else timings.values():  # alternate the order
            timing.turn()
    return timings


class Memory:
    """Peak memory since restart(), above the memory then: reserved on CUDA, else resident in this process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._before: int | None = None

    def restart(self) -> None:
        """Release the allocator's cached memory, and reset the peak."""
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_reserved()
            return
        self._before = None  # if the system cannot reset the peak, it is unknown
        with suppress(OSError, AttributeError):  # the C library is not glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _of_this_process("VmRSS")

    def peak(self) -> int | None:
        """Return the peak in bytes, or None if the system cannot measure it."""
        if self._before is None:
            return None
        return (torch.cuda.max_memory_reserved() if self._cuda else _of_this_process("VmHWM")) - self._before


def _of_this_process(name: str) -> int:
    """Return a memory value of /proc/self/status in bytes, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def start_up_seconds() -> float:
    """Return the median duration of five `cpmix --help` processes in seconds."""
    command = [sys.executable, "-m", "cpmix_cli", "--help"]
    return _median_seconds(
        lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), 5, torch.device("cpu")
    )


def _median_seconds(function: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the median duration of a call in seconds, until the device is done."""
    taken = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def pair_costs(num_classes: int, batch_size: int, device: torch.device) -> dict[str, float]:
    """Time the counting of a batch's errors, and the drawing of one confused partner per image.

    Args:
        num_classes: C; K [C, C] has at most 50 nonzero cells per row.
        batch_size: B.
        device: device of K.

    Returns:
        num_classes, and count_seconds and draw_seconds per batch.
    """
    generator = torch.Generator().manual_seed(0)

    def classes(*shape: int) -> Tensor:
        return torch.randint(0, num_classes, shape, generator=generator).to(device)

    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
    counts.scatter_(1, classes(num_classes, 50), 1.0)
    labels, predictions = classes(batch_size), classes(batch_size)
    uniforms = torch.rand(batch_size, dtype=torch.float64, generator=generator).to(device)
    counted = torch.ones((), dtype=torch.bool, device=device)

    def count() -> None:
        count_confusions(counts, prediction_codes(labels, predictions, counted, num_classes))

    return {
        "num_classes": num_classes,
        "count_seconds": _median_seconds(count, 10, device),
        "draw_seconds": _median_seconds(lambda: draw_confused(counts, labels, uniforms), 10, device),
    }


def not_projected(plans: Iterable[Plan]) -> list[str]:
    """Return the parts of training that `bench` does not time although the plans need them."""
    matches = any(term.recipe.match is not None for plan in plans for term in plan.terms)
    return ["the matching of partners"] if matches else []
