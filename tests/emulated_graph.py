"""CUDA graphs emulated on the CPU: a tape of ATen calls stands in for torch.cuda.CUDAGraph.

Capture: every ATen call of a step is run and kept (function, arguments, results); then all that it changed is put back,
as a real capture runs nothing. Replay: the calls run again on the same tensor objects, their results copied into the
kept ones. After each replay all that the tape made itself is overwritten with NaN or nonsense: a graph's memory is
another's afterwards, so nothing may be read from it later.

What cannot be seen on a CPU: copies between host and device that are no read by name (`.to(device)` in a step).
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from cpmix_cli.data.dataset import Dataset
from cpmix_cli.models import build_model
from cpmix_cli.recipe import loading
from cpmix_cli.runs.run_json import StateRecord
from cpmix_cli.runtime import console, signals
from cpmix_cli.runtime.errors import Interrupted
from cpmix_cli.training import cuda_graphs, loop
from cpmix_cli.training.cuda_graphs import CudaGraphRunner
from cpmix_cli.training.inputs import TrainingData, training_data
from cpmix_cli.training.phase import resume
from cpmix_cli.training.plan import PhaseContext, Plan, rehearsal
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.step import Step

# -- all that is known of cpmix_cli's inside: what is patched, what a step reads, how a run is prepared ----------------

EPOCHS = 9
"""Of both stages together; the last three of a phase are trained."""
BATCH = 80
"""Of the 213 images: two full batches an epoch and one of 53."""
SMALL = ["model.name=resnet8", "data.normalisation=dataset", f"optimizer.batch_size={BATCH}"]


def setup(name: str, phase: str, dataset: Dataset, *settings: str, device: str = "cpu") -> "Setup":
    """A phase of a recipe, made small enough for `dataset`."""
    recipe = loading.load(name, settings=settings, epochs=EPOCHS, rho=dataset.record.rho)
    if recipe.finetune is not None:
        three = recipe.finetune.model_copy(update={"epochs": 3, "batch_size": BATCH})
        recipe = recipe.model_copy(update={"finetune": three})
    precision = "fp32" if recipe.model.precision == "auto" else recipe.model.precision
    context = PhaseContext(recipe, dataset, torch.device(device), precision, {})
    return Setup(context, phase, training_data(dataset, recipe, context.device))


@dataclass(frozen=True)
class Setup:
    """What is trained on what."""

    context: PhaseContext
    phase: str
    data: TrainingData

    def begin(self) -> tuple[Plan, TrainingState]:
        """The last three epochs of the phase, and a fresh state; class 0 has never been confused."""
        plan, state = rehearsal(self.context, self.phase)
        plan = replace(plan, first_epoch=max(plan.first_epoch, plan.last_epoch - 2))
        state.epoch = plan.first_epoch
        state.confusion[0] = 0
        for group in state.optimizer.param_groups:
            group["fused"] = True  # as on a GPU
        if any("teacher" in term.functions for term in plan.terms):
            recipe, dataset = self.context.recipe, self.context.dataset
            model = recipe.model.model_copy(update={"experts": 6})
            shape = recipe.data.input_shape(dataset.shape)
            teacher = build_model(model, dataset.num_classes, shape, torch.Generator().manual_seed(1))
            plan = replace(plan, teacher=teacher.to(self.context.device).eval())
        return plan, state


def distinct_setups(folder: str) -> dict[str, tuple[str, str]]:
    """Recipe and phase of each training that the recipes of a folder have, those that are alike once; by its name."""
    found: dict[str, tuple[str, str]] = {}
    for name in loading.recipe_names():
        if not name.startswith(f"{folder}/"):
            continue
        recipe = loading.load(name, settings=SMALL, epochs=EPOCHS, rho=20.0).model_dump(mode="json")
        for phase in ("stage1", "stage2", "finetune"):
            if recipe[phase] is not None:
                tables = ("model", "data", "optimizer", "confusion", "schedule", phase)
                found.setdefault(json.dumps([phase, *(recipe[table] for table in tables)]), (name, phase))
    return {f"{name.partition('/')[2]} {phase}": (name, phase) for name, phase in found.values()}


def fit(setup: Setup, plan: Plan, state: TrainingState, stop_at: tuple[int, int] | None) -> None:
    """The training loop, to its end or until it is stopped at an epoch and a step."""
    asked = stop_at and mock.patch.multiple(
        signals, number=lambda: int((state.epoch, state.step) == stop_at), adopt=bool
    )
    console.mute(True)
    try:
        with asked or contextlib.nullcontext(), contextlib.suppress(Interrupted):
            loop.fit(plan, setup.data, state, publish=lambda: None)
    finally:
        console.mute(False)
    assert (state.epoch, state.step) == (stop_at or (plan.last_epoch, plan.num_steps(len(setup.data.labels))))


def resumed(setup: Setup, state: TrainingState) -> tuple[Plan, TrainingState]:
    """A fresh state filled with the tensors of one that was stopped."""
    plan, fresh = setup.begin()
    saved = {name: t.clone().contiguous() for name, t in state.tensors().items()}
    record = StateRecord.model_construct(epoch=state.epoch, step=state.step, columns=list(state.history[0]))
    resume(plan, fresh, saved, record, Path("memory"), len(setup.data.labels))
    return plan, fresh


def results(state: TrainingState) -> dict[str, Tensor]:
    """All that a state holds, but the clock."""
    tensors = {name: t.detach().clone() for name, t in state.tensors().items()}
    tensors["sums"][list(state.sums.read()).index("seconds")] = 0
    clock = [list(state.history[0]).index(name) for name in ("seconds", "images_per_second")]
    tensors["history"][:, clock] = 0
    tensors["history"].nan_to_num_(-1.0)  # the nulls
    return tensors


@contextlib.contextmanager
def recorded(made: list["EmulatedGraph"], steps: list[Step], pools: list[object] | None = None) -> Iterator[None]:
    """Steps are recorded on the CPU too, after one eager one; graphs, steps and memory pools go into the lists."""
    original, pool_numbers = CudaGraphRunner.__init__, count(1)

    def init(self: CudaGraphRunner, function: Any, device: torch.device, *, record: bool = True) -> None:
        original(self, function, device, record=record)
        self.records = record
        if isinstance(step := getattr(function, "__self__", None), Step):
            steps.append(step)

    def new_graph() -> EmulatedGraph:
        made.append(EmulatedGraph())
        return made[-1]

    def graph(graph: EmulatedGraph, pool: object, stream: None) -> AbstractContextManager[None]:
        if pools is not None:
            pools.append(pool)
        return graph.capture()

    with (
        mock.patch.object(CudaGraphRunner, "__init__", init),
        mock.patch.object(cuda_graphs, "EAGER_STEPS", 1),
        mock.patch.multiple(
            torch.cuda,
            CUDAGraph=new_graph,
            graph=graph,
            synchronize=lambda: None,
            current_stream=lambda: None,
            graph_pool_handle=lambda: next(pool_numbers),
        ),
    ):
        yield


def outside_tensors(step: Step) -> dict[str, list[Tensor]]:
    """All tensors that a step may read without having made them, by what they are."""
    plan, state, data = step._plan, step._state, step._data

    def of(thing: object) -> list[Tensor]:
        return [value for value in vars(thing).values() if isinstance(value, Tensor)]

    return {
        "weights": list(state.model.parameters()),
        "statistics": list(state.model.buffers()),
        "momentum": [t for values in state.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)],
        "learning rates": [group["lr"] for group in state.optimizer.param_groups],
        "confusion counts": [state.confusion],
        "sums": [state.sums.values],
        "average": list(state.average.parameters()) if state.average else [],
        "step number": [step.inputs._counter],
        "class counts": [data.class_counts],
        "images by class": of(step.inputs._pool),
        "images": of(data.batches),
        "augmentation policy": of(policy) if (policy := getattr(data.batches, "_policy", None)) else [],
        "teacher": [*plan.teacher.parameters(), *plan.teacher.buffers()] if plan.teacher else [],
    } | {f"input {name}": [values] for name, values in _leaves(step.inputs.epoch, [term.name for term in plan.terms])}


def _leaves(thing: Any, terms: list[str], name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in an object of dataclasses by their path, terms by their name."""
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, tuple):
        for term, own in zip(terms, thing, strict=True):
            yield from _leaves(own, terms, term)
    elif is_dataclass(thing):
        for part in fields(thing):
            yield from _leaves(getattr(thing, part.name), terms, f"{name}.{part.name}".lstrip("."))


