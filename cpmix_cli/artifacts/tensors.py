"""Tensors on disk: safetensors files, sealed by a digest of what they hold. Never pickle."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cpmix_cli.artifacts.files import canonical_json, digest, open_file, publish, read_bytes, unique_members
from cpmix_cli.runtime.errors import InputError, counted, indented

_MAX_HEADER = 8_000_000  # bytes; a ResNet-152's is 60 thousand


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


def _parse_header(text: bytes) -> tuple[dict[str, list[int]], Any]:
    """Shapes by tensor name, and the metadata, of a safetensors header; raises _NOT_A_HEADER."""
    header = json.loads(text, object_pairs_hook=unique_members)
    metadata = header.pop("__metadata__", {}).get("cpmix")
    shapes = {name: list(entry["shape"]) for name, entry in header.items()}
    return shapes, json.loads(metadata) if metadata is not None else None


_NOT_A_HEADER = (ValueError, KeyError, AttributeError, TypeError, RecursionError)


def read_tensors(path: Path, sha: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Read tensors and metadata (a JSON value or None) of a safetensors file; raise InputError if it is none.

    As bytes and not by memory mapping, which is slow or fatal on network file systems.
    """
    data = read_bytes(path, sha)
    try:
        size = int.from_bytes(data[:8], "little")
        if size > _MAX_HEADER:
            raise ValueError(f"its header says it has {size:,} bytes")
        _, metadata = _parse_header(data[8 : 8 + size])
        return safetensors.torch.load(data), metadata
    except (safetensors.SafetensorError, *_NOT_A_HEADER) as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}") from fault


def check_seal(path: Path, metadata: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return the metadata that sealed_metadata() sealed; raise InputError without a seal, or if it is broken.

    Without `tensors` only the metadata are checked.
    """
    content = dict(metadata) if isinstance(metadata, dict) else {}
    whole = content.pop("digest", None) == digest(content)
    if not whole or (tensors is not None and content.get("tensors_digest") != tensors_digest(tensors)):
        raise InputError(f"{path} is damaged, or no file of cpmix", fix="make it again, with --overwrite")
    return content


def read_header(path: Path) -> tuple[dict[str, list[int]], Any]:
    """Return shapes by tensor name, and metadata (a JSON value or None), of a safetensors file; its values stay unread.

    Raises:
        InputError: missing, or no header.
    """
    with open_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if 0 < size <= _MAX_HEADER else b""
    try:
        return _parse_header(text)
    except _NOT_A_HEADER as fault:
        raise InputError(f"{path} is not a valid safetensors file") from fault


def check_fit(
    path: Path,
    given: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    exact: bool = True,
    needed_by: str = "",
    fix: str = "",
) -> None:
    """Check the tensors of the file `path` (`given`) against those that they are to be copied into (`own`).

    With `exact` False, any floating-point type goes into any other, and counters of batch norm may be missing.

    Raises:
        InputError: with every tensor that is missing, unknown, of another shape or type, or not finite.
    """
    faults = []
    for name in sorted(own.keys() | given.keys()):
        expected, found = own.get(name), given.get(name)
        if expected is None:
            faults.append(f"{name}: not in the network")
        elif found is None:
            if exact or not name.endswith("num_batches_tracked"):
                faults.append(f"{name}: missing")
        elif expected.shape != found.shape:
            faults.append(f"{name}: has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        elif expected.dtype != found.dtype and (exact or expected.is_floating_point() != found.is_floating_point()):
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (found, expected)]
            faults.append(f"{name}: holds {kinds[0]}, expected {kinds[1]}")
        elif not found.to(expected.dtype).isfinite().all():  # a float64 may be beyond float32
            faults.append(f"{name}: holds values that are not finite")
    if faults:
        message = f"{path} does not fit the network, {counted(len(faults), 'tensor')}:{indented(faults, 10)}"
        raise InputError(message, needed_by=needed_by, fix=fix)
