"""build-lt: build a long-tailed data set folder from a source."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts import files as artifacts
from cpmix_cli.artifacts import locks, records, tables
from cpmix_cli.data import shards, storage
from cpmix_cli.data.dataset import Dataset, DatasetRequest, Storage, open_dataset
from cpmix_cli.data.decoding import SHOWN, UnreadableImages, check_headers
from cpmix_cli.data.download import download
from cpmix_cli.data.longtail import GROUPS, PROFILES, group_of, shuffled_by_class
from cpmix_cli.data.sources import IMAGE_SIZE, LARGE_IMAGE_SIZE, OFFICIAL_LISTS, SOURCES, places
from cpmix_cli.data.splits import Source, Split
from cpmix_cli.flags import BuildOptions
from cpmix_cli.recipe.schema import differences
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError, give_one_of, indented


def run(options: BuildOptions) -> None:
    """Select images, store them, and print the class counts.

    Raises:
        UsageError: the source is unknown, a number is out of range, or the source does not support a flag.
        InputError: source files are missing or damaged, or classes have too few images for the request.
        EnvironmentFault: the folder contains another data set or cannot be written, or --download failed.
    """
    _check_flags(options)
    if options.download:
        download(options.source, places(options.source, options.data_root)[0])
    kind: Storage = "tensors"
    size = options.image_size or IMAGE_SIZE
    if options.pack:
        kind, size = "shards", options.pack
    elif options.pack == 0 or options.source in OFFICIAL_LISTS:
        kind, size = "files", options.image_size or LARGE_IMAGE_SIZE
    source = SOURCES[options.source](options.data_root, options.list_dir)
    rho = options.rho if options.rho is not None else source.default_rho
    if source.test is not None and options.test_per_class is not None:
        raise UsageError(f"--test-per-class: {options.source} has its own test split", fix="drop the flag")
    if source.val is not None and options.val_per_class:
        raise UsageError(f"--val-per-class: {options.source} has its own val split", fix="drop the flag")

    if options.val_capped and (rho is None or not options.val_per_class):
        raise UsageError(
            "--val-capped keeps the counts of an imbalance factor beside a val split; one of the two is missing",
            fix="give --rho and --val-per-class as well, or drop the flag",
        )

    name = _folder_name(options, source, rho)
    folder = options.out or Path("data") / name
    request = DatasetRequest(
        source=options.source,
        rho=rho,
        profile=None if rho is None else options.profile or source.profile,
        subset_seed=options.subset_seed,
        val_per_class=options.val_per_class,
        test_per_class=options.test_per_class or source.test_per_class,
        image_size=size if source.root else None,
        listing=source.listing,
        storage=kind,
        val_capped=options.val_capped,
        few_inclusive=options.few_inclusive,
    )

    status = "up to date"
    if options.overwrite or not artifacts.is_there(folder / artifacts.DATASET):
        splits = storage.take(source, _choose(source, request))
        artifacts.check_place(folder, 0)
        with _unreadable_listed_beside(folder):
            sizes = storage.look_for_files(source.root, splits) if source.root and kind != "tensors" else {}
            with locks.hold(folder, wait=True) as lock:
                # Another process may have built it while this one waited.
                if options.overwrite or not artifacts.is_there(folder / artifacts.DATASET):
                    if kind == "tensors" or source.root is None:
                        stored = storage.store_tensors(folder, splits, source.root, size)
                    elif kind == "shards":
                        upright = options.source == "image-folder"
                        stored = storage.store_shards(folder, lock, splits, source.root, sizes, size, upright)
                    else:
                        stored = storage.store_files(folder, splits, source.root, size)
                    _write(folder, lock, name, request, source, splits, stored)
                    storage.clear(folder, open_dataset(folder))
                    status = "built"
    dataset = replace(open_dataset(folder), moved_to=source.root)
    if status == "up to date":
        _check_existing(dataset, request)
    elif shared := _num_duplicates(dataset):
        console.warn(f"{shared} of {dataset.record.num_test} test images are identical to a training image")
    if options.verify:
        _verify(dataset)
    _show(dataset, status)


def _check_flags(options: BuildOptions) -> None:
    """Check the flags as far as possible without reading a file."""
    name = options.source
    if name not in SOURCES:
        raise UsageError(f'build-lt has no source "{name}"', fix=give_one_of(name, SOURCES))
    if options.rho is not None and not options.rho >= 1:
        raise UsageError(
            f"--rho {options.rho:g} is no imbalance factor", fix="give a number from 1 up, such as --rho 20"
        )
    if options.profile is not None and options.profile not in PROFILES:
        raise UsageError(
            f'--profile "{options.profile}" is no class profile',
            fix=give_one_of(options.profile, PROFILES, "--profile"),
        )
    is_official = name in OFFICIAL_LISTS
    has_files = is_official or name == "image-folder"
    refusals = {
        f"--rho: {name} is as long-tailed as its lists say": is_official and options.rho is not None,
        f"--subset-seed: {name} has the images that its lists say": (
            is_official and options.subset_seed and not options.val_per_class
        ),
        f"--list-dir: {name} does not come as image files": not has_files and options.list_dir is not None,
        f"--pack: {name} does not come as image files": not has_files and options.pack is not None,
        f"--image-size: the images of {name} have one size": not has_files and options.image_size is not None,
        f"--profile: {name} has its own": name != "image-folder" and options.profile is not None,
        "--image-size: --pack says the size": options.pack and options.image_size is not None,
    }
    for message, is_wrong in refusals.items():
        if is_wrong:
            raise UsageError(message, fix="drop the flag")
    if options.profile is not None and options.rho is None:
        raise UsageError("--profile: without --rho all images are kept", fix="give --rho as well")
    if options.pack and not 8 <= options.pack <= 1024:
        raise UsageError(
            f"--pack {options.pack} is no side of packed images",
            fix="give 8 to 1024 pixels, such as --pack 256; --pack 0 leaves the images in their files",
        )


def _folder_name(options: BuildOptions, source: Source, rho: float | None) -> str:
    """Return a name from source, rho and all values that are not the default, such as cifar100-lt-rho200-seed1."""
    name = options.source
    if source.name:
        name += "-" + re.sub(r"[^\w.-]+", "-", source.name)
    if rho is not None:
        name += f"-lt-rho{rho:g}"
    if options.profile not in (None, source.profile):
        name += f"-{options.profile}"
    if options.pack is not None:
        name += f"-pack{options.pack}" if options.pack else "-files"
    if options.image_size is not None:
        name += f"-{options.image_size}px"
    if options.few_inclusive:
        name += "-few-inclusive"
    numbers = {"seed": options.subset_seed, "val": options.val_per_class, "test": options.test_per_class}
    name += "".join(f"-{word}{number}" for word, number in numbers.items() if number)
    return f"{name}-capped" if options.val_capped else name


def _choose(source: Source, request: DatasetRequest) -> dict[str, NDArray[np.int64]]:
    """Select positions in the source's pool for train, val and, if the source has no test split, test.

    Each class is shuffled. Its first images are train, its last ones test, and val lies before test. So subsets are
    nested over rho, and the splits never overlap. With val_capped, the training set differs from the one without val
    only in classes that val does not leave enough images. Without --test-per-class, a class holds out 20 per cent
    (rounded), at most 10 images. Every class keeps at least one training image. The positions are stacked class by
    class.
    """
    names, rho, num_val = source.class_names, request.rho, request.val_per_class
    order = shuffled_by_class(source.pool.labels, len(names), request.subset_seed)
    available = np.array([len(positions) for positions in order])
    if empty := [names[c] for c in np.flatnonzero(available == 0)]:
        raise InputError(f"classes without a training image: {', '.join(empty)}", fix="take them out of the source")
    held_test = np.zeros_like(available)
    if source.test is None:
        share = np.minimum(10, (available * 0.2 + 0.5).astype(np.int64))
        held_test = np.minimum(share if request.test_per_class is None else request.test_per_class, available - 1)
    left = available - held_test - num_val
    if left.min() < 1:
        smallest = int(left.argmin())
        raise InputError(
            f'class "{names[smallest]}" has {available[smallest]} images; '
            f"holding out {held_test[smallest] + num_val} leaves none to train on",
            fix="lower --test-per-class or --val-per-class",
        )
    counts = left
    if rho is not None and request.profile is not None:
        shaped = PROFILES[request.profile](left + num_val if request.val_capped else left, rho)
        counts = np.minimum(shaped, left)
    if counts.min() < 1:
        raise InputError(
            f"rho {rho:g} leaves no image in {int((counts < 1).sum())} classes (largest class: {counts.max()} images)",
            fix=f"choose --rho {counts.max()} or less",
        )
    train, val, test = [], [], []
    for positions, n, held in zip(order, counts, held_test, strict=True):
        end = len(positions) - held
        train.append(positions[:n])
        val.append(positions[end - num_val : end])
        test.append(positions[end:])
    return {"train": np.concatenate(train), "val": np.concatenate(val), "test": np.concatenate(test)}


@contextmanager
def _unreadable_listed_beside(folder: Path) -> Iterator[None]:
    """If a message cannot show all unreadable image files, list them in a file next to the output folder."""
    path = folder.with_name(f"{folder.name}-unreadable.txt")
    try:
        yield
    except UnreadableImages as fault:
        if len(fault.lines) <= SHOWN:
            raise
        artifacts.make_folder(path.parent)
        artifacts.publish(path, "".join(f"{line}\n" for line in fault.lines).encode(errors="surrogateescape"))
        raise UnreadableImages(fault.lines, shown=SHOWN, listed_in=path) from fault
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _write(
    folder: Path,
    lock: locks.Lock,
    name: str,
    request: DatasetRequest,
    source: Source,
    splits: Mapping[str, Split],
    stored: storage.Stored,
) -> None:
    """Publish the lists, the class counts, and dataset.json last."""
    files = dict(stored.files)
    digests: dict[str, Any] = {}
    for split, part in splits.items():
        columns: dict[str, Any] = {"sample_id": np.arange(len(part.labels)), "label": part.labels}
        columns |= {"path": part.paths} if source.root else {"source_index": part.positions}
        listed = f"{split}.parquet"
        files[listed] = tables.publish_table(folder / listed, tables.split_schema(source.root is not None), columns)
        # A digest of the content, because another pyarrow may write other Parquet bytes.
        pairs = np.stack([part.labels, part.positions]).astype("<i8").tobytes()
        digests[split] = {"list": artifacts.sha256(pairs), **stored.digests[split]}

    counts, num_test = (
        np.bincount(splits[name].labels, minlength=len(source.class_names)) for name in ("train", "test")
    )
    groups = [group_of(int(n), few_inclusive=request.few_inclusive) for n in counts]
    files[artifacts.CLASS_COUNTS] = tables.publish_table(
        folder / artifacts.CLASS_COUNTS,
        tables.CLASS_COUNTS_SCHEMA,
        {
            "class_id": np.arange(len(counts)),
            "class_name": source.class_names,
            "num_train": counts,
            "num_test": num_test,
            "group": groups,
        },
    )
    record = {
        "format": records.FORMAT,
        "name": name,
        **request.model_dump(exclude_defaults=True),
        "classes": source.class_names,
        "num_train": int(counts.sum()),
        "num_test": int(num_test.sum()),
        "shape": stored.shape,
        "mean": stored.mean,
        "std": stored.std,
        "groups": {g: groups.count(g) for g in GROUPS},
        "recipe": source.recipe,
        "files": files,
        **stored.keys,
        "data_root": str(source.root.resolve()) if source.root else None,
        "source_files": {p.name: artifacts.sha256(artifacts.read_bytes(p)) for p in source.files},
        "fingerprint": artifacts.digest({"classes": source.class_names, "splits": digests}),
    }
    lock.check()
    records.publish_record(folder / artifacts.DATASET, record)


# -- a finished data set -----------------------------------------------------------------------------------------------


def _check_existing(dataset: Dataset, request: DatasetRequest) -> None:
    """Check that an existing data set is the requested one and undamaged; pack missing shards again."""
    recorded = dataset.record.model_dump(include=set(DatasetRequest.model_fields))
    if changed := differences(recorded, request.model_dump()):
        raise EnvironmentFault(
            f"{dataset.folder} holds another data set:{indented(changed)}",
            fix="write elsewhere with --out FOLDER, or replace it with --overwrite",
        )
    artifacts.verify(dataset.folder, dataset.record.files)
    if dataset.storage == "shards":
        _repair(dataset)
    locks.tidy(dataset.folder)


def _repair(dataset: Dataset) -> None:
    """Pack missing or truncated shards again, and check them against the recorded hashes."""
    assert dataset.data_root is not None
    for split in dataset.splits:
        recorded = dataset.recorded_shards(split)
        if not recorded.missing():
            continue
        paths = dataset.samples(split)["path"].tolist()
        with _unreadable_listed_beside(dataset.folder), locks.hold(dataset.folder, wait=True) as lock:
            missing = recorded.missing()  # another process may have packed some while this one waited
            console.note(f"packing {len(missing)} missing shards of {split} again")
            sizes = np.zeros(len(paths), dtype=np.int64)
            packing = shards.Packing(
                *(dataset.folder, split, dataset.data_root, paths, sizes),
                *(dataset.shape[0], dataset.upright, dataset.record.shard_images),
            )
            packing.pack(missing, lock, expected=recorded.hashes)
            storage.clear(dataset.folder, dataset)


def _verify(dataset: Dataset) -> None:
    """Check every packed image, or the header of every image file."""
    if dataset.storage == "shards":
        for split in dataset.splits:
            dataset.shards(split).verify()
    elif dataset.storage == "files":
        with _unreadable_listed_beside(dataset.folder):
            check_headers([path for split in dataset.splits for path in dataset.paths(split)])


def _num_duplicates(dataset: Dataset) -> int:
    """Count test images with the pixels of a training image; 0 for images left in their files."""
    if dataset.storage == "files":
        return 0
    in_shards = dataset.storage == "shards"
    images = [dataset.shards(s).hashes if in_shards else dataset.read(s)[0].numpy() for s in ("train", "test")]
    known = {image.tobytes() for image in images[0]}
    return sum(image.tobytes() in known for image in images[1])


def _show(dataset: Dataset, status: str) -> None:
    record, counts = dataset.record, dataset.class_counts
    groups = record.groups
    medium, few = ("21..100", "<=20") if record.few_inclusive else ("20..100", "<20")
    num_val = len(dataset.labels("val")) if "val" in dataset.splits else 0
    fields = {
        "status": status,
        "folder": str(dataset.folder),
        "num_classes": len(counts),
        "num_train": record.num_train,
        "num_val": num_val,
        "num_test": record.num_test,
        "largest": int(counts.max()),
        "smallest": int(counts.min()),
        "groups": groups,
        "fingerprint": record.fingerprint,
    }
    shown = f"many (>100) {groups['many']}, medium ({medium}) {groups['medium']}, few ({few}) {groups['few']}"
    lines = [
        *console.histogram(counts.tolist(), record.classes),
        "",
        f"{record.name}: {record.num_train:,} training{f', {num_val:,} val' if num_val else ''} and "
        f"{record.num_test:,} test images, "
        f"{len(counts)} classes, largest {counts.max()}, smallest {counts.min()} "
        f"(ratio {counts.max() / counts.min():.4g})",
        f"groups: {shown} classes",
        f"{status}: {dataset.folder}",
    ]
    console.result(fields, lines=lines)
    console.follow(console.typed("train-stage1", "--data", dataset.folder, "--out", f"ckpt/{record.name}"))
