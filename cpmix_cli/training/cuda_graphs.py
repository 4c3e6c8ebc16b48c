"""CUDA graphs: a step is recorded once per batch size, then replayed. And the streams and events around it.

A replay is one launch instead of several hundred. On the CPU every step runs eagerly.
"""

import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

from cpmix_cli.runtime import console, ranks

EAGER_STEPS = 3  # before recording: in these steps, libraries select kernels and allocate memory
STEPS_IN_FLIGHT = 8
"""Most steps that the device has not finished when the host launches another one."""
_PATIENCE_SECONDS = 30.0
"""Longest wait for a step of several ranks. A lost rank would block the device, and is noticed only between steps."""


class CudaGraphRunner:
    """Runner of a function that launches the same work on the device at each call with the same key.

    On CUDA, the work is recorded once per key, then replayed. If recording fails, a warning says so, and all calls run
    eagerly. Call the runner inside own_stream().

    Args:
        function: takes the key and launches the work. It reads nothing back, and its tensors keep their addresses.
        device: device of the work.
        record: False runs every call eagerly, for a function that reads values back.
    """

    capture_seconds = 0.0
    """Seconds spent recording so far."""

    def __init__(self, function: Callable[[int], None], device: torch.device, *, record: bool = True) -> None:
        self.records = record and device.type == "cuda"
        """True if calls are recorded; False after a recording has failed."""
        self._function = function
        self._num_eager: Counter[int] = Counter()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # These graphs share memory: they run one after another, and none reads another's memory. Other runners' graphs
        # have their own, because they may run between these.
        self._pool: Any = None
        self._failed: torch.cuda.CUDAGraph | None = None

    def __call__(self, key: int) -> None:
        """Run the function for a key: eagerly at first, then as a graph."""
        if self.records and key not in self._graphs and self._num_eager[key] >= EAGER_STEPS:
            self._record(key)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._num_eager[key] += 1
            self._function(key)

    def _record(self, key: int) -> None:
        """Record the work of a key, which runs nothing on the device."""
        torch.cuda.synchronize()  # recording waits for the device anyway; do not count earlier steps as recording
        started = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with _no_collection(), torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
                self._function(key)
            self._graphs[key] = graph
        except RuntimeError as fault:  # also out of memory: a graph has memory of its own
            self._give_up(graph, fault)
        finally:
            self.capture_seconds += time.perf_counter() - started

    def _give_up(self, graph: torch.cuda.CUDAGraph, fault: RuntimeError) -> None:
        """Drop all graphs. Nothing of the failed recording ran, so an eager step continues from the same state."""
        first: BaseException = fault  # the end of a recording fails because of an earlier error
        while first.__context__ is not None:
            first = first.__context__
        console.warn(
            f"the step cannot be recorded as a CUDA graph ({str(first).strip().partition(chr(10))[0]}), so it runs "
            "without one, which is slower; to record none: --set model.cuda_graphs=false"
        )
        self.records = False
        self._graphs.clear()
        self._failed = graph  # torch's allocator may keep a pointer to it
        # If the recording was not ended, the allocator still counts it as underway, and would not free cached memory.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage, then keep the collector off: a graph that is destroyed while another records makes it fail."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StepsInFlight:
    """Limit of the steps that the host launches ahead of the device, so that a signal is answered after few of them.

    Args:
        device: device of the steps; on the CPU, there is nothing to wait for.
        new_event: makes an event of the device.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Any] | None = None) -> None:
        self._new_event = new_event or torch.cuda.Event
        self._limited = device.type == "cuda"
        self._events: deque[Any] = deque()

    def launched(self) -> None:
        """Note that a step was launched, and wait for the step STEPS_IN_FLIGHT before it."""
        if not self._limited:
            return
        if len(self._events) < STEPS_IN_FLIGHT:
            event = self._new_event()
        else:
            event = self._events.popleft()
            limit = time.monotonic() + _PATIENCE_SECONDS if ranks.current().size > 1 else float("inf")
            # Not event.synchronize(): a second Ctrl-C is handled between two queries only.
            while not event.query() and time.monotonic() < limit:
                time.sleep(0.001)
        event.record()
        self._events.append(event)


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
