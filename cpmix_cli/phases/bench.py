"""bench: how fast this machine trains, beside the loop of the released long-tail code and the network alone.

The contenders take turns, round after round, so that a drift of the machine's speed meets all of them; what is printed
are medians over the rounds, ratios too. Nothing is written.
"""

import ctypes
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpmix_cli import console, hardware
from cpmix_cli import recipe as recipes
from cpmix_cli.confusion import confusion_codes, count_confusions, draw_confused
from cpmix_cli.contenders import Contender, InputAlone, NetworkAlone, PilImages, ReferenceLoop, TrainingLoop
from cpmix_cli.data.batches import make_batches, open_batches
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.engine import synchronize
from cpmix_cli.errors import InputError, UsageError
from cpmix_cli.models import MODELS, build_model
from cpmix_cli.plans import Setting, prepared
from cpmix_cli.randomness import torch_generator
from cpmix_cli.recipe import Recipe
from cpmix_cli.runs import PHASES
from cpmix_cli.step import Plan, TrainingData
from cpmix_cli.terms import check_fits, compile_stage

PAIR_CLASSES = (100, 1000, 8142)  # CIFAR-100, ImageNet-LT, iNaturalist 2018
MIN_STEPS = 3  # of a contender in a round
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    recipe: str | None
    settings: list[str]
    epochs: int | None
    data: Path | None
    data_root: Path | None
    device: str
    rounds: int
    seconds: float


@dataclass
class Timing:
    """What a contender reached."""

    contender: Contender
    peak_bytes: int | None
    """Memory that building and warming it up took, without the resident images and without loader processes."""
    num_steps: int
    """In a round."""
    images_per_second: list[float] = field(default_factory=list)
    """Round by round."""

    @property
    def median(self) -> float:
        """Images a second."""
        return statistics.median(self.images_per_second)

    def ratio_to(self, other: "Timing") -> float:
        """Median over the rounds of this contender's speed over the other's in the same round."""
        pairs = zip(self.images_per_second, other.images_per_second, strict=True)
        return statistics.median(mine / others for mine, others in pairs)


