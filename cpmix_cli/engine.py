"""The one training loop, its state on disk, and prediction.

fit() serves all three training phases; what differs stands in the recipe's terms and in the TrainingState it starts
from. Nothing in a step waits for the device: sums are kept there and read once an epoch (on the CPU reading is free,
so a non-finite loss is seen at once).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cpmix_cli import console, signals
from cpmix_cli.confusion import count_confusions
from cpmix_cli.data.batches import Batches, ClassPool
from cpmix_cli.errors import Diverged, EnvironmentFault, InputError, Interrupted
from cpmix_cli.mixing import MixingState
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import Optimizer
from cpmix_cli.terms import EpochDraws, Term, TermBatch, draw_epoch


@dataclass
class TrainingState:
    """All that a run resumes from."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    confusion: Tensor
    """K [C, C] float64."""
    epoch: int
    """The epoch under way, counted as in Plan; the last one when all is done."""
    step: int = 0
    """Steps of that epoch already taken."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sums of the epoch under way, in the order of sum_names()."""
    history: list[dict[str, float | None]] = field(default_factory=list)
    """Rows of metrics.parquet."""


@dataclass(frozen=True)
class Plan:
    """What fit() runs."""

    phase: str
    seed: int
    terms: list[Term]
    joint_forward: bool
    first_epoch: int
    """Counted over both stages, from 1."""
    last_epoch: int
    batch_size: int
    learning_rate: Callable[[int, int, int], float]
    """(epoch, step, steps an epoch) -> rate; parameter groups scale it by their lr_factor."""
    train_mode: bool = True
    """False keeps batch norm in eval mode."""
    collect_confusion: bool = True
    confusion_start: int = 1
    confusion_decay: float = 1.0
    precision: str = "fp32"


@dataclass(frozen=True)
class TrainingData:
    """The training split on the device."""

    batches: Batches
    labels: Tensor
    """[N] int64."""
    class_counts: Tensor
    """[C] int64."""


