"""Metrics of an epoch: columns of metrics.parquet, their values, the line on the console. Add a column here."""

from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa

from cpmix_cli.artifacts.files import METRICS, TRAINING_STATE
from cpmix_cli.artifacts.tables import read_table, schema_of
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.run_json import verify_state
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.rounding import percent

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


LINE_WIDTH = 80
_MAY_LACK = ("terms", "fallbacks", "err", "img/s")
"""Keys of epoch_line() that are left out where there is no room, the most important first."""


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


def read_history(folder: PhaseFolder) -> dict[str, list[float | None]]:
    """Return the metrics of a begun phase's finished epochs, column -> values: of metrics.parquet, or its saved state.

    Raises:
        InputError: that file is missing or damaged.
    """
    if folder.done:
        table = read_metrics(folder)
    else:
        record, rows = verify_state(folder.path / TRAINING_STATE)
        table = pd.DataFrame(rows, columns=record.columns)
    whole = {column.split()[0] for column in _COLUMNS if " int64" in column}
    return {
        name: [None if value != value else int(value) if name in whole else value for value in table[name].tolist()]
        for name in table.columns
    }


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
    """Format a row of metrics_row() as one console line of key=value pairs, of at most LINE_WIDTH characters.

    What does not fit is left out, the least important first: img/s, err, fallbacks, terms. The view and metrics.parquet
    have all of it.
    """
    fallbacks, rate, seconds = (row[name] or 0.0 for name in ("num_fallbacks", "learning_rate", "seconds"))
    terms = [row[f"loss_{term.name}"] or 0.0 for term in plan.terms]
    shown = {  # in the order of the line
        "epoch": f"{row['epoch']:.0f}/{plan.last_epoch}",
        "lr": _short(rate),
        "loss": f"{row['loss']:.3f}",
        "terms": ",".join(f"{loss:.2f}" for loss in terms) if len(terms) > 1 else None,
        "acc": _percent(row["train_accuracy"]),
        "test_acc": _percent(row["test_accuracy"]),
        "err": None if row["num_confusions"] is None else f"{row['num_confusions']:.0f}",
        "fallbacks": f"{fallbacks:.0f}" if fallbacks else None,
        "img/s": f"{row['images_per_second']:.0f}",
        "s": f"{seconds:.{1 if seconds < 100 else 0}f}",
    }
    parts = {key: f" {key}={value}" for key, value in shown.items() if value is not None}
    # The learning rate counts with its longest value: a key does not come and go with it from epoch to epoch.
    room = LINE_WIDTH - len(plan.phase) - len(" lr=0.0012")
    room -= sum(len(part) for key, part in parts.items() if key not in (*_MAY_LACK, "lr"))
    for key in [key for key in _MAY_LACK if key in parts]:
        if len(parts[key]) > room:
            del parts[key]
        else:
            room -= len(parts[key])
    return plan.phase + "".join(parts.values())


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{percent(100 * share, 2)}%"


def _short(rate: float) -> str:
    """Return a learning rate in at most 6 characters, two digits of them: 0.1, 0.0012, 1.2e-4."""
    return f"{rate:.2g}" if rate >= 0.001 or not rate else f"{rate:.1e}".replace("e-0", "e-")
