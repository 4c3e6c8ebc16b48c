"""bench --world-size: what this machine measured of a recipe, and what that projects to on more ranks.

Measured and projected are kept apart: a projection is a pure function of what was measured here and of what is assumed.
It assumes that every rank is a device like this one, that reading, computing and sending overlap without a loss, and
that no rank waits for another.
"""

import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cpmix_cli import console, hardware
from cpmix_cli import recipe as recipes
from cpmix_cli.contenders import NetworkAlone
from cpmix_cli.data.batches import CropBatches
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.lists import IMAGENET_LT, INATURALIST2018, PLACES_LT
from cpmix_cli.data.shards import Shards
from cpmix_cli.data.stream import FileReader
from cpmix_cli.engine import synchronize
from cpmix_cli.errors import UsageError
from cpmix_cli.models import MODELS
from cpmix_cli.phases.bench import pair_costs
from cpmix_cli.plans import Setting, prepared
from cpmix_cli.runs import PHASES
from cpmix_cli.step import Plan, TrainingData
from cpmix_cli.terms import check_fits

PUBLISHED = {"imagenet-lt": IMAGENET_LT, "places-lt": PLACES_LT, "inaturalist2018": INATURALIST2018}
STORED = 256  # side of a packed image
JPEG = (375, 500)  # height and width of a generated file: ImageNet's middle
GB = 1e9
SECONDS = 1.0  # that a rate is measured for, and three turns at least
CPU_BATCH = 8  # of a term: ResNet-50 takes some seconds for it


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    recipe: str
    settings: list[str]
    epochs: int | None
    data: Path | None
    device: str
    world_sizes: list[int]
    cores: int
    link: float


@dataclass(frozen=True)
class Work:
    """What a phase asks of a step's image, and how often."""

    phase: str
    batch_size: int
    """Of all ranks together."""
    steps: int
    """An epoch."""
    epochs: int
    terms: int
    """Times that an image of the batch goes through the network."""
    reads: int
    """Images read for one of the batch, by a rank alone."""
    reads_in_part: int
    """The same where a batch has several parts: partners in the batch are made anew."""
    trained_bytes: int
    """Gradients in float32."""


@dataclass(frozen=True)
class Measured:
    """Rates of one rank on this machine."""

    network: Mapping[str, float]
    """Images a second through forward, backward and optimizer step, by phase."""
    augment_shards: float
    """Images a second cropped, flipped, jittered and normalised on the device."""
    augment_files: float
    """The same of images that were cropped when they were decoded."""
    decode: float
    """Images a second and core from JPEG, cropped at random and scaled."""
    read: float
    """Images a second and core from shards, their hashes checked before."""
    first_read: float
    """The same with the hashes checked."""
    jpeg_bytes: float
    """Of a file, mean."""
    packed_bytes: int
    """Of an image in a shard."""
    pairs: float
    """Seconds to count a batch's confusions and draw its partners."""


@dataclass(frozen=True)
class Assumed:
    """What is not measured."""

    cores: int
    """That read for each rank."""
    link: float
    """Bytes a second that a rank sends, and receives at the same time."""


@dataclass(frozen=True)
class Projected:
    """A phase on so many ranks, its images in files or in shards."""

    world_size: int
    phase: str
    storage: str
    images: int
    """Of a rank and step, through the network."""
    device_seconds: float
    """Of a step: augmentation, network, pairs."""
    input_seconds: float
    """Of a step: reading, by the cores of a rank."""
    link_seconds: float
    """Of a step: gradients."""
    disk_bytes: float
    """Of an epoch, by all ranks together."""
    link_bytes: float
    """Of a step, out of each rank."""
    hours: float
    """Of the whole phase."""
    device_hours: float

    @property
    def seconds(self) -> float:
        """Of a step: all three at once, so what takes longest."""
        return max(self.device_seconds, self.input_seconds, self.link_seconds)

    @property
    def first(self) -> str:
        """What runs out first."""
        found = {"device": self.device_seconds, "input": self.input_seconds, "link": self.link_seconds}
        return max(found, key=lambda name: found[name])


