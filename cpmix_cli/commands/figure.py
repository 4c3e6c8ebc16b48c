"""figure: the paper's figures 1 to 6 from run folders. Reads evaluations' predictions; trains nothing.

A run's place in a figure is what it is, not where it stands on the command line: its method is what the recipe of its
phase minimises, its imbalance factor the data set's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpmix_cli.artifacts.files import make_folder, publish, read_bytes, sweep
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.sources import TOY_SIMILAR
from cpmix_cli.evaluation.accuracy import class_accuracy
from cpmix_cli.evaluation.prediction import predicted_regions
from cpmix_cli.evaluation.saved import POST_HOC, matrix_of, read_predictions
from cpmix_cli.flags import FigureOptions
from cpmix_cli.recipe.loading import recipe_names
from cpmix_cli.recipe.schema import Evaluation, Recipe, Stage, changed
from cpmix_cli.report import paper_figures
from cpmix_cli.report.figures import MAX_NUMBERS, Array, Kind, encode, warn_of_boxes
from cpmix_cli.results.comparison import epochs_to
from cpmix_cli.runs import folders as runs
from cpmix_cli.runs.folders import PhaseFolder, beside, choose_phase, locate
from cpmix_cli.runs.run_json import PHASES
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # at run time after cpmix_cli.report, which quietens matplotlib's warnings

KINDS: tuple[Kind, ...] = ("pdf", "svg", "png")
DPI = 450  # of a PNG, and of the pixels within the others

_CROSS_ENTROPY, _BALANCED = ({"draw": "natural", "loss": loss} for loss in ("cross-entropy", "balanced-softmax"))
_MIXUP = {**_CROSS_ENTROPY, "partner": "permutation", "ratio": "beta", "mix": "linear", "label": "lambda"}
_MIX = {**_MIXUP, "label": "imbalance-aware"}
METHODS: dict[str, tuple[str, list[dict[str, str]]]] = {
    "ERM": ("cross-entropy", [_CROSS_ENTROPY]),
    "Mixup": ("mixup", [_MIXUP]),
    "Balanced Softmax": ("balanced-softmax", [_BALANCED]),
    "similar-pair mixup": ("fixed-pairs", [_CROSS_ENTROPY, {**_MIXUP, "partner": "fixed"}]),
    "CP-Mix": ("cpmix", [_BALANCED, {**_MIX, "draw": "class-uniform", "partner": "confusion"}, _MIX]),
}
"""Method -> its recipe of each data set; draw and functions of each term that it minimises, whatever their parameters.
"""

SOURCE_TITLES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
    "toy": "toy",
}
TOY_RHO = 20.0  # of the paper's panels: 1,000 and 50 points


@dataclass(frozen=True)
class Run:
    """An evaluated phase that has a place in a figure."""

    source: PhaseFolder
    method: str
    recipe: Recipe
    dataset: Dataset
    figure: str

    @cached_property
    def matrix(self) -> torch.Tensor:
        """Test images of true class (row) predicted as (column) [C, C].

        Raises:
            InputError: the phase was not evaluated, or files are damaged.
        """
        evaluation = self.source.run / "evaluation" / self.source.phase
        table, _ = read_predictions(evaluation, self.source, self.dataset.num_classes, needed_by=self.figure)
        return matrix_of(table, self.dataset.num_classes)

    @property
    def cells(self) -> Array:
        """`matrix` as an array."""
        return self.matrix.numpy()

    @property
    def accuracy(self) -> float:
        """Per cent of the test images."""
        return 100 * float(self.matrix.diagonal().sum()) / float(self.matrix.sum())

    @property
    def counts(self) -> Array:
        """Training images [C]."""
        return self.dataset.class_counts

    @property
    def rho(self) -> float:
        """Imbalance factor: the one built for, else the largest class over the smallest."""
        recorded = self.dataset.record["rho"]
        return float(recorded) if recorded is not None else float(self.counts.max() / self.counts.min())

    @property
    def data(self) -> str:
        """The data set as the paper writes it: CIFAR100-LT-200, balanced CIFAR100."""
        title = SOURCE_TITLES.get(self.dataset.record["source"])
        if title is None:
            return self.dataset.name
        return f"balanced {title}" if is_balanced(self) else f"{title}-LT-{self.rho:g}"


@dataclass(frozen=True)
class Drawn:
    """A figure and the runs in it."""

    figure: "Figure"
    panels: list[tuple[str, Run]]
    """What each run is shown as: letter, or "(e)" for all of a curve."""


def run(options: FigureOptions) -> None:
    """Draw a figure and publish it.

    Raises:
        UsageError: an --out that is no picture.
        InputError: a run that the figure needs is missing, not evaluated, of other data, or given twice.
        EnvironmentFault: an --out exists already, with another content, or cannot be written.
    """
    outs = options.out or [Path(f"figure{options.number}.pdf")]
    kinds = [_kind(out) for out in outs]
    found = read_runs(options)
    drawn = FIGURES[options.number](options, found)
    warn_unused(found, drawn.panels)
    warn_of_boxes(drawn.panels[0][1].dataset.class_names)
    files = {out: encode(drawn.figure, kind, dpi=DPI) for out, kind in zip(outs, kinds, strict=True)}
    new = {out: data for out, data in files.items() if not out.is_file() or read_bytes(out) != data}
    for out in new:
        if out.exists() and not options.overwrite:
            raise EnvironmentFault(
                f"{out} exists and is not this figure", fix="write elsewhere, or replace it with --overwrite"
            )
    for out, data in new.items():
        make_folder(out.parent)
        sweep(out)
        publish(out, data)
    report(options, drawn, list(files), "done" if new else "up to date")


def _kind(out: Path) -> Kind:
    for kind in KINDS:
        if out.suffix.lower() == f".{kind}":
            return kind
    raise UsageError(f"--out {out}: the name ends in .{', .'.join(KINDS)}", needed_by="figure")


def read_runs(options: FigureOptions) -> list[Run]:
    """The runs that are of one of METHODS; others are told.

    Raises:
        InputError: a folder is no run, has no finished phase, or its data set is not found.
    """
    found = []
    for folder in options.folders:
        root, named = locate(folder, needed_by=options.name)
        source = choose_phase(root, named, PHASES, needed_by=options.name)
        recipe = source.recipe()
        method = method_of(recipe, source.phase)
        if method is None:
            console.warn(f"{source.path} is not used: it is none of {', '.join(METHODS)}")
            continue
        if source.phase == "finetune" and method != "CP-Mix":
            console.warn(f"{source.path} is finetuned, which the paper's {method} is not: {root}/PHASE names a phase")
        found.append(Run(source, method, recipe, find_dataset(options, source), options.name))
    return found


def method_of(recipe: Recipe, phase: str) -> str | None:
    """The method of METHODS by which a phase's network was trained, or None.

    A finetune of CP-Mix's kind is of the method that it took; another kind (cRT) makes another method, and so do the
    first of two stages, several experts, an evaluation after the fact, and confusions of other images than the training
    batches'.
    """
    plain = Evaluation()
    if phase == "stage1" and recipe.stage2 is not None:
        return None
    if recipe.model.experts > 1 or recipe.confusion.source != "train":
        return None
    if any(getattr(recipe.evaluation, key) != getattr(plain, key) for key in POST_HOC):
        return None
    if phase == "finetune":
        tuned = recipe.finetune
        if tuned is None or (tuned.head, tuned.batchnorm, signature(tuned)) != ("keep", "frozen", FINETUNE):
            return None
    stage = recipe.stage2 if recipe.stage2 is not None else recipe.stage1
    return next((name for name, (_, terms) in METHODS.items() if signature(stage) == in_order(terms)), None)


def signature(stage: Stage) -> list[list[tuple[str, str]]]:
    """Draw and functions of each term that counts."""
    return in_order([{"draw": term.draw, **term.functions} for term in stage.terms.values() if term.weight > 0])


def in_order(terms: Sequence[dict[str, str]]) -> list[list[tuple[str, str]]]:
    """Terms in an order that does not depend on their names."""
    return sorted(sorted(term.items()) for term in terms)


FINETUNE = in_order([{"draw": "class-uniform", "loss": "cross-entropy"}])


def find_dataset(options: FigureOptions, source: PhaseFolder) -> Dataset:
    """A run's data set: a --data with its fingerprint, else where the run recorded it.

    Raises:
        InputError: it is not found.
    """
    record = source.record()
    for folder in options.data:
        found = open_dataset(folder, needed_by="--data")
        if found.fingerprint == record["dataset"]["fingerprint"]:
            return found
    return runs.find_dataset(source.run, record, None, needed_by=options.name)


# -- which run goes where ----------------------------------------------------------------------------------------------


def is_balanced(run: Run) -> bool:
    """All classes have as many training images."""
    return bool(run.counts.max() == run.counts.min())


def by_data(found: Sequence[Run]) -> list[list[Run]]:
    """Runs of the same training images together, in the order of their first.

    Raises:
        InputError: two data sets differ and look the same in a figure.
    """
    groups: dict[str, list[Run]] = {}
    for one in found:
        groups.setdefault(one.dataset.fingerprint, []).append(one)
    titles: dict[str, Run] = {}
    for group in groups.values():
        if (other := titles.setdefault(group[0].data, group[0])) is not group[0]:
            raise InputError(
                f"{other.source.run} and {group[0].source.run} are of different subsets of {group[0].data}",
                needed_by=group[0].figure,
                fix="give runs of one of the two",
            )
    return list(groups.values())


def by_method(group: Sequence[Run], wanted: Sequence[str]) -> dict[str, Run]:
    """Those runs of a data set whose method is wanted, in that order.

    Raises:
        InputError: two are of the same method.
    """
    chosen: dict[str, Run] = {}
    for method in wanted:
        for one in group:
            if one.method != method:
                continue
            if method in chosen:
                raise InputError(
                    f"{chosen[method].source.path} and {one.source.path} are both {method} on {one.data}",
                    needed_by=one.figure,
                    fix="give one of the two",
                )
            chosen[method] = one
    return chosen


def all_of(group: Sequence[Run], wanted: Sequence[str]) -> dict[str, Run]:
    """by_method(), none missing.

    Raises:
        InputError: one is.
    """
    chosen = by_method(group, wanted)
    for method in wanted:
        if method not in chosen:
            raise missing(method, group[0].dataset, f"on {group[0].data}", group[0].figure)
    return chosen


def missing(method: str, dataset: Dataset, where: str, figure: str) -> InputError:
    """What is said of a run that is not given."""
    stem = METHODS[method][0]
    recipe = f"{dataset.recipe().rpartition('/')[0]}/{stem}"
    shown = recipe if recipe in recipe_names() else "FILE"
    folder = beside(dataset.folder, ".")
    command = console.typed("train-stage1", "--data", folder, "--recipe", shown, "--out", f"ckpt/{stem}")
    return InputError(
        f"{figure} needs a run of {method} {where}",
        needed_by=figure,
        fix=f"{command} and what it says next; then give that folder too",
    )


def nothing_given(options: FigureOptions, needs: str) -> InputError:
    """None of the folders has a place in the figure."""
    return InputError(
        f"none of {', '.join(map(str, options.folders))} is {needs}",
        needed_by=options.name,
        fix=f"see recipes/figures/figure{options.number}.sh",
    )


def warn_unused(found: Sequence[Run], panels: Sequence[tuple[str, Run]]) -> None:
    """Tell the runs that a figure has no place for."""
    used = {one.source.path for _, one in panels}
    for one in found:
        if one.source.path not in used:
            console.warn(f"{one.source.path} is not used: {one.figure} has no place for {one.method} on {one.data}")


# -- the figures -------------------------------------------------------------------------------------------------------


def figure1(options: FigureOptions, found: list[Run]) -> Drawn:
    """Class distribution and confusion matrix of ERM."""
    groups = by_data([one for one in found if one.method == "ERM"])
    if not groups:
        raise nothing_given(options, "a run of ERM")
    if len(groups) > 1:
        raise one_data_set(groups)
    one = all_of(groups[0], ["ERM"])["ERM"]
    if one.dataset.num_classes > MAX_NUMBERS:
        raise too_many_classes(one)
    figure = paper_figures.class_distribution(one.cells, one.dataset.class_names, one.counts, data=one.data)
    return Drawn(figure, [("(a, b)", one)])


def one_data_set(groups: Sequence[Sequence[Run]]) -> InputError:
    """Runs of several data sets, where a figure shows one."""
    listed = ", ".join(f"{group[0].source.run} ({group[0].data})" for group in groups)
    return InputError(
        f"the runs are of {len(groups)} data sets: {listed}", needed_by=groups[0][0].figure, fix="give runs of one"
    )


def too_many_classes(one: Run) -> InputError:
    """Numbers that nobody could read."""
    return InputError(
        f"{one.figure} writes numbers into cells, for {MAX_NUMBERS} classes at most; {one.source.run} has "
        f"{one.dataset.num_classes}",
        needed_by=one.figure,
        fix="cpmix figure 3 groups classes, figure 5 shows all without numbers",
    )


TOY_METHODS = ("ERM", "Mixup", "similar-pair mixup", "CP-Mix")


def figure2(options: FigureOptions, found: list[Run]) -> Drawn:
    """The toy example: regions at one imbalance factor, accuracy and confusion over all, over seeds."""
    for one in found:
        if one.dataset.record["source"] != "toy":
            raise InputError(
                f"{one.source.run} is of {one.dataset.name}, and not of the toy data",
                needed_by=options.name,
                fix="cpmix build-lt toy",
            )
    placed: dict[tuple[str, float, int], Run] = {}
    for one in (one for one in found if one.method in TOY_METHODS):
        same = placed.setdefault((one.method, one.rho, one.recipe.seed), one)
        if same is not one:
            raise InputError(
                f"{same.source.path} and {one.source.path} are both {one.method}, rho {one.rho:g}, "
                f"seed {one.recipe.seed}",
                needed_by=options.name,
                fix="give one of the two",
            )
    if not placed:
        raise nothing_given(options, "a run on the toy data")
    by_data(list(placed.values()))
    alike: dict[str, Run] = {}
    for one in placed.values():
        other = alike.setdefault(one.method, one)
        if differing := [key for key, *_ in changed(settings_of(other), settings_of(one))]:
            raise InputError(
                f"{other.source.path} and {one.source.path} are both {one.method}, and differ in "
                f"{', '.join(differing)}",
                needed_by=options.name,
                fix="give runs that differ in seed and rho alone",
            )
    rhos = sorted({rho for _, rho, _ in placed})
    rho = TOY_RHO if TOY_RHO in rhos else rhos[-1]
    at_rho = [one for (_, r, _), one in sorted(placed.items()) if r == rho]
    shown: dict[str, Run] = {}
    for one in at_rho:  # the first seed of each
        shown.setdefault(one.method, one)
    regions = []
    points = at_rho[0].dataset.read("train")
    for method in TOY_METHODS:
        if method not in shown:
            raise missing(method, at_rho[0].dataset, f"at rho {rho:g}", options.name)
        one = shown[method]
        axis, classes = predicted_regions(one.source, one.dataset, points[0])
        regions.append(paper_figures.Regions(method, axis, classes, one.accuracy, similar_confusion(one)))
    test = at_rho[0].dataset.read("test")
    figure = paper_figures.toy_example(
        (points[0].numpy(), points[1].numpy()),
        (test[0].numpy(), test[1].numpy()),
        at_rho[0].dataset.class_names,
        regions,
        [curve(method, placed) for method in TOY_METHODS],
        rho=rho,
    )
    letters = dict(zip(TOY_METHODS, ("(b, e)", "(c, e)", "(d, e)", "(f, e)"), strict=True))
    panels = [(letters[m] if one is shown[m] else "(e)", one) for (m, _, _), one in sorted(placed.items(), key=_place)]
    return Drawn(figure, panels)


def settings_of(one: Run) -> dict[str, Any]:
    """What the phase depends on but for the seed."""
    return {key: value for key, value in one.recipe.tables_of(one.source.phase).items() if key != "seed"}


def _place(item: tuple[tuple[str, float, int], Run]) -> tuple[int, float, int]:
    (method, rho, seed), _ = item
    return TOY_METHODS.index(method), rho, seed


def similar_confusion(one: Run) -> int:
    """Test points of each minority predicted as the majority beside it, of both pairs together. Paper: Fig. 2(e)."""
    return sum(int(one.matrix[minority, majority]) for minority, majority in TOY_SIMILAR.items())


def curve(method: str, placed: dict[tuple[str, float, int], Run]) -> paper_figures.Curve:
    """Accuracy and confusion of a method's runs over rho."""
    by_rho: dict[float, list[Run]] = {}
    for (m, rho, _), one in sorted(placed.items()):
        if m == method:
            by_rho.setdefault(rho, []).append(one)
    return paper_figures.Curve(
        method,
        list(by_rho),
        [[one.accuracy for one in seeds] for seeds in by_rho.values()],
        [[float(similar_confusion(one)) for one in seeds] for seeds in by_rho.values()],
    )


