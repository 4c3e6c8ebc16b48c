"""import-weights: a PyTorch checkpoint becomes a safetensors file, once. The only place that reads such a file.

Its hash is checked before a byte is unpickled, PyTorch's tensors-only unpickler does the rest, and there is no way
round it. PyTorch 2.11, the oldest that cpmix runs on, has the fixes of CVE-2025-32434 and CVE-2026-24747.
"""

import io
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.tensors import sealed_metadata, tensor_bytes
from cpmix_cli.flags import ImportOptions
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError, shortened

WRAPPERS = ("state_dict", "model", "state_dict_ema")
"""Keys under which training scripts keep the weights beside an epoch count and an optimizer."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def run(options: ImportOptions) -> None:
    """Convert a checkpoint.

    Raises:
        UsageError: the hash is none, or too short; the output would be the checkpoint itself.
        InputError: the file is missing, is another one, or holds more than tensors.
        EnvironmentFault: another file is in the way, or the disk does not allow it.
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
    data = files.read_bytes(options.file)
    found = files.sha256(data)
    if not found.startswith(wanted):
        raise InputError(
            f"{options.file} has sha256 {found}, not {wanted}", fix="fetch the file again from where it was published"
        )
    tensors = _read_checkpoint(data, options.file)
    converted = tensor_bytes(tensors, sealed_metadata(tensors, {"file": options.file.name, "sha256": found}))
    status = "done"
    if out.exists() and not options.overwrite:
        # Its bytes, not what it says of its origin: a damaged file says the same.
        if not out.is_file() or files.read_bytes(out) != converted:
            raise EnvironmentFault(f"{out} holds something else", fix="choose another --out, or give --overwrite")
        status = "up to date"
    else:
        files.publish_out(out, converted)
    values, sha = sum(t.numel() for t in tensors.values()), files.sha256(converted)
    console.result(
        {"status": status, "out": str(out), "num_tensors": len(tensors), "num_values": values, "sha256": sha},
        lines=[f"{len(tensors)} tensors of {values:,} values, sha256 {sha}", f"{status}: {out}"],
    )
    console.note(f"to train from it, give train-stage1 --init {out}")


def _read_checkpoint(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's bytes, by plain names."""
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as fault:  # a damaged pickle raises whatever its bytes happen to spell
        refused = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(fault))
        reason = f"it holds {refused[1]}" if refused else str(fault).split("\n")[0].split(". ")[0]
        raise InputError(
            f"{path} is no checkpoint of tensors alone, and nothing of it was run: {reason}",
            fix="ask its authors for the state_dict, or better for safetensors",
        ) from fault
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} holds a {type(content).__name__}, not named tensors")
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
    # Copies: in a checkpoint several names may share one memory, in safetensors none do.
    return {names[name]: value.detach().clone() for name, value in content.items()}


def _not_plain(value: object) -> str:
    """What a value is that safetensors has no place for; "" for a dense tensor of real numbers."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kinds = {"sparse": value.layout != torch.strided, "quantized": value.is_quantized, "complex": value.is_complex()}
    return next((kind for kind, found in kinds.items() if found), "without values" if value.is_meta else "")
