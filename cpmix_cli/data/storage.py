"""How the images of a data set are kept: in one tensor a split, in shards, or in their own files; see Storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpmix_cli.artifacts import locks, tables
from cpmix_cli.artifacts.files import DATASET, HASHES, check_place, digest, is_there, sha256
from cpmix_cli.artifacts.tensors import publish_tensors
from cpmix_cli.data import shards
from cpmix_cli.data.cifar import Split
from cpmix_cli.data.dataset import SPLITS, Dataset, channel_statistics
from cpmix_cli.data.decoding import UnreadableImages, check_headers, file_sizes
from cpmix_cli.data.sources import ImageFiles, Source
from cpmix_cli.runtime.errors import InputError


@dataclass(frozen=True)
class Chosen:
    """The images of a split."""

    origin: Split
    positions: NDArray[np.int64]
    """In the origin [n]."""
    labels: NDArray[np.int64]
    """Class of each image [n]."""
    paths: list[str] | None
    """Where the images are files."""


def chosen(source: Source, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, Chosen]:
    """The splits of a source's own, and what choose() took of its pool for the others; no empty val."""
    splits = {}
    for split, own in (("train", None), ("val", source.val), ("test", source.test)):
        origin = own or source.pool
        positions = parts[split] if own is None else np.arange(len(own.labels))
        paths = None
        if source.own is not None:
            of_val = source.own.val_paths if source.val is not None else source.own.paths
            listed = {"train": source.own.paths, "val": of_val, "test": source.own.test_paths}[split]
            paths = [listed[i] for i in positions]
        if len(positions) or split != "val":
            splits[split] = Chosen(origin, positions, origin.labels[positions].astype(np.int64), paths)
    return splits


def look_for_files(own: ImageFiles, splits: Mapping[str, Chosen]) -> dict[str, NDArray[np.int64]]:
    """Bytes of each image file, by split.

    Raises:
        InputError: none is there.
        UnreadableImages: with every file that is missing.
    """
    paths = [own.root / path for split in splits.values() for path in split.paths or ()]
    try:
        sizes = file_sizes(paths)
    except UnreadableImages as fault:
        if len(fault.lines) < len(paths):
            raise
        raise InputError(
            f"none of the {len(paths):,} image files is there; the first would be {paths[0]}",
            fix="give the folder that their paths start from with --data-root FOLDER",
        ) from fault
    ends = np.cumsum([len(split.labels) for split in splits.values()])
    return dict(zip(splits, np.split(sizes, ends[:-1]), strict=True))


@dataclass(frozen=True)
class Stored:
    """What was written of the images, and what is known of them."""

    shape: list[int]
    mean: list[float]
    std: list[float]
    files: dict[str, str]
    """Name -> sha256."""
    digests: dict[str, dict[str, str]]
    """What the fingerprint has of each split besides labels and positions."""
    keys: dict[str, Any]
    """More keys for dataset.json."""


def store_tensors(folder: Path, splits: Mapping[str, Chosen]) -> Stored:
    """All pixels (or points) of a split in one file.

    Raises:
        UnreadableImages: with all files of all splits that cannot be read.
    """
    loaded: dict[str, NDArray[Any]] = {}
    unreadable: list[str] = []
    for split, part in splits.items():
        try:
            loaded[split] = part.origin.load(part.positions)
        except UnreadableImages as fault:
            unreadable += fault.lines
    if unreadable:
        raise UnreadableImages(unreadable)
    check_place(folder, sum(loaded[s].nbytes + 64 * len(part.labels) for s, part in splits.items()))
    (folder / DATASET).unlink(missing_ok=True)
    files: dict[str, str] = {}
    for split, part in splits.items():
        kind = "images" if loaded[split].dtype == np.uint8 else "points"
        tensors = {kind: torch.from_numpy(loaded[split]), "labels": torch.from_numpy(part.labels)}
        files[f"{split}.safetensors"] = publish_tensors(folder / f"{split}.safetensors", tensors)
    images = loaded["train"]
    mean, std = channel_statistics(torch.from_numpy(images)) if images.dtype == np.uint8 else ([], [])
    digests = {split: {"packed": files[f"{split}.safetensors"]} for split in splits}
    return Stored(list(images.shape[1:]), mean, std, files, digests, {})


def store_shards(
    folder: Path,
    lock: locks.Lock,
    splits: Mapping[str, Chosen],
    own: ImageFiles,
    sizes: Mapping[str, NDArray[np.int64]],
    size: int,
    upright: bool,
) -> Stored:
    """Packed squares; shards that an earlier build of the same images finished are taken over.

    Raises:
        UnreadableImages: with all files of all splits that are no images.
    """
    if is_there(folder / DATASET):  # to be replaced: its room is needed
        (folder / DATASET).unlink()
        clear(folder)
    packings = {
        split: shards.Packing(folder, split, own.root, part.paths or [], sizes[split], size, upright)
        for split, part in splits.items()
    }
    left = {split: packing.left() for split, packing in packings.items()}
    check_place(
        folder,
        sum(packing.num_bytes(left[split]) + 512 * len(packing.paths) for split, packing in packings.items()),
        largest_file=max(packing.num_bytes([0]) for packing in packings.values()),
    )
    unreadable: list[str] = []
    for split, packing in packings.items():
        try:
            packing.pack(left[split], lock)
        except UnreadableImages as fault:
            unreadable += fault.lines
    if unreadable:
        raise UnreadableImages(unreadable)
    files, digests = {}, {}
    for split, packing in packings.items():
        columns = {"sample_id": np.arange(len(packing.paths)), "sha256": [row.tobytes() for row in packing.hashes]}
        name = f"{split}-{HASHES}"
        files[name] = tables.publish_table(folder / name, tables.HASHES_SCHEMA, columns)
        hashes = sha256(packing.hashes.tobytes())
        digests[split] = {"packed": hashes, "paths": digest(packing.paths)}
    mean, std = packings["train"].statistics()
    keys = {"shard_images": packings["train"].shard_images}
    return Stored([size, size, 3], mean, std, files, digests, keys)


def store_files(folder: Path, splits: Mapping[str, Chosen], own: ImageFiles, size: int) -> Stored:
    """Nothing but a look at each file: images stay where they are.

    Raises:
        UnreadableImages: with all that are no images.
    """
    check_headers([own.root / path for part in splits.values() for path in part.paths or ()])
    (folder / DATASET).unlink(missing_ok=True)
    digests = {split: {"paths": digest(part.paths)} for split, part in splits.items()}
    return Stored([size, size, 3], [], [], {}, digests, {})


def clear(folder: Path, dataset: Dataset | None = None) -> None:
    """Remove what packing needed, and images of a data set that was here before.

    Args:
        folder: of the data set.
        dataset: the one that is there now.
    """
    keep = set(dataset.record["files"]) if dataset is not None else set()
    if dataset is not None and dataset.storage == "shards":
        for split in dataset.splits:
            recorded = dataset.recorded_shards(split)
            keep |= {recorded.path(number).name for number in range(recorded.num_shards)}
    for split in SPLITS:
        images = (f"{split}-?????.shard", f"{split}-{HASHES}", f"{split}.safetensors")
        for pattern in (f"packing-{split}-*.json", *images):
            for path in folder.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
