"""What pictures are drawn from, and those of confusion-report, as matplotlib Figures; paper_figures.py has the paper's.

Confusion matrices have true classes in rows and predictions in columns; classes stand in the order of their training
images, most first. The colour map is viridis reversed (perceptually uniform, colour-blind safe); a cell without
images is white, so zero differs from little. Equal arrays give equal bytes.
"""

import io
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS, group_of
from cpmix_cli.runtime import console

Array = NDArray[Any]
Kind = Literal["png", "svg", "pdf"]

matplotlib.rcParams["text.parse_math"] = False  # names of classes are no formulas

DPI = 150
GROUP_COLOURS = {"many": "#dbe9f6", "medium": "#fdebd0", "few": "#f6dbe4"}
MAX_NAMES = 150
MAX_CELLS = 1000  # a side: more than a picture has pixels for
MAX_NUMBERS = 12
NUM_GROUPS = 10
MAX_BINS = 60
COLOURS = matplotlib.colormaps["viridis_r"].with_extremes(bad="white")
"""White, and not see-through: PDF viewers draw dark seams between cells that are and cells that are not."""
PERCENT_TICKS = [0, 1, 5, 10, 25, 50, 75, 100]

_METADATA: dict[Kind, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
"""Without dates."""


def encode(figure: Figure, kind: Kind, *, dpi: float = DPI) -> bytes:
    """A Figure as the bytes of a file; a PDF carries its fonts (TrueType), an SVG its letters as outlines.

    Args:
        figure: drawn by a function of this module or of paper_figures.py.
        kind: png, svg or pdf.
        dpi: of pixels: a PNG's all, of an SVG or PDF matrices and clouds of points alone.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "cpmix"}):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # see without_glyphs()
        if figure.get_layout_engine() is not None:  # once: laid out again for each kind, it would move a little
            for _ in range(2):  # axes that the first laid out smaller may have other ticks, with labels of other sizes
                figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return buffer.getvalue()


def without_glyphs(names: Sequence[str]) -> list[str]:
    """Those of the names that the pictures' font cannot write in full: boxes stand for what it lacks."""
    known = get_font(findfont(FontProperties())).get_charmap()
    return [name for name in names if any(ord(letter) not in known for letter in name)]


# -- parts of pictures -------------------------------------------------------------------------------------------------


def by_count(class_counts: Array) -> Array:
    """Class ids, most training images first, ties by id."""
    return np.argsort(-class_counts, kind="stable")


def neighbours(class_counts: Array, num_groups: int = NUM_GROUPS) -> list[Array]:
    """Class ids in groups of (nearly) equal size along the classes by training images; at most one a class."""
    order = by_count(class_counts)
    return np.array_split(order, min(num_groups, len(order)))


def consolidated(matrix: Array, parts: Sequence[Array]) -> Array:
    """Test images [C, C] summed over groups of classes [G, G]."""
    return np.array([[matrix[np.ix_(a, b)].sum() for b in parts] for a in parts])


def range_labels(class_counts: Array, parts: Sequence[Array]) -> list[str]:
    """Each group by the training images of its classes: "500 to 310"."""
    ends = [(int(class_counts[part].max()), int(class_counts[part].min())) for part in parts]
    return [f"{high}" if low == high else f"{high} to {low}" for high, low in ends]


def row_percent(matrix: Array) -> Array:
    """Per cent of each true class's test images [C, C]; 0 for a class without."""
    percent: Array = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    return percent


def percent_norm() -> PowerNorm:
    """Colours of 0 to 100 per cent on a square-root scale."""
    return PowerNorm(0.5, vmin=0, vmax=100)


def count_norm(*cells: Array) -> LogNorm:
    """Colours of counts of images on a logarithmic scale, the same for several matrices."""
    together = np.concatenate([c.ravel() for c in cells])
    return LogNorm(vmin=1, vmax=max(10, together.max()))  # from one image on: the same in every picture


def largest_of_blocks(values: Array, block: int) -> Array:
    """The largest value of each block of cells; a mean would fade single ones, which are most of a large matrix.

    Args:
        values: not below 0 [R, S].
        block: cells along a side of a block; the last ones may have fewer.
    """
    starts = [np.arange(0, size, block) for size in values.shape]
    largest: Array = np.maximum.reduceat(np.maximum.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    return largest


def draw_cells(
    axes: Axes, values: Array, norm: Normalize, *, numbers: Sequence[Sequence[str]] | None = None, fontsize: float = 9
) -> AxesImage:
    """Coloured cells, zero ones white; beyond MAX_CELLS a side, blocks of them in the colour of their largest value.

    Args:
        axes: where.
        values: rows from the top, columns from the left [R, S].
        norm: value -> colour.
        numbers: what stands in each cell; None: nothing.
        fontsize: of the numbers, in points.
    """
    block = -(-max(values.shape) // MAX_CELLS)
    shown = largest_of_blocks(values, block) if block > 1 else values
    right, bottom = block * shown.shape[1] - 0.5, block * shown.shape[0] - 0.5
    image = axes.imshow(np.ma.masked_equal(shown, 0), cmap=COLOURS, norm=norm, extent=(-0.5, right, bottom, -0.5))
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
    for i, row in enumerate(numbers or []):
        for j, number in enumerate(row):
            dark = values[i, j] > 0 and norm(values[i, j]) > 0.55
            axes.text(j, i, number, ha="center", va="center", fontsize=fontsize, color="w" if dark else "k")
    return image


def whole_percent(percent: Array) -> list[list[str]]:
    """Numbers of cells: none at zero, <1 below one."""
    return [[f"{v:.0f}" if v >= 1 else "<1" if v > 0 else "" for v in row] for row in percent]


def draw_group_means(axes: Axes, accuracy: Array, parts: Sequence[Array], **style: Any) -> None:
    """Mean accuracy of each group of classes, a point each joined by a line; groups without test images are left out.

    Args:
        axes: where.
        accuracy: per cent [C]; NaN where a class has no test image.
        parts: class ids, group by group.
        style: of the line.
    """
    means = np.array([np.nanmean(accuracy[p]) if not np.isnan(accuracy[p]).all() else np.nan for p in parts])
    axes.plot(np.arange(len(parts)), means, **style)


def confusion_values(matrix: Array) -> Array:
    """Per cent of the true class's test images taken for the other class, of each ordered pair [C * (C - 1)]."""
    return row_percent(matrix)[~np.eye(len(matrix), dtype=bool)]


def draw_histograms(axes: Axes, matrices: Sequence[Array], styles: Sequence[dict[str, Any]]) -> None:
    """How many ordered pairs of classes have which confusion value, for one or several classifiers; zeros undrawn.

    Args:
        axes: where.
        matrices: test images [C, C] of each.
        styles: of each one's bars.
    """
    values = [confusion_values(m) for m in matrices]
    largest = max(v.max(initial=0) for v in values)
    top = max(5.0, float(np.ceil(largest / 5) * 5))
    # Values are whole images: bins of equally many of them, each with its upper end.
    image = 100 / max(1, *(m.sum(1).max() for m in matrices))
    width = image * np.ceil(top / image / MAX_BINS)
    edges = np.arange(0, top + width, width) + image / 100
    for value, style in zip(values, styles, strict=True):
        axes.hist(value[value > 0], bins=[0, *edges[1:]], **style)
    if largest > 0:
        axes.set_yscale("log")
        axes.set_ylim(0.7, None)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes.get_ylim()[1] < 100 else (1,)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, top)
    axes.set_xlabel("confusion value: % of the true class's test images taken for the other class")
    axes.set_ylabel("ordered class pairs (log)")


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
POINT_MARKERS = "oD^sPvX*"
"""Beside the colours, for those who cannot tell them apart."""


def class_style(number: int) -> tuple[str, str]:
    """Colour and marker of a class of points."""
    return REGION_COLOURS[number % len(REGION_COLOURS)], POINT_MARKERS[number % len(POINT_MARKERS)]


def draw_regions(axes: Axes, axis: Array, classes: Array) -> None:
    """Where a classifier of the plane says what.

    Args:
        axes: where.
        axis: ascending, of both directions [G].
        classes: class at (row of y, column of x) [G, G].
    """
    axes.imshow(
        classes % len(REGION_COLOURS),
        origin="lower",
        extent=(axis[0], axis[-1], axis[0], axis[-1]),
        cmap=ListedColormap(REGION_COLOURS),
        vmin=-0.5,
        vmax=len(REGION_COLOURS) - 0.5,
        alpha=0.28,
        interpolation="nearest",
    )


def draw_points(axes: Axes, points: Array, labels: Array, class_names: Sequence[str], *, size: float) -> None:
    """Points of the plane, rarer classes larger, edged and on top.

    Args:
        axes: where.
        points: [N, 2].
        labels: [N].
        class_names: C names; the label of a class says how many points it has.
        size: of a commoner class's point, in square points.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    for c in by_count(counts):
        few = counts[c] < counts.max() / 2
        colour, marker = class_style(c)
        chosen = points[labels == c]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=3.5 * size if few else size,
            color=colour,
            marker=marker,
            edgecolors="k" if few else "none",
            linewidths=0.6 if few else 0,
            alpha=1.0 if few else 0.6,
            label=f"{class_names[c]} ({counts[c]:,})",
            rasterized=True,
        )
    axes.set_aspect("equal")


# -- pictures of confusion-report --------------------------------------------------------------------------------------


def _group_spans(sorted_counts: Array, few_inclusive: bool) -> list[tuple[str, int, int]]:
    """(group, first, one past last) of the groups that have classes, in sorted order."""
    names = [group_of(int(n), few_inclusive=few_inclusive) for n in sorted_counts]
    return [(g, names.index(g), len(names) - names[::-1].index(g)) for g in GROUPS if g in names]


def confusion_heat_map(
    matrix: Array, class_names: list[str], class_counts: Array, *, title: str, few_inclusive: bool = False
) -> Figure:
    """The whole matrix in per cent of each true class's test images, square-root scale; thin lines part the groups.

    Up to 12 classes every cell carries its number, up to 150 every class its name.

    Args:
        matrix: test images [C, C].
        class_names: C names.
        class_counts: training images [C].
        title: above the picture.
        few_inclusive: classes of exactly 20 training images are few.

    Paper: Fig. 1(b), 5, 6.
    """
    order = by_count(class_counts)
    size = len(order)
    percent = row_percent(matrix)[np.ix_(order, order)]
    side = 6.5 if size <= MAX_NUMBERS else min(16.0, 7 + 0.08 * size)
    figure = Figure(figsize=(side * 1.12, side), layout="constrained")
    axes = figure.add_subplot()
    numbers = whole_percent(percent) if size <= MAX_NUMBERS else None
    image = draw_cells(axes, percent, percent_norm(), numbers=numbers)
    names = [class_names[c] for c in order]
    if size <= MAX_NAMES:
        font = 10 if size <= 20 else max(4.5, 8 - size / 30)
        axes.set_xticks(range(size), names, rotation=90, fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
        axes.tick_params(length=0 if size > 20 else 3)
    for _, first, _ in _group_spans(class_counts[order], few_inclusive)[1:]:
        axes.axhline(first - 0.5, color="0.35", linewidth=0.8)
        axes.axvline(first - 0.5, color="0.35", linewidth=0.8)
    for group, first, last in _group_spans(class_counts[order], few_inclusive):
        middle = (first + last - 1) / 2
        axes.annotate(group, (middle, -0.5), (0, 4), textcoords="offset points", ha="center", va="bottom")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, pad=24)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=PERCENT_TICKS)
    bar.set_label("% of the true class's test images (white: none)")
    return figure


def grouped_heat_map(matrix: Array, class_counts: Array, *, num_groups: int = NUM_GROUPS, title: str) -> Figure:
    """Neighbouring classes consolidated, with the number of test images in each cell.

    Args:
        matrix: test images [C, C].
        class_counts: training images [C].
        num_groups: groups of (nearly) equal size along the sorted classes; at most C.
        title: above the picture.

    Paper: Fig. 3(a, b), 4(a).
    """
    parts = neighbours(class_counts, num_groups)
    cells = consolidated(matrix, parts)
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.add_subplot()
    image = draw_cells(axes, cells, count_norm(cells), numbers=[[f"{n:,}" for n in row] for row in cells])
    labels = range_labels(class_counts, parts)
    axes.set_xticks(range(len(parts)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(parts)), labels)
    axes.set_xlabel("predicted class, by its training images")
    axes.set_ylabel("true class, by its training images")
    axes.set_title(title)
    add_count_bar(figure, image, axes)
    return figure


def add_count_bar(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], **place: Any) -> None:
    """The colour bar of count_norm()."""
    place = {"shrink": 0.8, **place}
    bar = figure.colorbar(image, ax=axes, ticks=LogLocator(subs=(1, 2, 5)), format="{x:,.0f}", **place)
    bar.minorticks_off()
    bar.set_label("test images (white: none)")


def class_accuracy(
    accuracy: Array, class_names: list[str], class_counts: Array, *, title: str, few_inclusive: bool = False
) -> Figure:
    """Accuracy of each class, and the curve of training images over the same classes.

    Above 20 classes each class is a dot and ten groups of neighbours are lines.

    Args:
        accuracy: per cent [C]; NaN where a class has no test image.
        class_names: C names, written on the axis up to 20 classes.
        class_counts: training images [C].
        title: above the picture.
        few_inclusive: classes of exactly 20 training images are few.

    Paper: Fig. 4(b, c).
    """
    order = by_count(class_counts)
    counts = class_counts[order]
    place = np.arange(len(order))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for group, first, last in _group_spans(counts, few_inclusive):
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
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylim(max(0.8, counts.min() * 0.8), counts.max() * 1.25)
    right.set_ylabel("training images (log)")
    lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    names = [*axes.get_legend_handles_labels()[1], *right.get_legend_handles_labels()[1]]
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


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


def confusion_histogram(matrix: Array, *, title: str) -> Figure:
    """How many ordered pairs of classes have which confusion value; pairs without any are named, not drawn.

    Args:
        matrix: test images [C, C].
        title: above the picture.

    Paper: Fig. 3(c).
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw_histograms(axes, [matrix], [{"color": "#31688e", "edgecolor": "w", "linewidth": 0.4}])
    values = confusion_values(matrix)
    zeros, largest = int((values == 0).sum()), values.max(initial=0)
    told = f"largest {largest:.0f} %" if largest > 0 else "no confusion"
    axes.set_title(f"{title}\n{zeros:,} of {len(values):,} pairs at zero, {told}")
    return figure


def decision_regions(
    axis: Array,
    grid_classes: Array,
    points: Array,
    labels: Array,
    class_names: list[str],
    *,
    title: str,
) -> Figure:
    """Where a classifier of the plane says what, under the training points; rarer classes are drawn on top.

    Args:
        axis: ascending, of both directions [G].
        grid_classes: class at (row of y, column of x) [G, G].
        points: [N, 2].
        labels: [N].
        class_names: C names.
        title: above the picture.

    Paper: Fig. 2(b-d).
    """
    figure = Figure(figsize=(6.4, 6.6), layout="constrained")
    axes = figure.add_subplot()
    draw_regions(axes, axis, grid_classes)
    draw_points(axes, points, labels, class_names, size=7)
    axes.set_title(title)
    handles: list[Any] = figure.legend(loc="outside lower center", ncols=4, frameon=False).legend_handles
    for handle in handles:  # a common class's points are too small to tell their marker
        handle.set(sizes=[30], alpha=1)
    return figure


def warn_of_boxes(class_names: list[str]) -> None:
    """Say that names will not be legible in pictures."""
    if lacking := without_glyphs(class_names):
        console.warn(
            f"the pictures' font cannot write {len(lacking)} class names, such as {lacking[0]}: boxes stand for letters"
        )
