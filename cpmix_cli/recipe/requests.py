"""What can be said of --recipe, --set and --epochs before torch is imported."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cpmix_cli.recipe.loading import _read_json, _read_small, find_recipe, load, read_tables, recipe_names


def check_request(
    name: str | None,
    settings: Sequence[str],
    epochs: int | None,
    *,
    data: Path | None = None,
    phases: Sequence[Path] = (),
) -> None:
    """Say what is wrong with a recipe that flags ask for, before anything heavy is imported for it.

    What is wrong with files, the recipe's own aside, the phase says.

    Args:
        name: of the recipe; without one that of the data set, or of a finished phase.
        settings: with epochs, see load().
        data: data set folder.
        phases: phase folders; the first that is finished counts.

    Raises:
        UsageError: as load() does.
    """
    rho = None
    if data is not None:
        record = _read_json(data / "dataset.json")
        if record is None or not {"recipe", "rho"} <= record.keys():
            return
        own, rho = record["recipe"], record["rho"]
        if own not in recipe_names() or not isinstance(rho, float | None):
            return
        name = name or own
    if name is None:
        finished = next((folder for folder in phases if (folder / "run.json").is_file()), None)
        name = None if finished is None else _own_recipe(finished)
    if name is None or (rho is None and "by_rho" in read_tables(find_recipe(name))):
        return
    load(name, settings=settings, epochs=epochs, rho=rho)


def _own_recipe(phase: Path) -> str | None:
    """The recipe of a finished phase, if it is the one that its record names; no user's --recipe is at fault for
    another.
    """
    path = phase / "recipe.toml"
    record = _read_json(phase / "run.json")
    outputs = record.get("outputs") if record is not None else None
    try:
        sha = hashlib.sha256(_read_small(path)).hexdigest()
    except OSError:
        return None
    return str(path) if isinstance(outputs, dict) and outputs.get(path.name) == sha else None
