"""Recipes from files and flags: found by name, merged, checked, rescaled to another number of epochs."""

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpmix_cli.artifacts.files import PHASES, read_bytes
from cpmix_cli.recipe.functions import TERM_KINDS, bind, keywords, known
from cpmix_cli.recipe.rules import unmet
from cpmix_cli.recipe.schema import AS_RECORD, Finetune, Recipe, Stage, Table, TermRecipe
from cpmix_cli.runtime.errors import InputError, UsageError, counted, indented, nearest, shortened, suggest
from cpmix_cli.runtime.text import quoted

MAX_BYTES = 4_000_000  # largest size of a recipe file
_MAX_DEPTH = 16  # deepest nesting of tables; a recipe has 4 levels
_MAX_PARTS = 1000  # most points between two = of a line
_MAX_EXTENDS = 16


@cache
def recipe_folders() -> list[Path]:
    """Return the folders of recipes that have names: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()]


def recipe_names() -> list[str]:
    """Return the sorted names of all recipes that come with cpmix, such as cifar100-lt/cpmix."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in recipe_folders()
        for path in folder.rglob("*.toml")
    )


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by name; raise UsageError if it does not exist."""
    path = Path(name)
    with suppress(RuntimeError):  # ~name of no user
        path = path.expanduser()
    is_file_name = path.suffix.lower() == ".toml"
    try:
        if is_file_name and (path.is_file() or os.path.lexists(path)):  # a folder is refused where it is read
            return path
        if not is_file_name and path.is_file():
            raise UsageError(
                f"recipe file {path} has no name that ends in .toml",
                needed_by="--recipe",
                fix=f"rename it: {quoted('mv', path, path.with_name(f'{path.name}.toml'))}",
            )
        if re.fullmatch(r"[\w.-]*\w(/[\w.-]*\w)*", name):  # not ./digits/cpmix, which is a user's file
            for folder in recipe_folders():
                if (found := folder / f"{name}.toml").is_file():
                    return found
    except OSError as fault:  # a name that is too long, or a folder that may not be read
        raise UsageError(
            f'recipe "{name}" cannot be read: {fault.strerror}',
            needed_by="--recipe",
            fix="choose a name that cpmix recipes lists",
        ) from fault
    if is_file_name:
        raise UsageError(
            f"recipe file {path} does not exist",
            needed_by="--recipe",
            fix="correct the path, or give a name that cpmix recipes lists",
        )
    of_that_name = [known for known in recipe_names() if known.endswith(f"/{name}")]
    closest = of_that_name[:1] or nearest(name, recipe_names())
    near = "".join(f"give {known} in place of {quoted(name)}" for known in closest)
    others = "choose a name that cpmix recipes lists"
    raise UsageError(f'no recipe "{name}"', needed_by="--recipe", fix=f"{near}, or {others}" if near else others)


def of_dataset(name: str | None, own: str) -> str:
    """Return a recipe's name in full: cpmix is cifar100-lt/cpmix for a data set whose recipe `own` is of that folder.

    Any other name is returned as it is, and `own` for None. `own` need not exist.
    """
    if name is None:
        return own
    beside = f"{own.rpartition('/')[0]}/{name}"
    return beside if "/" not in name and beside in recipe_names() else name


def load(
    name: str,
    *,
    settings: Sequence[str] = (),
    epochs: int | None = None,
    seed: int | None = None,
    rho: float | None = None,
    as_record: bool = False,
) -> Recipe:
    """Read and resolve a recipe.

    Args:
        name: path of a TOML file, or the name of a recipe that comes with cpmix.
        settings: overrides "table.key=value", with values as in TOML; a bare word is a string.
        epochs: length of both stages together; all epoch counts are rescaled to it.
        seed: replaces the recipe's seed.
        rho: imbalance factor of the data set; selects the overrides in [by_rho.R].
        as_record: also accept names of functions of a plugin that is not given; they and their parameters are not
            checked. For the recipe of a run that is read, not continued.

    Raises:
        UsageError: the file, syntax, a key, type, range or setting is wrong; all errors are listed.
    """
    path = find_recipe(name)
    tables = read_tables(path)
    by_rho = tables.pop("by_rho", {})
    if not isinstance(by_rho, dict) or not all(isinstance(over, dict) for over in by_rho.values()):
        raise UsageError(
            f"recipe {path}: by_rho is not a table of tables",
            fix=f"write [by_rho.100.optimizer], or the like, in {path}",
        )
    wrong = _by_rho_faults(tables, by_rho)
    if rho is not None and f"{rho:g}" in by_rho and not wrong:
        tables = _merged(tables, by_rho[f"{rho:g}"])
    changed = tables
    replaced: list[str] = []
    for setting in settings:
        parsed = _parse_setting(setting)
        if fault := _replaced_table(changed, parsed):  # not merged: the table would be lost
            replaced.append(fault)
        else:
            changed = _merged(changed, parsed)
    if seed is not None:
        changed = {**changed, "seed": seed}
    recipe, faults = _checked(changed, as_record=as_record)
    if recipe is None or faults or replaced or wrong:
        faults += replaced + wrong
        own = [fault for fault in (*_checked(tables)[1], *wrong) if fault in faults]
        raise refusal(
            f"recipe {path}",
            faults,
            typed_flags(settings, seed),
            own,
            fix=f"correct {' or '.join(map(str, _own_chain(path)))}",
        )
    return recipe if epochs is None else _rescaled(recipe, epochs, path)


def with_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return a recipe with the changes of `settings`, see load().

    Raises:
        UsageError: a setting is wrong.
    """
    tables: dict[str, Any] = recipe.tables()
    for setting in settings:
        tables = _merged(tables, _parse_setting(setting))
    changed, faults = _checked(tables)
    if changed is None or faults:
        raise UsageError(f"the recipe has {counted(len(faults), 'error')}:{indented(faults)}", fix="drop the settings")
    return changed


