"""Images that are read from disk ahead of their use.

What will be wanted is announced some steps ahead; threads read it into buffers, and the batch that is asked for is sent
to the device as bytes and augmented there, as resident images are: the same numbers. What was never announced is read
when it is asked for, what is announced and not asked for is forgotten. Which thread reads what changes nothing.
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
from typing import TYPE_CHECKING, Protocol

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
"""Images that are read before they are asked for take no more; the batch that is asked for comes on top."""
MAX_ANNOUNCED = 10_000
"""Batches that are remembered; only what nobody asks for ever comes to that."""
AT_ONCE = 8
"""Images that a thread reads before it looks what is most urgent."""
PATIENCE_SECONDS = 1.0
"""For threads that read when the program ends."""


class Reader(Protocol):
    """Gives images, one at a time, to many threads."""

    shape: list[int]
    """Of what read() gives: height, width, channels."""

    def __len__(self) -> int:
        """N."""
        ...

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """Image `index` as its uniforms [U] want it, or (None) as it is tested on, into uint8 [h, w, channels].

        Raises:
            InputError: it is missing or damaged.
        """
        ...


class FileReader:
    """Image files, decoded at each use.

    Args:
        paths: of the files [N].
        size: shorter side of a test image, whose middle square is seen.
        recipe: crops.
        upright: turn images as EXIF says, see decoding.py.
    """

    def __init__(self, paths: Sequence[Path], size: int, recipe: Data, *, upright: bool) -> None:
        self._paths = paths
        self._size = size
        self._recipe = recipe
        self._upright = upright
        side = recipe.crop or size
        self.shape = [side, side, 3]
        # Pillow names no file. Python's filters are the process's, and so are they set here and not in the threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """With uniforms the random resized crop, where the recipe has one; else the test image's middle.

        Raises:
            InputError: the file is missing, or no image that can be decoded.
        """
        path = self._paths[index]
        try:
            into[:] = self._seen(open_rgb(path, upright=self._upright), uniforms)
        except Exception as fault:  # Pillow's plugins raise whatever a broken file makes them raise
            raise InputError(
                f"{path} cannot be read as an image: {reason(fault)}",
                fix="put the file back or mend it; if the images have moved, name their folder with --data-root",
            ) from fault

    def _seen(self, image: Image.Image, uniforms: NDArray[np.float64] | None) -> NDArray[np.uint8]:
        crop = self._recipe.crop
        if uniforms is None or not self._recipe.augment.startswith("resized-crop"):
            whole = torch.from_numpy(np.array(square(image, self._size)))
            return (augment.middle(whole[None], crop)[0] if crop else whole).numpy()
        drawn = torch.from_numpy(uniforms).view(1, -1)
        top, left, height, width = augment.crop_boxes(drawn, image.height, image.width)[0].tolist()
        # Cut out first, as torchvision does: with `box` alone Pillow would look at the pixels beside it.
        cut = image.crop((left, top, left + width, top + height))
        return np.asarray(cut.resize((crop, crop), Image.Resampling.BILINEAR))


class StreamedBatches:
    """Batches of images that a reader gives.

    Args:
        reader: from where.
        maths: what becomes of them on the device.
        device: where inputs come out.
    """

    def __init__(self, reader: Reader, maths: "Resident", device: torch.device) -> None:
        self.num_uniforms = maths.num_uniforms
        self.device = torch.device("cpu")
        self.resident = False
        self._reader = reader
        self._maths = maths
        self._target = device
        self._ahead: dict[tuple[bytes, bytes | None], _PrefetchJob] = {}  # in the order of their announcement

    def __del__(self) -> None:
        for job in self._ahead.values():
            job.dropped = True

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Augmented inputs of `indices` [B], uniforms [B, num_uniforms] float64: [B, channels, H, W] float32.

        Raises:
            InputError: an image is missing or damaged; the first in the batch.
        """
        images = self._read(indices, uniforms)
        return self._maths.on(images).batch(self._all_of(images), _sent(uniforms, self._target))

    def plain(self, indices: Tensor) -> Tensor:
        """Inputs of `indices` [B] as they are tested on; raises as batch()."""
        images = self._read(indices, None)
        return self._maths.on(images).plain(self._all_of(images))

    def prefetch(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """Begin to read what batch() or, without uniforms, plain() will be asked for, after all that was announced
        before: as soon as AHEAD_BYTES have room for it.
        """
        key = _key(indices, uniforms)
        if key in self._ahead:
            return
        self._ahead[key] = _PrefetchJob(self._reader, key, self._target.type == "cuda")
        if len(self._ahead) > MAX_ANNOUNCED:
            self._forget(next(iter(self._ahead)))
        self._begin()

    def _read(self, indices: Tensor, uniforms: Tensor | None) -> Tensor:
        """uint8 [B, h, w, channels] on the target."""
        key = _key(indices, uniforms)
        if key in self._ahead:
            while (passed_over := next(iter(self._ahead))) != key:
                self._forget(passed_over)
            job = self._ahead.pop(key)
        else:
            job = _PrefetchJob(self._reader, key, self._target.type == "cuda")
        job.begin(urgent=True)
        self._begin()
        return _sent(job.wait(), self._target)

    def _begin(self) -> None:
        """Begin what there is room for."""
        used = 0
        for job in self._ahead.values():
            used += job.num_bytes
            if used > AHEAD_BYTES:
                return
            job.begin()

    def _forget(self, key: tuple[bytes, bytes | None]) -> None:
        self._ahead.pop(key).dropped = True

    def _all_of(self, images: Tensor) -> Tensor:
        return torch.arange(len(images), device=images.device)


def read_in_order(reader: Reader, indices: Sequence[int], at_once: int = 64) -> Iterator[NDArray[np.uint8]]:
    """Images as they are tested on, one after the other: [h, w, channels] uint8."""
    for part in torch.split(torch.as_tensor(indices, dtype=torch.int64), at_once):
        job = _PrefetchJob(reader, _key(part, None), pinned=False)
        job.begin()
        yield from job.wait().numpy()


def _key(indices: Tensor, uniforms: Tensor | None) -> tuple[bytes, bytes | None]:
    return indices.numpy().tobytes(), None if uniforms is None else uniforms.numpy().tobytes()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host goes on."""
    if device.type == "cpu":
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class _PrefetchJob:
    """A batch to be read.

    Args:
        reader: from where.
        key: bytes of the indices, int64, and of their uniforms, float64.
        pinned: the buffer goes to a GPU.
    """

    def __init__(self, reader: Reader, key: tuple[bytes, bytes | None], pinned: bool) -> None:
        self._reader = reader
        self._key = key
        self._indices: list[int] = []
        self._uniforms: NDArray[np.float64] | None = None
        self._pinned = pinned
        self._images: Tensor | None = None
        self._faults: dict[int, Exception] = {}
        self._count = self._left = len(key[0]) // np.dtype(np.int64).itemsize
        self._done = threading.Event()
        self.dropped = False
        """Nobody waits for it any more."""
        self.num_bytes = self._count * int(np.prod(reader.shape))

    def begin(self, *, urgent: bool = False) -> None:
        """Hand it to the threads, before all else if it is urgent."""
        if self._images is not None:
            return
        count = self._count
        self._indices = np.frombuffer(self._key[0], dtype=np.int64).tolist()
        if self._key[1] is not None:  # a copy: torch makes no tensor of bytes that are not to be written to
            numbers = np.frombuffer(self._key[1])
            self._uniforms = numbers.reshape(count, len(numbers) // max(count, 1)).copy()
        self._images = torch.empty((count, *self._reader.shape), dtype=torch.uint8, pin_memory=self._pinned)
        parts = [range(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE)]
        _threads.give([(self, part) for part in parts], urgent=urgent)
        if not parts:
            self._done.set()

    def read(self, part: range) -> None:
        """What a thread does."""
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
        """The images uint8 [B, h, w, channels]; raises what the reader raised for the first of them."""
        self._done.wait()
        if self._faults:
            raise self._faults[min(self._faults)]
        assert self._images is not None
        return self._images


class _Threads:
    """Threads that read, started when there is something to read; all streams of the process share them.

    Daemons, for a file system that hangs may not hold up the end; but asked to stop and waited for when the program
    ends, for a while: Python takes no care of what such threads are in.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._waiting: deque[tuple[_PrefetchJob, range]] = deque()
        self._threads: list[threading.Thread] = []
        self.stopping = False

    def give(self, parts: list[tuple[_PrefetchJob, range]], *, urgent: bool) -> None:
        """Parts of a job, to be read in their order."""
        if not self._threads:
            count = hardware.num_readers(os.environ, Path("/sys/fs/cgroup"), ranks.current().local_size)
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
                while not self._waiting and not self.stopping:
                    self.changed.wait()
                if self.stopping:
                    return
                job, part = self._waiting.popleft()
            job.read(part)
            del job  # its images, while there is nothing to do

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