def figure3(options: FigureOptions, found: list[Run]) -> Drawn:
    """Grouped matrices of ERM and Mixup, and confusion values of ERM on balanced and long-tailed data."""
    groups = by_data([one for one in found if one.method in ("ERM", "Mixup")])
    tailed = [group for group in groups if not is_balanced(group[0])]
    if not tailed:
        raise nothing_given(options, "a run of ERM or Mixup on long-tailed data")
    if len(tailed) > 1:
        raise one_data_set(tailed)
    chosen = all_of(tailed[0], ["ERM", "Mixup"])
    erm, mixup = chosen["ERM"], chosen["Mixup"]
    even = [g for g in groups if is_balanced(g[0]) and g[0].dataset.class_names == erm.dataset.class_names]
    balanced = next((chosen["ERM"] for group in even if (chosen := by_method(group, ["ERM"]))), None)
    if balanced is None:
        source = erm.dataset.record["source"]
        build = console.typed("build-lt", source, "--rho", 1, "--out", f"data/{source}-lt-rho1")
        raise InputError(
            f"{options.name} needs a run of ERM on balanced {SOURCE_TITLES.get(source, source)}",
            needed_by=options.name,
            fix=f"{build}, then train and evaluate ERM on it",
        )
    figure = paper_figures.long_tailed_confusion(
        erm.cells, mixup.cells, balanced.cells, erm.counts, data=erm.data, balanced_data=balanced.data
    )
    return Drawn(figure, [("(a, c)", erm), ("(b)", mixup), ("(c)", balanced)])