def run(options: Options) -> None:
    """Measure and print.

    Raises:
        EnvironmentFault: the device is not there.
        InputError: the data set is damaged, or holds points.
        UsageError: faults of the recipe.
    """
    device = hardware.use_device(options.device)
    memory = Memory(device)
    dataset = training_set(options.data, options.data_root)
    name = options.recipe or dataset.record["recipe"]
    recipe = recipe_for(dataset, name, options)
    precision = hardware.resolve_precision(recipe.model.precision, device)
    best = hardware.resolve_precision("auto", device)
    setting = Setting(recipe, dataset, device, precision, {})
    images: Tensor | None
    if options.data is None:
        images, labels = random_images(dataset)
        batches = make_batches(images.to(device), recipe.data, dataset.record["mean"], dataset.record["std"])
    else:
        batches, labels = open_batches(dataset, "train", recipe.data, device)
        images = dataset.read("train")[0] if dataset.storage == "tensors" else None
    data = TrainingData(batches, labels.to(device), torch.tensor(dataset.class_counts, device=device))
    phases = [phase for phase in PHASES if getattr(recipe, phase) is not None]
    workers = torch.get_num_threads()

    def reference() -> Contender:
        generator = torch_generator(recipe.seed, "weights")
        model = build_model(recipe.model, dataset.num_classes, recipe.data.input_shape(dataset.shape), generator)
        pixels = dataset.paths("train") if images is None else images
        pictures = PilImages(pixels, dataset.shape, labels, recipe.data)
        return ReferenceLoop(pictures, model.to(device), recipe.optimizer.batch_size, workers)

    def alone(phase: str, precision: str) -> Contender:
        return NetworkAlone(data, *prepared(replace(setting, precision=precision), phase))

    def training(phase: str) -> Contender:
        return TrainingLoop(data, *prepared(setting, phase))

    def other_network(**changes: Any) -> Contender:
        model = recipe.model.model_copy(update=changes)
        changed = replace(setting, recipe=recipe.model_copy(update={"model": model}))
        return NetworkAlone(data, *prepared(changed, "stage1"))

    # Each phase stands beside the network it is compared with.
    contenders: dict[str, Callable[[], Contender]] = {"reference": reference}
    if not batches.resident:
        contenders["input"] = partial(InputAlone, data, recipe.optimizer.batch_size)
    if recipe.model.experts > 1:
        contenders["plain"] = partial(other_network, experts=1)  # at its full width, whatever the experts'
        other = "loop" if recipe.model.expert_layout == "fused" else "fused"
        with suppress(ValueError), torch.device("meta"):  # a network without that layout
            changed = recipe.model.model_copy(update={"expert_layout": other})
            MODELS[recipe.model.name](dataset.num_classes, recipe.data.input_shape(dataset.shape), changed)
            contenders[f"experts {other}"] = partial(other_network, expert_layout=other)
    for phase in phases:
        for chosen in sorted({precision, "fp32", best} if phase == "stage1" else {precision}):
            contenders[f"network {phase} {chosen}"] = partial(alone, phase, chosen)
        contenders[phase] = partial(training, phase)

    console.note(
        f"bench: {name} on {dataset.name}, {len(labels):,} images of {'x'.join(map(str, dataset.shape))}; "
        f"{hardware.device_name(device)}, {workers} threads"
    )
    timings = measure(contenders, options.rounds, options.seconds, memory)
    start_up = start_up_seconds()
    costs = [pair_costs(num_classes, recipe.optimizer.batch_size, device) for num_classes in PAIR_CLASSES]

    network = {phase: timings[f"network {phase} {precision}"] for phase in phases}
    plans = {phase: prepared(setting, phase)[0] for phase in phases}
    epochs = {phase: plan.last_epoch - plan.first_epoch + 1 for phase, plan in plans.items()}
    projected = {p: epochs[p] * len(plans[p].terms) * len(labels) / timings[p].median for p in phases}
    hours = sum(projected.values()) / 3600
    fields: dict[str, Any] = {
        "command": "bench",
        "recipe": name,
        "data": dataset.name,
        "num_images": len(labels),
        "images_per_step": {p: min(plan.batch_size, len(labels)) * len(plan.terms) for p, plan in plans.items()},
        "rounds": options.rounds,
        "device": hardware.device_name(device),
        "threads": workers,
        "torch": torch.__version__,
        "precision": precision,
        "best_precision": best,
        "reference_images_per_second": timings["reference"].median,
        "input_images_per_second": timings["input"].median if "input" in timings else None,
        "network_fp32_images_per_second": timings["network stage1 fp32"].median,
        "network_best_images_per_second": timings[f"network stage1 {best}"].median,
        **{f"{p}_images_per_second": timings[p].median if p in phases else None for p in PHASES},
        **{f"network_{p}_images_per_second": network[p].median if p in phases else None for p in PHASES},
        "ratio_to_reference": {p: timings[p].ratio_to(timings["reference"]) for p in phases},
        "ratio_to_network": {p: timings[p].ratio_to(network[p]) for p in phases},
        "ratio_to_plain_network": {
            layout: timing.ratio_to(timings["plain"])
            for layout, timing in (
                (recipe.model.expert_layout, network["stage1"]),
                *((name.split()[1], timing) for name, timing in timings.items() if name.startswith("experts ")),
            )
            if "plain" in timings
        },
        "peak_memory_bytes": {name.replace(" ", "_"): t.peak_bytes for name, t in timings.items()},
        "images_per_second_by_round": {name.replace(" ", "_"): t.images_per_second for name, t in timings.items()},
        "projected_seconds": projected | {"total": sum(projected.values())},
        "not_projected": not_projected(recipe, plans.values()),
        "gpu_hours": hours if device.type == "cuda" else 0.0,
        "start_up_seconds": start_up,
        "pairs": costs,
    }
    report(fields, phases, timings, network, epochs)


def recipe_for(dataset: Dataset, name: str, options: Options) -> Recipe:
    """The recipe of that name as the flags change it.

    Raises:
        UsageError: its faults, or it does not fit the data set, or wants a teacher.
    """
    recipe = recipes.load(name, settings=options.settings, epochs=options.epochs, rho=dataset.record["rho"])
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    if any(term.taught for term in compile_stage(recipe.stage1)):
        raise UsageError(f"{name} learns from a teacher, which bench has not", needed_by="bench")
    return recipe


def not_projected(recipe: Recipe, plans: Iterable[Plan]) -> list[str]:
    """What a recipe also takes time for, and nothing here times."""
    extra = {
        "the matching of partners": any(term.matched for plan in plans for term in plan.terms),
        "the predictions on another split after each epoch": recipe.confusion.source != "train",
    }
    return [what for what, there in extra.items() if there]


def training_set(folder: Path | None, data_root: Path | None) -> Dataset:
    """The data set of a folder; without one that of random_images().

    Raises:
        InputError: no data set there, damaged, or points.
        UsageError: --data-root without --data.
    """
    if folder is not None:
        dataset = open_dataset(folder, needed_by="bench", data_root=data_root)
        if len(dataset.shape) != 3:
            raise InputError(f"{folder} holds points; the loop to compare with takes images", needed_by="bench")
        return dataset
    if data_root is not None:
        raise UsageError("--data-root is of a data set: give --data too", needed_by="bench")
    counts = exponential_counts(500, 100, 200)
    record = {"name": "random images", "recipe": "cifar100-lt/cpmix", "rho": 200.0, "shape": (32, 32, 3)}
    record |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    return Dataset(Path(), record, [str(c) for c in range(len(counts))], counts)