WRITTEN = {"weights", "statistics", "momentum", "learning rates", "confusion counts", "sums"}
"""What every step writes to of all that it has not made; with averaged weights also "average"."""


def _around(owner: Any, name: str, *, before: Any = None, after: Any = None) -> Any:
    original = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args)
        found = original(*args, **kwargs)
        if after:
            after(*args)
        return found

    return mock.patch.object(owner, name, changed)


def _replace_inputs(step: Step, epoch: int) -> None:
    step.inputs.epoch = None


def _replace_number(step: Step, number: int) -> None:
    step.inputs._counter = step.inputs._counter.clone()


def _replace_sums(plan: Plan, step: Step, state: TrainingState, num_steps: int) -> None:
    state.sums = copy(state.sums)
    state.sums.values = state.sums.values.clone()


def _bake_number(step: Step, size: int) -> None:
    for parameter in step._state.model.parameters():
        parameter.data.mul_(1 - 1e-3 * step.inputs._number)


def _read_gradient(step: Step, number: int) -> None:
    gradients = [p.grad for p in step._state.model.parameters() if p.grad is not None]
    step._state.sums.values[0] += gradients[0].isfinite().all()


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inputs replaced": partial(_around, Step, "begin_epoch", before=_replace_inputs),
    "the step's number replaced": partial(_around, Step, "__call__", before=_replace_number),
    "sums replaced": partial(_around, loop, "epoch_steps", before=_replace_sums),
    "a value of Python baked in": partial(_around, Step, "_run", after=_bake_number),
    "the graph's memory read after it": partial(_around, Step, "__call__", after=_read_gradient),
}
"""Faults that only a replay shows."""
READING: dict[str, tuple[str, Callable[[Step, int], object]]] = {
    "a sum as a number": ("_local_scalar_dense", lambda step, _: float(step._state.sums.values[0])),
    "the sums as a list": ("tolist", lambda step, _: step._state.sums.values.tolist()),
    "labels by a mask": ("index", lambda step, _: step._data.labels[step._data.labels > 0]),
    "a number sent": ("lift_fresh", lambda step, _: step._state.sums.values.add_(torch.tensor(0.0))),
}
"""What makes the host wait at the end of a step, and the call that tells."""


