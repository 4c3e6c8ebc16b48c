"""Plugins: a user's file of functions, given with --plugin, whose tables join those of cpmix for one command.

The file has the tables of losses.py, mixing.py and models.py, and follows their rules. Recipes are checked against its
outline (functions.py); where torch is imported, its code runs as well, once, from the bytes that were hashed. It is
only ever given on the command line: no recipe, record or checkpoint names code that is loaded.
"""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from cpmix_cli.artifacts.files import PHASES, read_bytes
from cpmix_cli.recipe.functions import ARGUMENTS, FUNCTION_TABLES, OTHER_TABLES, Needs, known, outline, outlined
from cpmix_cli.recipe.schema import Recipe, TermRecipe
from cpmix_cli.runtime.errors import CpmixError, InputError, UsageError, nearest
from cpmix_cli.runtime.memory import is_exhausted

MAX_BYTES = 4_000_000
_MODULE = "cpmix_plugin"
"""Name of the module whose code is the plugin's."""
_KIND_OF = {table: kind for kind, (_, tables) in FUNCTION_TABLES.items() for table in tables}
_HOMES: dict[str, tuple[str, ...]] = {
    **{table: (module,) for module, tables in FUNCTION_TABLES.values() for table in tables},
    "NEEDS": ("losses", "mixing"),
    "MIX_UNIFORMS": ("mixing",),
}
"""Table -> modules that have it."""
Tables = Mapping[str, Mapping[Any, Any]]


@dataclass
class Plugin:
    """File of functions that is joined."""

    path: Path
    """As the user typed it."""
    source: bytes
    tables: Tables = field(default_factory=dict)
    """Its tables in the outline."""
    _added: list[tuple[MutableMapping[Any, Any], Any]] = field(default_factory=list)
    _has_run: bool = False

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.source).hexdigest()

    def is_named_in(self, recipe: Recipe, phases: Sequence[str] = PHASES) -> bool:
        """Return whether a recipe names a function of this plugin, in its [model] or in the tables of `phases`."""
        return recipe.model.name in self.tables.get("MODELS", ()) or any(
            name in self.tables.get(table, ())
            for place, term in recipe.terms(idle=True)
            if place.partition(".")[0] in phases
            for kind, name in term.functions.items()
            for table in FUNCTION_TABLES[kind][1]
        )

    def join(self, tables: Tables, *, outlines: bool) -> None:
        """Add the entries of tables to those of cpmix: to its outlines, or to its modules, which import torch."""
        for table, entries in tables.items():
            for module in _HOMES[table]:
                home = outline(module) if outlines else vars(import_module(f"cpmix_cli.{module}"))
                home[table].update(entries)
                self._added += [(home[table], name) for name in entries]

    def leave(self) -> None:
        """Take all entries out again."""
        for table, name in self._added:
            table.pop(name, None)
        sys.modules.pop(_MODULE, None)


_current: Plugin | None = None


def current() -> Plugin | None:
    """Return the plugin that is joined; None without."""
    return _current


@contextmanager
def joined(path: Path | None) -> Iterator[None]:
    """Context in which recipes may name the functions of a file; its code does not run, see run_code().

    Inside of the context of the same file, and without a file, nothing changes.

    Raises:
        InputError: the file cannot be read.
        UsageError: it is no Python, has no table, or a table that is no dictionary of functions as cpmix calls them; or
            a name in it is cpmix's own.
    """
    global _current
    if path is None or (_current is not None and _current.path == path):
        yield
        return
    try:
        plugin = Plugin(path, read_bytes(path, limit=MAX_BYTES))
    except InputError as fault:
        raise InputError(fault.message, needed_by="--plugin", fix=fault.fix or "give a Python file") from fault
    found, lines = outlined(path, plugin.source)
    plugin.tables = _checked(path, found, lines)
    before, _current = _current, plugin
    try:
        plugin.join(plugin.tables, outlines=True)
        yield
    finally:
        plugin.leave()
        _current = before


def run_code() -> None:
    """Run the code of the plugin that is joined, if there is one, and add its functions to those of cpmix; idempotent.

    Raises:
        UsageError: the code raises an exception, or makes other tables than those that stand in the file.
    """
    plugin = _current
    if plugin is None or plugin._has_run:
        return
    module = ModuleType(_MODULE)
    module.__file__ = str(plugin.path.resolve())
    sys.modules[_MODULE] = module  # dataclasses and the like look for it
    with explained():
        exec(compile(plugin.source, module.__file__, "exec", dont_inherit=True), vars(module))
    for table, entries in plugin.tables.items():
        made = getattr(module, table, {})
        if table in ARGUMENTS and list(made) != list(entries):
            raise UsageError(
                f"{plugin.path}: when it runs, {table} has {', '.join(map(str, made)) or 'no name'}; written there "
                f"is {', '.join(map(str, entries))}",
                fix=f"write all of {table} in one dictionary, as text that needs no import",
            )
    plugin.join({table: getattr(module, table) for table in plugin.tables}, outlines=False)
    plugin._has_run = True


