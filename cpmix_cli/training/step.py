"""One optimizer step, as work for the device alone: batches, losses, gradients, confusion counts, sums.

A step reads nothing back from the device, and all that it changes stays at its address. So a CUDA graph can hold a
whole step: it is recorded once for each batch size (the full one, and the last of an epoch) and replayed from then on,
at the cost of one launch in place of some hundreds. The CPU runs the same code.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpmix_cli.confusion import NO_ERROR, confusion_codes, count_confusions
from cpmix_cli.data.batches import Batches, ClassPool
from cpmix_cli.mixing import MixingState
from cpmix_cli.models import Classifier
from cpmix_cli.runtime import ranks
from cpmix_cli.training.objective import Part, Term, TermBatch, draw_epoch, matching_terms

EAGER_STEPS = 3  # before a graph is recorded: the libraries choose and allocate in them
NATURAL: tuple[str, str, str | None] = ("order", "augment", None)
"""Names of the indices and the uniforms of the natural batch."""


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
    epoch_confusion: Tensor | None = None
    """K as it was when the epoch under way began, on the CPU; where its partners are drawn from that."""


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
    """Of all ranks together."""
    learning_rate: Callable[[int, int, int], float]
    """(epoch, step, steps an epoch) -> rate; parameter groups scale it by their lr_factor."""
    train_mode: bool = True
    """False keeps batch norm in eval mode."""
    collect_confusion: bool = True
    confusion_start: int = 1
    confusion_decay: float = 1.0
    partners_ahead: bool = False
    """Partners of a whole epoch are drawn when it begins."""
    micro_batches: int = 1
    """Parts that each rank takes its share of a batch in."""
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


class Pass(nn.Module):
    """The network's forward pass over the terms of a step: what DistributedDataParallel watches.

    Args:
        model: the network.
        joint: all terms in one forward, so that batch norm sees them together; else each in its own.
    """

    def __init__(self, model: Classifier, joint: bool) -> None:
        super().__init__()
        self.model = model
        self.joint = joint

    def forward(self, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Inputs of each term [P, ...] -> raw logits [E, P, C] of each, and the routers' [E - 1, P] where there are
        some.
        """
        if self.model.routers is not None:
            return [self.model.routed(x) for x in inputs]
        if self.joint:
            logits = self.model.expert_logits(torch.cat(inputs))
            return [(z, None) for z in torch.split(logits, [len(x) for x in inputs], 1)]
        return [(self.model.expert_logits(x), None) for x in inputs]


