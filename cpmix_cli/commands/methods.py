"""methods: list the methods that have recipes, with kind, paper, requirements, and results in CP-Mix's paper.

Kind, paper and requirements are in the recipes' [about] tables, which training ignores; results/paper.py has the
results. Reads only TOML.
"""

from typing import Any

from cpmix_cli.flags import MethodsOptions
from cpmix_cli.results.methods import all_methods, stem
from cpmix_cli.results.paper import COPIED, PAPER_TABLES
from cpmix_cli.runtime import console

SHOWN = "cifar100-lt"
"""Data set whose recipes are listed with their results."""
LARGE = tuple(column.data for column in PAPER_TABLES["table2"].columns)


def run(options: MethodsOptions) -> None:
    """List the methods.

    Raises:
        UsageError: an [about] table is wrong.
    """
    listed, rows, large = [], [], []
    methods = all_methods()
    names = {name for method in methods for name in method.recipes}
    small_only = sorted(
        stem(name) for name in names if name.startswith(f"{SHOWN}/") and f"cifar10-lt/{stem(name)}" not in names
    )
    alone = ", ".join(name for name in small_only if not name.startswith("ablation"))
    for method in methods:
        recipe = stem(next(iter(method.recipes)))
        recipes = [_printed(name, about.note) for name, about in method.recipes.items()]
        fields = {"method": method.name, "kind": method.kind, "paper": method.paper, "needs": method.needs}
        listed.append({**fields, "recipes": recipes})
        small = _cells(recipe, ("200", "table3"), ("100",), ("50",), ("10",))
        authors, *title_and_year = method.paper.split(", ")
        cited = ", ".join([authors, *title_and_year[-1:]])
        rows.append([method.name, method.kind, *small, recipe, cited, method.needs])
        if any(cells := _cells(recipe, (LARGE[0], "table4"), *((name,) for name in LARGE[1:]))):
            large.append([method.name, *cells])
    if not console.as_json:
        header = ("method", "kind", ">200", ">100", ">50", ">10", "recipe", "paper", "needs")
        title = "accuracy in CP-Mix's paper, per cent, on CIFAR-100-LT by rho (Table 1; ablations: Table 3)"
        console.table(header, rows, title=title)
    console.result(
        {"methods": listed},
        header=("method", *(f">{name}" for name in LARGE)),
        rows=large,
        title="\non large data sets (Table 2; ablations: Table 4)",
        lines=console.prose(
            [
                f"* {COPIED}",
                f"all but ablations, {alone}, cpmix-last-block (places-lt) and fixed-pairs (toy) stand for "
                "cifar10-lt too",
                f"with a number in the second table, for that data set too; ablations for {LARGE[0]}",
                f"cpmix recipes {SHOWN}/RECIPE shows one, --json has titles and notes",
            ]
        ),
    )


def _printed(name: str, note: str = "") -> dict[str, Any]:
    """Return the results of a recipe's method in CP-Mix's paper: name, cells, copied, note.

    `cells` has accuracies: of Table 1 by rho, of Table 2 by data set, of Tables 3 (rho 200) and 4 (ImageNet-LT) by
    table. A recipe of SHOWN also has those of the large data sets. `copied`: the authors took them from other papers.
    `note` is the paper tables' note, or else the given one.
    """
    family, _, method = name.rpartition("/")
    cells: dict[str, float] = {}
    copied, notes = False, []
    for key in ("table1", "table2", "table3", "table4"):
        for row in PAPER_TABLES[key].rows:
            found = {
                column.data.rpartition("-rho")[2] if key == "table1" else column.data if key == "table2" else key: cell
                for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True)
                if cell and family in ((column.family,) if key == "table1" else (column.family, SHOWN))
            }
            if row.recipe == method and found:
                cells |= {place: float(cell) for place, cell in found.items()}
                copied = copied or row.copied
                notes.append(row.name if key in ("table3", "table4") else row.note)
    said = "; ".join(dict.fromkeys(filter(None, notes)))
    return {"name": name, "cells": cells, "copied": copied, "note": said or note}


def _cells(recipe: str, *columns: tuple[str, ...]) -> list[str]:
    """Format a cell per column: the accuracy of the first of its keys that the recipe of SHOWN has; * if copied."""
    known = _printed(f"{SHOWN}/{recipe}")
    found = [next((known["cells"][key] for key in keys if key in known["cells"]), None) for keys in columns]
    return ["" if cell is None else f"{cell:.2f}{'*' if known['copied'] else ' '}" for cell in found]