ACCURACY_METHODS = ("ERM", "Mixup", "Balanced Softmax", "CP-Mix")


def figure4(options: FigureOptions, found: list[Run]) -> Drawn:
    """The grouped matrix of CP-Mix, and accuracies of classes on one or two data sets."""
    groups = by_data([one for one in found if one.method in ACCURACY_METHODS])
    if not groups:
        raise nothing_given(options, f"a run of {', '.join(ACCURACY_METHODS)}")
    if len(groups) > 2:
        raise one_data_set(groups)
    groups.sort(key=lambda group: -group[0].dataset.num_classes)
    chosen = [all_of(group, ACCURACY_METHODS) for group in groups]
    accuracies = [
        paper_figures.ClassAccuracies(
            one["ERM"].data,
            one["ERM"].dataset.class_names,
            one["ERM"].counts,
            {method: class_accuracy(run.matrix).numpy() * 100 for method, run in one.items()},
            {method for method, run in one.items() if run.source.phase == "finetune"},
        )
        for one in chosen
    ]
    figure = paper_figures.class_accuracies(chosen[0]["CP-Mix"].cells, accuracies)
    panels = [
        ("(a, b)" if letter == "b" and method == "CP-Mix" else f"({letter})", one)
        for letter, of_data in zip("bc", chosen, strict=False)
        for method, one in of_data.items()
    ]
    return Drawn(figure, panels)


