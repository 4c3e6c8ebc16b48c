"""Records on disk: JSON with a digest of its own content."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cpmix_cli.artifacts.files import MAX_RECORD, _record_bytes, _unique, digest, publish, read_bytes
from cpmix_cli.runtime.errors import InputError

FORMAT = 1


def publish_record(path: Path, record: Mapping[str, Any]) -> str:
    """Publish a JSON record with the digest of its own content, for people and programs to read."""
    return publish(path, _record_bytes({**record, "digest": digest(dict(record))}))


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
