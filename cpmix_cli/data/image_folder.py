"""A user's own images: a scan that gives each file of a folder its split and class, or the reason why it is left out.

Nothing is left out without being counted: LeftOut is the table at the end of build-lt, and what commands warn of.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cpmix_cli.artifacts.files import DATASET, MAX_RECORD, PHASES, RUN, TRAINING_STATE, digest, open_file
from cpmix_cli.data.decoding import ENDINGS, SHOWN
from cpmix_cli.data.splits import Split
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted, indented, shortened
from cpmix_cli.runtime.text import quoted

Layout = Literal["auto", "classes", "splits"]
"""Meaning of the sub-folders: all are classes; train, val and test are splits; or what their names say."""

HIDDEN = "hidden, its name begins with a dot"
SYSTEM = "thumbnails, recycle bins and notes of other programs"
OUTPUT = "written by cpmix"
LINK = "a link to a folder that is read already"
NO_IMAGE = "no image by the name"
LOOSE = "not in the folder of a class"
NO_SPLIT = "beside the folder of the training images, and no split"
UNREADABLE = "cannot be read"

LeftOut = Mapping[str, Mapping[str, int]]
"""Reason -> path below the scanned folder -> number of files; a path that ends in "/" is a whole folder."""

_SYSTEM_NAMES = {
    *("@eadir", "@synoresource", "@tmp", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "~snapshot"),  # NAS
    *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found", "found.000", "__macosx"),
    *("thumbs", "thumbs.db", "ehthumbs.db", "thumbnails", "_thumbs", "_thumbnails", "desktop.ini", "icon\r"),
    *("picasa.ini", "zbthumbnail.info", "__pycache__"),
}
_POSSIBLE_CLASSES = {"recycler", "recycled", "thumbs", "thumbnails"}
_SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev(?:elopment)?)|(?P<test>test(?:ing)?))"
    r"(?:[-_ ]?(?:set|data|images|split))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Found:
    """Images of a folder."""

    class_names: list[str]
    splits: dict[str, Split]
    """train, and val and test if there are folders of them; the images of each class are sorted."""
    left_out: LeftOut


def listing(root: Path, paths: Sequence[str]) -> tuple[str, str]:
    """Return a digest of the names and sizes of files, and one of the times of their last change.

    The first changes if a file is added, removed or changes its size. The second changes with any edit, but a copy of
    the folder may have other times too.
    """
    found = [_stat(root / path) for path in paths]
    sizes = [(path, file and file.st_size) for path, file in zip(paths, found, strict=True)]
    return digest(sizes), digest([file and file.st_mtime_ns for file in found])


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _is_folder(path: Path) -> bool:
    found = _stat(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def scan(
    root: Path, *, layout: Layout = "auto", class_names: list[str] | None = None, skip_unreadable: bool = False
) -> Found:
    """Find the image files below a folder, at any depth, and the split and class of each.

    Args:
        root: folder that the files' paths are relative to.
        layout: what the sub-folders are. "auto": splits, if one of them is called like training images.
        class_names: classes of a trained network, if there is one; a class may then have no sub-folder.
        skip_unreadable: leave out links and folders that cannot be read.

    Raises:
        InputError: something cannot be read, the sub-folders are missing or may be classes as well as splits, a class
            has no image, or a sub-folder's class is unknown.
    """
    walk = _Walk(root, skip_unreadable=skip_unreadable)
    tops, loose = walk.entries(root)
    walk.leave_out(LOOSE, *loose)
    walk.check()
    splits = _split_folders(walk, tops, layout)
    names, images = (
        _of_classes(walk, splits["train"], class_names) if splits else _of_classes(walk, root, class_names, tops)
    )
    found = {"train": images}
    for split in ("val", "test"):
        if split in splits:
            found[split] = _of_classes(walk, splits[split], names)[1]
    walk.check()
    return Found(names, found, walk.left_out)


def find_images(places: Sequence[Path], *, skip_unreadable: bool = False) -> list[Path]:
    """Return the image files in `places`: a file as given, a folder as all image files below it, sorted.

    What is left out of a folder is named in a warning.

    Args:
        places: files and folders.
        skip_unreadable: leave out links and folders that cannot be read.

    Raises:
        InputError: a place does not exist, a folder contains no images, or something below it cannot be read.
    """
    found: list[Path] = []
    for place in places:
        images = [place]
        if place.is_dir():
            walk = _Walk(place, skip_unreadable=skip_unreadable)
            images = walk.images(place)
            walk.check()
            warn_of(place, walk.left_out)
            if not images:
                raise InputError(
                    f"no file below {place} has the name of an image",
                    fix=f"give files that end in {', '.join(sorted(ENDINGS))}",
                )
        found += images
    if missing := [str(f) for f in found if not os.path.lexists(f)]:
        raise InputError(
            f"no such file: {', '.join(missing)}", fix="give image files, or folders of images, that exist"
        )
    return found


def warn_of(root: Path, left_out: LeftOut) -> None:
    """Name what is left out of a folder, in one line per reason."""
    for reason, paths in left_out.items():
        line = f"{root}: {counted(sum(paths.values()), 'file')} left out, {reason}: {shortened(list(paths), 5)}"
        names = {Path(path).name.lower() for path in paths if path.endswith("/")}
        if reason == HIDDEN or (reason == SYSTEM and not names & _POSSIBLE_CLASSES):
            console.note(line)
        else:
            console.warn(line)


def rows_of(left_out: LeftOut) -> list[list[str]]:
    """Return a table row per reason: what, number of files, examples."""
    return [
        [f"left out: {reason}", f"{sum(paths.values()):,}", shortened(list(paths), 3)]
        for reason, paths in left_out.items()
    ]


# -- splits and classes ------------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """Return the split (train, val or test) that a folder is called like, in any usual spelling; None for others."""
    found = _SPLIT_NAME.fullmatch(name)
    return found.lastgroup if found else None


def _split_folders(walk: "_Walk", tops: list[Path], layout: Layout) -> dict[str, Path]:
    """Return the folder of each split, or {} if the folders `tops` are classes.

    Raises:
        InputError: they may be either, or two folders are of one split.
    """
    named: dict[str, list[Path]] = {}
    others = []
    for folder in tops:
        split = split_of(folder.name)
        named.setdefault(split, []).append(folder) if split else others.append(folder)
    if layout == "classes" or (not named and layout == "auto"):
        if layout == "auto":
            _refuse_splits_inside(walk, tops)
        _warn_of_equal_insides(tops)
        return {}
    said = shortened([repr(f.name) for folders in named.values() for f in folders], 5)
    all_classes = f"if {said} {'is a class' if sum(map(len, named.values())) == 1 else 'are classes'}: --layout classes"
    if twice := [folders for folders in named.values() if len(folders) > 1]:
        names = " and ".join(repr(f.name) for f in twice[0])
        raise InputError(
            f"{walk.root} has {names}, two folders of one split", fix=f"rename or move one of them; {all_classes}"
        )
    if not named:
        raise InputError(
            f"{walk.root} has no folder of training images",
            needed_by="--layout splits",
            fix="call it train, with a sub-folder for each class; or drop the flag",
        )
    if "train" not in named:
        beside = f" beside {shortened([repr(f.name) for f in others], 5)}" if others else ""
        raise InputError(
            f"{walk.root} has {said}{beside}, and no folder of training images{walk.said_of_links(walk.root)}",
            fix=f"for splits, move the classes into {walk.root / 'train'}; {all_classes}",
        )
    train = named["train"][0]
    inside = [f.name for f in walk.sub_folders(train)]
    with_images = [f for f in others if walk.has_image(f)]
    if with_images and layout == "auto":
        if not inside and len(named) == 1:
            return {}  # a class of that name
        if not inside or len(named) == 1:
            raise InputError(
                f"{train} has {'sub-folders: ' + shortened(inside, 5) if inside else 'no sub-folders'}; "
                f"beside it are images too: {shortened([f.name for f in with_images], 5)}",
                fix=f"{all_classes}; if the classes are inside: --layout splits",
            )
    for folder in others:
        walk.leave_out(NO_SPLIT, folder)
    if inside and all(map(split_of, inside)):
        raise InputError(
            f"{train} has no classes inside but {shortened(inside, 5)}, the name of a split again",
            fix=f"move the classes up into {train}; {all_classes}",
        )
    return {split: folders[0] for split, folders in named.items()}


def _refuse_splits_inside(walk: "_Walk", tops: list[Path]) -> None:
    """Raise InputError if a class has several splits inside: the images of all would be mixed."""
    for top in tops:
        inside = [folder for folder in walk.sub_folders(top) if split_of(folder.name)]
        if len({split_of(folder.name) for folder in inside}) > 1:
            is_whole = any(walk.sub_folders(folder) for folder in inside)
            moved = ", ".join(str(walk.root / folder.name / top.name) for folder in inside)
            raise InputError(
                f"{top} has {shortened([repr(folder.name) for folder in inside], 5)} inside",
                fix=(
                    f"for splits, give {quoted('--data-root', top)}"
                    if is_whole
                    else f"for splits, move them to {moved}"
                )
                + f"; if all of their images are of the class {top.name!r}: --layout classes",
            )


def _warn_of_equal_insides(tops: list[Path]) -> None:
    """Warn if classes hold the same sub-folders, as splits of another name do."""
    insides: dict[tuple[str, ...], list[str]] = {}
    for folder in tops:
        try:
            inside = tuple(sorted(f.name for f in os.scandir(folder) if f.is_dir() and not f.name.startswith(".")))
        except OSError:
            continue
        if len(inside) > 1:
            insides.setdefault(inside, []).append(folder.name)
    for inside, names in insides.items():
        if 1 < len(names) == len(tops):
            console.warn(
                f"{shortened(names, 5)} are taken as classes, and all hold the sub-folders {shortened(inside, 5)}; "
                "if they are splits, rename them to train, val and test"
            )


def _of_classes(
    walk: "_Walk", folder: Path, class_names: list[str] | None, found: list[Path] | None = None
) -> tuple[list[str], Split]:
    """Return class names and images of a folder with one sub-folder per class.

    Args:
        walk: notes what is left out.
        folder: the folder.
        class_names: known classes; None: those of the sub-folders.
        found: the sub-folders, if they are known already.

    Raises:
        InputError: as scan().
    """
    if found is None:
        found, loose = walk.entries(folder)
        walk.leave_out(LOOSE, *loose)
        walk.check()
    images = {sub: walk.images(sub) for sub in found}
    walk.check()
    if class_names is None:
        _note_sub_folders(images)
    # A folder of which cpmix wrote all, such as data/ with data sets, is no class.
    found = [sub for sub in found if images[sub] or not walk.is_left_out(OUTPUT, sub)]
    if not found:
        raise InputError(
            f"{folder} has no class sub-folders{walk.said_of_links(folder)}",
            fix="lay the images out as FOLDER/CLASS/IMAGE.jpg, or FOLDER/train/CLASS/... and FOLDER/test/CLASS/..."
            if folder == walk.root
            else f"sort its images into class sub-folders, or move it out of {walk.root}",
        )
    by_class: dict[str, list[Path]] = {}
    for sub in found:  # a name may be spelled in two Unicode forms, which look alike
        by_class.setdefault(unicodedata.normalize("NFC", sub.name), []).append(sub)
    for subs in by_class.values():
        if len(subs) > 1:
            console.warn(
                f"{folder}: {len(subs)} folders of the name {subs[0].name}, in two Unicode forms, are one class"
            )
    if class_names is None:
        _warn_of_similar(folder, list(by_class))
    names = class_names or [subs[0].name for subs in by_class.values()]
    numbers = {unicodedata.normalize("NFC", name): number for number, name in enumerate(names)}
    if unknown := [subs[0].name for name, subs in by_class.items() if name not in numbers]:
        splits = sorted((name for name in unknown if split_of(name)), key=lambda name: split_of(name) == "test")
        spelled = {_folded(name): name for name in names}
        renamed = [(name, spelled[_folded(name)]) for name in unknown if _folded(name) in spelled]
        others = f"; the classes are spelled {shortened([b for _, b in renamed], 5)}" if renamed else ""
        fix = f"name the sub-folders after the classes: {shortened(names, 20)}"
        if len(splits) == len(unknown):
            fix = f"give one of its splits: {folder / splits[-1]}"
        elif len(renamed) == len(unknown) <= 5:
            fix = " && ".join(quoted("mv", folder / old, folder / new) for old, new in renamed)
        raise InputError(
            f"{folder} has {counted(len(unknown), 'sub-folder')} ({', '.join(unknown)}) of no known class{others}",
            fix=fix,
        )
    if empty := [subs[0].name for subs in by_class.values() if not any(images[sub] for sub in subs)]:
        raise InputError(
            f"{folder}: {counted(len(empty), 'class', 'classes')} ({', '.join(empty)}) without an image "
            f"({', '.join(sorted(ENDINGS))}){walk.said_of(folder / empty[0])}",
            fix="add images, or delete the empty sub-folders",
        )
    of_class = {numbers[name]: sorted(f for sub in subs for f in images[sub]) for name, subs in by_class.items()}
    paths = [f.relative_to(walk.root).as_posix() for inside in of_class.values() for f in inside]
    if odd := [repr(os.fsencode(path))[1:] for path in paths if path != path.encode(errors="ignore").decode()]:
        raise InputError(
            f"{folder}: names that are no UTF-8, which no table can hold: {shortened(odd, 5)}", fix="rename them"
        )
    return names, Split(np.repeat(list(of_class), [len(inside) for inside in of_class.values()]), paths=paths)


def _note_sub_folders(images: Mapping[Path, Sequence[Path]]) -> None:
    """Name the sub-folders whose images are of the class above: class folder -> its images."""
    inside = {
        folder.name: sorted(str(at.relative_to(folder)) for at in {file.parent for file in files} - {folder})
        for folder, files in images.items()
    }
    if shown := [f"{name} ({shortened(below, 5)})" for name, below in inside.items() if below]:
        console.note(f"images of sub-folders are of the class above: {shortened(shown, 5)}")


def _folded(name: str) -> str:
    """Return a class name without the differences that are easily overlooked: case, spaces, Unicode form."""
    shown = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return re.sub(r"[\s_-]+", " ", shown).strip().casefold()


def _warn_of_similar(folder: Path, names: Sequence[str]) -> None:
    """Name the classes whose names hardly differ."""
    similar: dict[str, list[str]] = {}
    for name in names:
        similar.setdefault(_folded(name), []).append(repr(name))
    if groups := [" and ".join(spelled) for spelled in similar.values() if len(spelled) > 1]:
        console.warn(f"{folder}: names of classes that hardly differ: {shortened(groups, 5, '; ')}")


# -- the walk ----------------------------------------------------------------------------------------------------------


class _Walk:
    """A walk through a folder, which notes what it leaves out and what it cannot read.

    Linked folders are followed if they are outside of the folder, each once.

    Args:
        root: the folder.
        skip_unreadable: leave out what cannot be read, instead of an error in check().
    """

    def __init__(self, root: Path, *, skip_unreadable: bool) -> None:
        self.root = root
        self.left_out: dict[str, dict[str, int]] = {}
        self._skip = skip_unreadable
        self._faults: list[str] = []
        self._real_root = Path(os.path.realpath(root))
        self._linked: set[Path] = set()

    def check(self) -> None:
        """Raise InputError if something could not be read."""
        if self._faults:
            first = self._faults[0]
            raise InputError(
                f"cannot read {first}"
                if len(self._faults) == 1
                else f"{len(self._faults)} files or folders cannot be read:{indented(self._faults, SHOWN)}",
                fix="give their permissions back or repair the links, or go on without them: --skip-unreadable",
            )

    def leave_out(self, reason: str, *paths: Path, why: str = "") -> None:
        """Note files or folders that are left out, with the number of files in them."""
        for path in paths:
            is_folder = _is_folder(path) and not path.is_symlink()
            number = sum(len(files) for _, _, files in os.walk(path)) if is_folder else 1
            name = path.relative_to(self.root).as_posix() + ("/" if is_folder else "")
            self.left_out.setdefault(reason, {})[name + why] = number

    def is_left_out(self, reason: str, folder: Path) -> bool:
        """Return whether something in a folder is left out for a reason."""
        inside = folder.relative_to(self.root).as_posix() + "/"
        return any(path.startswith(inside) for path in self.left_out.get(reason, {}))

    def said_of(self, folder: Path) -> str:
        """Return what is left out of a folder, for the end of a message."""
        reasons = [reason for reason in self.left_out if self.is_left_out(reason, folder)]
        linked = self.left_out.get(LINK, {}).get(folder.relative_to(self.root).as_posix())
        reasons += [LINK] if linked else []
        return f"; left out: {', '.join(reasons)}" if reasons else ""

    def said_of_links(self, folder: Path) -> str:
        """Return which links in a folder are left out, for the end of a message."""
        links = [path for path in self.left_out.get(LINK, {}) if (self.root / path).parent == folder]
        return f"; left out as links to folders that are read already: {shortened(links, 5)}" if links else ""

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the folders and the files in a folder, sorted by name, without what is left out."""
        try:
            with os.scandir(folder) as listed:
                found = sorted(listed, key=lambda entry: entry.name)
        except OSError as fault:
            if folder == self.root:
                raise InputError(
                    f"cannot read {folder}: {fault.strerror or fault}", fix="give the folder with --data-root FOLDER"
                ) from fault
            self._not_read(folder, fault.strerror or str(fault))
            return [], []
        folders, files = [], []
        of_run = {*PHASES, "evaluation", "confusion"}
        is_run = any(entry.name in of_run for entry in found) and _is_run(folder)
        for entry in found:
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_NAMES:
                is_thumbnails = entry.name.lower() in (".thumbnails", ".thumbs") or entry.name.startswith(".Trash")
                is_hidden = entry.name.startswith(".") and not is_thumbnails
                self.leave_out(HIDDEN if is_hidden else SYSTEM, path)
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and _is_folder(path)):
                is_part = entry.name in of_run and is_run
                if is_part or ((_is_output(path) or _is_run(path)) and not self.has_image(path)):
                    self.leave_out(OUTPUT, path)
                elif entry.is_symlink() and not self._follows(path):
                    self.leave_out(LINK, path)
                else:
                    folders.append(path)
            elif entry.is_symlink() and not _is_image(path) and _stat(path) is None:
                is_gone = not os.path.lexists(os.path.realpath(path))
                lost = "which is not there" if is_gone else "which cannot be read"
                self._not_read(path, f"it is a link to {path.readlink()}, {lost}")
            else:
                files.append(path)
        return folders, files

    def sub_folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder that are not left out; notes nothing."""
        with suppress(InputError):
            return _Walk(folder, skip_unreadable=True).entries(folder)[0]
        return []

    def has_image(self, folder: Path) -> bool:
        """Return whether a file below a folder has the name of an image; notes nothing."""
        with suppress(InputError):
            return any(_is_image(file) for file in _Walk(folder, skip_unreadable=True)._files_below(folder))
        return False

    def images(self, folder: Path) -> list[Path]:
        """Return all image files below a folder, sorted."""
        found: list[Path] = []
        for file in self._files_below(folder):
            if _is_image(file):
                found.append(file)
            else:
                self.leave_out(NO_IMAGE, file)
        return sorted(found)

    def _files_below(self, folder: Path) -> Iterator[Path]:
        waiting = [folder]
        while waiting:
            folders, files = self.entries(waiting.pop())
            yield from files
            waiting += reversed(folders)

    def _follows(self, link: Path) -> bool:
        """Return whether a linked folder leads out of the folder, to a place where no link led before."""
        real = Path(os.path.realpath(link))
        if real in (self._real_root, *self._real_root.parents, *self._linked):
            return False
        if self._real_root in real.parents:  # only what would be left out is reached by this link alone
            inside = real.relative_to(self._real_root).parts
            return any(part.startswith(".") for part in inside)
        if any(real in known.parents or known in real.parents for known in self._linked):
            return False
        self._linked.add(real)
        return True

    def _not_read(self, path: Path, why: str) -> None:
        if self._skip:
            self.leave_out(UNREADABLE, path, why=f": {why}")
        else:
            self._faults.append(f"{path}: {why}")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _is_output(folder: Path) -> bool:
    """Return whether a folder is a data set, a phase, an evaluation or a report, by its record."""
    for name in (DATASET, RUN):
        try:
            with open_file(folder / name) as file:
                data = file.read(MAX_RECORD)
        except (InputError, OSError):
            continue
        if b'"format"' in data and b'"digest"' in data:  # a user's own dataset.json has no digest
            return True
    return False


def _is_run(folder: Path) -> bool:
    """Return whether a folder has phases, evaluations or reports of a run."""
    names = [f"{phase}/{name}" for phase in PHASES for name in (RUN, TRAINING_STATE)]
    if any(_stat(folder / name) is not None for name in names):
        return True
    with suppress(OSError):  # a folder that cannot be read is named when its images are looked for
        return any(next((folder / name).glob(f"*/{RUN}"), None) for name in ("evaluation", "confusion"))
    return False
