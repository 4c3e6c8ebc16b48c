"""Runs of a report: an evaluated phase, and the data that the page of confusion-report shows of it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cpmix_cli.artifacts import files, tables
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.evaluation.accuracy import reliability
from cpmix_cli.evaluation.samples import evaluated_tests
from cpmix_cli.evaluation.saved import accuracy_rows, matrix_of, read_predictions
from cpmix_cli.flags import ReportOptions
from cpmix_cli.report.images import ContactSheet, most_confused, sheet
from cpmix_cli.report.page import ShownRun
from cpmix_cli.runs import folders, run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runtime.errors import InputError, UsageError, counted
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import quoted


@dataclass(frozen=True)
class ReportedRun:
    """An evaluated phase, and the data that the page shows of it."""

    root: Path
    source: PhaseFolder
    dataset: Dataset
    evaluation: Path
    predictions: pd.DataFrame
    sha: str
    """SHA-256 of the predictions' file."""
    tested_on: str
    """Fingerprint of the data set that the test images are from."""
    accuracies: list[list[str]]
    """A table row per evaluation of the run."""
    listing: str
    """Flags with which `misclassified --from RUN` lists the evaluation; "" if the page is not written into the run."""
    shown: ShownRun


def read_run(
    options: ReportOptions,
    given: Path,
    phase: str | None = None,
    data: Path | None = None,
    data_root: Path | None = None,
    known: Dataset | None = None,
) -> ReportedRun:
    """Read an evaluated phase of a run; an evaluation in --out comes before one in the run folder.

    Args:
        options: flags of the report, for --label and --out.
        given: run folder, or the folder of a phase.
        phase: phase to read; None: the last one that is done.
        data: folder of the run's data set; None: where it was.
        data_root: folder of the images of a data set that is not packed; None: where it was.
        known: data set that is open; a run on it needs no other folder of it, as --data may have said where it is.

    Raises:
        UsageError: the run has no such phase.
        InputError: the phase is not evaluated, the data set is missing, or a file is damaged.
    """
    source = choose(given, phase)
    root = source.run
    name = source.phase if options.label is None else f"{source.phase}-{options.label}"
    evaluation = (options.out or root) / "evaluation" / name
    if not (evaluation / files.RUN).is_file():
        evaluation = root / "evaluation" / name
    recorded = source.record().dataset
    if known is not None and known.fingerprint == recorded.fingerprint:
        dataset = known
    else:
        dataset = folders.find_dataset(root, recorded, data, data_root=data_root)
    predictions, sha = read_predictions(evaluation, source, dataset.num_classes)
    matrix = matrix_of(predictions, dataset.num_classes)
    table = tables.read_confusions(*source.output(files.CONFUSION_PAIRS), dataset.num_classes)
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    path, classes_sha = run_json.output_of(evaluation, record, files.PER_CLASS)
    confidence = torch.tensor(predictions["confidence"].to_numpy(), dtype=torch.float64)
    right = torch.tensor((predictions["label"] == predictions["predicted"]).to_numpy())
    shown = ShownRun(
        name=name,
        facts=_facts(source, dataset, matrix),
        lead=_lead(source, dataset, int(matrix.sum())),
        class_counts=dataset.class_counts,
        groups=tables.read_per_class(path, classes_sha)["group"].tolist(),
        matrix=matrix,
        confusions=tables.confusion_counts(table, dataset.num_classes) if len(table) else None,
        reliability=reliability(confidence, right).numpy(),
    )
    accuracies = accuracy_rows(evaluation.parent, evaluation.name)
    flags: list[object] = ["--phase", source.phase]
    for flag, value in (("--label", options.label), ("--data", data), ("--data-root", data_root)):
        flags += [] if value is None else [flag, value.absolute() if isinstance(value, Path) else value]
    listing = quoted(*flags) if options.out is None else ""
    tested_on = record.made_from.dataset
    return ReportedRun(root, source, dataset, evaluation, predictions, sha, tested_on, accuracies, listing, shown)


