"""bench --world-size: what training takes on other numbers of ranks.

What is timed or counted here, what is assumed, and what follows from both are kept apart; project() is arithmetic
alone. Nothing is written but packed images and image files in a temporary folder.

A step takes as long as its slowest resource: the device (augmentation, network, confused pairs), the cores that read
images, the links between ranks.
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
from cpmix_cli.data.decoding import file_sizes
from cpmix_cli.data.shards import Shards, shard_name
from cpmix_cli.data.sources import OFFICIAL_LISTS
from cpmix_cli.data.stream import FileReader, ImageReader
from cpmix_cli.flags import BenchOptions
from cpmix_cli.mixing import BATCH_PARTNERS, CLASS_PARTNERS
from cpmix_cli.recipe.loading import find_recipe
from cpmix_cli.runtime import console, hardware
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.batch_slices import BatchSlice
from cpmix_cli.training.cuda_graphs import EAGER_STEPS
from cpmix_cli.training.plan import PhaseContext, Plan, rehearsal

_PACKED_SIDE = 256  # pixels, where nothing is packed yet: what all of the published sets are tested at
_GENERATED = (500, 375)  # width and height of image files made where there are none: the commonest of ImageNet
_NUM_GENERATED = 16
_NUM_READ = 256  # images that are read or augmented in turn; the page cache holds them
_FIRST_IMAGES = 8  # that go through a network when it is first timed
_STEP_SECONDS = 1.0  # a measured step takes hardly longer: its batch is that of a rank, or a smaller one
_MAX_SECONDS = 3.0  # of all turns of one measurement; there is one in any case
_MB, _GB = 1e6, 1e9
_PLACES = {"resident": "on the device", "shards": "in shards", "files": "in their files"}


@dataclass(frozen=True)
class StorageSpeed:
    """Training images as they are kept: on the device, packed or in their files."""

    read: float | None
    """Images a second that one core reads; None where there is nothing to read."""
    image_bytes: float
    """Read from disk for an image."""
    augment: Mapping[int, float]
    """Images a second on the device, by images at once."""


@dataclass(frozen=True)
class Measurements:
    """What was timed or counted here."""

    kept: Mapping[str, StorageSpeed]
    network: Mapping[str, Mapping[int, float]]
    """Phase -> images a second forward, backward and through the optimizer, by images of a term at once."""
    gradient_bytes: Mapping[str, int]
    """By phase, of what it trains."""
    buffer_bytes: int
    """Of the network's running statistics, which the first rank sends to the others."""
    count_seconds: float
    """To count the errors of a batch."""
    draw_seconds: float
    """To draw confused partners for a batch."""


@dataclass(frozen=True)
class Assumptions:
    """What is not known here."""

    cores: int
    """Of a rank, that read images."""
    link: float
    """GB a second, each way, of the slowest link on the way round all ranks."""
    ranks_per_machine: int = 8


def _images_made(plan: Plan, *, sliced: bool) -> int:
    """Images that are read and augmented for each of a batch."""
    terms = [term.recipe for term in plan.terms]
    # In slices, partners from the batch may be another rank's, and are made anew.
    anew = {*CLASS_PARTNERS, *(BATCH_PARTNERS if sliced else ())}
    natural = sum(term.draw == "natural" for term in terms)
    return min(natural, 1) + len(terms) - natural + sum(term.partner in anew for term in terms)


