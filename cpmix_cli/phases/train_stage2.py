"""train-stage2: epochs E_cp + 1 to E, adding the mixed terms. Paper: Algorithm 1, second part, and Eq. (13).

Weights, momentum, schedule and confusion counts go on from stage 1; many stage 2s can start from one stage 1.
"""

from functools import partial
from pathlib import Path

from cpmix_cli import artifacts, runs
from cpmix_cli import recipe as recipes
from cpmix_cli.engine import load_state
from cpmix_cli.errors import UsageError
from cpmix_cli.phases.training import Options, skip, train
from cpmix_cli.plans import Setting, fresh_state, stage_plan
from cpmix_cli.runs import PhaseFolder
from cpmix_cli.step import Plan, TrainingState
from cpmix_cli.terms import check_fits


def run(options: Options, from_folder: Path, out: Path | None) -> None:
    """Train from the end of stage 1 to the last epoch.

    Raises:
        InputError: stage 1 is not done, or was trained differently from what the recipe asks.
        CpmixError: see phases.training.train().
    """
    root, named = runs.locate(from_folder)
    if named not in (None, "stage1"):
        raise UsageError(f"train-stage2 starts from stage 1, not from {named}", fix=f"--from {root}")
    source = runs.choose_phase(root, "stage1", ("stage1",), needed_by="train-stage2")
    record = source.record()
    dataset = runs.find_dataset(root, record, options.data, needed_by="train-stage2", data_root=options.data_root)
    recipe = requested_recipe(options, source, dataset.record["rho"])
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    runs.require_same_upstream(source, recipe, needed_by="train-stage2", origin=options.recipe or "what is asked")
    if recipe.stage2 is None:
        skip("train-stage2", "the recipe has no stage 2", out or root)
        return
    train(
        PhaseFolder(out or root, "stage2"),
        source,
        recipe,
        dataset,
        options,
        partial(prepare, source),
    )


def requested_recipe(options: Options, source: PhaseFolder, rho: float | None) -> recipes.Recipe:
    """The recipe that the flags ask for; without any, the one the source was trained with.

    Raises:
        InputError: the source's own is missing or damaged.
        UsageError: what the flags ask for is wrong.
    """
    own = source.recipe()  # flags that change it are no reason to take it unverified
    if not options.changes_recipe:
        return own
    name = options.recipe or str(source.output(artifacts.RECIPE)[0])
    return recipes.load(name, settings=options.settings, epochs=options.epochs, seed=options.seed, rho=rho)


def prepare(source: PhaseFolder, setting: Setting) -> tuple[Plan, TrainingState]:
    """Stage 1's state, at the beginning of the next epoch."""
    path, sha = source.output(artifacts.TRAINING_STATE)
    tensors, _ = artifacts.read_tensors(path, sha)
    state = fresh_state(setting)
    load_state(state, tensors, path)
    plan = stage_plan(setting, "stage2")
    state.epoch = plan.first_epoch
    return plan, state
