"""The functions that a recipe may name, their parameters and their needs: known without importing torch.

losses.py, mixing.py and models.py import torch, seconds in which a misspelt name would go untold. So recipes are
checked against an outline of them, made from their source text: the tables at their foot, and functions of which the
keyword-only parameters are left. training/objective.py binds the real ones by the same rules.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cpmix_cli.runtime.errors import suggest

Functions = Mapping[str, Callable[..., Any]]
FUNCTION_TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "partner": ("mixing", ("BATCH_PARTNERS", "CLASS_PARTNERS")),
    "match": ("mixing", ("MATCHES",)),
    "ratio": ("mixing", ("RATIOS",)),
    "mix": ("mixing", ("MIXES",)),
    "label": ("mixing", ("LABELS",)),
    "loss": ("losses", ("LOSSES", "ENSEMBLE_LOSSES", "ROUTING_LOSSES")),
    "regulariser": ("losses", ("REGULARISERS",)),
    "teacher": ("losses", ("DISTILLATIONS",)),
    "reweight": ("losses", ("CLASS_WEIGHTS",)),
    "model": ("models", ("MODELS",)),
}
"""What a key of a recipe names -> the module, and its dictionaries of functions by name."""
TERM_KINDS = tuple(kind for kind in FUNCTION_TABLES if kind != "model")


@dataclass(frozen=True)
class Needs:
    """What a function of a term needs beside its parameters. It stands in NEEDS at the foot of the function's file."""

    keys: Mapping[str, Sequence[object]] = field(default_factory=dict)
    """Key of the recipe, such as "model.head" -> the values that go with the function."""
    why: str = ""
    """The reason for these values, for the message."""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> key of the recipe whose value it has to repeat."""
    idle_without: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> step of the term, such as "reweight", without which it may only be 0."""
    stage: str = ""
    """The only stage that may have it; "": any."""
    images: bool = False
    """The data set has images, not points."""
    class_pairs: str = ""
    """Parameter that holds pairs of class ids, whose range is the data set's."""
    package: str = ""
    """Module that has to be installed, and ..."""
    extra: str = ""
    """... the optional extra of cpmix that installs it."""


@cache
def outline(module: str) -> dict[str, Any]:
    """What stands at the top of a module of this package: functions with nothing but their keyword-only parameters,
    and whatever else can be made without the packages that take long to import.

    Raises:
        NameError: a table of functions cannot be made so; what is in the way, and how to go without it.
    """
    path = Path(__file__).parents[1] / f"{module}.py"
    found: dict[str, Any] = {}
    unreadable: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            light = {*sys.stdlib_module_names, "pydantic"}
            if source is None or not (source.partition(".")[0] in light or source.startswith("cpmix_cli.recipe.")):
                continue
        elif isinstance(node, ast.FunctionDef):
            node.args = ast.arguments([], [], None, node.args.kwonlyargs, node.args.kw_defaults, None, [])
            node.body, node.decorator_list, node.returns = [ast.Pass()], [], None
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.Assign([node.target], node.value)
        elif not isinstance(node, ast.Assign):
            continue
        code = compile(ast.fix_missing_locations(ast.Module([node], [])), str(path), "exec")
        try:
            exec(code, found)
        except NameError as fault:
            tables = {table for known_in, names in FUNCTION_TABLES.values() if known_in == module for table in names}
            made = {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
            if isinstance(node, ast.FunctionDef):  # which is no fault unless a table names it
                unreadable[node.name] = _unreadable_parameter(node, str(fault.name))
            elif made & {*tables, "NEEDS"}:
                told = f"{', '.join(made)} may only name functions of this file: {fault}"
                raise NameError(f"{path}: {unreadable.get(str(fault.name), told)}") from fault
            # Otherwise a constant made with torch.
    return found


def _unreadable_parameter(function: ast.FunctionDef, package: str) -> str:
    """Say which keyword-only parameter of a function cannot be read without a package, and what to do."""
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    texts = [ast.unparse(name) + (f" = {ast.unparse(default)}" if default else "") for name, default in given]
    culprit = next(text for text in texts if re.search(rf"\b{package}\b", text))
    return (
        f"{function.name}(): the parameter {culprit} cannot be read without importing {package}. Recipes are checked "
        "without that: give the parameter a plain type and default (float, int, bool, str, list, Literal, Annotated), "
        "and make anything else of its value inside of the function"
    )


def known(kind: str, namespace: Callable[[str], Mapping[str, Any]] = outline) -> Functions:
    """The functions of a kind by name.

    Args:
        kind: a key of FUNCTION_TABLES.
        namespace: module -> what stands in it.
    """
    module, tables = FUNCTION_TABLES[kind]
    return {name: function for table in tables for name, function in namespace(module)[table].items()}


def needs_of(kind: str, name: str) -> Needs:
    """What a function needs; nothing where there is no such function."""
    needs: Mapping[Any, Needs] = outline(FUNCTION_TABLES[kind][0]).get("NEEDS", {})
    return needs.get(known(kind).get(name), Needs())


def keywords(kind: str, name: object) -> list[str]:
    """The parameters of a function; none where there is no such function."""
    function = known(kind).get(str(name))
    return [] if function is None else list(inspect.signature(function).parameters)


def bind(
    names: Mapping[str, str], given: Mapping[str, Any], functions: Mapping[str, Functions], others: Iterable[str]
) -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """Look up the functions that a term names and give each its parameters.

    Args:
        names: kind -> name of the function.
        given: the keys of the term that are parameters of them.
        functions: kind -> functions by name.
        others: keys that a term has in any case; one of them may be meant by an unknown key.

    Returns:
        kind -> the function with its parameters bound; and all faults, as "key = value: what is wrong".
    """
    bound: dict[str, Callable[..., Any]] = {}
    keys: set[str] = set()
    faults = []
    for kind, name in names.items():
        if name not in functions[kind]:
            faults.append(f'{kind} = "{name}": unknown.{suggest(name, functions[kind])}')
            continue
        values = {}
        for key, parameter in inspect.signature(functions[kind][name]).parameters.items():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            keys.add(key)
            if key in given:
                checker: TypeAdapter[Any] = TypeAdapter(parameter.annotation, config=ConfigDict(allow_inf_nan=False))
                try:
                    values[key] = checker.validate_python(given[key], strict=True)
                except ValidationError as fault:
                    faults.append(f"{key} = {given[key]!r}: {fault.errors()[0]['msg']}")
            elif parameter.default is inspect.Parameter.empty:
                faults.append(f'{key}: missing (a parameter of {kind} = "{name}")')
        bound[kind] = partial(functions[kind][name], **values)
    if len(bound) == len(names):  # else they may belong to the function that was not found
        faults += [f"{key}: unknown key.{suggest(key, {*others, *keys})}" for key in sorted(given.keys() - keys)]
    return bound, faults