def _by_rho_faults(tables: dict[str, Any], by_rho: dict[str, Any]) -> list[str]:
    """Return the errors of all tables [by_rho.R], also those that the data set does not select."""
    faults, known = [], _checked(tables)[1] if by_rho else []
    for rho, over in by_rho.items():
        with suppress(ValueError):
            if not 1 <= float(rho) < float("inf"):
                faults.append(f"by_rho.{rho}: no imbalance factor, which is a number from 1 up")
            elif rho != (written := f"{float(rho):g}"):
                faults.append(f"by_rho.{rho}: a data set of this rho selects by_rho.{written}")
            if part := next((key for key in over if key.isdecimal()), None):
                faults.append(f'by_rho.{rho}.{part}: a number with a point is quoted, as in [by_rho."{rho}.{part}"]')
                continue
            faults += [f"by_rho.{rho}.{line}" for line in _checked(_merged(tables, over))[1] if line not in known]
            continue
        faults.append(f"by_rho.{rho}: not a number")
    return faults


def _checked(tables: dict[str, Any], *, as_record: bool = False) -> tuple[Recipe | None, list[str]]:
    """Return the recipe of resolved tables, None if they are invalid, and one line per error."""
    recipe = None
    try:
        recipe = Recipe.model_validate(tables, context=AS_RECORD if as_record else None)
        faults = unmet(recipe)
    except ValidationError as fault:
        faults = [_explain(dict(error), tables) for error in fault.errors()]
    return recipe, faults + _function_faults(tables, as_record=as_record)


def typed_flags(settings: Sequence[str], seed: int | None = None) -> list[tuple[str, str]]:
    """Return the key and the text of each flag that changes a recipe: ("optimizer.lr", "--set optimizer.lr=1")."""
    typed = [(setting.partition("=")[0].strip(), _shown(setting)) for setting in settings]
    typed += [] if seed is None else [("seed", f"--seed {seed}")]
    return list(dict(typed).items())  # the last flag of a key wins


def _shown(setting: str) -> str:
    """Return the flag of a setting as it is typed in a shell, with at most 80 characters of the setting."""
    return f"--set {quoted(setting if len(setting) <= 80 else f'{setting[:80]}...')}"


