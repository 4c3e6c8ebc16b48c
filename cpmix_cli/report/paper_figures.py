"""The paper's figures 1 to 6, drawn from arrays as matplotlib Figures 6.5 inches wide, or less for a single matrix.

Long names are elided, and figures are as high as the names need. As in the paper, and unlike confusion-report,
matrices are drawn with the true class along x and the predicted class along y. So the upper right shows minorities
predicted as majorities. Shapes: C classes.
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
from cpmix_cli.report.panels import (
    PERCENT_TICKS,
    Array,
    accuracy_names,
    add_count_bar,
    by_count,
    class_style,
    columns_of,
    confusion_values,
    consolidated,
    count_norm,
    draw_accuracies,
    draw_grouped,
    draw_histograms,
    draw_matrix,
    draw_points,
    draw_regions,
    elided,
    inches,
    label_ticks,
    labels_of,
    numbers,
    percent_right,
    row_percent,
    whole_percent,
    wrapped,
)
from cpmix_cli.runtime.rounding import percent

_WIDTH = 6.5
_NAME_COLUMNS = 14  # of class names
_TITLE_COLUMNS = 24  # of names of data sets
_MAX_BESIDE = 3  # panels of figures 5 and 6 beside each other, if there is one method
_LARGEST_SIDE = 2.6  # of their matrices in inches
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
    def title(self) -> str:
        """Name of the data set for titles and legends."""
        return elided(self.data, _TITLE_COLUMNS)

    @property
    def names(self) -> list[str]:
        """Class names for axes."""
        return [elided(name, _NAME_COLUMNS) for name in self.class_names]

    @property
    def accuracy(self) -> float:
        """Accuracy in per cent of the test images."""
        return 100 * float(self.matrix.trace()) / float(self.matrix.sum())

    @property
    def similar_confusion(self) -> int:
        """Toy data: number of test points of minorities predicted as their similar majority. Paper: Fig. 2(e)."""
        return sum(int(self.matrix[minority, majority]) for minority, majority in TOY_SIMILAR.items())


def _letter(axes: Axes, letter: str, text: str, width: float = 2.3) -> None:
    axes.set_title(wrapped(f"({letter}) {text}", width, 8), loc="left")


def panel_letters() -> Iterator[str]:
    """Yield a to z, then aa, ab, ..."""
    yield from ascii_lowercase
    yield from map("".join, product(ascii_lowercase, repeat=2))


# -- figure 1 ----------------------------------------------------------------------------------------------------------


@_printed
def class_distribution(erm: MethodResult) -> Figure:
    """Draw figure 1: training images per class, and the confusion matrix of ERM in test images."""
    order = by_count(erm.class_counts)
    names = {place: erm.names[c] for place, c in enumerate(order)}
    counts = [f"{n:,}" for n in erm.class_counts[order]]
    width, side = 2.0, 2.3  # of the bars and of the matrix in inches, at least
    *_, below = labels_of(names, width / len(names))
    figure = Figure(figsize=(_WIDTH, 3.0 + below), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    bars = left.bar(list(names), erm.class_counts[order], color="#31688e")
    upright = inches(counts, 6) > 0.9 * width / len(names)
    left.bar_label(bars, counts, fontsize=6, padding=1, rotation=90 if upright else 0)
    label_ticks(left.xaxis, names, width / len(names))
    left.set_ylabel("training images")
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.margins(x=0.03, y=0.15 if upright else 0.08)
    left.spines[["top", "right"]].set_visible(False)
    _letter(left, "a", f"classes of {erm.title}")
    cells, norm = erm.matrix[np.ix_(order, order)], PowerNorm(0.5, vmin=0, vmax=erm.matrix.max())
    image = draw_matrix(right, cells, names, lambda n: f"{n:,}" if n else "", norm, side=side, transposed=True)
    _letter(right, "b", f"predictions of ERM on {erm.title}")
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
    edge, class_names = axis[-1], results[0].names
    draw_points(panels["a"], *train, class_names, size=2.5)
    _letter(panels["a"], "a", f"data ({_RHO} = {next(iter(shown.values())).rho:g})")
    for letter, (method, classes) in zip("bcdf", regions.items(), strict=True):
        axes = panels[letter]
        draw_regions(axes, axis, classes)
        draw_points(axes, *test, class_names, size=0.8)
        _letter(axes, letter, method)
        numbers = f"{percent(shown[method].accuracy, 1)} % right, confusion {shown[method].similar_confusion:,}"
        axes.set_xlabel(numbers, fontsize=6.5, labelpad=2)
        for c in range(len(class_names)):  # a larger marker in the middle of each class
            colour, marker = class_style(c)
            middle = test[0][test[1] == c].mean(0)
            axes.plot(*middle, color=colour, marker=marker, markersize=5, markeredgecolor="k", markeredgewidth=0.6)
    for letter in "abcdf":
        panels[letter].set(xlim=(-edge, edge), ylim=(-edge, edge), xticks=[], yticks=[])
    _over_rho(panels["accuracy"], results, lambda result: result.accuracy)
    _letter(panels["accuracy"], "e", "accuracy (%)")
    _over_rho(panels["confusion"], results, lambda result: result.similar_confusion)
    panels["confusion"].set_ylim(0, 1.08 * max(1, *(result.similar_confusion for result in results)))
    panels["confusion"].set_title("confusion (test points)", loc="left")
    counts = np.bincount(train[1], minlength=len(class_names))
    points = []
    for c, name in enumerate(class_names):
        colour, marker = class_style(c)
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
    axes.set_xticks(rhos, _with_room(rhos, 1.1))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"imbalance factor {_RHO}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(1)


def _with_room(rhos: Sequence[float], length: float) -> list[str]:
    """Return the labels of ascending ticks on a logarithmic axis of `length` inches; "" where they would overlap."""
    labels, free = [], -np.inf
    for rho in rhos:
        label = f"{rho:g}"
        place = length * np.log(rho / rhos[0]) / max(1, np.log(rhos[-1] / rhos[0]))
        half = inches([label], 6.5) / 2
        labels.append(label if place - half > free else "")
        free = place + half + 0.05 if labels[-1] else free
    return labels


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
    norm = count_norm(*(consolidated(one.matrix, erm.class_counts) for one in (erm, mixup)))
    for letter, result in (("a", erm), ("b", mixup)):
        image = draw_grouped(panels[letter], result.matrix, erm.class_counts, norm, side=2.2, transposed=True)
        _letter(panels[letter], letter, f"{result.method}, {erm.title}")
    panels["b"].set(yticklabels=[], ylabel=None)
    add_count_bar(figure, image, [panels["a"], panels["b"]], pad=0.01, shrink=0.9)
    labels = [f"{r.title}, largest {percent(confusion_values(r.matrix).max())} %" for r in (erm, balanced)]
    styles: list[dict[str, Any]] = [
        {"color": "#e69f00", "edgecolor": "w", "linewidth": 0.3, "label": labels[0]},
        {"color": "#31688e", "histtype": "step", "linewidth": 1.4, "label": labels[1]},
    ]
    draw_histograms(panels["c"], [erm.matrix, balanced.matrix], styles)
    panels["c"].legend(frameon=False, loc="upper right")
    panels["c"].spines[["top", "right"]].set_visible(False)
    _letter(panels["c"], "c", "confusion values of ERM")
    return figure


@_printed
def class_accuracies(panels: Sequence[Mapping[str, MethodResult]]) -> Figure:
    """Draw figure 4: the grouped matrix of CP-Mix, and accuracies per class or group of the methods.

    `panels` has method -> result for one or two data sets; the matrix is of the first.
    """
    width = 2.1  # of the accuracies in inches, at least
    names = [accuracy_names(panel["CP-Mix"].names, panel["CP-Mix"].class_counts) for panel in panels]
    below = sum(labels_of(of_axes, width / len(of_axes))[2] for of_axes in names)
    figure = Figure(figsize=(_WIDTH, (3.0 if len(panels) == 1 else 4.0) + below), layout="constrained")
    sides: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = sides
    axes, cpmix = left.subplots(), panels[0]["CP-Mix"]
    draw_grouped(axes, cpmix.matrix, cpmix.class_counts, side=2.2, transposed=True)
    _letter(axes, "a", f"CP-Mix, {cpmix.title}")
    places = right.subplots(len(panels), 1, squeeze=False)[:, 0]
    for letter, place, panel, of_axes in zip("bc", places, panels, names, strict=False):
        of_data = panel["CP-Mix"]
        drawn = [(percent_right(result.matrix), METHOD_STYLES[method]) for method, result in panel.items()]
        draw_accuracies(place, of_axes, of_data.class_counts, drawn, width=width)
        _letter(place, letter, of_data.title)
    lines = []
    for method in panels[0]:
        where = [letter for letter, panel in zip("bc", panels, strict=False) if panel[method].finetuned]
        note = "" if not where else ", finetuned" if len(where) == len(panels) else f", finetuned in ({where[0]})"
        lines.append(Line2D([], [], label=method + note, **METHOD_STYLES[method]))
    columns = columns_of([str(line.get_label()) for line in lines], 2.9, 7)
    right.legend(handles=lines, loc="outside upper center", ncols=columns, frameon=False)
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
    grid = [[row.get(method) for method in methods] for row in rows]
    if len(methods) == 1:  # a column would be higher than a page
        alone = [one for (one,) in grid]
        grid = [alone[k : k + _MAX_BESIDE] for k in range(0, len(alone), _MAX_BESIDE)]
    placed = {(r, c): one for r, row in enumerate(grid) for c, one in enumerate(row) if one is not None}
    names = {place: _tick_names(one, numbered=numbered) for place, one in placed.items()}
    # A panel leaves out names that the panel below it or to its left has.
    named_x = {(r, c) for r, c in placed if all(names[r, c] != names.get((k, c)) for k in range(r + 1, len(grid)))}
    named_y = {(r, c) for r, c in placed if all(names[r, c] != names.get((r, k)) for k in range(c))}
    columns, num_classes = 1 + max(c for _, c in placed), len(next(iter(placed.values())).class_names)
    beside = max(labels_of(one, _LARGEST_SIDE / num_classes)[1] for one in names.values())
    beside *= len({c for _, c in named_y})
    side = min(_LARGEST_SIDE, (_WIDTH - 0.5 - beside) / columns - 0.1)
    below = max(labels_of(one, side / num_classes)[2] for one in names.values())
    below *= len({r for r, _ in named_x})
    titles = {
        place: wrapped(f"({letter}) {one.method}, {one.title}", side, 8)
        for letter, (place, one) in zip(panel_letters(), placed.items(), strict=False)
    }
    lines = 1 + max(title.count("\n") for title in titles.values())
    height = 0.85 + below + len(grid) * (side + 0.1 + 0.15 * lines)
    figure = Figure(figsize=(0.5 + beside + columns * (side + 0.1), height), layout="constrained")
    panels = figure.subplots(len(grid), columns, squeeze=False)
    number = (lambda value: whole_percent(value) if value >= 1 else "") if numbered else None
    for place, axes in np.ndenumerate(panels):
        if place not in placed:
            axes.axis("off")
            continue
        order = by_count(placed[place].class_counts)
        cells = row_percent(placed[place].matrix)[np.ix_(order, order)]
        image = draw_matrix(axes, cells, names[place], number, side=side, transposed=True)
        axes.set(xlabel=None, ylabel=None)
        axes.set_title(titles[place], loc="left")
        axes.tick_params(labelbottom=place in named_x, labelleft=place in named_y)
    figure.supxlabel("true class, most training images first", fontsize=7.5)
    figure.supylabel("predicted class, most training images first", fontsize=7.5)
    bar = figure.colorbar(
        image, ax=panels, location="top", ticks=PERCENT_TICKS, aspect=50, shrink=0.8, fraction=0.03, pad=0.01
    )
    bar.set_label("% of the true class (white: none)")
    return figure


def _tick_names(one: MethodResult, *, numbered: bool) -> dict[int, str]:
    if not numbered:
        return numbers(len(one.names), 6)
    return {place: one.names[c] for place, c in enumerate(by_count(one.class_counts))}