def _share(
    measured: Measurements, assumed: Assumptions, plan: Plan, kept: str, world_size: int, size: int
) -> dict[str, Any]:
    """The share of one rank in a step over a batch of `size` images; images that pad what is uneven are counted."""
    images, num_terms = measured.kept[kept], len(plan.terms)
    part = BatchSlice(0, world_size * plan.micro_batches, size)
    num_images = part.length * plan.micro_batches
    made = num_images * _images_made(plan, sliced=not part.is_whole)
    counts = plan.counts_errors(plan.last_epoch)
    pairs = measured.count_seconds * counts
    pairs += measured.draw_seconds * sum(term.recipe.partner == "confusion" for term in plan.terms)
    device = made / _speed_at(images.augment, part.length)
    device += num_images * num_terms / _speed_at(measured.network[plan.phase], part.length) + pairs
    sums = 8 * (num_terms + 3)  # the losses, their sum, how many are right, and the word that none has ended
    # A ring all-reduce of n bytes sends 2 (W - 1) / W n from each of W ranks.
    sent = 2 * (world_size - 1) / world_size * (measured.gradient_bytes[plan.phase] + sums)
    if world_size > 1:
        sent += measured.buffer_bytes + (world_size - 1) * 8 * counts * num_images
    one_core = 0.0 if images.read is None else made / images.read
    seconds = {"device": device, "input": one_core / assumed.cores, "link": sent / (assumed.link * _GB)}
    longest = max(seconds.values())
    return {
        "images_per_rank_and_step": num_images,
        "passes_per_rank_and_step": num_images * num_terms,
        "read_per_rank_and_step": made if images.read is not None else 0,
        **{f"{resource}_seconds": taken for resource, taken in seconds.items()},
        "step_seconds": longest,
        "limit": max(seconds, key=lambda resource: seconds[resource]),
        "cores_wanted": math.ceil(one_core / max(seconds["device"], seconds["link"])),
        "pairs_share": pairs / longest,
        "network_bytes_per_rank_and_step": round(sent),
    }


def _speed_at(speeds: Mapping[int, float], at_once: int) -> float:
    """The speed at the nearest number of images that was measured."""
    return speeds[min(speeds, key=lambda size: abs(size - at_once))]


