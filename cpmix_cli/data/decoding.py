"""Image files to pixels: RGB as it is stored or as it was taken, and the square that is packed and tested on.

Benchmark sets are read as everybody reads them, without the camera's EXIF rotation; of people's own images it is
applied (`upright`): a photograph is to be seen as it was taken.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cpmix_cli.artifacts.files import open_file
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

T = TypeVar("T")
SHOWN = 20
"""Faults that a message shows where their number may be that of the images."""
AHEAD = 4096
"""Calls that in_threads() hands out at a time: a waiting call takes memory too."""
IO_THREADS = 16
STAT_BLOCK = 1000


class UnreadableImages(InputError):
    """Image files that cannot be read.

    Args:
        lines: 'PATH: why' for every one of them.
        shown: how many the message lists; all by default.
        listed_in: the file that has all of them, where the message has not.
    """

    def __init__(self, lines: Sequence[str], *, shown: int | None = None, listed_in: Path | None = None) -> None:
        count = "1 file" if len(lines) == 1 else f"{len(lines):,} files"
        message = f"{count} cannot be read as an image:\n    " + "\n    ".join(lines[:shown])
        if listed_in is not None and shown is not None and len(lines) > shown:
            message += f"\n    ... and {len(lines) - shown:,} more; {listed_in} lists all"
        super().__init__(message, fix="mend, convert or delete these files")
        self.lines = list(lines)


def open_rgb(path: Path, *, upright: bool) -> Image.Image:
    """The whole image, decoded as RGB: as torchvision's loader has it, or `upright` as EXIF says, transparency laid on
    white.

    Raises:
        Exception: whatever Pillow's plugins raise; reason() puts it in words.
    """
    with open_file(path) as file, Image.open(file) as image:
        return as_rgb(ImageOps.exif_transpose(image)) if upright else image.convert("RGB")


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side `size`, the longer one truncated. Source: torchvision's Resize."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` of the image with its shorter side scaled to `size`, bilinear.

    Source: torchvision's Resize(size) and CenterCrop(size), byte for byte. The middle 224 of the middle 256 is the
    middle 224 of the whole.
    """
    scaled = image.resize(resized(*image.size, size), Image.Resampling.BILINEAR)
    # Python rounds halves to even, as torchvision's CenterCrop does.
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    return scaled.crop((left, top, left + size, top + size))


def read_square(path: Path, size: int, *, upright: bool) -> Image.Image:
    """square() of a file: what is packed, and how test images are seen; raises as open_rgb()."""
    return square(open_rgb(path, upright=upright), size)


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is laid on white, 16-bit grey keeps its upper 8 bits.

    Raises:
        ValueError: 32-bit pixels.
    """
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


@contextmanager
def strict_warnings() -> Iterator[None]:
    """While images are decoded in threads: Pillow's warnings are silent, which name no file, and an image with too many
    pixels is an error. Python's filters are the process's, so this stands round the threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def in_threads(function: Callable[[int], T], count: int, *, threads: int | None = None) -> Iterator[T]:
    """function(0), function(1), ... in their order, computed by as many threads as there are CPUs (or `threads`)."""
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        try:
            for first in range(0, count, AHEAD):
                yield from pool.map(function, range(first, min(first + AHEAD, count)))
        except BaseException:  # a signal: leaving the pool would wait for all that is left
            pool.shutdown(cancel_futures=True)
            raise


def file_sizes(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Bytes of each file [N], by many threads: on a network file system it is the waiting that takes the time.

    Raises:
        UnreadableImages: with every file that is missing, empty or none.
    """
    sizes = np.zeros(len(paths), dtype=np.int64)

    def look(block: int) -> list[str]:
        faults = []
        for i in range(block * STAT_BLOCK, min((block + 1) * STAT_BLOCK, len(paths))):
            try:
                found = paths[i].stat()
            except OSError as fault:
                faults.append(f"{paths[i]}: {fault.strerror or fault}")
                continue
            sizes[i] = found.st_size
            if not stat.S_ISREG(found.st_mode) or not found.st_size:
                faults.append(f"{paths[i]}: {'empty' if stat.S_ISREG(found.st_mode) else 'not a file'}")
        return faults

    faults = [line for lines in in_threads(look, -(-len(paths) // STAT_BLOCK), threads=IO_THREADS) for line in lines]
    if faults:
        raise UnreadableImages(faults)
    return sizes


def check_headers(paths: Sequence[Path]) -> None:
    """Read as much of each file as tells its format and size.

    Raises:
        UnreadableImages: with every file that is no image.
    """

    def look(i: int) -> str | None:
        try:
            with open_file(paths[i]) as file, Image.open(file):
                return None
        except Exception as fault:
            return f"{paths[i]}: {reason(fault)}"

    faults = []
    with strict_warnings(), console.Progress("checked image files", len(paths)) as progress:
        for line in in_threads(look, len(paths), threads=IO_THREADS):
            progress.step()
            faults += [line] if line is not None else []
    if faults:
        raise UnreadableImages(faults)
