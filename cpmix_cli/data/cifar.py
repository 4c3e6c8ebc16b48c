"""CIFAR-10 and CIFAR-100 from the published archive or from the Hugging Face Parquet layout, whichever is found.

The published batches are Python pickles. Their hash is checked before anything is unpickled. The unpickler then
accepts only arrays, lists and text, so no file can run code here.
"""

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts.files import read_bytes, sha256
from cpmix_cli.data.decoding import open_image, reason
from cpmix_cli.data.splits import Source, Split, check_labels, check_published
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, counted, shortened
from cpmix_cli.runtime.text import quoted

_SHAPE = (32, 32, 3)
_NUM_IMAGES = {"train": 50_000, "test": 10_000}
_MAX_ARCHIVE = 250_000_000  # bytes; the archives have 170 million
_FETCH = "run the same command again with --download, which fetches the published archive"


@dataclass(frozen=True)
class CifarArchive:
    """Names, hashes and layout of a published archive (https://www.cs.toronto.edu/~kriz/cifar.html)."""

    name: str
    num_classes: int
    archive: str
    """File name of the archive."""
    archive_bytes: int
    """Size of the archive."""
    sha256: str
    """Hash of the archive. Source: Keras's loader."""
    folder: str
    """Name of the only folder in the archive."""
    recipe: str
    """Default recipe of its long-tailed sets. Differs from the paper for CIFAR-100: recipes/RESULTS.md, full length."""
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
    archive_bytes=170_498_071,
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    folder="cifar-10-batches-py",
    recipe="cifar10-lt/cpmix",
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
    archive_bytes=169_001_437,
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    folder="cifar-100-python",
    recipe="cifar100-lt/cpmix-tuned",
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
        if _parquet_folders([place], published):
            return _from_parquet(_parquet_folders(places, published), published)
    raise InputError(
        f"no {published.archive}, {published.folder}/ or train-*.parquet in {' or '.join(map(str, places))}",
        fix="give their folder with --data-root FOLDER or in CPMIX_DATA_DIR, or fetch them with --download",
    )


def _source(published: CifarArchive, names: list[str], train: Split, test: Split, files: tuple[Path, ...]) -> Source:
    """Return the source; raise InputError if its classes are not the classes of `published`."""
    if len(names) != published.num_classes:
        raise InputError(
            f"{files[0]} has {counted(len(names), 'class', 'classes')}; {published.name} has {published.num_classes}",
            fix=f"give the folder of {published.name} with --data-root FOLDER, or fetch it with --download",
        )
    return Source(names, train, published.recipe, test=test, files=files)


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


def _parquet_folders(places: list[Path], published: CifarArchive) -> list[Path]:
    """Return the folders with training images: of `places`, and their sub-folders that Hugging Face names.

    A place may be Hugging Face's cache, a data set's folder in it, or a snapshot. Equal snapshots count once.
    """

    def inside(roots: Iterable[Path]) -> list[Path]:
        folders = [root / name for root in roots for name in ("", "data", "plain_text", published.name)]
        unique = {os.path.realpath(folder): folder for folder in reversed(folders)}  # one may be a link to another
        return [folder for folder in reversed(unique.values()) if _files_of(folder, "train")]

    def content(folder: Path) -> list[tuple[str, str]]:
        found = [*_files_of(folder, "train"), *_files_of(folder, "test")]
        return [(str(path.relative_to(folder)), sha256(read_bytes(path))) for path in found]

    caches = [*places, *(cache for place in places for cache in place.glob(f"datasets--*{published.name}"))]
    snapshots = inside(snapshot for cache in caches for snapshot in sorted(cache.glob("snapshots/*")))
    if len(snapshots) > 1:
        contents = [content(folder) for folder in snapshots]
        snapshots = [folder for i, folder in enumerate(snapshots) if contents[i] not in contents[:i]]
    return inside(places) + snapshots


def _files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split in a folder and in its sub-folder of the split's name, such as train/0000.parquet."""
    return sorted([*folder.glob(f"*{split}*.parquet"), *folder.glob(f"{split}/*.parquet")])