class Step:
    """The training step of a plan: begin_epoch(), then a call for each step of it. On CUDA, inside own_stream().

    Several ranks take it together, each with its part of the batch: every draw is for all of it, and the same on each.

    Args:
        plan: what to run.
        data: the training images.
        state: its network, optimizer, confusion counts and sums are changed in place.
    """

    STEPS_AHEAD = 2
    """Images that come from disk are asked for so long before they are needed."""

    def __init__(self, plan: Plan, data: TrainingData, state: TrainingState) -> None:
        self._plan = plan
        self._data = data
        self._state = state
        self._ranks = ranks.current()
        self._pool = ClassPool(data.labels, len(data.class_counts))
        # A view of the last sum: partners count their fall-backs straight into it.
        self._mixing = MixingState(data.class_counts, state.confusion, state.sums[-1], self._features)
        self._matching: set[str] = set()
        self._number = torch.zeros(1, dtype=torch.int64, device=data.labels.device)
        self._inputs: dict[str, Tensor] = {}
        self._on_host: dict[str, Tensor] = {}
        self._step = 0
        self._announced = -1
        self._network: nn.Module = Pass(state.model, plan.joint_forward)
        if self._ranks.size > 1:
            own_device = [self._number.device] if self._number.device.type == "cuda" else None
            self._network = DistributedDataParallel(self._network, own_device)
        record = data.batches.resident and self._ranks.size == 1 and not any(term.matched for term in plan.terms)
        self._take = Replayed(self._run, self._number.device, record=record)

    def begin_epoch(self, epoch: int) -> None:
        """Send all that differs between the steps of an epoch to the device: random numbers, the images that they
        choose, and learning rates.
        """
        plan, device, resident = self._plan, self._number.device, self._data.batches.resident
        num_samples = len(self._data.labels)
        key = (plan.seed, plan.phase)
        num_uniforms = self._data.batches.num_uniforms
        inputs = draw_epoch(plan.terms, num_samples, plan.batch_size, key, epoch, plan.num_epochs, num_uniforms)
        self._matching = matching_terms(plan.terms, key, epoch, plan.num_epochs)
        steps = plan.num_steps(num_samples)
        rates = [plan.learning_rate(epoch, step, steps) for step in range(steps)]
        inputs["learning_rate"] = torch.tensor(rates, dtype=torch.float64)
        inputs["collects"] = torch.full((steps,), float(plan.counts_errors(epoch)), dtype=torch.float64)
        if not resident:
            self._on_host = {name: inputs.pop(name) for name in list(inputs) if name.endswith("augment")}
        inputs = {name: values.to(device) for name, values in inputs.items()}
        for term in plan.terms:
            inputs |= term.chosen(inputs, self._pool)
        if plan.partners_ahead:
            inputs |= self._partners_of_epoch(inputs, steps)
        if not resident:
            chosen = {name: values for name, values in inputs.items() if values.dtype == torch.int64}
            self._on_host |= {name: values.to(self._data.batches.device) for name, values in chosen.items()}
        for name, values in inputs.items():
            if name in self._inputs:
                self._inputs[name].copy_(values)
            else:
                self._inputs[name] = values
        self._announced = -1

    def __call__(self, number: int) -> None:
        """Take step `number` of the epoch, counted from 0."""
        self._number.fill_(number)
        self._step = number
        if not self._data.batches.resident:
            last = min(number + self.STEPS_AHEAD, self._plan.num_steps(len(self._data.labels)) - 1)
            for ahead in range(max(number, self._announced + 1), last + 1):
                self._announce(ahead)
            self._announced = last
        self._take(self._size(number))

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

    def _size(self, number: int) -> int:
        """Images of the natural batch of a step: the last of an epoch takes what is left."""
        return min(self._plan.batch_size, len(self._data.labels) - number * self._plan.batch_size)

    def _parts(self, size: int) -> list[Part]:
        """This rank's parts of a batch, one for each of its micro-batches."""
        pieces = self._plan.micro_batches
        return [Part(self._ranks.rank * pieces + i, self._ranks.size * pieces, size) for i in range(pieces)]

    def _partners_of_epoch(self, inputs: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Term.partners() of all steps [S, B], from the counts at the beginning of the epoch, and "fallbacks" [S]."""
        device, began = self._number.device, self._state.epoch_confusion
        fallbacks = torch.zeros(steps, dtype=torch.float64, device=device)
        confusion = self._state.confusion if began is None else began.to(device)
        found: dict[str, Tensor] = {}
        for number in range(steps):
            size = self._size(number)
            draws = {name: values[number, :size] for name, values in inputs.items() if values.dim() > 1}
            state = MixingState(self._data.class_counts, confusion, fallbacks[number], self._features)
            for term in self._plan.terms:
                for name, chosen in term.partners(draws, self._data.labels, self._pool, state).items():
                    if name not in found:
                        found[name] = chosen.new_zeros(steps, self._plan.batch_size)
                    found[name][number, :size] = chosen
        return {**found, "fallbacks": fallbacks}

    def _run(self, size: int) -> None:
        """The step that self._number says, of `size` images.

        Paper: Algorithm 1 and Eq. (13). Differs: with one joint forward the CP batch is drawn before this step's errors
        are known, so partners come from the counts through the step before.
        """
        plan, state, labels = self._plan, self._state, self._data.labels
        inputs = {name: values.index_select(0, self._number)[0] for name, values in self._inputs.items()}
        rate, collects = inputs.pop("learning_rate"), inputs.pop("collects")
        if plan.partners_ahead:
            state.sums[-1] += inputs.pop("fallbacks")
        draws = {name: values[:size] for name, values in inputs.items()}
        if not plan.partners_ahead:
            for term in plan.terms:
                draws |= term.partners(draws, labels, self._pool, self._mixing)
        parts = self._parts(size)
        state.optimizer.zero_grad(set_to_none=True)
        values, codes = [], []
        for part in parts:
            batches = self._term_batches(draws, part)
            with self._gradients_stay_here() if part is not parts[-1] else nullcontext():
                logits = self._forward(batches)
                losses = [
                    term.loss(z, batch, self._data.class_counts)
                    for term, z, batch in zip(plan.terms, logits, batches, strict=True)
                ]
                losses = [torch.stack([t.weight * x for t, x in zip(plan.terms, losses, strict=True)]).sum(), *losses]
                (losses[0] / len(parts)).backward()  # type: ignore[no-untyped-call]
            correct, wrong = self._errors(logits, batches, collects)
            values.append(torch.stack([*(x.detach().double() / parts[0].count for x in losses), correct]))
            codes += wrong
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        for group in state.optimizer.param_groups:
            group["lr"].copy_(rate * group["lr_factor"])
        state.optimizer.step()

        *means, right = self._ranks.sum_(torch.stack(values).sum(0)).unbind()
        errors = torch.zeros_like(rate)
        if codes:
            found = self._ranks.all_gather(torch.cat(codes))
            count_confusions(state.confusion, found)
            errors = (found != NO_ERROR).sum()
        added = torch.stack([v.double() for v in (*means, norm, right, errors)])
        state.sums[: len(added)] += added
        # A sum that is not finite never is again: this one counts the steps before the first that was not.
        state.sums[len(added)] += state.sums[: len(added)].isfinite().all()

    def _gradients_stay_here(self) -> AbstractContextManager[None]:
        """While the parts of a batch before the last go through."""
        return self._network.no_sync() if isinstance(self._network, DistributedDataParallel) else nullcontext()

    def _forward(self, batches: list[TermBatch]) -> list[Tensor]:
        """Raw logits [E, P, C] of each term, in fp32 or better; what routers and teachers say goes into the batches."""
        plan = self._plan
        for term, batch in zip(plan.terms, batches, strict=True):
            if term.taught:
                batch.teacher = self._taught(batch.x)
        with torch.autocast(self._number.device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            passed = self._network([batch.x for batch in batches])
        for batch, (_, routes) in zip(batches, passed, strict=True):
            batch.routes = None if routes is None else _at_least_fp32(routes)
        return [_at_least_fp32(logits) for logits, _ in passed]

    def _errors(self, logits: list[Tensor], batches: list[TermBatch], collects: Tensor) -> tuple[Tensor, list[Tensor]]:
        """How many images of a part are right where that is measured, float64 scalar, and the codes of the errors that
        are counted.
        """
        plan = self._plan
        correct, codes = collects.new_zeros(()), []
        measured, counted = plan.measured_terms, plan.counted_term
        for term, z, batch in zip(plan.terms, logits, batches, strict=True):
            own = torch.ones_like(batch.y1, dtype=torch.bool) if batch.weights is None else batch.weights > 0
            if term in measured:
                correct = correct + ((z.detach().mean(0).argmax(1) == batch.y1) & own).sum()
            if term is counted:
                own = own & (collects if batch.unmixed is None else collects * batch.unmixed[0]).bool()
                codes.append(confusion_codes(batch.y1, z.detach().mean(0).argmax(1), own, z.shape[-1]))
        return correct, codes

    def _term_batches(self, draws: Mapping[str, Tensor], part: Part) -> list[TermBatch]:
        """Each term's images of a part of the step; the natural batch is made once for all that share it."""
        images = partial(self._images, draws, part)
        natural = images(*NATURAL) if any(term.natural for term in self._plan.terms) else torch.empty(0)
        return [
            term.batch(
                *(draws, part, natural, self._data.labels, images, self._mixing),
                matching=term.name in self._matching,
            )
            for term in self._plan.terms
        ]

    def _images(
        self, draws: Mapping[str, Tensor], part: Part, indices: str, uniforms: str, by: str | None = None
    ) -> Tensor:
        """See Images; `draws` are those of the step."""
        chosen = self._wanted(draws, self._step, part, indices, uniforms, by)
        return self._data.batches.batch(*chosen)

    def _wanted(
        self, draws: Mapping[str, Tensor], number: int, part: Part, indices: str, uniforms: str, by: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Indices [P] and uniforms [P, U] of a part's images, where the data set wants them: images that come from disk
        are known to the host where that is possible, and else waited for.
        """

        def named(name: str) -> Tensor:
            if name in self._on_host:
                return self._on_host[name][number, : part.size]
            return draws[name].to(self._data.batches.device)

        at = part.of(named(by)) if by else None
        index, augment = named(indices), named(uniforms)
        return (part.of(index), part.of(augment)) if at is None else (index[at], augment[at])

    def _announce(self, number: int) -> None:
        """Say which images of a step will come from disk, as far as the host knows."""
        for part in self._parts(self._size(number)):
            asked = [NATURAL for term in self._plan.terms if term.natural][:1]
            asked += [names for term in self._plan.terms for names in term.wanted(part.count == 1)]
            for names in asked:
                if all(name is None or name in self._on_host for name in names):
                    self._data.batches.prefetch(*self._wanted({}, number, part, *names))

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
