"""Panels: what the figures of confusion-report (report_figures.py) and those of the paper (paper_figures.py) draw.

Args of all functions:
    axes: matplotlib Axes to draw on.
    matrix: test images of true class (row) predicted as class (column) [C, C].
    class_names: C names.
    class_counts: training images per class [C].

Classes are drawn in descending order of their training images. Cells have the page's colours of confusions in light
mode (colours.py) without the palest, so that one image differs from none: cells without images are white. Equal
arrays give equal bytes.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.colors import ListedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from cpmix_cli.report.colours import colour_map, text_colour
from cpmix_cli.report.figure_files import boxes_allowed
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import cut, width_of

Array = NDArray[Any]

MAX_NUMBERS = 12
"""Largest number of classes of a matrix with numbers in its cells."""
_NAME_COLUMNS = 32
_MAX_TICKS = 20  # numbers on an axis without names
_SMALL_LABEL = 6  # points; ticks would be longer than the space between smaller labels
_MAX_CELLS = 1000  # per side; more cells than pixels
_MAX_BINS = 60
NUM_GROUPS = 10
_COLOURS = ListedColormap(colour_map("confusion")(np.linspace(0.05, 1, 256))).with_extremes(bad="white")
"""Empty cells are white, not transparent: PDF viewers draw dark seams between transparent and filled cells."""
PERCENT_TICKS = [0, 1, 5, 10, 25, 50, 75, 100]


# -- texts -------------------------------------------------------------------------------------------------------------


def elided(name: str, columns: int = _NAME_COLUMNS) -> str:
    """Return a name of at most so many columns; an ellipsis stands for its middle, because ends tell names apart."""
    if width_of(name) <= columns:
        return name
    end = cut(name[::-1], (columns - 1) // 2, "")[::-1]
    return cut(name, columns - width_of(end)) + end


def inches(texts: Iterable[str], size: float) -> float:
    """Return the width of the widest of some lines of text in inches, drawn at a size in points."""
    font = FontProperties(size=size)
    with boxes_allowed():
        return max((text_to_path.get_text_width_height_descent(t, font, False)[0] for t in texts), default=0.0) / 72


def wrapped(title: str, width: float, size: float) -> str:
    """Break a title into lines that are at most so many inches wide at a size in points."""
    one_line = inches([title], size)
    if one_line <= width:
        return title
    columns = int(0.9 * len(title) * width / one_line)
    return textwrap.fill(title, columns, break_on_hyphens=max(map(len, title.split())) > columns)


def numbers(size: int, most: int = _MAX_TICKS) -> dict[int, str]:
    """Return place -> number from 1 of some of `size` classes: the first, and all multiples of a round number."""
    step = next(step for power in range(9) for m in (1, 2, 5) if (step := m * 10**power) * most >= size)
    return {place: f"{place + 1}" for place in [0, *range(step - 1, size, step)]}


def label_ticks(axis: Axis, names: Mapping[int, str], pitch: float) -> None:
    """Name places of an axis: small enough for their distance, and along x turned where they would touch.

    Args:
        axis: xaxis or yaxis.
        names: place -> name, in ascending order.
        pitch: distance between neighbouring places in inches.
    """
    size, width, below = labels_of(names, pitch)
    turned = isinstance(axis, XAxis) and below == width
    axis.set_ticks(list(names), list(names.values()), rotation=90 if turned else 0)
    if size < _SMALL_LABEL:
        axis.set_tick_params(length=0)
    axis.set_tick_params(labelsize=size)


def labels_of(names: Mapping[int, str], pitch: float) -> tuple[float, float, float]:
    """Return the size of names in points, and the width that they take along y and the height along x in inches."""
    gap = pitch * float(min(np.diff(list(names)), default=1))
    size = min(FontProperties(size=matplotlib.rcParams["xtick.labelsize"]).get_size_in_points(), 0.8 * 72 * gap)
    width = inches(names.values(), size)
    return size, width, width if width > 0.8 * gap else size / 72


def columns_of(labels: Sequence[str], width: float, size: float) -> int:
    """Return the number of columns of a legend of at most so many inches, with letters of a size in points."""
    handle = 4.5 * size / 72  # and the space beside it
    return max(1, min(len(labels), int(width / (inches(labels, size) + handle))))


# -- panels ------------------------------------------------------------------------------------------------------------


def by_count(class_counts: Array) -> Array:
    """Return class ids in descending order of training images, ties by id: [C] -> [C]."""
    return np.argsort(-class_counts, kind="stable")


def consolidated(matrix: Array, class_counts: Array) -> Array:
    """Sum test images over ten groups of neighbouring classes: [C, C] -> [G, G], G = min(10, C)."""
    parts = _neighbours(class_counts)
    return np.array([[matrix[np.ix_(a, b)].sum() for b in parts] for a in parts])


def _neighbours(class_counts: Array) -> list[Array]:
    """Return class ids in up to ten nearly equal groups."""
    return np.array_split(by_count(class_counts), min(NUM_GROUPS, len(class_counts)))


def group_names(class_counts: Array) -> dict[int, str]:
    """Return place -> training images of each of ten groups of neighbouring classes, such as "500 to 310"."""
    ends = [(class_counts[part[0]], class_counts[part[-1]]) for part in _neighbours(class_counts)]
    return dict(enumerate(f"{high}" if low == high else f"{high} to {low}" for high, low in ends))


def row_percent(matrix: Array) -> Array:
    """Convert counts to per cent of each row [C, C]; 0 in rows without test images."""
    of_rows: Array = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    return of_rows


def percent_right(matrix: Array) -> Array:
    """Return the accuracy per class in per cent [C]; NaN for a class without test images."""
    with np.errstate(invalid="ignore"):
        of_classes: Array = matrix.diagonal() / matrix.sum(1) * 100
    return of_classes


def count_norm(*cells: Array) -> LogNorm:
    """Return a logarithmic colour scale for counts that covers all the given matrices."""
    return LogNorm(vmin=1, vmax=max(10, *(c.max() for c in cells)))  # starts at one image in every figure


def _largest_of_blocks(values: Array, block: int) -> Array:
    """Return the largest value per block of cells; a mean would fade isolated cells, which dominate large matrices."""
    rows, columns = (np.arange(0, size, block) for size in values.shape)
    largest: Array = np.maximum.reduceat(np.maximum.reduceat(values, rows, axis=0), columns, axis=1)
    return largest


def whole_percent(value: float) -> str:
    """Format a percentage for a cell: nothing for zero, <1 below one."""
    return percent(value) if value >= 1 else "<1" if value > 0 else ""


def draw_matrix(
    axes: Axes,
    matrix: Array,
    names: Mapping[int, str],
    number: Callable[[float], str] | None = None,
    norm: Normalize | None = None,
    *,
    side: float,
    transposed: bool,
    what: str = "class",
) -> AxesImage:
    """Draw a matrix as coloured cells, zeros white. Matrices over 1,000 cells per side show blocks' largest values.

    Args:
        axes: Axes to draw on.
        matrix: values of true (rows) and predicted (columns) classes or groups, in their order.
        names: tick position -> label, on both axes.
        number: formats the value in a cell; None: no numbers.
        norm: value -> colour; None: 0 to 100 per cent on a square-root scale.
        side: width and height that the layout will give the matrix, in inches; numbers and names fit into it.
        transposed: draw true classes along x, as in the paper; else along y.
        what: noun of the axis labels, such as "class".
    """
    values = matrix.T if transposed else matrix
    norm = norm or PowerNorm(0.5, vmin=0, vmax=100)
    block, pitch = -(-len(values) // _MAX_CELLS), side / len(values)
    shown = _largest_of_blocks(values, block)
    edge, end = block * len(shown) - 0.5, len(values) - 0.5
    cells = np.ma.masked_equal(shown, 0)
    image = axes.imshow(cells, cmap=_COLOURS, norm=norm, extent=(-0.5, edge, edge, -0.5))
    axes.set(xlim=(-0.5, end), ylim=(end, -0.5))
    if number is not None:
        fills, texts = image.to_rgba(cells), {place: number(value) for place, value in np.ndenumerate(values)}
        largest = 0.85 * matplotlib.rcParams["font.size"]
        size = largest * min(1, 0.85 * pitch / max(inches(texts.values(), largest), largest / 72))
        for (i, j), text in texts.items():
            colour = text_colour(tuple(fills[i, j, :3]))
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour, in_layout=False)
    for axis in (axes.xaxis, axes.yaxis):
        label_ticks(axis, names, pitch)
    true, predicted = (axes.set_xlabel, axes.set_ylabel) if transposed else (axes.set_ylabel, axes.set_xlabel)
    true(f"true {what}")
    predicted(f"predicted {what}")
    return image


def draw_grouped(
    axes: Axes, matrix: Array, class_counts: Array, norm: Normalize | None = None, *, side: float, transposed: bool
) -> AxesImage:
    """Draw the matrix of ten groups of neighbouring classes, with test images as numbers.

    Args:
        axes: Axes to draw on.
        matrix: test images [C, C].
        class_counts: training images [C].
        norm: value -> colour; None: count_norm() of the grouped matrix.
        side: width and height that the layout will give the matrix, in inches.
        transposed: draw true classes along x; else along y.
    """
    cells = consolidated(matrix, class_counts)
    style: dict[str, Any] = {"side": side, "transposed": transposed, "what": "class, by its training images"}
    return draw_matrix(axes, cells, group_names(class_counts), "{:,}".format, norm or count_norm(cells), **style)


def add_count_bar(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], **place: Any) -> None:
    """Draw the colour bar of an image with count_norm().

    Args:
        figure: Figure of the axes.
        image: image whose colours are explained.
        axes: Axes that give room to the bar.
        place: other arguments of Figure.colorbar().
    """
    bar = figure.colorbar(image, ax=axes, ticks=LogLocator(subs=(1, 2, 5)), format="{x:,.0f}", **place)
    bar.minorticks_off()
    bar.set_label("test images (white: none)")


def accuracy_names(class_names: Sequence[str], class_counts: Array) -> dict[int, str]:
    """Return place -> name of up to ten classes, or place -> training images of ten groups of classes."""
    if len(class_names) > NUM_GROUPS:
        return group_names(class_counts)
    return {place: class_names[c] for place, c in enumerate(by_count(class_counts))}


def draw_accuracies(
    axes: Axes,
    names: Mapping[int, str],
    class_counts: Array,
    lines: Sequence[tuple[Array, dict[str, Any]]],
    *,
    width: float,
) -> None:
    """Draw mean accuracies of ten groups of neighbouring classes over bars of their mean training images.

    Args:
        axes: Axes to draw on.
        names: accuracy_names().
        class_counts: training images [C].
        lines: accuracy per class in per cent [C] (NaN: no test images) and line style of each line.
        width: inches that the layout will give the axes.
    """
    parts = _neighbours(class_counts)
    place = np.arange(len(parts))
    for accuracy, style in lines:
        means = np.array([np.nan if np.isnan(accuracy[p]).all() else np.nanmean(accuracy[p]) for p in parts])
        axes.plot(place, means, clip_on=False, **style)
    label_ticks(axes.xaxis, names, width / len(parts))
    axes.set_xlabel("class" if len(parts) == len(class_counts) else "class, by its training images")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    behind = axes.twinx()
    behind.bar(place, [class_counts[part].mean() for part in parts], color="0.88", width=0.85)
    behind.set_ylabel("training images", color="0.4")
    behind.tick_params(axis="y", colors="0.4")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def confusion_values(matrix: Array) -> Array:
    """Return per cent of the true class's test images predicted as the other class, per ordered pair [C (C - 1)]."""
    return row_percent(matrix)[~np.eye(len(matrix), dtype=bool)]


