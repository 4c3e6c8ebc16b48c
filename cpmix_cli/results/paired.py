"""Differences between two rows of compare: accuracy paired by seed with t intervals, and error shift.

Shapes: n pairs of runs, C classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from cpmix_cli.evaluation.error_shift import most_confused_pairs, split_errors
from cpmix_cli.results.comparison import ComparisonRow, EvaluatedRun
from cpmix_cli.results.table_formats import Sheet
from cpmix_cli.runtime.rounding import percent, signed

MEASURES = ("top1", "many", "medium", "few")
"""Accuracies with a paired difference, per cent."""


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, with its 95 % t interval."""

    mean: float
    half_width: float | None
    """Mean plus and minus this is the interval; None for one pair, which has no deviation."""


@dataclass(frozen=True)
class ErrorShift:
    """Wrong predictions in per cent of the test images, from one row to another: means over the pairs."""

    before: float
    after: float
    change: Difference


@dataclass(frozen=True)
class PairedRows:
    """Two rows of compare, and their runs that belong together."""

    number: int
    """Number of the row, from 1."""
    base_number: int
    """Number of the row that is subtracted."""
    pairs: list[tuple[EvaluatedRun, EvaluatedRun]]
    """Runs of the row and of the base, of one seed or one after the other."""

    def difference(self, measure: str) -> Difference | None:
        """Return the difference of a measure of MEASURES in per cent points; None if a run has no such group."""
        found = [(getattr(run.numbers, measure), getattr(base.numbers, measure)) for run, base in self.pairs]
        return None if any(None in values for values in found) else _mean_difference([a - b for a, b in found])

    def fields(self) -> dict[str, Any]:
        """Return the differences as plain values in full precision."""
        shifts = dict(zip(("most_confused_pairs", "other_pairs"), self.error_shift, strict=True))
        return {
            "row": self.number,
            "minus_row": self.base_number,
            "n": len(self.pairs),
            "seeds": [run.seed for run, _ in self.pairs],
            **{key: found and asdict(found) for key in MEASURES for found in [self.difference(key)]},
            "errors": {name: asdict(shift) for name, shift in shifts.items()},
        }

    @cached_property
    def error_shift(self) -> tuple[ErrorShift, ErrorShift]:
        """Errors on the class pairs that the training of the base confused most, and all other errors.

        See error_shift.most_confused_pairs().

        Raises:
            InputError: predictions or confusion pairs are missing or damaged.
        """
        errors = np.array([_errors(run, base) for run, base in self.pairs])  # [n, run or base, most confused or other]
        most_confused, other = (
            ErrorShift(
                fmean(errors[:, 1, part]),
                fmean(errors[:, 0, part]),
                _mean_difference((errors[:, 0, part] - errors[:, 1, part]).tolist()),
            )
            for part in (0, 1)
        )
        return most_confused, other


def paired_rows(rows: Sequence[ComparisonRow], reference: Path) -> list[PairedRows]:
    """Pair rows: each with the row of the checkpoints that it started from, then with the row of the reference.

    A row and the reference's row of the same data set and stage are paired by seed. A seed that a row has twice is left
    out, because its runs have no counterpart.

    Args:
        rows: all rows of a comparison, in their order.
        reference: run folder whose rows are subtracted from others.
    """
    found = [
        PairedRows(number, base_number, pairs)
        for number, row in enumerate(rows, start=1)
        for base_number, base in enumerate(rows, start=1)
        if (pairs := _continued(row, base))
    ]
    for base_number, base in enumerate(rows, start=1):
        if reference.resolve() in {run.run.resolve() for run in base.runs}:
            alike = [(n, row) for n, row in enumerate(rows, start=1) if n != base_number and _are_alike(row, base)]
            found += [PairedRows(n, base_number, pairs) for n, row in alike if (pairs := _of_one_seed(row, base))]
    return found


def _continued(row: ComparisonRow, base: ComparisonRow) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    """Return the runs of a row that started from a checkpoint of the base, evaluated on the same images."""
    if row.first.tested_on != base.first.tested_on:
        return []
    bases = {run.checkpoint: run for run in base.runs}
    return [(run, bases[run.started_from]) for run in row.runs if run.started_from in bases]


def _are_alike(row: ComparisonRow, base: ComparisonRow) -> bool:
    return (row.first.stage, row.first.tested_on) == (base.first.stage, base.first.tested_on)


def _of_one_seed(row: ComparisonRow, base: ComparisonRow) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    ours, theirs = _once(row.runs), _once(base.runs)
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _once(runs: Sequence[EvaluatedRun]) -> dict[int, EvaluatedRun]:
    times = Counter(run.seed for run in runs)
    return {run.seed: run for run in runs if times[run.seed] == 1}


def _mean_difference(values: Sequence[float]) -> Difference:
    n = len(values)
    if n == 1:
        return Difference(values[0], None)
    return Difference(fmean(values), t_quantile(n - 1) * stdev(values) / n**0.5)


# Importing scipy.special takes a quarter of a second, a third of a compare.
_T_975 = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
)


def t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t distribution with `degrees` >= 1 degrees of freedom."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def _errors(run: EvaluatedRun, base: EvaluatedRun) -> list[list[float]]:
    """Return errors on the most confused pairs and other errors, of the run and of the base, per cent of the images."""
    pairs = most_confused_pairs(base.confusions)
    return [[100 * n / m.sum() for n in split_errors(m, pairs)] for m in (run.matrix, base.matrix)]


def sheets_of(pairs: Sequence[PairedRows], *, with_deviations: bool) -> list[Sheet]:
    """Make a table of the accuracy differences and one of the error shifts.

    Args:
        pairs: rows to compare.
        with_deviations: whether all measures show their interval, or only top-1.
    """

    def accuracy(pair: PairedRows, measure: str) -> str:
        found = pair.difference(measure)
        if found is None:
            return "-"
        return _shown(found) if with_deviations or measure == "top1" else signed(found.mean, 2)

    named = [(f"{pair.number} - {pair.base_number}", str(len(pair.pairs)), pair) for pair in pairs]
    accuracies = Sheet(
        "paired differences, per cent points",
        ["rows", ">n", ">top-1", ">many", ">medium", ">few"],
        [[name, n, *(accuracy(pair, measure) for measure in MEASURES)] for name, n, pair in named],
        [
            "2 - 1: row 2 minus row 1; mean over n pairs (same seed, or a phase and the one it started from)",
            *(["+-: 95 % t interval over the pairs"] if any(len(pair.pairs) > 1 for pair in pairs) else []),
        ],
    )
    columns = [(shift.before, shift.after, shift.change) for pair in pairs for shift in pair.error_shift]
    cells = [[percent(before, 2), percent(after, 2), _shown(change)] for before, after, change in columns]
    shifts = Sheet(
        "error shift, per cent of the test images",
        ["rows", ">confused pairs", ">to", ">change", ">other pairs", ">to", ">change"],
        [[name, *cells[2 * i], *cells[2 * i + 1]] for i, (name, _, _) in enumerate(named)],
        [
            "confused pairs: half of each class's confusions in training, in the row that is subtracted",
            "other pairs: all other errors",
        ],
    )
    return [accuracies, shifts]


def _shown(difference: Difference) -> str:
    half = "" if difference.half_width is None else f" +- {percent(difference.half_width, 2)}"
    return f"{signed(difference.mean, 2)}{half}"
