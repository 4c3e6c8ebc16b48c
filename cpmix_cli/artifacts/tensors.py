"""Tensors on disk: safetensors files with digests of their content, never pickles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cpmix_cli.artifacts.files import canonical_json, publish, read_bytes
from cpmix_cli.artifacts.seals import DAMAGED, content_digest, parse_header, sealed
from cpmix_cli.runtime.errors import InputError, counted, indented


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, contiguous on the CPU.

    Those of a device are packed there and copied together, once per type: each copy would wait for the device.
    """
    found = {name: t.detach().contiguous() for name, t in tensors.items() if t.device.type == "cpu"}
    there = {name: t.detach() for name, t in tensors.items() if t.device.type != "cpu"}
    for dtype in {t.dtype for t in there.values()}:
        own = {name: t for name, t in there.items() if t.dtype == dtype}
        sizes = [t.numel() for t in own.values()]
        try:
            packed = torch.empty(sum(sizes), dtype=dtype, device=next(iter(own.values())).device)
        except torch.OutOfMemoryError:
            found |= {name: t.cpu().contiguous() for name, t in own.items()}
            continue
        for part, t in zip(torch.split(packed, sizes), own.values(), strict=True):
            part.view(t.shape).copy_(t)
        parts = zip(own.items(), torch.split(packed.cpu(), sizes), strict=True)
        found |= {name: part.view(t.shape) for (name, t), part in parts}
    return found


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Any = None) -> bytes:
    """Return the bytes of a safetensors file, with `metadata` (a JSON value) under the single key "cpmix".

    There is only one key, because safetensors 0.8 writes several in random order and equal content must give equal
    bytes.
    """
    plain = dict(sorted(on_host(tensors).items()))
    text = {"cpmix": canonical_json(metadata)} if metadata is not None else None
    return safetensors.torch.save(plain, text)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256, as hex digits, of tensors with their names, types and shapes."""
    plain = sorted(on_host(tensors).items())
    return content_digest((name, str(t.dtype), t.shape, t.view(-1).view(torch.uint8).numpy().data) for name, t in plain)


def sealed_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata sealed with digests of the tensors and of itself, so that the file can be checked on its own."""
    return sealed(metadata, tensors_digest(tensors))


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> str:
    """Publish tensors as a safetensors file and return its sha256; see tensor_bytes().

    Args:
        path: file to write.
        tensors: name -> tensor.
        metadata: JSON value, or None for no metadata.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    return publish(path, tensor_bytes(tensors, metadata))


def read_tensors(path: Path, sha: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Read a safetensors file: tensors by name, and metadata (a JSON value or None).

    The file is read as bytes, because memory mapping is slow or fatal on network file systems.

    Args:
        path: file to read.
        sha: recorded sha256 of the file.

    Raises:
        InputError: the file is missing or damaged.
    """
    data = read_bytes(path, sha)
    try:
        _, metadata = parse_header(data)
        return safetensors.torch.load(data), metadata
    except DAMAGED as fault:
        raise InputError(f"{path} is not a valid safetensors file: {fault}", path=path) from fault


def check_fit(path: Path, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that tensors of a file are those of a network.

    Args:
        path: file of the tensors, for the message.
        given: tensors of the file, by name.
        own: tensors of the network, by name.

    Raises:
        InputError: lists every tensor that does not fit, see unfit().
    """
    if faults := unfit(given, own):
        message = f"{path} does not fit the network, {counted(len(faults), 'tensor')}:{indented(faults, 10)}"
        raise InputError(message, path=path)


def unfit(given: Mapping[str, Tensor], own: Mapping[str, Tensor], *, exact: bool = True) -> list[str]:
    """Return a line for every tensor that is missing, unknown, of another shape or type, or not finite.

    Args:
        given: tensors of a file, by name.
        own: tensors of a network, by name.
        exact: require equal types and all names. If False, floating-point types may differ and the counters of batch
            norm may be missing.
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
            faults.append(f"{name}: has type {kinds[0]}, expected {kinds[1]}")
        elif not found.to(expected.dtype).isfinite().all():  # checked after conversion: a float64 may exceed float32
            faults.append(f"{name}: contains NaN or infinite values")
    return faults
