"""bench --world-size: training time projected to other numbers of ranks.

The code keeps Measurements, Assumptions and the projection apart; project() only calculates. Files are written only to
a temporary folder: packed images and image files.

A step takes as long as its slowest resource: the device (augmentation, network, confused pairs), the cores that read
images, or the links between ranks.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cpmix_cli.bench import measure
from cpmix_cli.bench.loops import InputAlone, NetworkAlone, TimedLoop
from cpmix_cli.data.batches import Batches, make_batches
from cpmix_cli.data.dataset import Dataset, unwritten_dataset
from cpmix_cli.data.decoding import sizes_and_times
from cpmix_cli.data.shards import Shards, shard_name
from cpmix_cli.data.sources import OFFICIAL_LISTS
from cpmix_cli.data.stream import FileReader, ImageReader
from cpmix_cli.flags import BenchOptions
from cpmix_cli.mixing import BATCH_PARTNERS, CLASS_PARTNERS
from cpmix_cli.recipe.loading import find_recipe
from cpmix_cli.runtime import console, hardware
from cpmix_cli.runtime.errors import UsageError, counted
from cpmix_cli.training.batch_slices import BatchSlice
from cpmix_cli.training.cuda_graphs import EAGER_STEPS
from cpmix_cli.training.plan import PhaseContext, Plan, rehearsal

_PACKED_SIDE = 256  # pixels, for a data set without packed images: the test resolution of the published sets
_GENERATED = (500, 375)  # width and height of generated image files: the most frequent size in ImageNet
_NUM_GENERATED = 16
_NUM_READ = 256  # images that are read or augmented in turn; few enough for the page cache
_FIRST_IMAGES = 8  # images in the first timed forward pass of a network
_STEP_SECONDS = 1.0  # limit of a timed step: if a rank's batch takes longer, a smaller batch is timed
_MAX_SECONDS = 3.0  # limit of all turns of one measurement; at least one turn is timed
_MB, _GB = 1e6, 1e9
_PLACES = {"resident": "on the device", "shards": "in shards", "files": "in their files"}


@dataclass(frozen=True)
class StorageSpeed:
    """Speed of one way to store training images: on the device, in shards or in their files."""

    read: float | None
    """Images per second that one core reads; None for images on the device."""
    image_bytes: float
    """Bytes read from disk per image."""
    augment: Mapping[int, float]
    """Images in one call -> images per second that the device augments."""


@dataclass(frozen=True)
class Measurements:
    """Values measured on this machine."""

    kept: Mapping[str, StorageSpeed]
    """Way to store images ("resident", "shards", "files") -> its speed."""
    network: Mapping[str, Mapping[int, float]]
    """Phase -> images of a term per step -> images per second, for forward, backward and optimizer."""
    gradient_bytes: Mapping[str, int]
    """Phase -> bytes of the gradients of its trained parameters."""
    buffer_bytes: int
    """Bytes of the network's running statistics, which the first rank sends to the others."""
    count_seconds: float
    """Seconds to count the errors of a batch."""
    draw_seconds: float
    """Seconds to draw confused partners for a batch."""


@dataclass(frozen=True)
class Assumptions:
    """Assumed values, which cannot be measured on this machine."""

    cores: int
    """Cores per rank that read images."""
    link: float
    """GB per second in each direction, on the slowest link of the ring of all ranks."""
    ranks_per_machine: int = 8


def _images_made(plan: Plan, *, sliced: bool) -> int:
    """Return the images read and augmented per image of the batch."""
    terms = [term.recipe for term in plan.terms]
    # With several slices, a partner in the batch may be in another rank's slice: it is read again.
    anew = {*CLASS_PARTNERS, *(BATCH_PARTNERS if sliced else ())}
    natural = sum(term.draw == "natural" for term in terms)
    return min(natural, 1) + len(terms) - natural + sum(term.partner in anew for term in terms)


