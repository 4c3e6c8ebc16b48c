"""Copies of what stands beside the recipes, for a user to edit: recipes, Slurm and figure scripts, measured results.

A record in the folder has the hashes of the copies, which tell them from files of the user: a copy that was edited is
the user's.
"""

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.records import FORMAT, Record, publish_record, read_record
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError, counted, shortened

_RECORD = ".cpmix-recipes.json"
_SCRIPTS = (".sh", ".sbatch")


class _Copied(Record):
    """Content of the record."""

    files: dict[str, str]
    """Name of a copy, with the folders above it -> sha256."""


def copy_folder(source: Path, folder: Path, *, overwrite: bool) -> tuple[int, list[str]]:
    """Copy all files below a folder. Scripts name each other by the place of the copies, as it was typed.

    Args:
        source: folder of the recipes.
        folder: folder of the copies; it need not exist.
        overwrite: replace copies of another version of cpmix.

    Returns:
        Number of all copies, and the names of those that were written now.

    Raises:
        UsageError: `folder` lies in `source`. If it is `source`, nothing is written.
        EnvironmentFault: a file is there that cpmix did not write or that was edited; or that is of another version,
            without `overwrite`; or the folder cannot be written.
    """
    if source.resolve() in folder.resolve().parents:
        raise UsageError(f"{folder} lies in the recipes of cpmix", fix="give another folder with --copy")
    names = sorted(
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file() and path.name[0] != "."
    )
    if folder.resolve() == source.resolve():  # in a checkout
        return len(names), []
    copies = {name: _copy_of(source / name, folder) for name in names}
    known: dict[str, str] = {}
    with suppress(InputError):
        known = read_record(folder / _RECORD, _Copied).files
    older: list[str] = []
    strange: list[str] = []
    for name, data in copies.items():
        path = folder / name
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
            is_own = path.is_file() and not path.is_symlink() and files.sha256(path.read_bytes()) == known.get(name)
            (older if is_own else strange).append(name)
    if strange:
        raise EnvironmentFault(
            f"{folder} has {counted(len(strange), 'file')} that cpmix did not write, or that you edited: "
            f"{shortened(strange, 5)}",
            fix="copy into another folder, or move these files away",
        )
    if older and not overwrite:
        raise EnvironmentFault(
            f"{folder} has {counted(len(older), 'copy', 'copies')} of another version of cpmix: {shortened(older, 5)}",
            fix="copy into another folder, or replace them with --overwrite",
        )
    written = [name for name in names if not (folder / name).is_file() or name in older]
    if written:
        files.check_place(folder, sum(len(copies[name]) for name in written))
        hashes = {name: files.sha256(data) for name, data in copies.items()}
        for name in written:
            files.make_folder((folder / name).parent)
            files.publish(folder / name, copies[name])
        publish_record(folder / _RECORD, {"format": FORMAT, "files": {**known, **hashes}})
    return len(names), written


def _copy_of(path: Path, folder: Path) -> bytes:
    """Return the content of a file; in a script, `recipes/` before a name is the folder of the copies."""
    data = files.read_bytes(path)
    if path.suffix not in _SCRIPTS:
        return data
    place = shlex.quote(folder.as_posix())
    return re.sub(rb"(?<![\w$/])recipes/(?=\w)", lambda _: os.fsencode(place) + b"/", data)
