"""Evaluations of runs for compare: their numbers, conditions and costs, and which of them share a row."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts import files, tables
from cpmix_cli.evaluation.saved import EvaluationNumbers, matrix_of, read_numbers, read_predictions
from cpmix_cli.recipe.functions import TERM_KINDS
from cpmix_cli.recipe.loading import recipe_names
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.results.methods import Recognised, recognised
from cpmix_cli.results.paper import PAPER_TABLES, Column, PaperRow
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import begun_phases
from cpmix_cli.runs.repair import fix_of
from cpmix_cli.runs.run_json import EvaluationRecord, PhaseRecord, read_run
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, shortened
from cpmix_cli.training.metrics import read_metrics

MAX_NAMED = 3
"""Largest number of changed keys with which a method keeps its name."""
COST_KEYS = ("images_per_second", "training_seconds", "gpu_hours", "device")
"""Keys of a cost. Images count once per term. Seconds are wall-clock time of epochs. gpu_hours is None on a CPU."""


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation of one run."""

    run: Path
    evaluation: Path
    """Folder of the evaluation."""
    source: PhaseFolder
    """Phase that was evaluated."""
    name: str
    """Name of its method, with the changed keys."""
    method: Recognised
    data: str
    label: str
    """Label of the evaluation; without one, "mirror" if its recipe mirrors the test images, else ""."""
    stage: str
    """before or after the finetune, none (no finetune in the recipe), or before stage 2; then the label, if any."""
    forms: frozenset[bool]
    """Values of PaperRow.finetuned of the paper's rows that it is comparable with."""
    seed: int
    numbers: EvaluationNumbers
    conditions: dict[str, Any]
    """Dotted key -> value of everything that runs of one row share."""
    checkpoint: str
    """sha256 of the weights."""
    started_from: str | None
    """sha256 of the weights that the phase started from; None for stage 1, or if they are missing."""
    num_parameters: int
    epochs: tuple[int, ...]
    """Epochs of each phase that leads to the checkpoint."""
    full_epochs: int | None
    """Epochs of both stages in the recipe before --epochs rescaled them; None without --epochs."""
    cost: dict[str, Any]
    """Values of COST_KEYS over all phases that lead to the checkpoint; all None if one is missing."""

    @property
    def _num_classes(self) -> int:
        return len(tables.read_class_counts(*self.source.output(files.CLASS_COUNTS)))

    @cached_property
    def matrix(self) -> NDArray[np.int64]:
        """Test images of each true class (row) predicted as each class (column) [C, C].

        Raises:
            InputError: see read_predictions().
        """
        return matrix_of(read_predictions(self.evaluation, self.source, self._num_classes)[0], self._num_classes)

    @cached_property
    def confusions(self) -> NDArray[np.int64]:
        """Confusion counts K of training [C, C]; InputError if they are missing or damaged."""
        pairs = tables.read_confusions(*self.source.output(files.CONFUSION_PAIRS), self._num_classes)
        return tables.confusion_counts(pairs, self._num_classes)

    @property
    def tested_on(self) -> tuple[str, ...]:
        """Data set and images of the evaluation, equal for runs with comparable numbers."""
        return tuple(
            str(self.conditions.get(key)) for key in ("data set", "subset", "test images", "test_distribution")
        )


@dataclass(frozen=True)
class ComparisonRow:
    """Runs that differ only in the seed."""

    runs: list[EvaluatedRun]

    @property
    def first(self) -> EvaluatedRun:
        """The first run, for the values that all share."""
        return self.runs[0]

    def statistics(self, measure: str) -> tuple[float | None, float | None]:
        """Return mean and sample standard deviation of a measure; None if undefined."""
        values = [value for run in self.runs if (value := getattr(run.numbers, measure)) is not None]
        return (fmean(values) if values else None, stdev(values) if len(values) > 1 else None)

    def cost(self) -> dict[str, Any]:
        """Return mean costs over the runs. A cost is None if a run lacks it; speed and time also if devices differ."""
        *numbers, devices = ([run.cost[key] for run in self.runs] for key in COST_KEYS)
        means = [None if None in values else fmean(values) for values in numbers]
        if len(set(devices)) > 1:
            means[:2] = None, None
        device = None if None in devices else ", ".join(sorted(set(devices)))
        return dict(zip(COST_KEYS, (*means, device), strict=True))

    def published(self) -> tuple[PaperRow, str] | None:
        """Return the row and top-1 accuracy of the paper that correspond to these runs; None without."""
        for table in PAPER_TABLES.values():
            for row in table.rows:
                for column, cell in zip(table.columns, row.cells, strict=True):
                    if cell is not None and column.measure == "top1" and self.stands_for(row, column):
                        return row, cell
        return None

    def stands_for(self, row: PaperRow, column: Column) -> bool:
        """Return whether a cell of the paper has this method, data set and stage."""
        run = self.first
        return run.data == column.data and row.finetuned in run.forms and run.method.is_printed_in(row, column)


