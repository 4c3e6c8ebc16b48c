"""Lists of image files: the official splits of ImageNet-LT, Places-LT and iNaturalist 2018, and a user's own.

A list has one line 'PATH LABEL' per image, with the path relative to the folder of the images. Only the lists are
checked here. The image files are checked where they are read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from cpmix_cli.artifacts.files import digest, read_bytes
from cpmix_cli.data.decoding import SHOWN
from cpmix_cli.data.splits import Source, Split
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted, indented, shortened

_MAX_LIST = 500_000_000  # bytes; iNaturalist's training list has 30 million


@dataclass(frozen=True)
class OfficialLists:
    """Counts of a published set, against which its lists are checked."""

    name: str
    lists: Mapping[str, str]
    """Split -> file name of its list."""
    num_images: Mapping[str, int]
    """Split -> number of images."""
    num_classes: int
    largest: int
    """Training images of the largest class."""
    smallest: int
    """Training images of the smallest class."""


# Source: the released text files, counted.
IMAGENET_LT = OfficialLists(
    "imagenet-lt",
    {"train": "ImageNet_LT_train.txt", "val": "ImageNet_LT_val.txt", "test": "ImageNet_LT_test.txt"},
    {"train": 115_846, "val": 20_000, "test": 50_000},
    num_classes=1000,
    largest=1280,
    smallest=5,
)
PLACES_LT = OfficialLists(
    "places-lt",
    {"train": "Places_LT_train.txt", "val": "Places_LT_val.txt", "test": "Places_LT_test.txt"},
    {"train": 62_500, "val": 7_300, "test": 36_500},
    num_classes=365,
    largest=4980,
    smallest=5,
)
INATURALIST2018 = OfficialLists(
    "inaturalist2018",  # tested on its validation images, as in published results
    {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"},
    {"train": 437_513, "test": 24_426},
    num_classes=8142,
    largest=1000,
    smallest=2,
)


def read(list_dir: Path, published: OfficialLists, root: Path) -> Source:
    """Read the lists of a published set.

    Args:
        list_dir: folder of the lists.
        published: counts of the set, against which the lists are checked.
        root: folder of the image files.

    Raises:
        InputError: a list is missing or malformed, its counts are not the published ones, or a training image is also
            a test image.
    """
    files = {split: list_dir / name for split, name in published.lists.items()}
    splits = _read_all(files, published.num_classes)
    again = "fetch the list again; lists of your own are for the source image-folder"
    for split, expected in published.num_images.items():
        if (found := len(splits[split].labels)) != expected:
            raise InputError(
                f"{files[split]} has {counted(found, 'image')}; the published list has {expected:,}", fix=again
            )
    counts = np.bincount(splits["train"].labels)
    if (counts.max(), counts.min()) != (published.largest, published.smallest):
        raise InputError(
            f"{files['train']}: the largest class has {counts.max():,} images, the smallest {counts.min():,}; "
            f"in the published list {published.largest:,} and {published.smallest:,}",
            fix=again,
        )
    return _source(files, splits, root, f"{published.name}/cpmix")


def read_own(list_dir: Path, root: Path) -> Source:
    """Read a user's own lists: the files whose names end in train.txt, test.txt and, if one exists, val.txt.

    Raises:
        InputError: a list is missing or malformed, there is one class, or a training image is also a test image.
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
    source = _source(found, _read_all(found, None), root, "image-folder/cpmix")
    if len(source.class_names) < 2:
        raise InputError(
            f"{found['train']} has one class; a classifier needs two", fix="list images of another class, with label 1"
        )
    return replace(source, profile="ranked", name=list_dir.resolve().name)


def _source(files: Mapping[str, Path], splits: Mapping[str, Split], root: Path, recipe: str) -> Source:
    return Source(
        class_names=_class_names(splits.values(), 1 + int(splits["train"].labels.max())),
        pool=splits["train"],
        recipe=recipe,
        test=splits["test"],
        val=splits.get("val"),
        files=tuple(files.values()),
        root=root,
        listing=digest({name: [split.paths, split.labels.tolist()] for name, split in splits.items()}),
    )


