"""Equal images of a data set: duplicates in classes and splits, and image files that changed since it was built."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cpmix_cli.artifacts.files import DATASET
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.decoding import SHOWN, UnreadableImages, content_hashes, read_each, read_square, sizes_and_times
from cpmix_cli.data.parquet_rows import file_of
from cpmix_cli.data.splits import Source
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, counted, indented


def _image_keys(dataset: Dataset, split: str) -> list[bytes]:
    """Return a key per image [N], equal for equal pixels; of a user's images left in their files, for equal bytes."""
    if (seen := dataset.seen(split)) is not None:
        return list(seen["sha256"])
    if dataset.storage == "shards":
        return [row.tobytes() for row in dataset.shards(split).hashes]
    return [sha256(image.tobytes()).digest() for image in dataset.read(split)[0].numpy()]


def warn_of_duplicates(dataset: Dataset, *, is_own: bool) -> None:
    """Name images that are in two splits, and a user's own images that are in two classes."""
    if dataset.storage == "files" and not is_own:
        return  # published sets: comparing their files would read them all
    keys = {split: _image_keys(dataset, split) for split in dataset.splits}
    names = {split: list(map(str, dataset.paths(split))) if dataset.data_root else [] for split in dataset.splits}
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        if not {first, second} <= keys.keys():
            continue
        known = {key: number for number, key in reversed(list(enumerate(keys[first])))}
        shared = [(known[key], number) for number, key in enumerate(keys[second]) if key in known]
        pairs = [f"{names[second][j]} = {names[first][i]}" for i, j in shared if names[first]]
        if shared:
            of = "a training image" if first == "train" else "a val image"
            shown = f":{indented(pairs, SHOWN)}" if pairs else ""
            are = "is" if len(shared) == 1 else "are"
            console.warn(
                f"{len(shared)} of {counted(len(keys[second]), f'{second} image')} {are} identical to {of}{shown}"
            )
    if is_own:
        seen: dict[bytes, tuple[int, str, str]] = {}
        mixed, twice = [], []
        for split in dataset.splits:
            for key, label, name in zip(keys[split], dataset.labels(split).tolist(), names[split], strict=True):
                other, first, path = seen.setdefault(key, (label, split, name))
                mixed += [f"{name} = {path}"] if other != label else []
                twice += [f"{name} = {path}"] if (other, first) == (label, split) and name != path else []
        for pairs, where in ((mixed, "in another class too"), (twice, "in the same class and split more than once")):
            if pairs:
                are = "image is" if len(pairs) == 1 else "images are"
                console.warn(f"{len(pairs)} {are} {where}:{indented(pairs, SHOWN)}")


def _changed_files(dataset: Dataset, split: str, seen: pd.DataFrame, *, times: bool) -> list[str]:
    """Return the image files with another content than when the set was built.

    Args:
        dataset: data set of a user's images that are left in their files.
        split: its split.
        seen: files as they were, see Dataset.seen().
        times: also look into files of the same size that were written since.

    Raises:
        UnreadableImages: files are missing.
    """
    paths = dataset.paths(split)
    differs = sizes_and_times(paths) != seen[["size", "changed_ns"]].to_numpy()
    doubtful = np.flatnonzero(differs.any(1) if times else differs[:, 0])
    hashes = content_hashes([paths[i] for i in doubtful])
    return [str(paths[i]) for i, found in zip(doubtful, hashes, strict=True) if found != seen["sha256"][i]]


def warn_of_changed(dataset: Dataset, split: str) -> None:
    """Name a user's image files, left where they are, that are not what they were when the set was built."""
    if (seen := dataset.seen(split)) is None:
        return
    with suppress(UnreadableImages):  # the files that are missing are named when they are read
        # A copy has other times: it would be read whole by each command.
        if changed := _changed_files(dataset, split, seen, times=dataset.moved_to is None):
            number = f"{len(changed):,} of {counted(len(seen), f'{split} image')}"
            console.warn(
                f"{number} in {dataset.data_root} changed since {dataset.folder} was built; the same build-lt command "
                f"with --overwrite takes them as they are:{indented(changed, SHOWN)}"
            )


