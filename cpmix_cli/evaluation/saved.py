"""Finished evaluations: their numbers, their predictions, and how they are shown."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cpmix_cli.artifacts import files, records, tables
from cpmix_cli.evaluation.accuracy import confusion_matrix
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.run_json import PHASES
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError


def read_predictions(evaluation: Path, source: PhaseFolder, num_classes: int) -> tuple[pd.DataFrame, str]:
    """An evaluation's predictions and their hash.

    Raises:
        InputError: there is none, or it is of an older checkpoint.
    """
    label = evaluation.name.removeprefix(source.phase).removeprefix("-")
    flags = ["--label", label] if label else []
    again = console.typed("evaluate", "--from", source.run, "--phase", source.phase, *flags)
    if not (evaluation / files.RUN).is_file():
        raise InputError(f"no evaluation {evaluation}", fix=again)
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    if record.source.sha256 != source.output(files.MODEL)[1]:
        raise InputError(f"{evaluation} is of an older checkpoint of {source.phase}", fix=again)
    path, sha = run_json.output_of(evaluation, record, files.PREDICTIONS)
    table = tables.read_table(path, tables.PREDICTIONS_SCHEMA, sha)
    for name in ("label", "predicted"):
        tables.refuse_outside(path, table, name, num_classes)
    return table, sha


def matrix_of(predictions: pd.DataFrame, num_classes: int) -> torch.Tensor:
    """Test images of true class (row) predicted as (column) [C, C] int64, from read_predictions()."""
    label, predicted = (
        torch.tensor(predictions[name].to_numpy(), dtype=torch.int64) for name in ("label", "predicted")
    )
    return confusion_matrix(label, predicted, num_classes)


POST_HOC = ("logit_adjustment", "tau_norm", "aggregate", "routing_threshold", "temperature")
"""Keys of [evaluation] under which the same network gives other logits."""
ACCURACY_HEADER = (
    "evaluation",
    ">top-1",
    ">many",
    ">medium",
    ">few",
    ">balanced",
    ">ECE",
    ">images",
)


def accuracy_rows(evaluations: Path, own: str) -> list[list[str]]:
    """A table row for each finished evaluation of a run, in the order of its phases.

    Raises:
        InputError: the evaluation in the folder named `own` is damaged; of another that is, a warning tells.
    """
    rows = []
    for path in sorted(evaluations.glob(f"*/{files.RUN}"), key=lambda p: _place(p.parent.name)):
        try:
            n = read_numbers(path.parent)
        except InputError as fault:
            if path.parent.name == own:
                raise
            console.warn(f"left out: {fault.message}")
            continue
        rows.append(accuracy_row(path.parent.name, n))
    return rows


def accuracy_row(name: str, numbers: dict[str, Any]) -> list[str]:
    """The cells under ACCURACY_HEADER."""
    keys = ("top1", "many", "medium", "few", "balanced_accuracy", "ece")
    cells = ["-" if numbers[key] is None else f"{numbers[key]:.2f}" for key in keys]
    return [name, *cells, f"{numbers['num_test']:,}"]


class Numbers(records.Record):
    """What readers of an evaluation's metrics.json count on."""

    top1: float
    many: float | None
    medium: float | None
    few: float | None
    balanced_accuracy: float
    ece: float
    num_test: int
    experts: list[dict[str, float | int | None]]


def read_numbers(evaluation: Path) -> dict[str, Any]:
    """An evaluation's metrics.json, verified.

    Raises:
        InputError: it or the evaluation's record is missing or damaged.
    """
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    path, sha = run_json.output_of(evaluation, record, files.EVALUATION)
    try:
        numbers: dict[str, Any] = json.loads(files.read_bytes(path, sha, limit=files.MAX_RECORD))
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{path} is no JSON") from fault
    records.checked(path, Numbers, numbers)
    return numbers


def _place(name: str) -> tuple[int, str]:
    phase = name.split("-")[0]
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), name)
