"""Functions that a recipe may name, with their parameters and needs, without an import of torch.

losses.py, mixing.py and models.py import torch, which takes seconds. Recipes are therefore checked against outlines of
these files, made from their source text. An outline has the tables at the end of a file, and functions with only their
keyword-only parameters. training/objective.py binds the real functions by the same rules.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from cpmix_cli.runtime.errors import UsageError, suggest

Functions = Mapping[str, Callable[..., Any]]
FUNCTION_TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "partner": ("mixing", ("BATCH_PARTNERS", "CLASS_PARTNERS")),
    "match": ("mixing", ("MATCHES",)),
    "ratio": ("mixing", ("RATIOS",)),
    "mix": ("mixing", ("MIXES", "FEATURE_MIXES")),
    "label": ("mixing", ("LABELS",)),
    "loss": ("losses", ("LOSSES", "ENSEMBLE_LOSSES", "ROUTING_LOSSES")),
    "regulariser": ("losses", ("REGULARISERS",)),
    "teacher": ("losses", ("DISTILLATIONS",)),
    "reweight": ("losses", ("CLASS_WEIGHTS",)),
    "model": ("models", ("MODELS",)),
}
"""Key of a recipe (a kind of function) -> module of these functions, and the names of its tables of them."""
ARGUMENTS = {
    "BATCH_PARTNERS": ("uniforms", "labels", "state"),
    "CLASS_PARTNERS": ("uniforms", "labels", "state"),
    "MATCHES": ("f1", "y1", "f2", "y2", "state"),
    "RATIOS": ("drawn", "n1", "n2"),
    "MIXES": ("x1", "x2", "lam", "uniforms"),
    "FEATURE_MIXES": ("x1", "x2", "lam", "uniforms"),
    "LABELS": ("lam", "n1", "n2"),
    "LOSSES": ("logits", "labels", "weights", "class_counts"),
    "ENSEMBLE_LOSSES": ("logits", "labels", "weights", "class_counts"),
    "ROUTING_LOSSES": ("logits", "routes", "labels"),
    "REGULARISERS": ("logits", "class_counts", "reweighting"),
    "DISTILLATIONS": ("logits", "teacher"),
    "CLASS_WEIGHTS": ("class_counts",),
    "MODELS": ("num_classes", "shape", "recipe"),
}
"""Table of functions -> the positional arguments that a call gives, in order; other parameters are keyword-only."""
OTHER_TABLES = ("NEEDS", "MIX_UNIFORMS")
"""Tables that say more of the functions in the others."""
TERM_KINDS = tuple(kind for kind in FUNCTION_TABLES if kind != "model")


MAX_FLOAT = 3e38
"""Largest absolute value of a number in a recipe; float32, in which networks are computed, ends at 3.4e38."""


def in_float32(value: Any) -> Any:
    """Return the value of a key; raise ValueError if it is, or contains, a number beyond MAX_FLOAT."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and abs(number) > MAX_FLOAT:
            raise ValueError(f"Input should be at most {MAX_FLOAT:g} in size, because networks compute in float32")
    return value


@dataclass(frozen=True)
class Needs:
    """Requirements of a term's function besides its parameters: an entry of NEEDS at the end of the function's file."""

    keys: Mapping[str, Sequence[object]] = field(default_factory=dict)
    """Key of the recipe, such as "model.head" -> its allowed values."""
    why: str = ""
    """Reason for these values, for the message."""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> key of the recipe that must have the same value."""
    idle_without: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> key of the term, such as "reweight". Without this key the parameter must be 0."""
    replaces: Sequence[str] = ()
    """Keys of the term that a mix replaces. They are refused beside it, and a partner does not need them."""
    per_expert: str = ""
    """Parameter that is a list of one value per expert."""
    stage: str = ""
    """Only stage in which the function is allowed; "" allows all."""
    images: bool = False
    """True if the data set must have images, not points."""
    class_pairs: str = ""
    """Parameter that contains pairs of class ids of the data set."""
    package: str = ""
    """Module that must be installed."""
    extra: str = ""
    """Optional extra of cpmix that installs `package`."""