def evaluations_of(root: Path, phase: str | None) -> tuple[list[EvaluatedRun], list[str]]:
    """Return the evaluations of a run's current checkpoints, and a line per evaluation that is left out.

    The lines are also printed as warnings. `phase` restricts the evaluations to one phase.

    Raises:
        InputError: the folder contains no phase, or the record of a phase is damaged.
    """
    paths = sorted((root / "evaluation").glob(f"*/{files.RUN}"))
    if paths and not any(PhaseFolder(root, name).is_begun for name in files.PHASES):
        raise InputError(
            f"{root} holds evaluations, but not the run that they are of",
            fix="give a run folder; evaluate without --out writes into it",
        )
    begun_phases(root)
    found, left_out = [], []
    for path in paths:
        folder = path.parent
        try:
            record = read_run(folder, EvaluationRecord)
            if record.phase != f"evaluation/{folder.name}":
                raise InputError(
                    f"{path} is the record of {record.phase}, not of evaluation/{folder.name}",
                    fix=f"rename the folder to {root / record.phase}, or delete it",
                )
            source = PhaseFolder(root, record.source.phase)
            if phase is not None and source.phase != phase:
                continue
            why = _unusable(source, record)
            if why is None:
                found.append(_evaluated_run(folder, record, source))
        except InputError as fault:  # one that cannot be read does not take the others away
            why = f"{fault.message}; to repair it: {fix_of(fault)}"
        if why is not None:
            left_out.append(f"{folder} is left out: {why}")
            console.warn(left_out[-1])
    if not found and not left_out:
        left_out.append(f"{root} is left out: it holds no evaluation" + (f" of {phase}" if phase else ""))
        console.warn(left_out[-1])
    return found, left_out


def _unusable(source: PhaseFolder, record: EvaluationRecord) -> str | None:
    """Return why an evaluation is not of a current checkpoint; None if it is."""
    if (why := source.unusable_because()) is not None:
        return f"{source.phase} {why}"
    return None if source.is_source_of(record) else f"it is of an older checkpoint of {source.phase}"


def _evaluated_run(folder: Path, record: EvaluationRecord, source: PhaseFolder) -> EvaluatedRun:
    trained, recipe = source.record(), source.recipe()
    data = trained.dataset.name
    trained_with = trained.recipe_name if trained.recipe_name in recipe_names() else None
    method = recognised(recipe, source.phase, *split_name(data), trained_with)
    leading = leading_phases(source)
    stage, forms = _stage_of(source, recipe)
    conditions = _conditions_of(record, trained, recipe, source.phase, leading)
    # Two looks at each test image are reported apart, also if it is the recipe that asks for them.
    asked = "mirror" if conditions.get("evaluation.mirror") else ""
    label = folder.name.removeprefix(source.phase).removeprefix("-") or asked
    usual = conditions["test images"] == "own test split" and conditions.get("test_distribution") == "uniform"
    return EvaluatedRun(
        run=source.run,
        evaluation=folder,
        source=source,
        name=_name_of(method, recipe, trained, leading),
        method=method,
        data=data,
        label=label,
        stage=f"{stage}, {label}" if label else stage,
        forms=forms if usual and not label else frozenset(),
        seed=recipe.seed,
        numbers=read_numbers(folder),
        conditions=conditions,
        checkpoint=record.source.sha256,
        started_from=origin.output(files.MODEL)[1] if (origin := source.origin()) and origin.done else None,
        num_parameters=trained.num_parameters,
        epochs=epochs_to(source, recipe),
        full_epochs=recipe.schedule.rescaled_from or None,
        cost=_cost_of(leading) if leading else dict.fromkeys(COST_KEYS),
    )


