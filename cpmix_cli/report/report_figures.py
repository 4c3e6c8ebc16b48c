"""The figures of confusion-report, drawn from arrays as Figures that are as large as their cells and names need.

Args of all functions:
    matrix: test images of true class (row) predicted as class (column) [C, C].
    class_names: C names.
    class_counts: training images per class [C].
    title: title of the figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.evaluation.prediction import predicted_regions
from cpmix_cli.report import panels
from cpmix_cli.report.figure_files import Kind, encode
from cpmix_cli.report.panels import NUM_GROUPS, Array, by_count, elided
from cpmix_cli.report.reported_run import ReportedRun
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import on_a_line

DECISION_REGIONS = "decision_regions"
PICTURES = (
    *("confusion_matrix", "confusion_matrix_grouped", "class_accuracy", "confusion_histogram"),
    DECISION_REGIONS,
)
"""Names of the figures' files without suffix."""
Pictures = list[tuple[str, str, dict[Kind, bytes]]]
"""File name without suffix, caption, and PNG and SVG of each figure."""
_MAX_NAMES = 150
_MAX_IN_LEGEND = 40
_TITLE_COLUMNS = 120
_GAP = 0.12  # inches between texts beside each other
_SPACE_ABOVE = 0.2  # inches, of a line between axes and title
_BAR: dict[str, Any] = {"shrink": 0.8, "aspect": 30, "fraction": 0.05, "pad": 0.02}


def draw_all(run: ReportedRun) -> Pictures:
    """Draw the figures of a run. Fewer than 20 classes have no matrix of ten groups: it would repeat the first one."""
    source, dataset, matrix, groups = run.source, run.dataset, run.shown.matrix, run.shown.groups
    title = on_a_line(f"{dataset.name}, {run.evaluation.name}")
    images = "the test split" if run.evaluation.name == source.phase else on_a_line(run.evaluation.name)
    names, counts = [on_a_line(name) for name in dataset.class_names], dataset.class_counts
    pictures = [
        (
            "confusion_matrix",
            f"Confusion matrix of {images}: rows true, columns predicted, per cent of the true class; "
            "classes in descending order of training images.",
            confusion_heat_map(matrix, names, counts, groups, title=title),
        ),
        (
            "class_accuracy",
            "Accuracy per class over training images.",
            class_accuracy(matrix, names, counts, title=title),
        ),
        (
            "confusion_histogram",
            "Histogram of confusion values between two classes.",
            confusion_histogram(matrix, title=title),
        ),
    ]
    if len(counts) >= 2 * NUM_GROUPS:
        caption = (
            "Confusion matrix of ten groups of neighbouring classes (test images per cell), as in Fig. 3 of the paper."
        )
        pictures.insert(1, ("confusion_matrix_grouped", caption, grouped_heat_map(matrix, counts, title=title)))
    if dataset.shape == [2]:
        points, labels = dataset.read("train")
        axis, classes = predicted_regions(source, dataset, points)
        regions = decision_regions(axis, classes, points.numpy(), labels.numpy(), names, title=title)
        caption = "Decision regions over the training points, as in Fig. 2 of the paper."
        pictures.insert(0, (DECISION_REGIONS, caption, regions))
    return [
        (name, caption, {kind: encode(figure, kind) for kind in ("png", "svg")}) for name, caption, figure in pictures
    ]


def confusion_heat_map(
    matrix: Array, class_names: Sequence[str], class_counts: Array, groups: Sequence[str], *, title: str
) -> Figure:
    """Draw the confusion matrix in per cent of each true class's test images. Paper: Fig. 1(b), 5, 6.

    Up to 12 classes have numbers in the cells, up to 150 have names on the axes. Lines separate the groups.

    Args:
        matrix: test images [C, C].
        class_names: C names.
        class_counts: training images [C].
        groups: many, medium or few, per class [C].
        title: title of the figure.
    """
    order = by_count(class_counts)
    size, numbered = len(order), len(order) <= panels.MAX_NUMBERS
    side = 5.2 if numbered else min(13.0, 5.5 + 0.08 * size)
    named = {place: elided(class_names[c]) for place, c in enumerate(order)}
    names = named if size <= _MAX_NAMES else panels.numbers(size)
    figure, axes = _matrix_panel(names, size, side, title, above=_SPACE_ABOVE)
    cells, number = panels.row_percent(matrix)[np.ix_(order, order)], panels.whole_percent if numbered else None
    image = panels.draw_matrix(axes, cells, names, number, side=side, transposed=False)
    of_rows = [groups[c] for c in order]
    shown = [group for group in GROUPS if group in of_rows]
    firsts, widths = [of_rows.index(group) for group in shown], [panels.inches([group], 10) for group in shown]
    for first in firsts[1:]:
        axes.axhline(first - 0.5, color="0.35", linewidth=0.8)
        axes.axvline(first - 0.5, color="0.35", linewidth=0.8)
    middles = np.add(firsts, [*firsts[1:], size]) / 2 * side / size
    for group, start in zip(shown, _apart(middles, widths, side), strict=True):
        _above(axes, group, start / side, "left")
    bar = figure.colorbar(image, ax=axes, ticks=panels.PERCENT_TICKS, **_BAR)
    bar.set_label("% of the true class's test images (white: none)")
    return figure


def _above(axes: Axes, text: str, place: float, align: Literal["left", "center"]) -> None:
    """Write a line into the space between axes and title, at a place from 0 (left) to 1."""
    points: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 10}
    axes.annotate(text, (place, 1), (0, 4), ha=align, va="bottom", **points)


