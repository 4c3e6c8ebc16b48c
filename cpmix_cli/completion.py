"""Completion: the words that a shell offers at TAB, after `cpmix --install-completion`.

Typer's own completion builds all commands and checks their values with pydantic, and it knows no recipe. This one reads
flags.py, and names and keys from the source text of the recipe's schema and functions, without an import of them.
"""

import ast
import json
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from typer.models import ArgumentInfo, OptionInfo

from cpmix_cli.artifacts.files import DATASET, PHASES
from cpmix_cli.cli import COMMANDS
from cpmix_cli.flags import SOURCE_NAMES
from cpmix_cli.recipe.libraries import LIBRARIES, library_names

PACKAGE = Path(__file__).parent
SHELLS = ("bash", "zsh", "fish")
Words = Mapping[str, str]
"""Word to offer -> its explanation, which zsh and fish show."""
_FREE = {
    "--phase": PHASES,
    "--profile": ("exponential", "step", "ranked", "pareto"),
    "--threshold-for": ("precision=", "recall="),
}
"""Flag -> words for its value, beside those of flags.one_of()."""


def answer(instruction: str, variables: Mapping[str, str]) -> tuple[str, int] | None:
    """Return what to print for a shell, and the exit code; None if the instruction is none of TAB.

    Args:
        instruction: what a shell's script asks for: complete_bash, complete_zsh or complete_fish.
        variables: variables that the script sets: the words typed so far.
    """
    task, _, shell = instruction.partition("_")
    if task != "complete" or shell not in SHELLS:
        return None
    words, last, cut = _of_bash(variables) if shell == "bash" else _of_line(variables)
    offered: Words = {}
    with suppress(Exception):  # such as a damaged recipe: a traceback would end up in the line that is typed
        offered = {word: text for word, text in _offers(words, last).items() if word.startswith(last)}
    if shell == "bash":
        return "\n".join(word[cut:] for word in offered), 0
    if shell == "zsh":
        listed = "\n".join(f'"{word}":"{_plain(text)}"' if text else f'"{word}"' for word, text in offered.items())
        return (f"_arguments '*: :(({listed}))'" if offered else "_files"), 0
    if variables.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return "", 0 if offered else 1
    return "\n".join(f"{word}\t{_plain(text)}" if text else word for word, text in offered.items()), 0


def _of_bash(variables: Mapping[str, str]) -> tuple[list[str], str, int]:
    """Return the complete words, the word to complete, and how many of its characters bash does not replace.

    bash takes = as a word of its own: `--set a=b` has the words --set, a, =, b, and only the last is replaced.
    """
    text, index = variables.get("COMP_WORDS", ""), int(variables.get("COMP_CWORD", "0"))
    given = text.split("\n") if "\n" in text else _split(text)
    given = [*given, *[""] * (index + 1 - len(given))][: index + 1]
    joined: list[str] = []
    for word in given:
        is_rest = bool(joined) and joined[-1].endswith("=") and not word.startswith("--") and word != ""
        if len(joined) > 1 and (word == "=" or is_rest):
            joined[-1] += word
        else:
            joined.append(word)
    *words, last = joined
    return words, last, 0 if last == given[-1] else last.rfind("=") + 1


def _of_line(variables: Mapping[str, str]) -> tuple[list[str], str, int]:
    line = variables.get("_TYPER_COMPLETE_ARGS", "")
    words = _split(line)
    last = words.pop() if words and not line.endswith(" ") else ""
    return words, last, 0


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote that is open
        return text.split()


def _plain(text: str) -> str:
    """Return an explanation without characters that a shell's script would read."""
    return "".join(c for c in " ".join(text.split()) if c not in "\"'`$:\\()[]")


# -- flags and their values --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flag:
    help: str
    takes_value: bool = False
    choices: tuple[str, ...] = ()


def _flags_of(kind: type) -> dict[str, _Flag]:
    found = {}
    for known in fields(kind):
        infos = (known.metadata.get("option"), *getattr(known.type, "__metadata__", ()))
        info = next(
            (info for info in infos if isinstance(info, OptionInfo) and not isinstance(info, ArgumentInfo)), None
        )
        if info is None:
            continue
        names = [name for name in (info.default, *(info.param_decls or ())) if str(name).startswith("--")]
        takes_value = known.type is not bool and bool not in get_args(known.type)
        choices = tuple(getattr(info.callback, "choices", ()))
        for name in names or [f"--{known.name.replace('_', '-')}"]:
            found[str(name)] = _Flag(str(info.help), takes_value, choices)
    shared = {"--json": _Flag("Print one JSON object on stdout and nothing else."), "--help": _Flag("Show the help.")}
    return {**found, **shared}