def split_name(data: str) -> tuple[str, float | None]:
    """Split cifar100-lt-rho200-seed1 into cifar100-lt and 200; without rho return the name itself and None."""
    found = re.fullmatch(r"(.+-lt)-rho(\d[\d.e+]*)(-.+)?", data)
    return (found[1], float(found[2])) if found else (data, None)


def _stage_of(source: PhaseFolder, recipe: Recipe) -> tuple[str, frozenset[bool]]:
    """Return EvaluatedRun.stage without the label, and EvaluatedRun.forms."""
    last = "stage1" if recipe.stage2 is None else "stage2"
    if source.phase == "finetune":
        origin = source.origin()
        early = origin is not None and origin.phase != last
        return ("after, without stage 2", frozenset()) if early else ("after", frozenset({True}))
    if source.phase != last:
        return "before stage 2", frozenset()
    return ("none", frozenset({True, False})) if recipe.finetune is None else ("before", frozenset({False}))


def epochs_to(source: PhaseFolder, recipe: Recipe) -> tuple[int, ...]:
    """Return the epochs of each phase up to this one."""
    origin = source.origin()
    before = () if origin is None else files.PHASES[: files.PHASES.index(origin.phase) + 1]
    return tuple(recipe.epochs_of(phase) for phase in (*before, source.phase))


def leading_phases(source: PhaseFolder) -> list[PhaseFolder]:
    """Return the phases that lead to a checkpoint, its own last; an empty list if one is missing."""
    found = [source]
    while (origin := found[0].origin()) is not None:
        if not origin.done:
            return []
        found.insert(0, origin)
    return found


def _cost_of(leading: Sequence[PhaseFolder]) -> dict[str, Any]:
    """Return the values of COST_KEYS."""
    images = seconds = 0.0
    records = [folder.record() for folder in leading]
    for folder in leading:
        table = read_metrics(folder)
        images += float((table["images_per_second"] * table["seconds"]).sum())
        seconds += float(table["seconds"].sum())
    devices = [r.device if r.device != "cpu" else f"cpu, {r.threads} thread{'s' * (r.threads > 1)}" for r in records]
    return {
        "images_per_second": images / seconds,
        "training_seconds": seconds,
        "gpu_hours": None if any(r.device == "cpu" for r in records) else sum(r.gpu_hours for r in records),
        "device": " and ".join(dict.fromkeys(devices)),
    }


