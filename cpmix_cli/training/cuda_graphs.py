"""CUDA graphs: a step is recorded once per batch size, then replayed.

A replay is one launch instead of several hundred. On the CPU every step runs eagerly.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

EAGER_STEPS = 3  # before recording: in these steps, libraries select kernels and allocate memory


class CudaGraphRunner:
    """Runner of a function that launches the same work on the device at each call with the same key.

    On CUDA, the work is recorded once per key, then replayed. Call the runner inside own_stream().

    Args:
        function: takes the key and launches the work. It reads nothing back, and its tensors keep their addresses.
        device: device of the work.
        record: False runs every call eagerly, for a function that reads values back.
    """

    capture_seconds = 0.0
    """Seconds spent recording so far."""

    def __init__(self, function: Callable[[int], None], device: torch.device, *, record: bool = True) -> None:
        self._function = function
        self._record = record and device.type == "cuda"
        self._num_eager: Counter[int] = Counter()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, key: int) -> None:
        """Run the function for a key: eagerly at first, then as a graph."""
        if not self._record or self._num_eager[key] < EAGER_STEPS:
            self._num_eager[key] += 1
            self._function(key)
            return
        if key not in self._graphs:
            torch.cuda.synchronize()  # recording waits for the device anyway; do not count earlier steps as recording
            started = time.perf_counter()
            self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[key], pool=_graph_memory(), stream=torch.cuda.current_stream()):
                self._function(key)
            self.capture_seconds += time.perf_counter() - started
        self._graphs[key].replay()


@cache
def _graph_memory() -> Any:
    """Return one memory pool for all graphs: they run one after another, and none reads another's memory."""
    return torch.cuda.graph_pool_handle()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # One stream per process: the allocator and cuBLAS keep memory for each stream.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run the CUDA work inside on a separate stream, on which graphs can be recorded. On the CPU, do nothing."""
    if device.type == "cpu":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
