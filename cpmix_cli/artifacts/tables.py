"""Tables on disk: Parquet files with fixed schemas, checked when they are read."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cpmix_cli.artifacts.files import publish, read_bytes, utf8_text
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.memory import raise_if_exhausted


def schema_of(*columns: str) -> pa.Schema:
    """Return the Arrow schema of columns given as "name type". A type that ends in "?" allows null."""
    fields = []
    for column in columns:
        name, kind = column.rsplit(" ", 1)
        type_ = pa.binary(32) if kind == "sha256" else pa.type_for_alias(kind.removesuffix("?"))
        fields.append(pa.field(name, type_, nullable=kind.endswith("?")))
    return pa.schema(fields)


def split_schema(by_path: bool) -> pa.Schema:
    """Return the schema of train, val and test .parquet, with the column path or source_index to identify an image."""
    return schema_of("sample_id int64", "label int32", "path string" if by_path else "source_index int64")


CLASS_COUNTS_SCHEMA = schema_of(
    "class_id int32", "class_name string", "num_train int64", "num_test int64", "group string"
)
HASHES_SCHEMA = schema_of("sample_id int64", "sha256 sha256")
"""sha256 of each packed image of a split."""
SEEN_SCHEMA = schema_of("sample_id int64", "size int64", "changed_ns int64", "sha256 sha256")
"""Bytes, time of the last change and content of each file of a split, of a user's images that stay in their files."""
CONFUSION_SCHEMA = schema_of("true_class int32", "predicted_class int32", "count int64")
_OLDER_PER_CLASS = (
    *("class_id int32", "class_name string", "group string"),
    *("num_train int64", "num_test int64", "num_correct int64", "accuracy double?"),
)
OLDER_PER_CLASS_SCHEMA = schema_of(*_OLDER_PER_CLASS)
"""The columns of per_class.parquet that older versions wrote."""
PER_CLASS_SCHEMA = schema_of(
    *_OLDER_PER_CLASS,
    *("num_predicted int64", "precision double?", "f1 double?", "recall_low double?", "recall_high double?"),
)
PREDICTIONS_SCHEMA = schema_of("sample_id int64", "label int32", "predicted int32", "confidence float")
CONFUSED_PAIRS_SCHEMA = schema_of(
    *("rarer_class int32", "commoner_class int32", "rarer_as_commoner int64"),
    *("commoner_as_rarer int64", "count int64", "minority_share double"),
)
THRESHOLDS_SCHEMA = schema_of(
    *("class_id int32", "class_name string", "threshold float?"),
    *("num_val int64", "val_precision double?", "val_recall double?"),
    *("num_predicted int64", "num_decided int64", "num_correct int64", "precision double?", "recall double?"),
)
MISCLASSIFIED_SCHEMA = schema_of(
    *("sample_id int64", "path string?", "source_index int64?", "true_class int32", "true_name string"),
    *("predicted_class int32", "predicted_name string", "confidence float"),
)
PREDICTED_IMAGES_SCHEMA = schema_of(
    "path string", "rank int64", "class_id int32", "class_name string", "confidence float"
)


def table_bytes(schema: pa.Schema, columns: Mapping[str, Any]) -> bytes:
    """Return the bytes of a Parquet file with these columns and exactly this schema.

    Bytes of file names that are not UTF-8 are escaped: Parquet strings are UTF-8.
    """
    arrays = []
    for field in schema:
        values = columns[field.name]
        try:
            arrays.append(pa.array(values, type=field.type, from_pandas=True))
        except UnicodeEncodeError:
            arrays.append(pa.array([utf8_text(value) for value in values], type=field.type))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()


def publish_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> str:
    """Publish columns as a Parquet file and return its sha256.

    Args:
        path: file to write.
        schema: names and types of the columns.
        columns: column name -> values [N].

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    return publish(path, table_bytes(schema, columns))


def open_parquet(data: bytes, encoded: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a Parquet file. Its rows must be read with use_threads=False.

    Threads of pyarrow may still hold the file's Python object after an error. If Python ends before they let go of it,
    the process aborts (signal 6). So no thread may read ahead or decode.

    Args:
        data: content of the file.
        encoded: columns that are read with dictionary encoding.
    """
    return pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(encoded), pre_buffer=False)


