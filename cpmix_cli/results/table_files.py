"""Tables that --out writes: Parquet, CSV or JSON by the ending of the file's name."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cpmix_cli.artifacts import files, tables
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.runtime.text import csv_cell

_ENDINGS = (".parquet", ".csv", ".json")


def check_out(path: Path, is_own: Callable[[list[str]], bool], *, overwrite: bool, example: str) -> None:
    """Check the file of --out before the work begins.

    Args:
        path: value of --out.
        is_own: tells by the columns of a table whether this command wrote it.
        overwrite: value of --overwrite.
        example: name for the message.

    Raises:
        UsageError: the name has another ending.
        EnvironmentFault: the file exists, and was not written by cpmix or --overwrite is not given.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(
            f"--out {path} ends in none of {', '.join(_ENDINGS)}", fix=f"give a name such as --out {example}"
        )
    files.refuse_existing(path, lambda data: is_own(_columns_of(data)), overwrite=overwrite)


def _columns_of(data: bytes) -> list[str]:
    """Return the columns of a table in one of the three formats; of other content, anything but those of a table."""
    with suppress(pa.ArrowInvalid):
        return list(pq.read_schema(io.BytesIO(data)).names)
    with suppress(ValueError, IndexError, TypeError, AttributeError, RecursionError):
        return list(json.loads(data)[0])
    line = data.partition(b"\n")[0].decode(errors="replace")
    return next(csv.reader([line]), []) if len(line) < csv.field_size_limit() else []


def publish_in_format(path: Path, schema: pa.Schema, columns: Mapping[str, Sequence[Any]]) -> None:
    """Publish a table as the ending of its name says.

    Args:
        path: file to write.
        schema: names and types of the columns.
        columns: column name -> values [N].

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    files.publish_out(path, _encoded(path.suffix.lower(), schema, columns))


def _encoded(suffix: str, schema: pa.Schema, columns: Mapping[str, Sequence[Any]]) -> bytes:
    if suffix == ".parquet":
        return tables.table_bytes(schema, columns)
    rows = list(zip(*(columns[name] for name in schema.names), strict=True))
    if suffix == ".json":
        found = [dict(zip(schema.names, map(_plain, row), strict=True)) for row in rows]
        return (files.json_text(found) + "\n").encode()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([map(csv_cell, row) for row in (schema.names, *rows)])
    return text.getvalue().encode()


def _plain(value: Any) -> Any:
    """Return a value of a cell for JSON: float32 with as few digits as tell it from others."""
    return float(str(value)) if isinstance(value, np.floating) else value
