"""figure: draw the paper's figures 1 to 6 from run folders. Reads predictions of evaluations, trains nothing.

The place of a run in a figure depends on its method and imbalance factor, not on the order of the command line. The
method is the objective of the phase's recipe, and the imbalance factor is that of the data set.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmix_cli.artifacts.files import PHASES, publish_out, read_bytes, refuse_existing
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.evaluation.prediction import predicted_regions
from cpmix_cli.evaluation.saved import matrix_of, read_predictions
from cpmix_cli.flags import FigureOptions
from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.recipe.schema import Recipe, changed
from cpmix_cli.report import paper_figures
from cpmix_cli.report.figure_files import Kind, encode, fonts_for, is_own
from cpmix_cli.report.panels import MAX_NUMBERS
from cpmix_cli.report.paper_figures import MethodResult
from cpmix_cli.results.comparison import epochs_to
from cpmix_cli.results.methods import OBJECTIVES, minimised, stem
from cpmix_cli.runs.folders import PhaseFolder, beside, find_dataset
from cpmix_cli.runs.next_command import TRAINING_COMMANDS
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.runtime.text import on_a_line, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # not at run time: cpmix_cli.report must silence its warnings first

KINDS: dict[str, Kind] = {".pdf": "pdf", ".svg": "svg", ".png": "png"}
DPI = 450  # of PNG files, and of matrices and point clouds in PDF and SVG

SOURCE_TITLES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
    "toy": "toy",
}
TOY_RHO = 20.0  # imbalance factor of the paper's panels: 1,000 and 50 points


@dataclass(frozen=True)
class _Candidate:
    """A trained phase of a method of OBJECTIVES, which a figure may show."""

    source: PhaseFolder
    method: str
    recipe: Recipe
    dataset: Dataset

    @property
    def balanced(self) -> bool:
        """Whether all classes have equally many training images."""
        return bool(self.dataset.class_counts.max() == self.dataset.class_counts.min())

    @property
    def rho(self) -> float:
        """Imbalance factor: --rho of build-lt, or else largest / smallest class."""
        recorded, counts = self.dataset.record.rho, self.dataset.class_counts
        return float(recorded if recorded is not None else counts.max() / counts.min())

    @property
    def data(self) -> str:
        """Name of the data set as in the paper: CIFAR100-LT-200, balanced CIFAR100."""
        title = SOURCE_TITLES.get(self.dataset.record.source)
        if title is None:
            return on_a_line(self.dataset.name)
        return f"balanced {title}" if self.balanced else f"{title}-LT-{self.rho:g}"

    @cached_property
    def result(self) -> MethodResult:
        """Test results of the phase.

        Raises:
            InputError: the phase is not evaluated, or files are damaged.
        """
        evaluation = self.source.run / "evaluation" / self.source.phase
        table, _ = read_predictions(evaluation, self.source, self.dataset.num_classes)
        return MethodResult(
            self.method,
            self.data,
            self.rho,
            [on_a_line(name) for name in self.dataset.class_names],
            self.dataset.class_counts,
            matrix_of(table, self.dataset.num_classes),
            finetuned=self.source.phase == "finetune",
        )


Panels = list[tuple[str, _Candidate]]
"""Panel letters and run of each run in a figure; runs of a curve share their letter."""


def run(options: FigureOptions) -> None:
    """Draw a figure and publish it.

    Raises:
        UsageError: --out has another suffix than those of KINDS.
        InputError: a required run is missing, not evaluated, of other data, or given twice.
        EnvironmentFault: --out exists with other content, or cannot be written.
    """
    console.command = f"figure {options.number}"
    outs = options.out or [Path(f"figure{options.number}.pdf")]
    for out in outs:
        if out.suffix.lower() not in KINDS:
            raise UsageError(
                f"--out {out} ends in none of {', '.join(KINDS)}",
                fix=f"give a name such as --out figure{options.number}.pdf",
            )
    found = _read_runs(options)
    names = [name for one in found for name in (*one.dataset.class_names, one.data)]
    with fonts_for(dict.fromkeys(names)):
        figure, panels = FIGURES[options.number](options, found)
        files = {out: encode(figure, KINDS[out.suffix.lower()], dpi=DPI) for out in outs}
    used = {one.source.path for _, one in panels}
    for one in found:
        if one.source.path not in used:
            console.warn(
                f"{one.source.path} is not used: {console.command} has no place for {one.method} on {one.data}"
            )
    new = {out: data for out, data in files.items() if not out.is_file() or read_bytes(out) != data}
    for out in new:
        refuse_existing(out, is_own, overwrite=options.overwrite, why="exists and is not this figure")
    for out, data in new.items():
        publish_out(out, data)
    _report(options.number, panels, list(files), "done" if new else "up to date")


def _read_runs(options: FigureOptions) -> list[_Candidate]:
    """Return the runs of methods of OBJECTIVES, and warn of the others."""
    given = {open_dataset(folder).fingerprint: folder for folder in reversed(options.data)}
    found = []
    for folder in options.folders:
        source = choose(folder)
        recipe, known = source.recipe(), source.record().dataset
        method = minimised(recipe, source.phase)
        if method is None:
            console.warn(f"{source.path} is not used: it is none of {', '.join(OBJECTIVES)}")
            continue
        if source.phase == "finetune" and method != "CP-Mix":
            what = f"finetuned, which the paper's {method} is not: {source.run}/PHASE names a phase"
            console.warn(f"{source.path} is {what}")
        dataset = find_dataset(source.run, known, given.get(known.fingerprint))
        found.append(_Candidate(source, method, recipe, dataset))
    return found


# -- selection of runs -------------------------------------------------------------------------------------------------


def _by_data(options: FigureOptions, found: Sequence[_Candidate], wanted: Collection[str]) -> list[list[_Candidate]]:
    """Group the runs of wanted methods by training images, in the order of first appearance.

    Refuses different data sets that have the same name in a figure.
    """
    groups: dict[str, list[_Candidate]] = {}
    for one in found:
        if one.method in wanted:
            groups.setdefault(one.dataset.fingerprint, []).append(one)
    if not groups:
        raise _nothing_given(options, f"a run of {' or '.join(wanted)}")
    titles: dict[str, _Candidate] = {}
    for first, *_ in groups.values():
        if (other := titles.setdefault(first.data, first)) is not first:
            raise InputError(
                f"{other.source.run} and {first.source.run} are of different subsets of {first.data}",
                fix="give runs of one of the two",
            )
    return list(groups.values())


def _nothing_given(options: FigureOptions, needs: str) -> InputError:
    folders = ", ".join(map(str, options.folders))
    how = f"train them as figures/figure{options.number}.sh of the recipes does: cpmix recipes --copy recipes"
    return InputError(f"none of {folders} is {needs}", fix=how)


def _refuse_several(groups: Sequence[Sequence[_Candidate]], most: int = 1) -> None:
    """Refuse more data sets than a figure shows."""
    if len(groups) > most:
        listed = ", ".join(f"{first.source.run} ({first.data})" for first, *_ in groups)
        raise InputError(f"the runs are of {len(groups)} data sets: {listed}", fix="give runs of one")


def _by_method(
    group: Sequence[_Candidate], wanted: Sequence[str], *, all_of_them: bool = False
) -> dict[str, _Candidate]:
    """Return method -> run of a data set in the order of `wanted`; refuses two runs of a method, or missing ones."""
    chosen: dict[str, _Candidate] = {}
    for method in wanted:
        for one in group:
            if one.method == method and (other := chosen.setdefault(method, one)) is not one:
                raise InputError(
                    f"{other.source.path} and {one.source.path} are both {method} on {one.data}",
                    fix="give one of the two",
                )
        if all_of_them and method not in chosen:
            dataset, name = group[0].dataset, stem(OBJECTIVES[method])
            recipe = f"{dataset.recipe().rpartition('/')[0]}/{name}"
            raise InputError(
                f"{console.command} needs a run of {method} on {group[0].data}, trained and evaluated",
                fix=_commands_of(recipe, dataset, f"ckpt/{name}")
                if recipe in recipe_names()
                else f"write a recipe of {method} for {dataset.name}, and train it",
            )
    return chosen


def _commands_of(recipe: str, dataset: Dataset, run: str) -> str:
    """Return the commands that train and evaluate a recipe on a data set, and how to go on."""
    words = ("--data", beside(dataset.folder, "."), "--recipe", recipe, "--out", run)
    resolved = load(recipe, rho=dataset.record.rho)
    first, *later = [TRAINING_COMMANDS[phase] for phase in PHASES if resolved.epochs_of(phase)]
    commands = [console.typed(first, *words)] + [console.typed(name, "--from", run) for name in (*later, "evaluate")]
    return f"train one, and give {quoted(run)} as well: {' && '.join(commands)}"


def _refuse_many_classes(one: _Candidate) -> None:
    """Refuse data sets with too many classes for numbers in the cells."""
    if one.dataset.num_classes > MAX_NUMBERS:
        raise InputError(
            f"{console.command} writes numbers into cells, for {MAX_NUMBERS} classes at most; {one.source.run} has "
            f"{one.dataset.num_classes}",
            fix="take figure 3, which groups classes, or figure 5, which shows all without numbers",
        )


# -- the figures -------------------------------------------------------------------------------------------------------


def _figure1(options: FigureOptions, found: list[_Candidate]) -> tuple["Figure", Panels]:
    """Draw class distribution and confusion matrix of ERM."""
    groups = _by_data(options, found, ["ERM"])
    _refuse_several(groups)
    one = _by_method(groups[0], ["ERM"])["ERM"]
    _refuse_many_classes(one)
    return paper_figures.class_distribution(one.result), [("(a, b)", one)]


TOY_METHODS = ("ERM", "Mixup", "similar-pair mixup", "CP-Mix")


def _figure2(options: FigureOptions, found: list[_Candidate]) -> tuple["Figure", Panels]:
    """Draw the toy example: regions at one imbalance factor, accuracy and confusion over all of them."""
    for one in found:
        if one.dataset.record.source != "toy":
            raise InputError(
                f"{one.source.run} is of {one.dataset.name}, and not of the toy data",
                fix="give runs that were trained on the toy data; to build it: cpmix build-lt toy",
            )
    groups = _by_data(options, found, TOY_METHODS)
    rhos = sorted(group[0].rho for group in groups)
    rho = TOY_RHO if TOY_RHO in rhos else rhos[-1]
    runs: list[_Candidate] = []
    shown: dict[str, _Candidate] = {}
    for group in sorted(groups, key=lambda group: group[0].rho):
        for seed in sorted({one.recipe.seed for one in group}):
            of_seed = _by_method([one for one in group if one.recipe.seed == seed], TOY_METHODS)
            runs += of_seed.values()
            if group[0].rho == rho:
                shown = of_seed | shown  # the first seed of each
    runs.sort(key=lambda one: TOY_METHODS.index(one.method))
    _refuse_unlike(runs)
    shown = _by_method(list(shown.values()), TOY_METHODS, all_of_them=True)
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
        _results_of(shown),
        [one.result for one in runs],
    )
    letters = dict(zip(TOY_METHODS, ("(b, e)", "(c, e)", "(d, e)", "(f, e)"), strict=True))
    return figure, [(letters[one.method] if one is shown[one.method] else "(e)", one) for one in runs]


def _refuse_unlike(runs: Sequence[_Candidate]) -> None:
    """Refuse runs of one method whose recipes differ in more than the seed."""
    first: dict[str, tuple[_Candidate, dict[str, Any]]] = {}
    for one in runs:
        settings = {key: value for key, value in one.recipe.tables_of(one.source.phase).items() if key != "seed"}
        other, theirs = first.setdefault(one.method, (one, settings))
        if differing := [key for key, *_ in changed(theirs, settings)]:
            raise InputError(
                f"{other.source.path} and {one.source.path} are both {one.method}, and differ in "
                f"{', '.join(differing)}",
                fix="give runs that differ in seed and rho alone",
            )


def _figure3(options: FigureOptions, found: list[_Candidate]) -> tuple["Figure", Panels]:
    """Draw grouped matrices of ERM and Mixup, and confusion values of ERM on balanced and long-tailed data."""
    groups = _by_data(options, found, ["ERM", "Mixup"])
    tailed = [group for group in groups if not group[0].balanced]
    if not tailed:
        raise _nothing_given(options, "a run of ERM or Mixup on long-tailed data")
    _refuse_several(tailed)
    erm, mixup = _by_method(tailed[0], ["ERM", "Mixup"], all_of_them=True).values()
    names = erm.dataset.class_names
    even = [group for group in groups if group[0].balanced and group[0].dataset.class_names == names]
    balanced = next((chosen["ERM"] for group in even if (chosen := _by_method(group, ["ERM"]))), None)
    if balanced is None:
        source = erm.dataset.record.source
        title = SOURCE_TITLES.get(source, source)
        raise InputError(
            f"{console.command} needs a run of ERM on balanced {title}, trained and evaluated",
            fix="train and evaluate one, and give it as well; to build the data: "
            + console.typed("build-lt", source, "--rho", 1, "--out", f"data/{source}-lt-rho1"),
        )
    figure = paper_figures.long_tailed_confusion(erm.result, mixup.result, balanced.result)
    return figure, [("(a, c)", erm), ("(b)", mixup), ("(c)", balanced)]


ACCURACY_METHODS = ("ERM", "Mixup", "Balanced Softmax", "CP-Mix")


def _figure4(options: FigureOptions, found: list[_Candidate]) -> tuple["Figure", Panels]:
    """Draw the grouped matrix of CP-Mix, and accuracies per class on one or two data sets."""
    groups = _by_data(options, found, ACCURACY_METHODS)
    _refuse_several(groups, most=2)
    groups.sort(key=lambda group: -group[0].dataset.num_classes)
    chosen = [_by_method(group, ACCURACY_METHODS, all_of_them=True) for group in groups]
    figure = paper_figures.class_accuracies([_results_of(panel) for panel in chosen])
    panels = [
        ("(a, b)" if letter == "b" and method == "CP-Mix" else f"({letter})", one)
        for letter, of_data in zip("bc", chosen, strict=False)
        for method, one in of_data.items()
    ]
    return figure, panels


def _results_of(chosen: Mapping[str, _Candidate]) -> dict[str, MethodResult]:
    """Return the test results of each method's run."""
    return {method: one.result for method, one in chosen.items()}


