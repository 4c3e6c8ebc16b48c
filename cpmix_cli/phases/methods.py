"""methods: every method that has a recipe, with its kind, paper, needs, and its cells in the tables of CP-Mix's paper.

A recipe says it in its [about] table, which no training looks at. Reads TOML alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from cpmix_cli import console
from cpmix_cli.errors import UsageError
from cpmix_cli.recipe import Table, find_recipe, read_tables, recipe_names

Kind = Literal["loss", "reweighting", "mixing", "decoupled", "ensemble", "CP-Mix", "control", "ablation"]
KINDS = get_args(Kind)
"""In the order of the list."""
SHOWN = "cifar100-lt"
"""The data set whose recipes have the cells that are shown."""
LARGE = ("imagenet-lt", "places-lt", "inaturalist2018")


class About(Table):
    """[about] of a recipe: where its method comes from, and what CP-Mix's paper prints for it."""

    method: str
    """Its name, as in the paper's tables where it is there. The recipes of a method share it."""
    kind: Kind | None = None
    """This and the next two stand in one recipe of the method."""
    paper: str = ""
    """Authors, title, venue, year."""
    needs: str = ""
    """What it takes beside images and labels."""
    cells: dict[
        Literal["200", "100", "50", "10", "table3", "imagenet-lt", "places-lt", "inaturalist2018", "table4"], float
    ] = Field(default_factory=dict)
    """Accuracy by rho in Table 1, for this data set, or in Table 3, which is at rho 200. A recipe of CIFAR-100-LT has
    those of the large data sets too: Table 2, or Table 4, which is on ImageNet-LT."""
    copied: bool = False
    """Its authors copied the cells from other papers."""
    note: str = ""
    """What to know of the cells."""


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
            "* copied there from other papers: other epochs, best epoch on the test set, for OTmix its confusions too",
            "all but ablations stand for cifar10-lt too",
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


def told(method: Method) -> list[dict[str, Any]]:
    """Its recipes as plain values."""
    return [
        {"name": name, "cells": about.cells, "copied": about.copied, "note": about.note}
        for name, about in method.recipes.items()
    ]


def small_cells(method: Method) -> list[str]:
    """Cells at rho 200, 100, 50, 10."""
    return _cells(method, ("200", "table3"), ("100",), ("50",), ("10",))


def large_cells(method: Method) -> list[str]:
    """Cells of LARGE."""
    return _cells(method, ("imagenet-lt", "table4"), ("places-lt",), ("inaturalist2018",))


def _cells(method: Method, *columns: tuple[str, ...]) -> list[str]:
    """A cell a column, the first of its keys that the method has; copied ones with a star."""
    about = method.recipes.get(f"{SHOWN}/{stem(next(iter(method.recipes)))}", About(method=method.name))
    known: dict[str, float] = {str(key): cell for key, cell in about.cells.items()}
    found = [next((known[key] for key in keys if key in known), None) for keys in columns]
    return ["" if cell is None else f"{cell:.2f}{'*' if about.copied else ' '}" for cell in found]
