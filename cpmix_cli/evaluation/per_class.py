"""Numbers of each class in an evaluation: precision, recall, F1 and an interval, as a table, as JSON and as lines.

Shapes: C classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cpmix_cli.artifacts import files, tables
from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.evaluation.intervals import of_mean, wilson
from cpmix_cli.runs import run_json
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import counted, shortened
from cpmix_cli.runtime.rounding import percent

_SHOWN = 20
Array = NDArray[Any]


def class_columns(matrix: Array, profile: Array | None = None) -> dict[str, Any]:
    """Return the columns of per_class.parquet that follow from a confusion matrix, in per cent; NaN if undefined.

    A class without test images has no recall, precision and F1, since none of its predictions could be right. A class
    that is never predicted has no precision, and F1 0, as in scikit-learn.

    Args:
        matrix: test images of true class (row) and predicted class (column) [C, C].
        profile: test images per class [C] of a long-tailed test set. Precision and F1 are those of such a test set.
    """
    tested, correct = matrix.sum(1), matrix.diagonal()
    counts = matrix.astype(np.float64)
    if profile is not None:
        counts *= (profile / tested)[:, None]
    low, high = wilson(correct, tested)
    with np.errstate(invalid="ignore", divide="ignore"):
        hits = np.where(tested > 0, counts.diagonal(), np.nan)
        precision, f1 = hits / counts.sum(0), 2 * hits / (counts.sum(0) + counts.sum(1))
        accuracy = correct / tested
    return {
        "num_test": tested,
        "num_correct": correct,
        "accuracy": 100 * accuracy,
        "num_predicted": matrix.sum(0),
        "precision": 100 * precision,
        "f1": 100 * f1,
        "recall_low": 100 * low,
        "recall_high": 100 * high,
    }


def totals(matrix: Array, groups: Sequence[str], profile: Array | None = None) -> dict[str, Any]:
    """Return macro F1 and the 95 % intervals of the accuracies of metrics.json, in per cent.

    top1 has Wilson's interval. Groups and balanced accuracy are means of class accuracies, and so is top1 of a
    long-tailed test set: see intervals.of_mean(). Macro F1 is the mean over the classes with test images.

    Args:
        matrix: confusion matrix [C, C].
        groups: group of each class [C].
        profile: as for class_columns().
    """
    tested, correct = matrix.sum(1), matrix.diagonal()
    chosen = {"top1": tested > 0, **{name: (np.array(groups) == name) & (tested > 0) for name in GROUPS}}
    chosen["balanced_accuracy"] = tested > 0
    found: dict[str, list[float] | None] = {}
    for name, which in chosen.items():
        if not which.any():
            found[name] = None
        elif name == "top1" and profile is None:
            found[name] = _percent(*wilson(correct.sum(), tested.sum()))
        else:
            weights = profile[which] if name == "top1" and profile is not None else None
            found[name] = _percent(*of_mean(correct[which], tested[which], weights))
    return {"macro_f1": round(float(np.nanmean(class_columns(matrix, profile)["f1"])), 2), "intervals": found}


def _percent(*ends: Any) -> list[float]:
    return [round(100 * float(end), 4) for end in ends]  # people read them with one decimal


def read_classes(evaluation: Path) -> pd.DataFrame:
    """Read per_class.parquet. What an evaluation of an older version lacks is NaN.

    Raises:
        InputError: it is missing or damaged.
    """
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    path, sha = run_json.output_of(evaluation, record, files.PER_CLASS)
    return tables.read_per_class(path, sha)


def as_json(classes: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of read_classes() as JSON objects, in per cent with two decimals; null where undefined."""
    renamed = classes.rename(columns={"accuracy": "recall"}).drop(columns="num_correct")
    rows: list[dict[Any, Any]] = renamed.to_dict("records")
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = None if math.isnan(value) else round(value, 2)
        row["recall_interval"] = [row.pop("recall_low"), row.pop("recall_high")]
    return rows


def interval_row(intervals: dict[str, Any]) -> list[str]:
    """Return the table row of the intervals under saved.ACCURACY_HEADER."""
    ends = (intervals.get(name) for name in ("top1", *GROUPS, "balanced_accuracy"))
    return ["  95 % interval", *(f"{percent(e[0], 1)}-{_end(e[1])}" if e else "-" for e in ends), "", ""]


def _end(share: float) -> str:
    """Return the upper end of an interval in per cent, "100" where it would be one character wider than others."""
    return percent(share, 1).replace("100.0", "100")


def lines_of(classes: pd.DataFrame, macro_f1: float, evaluation: Path) -> list[str]:
    """Return a table of the classes, the rarest last, or of the least recognised of many classes, and remarks."""
    rows, title = classes.sort_values(["num_train", "class_id"], ascending=[False, True]), "classes"
    if len(classes) > _SHOWN:
        rows = rows[rows["num_test"] > 0].sort_values(["f1", "num_train"], kind="stable").head(_SHOWN)
        title = f"the {len(rows)} classes of lowest F1, of {len(classes):,}"
    header = ("class", ">training images", ">test images", ">precision", ">recall", ">95 % interval", ">F1")
    cells = [
        [
            *(str(row.class_name), f"{row.num_train:,}", f"{row.num_test:,}"),
            *(_cell(row.precision), _cell(row.accuracy)),
            _interval(row.recall_low, row.recall_high) if row.num_test else "-",
            _cell(row.f1),
        ]
        for row in rows.itertuples()
    ]
    lines = console.table_lines(header, cells, title=f"{title}, per cent; macro F1 {percent(macro_f1, 2)}")
    if len(classes) > _SHOWN:
        lines.append(f"all classes: {evaluation / files.PER_CLASS}, and --json")
    if single := classes["class_name"][classes["num_test"] == 1].tolist():
        lines.append(
            f"{counted(len(single), 'class has', 'classes have')} 1 test image, so the recall can only be 0 or 100: "
            f"{shortened(single, 5)}"
        )
    return ["", *lines, ""]


def _interval(low: Any, high: Any) -> str:
    return f"{percent(low, 1)}-{percent(high, 1)}"


def _cell(share: Any) -> str:
    return "-" if math.isnan(share) else percent(share, 2)
