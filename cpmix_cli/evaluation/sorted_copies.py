"""Sorted copies of images: one folder per class, made whole beside its place and then moved there.

The folder's own list of its files, with their hashes, tells them from files of a user. The originals stay as they are.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cpmix_cli.artifacts import files, tables
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError, counted, shortened

_LIST = ".cpmix-sorted.parquet"
_SCHEMA = tables.schema_of("copy string", "source string", "sha256 sha256")
_LONGEST = 255  # bytes of a file name


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a different folder name for each name: without "/", no dot at its start, not too long."""
    found: list[str] = []
    for name in names:
        plain = re.sub("[/\0]", "_", name)
        plain = f"_{plain}" if not plain or plain.startswith(".") else plain
        found.append(_free(plain, "", set(found)))
    return found


def _free(stem: str, suffix: str, used: set[str]) -> str:
    """Return stem + suffix, with a number between them if the name is used; the stem is cut if it is too long."""
    number = ""
    while True:
        kept = stem
        while len(os.fsencode(f"{kept}{number}{suffix}")) > _LONGEST and kept:
            kept = kept[:-1]
        if (name := f"{kept}{number}{suffix}") not in used:
            return name
        number = f"-{int(number[1:] or 1) + 1}"


@dataclass(frozen=True)
class SortedFolder:
    """The folder of --sort-into."""

    place: Path
    """The folder, without links."""
    shown: Path
    """As it was given."""

    def write(self, paths: Sequence[Path], folders: Sequence[str], *, overwrite: bool) -> bool:
        """Copy each image into its folder, under its own name; of equal names, later ones get a number.

        Args:
            paths: image files [N]; one that is given twice is copied once.
            folders: name of the folder of each image [N].
            overwrite: replace the copies of an earlier command.

        Returns:
            False if all copies are there already.

        Raises:
            InputError: an image cannot be read.
            EnvironmentFault: the folder holds other copies and `overwrite` is not given, or it cannot be written.
        """
        names: dict[tuple[Path, str], str] = {}
        used: dict[str, set[str]] = {}
        for path, folder in dict.fromkeys(zip(paths, folders, strict=True)):
            inside = used.setdefault(folder, set())
            name = _free(path.stem, path.suffix, inside)
            inside.add(name)
            names[path, folder] = f"{folder}/{name}"
        before = self.listed()
        staging = files.temporary_for(self.place)
        files.remove_abandoned(self.place)
        files.check_place(self.place.parent, sum(path.stat().st_size for path, _ in names))
        files.make_folder(staging)
        try:
            rows = [(copy, str(path), _copy(path, staging / copy)) for (path, _), copy in names.items()]
            columns = dict(zip(_SCHEMA.names, zip(*rows, strict=True), strict=True))
            files.publish(staging / _LIST, tables.table_bytes(_SCHEMA, columns))
            if before is not None:
                found = tables.read_table(staging / _LIST, _SCHEMA)
                if before.equals(found) and all(os.path.lexists(self.place / copy) for copy, *_ in rows):
                    return False
                if not overwrite:
                    raise EnvironmentFault(
                        f"{self.shown} holds copies of another command, or not all of this one's",
                        fix="sort into another folder, or replace the copies with --overwrite",
                    )
            os.sync()  # of thousands of files at once: the move below must not be written before them
            self._move(staging)
        except OSError as fault:
            raise files.write_fault(self.shown, fault) from fault
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return True

    def _move(self, staging: Path) -> None:
        """Put the new folder into its place; on failure, the old one is there again."""
        old = staging.with_name(f"{staging.name}-before")
        is_there = self.place.is_dir() and any(self.place.iterdir())
        if is_there:
            self.place.rename(old)
        try:
            staging.rename(self.place)
        except BaseException:
            if is_there:
                old.rename(self.place)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def listed(self) -> pd.DataFrame | None:
        """Return the list of the folder's files; None if it is empty or not there.

        Raises:
            EnvironmentFault: it has files that are not on the list, or that changed since.
        """
        if not os.path.lexists(self.place):
            return None
        if not self.place.is_dir():
            raise EnvironmentFault(f"{self.shown} is not a folder", fix="give another name with --sort-into")
        listed = None
        with suppress(InputError):
            listed = tables.read_table(self.place / _LIST, _SCHEMA)
        known = {} if listed is None else dict(zip(listed["copy"], listed["sha256"], strict=True))
        strange = []
        for folder, inside, names in os.walk(self.place):
            for name in (*names, *(sub for sub in inside if Path(folder, sub).is_symlink())):
                path = Path(folder, name)
                relative = files.utf8_text(path.relative_to(self.place).as_posix())
                if relative == _LIST and listed is not None:
                    continue
                if relative not in known or path.is_symlink() or known[relative] != _hash(path):
                    strange.append(relative)
        if strange:
            raise EnvironmentFault(
                f"{self.shown} has {counted(len(strange), 'file')} that cpmix did not write, or that changed since: "
                f"{shortened(sorted(strange), 5)}",
                fix="sort into another folder, or move these files away",
            )
        return listed


def open_sorted(folder: Path, images: Sequence[Path]) -> SortedFolder:
    """Check the folder of --sort-into before the images are predicted.

    Args:
        folder: the folder; it need not exist.
        images: files and folders that were given.

    Raises:
        UsageError: it lies in one of the folders of images, or one of them in it.
        EnvironmentFault: it has files that cpmix did not write, or that changed since.
    """
    place = Path(os.path.realpath(folder))
    for given in images:
        other = Path(os.path.realpath(given))
        if place == other or place in other.parents or (other.is_dir() and other in place.parents):
            raise UsageError(
                f"--sort-into {folder} and the images in {given} are not apart, so copies would be sorted again",
                fix="give a folder outside of the images, such as --sort-into sorted",
            )
    found = SortedFolder(place, folder)
    found.listed()
    return found


def _hash(path: Path) -> bytes:
    with files.open_file(path) as file:
        return hashlib.sha256(file.read()).digest()


def _copy(path: Path, target: Path) -> bytes:
    """Copy a file, or what a link leads to, with its times; return its sha256."""
    target.parent.mkdir(exist_ok=True)
    with files.open_file(path) as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy)
    with suppress(OSError):  # a file system without them
        shutil.copystat(path, target)
    return _hash(target)