def failing(owner: Any, name: str, *, recording: int) -> AbstractContextManager[Any]:
    """Recording number `recording`, from 1, fails after a method was called, as it does where CUDA forbids a call."""
    tapes: list[Tape] = []

    def fail(*_: object) -> None:
        tape = _get_current_dispatch_mode()
        if isinstance(tape, Tape):
            if tape not in tapes:
                tapes.append(tape)
            if tapes.index(tape) == recording - 1:
                raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    return _around(owner, name, after=fail)


def at_its_end(what: Callable[[Step, int], object]) -> AbstractContextManager[Any]:
    """A step that does something more."""
    return _around(Step, "_run", after=what)


# -- the graph ---------------------------------------------------------------------------------------------------------

READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique", "_unique2", "unique_dim"),
    *("bincount", "multinomial", "histc", "repeat_interleave", "lift_fresh", "lift_fresh_copy"),
}
"""ATen calls that make the host wait, or send what it holds; and choices by a mask."""
METHODS = ("tolist", "numpy", "cpu")
"""Reads that are no ATen call on the CPU."""


class Tape(TorchDispatchMode):
    """Keeps every ATen call, and what it touches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, tuple[Tensor, torch.UntypedStorage, int]] = {}
        """By storage: a tensor that no call of the tape has made, a copy of the storage as it was, and the number of
        times that it had been written to, as torch counts them."""
        self.made: dict[int, Tensor] = {}
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.outside:
                self.outside[storage._cdata] = (tensor, storage.clone(), tensor._version)
        name = function.overloadpacket.__name__
        masked = name.lstrip("_").startswith("index") and any(
            t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])
        )
        if name in READS or masked:
            self.reads[name] += 1
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
            key = tensor.untyped_storage()._cdata
            if key not in self.made and key not in self.outside:
                self.made[key] = tensor
        self.calls.append((function, args, kwargs, out))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class EmulatedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.num_replays = 0
        self.tape = Tape()
        self.written: set[int] = set()
        """Storages from outside that the step wrote to."""

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """In place of torch.cuda.graph."""
        tape = self.tape

        def counted(name: str) -> Callable[..., Any]:
            original = getattr(Tensor, name)

            def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                tape.reads[name] += 1
                return original(tensor, *args, **kwargs)

            return method

        try:
            with mock.patch.multiple(Tensor, **{name: counted(name) for name in METHODS}), tape:
                yield
        finally:
            for key, (tensor, before, version) in tape.outside.items():
                storage = tensor.untyped_storage()
                # Batch norm's statistics change uncounted; a rate is written that may be the old one.
                if tensor._version != version or not _bytes(storage).equal(_bytes(before)):
                    self.written.add(key)
                    storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the calls again, then spoil all that they have made."""
        self.num_replays += 1
        for function, args, kwargs, out in self.tape.calls:
            again = function(*args, **kwargs)
            for kept, new in zip(_tensors(out), _tensors(again), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
        for tensor in self.tape.made.values():
            tensor.detach().fill_(math.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or -77)


# -- a training, and what came of it -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a training."""

    tensors: dict[str, Tensor]
    """See results()."""
    state: TrainingState
    num_replays: list[int] = field(default_factory=list)
    """Of each graph."""
    reads: Counter[str] = field(default_factory=Counter)
    """Calls of a recorded step that make the host wait."""
    read: set[str] = field(default_factory=set)
    """What recorded steps read from outside, as outside_tensors() names it."""
    written: set[str] = field(default_factory=set)
    """What of that they wrote to."""

    def differs_from(self, other: "Outcome") -> list[str]:
        """Names of the tensors that are not the same bit for bit."""
        names = sorted(self.tensors.keys() | other.tensors.keys())
        mine, theirs = self.tensors, other.tensors
        return [n for n in names if n not in mine or n not in theirs or not mine[n].equal(theirs[n])]


def train(
    setup: Setup,
    *,
    emulate: bool,
    fault: AbstractContextManager[Any] | None = None,
    start: tuple[Plan, TrainingState] | None = None,
    stop_at: tuple[int, int] | None = None,
) -> Outcome:
    """Train from the beginning or from `start` to the end, or to the epoch and step of `stop_at`."""
    plan, state = start or setup.begin()
    made: list[EmulatedGraph] = []
    steps: list[Step] = []
    with recorded(made, steps) if emulate else contextlib.nullcontext(), fault or contextlib.nullcontext():
        fit(setup, plan, state, stop_at)
    outcome = Outcome(results(state), state)
    known: dict[int, str] = {}
    for step in steps:
        for name, tensors in outside_tensors(step).items():
            for tensor in tensors:
                known.setdefault(tensor.untyped_storage()._cdata, name)
    for graph in made:
        outcome.num_replays.append(graph.num_replays)
        outcome.reads += graph.tape.reads
        names = {key: known.get(key, _unknown(tensor)) for key, (tensor, *_) in graph.tape.outside.items()}
        outcome.read |= set(names.values())
        outcome.written |= {names[key] for key in graph.written}
    return outcome


def _unknown(tensor: Tensor) -> str:
    return f"unknown {tuple(tensor.shape)} {tensor.dtype}"
