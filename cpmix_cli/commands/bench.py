"""bench: training speed of this machine, next to the reference loop and the network only.

The loops take turns in each round, so that a drift of the machine's speed affects all of them. All results are medians
over the rounds, including ratios. Nothing is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpmix_cli.artifacts.files import PHASES
from cpmix_cli.bench import ingredients, projection
from cpmix_cli.bench.loops import InputAlone, NetworkAlone, PilImages, ReferenceLoop, TimedLoop, TrainingLoop
from cpmix_cli.bench.measure import (
    MIB,
    PAIR_CLASSES,
    Memory,
    Timing,
    measure,
    not_projected,
    pair_costs,
    prepare,
    random_data,
    random_images,
    start_up_seconds,
    training_set,
)
from cpmix_cli.data.batches import open_batches
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.flags import BenchOptions
from cpmix_cli.models import build_model
from cpmix_cli.recipe.loading import of_dataset
from cpmix_cli.runtime import console, hardware
from cpmix_cli.runtime.errors import UsageError, counted
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.plan import make_plan, rehearsal
from cpmix_cli.training.randomness import torch_generator


def run(options: BenchOptions) -> None:
    """Measure and print the speed of each loop; or the cost of ingredients; or project the training time.

    Raises:
        EnvironmentFault: the device is missing.
        InputError: the data set is damaged, or contains points.
        UsageError: the recipe is wrong, or both --ingredients and --world-size are given.
    """
    if options.recipe is not None and "/" not in options.recipe:
        own = "cifar100-lt/cpmix" if options.data is None else open_dataset(options.data).record.recipe
        options = replace(options, recipe=of_dataset(options.recipe, own))
    if options.ingredients and options.world_sizes:
        raise UsageError("--ingredients and --world-size are two different reports", fix="give one of them")
    if options.ingredients:
        ingredients.run(options)
        return
    if options.world_sizes:
        projection.run(options)
        return
    dataset = training_set(options.data, options.data_root)
    name, context, phases = prepare(options, dataset)
    recipe, device, precision = context.recipe, context.device, context.precision
    memory, best = Memory(device), hardware.resolve_precision("auto", device)
    images: Tensor | None
    if options.data is None:
        labels = torch.arange(dataset.num_classes).repeat_interleave(torch.tensor(dataset.class_counts))
        images, data = random_images(len(labels), dataset.shape), random_data(context, labels)
    else:
        batches, labels = open_batches(dataset, "train", recipe.data, device)
        images = dataset.read("train")[0] if dataset.storage == "tensors" else None
        data = TrainingData(batches, labels.to(device), torch.tensor(dataset.class_counts, device=device))
    workers = torch.get_num_threads()

    def reference() -> TimedLoop:
        generator = torch_generator(recipe.seed, "weights")
        model = build_model(recipe.model, dataset.num_classes, recipe.data.input_shape(dataset.shape), generator)
        pixels = dataset.paths("train") if images is None else images
        pictures = PilImages(pixels, dataset.shape, labels, recipe.data)
        return ReferenceLoop(pictures, model.to(device), recipe.optimizer.batch_size, workers)

    def alone(phase: str, precision: str) -> TimedLoop:
        return NetworkAlone(data, *rehearsal(replace(context, precision=precision), phase))

    def training(phase: str) -> TimedLoop:
        return TrainingLoop(data, *rehearsal(context, phase))

    def plain() -> TimedLoop:
        model = recipe.model.model_copy(update={"experts": 1})  # of full width, whatever model.expert_width
        changed = replace(context, recipe=recipe.model_copy(update={"model": model}))
        return NetworkAlone(data, *rehearsal(changed, "stage1"))

    # Each phase is timed next to the network that it is compared with.
    loops: dict[str, Callable[[], TimedLoop]] = {"reference": reference}
    if not data.batches.resident:
        size = min(recipe.optimizer.batch_size, len(labels))
        loops["input"] = partial(InputAlone, data.batches, device, len(labels), size)
    if recipe.model.experts > 1:
        loops["plain"] = plain
    for phase in phases:
        for chosen in sorted({precision, "fp32", best} if phase == "stage1" else {precision}):
            loops[f"network {phase} {chosen}"] = partial(alone, phase, chosen)
        loops[phase] = partial(training, phase)

    console.note(
        f"bench: {name} on {dataset.name}, {len(labels):,} images of {'x'.join(map(str, dataset.shape))}; "
        f"{hardware.device_name(device)}, {counted(workers, 'thread')}"
    )
    timings = measure(loops, options.rounds, options.seconds, memory)
    start_up = start_up_seconds()
    costs = [pair_costs(num_classes, recipe.optimizer.batch_size, device) for num_classes in PAIR_CLASSES]

    network = {phase: timings[f"network {phase} {precision}"] for phase in phases}
    plans = {phase: make_plan(context, phase) for phase in phases}
    epochs = {phase: plan.last_epoch - plan.first_epoch + 1 for phase, plan in plans.items()}
    projected = {p: epochs[p] * plans[p].num_passes * len(labels) / timings[p].median for p in phases}
    hours = sum(projected.values()) / 3600
    fields: dict[str, Any] = {
        "recipe": name,
        "data": dataset.name,
        "num_images": len(labels),
        "images_per_step": {p: min(plan.batch_size, len(labels)) * plan.num_passes for p, plan in plans.items()},
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
        "ratio_to_plain_network": {"loop": network["stage1"].ratio_to(timings["plain"])} if "plain" in timings else {},
        "peak_memory_bytes": {name.replace(" ", "_"): t.peak_bytes for name, t in timings.items()},
        "images_per_second_by_round": {name.replace(" ", "_"): t.images_per_second for name, t in timings.items()},
        "projected_seconds": projected | {"total": sum(projected.values())},
        "not_projected": not_projected(plans.values()),
        "gpu_hours": hours if device.type == "cuda" else 0.0,
        "start_up_seconds": start_up,
        "pairs": costs,
    }
    _report(fields, timings, epochs)


def _report(fields: dict[str, Any], timings: Mapping[str, Timing], epochs: Mapping[str, int]) -> None:
    """Print the table and lines, or the JSON object."""
    reference, own = timings["reference"], fields["precision"]

    def row(title: str, timing: Timing, alone: Timing | None = None) -> list[str]:
        spread = f"{min(timing.images_per_second):,.0f} .. {max(timing.images_per_second):,.0f}"
        to_network = "" if alone is None else f"{timing.ratio_to(alone):.3f}"
        memory = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / MIB:,.0f}"
        return [title, f"{timing.median:,.0f}", spread, f"{timing.ratio_to(reference):.2f}", to_network, memory]

    rows = [row(f"reference loop: PIL, {counted(fields['threads'], 'worker')}, fp32", reference)]
    if "input" in timings:
        rows.append(row("read from disk and augmented, no network", timings["input"]))
    networks = [name.split() for name in timings if name.startswith("network")]
    for _, phase, precision in sorted(networks, key=lambda n: (PHASES.index(n[1]), n[2] != "fp32")):
        forward = f"{fields['images_per_step'][phase]} images" + (", head" if phase == "finetune" else "")
        rows.append(row(f"network only, {precision}, {forward}", timings[f"network {phase} {precision}"]))
    if "plain" in timings:
        rows.append(row(f"network only, plain, {own}", timings["plain"]))
    for phase, count in fields["images_per_step"].items():
        rows.append(row(f"cpmix {phase}, {own}, {count} images", timings[phase], timings[f"network {phase} {own}"]))
    header = ("loop", ">images/s", ">lowest .. highest", ">to reference", ">to network", ">peak MiB")
    projected = fields["projected_seconds"]
    parts = [
        f"{phase} {console.duration(projected[phase])} ({counted(count, 'epoch')})" for phase, count in epochs.items()
    ]
    hours = f", {fields['gpu_hours']:.3f} GPU-hours" if fields["gpu_hours"] else ""
    without = f" (without {', '.join(fields['not_projected'])})" if fields["not_projected"] else ""
    ratios = fields["ratio_to_plain_network"].items()
    lines = [
        "",
        *(f"experts to the plain network of full width, each alone, images/s: {how} {x:.2f}" for how, x in ratios),
        f"projected for {fields['recipe']}: {', '.join(parts)}; together {console.duration(projected['total'])}{hours}"
        f"{without}",
        f"start-up: cpmix --help takes {fields['start_up_seconds']:.2f} s",
    ]
    for cost in fields["pairs"]:
        lines.append(
            f"pairs at {cost['num_classes']:,} classes: {1000 * cost['count_seconds']:.2f} ms to count a batch, "
            f"{1000 * cost['draw_seconds']:.2f} ms to draw one"
        )
    console.result(fields, header=header, rows=rows, lines=console.prose(lines))
