"""Finished evaluations: reading their metrics and predictions, and table rows of their accuracies."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ConfigDict

from cpmix_cli.artifacts import files, records, tables
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.plugin_needs import plugin_words_of
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.rounding import percent


def read_predictions(evaluation: Path, source: PhaseFolder, num_classes: int) -> tuple[pd.DataFrame, str]:
    """Read the predictions of an evaluation; return the table and the sha256 of its file.

    Args:
        evaluation: folder of the evaluation.
        source: phase that must have been evaluated.
        num_classes: C.

    Raises:
        InputError: the evaluation is missing or damaged, or was made from an older checkpoint.
    """
    label = evaluation.name.removeprefix(source.phase).removeprefix("-")
    flags = [*(["--label", label] if label else []), *plugin_words_of(source)]
    again = console.typed("evaluate", "--from", source.run, "--phase", source.phase, *flags)
    if not (evaluation / files.RUN).is_file():
        raise InputError(f"no evaluation {evaluation}", fix=again)
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    if not source.is_source_of(record):
        raise InputError(f"{evaluation} is of an older checkpoint of {source.phase}", fix=again)
    path, sha = run_json.output_of(evaluation, record, files.PREDICTIONS)
    table = tables.read_table(path, tables.PREDICTIONS_SCHEMA, sha)
    for name in ("label", "predicted"):
        tables.refuse_outside(path, table, name, num_classes)
    return table, sha


def matrix_of(predictions: pd.DataFrame, num_classes: int) -> NDArray[np.int64]:
    """Count test images of each true class (row) predicted as each class (column): [C, C] int64.

    `predictions` is the table of read_predictions().
    """
    label, predicted = predictions[["label", "predicted"]].to_numpy(np.int64).T
    counts = np.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


POST_HOC = ("logit_adjustment", "tau_norm", "aggregate", "routing_threshold", "temperature", "mirror")
"""Keys of [evaluation] that change the logits of a network."""
ACCURACY_HEADER = ("evaluation", ">top-1", ">many", ">medium", ">few", ">balanced", ">ECE", ">images")


def accuracy_rows(evaluations: Path, own: str) -> list[list[str]]:
    """Return one table row per finished evaluation of a run, in the order of the phases.

    A damaged evaluation is left out with a warning, unless its folder's name is `own`.

    Raises:
        InputError: the evaluation `own` is damaged.
    """
    rows = []
    for folder in sorted((path.parent for path in evaluations.glob(f"*/{files.RUN}")), key=_place):
        try:
            rows.append(accuracy_row(folder.name, read_numbers(folder)))
        except InputError as fault:
            if folder.name == own:
                raise
            console.warn(f"left out: {fault.message}; to repair it: {fix_of(fault)}")
    return rows


class Accuracy(records.Record):
    """Metrics of accuracy.summary(), in percent; None for a group without tested classes."""

    top1: float
    many: float | None
    medium: float | None
    few: float | None
    balanced_accuracy: float
    num_test: int
    num_classes_without_test: int
    ece: float


class EvaluationNumbers(Accuracy):
    """Fields of an evaluation's metrics.json. Unknown fields are kept, so that --json shows them."""

    model_config = ConfigDict(extra="allow")

    phase: str
    num_experts: int
    experts: list[Accuracy]


def accuracy_row(name: str, numbers: Accuracy) -> list[str]:
    """Return the cells of one row under ACCURACY_HEADER."""
    shares = (numbers.top1, numbers.many, numbers.medium, numbers.few, numbers.balanced_accuracy, numbers.ece)
    return [name, *("-" if share is None else percent(share, 2) for share in shares), f"{numbers.num_test:,}"]


def read_numbers(evaluation: Path) -> EvaluationNumbers:
    """Read an evaluation's metrics.json.

    Raises:
        InputError: metrics.json or run.json is missing or damaged.
    """
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    path, sha = run_json.output_of(evaluation, record, files.EVALUATION)
    try:
        numbers = json.loads(files.read_bytes(path, sha, limit=files.MAX_RECORD))
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{path} is not valid JSON: {fault}", path=path) from fault
    return records.checked(path, EvaluationNumbers, numbers)


def read_current_numbers(source: PhaseFolder, evaluation: Path) -> EvaluationNumbers | None:
    """Read an evaluation's metrics.json; None if there is no such evaluation, or it is of other weights than the phase.

    Raises:
        InputError: the evaluation is damaged, or the phase is not finished.
    """
    if not (evaluation / files.RUN).is_file():
        return None
    if not source.is_source_of(run_json.read_run(evaluation, run_json.EvaluationRecord)):
        return None
    return read_numbers(evaluation)


def _place(folder: Path) -> tuple[int, str]:
    phase = folder.name.split("-")[0]
    return (*files.PHASES, phase).index(phase), folder.name
