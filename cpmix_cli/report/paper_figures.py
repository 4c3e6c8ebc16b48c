"""The paper's figures 1 to 6, as matplotlib Figures of a page's width (6.5 inches), from arrays.

As in the paper, and other than in confusion-report, a matrix here has the true class along x and the prediction along
y: its upper right holds minorities taken for majorities. Shapes: C classes, G groups, R imbalance factors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import product
from string import ascii_lowercase
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from cpmix_cli.report.figures import (
    PERCENT_TICKS,
    Array,
    add_count_bar,
    by_count,
    class_style,
    confusion_values,
    consolidated,
    count_norm,
    draw_cells,
    draw_group_means,
    draw_histograms,
    draw_points,
    draw_regions,
    neighbours,
    percent_norm,
    range_labels,
    row_percent,
    whole_percent,
)

WIDTH = 6.5
RHO = "\N{GREEK SMALL LETTER RHO}"
STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}
METHOD_STYLES: dict[
    str, dict[str, Any]
] = {  # Okabe and Ito's colours, which the colour-blind can tell apart; and a marker each
    "ERM": {"color": "#000000", "marker": "o"},
    "Mixup": {"color": "#0072b2", "marker": "s", "linestyle": "--"},
    "Balanced Softmax": {"color": "#e69f00", "marker": "D", "linestyle": "-."},
    "similar-pair mixup": {"color": "#009e73", "marker": "^", "linestyle": ":"},
    "CP-Mix": {"color": "#d55e00", "marker": "v"},
}

Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw with the sizes of a printed page."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def _letter(axes: Axes, letter: str, text: str) -> None:
    axes.set_title(f"({letter}) {text}", loc="left")


def _name_axes(axes: Axes, what: str = "class") -> None:
    axes.set_xlabel(f"true {what}")
    axes.set_ylabel(f"predicted {what}")


def _turn(names: Sequence[str]) -> int:
    """Degrees by which names below an axis are turned, so that they do not run into each other."""
    return 90 if max(map(len, names)) > 3 else 0


def panel_letters() -> Iterator[str]:
    """a to z, then aa, ab, ..."""
    yield from ascii_lowercase
    yield from ("".join(pair) for pair in product(ascii_lowercase, repeat=2))


# -- figure 1 ----------------------------------------------------------------------------------------------------------


@_styled
def class_distribution(matrix: Array, class_names: Sequence[str], class_counts: Array, *, data: str) -> Figure:
    """Figure 1: training images of each class, and how many of its test images are predicted as which.

    Args:
        matrix: test images of true class (row) predicted as (column) [C, C].
        class_names: C names.
        class_counts: training images [C].
        data: name of the data set.
    """
    order = by_count(class_counts)
    names, place = [class_names[c] for c in order], range(len(order))
    figure = Figure(figsize=(WIDTH, 3.15), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    bars = left.bar(place, class_counts[order], color="#31688e")
    left.bar_label(bars, [f"{n:,}" for n in class_counts[order]], fontsize=6, padding=1)
    left.set_xticks(place, names, rotation=_turn(names))
    left.set_ylabel("training images")
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.margins(x=0.03, y=0.08)
    left.spines[["top", "right"]].set_visible(False)
    _letter(left, "a", f"classes of {data}")
    cells = matrix[np.ix_(order, order)].T
    norm = PowerNorm(0.5, vmin=0, vmax=cells.max())
    numbers = [[f"{n:,}" if n else "" for n in row] for row in cells]
    image = draw_cells(right, cells, norm, numbers=numbers, fontsize=6)
    right.set_xticks(place, names, rotation=_turn(names))
    right.set_yticks(place, names)
    _name_axes(right)
    _letter(right, "b", f"predictions of ERM on {data}")
    bar = figure.colorbar(image, ax=right, pad=0.02, shrink=0.9)
    bar.set_label("test images (white: none)")
    return figure


# -- figure 2 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regions:
    """A classifier of the plane."""

    method: str
    axis: Array
    """Coordinates of both directions [N]."""
    classes: Array
    """Class at (row of y, column of x) [N, N]."""
    accuracy: float
    """Per cent of the test points."""
    confusion: int
    """Test points of a minority predicted as its similar majority."""


@dataclass(frozen=True)
class Curve:
    """A method over imbalance factors; each sequence is that of its seeds."""

    method: str
    rhos: list[float]
    """Ascending [R]."""
    accuracies: list[list[float]]
    """Per cent of the test points [R][seeds]."""
    confusions: list[list[float]]
    """Test points [R][seeds]."""


@_styled
def toy_example(
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    class_names: Sequence[str],
    regions: Sequence[Regions],
    curves: Sequence[Curve],
    *,
    rho: float,
) -> Figure:
    """Figure 2: data, decision regions under the test points, and accuracy and confusion over the imbalance factor.

    The paper's panels have the paper's letters; (f), the regions under pairs that were collected, is not in it.

    Args:
        train: points [N, 2] and labels [N] that the regions were learnt from.
        test: points and labels.
        class_names: C names.
        regions: of ERM, Mixup, fixed pairs and CP-Mix.
        curves: one a method.
        rho: of `train`.
    """
    figure = Figure(figsize=(WIDTH, 3.95), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    panels = {
        **rows[0].subplot_mosaic([["a", "b", "c", "d"]]),
        **rows[1].subplot_mosaic([["accuracy", "confusion", "f", "legend"]]),
    }
    edge = regions[0].axis[-1]
    draw_points(panels["a"], *train, class_names, size=2.5)
    _letter(panels["a"], "a", f"data ({RHO} = {rho:g})")
    for letter, region in zip("bcdf", regions, strict=True):
        axes = panels[letter]
        draw_regions(axes, region.axis, region.classes)
        draw_points(axes, *test, class_names, size=0.8)
        _letter(axes, letter, region.method)
        axes.set_xlabel(f"{region.accuracy:.1f} % right, confusion {region.confusion:,}", fontsize=6.5, labelpad=2)
        for c in range(len(class_names)):  # its marker, legible, in the middle of each class
            colour, marker = class_style(c)
            middle = test[0][test[1] == c].mean(0)
            axes.plot(*middle, color=colour, marker=marker, markersize=5, markeredgecolor="k", markeredgewidth=0.6)
    for letter in "abcdf":
        panels[letter].set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])
    _over_rho(panels["accuracy"], curves, [c.accuracies for c in curves])
    _letter(panels["accuracy"], "e", "accuracy (%)")
    _over_rho(panels["confusion"], curves, [c.confusions for c in curves])
    panels["confusion"].set_ylim(bottom=0)
    panels["confusion"].set_title("confusion (test points)", loc="left")
    counts = np.bincount(train[1], minlength=len(class_names))
    points = []
    for c, name in enumerate(class_names):
        colour, marker = class_style(c)
        label = f"{name}, {counts[c]:,} points"
        edged: dict[str, Any] = {
            "markeredgecolor": "k" if counts[c] < counts.max() / 2 else colour,
            "markeredgewidth": 0.6,
        }
        points.append(Line2D([], [], linestyle="", color=colour, marker=marker, label=label, **edged))
    lines = [Line2D([], [], label=c.method, **METHOD_STYLES[c.method]) for c in curves]
    panels["legend"].axis("off")
    panels["legend"].legend(
        handles=[*points, *lines], loc="center", frameon=False, borderaxespad=0, labelspacing=0.45, handlelength=2.6
    )
    return figure


def _over_rho(axes: Axes, curves: Sequence[Curve], values: Sequence[list[list[float]]]) -> None:
    """Means over seeds as lines, plus and minus a standard deviation as bands."""
    for curve, of_seeds in zip(curves, values, strict=True):
        means = np.array([np.mean(v) for v in of_seeds])
        spread = np.array([np.std(v, ddof=1) if len(v) > 1 else np.nan for v in of_seeds])
        style = METHOD_STYLES[curve.method]
        axes.plot(curve.rhos, means, **style)
        axes.fill_between(curve.rhos, means - spread, means + spread, color=style["color"], alpha=0.15, linewidth=0)
    rhos = sorted({rho for curve in curves for rho in curve.rhos})
    axes.set_xscale("log")
    axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"imbalance factor {RHO}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(1)


# -- figures 3 and 4 ---------------------------------------------------------------------------------------------------


@_styled
def long_tailed_confusion(
    erm: Array, mixup: Array, balanced: Array, class_counts: Array, *, data: str, balanced_data: str
) -> Figure:
    """Figure 3: matrices of ERM and Mixup in ten groups of classes, and confusion values of ERM on balanced data.

    Args:
        erm: test images [C, C], trained on the long-tailed data.
        mixup: the same.
        balanced: the same classes, trained on as many images of each.
        class_counts: training images of the long-tailed data [C].
        data: its name.
        balanced_data: name of the balanced data.
    """
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    panels = figure.subplot_mosaic([["a", "b"], ["c", "c"]], height_ratios=(3.2, 1.6))
    parts = neighbours(class_counts)
    norm = count_norm(consolidated(erm, parts), consolidated(mixup, parts))
    for letter, method, matrix in (("a", "ERM", erm), ("b", "Mixup", mixup)):
        image = _grouped(panels[letter], matrix, class_counts, norm)
        _letter(panels[letter], letter, f"{method}, {data}")
    panels["b"].set(yticklabels=[], ylabel=None)
    add_count_bar(figure, image, [panels["a"], panels["b"]], pad=0.01, shrink=0.9)
    styles: list[dict[str, Any]] = [
        {"color": "#e69f00", "edgecolor": "w", "linewidth": 0.3},
        {"color": "#31688e", "histtype": "step", "linewidth": 1.4},
    ]
    for style, name, matrix in zip(styles, (data, balanced_data), (erm, balanced), strict=True):
        style["label"] = f"{name}, largest {confusion_values(matrix).max():.0f} %"
    draw_histograms(panels["c"], [erm, balanced], styles)
    panels["c"].legend(frameon=False, loc="upper right")
    panels["c"].spines[["top", "right"]].set_visible(False)
    _letter(panels["c"], "c", "confusion values of ERM")
    return figure


def _grouped(axes: Axes, matrix: Array, class_counts: Array, norm: Any) -> Any:
    """The matrix in ten groups, their numbers of test images in the cells."""
    parts = neighbours(class_counts)
    cells = consolidated(matrix, parts).T
    image = draw_cells(axes, cells, norm, numbers=[[f"{n:,}" for n in row] for row in cells], fontsize=6)
    labels = range_labels(class_counts, parts)
    axes.set_xticks(range(len(parts)), labels, rotation=_turn(labels))
    axes.set_yticks(range(len(parts)), labels)
    _name_axes(axes, "class, by its training images")
    return image


@dataclass(frozen=True)
class ClassAccuracies:
    """Methods on one data set."""

    data: str
    class_names: list[str]
    class_counts: Array
    """Training images [C]."""
    accuracies: dict[str, Array]
    """Method -> per cent of each class's test images [C]; NaN where it has none."""
    finetuned: set[str]
    """Methods of whose networks the head was trained once more; the legend says so."""


