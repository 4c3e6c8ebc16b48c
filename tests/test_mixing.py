"""Mixing by hand-worked cases and limits."""

import numpy as np
import pytest
import torch

from cpmix_cli import mixing
from cpmix_cli.data.longtail import exponential_counts


def state(counts: list[int]) -> mixing.MixingState:
    size = len(counts)
    zero = torch.zeros((), dtype=torch.float64)
    known = torch.zeros(size, size, dtype=torch.float64)
    return mixing.MixingState(torch.tensor(counts), known, zero, torch.full((size,), 100.0, dtype=torch.float64))


def test_equation_9_equals_the_values_by_hand() -> None:
    # lambda 0.2 on the first of a pair of 200 and 2 images: 0.5 * 0.2 + 0.5 * 2/202
    lam = torch.tensor([0.2], dtype=torch.float64)
    found = mixing.imbalance_aware(lam, torch.tensor([200]), torch.tensor([2]), t=0.5)
    assert found.item() == pytest.approx(0.1 + 0.5 * 2 / 202)
    # the rarer one first: 0.5 * 0.2 + 0.5 * 200/202
    found = mixing.imbalance_aware(lam, torch.tensor([2]), torch.tensor([200]), t=0.5)
    assert found.item() == pytest.approx(0.1 + 0.5 * 200 / 202)


def test_equation_9_does_not_depend_on_the_order_of_the_pair(generator: torch.Generator) -> None:
    lam = torch.rand(50, dtype=torch.float64, generator=generator)
    n1 = torch.randint(1, 500, (50,), generator=generator)
    n2 = torch.randint(1, 500, (50,), generator=generator)
    for t in (0.0, 0.3, 0.5, 1.0):
        forward = mixing.imbalance_aware(lam, n1, n2, t=t)
        swapped = mixing.imbalance_aware(1 - lam, n2, n1, t=t)
        torch.testing.assert_close(forward, 1 - swapped)
        assert ((forward >= 0) & (forward <= 1)).all()


def test_equation_9_is_mixup_at_t_1_and_ignores_lambda_at_0(generator: torch.Generator) -> None:
    lam = torch.rand(20, dtype=torch.float64, generator=generator)
    n1, n2 = torch.full((20,), 300), torch.full((20,), 100)
    assert mixing.imbalance_aware(lam, n1, n2, t=1.0).equal(mixing.same_ratio(lam, n1, n2))  # vanilla mixup
    assert mixing.imbalance_aware(lam, n1, n2, t=0.0).tolist() == [0.25] * 20  # independent of lambda


def test_minority_gets_the_published_mean_weight() -> None:
    # Eq. (9), averaged over lambda: at t = 0.5 and ratio 10, 100, 200 the minority gets .705, .745, .747 on average.
    lam = torch.tensor([0.5], dtype=torch.float64)
    means = [mixing.imbalance_aware(lam, torch.tensor([1]), torch.tensor([r]), t=0.5).item() for r in (10, 100, 200)]
    assert means == pytest.approx([0.705, 0.745, 0.747], abs=6e-4)


def test_linear_mix_equals_the_values_by_hand_and_at_its_ends() -> None:
    x1, x2 = torch.full((2, 1, 2, 2), 8.0), torch.full((2, 1, 2, 2), 4.0)
    mixed, lam = mixing.linear(x1, x2, torch.tensor([0.25, 1.0], dtype=torch.float64), torch.zeros(2, 2))
    assert mixed[0].unique().tolist() == [5.0]
    assert mixed[1].equal(x1[1])
    assert lam.tolist() == [0.25, 1.0]
    assert mixing.linear(x1, x2, torch.tensor([0.0]), torch.zeros(1, 2))[0].equal(x2)


def test_permutation_returns_each_index_once_in_another_order(generator: torch.Generator) -> None:
    uniforms = torch.rand(30, dtype=torch.float64, generator=generator)
    found = mixing.permutation(uniforms, torch.zeros(30), state([1]))
    assert sorted(found.tolist()) == list(range(30))
    assert found.tolist() != list(range(30))


def test_control_partners_have_their_class_frequencies(generator: torch.Generator) -> None:
    draws = 30_000
    uniforms = torch.rand(draws, dtype=torch.float64, generator=generator)
    labels = torch.full((draws,), 1)
    by_class = torch.bincount(mixing.class_uniform(uniforms, labels, state([60, 30, 10])), minlength=3)
    assert by_class[1] == 0
    assert by_class[0].item() == pytest.approx(draws / 2, abs=5 * (draws / 4) ** 0.5)
    naturally = torch.bincount(mixing.random(uniforms, labels, state([60, 30, 10])), minlength=3) / draws
    assert naturally.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.015)


