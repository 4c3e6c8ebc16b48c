"""Batches that are prefetched from disk.

Threads read a batch into memory some steps before it is requested. A requested batch is sent to the device as bytes
and augmented there, with the same arithmetic as resident images. A batch that was not prefetched is read on request. A
prefetched batch is dropped if a later one is requested first. Results do not depend on which thread reads an image.
"""

import atexit
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
"""Largest memory of prefetched images, in bytes. The requested batch is not counted."""
UPLOADS_IN_USE = 8
"""Most batches whose memory on a GPU is kept until it has used them."""
_AT_ONCE = 8
"""Images that a thread reads before it takes the next part from the queue, where urgent parts are first."""
PATIENCE_SECONDS = 1.0
"""Longest wait for the reading threads when the program exits."""


class ImageReader(Protocol):
    """Reader of one image at a time; called from several threads."""

    shape: list[int]
    """Height, width and channels of the images."""

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """Read one image.

        Args:
            index: index of the image.
            uniforms: random numbers [U] for a reader that crops training images; None reads the test image.
            into: output, uint8 [height, width, channels].

        Raises:
            InputError: the image is missing or damaged.
        """
        ...


class FileReader:
    """Reader of image files. A file is decoded each time that it is read.

    Args:
        paths: image files [N]; or decoded images of any size, uint8 [H, W, 3].
        shape: shape of a test image before the recipe's crop, [S, S, channels]; see decoding.square().
        recipe: table [data]: size and kind of the crops.
        upright: rotate images by their EXIF tag; see decoding.py.
        fix: advice in the message about a missing or unreadable file.
    """

    def __init__(
        self,
        paths: Sequence[Path | NDArray[np.uint8]],
        shape: Sequence[int],
        recipe: Data,
        *,
        upright: bool,
        fix: str = "repair it",
    ) -> None:
        self._paths = paths
        self._size = shape[0]
        self._recipe = recipe
        self._upright = upright
        self._fix = fix
        side = recipe.crop or shape[0]
        self.shape = [side, side, shape[2]]
        # Pillow's warnings do not name the file. Filters belong to the process, so they are not set in the threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def read(self, index: int, uniforms: NDArray[np.float64] | None, into: NDArray[np.uint8]) -> None:
        """Read a random resized crop, or the centre crop of the test image.

        Args:
            index: index of the image.
            uniforms: random numbers [U] of the crop; None, or a recipe without resized crops, reads the test image.
            into: output, uint8 [height, width, channels].

        Raises:
            InputError: the file is missing or not an image.
        """
        path = self._paths[index]
        try:
            whole = open_rgb(path, upright=self._upright) if isinstance(path, Path) else Image.fromarray(path)
            image = self._seen(whole, uniforms)
            into[:] = np.asarray(image if self.shape[2] == 3 else image.convert("L")).reshape(self.shape)
        except Exception as fault:  # a broken file can make Pillow's plugins raise any exception
            raise InputError(f"{path} cannot be read as an image: {reason(fault)}", fix=self._fix) from fault

    def _seen(self, image: Image.Image, uniforms: NDArray[np.float64] | None) -> Any:
        from torchvision.transforms import functional  # imported here: it takes a second

        crop = self._recipe.crop
        if uniforms is None or not self._recipe.augment.startswith("resized-crop"):
            whole = square(image, self._size)
            return functional.center_crop(whole, [crop, crop]) if crop else whole
        drawn = torch.from_numpy(uniforms).view(1, -1)
        box = augment.crop_boxes(drawn, image.height, image.width)[0].tolist()
        return functional.resized_crop(image, *box, [crop, crop])


class StreamedBatches:
    """Batches of images from disk; see batches.Batches for the methods.

    Args:
        reader: reads one image by index.
        maths: batches of resident images, which augment and normalise what was read.
        device: device of the inputs.
    """

    def __init__(self, reader: ImageReader, maths: "Resident", device: torch.device) -> None:
        self.num_uniforms = maths.num_uniforms
        self.alternating = maths.alternating
        self.device = torch.device("cpu")
        self.resident = False
        self._reader = reader
        self._maths = maths
        self._target = device
        self._ahead: dict[tuple[bytes, bytes | None], _PrefetchJob] = {}  # in the order of prefetch()
        self._uploads = Uploads(device)

    def __del__(self) -> None:
        for job in self._ahead.values():
            job.dropped = True

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        """Return training inputs: indices [B], uniforms [B, num_uniforms] -> float32 [B, channels, H, W].

        Raises:
            InputError: an image is missing or damaged; the message names the first such image of the batch.
        """
        with self._uploads.sent(self._read(indices, uniforms), uniforms) as (images, on_device):
            return self._maths.on(images).batch(self._all(images), on_device)

    def plain(self, indices: Tensor) -> Tensor:
        """Return test inputs: indices [B] -> float32 [B, channels, H, W]; raises as batch()."""
        with self._uploads.sent(self._read(indices, None)) as (images,):
            return self._maths.on(images).plain(self._all(images))

    def prefetch(self, indices: Tensor, uniforms: Tensor | None) -> None:
        """Queue a batch for reading. Reading starts when the earlier prefetched batches leave room in AHEAD_BYTES."""
        key = _key(indices, uniforms)
        if key not in self._ahead:
            self._ahead[key] = self._job(indices, uniforms)
            self._begin()

    def _all(self, images: Tensor) -> Tensor:
        """Return the indices 0 to B - 1 of B images, on the device."""
        return torch.arange(len(images), device=self._target)

    def _read(self, indices: Tensor, uniforms: Tensor | None) -> Tensor:
        """Return the requested images uint8 [B, height, width, channels], on the CPU."""
        key = _key(indices, uniforms)
        while key in self._ahead and (first := next(iter(self._ahead))) != key:
            self._ahead.pop(first).dropped = True
        job = self._ahead.pop(key, None) or self._job(indices, uniforms)
        job.begin(urgent=True)
        self._begin()
        return job.wait()

    def _job(self, indices: Tensor, uniforms: Tensor | None) -> "_PrefetchJob":
        return _PrefetchJob(self._reader, indices, uniforms, pinned=self._target.type == "cuda")

    def _begin(self) -> None:
        """Begin the prefetch jobs that fit in AHEAD_BYTES."""
        used = 0
        for job in self._ahead.values():
            used += job.num_bytes
            if used > AHEAD_BYTES:
                return
            job.begin()


