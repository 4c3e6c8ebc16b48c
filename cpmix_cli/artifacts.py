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
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
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
    """JSON with sorted keys and no spaces: equal content, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON value's canonical text."""
    return sha256(canonical_json(value).encode())


# -- writing -----------------------------------------------------------------------------------------------------------


def write_fault(path: Path, fault: OSError, *, needed_bytes: int = 0) -> EnvironmentFault:
    """The error for a file or folder that cannot be written: why, and what would be enough."""
    reason = fault.strerror or str(fault)
    fix = "choose a folder you can write to with --out"
    if fault.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        fix = f"free at least {needed_bytes:,} bytes there, then run the same command again"
    return EnvironmentFault(f"cannot write {path}: {reason}", fix=fix)


def check_place(folder: Path, needed_bytes: int) -> None:
    """Refuse an output folder that cannot be written or lacks room, before hours are spent on what goes there.

    Raises:
        EnvironmentFault: with the reason. A quota shows only when it is hit.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    code = 0
    if not place.is_dir():
        code = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    elif shutil.disk_usage(place).free < needed_bytes:
        code = errno.ENOSPC
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
        raise write_fault(path, fault) from fault


def publish(path: Path, data: bytes) -> str:
    """Write a file whole: after this call `path` holds `data`; if it fails, what it held before.

    Returns:
        The sha256 of `data`.

    Raises:
        EnvironmentFault: the disk, a permission or a quota does not allow it; the temporary file is gone.
    """
    temporary = path.with_name(f".cpmix-tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        # Mode 0666 less the umask, as any other program would: the group can read a checkpoint.
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as fault:
        temporary.unlink(missing_ok=True)
        raise write_fault(path, fault, needed_bytes=len(data)) from fault
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return sha256(data)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """Tensors as the bytes of a safetensors file, with `metadata` (a JSON value) under the one key "cpmix".

    One key only: safetensors 0.8 writes several in random order, and equal content must be equal bytes.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    text = {"cpmix": canonical_json(metadata)} if metadata is not None else None
    return safetensors.torch.save(plain, text)


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> str:
    """Publish tensors as safetensors; see tensor_bytes()."""
    return publish(path, tensor_bytes(tensors, metadata))


def publish_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> str:
    """Publish columns as Parquet with exactly this schema."""
    arrays = [pa.array(columns[f.name], type=f.type, from_pandas=True) for f in schema]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    return publish(path, buffer.getvalue())


def publish_record(path: Path, record: Mapping[str, Any]) -> str:
    """Publish a JSON record with the digest of its own content, for people and programs to read."""
    sealed = {**record, "digest": digest(dict(record))}
    return publish(path, (json.dumps(sealed, indent=1, ensure_ascii=False) + "\n").encode())


# -- reading -----------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, sha: str | None = None) -> bytes:
    """The bytes of a file, checked against the hash that its record gives.

    Raises:
        InputError: it is missing, unreadable, or its bytes are not those that were published.
    """
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise InputError(f"cannot read {path}: {fault.strerror or fault}") from fault
    if sha is not None and sha256(data) != sha:
        raise InputError(
            f"{path} is damaged: its sha256 is {sha256(data)[:12]}..., recorded was {sha[:12]}...",
            fix="make it again with --overwrite, or restore it from a copy",
        )
    return data


def read_tensors(path: Path, sha: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata (a JSON value or None) of a safetensors file.

    Read as bytes and not by memory mapping, which is slow or fatal on network file systems.

    Raises:
        InputError: missing, damaged, or not safetensors.
    """
    data = read_bytes(path, sha)
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("cpmix")
        return tensors, json.loads(metadata) if metadata is not None else None
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError) as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}") from fault


def read_header(path: Path) -> tuple[dict[str, list[int]], Any]:
    """Shapes by tensor name and metadata (a JSON value or None) of a safetensors file, its values unread.

    Raises:
        InputError: missing, or the header is not one.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 0 < size <= MAX_HEADER else None
            metadata = header.pop("__metadata__", {}).get("cpmix")  # type: ignore[union-attr]
            shapes = {name: list(entry["shape"]) for name, entry in header.items()}  # type: ignore[union-attr]
            return shapes, json.loads(metadata) if metadata is not None else None
    except OSError as fault:
        raise InputError(f"cannot read {path}: {fault.strerror or fault}") from fault
    except (ValueError, KeyError, AttributeError, TypeError) as fault:
        raise InputError(f"{path} is not a valid safetensors file") from fault


def read_table(path: Path, schema: pa.Schema | None = None, sha: str | None = None) -> pd.DataFrame:
    """A Parquet table, its schema checked exactly.

    Raises:
        InputError: missing, damaged, or with other columns.
    """
    data = read_bytes(path, sha)
    try:
        found = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as fault:
        raise InputError(f"{path} is not a valid Parquet file: {fault}") from fault
    if schema is not None and not found.schema.equals(schema):
        raise InputError(f"{path} has columns {_columns(found.schema)}; expected {_columns(schema)}")
    table: pd.DataFrame = found.to_pandas()
    return table


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record whose own digest holds.

    Raises:
        InputError: missing, not JSON, of another format, or changed since it was written.
    """
    data = read_bytes(path)
    try:
        record = json.loads(data)
        sealed = record.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError) as fault:
        raise InputError(f"{path} is damaged: not a cpmix record") from fault
    if digest(record) != sealed:
        raise InputError(
            f"{path} was changed after it was written",
            fix="restore it, or make it again with --overwrite",
        )
    if record.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {record.get('format')}, this cpmix reads format {FORMAT}",
            fix="use the cpmix version that wrote it, or make it again",
        )
    return dict(record)


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
