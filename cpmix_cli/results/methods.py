"""Methods: what recipes say of theirs in [about], and which method a trained recipe is. Reads TOML alone.

recognised() compares all settings with those of the recipes that come with cpmix. minimised() compares objectives alone
and leaves out parameters on purpose: a figure names a curve by its method, and CP-Mix with another t is CP-Mix there.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from cpmix_cli.recipe.loading import find_recipe, load, read_own_tables, recipe_names
from cpmix_cli.recipe.schema import PHASE_TABLES, Recipe, Stage, Table, changed
from cpmix_cli.results.paper import Column, PaperRow
from cpmix_cli.runtime.errors import UsageError

Kind = Literal["loss", "reweighting", "mixing", "decoupled", "ensemble", "CP-Mix", "control", "ablation"]
KINDS = get_args(Kind)  # in the order of the list


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
class Method:
    """A method and what its recipes say of it."""

    name: str
    kind: str
    paper: str
    needs: str
    recipes: dict[str, About]
    """By the recipe's name."""


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
    if (table := read_own_tables(path).get("about")) is None:
        return None
    try:
        return About.model_validate(table)
    except ValidationError as fault:
        lines = [f"about.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in fault.errors()]
        raise UsageError(f"{path}: [about] is wrong:\n    " + "\n    ".join(lines)) from fault


def stem(name: str) -> str:
    """cmo of cifar100-lt/cmo."""
    return name.rpartition("/")[2]


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

    def is_printed_in(self, row: PaperRow, column: Column) -> bool:
        """The paper has this method in that cell."""
        return f"{column.family}/{row.recipe}" in self.exact


def recognised(recipe: Recipe, phase: str, family: str, rho: float | None) -> Recognised:
    """Compare a recorded recipe with all that come with cpmix, at its epochs and rho; those in the folder `family` come
    first. Only what the phase depends on counts, and neither the seed nor the precision; the rest of the recipe tells
    those apart that are equal in it.
    """
    known = _known_settings(recipe.schedule.epochs, rho)
    counted = (*PHASE_TABLES[phase], "evaluation")
    found = []
    for order, ((method, name), differing) in enumerate(_compared(_settings(recipe), known).items()):
        near = {key: value for key, value in differing.items() if key.partition(".")[0] in counted}
        found.append((len(near), len(differing), name.rpartition("/")[0] != family, order, method, name, near))
    *_, order, method, name, near = min(found)
    return Recognised(method, name, near, tuple(entry[5] for entry in found if not entry[0]), order)


OBJECTIVES = {
    "ERM": "toy/cross-entropy",
    "Mixup": "toy/mixup",
    "Balanced Softmax": "toy/balanced-softmax",
    "similar-pair mixup": "toy/fixed-pairs",
    "CP-Mix": "toy/cpmix",
}
"""Methods of the paper's figures, and a recipe that minimises the objective of each."""


def minimised(recipe: Recipe, phase: str) -> str | None:
    """The method of OBJECTIVES by which a phase's network was trained, or None.

    A finetune of CP-Mix's kind is of the method that it took. Another kind (cRT) makes another method, and so do the
    first of two stages, several experts, an evaluation after the fact, and confusions of other images than the training
    batches'.
    """
    if phase == "stage1" and recipe.stage2 is not None:
        return None
    compared = _compared(_objective(recipe, phase), _known_objectives(phase))
    return next((method for method, differing in compared.items() if not differing), None)


def _compared(own: dict[str, Any], known: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The keys in which own tables differ from each of the known ones, with the own values."""
    return {name: {key: value for key, _, value in changed(theirs, own)} for name, theirs in known.items()}


def _settings(recipe: Recipe) -> dict[str, Any]:
    tables = recipe.tables()
    del tables["seed"], tables["model"]["precision"]
    return tables


@cache
def _known_settings(epochs: int, rho: float | None) -> dict[tuple[str, str], dict[str, Any]]:
    """By method and name, the recipes that can last so many epochs."""
    found = {}
    for method in all_methods():
        for name in method.recipes:
            with suppress(UsageError):  # one epoch is none for two stages
                found[method.name, name] = _settings(load(name, epochs=epochs, rho=rho))
    return found


def _objective(recipe: Recipe, phase: str) -> dict[str, Any]:
    """What a phase minimises: draw and functions of each term that counts, whatever their names and parameters."""

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
