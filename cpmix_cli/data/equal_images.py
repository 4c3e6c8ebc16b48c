"""Equal images of a data set: duplicates in classes and splits, and whether image files are still what was packed."""

from functools import partial
from hashlib import sha256

from PIL import Image

from cpmix_cli.artifacts.files import digest
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.decoding import SHOWN, UnreadableImages, content_keys, read_each, read_square, sizes_and_times
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, counted, indented


def _image_keys(dataset: Dataset, split: str) -> list[bytes]:
    """Return a key per image [N], equal for equal pixels; of images left in their files, for equal bytes."""
    if dataset.storage == "files":
        return content_keys(dataset.paths(split))
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
            console.warn(f"{len(shared)} of {len(keys[second])} {second} images are identical to {of}{shown}")
    if is_own:
        seen: dict[bytes, tuple[int, str]] = {}
        mixed = []
        for split in dataset.splits:
            for key, label, name in zip(keys[split], dataset.labels(split).tolist(), names[split], strict=True):
                other, path = seen.setdefault(key, (label, name))
                mixed += [f"{name} = {path}"] if other != label else []
        if mixed:
            are = "image is" if len(mixed) == 1 else "images are"
            console.warn(f"{len(mixed)} {are} in another class too:{indented(mixed, SHOWN)}")


def warn_of_changed(dataset: Dataset, split: str) -> None:
    """Warn if a user's image files, left where they are, have another size or time than when the set was built."""
    known = dataset.record.seen.get(split)
    if known is None:
        return
    try:
        found = [digest(column) for column in sizes_and_times(dataset.paths(split)).T.tolist()]
    except UnreadableImages:
        return  # the files that are missing are named when they are read
    if found[0] != known[0] or (dataset.moved_to is None and found != known):  # a copy may have other times
        console.warn(
            f"{split} images in {dataset.data_root} were written since {dataset.folder} was built: they may be other "
            "pictures; the same build-lt command with --overwrite takes them as they are"
        )


def check_unchanged(dataset: Dataset) -> None:
    """Compare the image files, some of which are written since, with the images that were packed.

    Raises:
        EnvironmentFault: images have changed, or the data set has no copy to compare them with.
    """
    fix = "write elsewhere with --out FOLDER, or replace it with --overwrite"
    if dataset.storage == "files":
        raise EnvironmentFault(
            f"{dataset.folder} holds no copy of its images, and files of {dataset.data_root} were written since it was "
            "built; their names and sizes are the same",
            fix=fix,
        )
    console.note(f"files of {dataset.data_root} were written since: comparing all images with the packed ones")
    changed: list[str] = []
    for split in dataset.splits:
        paths = dataset.paths(split)
        keys = _image_keys(dataset, split)
        now: list[bytes] = [b""] * len(paths)

        def note(i: int, image: Image.Image, now: list[bytes] = now) -> None:
            now[i] = sha256(image.tobytes()).digest()

        with console.Progress(f"compared {split} images", len(paths)) as progress:
            read_each(paths, partial(read_square, size=dataset.shape[0], upright=dataset.upright), note, progress)
        changed += [str(path) for path, key, found in zip(paths, keys, now, strict=True) if key != found]
    if changed:
        raise EnvironmentFault(
            f"{counted(len(changed), 'image')} changed since {dataset.folder} was built:{indented(changed, SHOWN)}",
            fix=fix,
        )
