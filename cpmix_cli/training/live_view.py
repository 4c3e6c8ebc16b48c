"""The live view: a terminal table of the training in progress, the last epoch beside the current one.

The view reads from the device between two steps and changes nothing. It subtracts the confusion counts K at the start
of the epoch from K now. Row sums are errors per class, cells are errors per class pair. So training keeps no extra sums
for the view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS, group_of
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import sparkline
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.step import Step

_NUM_PAIRS = 5
_ACCURACY = "train acc, %"
_TREND_WIDTH = 16


class _Column(NamedTuple):
    """Column of the table: one epoch."""

    title: str
    numbers: dict[str, str]
    """Formatted values by row label."""
    errors: "pd.Series[float]"
    """Errors by true class * C + predicted class; empty if the epoch counts no errors."""


@dataclass
class LiveView:
    """Table of a phase for the terminal, made when the run begins. It reads `state` and never changes it."""

    plan: Plan
    data: TrainingData
    state: TrainingState
    step: Step
    class_names: Sequence[str]
    """Names by class id; if empty, the table shows ids."""
    few_inclusive: bool = False
    """Classes of exactly 20 training images belong to "few" (build-lt --few-inclusive)."""

    def __post_init__(self) -> None:
        counts = self.data.class_counts.tolist()
        self._names = self.class_names or [str(c) for c in range(len(counts))]
        self._groups = np.array([group_of(n, few_inclusive=self.few_inclusive) for n in counts])
        self._before: _Column | None = None
        self._since = self.state.step
        """First step that the current column covers: 0, or the step at which this run resumed."""
        self._began = self._confusion()
        """K before that step."""
        if self.state.step == 0:
            self._fade(self.state.epoch)

    def table(self) -> list[tuple[str, ...]]:
        """Return rows of label, last epoch, current epoch: the heading, the numbers, then the most frequent errors.

        Labels of loss and accuracy end with their course over the epochs of the phase. The pairs are those that are
        confused most in the current epoch; of equal ones, those of the last epoch.
        """
        now = self._column()
        epochs = [column for column in (self._before, now) if column is not None]
        rows = [("", *(column.title for column in epochs))]
        for label in now.numbers:
            cells = [column.numbers.get(label, "") for column in epochs]
            rows.append((f"{label:<14}{self._trend(label, cells[-1])}".rstrip(), *cells))
        pairs = pd.concat([column.errors for column in reversed(epochs)], axis=1).fillna(0)
        pairs = pairs.sort_values(list(pairs.columns), ascending=False, kind="stable").iloc[:_NUM_PAIRS, ::-1]
        if len(pairs):
            rows.append(("images of one class as another", *("" for _ in epochs)))
        for pair, counts in zip(pairs.index, pairs.to_numpy(), strict=True):
            true, predicted = divmod(int(pair), len(self._names))
            rows.append((f"  {self._names[true]} as {self._names[predicted]}", *(f"{count:.0f}" for count in counts)))
        return rows

    def _trend(self, label: str, now: str) -> str:
        """Return the course of a row's number over the epochs of the phase up to now; "" for rows without one."""
        column = {"loss": "loss", _ACCURACY: "train_accuracy"}.get(label)
        if column is None or not self.state.history:
            return ""
        scale = 100 if column == "train_accuracy" else 1
        past = [value if (value := row[column]) is None else scale * value for row in self.state.history]
        return sparkline([*past, float(now)], _TREND_WIDTH)

    def end_epoch(self) -> None:
        """Keep the completed epoch as the last one. Call it before the epoch's sums are reset."""
        self._before = self._column()
        self._since, self._began = 0, self._confusion()
        self._fade(self.state.epoch + 1)

    def _fade(self, epoch: int) -> None:
        """Apply the confusion decay to the remembered K, as the loop does to K when the epoch begins."""
        if epoch > self.plan.confusion_start:
            self._began *= self.plan.confusion_decay

    def _confusion(self) -> "pd.Series[float]":
        """Return the nonzero cells of K by flat index; with many classes nearly all cells are zero."""
        counts = self.state.confusion.flatten()
        where = counts.nonzero()[:, 0]
        return pd.Series(counts[where].cpu().numpy(), index=where.cpu().numpy())

    def _column(self) -> _Column:
        """Return the column of the current epoch."""
        plan, epoch, step, sums = self.plan, self.state.epoch, self.state.step, self.state.sums.read()
        errors: pd.Series[float] = pd.Series(dtype=np.float64)
        if plan.counts_errors(epoch):
            grown = self._confusion().sub(self._began, fill_value=0).round()
            errors = grown[grown > 0]
        numbers = {"loss": f"{sums['loss'] / step:.4f}"}
        if len(plan.terms) > 1:
            numbers |= {f"  {term.name}": f"{sums[f'loss_{term.name}'] / step:.4f}" for term in plan.terms}
        if seen := min(step * plan.batch_size, len(self.data.labels)) * len(plan.measured_terms):
            numbers[_ACCURACY] = percent(100 * sums["correct"] / seen, 2)
        if plan.counts_errors(epoch):
            numbers |= self._group_accuracy(errors)
        whole = step == plan.num_steps(len(self.data.labels))
        return _Column(f"epoch {epoch}" + ("" if whole else " so far"), numbers, errors)

    def _group_accuracy(self, errors: "pd.Series[float]") -> dict[str, str]:
        """Return the mean class accuracy of each group in percent, as in `evaluate`, over the classes seen so far."""
        images = self._images()
        wrong = np.bincount(errors.index // len(images), errors, len(images))
        accuracy = 1 - wrong / np.where(images > 0, images, np.nan)
        found = {group: accuracy[(self._groups == group) & (images > 0)] for group in GROUPS}
        return {
            f"  {group}": percent(100 * float(part.mean()), 2) if len(part) else "-" for group, part in found.items()
        }

    def _images(self) -> NDArray[np.float64]:
        """Return the training images per class [C] float64 whose errors were counted since the column began."""
        plan, term, epoch = self.plan, self.plan.counted_term, self.step.inputs.epoch
        images = torch.zeros(len(self._names), dtype=torch.float64)
        if term is None or epoch is None:
            return images.numpy()
        draws = epoch.draws.terms[plan.terms.index(term)]
        labels = draws.labels.cpu()
        counted = torch.ones(len(labels), dtype=torch.float64)
        if draws.mixing is not None and draws.mixing.gate is not None:  # only unmixed batches
            counted -= draws.mixing.gate[:, 0].cpu()
        size = plan.batch_size
        taken = slice(self._since * size, min(self.state.step * size, len(self.data.labels)))
        counted = counted.repeat_interleave(size)[taken]
        return images.index_add_(0, labels.flatten()[taken], counted).numpy()
