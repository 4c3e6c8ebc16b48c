"""What changes from one run to another: balanced accuracy, the classes that gain and lose most, where errors are.

C classes; matrices have true classes in rows and predicted classes in columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.evaluation.error_shift import most_confused_pairs, split_errors
from cpmix_cli.evaluation.intervals import differ
from cpmix_cli.evaluation.per_class import class_columns
from cpmix_cli.report.findings import Finding
from cpmix_cli.runtime.errors import counted
from cpmix_cli.runtime.rounding import percent, signed

Array = NDArray[Any]


def verdict(
    before: Array, after: Array, alone: tuple[Array, Array] | None, groups: Sequence[str], named: tuple[str, str]
) -> list[str]:
    """Return sentences on the difference of the balanced accuracies of two runs, and whether chance explains it.

    Args:
        before: matrix of the first run [C, C].
        after: matrix of the other run [C, C].
        alone: test images per class that only the other run gets right [C], and that only the first gets right [C];
            None if the runs were not tested on the same images.
        groups: many, medium or few [C].
        named: names of both runs, the other first.
    """
    other, first = named
    recalls = [class_columns(matrix)["accuracy"] for matrix in (after, before)]
    tested = [~np.isnan(recall) for recall in recalls]
    both = tested[0] & tested[1]
    if not both.any():
        return ["No class was tested in both runs."]
    shares = [float(recall[both].mean()) for recall in recalls]
    of_both = (
        "" if (tested[0] == tested[1]).all() else f"On the {counted(both.sum(), 'class', 'classes')} that both tested, "
    )
    changes = {name: (recalls[0] - recalls[1])[both & (np.array(groups) == name)] for name in GROUPS}
    listed = ", ".join(f"{name} {signed(float(of.mean()), 1)}" for name, of in changes.items() if len(of))
    by_group = f"By group, in points: {listed}."
    points = percent(abs(shares[0] - shares[1]), 2)
    is_equal = points == "0.00"
    change = "as" if is_equal else f"{points} points {'more' if shares[0] > shares[1] else 'less'} than"
    own, base = (f"{percent(share, 2)} %" for share in shares)
    words = f"{of_both}{other} has a balanced accuracy of {own}, {change} {first} ({base})"
    if alone is None:
        return [
            f"{words}.",
            by_group,
            "They were not tested on the same images, so chance is not judged; both intervals follow below.",
        ]
    gained, lost = (int(images.sum()) for images in alone)
    images = counted(int(after.sum()), "test image")
    alone_right = f"Of {images}, only {other} is right on {gained:,}, and only {first} on {lost:,}."
    if is_equal:
        return [f"{words}.", by_group, alone_right]
    judged = "more than chance explains" if differ(*alone, after.sum(1)) else "which chance can explain"
    return [
        f"{words}: {judged}.",
        by_group,
        f"{alone_right} Judged by McNemar's test at 5 %, in which each class counts equally, for these two trainings: "
        "other seeds may differ.",
    ]


def gains_and_losses(
    before: Array, after: Array, class_counts: Array, groups: Sequence[str], names: Sequence[str], *, limit: int = 5
) -> tuple[list[Finding], list[Finding]]:
    """Return the classes whose recall rises most from one run to another, and those whose recall falls most.

    Each is a sentence with the class's cell on the diagonal. Classes without test images, and those without a change,
    are left out. Ties go by class id.

    Args:
        before: matrix of the first run [C, C].
        after: matrix of the other run [C, C].
        class_counts: training images [C].
        groups: many, medium or few [C].
        names: class names [C].
        limit: largest number of classes in each list.
    """
    tested = before.sum(1), after.sum(1)
    right = before.diagonal(), after.diagonal()
    change = right[1] / np.maximum(tested[1], 1) - right[0] / np.maximum(tested[0], 1)
    change[(tested[0] == 0) | (tested[1] == 0)] = 0

    def listed(rise: Array) -> list[Finding]:
        classes = [int(c) for c in np.argsort(-rise, kind="stable")[:limit] if rise[c] > 0]
        return [Finding(_change(c), c, c) for c in classes]

    def _change(c: int) -> str:
        images = counted(tested[1][c], "image")
        if tested[0][c] == tested[1][c]:
            recall = f"{right[0][c]:,} to {right[1][c]:,} of {images}"
        else:
            recall = f"{right[0][c]:,} of {tested[0][c]:,} to {right[1][c]:,} of {images}"
        return f"{names[c]}: {recall} ({groups[c]}, {counted(class_counts[c], 'training image')})"

    return listed(change), listed(-change)


def moved_errors(matrices: Sequence[Array], confusions: Array) -> tuple[str, list[list[str]]]:
    """Return what the pairs are that the first run's training confused most, and a row of errors per run.

    A row has the errors on these pairs and all other errors, each with its difference to the first run.

    Args:
        matrices: matrix of each run [C, C].
        confusions: confusion counts of the first run's training [C, C].
    """
    pairs, size = most_confused_pairs(confusions), len(confusions)
    share = 100 * pairs.sum() / (size * (size - 1))
    shown = f"{percent(share)} %" if share >= 1 else "less than 1 %"
    words = (
        f"{pairs.sum():,} of {size * (size - 1):,} ordered pairs of classes ({shown}): of each class, those "
        "that make up half of its confusions in training"
    )
    (first, all_images), *others = ((split_errors(matrix, pairs), int(matrix.sum())) for matrix in matrices)
    rows = [[_errors(wrong, all_images) for wrong in first]]
    for found, images in others:
        changes = [
            f"{wrong - base:+,}"
            if images == all_images
            else f"{signed(100 * (wrong / images - base / all_images), 1)} points"
            for wrong, base in zip(found, first, strict=True)
        ]
        rows.append([f"{_errors(wrong, images)}, {change}" for wrong, change in zip(found, changes, strict=True)])
    return words, rows


def _errors(wrong: int, images: int) -> str:
    return f"{wrong:,} ({percent(100 * wrong / images, 1)} %)"
