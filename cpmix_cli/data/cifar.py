"""CIFAR-10 and CIFAR-100 from the published archive or from the Hugging Face Parquet layout, whichever is found.

The published batches are Python pickles. Their hash is checked before anything is unpickled. The unpickler then
accepts only arrays, lists and text, so no file can run code here.
"""

import hashlib
import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts.files import read_bytes, sha256
from cpmix_cli.data.decoding import open_image, reason
from cpmix_cli.data.splits import Source, Split, check_labels, check_published
from cpmix_cli.runtime.errors import InputError, counted

_SHAPE = (32, 32, 3)
_MAX_ARCHIVE = 250_000_000  # bytes; the archives have 170 million
_FETCH = "run the same command again with --download, which fetches the published archive"


@dataclass(frozen=True)
class CifarArchive:
    """Names, hashes and layout of a published archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""

    name: str
    num_classes: int
    archive: str
    """File name of the archive."""
    sha256: str
    """Hash of the archive. Source: Keras's loader."""
    folder: str
    """Name of the only folder in the archive."""
    train: Mapping[str, str]
    """Batch file -> MD5 of its content, in published order. Source: torchvision's loader."""
    test: Mapping[str, str]
    """Test batch file -> MD5."""
    meta: Mapping[str, str]
    """File with the class names -> MD5."""
    labels: str
    """Key of the labels in a batch."""
    names: str
    """Key of the class names in the meta file."""


CIFAR10 = CifarArchive(
    name="cifar10",
    num_classes=10,
    archive="cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    labels="labels",
    names="label_names",
)
CIFAR100 = CifarArchive(
    name="cifar100",
    num_classes=100,
    archive="cifar-100-python.tar.gz",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    labels="fine_labels",
    names="fine_label_names",
)


def read(places: list[Path], published: CifarArchive) -> Source:
    """Read a CIFAR set from the first folder in `places` that contains it. Images keep the published order.

    A folder may contain the archive, the unpacked archive, or Parquet files.

    Raises:
        InputError: no folder contains the set, or its files are damaged, of another layout or not the published ones.
    """
    for place in places:
        if (archive := place / published.archive).is_file():
            return _from_archive(archive, published)
        for folder in (place / published.folder, place):
            if (folder / next(iter(published.meta))).is_file():
                return _from_folder(folder, published)
        if list(place.glob("train-*.parquet")):
            return _from_parquet(place, published)
    raise InputError(
        f"no {published.archive}, {published.folder}/ or train-*.parquet in {' or '.join(map(str, places))}",
        fix="give their folder with --data-root FOLDER or in CPMIX_DATA_DIR, or fetch them with --download",
    )


def _source(published: CifarArchive, names: list[str], train: Split, test: Split, files: tuple[Path, ...]) -> Source:
    """Return the source; raise InputError if its classes are not the classes of `published`."""
    if len(names) != published.num_classes:
        raise InputError(
            f"{files[0]} names {len(names)} classes; expected {published.num_classes}",
            fix="give the folder of the other CIFAR set with --data-root FOLDER",
        )
    for split in (train, test):
        check_labels(files[0], split.labels, published.num_classes, fix=_FETCH)
    return Source(names, train, f"{published.name}-lt/cpmix", test=test, files=files)


# -- the published archive ---------------------------------------------------------------------------------------------


def _from_archive(path: Path, published: CifarArchive) -> Source:
    """Read the set from the .tar.gz, without unpacking it to disk."""
    data = read_bytes(path, limit=_MAX_ARCHIVE)
    check_published(path, "sha256", sha256(data), published.sha256)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"{published.folder}/{name}")
            assert file is not None  # the archive's hash is checked, so its files are known
            return file.read()

        return _from_batches(member, published, (path,))


def _from_folder(folder: Path, published: CifarArchive) -> Source:
    """Read the set from the unpacked archive."""
    files = tuple(folder / name for name in (*published.train, *published.test, *published.meta))
    return _from_batches(lambda name: read_bytes(folder / name, limit=_MAX_ARCHIVE), published, files)


def _from_batches(member: Callable[[str], bytes], published: CifarArchive, files: tuple[Path, ...]) -> Source:
    place = files[0] if len(files) == 1 else files[0].parent

    def content(hashes: Mapping[str, str]) -> list[dict[str, Any]]:
        return [_unpickled(member(name), md5, f"{name} of {place}") for name, md5 in hashes.items()]

    def split(hashes: Mapping[str, str]) -> Split:
        batches = content(hashes)
        labels = np.concatenate([np.asarray(batch[published.labels], dtype=np.int64) for batch in batches])
        planes = np.concatenate([batch["data"] for batch in batches])  # [N, 3 x 32 x 32]
        images = planes.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        return Split(labels, images.__getitem__)

    try:
        names = [str(name) for name in content(published.meta)[0][published.names]]
        return _source(published, names, split(published.train), split(published.test), files)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise InputError(f"{place} has another layout than {published.archive}: {fault!r}", fix=_FETCH) from fault