def _offers(words: Sequence[str], last: str) -> Words:
    """Return the words that can stand in place of the last one.

    Args:
        words: words before it, the name of the program first.
        last: its first characters.
    """
    commands = {name: kind for panel in COMMANDS.values() for name, kind in panel.items()}
    if len(words) < 2:
        own = ("--help", "--version", "--install-completion", "--show-completion")
        return dict.fromkeys(own, "") if last.startswith("-") else {n: _first(k.__doc__) for n, k in commands.items()}
    name, *typed = words[1:]
    if name not in commands:
        return {}
    flags = _flags_of(commands[name])
    flag, start = (typed or [""])[-1], ""
    if last.startswith("--") and "=" in last:
        flag, _, last = last.partition("=")
        start = f"{flag}="
    if flag in flags and flags[flag].takes_value:
        return {f"{start}{word}": text for word, text in _values(flag, flags[flag], typed, last).items()}
    if last.startswith("-"):
        return {name: known.help for name, known in flags.items()}
    if name in ("build-lt", "run") and not _has_argument(typed, flags):
        return dict.fromkeys(SOURCE_NAMES, "")
    return dict.fromkeys(_recipe_names(), "") if name == "recipes" else {}


def _has_argument(typed: Sequence[str], flags: Mapping[str, _Flag]) -> bool:
    return any(
        not word.startswith("-") and not (flag in flags and flags[flag].takes_value)
        for flag, word in zip(["", *typed], typed, strict=False)
    )


def _values(flag: str, known: _Flag, typed: Sequence[str], last: str) -> Words:
    if flag == "--set":
        return _settings(typed, last)
    if flag == "--recipe":
        names = _recipe_names()
        return dict.fromkeys([*names, *dict.fromkeys(name.rpartition("/")[2] for name in names)], "")
    before = last[: last.rfind(",") + 1] if flag == "--tracker" else ""
    return {f"{before}{word}": "" for word in (*known.choices, *_FREE.get(flag, ()))}


# -- recipes, read without an import of what checks them ---------------------------------------------------------------


def _recipe_files() -> dict[str, Path]:
    """Return the recipes that have names, as recipe.loading.recipe_names() finds them."""
    folders = [folder for folder in (PACKAGE.parent / "recipes", PACKAGE / "recipes") if folder.is_dir()]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*.toml"))
    }


def _recipe_names() -> list[str]:
    return sorted(_recipe_files())


def _tables(typed: Sequence[str]) -> dict[str, Any]:
    """Return the tables of the recipe that a command line names by --recipe, --data or --from; else of digits/cpmix."""
    given = dict(pairwise(typed))
    known = _recipe_files()
    name = given.get("--recipe", "")
    with suppress(OSError, ValueError, TypeError, KeyError):
        if not name and (data := given.get("--data")):
            name = str(json.loads((Path(data) / DATASET).read_bytes())["recipe"])
        run = Path(given.get("--from", "."))
        places = [run / "recipe.toml", *(run / phase / "recipe.toml" for phase in reversed(PHASES))]
        if not name and "--from" in given:
            name = str(next(place for place in places if place.is_file()))
    named = [full for full in (name, *known) if full in known and (full == name or full.endswith(f"/{name}"))]
    path = Path(name) if name.endswith(".toml") else known.get((named or ["digits/cpmix"])[0])
    tables: dict[str, Any] = {}
    for _ in range(16):
        if path is None:
            break
        try:
            own = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            break
        base = str(own.pop("extends", ""))
        tables = _merged(own, tables)
        path = path.parent / base if base.endswith(".toml") else known.get(base)
    return tables


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **{key: value for key, value in both.items() if isinstance(over[key], dict)}}


