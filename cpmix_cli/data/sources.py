"""Sources of images: add a data set here.

A source is a function (--data-root, --list-dir) -> Source. Its name in SOURCES is the SOURCE argument of `build-lt`.
No function here reads a network; see download.py.
"""

import gzip
import io
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cpmix_cli.artifacts.files import DATASET, digest, read_bytes, sha256
from cpmix_cli.data import cifar, lists, parquet
from cpmix_cli.data import image_folder as folders
from cpmix_cli.data.splits import Source, Split, check_published
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, give_one_of
from cpmix_cli.runtime.text import quoted

_DOWNLOADS = Path("data/download")
"""Default of --data-root, and the folder that --download writes to."""
IMAGE_SIZE = 64
"""Default of --image-size."""
LARGE_IMAGE_SIZE = 256
"""Default of --image-size if images stay in their files."""


def check_source(name: str) -> None:
    """Raise UsageError if a name is no source, with the command for a folder that is given in its place."""
    if name in SOURCES:
        return
    folder = Path(name).expanduser()
    if (folder / DATASET).is_file():
        train = console.typed("train-stage1", "--data", folder, "--out", Path("ckpt") / folder.resolve().name)
        what = f"{folder} is no source but a data set folder, which is built already"
        raise UsageError(what, fix=f"train on it: {train}")
    if folder.is_dir():
        raise UsageError(
            f"{folder} is no source but a folder; the source of a folder of images is image-folder",
            fix=f"build a data set of it: {console.typed(console.command, 'image-folder', '--data-root', folder)}",
        )
    raise UsageError(f'{console.command} has no source "{name}"', fix=give_one_of(name, SOURCES))


def places(source: str, data_root: Path | None) -> list[Path]:
    """Return the folders in which a source's files are looked up: DATA_ROOT/SOURCE, then DATA_ROOT."""
    root = data_root or _DOWNLOADS
    return [root / source, root]


def digits(data_root: Path | None, list_dir: Path | None) -> Source:
    """Return scikit-learn's digits: 1,797 handwritten digits of 8 x 8 grey pixels (UCI, test part: 13 writers).

    The bundle has no test split, so 50 images per class are held out. Training and test images have the same writers.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # Values are 0 to 16, the number of set pixels in a block of 4 x 4.
    images = (bundle.images * (255 / 16)).round().astype(np.uint8)[..., None]
    return Source(
        class_names=[str(name) for name in bundle.target_names],
        pool=Split(bundle.target.astype(np.int64), images.__getitem__),
        recipe="digits/cpmix",
        default_rho=20,
        test_per_class=50,
    )


TOY_SIMILAR = {2: 0, 3: 1}
"""Minority class of the toy data -> the nearest majority class."""


def toy(data_root: Path | None, list_dir: Path | None) -> Source:
    """Return the toy data: points of four Gaussians with standard deviation 0.4 in the plane.

    The majority classes are red at (0, 1) and purple at (1, 0), the minority classes grey at (-1, 0) and yellow at
    (0, -1). Each class has 1,000 training and 1,000 test points. The step profile keeps 1,000 / rho training points
    of a minority class. The points are the same for every rho and subset seed.

    Paper: Sec. 3.1, B.1, Fig. 2(a): grey is next to red, yellow next to purple.
    """
    centres = np.array([[0, 1], [1, 0], [-1, 0], [0, -1]], dtype=np.float64)
    noise = np.random.Generator(np.random.PCG64(0)).normal(0.0, 0.4, size=(2, 4, 1000, 2))
    points = (centres[None, :, None, :] + noise).astype(np.float32).reshape(2, -1, 2)
    labels = np.repeat(np.arange(4), 1000)
    return Source(
        class_names=["red", "purple", "grey", "yellow"],
        pool=Split(labels, points[0].__getitem__),
        recipe="toy/cpmix",
        default_rho=20,
        profile="step",
        test=Split(labels, points[1].__getitem__),
    )


def cifar10(data_root: Path | None, list_dir: Path | None) -> Source:
    """Return CIFAR-10: 50,000 training and 10,000 test images, 32 x 32 RGB, 10 classes; raises as cifar.read()."""
    return cifar.read(places("cifar10", data_root), cifar.CIFAR10)


def cifar100(data_root: Path | None, list_dir: Path | None) -> Source:
    """Return CIFAR-100: 50,000 training, 10,000 test images, 32 x 32 RGB, 100 fine classes; raises as cifar.read()."""
    return cifar.read(places("cifar100", data_root), cifar.CIFAR100)


FASHION_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
_FASHION_FILES = {  # sha256 of the uncompressed content: compressed files differ between copies
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_MAX_FASHION_FILE = 50_000_000  # bytes; the training images are 47 million
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def fashion_mnist(data_root: Path | None, list_dir: Path | None) -> Source:
    """Return Fashion-MNIST: 60,000 training and 10,000 test images, 28 x 28 grey, 10 classes.

    The files are the published IDX files, with or without .gz. Without --data-root, the folder of Debian's package
    dataset-fashion-mnist is also searched.

    Raises:
        InputError: files are missing, or are not the published ones.
    """
    folders = [*places("fashion-mnist", data_root), *([] if data_root else [DEBIAN_FASHION])]
    first = next(iter(_FASHION_FILES))
    folder = next((f for f in folders if (f / first).is_file() or (f / f"{first}.gz").is_file()), None)
    if folder is None:
        raise InputError(
            f"no {first}.gz in {', '.join(map(str, folders))}",
            fix="give their folder with --data-root FOLDER, or fetch them with --download, "
            "or apt install dataset-fashion-mnist",
        )
    paths, content = zip(*(_fashion_file(folder, name, sha) for name, sha in _FASHION_FILES.items()), strict=True)
    # IDX: a header of 4 bytes plus 4 per axis, then the values. The hash is checked, so the header is not parsed.
    images, test_images = (np.frombuffer(c, np.uint8, offset=16).reshape(-1, 28, 28, 1) for c in content[::2])
    labels, test_labels = (np.frombuffer(c, np.uint8, offset=8).astype(np.int64) for c in content[1::2])
    return Source(
        class_names=FASHION_NAMES,
        pool=Split(labels, images.__getitem__),
        recipe="fashion-mnist-lt/cpmix",
        test=Split(test_labels, test_images.__getitem__),
        files=tuple(paths),
    )


def _fashion_file(folder: Path, name: str, sha: str) -> tuple[Path, bytes]:
    """Return path and uncompressed content of NAME or NAME.gz."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    data = read_bytes(path, limit=_MAX_FASHION_FILE)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:  # read with a limit: the file may expand to any size
            content = file.read(_MAX_FASHION_FILE) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as fault:
        raise InputError(f"{path} is damaged: {fault}", fix="copy or fetch it again") from fault
    check_published(f"the content of {path}", "sha256", sha256(content), sha)
    return path, content


