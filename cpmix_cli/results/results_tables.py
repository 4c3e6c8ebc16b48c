"""Tables of a results file, for a terminal and for Markdown files that mark where they stand. Imports nothing heavy.

A line of a table is a run: its evaluation before the finetune, and for columns with "+" the one after it. Without the
column seed, runs that differ only in the seed share a line.
"""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

from cpmix_cli.results.results_file import COLUMNS, MEASURES, Row
from cpmix_cli.results.table_formats import Sheet, markdown
from cpmix_cli.runtime.errors import InputError, suggest
from cpmix_cli.runtime.rounding import percent

START = re.compile(r"<!-- results: study=(.+) columns=(\S+) -->")
END = "<!-- end of results -->"
EXAMPLE = "<!-- results: study=NAME columns=method,seed,top1,+top1 -->"
FINETUNE = "+"
"""Prefix of columns of the evaluation after the finetune."""
RUN = ("study", "method", "recipe", "data", "rho", "label", "split", "precision")
"""Columns that both evaluations of a run share, and runs of all seeds."""
SHOWN = ("method", "data", "seed", "epochs", "phase", "label", "split", "precision", *MEASURES, "paper")
"""Columns of sheets_of()."""
NUMBERS = (*MEASURES, "rho", "seed", "paper", "image_passes", "training_seconds")


def sheets_of(rows: Sequence[Row]) -> list[Sheet]:
    """Return a table per study, with one line per row. Columns with equal cells are said below it."""
    sheets = []
    for study in dict.fromkeys(row["study"] for row in rows):
        own = [row for row in rows if row["study"] == study]
        cells = {column: [row[column] for row in own] for column in SHOWN}
        shown = [c for c in SHOWN if c in ("method", "top1") or len(set(cells[c])) > 1]
        same = [f"{column} {cells[column][0]}" for column in SHOWN if column not in shown and cells[column][0]]
        header = [f">{_title(column)}" if column in NUMBERS else _title(column) for column in shown]
        body = [[row[column] for column in shown] for row in own]
        sheets.append(Sheet(study, header, body, [f"all: {', '.join(same)}"] if same else []))
    return sheets


def _title(column: str) -> str:
    return MEASURES.get(column, column.replace("_", " "))


def sheet_of(rows: Sequence[Row], columns: Sequence[str]) -> Sheet:
    """Return the table of a study.

    Args:
        rows: rows of the study.
        columns: names of columns; those with "+" are of the evaluation after the finetune.
    """
    finetuned = [column for column in columns if column.startswith(FINETUNE)]
    header = []
    for column in columns:
        name = column.removeprefix(FINETUNE)
        title = f"+ finetune: {_title(name)}" if finetuned and column == finetuned[0] else _title(name)
        header.append(f">{title}" if name in NUMBERS else title)
    lines = _lines_of(rows, with_finetune=bool(finetuned), by_seed="seed" in columns)
    return Sheet("", header, [[_cell(before, after, column) for column in columns] for before, after in lines])


def _lines_of(rows: Sequence[Row], *, with_finetune: bool, by_seed: bool) -> list[tuple[list[Row], list[Row]]]:
    """Return the rows of each line, before and after the finetune."""
    times: Counter[tuple[str, ...]] = Counter()
    lines: dict[tuple[str, ...], tuple[list[Row], list[Row]]] = {}
    for row in rows:
        after = with_finetune and row["phase"] == "finetune"
        epochs = row["epochs"].rpartition("+")[0] if after else row["epochs"]
        run = (*(row[column] for column in RUN), epochs, "" if with_finetune else row["phase"])
        # A second row of one seed is another run of it: it starts another line.
        evaluation = (*run, row["seed"], str(after))
        times[evaluation] += 1
        line = (*run, row["seed"] if by_seed else "", str(times[evaluation]))
        lines.setdefault(line, ([], []))[after].append(row)
    return list(lines.values())


def _cell(before: Sequence[Row], after: Sequence[Row], column: str) -> str:
    name = column.removeprefix(FINETUNE)
    rows = after if column != name else [*before, *after] if column in (*RUN, "seed") else before
    cells = [row[name] for row in rows if row[name]]
    if name not in MEASURES:
        return ", ".join(dict.fromkeys(cells))
    numbers = list(map(float, cells))
    if len(numbers) > 1:
        return f"{percent(fmean(numbers), 2)} +- {percent(stdev(numbers), 2)}"
    return percent(numbers[0], 2) if numbers else ""


def updated(where: str, text: str, rows: Sequence[Row]) -> tuple[str, int]:
    """Return a Markdown text with its tables made from a results file, and the number of tables.

    Args:
        where: name of the text, for messages.
        text: the text; a table stands between START and END, each on a line of its own.
        rows: rows of the results file.

    Raises:
        InputError: there is no table, a mark is wrong or lacks its end, or a study or column is unknown.
    """
    out: list[str] = []
    number_of_tables, opened = 0, 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("<!-- results:"):
            if opened:
                break
            opened, number_of_tables = number, number_of_tables + 1
            made = markdown(_sheet_of_mark(f"{where}, line {number}", line.rstrip(), rows))
            out += [line, *(row + "\r" * line.endswith("\r") for row in made)]  # a file of Windows keeps its line ends
        elif line.rstrip() == END and opened:
            opened = 0
        if not opened:
            out.append(line)
    if opened:
        raise InputError(f"{where}, line {opened}: this table has no end", fix=f"add a line {END} below the table")
    if not number_of_tables:
        raise InputError(f"{where} marks no table", fix=f"write lines {EXAMPLE} and {END} where a table belongs")
    return "\n".join(out), number_of_tables


def _sheet_of_mark(where: str, mark: str, rows: Sequence[Row]) -> Sheet:
    found = START.fullmatch(mark)
    if not found:
        raise InputError(f"{where}: {mark} does not name a study and columns", fix=f"write it as {EXAMPLE}")
    study, columns = found[1], found[2].split(",")
    own = [row for row in rows if row["study"] == study]
    if not own:
        known = suggest(study, {row["study"] for row in rows})
        raise InputError(
            f'{where}: the results file has no study "{study}".{known}', fix="name one of the file's studies"
        )
    for column in columns:
        if (name := column.removeprefix(FINETUNE)) not in COLUMNS:
            raise InputError(f'{where}: no column "{name}".{suggest(name, COLUMNS)}', fix="name columns of the file")
    return sheet_of(own, columns)
