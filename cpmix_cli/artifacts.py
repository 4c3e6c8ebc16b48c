"""Files on disk: names, schemas, atomic publishing, hashes.

Every file is published whole (temporary file in the same folder, fsync, rename, fsync of the folder) and verified by
hash when it is read. Tensors are safetensors, tables are Parquet, records are JSON with a digest of their own
content. Never pickle.
"""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from cpmix_cli.errors import EnvironmentFault, InputError

FORMAT = 1
MAX_HEADER = 8_000_000  # bytes; a ResNet-152's is 60 thousand

DATASET = "dataset.json"
RUN = "run.json"
RECIPE = "recipe.toml"
MODEL = "model.safetensors"
TRAINING_STATE = "training_state.safetensors"
CONFUSION_PAIRS = "confusion_pairs.parquet"
CLASS_COUNTS = "class_counts.parquet"
METRICS = "metrics.parquet"
EVALUATION = "metrics.json"
PER_CLASS = "per_class.parquet"
PREDICTIONS = "predictions.parquet"
LOGITS = "logits.safetensors"
SAMPLES = "samples.parquet"
HASHES = "hashes.parquet"
CONFUSION_MATRIX = "confusion_matrix.parquet"
CONFUSED_PAIRS = "confused_pairs.parquet"


def _schema(*fields: tuple[str, pa.DataType] | tuple[str, pa.DataType, bool]) -> pa.Schema:
    """(name, type) or (name, type, nullable) triples; columns are not nullable unless said."""
    return pa.schema([pa.field(f[0], f[1], nullable=len(f) == 3 and bool(f[2])) for f in fields])


CLASS_COUNTS_SCHEMA = _schema(
    ("class_id", pa.int32()),
    ("class_name", pa.string()),
    ("num_train", pa.int64()),
    ("num_test", pa.int64()),
    ("group", pa.string()),
)


def split_schema(by_path: bool) -> pa.Schema:
    """Schema of train, val and test .parquet; an image is known by its place in the source, or by its file's path."""
    origin = ("path", pa.string()) if by_path else ("source_index", pa.int64())
    return _schema(("sample_id", pa.int64()), ("label", pa.int32()), origin)


HASHES_SCHEMA = _schema(("sample_id", pa.int64()), ("sha256", pa.binary(32)))
"""sha256 of each packed image of a split."""
CONFUSION_SCHEMA = _schema(
    ("true_class", pa.int32()),
    ("predicted_class", pa.int32()),
    ("count", pa.int64()),
)
PER_CLASS_SCHEMA = _schema(
    ("class_id", pa.int32()),
    ("class_name", pa.string()),
    ("group", pa.string()),
    ("num_train", pa.int64()),
    ("num_test", pa.int64()),
    ("num_correct", pa.int64()),
    ("accuracy", pa.float64(), True),
)
PREDICTIONS_SCHEMA = _schema(
    ("sample_id", pa.int64()),
    ("label", pa.int32()),
    ("predicted", pa.int32()),
    ("confidence", pa.float32()),
)
CONFUSED_PAIRS_SCHEMA = _schema(
    ("rarer_class", pa.int32()),
    ("commoner_class", pa.int32()),
    ("rarer_as_commoner", pa.int64()),
    ("commoner_as_rarer", pa.int64()),
    ("count", pa.int64()),
    ("minority_share", pa.float64()),
)
PREDICTED_IMAGES_SCHEMA = _schema(
    ("path", pa.string()),
    ("rank", pa.int64()),
    ("class_id", pa.int32()),
    ("class_name", pa.string()),
    ("confidence", pa.float32()),
)
METRICS_COLUMNS = (  # between `loss` and `gradient_norm` stands one `loss_<term>` a term
    "epoch",
    "learning_rate",
    "loss",
    "gradient_norm",
    "train_accuracy",
    "num_confusions",
    "num_fallbacks",
    "test_accuracy",
    "images_per_second",
    "seconds",
)


def metrics_schema(terms: list[str]) -> pa.Schema:
    """Schema of metrics.parquet for a phase with these terms, one row an epoch.

    learning_rate, loss and gradient_norm (L2, of all trained parameters) are means over the epoch's steps;
    train_accuracy (fraction) and num_confusions are null where no unmixed batch is seen; test_accuracy (fraction) is
    null but for --eval-every; images_per_second counts an image each time it passes through the network.
    """
    integers = {"epoch", "num_confusions", "num_fallbacks"}
    nullable = {"train_accuracy", "num_confusions", "test_accuracy"}
    names: list[str] = []
    for name in METRICS_COLUMNS:
        names += [name] if name != "loss" else ["loss", *(f"loss_{term}" for term in terms)]
    return _schema(*((n, pa.int64() if n in integers else pa.float64(), n in nullable) for n in names))