_UNPACKS = 10
"""Largest number of bytes in memory per byte of the file. The table of a split with a million images has 4."""
_UNPACKS_REGULAR = 128
"""The same limit if `max_rows` is given. The table of all pairs of 256 classes, each confused once, has 101."""


def read_table(
    path: Path,
    schema: pa.Schema | None = None,
    sha: str | None = None,
    *,
    max_rows: int | None = None,
    older: pa.Schema | None = None,
) -> pd.DataFrame:
    """Read a Parquet table.

    Args:
        path: file to read.
        schema: columns that the table must have; None accepts any.
        sha: recorded sha256 of the file.
        max_rows: largest possible number of rows, if known. The table may then compress better than others.
        older: columns that the table may have instead, because an older version wrote it.

    Raises:
        InputError: the file is missing, damaged or too large in memory, or has other columns or too many rows.
    """
    data = read_bytes(path, sha)
    try:
        found = open_parquet(data).schema_arrow
        if schema is not None and not (found.equals(schema) or (older is not None and found.equals(older))):
            raise InputError(f"{path} has columns {_columns(found)}; expected {_columns(schema)}", path=path)
        texts = [field.name for field in found if pa.types.is_string(field.type)]
        # Dictionary encoding: a string that a column repeats a million times takes memory once.
        source = open_parquet(data, texts)
        num_rows = source.metadata.num_rows
        if max_rows is not None and num_rows > max_rows:
            raise InputError(
                f"{path} has {num_rows:,} rows by its footer; at most {max_rows:,} are possible", path=path
            )
        _refuse_codecs(path, source.metadata)
        times = _UNPACKS if max_rows is None else _UNPACKS_REGULAR
        unpacked = sum(4 if field.name in texts else -(-field.type.bit_width // 8) for field in found) * num_rows
        _refuse_size(path, data, unpacked, times)
        columns = source.read(use_threads=False)
        unpacked += sum(_text_bytes(chunk) for name in texts for chunk in columns[name].chunks)
        _refuse_size(path, data, unpacked, times)
        table: pd.DataFrame = columns.cast(found).to_pandas(use_threads=False)
    except InputError:
        raise
    except Exception as fault:  # a damaged file can make pyarrow raise any exception
        raise_if_exhausted(fault)
        raise InputError(f"{path} is not a valid Parquet file: {fault}", path=path) from fault
    return table


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    """Return the bytes of all strings of a column; repeated strings count each time."""
    lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)


def _refuse_size(path: Path, data: bytes, unpacked: int, times: int) -> None:
    """Raise InputError if a table expands too much: a few bytes can encode a million equal rows or strings."""
    if unpacked > times * len(data) + 2**20:
        raise InputError(
            f"{path} would unpack from {len(data):,} to {unpacked:,} bytes; at most {times} times its size is read",
            path=path,
        )


def _refuse_codecs(path: Path, footer: pq.FileMetaData) -> None:
    """Raise InputError if a table is compressed with another codec than Snappy.

    Snappy expands 3 bytes to at most 64. One page of gzip or Zstandard can fill the memory before its size is known.
    """
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    used = {group.column(i).compression for group in groups for i in range(group.num_columns)}
    if others := sorted(used - {"SNAPPY", "UNCOMPRESSED"}):
        raise InputError(f"{path} is compressed with {', '.join(others)}; cpmix writes and reads SNAPPY", path=path)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _refuse(path: Path, table: pd.DataFrame, wrong: "pd.Series[bool]", what: str) -> None:
    """Raise InputError with the first row for which `wrong` is True, if there is one."""
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        row = ", ".join(f"{name} {value}" for name, value in table.iloc[first].items())
        raise InputError(f"{path}, row {first + 1} ({row}): {what}", path=path)


def refuse_outside(path: Path, table: pd.DataFrame, column: str, num_classes: int) -> None:
    """Check that all class ids of a column are in 0..num_classes - 1.

    Args:
        path: file of the table, for the message.
        table: table that was read.
        column: name of the column of class ids.
        num_classes: C.

    Raises:
        InputError: an id is outside the range; the message shows the first such row.
    """
    classes = table[column]
    _refuse(path, table, (classes < 0) | (classes >= num_classes), f"classes are 0 to {num_classes - 1}")


def read_samples(path: Path, by_path: bool, sha: str | None) -> pd.DataFrame:
    """Read the table of a split: sample_id, label, and path or source_index.

    Args:
        path: file to read.
        by_path: the samples are image files.
        sha: recorded sha256 of the file.

    Raises:
        InputError: as read_table(); or a path leads out of the folder of the images.
    """
    table = read_table(path, split_schema(by_path), sha)
    if by_path:
        outside = pc.match_substring_regex(pa.array(table["path"], pa.string()), r"(^|/)\.{0,2}(/|$)|\x00")
        _refuse(path, table, pd.Series(outside.to_numpy(zero_copy_only=False)), "no path below the folder of images")
    return table


def read_class_counts(path: Path, sha: str) -> pd.DataFrame:
    """Read class_counts.parquet: one row per class 0 to C - 1, in this order, with counts of images.

    Raises:
        InputError: as read_table(); or ids are not 0 to C - 1 in order, or a class has no training image.
    """
    table = read_table(path, CLASS_COUNTS_SCHEMA, sha)
    _refuse(path, table, table["class_id"] != np.arange(len(table)), "class ids must be 0, 1, 2, ... in this order")
    _refuse(path, table, table["num_train"] < 1, "num_train must be at least 1")
    _refuse(path, table, table["num_test"] < 0, "num_test must be at least 0")
    return table


def read_per_class(path: Path, sha: str | None) -> pd.DataFrame:
    """Read per_class.parquet: one row per class. Columns that an older version did not write are NaN.

    Raises:
        InputError: as read_table().
    """
    return read_table(path, PER_CLASS_SCHEMA, sha, older=OLDER_PER_CLASS_SCHEMA).reindex(columns=PER_CLASS_SCHEMA.names)


def read_confusions(path: Path, sha: str, num_classes: int) -> pd.DataFrame:
    """Read confusion_pairs.parquet: one row per ordered pair of different classes that were confused.

    Args:
        path: file to read.
        sha: recorded sha256 of the file.
        num_classes: C.

    Raises:
        InputError: as read_table(); or a class id or count is out of range, or a pair is invalid or repeated.
    """
    pair = ["true_class", "predicted_class"]
    table = read_table(path, CONFUSION_SCHEMA, sha, max_rows=num_classes**2)
    for name in pair:
        refuse_outside(path, table, name, num_classes)
    _refuse(path, table, table["count"] < 1, "count must be at least 1")
    _refuse(path, table, table["true_class"] == table["predicted_class"], "the two classes of a pair must differ")
    _refuse(path, table, table.duplicated(pair), "the pair occurs twice")
    return table


def confusion_columns(counts: NDArray[Any]) -> dict[str, Any]:
    """Convert confusion counts to columns of CONFUSION_SCHEMA: [C, C] -> [n] each, n counts other than 0, by row."""
    counts = counts.round().astype(np.int64)
    true_class, predicted_class = counts.nonzero()
    return {"true_class": true_class, "predicted_class": predicted_class, "count": counts[true_class, predicted_class]}


def confusion_counts(table: pd.DataFrame, num_classes: int) -> NDArray[np.int64]:
    """Convert a sparse table of CONFUSION_SCHEMA to dense counts: n rows -> [C, C]."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    counts[table["true_class"], table["predicted_class"]] = table["count"]
    return counts
