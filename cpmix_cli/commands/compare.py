"""compare: show evaluations of many runs in one table, or in the layout of a table of CP-Mix's paper.

Runs share a row if all their records agree except the seed (results/comparison.py). What rows of one method differ in
is listed below the table. Rows are also compared run by run (results/paired.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cpmix_cli.artifacts import files
from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.flags import CompareOptions
from cpmix_cli.results import comparison, paired, results_file
from cpmix_cli.results.comparison import ComparisonRow, EvaluatedRun
from cpmix_cli.results.measured_row import row_of
from cpmix_cli.results.paper import COPIED, PAPER_TABLES, Column, PaperRow, PaperTable
from cpmix_cli.results.results_file import MEASURES
from cpmix_cli.results.table_formats import Sheet, csv_text, latex, markdown, plain
from cpmix_cli.runs.phase_choice import locate
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted, shortened
from cpmix_cli.runtime.rounding import percent, signed
from cpmix_cli.runtime.text import printable

WINNERS_CURSE = (
    "ranked by val. The best of several on val is in part luck, so its val number is too high: measure it once on test"
)
MAX_LISTED = 8
"""Largest number of keys in a line below the table."""
FORMS: dict[str, Callable[[Sheet], list[str]]] = {"table": plain, "markdown": markdown, "latex": latex, "json": plain}


def run(options: CompareOptions) -> None:
    """Collect the evaluations of all runs and show them.

    Raises:
        UsageError: both --json and another --format are given, or --study without --append.
        InputError: a folder is no run, no evaluation is usable, or a record, metrics or the --append file is damaged.
        EnvironmentFault: --out exists, or --out or --append cannot be written.
    """
    if console.as_json and options.form not in ("table", "json"):
        raise UsageError(f"--json and --format {options.form} are two output formats", fix="drop one of the two flags")
    if options.study is not None and options.append is None:
        raise UsageError("--study is of --append", fix="give the results file too: --append FILE")
    console.as_json = console.as_json or options.form == "json"
    if options.out is not None:
        files.refuse_existing(options.out, _is_own, overwrite=options.overwrite)
    measured: list[EvaluatedRun] = []
    left_out: list[str] = []
    seen: set[tuple[Path, str | None]] = set()
    for folder in options.folders:
        root, phase = locate(folder)
        if (root.resolve(), phase) in seen:
            console.note(f"compare: {folder} is given twice, and counted once")
        else:
            seen.add((root.resolve(), phase))
            found, others = comparison.evaluations_of(root, phase)
            measured += found
            left_out += others
    measured = _of_split(measured, options)
    rows = comparison.in_rows(measured)
    if options.split == "val":  # best first within a data set; data sets keep their order
        data = list(dict.fromkeys(row.first.data for row in rows))
        rows.sort(key=lambda row: (data.index(row.first.data), -(row.statistics("top1")[0] or 0)))
    if options.paper is None:
        # CSV has one record per row, so it needs no predictions.
        pairs = [] if options.form == "csv" else paired.paired_rows(rows, measured[0].run)
        fields: dict[str, Any] = {
            "rows": [_row_fields(row) for row in rows],
            "differences": comparison.differences_of(rows),
            "paired": [pair.fields() for pair in pairs],
        }
        with_deviations = options.form != "table"
        sheets = _sheets_of(rows, with_deviations=with_deviations)
        if options.split == "val":
            sheets[-1] = replace(sheets[-1], lines=[*sheets[-1].lines, WINNERS_CURSE])
        if pairs:
            sheets += paired.sheets_of(pairs, with_deviations=with_deviations)
        sheets.append(_cost_sheet(rows))
        records = _records_of(rows)
    else:
        table = PAPER_TABLES[options.paper]
        for other in (row.first for row in rows if not _places(row, table)):
            what = f"{other.name}, finetune {other.stage}, {other.data}"
            console.note(f"compare: in no cell of {options.paper}: {what} ({other.run})")
        records = _paper_records(table, rows)
        fields = {"paper": options.paper, "title": table.title, "note": table.note, "cells": records}
        sheets = [_paper_sheet(table, rows)]
    if options.append is not None:
        new, present = results_file.append(
            options.append, [row_of(run, options.study) for row in rows for run in row.runs]
        )
        fields["append"] = {"file": str(options.append), "appended": new, "present": present}
        console.note(f"compare: {counted(new, 'row')} appended to {options.append}, {present} already there")
    _publish(options, {**fields, "left_out": left_out}, sheets, records)


_OWN = re.compile(
    r"[^\n]*, per cent\n[^\n]*\n[- ]+\n"
    r"|\*\*[^\n]*, per cent\*\*\n\n\|[^\n]*\n\| ---"
    r"|% \\usepackage\{booktabs\}\n\\begin\{table\}\n  \\centering\n  \\caption\{[^\n]*, per cent\}\n"
    r"|method,(recipe,changed,data|column,data,measure,paper),"
    r'|\{\s*"command": "compare",'
)
"""First lines of a table of compare: plain, Markdown, LaTeX, CSV, JSON."""


def _is_own(data: bytes) -> bool:
    """Return whether a file is a table that compare has written, in any of its formats."""
    return _OWN.match(data.decode(errors="replace")) is not None


def _of_split(measured: list[EvaluatedRun], options: CompareOptions) -> list[EvaluatedRun]:
    """Return the evaluations on the split of --split, or all without it; raise InputError if none is left."""
    if options.split is not None:
        measured = [run for run in measured if run.conditions["test images"] == f"own {options.split} split"]
    if measured:
        return measured
    folders = ", ".join(map(str, options.folders))
    if options.split is None:
        raise InputError(f"no evaluation of use in {folders}", fix=console.typed("status", *options.folders))
    raise InputError(
        f"no evaluation of the {options.split} split in {folders}",
        needed_by=f"compare --split {options.split}",
        fix=console.typed("evaluate", "--from", options.folders[0], "--split", options.split),
    )


def _publish(
    options: CompareOptions, fields: dict[str, Any], sheets: Sequence[Sheet], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write the result to stdout or --out."""
    if options.form == "csv":
        lines = csv_text(records)
    else:
        form = FORMS[options.form]
        if form is plain and options.out is None:
            form = partial(plain, width=console.columns())
        lines = [line for number, sheet in enumerate(sheets) for line in (*([""] if number else []), *form(sheet))]
        if options.form == "latex":
            lines.insert(0, r"% \usepackage{booktabs}")
    if options.out is None:
        console.result(fields, lines=lines)
        return
    text = files.json_text(console.with_command(fields)) if console.as_json else "\n".join(map(printable, lines))
    files.publish_out(options.out, (text + "\n").encode("utf-8", "backslashreplace"))
    console.result({"status": "done", "file": str(options.out)}, lines=[f"done: {options.out}"])