# -- hashes ------------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal content, equal text. File names that are no UTF-8 are escaped."""
    return _unicode(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def _unicode(text: str) -> str:
    """JSON text whose lone surrogates (bytes of a file name that are no UTF-8) are escaped, as JSON itself would."""
    return text.encode("utf-8", "backslashreplace").decode()


def sha256(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON value's canonical text."""
    return sha256(canonical_json(value).encode())


# -- writing -----------------------------------------------------------------------------------------------------------

TEMPORARY = ".cpmix-tmp-"


def temporary_for(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: a name of this process's own in the same folder.

    Short: the name of `path` may be as long as a name can be.
    """
    return path.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{sha256(os.fsencode(path.name))[:8]}")


def write_fault(path: Path, fault: OSError, *, needed_bytes: int = 0) -> EnvironmentFault:
    """The error for a file or folder that cannot be written: why, what was needed and what is free."""
    reason = fault.strerror or str(fault)
    fix = "choose a folder you can write to with --out"
    if fault.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        room = f"{shutil.disk_usage(_existing(path)).free:,} are free on the disk"
        fix = f"free at least {needed_bytes:,} bytes there"
        if fault.errno == errno.EFBIG:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            room = f"a file may have {limit:,} here (ulimit -f)" if limit >= 0 else "the file system takes less"
            fix = "raise the limit, or choose another folder with --out"
        elif fault.errno == errno.EDQUOT:
            room += ", but your quota is used up (see: quota -s)"
        reason += f": {needed_bytes:,} bytes are needed, {room}"
        fix += ", then run the same command again"
    return EnvironmentFault(f"cannot write {path}: {reason}", fix=fix)


def _existing(path: Path) -> Path:
    """The nearest folder above that is there, or the path itself."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_place(folder: Path, needed_bytes: int, *, largest_file: int = 0) -> None:
    """Refuse an output folder that cannot be written or lacks room, before hours are spent on what goes there.

    Args:
        folder: it, or where it will be.
        needed_bytes: in all, beyond what is there.
        largest_file: its bytes, which `ulimit -f` may forbid.

    Raises:
        EnvironmentFault: with the reason. A quota shows only when it is hit.
    """
    place = _existing(folder)
    code = 0
    if not place.is_dir():
        code = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    elif shutil.disk_usage(place).free < needed_bytes:
        code = errno.ENOSPC
    elif 0 <= resource.getrlimit(resource.RLIMIT_FSIZE)[0] < largest_file:
        code, needed_bytes = errno.EFBIG, largest_file
    if code:
        raise write_fault(folder, OSError(code, os.strerror(code)), needed_bytes=needed_bytes)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        EnvironmentFault: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise write_fault(path, fault, needed_bytes=4096) from fault


def publish(path: Path, data: bytes) -> str:
    """Write a file whole: after this call `path` holds `data`; if it fails, what it held before.

    Returns:
        The sha256 of `data`.

    Raises:
        EnvironmentFault: the disk, a permission or a quota does not allow it; the temporary file is gone.
    """
    sha = sha256(data)
    with publishing(path, len(data)) as file:
        file.write(data)
    return sha


@contextmanager
def publishing(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """A file to write `num_bytes` to, that is published whole when the context is left, and not at all by an exception;
    see publish(). An OSError inside is taken for one of writing.
    """
    temporary = temporary_for(path)
    before = temporary.with_name(temporary.name + "-before")
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # Mode 0666 less the umask, as any other program would: the group can read a checkpoint.
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with suppress(OSError):  # nothing was there, or no hard links are: then there is no way back
                os.link(path, before)
            temporary.replace(path)
            try:
                os.fsync(folder)
            except OSError as fault:
                if fault.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems that know no fsync of folders
                    before.replace(path) if before.exists() else path.unlink()
                    raise
        finally:
            os.close(folder)
    except OSError as fault:
        raise write_fault(path, fault, needed_bytes=num_bytes) from fault
    finally:
        for leftover in (temporary, before):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what processes of this machine left that died while they published this very file: for one outside a
    locked folder, whose sweep sees to the rest.
    """
    *_, name = temporary_for(path).name.rpartition("-")
    for left in path.parent.glob(f"{TEMPORARY}{socket.gethostname()}-*-{name}*"):
        pid = left.name.removesuffix("-before").split("-")[-2]
        if not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                left.unlink()


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """Tensors as the bytes of a safetensors file, with `metadata` (a JSON value) under the one key "cpmix".

    One key only: safetensors 0.8 writes several in random order, and equal content must be equal bytes.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    text = {"cpmix": canonical_json(metadata)} if metadata is not None else None
    return safetensors.torch.save(plain, text)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of tensors with their names, types and shapes, for a file whose hash no record holds yet."""
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        content.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        content.update(plain.view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def sealed_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with a digest of the tensors and one of itself: such a file needs no record beside it to be checked."""
    sealed = {**metadata, "tensors_digest": tensors_digest(tensors)}
    return {**sealed, "digest": digest(sealed)}


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> str:
    """Publish tensors as safetensors; see tensor_bytes()."""
    return publish(path, tensor_bytes(tensors, metadata))


def table_bytes(schema: pa.Schema, columns: Mapping[str, Any]) -> bytes:
    """Columns as the bytes of a Parquet file with exactly this schema."""
    arrays = [pa.array(columns[f.name], type=f.type, from_pandas=True) for f in schema]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()


def publish_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> str:
    """Publish columns as Parquet; see table_bytes()."""
    return publish(path, table_bytes(schema, columns))


def publish_record(path: Path, record: Mapping[str, Any]) -> str:
    """Publish a JSON record with the digest of its own content, for people and programs to read."""
    return publish(path, _record_bytes({**record, "digest": digest(dict(record))}))


def json_text(value: Any) -> str:
    """A JSON value for people and programs to read."""
    return _unicode(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def _record_bytes(sealed: Any) -> bytes:
    return (_unicode(json.dumps(sealed, indent=1, ensure_ascii=False)) + "\n").encode()


# -- reading -----------------------------------------------------------------------------------------------------------

LATE_SECONDS = 5.0
"""How long a file may take to appear that its record says is there: network file systems show some late."""
MAX_RECORD = 2_000_000  # bytes; that of a data set of ten thousand classes has half a million
UNPACKS = 10
"""How many times its bytes a table may have in memory. A split's list of a million images has 4 times."""
UNPACKS_REGULAR = 128
"""The same for one whose rows are bounded otherwise: all pairs of 256 classes, each confused once, have 101 times."""


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading that is one: no folder, no pipe that would wait for ever, no device without an end.

    Raises:
        InputError: it is none, missing, or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise InputError(f"cannot read {path}: {fault.strerror or fault}") from fault
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise InputError(f"cannot read {path}: it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")
    return os.fdopen(descriptor, "rb")


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, be it a link to nowhere.

    Raises:
        InputError: that cannot be seen: what is out of sight is not taken for what is not there.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as fault:
        raise InputError(f"cannot read {path}: {fault.strerror or fault}") from fault
    return True


def wait_for(path: Path) -> None:
    """Give a file that has to be there some seconds to show, LATE_SECONDS at most; none where its folder is not."""
    until = time.monotonic() + LATE_SECONDS
    while not os.path.lexists(path) and path.parent.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
        with suppress(OSError), os.scandir(path.parent) as entries:  # makes NFS look again
            next(entries, None)


def read_bytes(path: Path, sha: str | None = None, *, limit: int | None = None) -> bytes:
    """The bytes of a file, checked against the hash that its record gives.

    Args:
        path: of the file; one with a hash is waited for, LATE_SECONDS at most.
        sha: the recorded sha256.
        limit: refuse a file with more bytes.

    Raises:
        InputError: it is missing, unreadable, no file, too large, or its bytes are not those that were published.
    """
    if sha is not None:
        wait_for(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise InputError(f"{path} has {size:,} bytes; a file of its kind has at most {limit:,}")
        try:
            data = file.read()
        except OSError as fault:
            raise InputError(f"cannot read {path}: {fault.strerror or fault}") from fault
    if sha is not None and sha256(data) != sha:
        raise InputError(
            f"{path} is damaged: its sha256 is {sha256(data)[:12]}..., recorded was {sha[:12]}...",
            fix="make it again with --overwrite, or restore it from a copy",
        )
    return data


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Check the files of a folder against their recorded hashes.

    Raises:
        InputError: one is missing or damaged.
    """
    for name, sha in hashes.items():
        read_bytes(folder / name, sha)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; a second of the same name would silently take the place of the first."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands there twice")
    return members


def _parse_header(text: bytes) -> tuple[dict[str, list[int]], Any]:
    """Shapes by tensor name, and the metadata, of a safetensors header.

    Raises:
        ValueError, KeyError, AttributeError, TypeError, RecursionError: it is none.
    """
    header = json.loads(text, object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", {}).get("cpmix")
    shapes = {name: list(entry["shape"]) for name, entry in header.items()}
    return shapes, json.loads(metadata) if metadata is not None else None


_NOT_A_HEADER = (ValueError, KeyError, AttributeError, TypeError, RecursionError)


def read_tensors(path: Path, sha: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata (a JSON value or None) of a safetensors file.

    Read as bytes and not by memory mapping, which is slow or fatal on network file systems.

    Raises:
        InputError: missing, damaged, or not safetensors.
    """
    data = read_bytes(path, sha)
    try:
        size = int.from_bytes(data[:8], "little")
        if size > MAX_HEADER:
            raise ValueError(f"its header says it has {size:,} bytes")
        _, metadata = _parse_header(data[8 : 8 + size])
        return safetensors.torch.load(data), metadata
    except (safetensors.SafetensorError, *_NOT_A_HEADER) as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}") from fault


def check_seal(path: Path, metadata: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What sealed_metadata() put round a safetensors file's tensors (unread: None) holds; returns the metadata.

    Raises:
        InputError: it does not, or there is no seal.
    """
    content = dict(metadata) if isinstance(metadata, dict) else {}
    whole = content.pop("digest", None) == digest(content)
    if not whole or (tensors is not None and content.get("tensors_digest") != tensors_digest(tensors)):
        raise InputError(f"{path} is damaged, or no file of cpmix", fix="make it again, with --overwrite")
    return content


def read_header(path: Path) -> tuple[dict[str, list[int]], Any]:
    """Shapes by tensor name and metadata (a JSON value or None) of a safetensors file, its values unread.

    Raises:
        InputError: missing, or the header is not one.
    """
    with open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if 0 < size <= MAX_HEADER else b""
    try:
        return _parse_header(text)
    except _NOT_A_HEADER as fault:
        raise InputError(f"{path} is not a valid safetensors file") from fault


def read_table(
    path: Path, schema: pa.Schema | None = None, sha: str | None = None, *, max_rows: int | None = None
) -> pd.DataFrame:
    """A Parquet table, its schema checked exactly.

    Args:
        path: of the file.
        schema: what it is to have; None takes any columns.
        sha: the recorded sha256.
        max_rows: what its content can have at most, where that is known: it may then be more regular than others.

    Raises:
        InputError: missing, damaged, with other columns, or made to fill the memory.
    """
    data = read_bytes(path, sha)
    try:
        found = pq.read_schema(io.BytesIO(data))
        if schema is not None and not found.equals(schema):
            raise InputError(f"{path} has columns {_columns(found)}; expected {_columns(schema)}")
        texts = [field.name for field in found if pa.types.is_string(field.type)]
        # As a dictionary: a word that stands there a million times stays one.
        source = pq.ParquetFile(io.BytesIO(data), read_dictionary=texts)
        num_rows = source.metadata.num_rows
        if max_rows is not None and num_rows > max_rows:
            raise InputError(f"{path} says it has {num_rows:,} rows; it can have {max_rows:,}")
        _refuse_codecs(path, source.metadata)
        times = UNPACKS if max_rows is None else UNPACKS_REGULAR
        fixed = sum(4 if field.name in texts else _width(field) for field in found) * num_rows
        _refuse_size(path, data, fixed, times)
        columns = source.read()
        for name in texts:
            fixed += sum(_text_bytes(chunk) for chunk in columns[name].chunks)
            _refuse_size(path, data, fixed, times)
            columns = columns.set_column(columns.schema.get_field_index(name), name, columns[name].cast(pa.string()))
        table: pd.DataFrame = columns.to_pandas()
    except InputError:
        raise
    except Exception as fault:  # a damaged file makes pyarrow raise whatever its bytes happen to spell
        raise InputError(f"{path} is not a valid Parquet file: {fault}") from fault
    return table


def _width(field: pa.Field) -> int:
    """Bytes of a value."""
    width: int = -(-field.type.bit_width // 8)
    return width


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of all words of a column, one that stands there twice counted twice."""
    lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)


def _refuse_size(path: Path, data: bytes, unpacked: int, times: int) -> None:
    """A few bytes can spell a million equal rows, or names; none of our tables is that regular.

    Raises:
        InputError: it is.
    """
    if unpacked > times * len(data) + 2**20:
        raise InputError(f"{path} would unpack its {len(data):,} bytes to {unpacked:,}")


def _refuse_codecs(path: Path, footer: pq.FileMetaData) -> None:
    """Snappy makes 64 bytes of 3 at most, whatever the footer says; one page of gzip or Zstandard can fill the memory
    before anything of it is counted.

    Raises:
        InputError: another codec than we write.
    """
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    used = {group.column(i).compression for group in groups for i in range(group.num_columns)}
    if others := sorted(used - {"SNAPPY", "UNCOMPRESSED"}):
        raise InputError(f"{path} is compressed with {', '.join(others)}; cpmix writes SNAPPY")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def refuse(path: Path, table: pd.DataFrame, wrong: "pd.Series[bool]", what: str) -> None:
    """Refuse a table for its first row that is wrong.

    Raises:
        InputError: with that row.
    """
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        row = ", ".join(f"{name} {value}" for name, value in table.iloc[first].items())
        raise InputError(f"{path}, row {first + 1} ({row}): {what}", fix="make it again with --overwrite")


def read_class_counts(path: Path, sha: str) -> pd.DataFrame:
    """class_counts.parquet: classes 0 to C - 1 in order, each with a training image.

    Raises:
        InputError: missing, damaged, or not so.
    """
    table = read_table(path, CLASS_COUNTS_SCHEMA, sha)
    refuse(path, table, table["class_id"] != np.arange(len(table)), "classes stand in the order of their ids, from 0")
    refuse(path, table, table["num_train"] < 1, "a class has a training image at least")
    refuse(path, table, table["num_test"] < 0, "no class has fewer than 0 test images")
    return table


def read_confusions(path: Path, sha: str, num_classes: int) -> pd.DataFrame:
    """confusion_pairs.parquet: ordered pairs of different classes, each once, with a count.

    Raises:
        InputError: missing, damaged, or not so.
    """
    table = read_table(path, CONFUSION_SCHEMA, sha, max_rows=num_classes**2)
    for name in ("true_class", "predicted_class"):
        refuse_outside(path, table, name, num_classes)
    refuse(path, table, table["count"] < 1, "a pair is there because it was counted")
    refuse(path, table, table["true_class"] == table["predicted_class"], "a class is not confused with itself")
    twice = table.duplicated(["true_class", "predicted_class"])
    refuse(path, table, twice, "the pair stands there twice")
    return table


def refuse_outside(path: Path, table: pd.DataFrame, column: str, num_classes: int) -> None:
    """Refuse class ids outside 0 to num_classes - 1.

    Raises:
        InputError: with the first row that has one.
    """
    classes = table[column]
    refuse(path, table, (classes < 0) | (classes >= num_classes), f"classes are 0 to {num_classes - 1}")


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record whose own digest holds.

    Raises:
        InputError: missing, not JSON, of another format, or changed since it was written.
    """
    data = read_bytes(path, limit=MAX_RECORD)
    try:
        record = json.loads(data, object_pairs_hook=_unique)
        as_published = _record_bytes(record) == data
        sealed = record.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
        raise InputError(f"{path} is damaged: not a cpmix record") from fault
    if digest(record) != sealed or not as_published:
        raise InputError(
            f"{path} was changed after it was written",
            fix="restore it, or make it again with --overwrite",
        )
    check_format(path, record)
    return dict(record)


def checked(path: Path, entry: type[BaseModel], record: dict[str, Any]) -> dict[str, Any]:
    """A record that has what its readers count on. It may have been made by hand, digest and all.

    Raises:
        InputError: with the first thing that is not so.
    """
    try:
        entry.model_validate(record)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise InputError(f"{path} is no such record: {'.'.join(map(str, first['loc']))}: {first['msg']}") from fault
    return record


def check_format(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse what another version of cpmix wrote.

    Raises:
        InputError: its format is not FORMAT.
    """
    if record.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {record.get('format')}, this cpmix reads format {FORMAT}",
            fix="use the cpmix version that wrote it, or make it again",
        )


def confusion_columns(counts: Tensor) -> dict[str, Any]:
    """Confusion counts [C, C] as the sparse columns of CONFUSION_SCHEMA, in row order, no zero rows."""
    counts = counts.detach().cpu().round().to(torch.int64)
    true_class, predicted_class = counts.nonzero(as_tuple=True)
    return {
        "true_class": true_class.numpy(),
        "predicted_class": predicted_class.numpy(),
        "count": counts[true_class, predicted_class].numpy(),
    }


def confusion_tensor(table: pd.DataFrame, num_classes: int) -> Tensor:
    """The dense int64 counts [C, C] of a sparse confusion table."""
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    counts[
        torch.tensor(table["true_class"].to_numpy(), dtype=torch.int64),
        torch.tensor(table["predicted_class"].to_numpy(), dtype=torch.int64),
    ] = torch.tensor(table["count"].to_numpy(), dtype=torch.int64)
    return counts