def resolve_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device that is there.

    Raises:
        EnvironmentFault: cuda was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(f"device cuda is not there (torch {torch.__version__})", fix="use --device cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_precision(asked: str, device: torch.device) -> str:
    """auto -> bf16 where the hardware multiplies it, else fp32; anything else stays."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def make_optimizer(model: Classifier, recipe: Optimizer) -> torch.optim.Optimizer:
    """SGD or Adam over the parameters that require a gradient, in groups with their own lr_factor and weight decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = next((g for g in recipe.groups if name.startswith(g.prefix)), None)
        decay = recipe.weight_decay
        if own is not None and own.weight_decay is not None:
            decay = own.weight_decay
        groups.setdefault((own.lr_factor if own else 1.0, decay), []).append(parameter)
    parameters = [{"params": p, "weight_decay": decay, "lr_factor": factor} for (factor, decay), p in groups.items()]
    if recipe.kind == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


# -- the state on disk -------------------------------------------------------------------------------------------------


def sum_names(terms: list[Term]) -> list[str]:
    """What is summed over an epoch."""
    return [
        "loss",
        *(f"loss_{term.name}" for term in terms),
        "gradient_norm",
        "learning_rate",
        "correct",
        "seen",
        "errors",
        "images",
        "seconds",
        "fallbacks",
    ]


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """A TrainingState as named tensors; the history as float64 [epochs, columns], NaN for null."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    tensors["confusion"] = state.confusion
    tensors["sums"] = state.sums
    rows = [[math.nan if v is None else v for v in row.values()] for row in state.history]
    tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    return tensors


def load_model(model: Classifier, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy weights into a network, names and shapes checked first.

    Raises:
        InputError: the file is of another network or another number of classes.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise InputError(
            f"{path} does not fit the network: {wrong[0]} is {found.get(wrong[0], 'missing')}, "
            f"expected {expected.get(wrong[0], 'nothing')} ({len(wrong)} tensors differ)"
        )
    model.load_state_dict(tensors)


def load_state(state: TrainingState, tensors: dict[str, Tensor], path: Path, *, optimizer: bool = True) -> None:
    """Copy a saved state's network, optimizer and confusion counts into `state`.

    Args:
        state: what is filled.
        tensors: of training_state.safetensors.
        path: where they came from, for the message.
        optimizer: False leaves the optimizer fresh.

    Raises:
        InputError: the file does not fit the network.
    """
    saved = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    load_model(state.model, saved, path)
    if tuple(tensors["confusion"].shape) != tuple(state.confusion.shape):
        raise InputError(f"{path} holds confusions of {tensors['confusion'].shape[0]} classes")
    state.confusion.copy_(tensors["confusion"])
    if not optimizer:
        return
    for name, parameter in state.model.named_parameters():
        prefix = f"optimizer.{name}."
        values = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for key, value in values.items():
            # A buffer shaped like its parameter also gets its memory format and device; Adam's step count stays as it
            # is.
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter).copy_(value)
            state.optimizer.state[parameter][key] = value


# -- the loop ----------------------------------------------------------------------------------------------------------


def fit(
    plan: Plan,
    data: TrainingData,
    state: TrainingState,
    *,
    publish: Callable[[], None],
    test_accuracy: Callable[[], float] | None = None,
    eval_every: int = 0,
) -> None:
    """Train from where `state` stands to the end of the plan's last epoch.

    Args:
        plan: what to run.
        data: the training images.
        state: changed in place, published at the end of each epoch.
        publish: writes the state to disk.
        test_accuracy: fraction of test images right, for a curve that selects nothing.
        eval_every: epochs between its points; 0 for none.

    Raises:
        Diverged: the loss is NaN or infinite; the last published state stays.
        Interrupted: a signal asked to stop; the state is published.
    """
    steps = -(-len(data.labels) // plan.batch_size)
    if state.step == steps:  # the epoch it stands at is complete
        state.epoch, state.step = state.epoch + 1, 0
    if state.epoch > plan.last_epoch:
        return
    pool = ClassPool(data.labels, len(data.class_counts))
    done = (state.epoch - plan.first_epoch) * steps + state.step
    progress = console.EpochProgress(plan.phase, (plan.last_epoch - plan.first_epoch + 1) * steps, done)
    state.model.train(plan.train_mode)
    try:
        with signals.in_loop():
            while True:
                _run_epoch(plan, data, pool, state, steps, progress, publish)
                row = _metrics_row(plan, state, steps)
                if test_accuracy and eval_every and state.epoch % eval_every == 0:
                    row["test_accuracy"] = test_accuracy()
                    state.model.train(plan.train_mode)
                state.history.append(row)
                progress.line(epoch_line(plan, row))
                publish()
                if signals.pending():
                    raise _interrupted(plan, state)
                if state.epoch == plan.last_epoch:
                    return
                state.epoch, state.step = state.epoch + 1, 0
    finally:
        progress.close()


def _run_epoch(
    plan: Plan,
    data: TrainingData,
    pool: ClassPool,
    state: TrainingState,
    steps: int,
    progress: console.EpochProgress,
    publish: Callable[[], None],
) -> None:
    """The steps of the epoch under way that are not taken yet."""
    device = data.labels.device
    key = (plan.seed, plan.phase, state.epoch)
    draws = draw_epoch(plan.terms, len(data.labels), plan.batch_size, key, device)
    if state.step == 0:
        state.sums = torch.zeros(len(sum_names(plan.terms)), dtype=torch.float64, device=device)
        if state.epoch > plan.confusion_start:
            state.confusion *= plan.confusion_decay
    # A view of the last sum: partners count their fall-backs straight into it.
    mixing = MixingState(data.class_counts, state.confusion, num_fallbacks=state.sums[-1])
    started = time.perf_counter()
    while state.step < steps:
        rate = plan.learning_rate(state.epoch, state.step, steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        parts = _term_batches(plan, data, draws, state.step, pool, mixing)
        values = _step(plan, data, state, parts, rate)
        state.sums[: len(values)] += values
        state.step += 1
        if (device.type == "cpu" or state.step == steps) and not state.sums[0].isfinite():
            raise Diverged(
                f"the loss became {float(state.sums[0])} at step {state.step} of epoch {state.epoch}, "
                f"learning rate {rate:g}",
                needed_by=plan.phase,
                fix="lower optimizer.lr (or finetune.lr) or raise schedule.warmup_epochs",
            )
        progress.step((state.epoch - plan.first_epoch) * steps + state.step)
        if signals.pending() and state.step < steps:
            state.sums[-2] += time.perf_counter() - started
            publish()
            raise _interrupted(plan, state)
    state.sums[-2] += time.perf_counter() - started


def _interrupted(plan: Plan, state: TrainingState) -> Interrupted:
    return Interrupted(
        f"{signals.pending()} received; {plan.phase} is saved at epoch {state.epoch}, step {state.step}",
        fix="run the same command again to go on",
    )


def _term_batches(
    plan: Plan,
    data: TrainingData,
    draws: EpochDraws,
    step: int,
    pool: ClassPool,
    mixing: MixingState,
) -> list[TermBatch]:
    """Each term's images of one step; the natural batch is made once for all that share it."""
    indices = draws.order[step * plan.batch_size : (step + 1) * plan.batch_size]
    labels = data.labels[indices]
    if any(term.natural for term in plan.terms):
        natural = data.batches.batch(indices, draws["augment"][step][: len(indices)])
    else:
        natural = torch.empty(0)
    return [term.batch(step, draws, (natural, labels), data.batches, pool, mixing) for term in plan.terms]


def _step(
    plan: Plan,
    data: TrainingData,
    state: TrainingState,
    parts: list[TermBatch],
    rate: float,
) -> Tensor:
    """One optimizer step. Returns its share of the sums, in the order of sum_names() without the last two.

    Paper: Algorithm 1 and Eq. (13). Differs: with one joint forward the CP batch is drawn before this step's errors are
    known, so partners come from the counts through the step before.
    """
    inputs = [part.x for part in parts]
    with torch.autocast(data.labels.device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
        if plan.joint_forward:
            logits = list(torch.split(state.model(torch.cat(inputs)), [len(x) for x in inputs]))
        else:
            logits = [state.model(x) for x in inputs]
    logits = [z.float() for z in logits]
    losses = [term.loss(z, part, data.class_counts) for term, z, part in zip(plan.terms, logits, parts, strict=True)]
    total = torch.stack([t.weight * x for t, x in zip(plan.terms, losses, strict=True)]).sum()
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    state.optimizer.step()

    correct = seen = errors = torch.zeros((), device=total.device)
    for term, z, part in zip(plan.terms, logits, parts, strict=True):
        if term.mixed:
            continue
        predictions = z.detach().argmax(1)
        right = (predictions == part.y1).sum()
        correct, seen = correct + right, seen + len(z)
        if term.natural and plan.collect_confusion and state.epoch >= plan.confusion_start:
            count_confusions(state.confusion, part.y1, predictions)
            errors = errors + len(z) - right
            break  # one unmixed natural batch is the epoch's: others would count its images twice
    images = torch.tensor(float(sum(map(len, inputs))), device=total.device)
    values = [total, *losses, norm, torch.tensor(rate, device=total.device)]
    return torch.stack([v.detach().double() for v in (*values, correct, seen, errors, images)])


def _metrics_row(plan: Plan, state: TrainingState, steps: int) -> dict[str, float | None]:
    """The row of metrics.parquet for the finished epoch."""
    s = dict(zip(sum_names(plan.terms), state.sums.tolist(), strict=True))
    unmixed = any(not term.mixed for term in plan.terms)
    natural = plan.collect_confusion and any(t.natural and not t.mixed for t in plan.terms)
    row: dict[str, float | None] = {"epoch": state.epoch, "learning_rate": s["learning_rate"] / steps}
    row["loss"] = s["loss"] / steps
    row |= {f"loss_{term.name}": s[f"loss_{term.name}"] / steps for term in plan.terms}
    row["gradient_norm"] = s["gradient_norm"] / steps
    row["train_accuracy"] = s["correct"] / s["seen"] if unmixed else None
    row["num_confusions"] = s["errors"] if natural else None
    row["num_fallbacks"] = s["fallbacks"]
    row["test_accuracy"] = None
    row["images_per_second"] = s["images"] / s["seconds"]
    row["seconds"] = s["seconds"]
    return row


def epoch_line(plan: Plan, row: dict[str, float | None]) -> str:
    """One plain line an epoch, key=value."""
    parts = [f"{plan.phase} epoch={row['epoch']:.0f}/{plan.last_epoch}"]
    parts += [f"lr={row['learning_rate']:.4g}", f"loss={row['loss']:.4f}"]
    if len(plan.terms) > 1:
        parts += [f"loss_{t.name}={row[f'loss_{t.name}']:.4f}" for t in plan.terms]
    if row["train_accuracy"] is not None:
        parts.append(f"train_accuracy={100 * row['train_accuracy']:.2f}%")
    if row["num_confusions"] is not None:
        parts.append(f"confusions={row['num_confusions']:.0f}")
    if row["num_fallbacks"]:
        parts.append(f"fallbacks={row['num_fallbacks']:.0f}")
    if row["test_accuracy"] is not None:
        parts.append(f"test_accuracy={100 * row['test_accuracy']:.2f}%")
    parts += [f"images/s={row['images_per_second']:.0f}", f"seconds={row['seconds']:.1f}"]
    return " ".join(parts)


@torch.no_grad()
def predict(model: Classifier, batches: Batches, num_samples: int, batch_size: int) -> Tensor:
    """Raw logits [N, C] float32 on the CPU, in the data's order; the network in eval mode, fp32, no augmentation."""
    model.eval()
    device = next(model.parameters()).device
    indices = torch.arange(num_samples, device=device)
    return torch.cat([model(batches.plain(part)).cpu() for part in torch.split(indices, batch_size)])
