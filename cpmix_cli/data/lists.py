"""Lists of image files: the official splits of ImageNet-LT, Places-LT and iNaturalist 2018, and a user's own.

A list has a line 'PATH LABEL' for each image, the path below the folder of the images. What a list says is checked
here; whether the files are there is checked where they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts.files import digest, read_bytes
from cpmix_cli.data.decoding import SHOWN
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError

MAX_LIST = 500_000_000  # bytes; iNaturalist's training list has 30 million


@dataclass(frozen=True)
class OfficialLists:
    """What is known of a published set."""

    lists: Mapping[str, str]
    """Split -> file."""
    num_images: Mapping[str, int]
    """Of each split."""
    num_classes: int
    largest: int
    """Training images of the largest class."""
    smallest: int


# Source: the released text files, counted; reference/methods_mixing.md section 1b.
IMAGENET_LT = OfficialLists(
    {"train": "ImageNet_LT_train.txt", "val": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"},
    {"train": 115_846, "val": 20_000, "test": 50_000},
    num_classes=1000,
    largest=1280,
    smallest=5,
)
PLACES_LT = OfficialLists(
    {"train": "Places_LT_train.txt", "val": "Places_LT_val.txt", "test": "Places_LT_test.txt"},
    {"train": 62_500, "val": 7_300, "test": 36_500},
    num_classes=365,
    largest=4980,
    smallest=5,
)
INATURALIST2018 = OfficialLists(  # whose validation images everybody tests on
    {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"},
    {"train": 437_513, "test": 24_426},
    num_classes=8142,
    largest=1000,
    smallest=2,
)


@dataclass(frozen=True)
class Listed:
    """The images of one list, in its order."""

    path: Path
    """Of the list."""
    paths: list[str]
    labels: NDArray[np.int64]
    """Class of each image [n]."""


@dataclass(frozen=True)
class Lists:
    """The lists of a set that belong together."""

    class_names: list[str]
    splits: dict[str, Listed]
    """train, test, and val where there is one."""

    @property
    def listing(self) -> str:
        """Digest of all paths and labels."""
        return digest({split: [one.paths, one.labels.tolist()] for split, one in self.splits.items()})


def read(list_dir: Path, published: OfficialLists) -> Lists:
    """The lists of a published set.

    Raises:
        InputError: a list is missing or malformed, differs from what is known of the set, or has a training image that
            is a test image as well.
    """
    lists = _read_all({split: list_dir / name for split, name in published.lists.items()}, published.num_classes)
    for split, one in lists.splits.items():
        if len(one.paths) != published.num_images[split]:
            raise InputError(
                f"{one.path} has {len(one.paths):,} images; the published list has {published.num_images[split]:,}",
                fix="fetch the list again; lists of your own: build-lt image-folder --list-dir DIR",
            )
    train = lists.splits["train"]
    counts = np.bincount(train.labels, minlength=published.num_classes)
    if (counts.max(), counts.min()) != (published.largest, published.smallest):
        raise InputError(
            f"{train.path}: the largest class has {counts.max():,} images, the smallest {counts.min():,}; "
            f"in the published list {published.largest:,} and {published.smallest:,}",
            fix="fetch the list again; lists of your own: build-lt image-folder --list-dir DIR",
        )
    return lists


def read_own(list_dir: Path) -> Lists:
    """A user's own lists: the files whose names end in train.txt, test.txt and (where there is one) val.txt.

    Raises:
        InputError: as read(), but that nothing is known of the set.
    """
    found: dict[str, Path] = {}
    for split in ("train", "val", "test"):
        files = sorted(list_dir.glob(f"*{split}.txt"))
        if len(files) > 1:
            raise InputError(
                f"{list_dir} has {len(files)} lists for {split}: {', '.join(f.name for f in files)}", fix="leave one"
            )
        if not files and split != "val":
            raise InputError(
                f"no list *{split}.txt in {list_dir}",
                fix="write train.txt and test.txt with a line 'PATH LABEL' for each image",
            )
        if files:
            found[split] = files[0]
    return _read_all(found, None)


def _read_all(files: Mapping[str, Path], num_classes: int | None) -> Lists:
    """The lists of a set, labels 0 to num_classes - 1 (None: to the largest there is)."""
    splits = {split: read_list(path) for split, path in files.items()}
    if num_classes is None:
        num_classes = 1 + max(int(one.labels.max()) for one in splits.values())
    for one in splits.values():
        outside = np.flatnonzero((one.labels < 0) | (one.labels >= num_classes))
        _refuse(one.path, {int(i) + 1: f"label {one.labels[i]}; labels are 0 to {num_classes - 1}" for i in outside})
    missing = np.flatnonzero(np.bincount(splits["train"].labels, minlength=num_classes) == 0)
    if len(missing):
        shown = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise InputError(
            f"{splits['train'].path} has no image of {len(missing)} of the {num_classes} classes: {shown}",
            fix="number the classes from 0 without a gap",
        )
    _refuse_overlap(splits)
    return Lists(_class_names(splits, num_classes), splits)


def read_list(path: Path) -> Listed:
    """One list; empty lines are passed over.

    Raises:
        InputError: it is missing or no text, or has malformed lines, paths that lead out of the folder, or paths that
            stand there twice: with the first 20.
    """
    data = read_bytes(path, limit=MAX_LIST)
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as fault:
        raise InputError(f"{path} is no list: not UTF-8 text ({fault.reason} at byte {fault.start:,})") from fault
    seen: dict[str, int] = {}
    labels: list[int] = []
    faults: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        *before, label = line.strip().rsplit(None, 1)
        image = "".join(before)
        if not image or "\x00" in image or not label.removeprefix("-").isdecimal() or len(label) > 9:
            faults[number] = f"{console.on_a_line(line)[:80]!r} is not 'PATH LABEL'"
        elif {"", ".", ".."} & set(image.split("/")):
            faults[number] = f"{image!r} is no plain path below the folder of the images"
        elif image in seen:
            faults[number] = f"{image} stands on line {seen[image]} already"
        else:
            seen[image] = number
            labels.append(int(label))
    _refuse(path, faults)
    if not labels:
        raise InputError(f"{path} lists no image")
    return Listed(path, list(seen), np.array(labels, dtype=np.int64))


def _refuse(path: Path, faults: Mapping[int, str]) -> None:
    """Refuse a list for its lines.

    Raises:
        InputError: with the first of them.
    """
    if not faults:
        return
    lines = [f"line {number}: {why}" for number, why in faults.items()]
    more = f"\n    ... and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
    count = "1 fault" if len(lines) == 1 else f"{len(lines):,} faults"
    raise InputError(f"{path} has {count}:\n    " + "\n    ".join(lines[:SHOWN]) + more, fix="fetch or mend the list")


def _refuse_overlap(splits: Mapping[str, Listed]) -> None:
    """A training image that is a test image as well makes every accuracy wrong; one in val is warned of.

    Raises:
        InputError: there is one.
    """
    for first, second in combinations(splits, 2):
        images = set(splits[second].paths)
        shared = [path for path in splits[first].paths if path in images]
        if not shared:
            continue
        what = f"{len(shared):,} images of {splits[first].path} are in {splits[second].path} too, such as {shared[0]}"
        if "val" in (first, second):
            console.warn(what)
        else:
            raise InputError(what, fix="take them out of one of the two")


def _class_names(splits: Mapping[str, Listed], num_classes: int) -> list[str]:
    """The folders of the images, if each class has one to itself; else the labels."""
    folders: dict[int, str] = {}
    for one in splits.values():
        for path, label in zip(one.paths, one.labels.tolist(), strict=True):
            folder = path.rpartition("/")[0].rpartition("/")[2]
            if folders.setdefault(label, folder) != folder:
                return [str(c) for c in range(num_classes)]
    names = [folders[c] for c in range(num_classes)]
    return names if len(set(names)) == num_classes and all(names) else [str(c) for c in range(num_classes)]