def project(
    measured: Measurements, assumed: Assumptions, plans: Iterable[Plan], num_images: int, kept: str, world_size: int
) -> dict[str, Any]:
    """Time, GPU-hours, traffic and limits of phases over so many images on a number of ranks, with the images kept in
    one of the ways of measured.kept.
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
        EnvironmentFault: the device is not there.
        InputError: the data set is damaged, or holds points.
        UsageError: faults of the flags or the recipe.
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
        f"{hardware.device_name(device)}, {torch.get_num_threads()} threads"
    )
    plans, network, gradients, buffers = [], {}, {}, 0
    all_at_once: set[int] = set()
    for phase in phases:
        plan, state = rehearsal(context, phase)
        plans.append(plan)
        gradients[phase] = _num_bytes(p for p in state.model.parameters() if p.requires_grad)
        buffers = _num_bytes(state.model.buffers())
        # Images of a term that a rank takes at once, for each number of ranks.
        size = plan.size(0, num_images)
        at_once = {BatchSlice(0, ranks * plan.micro_batches, size).length for ranks in sizes}
        all_at_once |= at_once

        def one(size: int, plan: Plan = plan, state: Any = state) -> TimedLoop:
            data = measure.random_data(context, torch.arange(size) % dataset.num_classes)
            return NetworkAlone(data, replace(plan, batch_size=size), state, record=False)

        console.note(f"bench: the network of {phase}")
        network[phase] = _speeds(one, at_once, options, len(plan.terms))
    console.note("bench: images")
    kept, facts = _images(context, all_at_once, options)
    if "shards" in kept:
        resident = num_images * kept["shards"].image_bytes
        # The ranks of a machine each have a GPU, but one memory between them.
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
    """The data set, its training images, and where their number is from: without --data, the recipe's published set."""
    family = find_recipe(options.recipe).resolve().parent.name if options.recipe is not None else ""
    if options.data is not None or options.data_root is not None or family not in OFFICIAL_LISTS:
        dataset = measure.training_set(options.data, options.data_root)
        return dataset, int(dataset.class_counts.sum()), "--data" if options.data else "made up"
    published = OFFICIAL_LISTS[family]
    num_images = published.num_images["train"]
    counts = np.full(published.num_classes, num_images // published.num_classes)  # who has how many changes no speed
    shape = [_PACKED_SIDE, _PACKED_SIDE, 3]
    dataset = unwritten_dataset(family, counts, shape, recipe=f"{family}/cpmix", rho=None, storage="shards")
    return dataset, num_images, "published"


def _speeds(
    build: Callable[[int], TimedLoop], sizes: Iterable[int], options: BenchOptions, num_terms: int = 1
) -> dict[int, float]:
    """Images a second by images of a term at once."""
    # A CPU's speed hangs little on their number: there it is the largest whose step is short; a GPU takes all those
    # whose steps are short and fit into its memory. Not 1: batch norm may not take it.
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
    """A loop whose libraries have chosen and allocated, and the seconds of a step."""
    loop.timed(EAGER_STEPS if loop.device.type == "cuda" else 1)
    return loop, loop.timed(1)[0]


def _median_speed(loop: TimedLoop, taken: float, options: BenchOptions) -> float:
    """Images a second: the median of options.rounds turns, or of as many as _MAX_SECONDS have room for."""
    steps = max(1, math.ceil(options.seconds / taken))
    timing = measure.Timing(loop, None, steps)
    for _ in range(min(options.rounds, max(1, int(_MAX_SECONDS / (steps * taken))))):
        timing.turn()
    return timing.median


def _images(
    context: PhaseContext, at_once: Iterable[int], options: BenchOptions
) -> tuple[dict[str, StorageSpeed], dict[str, Any]]:
    """How images may be kept, with the speed of each way; and what was read for that."""
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
        first = seconds_to_read(reader, count)  # from here on in the page cache, and verified
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
        mean_bytes = float(file_sizes(paths).mean())
    width, height = _GENERATED
    of_files = f"{len(paths)} of its files" if own == "files" else f"{len(paths)} generated JPEGs, {width} x {height}"
    return {
        "shards": StorageSpeed(verified, float(np.prod(dataset.shape)), kept),
        "files": StorageSpeed(decoded, mean_bytes, cropped),
    }, {"first_read": first_read, "image_files": of_files}


def _packed(folder: Path, shape: list[int]) -> Callable[[], Shards]:
    """Write a shard of random pixels; return what opens it."""
    images = measure.random_images(_NUM_READ, shape).numpy()
    (folder / shard_name("train", 0)).write_bytes(images.tobytes())
    hashes = np.frombuffer(b"".join(sha256(image.tobytes()).digest() for image in images), dtype=np.uint8)
    return partial(Shards, folder, "train", hashes.reshape(-1, 32), shape, _NUM_READ)


def _image_files(folder: Path) -> list[Path]:
    """_NUM_GENERATED JPEGs that have detail at every scale, as photographs do; about as large as those of ImageNet."""
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
    """The fewest ranks at which something else than the device is the limit, and what, in the longest such phase."""
    for entry in projected:
        phases = entry["images"][kept]["phases"]
        limited = [phase for phase in phases if phases[phase]["limit"] != "device"]
        if limited:
            longest = max(limited, key=lambda phase: phases[phase]["seconds"])
            return {"world_size": entry["world_size"], "phase": longest, "limit": phases[longest]["limit"]}
    return None


def _report(fields: dict[str, Any], num_terms: Mapping[str, int]) -> None:
    """Three parts: measured, assumed, projected; or the JSON object."""
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
        f"assumed: {assumed['cores']} cores of each rank read images (--cores); {assumed['link']:g} GB/s each way on "
        f"the slowest link (--link); {assumed['ranks_per_machine']} ranks a machine",
        *(f"  {said}" for said in assumed["said"]),
        "",
        f"projected, not measured: {fields['recipe']} on {fields['num_images']:,} images in "
        f"{fields['num_classes']:,} classes ({fields['counts_from']})",
        *console.table_lines(totals_header, totals),
        "",
        "a step of a rank; steps and bytes from disk of an epoch, MB/s from disk of a machine",
        *console.table_lines(steps_header, steps),
        "",
    ]
    for kept, first in fields["runs_out_first"].items():
        limit = first and f"the {first['limit']}, with {_ranks(first)} in {first['phase']}"
        runs_out = limit or f"nothing but the device, with up to {_ranks(projected[-1])}"
        lines.append(f"runs out first with images {_PLACES[kept]}: {runs_out}")
    for entry in projected:
        phases = next(iter(entry["images"].values()))["phases"]
        shares = [f"{100 * step['pairs_share']:.3f} % of {phase}" for phase, step in phases.items()]
        lines.append(f"counting and drawing pairs with {_ranks(entry)}: {', '.join(shares)}")
    lines.append(f"not projected: {', '.join(fields['not_projected'])}")
    console.result(fields, lines=lines)


def _ranks(entry: Mapping[str, Any]) -> str:
    return "1 rank" if entry["world_size"] == 1 else f"{entry['world_size']:,} ranks"


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
