"""train-stage1: epochs 1 to E_cp on the natural batches, collecting confusion pairs. Paper: Algorithm 1, first part."""

from functools import partial
from pathlib import Path

import torch

from cpmix_cli import artifacts, console
from cpmix_cli import recipe as recipes
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.engine import make_optimizer
from cpmix_cli.errors import InputError, UsageError
from cpmix_cli.models import build_model, take_over
from cpmix_cli.phases.training import Options, Setting, train
from cpmix_cli.randomness import torch_generator
from cpmix_cli.runs import PhaseFolder
from cpmix_cli.schedule import learning_rate
from cpmix_cli.step import Plan, TrainingState
from cpmix_cli.terms import check_fits, compile_stage


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
    return artifacts.read_tensors(path, sha)[0]


def fresh_state(setting: Setting) -> TrainingState:
    """The recipe's network with its initial weights, its optimizer, and no confusion yet."""
    recipe, dataset, device = setting.recipe, setting.dataset, setting.device
    generator = torch_generator(recipe.seed, "weights")
    model = build_model(recipe.model, dataset.num_classes, dataset.shape, generator)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    confusion = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.float64)
    return TrainingState(model, make_optimizer(model, recipe.optimizer), confusion.to(device), epoch=1)


def stage_plan(setting: Setting, phase: str) -> Plan:
    """The plan of stage 1 or 2: one schedule and one optimizer over both."""
    recipe = setting.recipe
    stage = recipe.stage1 if phase == "stage1" else recipe.stage2
    assert stage is not None
    schedule = recipe.schedule
    return Plan(
        phase=phase,
        seed=recipe.seed,
        terms=compile_stage(stage),
        joint_forward=stage.forward == "joint",
        first_epoch=1 if phase == "stage1" else schedule.stage1_epochs + 1,
        last_epoch=schedule.stage1_epochs if phase == "stage1" else schedule.epochs,
        num_epochs=schedule.epochs,
        batch_size=recipe.optimizer.batch_size,
        learning_rate=partial(learning_rate, recipe.optimizer.lr, schedule),
        collect_confusion=recipe.confusion.source == "train",
        confusion_start=recipe.confusion.start_epoch,
        confusion_decay=recipe.confusion.decay,
        precision=setting.precision,
    )