def random_images(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Random pixels, as many as CIFAR-100-LT has at rho 200, and labels."""
    counts = dataset.class_counts
    generator = torch.Generator().manual_seed(0)
    shape = (int(counts.sum()), *dataset.shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def measure(
    contenders: Mapping[str, Callable[[], Contender]], rounds: int, seconds: float, memory: "Memory"
) -> dict[str, Timing]:
    """Time contenders in turn, each for so many seconds a round."""
    timings = {}
    expected = 0.0
    for name, build in contenders.items():
        memory.restart()
        contender = build()
        contender.warm_up()
        taken = contender.timed(MIN_STEPS)[0] / MIN_STEPS
        timings[name] = Timing(contender, memory.peak(), max(MIN_STEPS, math.ceil(seconds / taken)))
        expected += rounds * timings[name].num_steps * taken
    console.note(f"bench: {rounds} round{'s' if rounds > 1 else ''}, {console.duration(expected)} and more")
    for number in range(rounds):
        for timing in reversed(timings.values()) if number % 2 else timings.values():  # who comes first alternates
            taken, images = timing.contender.timed(timing.num_steps)
            timing.images_per_second.append(images / taken)
    return timings


class Memory:
    """Peak memory above what there was at restart(): reserved on the device on CUDA, else resident in this process.

    Args:
        device: whose.
    """

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
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._read("VmRSS")
        except OSError:
            self._before = None  # the peak so far stays

    def peak(self) -> int | None:
        """Bytes; None where the system does not say."""
        found = torch.cuda.max_memory_reserved() if self._cuda else self._read("VmHWM")
        return None if found is None or self._before is None else found - self._before

    def _read(self, name: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


def start_up_seconds() -> float:
    """Median of five runs of `cpmix --help`, as a process."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cpmix_cli", "--help"], stdout=subprocess.DEVNULL, check=True)
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

    def median_of(function: Callable[[], object]) -> float:
        taken = []
        for _ in range(10):
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def count() -> None:
        count_confusions(counts, confusion_codes(labels, predictions, counted, num_classes))

    return {
        "num_classes": num_classes,
        "count_seconds": median_of(count),
        "draw_seconds": median_of(lambda: draw_confused(counts, labels, uniforms)),
    }


def report(
    fields: dict[str, Any],
    phases: list[str],
    timings: Mapping[str, Timing],
    network: Mapping[str, Timing],
    epochs: Mapping[str, int],
) -> None:
    """Table and lines, or the JSON object."""
    reference = timings["reference"]

    def row(title: str, timing: Timing, alone: Timing | None = None) -> list[str]:
        spread = f"{min(timing.images_per_second):,.0f} .. {max(timing.images_per_second):,.0f}"
        to_network = "" if alone is None else f"{timing.ratio_to(alone):.3f}"
        memory = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / MIB:,.0f}"
        return [title, f"{timing.median:,.0f}", spread, f"{timing.ratio_to(reference):.2f}", to_network, memory]

    rows = [row(f"released code: PIL, {fields['threads']} workers, fp32", reference)]
    if "input" in timings:
        rows.append(row("read from disk and augmented, no network", timings["input"]))
    networks = [name.split() for name in timings if name.startswith("network")]
    for _, phase, precision in sorted(networks, key=lambda n: (PHASES.index(n[1]), n[2] != "fp32")):
        forward = f"{fields['images_per_step'][phase]} images" + (", head" if phase == "finetune" else "")
        rows.append(row(f"network alone, {precision}, {forward}", timings[f"network {phase} {precision}"]))
    for name, timing in timings.items():
        if name == "plain" or name.startswith("experts "):
            rows.append(row(f"network alone, {name}, {fields['precision']}", timing))
    for phase in phases:
        title = f"cpmix {phase}, {fields['precision']}, {fields['images_per_step'][phase]} images"
        rows.append(row(title, timings[phase], network[phase]))
    header = ("loop", ">images/s", ">lowest .. highest", ">to released code", ">to network", ">peak MiB")
    projected = fields["projected_seconds"]
    parts = [f"{phase} {console.duration(projected[phase])} ({epochs[phase]} epochs)" for phase in phases]
    hours = f", {fields['gpu_hours']:.3f} GPU-hours" if fields["gpu_hours"] else ""
    without = f" (without {', '.join(fields['not_projected'])})" if fields["not_projected"] else ""
    ratios = [f"{layout} {ratio:.2f}" for layout, ratio in fields["ratio_to_plain_network"].items()]
    lines = [
        "",
        *([f"experts to the plain network of full width, each alone, images/s: {', '.join(ratios)}"] if ratios else []),
        f"projected for {fields['recipe']}: {', '.join(parts)}; together {console.duration(projected['total'])}{hours}"
        f"{without}",
        f"start-up: cpmix --help takes {fields['start_up_seconds']:.2f} s",
    ]
    for cost in fields["pairs"]:
        lines.append(
            f"pairs at {cost['num_classes']:,} classes: {1000 * cost['count_seconds']:.2f} ms to count a batch, "
            f"{1000 * cost['draw_seconds']:.2f} ms to draw one"
        )
    console.result(fields, header=header, rows=rows, lines=lines)
