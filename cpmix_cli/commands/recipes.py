"""recipes: list the recipes of cpmix, show one, compare two, show their costs, or copy all. Reads only TOML."""

from pathlib import Path

from cpmix_cli.artifacts.files import PHASES, RECIPE
from cpmix_cli.flags import RecipesOptions, given_flags
from cpmix_cli.recipe.copies import copy_folder
from cpmix_cli.recipe.loading import find_recipe, load, recipe_folders, recipe_names
from cpmix_cli.recipe.schema import Recipe, Stage, differences
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import UsageError, counted
from cpmix_cli.runtime.text import quoted


def run(options: RecipesOptions) -> None:
    """List, show, compare or copy recipes, or show their costs.

    Raises:
        UsageError: a recipe is missing or wrong, or flags do not go together.
        EnvironmentFault: the folder of --copy has files of the user, or cannot be written.
    """
    if options.copy is not None:
        _copy(options, options.copy)
        return
    if options.overwrite:
        raise UsageError("--overwrite has no effect without --copy", fix="give --copy DIR as well, or drop it")
    if options.budget:
        _show_budgets(options)
        return
    if options.name is None:
        listed = [{"name": name, "description": _description(name)} for name in recipe_names()]
        console.result({"recipes": listed}, header=("recipe", "what"), rows=[list(entry.values()) for entry in listed])
        return
    first = _resolved(options, options.name)
    if options.other is None:
        console.result({"name": options.name, "recipe": first.tables()}, lines=first.to_toml().rstrip("\n").split("\n"))
        return
    lines = differences(first.tables(), _resolved(options, options.other).tables())
    fields = {"names": [options.name, options.other], "differences": lines}
    console.result(fields, lines=lines or ["no difference"])


def _copy(options: RecipesOptions, folder: Path) -> None:
    """Copy the folder of the recipes, and say how to use a copy."""
    if others := [name for name in given_flags(options) if name not in ("--copy", "--overwrite")]:
        raise UsageError(f"--copy copies all recipes as they are, without {', '.join(others)}", fix="drop the others")
    number, written = copy_folder(recipe_folders()[0], folder, overwrite=options.overwrite)
    status = "done" if written else "up to date"
    fields = {"status": status, "folder": str(folder), "num_files": number, "written": written}
    how = f"edit a recipe, then give its file: --recipe {quoted(folder / 'cifar100-lt' / 'cpmix.toml')}"
    console.result(fields, lines=[how, f"{status}: {folder} ({counted(len(written), 'file')} of {number} written)"])
    console.follow(console.typed("run", "digits", "--recipe", folder / "digits" / "cpmix.toml"))


def _resolved(options: RecipesOptions, name: str) -> Recipe:
    """Load a recipe as a training phase would; that of a run also without the run's plugin."""
    path = find_recipe(name)
    as_record = False
    if path.name == RECIPE:
        from cpmix_cli.runs.folders import PhaseFolder  # imported here: it imports pandas
        from cpmix_cli.runs.plugin_needs import needed_by

        as_record = needed_by([PhaseFolder(path.parent.parent, path.parent.name)]) is not None
    return load(
        name, settings=options.settings, epochs=options.epochs, seed=options.seed, rho=options.rho, as_record=as_record
    )


def _description(name: str) -> str:
    """Return the first comment line of a recipe's file."""
    with find_recipe(name).open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix("#").strip()


def _show_budgets(options: RecipesOptions) -> None:
    """Print the costs of the named recipes, or of all; to_cpmix is null if the data set has no recipe cpmix."""
    budgets, rows = [], []
    for name in [name for name in (options.name, options.other) if name] or recipe_names():
        recipe = _resolved(options, name)
        passes = image_passes(recipe)
        epochs = {f"{phase}_epochs": recipe.epochs_of(phase) for phase in PHASES}
        cpmix = f"{name.rpartition('/')[0]}/cpmix"
        ratio = round(passes / image_passes(_resolved(options, cpmix)), 4) if cpmix in recipe_names() else None
        budgets.append({"name": name, **epochs, "image_passes": round(passes, 4), "to_cpmix": ratio})
        shown = " + ".join(str(count) for count in epochs.values() if count)
        rows.append([name, shown, f"{passes:.1f}", "-" if ratio is None else f"{ratio:.2f}"])
    console.result(
        {"budgets": budgets},
        header=("recipe", ">epochs", ">passes of an image", ">to cpmix"),
        rows=rows,
        lines=console.prose(
            ["epochs of stage 1, stage 2, finetune; to cpmix: passes over those of the data set's cpmix recipe"]
        ),
    )


def image_passes(recipe: Recipe) -> float:
    """Return the passes of images through the network, divided by the training images N.

    Each epoch of a phase is one pass per term with weight > 0, also if only the head is trained, and two per term that
    mixes features. A term with a `match` adds two forward passes per matched batch. In mixed epoch e of E, the expected
    share of matched batches is probability * (e / E) ** match_power.
    """
    first, last = recipe.schedule.stage1_epochs, recipe.schedule.epochs
    passes = _stage_passes(recipe.stage1, range(1, first + 1), last)
    if recipe.stage2 is not None:
        passes += _stage_passes(recipe.stage2, range(first + 1, last + 1), last)
    if recipe.finetune is not None:
        passes += _stage_passes(recipe.finetune, range(1, recipe.finetune.epochs + 1), recipe.finetune.epochs)
    return passes


def _stage_passes(stage: Stage, epochs: range, num_epochs: int) -> float:
    """Return the passes of one stage in `epochs`, which are numbered from 1 to num_epochs."""
    passes = 0.0
    for term in stage.terms.values():
        if term.weight > 0:
            passes += len(epochs) * (2 if term.mixes_features else 1)
            mixed = [e for e in epochs if term.unmixed_first < e <= num_epochs - term.unmixed_last]
            if term.match is not None:
                passes += 2 * term.probability * sum((e / num_epochs) ** term.match_power for e in mixed)
    return passes
