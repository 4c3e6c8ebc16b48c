"""Tensors on disk: safetensors files, sealed by a digest of what they hold. Never pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cpmix_cli.artifacts.files import canonical_json, publish, read_bytes
from cpmix_cli.artifacts.seals import DAMAGED, content_digest, parse_header, sealed
from cpmix_cli.runtime.errors import InputError, counted, indented


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """Tensors as the bytes of a safetensors file, with `metadata` (a JSON value) under the one key "cpmix".

    One key only: safetensors 0.8 writes several in random order, and equal content must be equal bytes.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
    text = {"cpmix": canonical_json(metadata)} if metadata is not None else None
    return safetensors.torch.save(plain, text)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of tensors with their names, types and shapes, for a file whose hash no record holds yet."""
    plain = ((name, t.detach().cpu().contiguous()) for name, t in sorted(tensors.items()))
    return content_digest((name, str(t.dtype), t.shape, t.view(-1).view(torch.uint8).numpy().data) for name, t in plain)


def sealed_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with a digest of the tensors and one of itself: such a file needs no record beside it to be checked."""
    return sealed(metadata, tensors_digest(tensors))


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> str:
    """Publish tensors as safetensors; see tensor_bytes()."""
    return publish(path, tensor_bytes(tensors, metadata))


def read_tensors(path: Path, sha: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Read tensors and metadata (a JSON value or None) of a safetensors file; raise InputError if it is none.

    As bytes and not by memory mapping, which is slow or fatal on network file systems.
    """
    data = read_bytes(path, sha)
    try:
        _, metadata = parse_header(data)
        return safetensors.torch.load(data), metadata
    except DAMAGED as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}") from fault


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