def _from_parquet(folders: list[Path], published: CifarArchive) -> Source:
    """Read the shards of Hugging Face: columns img (encoded images) and fine_label or label."""
    if len(folders) > 1:
        raise InputError(
            f"{published.name} lies twice: *train*.parquet in {' and in '.join(map(str, folders))}",
            fix="leave one of the two folders, or give it with --data-root FOLDER",
        )
    files = {split: _shards(folders[0], split) for split in _NUM_IMAGES}
    names, train = _parquet_split(files["train"], [])
    names, test = _parquet_split(files["test"], names)
    found = {"train": len(train.labels), "test": len(test.labels)}
    for split, number in found.items():
        if number > _NUM_IMAGES[split]:
            raise InputError(
                f"{folders[0]} has {counted(number, f'{split} image')}; {published.name} has {_NUM_IMAGES[split]:,}",
                fix="take out the copies, or fetch the published archive with --download",
            )
    if found != _NUM_IMAGES:
        console.warn(
            f"{folders[0]} has {found['train']:,} train and {found['test']:,} test images, a part of {published.name}, "
            f"which has {_NUM_IMAGES['train']:,} and {_NUM_IMAGES['test']:,}"
        )
    for split, part in (("train", train), ("test", test)):
        check_labels(files[split][0], part.labels, published.num_classes, fix=_FETCH)
    names = names or [f"class_{c}" for c in range(int(train.labels.max()) + 1)]
    return _source(published, names, train, test, (*files["train"], *files["test"]))


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split in order; raise InputError if one is missing or twice there, or a name is odd."""
    files = _files_of(folder, split)
    example = f"{split}-00000-of-00001.parquet"
    last = max((path.stem for path in files if re.fullmatch(r"\d{4}\.parquet", path.name)), default="")
    numbered: dict[int, Path] = {}
    totals: dict[str, Path] = {}
    for path in files:
        # The hash at the end stands in files of push_to_hub().
        name = re.sub(
            r"^(\d{4})(?=\.parquet$)", lambda number: f"{split}-0{number[0]}-of-{int(last) + 1:05}", path.name
        )
        found = re.fullmatch(rf"{split}-(\d{{5}})-of-(\d{{5}})(-[0-9a-f]{{16}})?\.parquet", name)
        if found is None or int(found[1]) >= int(found[2]):
            rename = f", or rename it: {quoted('mv', path, path.with_name(example))}" if len(files) == 1 else ""
            raise InputError(
                f"{path} is no shard by its name, such as {example}; is it a copy?", fix=f"move it elsewhere{rename}"
            )
        if (other := numbered.setdefault(int(found[1]), path)) != path:
            raise InputError(f"{path} and {other.name} are the same shard of {split}", fix="leave one of the two")
        totals.setdefault(found[2], path)
    if not files:
        raise InputError(f"no {example} in {folder}", fix="copy or fetch the missing files")
    if len(totals) > 1:
        raise InputError(
            f"{' and '.join(map(str, totals.values()))} are of different sets of shards", fix="leave the files of one"
        )
    total = next(iter(totals))
    missing = [f"{split}-{i:05}-of-{total}.parquet" for i in range(int(total)) if i not in numbered]
    if missing:
        raise InputError(
            f"{folder} lacks {counted(len(missing), 'shard')} of {split}: {shortened(missing, 5)}",
            fix="copy or fetch the missing files",
        )
    return [numbered[i] for i in range(int(total))]


def _parquet_split(files: list[Path], names: list[str]) -> tuple[list[str], Split]:
    """Return the class names and all images.

    Args:
        files: shards in order.
        names: class names in the metadata of earlier shards; [] if none has such metadata.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from cpmix_cli.artifacts.tables import open_parquet

    known: dict[str, Path] = {}
    encoded, labels, rows = [], [], []
    for path in files:
        data = read_bytes(path, limit=_MAX_ARCHIVE)
        if (other := known.setdefault(sha256(data), path)) != path:
            raise InputError(f"{path} has the content of {other.name}: a shard is twice there", fix=_FETCH)
        try:
            schema = open_parquet(data).schema_arrow
            image, label = _image_column(path, schema), _label_column(path, schema)
            of_shard = _class_names(path, schema.metadata or {})
            if names and of_shard and names != of_shard:
                raise InputError(
                    f"{path} names other classes than the shards before it, or in another order", fix=_FETCH
                )
            names = names or of_shard
            # Dictionary encoding: an image that a file repeats a million times takes memory once. Row groups are read
            # one by one, because pyarrow cannot join the dictionaries of a struct's field.
            file = open_parquet(data, [image])
            num_groups, num_rows = file.metadata.num_row_groups, file.metadata.num_rows
            # Images are already compressed, so a file that expands far more was made to fill the memory.
            unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(num_groups))
            if unpacked > 3 * len(data) + 2**20 or num_rows > len(data):
                raise InputError(
                    f"{path} would unpack from {len(data):,} to {unpacked:,} bytes in {num_rows:,} rows", fix=_FETCH
                )
            for i in range(num_groups):
                group = file.read_row_group(i, [image, label], use_threads=False)
                images = group["img"] if image == "img" else pc.struct_field(group["img"], "bytes")
                if lost := images.null_count:
                    raise InputError(f"{path} lacks the bytes of {counted(lost, 'image')}", fix=_FETCH)
                if lost := group[label].null_count:
                    raise InputError(f"{path} lacks {counted(lost, 'label')}", fix=_FETCH)
                encoded += images.chunks
                labels += group[label].cast(pa.int64()).chunks
            rows.append(num_rows)
        except InputError:
            raise
        except Exception as fault:  # a damaged file can make pyarrow raise any exception
            raise InputError(f"{path} is not a readable Parquet file: {reason(fault)}", fix=_FETCH) from fault
    if not any(map(len, encoded)):
        raise InputError(f"{files[0]} contains no images", fix=_FETCH)
    images = pa.chunked_array(encoded)
    classes = np.concatenate([part.to_numpy(zero_copy_only=False) for part in labels]).astype(np.int64)
    ends = np.cumsum(rows)
    return names, Split(classes, lambda positions: _decode(images, positions, files, ends))