def _listed(numbers: Sequence[int]) -> str:
    """Join numbers as in "1, 2 and 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def _row_fields(row: ComparisonRow) -> dict[str, Any]:
    """Return a row as plain values in full precision."""
    run, published = row.first, row.published()
    mean = row.statistics("top1")[0]
    return {
        "method": run.name,
        "recipe": run.method.recipe,
        "changed": run.method.changed,
        "data": run.data,
        "rho": comparison.split_name(run.data)[1],
        "finetune": run.stage,
        "n": len(row.runs),
        "seeds": [r.seed for r in row.runs],
        "runs": [str(r.run) for r in row.runs],
        **{key: dict(zip(("mean", "std"), row.statistics(key), strict=True)) for key in MEASURES},
        "num_parameters": run.num_parameters,
        "num_experts": run.numbers.num_experts,
        "precision": run.conditions["precision"],
        "epochs": list(run.epochs),
        "full_epochs": run.full_epochs,
        **row.cost(),
        "paper": float(published[1]) if published else None,
        "paper_copied": published[0].copied if published else None,
        "difference": mean - float(published[1]) if published and mean is not None else None,
        "conditions": run.conditions,
    }


def _records_of(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """Return rows for CSV, without lists or tables; the last column lists differences from the method's other rows."""
    records = []
    for row in rows:
        record: dict[str, Any] = {}
        for key, value in _row_fields(row).items():
            if key in MEASURES:
                record |= {f"{key}_{part}": number for part, number in value.items()}
            elif key != "conditions":
                record[key] = FLATTEN[key](value) if key in FLATTEN else value
        records.append(record | {"differs": ""})
    for entry in comparison.differences_of(rows):
        for place, number in enumerate(entry["rows"]):
            values = (f"{key}={comparison.shown(values[place])}" for key, values in entry["keys"].items())
            records[number - 1]["differs"] = "; ".join(values)
    return records


FLATTEN: dict[str, Callable[[Any], str]] = {
    "seeds": lambda seeds: " ".join(map(str, seeds)),
    "runs": " ".join,
    "epochs": lambda epochs: "+".join(map(str, epochs)),
    "changed": comparison.said,
}


def _with_deviation(row: ComparisonRow, measure: str) -> str:
    """Format mean and standard deviation with two decimals."""
    mean, deviation = row.statistics(measure)
    if mean is None:
        return "-"
    return percent(mean, 2) if deviation is None else f"{percent(mean, 2)} +- {percent(deviation, 2)}"