@_styled
def class_accuracies(cpmix: Array, panels: Sequence[ClassAccuracies]) -> Figure:
    """Figure 4: the grouped matrix of CP-Mix, and accuracies of classes (or ten groups of them) beside other methods'.

    Args:
        cpmix: test images [C, C] on the first data set.
        panels: one or two data sets.
    """
    figure = Figure(figsize=(WIDTH, 3.5 if len(panels) == 1 else 4.3), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = sides
    axes = left.subplots()
    counts = panels[0].class_counts
    _grouped(axes, cpmix, counts, count_norm(consolidated(cpmix, neighbours(counts))))
    _letter(axes, "a", f"CP-Mix, {panels[0].data}")
    below = right.subplots(len(panels), 1, squeeze=False)[:, 0]
    for letter, place, panel in zip("bc", below, panels, strict=False):
        _accuracies(place, panel)
        _letter(place, letter, panel.data)
    lines = []
    for method in panels[0].accuracies:
        where = [letter for letter, panel in zip("bc", panels, strict=False) if method in panel.finetuned]
        told = "" if not where else ", finetuned" if len(where) == len(panels) else f", finetuned in ({where[0]})"
        lines.append(Line2D([], [], label=method + told, **METHOD_STYLES[method]))
    right.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _accuracies(axes: Axes, panel: ClassAccuracies) -> None:
    parts = neighbours(panel.class_counts)
    place = np.arange(len(parts))
    for method, accuracy in panel.accuracies.items():
        draw_group_means(axes, accuracy, parts, clip_on=False, **METHOD_STYLES[method])
    single = all(len(part) == 1 for part in parts)
    labels = [panel.class_names[part[0]] for part in parts] if single else range_labels(panel.class_counts, parts)
    axes.set_xticks(place, labels, rotation=_turn(labels))
    axes.set_xlabel("class" if single else "class, by its training images")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    behind = axes.twinx()
    behind.bar(place, [panel.class_counts[part].mean() for part in parts], color="0.88", width=0.85)
    behind.set_ylabel("training images", color="0.4")
    behind.tick_params(axis="y", colors="0.4")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


# -- figures 5 and 6 ---------------------------------------------------------------------------------------------------


@_styled
def matrices_over_rho(
    rows: Sequence[tuple[str, Array, dict[str, Array]]], methods: Sequence[str], class_names: Sequence[str] | None
) -> Figure:
    """Figures 5 and 6: whole matrices, a row for each data set and a column a method, in per cent of the true class.

    Args:
        rows: name of the data set, its training images [C], and each method's test images [C, C], where it has a run.
        methods: columns.
        class_names: written on the axes, and per cents in the cells; None for more classes than one can read.
    """
    width, height = WIDTH * (0.3 + len(methods)) / 3.3, 0.7 + 2.0 * len(rows)
    figure = Figure(figsize=(width, height if class_names is None else height + 0.35), layout="constrained")
    grid = figure.subplots(len(rows), len(methods), squeeze=False)
    shown = np.array([[method in matrices for method in methods] for _, _, matrices in rows])
    letters = panel_letters()
    for r, (data, class_counts, matrices) in enumerate(rows):
        order = by_count(class_counts)
        ticks = list(range(len(order))) if class_names is not None else [0, *range(19, len(order), 20)]
        names = [class_names[order[t]] if class_names is not None else f"{t + 1}" for t in ticks]
        for c, method in enumerate(methods):
            axes = grid[r, c]
            if method not in matrices:
                axes.axis("off")
                continue
            percent = row_percent(matrices[method])[np.ix_(order, order)].T
            numbers = whole_percent(np.where(percent >= 1, percent, 0)) if class_names is not None else None
            image = draw_cells(axes, percent, percent_norm(), numbers=numbers, fontsize=5.5)
            axes.set_xticks(ticks, names if not shown[r + 1 :, c].any() else [], rotation=_turn(names))
            axes.set_yticks(ticks, names if not shown[r, :c].any() else [])
            title = f"{method}, {data}"  # beside names of classes there is room for about 20 letters
            _letter(axes, next(letters), title if class_names is None or len(title) <= 20 else f"{method},\n{data}")
    figure.supxlabel("true class, most training images first", fontsize=7.5)
    figure.supylabel("predicted class, most training images first", fontsize=7.5)
    bar = figure.colorbar(
        image, ax=grid, location="top", ticks=PERCENT_TICKS, aspect=50, shrink=0.8, fraction=0.03, pad=0.01
    )
    bar.set_label("% of the true class (white: none)")
    return figure
