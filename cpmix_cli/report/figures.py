"""The pictures of confusion-report, as PNG bytes.

Confusion matrices have true classes in rows and predictions in columns; classes stand in the order of their training
images, most first. The colour map is viridis reversed (perceptually uniform, colour-blind safe); a cell without
images is white, so zero differs from little. Equal arrays give equal bytes.
"""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS, group_of

Array = NDArray[Any]

DPI = 150
GROUP_COLOURS = {"many": "#dbe9f6", "medium": "#fdebd0", "few": "#f6dbe4"}
MAX_NAMES = 150
MAX_NUMBERS = 12


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _by_count(class_counts: Array) -> Array:
    """Class ids, most training images first, ties by id."""
    return np.argsort(-class_counts, kind="stable")


def _group_spans(sorted_counts: Array) -> list[tuple[str, int, int]]:
    """(group, first, one past last) of the groups that have classes, in sorted order."""
    names = [group_of(int(n)) for n in sorted_counts]
    return [(g, names.index(g), len(names) - names[::-1].index(g)) for g in GROUPS if g in names]


def confusion_heat_map(matrix: Array, class_names: list[str], class_counts: Array, *, title: str) -> bytes:
    """The whole matrix in per cent of each true class's test images, square-root scale; thin lines part the groups.

    Up to 12 classes every cell carries its number, up to 150 every class its name.

    Args:
        matrix: test images [C, C].
        class_names: C names.
        class_counts: training images [C].
        title: above the picture.

    Paper: Fig. 1(b), 5, 6.
    """
    order = _by_count(class_counts)
    size = len(order)
    totals = np.maximum(matrix.sum(1, keepdims=True), 1)
    percent = (100 * matrix / totals)[np.ix_(order, order)]
    side = 6.5 if size <= MAX_NUMBERS else min(16.0, 7 + 0.08 * size)
    figure = Figure(figsize=(side * 1.12, side), layout="constrained")
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=100)
    image = axes.imshow(np.ma.masked_equal(percent, 0), cmap="viridis_r", norm=norm)
    if size <= MAX_NUMBERS:
        for i, j in np.argwhere(percent > 0):
            dark = norm(percent[i, j]) > 0.55
            text = f"{percent[i, j]:.0f}" if percent[i, j] >= 1 else "<1"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="w" if dark else "k")
    names = [class_names[c] for c in order]
    if size <= MAX_NAMES:
        font = 10 if size <= 20 else max(4.5, 8 - size / 30)
        axes.set_xticks(range(size), names, rotation=90, fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
        axes.tick_params(length=0 if size > 20 else 3)
    for _, first, _ in _group_spans(class_counts[order])[1:]:
        axes.axhline(first - 0.5, color="0.35", linewidth=0.8)
        axes.axvline(first - 0.5, color="0.35", linewidth=0.8)
    for group, first, last in _group_spans(class_counts[order]):
        middle = (first + last - 1) / 2
        axes.annotate(group, (middle, -0.5), (0, 4), textcoords="offset points", ha="center", va="bottom")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, pad=24)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("% of the true class's test images (white: none)")
    return _png(figure)


def grouped_heat_map(matrix: Array, class_counts: Array, *, num_groups: int = 10, title: str) -> bytes:
    """Neighbouring classes consolidated, with the number of test images in each cell.

    Args:
        matrix: test images [C, C].
        class_counts: training images [C].
        num_groups: groups of (nearly) equal size along the sorted classes; at most C.
        title: above the picture.

    Paper: Fig. 3(a, b), 4(a).
    """
    order = _by_count(class_counts)
    parts = np.array_split(order, min(num_groups, len(order)))
    cells = np.array([[matrix[np.ix_(a, b)].sum() for b in parts] for a in parts])
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.add_subplot()
    norm = LogNorm(vmin=min(cells[cells > 0]), vmax=max(10, cells.max()))
    image = axes.imshow(np.ma.masked_equal(cells, 0), cmap="viridis_r", norm=norm)
    for i, j in np.ndindex(*cells.shape):
        dark = cells[i, j] > 0 and norm(cells[i, j]) > 0.55
        colour = "w" if dark else "k"
        axes.text(j, i, f"{cells[i, j]:,}", ha="center", va="center", fontsize=9, color=colour)
    labels = [_range_label(class_counts[part]) for part in parts]
    axes.set_xticks(range(len(parts)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(parts)), labels)
    axes.set_xlabel("predicted class, by its training images")
    axes.set_ylabel("true class, by its training images")
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=LogLocator(subs=(1, 2, 5)), format="{x:,.0f}")
    bar.minorticks_off()
    bar.set_label("test images (white: none)")
    return _png(figure)


def _range_label(counts: Array) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{high}" if low == high else f"{high} to {low}"


