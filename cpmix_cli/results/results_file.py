"""Results files: CSV with one row per measured run and evaluation. compare --append adds rows, results shows them.

All cells are text; an empty cell is unknown. Imports nothing heavy.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from cpmix_cli.artifacts import files, locks
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.runtime.text import csv_cell

PERCENT = r"(100(\.0+)?|\d\d?(\.\d+)?)?"
NUMBER = r"(\d+(\.\d+)?)?"
TEXT = r".*"
COLUMNS = {
    "study": r".+",
    "method": r".+",
    "recipe": TEXT,
    "recipe_sha256": r"([0-9a-f]{64})?",
    "data": r".+",
    "rho": NUMBER,
    "seed": r"\d*",
    "epochs": r"(\d+(\+\d+)*)?",
    "phase": "|".join(files.PHASES),
    "label": TEXT,
    "split": r".+",
    "top1": PERCENT,
    "many": PERCENT,
    "medium": PERCENT,
    "few": PERCENT,
    "ece": PERCENT,
    "image_passes": r"\d*",
    "training_seconds": NUMBER,
    "device": TEXT,
    "threads": TEXT,
    "precision": TEXT,
    "versions": TEXT,
    "commit": TEXT,
    "command": TEXT,
    "checkpoint": r"([0-9a-f]{12})?",
    "paper": NUMBER + r"\*?",
    "note": TEXT,
}
"""Column -> pattern of its cells, in the order of the file."""
MEASURES = {"top1": "top-1", "many": "many", "medium": "medium", "few": "few", "ece": "ECE"}
"""Column of a measure in per cent -> its name in tables."""
IDENTITY = ("checkpoint", "label", "split", *MEASURES)
"""Columns that two rows of one evaluation share."""
Row = Mapping[str, str]
"""Column -> cell."""


def read_results(path: Path) -> list[Row]:
    """Read the rows of a results file.

    Raises:
        InputError: the file is missing, has another header, or a row is damaged.
    """
    return _parsed(path, files.read_bytes(path))


def _parsed(path: Path, data: bytes) -> list[Row]:
    rows: list[Row] = []
    restore = "correct the line, or restore the file from a copy"
    try:
        lines = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        header = next(lines, [])
        if header != list(COLUMNS):
            pairs = enumerate(zip_longest(header, COLUMNS, fillvalue=""), start=1)
            number, (found, expected) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
            raise InputError(
                f'{path} is no results file: column {number} of its header is "{found}", not "{expected}"',
                fix="give another file; compare --append creates it with its header",
            )
        for cells in lines:
            where = f"{path}, line {lines.line_num}"
            if len(cells) != len(COLUMNS):
                raise InputError(f"{where} has {len(cells)} cells, the header has {len(COLUMNS)}", fix=restore)
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
            for column, cell in rows[-1].items():
                if not re.fullmatch(COLUMNS[column], cell, re.DOTALL):
                    raise InputError(f'{where}: {column} "{cell}" is no value of that column', fix=restore)
    except (UnicodeDecodeError, csv.Error) as fault:
        raise InputError(f"{path} is no CSV file: {fault}", fix=restore) from fault
    if not data.endswith(b"\n"):
        raise InputError(f"{path}, line {lines.line_num} is cut off: it has no line end", fix=restore)
    return rows


def append(path: Path, rows: Sequence[Row]) -> tuple[int, int]:
    """Append the rows of evaluations that a results file lacks, and publish the file whole.

    The file is created if missing. Its earlier bytes are kept. Other processes that append to it wait.

    Returns:
        Number of rows that were appended, and number of rows that were there.

    Raises:
        InputError: see read_results(); nothing is written.
        EnvironmentFault: the file cannot be written.
    """
    path = path.resolve()  # links to one file share its lock
    # The lock is in a folder of its own: taking a lock removes temporary files beside it, and those of --out in the
    # file's folder may be alive.
    with locks.hold(path.with_name(f".cpmix-append-{files.sha256(path.name.encode())[:8]}"), wait=True):
        data = files.read_bytes(path) if files.is_there(path) else _lines([dict(zip(COLUMNS, COLUMNS, strict=True))])
        known = {_identity(row) for row in _parsed(path, data)}
        new = {identity: row for row in rows if (identity := _identity(row)) not in known}
        if new:
            files.publish_out(path, data + _lines(list(new.values())))
    return len(new), len(rows) - len(new)


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(csv_cell(row[column]) for column in IDENTITY)


def _lines(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(
        {column: csv_cell(cell) for column, cell in row.items()} for row in rows
    )
    return text.getvalue().encode("utf-8", "backslashreplace")