def draw_histograms(axes: Axes, matrices: Sequence[Array], styles: Sequence[dict[str, Any]]) -> None:
    """Draw histograms of confusion values above zero, one per matrix.

    Args:
        axes: Axes to draw on.
        matrices: test images [C, C] each.
        styles: bar style of each matrix.
    """
    values = [confusion_values(m) for m in matrices]
    largest = max(v.max(initial=0) for v in values)
    top = max(5.0, float(np.ceil(largest / 5) * 5))
    # Values are multiples of one image, so each bin spans a fixed number of images and includes its upper edge.
    image = 100 / max(1, *(m.sum(1).max() for m in matrices))
    width = image * np.ceil(top / image / _MAX_BINS)
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
    axes.set_xlabel("confusion value: % of the true class's test images predicted as the other class")
    axes.set_ylabel("ordered class pairs (log)")


_REGION_COLOURS = ("#d62728", "#9467bd", "#7f7f7f", "#e0a800", "#1f77b4", "#2ca02c", "#8c564b", "#17becf")
_POINT_MARKERS = "oD^sPvX*"  # in addition to colours, for colour-blind readers


def class_style(number: int) -> tuple[str, str]:
    """Return colour and marker of class `number` of 2-D points, which 64 classes have to themselves."""
    turns, colour = divmod(number, len(_REGION_COLOURS))
    return _REGION_COLOURS[colour], _POINT_MARKERS[(colour + turns) % len(_POINT_MARKERS)]


def draw_regions(axes: Axes, axis: Array, classes: Array) -> None:
    """Colour the background by the predicted class at each grid point.

    Args:
        axes: Axes to draw on.
        axis: ascending coordinates of the grid, in x and y [G].
        classes: predicted class at (row of y, column of x) [G, G].
    """
    axes.imshow(
        classes % len(_REGION_COLOURS),
        origin="lower",
        extent=(axis[0], axis[-1], axis[0], axis[-1]),
        cmap=ListedColormap(_REGION_COLOURS),
        vmin=-0.5,
        vmax=len(_REGION_COLOURS) - 0.5,
        alpha=0.28,
        interpolation="nearest",
    )


def draw_points(axes: Axes, points: Array, labels: Array, class_names: Sequence[str], *, size: float) -> None:
    """Draw 2-D points, rare classes larger, with an edge and on top.

    Args:
        axes: Axes to draw on.
        points: coordinates [N, 2].
        labels: class ids [N].
        class_names: C names, for the legend.
        size: area of a marker of frequent classes in square points.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    for c in by_count(counts):
        few = counts[c] < counts.max() / 2
        colour, marker = class_style(c)
        x, y = points[labels == c].T
        axes.scatter(
            x,
            y,
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