def refusal(
    subject: str, faults: Sequence[str], flags: Sequence[tuple[str, str]], own: Sequence[str] | None, fix: str
) -> UsageError:
    """Return the error of a recipe, which names the flags that cause it.

    Args:
        subject: the recipe, such as "recipe mine.toml".
        faults: one line per error, which starts with the key.
        flags: see typed_flags().
        own: lines of `faults` that the recipe has without the flags; None: lines without a key of a flag.
        fix: how to correct the recipe itself.
    """
    if own is None:
        own = [fault for fault in faults if not _flags_in(fault, flags)]
    caused = {flag for fault in faults if fault not in own for flag in _flags_in(fault, flags) or _beside(fault, flags)}
    named = shortened([flag for _, flag in flags if flag in caused], 5)
    count = counted(len(faults), "error")
    if not caused:
        return UsageError(f"{subject} has {count}:{indented(faults)}", fix=fix)
    if not own:
        gives = "gives" if len(caused) == 1 else "give"
        return UsageError(f"{named} {gives} {count} in {subject}:{indented(faults)}", fix=f"correct or drop {named}")
    return UsageError(f"{subject} with {named} has {count}:{indented(faults)}", fix=f"{fix}; correct or drop {named}")


def _flags_in(fault: str, flags: Sequence[tuple[str, str]]) -> list[str]:
    """Return the flags whose keys a line names, or that lie in the table that it starts with."""
    place = re.split(r"[:= ]", fault, maxsplit=1)[0]
    names = {key: rf"(?<![\w.]){re.escape(key)}(?!\w)" for key, _ in flags}
    inside = [flag for key, flag in flags if key.startswith(f"{place}.")] if place not in names else []
    return [flag for key, flag in flags if re.search(names[key], fault) or flag in inside]


def _beside(fault: str, flags: Sequence[tuple[str, str]]) -> list[str]:
    """Return the flags for the table of the key that a line starts with; all if there are none."""
    table = re.split(r"[:= ]", fault, maxsplit=1)[0].rpartition(".")[0]
    return [flag for key, flag in flags if key.rpartition(".")[0] == table] or [flag for _, flag in flags]


