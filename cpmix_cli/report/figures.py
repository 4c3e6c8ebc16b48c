"""Panels of figures, and the figures of confusion-report; paper_figures.py has the paper's.

Args of all functions:
    axes: matplotlib Axes to draw on.
    matrix: test images of true class (row) predicted as class (column) [C, C].
    class_names: C names.
    class_counts: training images per class [C].
    title: title of the figure.

Classes are drawn in descending order of their training images. Cells have the page's colours of confusions in light
mode (colours.py) without the palest, so that one image differs from none: cells without images are white. Equal
arrays give equal bytes. A figure is as large as its cells and names need.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.colors import ListedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.image import AxesImage
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.report.colours import colour_map, text_colour
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import counted
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import cut, on_a_line, width_of

Array = NDArray[Any]
Kind = Literal["png", "svg", "pdf"]

matplotlib.rcParams["text.parse_math"] = False  # a $ in a class name starts no formula
matplotlib.rcParams["text.hinting"] = "no_hinting"  # texts are equally wide at any resolution, so one layout fits all

MAX_NUMBERS = 12
"""Largest number of classes of a matrix with numbers in its cells."""
_MAX_NAMES = 150
_NAME_COLUMNS = 32
_MAX_TICKS = 20  # numbers on an axis without names
_MAX_IN_LEGEND = 40
_TITLE_COLUMNS = 120
_SMALL_LABEL = 6  # points; ticks would be longer than the space between smaller labels
_GAP = 0.12  # inches between texts beside each other
_SPACE_ABOVE = 0.2  # inches, of a line between axes and title
_BAR: dict[str, Any] = {"shrink": 0.8, "aspect": 30, "fraction": 0.05, "pad": 0.02}
_MAX_CELLS = 1000  # per side; more cells than pixels
_MAX_BINS = 60
_MAX_LISTED = 10  # letters in a warning
NUM_GROUPS = 10
_COLOURS = ListedColormap(colour_map("confusion")(np.linspace(0.05, 1, 256))).with_extremes(bad="white")
"""Empty cells are white, not transparent: PDF viewers draw dark seams between transparent and filled cells."""
PERCENT_TICKS = [0, 1, 5, 10, 25, 50, 75, 100]
# None: metadata that differ between equal figures
_METADATA: dict[Kind, dict[str, str | None]] = {
    "png": {"Software": "cpmix"},
    "svg": {"Creator": "cpmix", "Date": None},
    "pdf": {"Creator": "cpmix", "CreationDate": None},
}
_MARKS = (b"tEXtSoftware\x00cpmix", b"<dc:title>cpmix</dc:title>", b"/Creator (cpmix)")


def encode(figure: Figure, kind: Kind, *, dpi: float = 150) -> bytes:
    """Encode a Figure as a file. PDFs embed TrueType fonts; SVGs draw text as outlines.

    Args:
        figure: the Figure; its layout is fixed by the first call.
        kind: file format.
        dpi: resolution of a PNG. In PDF and SVG, only of matrices and point clouds.
    """
    buffer = io.BytesIO()
    with _boxes_allowed(), matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "cpmix"}):
        if figure.get_layout_engine() is not None:  # only once: a second layout for the next kind would move items
            for _ in range(2):  # the first pass may shrink axes, which changes their ticks and the size of labels
                figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return buffer.getvalue()


def is_own(data: bytes) -> bool:
    """Return whether encode() has made a file, by its metadata."""
    return any(mark in data for mark in _MARKS)


@contextmanager
def fonts_for(names: Iterable[str]) -> Iterator[None]:
    """Make and encode figures with installed fonts that have the letters of names; warn of letters that none has."""
    shown = [on_a_line(name) for name in names]
    lacking = set("".join(shown)) - _letters(findfont(FontProperties()))
    families, found = [*matplotlib.rcParams["font.family"]], _fonts_with(lacking) if lacking else {}
    while best := max(found, key=lambda family: len(found[family] & lacking), default=None):
        lacking -= found.pop(best)
        families.append(best)
        found = {family: letters for family, letters in found.items() if letters & lacking}
    if lacking:
        boxed = [name for name in shown if lacking & set(name)]
        listed = " ".join([*sorted(lacking)[:_MAX_LISTED], *(["..."] if len(lacking) > _MAX_LISTED else [])])
        console.warn(
            f"no installed font has the letters {listed} of {counted(len(boxed), 'name')}, such as {boxed[0]}: "
            "the figures have boxes in their places"
        )
    with matplotlib.rc_context({"font.family": families}):
        yield


@contextmanager
def _boxes_allowed() -> Iterator[None]:
    """Silence matplotlib's warnings of letters that the font lacks: fonts_for() warns of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _letters(font: str) -> set[str]:
    return set(map(chr, get_font(font).get_charmap()))


