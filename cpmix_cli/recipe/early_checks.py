"""What can be said of --recipe, --set and --epochs before torch is imported."""

from collections.abc import Sequence
from pathlib import Path

from cpmix_cli.artifacts.files import DATASET, RECIPE, RUN, read_bytes
from cpmix_cli.artifacts.records import Record, read_record
from cpmix_cli.recipe.loading import MAX_BYTES, find_recipe, load, read_tables, recipe_names
from cpmix_cli.runtime.errors import InputError


class _DatasetRecipe(Record):
    """Fields of a dataset.json that decide which recipe is read."""

    recipe: str
    rho: float | None


class _Outputs(Record):
    """The field of a run.json that names its files."""

    outputs: dict[str, str]


def check_request(
    name: str | None,
    settings: Sequence[str],
    epochs: int | None,
    *,
    data: Path | None = None,
    phases: Sequence[Path] = (),
) -> None:
    """Check a request as load() does, before anything heavy is imported; faults of other files are left to the phase.

    Without `name`, the recipe is that of the data set folder `data`, or of the first finished one of the `phases`.
    """
    rho = None
    if data is not None:
        try:
            record = read_record(data / DATASET, _DatasetRecipe)
        except InputError:
            return
        if record.recipe not in recipe_names():
            return
        name, rho = name or record.recipe, record.rho
    if name is None:
        finished = next((folder for folder in phases if (folder / RUN).is_file()), None)
        name = None if finished is None else _own_recipe(finished)
    if name is None or (rho is None and "by_rho" in read_tables(find_recipe(name))):
        return
    load(name, settings=settings, epochs=epochs, rho=rho)


def _own_recipe(phase: Path) -> str | None:
    """The recipe of a finished phase; None if it is not what run.json records, for which no --recipe is to blame."""
    path = phase / RECIPE
    try:
        read_bytes(path, read_record(phase / RUN, _Outputs).outputs.get(RECIPE, ""), limit=MAX_BYTES)
    except InputError:
        return None
    return str(path)
