"""recipes: what comes with cpmix, one of them resolved, or what two of them differ in. Reads TOML alone."""

from dataclasses import dataclass

from cpmix_cli import console
from cpmix_cli.recipe import Recipe, differences, find_recipe, load, recipe_names


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    name: str | None
    other: str | None
    settings: list[str]
    epochs: int | None
    seed: int | None
    rho: float | None


def run(options: Options) -> None:
    """List, show or compare.

    Raises:
        UsageError: no such recipe, or faults in it.
    """
    if options.name is None:
        listed = [{"name": name, "description": description(name)} for name in recipe_names()]
        rows = [[entry["name"], entry["description"]] for entry in listed]
        console.result({"command": "recipes", "recipes": listed}, header=("recipe", "what"), rows=rows)
        return
    first = resolved(options, options.name)
    if options.other is None:
        fields = {"command": "recipes", "name": options.name, "recipe": first.tables()}
        console.result(fields, lines=[first.to_toml().rstrip("\n")])
        return
    lines = differences(first.tables(), resolved(options, options.other).tables())
    fields = {"command": "recipes", "names": [options.name, options.other], "differences": lines}
    console.result(fields, lines=lines or ["no difference"])


def resolved(options: Options, name: str) -> Recipe:
    """A recipe as a training phase would resolve it."""
    return load(name, settings=options.settings, epochs=options.epochs, seed=options.seed, rho=options.rho)


def description(name: str) -> str:
    """First comment line of a recipe's file."""
    with find_recipe(name).open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix("#").strip()
