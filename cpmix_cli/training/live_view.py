"""The live view: what a terminal shows of the training under way, the last epoch beside the one that runs.

It reads from the device between two steps, never inside one, and changes nothing. The errors of an epoch are what the
confusion counts K have grown by since it began: by row they give the accuracy of classes, by cell the pairs. So
training sums nothing for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class _Column(NamedTuple):
    """What is shown of an epoch."""

    title: str
    numbers: dict[str, str]
    """By the label of their row."""
    errors: "pd.Series[float]"
    """By true class * C + predicted class; none where they are not counted."""


@dataclass
class LiveView:
    """What the terminal shows of a phase. Made at the beginning of a run; reads `state` and never changes it."""

    plan: Plan
    data: TrainingData
    state: TrainingState
    step: Step
    class_names: Sequence[str]
    """By class id; without them ids are shown."""
    few_inclusive: bool = False
    """Classes of exactly 20 training images are few, as build-lt was told."""

    def __post_init__(self) -> None:
        counts = self.data.class_counts.tolist()
        self._names = self.class_names or [str(c) for c in range(len(counts))]
        self._groups = np.array([group_of(n, few_inclusive=self.few_inclusive) for n in counts])
        self._before: _Column | None = None
        self._since = self.state.step
        """First step of the epoch, or of this run's part of it."""
        self._began = self._confusion()
        """K at its beginning."""
        if self.state.step == 0:
            self._fade(self.state.epoch)

    def table(self) -> list[tuple[str, ...]]:
        """Rows of a label, the last epoch and the one under way, the heading first and the most telling next."""
        epochs = [column for column in (self._before, self._column()) if column is not None]
        rows = [("", *(column.title for column in epochs))]
        rows += [(label, *(column.numbers.get(label, "") for column in epochs)) for label in epochs[-1].numbers]
        pairs = pd.concat([column.errors for column in epochs], axis=1).fillna(0)
        pairs = pairs.loc[pairs.sum(axis=1).nlargest(NUM_PAIRS).index]
        if len(pairs):
            rows.append(("images of a class taken for another", *("" for _ in epochs)))
        for pair, counts in zip(pairs.index, pairs.to_numpy(), strict=True):
            true, predicted = divmod(int(pair), len(self._names))
            rows.append((f"  {self._names[true]} as {self._names[predicted]}", *(f"{count:.0f}" for count in counts)))
        return rows

    def end_epoch(self) -> None:
        """The epoch under way is complete, and its sums and counts are still there."""
        self._before = self._column()
        self._since, self._began = 0, self._confusion()
        self._fade(self.state.epoch + 1)

    def _fade(self, epoch: int) -> None:
        """The epoch will begin with it."""
        if epoch > self.plan.confusion_start:
            self._began *= self.plan.confusion_decay

    def _confusion(self) -> "pd.Series[float]":
        """K without its zeros, as that of many classes nearly is."""
        counts = self.state.confusion.flatten()
        where = counts.nonzero()[:, 0]
        return pd.Series(counts[where].cpu().numpy(), index=where.cpu().numpy())

    def _column(self) -> _Column:
        """The epoch under way."""
        plan, epoch, step, sums = self.plan, self.state.epoch, self.state.step, self.state.sums.read()
        errors: pd.Series[float] = pd.Series(dtype=np.float64)
        if plan.counts_errors(epoch):
            grown = self._confusion().sub(self._began, fill_value=0).round()
            errors = grown[grown > 0]
        numbers = {"loss": f"{sums['loss'] / step:.4f}"}
        if len(plan.terms) > 1:
            numbers |= {f"  {term.name}": f"{sums[f'loss_{term.name}'] / step:.4f}" for term in plan.terms}
        if seen := min(step * plan.batch_size, len(self.data.labels)) * len(plan.measured_terms):
            numbers["train accuracy, %"] = f"{100 * sums['correct'] / seen:.2f}"
        if plan.counts_errors(epoch):
            numbers |= self._group_accuracy(errors)
        whole = step == plan.num_steps(len(self.data.labels))
        return _Column(f"epoch {epoch}" + ("" if whole else " so far"), numbers, errors)

    def _group_accuracy(self, errors: "pd.Series[float]") -> dict[str, str]:
        """Mean accuracy of the classes of each group, as `evaluate` means it; of those that were seen."""
        images = self._images()
        wrong = np.bincount(errors.index // len(images), errors, len(images))
        accuracy = 1 - wrong / np.where(images > 0, images, np.nan)
        found = {group: accuracy[(self._groups == group) & (images > 0)] for group in GROUPS}
        return {f"  {group}": f"{100 * part.mean():.2f}" if len(part) else "-" for group, part in found.items()}

    def _images(self) -> NDArray[np.float64]:
        """Images of each class [C] that the epoch has taken where their errors are counted."""
        plan, term, epoch = self.plan, self.plan.counted_term, self.step.inputs.epoch
        images = torch.zeros(len(self._names), dtype=torch.float64)
        if term is None or epoch is None:
            return images.numpy()
        draws = epoch.draws.terms[plan.terms.index(term)]
        labels = draws.labels.cpu()
        counted = torch.ones(len(labels), dtype=torch.float64)
        if draws.mixing is not None and draws.mixing.gate is not None:  # in the batches that it leaves unmixed
            counted -= draws.mixing.gate[:, 0].cpu()
        size = plan.batch_size
        taken = slice(self._since * size, min(self.state.step * size, len(self.data.labels)))
        counted = counted.repeat_interleave(size)[taken]
        return images.index_add_(0, labels.flatten()[taken], counted).numpy()
