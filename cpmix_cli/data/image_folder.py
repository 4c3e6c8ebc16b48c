"""A user's own images: one sub-folder per class, with files of any format that Pillow reads."""

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
    """Return a digest of the names and sizes of files. It changes if a file is added, removed or changes its size."""
    sizes = [(root / path).stat().st_size if (root / path).exists() else None for path in paths]
    return digest(list(zip(paths, sizes, strict=True)))


def scan(root: Path, below: str = "", *, class_names: list[str] | None = None) -> tuple[list[str], Split]:
    """Return class names, and the image files of all classes, sorted within each class.

    Args:
        root: folder that the files' paths are relative to.
        below: folder in `root` with one sub-folder per class; "" is `root` itself. Files at any depth count.
        class_names: classes of a trained network, if there is one; a class may then have no sub-folder.

    Raises:
        InputError: the folder or its sub-folders are missing, a class has no image, or a sub-folder's class is unknown.
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
    """Return the image files in `places`: a file as given, a folder as all image files below it, sorted.

    Raises:
        InputError: a place does not exist, or a folder contains no images.
    """
    found: list[Path] = []
    suffixes = ", ".join(sorted(_SUFFIXES))
    for place in places:
        images = [place]
        if place.is_dir():
            images = sorted(f for f in _files_below(place) if f.suffix.lower() in _SUFFIXES)
            if not images:
                raise InputError(
                    f"no file below {place} has the name of an image", fix=f"give files that end in {suffixes}"
                )
        found += images
    if missing := [str(f) for f in found if not f.exists()]:
        raise InputError(
            f"no such file: {', '.join(missing)}", fix="give image files, or folders of images, that exist"
        )
    return found


def _visible_folders(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError as fault:
        raise InputError(
            f"cannot read {folder}: {fault.strerror or fault}", fix="give the folder with --data-root FOLDER"
        ) from fault
    # Hidden folders and "__MACOSX" are leftovers of tools, not classes.
    return [e for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != "__MACOSX"]


def _files_below(folder: Path) -> list[Path]:
    """Return all visible files below a folder. Linked folders are followed, each once."""
    files: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            files += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return files
