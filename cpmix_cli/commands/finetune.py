"""finetune: class-balanced training of the head on the frozen network. Paper: Sec. 5.1, B.3 (Table 6, last rows).

Differs: the paper gives neither loss nor schedule nor sampler; cross entropy on class-uniform draws, cosine to 0, the
head kept, batch norm frozen (reference/methods_mixing.md section 3.10). Each is a recipe key.
"""

from functools import partial

from cpmix_cli.artifacts import files
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.evaluation.prediction import accuracy_on_test
from cpmix_cli.flags import FinetuneOptions
from cpmix_cli.runs import folders
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.loop import load_state
from cpmix_cli.training.phase import requested_recipe, skip, train
from cpmix_cli.training.plan import PhaseContext, fresh_state, head_plan
from cpmix_cli.training.step import Plan, TrainingState


def run(options: FinetuneOptions) -> None:
    """Train the head from the last training stage.

    Raises:
        InputError: that stage is not done, or was trained differently from what the recipe asks.
        CpmixError: see training.phase.train().
    """
    root, named = folders.locate(options.from_folder)
    phase = options.phase or (named if named != "finetune" else None)
    source = folders.choose_phase(root, phase, ("stage1", "stage2"))
    dataset = folders.find_dataset(root, source.record(), options.data, data_root=options.data_root)
    recipe = requested_recipe(options, source, dataset.record["rho"])
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    folders.require_same_upstream(source, recipe, origin=options.recipe or "what is asked")
    if recipe.finetune is None:
        skip("the recipe has no finetune", options.out or root)
        return
    if source.phase == "stage1" and recipe.stage2 is not None and phase is None:
        raise InputError(
            f"{root} has a stage 2 in its recipe, but only stage 1 is done",
            fix=f"cpmix train-stage2 --from {root}   (or name the phase: --phase stage1)",
        )
    train(
        PhaseFolder(options.out or root, "finetune"),
        source,
        recipe,
        dataset,
        options,
        partial(prepare, source),
        accuracy_on_test,
    )


def prepare(source: PhaseFolder, setting: PhaseContext) -> tuple[Plan, TrainingState]:
    """The source's network with all but the trained parameters frozen, and a fresh optimizer."""
    path, sha = source.output(files.TRAINING_STATE)
    tensors, _ = read_tensors(path, sha)
    state = fresh_state(setting)
    load_state(state, tensors, path, optimizer=False)
    return head_plan(setting, state), state
