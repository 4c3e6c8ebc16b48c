"""confusion-report: confusion matrix and most confused pairs, as tables, figures and one page. Paper: Figs. 1 to 4.

Reads an evaluation's predictions. Trains nothing, and predicts only the decision regions of 2-D points.
"""

import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cpmix_cli.artifacts import files, locks, tables
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.evaluation.accuracy import reliability
from cpmix_cli.evaluation.prediction import predicted_regions
from cpmix_cli.evaluation.samples import evaluated_tests
from cpmix_cli.evaluation.saved import ACCURACY_HEADER, accuracy_rows, matrix_of, read_predictions
from cpmix_cli.flags import ReportOptions, words_of
from cpmix_cli.report import figures
from cpmix_cli.report.images import ContactSheet, most_confused, sheet
from cpmix_cli.report.page import GENERATOR, ShownRun, page_digest, render_page
from cpmix_cli.report.pairs import clustered_order, confused_pairs
from cpmix_cli.runs import compared, folders, output, run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import command_ahead
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UnreadableError, UsageError, counted
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import on_a_line, quoted

DECISION_REGIONS = "decision_regions"
_PICTURES = (
    *("confusion_matrix", "confusion_matrix_grouped", "class_accuracy", "confusion_histogram"),
    DECISION_REGIONS,
)
_FILES = (
    *(files.CONFUSION_MATRIX, files.CONFUSED_PAIRS, files.RUN),
    *(f"{name}.{kind}" for name in _PICTURES for kind in ("png", "svg")),
)
NUM_SHOWN = 10
NUM_ON_PAGE = 100
Pictures = list[tuple[str, str, dict[figures.Kind, bytes]]]
"""File name without suffix, caption, and PNG and SVG of each figure."""


@dataclass(frozen=True)
class _Reported:
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


def run(options: ReportOptions) -> None:
    """Write confusion/<phase>/ and confusion/index.html from an evaluation; --label L writes confusion/<phase>-L/ only.

    Raises:
        UsageError: --compare names an evaluation twice, or the reported one; --no-compare is given with it; or
            --label is no label.
        InputError: the phase is not evaluated, a compared run has other classes, or files are damaged.
        EnvironmentFault: the output cannot be written.
    """
    if options.label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", options.label):
        raise UsageError(
            f'--label "{options.label}" is no label of an evaluation',
            fix="give the part of the name of a folder RUN/evaluation/PHASE-LABEL after PHASE-",
        )
    if options.compare and options.no_compare:
        raise UsageError("--compare and --no-compare are both given", fix="drop one of the two flags")
    own = _read_reported(options, options.from_folder, options.phase, options.data, options.data_root)
    out = options.out or own.root
    folder = out / "confusion" / own.evaluation.name
    # The page of the run is that of a plain evaluation; the others have theirs inside.
    index = (folder if options.label is not None else folder.parent) / "index.html"
    asked = replace(options, overwrite=False, no_compare=False)
    again = console.typed("confusion-report", *words_of(asked))
    record = None if options.compare else compared.record_of(index, folder)
    before = compared.places_in(record, out)
    others: dict[Path, _Reported] = {}
    for place in options.compare:
        others[place] = _read_other(options, place, [own, *others.values()])
    faults: dict[Path, InputError | UsageError] = {}
    if not (options.compare or options.no_compare):
        compared.warn_of_unknown(record, index, folder, again)
        for place in before:
            try:
                others[place] = _read_other(options, place, [own, *others.values()])
            except UnreadableError:  # for a moment, perhaps: the comparison is not given up for that
                raise
            except (InputError, UsageError) as fault:
                faults[place] = fault
    for place, why in faults.items():
        _warn_of_dropped(replace(asked, compare=list(others)), index, place, why)
    reported = [own, *(_beside(own, other) for other in others.values())]
    pairs = confused_pairs(own.shown.matrix, own.dataset.class_counts)
    references = compared.references(list(others), out)
    made_from = {
        "recipe": {},
        "images": options.images,
        "predictions": own.sha,
        "dataset": own.dataset.fingerprint,
        # The page shows all evaluations of the run, so a new one makes it stale.
        "accuracies": files.digest([run.accuracies for run in reported]),
        "page": page_digest(),
        "listing": own.listing,
        "compared": [
            [run.sha, run.dataset.fingerprint, name]
            for run, name in zip(others.values(), _names(reported)[1:], strict=True)
        ],
    }
    overwrite = options.overwrite or not _is_own_page(index, folder)
    writes = (*_FILES, index.name) if index.parent == folder else _FILES
    status = output.decide(folder, made_from, writes, overwrite=overwrite, refresh=True)
    if status == "fresh":
        _refuse_strange_page(index)
        if not _write(folder, index, made_from, reported, references, pairs, options.images, before=before, out=out):
            run(options)  # with the comparison that another report wrote meanwhile
            return
    else:
        locks.tidy(folder)
        locks.tidy(index.parent)
    dropped = [place for place in before if place not in others]
    _report(folder, index, reported, pairs, status, is_kept=bool(before), dropped=dropped)
    if options.out is None and options.label is None:
        command = command_ahead(own.root, data=options.data, data_root=options.data_root)
        if command is not None:
            console.follow(command)


