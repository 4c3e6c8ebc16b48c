"""figure: the paper's figures 1 to 6 from run folders. Reads evaluations' predictions; trains nothing.

A run's place in a figure is what it is, not where it stands on the command line: its method is what the recipe of its
phase minimises, its imbalance factor the data set's.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmix_cli.artifacts.files import publish_out, read_bytes
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.evaluation.prediction import predicted_regions
from cpmix_cli.evaluation.saved import matrix_of, read_predictions
from cpmix_cli.flags import FigureOptions
from cpmix_cli.recipe.loading import recipe_names
from cpmix_cli.recipe.schema import Recipe, changed
from cpmix_cli.report import paper_figures
from cpmix_cli.report.figures import MAX_NUMBERS, Kind, encode, warn_of_boxes
from cpmix_cli.report.paper_figures import MethodResult
from cpmix_cli.results.comparison import epochs_to
from cpmix_cli.results.methods import OBJECTIVES, minimised, stem
from cpmix_cli.runs.folders import PhaseFolder, beside, find_dataset
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # at run time after cpmix_cli.report, which quietens matplotlib's warnings

KINDS: tuple[Kind, ...] = ("pdf", "svg", "png")
DPI = 450  # of a PNG, and of the pixels within the others

SOURCE_TITLES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
    "toy": "toy",
}
TOY_RHO = 20.0  # of the paper's panels: 1,000 and 50 points


@dataclass(frozen=True)
class Candidate:
    """A trained phase of one of OBJECTIVES, which may have a place in a figure."""

    source: PhaseFolder
    method: str
    recipe: Recipe
    dataset: Dataset

    @property
    def balanced(self) -> bool:
        """All classes have as many training images."""
        return bool(self.dataset.class_counts.max() == self.dataset.class_counts.min())

    @property
    def rho(self) -> float:
        """Imbalance factor: the one built for, else the largest class over the smallest."""
        recorded, counts = self.dataset.record.rho, self.dataset.class_counts
        return float(recorded if recorded is not None else counts.max() / counts.min())

    @property
    def data(self) -> str:
        """The data set as the paper writes it: CIFAR100-LT-200, balanced CIFAR100."""
        title = SOURCE_TITLES.get(self.dataset.record.source)
        if title is None:
            return self.dataset.name
        return f"balanced {title}" if self.balanced else f"{title}-LT-{self.rho:g}"

    @cached_property
    def result(self) -> MethodResult:
        """What the figure shows.

        Raises:
            InputError: the phase was not evaluated, or files are damaged.
        """
        evaluation = self.source.run / "evaluation" / self.source.phase
        table, _ = read_predictions(evaluation, self.source, self.dataset.num_classes)
        return MethodResult(
            self.method,
            self.data,
            self.rho,
            self.dataset.class_names,
            self.dataset.class_counts,
            matrix_of(table, self.dataset.num_classes).numpy(),
            finetuned=self.source.phase == "finetune",
        )


@dataclass(frozen=True)
class Drawn:
    """A figure and the runs in it."""

    figure: "Figure"
    panels: list[tuple[str, Candidate]]
    """Where each run is shown: letter, or "(e)" for all of a curve."""


def run(options: FigureOptions) -> None:
    """Draw a figure and publish it.

    Raises:
        UsageError: an --out that is no picture.
        InputError: a run that the figure needs is missing, not evaluated, of other data, or given twice.
        EnvironmentFault: an --out exists already, with another content, or cannot be written.
    """
    console.command = f"figure {options.number}"
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
        publish_out(out, data)
    report(options, drawn, list(files), "done" if new else "up to date")


def _kind(out: Path) -> Kind:
    for kind in KINDS:
        if out.suffix.lower() == f".{kind}":
            return kind
    raise UsageError(f"--out {out}: the name ends in .{', .'.join(KINDS)}")


def read_runs(options: FigureOptions) -> list[Candidate]:
    """The runs of the methods of OBJECTIVES; warnings name the others.

    Raises:
        InputError: a folder is no run, has no finished phase, or its data set is not found.
    """
    given = {open_dataset(folder).fingerprint: folder for folder in reversed(options.data)}
    found = []
    for folder in options.folders:
        source = choose(folder)
        root = source.run
        recipe, known = source.recipe(), source.record().dataset
        method = minimised(recipe, source.phase)
        if method is None:
            console.warn(f"{source.path} is not used: it is none of {', '.join(OBJECTIVES)}")
            continue
        if source.phase == "finetune" and method != "CP-Mix":
            console.warn(f"{source.path} is finetuned, which the paper's {method} is not: {root}/PHASE names a phase")
        place = given.get(known.fingerprint)
        dataset = find_dataset(root, known, place)
        found.append(Candidate(source, method, recipe, dataset))
    return found


# -- which run goes where ----------------------------------------------------------------------------------------------


def by_data(options: FigureOptions, found: Sequence[Candidate], wanted: Collection[str]) -> list[list[Candidate]]:
    """Runs of wanted methods, those of the same training images together, in the order of their first.

    Raises:
        InputError: there is none, or two data sets differ and look the same in a figure.
    """
    groups: dict[str, list[Candidate]] = {}
    for one in found:
        if one.method in wanted:
            groups.setdefault(one.dataset.fingerprint, []).append(one)
    if not groups:
        raise nothing_given(options, f"a run of {' or '.join(wanted)}")
    titles: dict[str, Candidate] = {}
    for first, *_ in groups.values():
        if (other := titles.setdefault(first.data, first)) is not first:
            raise InputError(
                f"{other.source.run} and {first.source.run} are of different subsets of {first.data}",
                fix="give runs of one of the two",
            )
    return list(groups.values())


def nothing_given(options: FigureOptions, needs: str) -> InputError:
    """None of the folders has a place in the figure."""
    return InputError(
        f"none of {', '.join(map(str, options.folders))} is {needs}",
        fix=f"see recipes/figures/figure{options.number}.sh",
    )


def refuse_several(groups: Sequence[Sequence[Candidate]], most: int = 1) -> None:
    """Check that there are no more data sets than a figure shows.

    Raises:
        InputError: there are.
    """
    if len(groups) > most:
        listed = ", ".join(f"{first.source.run} ({first.data})" for first, *_ in groups)
        raise InputError(f"the runs are of {len(groups)} data sets: {listed}", fix="give runs of one")


def by_method(group: Sequence[Candidate], wanted: Sequence[str], *, all_of_them: bool = False) -> dict[str, Candidate]:
    """Those runs of a data set whose method is wanted, in that order.

    Raises:
        InputError: two are of the same method, or, with `all_of_them`, one is missing.
    """
    chosen: dict[str, Candidate] = {}
    for method in wanted:
        for one in group:
            if one.method == method and (other := chosen.setdefault(method, one)) is not one:
                raise InputError(
                    f"{other.source.path} and {one.source.path} are both {method} on {one.data}",
                    fix="give one of the two",
                )
        if all_of_them and method not in chosen:
            raise missing(method, group[0])
    return chosen


def missing(method: str, beside_it: Candidate) -> InputError:
    """A run of a method is not given, on the data set of one that is."""
    dataset, method_stem = beside_it.dataset, stem(OBJECTIVES[method])
    recipe = f"{dataset.recipe().rpartition('/')[0]}/{method_stem}"
    shown = recipe if recipe in recipe_names() else "FILE"
    folder = beside(dataset.folder, ".")
    command = console.typed("train-stage1", "--data", folder, "--recipe", shown, "--out", f"ckpt/{method_stem}")
    return InputError(
        f"{console.command} needs a run of {method} on {beside_it.data}",
        fix=f"{command} and what it says next; then give that folder too",
    )


def refuse_many_classes(one: Candidate) -> None:
    """Check that the numbers in the cells of a figure can be read.

    Raises:
        InputError: there are too many classes.
    """
    if one.dataset.num_classes > MAX_NUMBERS:
        raise InputError(
            f"{console.command} writes numbers into cells, for {MAX_NUMBERS} classes at most; {one.source.run} has "
            f"{one.dataset.num_classes}",
            fix="cpmix figure 3 groups classes, figure 5 shows all without numbers",
        )


def warn_unused(found: Sequence[Candidate], panels: Sequence[tuple[str, Candidate]]) -> None:
    """Name the runs that a figure has no place for."""
    used = {one.source.path for _, one in panels}
    for one in found:
        if one.source.path not in used:
            console.warn(
                f"{one.source.path} is not used: {console.command} has no place for {one.method} on {one.data}"
            )


# -- the figures -------------------------------------------------------------------------------------------------------


def figure1(options: FigureOptions, found: list[Candidate]) -> Drawn:
    """Class distribution and confusion matrix of ERM."""
    groups = by_data(options, found, ["ERM"])
    refuse_several(groups)
    one = by_method(groups[0], ["ERM"])["ERM"]
    refuse_many_classes(one)
    return Drawn(paper_figures.class_distribution(one.result), [("(a, b)", one)])


TOY_METHODS = ("ERM", "Mixup", "similar-pair mixup", "CP-Mix")


def figure2(options: FigureOptions, found: list[Candidate]) -> Drawn:
    """The toy example: regions at one imbalance factor, accuracy and confusion over all, over seeds."""
    for one in found:
        if one.dataset.record.source != "toy":
            raise InputError(
                f"{one.source.run} is of {one.dataset.name}, and not of the toy data", fix="cpmix build-lt toy"
            )
    groups = by_data(options, found, TOY_METHODS)
    rhos = sorted(group[0].rho for group in groups)
    rho = TOY_RHO if TOY_RHO in rhos else rhos[-1]
    runs: list[Candidate] = []
    shown: dict[str, Candidate] = {}
    for group in sorted(groups, key=lambda group: group[0].rho):
        for seed in sorted({one.recipe.seed for one in group}):
            of_seed = by_method([one for one in group if one.recipe.seed == seed], TOY_METHODS)
            runs += of_seed.values()
            if group[0].rho == rho:
                shown = of_seed | shown  # the first seed of each
    runs.sort(key=lambda one: TOY_METHODS.index(one.method))
    refuse_unlike(runs)
    shown = by_method(list(shown.values()), TOY_METHODS, all_of_them=True)
    dataset = shown["ERM"].dataset
    train, test = dataset.read("train"), dataset.read("test")
    regions = {}
    for method, one in shown.items():
        axis, regions[method] = predicted_regions(one.source, one.dataset, train[0])
    figure = paper_figures.toy_example(
        (train[0].numpy(), train[1].numpy()),
        (test[0].numpy(), test[1].numpy()),
        axis,
        regions,
        results_of(shown),
        [one.result for one in runs],
    )
    letters = dict(zip(TOY_METHODS, ("(b, e)", "(c, e)", "(d, e)", "(f, e)"), strict=True))
    return Drawn(figure, [(letters[one.method] if one is shown[one.method] else "(e)", one) for one in runs])


def refuse_unlike(runs: Sequence[Candidate]) -> None:
    """Check that the runs of a method depend on the same but for seed and data.

    Raises:
        InputError: two differ.
    """
    first: dict[str, tuple[Candidate, dict[str, Any]]] = {}
    for one in runs:
        settings = {key: value for key, value in one.recipe.tables_of(one.source.phase).items() if key != "seed"}
        other, theirs = first.setdefault(one.method, (one, settings))
        if differing := [key for key, *_ in changed(theirs, settings)]:
            raise InputError(
                f"{other.source.path} and {one.source.path} are both {one.method}, and differ in "
                f"{', '.join(differing)}",
                fix="give runs that differ in seed and rho alone",
            )


def figure3(options: FigureOptions, found: list[Candidate]) -> Drawn:
    """Grouped matrices of ERM and Mixup, and confusion values of ERM on balanced and long-tailed data."""
    groups = by_data(options, found, ["ERM", "Mixup"])
    tailed = [group for group in groups if not group[0].balanced]
    if not tailed:
        raise nothing_given(options, "a run of ERM or Mixup on long-tailed data")
    refuse_several(tailed)
    erm, mixup = by_method(tailed[0], ["ERM", "Mixup"], all_of_them=True).values()
    names = erm.dataset.class_names
    even = [group for group in groups if group[0].balanced and group[0].dataset.class_names == names]
    balanced = next((chosen["ERM"] for group in even if (chosen := by_method(group, ["ERM"]))), None)
    if balanced is None:
        source = erm.dataset.record.source
        build = console.typed("build-lt", source, "--rho", 1, "--out", f"data/{source}-lt-rho1")
        raise InputError(
            f"{console.command} needs a run of ERM on balanced {SOURCE_TITLES.get(source, source)}",
            fix=f"{build}, then train and evaluate ERM on it",
        )
    figure = paper_figures.long_tailed_confusion(erm.result, mixup.result, balanced.result)
    return Drawn(figure, [("(a, c)", erm), ("(b)", mixup), ("(c)", balanced)])


ACCURACY_METHODS = ("ERM", "Mixup", "Balanced Softmax", "CP-Mix")


def figure4(options: FigureOptions, found: list[Candidate]) -> Drawn:
    """The grouped matrix of CP-Mix, and accuracies of classes on one or two data sets."""
    groups = by_data(options, found, ACCURACY_METHODS)
    refuse_several(groups, most=2)
    groups.sort(key=lambda group: -group[0].dataset.num_classes)
    chosen = [by_method(group, ACCURACY_METHODS, all_of_them=True) for group in groups]
    figure = paper_figures.class_accuracies([results_of(panel) for panel in chosen])
    panels = [
        ("(a, b)" if letter == "b" and method == "CP-Mix" else f"({letter})", one)
        for letter, of_data in zip("bc", chosen, strict=False)
        for method, one in of_data.items()
    ]
    return Drawn(figure, panels)


def results_of(chosen: Mapping[str, Candidate]) -> dict[str, MethodResult]:
    """What a figure shows of each method's run."""
    return {method: one.result for method, one in chosen.items()}