def _sheets_of(rows: Sequence[ComparisonRow], *, with_deviations: bool) -> list[Sheet]:
    """Make a table of accuracies per data set.

    Without `with_deviations` only top-1 has a deviation, which keeps the table within a terminal.
    """
    numbered = list(enumerate(rows, start=1))
    sheets = [
        _accuracy_sheet(data, [(n, row) for n, row in numbered if row.first.data == data], with_deviations)
        for data in dict.fromkeys(row.first.data for row in rows)
    ]
    sheets[-1] = replace(sheets[-1], lines=_accuracy_lines(numbered, with_deviations))
    return sheets


def _accuracy_sheet(data: str, numbered: Sequence[tuple[int, ComparisonRow]], with_deviations: bool) -> Sheet:
    """Make the table of accuracies on one data set."""
    header = ["#", "method", "finetune", ">n", *(f">{name}" for name in MEASURES.values())]
    published = [row.published() for _, row in numbered]
    if any(published):
        header += [">paper", ">diff"]
    table = []
    for (number, row), found in zip(numbered, published, strict=True):
        run = row.first
        cells = [str(number), run.name, run.stage, str(len(row.runs))]
        for measure in MEASURES:
            cell = _with_deviation(row, measure)
            cells.append(cell if with_deviations or measure == "top1" else cell.partition(" ")[0])
        if any(published):
            mean = row.statistics("top1")[0]
            if found is None or mean is None:
                cells += ["-", "-"]
            else:
                cells += [found[1] + "*" * found[0].copied, signed(mean - float(found[1]), 2)]
        table.append(cells)
    return Sheet(f"{data}, per cent", header, table)


def _accuracy_lines(numbered: Sequence[tuple[int, ComparisonRow]], with_deviations: bool) -> list[str]:
    """What is comparison.said below the accuracies."""
    rows = [row for _, row in numbered]
    lines: list[str] = []
    if any(len(row.runs) > 1 for row in rows):
        rest = "" if with_deviations else " (other columns: --format csv)"
        lines.append(f"+-: sample standard deviation of n runs{rest}")
    for number, row in numbered:
        seeds = [r.seed for r in row.runs]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            lines.append(
                f"row {number} has several runs of seed {_listed(twice)}: its +- is not that of {len(seeds)} seeds"
            )
        run = row.first
        if len(run.method.changed) > comparison.MAX_NAMED:
            keys = [comparison.said({key: value}) for key, value in run.method.changed.items()]
            lines.append(f"{run.name}: {run.method.recipe} but for {shortened(keys, MAX_LISTED)}")
    known = [(number, row, found) for number, row in numbered if (found := row.published())]
    if known:
        lines.append("paper: top-1 in its Tables 1 to 4")
    if any(found[0].copied for *_, found in known):
        lines.append(f"* {COPIED}")
    if given := [number for number, row, _ in known if row.first.conditions["init"] not in ("none", "unknown")]:
        lines.append(f"row{'s' * (len(given) > 1)} {_listed(given)}: started from pretrained weights (--init)")
    fewer: dict[str, list[int]] = {}
    for number, row, _ in known:
        if row.first.full_epochs is not None:
            fewer.setdefault(_epochs_note(row), []).append(number)
    for note, numbers in fewer.items():
        lines.append(f"row{'s' * (len(numbers) > 1)} {_listed(numbers)}: {note}; diff is to the paper's full training")
    for entry in comparison.differences_of(rows):
        keys = [f"{key}: {_by_row(values, entry['rows'])}" for key, values in entry["keys"].items()]
        lines.append(f"rows {_listed(entry['rows'])} differ in {shortened(keys, MAX_LISTED, '; ')}")
    return lines


def _by_row(values: Sequence[Any], numbers: Sequence[int]) -> str:
    """Format values of rows: "crop, none" of two; of more, each value once with its rows, "crop (1, 2), none (3)"."""
    if len(values) == 2:
        return ", ".join(map(comparison.shown, values))
    rows: dict[str, list[str]] = {}
    for value, number in zip(values, numbers, strict=True):
        rows.setdefault(comparison.shown(value), []).append(str(number))
    return ", ".join(f"{value} ({', '.join(of_value)})" for value, of_value in rows.items())


def _epochs_note(row: ComparisonRow) -> str:
    """Format the epochs of both stages as in "10 of 300 epochs"."""
    return f"{row.first.conditions['schedule.epochs']} of {row.first.full_epochs} epochs"


