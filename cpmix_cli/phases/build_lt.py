"""build-lt: a long-tailed data set folder from a source."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpmix_cli import artifacts, console, locks
from cpmix_cli.data.dataset import channel_statistics, open_dataset
from cpmix_cli.data.decoding import UnreadableImages
from cpmix_cli.data.download import download
from cpmix_cli.data.longtail import GROUPS, PROFILES, group_of, shuffled_by_class
from cpmix_cli.data.sources import IMAGE_SIZE, SOURCES, Source, places
from cpmix_cli.errors import EnvironmentFault, InputError, UsageError, suggest
from cpmix_cli.recipe import differences


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    source: str
    rho: float | None
    out: Path | None
    data_root: Path | None
    subset_seed: int
    val_per_class: int
    test_per_class: int | None
    image_size: int | None
    download: bool
    overwrite: bool


def run(options: Options) -> None:
    """Choose images, pack them, and say what came out.

    Raises:
        UsageError: unknown source, a number out of range, or a flag that the source does not have.
        InputError: source files missing or damaged, or too few images for what is asked.
        EnvironmentFault: the folder holds another data set, or cannot be written; the network, with --download.
    """
    if options.source not in SOURCES:
        raise UsageError(f'no source "{options.source}".{suggest(options.source, SOURCES)}', needed_by="build-lt")
    if options.rho is not None and not options.rho >= 1:
        raise UsageError(f"--rho {options.rho:g}: the imbalance factor is 1 or more")
    if options.image_size is not None and options.source != "image-folder":
        raise UsageError(f"--image-size: the images of {options.source} have one size", fix="drop the flag")
    if options.download:
        download(options.source, places(options.source, options.data_root)[0])
    size = options.image_size or IMAGE_SIZE
    source = SOURCES[options.source](options.data_root, size)
    rho = options.rho if options.rho is not None else source.default_rho
    if source.test is not None and options.test_per_class is not None:
        raise UsageError(f"--test-per-class: {options.source} has its own test split", fix="drop the flag")
    test_per_class = options.test_per_class or source.test_per_class

    name = folder_name(options, source, rho)
    folder = options.out or Path("data") / name
    made_from = {
        "source": options.source,
        "rho": rho,
        "profile": source.profile if rho is not None else None,
        "subset_seed": options.subset_seed,
        "val_per_class": options.val_per_class,
        "test_per_class": test_per_class,
        "image_size": size if source.own else None,
        "listing": source.own.listing if source.own else None,
    }
    if not options.overwrite and artifacts.is_there(folder / artifacts.DATASET):
        _report_existing(folder, made_from)
        return

    parts = choose(source, rho, options.subset_seed, options.val_per_class, test_per_class)
    counts = np.bincount(source.pool.labels[parts["train"]], minlength=len(source.class_names))
    artifacts.check_place(folder, 0)
    with locks.hold(folder, wait=True) as lock:
        if not options.overwrite and artifacts.is_there(folder / artifacts.DATASET):  # while this one waited
            _report_existing(folder, made_from)
            return
        splits = _load(source, parts)
        artifacts.check_place(folder, sum(inputs.nbytes + 64 * len(labels) for inputs, labels, _ in splits.values()))
        record = _write(folder, lock, name, made_from, source, splits, counts)
    warning = _duplicates(folder, record)
    if warning:
        console.warn(warning)
    _show(folder, record, counts, "built")


def folder_name(options: Options, source: Source, rho: float | None) -> str:
    """Source, rho and all that is not the default, such as cifar100-lt-rho200-seed1."""
    name = options.source
    if source.own:
        name += "-" + re.sub(r"[^\w.-]+", "-", source.own.root.resolve().name)
    if rho is not None:
        name += f"-lt-rho{rho:g}"
    if options.image_size is not None:
        name += f"-{options.image_size}px"
    if options.subset_seed:
        name += f"-seed{options.subset_seed}"
    if options.val_per_class:
        name += f"-val{options.val_per_class}"
    if options.test_per_class:
        name += f"-test{options.test_per_class}"
    return name


def choose(
    source: Source, rho: float | None, subset_seed: int, val_per_class: int, test_per_class: int | None
) -> dict[str, NDArray[np.int64]]:
    """Positions in the source's pool for train, val and (where the source has no test split) test.

    Train is a prefix of each class's shuffled order, test its end, val what stands before test: so subsets are nested
    over rho and the three never overlap. A class too small for its test images keeps one to train on.

    Args:
        source: the set.
        rho: imbalance factor, or None for all images.
        subset_seed: of the shuffled order.
        val_per_class: images of each class held out as val.
        test_per_class: held out as test; None: the smaller of 10 and 20 per cent, rounded.

    Returns:
        {"train": [N], "val": [...], "test": [...]}, stacked class by class.

    Raises:
        InputError: a class has too few images.
    """
    names = source.class_names
    order = shuffled_by_class(source.pool.labels, len(names), subset_seed)
    available = np.array([len(positions) for positions in order])
    if empty := [names[c] for c in np.flatnonzero(available == 0)]:
        raise InputError(f"classes without a training image: {', '.join(empty)}", fix="take them out of the source")
    held_test = np.zeros_like(available)
    if source.test is None:
        share = np.minimum(10, (available * 0.2 + 0.5).astype(np.int64))
        held_test = np.minimum(share if test_per_class is None else test_per_class, available - 1)
    left = available - held_test - val_per_class
    if left.min() < 1:
        smallest = int(left.argmin())
        raise InputError(
            f'class "{names[smallest]}" has {available[smallest]} images; '
            f"holding out {held_test[smallest] + val_per_class} leaves none to train on",
            fix="lower --test-per-class or --val-per-class",
        )
    counts = left if rho is None else PROFILES[source.profile](left, rho)
    if counts.min() < 1:
        raise InputError(
            f"rho {rho:g} leaves no image in {int((counts < 1).sum())} classes (largest class: {counts.max()} images)",
            fix=f"choose --rho {counts.max()} or less",
        )
    train = [positions[:n] for positions, n in zip(order, counts, strict=True)]
    val = [p[len(p) - held - val_per_class : len(p) - held] for p, held in zip(order, held_test, strict=True)]
    test = [p[len(p) - held :] for p, held in zip(order, held_test, strict=True)]
    return {k: np.concatenate(v) for k, v in (("train", train), ("val", val), ("test", test))}


Splits = dict[str, tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]]
"""Inputs, labels and positions in the source of each split."""


def _load(source: Source, parts: dict[str, NDArray[np.int64]]) -> Splits:
    """The chosen samples.

    Raises:
        UnreadableImages: with all files of all splits that cannot be read.
    """
    origins = {"train": source.pool, "val": source.pool, "test": source.test or source.pool}
    if source.test is not None:
        parts["test"] = np.arange(len(source.test.labels))
    splits: Splits = {}
    unreadable: list[str] = []
    for split, origin in origins.items():
        positions = parts[split]
        if len(positions) or split != "val":
            try:
                splits[split] = origin.load(positions), origin.labels[positions].astype(np.int64), positions
            except UnreadableImages as fault:
                unreadable += fault.lines
    if unreadable:
        raise UnreadableImages(unreadable)
    return splits


def _write(
    folder: Path,
    lock: locks.Lock,
    name: str,
    made_from: dict[str, Any],
    source: Source,
    splits: Splits,
    counts: NDArray[np.int64],
) -> dict[str, Any]:
    """All files of the data set, dataset.json last."""
    (folder / artifacts.DATASET).unlink(missing_ok=True)
    files: dict[str, str] = {}
    digests: dict[str, Any] = {}
    for split, (inputs, labels, positions) in splits.items():
        kind = "images" if inputs.dtype == np.uint8 else "points"
        packed, listed = f"{split}.safetensors", f"{split}.parquet"
        tensors = {kind: torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        files[packed] = artifacts.publish_tensors(folder / packed, tensors)
        columns: dict[str, Any] = {"sample_id": np.arange(len(labels)), "label": labels}
        if source.own:
            paths = source.own.test_paths if split == "test" else source.own.paths
            columns["path"] = [paths[i] for i in positions]
        else:
            columns["source_index"] = positions
        files[listed] = artifacts.publish_table(folder / listed, artifacts.split_schema(bool(source.own)), columns)
        # Of the content and not of the Parquet bytes, which another pyarrow may write differently.
        chosen = np.stack([labels, positions]).astype("<i8").tobytes()
        digests[split] = {"list": artifacts.sha256(chosen), "packed": files[packed]}

    num_test = np.bincount(splits["test"][1], minlength=len(counts))
    groups = [group_of(int(n)) for n in counts]
    files[artifacts.CLASS_COUNTS] = artifacts.publish_table(
        folder / artifacts.CLASS_COUNTS,
        artifacts.CLASS_COUNTS_SCHEMA,
        {
            "class_id": np.arange(len(counts)),
            "class_name": source.class_names,
            "num_train": counts,
            "num_test": num_test,
            "group": groups,
        },
    )
    images = splits["train"][0]
    mean: list[float] = []
    std: list[float] = []
    if images.dtype == np.uint8:
        mean, std = channel_statistics(torch.from_numpy(images))
    record = {
        "format": artifacts.FORMAT,
        "name": name,
        **made_from,
        "classes": source.class_names,
        "num_train": int(counts.sum()),
        "num_test": int(num_test.sum()),
        "shape": list(images.shape[1:]),
        "mean": mean,
        "std": std,
        "groups": {g: groups.count(g) for g in GROUPS},
        "recipe": source.recipe,
        "files": files,
        "data_root": str(source.own.root.resolve()) if source.own else None,
        "source_files": {p.name: artifacts.sha256(artifacts.read_bytes(p)) for p in source.files},
        "fingerprint": artifacts.digest({"classes": source.class_names, "splits": digests}),
    }
    lock.check()
    artifacts.publish_record(folder / artifacts.DATASET, record)
    return record


def _report_existing(folder: Path, made_from: dict[str, Any]) -> None:
    """Say up to date, or refuse a folder of another data set."""
    dataset = open_dataset(folder, needed_by="build-lt")
    found = {key: dataset.record.get(key) for key in made_from}
    if changed := differences(found, made_from):
        raise EnvironmentFault(
            f"{folder} holds another data set:\n    " + "\n    ".join(changed),
            fix="write elsewhere with --out FOLDER, or replace it with --overwrite",
        )
    artifacts.verify(folder, dataset.record["files"])
    locks.tidy(folder)
    _show(folder, dataset.record, dataset.class_counts, "up to date")


def _duplicates(folder: Path, record: dict[str, Any]) -> str | None:
    """A warning where test images also stand in the training set."""
    dataset = open_dataset(folder, needed_by="build-lt")
    train = {image.numpy().tobytes() for image in dataset.read("train")[0]}
    shared = sum(image.numpy().tobytes() in train for image in dataset.read("test")[0])
    if not shared:
        return None
    return f"{shared} of {record['num_test']} test images are identical to a training image"


def _show(folder: Path, record: dict[str, Any], counts: NDArray[np.int64], status: str) -> None:
    groups = record["groups"]
    fields = {
        "command": "build-lt",
        "status": status,
        "folder": str(folder),
        "num_classes": len(counts),
        "num_train": record["num_train"],
        "num_test": record["num_test"],
        "largest": int(counts.max()),
        "smallest": int(counts.min()),
        "groups": groups,
        "fingerprint": record["fingerprint"],
    }
    lines = [
        *console.histogram(counts.tolist(), record["classes"]),
        "",
        f"{record['name']}: {record['num_train']:,} training and {record['num_test']:,} test images, "
        f"{len(counts)} classes, largest {counts.max()}, smallest {counts.min()} "
        f"(ratio {counts.max() / counts.min():.4g})",
        f"groups: many (>100) {groups['many']}, medium (20..100) {groups['medium']}, few (<20) {groups['few']} classes",
        f"{status}: {folder}",
    ]
    console.result(fields, lines=lines)
    following = console.typed("train-stage1", "--data", folder, "--out", f"ckpt/{record['name']}")
    console.note(f"next: {following}")
