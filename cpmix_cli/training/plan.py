"""What each phase trains: its plan, and the state it starts from where no checkpoint gives one."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from cpmix_cli.data.dataset import Dataset
from cpmix_cli.experts import target_classes
from cpmix_cli.models import add_routers, add_scale, build_model, initialise, within
from cpmix_cli.recipe.schema import Optimizer, ParameterGroup, Recipe, Schedule
from cpmix_cli.training.loop import make_optimizer
from cpmix_cli.training.objective import compile_stage
from cpmix_cli.training.randomness import torch_generator
from cpmix_cli.training.schedule import learning_rate
from cpmix_cli.training.step import Plan, TrainingState


@dataclass(frozen=True)
class PhaseContext:
    """What plans and states are made from."""

    recipe: Recipe
    dataset: Dataset
    device: torch.device
    precision: str
    inputs: Mapping[str, str]
    """Hashes of the files given by flags, by flag."""


def fresh_state(setting: PhaseContext) -> TrainingState:
    """The recipe's network with its initial weights, its optimizer, and no confusion yet."""
    recipe, dataset, device = setting.recipe, setting.dataset, setting.device
    generator = torch_generator(recipe.seed, "weights")
    model = build_model(recipe.model, dataset.num_classes, recipe.data.input_shape(dataset.shape), generator)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    confusion = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.float64)
    settings = recipe.optimizer
    if settings.expert_rates == "target-share":
        counts = torch.tensor(dataset.class_counts)
        shares = (target_classes(counts, recipe.model.experts) * counts).sum(1) / counts.sum()
        own = [
            ParameterGroup(prefix=f"{part}.{k}.", lr_factor=float(share))
            for k, share in enumerate(shares)
            for part in ("experts", "head")
        ]
        settings = settings.model_copy(update={"groups": [*settings.groups, *own]})
    return TrainingState(model, make_optimizer(model, settings), confusion.to(device), epoch=1)


def stage_plan(setting: PhaseContext, phase: str) -> Plan:
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
        confusion_start=recipe.confusion.start_epoch,
        confusion_decay=recipe.confusion.decay,
        partners_ahead=recipe.confusion.refresh == "epoch",
        micro_batches=recipe.optimizer.micro_batches,
        precision=setting.precision,
    )


def head_plan(setting: PhaseContext, state: TrainingState) -> Plan:
    """The finetune's plan; `state` is made ready for it: parameters frozen, the head as asked, a fresh optimizer."""
    recipe = setting.recipe
    table = recipe.finetune
    assert table is not None
    if table.head == "reinit":
        initialise(state.model.head, torch_generator(recipe.seed, "finetune", "head"))
    elif table.head == "scale":
        add_scale(state.model)
    elif table.head == "routers":
        generator = torch_generator(recipe.seed, "finetune", "routers")
        add_routers(state.model, setting.dataset.num_classes, table.router_top, generator)
    for name, parameter in state.model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(table.train)) and not within(name, state.model.frozen)
    optimizer = Optimizer(
        lr=table.lr,
        momentum=table.momentum,
        nesterov=table.nesterov,
        weight_decay=table.weight_decay,
        batch_size=table.batch_size,
        groups=table.groups,
    )
    state.optimizer = make_optimizer(state.model, optimizer)
    schedule = Schedule(epochs=table.epochs, stage1_epochs=table.epochs, warmup_epochs=0, kind=table.kind)
    return Plan(
        phase="finetune",
        seed=recipe.seed,
        terms=compile_stage(table),
        joint_forward=table.forward == "joint",
        first_epoch=1,
        last_epoch=table.epochs,
        num_epochs=table.epochs,
        batch_size=table.batch_size,
        learning_rate=partial(learning_rate, table.lr, schedule),
        train_mode=table.batchnorm == "shift",
        collect_confusion=False,
        partners_ahead=recipe.confusion.refresh == "epoch",
        micro_batches=recipe.optimizer.micro_batches,
        precision=setting.precision,
    )


def prepared(setting: PhaseContext, phase: str) -> tuple[Plan, TrainingState]:
    """A phase's plan, and a fresh state in which every class has been confused with every other."""
    state = fresh_state(setting)
    plan = head_plan(setting, state) if phase == "finetune" else stage_plan(setting, phase)
    state.epoch = max(plan.first_epoch, plan.confusion_start)
    state.confusion.fill_(1).fill_diagonal_(0)
    return plan, state
