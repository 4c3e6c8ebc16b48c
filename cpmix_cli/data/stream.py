"""Images that are prefetched from disk.

A batch is prefetched some steps before it is requested: threads read it into memory. A requested batch is sent to the
device as bytes and augmented there, with the same numbers as resident images. A batch that was not prefetched is read
on request; a prefetched batch that is never requested is dropped. Results do not depend on which thread reads what.
"""

import atexit
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cpmix_cli.data import augment
from cpmix_cli.data.decoding import open_rgb, reason, square
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime import hardware, ranks
from cpmix_cli.runtime.errors import InputError

if TYPE_CHECKING:
    from cpmix_cli.data.batches import Resident

AHEAD_BYTES = 2**30
"""Most memory of prefetched images; the requested batch comes on top."""
_AT_ONCE = 8
"""Images that a thread reads before it looks for the most urgent ones again."""
PATIENCE_SECONDS = 1.0
"""Longest wait for reading threads when the program ends."""


class ImageReader(Protocol):
    """Reads images one at a time, from many threads."""

    shape: list[int]
    """Height, width and channels of the images."""

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """Read image `index` into uint8 [height, width, channels]: augmented by uniforms [U], or (None) as for tests.

        Raises:
            InputError: it is missing or damaged.
        """
        ...


class FileReader:
    """Reads image files; a file is decoded at every use.

    Args:
        paths: of the files [N].
        shape: of a test image, [S, S, channels]: the shorter side is scaled to S, the middle square kept.
        recipe: crops.
        upright: rotate images as EXIF says, see decoding.py.
        fix: what to do about a missing or unreadable file.
    """

    def __init__(
        self, paths: Sequence[Path], shape: Sequence[int], recipe: Data, *, upright: bool, fix: str = "repair it"
    ) -> None:
        self._paths = paths
        self._size = shape[0]
        self._recipe = recipe
        self._upright = upright
        self._fix = fix
        side = recipe.crop or shape[0]
        self.shape = [side, side, shape[2]]
        # Pillow's warnings name no file. Python's filters are the process's, so they are not set in the threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """Read the random resized crop, if there are uniforms and the recipe has one; else the test image's middle."""
        path = self._paths[index]
        try:
            image = self._seen(open_rgb(path, upright=self._upright), uniforms)
            into[:] = np.asarray(image if self.shape[2] == 3 else image.convert("L")).reshape(self.shape)
        except Exception as fault:  # Pillow's plugins raise whatever a broken file makes them raise
            raise InputError(f"{path} cannot be read as an image: {reason(fault)}", fix=self._fix) from fault

    def _seen(self, image: Image.Image, uniforms: NDArray[np.float64] | None) -> Any:
        from torchvision.transforms import functional  # a second of import that other data sets do not need

        crop = self._recipe.crop
        if uniforms is None or not self._recipe.augment.startswith("resized-crop"):
            whole = square(image, self._size)
            return functional.center_crop(whole, [crop, crop]) if crop else whole
        drawn = torch.from_numpy(uniforms).view(1, -1)
        box = augment.crop_boxes(drawn, image.height, image.width)[0].tolist()
        return functional.resized_crop(image, *box, [crop, crop])


class StreamedBatches:
    """Batches of images that a reader reads, augmented and normalised by `maths` on a device; see batches.Batches."""

    def __init__(self, reader: ImageReader, maths: "Resident", device: torch.device) -> None:
        self.num_uniforms = maths.num_uniforms
        self.device = torch.device("cpu")
        self.resident = False
        self._reader = reader
        self._maths = maths
        self._target = device
        self._ahead: dict[tuple[bytes, bytes | None], _PrefetchJob] = {}  # in the order of prefetch()

    def __del__(self) -> None:
        for job in self._ahead.values():
            job.dropped = True

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Return [B, channels, H, W] float32; raise InputError for the first image that is missing or damaged."""
        images, all_of_them = self._read(indices, uniforms)
        return images.batch(all_of_them, _sent(uniforms, self._target))

    def plain(self, indices: Tensor) -> Tensor:
        """As batch(), but as for tests."""
        images, all_of_them = self._read(indices, None)
        return images.plain(all_of_them)

    def prefetch(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """Start to read a batch after those prefetched before, as soon as AHEAD_BYTES have room for it."""
        key = _key(indices, uniforms)
        if key not in self._ahead:
            self._ahead[key] = self._job(indices, uniforms)
            self._begin()

    def _read(self, indices: Tensor, uniforms: Tensor | None) -> tuple["Resident", Tensor]:
        """The images of a batch on the device, and their indices [B] there."""
        key = _key(indices, uniforms)
        while key in self._ahead and (first := next(iter(self._ahead))) != key:
            self._ahead.pop(first).dropped = True
        job = self._ahead.pop(key, None) or self._job(indices, uniforms)
        job.begin(urgent=True)
        self._begin()
        images = _sent(job.wait(), self._target)
        return self._maths.on(images), torch.arange(len(images), device=self._target)

    def _job(self, indices: Tensor, uniforms: Tensor | None) -> "_PrefetchJob":
        return _PrefetchJob(self._reader, indices, uniforms, pinned=self._target.type == "cuda")

    def _begin(self) -> None:
        """Begin the jobs that there is room for."""
        used = 0
        for job in self._ahead.values():
            used += job.num_bytes
            if used > AHEAD_BYTES:
                return
            job.begin()


def read_in_order(reader: ImageReader, indices: Sequence[int], at_once: int = 64) -> Iterator[NDArray[np.uint8]]:
    """Yield images as for tests, one after the other: uint8 [height, width, channels]."""
    for part in torch.split(torch.as_tensor(indices, dtype=torch.int64), at_once):
        job = _PrefetchJob(reader, part, None, pinned=False)
        job.begin()
        yield from job.wait().numpy()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; the host does not wait."""
    if device.type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _key(indices: Tensor, uniforms: Tensor | None) -> tuple[bytes, bytes | None]:
    return indices.numpy().tobytes(), None if uniforms is None else uniforms.numpy().tobytes()