def test_fixed_pairs_work_in_both_directions() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    found = mixing.fixed(torch.zeros(5), labels, state([1] * 5), pairs=[[0, 2], [3, 1]])
    assert found.tolist() == [2, 3, 0, 1, 4]


def test_confusion_partner_counts_its_fallbacks() -> None:
    known = state([5, 5, 5])
    known.confusion[0, 2] = 4.0
    labels = torch.tensor([0, 0, 1, 2])
    found = mixing.confusion(torch.full((4,), 0.5, dtype=torch.float64), labels, known)
    assert found.tolist() == [2, 2, 2, 0]  # 1: uniform over {0, 2}; 2: its column, {0}
    assert known.num_fallbacks.item() == 2


def test_boxes_are_pasted_as_by_hand_and_lambda_is_corrected() -> None:
    """lambda 0.75 on 8 x 8: sides of 4 round (2, 5); lambda 0.36 at the corner: sides of 6, of which 3 are inside."""
    x1, x2 = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    centre = torch.tensor([[2 / 8, 5 / 8], [0.0, 0.0]], dtype=torch.float64)
    mixed, lam = mixing.box(x1, x2, torch.tensor([0.75, 0.36], dtype=torch.float64), centre)
    expected = torch.zeros(2, 8, 8)
    expected[0, 0:4, 3:7] = 1
    expected[1, 0:3, 0:3] = 1
    assert mixed[:, 0].equal(expected)
    assert lam.tolist() == [1 - 16 / 64, 1 - 9 / 64]


def test_returned_lambda_equals_the_area_left_by_the_box(generator: torch.Generator) -> None:
    draws = 500
    lam = torch.rand(draws, dtype=torch.float64, generator=generator)
    lam[:2] = torch.tensor([0.0, 1.0])
    centre = torch.rand(draws, 2, dtype=torch.float64, generator=generator)
    mixed, left = mixing.box(torch.zeros(draws, 3, 32, 32), torch.ones(draws, 3, 32, 32), lam, centre)
    assert left.equal(1 - mixed.double().mean((1, 2, 3)))
    assert left[1] == 1
    assert ((left >= 0) & (left <= 1)).all()
    # A box inside the image has the area that was asked for, but for whole and even sides.
    half = 16 * (1 - lam).sqrt()
    inside = ((centre * 32 >= half[:, None]) & (centre * 32 <= 32 - half[:, None])).all(1)
    assert inside.sum() > 50
    assert (left - lam)[inside].min() >= 0
    assert (left - lam)[inside].max() < 2 * 2 / 32


def test_one_box_for_the_batch_cuts_all_images_alike(generator: torch.Generator) -> None:
    x1, x2 = torch.zeros(5, 3, 16, 16), torch.ones(5, 3, 16, 16)
    centre = torch.rand(1, 2, dtype=torch.float64, generator=generator)
    mixed, lam = mixing.box(x1, x2, torch.tensor([0.4], dtype=torch.float64), centre)
    assert lam.shape == (1,)
    assert (mixed == mixed[0]).all()
    assert mixing.box(x1, x2, torch.ones(1, dtype=torch.float64), centre)[0].equal(x1)


def test_channels_overwrite_a_set_of_each_expert_as_by_hand() -> None:
    """Two experts of four channels; 0.7 of 4 are 2, and the smallest numbers choose them."""
    f1, f2 = torch.arange(16.0).view(2, 2, 4), -1 - torch.arange(16.0).view(2, 2, 4)
    uniforms = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.2, 0.0, 0.8, 0.7]], dtype=torch.float64)
    mixed, lam = mixing.channels(f1, f2, torch.zeros(1, dtype=torch.float64), uniforms, p=0.7)
    expected = [[[0, -2, 2, -4], [-5, -6, 6, 7]], [[8, -10, 10, -12], [-13, -14, 14, 15]]]
    assert mixed.tolist() == expected
    assert lam.tolist() == [0.5]


