"""Class counts, subsets and groups against the published CIFAR-LT."""

import itertools

import numpy as np
import pytest

from cpmix_cli.commands.build_lt import _choose
from cpmix_cli.data import longtail
from cpmix_cli.data.dataset import DatasetRequest
from cpmix_cli.data.sources import SOURCES

CIFAR10 = np.tile(np.arange(10), 5000)
CIFAR100 = np.tile(np.arange(100), 500)


@pytest.mark.parametrize(
    ("num_max", "num_classes", "totals"),
    [
        (5000, 10, {10: 20431, 50: 13996, 100: 12406, 200: 11203}),
        (500, 100, {10: 19573, 50: 12608, 100: 10847, 200: 9502}),
    ],
)
def test_exponential_profile_gives_the_published_totals(num_max: int, num_classes: int, totals: dict[int, int]) -> None:
    found = {rho: int(longtail.exponential_counts(num_max, num_classes, rho).sum()) for rho in totals}
    assert found == totals


def test_exponential_profile_gives_the_published_class_counts() -> None:
    of_10 = {100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]}
    of_10[200] = [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25]
    assert {rho: longtail.exponential_counts(5000, 10, rho).tolist() for rho in of_10} == of_10
    assert longtail.exponential_counts(500, 100, 200)[-5:].tolist() == [3, 2, 2, 2, 2]
    assert longtail.exponential_counts(500, 100, 100)[-5:].tolist() == [6, 5, 5, 5, 5]
    assert longtail.exponential_counts(500, 100, 1).tolist() == [500] * 100


def test_step_profile_gives_the_toy_counts_of_the_paper() -> None:
    assert longtail.step_counts(1000, 4, 20).tolist() == [1000, 1000, 50, 50]


OF_CIFAR10 = {0: [398, 3833, 4836, 4572, 636, 2545], 1: [597, 332, 521, 3935, 4800, 1102]}
OF_CIFAR10[9] = [2204, 3816, 2206, 2507, 1926, 4765]
OF_CIFAR100 = {0: [90, 254, 283, 445, 461, 15], 1: [277, 307, 436, 88, 261, 57], 99: [348, 153, 363, 361, 299, 353]}


@pytest.mark.parametrize(("labels", "known"), [(CIFAR10, OF_CIFAR10), (CIFAR100, OF_CIFAR100)])
def test_seed_0_takes_the_published_images(labels: np.ndarray, known: dict[int, list[int]]) -> None:
    order = longtail.shuffled_by_class(labels, int(labels.max()) + 1, 0)
    for c, ranks in known.items():
        in_file_order = np.flatnonzero(labels == c)
        assert in_file_order[ranks].tolist() == order[c][:6].tolist()


DIGITS = DatasetRequest(
    source="digits",
    rho=20,
    profile="exponential",
    subset_seed=0,
    val_per_class=0,
    test_per_class=50,
    image_size=None,
    listing=None,
)


def test_subsets_are_nested_over_rho_and_never_overlap_with_val() -> None:
    source = SOURCES["digits"](None, None)
    parts = [_choose(source, DIGITS.model_copy(update={"rho": rho, "val_per_class": 5})) for rho in (100, 20, 5, 1)]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller["train"]) < set(larger["train"])
        assert smaller["test"].tolist() == larger["test"].tolist()
    last = parts[-1]
    chosen = np.concatenate([last["train"], last["val"], last["test"]])
    assert len(set(chosen)) == len(chosen)
    assert np.bincount(source.pool.labels[last["val"]]).tolist() == [5] * 10
    assert np.bincount(source.pool.labels[last["test"]]).tolist() == [50] * 10


