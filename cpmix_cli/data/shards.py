"""Shards of packed images: decoded squares uint8 [S, S, 3], one after the other, with a file of one sha256 per image.

A set may be larger than the memory, so images are written and read one by one. They are read by pread, because memory
mapping fails on network file systems. An image is verified when a process first reads it.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cpmix_cli.artifacts import locks, records
from cpmix_cli.artifacts.files import digest, is_there, open_file, publishing, read_fault, wait_for
from cpmix_cli.artifacts.records import Record
from cpmix_cli.data.decoding import SHOWN, in_threads, of_all, read_each, read_square
from cpmix_cli.runtime import console, signals
from cpmix_cli.runtime.errors import InputError, UnreadableError, counted, indented
from cpmix_cli.runtime.text import quoted

SHARD_IMAGES = 2048
"""Images per new shard: 403 MB at 256 x 256 pixels, and 226 shards for iNaturalist 2018."""


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, counted from 0."""
    return f"{split}-{number:05d}.shard"


@dataclass(eq=False)
class Shards:
    """The packed images of a split, for reading from many threads."""

    folder: Path
    """The data set's folder."""
    split: str
    hashes: NDArray[np.uint8]
    """sha256 of each image [N, 32]."""
    shape: list[int]
    """Shape of an image, [S, S, 3]."""
    shard_images: int
    """Images per shard; the last shard may have fewer."""

    def __post_init__(self) -> None:
        self._files: dict[int, int] = {}
        self._opening = threading.Lock()
        self._verified = bytearray(len(self.hashes))  # bytes, not bits: threads set them without a lock
        self._image_bytes = int(np.prod(self.shape))

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def __len__(self) -> int:
        """Return N, the number of images."""
        return len(self.hashes)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-len(self) // self.shard_images)

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        return len(self) * self._image_bytes

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / shard_name(self.split, number)

    def images(self, number: int) -> range:
        """Return the indices of the images in a shard."""
        return range(number * self.shard_images, min((number + 1) * self.shard_images, len(self)))

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """Read one image.

        Args:
            index: index of the image in the split.
            uniforms: ignored, because packed images are augmented on the device.
            into: output, uint8 [S, S, 3], contiguous.

        Raises:
            InputError: the shard is missing or too short, or the image is damaged.
        """
        number, place = divmod(index, self.shard_images)
        path, target = self.path(number), into.data.cast("B")
        done = 0
        try:
            descriptor = self._open(number)
            # A network file system may return less than requested.
            while got := os.preadv(descriptor, [target[done:]], place * self._image_bytes + done):
                done += got
        except OSError as fault:
            raise read_fault(path, fault) from fault
        if done < len(target):
            raise InputError(f"{path}: image {index} of the {self.split} split is cut short", path=path)
        if not self._verified[index] and sha256(target).digest() != self.hashes[index].tobytes():
            raise InputError(
                f"{path}: image {index} of the {self.split} split is damaged: its sha256 differs", path=path
            )
        self._verified[index] = 1

    def load_all(self) -> NDArray[np.uint8]:
        """Read all images into memory and return them: uint8 [N, S, S, 3]; raises as read()."""
        images = np.empty((len(self), *self.shape), dtype=np.uint8)
        for _ in in_threads(lambda i: self.read(i, None, images[i]), len(self)):
            pass
        return images

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are missing or have the wrong size, without reading their content.

        Raises:
            UnreadableError: the system does not tell, perhaps for a moment.
        """

        def is_whole(number: int) -> bool:
            path = self.path(number)
            try:
                return is_there(path) and path.stat().st_size == len(self.images(number)) * self._image_bytes
            except FileNotFoundError:  # a link that leads nowhere
                return False
            except OSError as fault:
                raise read_fault(path, fault) from fault

        return [number for number in range(self.num_shards) if not is_whole(number)]

    def verify(self) -> None:
        """Read every image; raise InputError with the number of damaged images per shard."""
        found: dict[int, list[int]] = {}

        def is_damaged(index: int) -> bool:
            try:
                self.read(index, None, np.empty(self.shape, dtype=np.uint8))
            except InputError:
                return True
            return False

        with console.Progress(f"verified {self.split} images", len(self)) as progress:
            for index, damaged in enumerate(in_threads(is_damaged, len(self))):
                progress.step()
                if damaged:
                    found.setdefault(index // self.shard_images, []).append(index)
        if found:
            lines = [
                f"{self.path(number)}: {len(images):,} damaged, the first is image {images[0]}"
                for number, images in found.items()
            ]
            shards = quoted(*(self.path(number) for number in found))
            fix = f"delete them, then run the same command again, which packs missing shards: rm -f {shards}"
            raise InputError(f"damaged shards:{indented(lines, SHOWN)}", fix=fix)

    def _open(self, number: int) -> int:
        """Return the file descriptor of a shard. Each shard is opened once."""
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
    """Record of a finished shard. A build that was interrupted continues from these records."""

    images: str
    """Digest of the image files' paths and sizes, and of the packing settings."""
    hashes: str
    """Concatenated sha256 of all images, in hexadecimal."""
    values: list[list[int]]
    """Histogram of the pixel values per channel [3, 256]."""