def test_channels_at_their_limits_and_for_each_image(generator: torch.Generator) -> None:
    f1, f2 = torch.randn(2, 30, 3, 64, generator=generator)
    uniforms = torch.rand(1, 192, dtype=torch.float64, generator=generator)
    mixes, not_mixed = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for p, lam, expected, left in (
        (0.0, mixes, f1, 1.0),
        (1.0, mixes, f2, 0.0),
        (0.25, not_mixed, f1, 1.0),  # a batch that stays unmixed
    ):
        mixed, share = mixing.channels(f1, f2, lam, uniforms, p=p)
        assert mixed.equal(expected)
        assert share.tolist() == [left]
    mixed, share = mixing.channels(f1, f2, mixes, uniforms, p=0.26)  # 16.64 channels: 16, not 17
    taken = (mixed == f2).double()
    assert taken.sum(2).unique().tolist() == [16.0]
    assert (taken == taken[0]).all()  # one set for the batch ...
    assert not taken[0, 0].equal(taken[0, 1])  # ... and one per expert
    assert share.tolist() == [0.75]
    each = torch.rand(30, 192, dtype=torch.float64, generator=generator)
    mixed, share = mixing.channels(f1, f2, mixes, each, p=0.25)
    taken = (mixed == f2).double()
    assert taken.sum(2).unique().tolist() == [16.0]
    assert len(taken[:, 0].unique(dim=0)) == 30
    assert share.tolist() == [0.75] * 30
    assert ((taken.mean((0, 1)) - 0.25).abs() < 0.25).all()


def test_channels_of_maps_and_average_pooling_commute(generator: torch.Generator) -> None:
    """As H2T has it, before the pooling; here after it."""
    maps = torch.randn(2, 5, 2, 8, 4, 4, generator=generator)
    mixes = torch.zeros(1, dtype=torch.float64)
    uniforms = torch.rand(1, 16, dtype=torch.float64, generator=generator)
    before, _ = mixing.channels(maps[0], maps[1], mixes, uniforms, p=0.3)
    after, _ = mixing.channels(maps[0].mean((3, 4)), maps[1].mean((3, 4)), mixes, uniforms, p=0.3)
    assert before.mean((3, 4)).equal(after)
    assert not after.equal(maps[0].mean((3, 4)))


def test_the_first_label_is_that_of_the_image_alone() -> None:
    n = torch.tensor([3, 200, 1])
    for lam in (torch.tensor([0.2]), torch.tensor([0.2, 0.0, 1.0])):
        assert mixing.first(lam, n, n.flip(0)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("lam", "n1", "n2", "expected"),
    [
        (0.4, 300, 100, 0.0),  # three times as common and less than half of the picture: the other's alone
        (0.4, 299, 100, 0.4),
        (0.5, 300, 100, 0.5),  # lambda < tau, not <=
        (0.6, 300, 100, 0.6),
        (0.6, 100, 300, 1.0),
        (0.5, 100, 300, 0.5),
        (0.4, 100, 300, 0.4),
        (0.6, 101, 300, 0.6),
        (0.4, 70, 70, 0.4),
        (0.0, 100, 300, 0.0),
        (1.0, 100, 300, 1.0),
        (1.0, 300, 100, 1.0),
    ],
)
def test_remix_gives_one_label_beyond_its_thresholds(lam: float, n1: int, n2: int, expected: float) -> None:
    found = mixing.remix(torch.tensor([lam]), torch.tensor([n1]), torch.tensor([n2]))
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(("sample_tau", "share"), [(0.0, 0.028), (-0.1, 0.037), (-0.5, 0.107), (-1.0, 0.30)])
def test_unimix_partners_have_the_published_share_of_few_classes(sample_tau: float, share: float) -> None:
    """CIFAR-100-LT, rho 100, in a batch of every fifth image: the 30 classes with fewer than 20 images."""
    counts = exponential_counts(500, 100, 100)
    labels = torch.repeat_interleave(torch.arange(100), torch.from_numpy(counts))[::5]
    uniforms = (torch.arange(len(labels), dtype=torch.float64) + 0.5) / len(labels)
    chosen = mixing.unimix(uniforms, labels, state(counts.tolist()), sample_tau=sample_tau)
    assert (labels[chosen] >= 70).double().mean().item() == pytest.approx(share, abs=2e-3)


def test_unimix_draws_by_the_power_of_the_counts(generator: torch.Generator) -> None:
    """A batch of 3 + 1 images of classes with 100 and 10: at tau -1 the one has 10 / 13 of the draws."""
    labels = torch.tensor([0, 0, 0, 1]).repeat(1000)
    uniforms = torch.rand(4000, dtype=torch.float64, generator=generator)
    chosen = mixing.unimix(uniforms, labels, state([100, 10]), sample_tau=-1.0)
    assert labels[chosen].double().mean().item() == pytest.approx(10 / 13, abs=0.03)


