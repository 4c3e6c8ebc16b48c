"""Image files to pixels: decoded RGB, and the centre square that is packed and tested on.

A user's own images are rotated by their EXIF tag (`upright`). Benchmark sets are not, as in published results.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cpmix_cli.artifacts.files import LFS_POINTER, open_file
from cpmix_cli.data.parquet_rows import file_of, open_picture
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted, indented
from cpmix_cli.runtime.memory import raise_if_exhausted

T = TypeVar("T")
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    "AVIF": (".avif",),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "TGA": (".tga",),  # last: its header is the least distinct
}
"""Pillow's name of each format that is read -> endings of its files. Others are refused whatever the ending says.

The content decides the format, and some decoders start other programs: PostScript runs Ghostscript.
"""
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
"""Endings of image files, in lower case."""
LEAVE_OUT = "repair, convert or delete these files, or leave them out: --skip-unreadable"
"""Advice about unreadable files that are not recorded anywhere yet."""
_NONE_LEFT = "repair or convert these files, or give others: no image can be read"
SHOWN = 20
"""Most unreadable files, or faulty lines of a list, that a message shows."""
_MOST_SCALED = 2**24
"""Largest number of pixels of an image that square() scales whole."""
_AHEAD = 4096
"""Calls that in_threads() queues at a time, since each waiting call takes memory."""
_IO_THREADS = 16  # more than CPUs: on a network file system most of the time is waiting


class UnreadableImages(InputError):
    """Image files that cannot be read.

    Args:
        lines: "PATH: reason" per file.
        shown: number of lines in the message; None shows all.
        listed_in: file that contains all lines; the message names it.
        fix: see CpmixError.
    """

    def __init__(
        self, lines: Sequence[str], *, shown: int | None = None, listed_in: Path | None = None, fix: str = LEAVE_OUT
    ) -> None:
        message = f"{counted(len(lines), 'file')} cannot be read as an image:{indented(lines, shown)}"
        if listed_in is not None:
            message += f"; {listed_in} lists all"
        super().__init__(message, fix=fix)
        self.lines = list(lines)


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image of one of FORMATS; its pixels are decoded when they are used.

    Raises:
        Exception: any exception of Pillow's plugins; reason() describes it.
    """
    try:
        return Image.open(file, formats=tuple(FORMATS))
    except UnidentifiedImageError as fault:
        file.seek(0)
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("a Git LFS pointer, not the image: run git lfs pull") from fault
        raise


