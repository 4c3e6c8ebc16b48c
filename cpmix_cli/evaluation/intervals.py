"""95 % confidence intervals of a proportion and of a mean of class accuracies, and a paired test of two networks.

Shapes: C classes. All values are fractions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpmix_cli.runtime.errors import counted, shortened
from cpmix_cli.runtime.rounding import percent

_Z = 1.959963984540054  # 97.5 % of a normal distribution are below
LEAST_IMAGES = 10
"""Of fewer images, a proportion of one half is uncertain by more than 26 points."""


def wilson(correct: ArrayLike, tested: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return Wilson's score interval of correct / tested: lower and upper ends, NaN where nothing is tested.

    Args:
        correct: numbers of images predicted right, of any shape.
        tested: numbers of images, which may be effective ones, so no whole numbers.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    k, n = np.asarray(correct, np.float64), np.asarray(tested, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = k / n
        middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def effective_images(correct: ArrayLike, tested: ArrayLike, weights: ArrayLike) -> float:
    """Return the images n with which a plain proportion p has the variance of a weighted mean p of class accuracies.

    n = p (1 - p) / sum_c w_c^2 p_c (1 - p_c) / n_c, where an accuracy p_c is shrunk to the mean as by 4 more images: a
    class with one test image is 0 or 1, and would seem to have no variance. If all p_c are equal, this is
    1 / sum_c w_c^2 / n_c.

    Args:
        correct: images predicted right per class [C].
        tested: test images n_c per class [C], each at least 1.
        weights: w_c [C]; they are divided by their sum.
    """
    k, n = np.asarray(correct, np.float64), np.asarray(tested, np.float64)
    w = np.asarray(weights, np.float64) / np.sum(weights)
    mean = float(w @ (k / n))
    shrunk = (k + _Z**2 * mean) / (n + _Z**2)
    variance = float(np.sum(w**2 * shrunk * (1 - shrunk) / n))
    spread = mean * (1 - mean)  # 0, but for rounding, if all classes are right or all are wrong
    return spread / variance if spread > 1e-12 and variance > 0 else float(1 / np.sum(w**2 / n))


def of_mean(correct: ArrayLike, tested: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, float]:
    """Return the interval of a weighted mean of class accuracies: Wilson's with the effective number of images.

    Args:
        correct: images predicted right per class [C].
        tested: test images per class [C], each at least 1.
        weights: weight per class [C]; None: all equal.

    Source: the modified Wilson interval of survey statistics, whose strata are the classes. A plain sum of Wilson
    intervals, or their squares, fails for classes with one test image: tests/evaluation/test_intervals.py simulates it.
    """
    k, n = np.asarray(correct, np.float64), np.asarray(tested, np.float64)
    w = np.ones_like(n) if weights is None else np.asarray(weights, np.float64)
    size = effective_images(k, n, w)
    low, high = wilson(size * float(w @ (k / n)) / w.sum(), size)
    return float(low), float(high)


def differ(gained: ArrayLike, lost: ArrayLike, tested: ArrayLike) -> bool:
    """Return whether the balanced accuracies of two networks on the same images differ by more than chance explains.

    This is McNemar's test at 5 %, in which each class counts equally. By chance, each network would be the one that is
    right in half of the images on which only one is; their share of a class is shrunk as in effective_images().

    Args:
        gained: images per class that only the second network gets right [C].
        lost: images per class that only the first network gets right [C].
        tested: test images n_c per class [C]; classes without are left out.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions (1947).
    """
    b, c, n = (np.asarray(values, np.float64)[np.asarray(tested) > 0] for values in (gained, lost, tested))
    shrunk = (b + c + _Z**2 * np.mean((b + c) / n)) / (n + _Z**2)
    return bool(np.sum((b - c) / n) ** 2 > _Z**2 * np.sum(shrunk / n))


def too_few_images(names: Sequence[str], groups: Sequence[str], tested: NDArray[Any]) -> str:
    """Return a sentence about the rare classes (group few) that too few test images measure; "" if there are none.

    Args:
        names: class names [C].
        groups: group of each class [C].
        tested: test images per class [C].
    """
    rare = [c for c in range(len(names)) if groups[c] == "few"]
    scarce = sorted((c for c in rare if tested[c] < LEAST_IMAGES), key=lambda c: int(tested[c]))
    if not scarce:
        return ""
    shown = shortened([f"{names[c]} ({tested[c]})" for c in scarce], 5)
    line = (
        f"{len(scarce)} of {counted(len(rare), 'class', 'classes')} with few training images "
        f"{'has' if len(scarce) == 1 else 'have'} fewer than {LEAST_IMAGES} test images: {shown}"
    )
    known = np.array([tested[c] for c in rare if tested[c]], np.float64)
    if not len(known):
        return line
    margin = 100 * _margin(max(int(tested[scarce[-1]]), 1))
    mean = 100 * _margin(float(len(known) ** 2 / np.sum(1 / known)))
    by = f"{percent(margin)} points or more, and the accuracy of few by {percent(mean)}"
    return f"{line}; a recall of 50 % is uncertain there by {by}"


def _margin(tested: float) -> float:
    """Return half the length of the interval of an accuracy of 50 %."""
    low, high = wilson(tested / 2, tested)
    return float(high - low) / 2