@cache
def outline(module: str) -> dict[str, Any]:
    """Return the top-level names of a module of this package, without an import of slow packages.

    Functions have only their keyword-only parameters. Values that need a slow package are left out. While a plugin is
    joined, its functions are in the tables too, see plugins.py.

    Raises:
        UsageError: see outlined().
    """
    path = Path(__file__).parents[1] / f"{module}.py"
    return outlined(path, path.read_bytes())[0]


def outlined(path: Path, source: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the outline of a file, and the line of each name in it.

    Args:
        path: the file, for messages.
        source: its content.

    Raises:
        UsageError: the file is no Python, a table of functions needs a slow package, or a function in it has parameters
            that no recipe can set; the message states the line, and what to change there.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError) as fault:
        raise UsageError(f"{_at(path, getattr(fault, 'lineno', None))}: {fault.args[0]}", fix="correct it") from fault
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    unreadable: dict[str, tuple[str, str]] = {}
    signatures: dict[str, ast.arguments] = {}
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            light = {*sys.stdlib_module_names, "pydantic"}
            if module is None or not (module.partition(".")[0] in light or module.startswith("cpmix_cli.recipe.")):
                continue
        elif isinstance(node, ast.FunctionDef):
            signatures[node.name] = node.args
            lines[node.name] = node.lineno
            node.args = ast.arguments([], [], None, node.args.kwonlyargs, node.args.kw_defaults, None, [])
            node.body, node.decorator_list, node.returns = [ast.Pass()], [], None
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        elif not isinstance(node, ast.Assign):
            continue
        made = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        lines |= dict.fromkeys(made, node.lineno)
        try:
            exec(compile(ast.fix_missing_locations(ast.Module([node], [])), str(path), "exec"), found)
        except (Exception, SystemExit) as fault:
            if isinstance(node, ast.FunctionDef):  # an error only if a table names the function
                unreadable[node.name] = _unreadable_parameter(node, fault)
            elif tables := {*made} & {*ARGUMENTS, *OTHER_TABLES}:
                missing = str(fault.name) if isinstance(fault, NameError) else ""
                what = f"names {missing}" if missing else f"cannot be made: {fault}"
                told = (f"{', '.join(tables)} {what}", f"name only functions that are defined in {path}")
                message, fix = unreadable.get(missing, told)
                raise UsageError(f"{_at(path, lines.get(missing, node.lineno))}: {message}", fix=fix) from fault
            # Any other name is a constant that is made with a slow package.
    for table in ARGUMENTS.keys() & found.keys():
        entries = found[table].values() if isinstance(found[table], dict) else ()
        for name in {getattr(getattr(function, "func", function), "__name__", "") for function in entries}:
            if name in signatures:
                _check_signature(_at(path, lines[name]), table, name, signatures[name])
    return found, lines


def _at(path: Path, line: int | None) -> str:
    return str(path) if line is None else f"{path}, line {line}"


def _check_signature(place: str, table: str, name: str, found: ast.arguments) -> None:
    """Raise UsageError if a function of a table does not take the table's arguments, or a parameter has no type."""
    wanted, given = ARGUMENTS[table], [argument.arg for argument in found.posonlyargs + found.args]
    typeless = [parameter.arg for parameter in found.kwonlyargs if parameter.annotation is None]
    if typeless:
        raise UsageError(
            f"{place}: {name}(): the parameter {typeless[0]} has no type",
            fix=f"write its type, such as {typeless[0]}: float, or {typeless[0]}: float = 1.0",
        )
    if len(given) != len(wanted) and found.vararg is None:
        defaults = dict(zip(reversed(given), map(ast.unparse, reversed(found.defaults)), strict=False))
        extra = [f"{key}: float" + (f" = {defaults[key]}" if key in defaults else "") for key in given[len(wanted) :]]
        rest = f", *, {', '.join(extra)}" if extra else ""
        raise UsageError(
            f"{place}: {name}() takes {', '.join(given) or 'nothing'}; a function of {table} gets {', '.join(wanted)}, "
            "and its parameters after a *",
            fix=f"write def {name}({', '.join([*given[: len(wanted)], *wanted[len(given) :]])}{rest})",
        )