def open_rgb(path: Path, *, upright: bool) -> Image.Image:
    """Decode a whole image file as RGB, as torchvision's loader does.

    Args:
        path: image file.
        upright: also rotate the image by its EXIF tag, and lay transparency on white.

    Raises:
        Exception: any exception of Pillow's plugins; reason() describes it.
    """
    with open_picture(path) as file, open_image(file) as image:
        if not upright:
            return image.convert("RGB")
        image.load()  # TIFF files are turned here already, and then have no orientation
        return _turned(_as_rgb(image), image)


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` pixels (bilinear), then crop `size` x `size` at the centre.

    Source: torchvision's Resize(size) and CenterCrop(size). A later centre crop of the result equals the same crop of
    the resized image.
    """
    from torchvision.transforms import functional  # imported here: it takes a second, and most data sets have no files

    short, long = sorted(image.size)
    if size * (size * long // short) > _MOST_SCALED:  # a line of pixels, which would be gigabytes when it is scaled
        image = functional.center_crop(image, [min(image.height, 4 * short), min(image.width, 4 * short)])
    found: Image.Image = functional.center_crop(functional.resize(image, size), [size, size])
    return found


def read_square(path: Path, size: int, *, upright: bool) -> Image.Image:
    """Decode a file and return its centre square, the pixels that are packed and tested on.

    Args:
        path: image file.
        size: side of the square, in pixels.
        upright: as for open_rgb().

    Raises:
        Exception: any exception of open_rgb().
    """
    return square(open_rgb(path, upright=upright), size)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation in the EXIF data of a file -> what makes the image upright."""


def _turned(pixels: Image.Image, file: Image.Image) -> Image.Image:
    """Turn the pixels of a file by its orientation. Unlike Pillow's exif_transpose(), no other entry can fail it."""
    try:
        turn = _TURNS.get(file.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF data raise any exception; the pixels are whole
        turn = None
    return pixels if turn is None else pixels.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. Transparency is laid on white; 16-bit grey keeps its upper 8 bits.

    Cameras and scanners put 12 bits into files of 16. An image without a value above 12 bits is taken as one of them.
    """
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image, dtype=np.uint16)
        image = Image.fromarray((values >> (8 if values.max() > 4095 else 4)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}), whose range is not known; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def reason(fault: Exception) -> str:
    """Return why an image cannot be read, on one line and without its path."""
    if isinstance(fault, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(fault, UnidentifiedImageError):
        return "not an image"
    if isinstance(fault, InputError):  # from open_file(): "cannot read PATH: reason"
        return fault.message.partition(": ")[2]
    return " ".join(str(getattr(fault, "strerror", None) or fault).split()) or type(fault).__name__


def in_threads(function: Callable[[int], T], count: int, *, threads: int | None = None) -> Iterator[T]:
    """Yield function(0), ..., function(count - 1) in this order, computed by several threads.

    Args:
        function: index -> result; called from any thread.
        count: number of calls.
        threads: number of threads; by default the number of CPUs that this process may use.
    """
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        try:
            for first in range(0, count, _AHEAD):
                yield from pool.map(function, range(first, min(first + _AHEAD, count)))
        except BaseException:  # a signal: without this, leaving the pool waits for all queued calls
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

    Args:
        paths: image files [N].
        read: file -> content; may raise any exception.
        use: takes the index of a file and its content; called from any thread.
        progress: advances by one per file.
        threads: number of threads; by default the number of CPUs that this process may use.

    Raises:
        UnreadableImages: lists every file for which read() raised.
    """

    def work(i: int) -> str | None:
        try:
            found = read(paths[i])
        except Exception as fault:  # a broken file can make Pillow's plugins raise any exception
            raise_if_exhausted(fault)
            return f"{paths[i]}: {reason(fault)}"
        use(i, found)
        return None

    unreadable = []
    with warnings.catch_warnings():  # filters belong to the process, so they are set outside the threads
        warnings.simplefilter("ignore")  # Pillow's warnings do not name the file
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for line in in_threads(work, len(paths), threads=threads):
            progress.step()
            unreadable += [line] if line is not None else []
    if unreadable:
        raise UnreadableImages(unreadable, fix=LEAVE_OUT if len(unreadable) < len(paths) else _NONE_LEFT)


def read_squares(paths: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Return read_square() of a user's own images: [n, size, size, 3]; raises as read_each()."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    with console.Progress("read images", len(paths)) as progress:
        read_each(paths, partial(read_square, size=size, upright=True), images.__setitem__, progress)
    return images


def check_headers(paths: Sequence[Path]) -> None:
    """Read the header of each file; raise UnreadableImages with every file that is not an image."""

    def look(path: Path) -> None:
        with open_picture(path) as file, open_image(file):
            pass

    with console.Progress("checked image files", len(paths)) as progress:
        read_each(paths, look, lambda *_: None, progress, threads=_IO_THREADS)


def with_several_pictures(paths: Sequence[Path]) -> list[Path]:
    """Return the files with animations or pages, of which only the first picture is read; raises as read_each()."""
    found = np.zeros(len(paths), dtype=bool)

    def look(path: Path) -> bool:
        with open_file(path) as file, open_image(file) as image:
            try:  # cameras put previews into MPO files
                return image.format != "MPO" and bool(getattr(image, "is_animated", False))
            except Exception:  # a broken second picture does no harm
                return False

    with console.Progress("looked for animations", len(paths)) as progress:
        read_each(paths, look, found.__setitem__, progress, threads=_IO_THREADS)
    return [path for path, is_found in zip(paths, found, strict=True) if is_found]


def check_pixels(paths: Sequence[Path], *, upright: bool, fix: str = LEAVE_OUT) -> None:
    """Decode each file whole; raise UnreadableImages with every file for which that fails, and the advice `fix`."""
    if lines := readable(paths, upright=upright)[1]:
        raise UnreadableImages(lines, fix=fix)


def readable(paths: Sequence[Path], *, upright: bool) -> tuple[NDArray[np.int64], list[str]]:
    """Decode each file whole.

    Args:
        paths: image files [N].
        upright: as for open_rgb().

    Returns:
        Positions of the files that can be decoded [n], and "PATH: reason" of each other file.
    """
    is_whole = np.zeros(len(paths), dtype=bool)

    def note(i: int, _: Image.Image) -> None:
        is_whole[i] = True

    lines: list[str] = []
    with console.Progress("decoded image files", len(paths)) as progress:
        try:
            read_each(paths, partial(open_rgb, upright=upright), note, progress)
        except UnreadableImages as fault:
            lines = fault.lines
    return np.flatnonzero(is_whole), lines


def readable_only(paths: Sequence[Path], *, upright: bool) -> NDArray[np.int64]:
    """Return the positions of the files that can be decoded, and name the others in a warning.

    Raises:
        UnreadableImages: none can be decoded.
    """
    kept, lines = readable(paths, upright=upright)
    if not len(kept):
        raise UnreadableImages(lines, shown=SHOWN, fix=_NONE_LEFT)
    if lines:
        console.warn(f"{counted(len(lines), 'file')} left out, cannot be decoded:{indented(lines, SHOWN)}")
    return kept


@contextmanager
def all_unreadable_named(paths: Sequence[Path], *, upright: bool, fix: str) -> Iterator[None]:
    """If reading images inside fails, decode all of them, to name every file that cannot be read.

    Args:
        paths: image files that are read inside.
        upright: as for open_rgb().
        fix: advice of the error.

    Raises:
        UnreadableImages: images cannot be read.
    """
    try:
        yield
    except InputError as fault:
        raise_if_exhausted(fault)
        if lines := readable(paths, upright=upright)[1]:
            raise UnreadableImages(lines, shown=SHOWN, fix=fix) from fault
        raise


def sizes_and_times(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Return bytes and time of the last change in ns of each file [N, 2].

    Raises:
        UnreadableImages: lists each file that is missing, empty or not a file.
    """

    def look(path: Path) -> tuple[int, int]:
        found = file_of(path).stat()
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            raise ValueError("empty" if stat.S_ISREG(found.st_mode) else "not a file")
        return found.st_size, found.st_mtime_ns

    seen = np.zeros((len(paths), 2), dtype=np.int64)
    with console.Progress("found image files", len(paths)) as progress:
        read_each(paths, look, seen.__setitem__, progress, threads=_IO_THREADS)
    return seen


def content_hashes(paths: Sequence[Path]) -> list[bytes]:
    """Return the sha256 of each file [N]; raises as read_each()."""

    def read(path: Path) -> bytes:
        found = sha256()
        with open_file(path) as file:
            while block := file.read(2**20):
                found.update(block)
        return found.digest()

    hashes = [b""] * len(paths)
    with console.Progress("hashed image files", len(paths)) as progress:
        read_each(paths, read, hashes.__setitem__, progress, threads=_IO_THREADS)
    return hashes


def of_all(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Make all calls and return their results; if some raise UnreadableImages, raise one with the files of all."""
    results, unreadable = [], []
    for call in calls:
        try:
            results.append(call())
        except UnreadableImages as fault:
            unreadable += fault.lines
    if unreadable:
        raise UnreadableImages(unreadable)
    return results
