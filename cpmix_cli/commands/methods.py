"""methods: every method that has a recipe, with its kind, paper, needs, and its cells in the tables of CP-Mix's paper.

A recipe says it in its [about] table, which no training looks at; paper.py has the cells. recognised() says which
method a trained recipe is. Reads TOML alone.
"""

from dataclasses import dataclass
from typing import Any

from cpmix_cli.results.methods import Method, all_methods, stem
from cpmix_cli.results.paper import COPIED, PAPER_TABLES
from cpmix_cli.runtime import console

SHOWN = "cifar100-lt"
"""The data set whose recipes have the cells that are shown."""
LARGE = tuple(column.data for column in PAPER_TABLES["table2"].columns)


@dataclass(frozen=True)
class Printed:
    """What CP-Mix's paper prints for the method of a recipe."""

    cells: dict[str, str]
    """Accuracy by rho in Table 1, for its data set, or in Table 3, which is at rho 200; in Table 2 by data set, or in
    Table 4, which is on ImageNet-LT. A recipe of CIFAR-100-LT has those of the large data sets too."""
    copied: bool
    """Its authors copied them from other papers."""
    note: str
    """What to know of them."""


def run() -> None:
    """List the methods.

    Raises:
        UsageError: an [about] table is wrong.
    """
    methods = all_methods()
    listed = [
        {"method": m.name, "kind": m.kind, "paper": m.paper, "needs": m.needs, "recipes": told(m)} for m in methods
    ]
    rows = [[m.name, m.kind, *small_cells(m), stem(next(iter(m.recipes))), citation(m.paper), m.needs] for m in methods]
    large = [[m.name, *cells] for m in methods if any(cells := large_cells(m))]
    if not console.as_json:
        header = ("method", "kind", ">200", ">100", ">50", ">10", "recipe", "paper", "needs")
        title = "accuracy in CP-Mix's paper, per cent, on CIFAR-100-LT by rho (Table 1; ablations: Table 3)"
        console.table(header, rows, title=title)
    console.result(
        {"methods": listed},
        header=("method", *(f">{name}" for name in LARGE)),
        rows=large,
        title="\non large data sets (Table 2; ablations: Table 4)",
        lines=[
            f"* {COPIED}",
            "all but ablations, cpmix-last-block (places-lt) and fixed-pairs (toy) stand for cifar10-lt too",
            f"with a number in the second table, for that data set too; ablations for {LARGE[0]}",
            f"cpmix recipes {SHOWN}/RECIPE shows one, --json has titles and notes",
        ],
    )


def citation(paper: str) -> str:
    """Ren et al., NeurIPS 2020 of "Ren et al., TITLE, NeurIPS 2020"."""
    parts = paper.split(", ")
    return ", ".join([parts[0], parts[-1]]) if len(parts) > 1 else paper


def printed(name: str) -> Printed:
    """What the paper has for the recipe of this name."""
    family, _, method = name.rpartition("/")
    cells: dict[str, str] = {}
    copied, notes = False, []
    for key in ("table1", "table2", "table3", "table4"):
        for row in PAPER_TABLES[key].rows:
            found = {
                column.data.rpartition("-rho")[2] if key == "table1" else column.data if key == "table2" else key: cell
                for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True)
                if cell and family in ((column.family,) if key == "table1" else (column.family, SHOWN))
            }
            if row.recipe == method and found:
                cells |= found
                copied = copied or row.copied
                notes.append(row.name if key in ("table3", "table4") else row.note)
    return Printed(cells, copied, "; ".join(dict.fromkeys(filter(None, notes))))


def told(method: Method) -> list[dict[str, Any]]:
    """Its recipes as plain values."""
    listed = []
    for name, about in method.recipes.items():
        found = printed(name)
        cells = {key: float(cell) for key, cell in found.cells.items()}
        listed.append({"name": name, "cells": cells, "copied": found.copied, "note": found.note or about.note})
    return listed


def small_cells(method: Method) -> list[str]:
    """Cells at rho 200, 100, 50, 10."""
    return _cells(method, ("200", "table3"), ("100",), ("50",), ("10",))


def large_cells(method: Method) -> list[str]:
    """Cells of LARGE."""
    return _cells(method, ("imagenet-lt", "table4"), ("places-lt",), ("inaturalist2018",))


def _cells(method: Method, *columns: tuple[str, ...]) -> list[str]:
    """A cell a column, the first of its keys that the method has; copied ones with a star."""
    known = printed(f"{SHOWN}/{stem(next(iter(method.recipes)))}")
    found = [next((known.cells[key] for key in keys if key in known.cells), None) for keys in columns]
    return ["" if cell is None else f"{float(cell):.2f}{'*' if known.copied else ' '}" for cell in found]
