"""Thresholds of the confidence, one per class, chosen on the val split for a precision or a recall.

A prediction below the threshold of its class is undecided. Shapes: C classes, N images.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cpmix_cli.evaluation.intervals import LEAST_IMAGES
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import UsageError, counted, shortened
from cpmix_cli.runtime.rounding import percent

_SHOWN = 20


@dataclass(frozen=True)
class Target:
    """Value of --threshold-for."""

    measure: Literal["precision", "recall"]
    share: float

    def __str__(self) -> str:
        return f"{self.measure}={self.share:g}"


def target_of(text: str) -> Target:
    """Read a value of --threshold-for, such as precision=0.9; raises UsageError for any other text."""
    found = re.fullmatch(r"(precision|recall)=(0?\.\d+|1(?:\.0*)?)", text)
    if found is None or not float(found[2]):
        raise UsageError(
            f'--threshold-for "{text}" is neither a precision nor a recall above 0 and up to 1',
            fix="give a value such as --threshold-for precision=0.9",
        )
    return Target("precision" if found[1] == "precision" else "recall", float(found[2]))


@dataclass(frozen=True)
class Scored:
    """Predictions of N images with their true classes."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]

    def reached(self, c: int, threshold: float) -> tuple[int, int, float, float]:
        """Return images decided as class c, those right, and precision and recall of class c; NaN if undefined."""
        decided = (self.predicted == c) & (self.confidence >= threshold)
        right, tested = int((decided & (self.labels == c)).sum()), int((self.labels == c).sum())
        number = int(decided.sum())
        return number, right, right / number if number else math.nan, right / tested if tested else math.nan


def choose(target: Target, val: Scored, c: int) -> float:
    """Return the threshold of class c; infinite if none reaches the target.

    For a precision it is the smallest one that reaches it, which decides most images. For a recall it is the largest
    one, since each smaller one has at least this recall. If even threshold 0 has less, it is 0.
    """
    own = val.predicted == c
    order = np.argsort(-val.confidence[own], kind="stable")
    confidence, right = val.confidence[own][order], (val.labels[own] == c)[order].cumsum()
    last = np.append(confidence[1:] != confidence[:-1], True) if len(confidence) else np.empty(0, bool)  # of equal ones
    if target.measure == "precision":
        reached = np.flatnonzero(last & (right / np.arange(1, len(right) + 1) >= target.share))
        return float(confidence[reached[-1]]) if len(reached) else math.inf
    reached = np.flatnonzero(last & (right >= target.share * max(1, (val.labels == c).sum())))
    return float(confidence[reached[0]]) if len(reached) else 0.0


def columns_of(target: Target, names: Sequence[str], val: Scored, test: Scored) -> dict[str, list[Any]]:
    """Return the columns of thresholds.parquet: chosen on val, measured on the test images. Shares are in per cent.

    Args:
        target: what to reach.
        names: class names [C].
        val: predictions of the val split.
        test: predictions of the measured images.
    """
    rows = []
    for c, name in enumerate(names):
        threshold = choose(target, val, c)
        number, _, val_precision, val_recall = val.reached(c, threshold)
        decided, right, precision, recall = test.reached(c, threshold)
        rests_on = number if target.measure == "precision" else int((val.labels == c).sum())
        row = {
            "class_id": c,
            "class_name": name,
            "threshold": threshold if math.isfinite(threshold) else None,
            "num_val": rests_on,
            "val_precision": 100 * val_precision,
            "val_recall": 100 * val_recall,
            "num_predicted": int((test.predicted == c).sum()),
            "num_decided": decided,
            "num_correct": right,
            "precision": 100 * precision,
            "recall": 100 * recall,
        }
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]}


def as_json(target: str, table: pd.DataFrame) -> dict[str, Any]:
    """Return thresholds.parquet as a JSON object; shares in per cent with two decimals, thresholds as they are."""
    classes: list[dict[Any, Any]] = table.to_dict("records")
    for row in classes:
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = None if math.isnan(value) else value if name == "threshold" else round(value, 2)
    decided, images = int(table["num_decided"].sum()), int(table["num_predicted"].sum())
    return {
        "for": target,
        "num_decided": decided,
        "num_undecided": images - decided,
        "accuracy_of_decided": round(100 * float(table["num_correct"].sum()) / decided, 2) if decided else None,
        "classes": classes,
    }


def warn_of(target: str, table: pd.DataFrame) -> None:
    """Name the classes whose target is not reached on val, and those whose threshold rests on too few val images."""
    measure, _, share = target.partition("=")
    short = table[f"val_{measure}"].fillna(0) < 100 * float(share) - 1e-9
    if missed := table["class_name"][short].tolist():
        rest = "their images stay undecided" if measure == "precision" else "all of their images are decided"
        console.warn(f"{target} is not reached on val for {shortened(missed, 5)}: {rest}")
    few = table[~short & (table["num_val"] < LEAST_IMAGES)]
    if named := [f"{name} ({number})" for name, number in zip(few["class_name"], few["num_val"], strict=True)]:
        console.warn(
            f"thresholds that rest on fewer than {LEAST_IMAGES} val images, which say little: {shortened(named, 5)}"
        )


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return as_json() as a table and a line."""
    header = ("class", ">threshold", ">val images", ">precision", ">recall", ">decided", ">undecided")
    rows = [
        [
            *(row["class_name"], "-" if row["threshold"] is None else f"{row['threshold']:.4f}", f"{row['num_val']:,}"),
            *("-" if row[name] is None else percent(row[name], 2) for name in ("precision", "recall")),
            *(f"{row['num_decided']:,}", f"{row['num_predicted'] - row['num_decided']:,}"),
        ]
        for row in found["classes"]
    ]
    title = f"thresholds for {found['for']}, chosen on val, measured here"
    lines = console.table_lines(header, rows[:_SHOWN], title=title)
    if len(rows) > _SHOWN:
        more = counted(len(rows) - _SHOWN, "more class", "more classes")
        lines.append(f"... and {more}; --json and thresholds.parquet have all")
    images = found["num_decided"] + found["num_undecided"]
    right = found["accuracy_of_decided"]
    accuracy = "" if right is None else f", {percent(right, 2)} % of them right"
    lines.append(f"{found['num_decided']:,} of {images:,} images are decided{accuracy}")
    return [*lines, ""]
