"""A device "cuda" simulated on the CPU: tensors keep their memory, and claim the device that they would be on.

Each call of torch is checked as CUDA checks it: all tensors on one device (numbers of the host may join), a generator
of the same device, no NumPy of a tensor on the device. What crosses between host and device is counted. The arithmetic
is the CPU's, so results can be compared with a run on the CPU.

What cannot be seen: the order of work on streams, kernels, memory, and what a real capture forbids.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"}
"""Calls that make the host wait for the device."""
_FREE = {"copy_", "backward", "__set__", "__get__", "_has_compatible_shallow_copy_type"}
"""Calls that may name tensors of both devices."""


class SimulatedDevice(TorchFunctionMode):
    """While active, "cuda" is a device."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: Counter[str] = Counter()
        """Copies between host and device, and reads of the host, by call."""
        self._own: dict[int, Any] = {}  # storages on the device; kept, so that no address is used twice
        self._pinned: dict[int, Any] = {}

    def device_of(self, tensor: Tensor) -> torch.device:
        return CUDA if tensor.untyped_storage()._cdata in self._own else CPU

    def place(self, tensor: Tensor) -> Tensor:
        """Put the memory of a tensor on the device."""
        storage = tensor.untyped_storage()
        self._own[storage._cdata] = storage
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is Tensor.device:
            return self.device_of(args[0])
        if name == "__get__" and owner is Tensor.is_cuda:
            return self.device_of(args[0]) == CUDA
        if name == "__get__" and owner is Tensor.grad:
            gradient = func(*args)
            return gradient if gradient is None or self.device_of(args[0]) == CPU else self.place(gradient)
        if name in ("to", "cpu"):
            return self._moved(*args[:1], *(args[1:] if name == "to" else ("cpu",)), **kwargs)
        if name in ("is_pinned", "pin_memory"):
            return self._pin(args[0], name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {self.device_of(t) for t in tensors if t.dim() or self.device_of(t) == CUDA}
        if name not in _FREE and len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda and cpu")
        if name == "copy_" and self.device_of(args[0]) != self.device_of(args[1]):
            self.crossings[name] += 1
        if CUDA in places and (name in READS or _by_mask(name, args)):
            self.crossings[name] += 1
        if CUDA in places and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        asked = kwargs.pop("device", None)
        target = torch.device(asked) if asked is not None else CUDA if CUDA in places else CPU
        pinned = kwargs.pop("pin_memory", False)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(f"Expected a '{target.type}' device type for generator but found 'cpu'")
        found = func(*args, **kwargs)
        for made in tree_leaves(found):
            if isinstance(made, Tensor) and target.type == "cuda":
                self.place(made)
            elif isinstance(made, Tensor) and pinned:
                self._pinned[made.untyped_storage()._cdata] = made.untyped_storage()
        if name == "__set__" and owner is Tensor.data and self.device_of(args[1]) == CUDA:
            self.place(args[0])
        return found

    def _moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("copy", None)
        if args and isinstance(args[0], Tensor):
            args = (self.device_of(args[0]), args[0].dtype)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = self.device_of(tensor)
        target = here if device is None else CUDA if device.type == "cuda" else CPU
        format_ = memory_format or torch.preserve_format
        if target != here:
            self.crossings["to"] += 1
        found = tensor.to(dtype=dtype or tensor.dtype, copy=target != here, memory_format=format_)
        return self.place(found) if target == CUDA else found

    def _pin(self, tensor: Tensor, name: str) -> Any:
        is_pinned = tensor.untyped_storage()._cdata in self._pinned
        if name == "is_pinned":
            return is_pinned
        assert self.device_of(tensor) == CPU, "only memory of the host can be pinned"
        found = tensor if is_pinned else tensor.clone()
        self._pinned[found.untyped_storage()._cdata] = found.untyped_storage()
        return found


def _by_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose number of places the host has to know."""
    return name == "__getitem__" and any(
        isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1:])
    )


class Stream:
    """In place of torch.cuda.Stream: every wait is over at once."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def is_capturing(self) -> bool:
        return False


class Event:
    """In place of torch.cuda.Event."""

    def record(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def simulated_cuda() -> Iterator[SimulatedDevice]:
    """A machine with a GPU, for all that cpmix asks torch.cuda; graphs are not recorded here, see emulated_graph.py."""
    device = SimulatedDevice()
    autocast, group = torch.autocast, clip_grad._group_tensors_by_device_and_dtype

    def by_device(lists: Any, with_indices: bool = False) -> Any:
        found = {}
        for place in (CPU, CUDA):
            own = [i for i, tensor in enumerate(lists[0]) if device.device_of(tensor) == place]
            chosen = [[part[i] for i in own] if part else [] for part in lists]
            for (_, dtype), grouped in (group(chosen, with_indices) if own else {}).items():
                found[place, dtype] = grouped
        return found

    stream = Stream()
    with (
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            is_bf16_supported=lambda including_emulation=True: True,
            get_device_name=lambda _: "simulated",
            mem_get_info=lambda _: (2**34, 2**34),
            Stream=Stream,
            Event=Event,
            current_stream=lambda *_: stream,
            stream=lambda _: contextlib.nullcontext(),
            synchronize=lambda *_: None,
            empty_cache=lambda: None,
            reset_peak_memory_stats=lambda: None,
            memory_reserved=lambda: 0,
            max_memory_reserved=lambda: 2**20,
        ),
        mock.patch.multiple(torch.accelerator, current_accelerator=lambda **_: CUDA, current_stream=lambda *_: stream),
        mock.patch.object(torch.backends.cudnn, "version", lambda: 90_000),
        mock.patch.object(torch, "autocast", lambda kind, **rest: autocast("cpu", **rest)),
        mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", by_device),
        mock.patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(by_device)),
        device,
    ):
        yield device
