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

from cpmix_cli.artifacts import files, locks, tables
from cpmix_cli.evaluation.saved import ACCURACY_HEADER
from cpmix_cli.flags import ReportOptions, words_of
from cpmix_cli.report.figure_files import fonts_for
from cpmix_cli.report.page import GENERATOR, page_digest, render_page
from cpmix_cli.report.pairs import clustered_order, confused_pairs, named_pairs
from cpmix_cli.report.report_figures import DECISION_REGIONS, PICTURES, Pictures, draw_all
from cpmix_cli.report.reported_run import ReportedRun, beside, names_of, read_other, read_run, thumbnails
from cpmix_cli.runs import compared, output, run_json
from cpmix_cli.runs.next_command import command_ahead
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UnreadableError, UsageError, counted
from cpmix_cli.runtime.text import quoted

_FILES = (
    *(files.CONFUSION_MATRIX, files.CONFUSED_PAIRS, files.RUN),
    *(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")),
)
NUM_SHOWN = 10
NUM_ON_PAGE = 100


@dataclass(frozen=True)
class _Place:
    """Where a report is written."""

    out: Path
    """The run's folder, or that of --out."""
    folder: Path
    """confusion/PHASE in it: tables, figures and record."""
    index: Path
    """The page. All phases of a run write the same one; an evaluation with a label has its own in `folder`."""


@dataclass(frozen=True)
class _Report:
    """What a report shows."""

    place: _Place
    runs: list[ReportedRun]
    """The run, then those that its page compares it with."""
    pairs: pd.DataFrame
    """confused_pairs() of the run."""
    references: list[dict[str, str]]
    """Records of the compared runs, see compared.references()."""
    before: list[Path]
    """Folders that the page on the disk compares with; none if --compare names others."""
    num_images: int
    """Largest number of thumbnails."""

    @property
    def dropped(self) -> list[Path]:
        """Folders that the page compared with before, and no longer."""
        return [place for place in self.before if str(place.resolve()) not in {r["absolute"] for r in self.references}]

    @property
    def is_kept(self) -> bool:
        """Whether the comparison is that of the page before."""
        return bool(self.before) and len(self.runs) > 1


def run(options: ReportOptions) -> None:
    """Write confusion/<phase>/ and confusion/index.html from an evaluation; --label L writes confusion/<phase>-L/ only.

    Raises:
        UsageError: --compare names an evaluation twice, or the reported one; --no-compare is given with it; or
            --label is no label.
        InputError: the phase is not evaluated, a compared run has other classes, or files are damaged.
        EnvironmentFault: the output cannot be written.
    """
    _check_flags(options)
    report = _read(options)
    own, *others = report.runs
    place = report.place
    made_from = {
        "recipe": {},
        "images": options.images,
        "predictions": own.sha,
        "dataset": own.dataset.fingerprint,
        # The page shows all evaluations of the run, so a new one makes it stale.
        "accuracies": files.digest([each.accuracies for each in report.runs]),
        "page": page_digest(),
        "listing": own.listing,
        "compared": [
            [each.sha, each.dataset.fingerprint, name]
            for each, name in zip(others, names_of(report.runs)[1:], strict=True)
        ],
    }
    writes = (*_FILES, place.index.name) if place.index.parent == place.folder else _FILES
    overwrite = options.overwrite or not _is_own_page(place)
    status = output.decide(place.folder, made_from, writes, overwrite=overwrite, refresh=True)
    if status == "fresh":
        _refuse_strange_page(place.index)
        if not _write(report, made_from):
            run(options)  # with the comparison that another report wrote meanwhile
            return
    else:
        locks.tidy(place.folder)
        locks.tidy(place.index.parent)
    _show(report, status)
    if options.out is None and options.label is None:
        command = command_ahead(own.root, data=options.data, data_root=options.data_root)
        if command is not None:
            console.follow(command)


def _check_flags(options: ReportOptions) -> None:
    """Raise UsageError if --label is no label, or --compare and --no-compare are both given."""
    if options.label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", options.label):
        raise UsageError(
            f'--label "{options.label}" is no label of an evaluation',
            fix="give the part of the name of a folder RUN/evaluation/PHASE-LABEL after PHASE-",
        )
    if options.compare and options.no_compare:
        raise UsageError("--compare and --no-compare are both given", fix="drop one of the two flags")


def _read(options: ReportOptions) -> _Report:
    """Read the run, and the runs of --compare; without it those that its page compares with, unless --no-compare."""
    own = read_run(options, options.from_folder, options.phase, options.data, options.data_root)
    out = options.out or own.root
    folder = out / "confusion" / own.evaluation.name
    place = _Place(out, folder, (folder if options.label is not None else folder.parent) / "index.html")
    record = None if options.compare else compared.record_of(place.index, folder)
    before = compared.places_in(record, out)
    others: dict[Path, ReportedRun] = {}
    for given in options.compare:
        others[given] = read_other(options, given, [own, *others.values()])
    if not (options.compare or options.no_compare):
        others = _read_again(options, own, place, record, before)
    runs = [own, *(beside(own, other) for other in others.values())]
    pairs = confused_pairs(own.shown.matrix, own.dataset.class_counts)
    return _Report(place, runs, pairs, compared.references(list(others), out), before, options.images)


def _read_again(
    options: ReportOptions, own: ReportedRun, place: _Place, record: run_json.ReportRecord | None, before: list[Path]
) -> dict[Path, ReportedRun]:
    """Read the runs that the page compares with, and warn of those that are gone or can no longer be compared."""
    asked = replace(options, overwrite=False)
    compared.warn_of_unknown(record, place.index, place.folder, console.typed("confusion-report", *words_of(asked)))
    others: dict[Path, ReportedRun] = {}
    faults: dict[Path, InputError | UsageError] = {}
    for given in before:
        try:
            others[given] = read_other(options, given, [own, *others.values()])
        except UnreadableError:  # for a moment, perhaps: the comparison is not given up for that
            raise
        except (InputError, UsageError) as fault:
            faults[given] = fault
    for given, why in faults.items():
        _warn_of_dropped(replace(asked, compare=list(others)), place.index, given, why)
    return others


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


def _is_own_page(place: _Place) -> bool:
    """Return whether the report in `folder` wrote index.html; a report of another phase may have replaced it."""
    if not place.index.is_file() or not (place.folder / files.RUN).is_file():
        return False
    recorded = run_json.read_run(place.folder, run_json.ReportRecord).page
    return recorded == files.sha256(files.read_bytes(place.index))


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


def _write(report: _Report, made_from: dict[str, Any]) -> bool:
    """Publish tables, figures and page, and run.json last. A page in `folder` is of this evaluation only.

    Returns:
        False if the page no longer compares with the runs `before`, because another report has written it since;
        nothing is written then.
    """
    own, folder, index, out = report.runs[0], report.place.folder, report.place.index, report.place.out
    with fonts_for([*own.dataset.class_names, own.dataset.name, own.evaluation.name]):
        pictures = draw_all(own)
    page = _make_page(report, pictures)
    files.check_place(folder, len(page))
    # Reports of all phases write the same page, so only one may run at a time.
    of_page = locks.hold(index.parent, wait=True) if index.parent != folder else nullcontext()
    with of_page, locks.hold(folder) as lock:
        now = compared.places_in(compared.record_of(index, folder), out)
        if report.before != now and report.references == compared.references(report.before, out):
            return False
        recorder = output.Recorder(folder, f"confusion/{folder.name}", made_from, lock)
        with recorder.replacing({index.name: index}) as staged:
            cells = tables.confusion_columns(own.shown.matrix)
            recorder.publish_table(files.CONFUSION_MATRIX, tables.CONFUSION_SCHEMA, cells)
            columns = {str(name): column for name, column in report.pairs.items()}
            recorder.publish_table(files.CONFUSED_PAIRS, tables.CONFUSED_PAIRS_SCHEMA, columns)
            for name, _, encoded in pictures:
                for kind, data in encoded.items():
                    recorder.publish(f"{name}.{kind}", data)
            page_sha = files.publish(staged / index.name, page.encode())
            recorder.finish(page=page_sha, picture=f"{pictures[0][0]}.png", compared=report.references)
        drawn = {name for name, *_ in pictures}
        for name in (f"{name}.{kind}" for name in PICTURES if name not in drawn for kind in ("png", "svg")):
            with suppress(OSError):  # of an earlier report, and no longer recorded
                (folder / name).unlink(missing_ok=True)
    return True


def _make_page(report: _Report, pictures: Pictures) -> str:
    """Render the page of a run and the runs that it is compared with."""
    own, called = report.runs[0], [files.utf8_text(name) for name in names_of(report.runs)]
    folder = "" if report.place.index.parent == report.place.folder else f"{report.place.folder.name}/"
    title, shown_pairs, notes = f"Confusion of {own.dataset.name}, {own.evaluation.name}", report.pairs, []
    if len(report.runs) > 1:
        title = f"Confusion of {', '.join(called)}"
        together = np.sum([run.shown.matrix for run in report.runs], axis=0)
        shown_pairs = confused_pairs(together, own.dataset.class_counts)
        if any((run.dataset.class_counts != own.dataset.class_counts).any() for run in report.runs):
            notes = [f"The runs have different training images. Orders, groups and rarer classes are from {called[0]}."]
    rows = [
        [f"{name}: {row[0]}" if len(report.runs) > 1 else row[0], *row[1:]]
        for name, run in zip(called, report.runs, strict=True)
        for row in run.accuracies
    ]
    return render_page(
        title=title,
        runs=[replace(run.shown, name=name) for name, run in zip(called, report.runs, strict=True)],
        class_names=own.dataset.class_names,
        notes=notes,
        accuracy=pd.DataFrame(rows, columns=[h.removeprefix(">") for h in ACCURACY_HEADER]),
        pairs=shown_pairs,
        named_pairs=named_pairs(report.pairs.head(NUM_ON_PAGE), own.dataset.class_names, own.dataset.class_counts),
        clustered=clustered_order(own.shown.matrix),
        images=thumbnails(own, report.num_images),
        pictures=[(caption, [f"{folder}{name}.{kind}" for kind in encoded]) for name, caption, encoded in pictures],
        embedded=[(caption, encoded["png"]) for name, caption, encoded in pictures if name == DECISION_REGIONS],
    )


def _show(report: _Report, status: str) -> None:
    """Show the most confused pairs, the accuracies, the paths of the outputs, and what the page compares.

    Args:
        report: the report.
        status: result of output.decide().
    """
    own, *others = report.runs
    called = names_of(report.runs)
    status = "up to date" if status == "done" else "done"
    kept = ", as before; --no-compare drops it" if report.is_kept else ""
    folder, index = report.place.folder, report.place.index
    picture = folder / run_json.read_run(folder, run_json.ReportRecord).picture
    size = len(own.predictions)
    wrong = size - int(own.shown.matrix.trace())
    top = report.pairs.head(NUM_SHOWN)
    if not console.as_json:
        header = ("rarer class", ">images", "more frequent class", ">images", ">confusions", ">rarer as frequent", ">%")
        rows = [
            [str(row.iloc[i]) for i in (0, 1, 2, 3, 4, 5, 7)]
            for _, row in named_pairs(top, own.dataset.class_names, own.dataset.class_counts).iterrows()
        ]
        images = f"{wrong:,} of {counted(size, 'test image')} wrong"
        title = f"most confused of {counted(len(report.pairs), 'class pair')} ({images})"
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
            "comparison_kept": report.is_kept,
            "comparison_dropped": [str(place) for place in report.dropped],
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
            *(f"no longer compares: {own.source.path} with {place}" for place in report.dropped),
        ],
    )
