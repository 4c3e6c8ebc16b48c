"""The training loop of all phases: epochs, checks for NaN, metrics, checkpoints, signals.

The phases differ only in their Plan and in the TrainingState that they start from. step.py computes one step.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from cpmix_cli.runtime import console, ranks, signals
from cpmix_cli.runtime.errors import Diverged, InputError, Interrupted, UnreadableError
from cpmix_cli.training.averaging import measure_statistics
from cpmix_cli.training.cuda_graphs import EAGER_STEPS, own_stream, synchronize
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.live_view import LiveView
from cpmix_cli.training.metrics import epoch_line, metrics_row
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.state import EpochSums, TrainingState
from cpmix_cli.training.step import Step


def fit(
    plan: Plan,
    data: TrainingData,
    state: TrainingState,
    *,
    publish: Callable[[], None],
    check_data: Callable[[], None] = lambda: None,
    checkpoint_every: int = 1,
    test_accuracy: Callable[[], float] | None = None,
    eval_every: int = 1,
    class_names: Sequence[str] = (),
    few_inclusive: bool = False,
) -> float:
    """Train to the end of the plan's last epoch, on all ranks together.

    Args:
        plan: terms, epochs and learning rates of the phase.
        data: training split.
        state: where training starts or resumes; changes in place.
        publish: writes `state` to disk. Called on the first rank only, and only if all values are finite.
        check_data: raises InputError if the data set is not in its place any more. Called after each epoch.
        checkpoint_every: epochs between two checkpoints; the last epoch is always saved.
        test_accuracy: measures the accuracy on the test set, a fraction. It is only recorded and selects no model.
        eval_every: epochs between two calls of `test_accuracy`.
        class_names, few_inclusive: see LiveView.

    Returns:
        Seconds spent recording CUDA graphs, part of the training time.

    Raises:
        Diverged: a loss, a gradient or a weight is NaN or infinite; the last published state is kept.
        Interrupted: a signal asked to stop; the state is published.
        InputError: `check_data` failed; the state is published. Or images cannot be read; the state after the last step
            is published, if a step reads all of its images before it changes the state.
    """
    steps = plan.num_steps(len(data.labels))
    if state.step == steps:  # that epoch is complete
        if state.epoch == plan.last_epoch:
            _finish_average(publish, plan, data, state)
            return 0.0
        state.epoch, state.step = state.epoch + 1, 0
    device, here = data.labels.device, ranks.current()
    if state.step == 0:
        state.sums = EpochSums([term.name for term in plan.terms], device)
    done = (state.epoch - plan.first_epoch) * steps + state.step
    warm_up = 1 if device.type == "cpu" else EAGER_STEPS + 1
    total = (plan.last_epoch - plan.first_epoch + 1) * steps
    progress = console.EpochProgress(plan.phase, total, done, warm_up, partial(synchronize, device))
    state.model.train(plan.train_mode)
    try:
        with signals.in_loop(), own_stream(device):
            here.max_over_ranks(0)  # wait for all ranks here: later, a missing rank would be noticed only within a step
            step = Step(plan, data, state)
            view = LiveView(plan, data, state, step, class_names, few_inclusive) if progress.has_view else None
            if view:
                progress.look = view.table
            while True:
                started = time.perf_counter()
                try:
                    for _ in epoch_steps(plan, step, state, steps):
                        progress.step((state.epoch - plan.first_epoch) * steps + state.step)
                        # A signal to one rank stops all ranks after the same step.
                        if signals.adopt(here.max_over_ranks(signals.number())) and state.step < steps:
                            _check_finite(plan, state, steps)
                            state.sums["seconds"].add_(time.perf_counter() - started)
                            _publish(publish, plan, state)
                            raise _interrupted(plan, state)
                except InputError:
                    # Not at the start of an epoch, where confusion counts have decayed, and it was saved before.
                    if here.size == 1 and plan.micro_batches == 1 and state.step > 0:
                        state.sums["seconds"].add_(time.perf_counter() - started)
                        _publish(publish, plan, state)
                        console.note(_saved(plan, state))
                    raise
                state.sums["seconds"].add_(time.perf_counter() - started)
                row = metrics_row(plan, state, len(data.labels))
                if view:
                    view.end_epoch()
                if test_accuracy and state.epoch % eval_every == 0:
                    if state.average is not None:
                        measure_statistics(plan, data, state)
                    row["test_accuracy"] = test_accuracy()
                    state.model.train(plan.train_mode)
                state.history.append(row)
                console.note(epoch_line(plan, row))
                moved = _fault_of(check_data)
                last, stop = state.epoch == plan.last_epoch, signals.adopt(here.max_over_ranks(signals.number()))
                any_moved = here.max_over_ranks(int(moved is not None))
                if last or stop or any_moved or state.epoch % checkpoint_every == 0:
                    _publish(publish, plan, state)
                if stop:
                    raise _interrupted(plan, state)
                if any_moved:  # all ranks end here, also one that looked before the data set was moved
                    console.note(_saved(plan, state))
                    raise (
                        moved
                        or _fault_of(check_data)
                        or InputError(
                            "the data set was moved or built anew while it was in use, as another rank sees it",
                            fix="put it back: then the same command goes on",
                        )
                    )
                if last:
                    _finish_average(publish, plan, data, state)
                    return step.capture_seconds
                state.epoch, state.step = state.epoch + 1, 0
    finally:
        progress.close()


def epoch_steps(plan: Plan, step: Step, state: TrainingState, num_steps: int) -> Iterator[None]:
    """Run the remaining steps of the current epoch, and yield after each.

    Args:
        plan: plan of the phase.
        step: runs one step.
        state: current epoch and completed steps; changes in place.
        num_steps: steps per epoch.

    Raises:
        Diverged: a loss or a gradient is NaN or infinite. The check waits for the device, so on CUDA it runs once per
            epoch.
    """
    if state.step == 0:
        state.sums.values.zero_()
        if state.epoch > plan.confusion_start:
            state.confusion *= plan.confusion_decay
            if state.counted_images is not None:
                state.counted_images *= plan.confusion_decay
        if plan.partners_ahead:
            state.epoch_confusion = state.confusion.to("cpu", copy=True)
    step.begin_epoch(state.epoch)
    reads_each = state.sums.values.device.type == "cpu"
    before = state.sums.read()
    while state.step < num_steps:
        step(state.step)
        state.step += 1
        if state.step == num_steps:
            ranks.current().max_over_ranks(0)  # notice a lost rank here: the read below would wait for it on the device
        if reads_each or state.step == num_steps:
            before = _check_finite(plan, state, num_steps, before if reads_each else None)
        if state.step == num_steps:
            state.epoch_confusion = None
        yield


def first_step(plan: Plan, data: TrainingData, state: TrainingState) -> None:
    """Run one training step as a test: forward, backward, optimizer. On CUDA, also record the graphs of the steps.

    Args:
        plan: plan of the phase.
        data: training split.
        state: where the step starts; changes in place.

    Raises:
        Diverged: a loss, a gradient or a weight is NaN or infinite.
    """
    steps = plan.num_steps(len(data.labels))
    if state.step == steps:  # that epoch is complete
        state.epoch, state.step = min(state.epoch + 1, plan.last_epoch), 0
    state.sums = EpochSums([term.name for term in plan.terms], data.labels.device)
    state.model.train(plan.train_mode)
    with own_stream(data.labels.device):
        step = Step(plan, data, state)
        next(epoch_steps(plan, step, state, steps))
        _check_finite(plan, state, steps, dict.fromkeys(state.sums.read(), 0.0))
        _check_weights(plan, state)
        step.record()  # needs memory of its own
        synchronize(data.labels.device)


def _check_finite(
    plan: Plan, state: TrainingState, steps: int, before: dict[str, float] | None = None
) -> dict[str, float]:
    """Return the epoch's sums, or raise Diverged; given the sums `before` the last step, the message has its losses."""
    sums = state.sums.read()
    if math.isfinite(sums["loss"]) and math.isfinite(sums["gradient_norm"]):
        return sums
    step = state.step if before else int(sums["finite_steps"]) + 1
    rate = plan.learning_rate(state.epoch, step - 1, steps)

    def value(name: str) -> str:
        if before:
            return f"{sums[name] - before[name]:.4g}"
        return "finite" if math.isfinite(sums[name]) else f"{sums[name]:.4g}"

    losses = ", ".join(f"{term.name} {value(f'loss_{term.name}')}" for term in plan.terms)
    what = "the gradient" if math.isfinite(sums["loss"]) else "the loss"
    raise Diverged(
        f"{what} is not finite at step {step} of epoch {state.epoch}, learning rate {rate:g}; loss terms: {losses}; "
        f"gradient norm {value('gradient_norm')}",
        needed_by=plan.phase,
        fix="lower optimizer.lr (or finetune.lr) or raise schedule.warmup_epochs",
    )