def project(work: Work, measured: Measured, assumed: Assumed, world_size: int, storage: str) -> Projected:
    """What a phase would take on `world_size` ranks.

    Args:
        work: the phase.
        measured: here.
        assumed: the rest.
        world_size: W.
        storage: files or shards.

    Source of the link's bytes: a ring all-reduce moves 2 (W - 1) / W of the gradients out of each rank.
    """
    share = -(-work.batch_size // world_size)
    images, reads = share * work.terms, share * (work.reads if world_size == 1 else work.reads_in_part)
    if storage == "shards":
        augment, read, size = measured.augment_shards, measured.read, float(measured.packed_bytes)
    else:
        augment, read, size = measured.augment_files, measured.decode, measured.jpeg_bytes
    device_seconds = images / measured.network[work.phase] + reads / augment + measured.pairs
    link_bytes = 2 * (world_size - 1) / world_size * work.trained_bytes
    found = Projected(
        world_size,
        work.phase,
        storage,
        images,
        device_seconds,
        reads / (read * assumed.cores),
        link_bytes / assumed.link,
        float(work.steps * world_size * reads * size),
        link_bytes,
        0.0,
        0.0,
    )
    hours = found.seconds * work.steps * work.epochs / 3600
    return replace(found, hours=hours, device_hours=hours * world_size)


def run(options: Options) -> None:
    """Measure, project, and print.

    Raises:
        UsageError: faults of the recipe, or nobody knows how many images it is for.
        EnvironmentFault: the device is not there.
        InputError: the data set is damaged.
    """
    device = hardware.use_device(options.device)
    dataset = open_dataset(options.data, needed_by="bench") if options.data else published(options.recipe)
    recipe = recipes.load(options.recipe, settings=options.settings, epochs=options.epochs, rho=dataset.record["rho"])
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    if not recipe.data.crop:
        raise UsageError(
            f"{options.recipe} sees whole images, which lie in memory; --world-size projects what is read from disk",
            needed_by="bench --world-size",
            fix="name a recipe with data.crop, such as imagenet-lt/cpmix",
        )
    if max(options.world_sizes) > recipe.optimizer.batch_size:
        raise UsageError(
            f"--world-size {max(options.world_sizes)}: a batch has {recipe.optimizer.batch_size} images",
            fix="give fewer ranks, or --set optimizer.batch_size=N",
        )
    precision = hardware.resolve_precision(recipe.model.precision, device)
    setting = Setting(recipe, dataset, device, precision, {})
    phases = [phase for phase in PHASES if getattr(recipe, phase) is not None]
    plans = {phase: prepared(setting, phase)[0] for phase in phases}
    console.note(f"bench: measures {options.recipe} on {hardware.device_name(device)}, {precision}; a minute or two")
    batch = recipe.optimizer.batch_size // min(options.world_sizes) if device.type == "cuda" else CPU_BATCH
    work = [phase_work(setting, phase, plans[phase]) for phase in phases]
    measured = measure(setting, plans, batch)
    assumed = Assumed(options.cores, options.link * GB)
    found = [
        project(each, measured, assumed, world_size, storage)
        for world_size in options.world_sizes
        for storage in ("shards", "files")
        for each in work
    ]
    report(options, setting, batch, work, measured, assumed, found)


def published(name: str) -> Dataset:
    """The data set that a recipe is for, as far as it is published: how many images and classes.

    Raises:
        UsageError: it is none of those.
    """
    family = recipes.find_recipe(name).parent.name
    if family not in PUBLISHED:
        raise UsageError(
            f"{name}: how many images and classes it is for is known of {', '.join(PUBLISHED)} alone",
            needed_by="bench --world-size",
            fix="give a data set folder with --data",
        )
    known = PUBLISHED[family]
    counts = np.full(known.num_classes, known.num_images["train"] // known.num_classes)
    counts[: known.num_images["train"] - counts.sum()] += 1
    record: dict[str, Any] = {
        "name": family,
        "recipe": name,
        "rho": None,
        "shape": [STORED, STORED, 3],
        "storage": "shards",
    }
    record["mean"], record["std"] = [0.5] * 3, [0.25] * 3
    return Dataset(Path(), record, [str(c) for c in range(known.num_classes)], counts)


def phase_work(setting: Setting, phase: str, plan: Plan) -> Work:
    """What a phase asks of a step."""
    dataset, recipe = setting.dataset, setting.recipe
    with torch.device("meta"):
        shape = recipe.data.input_shape(dataset.shape)
        model = MODELS[recipe.model.name](dataset.num_classes, shape, recipe.model)
    trained = [p for n, p in model.named_parameters() if phase != "finetune" or n.startswith("head")]
    natural = any(term.natural for term in plan.terms)
    alone, in_part = (natural + sum(len(term.wanted(whole)) for term in plan.terms) for whole in (True, False))
    return Work(
        phase=phase,
        batch_size=plan.batch_size,
        steps=plan.num_steps(int(dataset.class_counts.sum())),
        epochs=plan.last_epoch - plan.first_epoch + 1,
        terms=len(plan.terms),
        reads=alone,
        reads_in_part=in_part,
        trained_bytes=4 * sum(p.numel() for p in trained),
    )


# -- measuring ---------------------------------------------------------------------------------------------------------


def rate(function: Callable[[], int], device: torch.device) -> float:
    """Images a second of a function that says how many it took: for SECONDS, after a first turn that is not timed."""
    function()
    synchronize(device)
    images, turns, started = 0, 0, time.perf_counter()
    while turns < 3 or time.perf_counter() - started < SECONDS:
        images += function()
        turns += 1
        synchronize(device)
    return images / (time.perf_counter() - started)


def measure(setting: Setting, plans: Mapping[str, Plan], batch: int) -> Measured:
    """Rates of this machine for a recipe, `batch` images a term at once."""
    recipe, device = setting.recipe, setting.device
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (batch, STORED, STORED, 3), dtype=torch.uint8, generator=generator).to(device)
    none = ([0.5] * 3, [0.25] * 3)
    packed = CropBatches(stored, recipe.data, *none)
    side = recipe.data.crop
    cropped = CropBatches(stored[:, :side, :side].contiguous(), recipe.data, *none, cropped=True)
    uniforms = torch.rand(batch, packed.num_uniforms, dtype=torch.float64, generator=generator).to(device)
    indices = torch.arange(batch, device=device)
    labels = indices % setting.dataset.num_classes
    data = TrainingData(packed, labels, torch.ones(setting.dataset.num_classes, dtype=torch.int64, device=device))

    def network(phase: str) -> float:
        plan, state = prepared(setting, phase)
        alone = NetworkAlone(data, replace(plan, batch_size=batch), state)
        alone.warm_up() if device.type == "cuda" else alone.take(1)
        taken, images = alone.timed(3 if device.type == "cuda" else 2)
        return images / taken

    with tempfile.TemporaryDirectory() as folder:
        paths = jpeg_files(Path(folder), 8)
        reader = FileReader(paths, STORED, recipe.data, upright=False, needed_by="bench")
        into = np.empty(reader.shape, dtype=np.uint8)
        numbers = uniforms.cpu().numpy()

        def decode() -> int:
            for index in range(len(reader)):
                reader.read(index, numbers[index % batch] if len(numbers[0]) else None, into)
            return len(reader)

        sizes = [path.stat().st_size for path in paths]
        decoded = rate(decode, torch.device("cpu"))
        first_read, read = shard_rates(Path(folder), stored.cpu().numpy())
    pairs = pair_costs(setting.dataset.num_classes, recipe.optimizer.batch_size, device)
    draws = any(not term.in_batch and term.mixed for plan in plans.values() for term in plan.terms)
    return Measured(
        network={phase: network(phase) for phase in plans},
        augment_shards=rate(lambda: len(packed.batch(indices, uniforms)), device),
        augment_files=rate(lambda: len(cropped.batch(indices, uniforms)), device),
        decode=decoded,
        read=read,
        first_read=first_read,
        jpeg_bytes=sum(sizes) / len(sizes),
        packed_bytes=STORED * STORED * 3,
        pairs=pairs["count_seconds"] + draws * pairs["draw_seconds"],
    )


def jpeg_files(folder: Path, count: int) -> list[Path]:
    """Generated photographs, as far as a decoder's work goes: smooth shapes with noise, at quality 90."""
    generator = np.random.Generator(np.random.PCG64(0))
    paths = []
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(JPEG[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def shard_rates(folder: Path, images: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[float, float]:
    """Images a second that one thread reads from a shard in the page cache, at first touch and later."""
    from hashlib import sha256

    many = np.ascontiguousarray(np.resize(images, (256, *images.shape[1:])))
    (folder / "train-00000.shard").write_bytes(many.tobytes())
    hashes = np.stack([np.frombuffer(sha256(image.tobytes()).digest(), dtype=np.uint8) for image in many])
    into = np.empty(images.shape[1:], dtype=np.uint8)
    rates = []
    shards = Shards(folder, "train", hashes, images.shape[1:], len(many))
    for _ in range(2):
        started = time.perf_counter()
        for index in range(len(many)):
            shards.read(index, None, into)
        rates.append(len(many) / (time.perf_counter() - started))
    return rates[0], rates[1]


# -- showing -----------------------------------------------------------------------------------------------------------


def report(
    options: Options,
    setting: Setting,
    batch: int,
    work: Sequence[Work],
    measured: Measured,
    assumed: Assumed,
    found: Sequence[Projected],
) -> None:
    """Two tables, what was measured and what is projected; or the JSON object."""
    dataset = setting.dataset
    confusion_bytes = 8 * dataset.num_classes**2
    whole = {
        (w, storage): [p for p in found if (p.world_size, p.storage) == (w, storage)]
        for w in options.world_sizes
        for storage in ("shards", "files")
    }
    step = {each.phase: each.batch_size * each.terms / measured.network[each.phase] for each in work}
    share = max(measured.pairs / step[each.phase] for each in work if each.phase != "finetune")
    fields: dict[str, Any] = {
        "command": "bench",
        "recipe": options.recipe,
        "data": dataset.name,
        "num_images": int(dataset.class_counts.sum()),
        "num_classes": dataset.num_classes,
        "measured": {
            "device": hardware.device_name(setting.device),
            "torch": torch.__version__,
            "precision": setting.precision,
            "threads": torch.get_num_threads(),
            "images_of_a_term_at_once": batch,
            **asdict(measured),
            "pairs_share_of_step": share,
            "confusion_bytes": confusion_bytes,
            "work": [asdict(each) for each in work],
        },
        "assumed": asdict(assumed),
        "projected": [{**asdict(p), "seconds": p.seconds, "runs_out_first": p.first} for p in found],
    }
    rows = [
        *(
            [f"network, {each.phase}: forward, backward, step", f"{measured.network[each.phase]:,.1f} images/s"]
            for each in work
        ),
        ["augmenting packed images on the device", f"{measured.augment_shards:,.0f} images/s"],
        ["augmenting decoded crops on the device", f"{measured.augment_files:,.0f} images/s"],
        [f"decoding JPEG, {measured.jpeg_bytes / 1000:,.0f} kB, one core", f"{measured.decode:,.0f} images/s"],
        [f"reading shards, {measured.packed_bytes / 1000:,.0f} kB, one core", f"{measured.read:,.0f} images/s"],
        ["the same at first touch, hash checked", f"{measured.first_read:,.0f} images/s"],
        ["counting and drawing pairs of a batch", f"{1000 * measured.pairs:,.2f} ms, {100 * share:.2g} % of a step"],
        *([f"gradients, {each.phase}", f"{each.trained_bytes / 1e6:,.0f} MB"] for each in work),
        ["confusion counts on each rank and in a state", f"{confusion_bytes / 1e6:,.1f} MB"],
    ]
    title = (
        f"measured: {options.recipe}, {dataset.num_classes:,} classes, {hardware.device_name(setting.device)}, "
        f"{setting.precision}, {torch.get_num_threads()} threads, {batch} images of a term at once"
    )
    lines = console.table_lines(("what", ">here"), rows, title=title)
    header = [">ranks", "images in", ">images/step", ">ms/step", "runs out first", ">hours", ">device-hours"]
    header += [">disk GB/epoch", ">disk MB/s", ">link MB/step"]
    table = []
    for (world_size, storage), phases in whole.items():
        longest = max(phases, key=lambda p: p.hours)
        last = next(each for each in work if each.phase == longest.phase)
        seconds = longest.seconds * last.steps
        table.append(
            [
                str(world_size),
                storage,
                f"{longest.images:,}",
                f"{1000 * longest.seconds:,.0f}",
                f"{longest.first} ({longest.phase})",
                f"{sum(p.hours for p in phases):,.1f}",
                f"{sum(p.device_hours for p in phases):,.1f}",
                f"{longest.disk_bytes / GB:,.1f}",
                f"{longest.disk_bytes / seconds / 1e6:,.0f}",
                f"{longest.link_bytes / 1e6:,.0f}",
            ]
        )
    title = (
        f"projected: every rank a device as here, {assumed.cores} cores that read for each (--cores), "
        f"{assumed.link / GB:g} GB/s between them (--link), all overlapping, nobody waiting"
    )
    lines += ["", *console.table_lines(header, table, title=title)]
    lines.append("hours are of all phases; the other columns are of the phase that takes longest, a step's of one rank")
    console.result(fields, lines=lines)
