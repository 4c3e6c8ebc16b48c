"""Methods: the recipes' [about] tables, and the method of a trained recipe. Reads only TOML.

recognised() compares all settings with those of cpmix's recipes. minimised() compares only objectives, without their
parameters: a figure names a curve by its method, and CP-Mix with another t is still CP-Mix.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from cpmix_cli.recipe.loading import find_recipe, load, read_own_tables, recipe_names
from cpmix_cli.recipe.schema import PHASE_TABLES, About, Kind, Recipe, Stage, changed
from cpmix_cli.results.paper import Column, PaperRow
from cpmix_cli.runtime.errors import UsageError, indented

KINDS = get_args(Kind)  # in the order of the list


@dataclass(frozen=True)
class Method:
    """A method and the [about] tables of its recipes."""

    name: str
    kind: str
    paper: str
    needs: str
    recipes: dict[str, About]
    """Name of the recipe -> its table."""


def all_methods() -> list[Method]:
    """Return the methods in the order of KINDS.

    A recipe without [about] belongs to the method of the recipe with the same name for another data set.

    Raises:
        UsageError: an [about] table is wrong, or no table of a method has its kind.
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
            raise UsageError(
                f'{path}: [about] has no kind, nor does another recipe of method "{method}"',
                fix=f'add kind = "{KINDS[0]}" to [about], or another of {", ".join(KINDS)}',
            )
        methods.append(Method(method, main.kind, main.paper, main.needs, abouts))
    return sorted(methods, key=lambda m: (KINDS.index(m.kind), stem(next(iter(m.recipes)))))


def read_about(path: Path) -> About | None:
    """Return the [about] table of a recipe file; None without one.

    Raises:
        UsageError: keys or types are wrong; lists all errors.
    """
    if (table := read_own_tables(path).get("about")) is None:
        return None
    try:
        return About.model_validate(table)
    except ValidationError as fault:
        lines = [f"about.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in fault.errors()]
        raise UsageError(
            f"{path} has errors in [about]:{indented(lines)}", fix=f"its keys are {', '.join(About.model_fields)}"
        ) from fault


def stem(name: str) -> str:
    """Return the last part of a recipe's name: cmo of cifar100-lt/cmo."""
    return name.rpartition("/")[2]


@dataclass(frozen=True)
class Recognised:
    """The method of a trained recipe."""

    method: str
    """Method of the recipe."""
    recipe: str
    """Name of the recipe: an equal one, else the one that the run was trained with, else the most similar one."""
    changed: dict[str, Any]
    """Key -> value of the trained recipe where it differs; None if it lacks the key."""
    exact: tuple[str, ...]
    """Names of all recipes equal in the phase, such as CP-Mix and the last two rows of Table 3."""
    order: int
    """Position in the list of methods."""

    def is_printed_in(self, row: PaperRow, column: Column) -> bool:
        """Return whether the paper has this method in that cell."""
        return f"{column.family}/{row.recipe}" in self.exact


def recognised(
    recipe: Recipe, phase: str, family: str, rho: float | None, trained_with: str | None = None
) -> Recognised:
    """Find the recipe of cpmix that a recorded recipe is, or was made from.

    Only keys that the phase depends on count, without seed and precision. The other keys break ties.

    Args:
        recipe: the recorded recipe; all recipes are compared at its epochs.
        phase: the phase that was trained.
        family: folder of recipes to prefer, such as cifar100-lt, if none is equal.
        rho: imbalance factor of the data set; None if it has none.
        trained_with: recipe that the run was trained with, if it is known.
    """
    own, known = _settings(recipe), _known_settings(recipe.schedule.epochs, rho)
    counted = (*PHASE_TABLES[phase], "evaluation")
    found = []
    for order, ((method, name), theirs) in enumerate(known.items()):
        differing = changed(theirs, own)
        near = [entry for entry in differing if entry[0].partition(".")[0] in counted]
        outside = name.rpartition("/")[0] != family
        # An equal recipe may be of any family; a changed one is named by a recipe of its own.
        rank = (bool(near), bool(near) and outside, _size(near), _size(differing), outside, order)
        found.append((rank, method, name, {key: value for key, _, value in near}))
    best = min(found, key=lambda entry: entry[0])
    if best[3] and (given := [entry for entry in found if entry[2] == trained_with]):
        best = given[0]
    (*_, order), method, name, values = best
    return Recognised(method, name, values, tuple(entry[2] for entry in found if not entry[3]), order)


OBJECTIVES = {
    "ERM": "toy/cross-entropy",
    "Mixup": "toy/mixup",
    "Balanced Softmax": "toy/balanced-softmax",
    "similar-pair mixup": "toy/fixed-pairs",
    "CP-Mix": "toy/cpmix",
}
"""Method in the paper's figures -> a recipe that minimises its objective."""


def minimised(recipe: Recipe, phase: str) -> str | None:
    """Return the method of OBJECTIVES that trained the network of a phase, or None.

    A finetune like CP-Mix's does not change the method. None for another finetune (cRT), the first of two stages,
    several experts, a post-hoc method, and confusions of other images than the training batches.
    """
    if phase == "stage1" and recipe.stage2 is not None:
        return None
    own = _objective(recipe, phase)
    return next((method for method, theirs in _known_objectives(phase).items() if theirs == own), None)


def _size(differing: Sequence[tuple[str, Any, Any]]) -> int:
    """Return the number of keys that differ. A table that one of the two recipes lacks counts as all of its keys."""
    return sum(max(_num_keys(old), _num_keys(new)) for _, old, new in differing)


def _num_keys(value: Any) -> int:
    return sum(map(_num_keys, value.values())) if isinstance(value, dict) else 1


def _settings(recipe: Recipe) -> dict[str, Any]:
    tables = recipe.tables()
    del tables["seed"], tables["model"]["precision"]
    tables["model"].pop("cuda_graphs", None)
    return tables


@cache
def _known_settings(epochs: int, rho: float | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (method, name) -> settings of all recipes that can have so many epochs."""
    found = {}
    for method in all_methods():
        for name in method.recipes:
            with suppress(UsageError):  # two stages need at least two epochs
                found[method.name, name] = _settings(load(name, epochs=epochs, rho=rho))
    return found


def _objective(recipe: Recipe, phase: str) -> dict[str, Any]:
    """Return the objective of a phase: sampling and functions of each weighted term, without parameters."""

    def terms(stage: Stage) -> list[list[tuple[str, str]]]:
        counted = ({"draw": term.draw, **term.functions} for term in stage.terms.values() if term.weight > 0)
        return sorted(sorted(term.items()) for term in counted)

    finetune = recipe.finetune if phase == "finetune" else None
    return {
        "terms": terms(recipe.stage2 or recipe.stage1),
        "finetune": finetune and (finetune.head, finetune.batchnorm, terms(finetune)),
        "experts": recipe.model.experts > 1,
        "confusion": recipe.confusion.source,
        "evaluation": recipe.evaluation.model_dump(exclude={"batch_size"}),
    }


@cache
def _known_objectives(phase: str) -> dict[str, dict[str, Any]]:
    finetuned = {"finetune": load("cifar100-lt/cpmix").finetune}
    return {method: _objective(load(name).model_copy(update=finetuned), phase) for method, name in OBJECTIVES.items()}