GRID_METHODS = ("ERM", "Mixup", "CP-Mix")


def figure5(options: FigureOptions, found: list[Candidate]) -> Drawn:
    """Whole matrices of methods over imbalance factors; of figure 6, whose classes are few, with numbers."""
    groups = by_data(options, found, GRID_METHODS)
    numbered, first = options.number == 6, groups[0][0]
    if any(group[0].dataset.class_names != first.dataset.class_names for group in groups):
        refuse_several(groups)
    if numbered:
        refuse_many_classes(first)
    groups.sort(key=lambda group: -group[0].rho)
    rows = [by_method(group, GRID_METHODS) for group in groups]
    methods = [method for method in GRID_METHODS if any(method in row for row in rows)]
    figure = paper_figures.matrices_over_rho([results_of(row) for row in rows], methods, numbered=numbered)
    placed = [one for row in rows for one in row.values()]
    return Drawn(
        figure, [(f"({letter})", one) for letter, one in zip(paper_figures.panel_letters(), placed, strict=False)]
    )


FIGURES: dict[int, Callable[[FigureOptions, list[Candidate]], Drawn]] = {
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
            "top1": round(one.result.accuracy, 2),
            "run": str(one.source.run),
        }
        for panel, one in drawn.panels
    ]
    keys = ("panel", "method", "dataset", "seed", "phase", "epochs", "top1", "run")
    header = ("panel", "method", "data set", ">seed", "phase", ">epochs", ">top-1 %", "run")
    rows = [[f"{r[k]:.2f}" if k == "top1" else str(r[k]) for k in keys] for r in listed]
    console.result(
        {"status": status, "figure": options.number, "files": [str(out) for out in outs], "runs": listed},
        header=header,
        rows=rows,
        lines=[f"{status}: {out}" for out in outs],
    )
