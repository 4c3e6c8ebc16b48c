"""Mixing by hand-worked cases and limits."""

import pytest
import torch

from cpmix_cli.mixing import (
    MixingState,
    class_uniform,
    confusion,
    fixed,
    imbalance_aware,
    linear,
    permutation,
    random,
    same_ratio,
)


def state(counts: list[int]) -> MixingState:
    size = len(counts)
    zero = torch.zeros((), dtype=torch.float64)
    return MixingState(torch.tensor(counts), torch.zeros(size, size, dtype=torch.float64), zero, lambda x: x.flatten(1))


def test_equation_9_by_hand() -> None:
    # lambda 0.2 on the first of a pair of 200 and 2 images: 0.5 * 0.2 + 0.5 * 2/202
    lam = torch.tensor([0.2], dtype=torch.float64)
    found = imbalance_aware(lam, torch.tensor([200]), torch.tensor([2]), t=0.5)
    assert found.item() == pytest.approx(0.1 + 0.5 * 2 / 202)
    # the rarer one first: 0.5 * 0.2 + 0.5 * 200/202
    found = imbalance_aware(lam, torch.tensor([2]), torch.tensor([200]), t=0.5)
    assert found.item() == pytest.approx(0.1 + 0.5 * 200 / 202)


def test_equation_9_does_not_depend_on_the_order_of_the_pair(generator: torch.Generator) -> None:
    lam = torch.rand(50, dtype=torch.float64, generator=generator)
    n1 = torch.randint(1, 500, (50,), generator=generator)
    n2 = torch.randint(1, 500, (50,), generator=generator)
    for t in (0.0, 0.3, 0.5, 1.0):
        forward = imbalance_aware(lam, n1, n2, t=t)
        swapped = imbalance_aware(1 - lam, n2, n1, t=t)
        torch.testing.assert_close(forward, 1 - swapped)
        assert ((forward >= 0) & (forward <= 1)).all()


def test_limits_of_equation_9(generator: torch.Generator) -> None:
    lam = torch.rand(20, dtype=torch.float64, generator=generator)
    n1, n2 = torch.full((20,), 300), torch.full((20,), 100)
    assert imbalance_aware(lam, n1, n2, t=1.0).equal(same_ratio(lam, n1, n2))  # vanilla mixup
    assert imbalance_aware(lam, n1, n2, t=0.0).tolist() == [0.25] * 20  # independent of lambda


def test_published_mean_weight_of_the_minority() -> None:
    # reference/methods_mixing.md 3.11: at t = 0.5 and ratio 10, 100, 200 the minority gets .705, .745, .747 on average.
    lam = torch.tensor([0.5], dtype=torch.float64)
    means = [imbalance_aware(lam, torch.tensor([1]), torch.tensor([r]), t=0.5).item() for r in (10, 100, 200)]
    assert means == pytest.approx([0.705, 0.745, 0.747], abs=6e-4)


def test_linear_mix_by_hand_and_at_its_ends() -> None:
    x1, x2 = torch.full((2, 1, 2, 2), 8.0), torch.full((2, 1, 2, 2), 4.0)
    mixed, lam = linear(x1, x2, torch.tensor([0.25, 1.0], dtype=torch.float64), torch.zeros(2, 2))
    assert mixed[0].unique().tolist() == [5.0]
    assert mixed[1].equal(x1[1])
    assert lam.tolist() == [0.25, 1.0]
    assert linear(x1, x2, torch.tensor([0.0]), torch.zeros(1, 2))[0].equal(x2)


def test_permutation_is_a_permutation(generator: torch.Generator) -> None:
    uniforms = torch.rand(30, dtype=torch.float64, generator=generator)
    found = permutation(uniforms, torch.zeros(30), state([1]))
    assert sorted(found.tolist()) == list(range(30))
    assert found.tolist() != list(range(30))


def test_partner_classes_of_the_controls(generator: torch.Generator) -> None:
    draws = 30_000
    uniforms = torch.rand(draws, dtype=torch.float64, generator=generator)
    labels = torch.full((draws,), 1)
    by_class = torch.bincount(class_uniform(uniforms, labels, state([60, 30, 10])), minlength=3)
    assert by_class[1] == 0
    assert by_class[0].item() == pytest.approx(draws / 2, abs=5 * (draws / 4) ** 0.5)
    naturally = torch.bincount(random(uniforms, labels, state([60, 30, 10])), minlength=3) / draws
    assert naturally.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.015)


def test_fixed_pairs_hold_both_ways() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = fixed(torch.zeros(5), labels, state([1] * 5), pairs=[[0, 2], [3, 1]])
    assert found.tolist() == [2, 3, 0, 1, 4]


def test_confusion_partner_counts_its_fallbacks() -> None:
    mixing = state([5, 5, 5])
    mixing.confusion[0, 2] = 4.0
    labels = torch.tensor([0, 0, 1, 2])
    found = confusion(torch.full((4,), 0.5, dtype=torch.float64), labels, mixing)
    assert found.tolist() == [2, 2, 2, 0]  # 1: uniform over {0, 2}; 2: its column, {0}
    assert mixing.num_fallbacks.item() == 2
