"""Pictures hold at any size: no text overlaps another or leaves its figure; ten groups only of 20 classes or more."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers import must
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from cpmix_cli.data.longtail import group_of
from cpmix_cli.report import figure_files, panels, paper_figures, report_figures
from cpmix_cli.report.paper_figures import METHOD_STYLES, MethodResult

TITLES = {"short": "digits-lt-rho20, stage1", "long": f"{'photos-of-birds-' * 4}lt-rho200, finetune-other-test-images"}


def names_of(size: int, length: str) -> list[str]:
    return [f"c{c % 100:02}" if length == "short" else f"The name of a class WITH M {c % 1000:03}" for c in range(size)]


def example(size: int, rho: float = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A confusion matrix and long-tailed training images; numbers of the matrix are large where it shows numbers."""
    generator = np.random.Generator(np.random.Philox(seed))
    right = np.diag(generator.integers(400, 1200, size)) if size <= 12 else np.diag(generator.integers(20, 90, size))
    matrix = right + generator.poisson(40 if size <= 12 else 0.3, (size, size))
    return matrix, (5000 * (1 / rho) ** (np.arange(size) / max(1, size - 1))).astype(np.int64)


def result(method: str, size: int, length: str, rho: float = 200, seed: int = 0) -> MethodResult:
    matrix, counts = example(size, rho, seed)
    data = f"CIFAR100-LT-{rho:g}" if length == "short" else f"{'photos-of-birds-' * 4}lt-rho{rho:g}"
    return MethodResult(method, data, rho, names_of(size, length), counts, matrix, method == "CP-Mix" or seed == 7)