def check_unchanged(dataset: Dataset) -> None:
    """Compare the image files, some of which are written since, with the images of the data set.

    Raises:
        EnvironmentFault: images have changed.
    """
    console.note(f"files of {dataset.data_root} were written since: comparing all images with those of the data set")
    changed: list[str] = []
    for split in dataset.splits:
        if (seen := dataset.seen(split)) is not None:
            changed += _changed_files(dataset, split, seen, times=True)
            continue
        paths = dataset.paths(split)
        differing, unreadable = _differing(dataset, split, range(len(paths)))
        if unreadable is not None:
            raise unreadable
        changed += [str(paths[i]) for i in differing]
    if changed:
        raise EnvironmentFault(
            f"{counted(len(changed), 'image')} changed since {dataset.folder} was built:{indented(changed, SHOWN)}",
            fix="write elsewhere with --out FOLDER, or replace it with --overwrite",
        )


def _differing(dataset: Dataset, split: str, positions: Sequence[int]) -> tuple[list[int], UnreadableImages | None]:
    """Return the positions in a packed split whose file has other pixels now, and the error of unreadable files."""
    paths, keys = dataset.paths(split), _image_keys(dataset, split)
    now = [b""] * len(positions)

    def note(i: int, image: Image.Image) -> None:
        now[i] = sha256(image.tobytes()).digest()

    unreadable = None
    with console.Progress(f"compared {split} images", len(positions)) as progress:
        try:
            read = partial(read_square, size=dataset.shape[0], upright=dataset.upright)
            read_each([paths[i] for i in positions], read, note, progress)
        except UnreadableImages as fault:
            unreadable = fault
    return [i for i, found in zip(positions, now, strict=True) if keys[i] != found], unreadable


def changes_by_class(dataset: Dataset, source: Source) -> list[str]:
    """Return what became of a data set's images, a line per class: "bobcat: 5 new images, 2 gone, 1 changed".

    The classes with the most changes are first. Files that were not written since the data set was built stay closed.
    Of a set that does not have all images of its source, only files written since then count as new.

    Args:
        dataset: data set of image files; `data_root` is that of `source`.
        source: what its source has now.
    """
    assert source.root is not None
    built = (dataset.folder / DATASET).stat().st_mtime_ns
    now = {
        path: source.class_names[label]
        for part in (source.pool, source.val, source.test)
        if part is not None
        for path, label in zip(part.paths, part.labels.tolist(), strict=True)
    }
    has_all = dataset.record.rho is None and not dataset.record.skip_unreadable
    known: set[tuple[str, str]] = set()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split in dataset.splits:
        paths = dataset.samples(split)["path"].tolist()
        names = [dataset.class_names[label] for label in dataset.labels(split).tolist()]
        known.update(zip(paths, names, strict=True))
        stays = [now.get(path) == name for path, name in zip(paths, names, strict=True)]
        written = [i for i, path in enumerate(paths) if stays[i] and _written(source.root / path) > built]
        if (seen := dataset.seen(split)) is not None:
            hashes = content_hashes([source.root / paths[i] for i in written])
            differing = [i for i, found in zip(written, hashes, strict=True) if found != seen["sha256"][i]]
        else:
            differing = _differing(dataset, split, written)[0] if written else []
        for i, name in enumerate(names):
            counts[name]["gone"] += not stays[i]
        for i in differing:
            counts[names[i]]["changed"] += 1
    for path, name in now.items():
        if (path, name) not in known and (has_all or _written(source.root / path) > built):
            counts[name]["new"] += 1
    lines = []
    for name, found in sorted(counts.items(), key=lambda entry: -entry[1].total()):
        parts = [(found[what], what) for what in ("new", "gone", "changed") if found[what]]
        said = [f"{number:,} {what}" for number, what in parts]
        if said:
            said[0] += " image" if parts[0][0] == 1 else " images"
            lines.append(f"{name}: {', '.join(said)}")
    return lines


def _written(path: Path) -> int:
    """Return when a file was last written or moved here, in ns; 0 if it is not there."""
    with suppress(OSError):
        found = file_of(path).stat()
        return max(found.st_mtime_ns, found.st_ctime_ns)
    return 0
