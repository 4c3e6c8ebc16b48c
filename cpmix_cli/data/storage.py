"""Storage of a data set's images: as one tensor per split, as shards, or in their original files; see Storage."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    make_folder,
    replace_together,
    sha256,
    staging,
)
from cpmix_cli.artifacts.tensors import publish_tensors
from cpmix_cli.data import shards
from cpmix_cli.data.dataset import SPLITS, Dataset, Storage, open_dataset
from cpmix_cli.data.decoding import (
    UnreadableImages,
    check_headers,
    content_hashes,
    of_all,
    read_squares,
    sizes_and_times,
)
from cpmix_cli.data.splits import Source, Split
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

_PACKING = ".cpmix-packing"
"""Folder of the shards that are to replace a finished data set."""


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
    digests = {name: {"paths": digest(split.paths)} for name, split in splits.items()}
    files: dict[str, str] = {}
    for name, (sizes, times) in ((name, rows.T) for name, rows in seen.items()):
        digests[name]["content"] = sha256(b"".join(hashes[name]))
        columns = {"sample_id": np.arange(len(sizes)), "size": sizes, "changed_ns": times, "sha256": hashes[name]}
        files[f"{name}-{SEEN}"] = tables.publish_table(folder / f"{name}-{SEEN}", tables.SEEN_SCHEMA, columns)
    return Stored([size, size, 3], [], [], files, digests)


_OF_SPLIT = (
    *("packing-{0}-*.json", "{0}-[0-9][0-9][0-9][0-9][0-9].shard"),
    *(f"{{0}}-{HASHES}", f"{{0}}-{SEEN}", "{0}.safetensors", "{0}.parquet"),
)
OWN_FILES = (DATASET, CLASS_COUNTS, LEFT_OUT, *(name.format(split) for split in SPLITS for name in _OF_SPLIT))
"""Names and patterns of all files that build-lt writes into or removes from a data set folder."""


@contextmanager
def place_for(folder: Path, splits: Mapping[str, Split], kind: Storage, size: int) -> Iterator[Path]:
    """Yield the folder to write a data set to: `folder`, or, if it has a finished one, a folder in it.

    At the end, the new files replace the finished data set, which can be used until then. Shards that do not fit on the
    disk beside the old ones are written in place of them: the old data set is removed first. The shards of an
    interrupted build stay, for the same command to go on from.

    Args:
        folder: folder of the data set; the caller holds its lock.
        splits: split -> samples.
        kind: storage of the images.
        size: side of packed images in pixels.

    Raises:
        EnvironmentFault: a file cannot be written.
    """
    packing = folder / _PACKING
    if not is_there(folder / DATASET):
        yield folder
    elif kind != "shards":
        with staging(folder) as place:
            yield place
            _replace(folder, place)
    else:
        needed = sum(len(split.labels) for split in splits.values()) * 3 * size**2
        packed = sum(path.stat().st_size for path in packing.glob("*.shard"))
        if shutil.disk_usage(folder).free >= needed - packed:
            make_folder(packing)
            yield packing
            _replace(folder, packing)
        else:
            console.note(f"{folder}: no room for {needed:,} bytes beside the old images, which are removed first")
            (folder / DATASET).unlink()
            clear(folder)
            yield folder
    shutil.rmtree(packing, ignore_errors=True)
    clear(folder, open_dataset(folder))


def _replace(folder: Path, place: Path) -> None:
    """Move the files of a data set, without the records of its packing, to its folder."""
    written = sorted(place.iterdir(), key=lambda path: (path.name == DATASET, path.name))
    new = [(path, folder / path.name) for path in written if not path.name.startswith("packing-")]
    replace_together(folder / DATASET, new)


def clear(folder: Path, dataset: Dataset | None = None) -> None:
    """Remove the files of a data set from a folder, except those of `dataset`, if it is given."""
    keep = {DATASET, *dataset.record.files} if dataset is not None else set()
    if dataset is not None and dataset.storage == "shards":
        for split in dataset.splits:
            recorded = dataset.recorded_shards(split)
            keep |= {recorded.path(number).name for number in range(recorded.num_shards)}
    for name in OWN_FILES:
        for path in folder.glob(name):
            if path.name not in keep:
                path.unlink(missing_ok=True)