def of_report(size: int, length: str) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of confusion-report."""
    names, title = names_of(size, length), TITLES[length]
    matrix, counts = example(size)
    uneven = np.array([5000] * (size - 2) + [50, 5])  # medium and few have one class each
    for what, of_class in (("", counts), (", medium and few of one class", uneven)):
        groups = [group_of(int(n)) for n in of_class]
        yield f"matrix{what}", report_figures.confusion_heat_map(matrix, names, of_class, groups, title=title)
    yield "groups", report_figures.grouped_heat_map(matrix, counts, title=title)
    yield "accuracy", report_figures.class_accuracy(matrix, names, counts, title=title)
    yield "histogram", report_figures.confusion_histogram(matrix, title=title)
    axis, labels = np.linspace(-2, 2, 20), np.arange(2 * size) % size
    points, grid = np.stack([np.sin(labels), np.cos(3 * labels)], 1), np.add.outer(np.arange(20), np.arange(20)) % size
    yield "regions", report_figures.decision_regions(axis, grid, points, labels, names, title=title)


def of_paper(size: int, length: str) -> dict[str, Callable[[], Figure]]:
    """Return the functions that draw the figures 1 and 3 to 6 of the paper."""

    def several(*methods: str, seed: int = 0, rho: float = 200) -> dict[str, MethodResult]:
        return {method: result(method, size, length, rho, seed + k) for k, method in enumerate(methods)}

    def of_rho(rows: Sequence[dict[str, MethodResult]], *methods: str, numbered: bool) -> Callable[[], Figure]:
        return lambda: paper_figures.matrices_over_rho(rows, methods, numbered=numbered)

    erm, mixup, even = *several("ERM", "Mixup").values(), result("ERM", size, length, 1)
    first, second = (several("ERM", "Mixup", "Balanced Softmax", "CP-Mix", seed=seed) for seed in (0, 4))
    found: dict[str, Callable[[], Figure]] = {
        "1": lambda: paper_figures.class_distribution(erm),
        "1, balanced": lambda: paper_figures.class_distribution(even),
        "3": lambda: paper_figures.long_tailed_confusion(erm, mixup, even),
        "4, one data set": lambda: paper_figures.class_accuracies([first]),
        "4, two data sets": lambda: paper_figures.class_accuracies([first, second]),
    }
    methods = ("ERM", "Mixup", "CP-Mix")
    eight = [several(*methods, rho=200), several(*methods, rho=50), several("ERM", "CP-Mix", rho=10)]
    rhos = [several("ERM", rho=rho) for rho in (1000, 500, 200, 100, 50, 20, 10, 1)]
    for number in (5, 6):
        found[f"{number}, one run"] = of_rho([several("CP-Mix")], "CP-Mix", numbered=number == 6)
        found[f"{number}, eight runs"] = of_rho(eight, *methods, numbered=number == 6)
        found[f"{number}, eight imbalance factors"] = of_rho(rhos, "ERM", numbered=number == 6)
    few = size <= panels.MAX_NUMBERS  # the command refuses the figures 1 and 6 of more classes
    return {name: draw for name, draw in found.items() if few or name[0] in "345"}


def of_toy(rhos: list[float]) -> Figure:
    """Figure 2."""
    names, axis, points = ["red", "purple", "grey", "yellow"], np.linspace(-3, 3, 20), np.eye(2).repeat(2, 0)
    counts = np.array([1000, 1000, 50, 50])
    methods = [method for method in METHOD_STYLES if method != "Balanced Softmax"]
    runs = [
        MethodResult(method, "toy-LT-20", rho, names, counts, example(4, seed=k)[0], False)
        for k, method in enumerate(methods)
        for rho in rhos
    ]
    regions = {method: np.add.outer(axis > k - 1, 2 * (axis > 0)).astype(int) for k, method in enumerate(methods)}
    shown = {method: next(run for run in runs if run.method == method) for method in methods}
    data = (np.tile(points, (10, 1)) * 2 - 1, np.tile(np.arange(4), 10))
    return paper_figures.toy_example(data, data, axis, regions, shown, runs)


def test_texts_are_equally_wide_at_any_resolution() -> None:
    figure = Figure()
    text, widths = figure.text(0, 0.5, "aquarium_fish", fontsize=7.4), []
    for dpi in (72, 100, 150, 450):
        figure.set_dpi(dpi)
        widths.append(text.get_window_extent(RendererAgg(9, 9, dpi)).width / dpi)
    assert widths == pytest.approx([panels.inches(["aquarium_fish"], 7.4)] * 4, rel=0.01)


def faults(figure: Figure) -> list[str]:
    """Texts of a figure as encode() lays it out that overlap by more than a pixel or leave the figure."""
    figure_files.encode(figure, "png", dpi=20)
    texts: dict[Text, None] = {}
    draw = Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: texts.setdefault(text) or draw(text, renderer))
        figure.draw_without_rendering()
    drawn = [text for text in texts if text.get_visible() and text.get_text().strip()]
    low, high = (np.array([box.get_window_extent().get_points()[k] for box in drawn]) for k in (0, 1))
    outside = (low < 0).any(1) | (high > figure.bbox.size).any(1)
    shared = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).min(2)
    overlaps = [f"{drawn[a].get_text()!r} over {drawn[b].get_text()!r}" for a, b in np.argwhere(np.triu(shared > 1, 1))]
    return [*overlaps, *(f"{drawn[k].get_text()!r} is cut" for k in np.flatnonzero(outside))]


SIZES = (2, 5, 12, 13, 21, 100, 150, 151, 1000)
every_size = pytest.mark.parametrize(("size", "length"), [*product(SIZES, TITLES)])


def test_no_text_of_a_report_on_12_classes_with_long_names_overlaps_or_is_cut() -> None:
    assert {name: found for name, figure in of_report(12, "long") if (found := faults(figure))} == {}


@pytest.mark.slow
@pytest.mark.long
@every_size
def test_no_text_of_a_report_overlaps_or_is_cut(size: int, length: str) -> None:
    assert {name: found for name, figure in of_report(size, length) if (found := faults(figure))} == {}


@pytest.mark.parametrize("name", ["1", "3", "4, two data sets", "6, one run"])
def test_no_text_of_a_figure_of_12_classes_with_long_names_overlaps_or_is_cut(name: str) -> None:
    assert faults(of_paper(12, "long")[name]()) == []


@pytest.mark.slow
@pytest.mark.long
@every_size
def test_no_text_of_a_figure_overlaps_or_is_cut(size: int, length: str) -> None:
    assert {name: found for name, draw in of_paper(size, length).items() if (found := faults(draw()))} == {}


@pytest.mark.parametrize("rhos", [[20.0], [1.0, 2, 5, 10, 20, 25, 50, 100, 200, 1000]])
def test_no_text_of_figure_2_overlaps_or_is_cut(rhos: list[float]) -> None:
    assert faults(of_toy(rhos)) == []


def test_long_names_keep_both_ends() -> None:
    assert panels.elided("abcdefghij", 5) == "ab\u2026ij"
    assert panels.elided("abcdefghij", 10) == "abcdefghij"
    assert panels.elided("\u72ac" * 8, 9) == "\u72ac\u72ac\u2026\u72ac\u72ac"


def test_numbers_of_classes_are_round() -> None:
    assert panels.numbers(8) == {k: f"{k + 1}" for k in range(8)}
    assert list(panels.numbers(151).values()) == ["1", *(str(k) for k in range(10, 151, 10))]
    assert list(panels.numbers(8142, 6).values()) == ["1", "2000", "4000", "6000", "8000"]


def test_the_grouped_matrix_of_an_earlier_report_is_removed(digits_run: Path) -> None:
    folder = digits_run / "confusion" / "finetune"
    for kind in ("png", "svg"):
        shutil.copy(folder / f"class_accuracy.{kind}", folder / f"confusion_matrix_grouped.{kind}")
    must("confusion-report", "--from", digits_run, "--overwrite")
    assert sorted(path.stem for path in folder.glob("*.png")) == [
        "class_accuracy",
        "confusion_histogram",
        "confusion_matrix",
    ]
    assert not list(folder.glob("*grouped*"))
