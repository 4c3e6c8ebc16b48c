"""People's own images: class sub-folders of files of any format that Pillow reads."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpmix_cli.artifacts.files import digest
from cpmix_cli.data.splits import Split
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted, shortened

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def listing(root: Path, paths: Sequence[str]) -> str:
    """Return a digest of names and sizes: it changes if a file is added, removed or replaced by one of another size."""
    sizes = [(root / path).stat().st_size if (root / path).exists() else None for path in paths]
    return digest(list(zip(paths, sizes, strict=True)))


def scan(root: Path, below: str = "", *, class_names: list[str] | None = None) -> tuple[list[str], Split]:
    """Return class names, and image files with their classes, sorted class by class.

    Args:
        root: folder that the files' paths are relative to.
        below: the folder in it (or "") whose sub-folders are the classes, by name; files deeper down belong to them.
        class_names: classes of a trained network, if there is one; a class may then have no sub-folder.

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
            f"{folder} has {counted(len(unknown), 'sub-folder')} ({', '.join(unknown)}) of no known class",
            fix=f"name the sub-folders after the classes: {shortened(names, 20)}",
        )
    files = {sub.name: sorted(_files_below(sub)) for sub in found}
    images = {name: [f for f in inside if f.suffix.lower() in _SUFFIXES] for name, inside in files.items()}
    if empty := [name for name, inside in images.items() if not inside]:
        raise InputError(
            f"{folder}: {counted(len(empty), 'class', 'classes')} ({', '.join(empty)}) without an image "
            f"({', '.join(sorted(_SUFFIXES))})",
            fix="add images, or delete the empty sub-folders",
        )
    paths = [f.relative_to(root).as_posix() for inside in images.values() for f in inside]
    if odd := [repr(os.fsencode(path))[1:] for path in paths if path != path.encode(errors="ignore").decode()]:
        raise InputError(
            f"{folder}: names that are no UTF-8, which no table can hold: {shortened(odd, 5)}", fix="rename them"
        )
    if others := sum(map(len, files.values())) - len(paths):
        console.warn(f"{folder}: {counted(others, 'file')} left out, no image by the name")
    labels = np.repeat([names.index(name) for name in images], [len(inside) for inside in images.values()])
    return names, Split(labels, paths=paths)


def find_images(places: Sequence[Path]) -> list[Path]:
    """Return files as given, and all image files below folders, sorted.

    Raises:
        InputError: a place that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for place in places:
        images = [place]
        if place.is_dir():
            images = sorted(f for f in _files_below(place) if f.suffix.lower() in _SUFFIXES)
            if not images:
                raise InputError(f"{place} holds no images ({', '.join(sorted(_SUFFIXES))})")
        found += images
    if missing := [str(f) for f in found if not f.exists()]:
        raise InputError(f"no such file: {', '.join(missing)}")
    return found


def _visible_folders(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError as fault:
        raise InputError(
            f"cannot read {folder}: {fault.strerror or fault}", fix="give the folder with --data-root FOLDER"
        ) from fault
    # Tools leave hidden folders and "__MACOSX" behind.
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
