"""The live view: what a terminal shows of the training under way, the last epoch beside the one that runs.

A look reads from the device between two steps, never inside one, and changes nothing. The errors of an epoch are what
the confusion counts K have grown by since it began: by row they give the accuracy of classes, by cell the pairs. So
training sums nothing for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cpmix_cli.data.longtail import GROUPS, group_of
from cpmix_cli.step import Plan, Step, TrainingData, TrainingState, sum_names

NUM_PAIRS = 5


@dataclass(frozen=True)
class Look:
    """An epoch, or what is done of it."""

    title: str
    numbers: dict[str, str]
    """Label of a row -> what stands there."""
    confusions: "pd.Series[float]"
    """Errors by true class * C + predicted class; none where they are not counted."""


class LiveView:
    """What the terminal shows of a phase.

    Args:
        plan: what is run.
        data: the training images.
        state: what is trained, at the beginning of this run; read and never changed.
        step: takes its steps.
        class_names: by class id; without them ids are shown.
    """

    def __init__(
        self, plan: Plan, data: TrainingData, state: TrainingState, step: Step, class_names: Sequence[str]
    ) -> None:
        self._plan = plan
        self._data = data
        self._state = state
        self._step = step
        self._names = class_names or [str(c) for c in range(len(data.class_counts))]
        self._groups = np.array([group_of(n) for n in data.class_counts.tolist()])
        self._before: Look | None = None
        self._begin(state.epoch, state.step)

    def table(self) -> list[tuple[str, ...]]:
        """Rows of a label, the last epoch and the one under way, the heading first and the most telling next."""
        looks = [look for look in (self._before, self._look()) if look is not None]
        rows = [("", *(look.title for look in looks))]
        for label in looks[-1].numbers:
            rows.append((label, *(look.numbers.get(label, "") for look in looks)))
        total = pd.concat([look.confusions for look in looks]).groupby(level=0).sum()
        most = total[total > 0].nlargest(NUM_PAIRS)
        if len(most):
            rows.append(("images of a class taken for another", *("" for _ in looks)))
        for pair in most.index:
            true, predicted = divmod(int(pair), len(self._names))
            counts = (f"{look.confusions.get(pair, 0):.0f}" for look in looks)
            rows.append((f"  {self._names[true]} as {self._names[predicted]}", *counts))
        return rows

    def end_epoch(self) -> None:
        """The epoch under way is complete, and its sums and counts are still there."""
        self._before = self._look()
        self._begin(self._state.epoch + 1, 0)

    def _begin(self, epoch: int, step: int) -> None:
        """From this step on the growth of K is looked at."""
        self._since = step
        self._base = self._counts()
        if step == 0 and epoch > self._plan.confusion_start:  # the epoch will begin with it
            self._base *= self._plan.confusion_decay

    def _counts(self) -> "pd.Series[float]":
        """K without its zeros: that of many classes is nearly empty."""
        counts = self._state.confusion.flatten()
        where = counts.nonzero()[:, 0]
        return pd.Series(counts[where].cpu().numpy(), index=where.cpu().numpy())

    def _look(self) -> Look:
        plan, state = self._plan, self._state
        num_samples = len(self._data.labels)
        sums = dict(zip(sum_names(plan.terms), state.sums.tolist(), strict=True))
        numbers = {"loss": f"{sums['loss'] / state.step:.4f}"}
        if len(plan.terms) > 1:
            numbers |= {f"  {term.name}": f"{sums[f'loss_{term.name}'] / state.step:.4f}" for term in plan.terms}
        if seen := min(state.step * plan.batch_size, num_samples) * len(plan.measured_terms):
            numbers["train accuracy, %"] = f"{100 * sums['correct'] / seen:.2f}"
        confusions: pd.Series[float] = pd.Series(dtype=np.float64)
        if plan.counts_errors(state.epoch):
            confusions = self._counts().sub(self._base, fill_value=0).round()
            if not plan.confusion_of_each:  # then an image has an error of every expert
                numbers |= self._group_accuracy(confusions)
        title = f"epoch {state.epoch}"
        whole = state.step == plan.num_steps(num_samples)
        return Look(title if whole else f"{title} so far", numbers, confusions)

    def _group_accuracy(self, confusions: "pd.Series[float]") -> dict[str, str]:
        """Mean accuracy of the classes of each group, as `evaluate` means it; of those that were seen."""
        images = self._step.counted_images(self._since).cpu().numpy()
        errors = np.bincount(confusions.index // len(images), confusions, len(images))
        accuracy = 1 - errors / np.where(images > 0, images, np.nan)
        found = {group: accuracy[(self._groups == group) & (images > 0)] for group in GROUPS}
        return {f"  {group}": f"{100 * part.mean():.2f}" if len(part) else "-" for group, part in found.items()}