def _finish_average(publish: Callable[[], None], plan: Plan, data: TrainingData, state: TrainingState) -> None:
    """Complete the averaged network, if there is one, and publish the state. An interruption changes nothing of it."""
    if state.average is None:
        return

    def check() -> None:
        if signals.adopt(ranks.current().max_over_ranks(signals.number())):
            raise _interrupted(plan, state)

    console.note(f"{plan.phase}: one pass over the training images, for the batch norm of the averaged weights")
    with signals.in_loop(), own_stream(data.labels.device):
        measure_statistics(plan, data, state, check)
    _publish(publish, plan, state)


def _publish(publish: Callable[[], None], plan: Plan, state: TrainingState) -> None:
    _check_weights(plan, state)
    here = ranks.current()
    if here.first:
        publish()
    here.max_over_ranks(0)  # no rank exits before the state is saved: srun may kill the others at the first failure


def _check_weights(plan: Plan, state: TrainingState) -> None:
    """Raise Diverged if a weight is not finite: an update can overflow although its gradient is finite."""
    if bad := state.not_finite():
        raise Diverged(
            f"weights are not finite after step {state.step} of epoch {state.epoch}: {bad}",
            needed_by=plan.phase,
            fix="lower optimizer.lr (or finetune.lr) or raise schedule.warmup_epochs",
        )


def _fault_of(check_data: Callable[[], None]) -> InputError | None:
    """Return the error of a check; None also if the data set cannot be looked at now, perhaps for a moment."""
    try:
        check_data()
    except UnreadableError:
        return None
    except InputError as fault:
        return fault
    return None


def _interrupted(plan: Plan, state: TrainingState) -> Interrupted:
    return signals.interrupted(_saved(plan, state))


def _saved(plan: Plan, state: TrainingState) -> str:
    return f"{plan.phase} is saved at epoch {state.epoch}, step {state.step}"
