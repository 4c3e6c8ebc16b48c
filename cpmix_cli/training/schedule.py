"""The learning rate as a pure function of the step: a resumed run or a change of stage cannot shift it."""

import math

from cpmix_cli.recipe.schema import Schedule


def learning_rate(lr: float, schedule: Schedule, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of one optimizer step.

    Warm-up in epochs and multistep are constant within an epoch; warm-up in steps, cosine and linear change at each
    step. The warm-up factor multiplies the schedule's value. linear has its own: step k (from 1) has the value at k of
    a line from (0, 0) up to 1 at the end of the warm-up, and of one down to `end` at the last step.

    Args:
        lr: base learning rate.
        schedule: kind, length in epochs, milestones and warm-up.
        epoch: from 1, counted over both stages.
        step: step of the epoch, from 0.
        steps: steps per epoch.

    Paper: Table 6, B.3.1; warm-up lr x e / 10 (e from 1), decay from the epoch after the milestone. Source of linear:
    Page, How to train your ResNet (cifar10-fast).
    """
    if schedule.kind == "linear":
        peak, done = schedule.warmup_steps / steps or schedule.warmup_epochs, epoch - 1 + (step + 1) / steps
        if done <= peak:
            return lr * (done / peak)
        left = (schedule.epochs - done) / (schedule.epochs - peak)
        return lr * (schedule.end + (1 - schedule.end) * left)
    warm = min(1.0, epoch / schedule.warmup_epochs) if schedule.warmup_epochs > 0 else 1.0
    if schedule.warmup_steps:
        warm = min(1.0, ((epoch - 1) * steps + step + 1) / schedule.warmup_steps)
    if schedule.kind == "multistep":
        factors = schedule.decay if isinstance(schedule.decay, list) else [schedule.decay] * len(schedule.milestones)
        passed = [factor for milestone, factor in zip(schedule.milestones, factors, strict=True) if epoch > milestone]
        return lr * warm * math.prod(passed)
    if schedule.kind == "cosine":
        done = ((epoch - 1) * steps + step) / (schedule.epochs * steps)
        return lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    return lr * warm
