"""Storage of a data set's images: as one tensor per split, as shards, or in their original files; see Storage."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpmix_cli.artifacts import locks, tables
from cpmix_cli.artifacts.files import (
    CLASS_COUNTS,
    DATASET,
    HASHES,
    LEFT_OUT,
    SEEN,
    check_place,
    digest,
    is_there,
    sha256,
)
from cpmix_cli.artifacts.tensors import publish_tensors
from cpmix_cli.data import shards
from cpmix_cli.data.dataset import SPLITS, Dataset
from cpmix_cli.data.decoding import (
    UnreadableImages,
    check_headers,
    content_hashes,
    of_all,
    read_squares,
    sizes_and_times,
)
from cpmix_cli.data.splits import Source, Split
from cpmix_cli.runtime.errors import InputError


def take(source: Source, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, Split]:
    """Return the splits of a data set: split -> samples. An empty val split is left out.

    A test or val split of the source is used whole. The other splits are the positions `parts` [n] of its pool.
    """
    of_source = {"train": None, "val": source.val, "test": source.test}
    splits = {name: split or source.pool.take(parts[name]) for name, split in of_source.items()}
    return {name: split for name, split in splits.items() if len(split.labels) or name != "val"}


def look_for_files(root: Path, splits: Mapping[str, Split]) -> dict[str, NDArray[np.int64]]:
    """Return bytes and time of the last change in ns of each image file: split -> [N, 2].

    Raises:
        UnreadableImages: lists the files that are missing, empty or not files; then also those that are no images.
        InputError: all files are missing.
    """
    paths = _files(root, splits.values())
    try:
        seen = sizes_and_times(paths)
    except UnreadableImages as fault:
        if len(fault.lines) < len(paths):
            lost = {line.rpartition(": ")[0] for line in fault.lines}
            try:  # those that are there, so that one message names all
                check_headers([path for path in paths if str(path) not in lost])
            except UnreadableImages as more:
                raise UnreadableImages([*fault.lines, *more.lines]) from more
            raise
        raise InputError(
            f"none of the {len(paths):,} image files is there; the first would be {paths[0]}",
            fix="give the folder that their paths start from with --data-root FOLDER",
        ) from fault
    ends = np.cumsum([len(split.labels) for split in splits.values()])
    return dict(zip(splits, np.split(seen, ends[:-1]), strict=True))


def _files(root: Path, splits: Iterable[Split]) -> list[Path]:
    return [root / path for split in splits for path in split.paths]


@dataclass(frozen=True)
class Stored:
    """Record of the images that were written for a data set."""

    shape: list[int]
    """Shape of an image [H, W, channels] or point [D]."""
    mean: list[float]
    """Mean per channel of the training images on the scale 0..1; empty if not computed."""
    std: list[float]
    """Standard deviation per channel, as for `mean`."""
    files: dict[str, str]
    """File name -> sha256."""
    digests: dict[str, dict[str, str]]
    """Split -> digests that enter the fingerprint, besides labels and positions."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Further fields of dataset.json."""


def store_tensors(folder: Path, splits: Mapping[str, Split], root: Path | None, size: int) -> Stored:
    """Write each split to one safetensors file with its pixels or points, and its labels.

    Args:
        folder: folder of the data set.
        splits: split -> samples.
        root: folder of the image files; None if samples are not files.
        size: side in pixels of the squares that image files are resized and cropped to.

    Raises:
        UnreadableImages: lists every file that cannot be read.
        EnvironmentFault: a file cannot be written.
    """

    def load(split: Split) -> NDArray[Any]:
        return split.load() if root is None else read_squares(_files(root, [split]), size)

    loaded = dict(zip(splits, of_all(partial(load, split) for split in splits.values()), strict=True))
    check_place(folder, sum(loaded[name].nbytes + 64 * len(split.labels) for name, split in splits.items()))
    (folder / DATASET).unlink(missing_ok=True)
    files: dict[str, str] = {}
    for name, split in splits.items():
        kind = "images" if loaded[name].dtype == np.uint8 else "points"
        tensors = {kind: torch.from_numpy(loaded[name]), "labels": torch.from_numpy(split.labels)}
        files[f"{name}.safetensors"] = publish_tensors(folder / f"{name}.safetensors", tensors)
    images, mean, std = loaded["train"], [], []
    if images.dtype == np.uint8:
        channels = torch.from_numpy(images.reshape(-1, images.shape[-1])).to(torch.float64) / 255
        mean, std = channels.mean(0).tolist(), channels.std(0, correction=0).tolist()
    digests = {name: {"packed": files[f"{name}.safetensors"]} for name in splits}
    return Stored(list(images.shape[1:]), mean, std, files, digests)


