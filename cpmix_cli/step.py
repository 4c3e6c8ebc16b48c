"""One optimizer step, as work for the device alone: batches, losses, gradients, confusion counts, sums.

A step reads nothing back from the device, and all that it changes stays at its address. So a CUDA graph can hold a
whole step: it is recorded once for each batch size (the full one, and the last of an epoch) and replayed from then on,
at the cost of one launch in place of some hundreds. The CPU runs the same code.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cpmix_cli.confusion import count_confusions
from cpmix_cli.data.batches import Batches, ClassPool
from cpmix_cli.mixing import MixingState
from cpmix_cli.models import Classifier
from cpmix_cli.terms import Term, TermBatch, draw_epoch, matching_terms

EAGER_STEPS = 3  # before a graph is recorded: the libraries choose and allocate in them


@dataclass
class TrainingState:
    """All that a run resumes from."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    confusion: Tensor
    """K [C, C] float64."""
    epoch: int
    """The epoch under way, counted as in Plan; the last one when all is done."""
    step: int = 0
    """Steps of that epoch already taken."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sums of the epoch under way, in the order of sum_names()."""
    history: list[dict[str, float | None]] = field(default_factory=list)
    """Rows of metrics.parquet."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and how long."""

    phase: str
    seed: int
    terms: list[Term]
    joint_forward: bool
    first_epoch: int
    """Counted over both stages, from 1."""
    last_epoch: int
    num_epochs: int
    """Of both stages together."""
    batch_size: int
    learning_rate: Callable[[int, int, int], float]
    """(epoch, step, steps an epoch) -> rate; parameter groups scale it by their lr_factor."""
    train_mode: bool = True
    """False keeps batch norm in eval mode."""
    collect_confusion: bool = True
    confusion_start: int = 1
    confusion_decay: float = 1.0
    confusion_of_each: bool = False
    """Of several experts, every one's errors are counted and not those of their mean."""
    teacher: Classifier | None = None
    """Whose logits, the mean of its experts, the terms that are taught learn from; in eval mode, and never trained."""
    precision: str = "fp32"

    def num_steps(self, num_samples: int) -> int:
        """Steps of an epoch over so many images; the last one takes what is left."""
        return -(-num_samples // self.batch_size)

    def counts_errors(self, epoch: int) -> bool:
        """Whether the errors of this epoch's batches go into the confusion counts."""
        return self.collect_confusion and self.counted_term is not None and epoch >= self.confusion_start

    @property
    def measured_terms(self) -> list[Term]:
        """The unmixed terms whose predictions make the training accuracy: up to the first natural one, which sees
        every image of the epoch once.
        """
        unmixed = [term for term in self.terms if not term.mixed]
        naturals = [i for i, term in enumerate(unmixed) if term.natural]
        return unmixed[: naturals[0] + 1] if naturals else unmixed

    @property
    def counted_term(self) -> Term | None:
        """The natural term whose errors are counted: an unmixed one, or else one that leaves some batches unmixed."""
        naturals = [term for term in self.terms if term.natural]
        always = [term for term in naturals if not term.mixed]
        return next(iter(always + [term for term in naturals if term.gated]), None)


@dataclass(frozen=True)
class TrainingData:
    """The training split on the device."""

    batches: Batches
    labels: Tensor
    """[N] int64."""
    class_counts: Tensor
    """[C] int64."""


def sum_names(terms: list[Term]) -> list[str]:
    """What is summed over an epoch."""
    losses = [f"loss_{t.name}" for t in terms]
    return ["loss", *losses, "gradient_norm", "correct", "errors", "finite_steps", "seconds", "fallbacks"]


class Replayed:
    """A function of one key whose work on the device is the same at each call: on CUDA recorded once for each key, then
    replayed. On CUDA, inside own_stream().

    Args:
        function: launches the work; reads nothing back, and works on tensors that stay where they are.
        device: where.
        record: False takes every call eagerly, for a function that does read back.
    """

    capture_seconds = 0.0
    """Time spent recording so far."""

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


class Step:
    """The training step of a plan: begin_epoch(), then a call for each step of it. On CUDA, inside own_stream().

    Args:
        plan: what to run.
        data: the training images.
        state: its network, optimizer, confusion counts and sums are changed in place.
    """

    def __init__(self, plan: Plan, data: TrainingData, state: TrainingState) -> None:
        self._plan = plan
        self._data = data
        self._state = state
        self._pool = ClassPool(data.labels, len(data.class_counts))
        # A view of the last sum: partners count their fall-backs straight into it.
        self._mixing = MixingState(data.class_counts, state.confusion, state.sums[-1], self._features)
        self._matching: set[str] = set()
        self._number = torch.zeros(1, dtype=torch.int64, device=data.labels.device)
        self._inputs: dict[str, Tensor] = {}
        record = not any(term.matched for term in plan.terms)
        self._take = Replayed(self._run, self._number.device, record=record)

    def begin_epoch(self, epoch: int) -> None:
        """Send all that differs between the steps of an epoch to the device: random numbers and learning rates."""
        plan = self._plan
        num_samples = len(self._data.labels)
        key = (plan.seed, plan.phase)
        num_uniforms = self._data.batches.num_uniforms
        inputs = draw_epoch(plan.terms, num_samples, plan.batch_size, key, epoch, plan.num_epochs, num_uniforms)
        self._matching = matching_terms(plan.terms, key, epoch, plan.num_epochs)
        steps = plan.num_steps(num_samples)
        rates = [plan.learning_rate(epoch, step, steps) for step in range(steps)]
        inputs["learning_rate"] = torch.tensor(rates, dtype=torch.float64)
        inputs["collects"] = torch.full((steps,), float(plan.counts_errors(epoch)), dtype=torch.float64)
        for name, values in inputs.items():
            if name in self._inputs:
                self._inputs[name].copy_(values)
            else:
                self._inputs[name] = values.to(self._number.device)

    def __call__(self, number: int) -> None:
        """Take step `number` of the epoch, counted from 0."""
        size = min(self._plan.batch_size, len(self._data.labels) - number * self._plan.batch_size)
        self._number.fill_(number)
        self._take(size)

    def counted_images(self, since: int) -> Tensor:
        """Images of each class [C] float64 that the epoch has taken where their errors are counted, from step `since`
        on. No work of a step: for those who look on.
        """
        size, term = self._plan.batch_size, self._plan.counted_term
        order = self._inputs["order"]
        counted = torch.ones(len(order), dtype=torch.float64, device=order.device)
        if term is not None and term.mixed:  # in the batches that it leaves unmixed
            counted -= self._inputs[f"{term.name}/gate"][:, 0]
        taken = slice(since * size, min(self._state.step * size, len(self._data.labels)))
        labels = self._data.labels[order.flatten()[taken]]
        images = torch.zeros(len(self._data.class_counts), dtype=torch.float64, device=order.device)
        return images.index_add_(0, labels, counted.repeat_interleave(size)[taken])

    @property
    def capture_seconds(self) -> float:
        """Time spent recording CUDA graphs so far."""
        return self._take.capture_seconds

    def _run(self, size: int) -> None:
        """The step that self._number says, of `size` images.

        Paper: Algorithm 1 and Eq. (13). Differs: with one joint forward the CP batch is drawn before this step's errors
        are known, so partners come from the counts through the step before.
        """
        plan, state, class_counts = self._plan, self._state, self._data.class_counts
        inputs = {name: values.index_select(0, self._number)[0] for name, values in self._inputs.items()}
        rate, collects = inputs.pop("learning_rate"), inputs.pop("collects")
        parts = self._term_batches({name: values[:size] for name, values in inputs.items()})
        for term, part in zip(plan.terms, parts, strict=True):
            if term.taught:
                part.teacher = self._taught(part.x)
        with torch.autocast(collects.device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            if state.model.routers is not None:
                logits = []
                for part in parts:
                    z, routes = state.model.routed(part.x)
                    part.routes = _at_least_fp32(routes)
                    logits.append(z)
            elif plan.joint_forward:
                joint = state.model.expert_logits(torch.cat([part.x for part in parts]))
                logits = list(torch.split(joint, size, 1))
            else:
                logits = [state.model.expert_logits(part.x) for part in parts]
        logits = [_at_least_fp32(z) for z in logits]
        losses = [term.loss(z, part, class_counts) for term, z, part in zip(plan.terms, logits, parts, strict=True)]
        total = torch.stack([t.weight * x for t, x in zip(plan.terms, losses, strict=True)]).sum()
        state.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        for group in state.optimizer.param_groups:
            group["lr"].copy_(rate * group["lr_factor"])
        state.optimizer.step()

        correct = errors = torch.zeros_like(rate)
        measured, counted = plan.measured_terms, plan.counted_term
        for term, z, part in zip(plan.terms, logits, parts, strict=True):
            if term not in measured and term is not counted:
                continue
            right = (z.detach().mean(0).argmax(1) == part.y1).sum()
            if term in measured:
                correct = correct + right
            if term is counted:
                weight = collects if part.unmixed is None else collects * part.unmixed[0]
                for seen in z.detach() if plan.confusion_of_each else z.detach().mean(0)[None]:
                    predicted = seen.argmax(1)
                    count_confusions(state.confusion, part.y1, predicted, weight)
                    errors = errors + (size - (predicted == part.y1).sum()) * weight
        values = [total, *losses, norm, correct, errors]
        state.sums[: len(values)] += torch.stack([v.detach().double() for v in values])
        # A sum that is not finite never is again: this one counts the steps before the first that was not.
        state.sums[len(values)] += state.sums[: len(values)].isfinite().all()

    def _term_batches(self, draws: dict[str, Tensor]) -> list[TermBatch]:
        """Each term's images of the step; the natural batch is made once for all that share it."""
        data = self._data
        natural, labels = torch.empty(0), data.labels[draws["order"]]
        if any(term.natural for term in self._plan.terms):
            natural = data.batches.batch(draws["order"], draws["augment"])
        return [
            term.batch(draws, (natural, labels), data.batches, self._pool, self._mixing, term.name in self._matching)
            for term in self._plan.terms
        ]

    @torch.no_grad()
    def _taught(self, x: Tensor) -> Tensor:
        teacher = self._plan.teacher
        assert teacher is not None  # train_stage1 sees to it
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._plan.precision == "bf16"):
            logits: Tensor = teacher(x)
        return _at_least_fp32(logits)

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        model = self._state.model
        model.eval()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self._plan.precision == "bf16"):
            found = model.features(x).float()
        model.train(self._plan.train_mode)
        return found


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
