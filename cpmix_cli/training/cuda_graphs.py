"""CUDA graphs: a step's work on the device is recorded once for each size of a batch and replayed from then on.

A replay is one launch in place of some hundreds. On the CPU everything runs eagerly.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

EAGER_STEPS = 3  # before a graph is recorded: the libraries choose and allocate in them


class CudaGraphRunner:
    """A function of one key whose work on the device is the same at each call: on CUDA recorded once for each key, then
    replayed. On CUDA, inside own_stream().

    Args:
        function: launches the work. It reads nothing back, and works on tensors that stay where they are.
        device: the device of that work.
        record: False runs every call eagerly, for a function that does read back.
    """

    capture_seconds = 0.0
    """Seconds spent recording so far."""

    def __init__(self, function: Callable[[int], None], device: torch.device, *, record: bool = True) -> None:
        self._function = function
        self._record = record and device.type == "cuda"
        self._num_eager: Counter[int] = Counter()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, key: int) -> None:
        """Do the work of a key."""
        if not self._record or self._num_eager[key] < EAGER_STEPS:
            self._num_eager[key] += 1
            self._function(key)
            return
        if key not in self._graphs:
            torch.cuda.synchronize()  # recording does, and the wait for earlier steps is no part of it
            started = time.perf_counter()
            self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[key], pool=_graph_memory(), stream=torch.cuda.current_stream()):
                self._function(key)
            self.capture_seconds += time.perf_counter() - started
        self._graphs[key].replay()


@cache
def _graph_memory() -> Any:
    """One pool for all graphs: they run one after the other, and none reads what another left there."""
    return torch.cuda.graph_pool_handle()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # One for the process: the allocator and cuBLAS keep memory for each.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Put the CUDA work inside on a stream of its own, where graphs can be recorded; on the CPU nothing."""
    if device.type == "cpu":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