def store_shards(
    folder: Path,
    lock: locks.Lock,
    splits: Mapping[str, Split],
    root: Path,
    seen: Mapping[str, NDArray[np.int64]],
    size: int,
    upright: bool,
) -> Stored:
    """Write the images of all splits as shards. Finished shards of an interrupted build of the same images are kept.

    Args:
        folder: folder of the data set.
        lock: lock on the folder.
        splits: split -> samples.
        root: folder of the image files.
        seen: split -> bytes and time of each image file [N, 2]; see look_for_files().
        size: side of the packed squares, in pixels.
        upright: rotate images by their EXIF tag; see decoding.py.

    Raises:
        UnreadableImages: lists every file that is not an image.
        EnvironmentFault: a shard cannot be written.
    """
    if is_there(folder / DATASET):  # a finished data set is replaced; its disk space is needed
        (folder / DATASET).unlink()
        clear(folder)
    packings = {
        name: shards.Packing(folder, name, root, split.paths, seen[name], size, upright, shards.SHARD_IMAGES)
        for name, split in splits.items()
    }
    left = {split: packing.left() for split, packing in packings.items()}
    check_place(
        folder,
        sum(packing.num_bytes(left[split]) + 512 * len(packing.paths) for split, packing in packings.items()),
        largest_file=max(packing.num_bytes([0]) for packing in packings.values()),
    )
    of_all(partial(packing.pack, left[split], lock) for split, packing in packings.items())
    files, digests = {}, {}
    for split, packing in packings.items():
        columns = {"sample_id": np.arange(len(packing.paths)), "sha256": [row.tobytes() for row in packing.hashes]}
        name = f"{split}-{HASHES}"
        files[name] = tables.publish_table(folder / name, tables.HASHES_SCHEMA, columns)
        digests[split] = {"packed": sha256(packing.hashes.tobytes()), "paths": digest(packing.paths)}
    mean, std = packings["train"].statistics()
    return Stored([size, size, 3], mean, std, files, digests, {"shard_images": shards.SHARD_IMAGES})


def store_files(
    folder: Path, splits: Mapping[str, Split], root: Path, size: int, seen: Mapping[str, NDArray[np.int64]]
) -> Stored:
    """Check the header of each image file, and hash a user's own files; the images stay there.

    Args:
        folder: folder of the data set.
        splits: split -> samples.
        root: folder of the image files.
        size: side in pixels of the squares that are read for tests.
        seen: split -> bytes and time of each image file [N, 2], to be recorded; empty for published sets.

    Raises:
        UnreadableImages: lists every file whose header is not that of an image.
    """
    check_headers(_files(root, splits.values()))
    hashes = {name: content_hashes(_files(root, [splits[name]])) for name in seen}
    (folder / DATASET).unlink(missing_ok=True)
    digests = {name: {"paths": digest(split.paths)} for name, split in splits.items()}
    files: dict[str, str] = {}
    for name, (sizes, times) in ((name, rows.T) for name, rows in seen.items()):
        digests[name]["content"] = sha256(b"".join(hashes[name]))
        columns = {"sample_id": np.arange(len(sizes)), "size": sizes, "changed_ns": times, "sha256": hashes[name]}
        files[f"{name}-{SEEN}"] = tables.publish_table(folder / f"{name}-{SEEN}", tables.SEEN_SCHEMA, columns)
    return Stored([size, size, 3], [], [], files, digests)


_IMAGES = (
    *("packing-{0}-*.json", "{0}-[0-9][0-9][0-9][0-9][0-9].shard"),
    *(f"{{0}}-{HASHES}", f"{{0}}-{SEEN}", "{0}.safetensors"),
)
OWN_FILES = (
    *(DATASET, CLASS_COUNTS, LEFT_OUT),
    *(f"{split}.parquet" for split in SPLITS),
    *(name.format(split) for split in SPLITS for name in _IMAGES),
)
"""Names and patterns of all files that build-lt writes into or removes from a data set folder."""


def clear(folder: Path, dataset: Dataset | None = None) -> None:
    """Remove packing records and stored images from a folder, except the images of `dataset`."""
    keep = set(dataset.record.files) if dataset is not None else set()
    if dataset is not None and dataset.storage == "shards":
        for split in dataset.splits:
            recorded = dataset.recorded_shards(split)
            keep |= {recorded.path(number).name for number in range(recorded.num_shards)}
    for split in SPLITS:
        for name in _IMAGES:
            for path in folder.glob(name.format(split)):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