def class_accuracy(accuracy: Array, class_names: list[str], class_counts: Array, *, title: str) -> bytes:
    """Accuracy of each class, and the curve of training images over the same classes.

    Above 20 classes each class is a dot and ten groups of neighbours are lines.

    Args:
        accuracy: per cent [C]; NaN where a class has no test image.
        class_names: C names, written on the axis up to 20 classes.
        class_counts: training images [C].
        title: above the picture.

    Paper: Fig. 4(b, c).
    """
    order = _by_count(class_counts)
    counts = class_counts[order]
    place = np.arange(len(order))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for group, first, last in _group_spans(counts):
        axes.axvspan(first - 0.5, last - 0.5, color=GROUP_COLOURS[group], linewidth=0)
        values = accuracy[order[first:last]]
        mean = f"{np.nanmean(values):.1f} %" if not np.isnan(values).all() else "-"
        axes.text((first + last - 1) / 2, 103, f"{group}\n{mean}", ha="center", va="bottom", fontsize=9)
    _accuracy_curve(axes, place, accuracy[order])
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(0, 102)
    if len(order) <= 20:
        axes.set_xticks(place, [class_names[c] for c in order])
    axes.set_xlabel("class, most training images first")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title, pad=36)
    right = axes.twinx()
    right.plot(place, counts, color="0.35", linewidth=1, linestyle="--", label="training images")
    right.set_yscale("log")
    right.set_ylim(max(0.8, counts.min() * 0.8), counts.max() * 1.25)
    right.set_ylabel("training images (log)")
    lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    names = [*axes.get_legend_handles_labels()[1], *right.get_legend_handles_labels()[1]]
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _png(figure)


def _accuracy_curve(axes: Axes, place: Array, accuracy: Array) -> None:
    if len(place) <= 20:
        axes.plot(place, accuracy, "o-", color="C0", label="accuracy")
        return
    axes.plot(place, accuracy, ".", color="C0", alpha=0.45, markersize=4)
    for number, part in enumerate(np.array_split(place, 10)):
        inside = accuracy[part]
        if np.isnan(inside).all():
            continue
        label = "accuracy (dots: classes; lines: means of ten groups)" if number == 0 else None
        edges = [part[0] - 0.5, part[-1] + 0.5]
        axes.plot(edges, [np.nanmean(inside)] * 2, color="C0", linewidth=2.5, label=label)


def confusion_histogram(matrix: Array, *, title: str) -> bytes:
    """How many ordered pairs of classes have which confusion value; pairs without any are named, not drawn.

    Args:
        matrix: test images [C, C].
        title: above the picture.

    Paper: Fig. 3(c).
    """
    off = ~np.eye(len(matrix), dtype=bool)
    percent = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    values = percent[off]
    positive = values[values > 0]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    top = max(5.0, float(np.ceil(positive.max() / 5) * 5)) if len(positive) else 5.0
    axes.hist(positive, bins=np.linspace(0, top, 41).tolist(), color="#31688e", edgecolor="w", linewidth=0.4)
    if len(positive):
        axes.set_yscale("log")
        axes.set_ylim(0.7, None)
    axes.set_xlim(0, top)
    axes.set_xlabel("confusion value: % of the true class's test images taken for the other class")
    axes.set_ylabel("ordered class pairs (log)")
    largest = f"largest {positive.max():.0f} %" if len(positive) else "no confusion"
    axes.set_title(f"{title}\n{len(values) - len(positive):,} of {len(values):,} pairs at zero, {largest}")
    return _png(figure)


REGION_COLOURS = (
    "#d62728",
    "#9467bd",
    "#7f7f7f",
    "#e0a800",
    "#1f77b4",
    "#2ca02c",
    "#8c564b",
    "#17becf",
)


def decision_regions(
    grid_x: Array,
    grid_y: Array,
    grid_classes: Array,
    points: Array,
    labels: Array,
    class_names: list[str],
    *,
    title: str,
) -> bytes:
    """Where a classifier of the plane says what, under the training points; rarer classes are drawn on top.

    Args:
        grid_x: ascending [G].
        grid_y: ascending [G].
        grid_classes: class at (row of grid_y, column of grid_x) [G, G].
        points: [N, 2].
        labels: [N].
        class_names: C names.
        title: above the picture.

    Paper: Fig. 2(b-d).
    """
    colours = [REGION_COLOURS[c % len(REGION_COLOURS)] for c in range(len(class_names))]
    figure = Figure(figsize=(6.4, 6.6), layout="constrained")
    axes = figure.add_subplot()
    extent = (grid_x[0], grid_x[-1], grid_y[0], grid_y[-1])
    axes.imshow(
        grid_classes,
        origin="lower",
        extent=extent,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        alpha=0.28,
        interpolation="nearest",
    )
    counts = np.bincount(labels, minlength=len(class_names))
    for c in _by_count(counts):
        few = counts[c] < counts.max() / 2
        chosen = points[labels == c]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=26 if few else 7,
            color=colours[c],
            edgecolors="k" if few else "none",
            linewidths=0.6,
            alpha=1.0 if few else 0.6,
            label=f"{class_names[c]} ({counts[c]:,})",
        )
    axes.set_aspect("equal")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)
