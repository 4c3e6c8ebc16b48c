"""Tables as text that others read: Markdown, LaTeX and CSV. Pure functions of cells."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpmix_cli.runtime.console import table_lines

_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "%&_#${}"}
    | {character: f"\\text{name}{{}}" for character, name in _NAMED.items()}
    | {"\n": " "}
)
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_|<[]"} | {"\n": " "})


@dataclass(frozen=True)
class Sheet:
    """A table with what is said above and below it."""

    title: str
    header: Sequence[str]
    """Column names; one that starts with ">" is right-aligned."""
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()


def plain(sheet: Sheet) -> list[str]:
    """Lines for a terminal."""
    return [*table_lines(sheet.header, sheet.rows, title=sheet.title), *sheet.lines]


def markdown(sheet: Sheet) -> list[str]:
    """A pipe table, the lines below it as a list."""
    header = [name.removeprefix(">") for name in sheet.header]
    names, *rows = [[_markdown(cell) for cell in row] for row in (header, *sheet.rows)]
    marks = ["---:" if name.startswith(">") else "---" for name in sheet.header]
    title = [f"**{_markdown(sheet.title)}**", ""] if sheet.title else []
    lines = ["", *(f"- {_markdown(line)}" for line in sheet.lines)] if sheet.lines else []
    return [*title, *(f"| {' | '.join(row)} |" for row in (names, marks, *rows)), *lines]


def latex(sheet: Sheet) -> list[str]:
    r"""A table environment; nothing but \usepackage{booktabs} is needed."""
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
    """Records with the same keys as lines of CSV, a header first; nothing for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().removesuffix("\n").split("\n")


def _markdown(text: str) -> str:
    return text.translate(_MARKDOWN).replace("+-", "±")


def _latex(text: str) -> str:
    return text.translate(_LATEX).replace("+-", r"$\pm$")


def _latex_cell(text: str) -> str:
    """A cell; a row that began with a bracket or star would give it to the line end before."""
    escaped = re.sub(r"^-(?=\d)", "$-$", _latex(text))
    return f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
