"""Long-tailed subsets of a balanced source: class counts, the choice of images, class groups.

Subsets are built as LDAM-DRW builds CIFAR-LT, so that they contain the same images as in published results. No global
random state is read or changed.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MANY_ABOVE = 100  # many: n > 100 training images; medium: 20 to 100; few: n < 20
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")


def exponential_counts(num_max: int, num_classes: int, rho: float) -> NDArray[np.int64]:
    """Return images per class [C] of the exponential profile: n_i = int(num_max * rho^(-i/(C-1))), i from 0.

    Counts are truncated, as in every published CIFAR-LT. The smallest class of CIFAR-100 at rho 200 thus has 2 images
    instead of 2.5, and the real ratio is 250.

    Paper: Sec. B.2.1.

    Args:
        num_max: images of the largest class.
        num_classes: C.
        rho: imbalance factor, >= 1.
    """
    if num_classes == 1:
        return np.array([num_max], dtype=np.int64)
    exponents = np.arange(num_classes, dtype=np.float64) / (num_classes - 1)
    counts: NDArray[np.float64] = num_max * (1.0 / rho) ** exponents
    # 49 * (1 / 49) is 0.999...: a class that has one image but for rounding keeps it. No published subset has one.
    counts[counts > 1 - 1e-9] = np.maximum(counts[counts > 1 - 1e-9], 1)
    return counts.astype(np.int64)


def step_counts(num_max: int, num_classes: int, rho: float) -> NDArray[np.int64]:
    """Return images per class [C] of the step profile: num_max for the first half, int(num_max / rho) for the others.

    Paper: Sec. B.1 (two majorities of 1,000 points, two minorities of 50, at rho 20).

    Args:
        num_max: images of each large class.
        num_classes: C. If it is odd, the larger half has large classes.
        rho: imbalance factor, >= 1.
    """
    counts = np.full(num_classes, num_max, dtype=np.int64)
    counts[(num_classes + 1) // 2 :] = int(num_max / rho)
    return counts


def ranked_counts(available: NDArray[np.int64], rho: float) -> NDArray[np.int64]:
    """Return the largest exponential profile that fits a naturally imbalanced set: available [C] -> kept [C].

    Classes are ranked by their `available` images, since any class may be the largest. n_max is the largest number for
    which n_max * rho^(-i/(C-1)) does not exceed the images of the class of rank i.
    """
    shares = rho ** (-np.arange(len(available)) / max(1, len(available) - 1))
    return _by_rank(available, rho, shares, exponential_counts)


def _by_rank(
    available: NDArray[np.int64],
    rho: float,
    shares: NDArray[np.float64],
    profile: Callable[[int, int, float], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Return profile(num_max, C, rho) by rank, with the largest num_max for which num_max * shares <= available."""
    order = np.argsort(-available, kind="stable")
    counts = np.empty_like(available)
    counts[order] = profile(int((available[order] / shares).min() + 1e-9), len(available), rho)
    return counts


_PARETO_POWER = 6.0  # alpha of ImageNet-LT


def pareto_counts(num_max: int, num_classes: int, rho: float) -> NDArray[np.int64]:
    """Return images per class [C] of the Pareto profile: n_i = int(num_max * x_i^-(alpha + 1)), alpha = 6.

    The x_i are evenly spaced from 1 to rho^(1 / (alpha + 1)). The curve is the density of a Pareto distribution, cut
    off where it has fallen to 1 / rho. It falls faster at the head and slower at the tail than the exponential profile.

    Differs: Liu et al. (2019, "Large-Scale Long-Tailed Recognition in an Open World") made ImageNet-LT by "the Pareto
    distribution with the power value alpha = 6". Their code is not released, and their list is not this curve. For
    1,000 classes from 1,280 to 5 images, the curve has 175,036 images and 362/309/329 many, medium and few classes. The
    list has 115,846 images and 385/479/136 classes.

    Args:
        num_max: images of the largest class.
        num_classes: C.
        rho: imbalance factor, >= 1.
    """
    return (num_max * _pareto_shares(num_classes, rho) + 1e-9).astype(np.int64)


def _pareto_shares(num_classes: int, rho: float) -> NDArray[np.float64]:
    places = np.linspace(1.0, rho ** (1 / (_PARETO_POWER + 1)), num_classes)
    return places ** -(_PARETO_POWER + 1)


def ranked_pareto_counts(available: NDArray[np.int64], rho: float) -> NDArray[np.int64]:
    """Return the largest Pareto profile that fits a naturally imbalanced set: available [C] -> kept [C].

    Classes are ranked as in ranked_counts().
    """
    return _by_rank(available, rho, _pareto_shares(len(available), rho), pareto_counts)


PROFILES: dict[str, Callable[[NDArray[np.int64], float], NDArray[np.int64]]] = {
    "exponential": lambda available, rho: exponential_counts(int(available.min()), len(available), rho),
    "step": lambda available, rho: step_counts(int(available.min()), len(available), rho),
    "ranked": ranked_counts,
    "pareto": ranked_pareto_counts,
}
"""Profile name -> function (images per class [C] of the source, rho) -> images per class [C] to keep."""


def shuffled_by_class(labels: NDArray[np.int64], num_classes: int, seed: int) -> list[NDArray[np.int64]]:
    """Return C shuffled arrays of positions, one per class. A subset is the start of each array.

    One RandomState shuffles the classes in ascending order, whatever the number of images to keep. A subset of larger
    rho is therefore part of a subset of smaller rho.

    Source: LDAM-DRW imbalance_cifar.py.

    Args:
        labels: class of each image [N].
        num_classes: C.
        seed: seed of the RandomState; 0 gives the published subsets.
    """
    # The legacy generator made the published subsets. NumPy guarantees that its stream never changes.
    state = np.random.RandomState(seed)
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    order = np.split(labels.argsort(kind="stable"), ends[:-1])
    for positions in order:
        state.shuffle(positions)
    return order


def group_of(num_train: int, *, few_inclusive: bool = False) -> str:
    """Return the group of a class with n training images: many (n > 100), medium (20 to 100) or few (n < 20).

    With `few_inclusive`, a class of exactly 20 images is few. Paper: Sec. 5.1.
    """
    if num_train > MANY_ABOVE:
        return "many"
    if num_train < FEW_BELOW or (few_inclusive and num_train == FEW_BELOW):
        return "few"
    return "medium"
