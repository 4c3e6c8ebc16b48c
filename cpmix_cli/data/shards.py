"""Packed images: files of fixed-size records uint8 [S, S, 3], decoded once, and a sha256 for each image beside them.

A set may be larger than any memory: it is written image by image and read by pread, record by record (memory mapping
breaks on network file systems). An image is verified when a process first reads it.
"""

import os
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpmix_cli import artifacts, console
from cpmix_cli.data.decoding import SHOWN, in_threads
from cpmix_cli.errors import InputError

SHARD_IMAGES = 2048
"""Images of a new shard: at 256 x 256 it has 403 MB, and iNaturalist 2018 has 226 of them."""
MEND = "delete that shard, then give its build-lt command again: it packs what is missing anew"


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
        self._hashes = hashes
        self._shard_images = shard_images
        self._record_bytes = int(np.prod(self.shape))
        self._opening = threading.Lock()
        self._verified = bytearray(len(hashes))  # one byte an image: threads set them without a lock

    def __len__(self) -> int:
        """N."""
        return len(self._hashes)

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
            raise InputError(fault.message, fix=MEND) from fault
        except OSError as fault:
            raise InputError(f"cannot read {self.path(number)}: {fault.strerror or fault}", fix=MEND) from fault
        if not self._verified[index]:
            if done < len(target) or sha256(target).digest() != self._hashes[index].tobytes():
                what = "is damaged" if done == len(target) else "ends before its end"
                raise InputError(f"{self.path(number)}: image {index} of the {self._split} split {what}", fix=MEND)
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

        def check(index: int) -> InputError | None:
            try:
                self.read(index, None, np.empty(self.shape, dtype=np.uint8))
            except InputError as fault:
                return fault
            return None

        with console.Progress(f"verified {self._split} images", len(self)) as progress:
            for index, fault in enumerate(in_threads(check, len(self))):
                progress.step()
                if fault is not None:
                    found.setdefault(index // self._shard_images, []).append(index)
        if found:
            lines = [
                f"{self.path(number)}: {len(images):,} damaged, the first is image {images[0]}"
                for number, images in found.items()
            ]
            more = f"\n    and {len(lines) - SHOWN:,} shards more" if len(lines) > SHOWN else ""
            raise InputError("damaged shards:\n    " + "\n    ".join(lines[:SHOWN]) + more, fix=MEND)

    def _open(self, number: int) -> int:
        """Descriptor of a shard; each is opened once."""
        if (descriptor := self._files.get(number)) is not None:
            return descriptor
        with self._opening:
            if number not in self._files:
                artifacts.wait_for(self.path(number))
                with artifacts.open_file(self.path(number)) as file:
                    self._files[number] = os.dup(file.fileno())
            return self._files[number]


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
