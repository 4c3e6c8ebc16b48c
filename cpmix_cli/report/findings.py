"""Findings in words: what a network takes for what, of which every sentence leads to a cell of the matrix.

C classes; matrices have true classes in rows and predicted classes in columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.evaluation.intervals import wilson
from cpmix_cli.runtime.errors import counted

Array = NDArray[Any]


@dataclass(frozen=True)
class Finding:
    """One sentence, and the cell that shows it."""

    text: str
    true_class: int
    predicted_class: int


def find(matrix: Array, class_counts: Array, names: Sequence[str], *, limit: int = 3) -> list[Finding]:
    """Return the most telling confusions, each of another cell; fewer than `limit` if fewer cells have errors.

    First the most confused cell, then the class that is missed most, then the class that is wrongly predicted most,
    then the next most confused cells. Cells are ranked by the lower end of Wilson's interval of their share of the
    class's test images, so that 36 of 100 images come before 1 of 1.

    Args:
        matrix: test images [C, C].
        class_counts: training images [C].
        names: class names [C].
        limit: largest number of findings.
    """
    tested = matrix.sum(1)
    true, predicted = np.nonzero(matrix * ~np.eye(len(matrix), dtype=bool))
    if not len(true):
        return []
    certain = wilson(matrix[true, predicted], tested[true])[0]
    cells = [(int(true[i]), int(predicted[i])) for i in np.argsort(-certain, kind="stable")[: limit + 2]]

    def sentences() -> Iterator[Finding]:
        yield _confusion(matrix, class_counts, names, *cells[0])
        wrong = tested - matrix.diagonal()
        yield _missed(matrix, names, int(np.nanargmax(wilson(wrong, tested)[0])))
        yield _overused(matrix, names, int(np.argmax(matrix.sum(0) - matrix.diagonal())))
        for cell in cells[1:]:
            yield _confusion(matrix, class_counts, names, *cell)

    found: dict[tuple[int, int], Finding] = {}
    for finding in sentences():
        found.setdefault((finding.true_class, finding.predicted_class), finding)
    return list(found.values())[:limit]


def _confusion(matrix: Array, class_counts: Array, names: Sequence[str], true: int, predicted: int) -> Finding:
    of = _of(matrix[true, predicted], matrix[true].sum())
    counts = f"{counted(class_counts[true], 'training image')} against {class_counts[predicted]:,}"
    return Finding(f"{names[true]} is taken for {names[predicted]} in {of}; {counts}", true, predicted)


def _missed(matrix: Array, names: Sequence[str], true: int) -> Finding:
    others = matrix[true].copy()
    others[true] = 0
    predicted, right = int(others.argmax()), int(matrix[true, true])
    most = f"it is taken for {names[predicted]} in {others[predicted]:,}"
    return Finding(f"{names[true]} is recognised in {_of(right, matrix[true].sum())}; {most}", true, predicted)


def _overused(matrix: Array, names: Sequence[str], predicted: int) -> Finding:
    others = matrix[:, predicted].copy()
    others[predicted] = 0
    true, wrong = int(others.argmax()), int(others.sum())
    said = f"Of {matrix[:, predicted].sum():,} images predicted as {names[predicted]}, {wrong:,} are of other classes"
    return Finding(f"{said}; {others[true]:,} of {names[true]}", true, predicted)


def _of(images: int, all_images: int) -> str:
    return f"{images:,} of {counted(all_images, 'image')}"