class _DataOnly(pickle.Unpickler):
    """Unpickler that accepts only NumPy arrays, and builtin containers and text, which need no lookup of a name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few objects that an array's pickle names, under NumPy's old and new module names.

        Raises:
            pickle.UnpicklingError: the pickle names any other object.
        """
        match (module, name):
            case ("numpy", "ndarray"):
                return np.ndarray
            case ("numpy", "dtype"):
                return np.dtype
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return np.zeros(0).__reduce__()[0]
            case ("_codecs", "encode"):
                return str.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(data: bytes, md5: str, what: str) -> dict[str, Any]:
    """Return a batch's dictionary; raise InputError if the bytes are not the published ones, or more than data."""
    check_published(what, "MD5", hashlib.md5(data, usedforsecurity=False).hexdigest(), md5)
    try:
        # latin1: the batches are Python 2 pickles.
        content: dict[str, Any] = _DataOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as fault:
        raise InputError(
            f"{what} contains other objects than data, so it is not loaded: {fault}", fix=_FETCH
        ) from fault
    return content


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _from_parquet(folder: Path, published: CifarArchive) -> Source:
    """Read train-*.parquet and test-*.parquet of Hugging Face: columns img{bytes, path} and fine_label or label."""
    train_files, train = _parquet_split(folder, "train")
    test_files, test = _parquet_split(folder, "test")
    names = _class_names(train_files[0], num_classes=int(train.labels.max()) + 1)
    return _source(published, names, train, test, (*train_files, *test_files))


def _parquet_split(folder: Path, split: str) -> tuple[list[Path], Split]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise InputError(f"no {split}-*.parquet in {folder}", fix="copy or fetch the missing files")
    encoded, labels = [], []
    for path in files:
        data = read_bytes(path, limit=_MAX_ARCHIVE)
        try:
            columns = pq.read_schema(io.BytesIO(data)).names
            label = next((name for name in ("fine_label", "label") if name in columns), None)
            if label is None or "img" not in columns:
                raise InputError(
                    f"{path} has columns {', '.join(columns)}; expected img and fine_label (or label)", fix=_FETCH
                )
            # Dictionary encoding: an image that a file repeats a million times takes memory once.
            file = pq.ParquetFile(io.BytesIO(data), read_dictionary=["img.bytes"])
            # Images are already compressed, so a file that expands far more was made to fill the memory.
            unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
            if unpacked > 3 * len(data) + 2**20 or file.metadata.num_rows > len(data):
                raise InputError(
                    f"{path} would unpack from {len(data):,} to {unpacked:,} bytes in {file.metadata.num_rows:,} rows",
                    fix=_FETCH,
                )
            table = file.read(["img", label]).combine_chunks()
            encoded.append(pa.chunked_array(table["img"].chunks, table["img"].type).combine_chunks().field("bytes"))
            labels.append(table[label].cast(pa.int64()).combine_chunks())
        except InputError:
            raise
        except Exception as fault:  # a damaged file can make pyarrow raise any exception
            raise InputError(f"{path} is not a readable Parquet file: {fault}", fix=_FETCH) from fault
        if missing := labels[-1].null_count:
            raise InputError(f"{path} lacks {counted(missing, 'label')}", fix=_FETCH)
    images = pa.chunked_array(encoded)
    if not len(images):
        raise InputError(f"{files[0]} contains no images", fix=_FETCH)
    classes = np.concatenate([part.to_numpy(zero_copy_only=False) for part in labels]).astype(np.int64)
    return files, Split(classes, lambda positions: _decode(images, positions, files[0]))


def _class_names(path: Path, num_classes: int) -> list[str]:
    """Return the class names in the file's Hugging Face metadata; class_0, class_1, ... without such metadata."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        for column in ("fine_label", "label"):
            if names := features.get(column, {}).get("names"):
                return [str(name) for name in names]
    except Exception as fault:
        raise InputError(f"{path} has unreadable Hugging Face metadata: {fault}", fix=_FETCH) from fault
    return [f"class_{c}" for c in range(num_classes)]


def _decode(encoded: Any, positions: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
    """Decode the images (PNG, WebP, JPEG) at `positions` [n] without EXIF rotation -> uint8 [n, 32, 32, 3]."""
    from PIL import Image

    images = np.empty((len(positions), *_SHAPE), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, position in enumerate(positions):
            try:
                with open_image(io.BytesIO(encoded[int(position)].as_py())) as image:
                    if image.size != _SHAPE[:2]:
                        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels; expected 32 x 32")
                    images[i] = np.asarray(image.convert("RGB"))
            except Exception as fault:  # a broken image can make Pillow's plugins raise any exception
                raise InputError(
                    f"image {position} of {path} cannot be decoded: {reason(fault)}", fix=_FETCH
                ) from fault
    return images
