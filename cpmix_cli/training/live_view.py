"""The live view: what a terminal shows of the training under way, the last epoch beside the one that runs.

It reads from the device between two steps, never inside one, and changes nothing. The errors of an epoch are what the
confusion counts K have grown by since it began: by row they give the accuracy of classes, by cell the pairs. So
training sums nothing for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS, group_of
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.step import Step

NUM_PAIRS = 5

Cells = tuple[NDArray[np.int64], NDArray[np.float64]]
"""K without its zeros, as that of many classes nearly is: true class * C + predicted class, and the count."""


@dataclass(frozen=True)
class Reading:
    """What is read of an epoch; to be made sense of only when it is shown."""

    epoch: int
    step: int
    sums: dict[str, float]
    began: Cells
    """K at the beginning of the epoch, or of this run's part of it."""
    cells: Cells
    images: NDArray[np.float64]
    """Of each class [C], since then, whose errors are counted."""


class LiveView:
    """What the terminal shows of a phase.

    Args:
        plan: what is run.
        data: the training images.
        state: what is trained, at the beginning of this run; read and never changed.
        step: takes its steps.
        class_names: by class id; without them ids are shown.
        few_inclusive: classes of exactly 20 training images are few, as build-lt was told.
    """

    def __init__(
        self,
        plan: Plan,
        data: TrainingData,
        state: TrainingState,
        step: Step,
        class_names: Sequence[str],
        few_inclusive: bool = False,
    ) -> None:
        self._plan = plan
        self._num_samples = len(data.labels)
        self._state = state
        self._step = step
        self._names = class_names or [str(c) for c in range(len(data.class_counts))]
        self._groups = np.array([group_of(n, few_inclusive=few_inclusive) for n in data.class_counts.tolist()])
        self._before: Reading | None = None
        self._begin(state.epoch, state.step, self._cells())

    def table(self) -> list[tuple[str, ...]]:
        """Rows of a label, the last epoch and the one under way, the heading first and the most telling next."""
        epochs = [reading for reading in (self._before, self._read()) if reading is not None]
        rows = [("", *map(self._title, epochs))]
        confusions = [self._confusions(reading) for reading in epochs]
        numbers = [self._numbers(*each) for each in zip(epochs, confusions, strict=True)]
        rows += [(label, *(found.get(label, "") for found in numbers)) for label in numbers[-1]]
        pairs = pd.concat(confusions, axis=1).fillna(0)
        pairs = pairs.loc[pairs.sum(axis=1).nlargest(NUM_PAIRS).index]
        if len(pairs):
            rows.append(("images of a class taken for another", *("" for _ in epochs)))
        for pair, counts in zip(pairs.index, pairs.to_numpy(), strict=True):
            true, predicted = divmod(int(pair), len(self._names))
            rows.append((f"  {self._names[true]} as {self._names[predicted]}", *(f"{count:.0f}" for count in counts)))
        return rows

    def end_epoch(self) -> None:
        """The epoch under way is complete, and its sums and counts are still there."""
        self._before = self._read()
        self._begin(self._state.epoch + 1, 0, self._before.cells)

    def _begin(self, epoch: int, step: int, cells: Cells) -> None:
        """From this step on the growth of K is looked at."""
        self._since = step
        fades = step == 0 and epoch > self._plan.confusion_start  # the epoch will begin with it
        self._began = (cells[0], cells[1] * self._plan.confusion_decay) if fades else cells

    def _cells(self) -> Cells:
        counts = self._state.confusion.flatten()
        where = counts.nonzero()[:, 0]
        return where.cpu().numpy(), counts[where].cpu().numpy()

    def _read(self) -> Reading:
        state = self._state
        return Reading(state.epoch, state.step, state.sums.read(), self._began, self._cells(), self._images())

    def _images(self) -> NDArray[np.float64]:
        """Images of each class [C] that the epoch has taken where their errors are counted."""
        plan, term, epoch = self._plan, self._plan.counted_term, self._step.inputs.epoch
        images = torch.zeros(len(self._names), dtype=torch.float64)
        if term is None or epoch is None:
            return images.numpy()
        draws = epoch.draws.terms[plan.terms.index(term)]
        labels = draws.labels.cpu()
        counted = torch.ones(len(labels), dtype=torch.float64)
        if draws.mixing is not None and draws.mixing.gate is not None:  # in the batches that it leaves unmixed
            counted -= draws.mixing.gate[:, 0].cpu()
        size = plan.batch_size
        taken = slice(self._since * size, min(self._state.step * size, self._num_samples))
        counted = counted.repeat_interleave(size)[taken]
        return images.index_add_(0, labels.flatten()[taken], counted).numpy()

    def _title(self, reading: Reading) -> str:
        whole = reading.step == self._plan.num_steps(self._num_samples)
        return f"epoch {reading.epoch}" + ("" if whole else " so far")

    def _confusions(self, reading: Reading) -> "pd.Series[float]":
        """Errors by true class * C + predicted class; none where they are not counted."""
        if not self._plan.counts_errors(reading.epoch):
            return pd.Series(dtype=np.float64)
        now, began = (pd.Series(counts, index=where) for where, counts in (reading.cells, reading.began))
        grown = now.sub(began, fill_value=0).round()
        return grown[grown > 0]

    def _numbers(self, reading: Reading, confusions: "pd.Series[float]") -> dict[str, str]:
        """Label of a row -> what stands there."""
        plan = self._plan
        sums = reading.sums
        numbers = {"loss": f"{sums['loss'] / reading.step:.4f}"}
        if len(plan.terms) > 1:
            numbers |= {f"  {term.name}": f"{sums[f'loss_{term.name}'] / reading.step:.4f}" for term in plan.terms}
        if seen := min(reading.step * plan.batch_size, self._num_samples) * len(plan.measured_terms):
            numbers["train accuracy, %"] = f"{100 * sums['correct'] / seen:.2f}"
        if plan.counts_errors(reading.epoch):
            numbers |= self._group_accuracy(confusions, reading.images)
        return numbers

    def _group_accuracy(self, confusions: "pd.Series[float]", images: NDArray[Any]) -> dict[str, str]:
        """Mean accuracy of the classes of each group, as `evaluate` means it; of those that were seen."""
        errors = np.bincount(confusions.index // len(images), confusions, len(images))
        accuracy = 1 - errors / np.where(images > 0, images, np.nan)
        found = {group: accuracy[(self._groups == group) & (images > 0)] for group in GROUPS}
        return {f"  {group}": f"{100 * part.mean():.2f}" if len(part) else "-" for group, part in found.items()}
