"""import-weights: convert a PyTorch checkpoint to a safetensors file. The only code that reads such checkpoints.

The hash is checked before a byte is unpickled, and only PyTorch's tensors-only unpickler is used; no flag changes that.
Names stay as they are: train-stage1 --init finds the prefix that the network needs.
PyTorch 2.11, the oldest version that cpmix supports, has the fixes of CVE-2025-32434 and CVE-2026-24747.
"""

import io
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.seals import DAMAGED, parse_header
from cpmix_cli.artifacts.tensors import sealed_metadata, tensor_bytes
from cpmix_cli.flags import ImportOptions
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UnreadableError, UsageError, counted, give_one_of, indented, shortened
from cpmix_cli.runtime.text import quoted

WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "teacher")
"""Keys under which training scripts save the weights, next to epoch and optimizer. The first is taken."""
MAX_DEPTH = 3
"""Most keys above a state_dict."""
MAX_UNREAD = 100
"""Most classes and functions of a checkpoint that get a stand-in; each reads the file once more."""
_TRUST = "only if you trust its author, because this runs code of the file"
_LOAD = 'torch.load(sys.argv[1], map_location="cpu", weights_only=False)'
_FETCH = "fetch the file again from where it was published, or give one that torch.save(model.state_dict(), FILE) wrote"


def run(options: ImportOptions) -> None:
    """Convert a checkpoint.

    Raises:
        UsageError: the hash is malformed or too short, or --out is the checkpoint itself.
        InputError: the file is missing, has another hash, or has no state_dict, several of them, or a whole network.
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
    except UnreadableError:
        raise
    except InputError as fault:
        fix = "correct the path, or fetch the file from where it was published"
        raise InputError(fault.message, fix=fix) from fault
    found = files.sha256(data)
    if not found.startswith(wanted):
        raise InputError(
            f"{options.file} has sha256 {found}, not {wanted}", fix="fetch the file again from where it was published"
        )
    content, unread = _read(data, options.file)
    tensors = _choose(content, options)
    if unread:
        console.note(f"left out, and nothing of it was run: {shortened(unread, 5)}")
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
        lines=[f"{counted(len(tensors), 'tensor')} of {counted(values, 'value')}, sha256 {sha}", f"{status}: {out}"],
    )
    if prefix := _common_prefix(tensors):
        console.note(f"all names begin with '{prefix}'; train-stage1 --init takes it off, if the network fits then")
    console.note(f"to train from it, give train-stage1 --init {quoted(out)}")


def _is_own(data: bytes) -> bool:
    """Return whether this command has written a file."""
    try:
        return {"file", "sha256", "tensors_digest"} <= set(parse_header(data)[1])
    except DAMAGED:
        return False


class _Unread:
    """Stand-in for an object of a class that PyTorch's unpickler does not know: its content is dropped."""

    items: type | None = None
    """OrderedDict or list for a class like them, since the unpickler adds items to these only."""

    is_network: bool = False
    """True for a torch.nn.Module."""

    def __new__(cls, *_: object) -> Any:
        """Return an object for the unpickler to fill."""
        return object.__new__(cls) if cls.items is None else cls.items()

    def __setstate__(self, state: object) -> None:
        """Drop the content."""
        self.is_network = isinstance(state, Mapping) and "_modules" in state


def _read(data: bytes, path: Path) -> tuple[Any, list[str]]:
    """Return the content of a checkpoint or a safetensors file, and the classes and functions that were not read.

    No code but PyTorch's runs: its unpickler gets a stand-in for each class or function that it does not know. NumPy's
    are among these, because NumPy does not check the states that its types are given.
    """
    with suppress(*DAMAGED):
        parse_header(data)
        return safetensors.torch.load(data), []
    unread: dict[str, type[_Unread]] = {}
    while True:
        try:
            stand_ins = torch.serialization.safe_globals([(kind, name) for name, kind in unread.items()])
            with stand_ins, warnings.catch_warnings(action="ignore"):  # of files that an error tells below
                return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"), sorted(unread)
        except Exception as fault:  # a damaged pickle may raise any exception
            if len(unread) == MAX_UNREAD or not _add_stand_in(unread, str(fault)):
                raise _unreadable(path, str(fault)) from fault


