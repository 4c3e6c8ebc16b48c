"""Metrics of an epoch: columns of metrics.parquet, their values, the line on the console. Add a column here."""

from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from cpmix_cli.artifacts.files import METRICS
from cpmix_cli.artifacts.tables import read_table, schema_of
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runtime.errors import InputError

if TYPE_CHECKING:  # importing torch takes seconds, and compare reads metrics without it
    from cpmix_cli.training.plan import Plan
    from cpmix_cli.training.state import TrainingState

_COLUMNS = (  # one column `loss_<term>` per term follows `loss`
    "epoch int64",
    "learning_rate double",
    "loss double",
    "gradient_norm double",
    "train_accuracy double?",
    "num_confusions int64?",
    "num_fallbacks int64",
    "test_accuracy double?",
    "images_per_second double",
    "seconds double",
)


def metrics_schema(terms: list[str]) -> pa.Schema:
    """Return the schema of metrics.parquet for a phase with these terms: one row per epoch.

    - learning_rate, loss and gradient_norm (L2 over all trained parameters): means over the epoch's steps.
    - train_accuracy (fraction), num_confusions: null without unmixed batches.
    - num_fallbacks: partners drawn for a class without confusions.
    - test_accuracy (fraction): null except in the epochs of --eval-every.
    - images_per_second: an image counts once per forward pass.
    """
    return schema_of(*_COLUMNS[:3], *(f"loss_{term} double" for term in terms), *_COLUMNS[3:])


def read_metrics(folder: PhaseFolder) -> pd.DataFrame:
    """Read metrics.parquet of a done phase.

    Raises:
        InputError: the file is missing or damaged, has no rows, or lacks a column.
    """
    path, sha = folder.output(METRICS)
    table = read_table(path, sha=sha)
    if table.empty or not {column.split()[0] for column in _COLUMNS} <= set(table.columns):
        raise InputError(f"{path} has no rows, or lacks a column of the metrics of {folder.phase}", path=path)
    return table


def metrics_row(plan: "Plan", state: "TrainingState", num_samples: int) -> dict[str, float | None]:
    """Return the row of metrics.parquet for the finished epoch.

    Args:
        plan: gives the terms and the learning rates.
        state: at the end of the epoch, with its sums.
        num_samples: training images per epoch.
    """
    sums = state.sums.read()
    steps = plan.num_steps(num_samples)
    counts = plan.collect_confusion and plan.counted_term is not None
    seen = num_samples * len(plan.measured_terms)
    return {
        "epoch": state.epoch,
        "learning_rate": sum(plan.learning_rate(state.epoch, step, steps) for step in range(steps)) / steps,
        "loss": sums["loss"] / steps,
        **{f"loss_{term.name}": sums[f"loss_{term.name}"] / steps for term in plan.terms},
        "gradient_norm": sums["gradient_norm"] / steps,
        "train_accuracy": sums["correct"] / seen if seen else None,
        "num_confusions": sums["errors"] if counts else None,
        "num_fallbacks": sums["fallbacks"],
        "test_accuracy": None,
        "images_per_second": num_samples * plan.num_passes / sums["seconds"],
        "seconds": sums["seconds"],
    }


def epoch_line(plan: "Plan", row: dict[str, float | None]) -> str:
    """Format a row of metrics_row() as one console line of key=value pairs."""
    parts = [f"{plan.phase} epoch={row['epoch']:.0f}/{plan.last_epoch}"]
    parts += [f"lr={row['learning_rate']:.4g}", f"loss={row['loss']:.4f}"]
    if len(plan.terms) > 1:
        parts += [f"loss_{t.name}={row[f'loss_{t.name}']:.4f}" for t in plan.terms]
    if row["train_accuracy"] is not None:
        parts.append(f"train_accuracy={100 * row['train_accuracy']:.2f}%")
    if row["num_confusions"] is not None:
        parts.append(f"confusions={row['num_confusions']:.0f}")
    if row["num_fallbacks"]:
        parts.append(f"fallbacks={row['num_fallbacks']:.0f}")
    if row["test_accuracy"] is not None:
        parts.append(f"test_accuracy={100 * row['test_accuracy']:.2f}%")
    parts += [f"images/s={row['images_per_second']:.0f}", f"seconds={row['seconds']:.1f}"]
    return " ".join(parts)