def _read_all(files: Mapping[str, Path], num_classes: int | None) -> dict[str, Split]:
    """Read the lists of a set and check that labels are 0 to num_classes - 1 (None: 0 to the largest label)."""
    splits = {name: read_list(path) for name, path in files.items()}
    if num_classes is None:
        num_classes = 1 + max(int(split.labels.max()) for split in splits.values())
        if num_classes > (listed := len(splits["train"].labels)):
            raise InputError(
                f"the largest label is {num_classes - 1}, but {files['train']} has {counted(listed, 'image')}",
                fix="number the classes from 0 without a gap; each needs a training image",
            )
    for name, split in splits.items():
        outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
        limits = f"labels are 0 to {num_classes - 1}"
        _refuse(files[name], {int(i) + 1: f"label {split.labels[i]}; {limits}" for i in outside})
    missing = np.flatnonzero(np.bincount(splits["train"].labels, minlength=num_classes) == 0)
    if len(missing):
        raise InputError(
            f"{files['train']} has no image of {len(missing)} of the {num_classes} classes: "
            + shortened([str(c) for c in missing], SHOWN),
            fix="number the classes from 0 without a gap",
        )
    _refuse_overlap(files, splits)
    return splits


def read_list(path: Path) -> Split:
    """Read one list. Empty lines are skipped.

    Raises:
        InputError: a line is malformed, a path leads out of the folder or occurs twice, or no image is listed.
    """
    data = read_bytes(path, limit=_MAX_LIST)
    try:
        lines = re.split("\r?\n|\r", data.decode("utf-8-sig"))  # Windows' editors begin with a mark
    except UnicodeDecodeError as fault:
        raise InputError(
            f"{path} is not UTF-8 text: {fault.reason} at byte {fault.start:,}",
            fix="fetch the list again, or write a line 'PATH LABEL' for each image",
        ) from fault
    seen: dict[str, int] = {}
    labels: list[int] = []
    faults: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        *before, label = line.strip().rsplit(None, 1)
        image = "".join(before)
        if not image or "\x00" in image or not re.fullmatch("-?[0-9]{1,8}", label):
            faults[number] = f"{line[:80]!r} is not 'PATH LABEL'"
        elif {"", ".", ".."} & set(image.split("/")):
            faults[number] = f"{image!r} is no plain path below the folder of the images"
        elif image in seen:
            faults[number] = f"{image} stands on line {seen[image]} already"
        else:
            seen[image] = number
            labels.append(int(label))
    _refuse(path, faults)
    if not labels:
        raise InputError(f"{path} lists no image", fix="write a line 'PATH LABEL' for each image")
    return Split(np.array(labels, dtype=np.int64), paths=list(seen))


def _refuse(path: Path, faults: Mapping[int, str]) -> None:
    """Raise InputError if a list has faults: line number -> what is wrong."""
    if faults:
        lines = [f"line {number}: {why}" for number, why in faults.items()]
        raise InputError(
            f"{path} has {counted(len(lines), 'fault')}:{indented(lines, SHOWN)}", fix="fetch or repair the list"
        )


def _refuse_overlap(files: Mapping[str, Path], splits: Mapping[str, Split]) -> None:
    """Raise InputError if a training image is also a test image, which falsifies the accuracy; warn of one in val."""
    for first, second in combinations(splits, 2):
        images = set(splits[second].paths)
        shared = [path for path in splits[first].paths if path in images]
        if not shared:
            continue
        are = "is" if len(shared) == 1 else "are"
        what = f"{counted(len(shared), 'image')} of {files[first]} {are} in {files[second]} too, such as {shared[0]}"
        if "val" in (first, second):
            console.warn(what)
        else:
            raise InputError(what, fix="take them out of one of the two")


def _class_names(splits: Iterable[Split], num_classes: int) -> list[str]:
    """Return folder names as class names if each class has a folder of its own; else the labels."""
    pairs = {
        (path.rpartition("/")[0].rpartition("/")[2], label)
        for split in splits
        for path, label in zip(split.paths, split.labels.tolist(), strict=True)
    }
    folders = {label: folder for folder, label in pairs}
    names = [folders[c] for c in range(num_classes)]
    if len(pairs) == len(set(names)) == num_classes and all(names):
        return names
    return [str(c) for c in range(num_classes)]
