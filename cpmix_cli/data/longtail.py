"""Long-tailed subsets of a balanced source: class counts, which images, class groups.

The construction is the field's standard one (LDAM-DRW's CIFAR-LT), so that subsets equal those of published results
image by image. No global random state is read or touched.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MANY_ABOVE = 100  # many: n > 100 training images; medium: 20 to 100; few: n < 20
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")


def exponential_counts(num_max: int, num_classes: int, rho: float) -> NDArray[np.int64]:
    """n_i = int(num_max * rho^(-i/(C-1))), truncated as every published CIFAR-LT is: images per class [C]; rho >= 1.

    Truncation leaves 2 images and not 2.5 to the smallest class of CIFAR-100 at rho 200, so the real ratio is 250.

    Paper: Sec. B.2.1.
    """
    if num_classes == 1:
        return np.array([num_max], dtype=np.int64)
    exponents = np.arange(num_classes, dtype=np.float64) / (num_classes - 1)
    return (num_max * (1.0 / rho) ** exponents).astype(np.int64)


def step_counts(num_max: int, num_classes: int, rho: float) -> NDArray[np.int64]:
    """num_max for the first half of the classes, int(num_max / rho) for the others: images per class [C].

    Paper: Sec. B.1 (two majorities of 1,000 points, two minorities of 50, at rho 20).
    """
    counts = np.full(num_classes, num_max, dtype=np.int64)
    counts[(num_classes + 1) // 2 :] = int(num_max / rho)
    return counts


def ranked_counts(available: NDArray[np.int64], rho: float) -> NDArray[np.int64]:
    """The exponential profile by rank, as large as the `available` images per class [C] allow: images per class [C].

    For sets that are imbalanced by nature, whose largest class may be any: n_max is the largest number with
    n_max * rho^(-i/(C-1)) <= images of the class of rank i.
    """
    shares = rho ** (-np.arange(len(available)) / max(1, len(available) - 1))
    return _by_rank(available, rho, shares, exponential_counts)


def _by_rank(
    available: NDArray[np.int64],
    rho: float,
    shares: NDArray[np.float64],
    profile: Callable[[int, int, float], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Return profile(num_max, C, rho) by rank, num_max the largest that shares [C] of it do not exceed `available`."""
    order = np.argsort(-available, kind="stable")
    counts = np.empty_like(available)
    counts[order] = profile(int((available[order] / shares).min() + 1e-9), len(available), rho)
    return counts


_PARETO_POWER = 6.0  # alpha of ImageNet-LT


def pareto_counts(num_max: int, num_classes: int, rho: float) -> NDArray[np.int64]:
    """n_i = int(num_max * x_i^-(alpha + 1)), alpha = 6, at places x_i evenly spaced from 1 to rho^(1 / (alpha + 1)).

    That is the density of a Pareto distribution, cut off where it has fallen to 1 / rho: between the same ends it drops
    faster at the head and slower at the tail than the exponential profile.

    Differs: Liu et al. (2019, "Large-Scale Long-Tailed Recognition in an Open World") made ImageNet-LT by "the Pareto
    distribution with the power value alpha = 6"; the code that drew it was not released, and their list is not this
    curve: between its ends (1,000 classes, 1,280 to 5) the curve has 175,036 images and 362/309/329 many, medium and
    few classes, the list 115,846 and 385/479/136.
    """
    return (num_max * _pareto_shares(num_classes, rho) + 1e-9).astype(np.int64)


def _pareto_shares(num_classes: int, rho: float) -> NDArray[np.float64]:
    places = np.linspace(1.0, rho ** (1 / (_PARETO_POWER + 1)), num_classes)
    return places ** -(_PARETO_POWER + 1)


def ranked_pareto_counts(available: NDArray[np.int64], rho: float) -> NDArray[np.int64]:
    """The Pareto profile by rank, as large as the images of every class allow; see ranked_counts()."""
    return _by_rank(available, rho, _pareto_shares(len(available), rho), pareto_counts)


PROFILES: dict[str, Callable[[NDArray[np.int64], float], NDArray[np.int64]]] = {
    "exponential": lambda available, rho: exponential_counts(int(available.min()), len(available), rho),
    "step": lambda available, rho: step_counts(int(available.min()), len(available), rho),
    "ranked": ranked_counts,
    "pareto": ranked_pareto_counts,
}
"""Name -> function: images per class [C] of the source, rho -> images per class [C] to keep."""


def shuffled_by_class(labels: NDArray[np.int64], num_classes: int, seed: int) -> list[NDArray[np.int64]]:
    """Return C arrays of positions into labels [N], one per class, shuffled; a subset takes a prefix of each.

    One RandomState is consumed class by class in ascending order, once per class, so the order does not depend on how
    many images are kept and subsets are nested over rho. Seed 0 is that of the published subsets.

    Source: LDAM-DRW imbalance_cifar.py.
    """
    # The legacy generator made the published subsets; NumPy's policy is never to change its stream.
    state = np.random.RandomState(seed)
    ends = np.bincount(labels, minlength=num_classes).cumsum()
    order = np.split(labels.argsort(kind="stable"), ends[:-1])
    for positions in order:
        state.shuffle(positions)
    return order


def group_of(num_train: int, *, few_inclusive: bool = False) -> str:
    """many (n > 100), medium (20..100) or few (n < 20; n <= 20 with few_inclusive). Paper: Sec. 5.1."""
    if num_train > MANY_ABOVE:
        return "many"
    if num_train < FEW_BELOW or (few_inclusive and num_train == FEW_BELOW):
        return "few"
    return "medium"
