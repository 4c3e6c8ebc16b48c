"""Tables as plain text, Markdown, LaTeX and CSV: pure functions of cells."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpmix_cli.runtime.layout import prose, table_lines
from cpmix_cli.runtime.text import csv_cell, on_a_line

_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "%&_#${}"}
    | {character: f"\\text{name}{{}}" for character, name in _NAMED.items()}
)
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_|<[]"})


@dataclass(frozen=True)
class Sheet:
    """A table with a title and lines below it."""

    title: str
    header: Sequence[str]
    """Column names; a name that starts with ">" is right-aligned, without the ">"."""
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()


def plain(sheet: Sheet, width: int | None = None) -> list[str]:
    """Format a table as plain lines, in the columns of a terminal if there is a width."""
    table = table_lines(sheet.header, sheet.rows, title=sheet.title, width=width)
    return [*table, *prose(sheet.lines, width)]


def markdown(sheet: Sheet) -> list[str]:
    """Format a table as a Markdown pipe table, with the lines below it as a list."""
    header = [name.removeprefix(">") for name in sheet.header]
    names, *rows = [[_markdown(cell) for cell in row] for row in (header, *sheet.rows)]
    marks = ["---:" if name.startswith(">") else "---" for name in sheet.header]
    title = [f"**{_markdown(sheet.title)}**", ""] if sheet.title else []
    lines = ["", *(f"- {_markdown(line)}" for line in sheet.lines)] if sheet.lines else []
    return [*title, *(f"| {' | '.join(row)} |" for row in (names, marks, *rows)), *lines]


def latex(sheet: Sheet) -> list[str]:
    r"""Format a table as a LaTeX table environment, which needs only \usepackage{booktabs}."""
    columns = "".join("r" if name.startswith(">") else "l" for name in sheet.header)
    header = [name.removeprefix(">") for name in sheet.header]
    first, *rows = [f"  {' & '.join(map(_latex_cell, row))} \\\\" for row in (header, *sheet.rows)]
    return [
        r"\begin{table}",
        r"  \centering",
        *([f"  \\caption{{{_latex(sheet.title)}}}"] if sheet.title else []),
        f"  \\begin{{tabular}}{{{columns}}}",
        r"  \toprule",
        first,
        r"  \midrule",
        *rows,
        r"  \bottomrule",
        r"  \end{tabular}",
        *(f"  \\par\\footnotesize {_latex(line)}" for line in sheet.lines),
        r"\end{table}",
    ]


def csv_text(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format records with equal keys as lines of CSV with a header; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in record.items()} for record in records)
    return text.getvalue().removesuffix("\n").split("\n")


def _on_a_line(text: str) -> str:
    return on_a_line(text.replace("\n", " "))


def _markdown(text: str) -> str:
    return _on_a_line(text).translate(_MARKDOWN).replace("+-", "±")


def _latex(text: str) -> str:
    return _on_a_line(text).translate(_LATEX).replace("+-", r"$\pm$")


def _latex_cell(text: str) -> str:
    """Escape a cell. A leading [ or * is braced: after the line end before it, LaTeX would read it as an argument."""
    escaped = re.sub(r"^-(?=\d)", "$-$", _latex(text))
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
