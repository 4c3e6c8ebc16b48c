"""Memory that is exhausted, of the CPU or of a GPU: told from other errors, and what to lower."""

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault

_WORDS = re.compile(
    r"out of memory|can(?:no|')t allocate|not enough memory|failed to allocate|bad_alloc|unable to mmap|"
    r"STATUS_ALLOC_FAILED|failed to map segment|memory allocation (?:of|failed)|can't start new thread|"
    r"could not create a (?:primitive|memory)|PyObject pointer is null",
    re.IGNORECASE,
)
"""Words of libraries without a type of their own for it: torch and oneDNN, cuBLAS, cuDNN, the loader, Rust."""
_TRAINING = (
    "train with --set optimizer.micro_batches=2 or more, which takes a batch in parts, from stage 1 on; or lower "
    "{table}.batch_size (and the learning rate with it), or evaluation.batch_size where --eval-every is given"
)
_FIXES = {
    "build-lt": "pack the images into shards, which may exceed the memory: --pack S; or lower S or --image-size",
    "train-stage1": _TRAINING.format(table="optimizer"),
    "train-stage2": _TRAINING.format(table="optimizer"),
    "finetune": _TRAINING.format(table="finetune"),
    "bench": _TRAINING.format(table="optimizer"),
    "evaluate": "lower evaluation.batch_size: --set evaluation.batch_size=50",
    "predict": "give fewer images at a time",
    "confusion-report": "show fewer images: --images 0",
}
"""Command -> what to lower."""
_RESERVE = 2**20  # bytes, given back when a command fails: the message needs memory too


def is_exhausted(fault: BaseException | None) -> bool:
    """Return whether an exception, or one that it was raised from, means that memory is exhausted."""
    while fault is not None:
        if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
            return True
        if isinstance(fault, OSError) and fault.errno == errno.ENOMEM:
            return True
        if (isinstance(fault, RuntimeError | ImportError | ValueError) or _is_panic(fault)) and _WORDS.search(
            str(fault)
        ):
            return True
        fault = fault.__cause__ or fault.__context__
    return False


def _is_panic(fault: BaseException) -> bool:
    return type(fault).__name__ == "PanicException"  # of Rust, in safetensors; no subclass of Exception


def raise_if_exhausted(fault: BaseException) -> None:
    """Raise MemoryError if memory is exhausted, in place of an error that would name a whole file as damaged."""
    if is_exhausted(fault):
        raise MemoryError(str(fault)) from fault


@contextmanager
def explained() -> Iterator[None]:
    """Convert errors of exhausted memory, also those that name a file as damaged because of it.

    Raises:
        EnvironmentFault: memory is exhausted; the fix is what the running command can lower.
    """
    reserve = bytearray(_RESERVE)
    try:
        yield
    except BaseException as fault:
        del reserve
        if not (isinstance(fault, Exception) or _is_panic(fault)) or not is_exhausted(fault):
            raise
        texts: list[str] = []
        inner: BaseException | None = fault
        while inner is not None:
            texts.append(str(inner))
            inner = inner.__cause__ or inner.__context__
        on_gpu = any(word in text for text in texts for word in ("CUDA", "CUBLAS", "CUDNN", "HIP"))
        asked = next((found[1] for text in texts if (found := re.search(r"to allocate ([\d.,]+ \w+)", text))), "")
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        more = f", {asked} more were asked for" if asked else ""
        more += f" (ulimit -v allows {limit // 1024:,} kB)" if limit != resource.RLIM_INFINITY and not on_gpu else ""
        what = f"out of memory: that of the {'GPU' if on_gpu else 'CPU'} is used up{more}"
        if any("new thread" in text for text in texts):
            what = "no thread can be started: memory, or the number of processes (ulimit -u), is used up"
        fix = _FIXES.get(console.command.partition(" ")[0], "close other programs")
        raise EnvironmentFault(what, fix=f"{fix}; or give the process more memory") from fault