def _image_column(path: Path, schema: Any) -> str:
    """Return the column of the encoded images: "img.bytes" of Hugging Face's struct, or "img" if it is binary."""
    import pyarrow as pa

    expected = "img, as struct<bytes: binary, path: string> or binary"
    kind = _type_of(path, schema, "img", expected)
    name = "img.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else "img"
    values = kind.field("bytes").type if name == "img.bytes" else kind
    values = values.value_type if pa.types.is_dictionary(values) else values
    if values not in (pa.binary(), pa.large_binary(), pa.binary_view()):
        raise InputError(f"{path} has the column img as {kind}; expected {expected}", fix=_FETCH)
    return name


def _label_column(path: Path, schema: Any) -> str:
    """Return the column of the labels: "fine_label", or "label" without it."""
    import pyarrow as pa

    name = "fine_label" if "fine_label" in schema.names else "label"
    if not pa.types.is_integer(kind := _type_of(path, schema, name, "fine_label or label, as int64")):
        raise InputError(f"{path} has the column {name} as {kind}; expected int64, class numbers from 0", fix=_FETCH)
    return name


def _type_of(path: Path, schema: Any, column: str, expected: str) -> Any:
    """Return the type of a column; raise InputError if it does not occur exactly once."""
    if schema.names.count(column) != 1:
        columns = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise InputError(f"{path} has columns {columns}; expected {expected}", fix=_FETCH)
    return schema.field(column).type


def _class_names(path: Path, metadata: Mapping[bytes, bytes]) -> list[str]:
    """Return the class names in the file's Hugging Face metadata; [] without such metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        for column in ("fine_label", "label"):
            if names := features.get(column, {}).get("names"):
                if len({str(name).encode() for name in names}) < len(names):  # encode() refuses lone surrogates
                    raise ValueError("a class name occurs twice")
                return [str(name) for name in names]
    except Exception as fault:
        raise InputError(f"{path} has unreadable Hugging Face metadata: {fault}", fix=_FETCH) from fault
    return []


def _decode(
    encoded: Any, positions: NDArray[np.int64], files: list[Path], ends: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Decode images without EXIF rotation: positions [n] -> uint8 [n, 32, 32, 3].

    Args:
        encoded: content of an image file per image of the split.
        positions: positions of the images.
        files: shards of the split.
        ends: images in each shard and those before it.

    Raises:
        InputError: an image cannot be decoded; the message names its shard and its place there.
    """
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
                shard = int(np.searchsorted(ends, position, side="right"))
                place = position - (ends[shard - 1] if shard else 0)
                raise InputError(
                    f"image {place} of {files[shard]} cannot be decoded: {reason(fault)}", fix=_FETCH
                ) from fault
    return images