def read_in_order(reader: ImageReader, indices: Sequence[int], at_once: int = 64) -> Iterator[NDArray[np.uint8]]:
    """Yield test images one after the other: uint8 [height, width, channels] each.

    Args:
        reader: reads one image by index.
        indices: indices of the images [n], in the order of the result.
        at_once: number of images that the threads read together.

    Raises:
        InputError: an image is missing or damaged.
    """
    for part in torch.split(torch.as_tensor(indices, dtype=torch.int64), at_once):
        job = _PrefetchJob(reader, part, None, pinned=False)
        job.begin()
        yield from job.wait().numpy()


class Uploads:
    """Copies of batches to a GPU on a stream of their own, so that they overlap with the steps before.

    The memory of a batch is that stream's. A later copy may overwrite it when the device has used the batch: an event
    says so, for which the stream waits. Nothing here makes the host wait.

    Args:
        device: device of the copies; for the CPU, nothing is copied.
        cuda: torch.cuda, or what stands in for it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._in_use: deque[tuple[list[Tensor], Any]] = deque()
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def __del__(self) -> None:
        while self._in_use:
            self._let_go()

    @contextmanager
    def sent(self, *tensors: Tensor) -> Iterator[Sequence[Tensor]]:
        """Give tensors of the CPU to the work inside, on the device; it uses them on the current stream."""
        if self._stream is None:
            yield tensors
            return
        while len(self._in_use) >= UPLOADS_IN_USE:
            self._let_go()
        with self._cuda.stream(self._stream):
            found = [(t if t.is_pinned() else t.pin_memory()).to(self._device, non_blocking=True) for t in tensors]
        current = self._cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        try:
            yield found
        finally:
            used = self._cuda.Event()
            used.record(current)
            self._in_use.append((found, used))

    def _let_go(self) -> None:
        """Free the memory of the oldest batch for copies of this stream, which come after its last use."""
        assert self._stream is not None
        self._stream.wait_event(self._in_use[0][1])
        self._in_use.popleft()


def _key(indices: Tensor, uniforms: Tensor | None) -> tuple[bytes, bytes | None]:
    return indices.numpy().tobytes(), None if uniforms is None else uniforms.numpy().tobytes()


class _PrefetchJob:
    """A batch that threads read, in parts of _AT_ONCE images."""

    def __init__(self, reader: ImageReader, indices: Tensor, uniforms: Tensor | None, *, pinned: bool) -> None:
        self.dropped = False
        """True if the batch is no longer needed."""
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
        """Queue the job for the threads, first in the queue if it is urgent. Later calls do nothing."""
        if self._images is not None:
            return
        count = len(self._indices)
        self._images = torch.empty((count, *self._reader.shape), dtype=torch.uint8, pin_memory=self._pinned)
        parts = [range(first, min(first + _AT_ONCE, count)) for first in range(0, count, _AT_ONCE)]
        _threads.give([(self, part) for part in parts], urgent=urgent)
        if not parts:
            self._done.set()

    def read(self, part: range) -> None:
        """Read the images of `part`; called from the threads."""
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
        """Return the images uint8 [B, height, width, channels]; raise the reader's error for the first faulty image."""
        self._done.wait()
        if self._faults:
            raise self._faults[min(self._faults)]
        assert self._images is not None
        return self._images


class _Threads:
    """Reading threads, shared by all streams of the process. They start with the first job.

    They are daemon threads, because a file system that hangs must not block the exit. Python ends daemon threads at
    any instruction, so at exit they get PATIENCE_SECONDS to stop.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.stopping = False
        self._waiting: deque[tuple[_PrefetchJob, range]] = deque()
        self._threads: list[threading.Thread] = []

    def give(self, parts: list[tuple[_PrefetchJob, range]], *, urgent: bool) -> None:
        """Queue parts of a job in their order, before all others if they are urgent."""
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
            del job  # else its images stay in memory while the thread waits

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
