"""Records on disk: JSON with a digest of its own content, read as objects whose fields are checked once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cpmix_cli.artifacts.files import MAX_RECORD, digest, json_text, publish, read_bytes, unique_members
from cpmix_cli.runtime.errors import InputError

FORMAT = 1


class Record(BaseModel):
    """Base of what is read from disk: names the fields that its readers use. Other fields of the file are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


Read = TypeVar("Read", bound=Record)


def publish_record(path: Path, fields: Mapping[str, Any]) -> str:
    """Publish fields as a JSON record with the digest of its own content, for people and programs to read."""
    return publish(path, _text({**fields, "digest": digest(dict(fields))}))


def _text(sealed: Any) -> bytes:
    return (json_text(sealed) + "\n").encode()


def read_record(path: Path, model: type[Read]) -> Read:
    """Read a JSON record whose own digest holds.

    Raises:
        InputError: missing, not JSON, of another format, changed since it was written, or without a field that `model`
            requires.
    """
    return checked(path, model, read_fields(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Return all fields of a JSON record, its digest checked and left out; see read_record()."""
    data = read_bytes(path, limit=MAX_RECORD)
    try:
        fields: dict[str, Any] = json.loads(data, object_pairs_hook=unique_members)
        as_published = _text(fields) == data
        sealed = fields.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
        raise InputError(f"{path} is damaged: not a cpmix record") from fault
    if digest(fields) != sealed or not as_published:
        raise InputError(
            f"{path} was changed after it was written", fix="restore it, or make it again with --overwrite"
        )
    check_format(path, fields)
    return fields


def checked(path: Path, model: type[Read], fields: Any) -> Read:
    """Return the fields of a file as a record. The file may have been made by hand, digest and all.

    Raises:
        InputError: with the first field that is missing or wrong.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as fault:
        first = fault.errors()[0]
        raise InputError(f"{path} is no such record: {'.'.join(map(str, first['loc']))}: {first['msg']}") from fault


def check_format(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise InputError for a file of another format than FORMAT: another version of cpmix wrote it."""
    if fields.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {fields.get('format')}, this cpmix reads format {FORMAT}",
            fix="use the cpmix version that wrote it, or make it again",
        )