GRID_METHODS = ("ERM", "Mixup", "CP-Mix")


def _figure5(options: FigureOptions, found: list[_Candidate]) -> tuple["Figure", Panels]:
    """Draw matrices of methods over imbalance factors; figure 6 has few classes and shows numbers."""
    groups = _by_data(options, found, GRID_METHODS)
    numbered, first = options.number == 6, groups[0][0]
    if any(group[0].dataset.class_names != first.dataset.class_names for group in groups):
        _refuse_several(groups)
    if numbered:
        _refuse_many_classes(first)
    groups.sort(key=lambda group: -group[0].rho)
    rows = [_by_method(group, GRID_METHODS) for group in groups]
    methods = [method for method in GRID_METHODS if any(method in row for row in rows)]
    figure = paper_figures.matrices_over_rho([_results_of(row) for row in rows], methods, numbered=numbered)
    placed = [one for row in rows for one in row.values()]
    return figure, [(f"({letter})", one) for letter, one in zip(paper_figures.panel_letters(), placed, strict=False)]


FIGURES: dict[int, Callable[[FigureOptions, list[_Candidate]], tuple["Figure", Panels]]] = {
    1: _figure1,
    2: _figure2,
    3: _figure3,
    4: _figure4,
    5: _figure5,
    6: _figure5,
}


def _report(number: int, panels: Panels, outs: list[Path], status: str) -> None:
    """Print the panel of each run, and the files."""
    listed, rows = [], []
    for panel, one in panels:
        fields = {
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
        listed.append(fields)
        rows.append([f"{v:.2f}" if key == "top1" else str(v) for key, v in fields.items() if key != "rho"])
    console.result(
        {"status": status, "figure": number, "files": [str(out) for out in outs], "runs": listed},
        header=("panel", "method", "data set", ">seed", "phase", ">epochs", ">top-1 %", "run"),
        rows=rows,
        lines=[f"{status}: {out}" for out in outs],
    )
