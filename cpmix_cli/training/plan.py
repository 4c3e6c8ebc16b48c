"""Plans of the phases: terms, epochs, learning rates; and initial states: network, optimizer, confusion counts."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cpmix_cli.data.dataset import Dataset
from cpmix_cli.experts import target_classes
from cpmix_cli.models import Classifier, build_model, change_head
from cpmix_cli.recipe.schema import Finetune, Optimizer, ParameterGroup, Recipe, Schedule, Stage
from cpmix_cli.training.objective import Term, compile_stage
from cpmix_cli.training.randomness import torch_generator
from cpmix_cli.training.schedule import learning_rate
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.tuning import layer_depths, matching, set_trained


@dataclass(frozen=True)
class Plan:
    """Plan of a phase: terms, epochs, learning rates."""

    phase: str
    seed: int
    terms: tuple[Term, ...]
    joint_forward: bool
    """True if the batches of all terms are concatenated into one forward pass."""
    first_epoch: int
    """First epoch of the phase, from 1, counted over both stages."""
    last_epoch: int
    num_epochs: int
    """Epochs of both stages together."""
    batch_size: int
    """B, images per batch over all ranks."""
    learning_rate: Callable[[int, int, int], float]
    """(epoch, step, steps per epoch) -> learning rate; parameter groups multiply it by their lr_factor."""
    train_mode: bool = True
    """False keeps batch norm in eval mode."""
    collect_confusion: bool = True
    """False leaves the confusion counts K unchanged."""
    confusion_start: int = 1
    """First epoch whose errors are counted."""
    confusion_decay: float = 1.0
    """Factor of K at the start of each later epoch."""
    partners_ahead: bool = False
    """True if the partners of a whole epoch are chosen when it begins."""
    micro_batches: int = 1
    """Slices per rank and batch, processed one after the other."""
    teacher: Classifier | None = None
    """Network for the terms with distillation, which learn from its mean logits; in eval mode, never trained."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast)."""
    cuda_graphs: bool = True
    """False never records a step as a CUDA graph."""
    ema_epochs: float = 0.0
    """Horizon of the averaged weights; 0: none."""

    @property
    def num_passes(self) -> int:
        """Images through the network for each image of a batch: one per term, two per term that mixes features."""
        return sum(2 if term.recipe.mixes_features else 1 for term in self.terms)

    def num_steps(self, num_samples: int) -> int:
        """Return the steps per epoch over `num_samples` images; the last batch may be smaller."""
        return -(-num_samples // self.batch_size)

    def size(self, number: int, num_samples: int) -> int:
        """Return the images in the batch of step `number`, from 0, in an epoch of `num_samples` images."""
        return min(self.batch_size, num_samples - number * self.batch_size)

    def average_share(self, epoch: int, step: int, num_steps: int) -> float:
        """Return the share of the weights after a step in their average, whose horizon is not 0.

        It is 1 / (horizon in steps), but before the horizon 1 / (number of steps so far). So the first step copies the
        weights, and the average is their mean until the horizon. Source: timm's ModelEmaV3, with its power at 1.

        Args:
            epoch: from 1, over both stages.
            step: step of the epoch, from 0.
            num_steps: steps per epoch.
        """
        return min(1.0, max(1 / (self.ema_epochs * num_steps), 1 / ((epoch - 1) * num_steps + step + 1)))

    def counts_errors(self, epoch: int) -> bool:
        """Return whether the errors of this epoch are added to the confusion counts."""
        return self.collect_confusion and self.counted_term is not None and epoch >= self.confusion_start

    @property
    def measured_terms(self) -> list[Term]:
        """Unmixed terms whose predictions give the training accuracy, up to the first natural one.

        That term sees every training image once per epoch.
        """
        unmixed = [term for term in self.terms if term.recipe.partner is None]
        naturals = [i for i, term in enumerate(unmixed) if term.recipe.draw == "natural"]
        return unmixed[: naturals[0] + 1] if naturals else unmixed

    @property
    def counted_term(self) -> Term | None:
        """Natural term whose errors are counted: an unmixed term, else one with some unmixed batches; None without."""
        naturals = [term for term in self.terms if term.recipe.draw == "natural"]
        always = [term for term in naturals if term.recipe.partner is None]
        return next(iter(always + [term for term in naturals if term.recipe.is_gated]), None)


@dataclass(frozen=True)
class PhaseContext:
    """Inputs of plans and initial states."""

    recipe: Recipe
    dataset: Dataset
    device: torch.device
    precision: str
    inputs: Mapping[str, str]
    """sha256 of each file given by a flag, by flag."""


def make_plan(context: PhaseContext, phase: str) -> Plan:
    """Return the plan of a phase. Stages 1 and 2 share one schedule and one optimizer."""
    recipe, schedule = context.recipe, context.recipe.schedule
    stage: Stage = getattr(recipe, phase)
    table: Optimizer | Finetune = recipe.optimizer
    first, last = (1, schedule.stage1_epochs) if phase == "stage1" else (schedule.stage1_epochs + 1, schedule.epochs)
    if finetunes := isinstance(stage, Finetune):
        table, first, last = stage, 1, stage.epochs
        schedule = Schedule(epochs=last, stage1_epochs=last, warmup_epochs=stage.warmup_epochs, kind=stage.kind)
    return Plan(
        phase=phase,
        seed=recipe.seed,
        terms=compile_stage(stage),
        joint_forward=stage.forward == "joint",
        first_epoch=first,
        last_epoch=last,
        num_epochs=schedule.epochs,
        batch_size=table.batch_size,
        learning_rate=partial(learning_rate, table.lr, schedule),
        train_mode=not isinstance(stage, Finetune) or stage.batchnorm == "shift",
        collect_confusion=not finetunes,
        confusion_start=1 if finetunes else recipe.confusion.start_epoch,
        confusion_decay=1.0 if finetunes else recipe.confusion.decay,
        partners_ahead=recipe.confusion.refresh == "epoch",
        micro_batches=recipe.optimizer.micro_batches,
        precision=context.precision,
        cuda_graphs=recipe.model.cuda_graphs,
        ema_epochs=0.0 if finetunes else recipe.optimizer.ema_epochs,
    )


def fresh_state(context: PhaseContext) -> TrainingState:
    """Return the recipe's network with initial weights, its optimizer, and confusion counts of zero."""
    recipe, dataset, device = context.recipe, context.dataset, context.device
    generator = torch_generator(recipe.seed, "weights")
    model = build_model(recipe.model, dataset.num_classes, recipe.data.input_shape(dataset.shape), generator)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    confusion = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.float64)
    set_trained(model, recipe.stage1.train, recipe.model.frozen, idle_in_eval=True)
    state = TrainingState(model, _optimizer_of_stages(context, model), confusion.to(device), epoch=1)
    if recipe.has_match:
        state.counted_images = confusion.new_zeros(dataset.num_classes, device=device)
    if recipe.optimizer.ema_epochs:
        state.average = deepcopy(model).requires_grad_(False)
    return state


