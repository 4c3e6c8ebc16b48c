"""Rows of a results file, made from evaluations of runs."""

from collections.abc import Iterable

from cpmix_cli.artifacts import files
from cpmix_cli.results.comparison import ComparisonRow, EvaluatedRun, leading_phases, split_name
from cpmix_cli.results.results_file import MEASURES, Row
from cpmix_cli.runs.run_json import EvaluationRecord, RunRecord, read_run
from cpmix_cli.runtime import console


def row_of(run: EvaluatedRun, study: str | None) -> Row:
    """Return the row of an evaluation.

    If a phase that leads to the checkpoint is missing, all cells about the training are empty.

    Args:
        run: the evaluation.
        study: name of the study; None: the name of the data set.
    """
    leading = [folder.record() for folder in leading_phases(run.source)]
    records: list[RunRecord] = [*leading, read_run(run.evaluation, EvaluationRecord)] if leading else []
    published, rho = ComparisonRow([run]).published(), split_name(run.data)[1]
    speed, seconds = run.cost["images_per_second"], run.cost["training_seconds"]
    measured = {column: getattr(run.numbers, column) for column in MEASURES}
    return {
        "study": study or run.data,
        "method": run.name,
        "recipe": run.method.recipe,
        "recipe_sha256": run.source.output(files.RECIPE)[1],
        "data": run.data,
        "rho": "" if rho is None else f"{rho:.12g}",
        "seed": str(run.seed),
        "epochs": "+".join(map(str, run.epochs)),
        "phase": run.source.phase,
        "label": run.label,
        "split": run.conditions["test images"].removeprefix("own ").removesuffix(" split"),
        **{column: "" if value is None else f"{value:.2f}" for column, value in measured.items()},
        "image_passes": "" if speed is None else f"{speed * seconds:.0f}",
        "training_seconds": "" if seconds is None else f"{seconds:.1f}",
        "device": _joined(record.device for record in leading),
        "threads": _joined(str(record.threads) for record in leading),
        "precision": run.conditions["precision"],
        "versions": _joined(_versions(record) for record in records),
        "commit": _joined(record.versions.get("commit") for record in records),
        "command": " && ".join(console.typed(*record.argv[1:]) for record in records),
        "checkpoint": run.checkpoint[:12],
        "paper": "" if published is None else published[1] + "*" * published[0].copied,
        "note": "",
    }


def _versions(record: RunRecord) -> str | None:
    found = [f"{name} {record.versions[name]}" for name in ("torch", "python", "cpmix") if name in record.versions]
    return ", ".join(found) or None


def _joined(values: Iterable[str | None]) -> str:
    """Join different values as in "2 and 1"; return "" if one is unknown."""
    found = dict.fromkeys(values)
    return "" if None in found else " and ".join(map(str, found))