def image_folder(
    data_root: Path | None, list_dir: Path | None, *, layout: folders.Layout = "auto", skip_unreadable: bool = False
) -> Source:
    """Return a user's own images, from lists if --list-dir is given, else from one sub-folder per class.

    The layout is FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE with val/ and test/ beside train/. By default all
    images are kept. --rho keeps the largest exponential profile by rank; see longtail.ranked_counts().

    Args:
        data_root: folder of the images.
        list_dir: folder of the lists, if there are some.
        layout: as for image_folder.scan().
        skip_unreadable: as for image_folder.scan().

    Raises:
        InputError: as image_folder.scan() and lists.read_own(), --data-root is missing, or there is only one class.
    """
    root = _root_of("image-folder", data_root)
    if list_dir is not None:
        if not root.exists():
            raise InputError(f"no folder {root}", fix="give the folder that holds the images with --data-root FOLDER")
        listed = lists.read_own(list_dir, root)
        parts = [part for part in (listed.pool, listed.test, listed.val) if part is not None]
        return replace(listed, times=digest([folders.listing(root, part.paths) for part in parts]))
    found = folders.scan(root, layout=layout, skip_unreadable=skip_unreadable)
    names, splits = found.class_names, found.splits
    if len(names) < 2:
        inside = root / names[0]
        raise InputError(
            f'{root} has one class, "{names[0]}"; a classifier needs two',
            fix=f"if its sub-folders are the classes: {quoted('--data-root', inside)}"
            if inside.is_dir() and any(entry.is_dir() for entry in inside.iterdir())
            else "lay the images out as FOLDER/CLASS/IMAGE.jpg, a sub-folder for each class",
        )
    listings, times = zip(
        *(folders.listing(root, splits[name].paths) for name in ("train", "test", "val") if name in splits), strict=True
    )
    return Source(
        class_names=names,
        pool=splits["train"],
        recipe="image-folder/cpmix",
        profile="ranked",
        test=splits.get("test"),
        val=splits.get("val"),
        test_per_class=None,
        root=root,
        listing=digest(list(listings)),
        times=digest(list(times)),
        left_out=found.left_out,
        name=root.resolve().name,
    )


def parquet_files(
    data_root: Path | None, list_dir: Path | None, *, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Return the images of a folder of Parquet files, as Hugging Face lays them out; raises as parquet.read()."""
    return parquet.read(_root_of("parquet", data_root), image_column=image_column, label_column=label_column)


def _root_of(source: str, data_root: Path | None) -> Path:
    """Return the folder of the image files; raise InputError if --data-root is missing."""
    if data_root is None:
        raise InputError(
            f"{source} needs the folder that holds the images",
            fix="give it with --data-root FOLDER or in CPMIX_DATA_DIR",
        )
    return data_root


def _official(published: lists.OfficialLists, data_root: Path | None, list_dir: Path | None) -> Source:
    name = published.name
    if list_dir is None:
        raise InputError(
            f"{name} needs the folder that holds {' and '.join(published.lists.values())}",
            fix="give it with --list-dir DIR, and the folder of the images with --data-root",
        )
    root = _root_of(name, data_root)
    return lists.read(list_dir, published, root / name if (root / name).is_dir() else root)


OFFICIAL_LISTS = {found.name: found for found in (lists.IMAGENET_LT, lists.PLACES_LT, lists.INATURALIST2018)}
SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "toy": toy,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    **{name: partial(_official, published) for name, published in OFFICIAL_LISTS.items()},
    "image-folder": image_folder,
    "parquet": parquet_files,
}