def _fonts_with(letters: set[str]) -> dict[str, set[str]]:
    """Return the installed families that have some of the letters, and which, by name."""
    found: dict[str, set[str]] = {}
    others = {get_font(findfont(FontProperties())).family_name, "Last Resort High-Efficiency"}  # which has only boxes
    for font in sorted(fontManager.ttflist, key=lambda font: font.name):
        if font.style == "normal" and font.weight in (400, "normal") and font.name not in others:
            with suppress(OSError, RuntimeError):  # deleted or damaged since matplotlib listed it
                found.setdefault(font.name, letters & _letters(font.fname))
    return {family: has for family, has in found.items() if has}


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
    with _boxes_allowed():
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


# -- figures of confusion-report ---------------------------------------------------------------------------------------


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
    size, numbered = len(order), len(order) <= MAX_NUMBERS
    side = 5.2 if numbered else min(13.0, 5.5 + 0.08 * size)
    named = {place: elided(class_names[c]) for place, c in enumerate(order)}
    names = named if size <= _MAX_NAMES else numbers(size)
    figure, axes = _matrix_panel(names, size, side, title, above=_SPACE_ABOVE)
    cells, number = row_percent(matrix)[np.ix_(order, order)], whole_percent if numbered else None
    image = draw_matrix(axes, cells, names, number, side=side, transposed=False)
    of_rows = [groups[c] for c in order]
    shown = [group for group in GROUPS if group in of_rows]
    firsts, widths = [of_rows.index(group) for group in shown], [inches([group], 10) for group in shown]
    for first in firsts[1:]:
        axes.axhline(first - 0.5, color="0.35", linewidth=0.8)
        axes.axvline(first - 0.5, color="0.35", linewidth=0.8)
    middles = np.add(firsts, [*firsts[1:], size]) / 2 * side / size
    for group, start in zip(shown, _apart(middles, widths, side), strict=True):
        _above(axes, group, start / side, "left")
    bar = figure.colorbar(image, ax=axes, ticks=PERCENT_TICKS, **_BAR)
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
    _, beside, below = labels_of(names, side / size)
    return _one_panel(side + beside + 1.7, side + below + 0.6, title, side, above)


def _one_panel(width: float, height: float, title: str, inside: float, above: float = 0) -> tuple[Figure, Axes]:
    """Return a figure and its axes, about `inside` inches wide, with a title and space for texts below the title.

    Title and space add to the height.
    """
    lines = wrapped(elided(title, _TITLE_COLUMNS), inside, 12)
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
    side, names = 4.8, group_names(class_counts)
    figure, axes = _matrix_panel(names, len(names), side, title)
    image = draw_grouped(axes, matrix, class_counts, side=side, transposed=False)
    add_count_bar(figure, image, axes, **_BAR)
    return figure


def class_accuracy(matrix: Array, class_names: Sequence[str], class_counts: Array, *, title: str) -> Figure:
    """Draw accuracies and training images: means of ten groups as a line, single classes as dots. Paper: Fig. 4(b, c).

    Args:
        matrix: test images [C, C].
        class_names: C names.
        class_counts: training images [C].
        title: title of the figure.
    """
    accuracy, size, width = percent_right(matrix), len(class_counts), 7.4
    names = accuracy_names([*map(elided, class_names)], class_counts)
    *_, below = labels_of(names, width / len(names))
    figure, axes = _one_panel(9, 3.8 + below, title, width)
    draw_accuracies(axes, names, class_counts, [(accuracy, {"color": "C0", "marker": "o"})], width=width)
    if size > NUM_GROUPS:
        place = (np.arange(size) + 0.5) * NUM_GROUPS / size - 0.5
        axes.plot(place, accuracy[by_count(class_counts)], ".", color="C0", alpha=0.45, markersize=4)
        axes.set_xlabel("class, by its training images (dots: classes; line: means of ten groups)")
    return figure


def confusion_histogram(matrix: Array, *, title: str) -> Figure:
    """Draw the histogram of confusion values of ordered class pairs; the title counts zeros. Paper: Fig. 3(c)."""
    values = confusion_values(matrix)
    zeros, largest = int((values == 0).sum()), values.max(initial=0)
    note = f"largest {percent(largest)} %" if largest > 0 else "no confusion"
    figure, axes = _one_panel(7, 4, title, 6, above=_SPACE_ABOVE)
    _above(axes, f"{zeros:,} of {len(values):,} pairs at zero, {note}", 0.5, "center")
    draw_histograms(axes, [matrix], [{"color": "#31688e", "edgecolor": "w", "linewidth": 0.4}])
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
    draw_regions(axes, axis, grid_classes)
    draw_points(axes, points, labels, [*map(elided, class_names)], size=7)
    markers, names = axes.get_legend_handles_labels()
    markers, names = markers[:_MAX_IN_LEGEND], names[:_MAX_IN_LEGEND]
    columns = columns_of(names, 6.2, 10)
    heading = "" if len(names) == len(class_names) else f"the {len(names)} largest of {len(class_names):,} classes"
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "title": heading}
    handles: list[Any] = figure.legend(markers, names, **place).legend_handles
    for handle in handles:  # the markers of frequent classes are too small to recognise
        handle.set(sizes=[30], alpha=1)
    figure.set_figheight(figure.get_figheight() + 0.21 * (-(-len(names) // columns) + bool(heading)))
    return figure
