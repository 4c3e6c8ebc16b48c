"""Image files to pixels: RGB as it is stored or as it was taken, and the square that is packed and tested on.

The camera's EXIF rotation is applied to people's own images (`upright`). Benchmark sets are read without it, as
everybody reads them.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cpmix_cli.artifacts.files import open_file
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted, indented

T = TypeVar("T")
SHOWN = 20
"""Most unreadable files, or faults of a list, that a message shows."""
_AHEAD = 4096
"""Calls that in_threads() queues at a time: a waiting call takes memory too."""
_IO_THREADS = 16


class UnreadableImages(InputError):
    """Image files that cannot be read: a line 'PATH: why' each, of which the message shows the first `shown` (None:
    all), and names the file `listed_in` that has all of them.
    """

    def __init__(self, lines: Sequence[str], *, shown: int | None = None, listed_in: Path | None = None) -> None:
        message = f"{counted(len(lines), 'file')} cannot be read as an image:{indented(lines, shown)}"
        if listed_in is not None:
            message += f"; {listed_in} lists all"
        super().__init__(message, fix="repair, convert or delete these files")
        self.lines = list(lines)


def open_rgb(path: Path, *, upright: bool) -> Image.Image:
    """Decode the whole image as RGB: as torchvision's loader does, or `upright`: rotated as EXIF says, transparency
    laid on white. Raises whatever Pillow's plugins raise; reason() puts it in words.
    """
    with open_file(path) as file, Image.open(file) as image:
        return _as_rgb(ImageOps.exif_transpose(image)) if upright else image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` (bilinear) and keep the middle `size` x `size`: torchvision's Resize(size) and
    CenterCrop(size). The middle 224 of the middle 256 is the middle 224 of the whole.
    """
    from torchvision.transforms import functional  # a second of import that other data sets do not need

    found: Image.Image = functional.center_crop(functional.resize(image, size), [size, size])
    return found


def read_square(path: Path, size: int, *, upright: bool) -> Image.Image:
    """Return square() of a file: the pixels that are packed, and tested on; raises as open_rgb()."""
    return square(open_rgb(path, upright=upright), size)


def _as_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is laid on white, 16-bit grey keeps its upper 8 bits."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}), whose range is not known; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def reason(fault: Exception) -> str:
    """Why an image cannot be read, on one line, without its path."""
    if isinstance(fault, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(fault, UnidentifiedImageError):
        return "not an image"
    if isinstance(fault, InputError):  # no file
        return fault.message.partition(": ")[2]
    return " ".join(str(getattr(fault, "strerror", None) or fault).split()) or type(fault).__name__


def in_threads(function: Callable[[int], T], count: int, *, threads: int | None = None) -> Iterator[T]:
    """Yield function(0), function(1), ... in order, computed by as many threads as there are CPUs (or `threads`)."""
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        try:
            for first in range(0, count, _AHEAD):
                yield from pool.map(function, range(first, min(first + _AHEAD, count)))
        except BaseException:  # a signal: leaving the pool would wait for all that is left
            pool.shutdown(cancel_futures=True)
            raise


def read_each(
    paths: Sequence[Path],
    read: Callable[[Path], Any],
    use: Callable[[int, Any], object],
    progress: console.Progress,
    *,
    threads: int | None = None,
) -> None:
    """Call use(i, read(paths[i])) for every image file, in threads.

    Raises:
        UnreadableImages: with every file that read() refused.
    """

    def work(i: int) -> str | None:
        try:
            found = read(paths[i])
        except Exception as fault:  # Pillow's plugins raise whatever a broken file makes them raise
            return f"{paths[i]}: {reason(fault)}"
        use(i, found)
        return None

    unreadable = []
    with warnings.catch_warnings():  # the process's: set around the threads and not in each
        warnings.simplefilter("ignore")  # Pillow's name no file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for line in in_threads(work, len(paths), threads=threads):
            progress.step()
            unreadable += [line] if line is not None else []
    if unreadable:
        raise UnreadableImages(unreadable)


def read_squares(paths: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Return read_square() of people's own images: [n, size, size, 3]; raises as read_each()."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    with console.Progress("read images", len(paths)) as progress:
        read_each(paths, partial(read_square, size=size, upright=True), images.__setitem__, progress)
    return images


def check_headers(paths: Sequence[Path]) -> None:
    """Read as much of each file as gives its format and size; raise UnreadableImages with all that are no images."""

    def look(path: Path) -> None:
        with open_file(path) as file, Image.open(file):
            pass

    with console.Progress("checked image files", len(paths)) as progress:
        read_each(paths, look, lambda *_: None, progress, threads=_IO_THREADS)


def file_sizes(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Return the bytes of each file [N]; raise UnreadableImages with all that are missing, empty or no files.

    Many threads: on a network file system most of the time is waiting.
    """

    def size(path: Path) -> int:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            raise ValueError("empty" if stat.S_ISREG(found.st_mode) else "not a file")
        return found.st_size

    sizes = np.zeros(len(paths), dtype=np.int64)
    with console.Progress("found image files", len(paths)) as progress:
        read_each(paths, size, sizes.__setitem__, progress, threads=_IO_THREADS)
    return sizes


def of_all(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Return the results of all calls; raise UnreadableImages with the files of all calls that raised it."""
    results, unreadable = [], []
    for call in calls:
        try:
            results.append(call())
        except UnreadableImages as fault:
            unreadable += fault.lines
    if unreadable:
        raise UnreadableImages(unreadable)
    return results
