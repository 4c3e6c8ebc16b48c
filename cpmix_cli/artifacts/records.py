"""Records on disk: JSON files with a digest of their own content, read as objects with checked fields."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cpmix_cli.artifacts.files import MAX_RECORD, digest, json_text, publish, read_bytes, unique_members
from cpmix_cli.runtime.errors import InputError

FORMAT = 1


class Record(BaseModel):
    """Base class of objects read from JSON. Fields of the file that a class does not declare are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


Read = TypeVar("Read", bound=Record)


def publish_record(path: Path, fields: Mapping[str, Any]) -> str:
    """Publish fields as a JSON record with a digest of its content, and return the file's sha256."""
    return publish(path, _text({**fields, "digest": digest(dict(fields))}))


def _text(sealed: Any) -> bytes:
    return (json_text(sealed) + "\n").encode()


def read_record(path: Path, model: type[Read]) -> Read:
    """Read a JSON record and check its digest and the fields of `model`.

    Raises:
        InputError: the file is missing, not JSON, of another format or changed since it was written, or a field of
            `model` is missing or invalid.
    """
    return checked(path, model, read_fields(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Return all fields of a JSON record except its digest, which is checked; raises as read_record()."""
    data = read_bytes(path, limit=MAX_RECORD)
    try:
        is_whole = _is_whole(data)
        fields: dict[str, Any] = json.loads(data)
        del fields["digest"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
        raise InputError(f"{path} is damaged: it is not a JSON record of cpmix", path=path) from fault
    if not is_whole:
        raise InputError(f"{path} was changed after it was written: its digest differs", path=path)
    check_format(path, fields)
    return fields


@lru_cache(maxsize=32)  # status reads each record of a run dozens of times
def _is_whole(data: bytes) -> bool:
    """Return whether the bytes of a record are as they were published; raises if they are no JSON object."""
    fields = json.loads(data, object_pairs_hook=unique_members)
    as_published = _text(fields) == data
    sealed = fields.pop("digest")
    return digest(fields) == sealed and as_published


def checked(path: Path, model: type[Read], fields: Any) -> Read:
    """Convert fields to a record and check them. A correct digest is no proof: a user may have written the file.

    Args:
        path: file of the fields, for the message.
        model: class of the record.
        fields: JSON value.

    Raises:
        InputError: a field is missing or invalid; the message names the first.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as fault:
        first = fault.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the record"
        raise InputError(f"{path} has an invalid value: {field}: {first['msg']}", path=path) from fault


def check_format(path: Path, fields: Mapping[str, Any]) -> None:
    """Raise InputError if a file has another format than FORMAT, because another version of cpmix wrote it."""
    if fields.get("format") != FORMAT:
        found = fields.get("format")
        raise InputError(
            f"{path} has format {found}, this cpmix reads format {FORMAT}: another version of cpmix wrote it", path=path
        )