@dataclass
class Packing:
    """Images to pack as the shards of a split.

    Until the data set is finished, each published shard has a PackedShard record beside it. If the build is
    interrupted, the same command continues from these records.
    """

    folder: Path
    """The data set's folder."""
    split: str
    root: Path
    """Folder of the image files."""
    paths: Sequence[str]
    """Image files [N], relative to `root`."""
    seen: NDArray[np.int64]
    """Bytes and time of the last change of each file [N, 2]. With the path, they identify the images of a shard."""
    size: int
    """S, side of the packed squares in pixels."""
    upright: bool
    """Rotate images by their EXIF tag; see decoding.py."""
    shard_images: int
    """Images per shard; the last shard may have fewer."""

    def __post_init__(self) -> None:
        self.hashes = np.zeros((len(self.paths), 32), dtype=np.uint8)
        """sha256 of each image [N, 32]; zeros until the image is packed."""
        self._values = np.zeros((3, 256), dtype=np.int64)
        """Histogram of the packed pixel values per channel."""
        self._shards = Shards(self.folder, self.split, self.hashes, [self.size, self.size, 3], self.shard_images)

    def left(self) -> list[int]:
        """Return the numbers of the shards that remain to be packed. Shards of an earlier build of these images count
        as packed, and their hashes are loaded.
        """
        missing = set(self._shards.missing())
        return [n for n in range(self._shards.num_shards) if n in missing or not self._taken_over(n)]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of the pixels, [3] each, on the scale 0..1."""
        scale = np.arange(256) / 255
        mean = self._values @ scale / self._values.sum(1)
        variance = (self._values * (scale - mean[:, None]) ** 2).sum(1) / self._values.sum(1)
        return mean.tolist(), np.sqrt(variance).tolist()

    def num_bytes(self, shards: Sequence[int]) -> int:
        """Return the bytes of these shards together."""
        return sum(len(self._shards.images(number)) for number in shards) * 3 * self.size**2

    def pack(self, shards: Sequence[int], lock: locks.Lock, *, expected: NDArray[np.uint8] | None = None) -> None:
        """Decode images, and publish the shards with their records. The files of a shard are decoded in threads.

        Args:
            shards: numbers of the shards to pack.
            lock: lock on the data set's folder.
            expected: hashes of an earlier packing [N, 32] that the images must have.

        Raises:
            UnreadableImages: lists every file that is not an image. Shards without such a file are published.
            InputError: an image differs from its `expected` hash.
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
        console.note(f"packed {counted(count, f'{self.split} image')} in {console.duration(seconds)} ({rate})")

    def _pack(
        self, number: int, lock: locks.Lock, progress: console.Progress, expected: NDArray[np.uint8] | None
    ) -> None:
        images, path = self._shards.images(number), self._shards.path(number)
        files = [self.root / self.paths[i] for i in images]
        values = np.zeros((len(images), 3, 256), dtype=np.int32)
        lock.check()
        # The record first: a shard without one could be anyone's. The old shard is not that of the new record.
        for old in (self._record(number), path):
            old.unlink(missing_ok=True)
        writing = threading.Lock()
        with publishing(path, self.num_bytes([number])) as file:

            def write(place: int, image: Image.Image) -> None:
                data = image.tobytes()
                with writing:
                    file.seek(place * len(data))
                    file.write(data)
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
            hashes = self.hashes[images].tobytes().hex()
            record = PackedShard(images=self._key(number), hashes=hashes, values=sums.tolist())
            records.publish_record(self._record(number), {"format": records.FORMAT, **record.model_dump()})
        self._values += sums
        signals.state_is_saved()

    def _taken_over(self, number: int) -> bool:
        """Return whether an existing shard contains these images; if so, load its hashes and histogram."""
        try:
            record = records.read_record(self._record(number), PackedShard)
            if record.images != self._key(number):
                return False
            images = self._shards.images(number)
            self.hashes[images] = np.frombuffer(bytes.fromhex(record.hashes), dtype=np.uint8).reshape(-1, 32)
            self._values += np.array(record.values)
        except UnreadableError:
            raise
        except (InputError, ValueError):
            return False
        signals.state_is_saved()
        return True

    def _key(self, number: int) -> str:
        files = [[self.paths[i], *self.seen[i].tolist()] for i in self._shards.images(number)]
        return digest([self.size, self.upright, files])

    def _record(self, number: int) -> Path:
        return self.folder / f"packing-{shard_name(self.split, number)}.json"