class _PrefetchJob:
    """A batch to be read."""

    def __init__(self, reader: ImageReader, indices: Tensor, uniforms: Tensor | None, *, pinned: bool) -> None:
        self.dropped = False
        """The batch is not needed any more."""
        self.num_bytes = len(indices) * int(np.prod(reader.shape))
        self._reader = reader
        self._indices: list[int] = indices.tolist()
        self._uniforms = None if uniforms is None else uniforms.numpy().copy()
        self._pinned = pinned
        self._images: Tensor | None = None
        self._left = len(indices)
        self._faults: dict[int, Exception] = {}
        self._done = threading.Event()

    def begin(self, *, urgent: bool = False) -> None:
        """Give the job to the threads, before all others if it is urgent; once."""
        if self._images is not None:
            return
        count = len(self._indices)
        self._images = torch.empty((count, *self._reader.shape), dtype=torch.uint8, pin_memory=self._pinned)
        parts = [range(first, min(first + _AT_ONCE, count)) for first in range(0, count, _AT_ONCE)]
        _threads.give([(self, part) for part in parts], urgent=urgent)
        if not parts:
            self._done.set()

    def read(self, part: range) -> None:
        """Read the images of `part`; called by the threads."""
        assert self._images is not None
        images = self._images.numpy()
        for i in part:
            if self.dropped or _threads.stopping:
                break
            try:
                uniforms = None if self._uniforms is None else self._uniforms[i]
                self._reader.read(self._indices[i], uniforms, images[i])
            except Exception as fault:
                self._faults[i] = fault
        with _threads.changed:
            self._left -= len(part)
            if not self._left:
                self._done.set()

    def wait(self) -> Tensor:
        """Return the images uint8 [B, height, width, channels], or raise what the reader raised for the first."""
        self._done.wait()
        if self._faults:
            raise self._faults[min(self._faults)]
        assert self._images is not None
        return self._images


class _Threads:
    """Reading threads, shared by all streams of the process; started with the first job.

    They are daemons: a file system that hangs must not hold up the exit. At the exit they are asked to stop and waited
    for a while, since Python ends daemons in the middle of whatever they do.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.stopping = False
        self._waiting: deque[tuple[_PrefetchJob, range]] = deque()
        self._threads: list[threading.Thread] = []

    def give(self, parts: list[tuple[_PrefetchJob, range]], *, urgent: bool) -> None:
        """Queue parts of a job, to be read in their order."""
        if not self._threads:
            count = hardware.num_readers(os.environ, ranks.current().local_size)
            self._threads = [threading.Thread(target=self._work, daemon=True, name="reader") for _ in range(count)]
            for thread in self._threads:
                thread.start()
            atexit.register(self._stop)
        with self.changed:
            if urgent:
                self._waiting.extendleft(reversed(parts))
            else:
                self._waiting.extend(parts)
            self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._waiting or self.stopping)
                if self.stopping:
                    return
                job, part = self._waiting.popleft()
            job.read(part)
            del job  # free its images while the thread waits

    def _stop(self) -> None:
        with self.changed:
            self.stopping = True
            self._waiting.clear()
            self.changed.notify_all()
        until = time.monotonic() + PATIENCE_SECONDS
        for thread in self._threads:
            with suppress(RuntimeError):
                thread.join(max(0.0, until - time.monotonic()))


_threads = _Threads()
