"""Learning rate as a pure function of the step, so that resuming and changing stage cannot shift it."""

import math

from cpmix_cli.recipe.schema import Schedule


def learning_rate(lr: float, schedule: Schedule, epoch: int, step: int, steps: int) -> float:
    """Learning rate of one optimizer step, from the base rate `lr`; epochs count from 1 over both stages, steps from 0.

    Warm-up and multistep are constant within an epoch, cosine falls with every step. Warm-up multiplies what the
    schedule says.

    Paper: Table 6, B.3.1; warm-up lr x e / 10 (e from 1), drops from the epoch after the milestone.
    """
    warm = min(1.0, epoch / schedule.warmup_epochs) if schedule.warmup_epochs > 0 else 1.0
    if schedule.kind == "multistep":
        factors = schedule.decay if isinstance(schedule.decay, list) else [schedule.decay] * len(schedule.milestones)
        passed = [factor for milestone, factor in zip(schedule.milestones, factors, strict=True) if epoch > milestone]
        return lr * warm * math.prod(passed)
    if schedule.kind == "cosine":
        done = ((epoch - 1) * steps + step) / (schedule.epochs * steps)
        return lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    return lr * warm
