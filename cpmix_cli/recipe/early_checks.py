"""Early checks: --recipe, --set and --epochs are checked before torch is imported."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cpmix_cli.artifacts.files import DATASET, RECIPE, RUN, TRAINING_STATE, read_bytes
from cpmix_cli.artifacts.records import Record, read_fields, read_record
from cpmix_cli.artifacts.seals import read_header
from cpmix_cli.recipe.loading import MAX_BYTES, find_recipe, load, of_dataset, read_tables, recipe_names
from cpmix_cli.runtime.errors import InputError


class _DatasetRecipe(Record):
    """Fields of dataset.json that decide which recipe is read."""

    recipe: str
    rho: float | None


class _Outputs(Record):
    """Field of run.json that lists the output files."""

    outputs: dict[str, str]
    """File name -> sha256."""


def check_request(
    name: str | None,
    settings: Sequence[str],
    epochs: int | None,
    *,
    data: Path | None = None,
    phases: Sequence[Path] = (),
) -> None:
    """Check the flags of a recipe as load() does, before slow imports.

    Errors of the data set folder or of a run folder are not raised here. The command raises them later.

    Args:
        name: value of --recipe; None takes the data set's recipe, or that of the first finished folder in `phases`.
        settings: values of --set.
        epochs: value of --epochs.
        data: data set folder.
        phases: phase folders from which a recipe may be taken.

    Raises:
        UsageError: as load().
    """
    rho = None
    if data is not None:
        try:
            record = read_record(data / DATASET, _DatasetRecipe)
        except InputError:
            return
        if record.recipe not in recipe_names():
            return
        name, rho = of_dataset(name, record.recipe), record.rho
    elif name is not None and any(known.endswith(f"/{name}") for known in recipe_names()):
        return  # cpmix: the command knows the data set, and so the folder
    if name is None:
        finished = next((folder for folder in phases if (folder / RUN).is_file()), None)
        name = None if finished is None else _own_recipe(finished)
    if name is None or (rho is None and "by_rho" in read_tables(find_recipe(name))):
        return
    load(name, settings=settings, epochs=epochs, rho=rho)


def was_made_with_plugin(phase: Path) -> bool:
    """Return whether the record of a phase names a plugin; False if the phase is not begun or is damaged."""
    with suppress(InputError):
        is_done = (phase / RUN).is_file()
        fields = read_fields(phase / RUN) if is_done else read_header(phase / TRAINING_STATE)[1]
        return isinstance(fields, dict) and fields.get("plugin") is not None
    return False


def _own_recipe(phase: Path) -> str | None:
    """Return the recipe file of a finished phase; None if it is damaged, which is no error of --recipe."""
    path = phase / RECIPE
    try:
        read_bytes(path, read_record(phase / RUN, _Outputs).outputs.get(RECIPE, ""), limit=MAX_BYTES)
    except InputError:
        return None
    return str(path)