def begin_stage2(context: PhaseContext, state: TrainingState) -> None:
    """Prepare a state of stage 1 for stage 2: what both train keeps the optimizer's state, the rest begins."""
    recipe = context.recipe
    assert recipe.stage2 is not None
    if recipe.stage2.train == recipe.stage1.train:
        return
    set_trained(state.model, recipe.stage2.train, recipe.model.frozen, idle_in_eval=True)
    if state.average is not None:
        state.average.frozen = state.model.frozen
    kept = state.optimizer.state
    state.optimizer = _optimizer_of_stages(context, state.model)
    for p in (p for group in state.optimizer.param_groups for p in group["params"]):
        if p in kept:
            state.optimizer.state[p] = kept[p]
        elif recipe.optimizer.kind == "sgd" and recipe.optimizer.momentum:  # fused, SGD takes all buffers or none
            state.optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


def _optimizer_of_stages(context: PhaseContext, model: Classifier) -> torch.optim.Optimizer:
    settings = context.recipe.optimizer
    if settings.expert_rates == "target-share":
        counts, experts = torch.tensor(context.dataset.class_counts), context.recipe.model.experts
        shares = (target_classes(counts, experts) * counts).sum(1) / counts.sum()
        groups = list(settings.groups)
        for k, share in enumerate(shares):
            groups += [ParameterGroup(prefix=f"{part}.{k}.", lr_factor=float(share)) for part in ("experts", "head")]
        settings = settings.model_copy(update={"groups": groups})
    return make_optimizer(model, settings)


def begin_finetune(context: PhaseContext, state: TrainingState) -> None:
    """Prepare a trained state for finetune: change the head, freeze the other parameters, create the optimizer.

    If the weights were averaged, the average is finetuned.
    """
    recipe = context.recipe
    table = recipe.finetune
    assert table is not None
    state.model, state.average = state.result, None
    generator = torch_generator(recipe.seed, "finetune", "routers" if table.head == "routers" else "head")
    change_head(state.model, table, context.dataset.num_classes, generator)
    set_trained(state.model, table.train, recipe.model.frozen, idle_in_eval=False)
    state.optimizer = make_optimizer(state.model, table)


def make_optimizer(model: Classifier, recipe: Optimizer | Finetune) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that require a gradient, grouped by factor of the rate and weight decay.

    The learning rate of each group is a scalar tensor on the device; each step sets it.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    members = [(group, set(matching(model, [group.prefix]))) for group in recipe.groups]
    by_layer = recipe.layer_decay if isinstance(recipe, Optimizer) else 1.0
    depths = layer_depths(model) if by_layer < 1 else {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = next((group for group, names in members if name in names), ParameterGroup(prefix=""))
        decay = recipe.weight_decay if own.weight_decay is None else own.weight_decay
        groups.setdefault((own.lr_factor * by_layer ** depths.get(name, 0), decay), []).append(parameter)
    # Fused: one launch, which reads a float32 learning rate on the device. On the CPU it would gain almost nothing.
    device = next(model.parameters()).device
    fused = device.type == "cuda"
    rate = torch.zeros((), dtype=torch.float32 if fused else torch.float64, device=device)
    parameters = [
        {"params": p, "weight_decay": decay, "lr_factor": factor, "lr": rate.clone()}
        for (factor, decay), p in groups.items()
    ]
    if recipe.kind in ("adam", "adamw"):
        kind = torch.optim.Adam if recipe.kind == "adam" else torch.optim.AdamW
        adam = kind(parameters, fused=fused, capturable=fused)
        adam._warned_capturable_if_run_uncaptured = True  # steps before a recording are eager
        return adam
    return torch.optim.SGD(parameters, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused)


def rehearsal(context: PhaseContext, phase: str) -> tuple[Plan, TrainingState]:
    """Return a phase's plan, and an initial state in which each class was predicted as each other class once.

    A dry run and `bench` use it to run steps of a phase without a checkpoint.
    """
    plan = make_plan(context, phase)
    state = fresh_state(context)
    if phase != "stage1":
        (begin_finetune if phase == "finetune" else begin_stage2)(context, state)
    state.epoch = max(plan.first_epoch, plan.confusion_start)
    state.confusion.fill_(1).fill_diagonal_(0)
    if state.counted_images is not None:
        state.counted_images.fill_(context.dataset.num_classes)
    return plan, state
