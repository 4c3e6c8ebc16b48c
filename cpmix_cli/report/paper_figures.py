"""The paper's figures 1 to 6, drawn from arrays as matplotlib Figures 6.5 inches wide.

As in the paper, and unlike confusion-report, matrices are drawn with the true class along x and the predicted class
along y. So the upper right shows minorities predicted as majorities. Shapes: C classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from cpmix_cli.data.sources import TOY_SIMILAR
from cpmix_cli.report import figures
from cpmix_cli.report.figures import Array, by_count, draw_grouped, draw_matrix, draw_points, whole_percent
from cpmix_cli.report.rounding import percent

_WIDTH = 6.5
_SMALL = 6  # font size of numbers in cells, points
_RHO = "\N{GREEK SMALL LETTER RHO}"
_printed = matplotlib.rc_context(
    {
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
)
"""Decorator that sets the font and line sizes of a printed page."""
# Okabe and Ito's colours, which are colour-blind safe
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "ERM": {"color": "#000000", "marker": "o"},
    "Mixup": {"color": "#0072b2", "marker": "s", "linestyle": "--"},
    "Balanced Softmax": {"color": "#e69f00", "marker": "D", "linestyle": "-."},
    "similar-pair mixup": {"color": "#009e73", "marker": "^", "linestyle": ":"},
    "CP-Mix": {"color": "#d55e00", "marker": "v"},
}


@dataclass(frozen=True)
class MethodResult:
    """Test results of one run of a method."""

    method: str
    """Key of METHOD_STYLES."""
    data: str
    """Name of the data set in figures."""
    rho: float
    class_names: list[str]
    class_counts: Array
    matrix: Array
    finetuned: bool

    @property
    def accuracy(self) -> float:
        """Accuracy in per cent of the test images."""
        return 100 * float(self.matrix.trace()) / float(self.matrix.sum())

    @property
    def similar_confusion(self) -> int:
        """Toy data: number of test points of minorities predicted as their similar majority. Paper: Fig. 2(e)."""
        return sum(int(self.matrix[minority, majority]) for minority, majority in TOY_SIMILAR.items())


def _letter(axes: Axes, letter: str, text: str) -> None:
    axes.set_title(f"({letter}) {text}", loc="left")


def panel_letters() -> Iterator[str]:
    """Yield a to z, then aa, ab, ..."""
    yield from ascii_lowercase
    yield from map("".join, product(ascii_lowercase, repeat=2))


# -- figure 1 ----------------------------------------------------------------------------------------------------------


@_printed
def class_distribution(erm: MethodResult) -> Figure:
    """Draw figure 1: training images per class, and the confusion matrix of ERM in test images."""
    order = by_count(erm.class_counts)
    names, place = [erm.class_names[c] for c in order], range(len(order))
    figure = Figure(figsize=(_WIDTH, 3.15), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    bars = left.bar(place, erm.class_counts[order], color="#31688e")
    left.bar_label(bars, [f"{n:,}" for n in erm.class_counts[order]], fontsize=6, padding=1)
    left.set_xticks(place, names, rotation=figures.turn(names))
    left.set_ylabel("training images")
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.margins(x=0.03, y=0.08)
    left.spines[["top", "right"]].set_visible(False)
    _letter(left, "a", f"classes of {erm.data}")
    cells, norm = erm.matrix[np.ix_(order, order)], PowerNorm(0.5, vmin=0, vmax=erm.matrix.max())

    image = draw_matrix(
        right, cells, dict(enumerate(names)), lambda n: f"{n:,}" if n else "", norm, transposed=True, fontsize=_SMALL
    )
    _letter(right, "b", f"predictions of ERM on {erm.data}")
    bar = figure.colorbar(image, ax=right, pad=0.02, shrink=0.9)
    bar.set_label("test images (white: none)")
    return figure


# -- figure 2 ----------------------------------------------------------------------------------------------------------


@_printed
def toy_example(
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    axis: Array,
    regions: Mapping[str, Array],
    shown: Mapping[str, MethodResult],
    results: Sequence[MethodResult],
) -> Figure:
    """Draw figure 2: data, decision regions with test points, and accuracy and confusion over the imbalance factor.

    Letters are the paper's; (f), the regions of CP-Mix with collected pairs, is not in the paper.

    Args:
        train: training points [N, 2] and labels [N] of the runs in `shown`.
        test: test points [N, 2] and labels [N].
        axis: ascending coordinates of the grid, in x and y [G].
        regions: per method (ERM, Mixup, similar-pair mixup, CP-Mix) the predicted class at (row of y, column of x)
            [G, G].
        shown: per method, the run whose regions are drawn.
        results: all runs, of several imbalance factors and seeds.
    """
    figure = Figure(figsize=(_WIDTH, 3.95), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    panels = {
        **rows[0].subplot_mosaic([["a", "b", "c", "d"]]),
        **rows[1].subplot_mosaic([["accuracy", "confusion", "f", "legend"]]),
    }
    edge, class_names = axis[-1], results[0].class_names
    draw_points(panels["a"], *train, class_names, size=2.5)
    _letter(panels["a"], "a", f"data ({_RHO} = {next(iter(shown.values())).rho:g})")
    for letter, (method, classes) in zip("bcdf", regions.items(), strict=True):
        axes = panels[letter]
        figures.draw_regions(axes, axis, classes)
        draw_points(axes, *test, class_names, size=0.8)
        _letter(axes, letter, method)
        numbers = f"{percent(shown[method].accuracy, 1)} % right, confusion {shown[method].similar_confusion:,}"
        axes.set_xlabel(numbers, fontsize=6.5, labelpad=2)
        for c in range(len(class_names)):  # a larger marker in the middle of each class
            colour, marker = figures.class_style(c)
            middle = test[0][test[1] == c].mean(0)
            axes.plot(*middle, color=colour, marker=marker, markersize=5, markeredgecolor="k", markeredgewidth=0.6)
    for letter in "abcdf":
        panels[letter].set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])
    _over_rho(panels["accuracy"], results, lambda result: result.accuracy)
    _letter(panels["accuracy"], "e", "accuracy (%)")
    _over_rho(panels["confusion"], results, lambda result: result.similar_confusion)
    panels["confusion"].set_ylim(bottom=0)
    panels["confusion"].set_title("confusion (test points)", loc="left")
    counts = np.bincount(train[1], minlength=len(class_names))
    points = []
    for c, name in enumerate(class_names):
        colour, marker = figures.class_style(c)
        label = f"{name}, {counts[c]:,} points"
        edges: Any = {"markeredgecolor": "k" if counts[c] < counts.max() / 2 else colour, "markeredgewidth": 0.6}
        points.append(Line2D([], [], linestyle="", color=colour, marker=marker, label=label, **edges))
    lines = [Line2D([], [], label=method, **METHOD_STYLES[method]) for method in regions]
    panels["legend"].axis("off")
    panels["legend"].legend(
        handles=[*points, *lines], loc="center", frameon=False, borderaxespad=0, labelspacing=0.45, handlelength=2.6
    )
    return figure


def _over_rho(axes: Axes, results: Sequence[MethodResult], value: Callable[[MethodResult], float]) -> None:
    """Draw means over seeds as lines, and plus and minus one standard deviation as bands."""
    rhos = sorted({result.rho for result in results})
    for method in dict.fromkeys(result.method for result in results):
        values = pd.Series([value(r) for r in results if r.method == method])
        seeds = values.groupby([r.rho for r in results if r.method == method])
        means, spread = seeds.mean(), seeds.std()
        style = METHOD_STYLES[method]
        axes.plot(means.index, means, **style)
        axes.fill_between(means.index, means - spread, means + spread, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"imbalance factor {_RHO}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(1)


# -- figures 3 and 4 ---------------------------------------------------------------------------------------------------


@_printed
def long_tailed_confusion(erm: MethodResult, mixup: MethodResult, balanced: MethodResult) -> Figure:
    """Draw figure 3: grouped matrices of ERM and Mixup, and confusion values of ERM on long-tailed and balanced data.

    Args:
        erm: ERM on long-tailed data.
        mixup: Mixup on the same data.
        balanced: ERM on balanced data of the same classes.
    """
    figure = Figure(figsize=(_WIDTH, 5.5), layout="constrained")
    panels = figure.subplot_mosaic([["a", "b"], ["c", "c"]], height_ratios=(3.2, 1.6))
    norm = figures.count_norm(*(figures.consolidated(one.matrix, erm.class_counts) for one in (erm, mixup)))
    for letter, result in (("a", erm), ("b", mixup)):
        image = draw_grouped(panels[letter], result.matrix, erm.class_counts, norm, transposed=True, fontsize=_SMALL)
        _letter(panels[letter], letter, f"{result.method}, {erm.data}")
    panels["b"].set(yticklabels=[], ylabel=None)
    figures.add_count_bar(figure, image, [panels["a"], panels["b"]], pad=0.01, shrink=0.9)
    labels = [f"{r.data}, largest {percent(figures.confusion_values(r.matrix).max())} %" for r in (erm, balanced)]
    styles: list[dict[str, Any]] = [
        {"color": "#e69f00", "edgecolor": "w", "linewidth": 0.3, "label": labels[0]},
        {"color": "#31688e", "histtype": "step", "linewidth": 1.4, "label": labels[1]},
    ]
    figures.draw_histograms(panels["c"], [erm.matrix, balanced.matrix], styles)
    panels["c"].legend(frameon=False, loc="upper right")
    panels["c"].spines[["top", "right"]].set_visible(False)
    _letter(panels["c"], "c", "confusion values of ERM")
    return figure


@_printed
def class_accuracies(panels: Sequence[Mapping[str, MethodResult]]) -> Figure:
    """Draw figure 4: the grouped matrix of CP-Mix, and accuracies per class or group of the methods.

    `panels` has method -> result for one or two data sets; the matrix is of the first.
    """
    figure = Figure(figsize=(_WIDTH, 3.5 if len(panels) == 1 else 4.3), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = sides
    axes, cpmix = left.subplots(), panels[0]["CP-Mix"]
    draw_grouped(axes, cpmix.matrix, cpmix.class_counts, transposed=True, fontsize=_SMALL)
    _letter(axes, "a", f"CP-Mix, {cpmix.data}")
    below = right.subplots(len(panels), 1, squeeze=False)[:, 0]
    for letter, place, panel in zip("bc", below, panels, strict=False):
        of_data = panel["CP-Mix"]
        drawn = [(figures.percent_right(result.matrix), METHOD_STYLES[method]) for method, result in panel.items()]
        figures.draw_accuracies(place, of_data.class_names, of_data.class_counts, drawn)
        _letter(place, letter, of_data.data)
    lines = []
    for method in panels[0]:
        where = [letter for letter, panel in zip("bc", panels, strict=False) if panel[method].finetuned]
        note = "" if not where else ", finetuned" if len(where) == len(panels) else f", finetuned in ({where[0]})"
        lines.append(Line2D([], [], label=method + note, **METHOD_STYLES[method]))
    right.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
    return figure


# -- figures 5 and 6 ---------------------------------------------------------------------------------------------------


@_printed
def matrices_over_rho(rows: Sequence[Mapping[str, MethodResult]], methods: Sequence[str], *, numbered: bool) -> Figure:
    """Draw figures 5 and 6: confusion matrices in per cent of the true class, a row per data set, a column per method.

    Args:
        rows: method -> result, per data set; a missing method leaves its place empty.
        methods: methods in the order of the columns.
        numbered: for few classes: show class names and percentages in cells.
    """
    width, height = _WIDTH * (0.3 + len(methods)) / 3.3, 0.7 + 2.0 * len(rows)
    figure = Figure(figsize=(width, height + 0.35 if numbered else height), layout="constrained")
    grid = figure.subplots(len(rows), len(methods), squeeze=False)
    shown = np.array([[method in row for method in methods] for row in rows])
    letters = panel_letters()
    number = (lambda value: whole_percent(value) if value >= 1 else "") if numbered else None
    for r, row in enumerate(rows):
        first = next(iter(row.values()))
        order = by_count(first.class_counts)
        ticks = range(len(order)) if numbered else [0, *range(19, len(order), 20)]
        names = {t: first.class_names[order[t]] if numbered else f"{t + 1}" for t in ticks}
        for c, method in enumerate(methods):
            axes = grid[r, c]
            if method not in row:
                axes.axis("off")
                continue
            cells = figures.row_percent(row[method].matrix)[np.ix_(order, order)]
            image = draw_matrix(axes, cells, names, number, transposed=True, fontsize=5.5)
            axes.set(xlabel=None, ylabel=None)
            if shown[r + 1 :, c].any():
                axes.set_xticklabels([])
            if shown[r, :c].any():
                axes.set_yticklabels([])
            title = f"{method}, {first.data}"  # next to class names, about 20 letters fit
            _letter(axes, next(letters), f"{method},\n{first.data}" if numbered and len(title) > 20 else title)
    figure.supxlabel("true class, most training images first", fontsize=7.5)
    figure.supylabel("predicted class, most training images first", fontsize=7.5)
    bar = figure.colorbar(
        image, ax=grid, location="top", ticks=figures.PERCENT_TICKS, aspect=50, shrink=0.8, fraction=0.03, pad=0.01
    )
    bar.set_label("% of the true class (white: none)")
    return figure
