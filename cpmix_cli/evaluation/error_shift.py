"""Error shift: errors on the class pairs that training confused most, against all other errors.

C classes; matrices have true classes in rows and predicted classes in columns.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHARE = 0.5
"""Share of a class's training confusions that its most confused classes make up."""


def most_confused_pairs(confusions: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which predicted classes make up half of the confusions of each true class: [C, C] -> [C, C].

    Each row has the smallest number of classes, the most frequent first and the smaller id first in ties. A class
    without confusions has none.
    """
    found: NDArray[np.bool_] = np.zeros(confusions.shape, dtype=bool)
    for row, taken in zip(confusions, found, strict=True):  # one at a time, because the matrices may be large
        order = np.argsort(-row, kind="stable")
        ranked = row[order]
        before = ranked.cumsum() - ranked
        taken[order[(before < _SHARE * ranked.sum()) & (ranked > 0)]] = True
    return found


def split_errors(matrix: NDArray[Any], pairs: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the numbers of wrong test images on some ordered class pairs and on all others.

    Args:
        matrix: test images [C, C].
        pairs: pairs of a true and a predicted class [C, C], as most_confused_pairs() chooses them.
    """
    on_pairs, errors = int(matrix[pairs].sum()), int(matrix.sum() - matrix.trace())
    return on_pairs, errors - on_pairs