def _unreadable_parameter(function: ast.FunctionDef, fault: BaseException) -> tuple[str, str]:
    """Return what is wrong with a function whose parameters cannot be read without a package, and the fix."""
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    texts = [ast.unparse(name) + (f" = {ast.unparse(default)}" if default else "") for name, default in given]
    package = fault.name if isinstance(fault, NameError) else None
    culprit = next((text for text in texts if re.search(rf"\b{package}\b", text)), ", ".join(texts))
    why = f"cannot be read: {fault}" if package is None else f"cannot be read without importing {package}"
    return (
        f"{function.name}(): the parameter {culprit} {why}",
        "give the parameter a plain type and default (float, int, bool, str, list, Literal, Annotated), and make "
        "anything else of its value inside of the function",
    )


def known(kind: str, namespace: Callable[[str], Mapping[str, Any]] = outline) -> Functions:
    """Return the functions of a kind by name.

    Args:
        kind: key of FUNCTION_TABLES.
        namespace: module name -> its top-level names. By default they come from outline().
    """
    module, tables = FUNCTION_TABLES[kind]
    return {name: function for table in tables for name, function in namespace(module)[table].items()}


def needs_of(kind: str, name: str) -> Needs:
    """Return the needs of a function; empty needs if the function does not exist."""
    needs: Mapping[Any, Needs] = outline(FUNCTION_TABLES[kind][0]).get("NEEDS", {})
    return needs.get(known(kind).get(name), Needs())


def keywords(kind: str, name: object) -> list[str]:
    """Return the parameter names of a function; an empty list if the function does not exist."""
    function = known(kind).get(str(name))
    return [] if function is None else list(inspect.signature(function).parameters)


def bind(
    names: Mapping[str, str], given: Mapping[str, Any], functions: Mapping[str, Functions], others: Iterable[str]
) -> tuple[dict[str, partial[Any]], list[str]]:
    """Look up the functions that a term names and bind the parameters of each.

    Args:
        names: kind -> name of the function.
        given: keys and values of the term that are not fields of TermRecipe: parameters of the functions.
        functions: kind -> functions by name.
        others: fields of TermRecipe, to suggest for an unknown key.

    Returns:
        Kind -> bound function, and a list of all errors as "key = value: what is wrong".
    """
    bound: dict[str, partial[Any]] = {}
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
                try:
                    values[key] = _checker(functions[kind][name], key).validate_python(given[key], strict=True)
                except ValidationError as fault:
                    message = fault.errors()[0]["msg"].removeprefix("Value error, ")
                    faults.append(f"{key} = {given[key]!r}: {message}")
            elif parameter.default is inspect.Parameter.empty:
                faults.append(f'{key}: missing (a parameter of {kind} = "{name}")')
        bound[kind] = partial(functions[kind][name], **values)
    if len(bound) == len(names):  # else a key may be a parameter of the unknown function
        faults += [f"{key}: unknown key.{suggest(key, {*others, *keys})}" for key in sorted(given.keys() - keys)]
    return bound, faults


@cache
def _checker(function: Callable[..., Any], key: str) -> TypeAdapter[Any]:
    """Return the pydantic check of one parameter of a function."""
    annotation: Any = inspect.signature(function, eval_str=True).parameters[key].annotation
    return TypeAdapter(Annotated[annotation, AfterValidator(in_float32)], config=ConfigDict(allow_inf_nan=False))