def _settings(typed: Sequence[str], last: str) -> Words:
    """Return KEY= for the keys of a recipe, or KEY=VALUE for one that is typed, or is the only one that begins so."""
    keys = {f"{key}=": field for key, field in _keys("Recipe", _tables(typed))}
    if "=" in last:
        key = last.partition("=")[0] + "="
        return {f"{key}{value}": "" for value in keys[key].values(last.removeprefix(key))} if key in keys else {}
    offered = {key: field.help for key, field in keys.items() if key.startswith(last)}
    if len(offered) == 1:  # with a second word, a shell does not end the first with a space
        (key,) = offered
        offered |= {f"{key}{value}": "" for value in keys[key].values("") or [keys[key].default]}
    return offered


@dataclass(frozen=True)
class _Field:
    """Key of a table of the recipe."""

    annotation: ast.expr
    default: str
    help: str
    kind: str = ""
    """Kind of function that the key names; "" for other keys."""

    def values(self, last: str) -> list[str]:
        """Return the values that the type allows, if they can be listed."""
        if self.kind:
            libraries = [name for name in LIBRARIES if last.startswith(f"{name}/")]
            if self.kind == "model" and libraries:
                return list(library_names(libraries[0]))
            return [*_functions(self.kind), *((f"{name}/" for name in LIBRARIES) if self.kind == "model" else ())]
        found: list[str] = []
        for node in ast.walk(self.annotation):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
                found += [str(part.value) for part in ast.walk(node.slice) if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.Name) and node.id == "bool":
                found += ["true", "false"]
        return found


@cache
def _parsed(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))


@cache
def _schema() -> dict[str, dict[str, _Field]]:
    """Return the tables of recipe/schema.py: class -> key -> its field."""
    found: dict[str, dict[str, _Field]] = {}
    kinds = _function_tables()
    for table in _parsed("recipe/schema").body:
        if not isinstance(table, ast.ClassDef):
            continue
        own: dict[str, _Field] = {}
        for base in table.bases:
            own |= found.get(base.id, {}) if isinstance(base, ast.Name) else {}
        for node, after in zip(table.body, [*table.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
                key, text = node.target.id, ""
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    text = _first(str(after.value.value))
                kind = "model" if (table.name, key) == ("Model", "name") else key if table.name == "TermRecipe" else ""
                own[key] = _Field(node.annotation, _default(node.value), text, kind if kind in kinds else "")
        found[table.name] = own
    return found


def _default(value: ast.expr | None) -> str:
    """Return the default of a field as it is typed; "" if it has none."""
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    with suppress(ValueError, TypeError):
        if value is not None and (plain := ast.literal_eval(value)) is not None:
            return plain if isinstance(plain, str) else json.dumps(plain)
    return ""


def _keys(table: str, given: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, _Field]]:
    """Yield the keys of a table and of the tables in it, "table.key", with the terms that a recipe has.

    Args:
        table: class of schema.py.
        given: tables of the recipe.
        before: start of the keys.
    """
    schema = _schema()
    for key, field in schema[table].items():
        names = [node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)]
        inner = next((name for name in names if name in schema), None)
        own = given.get(key)
        if key == "about":
            continue
        if inner is None or "list" in names:
            yield f"{before}{key}", field
        elif "dict" in names:
            for term, values in own.items() if isinstance(own, dict) else ():
                yield from _keys(inner, values, f"{before}{key}.{term}.")
                for parameter in values.keys() - schema[inner].keys():  # of a function that the term names
                    yield (
                        f"{before}{key}.{term}.{parameter}",
                        _Field(ast.Constant(0), json.dumps(values[parameter]), ""),
                    )
        else:
            yield from _keys(inner, own if isinstance(own, dict) else {}, f"{before}{key}.")


def _function_tables() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return FUNCTION_TABLES of recipe/functions.py."""
    assigned = _assigned(_parsed("recipe/functions"), ["FUNCTION_TABLES"])
    return dict(ast.literal_eval(next(assigned)))


def _functions(kind: str) -> list[str]:
    """Return the names of the functions of a kind."""
    module, tables = _function_tables()[kind]
    dictionaries = [value for value in _assigned(_parsed(module), tables) if isinstance(value, ast.Dict)]
    return [str(key.value) for found in dictionaries for key in found.keys if isinstance(key, ast.Constant)]


def _assigned(module: ast.Module, names: Iterable[str]) -> Iterator[ast.expr]:
    """Yield what a module assigns to names at its top level."""
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in names:
            assert node.value is not None
            yield node.value


def _first(text: str | None) -> str:
    """Return the first sentence of a docstring."""
    return " ".join((text or "").split("\n\n")[0].split()).partition(". ")[0].removesuffix(".")