GRID_METHODS = ("ERM", "Mixup", "CP-Mix")


def figure5(options: FigureOptions, found: list[Run]) -> Drawn:
    """Whole matrices of methods over imbalance factors; of figure 6, whose classes are few, with numbers."""
    groups = by_data([one for one in found if one.method in GRID_METHODS])
    if not groups:
        raise nothing_given(options, f"a run of {', '.join(GRID_METHODS)}")
    numbered = options.number == 6
    names = groups[0][0].dataset.class_names
    for group in groups:
        if group[0].dataset.class_names != names:
            raise one_data_set(groups)
    if numbered and len(names) > MAX_NUMBERS:
        raise too_many_classes(groups[0][0])
    groups.sort(key=lambda group: -group[0].rho)
    chosen = [by_method(group, GRID_METHODS) for group in groups]
    methods = [method for method in GRID_METHODS if any(method in one for one in chosen)]
    rows = [
        (group[0].data, group[0].counts, {method: one.cells for method, one in of_data.items()})
        for group, of_data in zip(groups, chosen, strict=True)
    ]
    figure = paper_figures.matrices_over_rho(rows, methods, names if numbered else None)
    placed = [one for of_data in chosen for one in of_data.values()]
    return Drawn(
        figure, [(f"({letter})", one) for letter, one in zip(paper_figures.panel_letters(), placed, strict=False)]
    )


