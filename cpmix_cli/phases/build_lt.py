"""build-lt: a long-tailed data set folder from a source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpmix_cli import artifacts, console
from cpmix_cli.data.dataset import channel_statistics, open_dataset
from cpmix_cli.data.longtail import GROUPS, PROFILES, group_of, shuffled_by_class
from cpmix_cli.data.sources import SOURCES, Source
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
    overwrite: bool


def run(options: Options) -> None:
    """Choose images, pack them, and say what came out.

    Raises:
        UsageError: unknown source, or a number out of range.
        InputError: source files missing or damaged, or too few images for what is asked.
        EnvironmentFault: the folder holds another data set, or cannot be written.
    """
    if options.source not in SOURCES:
        raise UsageError(f'no source "{options.source}".{suggest(options.source, SOURCES)}', needed_by="build-lt")
    if options.rho is not None and not options.rho >= 1:
        raise UsageError(f"--rho {options.rho:g}: the imbalance factor is 1 or more")
    source = SOURCES[options.source](options.data_root)
    rho = options.rho if options.rho is not None else source.default_rho
    if source.test_labels is not None and options.test_per_class is not None:
        raise UsageError(f"--test-per-class: {options.source} has its own test split", fix="drop the flag")
    test_per_class = options.test_per_class or source.test_per_class

    name = folder_name(options, rho)
    folder = options.out or Path("data") / name
    made_from = {
        "source": options.source,
        "rho": rho,
        "profile": source.profile if rho is not None else None,
        "subset_seed": options.subset_seed,
        "val_per_class": options.val_per_class,
        "test_per_class": test_per_class,
    }
    if not options.overwrite and (folder / artifacts.DATASET).is_file():
        _report_existing(folder, made_from)
        return

    parts = choose(source, rho, options.subset_seed, options.val_per_class, test_per_class)
    counts = np.bincount(source.labels[parts["train"]], minlength=len(source.class_names))
    record = _write(folder, name, made_from, source, parts, counts)
    warning = _duplicates(folder, record)
    if warning:
        console.warn(warning)
    _show(folder, record, counts, "built")


def folder_name(options: Options, rho: float | None) -> str:
    """Source, rho and all that is not the default, such as cifar100-lt-rho200-seed1."""
    name = options.source if rho is None else f"{options.source}-lt-rho{rho:g}"
    if options.subset_seed:
        name += f"-seed{options.subset_seed}"
    if options.val_per_class:
        name += f"-val{options.val_per_class}"
    if options.test_per_class:
        name += f"-test{options.test_per_class}"
    return name


def choose(
    source: Source, rho: float | None, subset_seed: int, val_per_class: int, test_per_class: int
) -> dict[str, NDArray[np.int64]]:
    """Positions in the source's pool for train, val and (where the source has no test split) test.

    Train is a prefix of each class's shuffled order, test its end, val what stands before test: so subsets are nested
    over rho and the three never overlap.

    Returns:
        {"train": [N], "val": [...], "test": [...]}, stacked class by class.

    Raises:
        InputError: a class has too few images.
    """
    order = shuffled_by_class(source.labels, subset_seed)
    held_test = test_per_class if source.test_labels is None else 0
    held = held_test + val_per_class
    left = [len(positions) - held for positions in order]
    smallest = int(np.argmin(left))
    if left[smallest] < 1:
        raise InputError(
            f'class "{source.class_names[smallest]}" has {len(order[smallest])} images; '
            f"holding out {held} leaves none to train on",
            fix="lower --test-per-class or --val-per-class",
        )
    counts = np.array(left)
    if rho is not None:
        counts = PROFILES[source.profile](min(left), len(order), rho)
    if counts.min() < 1:
        raise InputError(
            f"rho {rho:g} leaves no image in {int((counts < 1).sum())} classes (largest class: {min(left)} images)",
            fix=f"choose --rho {min(left)} or less",
        )
    train = [positions[:n] for positions, n in zip(order, counts, strict=True)]
    val = [p[len(p) - held : len(p) - held_test] for p in order]
    test = [p[len(p) - held_test :] for p in order]
    return {k: np.concatenate(v) for k, v in (("train", train), ("val", val), ("test", test))}


def _write(
    folder: Path,
    name: str,
    made_from: dict[str, Any],
    source: Source,
    parts: dict[str, NDArray[np.int64]],
    counts: NDArray[np.int64],
) -> dict[str, Any]:
    """All files of the data set, dataset.json last."""
    splits = {"train": (source.load(parts["train"]), source.labels[parts["train"]], parts["train"])}
    if len(parts["val"]):
        splits["val"] = (source.load(parts["val"]), source.labels[parts["val"]], parts["val"])
    if source.test_labels is not None and source.load_test is not None:
        positions = np.arange(len(source.test_labels))
        splits["test"] = (source.load_test(positions), source.test_labels, positions)
    else:
        splits["test"] = (source.load(parts["test"]), source.labels[parts["test"]], parts["test"])

    artifacts.make_folder(folder)
    (folder / artifacts.DATASET).unlink(missing_ok=True)
    files: dict[str, str] = {}
    digests: dict[str, Any] = {}
    for split, (inputs, labels, positions) in splits.items():
        kind = "images" if inputs.dtype == np.uint8 else "points"
        labels = labels.astype(np.int64)
        packed, listed = f"{split}.safetensors", f"{split}.parquet"
        tensors = {kind: torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        files[packed] = artifacts.publish_tensors(folder / packed, tensors)
        columns = {"sample_id": np.arange(len(labels)), "label": labels, "source_index": positions}
        files[listed] = artifacts.publish_table(folder / listed, artifacts.SPLIT_SCHEMA, columns)
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
        "source_files": {p.name: artifacts.sha256(artifacts.read_bytes(p)) for p in source.files},
        "fingerprint": artifacts.digest({"classes": source.class_names, "splits": digests}),
    }
    artifacts.publish_record(folder / artifacts.DATASET, record)
    return record


def _report_existing(folder: Path, made_from: dict[str, Any]) -> None:
    """Say up to date, or refuse a folder of another data set."""
    dataset = open_dataset(folder, needed_by="build-lt")
    found = {key: dataset.record[key] for key in made_from}
    if changed := differences(found, made_from):
        raise EnvironmentFault(
            f"{folder} holds another data set:\n    " + "\n    ".join(changed),
            fix="write elsewhere with --out FOLDER, or replace it with --overwrite",
        )
    for name, sha in dataset.record["files"].items():
        artifacts.read_bytes(folder / name, sha)
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
    console.note(f"next: cpmix train-stage1 --data {folder} --out ckpt/{record['name']}")
