"""Packed images: files of fixed-size records uint8 [S, S, 3], decoded once, and a sha256 for each image beside them.

A set may be larger than any memory: it is written image by image and read by pread, record by record (memory mapping
breaks on network file systems). An image is verified when a process first reads it.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cpmix_cli.artifacts import locks, records
from cpmix_cli.artifacts.files import digest, open_file, publishing, wait_for
from cpmix_cli.artifacts.records import Record
from cpmix_cli.data.decoding import SHOWN, in_threads, of_all, read_each, read_square
from cpmix_cli.runtime import console, signals
from cpmix_cli.runtime.errors import InputError, indented

SHARD_IMAGES = 2048
"""Images of a new shard: at 256 x 256 it has 403 MB, and iNaturalist 2018 has 226 of them."""
REPAIR = "delete that shard, then rerun its build-lt command, which packs missing shards again"


def shard_name(split: str, number: int) -> str:
    """File name of a shard, counted from 0."""
    return f"{split}-{number:05d}.shard"


class Shards:
    """The packed images of a split, for reading from many threads.

    Args:
        folder: of the data set.
        split: train, val or test.
        hashes: sha256 of each image, uint8 [N, 32].
        shape: of an image, [S, S, 3].
        shard_images: images of each shard but the last.
    """

    def __init__(
        self, folder: Path, split: str, hashes: NDArray[np.uint8], shape: Sequence[int], shard_images: int
    ) -> None:
        self._files: dict[int, int] = {}
        self.shape = list(shape)
        self._folder = folder
        self._split = split
        self.hashes = hashes
        self._shard_images = shard_images
        self._record_bytes = int(np.prod(self.shape))
        self._opening = threading.Lock()
        self._verified = bytearray(len(hashes))  # one byte an image: threads set them without a lock

    def __len__(self) -> int:
        """N."""
        return len(self.hashes)

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def num_shards(self) -> int:
        """Shards there are."""
        return -(-len(self) // self._shard_images)

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        return len(self) * self._record_bytes

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self._folder / shard_name(self._split, number)

    def images(self, number: int) -> range:
        """Those that are in a shard."""
        return range(number * self._shard_images, min((number + 1) * self._shard_images, len(self)))

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """One image, as it is stored.

        Args:
            index: of it, 0 to N - 1.
            uniforms: unused; what augments is done on the device.
            into: uint8 [S, S, 3], contiguous.

        Raises:
            InputError: its shard is missing, too short or damaged there.
        """
        number, place = divmod(index, self._shard_images)
        target = into.data.cast("B")
        done = 0
        try:
            descriptor = self._open(number)
            while done < len(target):  # a network file system may give less than asked for
                got = os.preadv(descriptor, [target[done:]], place * self._record_bytes + done)
                if not got:
                    break
                done += got
        except InputError as fault:
            raise InputError(fault.message, fix=REPAIR) from fault
        except OSError as fault:
            raise InputError(f"cannot read {self.path(number)}: {fault.strerror or fault}", fix=REPAIR) from fault
        if not self._verified[index]:
            if done < len(target) or sha256(target).digest() != self.hashes[index].tobytes():
                what = "is damaged" if done == len(target) else "ends before its end"
                raise InputError(f"{self.path(number)}: image {index} of the {self._split} split {what}", fix=REPAIR)
            self._verified[index] = 1

    def load_all(self) -> Tensor:
        """All images in memory: uint8 [N, S, S, 3]; raises as read()."""
        images = np.empty((len(self), *self.shape), dtype=np.uint8)
        for _ in in_threads(lambda i: self.read(i, None, images[i]), len(self)):
            pass
        return torch.from_numpy(images)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not of their size: what can be seen without reading them."""
        return [n for n in range(self.num_shards) if _size(self.path(n)) != len(self.images(n)) * self._record_bytes]

    def verify(self) -> None:
        """Read every image.

        Raises:
            InputError: with the damaged ones, shard by shard.
        """
        found: dict[int, list[int]] = {}

        def is_damaged(index: int) -> bool:
            try:
                self.read(index, None, np.empty(self.shape, dtype=np.uint8))
            except InputError:
                return True
            return False

        with console.Progress(f"verified {self._split} images", len(self)) as progress:
            for index, damaged in enumerate(in_threads(is_damaged, len(self))):
                progress.step()
                if damaged:
                    found.setdefault(index // self._shard_images, []).append(index)
        if found:
            lines = [
                f"{self.path(number)}: {len(images):,} damaged, the first is image {images[0]}"
                for number, images in found.items()
            ]
            raise InputError(f"damaged shards:{indented(lines, SHOWN)}", fix=REPAIR)

    def _open(self, number: int) -> int:
        """Descriptor of a shard; each is opened once."""
        if (descriptor := self._files.get(number)) is not None:
            return descriptor
        with self._opening:
            if number not in self._files:
                wait_for(self.path(number))
                with open_file(self.path(number)) as file:
                    self._files[number] = os.dup(file.fileno())
            return self._files[number]


# -- packing -----------------------------------------------------------------------------------------------------------


class PackedShard(Record):
    """Record of a finished shard, from which an interrupted build continues."""

    images: str
    """Digest of the packed files, their sizes, and how they were packed."""
    hashes: str
    """sha256 of each image, in hexadecimal, one after the other."""
    values: list[list[int]]
    """How often each value occurs in each channel [3, 256]."""


@dataclass
class Packing:
    """Images to pack as the shards of a split.

    A shard that is published has a small record beside it until the data set is finished, by which the same command
    goes on after it was stopped.
    """

    folder: Path
    """Of the data set."""
    split: str
    root: Path
    paths: Sequence[str]
    """Of the image files [N], below root."""
    sizes: NDArray[np.int64]
    """Bytes of each file [N]: with its path, what tells whether a shard is of these very images."""
    size: int
    """S."""
    upright: bool
    """Whether EXIF's rotation is applied."""
    shard_images: int = field(default_factory=lambda: SHARD_IMAGES)

    def __post_init__(self) -> None:
        self.hashes = np.zeros((len(self.paths), 32), dtype=np.uint8)
        """Of the images that are packed [N, 32]."""
        self.values = np.zeros((3, 256), dtype=np.int64)
        """How often each value stands in each channel of them."""
        shape = (self.size, self.size, 3)
        self._shards = Shards(self.folder, self.split, self.hashes, shape, self.shard_images)
        self._record_bytes = int(np.prod(shape))

    def left(self) -> list[int]:
        """Shards that are to be packed. What an earlier build finished is taken over."""
        missing = set(self._shards.missing())
        return [n for n in range(self._shards.num_shards) if n in missing or not self._taken_over(n)]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation a channel of all images, on the scale 0..1."""
        scale = np.arange(256) / 255
        mean = self.values @ scale / self.values.sum(1)
        variance = (self.values * (scale - mean[:, None]) ** 2).sum(1) / self.values.sum(1)
        return mean.tolist(), np.sqrt(variance).tolist()

    def num_bytes(self, shards: Sequence[int]) -> int:
        """Room that these shards take."""
        return sum(len(self._shards.images(number)) for number in shards) * self._record_bytes

    def pack(self, shards: Sequence[int], lock: locks.Lock, *, expected: NDArray[np.uint8] | None = None) -> None:
        """Decode, publish and hash these shards, the files of each in threads.

        Args:
            shards: left().
            lock: of the folder.
            expected: hashes that come out if the files are still what they were [N, 32].

        Raises:
            UnreadableImages: with every file that is no image; the shards without one are published.
            InputError: files give other images than expected.
            EnvironmentFault: a shard cannot be written.
        """
        if not shards:
            return
        count = sum(len(self._shards.images(number)) for number in shards)
        done = len(self.paths) - count
        if done:
            console.note(f"{done:,} of {len(self.paths):,} {self.split} images are packed already")
        began = time.perf_counter()
        with console.Progress(f"packed {self.split} images", len(self.paths), done) as progress:
            of_all(partial(self._pack, number, lock, progress, expected) for number in shards)
        seconds = time.perf_counter() - began
        rate = f"{count / seconds:,.0f} images and {self.num_bytes(shards) / seconds / 1e6:,.0f} MB a second"
        console.note(f"packed {count:,} {self.split} images in {console.duration(seconds)} ({rate})")

    def _pack(
        self, number: int, lock: locks.Lock, progress: console.Progress, expected: NDArray[np.uint8] | None
    ) -> None:
        images, path = self._shards.images(number), self._shards.path(number)
        files = [self.root / self.paths[i] for i in images]
        values = np.zeros((len(images), *self.values.shape), dtype=np.int32)
        lock.check()
        self._record(number).unlink(missing_ok=True)
        with publishing(path, len(images) * self._record_bytes) as file:

            def write(place: int, image: Image.Image) -> None:
                data = image.tobytes()
                _write_at(file.fileno(), data, place * self._record_bytes)
                self.hashes[images[place]] = np.frombuffer(sha256(data).digest(), dtype=np.uint8)
                values[place] = np.array(image.histogram()).reshape(3, 256)

            read_each(files, partial(read_square, size=self.size, upright=self.upright), write, progress)
            if expected is not None and (changed := (expected != self.hashes)[images].any(1)).any():
                raise InputError(
                    f"{files[int(changed.argmax())]} is not what was packed: "
                    f"{int(changed.sum()):,} images of {path} have changed",
                    fix="restore the image files, or pack them all anew with --overwrite",
                )
        sums = values.sum(0, dtype=np.int64)
        self.values += sums
        record = {
            "format": records.FORMAT,
            "images": self._key(number),
            "hashes": self.hashes[images].tobytes().hex(),
            "values": sums.tolist(),
        }
        records.publish_record(self._record(number), record)
        signals.state_is_saved()

    def _taken_over(self, number: int) -> bool:
        """Whether a shard that is there is of these images; then its hashes and values are, too."""
        try:
            record = records.read_record(self._record(number), PackedShard)
            if record.images != self._key(number):
                return False
            images = self._shards.images(number)
            self.hashes[images] = np.frombuffer(bytes.fromhex(record.hashes), dtype=np.uint8).reshape(-1, 32)
            self.values += np.array(record.values)
        except (InputError, ValueError):
            return False
        signals.state_is_saved()
        return True

    def _key(self, number: int) -> str:
        images = self._shards.images(number)
        files = [[self.paths[i], int(self.sizes[i])] for i in images]
        return digest([self.size, self.upright, files])

    def _record(self, number: int) -> Path:
        return self.folder / f"packing-{shard_name(self.split, number)}.json"


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of it; a disk that fills up takes a part first."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
