"""The learning rate against the paper's numbers."""

import itertools
import math

import numpy as np
import pytest

from cpmix_cli.recipe.schema import Schedule
from cpmix_cli.training.schedule import learning_rate


def test_learning_rate_warms_up_and_drops_as_in_table_6() -> None:
    schedule = Schedule(epochs=300, warmup_epochs=10, milestones=[260, 280], decay=0.01)
    expected = {1: 0.01, 5: 0.05, 10: 0.1, 11: 0.1, 260: 0.1, 261: 1e-3, 280: 1e-3, 281: 1e-5, 300: 1e-5}
    for epoch, rate in expected.items():
        assert learning_rate(0.1, schedule, epoch, 0, 75) == pytest.approx(rate)
        assert learning_rate(0.1, schedule, epoch, 74, 75) == pytest.approx(rate)


def test_cosine_falls_with_every_step_to_zero() -> None:
    schedule = Schedule(epochs=4, stage1_epochs=4, warmup_epochs=0, kind="cosine")
    rates = [learning_rate(1.0, schedule, e, s, 5) for e in range(1, 5) for s in range(5)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    assert rates[0] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_learning_rate_is_constant_if_no_milestone_is_reached() -> None:
    constant = Schedule(epochs=5, stage1_epochs=5, warmup_epochs=0, kind="constant")
    beyond = Schedule(epochs=5, stage1_epochs=5, warmup_epochs=0, milestones=[9.5])
    assert {learning_rate(0.3, s, e, 0, 2) for s in (constant, beyond) for e in range(1, 6)} == {0.3}


@pytest.mark.parametrize(
    ("epochs", "peak", "end"), [(24, 5, 0.0), (10, 2.3, 0.07), (6, 0, 0.0), (6, 6, 0.0), (1, 0.5, 1.0)]
)
def test_linear_rises_to_its_peak_and_falls_to_its_end_with_every_step(epochs: int, peak: float, end: float) -> None:
    """The first is cifar10-fast's, 0 -> 0.4 at 5 of 24 epochs -> 0; the second has airbench's peak and end."""
    schedule = Schedule(epochs=epochs, stage1_epochs=epochs, warmup_epochs=peak, kind="linear", end=end)
    rates = [learning_rate(0.4, schedule, e, s, 98) for e in range(1, epochs + 1) for s in range(98)]
    places = np.arange(1, 98 * epochs + 1) / 98
    corners, shares = [0, peak, epochs], [0, 1, end]
    if peak in (0, epochs):
        corners, shares = [0, epochs], [1, end] if peak == 0 else [0, 1]
    np.testing.assert_allclose(rates, 0.4 * np.interp(places, corners, shares), rtol=1e-12, atol=1e-15)
    assert rates[-1] == 0.4 * (end if peak < epochs else 1)
    if peak == round(peak) > 0:
        assert rates[98 * int(peak) - 1] == max(rates) == 0.4


def test_a_warm_up_in_steps_rises_with_every_step_over_the_epochs() -> None:
    """7 of 3 x 4 steps: the factor of step k is k / 7, also in the middle of an epoch; linear has its peak there."""
    steps = {"epochs": 3, "stage1_epochs": 3, "warmup_epochs": 0, "warmup_steps": 7}
    factors = [min(1, k / 7) for k in range(1, 13)]
    for kind in ("cosine", "constant"):
        rates = []
        for table in (steps, {**steps, "warmup_steps": 0}):
            schedule = Schedule(**table, kind=kind)
            rates.append([learning_rate(0.3, schedule, e, s, 4) for e in range(1, 4) for s in range(4)])
        np.testing.assert_allclose(rates[0], np.multiply(factors, rates[1]), rtol=1e-12)
    schedule = Schedule(**steps, kind="linear", end=0.5)
    rates = [learning_rate(1.0, schedule, e, s, 4) for e in range(1, 4) for s in range(4)]
    np.testing.assert_allclose(rates, np.interp(range(1, 13), [0, 7, 12], [0, 1, 0.5]), rtol=1e-12)
