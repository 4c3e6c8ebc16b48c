"""Inputs of the steps of an epoch, on the device: learning rates, random numbers, chosen partners.

All inputs of an epoch are made when it begins, and their addresses never change. So a CUDA graph of a step can read
them by the step's number. Images on disk are prefetched some steps ahead.

Shapes as in randomness.py: S steps per epoch, B batch size. A selected step has no axis S.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpmix_cli.artifacts import files
from cpmix_cli.data.batches import Batches, ClassPool, open_batches
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.mixing import MixingState
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runtime import ranks
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.batch_slices import BatchSlice, batch_slices
from cpmix_cli.training.objective import Term
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.randomness import Draws, ImageRequest, Sampler, TermDraws, leaves, map_tensors

STEPS_AHEAD = 2
"""Number of steps for which images on disk are prefetched."""


@dataclass(frozen=True)
class TrainingData:
    """Training split: images, and labels on the device."""

    batches: Batches
    labels: Tensor
    """Class of each training image [N] int64."""
    class_counts: Tensor
    """Training images per class [C] int64."""


def training_data(dataset: Dataset, recipe: Recipe, device: torch.device) -> TrainingData:
    """Open the training split: images resident or streamed, labels and class counts on the device.

    Args:
        dataset: an open data set.
        recipe: gives augmentation and normalisation.
        device: device of the network.

    Raises:
        InputError: a file is missing or damaged, or the labels do not have the recorded class counts.
    """
    batches, labels = open_batches(dataset, "train", recipe.data, device)
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    if counts.tolist() != dataset.class_counts.tolist():
        raise InputError(
            f"{dataset.folder / files.CLASS_COUNTS} has other counts than the training labels",
            path=dataset.folder / files.CLASS_COUNTS,
        )
    return TrainingData(batches, labels.to(device), counts.to(device))


@dataclass(frozen=True)
class Inputs:
    """Inputs of the steps of an epoch, or of one step."""

    learning_rate: Tensor
    """Learning rate of each step [S, 1] float64, before the groups' lr_factor."""
    counts_errors: Tensor
    """1 if the errors of the step are counted, else 0 [S, 1] float64."""
    average_share: Tensor | None
    """Share of the weights after the step in their average [S, 1] float32; None if they are not averaged."""
    fallbacks: Tensor
    """Partners drawn for a class without confusions [S, 1] float64; 0 until partners are chosen."""
    draws: Draws


class EpochInputs:
    """Inputs of the current epoch, at fixed addresses: begin_epoch(), then select() and row() per step."""

    def __init__(self, plan: Plan, data: TrainingData, num_features: int) -> None:
        self.epoch: Inputs | None = None
        """Inputs of all steps of the current epoch."""
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
            alternating=data.batches.alternating,
            num_features=num_features,
        )

    def begin_epoch(self, epoch: int, confusion: Tensor) -> None:
        """Draw all random numbers of an epoch and copy them to the device.

        Args:
            epoch: from 1.
            confusion: K [C, C] at the start of the epoch; read only if partners are chosen for a whole epoch.
        """
        plan, steps = self._plan, self._plan.num_steps(len(self._data.labels))
        rates = [plan.learning_rate(epoch, step, steps) for step in range(steps)]
        share = None
        if plan.ema_epochs:
            share = torch.tensor([[plan.average_share(epoch, step, steps)] for step in range(steps)])
        inputs = Inputs(
            learning_rate=torch.tensor(rates, dtype=torch.float64)[:, None],
            counts_errors=torch.full((steps, 1), float(plan.counts_errors(epoch)), dtype=torch.float64),
            average_share=share,
            fallbacks=torch.zeros(steps, 1, dtype=torch.float64),
            draws=self._sampler.epoch(epoch),
        )
        inputs = map_tensors(inputs, lambda t: t.to(self._device), lambda t: t.to(self._data.batches.device))
        if plan.partners_ahead:
            inputs = self._choose_ahead(inputs, confusion.to(self._device))
        if self.epoch is None:
            self.epoch = inputs
        else:  # CUDA graphs read from the addresses of the first epoch
            kept = leaves(self.epoch, Tensor)
            self.epoch = map_tensors(inputs, lambda new: next(kept).copy_(new))
        self._prefetched = -1

    def select(self, number: int) -> None:
        """Select step `number` of the epoch, from 0, and prefetch images of that step and the next STEPS_AHEAD."""
        self._counter.fill_(number)
        self._number = number
        if self._data.batches.resident:
            return
        last = min(number + STEPS_AHEAD, self._plan.num_steps(len(self._data.labels)) - 1)
        for ahead in range(max(number, self._prefetched + 1), last + 1):
            size = self._plan.size(ahead, len(self._data.labels))
            for part in batch_slices(size, self._plan.micro_batches, ranks.current()):
                for request in leaves(self.epoch, ImageRequest):
                    if request.index is not None:  # None: the partners are not chosen yet
                        index, augment = (part.select(t[ahead, :size]) for t in (request.index, request.augment))
                        self._data.batches.prefetch(index, augment)
        self._prefetched = last

    def row(self, size: int) -> Inputs:
        """Return the inputs of the selected step for its first `size` images: [S, B] -> [size]."""
        assert self.epoch is not None  # begin_epoch() was called
        resident = self._data.batches.resident  # requests for images on disk stay on the CPU, as does the step's number
        on_host = None if resident else lambda t: t[self._number, :size]
        return map_tensors(self.epoch, lambda t: t.index_select(0, self._counter)[0][:size], on_host)

    def choose_partners(self, inputs: Inputs, state: MixingState) -> Inputs:
        """Return a step's inputs [B] with the partners that are not chosen yet, and the requests for their images."""
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
            # The partner may be in another rank's slice: its image is read again, with the same augmentation.
            second = ImageRequest(first.index[place], first.augment[place])
        return replace(draws, partners=partners, second=second)

    def _choose_ahead(self, inputs: Inputs, confusion: Tensor) -> Inputs:
        """Return the inputs of an epoch with the partners of all steps; places after the last image are zero."""
        rows = []
        for number in range(len(inputs.fallbacks)):
            size = self._plan.size(number, len(self._data.labels))
            row = map_tensors(inputs, lambda t: t[number, :size])  # noqa: B023
            rows.append(self.choose_partners(row, MixingState(self._data.class_counts, confusion, row.fallbacks[0])))
        steps = zip(*(leaves(row, Tensor) for row in rows), strict=True)
        return map_tensors(rows[0], lambda _: pad_sequence(list(next(steps)), batch_first=True))


def fetch(batches: Batches, request: ImageRequest | None, part: BatchSlice) -> Tensor | None:
    """Return the augmented images [P, ...] of one batch slice, or None if there is no request.

    Args:
        batches: reads and augments the images.
        request: indices [B] and augmentation [B, U] of the whole batch, with the partners chosen; or None.
        part: the slice.
    """
    if request is None:
        return None
    assert request.index is not None  # partners are chosen
    return batches.batch(part.select(request.index), part.select(request.augment))
