"""train-stage1: epochs 1 to E_cp on the natural batches, collecting confusion pairs. Paper: Algorithm 1, first part."""

from functools import partial
from pathlib import Path

import torch

from cpmix_cli import artifacts, console
from cpmix_cli import recipe as recipes
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.errors import InputError, UsageError
from cpmix_cli.models import take_over
from cpmix_cli.phases.training import Options, train
from cpmix_cli.plans import Setting, fresh_state, stage_plan
from cpmix_cli.runs import PhaseFolder
from cpmix_cli.step import Plan, TrainingState
from cpmix_cli.terms import check_fits


def run(options: Options, out: Path, init: Path | None) -> None:
    """Train from fresh weights (or those of --init) to the end of stage 1.

    Raises:
        InputError: the --init file is damaged or of another network.
        CpmixError: see phases.training.train().
    """
    if options.data is None:
        raise UsageError(
            "--data is missing: the data set folder",
            needed_by="train-stage1",
            fix="cpmix build-lt SOURCE makes one",
        )
    dataset = open_dataset(options.data, needed_by="train-stage1")
    recipe = recipes.load(
        options.recipe or dataset.record["recipe"],
        settings=options.settings,
        epochs=options.epochs,
        seed=options.seed,
        rho=dataset.record["rho"],
    )
    check_fits(recipe, dataset.num_classes, dataset.shape)
    inputs = {} if init is None else {"init": init}
    train(PhaseFolder(out, "stage1"), None, recipe, dataset, options, partial(prepare, init), inputs)


def prepare(init: Path | None, setting: Setting) -> tuple[Plan, TrainingState]:
    """Fresh or given weights, empty confusion counts, and the stage-1 plan."""
    state = fresh_state(setting)
    if init is not None:
        taken = take_over(state.model, read_weights(init, setting.inputs["init"]), init)
        console.note(f"starts from {taken} tensors of {init}; the head is new")
    return stage_plan(setting, "stage1"), state


def read_weights(path: Path, sha: str) -> dict[str, torch.Tensor]:
    """The tensors of an --init file, whose hash is already part of what the phase is made from.

    Raises:
        InputError: it is not a safetensors file, or was changed in between.
    """
    if path.suffix.lower() in (".pth", ".pt", ".bin", ".ckpt"):
        raise InputError(
            f"{path} is a PyTorch checkpoint; cpmix trains from safetensors alone",
            needed_by="--init",
            fix=f"cpmix import-weights {path} --sha256 HASH",
        )
    tensors, metadata = artifacts.read_tensors(path, sha)
    if isinstance(metadata, dict) and "tensors_digest" in metadata:  # import-weights wrote it
        artifacts.check_seal(path, metadata, tensors)
    return tensors
