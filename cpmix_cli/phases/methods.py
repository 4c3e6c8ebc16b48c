"""methods: every method that has a recipe, with its kind, paper, needs, and its cells in the tables of CP-Mix's paper.

A recipe says it in its [about] table, which no training looks at; paper.py has the cells. recognised() says which
method a trained recipe is. Reads TOML alone.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from cpmix_cli import console
from cpmix_cli.errors import UsageError
from cpmix_cli.paper import COPIED, TABLES
from cpmix_cli.recipe import PHASE_TABLES, Recipe, Table, changed, find_recipe, load, read_tables, recipe_names

Kind = Literal["loss", "reweighting", "mixing", "decoupled", "ensemble", "CP-Mix", "control", "ablation"]
KINDS = get_args(Kind)
"""In the order of the list."""
SHOWN = "cifar100-lt"
"""The data set whose recipes have the cells that are shown."""
LARGE = tuple(column.data for column in TABLES["table2"].columns)


class About(Table):
    """[about] of a recipe: where its method comes from."""

    method: str
    """Its name, as in the paper's tables where it is there. The recipes of a method share it."""
    kind: Kind | None = None
    """This and the next two stand in one recipe of the method."""
    paper: str = ""
    """Authors, title, venue, year."""
    needs: str = ""
    """What it takes beside images and labels."""
    note: str = ""
    """What else to know of it."""


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


@dataclass(frozen=True)
class Method:
    """A method and what its recipes say of it."""

    name: str
    kind: str
    paper: str
    needs: str
    recipes: dict[str, About]
    """By the recipe's name."""


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
        {"command": "methods", "methods": listed},
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


def all_methods() -> list[Method]:
    """The methods in the order of KINDS. A recipe without [about] is of the method that has a recipe of its name for
    another data set.

    Raises:
        UsageError: an [about] table is wrong, or none of a method's says its kind.
    """
    found = {name: about for name in recipe_names() if (about := read_about(find_recipe(name))) is not None}
    of_stem = {stem(name): about.method for name, about in found.items()}
    recipes: dict[str, dict[str, About]] = {}
    for name in recipe_names():
        if (method := of_stem.get(stem(name))) is not None:
            recipes.setdefault(method, {})[name] = found.get(name, About(method=method))
    methods = []
    for method, abouts in recipes.items():
        main = next((about for about in abouts.values() if about.kind is not None), None)
        if main is None or main.kind is None:
            path = find_recipe(next(iter(abouts)))
            raise UsageError(f'{path}: [about] says no kind, nor does another recipe of method "{method}"')
        methods.append(Method(method, main.kind, main.paper, main.needs, abouts))
    return sorted(methods, key=lambda m: (KINDS.index(m.kind), stem(next(iter(m.recipes)))))


def read_about(path: Path) -> About | None:
    """What a recipe file says of its method; None where it says nothing.

    Raises:
        UsageError: keys or types are wrong; all faults are listed.
    """
    table = read_tables(path).get("about")
    if table is None:
        return None
    try:
        return About.model_validate(table)
    except ValidationError as fault:
        lines = [f"about.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in fault.errors()]
        raise UsageError(f"{path}: [about] is wrong:\n    " + "\n    ".join(lines)) from fault


def stem(name: str) -> str:
    """cmo of cifar100-lt/cmo."""
    return name.rpartition("/")[2]


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
        for row in TABLES[key].rows:
            found = {
                column.data.rpartition("-rho")[2] if key == "table1" else column.data if key == "table2" else key: cell
                for column, cell in zip(TABLES[key].columns, row.cells, strict=True)
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


@dataclass(frozen=True)
class Recognised:
    """Which method a trained recipe is."""

    method: str
    """Of the nearest recipe."""
    recipe: str
    """Its name."""
    changed: dict[str, Any]
    """Keys in which the trained one differs, with its values; None where it has no such key."""
    exact: tuple[str, ...]
    """All recipes that say the same about the phase: CP-Mix, and the last two rows of Table 3."""
    order: int
    """Place in the list of methods."""


def recognised(recipe: Recipe, phase: str, family: str, rho: float | None) -> Recognised:
    """Compare a resolved recipe with all that come with cpmix, at its epochs and rho. Only what the phase depends on
    counts, and neither the seed nor the precision; the rest of the recipe tells those apart that are equal in it.

    Args:
        recipe: as recorded.
        phase: whose checkpoint it is.
        family: folder of the recipes for its data set, which come first.
        rho: of the data set.
    """
    names = (*PHASE_TABLES[phase], "evaluation")
    own = _told_apart(recipe)
    found = []
    for order, (method, name, theirs) in enumerate(_candidates(recipe.schedule.epochs, rho)):
        differing = changed(theirs, own)
        near = [entry for entry in differing if entry[0].partition(".")[0] in names]
        found.append((len(near), len(differing), name.rpartition("/")[0] != family, order, method, name, near))
    *_, order, method, name, near = min(found)
    exact = tuple(entry[5] for entry in found if entry[0] == 0)
    return Recognised(method, name, {key: value for key, _, value in near}, exact, order)


@cache
def _candidates(epochs: int, rho: float | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Method, name and tables of every recipe that can last so many epochs."""
    found = []
    for method in all_methods():
        for name in method.recipes:
            with suppress(UsageError):  # one epoch is none for two stages
                found.append((method.name, name, _told_apart(load(name, epochs=epochs, rho=rho))))
    return found


def _told_apart(recipe: Recipe) -> dict[str, Any]:
    """The tables by which methods are told apart."""
    tables = recipe.tables()
    model = {key: value for key, value in tables["model"].items() if key != "precision"}
    return {key: value for key, value in tables.items() if key != "seed"} | {"model": model}
