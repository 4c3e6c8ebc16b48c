"""The panels that figures are made of, and the figures of confusion-report; paper_figures.py has the paper's.

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

from cpmix_cli.data.longtail import GROUPS
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


def turn(names: Sequence[str]) -> int:
    """Degrees by which names below an axis are turned, so that they do not run into each other."""
    return 90 if max(map(len, names)) > 3 else 0


def draw_grouped(
    axes: Axes, matrix: Array, class_counts: Array, norm: Normalize | None = None, *, transposed: bool, fontsize: float
) -> AxesImage:
    """The matrix in ten groups of neighbouring classes, with the number of test images in each cell.

    Args:
        axes: where.
        matrix: test images of true class (row) predicted as (column) [C, C].
        class_counts: training images [C].
        norm: value -> colour; None: count_norm() of these cells.
        transposed: true classes along x, as in the paper; else along y.
        fontsize: of the numbers, in points.
    """
    parts = neighbours(class_counts)
    cells = consolidated(matrix, parts)
    numbers = [[f"{n:,}" for n in row] for row in (cells.T if transposed else cells)]
    image = draw_cells(
        axes, cells.T if transposed else cells, norm or count_norm(cells), numbers=numbers, fontsize=fontsize
    )
    labels = range_labels(class_counts, parts)
    axes.set_xticks(range(len(parts)), labels, rotation=turn(labels))
    axes.set_yticks(range(len(parts)), labels)
    name_axes(axes, "class, by its training images", transposed=transposed)
    return image


def name_axes(axes: Axes, what: str = "class", *, transposed: bool) -> None:
    """Write which axis of a matrix has the true classes: x where it is transposed, else y."""
    x, y = ("true", "predicted") if transposed else ("predicted", "true")
    axes.set_xlabel(f"{x} {what}")
    axes.set_ylabel(f"{y} {what}")


def add_count_bar(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], **place: Any) -> None:
    """The colour bar of count_norm()."""
    bar = figure.colorbar(image, ax=axes, ticks=LogLocator(subs=(1, 2, 5)), format="{x:,.0f}", **place)
    bar.minorticks_off()
    bar.set_label("test images (white: none)")


def draw_accuracies(
    axes: Axes,
    class_names: Sequence[str],
    class_counts: Array,
    lines: Sequence[tuple[Array, dict[str, Any]]],
    num_groups: int = NUM_GROUPS,
) -> Axes:
    """Mean accuracies of groups of neighbouring classes, before bars of their mean number of training images.

    Args:
        axes: where.
        class_names: C names, written where each class is a group of its own.
        class_counts: training images [C].
        lines: per cent [C] of each line, NaN where a class has no test image; and the style of the line.
        num_groups: G.

    Returns:
        The axes of the bars.
    """
    parts = neighbours(class_counts, num_groups)
    place = np.arange(len(parts))
    for accuracy, style in lines:
        means = [np.nan if np.isnan(accuracy[p]).all() else np.nanmean(accuracy[p]) for p in parts]
        axes.plot(place, np.array(means), clip_on=False, **style)
    single = len(parts) == len(class_counts)
    labels = [class_names[part[0]] for part in parts] if single else range_labels(class_counts, parts)
    axes.set_xticks(place, labels, rotation=turn(labels))
    axes.set_xlabel("class" if single else "class, by its training images")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    behind = axes.twinx()
    behind.bar(place, [class_counts[part].mean() for part in parts], color="0.88", width=0.85)
    behind.set_ylabel("training images", color="0.4")
    behind.tick_params(axis="y", colors="0.4")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    return behind


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


REGION_COLOURS = ("#d62728", "#9467bd", "#7f7f7f", "#e0a800", "#1f77b4", "#2ca02c", "#8c564b", "#17becf")
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


def confusion_heat_map(
    matrix: Array, class_names: list[str], class_counts: Array, groups: Sequence[str], *, title: str
) -> Figure:
    """The whole matrix in per cent of each true class's test images, square-root scale; thin lines part the groups.

    Up to 12 classes every cell carries its number, up to 150 every class its name.

    Args:
        matrix: test images [C, C].
        class_names: C names.
        class_counts: training images [C].
        groups: many, medium or few, of each class.
        title: above the figure.

    Paper: Fig. 1(b), 5, 6.
    """
    order = by_count(class_counts)
    size = len(order)
    percent = row_percent(matrix)[np.ix_(order, order)]
    side = 6.5 if size <= MAX_NUMBERS else min(16.0, 7 + 0.08 * size)
    figure, axes = _one_panel(side * 1.12, side)
    numbers = whole_percent(percent) if size <= MAX_NUMBERS else None
    image = draw_cells(axes, percent, percent_norm(), numbers=numbers)
    names = [class_names[c] for c in order]
    if size <= MAX_NAMES:
        font = 10 if size <= 20 else max(4.5, 8 - size / 30)
        axes.set_xticks(range(size), names, rotation=turn(names), fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
        axes.tick_params(length=0 if size > 20 else 3)
    for group, first, last in _spans(groups, order):
        if first:
            axes.axhline(first - 0.5, color="0.35", linewidth=0.8)
            axes.axvline(first - 0.5, color="0.35", linewidth=0.8)
        middle = (first + last - 1) / 2
        axes.annotate(group, (middle, -0.5), (0, 4), textcoords="offset points", ha="center", va="bottom")
    name_axes(axes, transposed=False)
    axes.set_title(title, pad=24)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=PERCENT_TICKS)
    bar.set_label("% of the true class's test images (white: none)")
    return figure


def _one_panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _spans(groups: Sequence[str], order: Array) -> list[tuple[str, int, int]]:
    """(group, first, one past last) of the groups that have classes, in sorted order."""
    names = [groups[c] for c in order]
    return [(g, names.index(g), len(names) - names[::-1].index(g)) for g in GROUPS if g in names]


def grouped_heat_map(matrix: Array, class_counts: Array, *, title: str) -> Figure:
    """The matrix in ten groups of neighbouring classes, with the number of test images in each cell.

    Args:
        matrix: test images [C, C].
        class_counts: training images [C].
        title: above the figure.

    Paper: Fig. 3(a, b), 4(a).
    """
    figure, axes = _one_panel(7.2, 6.4)
    image = draw_grouped(axes, matrix, class_counts, transposed=False, fontsize=9)
    axes.set_title(title)
    add_count_bar(figure, image, axes, shrink=0.8)
    return figure


def class_accuracy(
    accuracy: Array, class_names: list[str], class_counts: Array, groups: Sequence[str], *, title: str
) -> Figure:
    """Accuracy of each class before its training images; above 20 classes, dots and the means of ten groups.

    Args:
        accuracy: per cent [C]; NaN where a class has no test image.
        class_names: C names, written on the axis up to 20 classes.
        class_counts: training images [C].
        groups: many, medium or few, of each class.
        title: above the figure.

    Paper: Fig. 4(b, c).
    """
    order = by_count(class_counts)
    size = len(order)
    num_parts = size if size <= 20 else NUM_GROUPS
    figure, axes = _one_panel(9, 4.8)
    behind = draw_accuracies(axes, class_names, class_counts, [(accuracy, {"color": "C0", "marker": "o"})], num_parts)
    edges = np.arange(size + 1) * num_parts / size - 0.5
    if num_parts < size:
        axes.plot((edges[:-1] + edges[1:]) / 2, accuracy[order], ".", color="C0", alpha=0.45, markersize=4)
        axes.set_xlabel("class, by its training images (dots: classes; line: means of ten groups)")
    for bar in behind.patches:
        bar.set_facecolor("0.78")  # darker than on white
    for group, first, last in _spans(groups, order):
        behind.axvspan(edges[first], edges[last], color=GROUP_COLOURS[group], linewidth=0, zorder=0)
        values = accuracy[order[first:last]]
        mean = "-" if np.isnan(values).all() else f"{np.nanmean(values):.1f} %"
        axes.text((edges[first] + edges[last]) / 2, 103, f"{group}\n{mean}", ha="center", va="bottom", fontsize=9)
    axes.set_xlim(-0.5, num_parts - 0.5)
    axes.set_title(title, pad=36)
    return figure


def confusion_histogram(matrix: Array, *, title: str) -> Figure:
    """How many ordered pairs of classes have which confusion value; pairs without any are named, not drawn.

    Args:
        matrix: test images [C, C].
        title: above the picture.

    Paper: Fig. 3(c).
    """
    figure, axes = _one_panel(7, 4.2)
    draw_histograms(axes, [matrix], [{"color": "#31688e", "edgecolor": "w", "linewidth": 0.4}])
    values = confusion_values(matrix)
    zeros, largest = int((values == 0).sum()), values.max(initial=0)
    told = f"largest {largest:.0f} %" if largest > 0 else "no confusion"
    axes.set_title(f"{title}\n{zeros:,} of {len(values):,} pairs at zero, {told}")
    return figure


def decision_regions(
    axis: Array, grid_classes: Array, points: Array, labels: Array, class_names: list[str], *, title: str
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
    figure, axes = _one_panel(6.4, 6.6)
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