def read_tables(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the tables of a recipe file, merged over the tables of the recipe that it `extends`.

    Keys of the extended recipe that `without` lists are removed. `about` is not inherited.

    Args:
        path: recipe file.
        above: files that extend this one, nearest first.

    Raises:
        UsageError: a file is missing or not TOML, extends itself or is nested too deeply, or a key in `without` is
            missing.
    """
    if len(above) > _MAX_EXTENDS:
        raise UsageError(
            f"{above[-1]} extends a chain of more than {_MAX_EXTENDS} recipes",
            needed_by="--recipe",
            fix=f"write the keys of some of them into {above[-1]}, and extend a recipe further up",
        )
    tables = read_own_tables(path)
    without = tables.pop("without", [])
    base = tables.pop("extends", None)
    keys = without if isinstance(without, list) else [without]
    for key, name in [("extends", base)] * (base is not None) + [("without", name) for name in keys]:
        if not isinstance(name, str) or not name:
            what = "name or file of one recipe" if key == "extends" else "key of a recipe"
            raise UsageError(
                f"{path}: {key} = {name!r} is no {what}", needed_by="--recipe", fix=f"correct `{key}` in {path}"
            )
    if base is None:
        if without:
            raise UsageError(
                f"{path}: `without` removes keys of another recipe, but there is no `extends`",
                needed_by="--recipe",
                fix=f'in {path}, add extends = "NAME", or remove the line without = ...',
            )
        return tables
    try:
        found = _base_of(path, base)
    except UsageError as fault:
        raise UsageError(f"{path}: extends: {fault.message}", needed_by=fault.needed_by, fix=fault.fix) from fault
    if any(found.samefile(file) for file in (path, *above)):
        raise UsageError(
            f'{path}: extends = "{base}" leads back to a recipe that extends {path}',
            needed_by="--recipe",
            fix=f"in {path}, extend another recipe; cpmix recipes lists all",
        )
    below = read_tables(found, (path, *above))
    below.pop("about", None)
    for key in keys:
        _take_away(below, key, path)
    return _merged(below, tables)


def _base_of(path: Path, base: str) -> Path:
    """Return the file of the recipe that the file `path` extends; raises as find_recipe()."""
    is_beside = base.lower().endswith(".toml") and not base.startswith("~")  # not in the working directory
    return find_recipe(str(path.parent / base) if is_beside else base)


def _own_chain(path: Path) -> list[Path]:
    """Return a readable recipe file and the files that it extends, up to the first that comes with cpmix."""
    chain = [path]
    while base := read_own_tables(chain[-1]).get("extends"):
        below = _base_of(chain[-1], base)
        if any(below.is_relative_to(folder) for folder in recipe_folders()):
            break
        chain.append(below)
    return chain


def read_own_tables(path: Path) -> dict[str, Any]:
    """Return the tables of a recipe file, including `extends` and `without`, which are not resolved.

    Raises:
        UsageError: the file is missing or not TOML.
    """
    try:
        return _parse(read_bytes(path, limit=MAX_BYTES).decode("utf-8-sig"))  # Windows' editors begin with a mark
    except InputError as fault:
        raise UsageError(
            fault.message, needed_by="--recipe", fix=fault.fix or "give another file with --recipe"
        ) from fault
    except ValueError as fault:
        fix = f"save {path} as UTF-8" if isinstance(fault, UnicodeDecodeError) else f"correct {path}"
        raise UsageError(f"{path} is not readable TOML: {fault}", needed_by="--recipe", fix=fix) from fault


def _parse(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError if it is invalid, nested too deeply, or has an integer of more than 64 bits."""
    # tomllib takes the square of the parts of a key.
    if any(part.count(".") > _MAX_PARTS for line in text.splitlines() for part in line.split("=")):
        raise ValueError("it is nested too deeply")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # int() refuses more than 4,300 digits
        raise ValueError("it has an integer of more than 64 bits") from None
    _check_value(tables, 0)
    return tables


def _check_value(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("it has an integer of more than 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_value(inner, depth + 1)


def _take_away(tables: dict[str, Any], key: object, path: Path) -> None:
    """Remove "table.key" from nested tables, as `without` in the file `path` states."""
    *places, last = str(key).split(".")
    for place in places:
        tables = _table(tables.get(place))
    if last not in tables:
        raise UsageError(
            f'{path}: without: the recipe that it extends has no "{key}"',
            needed_by="--recipe",
            fix=f'remove "{key}" from `without` in {path}',
        )
    del tables[last]


def _function_faults(tables: dict[str, Any], *, as_record: bool) -> list[str]:
    """Return the errors of the functions that terms name, and of their parameters, even if other keys are invalid."""
    faults = []
    for stage in PHASES:
        for name, term in _table(_table(tables.get(stage)).get("terms")).items():
            names = {kind: key for kind in TERM_KINDS if isinstance(key := _table(term).get(kind), str)}
            if as_record and any(key not in known(kind) for kind, key in names.items()):
                continue  # of a plugin
            given = {key: value for key, value in _table(term).items() if key not in TermRecipe.model_fields}
            _, found = bind(names, given, {kind: known(kind) for kind in names}, TermRecipe.model_fields)
            faults += [f"{stage}.terms.{name}.{line}" for line in found]
    return faults


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rescaled(recipe: Recipe, epochs: int, path: Path) -> Recipe:
    """Return the recipe with every epoch count multiplied by epochs / schedule.epochs.

    Whole counts are rounded to at least one epoch, also per stage. Warm-up and milestones stay fractions, so that two
    milestones of a long schedule do not coincide in a short one.
    """
    s = recipe.schedule
    if epochs == s.epochs:
        return recipe
    stages = 1 if recipe.stage2 is None else 2
    if epochs < stages:
        raise UsageError(
            f"--epochs {epochs} is too short: recipe {path} has {stages} stages of at least one epoch",
            # The recipe of a run that --epochs rescaled: stage 1 is trained, and its epochs stay.
            fix=f"give --epochs {s.epochs}" if s.rescaled_from else f"give --epochs {stages} or more",
        )
    scale = epochs / s.epochs

    def whole(count: int) -> int:
        return max(1, int(count * scale + 0.5))

    def fraction(count: float) -> float:
        return round(count * scale, 4)

    def rescaled(term: TermRecipe) -> TermRecipe:
        counts = ("unmixed_first", "unmixed_last", "reweight_after")
        return term.model_copy(update={key: fraction(getattr(term, key)) for key in counts})

    schedule = {
        "epochs": epochs,
        "stage1_epochs": epochs if recipe.stage2 is None else min(whole(s.stage1_epochs), epochs - 1),
        "warmup_epochs": fraction(s.warmup_epochs),
        "milestones": [fraction(milestone) for milestone in s.milestones],
        "rescaled_from": s.rescaled_from or s.epochs,
    }
    start = recipe.confusion.start_epoch
    update: dict[str, Any] = {
        "schedule": s.model_copy(update=schedule),
        "confusion": recipe.confusion.model_copy(update={"start_epoch": 1 if start == 1 else whole(start)}),
        "optimizer": recipe.optimizer.model_copy(update={"ema_epochs": recipe.optimizer.ema_epochs * scale}),
    }
    for phase in PHASES:
        stage: Stage | None = getattr(recipe, phase)
        if stage is not None:
            terms = {name: rescaled(term) for name, term in stage.terms.items()}
            length: dict[str, float] = {}
            if isinstance(stage, Finetune):
                length["epochs"] = whole(stage.epochs)
                length["warmup_epochs"] = round(stage.warmup_epochs * length["epochs"] / stage.epochs, 4)
            update[phase] = stage.model_copy(update={"terms": terms, **length})
    return recipe.model_copy(update=update)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the nested values of `over`, without parameters of functions that `over` replaces."""
    merged = dict(base)
    for kind in TERM_KINDS:
        old, new = base.get(kind), over.get(kind)
        if isinstance(old, str) and isinstance(new, str) and old != new:
            kept = {key for k in TERM_KINDS for key in keywords(k, over.get(k, base.get(k)))}
            for key in set(keywords(kind, old)) - kept:
                merged.pop(key, None)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _replaced_table(tables: dict[str, Any], parsed: dict[str, Any], before: str = "") -> str:
    """Return what is wrong with a setting that would replace a whole table by a value; "" if it does not."""
    ((key, value),) = parsed.items() if len(parsed) == 1 else [("", None)]
    if not isinstance(old := tables.get(key), dict):
        return ""
    if isinstance(value, dict):
        return _replaced_table(old, value, f"{before}{key}.")
    one = next((key for key in _dotted(old) if not any(other.startswith(f"{key}.") for other in _dotted(old))), "KEY")
    return f"{before}{key} = {value!r}: Input should be a table. Set one of its keys, such as {before}{key}.{one}=VALUE"


def _parse_setting(setting: str) -> dict[str, Any]:
    """Return a setting as tables; raise UsageError if it is malformed."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise UsageError(f"{_shown(setting)} is not table.key=value", fix="write it such as --set optimizer.lr=0.05")
    parts = key.strip().split(".")
    value: Any
    try:
        if len(parts) > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        parsed = _parse(f"value = {text}")
        value = parsed.pop("value")
        if parsed:
            raise ValueError("it has lines of other keys")
        if value == {}:
            raise ValueError("an empty table changes nothing")
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except ValueError as fault:
        raise UsageError(
            f"{_shown(setting)} holds no value of a recipe: {fault}", fix=f"correct or drop {_shown(setting)}"
        ) from fault
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _explain(error: dict[str, Any], tables: dict[str, Any]) -> str:
    """Return a pydantic error of a recipe's tables as "table.key: what is wrong"."""
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        usual = name.lower().replace("-", "_")
        places = [f"{table}.{usual}" for table in Recipe.model_fields if usual in _keys_of([table])]
        places += [key for key in _dotted(tables) if key.endswith(f".{usual}")]
        if location[1:] or not places:
            hint = suggest(location[-1], _keys_of(location[:-1]))
        else:
            hint = f' Did you mean "{places[0]}"?'
        return f"{name}: unknown key.{hint}"
    if error["type"] == "missing":
        return f"{name}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = "Input should be a table"
    if not location or isinstance(error["input"], dict):
        return f"{name}: {message}" if name else message
    value = repr(error["input"])
    return f"{name} = {value if len(value) <= 200 else f'{value[:200]}...'}: {message}"


def _dotted(tables: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield "table.key" for every key of nested tables."""
    for key, value in tables.items():
        yield f"{before}{key}"
        yield from _dotted(_table(value), f"{before}{key}.")


def _keys_of(location: list[str]) -> list[str]:
    """Return the field names of the table at `location`."""
    table: Any = Recipe
    for part in location:
        field = getattr(table, "model_fields", {}).get(part)
        options = () if field is None else getattr(field.annotation, "__args__", (field.annotation,))
        table = next((o for o in options if isinstance(o, type) and issubclass(o, Table)), None)
    return list(getattr(table, "model_fields", ()))