def _add_stand_in(unread: dict[str, type[_Unread]], message: str) -> bool:
    """Add the stand-in that the unpickler lacked, or make one that can hold items. Return False if it is none of that.

    Args:
        unread: name of a class or function -> stand-in; changes in place.
        message: error of the unpickler.
    """
    if found := re.search(r"Unsupported global: GLOBAL (\S+) was not", message):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"  # whose name the message shortens
        if name in unread or name.startswith(("torch._", "torch.storage.")):  # a tensor of a newer PyTorch
            return False
        unread[name] = type("Unread", (_Unread,), {"__qualname__": name})
        return True
    if found := re.search(rf"Can only (SETITEM|append).* got <class '{re.escape(__name__)}\.(\S+)'>", message):
        unread[found[2]].items = OrderedDict if found[1] == "SETITEM" else list
        return True
    return False


def _unreadable(path: Path, message: str) -> InputError:
    """Return the error for a file that PyTorch's unpickler refuses with this message."""
    if blocked := re.search(r"unsupported GLOBAL ([\w.]+)", message):
        return InputError(f"{path} is refused, and nothing of it was run: it calls {blocked[1]}", fix=_FETCH)
    if "TorchScript" in message:
        fix = _save_again(path, 'torch.jit.load(sys.argv[1], map_location="cpu").state_dict()')
        return InputError(f"{path} is a TorchScript archive, no checkpoint of tensors", fix=fix)
    return InputError(
        f"{path} is damaged, or holds more than PyTorch reads as tensors; nothing of it was run",
        fix=f"{_FETCH}; or, {_TRUST}: {_save_again(path, _LOAD)}",
    )


def _save_again(path: Path, tensors: str) -> str:
    """Return the command that saves the tensors of a checkpoint in a file of their own and imports that.

    Args:
        path: the checkpoint.
        tensors: Python expression that reads them from sys.argv[1].
    """
    out = quoted(path.with_name(f"{path.stem}-state_dict.pth"))
    save = quoted("python", "-c", f"import sys, torch; torch.save({tensors}, sys.argv[2])", path)
    return f'{save} {out} && {console.typed("import-weights")} {out} --sha256 "$(sha256sum < {out} | cut -c1-64)"'


