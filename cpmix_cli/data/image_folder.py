"""People's own images: class sub-folders, and files of any format Pillow reads, packed at one size."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cpmix_cli.artifacts.files import digest, open_file
from cpmix_cli.data.decoding import UnreadableImages, as_rgb, in_threads, reason, strict_warnings
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Files:
    """Image files with a class each."""

    root: Path
    class_names: list[str]
    paths: list[str]
    """Relative to `root`, sorted class by class."""
    labels: NDArray[np.int64]
    """Class of each file [N]."""

    @property
    def listing(self) -> str:
        """Digest of names and sizes: changes when a file is added, taken away or replaced by one of another size."""
        files = [(path, self.root / path) for path in self.paths]
        return digest([[path, file.stat().st_size if file.exists() else None] for path, file in files])

    def read(self, positions: NDArray[np.int64], shape: Sequence[int]) -> NDArray[np.uint8]:
        """The images at `positions`, see read_images()."""
        return read_images([self.root / self.paths[int(i)] for i in positions], shape)


def scan(root: Path, below: str = "", *, class_names: list[str] | None = None) -> Files:
    """The image files of a folder of class sub-folders; files deeper down belong to the class above.

    Args:
        root: what the files' paths are relative to.
        below: the folder in it (or "") whose sub-folders are the classes, in the order of their names.
        class_names: the classes to use where they are already known (those of a trained network); a class may then
            have no sub-folder.

    Raises:
        InputError: no such folder, no class sub-folders, classes without an image, or a sub-folder of an unknown class.
    """
    folder = root / below
    found = sorted(_visible_folders(folder), key=lambda f: f.name)
    if not found:
        raise InputError(
            f"{folder} has no class sub-folders",
            fix="lay the images out as FOLDER/CLASS/IMAGE.jpg, or FOLDER/train/CLASS/... and FOLDER/test/CLASS/...",
        )
    names = class_names or [f.name for f in found]
    if unknown := [f.name for f in found if f.name not in names]:
        raise InputError(
            f"{folder} has {_listed(unknown, 'sub-folder', 'sub-folders')} of no known class",
            fix=f"name the sub-folders after the classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}",
        )
    paths: list[str] = []
    labels: list[int] = []
    others = 0
    empty = []
    for sub in found:
        files = sorted(_files_below(sub))
        images = [f for f in files if f.suffix.lower() in SUFFIXES]
        others += len(files) - len(images)
        if not images:
            empty.append(sub.name)
        paths += [f.relative_to(root).as_posix() for f in images]
        labels += [names.index(sub.name)] * len(images)
    if empty:
        raise InputError(
            f"{folder}: {_listed(empty, 'class', 'classes')} without an image ({', '.join(sorted(SUFFIXES))})",
            fix="add images, or delete the empty sub-folders",
        )
    if odd := [path for path in paths if not _is_utf8(path)]:
        raise InputError(f"{folder}: names that are no UTF-8, which no table can hold: {_few(odd)}", fix="rename them")
    if others:
        console.warn(f"{folder}: {others} file{'s' if others > 1 else ''} left out, no image by the name")
    return Files(root, names, paths, np.array(labels, dtype=np.int64))


def find_images(places: Sequence[Path]) -> list[Path]:
    """Files as given, and all image files below folders, sorted.

    Raises:
        InputError: a place that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for place in places:
        images = [place]
        if place.is_dir():
            images = sorted(f for f in _files_below(place) if f.suffix.lower() in SUFFIXES)
            if not images:
                raise InputError(f"{place} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += images
    if missing := [str(f) for f in found if not f.exists()]:
        raise InputError(f"no such file: {', '.join(missing)}")
    return found


def read_images(paths: Sequence[Path], shape: Sequence[int]) -> NDArray[np.uint8]:
    """Files as uint8 [n, H, W, channels]: rotated as EXIF says, the shorter side scaled to fit, the middle kept.

    Transparency is laid on white, CMYK and palettes become RGB, 16-bit grey keeps its upper 8 bits.

    Args:
        paths: of the files.
        shape: (H, W, channels) to pack at; 3 channels or 1.

    Raises:
        UnreadableImages: with every file that cannot be read, and why.
    """
    images = np.empty((len(paths), *shape), dtype=np.uint8)
    faults: dict[int, str] = {}

    def read(i: int) -> None:
        try:
            images[i] = _read_image(paths[i], shape)
        except Exception as fault:  # Pillow's plugins raise whatever a broken file makes them raise
            faults[i] = reason(fault)

    with strict_warnings():
        for done, _ in enumerate(in_threads(read, len(paths)), 1):
            if done % 10_000 == 0:
                console.note(f"read {done:,} of {len(paths):,} images")
    if faults:
        raise UnreadableImages([f"{paths[i]}: {faults[i]}" for i in sorted(faults)])
    return images


def _read_image(path: Path, shape: Sequence[int]) -> NDArray[np.uint8]:
    height, width, channels = shape
    with open_file(path) as file, Image.open(file) as image:
        # JPEG decodes at 1/2, 1/4 or 1/8 size for little; twice the size wanted leaves the scaling its say.
        image.draft(None, (2 * width, 2 * height))
        upright: Image.Image = ImageOps.exif_transpose(image)
        pixels = ImageOps.fit(as_rgb(upright), (width, height), Image.Resampling.BICUBIC)
    array = np.asarray(pixels if channels == 3 else pixels.convert("L"), dtype=np.uint8)
    return array.reshape(height, width, channels)


def _visible_folders(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError as fault:
        raise InputError(
            f"cannot read {folder}: {fault.strerror or fault}", fix="give the folder with --data-root FOLDER"
        ) from fault
    # Hidden folders and "__MACOSX" are what tools leave behind.
    return [e for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != "__MACOSX"]


def _files_below(folder: Path) -> list[Path]:
    """All visible files below a folder; linked folders are followed, each once."""
    files: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            files += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return files


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _few(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
    return ", ".join(repr(os.fsencode(path))[1:] for path in paths[:5]) + more


def _listed(names: Sequence[str], what: str, plural: str) -> str:
    """'1 class (a)', '2 classes (a, b)'."""
    return f"{len(names):,} {what if len(names) == 1 else plural} ({', '.join(names)})"
