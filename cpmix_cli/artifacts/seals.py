"""Seals of safetensors files, without torch: headers, and digests in the metadata that prove a file undamaged."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors

from cpmix_cli.artifacts.files import digest, open_file, read_bytes, read_fault, unique_members
from cpmix_cli.runtime.errors import InputError

MAX_HEADER = 8_000_000  # bytes; the header of a ResNet-152 has 60 thousand
DAMAGED = (safetensors.SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError)
"""Exceptions that parsing a damaged file can raise."""
_DTYPES = {
    "F64": "torch.float64",
    "F32": "torch.float32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "I64": "torch.int64",
    "I32": "torch.int32",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
}
"""Type name in safetensors -> type name in digests."""


def parse_header(data: bytes) -> tuple[dict[str, list[int]], Any]:
    """Parse the header in the first bytes of a file.

    Returns:
        Tensor name -> shape, and the metadata: a JSON value or None.

    Raises:
        one of DAMAGED: the bytes are not a valid header.
    """
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise ValueError(f"its header says it has {size:,} bytes")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=unique_members)
    metadata = header.pop("__metadata__", {}).get("cpmix")
    shapes = {name: list(entry["shape"]) for name, entry in header.items()}
    return shapes, json.loads(metadata) if metadata is not None else None


def read_header(path: Path) -> tuple[dict[str, list[int]], Any]:
    """Read only the header of a safetensors file; returns the same as parse_header().

    Raises:
        InputError: the file is missing or its header is not valid.
    """
    with open_file(path) as file:
        try:
            data = file.read(8)
            if 0 < (size := int.from_bytes(data, "little")) <= MAX_HEADER:
                data += file.read(size)
        except OSError as fault:
            raise read_fault(path, fault) from fault
    try:
        return parse_header(data)
    except DAMAGED as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}", path=path) from fault


def content_digest(tensors: Iterable[tuple[str, str, Sequence[int], Any]]) -> str:
    """Return the sha256, as hex digits, of tensors (name, type, shape, bytes). Give them in the order of names."""
    content = hashlib.sha256()
    for name, dtype, shape, values in tensors:
        content.update(f"{name} {dtype} {list(shape)}\n".encode())
        content.update(values)
    return content.hexdigest()


def sealed(metadata: Mapping[str, Any], tensors_digest: str) -> dict[str, Any]:
    """Return metadata with two more keys: the digest of the tensors, and a digest of the metadata themselves."""
    content = {**metadata, "tensors_digest": tensors_digest}
    return {**content, "digest": digest(content)}


def check_seal(path: Path, metadata: Any, tensors_digest: str | None = None) -> dict[str, Any]:
    """Check metadata made by sealed(), and return them without their own digest.

    Args:
        path: file of the metadata, for the message.
        metadata: JSON value.
        tensors_digest: digest of the file's tensors; None checks only the metadata.

    Raises:
        InputError: the metadata have no seal, or a digest differs.
    """
    content = dict(metadata) if isinstance(metadata, dict) else {}
    whole = content.pop("digest", None) == digest(content)
    if not whole or tensors_digest not in (None, content.get("tensors_digest")):
        raise InputError(f"{path} is damaged, or was not written by cpmix: its digest is missing or differs", path=path)
    return content


def read_sealed(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Check the seal of a file over its metadata and all tensor bytes, without making tensors.

    Returns:
        The metadata, and tensor name -> bytes.

    Raises:
        InputError: the file is missing or damaged, or has no seal.
    """
    data = read_bytes(path)
    try:
        _, metadata = parse_header(data)
        found = sorted(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
        entries = ((name, _DTYPES[t["dtype"]], t["shape"], t["data"]) for name, t in found)
        tensors_digest = content_digest(entries)
    except DAMAGED as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}", path=path) from fault
    return check_seal(path, metadata, tensors_digest), {name: t["data"] for name, t in found}
