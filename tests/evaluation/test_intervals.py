"""Intervals: Wilson's against hand-worked and published values, that of a mean by a simulation of its coverage."""

import numpy as np
import pytest

from cpmix_cli.evaluation.intervals import differ, effective_images, of_mean, too_few_images, wilson

MEANS = {
    "one class": ([0.8], [50]),
    "one image a class": ([0.5] * 100, [1] * 100),
    "30 classes of one image": ([0.3] * 30, [1] * 30),
    "three images in all": ([0.5] * 3, [1] * 3),
    "ten images a class": ([0.9] * 10, [10] * 10),
    "almost all right": ([0.99] * 10, [10] * 10),
    "accuracies from 5 to 95 %": (list(np.linspace(0.05, 0.95, 10)), [10] * 10),
    "a hundred classes": (list(np.linspace(0.1, 0.9, 100)), [100] * 100),
    "rare classes are worse, with one test image": ([0.5] * 5 + [0.95] * 5, [1] * 5 + [100] * 5),
    "rare classes are worse, with two": ([0.4] * 3 + [0.9] * 12, [2] * 3 + [50] * 12),
    "rare classes are better": ([0.95] * 5 + [0.5] * 5, [1] * 5 + [100] * 5),
}


def test_wilson_interval_equals_published_values() -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion (1998), Table I, method 3."""
    low, high = wilson([81, 15, 0, 1], [263, 148, 20, 29])
    assert low.round(4).tolist() == [0.2553, 0.0624, 0.0, 0.0061]
    assert high.round(4).tolist() == [0.3662, 0.1605, 0.1611, 0.1718]
    low, high = wilson([0, 1, 0], [1, 1, 0])
    assert low[:2].round(3).tolist() == [0, 0.207]
    assert high[:2].round(3).tolist() == [0.793, 1]
    assert np.isnan([low[2], high[2]]).all()


def coverage(shares: list[float], tested: list[int], interval: object, weights: list[float] | None = None) -> float:
    """Share of 2,000 random test sets whose interval contains the true mean."""
    generator = np.random.default_rng(1)
    true = np.average(shares, weights=weights)
    ends = [interval(generator.binomial(tested, shares), tested, weights) for _ in range(2000)]  # type: ignore[operator]
    return float(np.mean([low <= true <= high for low, high in ends]))


@pytest.mark.parametrize("case", MEANS)
def test_interval_of_a_mean_covers_it_in_95_of_100_test_sets(case: str) -> None:
    """Within what whole numbers of images allow: Wilson's own interval of 100 images covers 99 % in 92 of 100."""
    assert coverage(*MEANS[case], of_mean) >= 0.915


def test_interval_of_a_mean_is_not_needlessly_long() -> None:
    for case in ("one image a class", "ten images a class", "a hundred classes"):
        assert coverage(*MEANS[case], of_mean) <= 0.965


def test_interval_of_a_long_tailed_test_set_covers_its_accuracy() -> None:
    weights = list(50 * 50.0 ** -np.linspace(0, 1, 10))
    assert 0.935 <= coverage(list(np.linspace(0.9, 0.3, 10)), [50] * 10, of_mean, weights) <= 0.965


def test_adding_up_the_intervals_of_the_classes_would_not_do() -> None:
    """Why of_mean() exists: squares of Wilson's distances (MOVER) miss the mean of single images too often."""

    def summed(correct: np.ndarray, tested: list[int], _: None) -> tuple[float, float]:
        share, (low, high) = correct / np.array(tested), wilson(correct, tested)
        squares = [float(np.sqrt(np.sum((share - end) ** 2))) / len(tested) for end in (low, high)]
        return share.mean() - squares[0], share.mean() + squares[1]

    assert coverage(*MEANS["one image a class"], summed) < 0.8


def test_mean_of_one_class_or_of_equal_classes_has_wilson_s_interval() -> None:
    for correct, tested in ((30, 50), (50, 50), (0, 7)):
        low, high = wilson(correct, tested)
        assert of_mean([correct], [tested]) == pytest.approx((float(low), float(high)))
        assert of_mean([correct] * 4, [tested] * 4) == pytest.approx(tuple(map(float, wilson(4 * correct, 4 * tested))))
    assert effective_images([10, 10], [10, 30], [1, 3]) == pytest.approx(1 / (1 / 16 / 10 + 9 / 16 / 30), rel=0.5)


def test_a_difference_is_judged_as_by_mcnemar_s_test() -> None:
    """15^2 / 45 = 5 is above the 3.84 of the test, 13^2 / 45 = 3.76 is below; the classes have equally many images."""
    assert differ([20, 10], [10, 5], [100, 100]) and differ([10, 5], [20, 10], [100, 100])
    assert not differ([19, 10], [11, 5], [100, 100])
    assert not differ([0, 0], [0, 0], [100, 0])
    # (40 - 10) / 200 - 1 / 2 is negative: one image of a class of 2 outweighs them, and is no evidence.
    assert differ([40, 0], [10, 0], [200, 200]) and not differ([40, 0], [10, 1], [200, 2])
    assert differ([40, 0], [10, 0], [200, 0]) and not differ([40, 0], [26, 0], [200, 0])


@pytest.mark.parametrize(
    "case",
    {
        "no class differs": ([0.1] * 20, [0.1] * 20, [50] * 20),
        "rare classes gain what frequent ones lose": ([0.3] * 10 + [0.02] * 10, [0.02] * 10 + [0.3] * 10, [50] * 20),
        "rare classes have one test image": ([0.2] * 9 + [0.05] * 9, [0.1] * 9 + [0.15] * 9, [1] * 9 + [100] * 9),
    }.items(),
    ids=lambda case: case[0],
)
def test_equal_networks_differ_in_5_of_100_test_sets_at_most(case: tuple[str, tuple[list[float], ...]]) -> None:
    gains, losses, tested = map(np.array, case[1])
    generator = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        gained = generator.binomial(tested, gains)
        found.append(differ(gained, generator.binomial(tested - gained, losses / (1 - gains)), tested))
    assert np.mean(found) <= 0.065


def test_rare_classes_with_few_test_images_are_named() -> None:
    names, groups = ["cat", "lynx", "bobcat"], ["many", "few", "few"]
    assert too_few_images(names, groups, np.array([1, 10, 10])) == ""
    assert too_few_images(names, groups, np.array([100, 10, 1])) == (
        "1 of 2 classes with few training images has fewer than 10 test images: bobcat (1); a recall of 50 % is "
        "uncertain there by 45 points or more, and the accuracy of few by 36"
    )
    assert too_few_images(names, groups, np.array([100, 0, 0])) == (
        "2 of 2 classes with few training images have fewer than 10 test images: lynx (0), bobcat (0)"
    )