def read_other(options: ReportOptions, place: Path, reported: list[ReportedRun]) -> ReportedRun:
    """Read a run to compare with those that are read already, the reported one first.

    Raises:
        UsageError: it is one of them.
        InputError: it has other classes, is not evaluated, or a file is damaged.
    """
    own = reported[0]
    other = read_run(replace(options, out=None), place, known=own.dataset)
    if other.dataset.class_names != own.dataset.class_names:
        raise InputError(
            f"{other.root} has other classes than {own.root}",
            needed_by="confusion-report --compare",
            fix=f"drop {quoted('--compare', other.root)}, or give a run on data with the same classes",
        )
    if (evaluation := other.evaluation.resolve()) in [run.evaluation.resolve() for run in reported]:
        raise UsageError(
            f"{evaluation} is given twice",
            needed_by="confusion-report --compare",
            fix="give each run once in --from and --compare",
        )
    return other


def beside(own: ReportedRun, other: ReportedRun) -> ReportedRun:
    """Return the other run with the test images that one run only gets right, if both were tested on the same ones."""
    images = ["sample_id", "label"]
    if own.tested_on != other.tested_on or not own.predictions[images].equals(other.predictions[images]):
        return other
    label = own.predictions["label"].to_numpy()
    right, others_right = (run.predictions["predicted"].to_numpy() == label for run in (own, other))
    size = own.dataset.num_classes
    gained, lost = (np.bincount(label[only], minlength=size) for only in (others_right & ~right, right & ~others_right))
    return replace(other, shown=replace(other.shown, alone=(gained, lost)))


def names_of(reported: list[ReportedRun]) -> list[str]:
    """Return a unique name per run for the page: the end of its path, as long as needed, and phases that differ."""
    if len(reported) == 1:
        return [reported[0].evaluation.name]
    roots = [run.root.resolve() for run in reported]
    depths = range(1, 1 + max(len(root.parts) for root in roots))
    ends = (["/".join(root.parts[-depth:]) for root in roots] for depth in depths)
    found = next(names for names in ends if len(set(names)) == len(set(roots)))
    if len({run.source.phase for run in reported}) == 1:
        return found
    return [f"{name} {run.source.phase}" for name, run in zip(found, reported, strict=True)]


def thumbnails(run: ReportedRun, limit: int) -> ContactSheet | None:
    """Make at most `limit` thumbnails of misclassified test images; None if there are none or the data are points."""
    chosen = most_confused(run.predictions, limit)
    if len(run.dataset.shape) != 3 or not len(chosen):
        return None
    tests = evaluated_tests(run.evaluation, run.dataset)
    at = pd.Index(run.predictions["sample_id"]).get_indexer(chosen["sample_id"])
    with tests.reading():
        images = [images.numpy() for part in torch.split(torch.tensor(at), 64) for images in tests.pictures(part)]
    return sheet(images, max(run.dataset.shape[:2]), chosen, tests.samples.iloc[at], run.listing)


def _lead(source: PhaseFolder, dataset: Dataset, num_test: int) -> str:
    """Return a sentence on what was trained how and on what, and what it is tested on."""
    counts, recipe = dataset.class_counts, source.recipe()
    method = f"with {recipe.about.method} " if recipe.about is not None else ""
    length = counted(recipe.schedule.epochs, "epoch")
    return (
        f"{recipe.model.name}, trained {method}({length}, seed {recipe.seed}) on "
        f"{counted(int(counts.sum()), 'image')} of {counted(len(counts), 'class', 'classes')} of {dataset.name}: "
        f"{counts.max():,} of the largest class, {counts.min():,} of the smallest. Tested after {source.phase} on "
        f"{counted(num_test, 'image')}."
    )


def _facts(source: PhaseFolder, dataset: Dataset, matrix: NDArray[np.int64]) -> list[tuple[str, str]]:
    """Return name and value of what _lead() leaves out."""
    counts = dataset.class_counts
    wrong = int(matrix.sum() - matrix.diagonal().sum())
    rarer = int(matrix[counts[:, None] < counts].sum())
    share = f"; {percent(100 * rarer / wrong, 1)} % of them predicted as a more frequent class" if wrong else ""
    return [
        ("Checkpoint", f"{source.phase}, sha256 {source.output(files.MODEL)[1][:16]}"),
        ("Network", f"{source.recipe().model.name}, {counted(source.record().num_parameters, 'parameter')}"),
        ("Test images", f"{int(matrix.sum()):,}, {wrong:,} of them wrong{share}"),
    ]
