"""Tables on disk: Parquet files with exact schemas, checked when they are read."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cpmix_cli.artifacts.files import publish, read_bytes
from cpmix_cli.runtime.errors import InputError


def schema_of(*columns: str) -> pa.Schema:
    """Return the schema of columns "name type"; a type that ends in ? allows null."""
    fields = []
    for column in columns:
        name, kind = column.rsplit(" ", 1)
        type_ = pa.binary(32) if kind == "sha256" else pa.type_for_alias(kind.removesuffix("?"))
        fields.append(pa.field(name, type_, nullable=kind.endswith("?")))
    return pa.schema(fields)


def split_schema(by_path: bool) -> pa.Schema:
    """Schema of train, val and test .parquet; an image is known by its place in the source, or by its file's path."""
    return schema_of("sample_id int64", "label int32", "path string" if by_path else "source_index int64")


CLASS_COUNTS_SCHEMA = schema_of(
    "class_id int32", "class_name string", "num_train int64", "num_test int64", "group string"
)
HASHES_SCHEMA = schema_of("sample_id int64", "sha256 sha256")
"""sha256 of each packed image of a split."""
CONFUSION_SCHEMA = schema_of("true_class int32", "predicted_class int32", "count int64")
PER_CLASS_SCHEMA = schema_of(
    *("class_id int32", "class_name string", "group string"),
    *("num_train int64", "num_test int64", "num_correct int64", "accuracy double?"),
)
PREDICTIONS_SCHEMA = schema_of("sample_id int64", "label int32", "predicted int32", "confidence float")
CONFUSED_PAIRS_SCHEMA = schema_of(
    *("rarer_class int32", "commoner_class int32", "rarer_as_commoner int64"),
    *("commoner_as_rarer int64", "count int64", "minority_share double"),
)
PREDICTED_IMAGES_SCHEMA = schema_of(
    "path string", "rank int64", "class_id int32", "class_name string", "confidence float"
)


def table_bytes(schema: pa.Schema, columns: Mapping[str, Any]) -> bytes:
    """Columns as the bytes of a Parquet file with exactly this schema."""
    arrays = [pa.array(columns[f.name], type=f.type, from_pandas=True) for f in schema]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()


def publish_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> str:
    """Publish columns as Parquet; see table_bytes()."""
    return publish(path, table_bytes(schema, columns))


_UNPACKS = 10
"""Most bytes of a table in memory per byte of its file. A split's list of a million images has 4."""
_UNPACKS_REGULAR = 128
"""The same if `max_rows` bounds the rows: all pairs of 256 classes, each confused once, have 101."""


