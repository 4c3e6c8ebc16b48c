"""train-stage2: epochs E_cp + 1 to E, adding the mixed terms. Paper: Algorithm 1, second part, and Eq. (13).

Weights, momentum, schedule and confusion counts go on from stage 1; many stage 2s can start from one stage 1.
"""

from functools import partial

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.evaluation.prediction import accuracy_on_test
from cpmix_cli.flags import TrainStage2Options
from cpmix_cli.runs import folders
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.loop import load_state
from cpmix_cli.training.phase import requested_recipe, skip, train
from cpmix_cli.training.plan import PhaseContext, fresh_state, stage_plan
from cpmix_cli.training.step import Plan, TrainingState


def run(options: TrainStage2Options) -> None:
    """Train from the end of stage 1 to the last epoch.

    Raises:
        InputError: stage 1 is not done, or was trained differently from what the recipe asks.
        CpmixError: see training.phase.train().
    """
    root, named = folders.locate(options.from_folder)
    if named not in (None, "stage1"):
        raise UsageError(f"train-stage2 starts from stage 1, not from {named}", fix=f"--from {root}")
    source = folders.choose_phase(root, "stage1", ("stage1",))
    record = source.record()
    dataset = folders.find_dataset(root, record, options.data, data_root=options.data_root)
    recipe = requested_recipe(options, source, dataset.record["rho"])
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    folders.require_same_upstream(source, recipe, origin=options.recipe or "what is asked")
    if recipe.stage2 is None:
        skip("the recipe has no stage 2", options.out or root)
        return
    train(
        PhaseFolder(options.out or root, "stage2"),
        source,
        recipe,
        dataset,
        options,
        partial(prepare, source),
        accuracy_on_test,
    )


def prepare(source: PhaseFolder, setting: PhaseContext) -> tuple[Plan, TrainingState]:
    """Stage 1's state, at the beginning of the next epoch."""
    path, sha = source.output(files.TRAINING_STATE)
    tensors, _ = read_tensors(path, sha)
    state = fresh_state(setting)
    load_state(state, tensors, path)
    plan = stage_plan(setting, "stage2")
    state.epoch = plan.first_epoch
    return plan, state