FIGURES: dict[int, Callable[[FigureOptions, list[Run]], Drawn]] = {
    1: figure1,
    2: figure2,
    3: figure3,
    4: figure4,
    5: figure5,
    6: figure5,
}


def report(options: FigureOptions, drawn: Drawn, outs: list[Path], status: str) -> None:
    """Which run is what in the figure."""
    listed: list[dict[str, Any]] = [
        {
            "panel": panel,
            "method": one.method,
            "dataset": one.dataset.name,
            "rho": one.rho,
            "seed": one.recipe.seed,
            "phase": one.source.phase,
            "epochs": "+".join(map(str, epochs_to(one.source, one.recipe))),
            "top1": round(one.accuracy, 2),
            "run": str(one.source.run),
        }
        for panel, one in drawn.panels
    ]
    keys = ("panel", "method", "dataset", "seed", "phase", "epochs", "top1", "run")
    header = ("panel", "method", "data set", ">seed", "phase", ">epochs", ">top-1 %", "run")
    rows = [[f"{r[k]:.2f}" if k == "top1" else str(r[k]) for k in keys] for r in listed]
    console.result(
        {
            "command": "figure",
            "status": status,
            "figure": options.number,
            "files": [str(out) for out in outs],
            "runs": listed,
        },
        header=header,
        rows=rows,
        lines=[f"{status}: {out}" for out in outs],
    )