@contextmanager
def explained() -> Iterator[None]:
    """Convert an exception that the plugin's code raises, or that a function raises which it calls.

    Raises:
        UsageError: the plugin's code fails; the message states its line.
    """
    try:
        yield
    except (Exception, SystemExit) as fault:
        plugin = _current
        if plugin is None or isinstance(fault, CpmixError) or is_exhausted(fault):
            raise
        own = str(plugin.path.resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(fault.__traceback__) if frame.filename == own]
        if isinstance(fault, SyntaxError) and fault.filename == own:
            lines.append(fault.lineno)
        if not lines:
            raise
        raise UsageError(
            f"{plugin.path}, line {lines[-1]}: {type(fault).__name__}: {fault}", needed_by="--plugin", fix="correct it"
        ) from fault


def _checked(path: Path, found: Mapping[str, Any], lines: Mapping[str, int]) -> Tables:
    """Return the tables of a plugin's outline, checked."""
    tables = {table: found[table] for table in (*ARGUMENTS, *OTHER_TABLES) if table in found}
    example = 'LOSSES = {"mine": mine}'
    if not tables.keys() & ARGUMENTS.keys():
        near = [name for upper in found if upper.isupper() for name in nearest(upper, ARGUMENTS)]
        raise UsageError(
            f"{path} has no table of functions; the tables are {', '.join(ARGUMENTS)}",
            needed_by="--plugin",
            fix=f"name its functions at the end of it, such as {example.replace('LOSSES', (near or ['LOSSES'])[0])}",
        )
    for table, entries in tables.items():
        line = lines.get(table)
        example = {
            "NEEDS": 'NEEDS = {mine: Needs({"model.head": ["cosine"]})}',
            "MIX_UNIFORMS": 'MIX_UNIFORMS = {"mine": 0}',
        }.get(table, f'{table} = {{"mine": mine}}')
        if not isinstance(entries, dict):
            raise UsageError(
                f"{path}, line {line}: {table} is no dictionary, but {type(entries).__name__}", fix=f"write {example}"
            )
        for name, value in entries.items():
            if table == "NEEDS":
                is_right = callable(name) and isinstance(value, Needs)
            elif table == "MIX_UNIFORMS":
                is_right = isinstance(name, str) and type(value) is int and value >= 0
            else:
                is_right = isinstance(name, str) and bool(name) and callable(value)
            if not is_right:
                raise UsageError(
                    f"{path}, line {line}: {table} has an entry that it must not have, {name!r}", fix=f"write {example}"
                )
    seen: dict[tuple[str, str], str] = {}
    for table, kind in ((table, _KIND_OF[table]) for table in ARGUMENTS if table in tables):
        for name, function in tables[table].items():
            place = f"{path}, line {lines.get(table)}"
            if name in known(kind) or (kind, name) in seen:
                owner = f"a {kind} of cpmix" if name in known(kind) else f"in {seen[kind, name]} too"
                raise UsageError(
                    f'{place}: "{name}" of {table} is {owner}', fix=f'give it another name, such as "my-{name}"'
                )
            seen[kind, name] = table
            _check_parameters(place, kind, name, function)
            if table == "MIXES" and name not in tables.get("MIX_UNIFORMS", {}):
                raise UsageError(
                    f'{place}: the mix "{name}" is not in MIX_UNIFORMS',
                    fix=f'write MIX_UNIFORMS = {{"{name}": V}}, where V is how many random numbers it takes per image',
                )
    return tables


def _check_parameters(place: str, kind: str, name: str, function: Any) -> None:
    """Raise UsageError if a parameter has the name of a key of each term, or a network has one without a default."""
    for key, parameter in inspect.signature(function).parameters.items():
        if kind == "model" and parameter.default is parameter.empty:
            raise UsageError(
                f'{place}: the network "{name}" has the parameter {key}, which no recipe can set',
                fix=f"give {key} a default, or bind it with functools.partial",
            )
        if kind != "model" and key in TermRecipe.model_fields:
            raise UsageError(
                f'{place}: "{name}" has the parameter {key}, which is a key of each term', fix="give it another name"
            )