def _state_dicts(content: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mappings of a checkpoint that hold tensors, with their keys joined by dots; not the optimizers'."""
    if isinstance(content, Mapping):
        if any(isinstance(value, Tensor) for value in content.values()):
            yield ".".join(path), {str(name): value for name, value in content.items()}
        for key, value in content.items():
            if isinstance(key, str) and "optim" not in key.lower() and len(path) < MAX_DEPTH:
                yield from _state_dicts(value, (*path, key))


def _choose(content: object, options: ImportOptions) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their names: those of its state_dict, or those that --prefix names."""
    file, found = options.file, dict(_state_dicts(content))
    if not found:
        raise _no_tensors(content, file)
    sizes = {path: sum(isinstance(value, Tensor) for value in entries.values()) for path, entries in found.items()}
    large = [path for path, size in sizes.items() if 2 * size >= max(sizes.values())]
    best = min(map(_rank, large))
    first, *rivals = [path for path in large if _rank(path) == best]
    if options.prefix is not None:
        prefix = options.prefix.rstrip(".") + "."
        whole = {f"{path}." if path else "": entries for path, entries in found.items()}
        everything = {path + name: value for path, entries in whole.items() for name, value in entries.items()}
        for entries in (found[first], everything):
            if taken := {name.removeprefix(prefix): v for name, v in entries.items() if name.startswith(prefix)}:
                return _plain_tensors(taken, file)
        known = sorted({name.partition(".")[0] for name in (*found[first], *everything)})
        raise InputError(
            f"no name in {file} begins with {prefix}", needed_by="--prefix", fix=give_one_of(prefix, known, "--prefix")
        )
    if rivals:
        listed = [f"{path} ({counted(sizes[path], 'tensor')})" for path in (first, *rivals)]
        command = console.typed("import-weights", file, "--sha256", options.sha256, "--prefix", first)
        raise InputError(
            f"{file} has several state_dicts:{indented(listed, 10)}", fix=f"choose one, such as: {command}"
        )
    if others := [path for path in large if path not in ("", first)]:
        console.note(f"takes {first or 'the outermost tensors'}; --prefix takes {' or '.join(others)} instead")
    return _plain_tensors(found[first], file)


def _no_tensors(content: object, file: Path) -> InputError:
    """Return the error for a checkpoint that holds no named tensors, but perhaps a whole network."""
    entries = content.items() if isinstance(content, Mapping) else [("", content)]
    for key, network in entries:
        if isinstance(network, _Unread) and network.is_network:
            inside = f"[{json.dumps(key)}]" if isinstance(content, Mapping) else ""
            return InputError(
                f"{file} holds a whole {type(network).__qualname__}, not its state_dict; nothing of it was run",
                fix=f"{_TRUST}: {_save_again(file, f'{_LOAD}{inside}.state_dict()')}",
            )
    kind = "an empty" if content == {} else "a"
    return InputError(
        f"{file} holds no named tensors, but {kind} {type(content).__qualname__}",
        fix="give a file that torch.save(model.state_dict(), FILE) wrote",
    )


def _rank(path: str) -> int:
    """Return how late a state_dict is taken: those under WRAPPERS first, then the file itself, then other keys."""
    known = [WRAPPERS.index(key) for key in path.split(".") if key in WRAPPERS]
    return min(known, default=len(WRAPPERS) + bool(path))


def _plain_tensors(entries: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Return the tensors among named entries, and note the others."""
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if odd := [f"{name} ({kind})" for name, value in tensors.items() if (kind := _not_plain(name, value))]:
        raise InputError(
            f"{file} has tensors that are not plain: {shortened(odd, 10)}",
            fix="give the state_dict of the network on a CPU, in float32 and with its usual names",
        )
    others = [f"{name} ({type(value).__qualname__})" for name, value in entries.items() if name not in tensors]
    if others:
        console.note(f"left out what is no tensor: {shortened(others, 5)}")
    # Copies, because tensors of a checkpoint may share memory, which safetensors does not support.
    return {name: value.detach().clone() for name, value in tensors.items()}


def _common_prefix(names: Iterable[str]) -> str:
    """Return the modules that all names begin with: "backbone."; "" for none."""
    split = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(split), max(split), strict=False))
    return "".join(f"{part}." for part, _ in shared)


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
_PLAIN_TYPES = {*_FLOATS, *_INTEGERS, torch.bool}
"""Types that safetensors both writes and reads."""
_MOST_REPEATED = 2**20
"""Largest size in bytes of a tensor whose file holds fewer values, such as one that expand() made."""


def _not_plain(name: str, value: Tensor) -> str:
    """Return why safetensors cannot store a tensor, or no network has it; "" for a dense one of real numbers."""
    if value.is_nested or value.layout != torch.strided:
        return "nested" if value.is_nested else "sparse"
    kinds = {
        "quantized": value.is_quantized,
        "complex": value.is_complex(),
        str(value.dtype).removeprefix("torch."): value.dtype not in _PLAIN_TYPES,
        "without values": value.is_meta,
        f"{value.numel():,} values of {value.untyped_storage().nbytes():,} stored bytes": _is_expanded(value),
        "a name that safetensors reserves": name == "__metadata__",
        "a name that is not UTF-8": name != name.encode(errors="replace").decode(),
    }
    return next((kind for kind, found in kinds.items() if found), "")


def _is_expanded(value: Tensor) -> bool:
    """Return whether a tensor repeats stored values, such as one that expand() made: a copy may be terabytes."""
    return value.nbytes > max(value.untyped_storage().nbytes(), _MOST_REPEATED)
