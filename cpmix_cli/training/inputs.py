"""What differs between the steps of an epoch, on the device: learning rates, draws, the partners chosen.

All of it is made when the epoch begins and stays at its addresses, so that a CUDA graph of a step reads it by the
step's number. Images that come from disk are prefetched some steps ahead.

Shapes as in randomness.py: S steps per epoch, B batch; a selected step has no S.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpmix_cli.data.batches import Batches, ClassPool
from cpmix_cli.mixing import MixingState
from cpmix_cli.runtime import ranks
from cpmix_cli.training.batch_slices import BatchSlice, batch_slices
from cpmix_cli.training.objective import Term
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.randomness import Draws, ImageRequest, Sampler, TermDraws, leaves, map_tensors

STEPS_AHEAD = 2
"""Images that come from disk are prefetched so many steps before they are needed."""


@dataclass(frozen=True)
class TrainingData:
    """The training split on the device."""

    batches: Batches
    labels: Tensor
    """[N] int64."""
    class_counts: Tensor
    """[C] int64."""


@dataclass(frozen=True)
class Inputs:
    """Of the steps of an epoch."""

    learning_rate: Tensor
    """[S, 1] float64."""
    counts_errors: Tensor
    """[S, 1] float64: 1 if the errors of the step are counted, else 0."""
    fallbacks: Tensor
    """[S, 1] float64: partners drawn without a confusion, where they are chosen ahead."""
    draws: Draws


class EpochInputs:
    """The inputs of the epoch under way."""

    def __init__(self, plan: Plan, data: TrainingData) -> None:
        self.epoch: Inputs | None = None
        """Of all steps of the epoch under way."""
        self._plan = plan
        self._data = data
        self._device = data.labels.device
        self._pool = ClassPool(data.labels, len(data.class_counts))
        self._counter = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._number = 0
        self._prefetched = -1
        self._sampler = Sampler(
            {term.name: term.recipe for term in plan.terms},
            data.labels.cpu(),
            len(data.class_counts),
            batch_size=plan.batch_size,
            num_uniforms=data.batches.num_uniforms,
            key=(plan.seed, plan.phase),
            num_epochs=plan.num_epochs,
        )

    def begin_epoch(self, epoch: int, confusion: Tensor) -> None:
        """Draw all random numbers of an epoch and send them to the device; partners chosen ahead are chosen from K
        [C, C] at its beginning.
        """
        plan, steps = self._plan, self._plan.num_steps(len(self._data.labels))
        rates = [plan.learning_rate(epoch, step, steps) for step in range(steps)]
        inputs = Inputs(
            learning_rate=torch.tensor(rates, dtype=torch.float64)[:, None],
            counts_errors=torch.full((steps, 1), float(plan.counts_errors(epoch)), dtype=torch.float64),
            fallbacks=torch.zeros(steps, 1, dtype=torch.float64),
            draws=self._sampler.epoch(epoch),
        )
        inputs = map_tensors(inputs, lambda t: t.to(self._device), lambda t: t.to(self._data.batches.device))
        if plan.partners_ahead:
            inputs = self._choose_ahead(inputs, confusion.to(self._device))
        if self.epoch is None:
            self.epoch = inputs
        else:  # graphs read the addresses of the first epoch
            kept = leaves(self.epoch, Tensor)
            self.epoch = map_tensors(inputs, lambda new: next(kept).copy_(new))
        self._prefetched = -1

    def select(self, number: int) -> None:
        """Select step `number` of the epoch, from 0, and prefetch the images of those to come."""
        self._counter.fill_(number)
        self._number = number
        if self._data.batches.resident:
            return
        last = min(number + STEPS_AHEAD, self._plan.num_steps(len(self._data.labels)) - 1)
        for ahead in range(max(number, self._prefetched + 1), last + 1):
            size = self._plan.size(ahead, len(self._data.labels))
            for part in batch_slices(size, self._plan.micro_batches, ranks.current()):
                for request in leaves(self.epoch, ImageRequest):
                    if request.index is not None:  # else it is not chosen yet
                        index, augment = (part.select(t[ahead, :size]) for t in (request.index, request.augment))
                        self._data.batches.prefetch(index, augment)
        self._prefetched = last

    def row(self, size: int) -> Inputs:
        """The selected step, its first `size` images."""
        assert self.epoch is not None  # begin_epoch() came first
        resident = self._data.batches.resident  # other requests stay on the CPU, where the number is known
        on_host = None if resident else lambda t: t[self._number, :size]
        return map_tensors(self.epoch, lambda t: t.index_select(0, self._counter)[0][:size], on_host)

    def choose_partners(self, inputs: Inputs, state: MixingState) -> Inputs:
        """A step's inputs [B] with the partners that were not chosen ahead, and the requests for their images."""
        natural = inputs.draws.natural
        terms = [
            self._with_partners(term, draws, natural, state)
            for term, draws in zip(self._plan.terms, inputs.draws.terms, strict=True)
        ]
        return replace(inputs, draws=Draws(natural, tuple(terms)))

    def _with_partners(
        self, term: Term, draws: TermDraws, natural: ImageRequest | None, state: MixingState
    ) -> TermDraws:
        partners = None if draws.partners is not None else term.choose_partners(draws, self._pool, state)
        if partners is None:
            return draws
        place = partners.index.to(self._data.batches.device)
        first, second = draws.first or natural, draws.second
        if second is not None:
            second = replace(second, index=place)
        elif self._plan.micro_batches * ranks.current().size > 1 and first is not None and first.index is not None:
            # The partner may be another rank's: its image is made anew, as it is made there.
            second = ImageRequest(first.index[place], first.augment[place])
        return replace(draws, partners=partners, second=second)

    def _choose_ahead(self, inputs: Inputs, confusion: Tensor) -> Inputs:
        """The inputs of an epoch with the partners of all its steps, and zeros after its last image."""
        rows = []
        for number in range(len(inputs.fallbacks)):
            size = self._plan.size(number, len(self._data.labels))
            row = map_tensors(inputs, lambda t: t[number, :size])  # noqa: B023
            rows.append(self.choose_partners(row, MixingState(self._data.class_counts, confusion, row.fallbacks[0])))
        steps = zip(*(leaves(row, Tensor) for row in rows), strict=True)
        return map_tensors(rows[0], lambda _: pad_sequence(list(next(steps)), batch_first=True))


def fetch(batches: Batches, request: ImageRequest | None, part: BatchSlice) -> Tensor | None:
    """Make the inputs [P, ...] of a slice of a request [B]; None gives None."""
    if request is None:
        return None
    assert request.index is not None  # partners are chosen by now
    return batches.batch(part.select(request.index), part.select(request.augment))