def _cost_sheet(rows: Sequence[ComparisonRow]) -> Sheet:
    """Make the table of training costs."""
    numbered = list(enumerate(rows, start=1))
    costs = {number: row.cost() for number, row in numbered}
    on_gpu = any(cost["gpu_hours"] is not None for cost in costs.values())
    header = ["#", ">parameters", ">epochs", ">images/s", ">training", *([">GPU-hours"] if on_gpu else []), "device"]
    same: dict[tuple[str, ...], list[int]] = {}
    for number, row in numbered:
        cost = costs[number]
        speed, seconds, hours = (cost[key] for key in ("images_per_second", "training_seconds", "gpu_hours"))
        cells = (
            f"{row.first.num_parameters:,}",
            "+".join(map(str, row.first.epochs)),
            "-" if speed is None else f"{speed:,.0f}",
            "-" if seconds is None else console.duration(seconds),
            *(["-" if hours is None else f"{hours:.2f}"] if on_gpu else []),
            cost["device"] or "-",
        )
        # Evaluations of the same checkpoints share a line; other equal costs do not.
        checkpoints = tuple(sorted(r.checkpoint for r in row.runs))
        same.setdefault((*checkpoints, *cells), []).append(number)
    width = len(header) - 1
    table = [[_listed(numbers), *key[-width:]] for key, numbers in same.items()]
    lines = [
        "totals of all phases that lead to the checkpoint, in this run or others",
        "(a shared stage 1 counts in each row); means over n runs",
        "images/s: images through the network, once per term",
    ]
    if any(cost["device"] is None for cost in costs.values()):
        lines.append("-: unknown, a phase is missing")
    return Sheet("training", header, table, lines)


def _places(row: ComparisonRow, table: PaperTable) -> list[tuple[PaperRow, Column]]:
    """Return the cells of a paper table that a row corresponds to."""
    return [(theirs, column) for theirs in table.rows for column in table.columns if row.stands_for(theirs, column)]


def _paper_records(table: PaperTable, rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """Return a record per cell of a paper table and row of ours, or one with NO_RUN for a cell without rows."""
    records = []
    for theirs in table.rows:
        for column, cell in zip(table.columns, theirs.cells, strict=True):
            cells = {
                "method": theirs.name,
                "column": column.header,
                "data": column.data,
                "measure": column.measure,
                "paper": float(cell) if cell is not None else None,
                "paper_copied": theirs.copied,
            }
            found = [row for row in rows if row.stands_for(theirs, column)]
            for ours in [_our_fields(row, column) for row in found] or [NO_RUN]:
                records.append({**cells, **ours, "note": theirs.note})
    return records


NO_RUN = {"ours_mean": None, "ours_std": None, "n": 0, "epochs": None, "full_epochs": None, "runs": ""}


def _our_fields(row: ComparisonRow, column: Column) -> dict[str, Any]:
    """Return the fields of a record about a row of ours."""
    mean, deviation = row.statistics(column.measure)
    return {
        "ours_mean": mean,
        "ours_std": deviation,
        "n": len(row.runs),
        "epochs": row.first.conditions["schedule.epochs"],
        "full_epochs": row.first.full_epochs,
        "runs": " ".join(str(run.run) for run in row.runs),
    }


def _paper_sheet(table: PaperTable, rows: Sequence[ComparisonRow]) -> Sheet:
    """Make a table of the paper, each row followed by ours; cells without a run are empty."""
    letters: dict[str, str] = {}

    def cell_of(row: ComparisonRow, column: Column, beside: int) -> str:
        seeds = counted(len(row.runs), "run")
        note = seeds if row.first.full_epochs is None else f"{seeds} of {_epochs_note(row)}"
        few = row.first.conditions["few_inclusive"]
        if column.measure in GROUPS and few != table.few_inclusive:
            note += ", classes of 20 images are few" if few else ", classes of 20 images are medium"
        if row.first.conditions["init"] not in ("none", "unknown"):
            note += f", started from pretrained weights {row.first.conditions['init']}"
        if beside > 1:
            note += f", {row.first.run}"
        letter = letters.setdefault(note, _letter_of(len(letters)))
        return f"{_with_deviation(row, column.measure)} {letter}"

    body = []
    for theirs in table.rows:
        printed = ["-" if cell is None else cell for cell in theirs.cells]
        body.append([theirs.name + "*" * theirs.copied, "paper", *printed])
        ours = []
        for column in table.columns:
            found = [row for row in rows if row.stands_for(theirs, column)]
            ours.append(" / ".join(cell_of(row, column, len(found)) for row in found))
        body.append(["", "ours", *ours])
    lines = [f"{letter}: {note}" for note, letter in letters.items()]
    if any(row.copied for row in table.rows):
        lines.append(f"* {COPIED}")
    lines += [f"{row.name}: {row.note}" for row in table.rows if row.note]
    lines += [table.note] if table.note else []
    header = ["method", "", *(f">{column.header}" for column in table.columns)]
    return Sheet(f"{table.title}, per cent", header, body, lines)


def _letter_of(number: int) -> str:
    """Return the label of note `number`: a, b, ..., z, aa, ab, ..."""
    return (_letter_of(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