def read_table(
    path: Path, schema: pa.Schema | None = None, sha: str | None = None, *, max_rows: int | None = None
) -> pd.DataFrame:
    """Read a Parquet table.

    Args:
        path: of the file.
        schema: the columns that it must have; None accepts any.
        sha: the recorded sha256.
        max_rows: most rows that it can have, if that is known: such a table may be more regular than others.

    Raises:
        InputError: missing, damaged, with other columns or impossible values, or made to fill the memory.
    """
    data = read_bytes(path, sha)
    try:
        found = pq.read_schema(io.BytesIO(data))
        if schema is not None and not found.equals(schema):
            raise InputError(f"{path} has columns {_columns(found)}; expected {_columns(schema)}")
        texts = [field.name for field in found if pa.types.is_string(field.type)]
        # As a dictionary: a word that occurs a million times is held once.
        source = pq.ParquetFile(io.BytesIO(data), read_dictionary=texts)
        num_rows = source.metadata.num_rows
        if max_rows is not None and num_rows > max_rows:
            raise InputError(f"{path} says it has {num_rows:,} rows; it can have {max_rows:,}")
        _refuse_codecs(path, source.metadata)
        times = _UNPACKS if max_rows is None else _UNPACKS_REGULAR
        unpacked = sum(4 if field.name in texts else -(-field.type.bit_width // 8) for field in found) * num_rows
        _refuse_size(path, data, unpacked, times)
        columns = source.read()
        unpacked += sum(_text_bytes(chunk) for name in texts for chunk in columns[name].chunks)
        _refuse_size(path, data, unpacked, times)
        table: pd.DataFrame = columns.cast(found).to_pandas()
    except InputError:
        raise
    except Exception as fault:  # a damaged file makes pyarrow raise whatever its bytes happen to spell
        raise InputError(f"{path} is not a valid Parquet file: {fault}") from fault
    return table


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of all words of a column, a word that occurs twice counted twice."""
    lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)


def _refuse_size(path: Path, data: bytes, unpacked: int, times: int) -> None:
    """A few bytes can spell a million equal rows, or names; none of our tables is that regular."""
    if unpacked > times * len(data) + 2**20:
        raise InputError(f"{path} would unpack its {len(data):,} bytes to {unpacked:,}")


def _refuse_codecs(path: Path, footer: pq.FileMetaData) -> None:
    """Refuse other codecs than ours. Snappy makes 64 bytes of 3 at most, whatever the footer says; one page of gzip or
    Zstandard can fill the memory before anything of it is counted.
    """
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    used = {group.column(i).compression for group in groups for i in range(group.num_columns)}
    if others := sorted(used - {"SNAPPY", "UNCOMPRESSED"}):
        raise InputError(f"{path} is compressed with {', '.join(others)}; cpmix writes SNAPPY")


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _refuse(path: Path, table: pd.DataFrame, wrong: "pd.Series[bool]", what: str) -> None:
    """Refuse a table with its first row that is wrong, if any."""
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        row = ", ".join(f"{name} {value}" for name, value in table.iloc[first].items())
        raise InputError(f"{path}, row {first + 1} ({row}): {what}", fix="make it again with --overwrite")


def refuse_outside(path: Path, table: pd.DataFrame, column: str, num_classes: int) -> None:
    """Raise InputError for the first row whose class id in `column` is not 0 to num_classes - 1."""
    classes = table[column]
    _refuse(path, table, (classes < 0) | (classes >= num_classes), f"classes are 0 to {num_classes - 1}")


def read_class_counts(path: Path, sha: str) -> pd.DataFrame:
    """Read class_counts.parquet: classes 0 to C - 1 in order, each with a training image; raises as read_table()."""
    table = read_table(path, CLASS_COUNTS_SCHEMA, sha)
    _refuse(path, table, table["class_id"] != np.arange(len(table)), "classes stand in the order of their ids, from 0")
    _refuse(path, table, table["num_train"] < 1, "a class has a training image at least")
    _refuse(path, table, table["num_test"] < 0, "no class has fewer than 0 test images")
    return table


def read_confusions(path: Path, sha: str, num_classes: int) -> pd.DataFrame:
    """Read confusion_pairs.parquet: ordered pairs of different classes, each once; raises as read_table()."""
    pair = ["true_class", "predicted_class"]
    table = read_table(path, CONFUSION_SCHEMA, sha, max_rows=num_classes**2)
    for name in pair:
        refuse_outside(path, table, name, num_classes)
    _refuse(path, table, table["count"] < 1, "a pair is there because it was counted")
    _refuse(path, table, table["true_class"] == table["predicted_class"], "a class is not confused with itself")
    _refuse(path, table, table.duplicated(pair), "the pair stands there twice")
    return table


def confusion_columns(counts: NDArray[Any]) -> dict[str, Any]:
    """Confusion counts [C, C] as the sparse columns of CONFUSION_SCHEMA, in row order, no zero rows."""
    counts = counts.round().astype(np.int64)
    true_class, predicted_class = counts.nonzero()
    return {"true_class": true_class, "predicted_class": predicted_class, "count": counts[true_class, predicted_class]}


def confusion_counts(table: pd.DataFrame, num_classes: int) -> NDArray[np.int64]:
    """The dense counts [C, C] of a sparse confusion table."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    counts[table["true_class"], table["predicted_class"]] = table["count"]
    return counts