def test_capped_val_keeps_the_standard_training_set_except_where_val_needs_the_images() -> None:
    source = SOURCES["digits"](None, None)  # the classes have 124 to 133 images beside the 50 test images
    standard, capped, shrunk = (
        _choose(source, DIGITS.model_copy(update=update))
        for update in ({}, {"val_per_class": 30, "val_capped": True}, {"val_per_class": 30})
    )
    counts = [np.bincount(source.pool.labels[parts["train"]]).tolist() for parts in (standard, capped, shrunk)]
    # The smallest class allows 124 images at the head, and 94 beside val; class 0 has 128 images, so val leaves 98.
    assert counts[0] == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert counts[1] == [98, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert counts[2] == [94, 67, 48, 34, 24, 17, 12, 9, 6, 4]
    assert set(capped["train"]) < set(standard["train"])
    assert np.bincount(source.pool.labels[capped["val"]]).tolist() == [30] * 10
    assert not set(capped["val"]) & set(capped["train"])


def test_another_seed_takes_other_images() -> None:
    assert (
        longtail.shuffled_by_class(CIFAR10, 10, 0)[0].tolist() != longtail.shuffled_by_class(CIFAR10, 10, 1)[0].tolist()
    )


def test_global_random_state_is_neither_read_nor_touched() -> None:
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002
    first = longtail.shuffled_by_class(CIFAR10, 10, 0)[3]
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    np.random.seed(6)  # noqa: NPY002
    assert np.array_equal(first, longtail.shuffled_by_class(CIFAR10, 10, 0)[3])


def test_group_borders_belong_to_medium_or_few() -> None:
    assert [longtail.group_of(n) for n in (101, 100, 20, 19)] == ["many", "medium", "medium", "few"]
    assert longtail.group_of(20, few_inclusive=True) == "few"


@pytest.mark.parametrize(
    ("num_max", "num_classes", "sizes"),
    [
        (5000, 10, {10: (10, 0, 0), 50: (9, 1, 0), 100: (8, 2, 0), 200: (7, 3, 0)}),
        (500, 100, {10: (69, 31, 0), 50: (41, 41, 18), 100: (35, 35, 30), 200: (30, 31, 39)}),
    ],
)
def test_groups_have_published_sizes(num_max: int, num_classes: int, sizes: dict[int, tuple[int, int, int]]) -> None:
    """Classes that are many, medium, few."""
    for rho, expected in sizes.items():
        groups = [longtail.group_of(int(n)) for n in longtail.exponential_counts(num_max, num_classes, rho)]
        assert tuple(groups.count(g) for g in ("many", "medium", "few")) == expected, rho


def test_ranked_counts_are_the_largest_profile_that_fits() -> None:
    # By rank 100, 30, 20: n_max <= 100 / 1, 30 / (1/5), 20 / (1/25) -> 100, and 30 > 100/5, 20 > 100/25 stay unused.
    assert longtail.ranked_counts(np.array([20, 100, 30]), 25).tolist() == [4, 100, 20]
    assert longtail.ranked_counts(np.array([20, 100, 30]), 1).tolist() == [20, 20, 20]
    assert longtail.ranked_counts(np.array([7, 7]), 7).tolist() == [7, 1]  # equal classes: the first is the commonest
    for rho in (1, 3, 40):
        available = np.array([3, 90, 14, 14, 55])
        assert (longtail.ranked_counts(available, rho) <= available).all()


def test_pareto_counts_equal_those_by_hand() -> None:
    """At rho 2^7 the places run from 1 to 2, and n = n_max / x^7."""
    # x = 1, 1.25, 1.5, 1.75, 2; x^7 = 1, 4.768, 17.086, 50.266, 128
    assert longtail.pareto_counts(12_800, 5, 128).tolist() == [12_800, 2_684, 749, 254, 100]
    assert longtail.pareto_counts(7, 4, 1).tolist() == [7, 7, 7, 7]
    assert longtail.pareto_counts(500, 1, 100).tolist() == [500]
    for num_max, num_classes, rho in ((1280, 1000, 256), (500, 10, 100), (500, 10, 10), (4980, 365, 996)):
        counts = longtail.pareto_counts(num_max, num_classes, rho)
        assert (counts[0], counts[-1]) == (num_max, round(num_max / rho))
        assert (np.diff(counts) <= 0).all()
        assert (counts <= longtail.exponential_counts(num_max, num_classes, rho) + 1).all()
    counts = longtail.pareto_counts(1280, 1000, 256)
    assert [counts.sum(), (counts > 100).sum(), (counts < 20).sum()] == [175_036, 362, 329]


def test_pareto_by_rank_takes_what_the_classes_allow() -> None:
    # The smallest allows 3 x 128 at the head, the second largest 400 x 17.086, the largest 1,000.
    assert longtail.ranked_pareto_counts(np.array([400, 3, 1000]), 128).tolist() == [22, 3, 384]
    assert longtail.ranked_pareto_counts(np.array([50, 50, 50]), 128).tolist() == [50, 2, 0]