def _apart(middles: Array, widths: Sequence[float], length: float) -> list[float]:
    """Return where texts start so that none overlaps the next: at their middles, or shifted along the axis.

    Args:
        middles: places of the texts in inches, ascending [N].
        widths: their widths in inches.
        length: length of the axis in inches.
    """
    starts: list[float] = []
    free = 0.0
    for middle, width in zip(middles, widths, strict=True):
        starts.append(max(middle - width / 2, free))
        free = starts[-1] + width + _GAP
    for k in reversed(range(len(starts))):
        starts[k] = min(starts[k], length - widths[k])
        length = starts[k] - _GAP
    return starts


def _matrix_panel(
    names: Mapping[int, str], size: int, side: float, title: str, above: float = 0
) -> tuple[Figure, Axes]:
    """Return a figure that has room for a matrix of `side` inches, its names, its colour bar and texts above it."""
    _, beside, below = panels.labels_of(names, side / size)
    return _one_panel(side + beside + 1.7, side + below + 0.6, title, side, above)


def _one_panel(width: float, height: float, title: str, inside: float, above: float = 0) -> tuple[Figure, Axes]:
    """Return a figure and its axes, about `inside` inches wide, with a title and space for texts below the title.

    Title and space add to the height.
    """
    lines = panels.wrapped(elided(title, _TITLE_COLUMNS), inside, 12)
    height += above + 0.3 + 0.2 * lines.count("\n")
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(lines, fontsize=12, pad=6 + 72 * above)
    return figure, axes


def grouped_heat_map(matrix: Array, class_counts: Array, *, title: str) -> Figure:
    """Draw the matrix [C, C] in ten groups of neighbouring classes, see draw_grouped(). Paper: Fig. 3(a, b), 4(a).

    Args:
        matrix: test images [C, C].
        class_counts: training images [C].
        title: title of the figure.
    """
    side, names = 4.8, panels.group_names(class_counts)
    figure, axes = _matrix_panel(names, len(names), side, title)
    image = panels.draw_grouped(axes, matrix, class_counts, side=side, transposed=False)
    panels.add_count_bar(figure, image, axes, **_BAR)
    return figure


def class_accuracy(matrix: Array, class_names: Sequence[str], class_counts: Array, *, title: str) -> Figure:
    """Draw accuracies and training images: means of ten groups as a line, single classes as dots. Paper: Fig. 4(b, c).

    Args:
        matrix: test images [C, C].
        class_names: C names.
        class_counts: training images [C].
        title: title of the figure.
    """
    accuracy, size, width = panels.percent_right(matrix), len(class_counts), 7.4
    names = panels.accuracy_names([*map(elided, class_names)], class_counts)
    *_, below = panels.labels_of(names, width / len(names))
    figure, axes = _one_panel(9, 3.8 + below, title, width)
    panels.draw_accuracies(axes, names, class_counts, [(accuracy, {"color": "C0", "marker": "o"})], width=width)
    if size > NUM_GROUPS:
        place = (np.arange(size) + 0.5) * NUM_GROUPS / size - 0.5
        axes.plot(place, accuracy[by_count(class_counts)], ".", color="C0", alpha=0.45, markersize=4)
        axes.set_xlabel("class, by its training images (dots: classes; line: means of ten groups)")
    return figure


def confusion_histogram(matrix: Array, *, title: str) -> Figure:
    """Draw the histogram of confusion values of ordered class pairs; the title counts zeros. Paper: Fig. 3(c)."""
    values = panels.confusion_values(matrix)
    zeros, largest = int((values == 0).sum()), values.max(initial=0)
    note = f"largest {percent(largest)} %" if largest > 0 else "no confusion"
    figure, axes = _one_panel(7, 4, title, 6, above=_SPACE_ABOVE)
    _above(axes, f"{zeros:,} of {len(values):,} pairs at zero, {note}", 0.5, "center")
    panels.draw_histograms(axes, [matrix], [{"color": "#31688e", "edgecolor": "w", "linewidth": 0.4}])
    return figure


def decision_regions(
    axis: Array, grid_classes: Array, points: Array, labels: Array, class_names: Sequence[str], *, title: str
) -> Figure:
    """Draw the decision regions of a classifier of 2-D points, and training points on top. Paper: Fig. 2(b-d).

    Args:
        axis: ascending coordinates of the grid, in x and y [G].
        grid_classes: predicted class at (row of y, column of x) [G, G].
        points: coordinates [N, 2].
        labels: class ids [N].
        class_names: C names.
        title: title of the figure.
    """
    figure, axes = _one_panel(6.4, 6.1, title, 5.6)
    panels.draw_regions(axes, axis, grid_classes)
    panels.draw_points(axes, points, labels, [*map(elided, class_names)], size=7)
    markers, names = axes.get_legend_handles_labels()
    markers, names = markers[:_MAX_IN_LEGEND], names[:_MAX_IN_LEGEND]
    columns = panels.columns_of(names, 6.2, 10)
    heading = "" if len(names) == len(class_names) else f"the {len(names)} largest of {len(class_names):,} classes"
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "title": heading}
    handles: list[Any] = figure.legend(markers, names, **place).legend_handles
    for handle in handles:  # the markers of frequent classes are too small to recognise
        handle.set(sizes=[30], alpha=1)
    figure.set_figheight(figure.get_figheight() + 0.21 * (-(-len(names) // columns) + bool(heading)))
    return figure
