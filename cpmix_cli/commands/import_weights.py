"""import-weights: convert a PyTorch checkpoint to a safetensors file. The only code that reads such checkpoints.

The hash is checked before a byte is unpickled, and only PyTorch's tensors-only unpickler is used; no flag changes that.
PyTorch 2.11, the oldest version that cpmix supports, has the fixes of CVE-2025-32434 and CVE-2026-24747.
"""

import io
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.seals import DAMAGED, parse_header
from cpmix_cli.artifacts.tensors import sealed_metadata, tensor_bytes
from cpmix_cli.flags import ImportOptions
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, shortened

WRAPPERS = ("state_dict", "model", "state_dict_ema")
"""Keys under which training scripts save the weights, next to epoch and optimizer."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to every name."""


def run(options: ImportOptions) -> None:
    """Convert a checkpoint.

    Raises:
        UsageError: the hash is malformed or too short, or --out is the checkpoint itself.
        InputError: the file is missing, has another hash, or contains more than tensors.
        EnvironmentFault: --out exists with other content, or cannot be written.
    """
    wanted = options.sha256.lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", wanted):
        raise UsageError(
            f'--sha256 "{options.sha256}": 64 hexadecimal digits, or the first 8 or more of them',
            fix="take it from where the weights were published; torchvision's file names end in the first 8",
        )
    out = options.out or options.file.with_suffix(".safetensors")
    if out.resolve() == options.file.resolve():
        raise UsageError(f"{out} is the checkpoint itself", fix="choose another --out")
    try:
        data = files.read_bytes(options.file)
    except InputError as fault:
        fix = "correct the path, or fetch the file from where it was published"
        raise InputError(fault.message, fix=fix) from fault
    found = files.sha256(data)
    if not found.startswith(wanted):
        raise InputError(
            f"{options.file} has sha256 {found}, not {wanted}", fix="fetch the file again from where it was published"
        )
    tensors = _read_checkpoint(data, options.file)
    converted = tensor_bytes(tensors, sealed_metadata(tensors, {"file": options.file.name, "sha256": found}))
    status = "done"
    # Compares bytes, because a damaged file may still have the right metadata.
    if not options.overwrite and out.is_file() and files.read_bytes(out) == converted:
        status = "up to date"
    else:
        files.refuse_existing(out, _is_own, overwrite=options.overwrite, why="holds something else")
        files.publish_out(out, converted)
    values, sha = sum(t.numel() for t in tensors.values()), files.sha256(converted)
    console.result(
        {"status": status, "out": str(out), "num_tensors": len(tensors), "num_values": values, "sha256": sha},
        lines=[f"{len(tensors)} tensors of {values:,} values, sha256 {sha}", f"{status}: {out}"],
    )
    console.note(f"to train from it, give train-stage1 --init {out}")


def _is_own(data: bytes) -> bool:
    """Return whether this command has written a file."""
    try:
        return {"file", "sha256", "tensors_digest"} <= set(parse_header(data)[1])
    except DAMAGED:
        return False


def _read_checkpoint(data: bytes, path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by their names without PREFIXES."""
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as fault:  # a damaged pickle may raise any exception
        refused = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(fault))
        reason = f"it holds {refused[1]}" if refused else str(fault).split("\n")[0].split(". ")[0]
        raise InputError(
            f"{path} is no checkpoint of tensors alone, and nothing of it was run: {reason}",
            fix="ask its authors for the state_dict, or better for safetensors",
        ) from fault
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise InputError(
            f"{path} holds no named tensors, but {'an empty' if content == {} else 'a'} {type(content).__name__}",
            fix="give a file that torch.save(model.state_dict(), FILE) wrote",
        )
    if others := [f"{name} ({kind})" for name, value in content.items() if (kind := _not_plain(value))]:
        raise InputError(
            f"{path} has entries that are no plain tensors: {shortened(others, 10)}",
            fix="ask its authors for the state_dict alone",
        )
    plain = re.compile(rf"^({'|'.join(map(re.escape, PREFIXES))})+")
    names = {name: plain.sub("", str(name)) for name in content}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise InputError(
            f"{path} has several entries for one name, once {' and '.join(PREFIXES)} are taken off: "
            + shortened(twice, 10),
            fix="ask its authors for the state_dict alone",
        )
    # Copies, because tensors of a checkpoint may share memory, which safetensors does not support.
    return {names[name]: value.detach().clone() for name, value in content.items()}


def _not_plain(value: object) -> str:
    """Return why safetensors cannot store a value; "" for a dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kinds = {"sparse": value.layout != torch.strided, "quantized": value.is_quantized, "complex": value.is_complex()}
    return next((kind for kind, found in kinds.items() if found), "without values" if value.is_meta else "")