@pytest.mark.parametrize(
    ("alpha", "means"), [(0.8, (0.52, 0.53, 0.51)), (0.5, (0.56, 0.60, 0.55)), (1.0, (0.5, 0.5, 0.5))]
)
def test_unimix_gives_the_minority_the_published_mean_weight(alpha: float, means: tuple[float, ...]) -> None:
    drawn = torch.from_numpy(np.random.Generator(np.random.Philox(1)).beta(alpha, alpha, 200_000))
    for ratio, mean in zip((2, 10, 100), means, strict=True):
        lam = mixing.unimix_ratio(drawn, torch.ones(200_000), torch.full((200_000,), ratio))
        assert ((lam >= 0) & (lam < 1)).all()
        assert lam.mean().item() == pytest.approx(mean, abs=6e-3)


@pytest.mark.parametrize(
    ("power", "shares"), [(1.0, (0.6, 0.3, 0.1)), (0.0, (1 / 3,) * 3), (-1.0, (1 / 9, 2 / 9, 2 / 3))]
)
def test_draws_follow_powers_of_class_counts(
    power: float, shares: tuple[float, ...], generator: torch.Generator
) -> None:
    uniforms = torch.rand(30_000, dtype=torch.float64, generator=generator)
    found = mixing.frequency_power(uniforms, torch.zeros(30_000, dtype=torch.int64), state([60, 30, 10]), power=power)
    assert (torch.bincount(found, minlength=3) / 30_000).tolist() == pytest.approx(list(shares), abs=0.015)


def test_few_classes_are_most_partners_at_power_minus_1() -> None:
    """CIFAR-100-LT, rho 100: three in four of UniMix's partners are of the 30 classes with fewer than 20 images."""
    counts = [int(500 * 100 ** (-c / 99)) for c in range(100)]
    share = sum(1 / n for n in counts if n < 20) / sum(1 / n for n in counts)
    assert share == pytest.approx(0.768, abs=5e-4)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    chosen = mixing.frequency_power(uniforms, torch.zeros(10_000, dtype=torch.int64), state(counts), power=-1.0)
    assert (torch.tensor(counts)[chosen] < 20).double().mean().item() == pytest.approx(share, abs=1e-3)


def test_transport_without_features_chooses_the_most_confused(generator: torch.Generator) -> None:
    """Six classes, one image of each on both sides: each is sent to the class it is confused with most."""
    known = state([10] * 6)
    confused = [3, 0, 4, 1, 5, 2]
    for true, predicted in enumerate(confused):
        known.confusion[true, predicted] = 6.0
        known.confusion[true, (predicted + 1) % 6] = 2.0
    known.confusion.fill_diagonal_(0)
    x = torch.randn(6, 3, generator=generator)
    y1, y2 = torch.randperm(6, generator=generator), torch.randperm(6, generator=generator)
    found = mixing.transport(x, y1, x, y2, known, feature_weight=0.0, regularisation=0.01)
    assert y1[found].tolist() == [confused[c] for c in y2.tolist()]


def test_transport_weighs_an_error_by_all_images_of_its_class(generator: torch.Generator) -> None:
    """Class 0 is predicted as class 2 in 90 of 100 images, class 1 in 10 of 100; neither has other errors.

    The image of class 2 costs 0.1 for class 0 and 0.9 for class 1, so class 0 gets it. Shares of the errors alone would
    be equal: cost 0 for both.
    """
    known = state([10] * 3)
    known.confusion[0, 2], known.confusion[1, 2] = 90.0, 10.0
    x = torch.ones(2, 3)
    y1, y2 = torch.tensor([2, 1]), torch.tensor([1, 0])
    assert mixing.transport(x, y1, x, y2, known, feature_weight=0.0, regularisation=0.01).tolist() == [1, 0]


def test_transport_by_features_only_chooses_the_nearest(generator: torch.Generator) -> None:
    x1 = torch.randn(8, 40, generator=generator)
    order = torch.randperm(8, generator=generator)
    labels = torch.zeros(8, dtype=torch.int64)
    assert mixing.transport(x1, labels, x1[order], labels, state([5]), feature_weight=1.0).equal(order)