def _read_reported(
    options: ReportOptions,
    given: Path,
    phase: str | None = None,
    data: Path | None = None,
    data_root: Path | None = None,
    known: Dataset | None = None,
) -> _Reported:
    """Read an evaluated phase of a run; an evaluation in --out comes before one in the run folder.

    A run on the data set `known` needs no other folder of it: --data may have said where it is.
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
    return _Reported(root, source, dataset, evaluation, predictions, sha, tested_on, accuracies, listing, shown)


def _read_other(options: ReportOptions, place: Path, reported: list[_Reported]) -> _Reported:
    """Read a run to compare with those that are read already, the reported one first.

    Raises:
        UsageError: it is one of them.
        InputError: it has other classes, is not evaluated, or a file is damaged.
    """
    own = reported[0]
    other = _read_reported(replace(options, out=None), place, known=own.dataset)
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


def _beside(own: _Reported, other: _Reported) -> _Reported:
    """Return the other run with the test images that one run only gets right, if both were tested on the same ones."""
    images = ["sample_id", "label"]
    if own.tested_on != other.tested_on or not own.predictions[images].equals(other.predictions[images]):
        return other
    label = own.predictions["label"].to_numpy()
    right, others_right = (run.predictions["predicted"].to_numpy() == label for run in (own, other))
    size = own.dataset.num_classes
    gained, lost = (np.bincount(label[only], minlength=size) for only in (others_right & ~right, right & ~others_right))
    return replace(other, shown=replace(other.shown, alone=(gained, lost)))


def _warn_of_dropped(options: ReportOptions, index: Path, place: Path, fault: InputError | UsageError) -> None:
    """Warn that a page no longer compares with the run in `place`, and why; the options are those without it."""
    again = console.typed("confusion-report", *words_of(options), "--compare")
    if not place.is_dir():
        why = f"it is gone; if it has moved, compare with its new folder: {again} FOLDER"
    elif isinstance(fault, UsageError):
        why = fault.message
    else:
        mend = fix_of(fault)
        steps = f"{mend} && {again} {quoted(place)}" if mend.startswith("cpmix ") else mend
        why = f"{fault.message}; to compare again: {steps}"
    console.warn(f"{index} no longer compares with {place}: {why}")


def _names(reported: list[_Reported]) -> list[str]:
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


def _is_own_page(index: Path, folder: Path) -> bool:
    """Return whether the report in `folder` wrote index.html; a report of another phase may have replaced it."""
    if not index.is_file() or not (folder / files.RUN).is_file():
        return False
    return run_json.read_run(folder, run_json.ReportRecord).page == files.sha256(files.read_bytes(index))


def _refuse_strange_page(index: Path) -> None:
    """Raise EnvironmentFault if index.html exists and no report wrote it, by its text or by the record of a report."""
    if not files.is_there(index):
        return
    text, pages = b"", set()
    with suppress(InputError):
        text = files.read_bytes(index)
    for path in index.parent.glob(f"*/{files.RUN}"):
        with suppress(InputError):
            pages.add(run_json.read_run(path.parent, run_json.ReportRecord).page)
    if GENERATOR not in text and files.sha256(text) not in pages:
        raise EnvironmentFault(
            f"{index} is a file that cpmix did not write and would replace",
            fix="move it to another folder, or write elsewhere with --out FOLDER",
        )


def _write(
    folder: Path,
    index: Path,
    made_from: dict[str, Any],
    reported: list[_Reported],
    references: list[dict[str, str]],
    pairs: pd.DataFrame,
    num_images: int,
    *,
    before: list[Path],
    out: Path,
) -> bool:
    """Publish tables, figures and page, and run.json last. A page in `folder` is of this evaluation only.

    Returns:
        False if the page no longer compares with the runs `before`, because another report has written it since;
        nothing is written then.
    """
    own = reported[0]
    with figures.fonts_for([*own.dataset.class_names, own.dataset.name, own.evaluation.name]):
        pictures = _draw(own)
    folder_of_pictures = "" if index.parent == folder else f"{folder.name}/"
    page = _make_page(reported, pairs, pictures, num_images, folder_of_pictures)
    files.check_place(folder, len(page))
    # Reports of all phases write the same page, so only one may run at a time.
    of_page = locks.hold(index.parent, wait=True) if index.parent != folder else nullcontext()
    with of_page, locks.hold(folder) as lock:
        now = compared.places_in(compared.record_of(index, folder), out)
        if before != now and references == compared.references(before, out):
            return False
        recorder = output.Recorder(folder, f"confusion/{folder.name}", made_from, lock)
        with recorder.replacing({index.name: index}) as place:
            cells = tables.confusion_columns(own.shown.matrix)
            recorder.publish_table(files.CONFUSION_MATRIX, tables.CONFUSION_SCHEMA, cells)
            columns = {str(name): column for name, column in pairs.items()}
            recorder.publish_table(files.CONFUSED_PAIRS, tables.CONFUSED_PAIRS_SCHEMA, columns)
            for name, _, encoded in pictures:
                for kind, data in encoded.items():
                    recorder.publish(f"{name}.{kind}", data)
            page_sha = files.publish(place / index.name, page.encode())
            recorder.finish(page=page_sha, picture=f"{pictures[0][0]}.png", compared=references)
        drawn = {name for name, *_ in pictures}
        for name in (f"{name}.{kind}" for name in _PICTURES if name not in drawn for kind in ("png", "svg")):
            with suppress(OSError):  # of an earlier report, and no longer recorded
                (folder / name).unlink(missing_ok=True)
    return True


def _make_page(reported: list[_Reported], pairs: pd.DataFrame, pictures: Pictures, num_images: int, folder: str) -> str:
    """Render the page of a run and the runs that it is compared with; `folder` is where its figures are, or ""."""
    own, called = reported[0], [files.utf8_text(name) for name in _names(reported)]
    title, shown_pairs, notes = f"Confusion of {own.dataset.name}, {own.evaluation.name}", pairs, []
    if len(reported) > 1:
        title = f"Confusion of {', '.join(called)}"
        together = np.sum([run.shown.matrix for run in reported], axis=0)
        shown_pairs = confused_pairs(together, own.dataset.class_counts)
        if any((run.dataset.class_counts != own.dataset.class_counts).any() for run in reported):
            notes = [f"The runs have different training images. Orders, groups and rarer classes are from {called[0]}."]
    rows = [
        [f"{name}: {row[0]}" if len(reported) > 1 else row[0], *row[1:]]
        for name, run in zip(called, reported, strict=True)
        for row in run.accuracies
    ]
    return render_page(
        title=title,
        runs=[replace(run.shown, name=name) for name, run in zip(called, reported, strict=True)],
        class_names=own.dataset.class_names,
        notes=notes,
        accuracy=pd.DataFrame(rows, columns=[h.removeprefix(">") for h in ACCURACY_HEADER]),
        pairs=shown_pairs,
        named_pairs=_with_names(pairs.head(NUM_ON_PAGE), own.dataset),
        clustered=clustered_order(own.shown.matrix),
        images=_thumbnails(own, num_images),
        pictures=[(caption, [f"{folder}{name}.{kind}" for kind in encoded]) for name, caption, encoded in pictures],
        embedded=[(caption, encoded["png"]) for name, caption, encoded in pictures if name == DECISION_REGIONS],
    )


def _thumbnails(run: _Reported, limit: int) -> ContactSheet | None:
    """Make the thumbnails of misclassified test images; None if there are none or the data are points."""
    chosen = most_confused(run.predictions, limit)
    if len(run.dataset.shape) != 3 or not len(chosen):
        return None
    tests = evaluated_tests(run.evaluation, run.dataset)
    at = pd.Index(run.predictions["sample_id"]).get_indexer(chosen["sample_id"])
    with tests.reading():
        images = [images.numpy() for part in torch.split(torch.tensor(at), 64) for images in tests.pictures(part)]
    return sheet(images, max(run.dataset.shape[:2]), chosen, tests.samples.iloc[at], run.listing)


def _draw(run: _Reported) -> Pictures:
    source, dataset, matrix, groups = run.source, run.dataset, run.shown.matrix, run.shown.groups
    title = on_a_line(f"{dataset.name}, {run.evaluation.name}")
    images = "the test split" if run.evaluation.name == source.phase else on_a_line(run.evaluation.name)
    names, counts = [on_a_line(name) for name in dataset.class_names], dataset.class_counts
    pictures = [
        (
            "confusion_matrix",
            f"Confusion matrix of {images}: rows true, columns predicted, per cent of the true class; "
            "classes in descending order of training images.",
            figures.confusion_heat_map(matrix, names, counts, groups, title=title),
        ),
        (
            "class_accuracy",
            "Accuracy per class over training images.",
            figures.class_accuracy(matrix, names, counts, title=title),
        ),
        (
            "confusion_histogram",
            "Histogram of confusion values between two classes.",
            figures.confusion_histogram(matrix, title=title),
        ),
    ]
    if len(counts) >= 2 * figures.NUM_GROUPS:  # with fewer, groups of one class would repeat the matrix
        caption = (
            "Confusion matrix of ten groups of neighbouring classes (test images per cell), as in Fig. 3 of the paper."
        )
        pictures.insert(1, ("confusion_matrix_grouped", caption, figures.grouped_heat_map(matrix, counts, title=title)))
    if dataset.shape == [2]:
        points, labels = dataset.read("train")
        axis, classes = predicted_regions(source, dataset, points)
        regions = figures.decision_regions(axis, classes, points.numpy(), labels.numpy(), names, title=title)
        caption = "Decision regions over the training points, as in Fig. 2 of the paper."
        pictures.insert(0, (DECISION_REGIONS, caption, regions))
    return [
        (name, caption, {kind: figures.encode(figure, kind) for kind in ("png", "svg")})
        for name, caption, figure in pictures
    ]


def _with_names(pairs: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """Return the pairs with class names, training counts and headings to read."""
    names, counts = np.array(dataset.class_names), dataset.class_counts
    rarer, frequent = pairs["rarer_class"].to_numpy(), pairs["commoner_class"].to_numpy()
    return pd.DataFrame(
        {
            "rarer class": names[rarer],
            "training images": counts[rarer],
            "more frequent class": names[frequent],
            "training images ": counts[frequent],
            "confusions": pairs["count"],
            "rarer as more frequent": pairs["rarer_as_commoner"],
            "more frequent as rarer": pairs["commoner_as_rarer"],
            "rarer as more frequent, %": [
                percent(100 * share) if few < many else "-"  # of two equally large classes, neither is the rarer
                for share, few, many in zip(pairs["minority_share"], counts[rarer], counts[frequent], strict=True)
            ],
        }
    )


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


def _report(
    folder: Path,
    index: Path,
    reported: list[_Reported],
    pairs: pd.DataFrame,
    status: str,
    *,
    is_kept: bool,
    dropped: list[Path],
) -> None:
    """Show the most confused pairs, the accuracies, the paths of the outputs, and what the page compares.

    Args:
        folder: folder of the report.
        index: its page.
        reported: the run, then those that it is compared with.
        pairs: confused_pairs() of the run.
        status: result of output.decide().
        is_kept: the comparison is that of an earlier report.
        dropped: folders that an earlier report compared with, and this one does not.
    """
    own, *others = reported
    called = _names(reported)
    status = "up to date" if status == "done" else "done"
    kept = ", as before; --no-compare drops it" if is_kept else ""
    picture = folder / run_json.read_run(folder, run_json.ReportRecord).picture
    size = len(own.predictions)
    wrong = size - int(own.shown.matrix.trace())
    top = pairs.head(NUM_SHOWN)
    if not console.as_json:
        header = ("rarer class", ">images", "more frequent class", ">images", ">confusions", ">rarer as frequent", ">%")
        rows = [
            [str(row.iloc[i]) for i in (0, 1, 2, 3, 4, 5, 7)] for _, row in _with_names(top, own.dataset).iterrows()
        ]
        title = (
            f"most confused of {counted(len(pairs), 'class pair')} ({wrong:,} of {counted(size, 'test image')} wrong)"
        )
        console.table(header, rows, title=title)
    console.result(
        {
            "status": status,
            "phase": own.source.phase,
            "folder": str(folder),
            "page": str(index),
            "picture": str(picture),
            "num_test": size,
            "num_wrong": wrong,
            "most_confused": top.to_dict("records"),
            "compared_with": [str(other.source.path) for other in others],
            "comparison_kept": is_kept and bool(others),
            "comparison_dropped": [str(place) for place in dropped],
        },
        title="\naccuracy, per cent",
        header=ACCURACY_HEADER,
        rows=own.accuracies,
        lines=[
            *(f"{status}: {folder}", f"page: {index}", f"picture: {picture}"),
            *(
                f"compares: {own.source.path} with {other.source.path}{kept} (difference: {name} minus {called[0]})"
                for other, name in zip(others, called[1:], strict=True)
            ),
            *(f"no longer compares: {own.source.path} with {place}" for place in dropped),
        ],
    )
