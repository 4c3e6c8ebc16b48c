"""Which classes are confused with each other, and in which direction."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def confused_pairs(matrix: NDArray[Any], class_counts: NDArray[Any]) -> pd.DataFrame:
    """One row for each unordered pair of classes with any confusion, most confused first.

    Of two classes with equally many training images the one with the larger id counts as the rarer.

    Args:
        matrix: test images of true class (row) predicted as (column) [C, C], diagonal ignored.
        class_counts: training images a class [C].

    Returns:
        rarer_class, commoner_class int32; rarer_as_commoner, commoner_as_rarer and their sum count int64;
        minority_share float64 = rarer_as_commoner / count. Ties are ordered by class ids.

    Paper: Sec. 3, Fig. 1 (minorities are taken for their similar majorities).
    """
    # Rank 0 is the commonest class; a stable sort keeps smaller ids first.
    rank = np.empty(len(class_counts), dtype=np.int64)
    rank[np.argsort(-class_counts, kind="stable")] = np.arange(len(class_counts))
    rarer, commoner = np.nonzero(rank[:, None] > rank[None, :])
    table = pd.DataFrame(
        {
            "rarer_class": rarer.astype(np.int32),
            "commoner_class": commoner.astype(np.int32),
            "rarer_as_commoner": matrix[rarer, commoner].astype(np.int64),
            "commoner_as_rarer": matrix[commoner, rarer].astype(np.int64),
        }
    )
    table["count"] = table["rarer_as_commoner"] + table["commoner_as_rarer"]
    table = table[table["count"] > 0]
    table["minority_share"] = table["rarer_as_commoner"] / table["count"]
    order = ["count", "rarer_class", "commoner_class"]
    return table.sort_values(order, ascending=[False, True, True], ignore_index=True)
