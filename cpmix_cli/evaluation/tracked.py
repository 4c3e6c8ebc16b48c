"""Evaluations in trackers: their numbers, beside the curves of the phase, at its last epoch."""

from contextlib import suppress
from pathlib import Path

import torch

from cpmix_cli.artifacts.files import LOGITS
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.evaluation.saved import read_current_numbers
from cpmix_cli.runs import run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.metrics import read_metrics
from cpmix_cli.training.trackers import Description, make_trackers, running


def track(names: str, source: PhaseFolder, dataset: str, evaluation: Path) -> None:
    """Write the curves of a phase with the numbers of an evaluation, and of those of its own splits that are there.

    All are written, because only some trackers can add to what they have.

    Args:
        names: value of --tracker.
        source: the phase.
        dataset: name of its data set.
        evaluation: folder of the evaluation.

    Raises:
        InputError: the evaluation or the metrics of the phase are damaged.
    """
    values = _values(source, evaluation)
    for split in (None, "val", "train"):  # None: test
        if (other := source.evaluation(split)) != evaluation:
            with suppress(InputError):  # damaged
                values |= _values(source, other)
    rows = [
        {str(name): None if value != value else value for name, value in row.items()}
        for row in read_metrics(source).to_dict("records")
    ]
    rows[-1] |= values
    trackers = make_trackers(names, Description(source.path, source.recipe(), dataset))
    with running(trackers):
        for tracker in trackers:
            tracker.write(rows)


def _values(source: PhaseFolder, evaluation: Path) -> dict[str, float]:
    """Return the numbers of an evaluation: "val/loss", the mean cross-entropy, and shares in per cent.

    None are returned if it is not there, or of other weights.
    """
    numbers = read_current_numbers(source, evaluation)
    if numbers is None:
        return {}
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    tensors, _ = read_tensors(*run_json.output_of(evaluation, record, LOGITS))
    loss = torch.nn.functional.cross_entropy(tensors["logits"].double(), tensors["labels"])
    shares = {name: getattr(numbers, name) for name in ("top1", "balanced_accuracy", "many", "medium", "few")}
    label = evaluation.name.removeprefix(source.phase).removeprefix("-") or "test"
    found = {"loss": float(loss), **{name: share for name, share in shares.items() if share is not None}}
    return {f"{label}/{name}": value for name, value in found.items()}