def _share(
    measured: Measurements, assumed: Assumptions, plan: Plan, kept: str, world_size: int, size: int
) -> dict[str, Any]:
    """Return one rank's images, seconds and bytes in a step over a batch of `size` images, padding included."""
    images, passes = measured.kept[kept], plan.num_passes
    part = BatchSlice(0, world_size * plan.micro_batches, size)
    num_images = part.length * plan.micro_batches
    made = num_images * _images_made(plan, sliced=not part.is_whole)
    counts = plan.counts_errors(plan.last_epoch)
    pairs = measured.count_seconds * counts
    pairs += measured.draw_seconds * sum(term.recipe.partner == "confusion" for term in plan.terms)
    device = made / _speed_at(images.augment, part.length)
    device += num_images * passes / _speed_at(measured.network[plan.phase], part.length) + pairs
    sums = 8 * (len(plan.terms) + 3)  # losses, objective, correct predictions, and the check that no rank has ended
    # A ring all-reduce of n bytes sends 2 (W - 1) / W n from each of W ranks.
    sent = 2 * (world_size - 1) / world_size * (measured.gradient_bytes[plan.phase] + sums)
    if world_size > 1:
        sent += measured.buffer_bytes + (world_size - 1) * 8 * counts * num_images
    one_core = 0.0 if images.read is None else made / images.read
    seconds = {"device": device, "input": one_core / assumed.cores, "link": sent / (assumed.link * _GB)}
    longest = max(seconds.values())
    return {
        "images_per_rank_and_step": num_images,
        "passes_per_rank_and_step": num_images * passes,
        "read_per_rank_and_step": made if images.read is not None else 0,
        **{f"{resource}_seconds": taken for resource, taken in seconds.items()},
        "step_seconds": longest,
        "limit": max(seconds, key=lambda resource: seconds[resource]),
        "cores_wanted": math.ceil(one_core / max(seconds["device"], seconds["link"])),
        "pairs_share": pairs / longest,
        "network_bytes_per_rank_and_step": round(sent),
    }


def _speed_at(speeds: Mapping[int, float], at_once: int) -> float:
    """Return the speed at the nearest measured number of images."""
    return speeds[min(speeds, key=lambda size: abs(size - at_once))]


def project(
    measured: Measurements, assumed: Assumptions, plans: Iterable[Plan], num_images: int, kept: str, world_size: int
) -> dict[str, Any]:
    """Project the training time, the traffic and the slowest resource of each phase.

    Args:
        measured: values measured on this machine.
        assumed: cores and links of the other machines.
        plans: plans of the phases.
        num_images: training images per epoch.
        kept: way to store images, a key of measured.kept.
        world_size: number of ranks W.

    Returns:
        Seconds of all phases, rank-hours, and the fields of each phase: seconds and bytes per rank and step, and bytes
        read per epoch.
    """
    image_bytes = measured.kept[kept].image_bytes
    on_a_machine = min(world_size, assumed.ranks_per_machine)
    phases: dict[str, dict[str, Any]] = {}
    for plan in plans:
        steps, epochs = plan.num_steps(num_images), plan.last_epoch - plan.first_epoch + 1
        full, last = (
            _share(measured, assumed, plan, kept, world_size, plan.size(step, num_images)) for step in (0, steps - 1)
        )
        read, seconds = ((steps - 1) * full[key] + last[key] for key in ("read_per_rank_and_step", "step_seconds"))
        at_once = on_a_machine * full["read_per_rank_and_step"] * image_bytes
        phases[plan.phase] = full | {
            "steps_per_epoch": steps,
            "epochs": epochs,
            "disk_bytes_per_epoch": round(world_size * read * image_bytes),
            "disk_bytes_per_second_and_machine": at_once / full["step_seconds"],
            "seconds": epochs * seconds,
        }
    total = sum(phase["seconds"] for phase in phases.values())
    return {"seconds": total, "rank_hours": world_size * total / 3600, "phases": phases}