def _flattened(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found |= _flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _conditions_of(
    record: EvaluationRecord, trained: PhaseRecord, recipe: Recipe, phase: str, leading: Sequence[PhaseFolder]
) -> dict[str, Any]:
    """Return everything that runs of one row share: all but the seed, with the precision that was resolved."""
    dataset, tests = trained.dataset, record.made_from.dataset
    own, _, split = tests.partition(" ")
    tables = recipe.tables_of(phase)
    del tables["seed"], tables["model"]["precision"]
    others = f"others, {files.sha256(tests.encode())[:12]}"
    return {
        "data set": dataset.name,
        "subset": dataset.fingerprint[:12],
        "test images": f"own {split or 'test'} split" if own == dataset.fingerprint else others,
        "precision": trained.precision,
        "init": leading[0].record().made_from.init[:12] if leading else "unknown",
        **_flattened(tables),
        **_flattened(record.made_from.recipe),
    }


def _name_of(method: Recognised, recipe: Recipe, trained: PhaseRecord, leading: Sequence[PhaseFolder]) -> str:
    """Return the name of the method, with up to MAX_NAMED changed keys.

    A user's own recipe has the name in its [about] table. Without one, it has the name of the recipe of cpmix that it
    is equal to, else that of its file. With more changed keys, a recipe of cpmix is another method, named by a digest.
    """
    given = trained.recipe_name or _typed_recipe(leading)
    is_file = given is not None and given not in recipe_names()
    title = [setting for setting in trained.settings if setting.strip().startswith("about")]
    if recipe.about is not None and (given not in recipe_names() or title):
        own = recipe.about.method
    elif not method.changed:
        return method.method
    elif is_file and Path(str(given)).name != files.RECIPE:
        own = Path(str(given)).stem
    elif len(named := _without_consequences(method.changed)) <= MAX_NAMED:
        return f"{method.method}, {said(named)}"
    else:
        return f"recipe {files.digest(method.changed)[:8]}"
    others = [setting for setting in trained.settings if setting not in title]
    return ", ".join([own, *([shortened(others, MAX_NAMED)] if others else [])])


def _without_consequences(changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed keys without the parameters that a term lacks because it names another function."""
    replaced = {term for term, _, key in (name.rpartition(".") for name in changed) if key in TERM_KINDS}
    return {
        name: value for name, value in changed.items() if value is not None or name.rpartition(".")[0] not in replaced
    }


def _typed_recipe(leading: Sequence[PhaseFolder]) -> str | None:
    """Return the last --recipe of the commands that trained a run, for runs that do not record it."""
    for folder in reversed(leading):
        words = folder.record().argv
        given = [w.removeprefix("--recipe=") for w in words if w.startswith("--recipe=")]
        given += [after for word, after in pairwise(words) if word == "--recipe"]
        if given:
            return given[-1]
    return None


def said(keys: Mapping[str, Any]) -> str:
    """Format changed keys as "key=value, ..."."""
    return ", ".join(f"no {key}" if value is None else f"{key}={shown(value)}" for key, value in keys.items())


def shown(value: Any) -> str:
    """Format a value of a recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    return "(none)" if value is None else "(table)" if isinstance(value, dict) else str(value)


def in_rows(measured: Sequence[EvaluatedRun]) -> list[ComparisonRow]:
    """Group runs into rows by stage and conditions; a checkpoint in several folders counts once."""
    grouped: dict[str, dict[str, EvaluatedRun]] = {}
    for run in measured:
        group = grouped.setdefault(files.canonical_json([run.stage, run.conditions]), {})
        if (twin := group.get(run.checkpoint)) is not None:
            what = "is given twice" if run.run.resolve() == twin.run.resolve() else f"holds a checkpoint of {twin.run}"
            console.note(f"compare: {run.run} {what} ({run.name}, finetune {run.stage}): counted once")
        group.setdefault(run.checkpoint, run)
    in_training = ("before stage 2", "before", "none", "after")

    def place(row: ComparisonRow) -> tuple[Any, ...]:
        run = row.first
        family, rho = split_name(run.data)
        stage = in_training.index(run.stage.split(",")[0])
        return family, -(rho or 0), run.data, run.method.order, run.name, stage, run.stage

    return sorted((ComparisonRow(list(group.values())) for group in grouped.values()), key=place)


_RESCALED = ("schedule", "confusion", "stage1", "stage2", "finetune")  # tables with counts of epochs


def differences_of(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """Return the differences between rows of one method, data set, rho and stage: row numbers (from 1) and values."""
    alike: dict[tuple[Any, ...], dict[int, EvaluatedRun]] = {}
    for number, row in enumerate(rows, start=1):
        run = row.first
        stage = run.stage.removesuffix(f", {run.label}")
        alike.setdefault((run.method.method, split_name(run.data), stage), {})[number] = run
    found = []
    for numbered in alike.values():
        group = list(numbered.values())
        keys = dict.fromkeys(key for run in group for key in run.conditions)
        values = {key: [run.conditions.get(key) for run in group] for key in keys}
        differing = {key: found for key, found in values.items() if any(v != found[0] for v in found)}
        if "schedule.epochs" in differing and len({run.method.recipe for run in group}) == 1:
            # --epochs rescales these tables too, so of them only keys that a run changed count.
            kept = {"schedule.epochs", *(key for run in group for key in run.method.changed)}
            differing = {k: v for k, v in differing.items() if k in kept or k.partition(".")[0] not in _RESCALED}
        if differing:  # none if the row is the only one, or an evaluation has two labels
            found.append({"rows": list(numbered), "keys": differing})
    return found