def run(options: BenchOptions) -> None:
    """Measure, project to options.world_sizes and print.

    Raises:
        EnvironmentFault: the device is missing.
        InputError: the data set is damaged, or has points instead of images.
        UsageError: the flags or the recipe have errors.
    """
    sizes = options.world_sizes
    dataset, num_images, source = _training_set(options)
    name, context, phases = measure.prepare(options, dataset)
    recipe, device = context.recipe, context.device
    batches = [recipe.optimizer.batch_size, *([recipe.finetune.batch_size] if recipe.finetune else [])]
    if sizes[-1] > (most := min(num_images, *batches)):
        raise UsageError(
            f"--world-size {sizes[-1]}: a batch of {name} has {most} images, not one for each rank",
            fix="give fewer ranks, or a larger optimizer.batch_size and finetune.batch_size",
        )
    assumed = Assumptions(options.cores or 8, options.link or 12.5)  # 12.5 GB/s are 100 Gbit/s
    console.note(
        f"bench: {name}, {num_images:,} images in {dataset.num_classes:,} classes ({source}); "
        f"{hardware.device_name(device)}, {counted(torch.get_num_threads(), 'thread')}"
    )
    plans, network, gradients, buffers = [], {}, {}, 0
    all_at_once: set[int] = set()
    for phase in phases:
        plan, state = rehearsal(context, phase)
        plans.append(plan)
        gradients[phase] = _num_bytes(p for p in state.model.parameters() if p.requires_grad)
        buffers = _num_bytes(state.model.buffers())
        # Images of a term per slice, for each number of ranks.
        size = plan.size(0, num_images)
        at_once = {BatchSlice(0, ranks * plan.micro_batches, size).length for ranks in sizes}
        all_at_once |= at_once

        def one(size: int, plan: Plan = plan, state: Any = state) -> TimedLoop:
            data = measure.random_data(context, torch.arange(size) % dataset.num_classes)
            return NetworkAlone(data, replace(plan, batch_size=size), state, record=False)

        console.note(f"bench: the network of {phase}")
        network[phase] = _speeds(one, at_once, options, plan.num_passes)
    console.note("bench: images")
    kept, facts = _images(context, all_at_once, options)
    if "shards" in kept:
        resident = num_images * kept["shards"].image_bytes
        # Each rank has its own GPU memory, but the ranks of a machine share its main memory.
        if hardware.fits(round(resident * (1 if device.type == "cuda" else assumed.ranks_per_machine)), device):
            kept = {"resident": StorageSpeed(None, 0.0, kept["shards"].augment), **kept}
    costs = measure.pair_costs(dataset.num_classes, recipe.optimizer.batch_size, device)
    measured = Measurements(kept, network, gradients, buffers, costs["count_seconds"], costs["draw_seconds"])
    projected = [
        {"world_size": size, "images": {how: project(measured, assumed, plans, num_images, how, size) for how in kept}}
        for size in sizes
    ]
    said = [
        "every rank has the device that was measured here, and none is slower than the others",
        "reading and all-reduce cost nothing while the device computes; all-reduce overlaps the backward pass",
        "reading grows with the cores" + (", which are others than those that train" if device.type == "cpu" else ""),
        "the disk gives what is asked of it, and nothing stays in the page cache",
        "a batch of a size that was not measured has the speed of the nearest one that was",
    ]
    left_out = [*measure.not_projected(plans), "evaluations", "checkpoints", "start-up"]
    if recipe.model.sync_batchnorm:
        left_out.insert(0, "SyncBatchNorm's own messages")
    fields = {
        "recipe": name,
        "data": dataset.name,
        "num_images": num_images,
        "num_classes": dataset.num_classes,
        "counts_from": source,
        "device": hardware.device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": context.precision,
        "measured": {**asdict(measured), **facts, "confusion_bytes": 8 * dataset.num_classes**2},
        "assumed": {**asdict(assumed), "said": said},
        "projected": projected,
        "runs_out_first": {how: _first_limit(how, projected) for how in kept},
        "not_projected": left_out,
    }
    _report(fields, {plan.phase: len(plan.terms) for plan in plans})


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _training_set(options: BenchOptions) -> tuple[Dataset, int, str]:
    """Return the data set, its number of training images, and the source of that number.

    Without --data that is the recipe's published set, else random images.
    """
    family = find_recipe(options.recipe).resolve().parent.name if options.recipe is not None else ""
    if options.data is not None or options.data_root is not None or family not in OFFICIAL_LISTS:
        dataset = measure.training_set(options.data, options.data_root)
        return dataset, int(dataset.class_counts.sum()), "--data" if options.data else "made up"
    published = OFFICIAL_LISTS[family]
    num_images = published.num_images["train"]
    counts = np.full(published.num_classes, num_images // published.num_classes)  # the imbalance changes no speed
    shape = [_PACKED_SIDE, _PACKED_SIDE, 3]
    dataset = unwritten_dataset(family, counts, shape, recipe=f"{family}/cpmix", rho=None, storage="shards")
    return dataset, num_images, "published"


def _speeds(
    build: Callable[[int], TimedLoop], sizes: Iterable[int], options: BenchOptions, num_terms: int = 1
) -> dict[int, float]:
    """Time loops of several sizes: images of a term per step -> images per second."""
    # A CPU's speed depends little on the size, so only the largest size with a short step is timed. A GPU times all
    # sizes with short steps that fit into its memory. At least 2 images: batch norm may refuse 1.
    wanted = sorted({max(2, size) for size in sizes})
    size = min(max(2, -(-_FIRST_IMAGES // num_terms)), wanted[-1])
    loop, taken = _warm(build(size))
    with suppress(torch.OutOfMemoryError):
        while size < wanted[-1] and (room := int(_STEP_SECONDS / taken)) > 1:
            larger = min(wanted[-1], size * min(8, room))
            loop, taken = _warm(build(larger))
            size = larger
    speeds = {size: _median_speed(loop, taken, options)}
    if loop.device.type == "cuda":
        for smaller in {min(size, other) for other in wanted} - {size}:
            speeds[smaller] = _median_speed(*_warm(build(smaller)), options)
    return dict(sorted(speeds.items()))


def _warm(loop: TimedLoop) -> tuple[TimedLoop, float]:
    """Run steps until kernels are selected and memory is allocated; return the loop and the seconds per step."""
    loop.timed(EAGER_STEPS if loop.device.type == "cuda" else 1)
    return loop, loop.timed(1)[0]


def _median_speed(loop: TimedLoop, taken: float, options: BenchOptions) -> float:
    """Return the median images per second over options.rounds turns, or fewer if they exceed _MAX_SECONDS."""
    steps = max(1, math.ceil(options.seconds / taken))
    timing = measure.Timing(loop, None, steps)
    for _ in range(min(options.rounds, max(1, int(_MAX_SECONDS / (steps * taken))))):
        timing.turn()
    return timing.median


def _images(
    context: PhaseContext, at_once: Iterable[int], options: BenchOptions
) -> tuple[dict[str, StorageSpeed], dict[str, Any]]:
    """Time each way to store images; return the speeds by way, and facts about the images that were read."""
    dataset, recipe, device = context.dataset, context.recipe.data, context.device

    def augmenting(batches: Batches) -> dict[int, float]:
        return _speeds(lambda size: InputAlone(batches, device, _NUM_READ, size), at_once, options)

    whole = measure.random_data(context, torch.arange(_NUM_READ) % dataset.num_classes).batches
    kept = cropped = augmenting(whole)
    if dataset.storage == "tensors":
        return {"resident": StorageSpeed(None, 0.0, kept)}, {}
    if recipe.crop:
        seen = measure.random_images(_NUM_READ, (recipe.crop, recipe.crop, 3)).to(device)
        cropped = augmenting(make_batches(seen, recipe, dataset.record, cropped=True))

    def seconds_to_read(reader: ImageReader, count: int) -> float:
        uniforms = np.random.default_rng(0).random((count, whole.num_uniforms))
        into, started = np.empty(reader.shape, dtype=np.uint8), time.perf_counter()
        for index in range(count):
            reader.read(index, uniforms[index], into)
        return time.perf_counter() - started

    def reading(reader: ImageReader, count: int) -> float:
        first = seconds_to_read(reader, count)  # after it, images are verified and in the page cache
        turns = min(options.rounds, max(1, int(_MAX_SECONDS / first)))
        return count / statistics.median(seconds_to_read(reader, count) for _ in range(turns))

    own = dataset.storage if options.data is not None else ""
    with tempfile.TemporaryDirectory(prefix="cpmix-bench-") as made:
        opened = partial(dataset.shards, "train") if own == "shards" else _packed(Path(made), dataset.shape)
        packed = min(_NUM_READ, len(opened()))
        verified = reading(opened(), packed)
        first_read = packed / seconds_to_read(opened(), packed)
        paths = dataset.paths("train") if own == "files" else _image_files(Path(made))
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(_NUM_READ, len(paths)), dtype=int)]
        decoded = reading(FileReader(paths, dataset.shape, recipe, upright=dataset.upright), len(paths))
        mean_bytes = float(sizes_and_times(paths)[:, 0].mean())
    width, height = _GENERATED
    of_files = f"{len(paths)} of its files" if own == "files" else f"{len(paths)} generated JPEGs, {width} x {height}"
    return {
        "shards": StorageSpeed(verified, float(np.prod(dataset.shape)), kept),
        "files": StorageSpeed(decoded, mean_bytes, cropped),
    }, {"first_read": first_read, "image_files": of_files}


def _packed(folder: Path, shape: list[int]) -> Callable[[], Shards]:
    """Write a shard of random pixels; return a function that opens it."""
    images = measure.random_images(_NUM_READ, shape).numpy()
    (folder / shard_name("train", 0)).write_bytes(images.tobytes())
    hashes = np.frombuffer(b"".join(sha256(image.tobytes()).digest() for image in images), dtype=np.uint8)
    return partial(Shards, folder, "train", hashes.reshape(-1, 32), shape, _NUM_READ)


def _image_files(folder: Path) -> list[Path]:
    """Write _NUM_GENERATED JPEGs with detail at every scale, as in photographs; their bytes are as in ImageNet."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.full((_NUM_GENERATED, 3, *reversed(_GENERATED)), 128.0)
    for octave in range(8):
        side = 4 * 2**octave
        noise = torch.randn(_NUM_GENERATED, 3, 3 * side // 4, side, generator=generator)
        pixels += 50 * 0.85**octave * F.interpolate(noise, pixels.shape[2:], mode="bicubic")
    paths = [folder / f"{number}.jpg" for number in range(_NUM_GENERATED)]
    for path, image in zip(paths, pixels.clip(0, 255).byte().permute(0, 2, 3, 1).numpy(), strict=True):
        Image.fromarray(image).save(path, quality=90)
    return paths


def _first_limit(kept: str, projected: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the smallest number of ranks at which reading or links limit a step, with phase and resource, or None.

    If several phases are limited, it is the longest one.
    """
    for entry in projected:
        phases = entry["images"][kept]["phases"]
        limited = [phase for phase in phases if phases[phase]["limit"] != "device"]
        if limited:
            longest = max(limited, key=lambda phase: phases[phase]["seconds"])
            return {"world_size": entry["world_size"], "phase": longest, "limit": phases[longest]["limit"]}
    return None


def _report(fields: dict[str, Any], num_terms: Mapping[str, int]) -> None:
    """Print the parts measured, assumed and projected, or the JSON object."""
    assumed, projected = fields["assumed"], fields["projected"]
    totals, steps = [], []
    for entry in projected:
        ranks = f"{entry['world_size']:,}"
        for kept, found in entry["images"].items():
            times = [console.duration(step["seconds"]) for step in found["phases"].values()]
            totals.append([ranks, kept, *times, console.duration(found["seconds"]), f"{found['rank_hours']:,.1f}"])
            for phase, step in found["phases"].items():
                times = [f"{1000 * step[f'{what}_seconds']:,.1f}" for what in ("device", "input", "link")]
                steps.append(
                    [
                        *(ranks, kept, phase, f"{step['images_per_rank_and_step']:,}", f"{step['steps_per_epoch']:,}"),
                        *(*times, step["limit"], f"{step['cores_wanted']:,}"),
                        f"{step['network_bytes_per_rank_and_step'] / _MB:,.1f}",
                        f"{step['disk_bytes_per_epoch'] / _GB:,.1f}",
                        f"{step['disk_bytes_per_second_and_machine'] / _MB:,.0f}",
                    ]
                )
    hours = ">GPU-hours" if fields["device_type"] == "cuda" else ">rank-hours"
    totals_header = (">ranks", "images", *(f">{phase}" for phase in num_terms), ">together", hours)
    steps_header = (
        *(">ranks", "images", "phase", ">a rank", ">steps", ">device ms", ">input ms", ">link ms", "limit"),
        *(">cores wanted", ">MB sent", ">disk GB", ">MB/s"),
    )
    lines = [
        f"measured here: {fields['device']}, threads: {fields['threads']}, {fields['precision']}, "
        f"torch {fields['torch']}",
        *console.table_lines(("what", ">images/s", "how"), _measured_rows(fields["measured"], num_terms)),
        "",
        *console.prose(
            [
                f"assumed: {counted(assumed['cores'], 'core')} of each rank read images (--cores); "
                f"{assumed['link']:g} GB/s each way on the slowest link (--link); "
                f"{counted(assumed['ranks_per_machine'], 'rank')} a machine",
                *(f"  {said}" for said in assumed["said"]),
            ]
        ),
        "",
        f"projected, not measured: {fields['recipe']} on {fields['num_images']:,} images in "
        f"{fields['num_classes']:,} classes ({fields['counts_from']})",
        *console.table_lines(totals_header, totals),
        "",
        "a step of a rank; steps and bytes from disk of an epoch, MB/s from disk of a machine",
        *console.table_lines(steps_header, steps),
        "",
    ]
    said = []
    for kept, first in fields["runs_out_first"].items():
        limit = first and f"the {first['limit']}, with {_ranks(first)} in {first['phase']}"
        runs_out = limit or f"nothing but the device, with up to {_ranks(projected[-1])}"
        said.append(f"runs out first with images {_PLACES[kept]}: {runs_out}")
    for entry in projected:
        phases = next(iter(entry["images"].values()))["phases"]
        shares = [f"{100 * step['pairs_share']:.3f} % of {phase}" for phase, step in phases.items()]
        said.append(f"counting and drawing pairs with {_ranks(entry)}: {', '.join(shares)}")
    said.append(f"not projected: {', '.join(fields['not_projected'])}")
    console.result(fields, lines=[*lines, *console.prose(said)])


def _ranks(entry: Mapping[str, Any]) -> str:
    return counted(entry["world_size"], "rank")


def _measured_rows(found: Mapping[str, Any], num_terms: Mapping[str, int]) -> list[list[str]]:
    def speed(images_per_second: float) -> str:
        return f"{images_per_second:,.{0 if images_per_second >= 100 else 1}f}"

    def row(what: str, speeds: Mapping[int, float], terms: int = 1) -> list[str]:
        several = f" x {terms} terms" if terms > 1 else ""
        how = ", ".join(f"{n}{several}: {speed(found)}" for n, found in speeds.items())
        return [what, speed(max(speeds.values())), f"by images at once: {how}"]

    rows = []
    kept = found["kept"]
    if "files" in kept:
        files, packed = kept["files"], kept["shards"]
        how = f"{found['image_files']}, mean {files['image_bytes'] / 1000:,.0f} KB"
        rows.append(["decode and crop an image file, one core", speed(files["read"]), how])
        first = f"{found['first_read']:,.0f} at first touch, with its hash"
        how = f"{packed['image_bytes'] / 1000:,.0f} KB each from the page cache; {first}"
        rows.append(["read a packed image, one core", speed(packed["read"]), how])
    for name, images in kept.items():
        if name != "shards" or "resident" not in kept:
            rows.append(row(f"augment, {name}", images["augment"]))
    rows += [row(f"network, {phase}", speeds, num_terms[phase]) for phase, speeds in found["network"].items()]
    sizes = [f"{phase} {count / _MB:,.1f} MB" for phase, count in found["gradient_bytes"].items()]
    rows.append(["gradients", "", f"{', '.join(sizes)}; running statistics {found['buffer_bytes'] / _MB:,.2f} MB"])
    how = f"count {1000 * found['count_seconds']:.3f} ms, draw {1000 * found['draw_seconds']:.3f} ms a batch; "
    rows.append(["confused pairs", "", how + f"K has {found['confusion_bytes'] / _MB:,.1f} MB"])
    return rows
