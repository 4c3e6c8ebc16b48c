"""compare: evaluations of many runs in one table, or in the form of a table of CP-Mix's paper.

Reads records and metrics; trains and predicts nothing. Runs share a row when they agree in all that was recorded of
them but the seed. What rows of one method differ in is said below the table.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cpmix_cli import artifacts, console, runs
from cpmix_cli.data.longtail import GROUPS
from cpmix_cli.errors import EnvironmentFault, InputError
from cpmix_cli.paper import COPIED, TABLES, Column, PaperTable
from cpmix_cli.paper import Row as PaperRow
from cpmix_cli.phases.evaluate import MARK, legend, read_numbers
from cpmix_cli.phases.methods import Recognised, recognised
from cpmix_cli.phases.status import epochs_of
from cpmix_cli.recipe import Evaluation, Recipe, recipe_names
from cpmix_cli.report.tables import Sheet, csv_text, latex, markdown, plain
from cpmix_cli.runs import PhaseFolder

MEASURES = {"top1": "top-1", "many": "many", "medium": "medium", "few": "few", "ece": "ECE"}
"""Keys of metrics.json, per cent -> column names."""
MAX_NAMED = 3
"""Changed keys with which a method still goes by its name."""
MAX_LISTED = 8
"""Keys that a line below the table lists."""
FORMS: dict[str, Callable[[Sheet], list[str]]] = {"table": plain, "markdown": markdown, "latex": latex}


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    folders: list[Path]
    paper: str | None
    form: str
    """table, csv, markdown or latex; JSON where console.as_json says so."""
    out: Path | None
    overwrite: bool


@dataclass(frozen=True)
class Cost:
    """What the phases took that lead to a checkpoint: all of them, wherever they are."""

    seconds: float
    """Of their epochs, by the clock."""
    images: float
    """That passed through the network; an image of several terms counts as often."""
    gpu_hours: float | None
    """None on a CPU."""
    device: str


@dataclass(frozen=True)
class Measured:
    """One evaluation of one run."""

    run: Path
    name: str
    """Of its method, with the keys that were changed."""
    method: Recognised
    data: str
    stage: str
    """before or after the finetune, none where the recipe has none, or before stage 2; and the evaluation's label."""
    forms: frozenset[bool]
    """Which rows of the paper it may stand for, by Row.finetuned."""
    seed: int
    numbers: dict[str, Any]
    conditions: dict[str, Any]
    """All that it has to share with others in its row, by names with dots."""
    checkpoint: str
    num_parameters: int
    epochs: tuple[int, ...]
    """Of the phases that lead to the checkpoint."""
    full_epochs: int | None
    """Of both stages in the recipe, where --epochs made them fewer or more."""
    cost: Cost | None
    """None where a phase is out of reach."""

    @property
    def key(self) -> str:
        """Equal for runs that share a row."""
        return artifacts.canonical_json([self.stage, self.conditions])

    @property
    def place(self) -> tuple[str, float, str, int, str]:
        """Of its row in the table."""
        family, rho = split_name(self.data)
        return (family, -(rho or 0), self.data, self.method.order, self.name)


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed."""

    runs: list[Measured]

    @property
    def first(self) -> Measured:
        """One of them, for what they share."""
        return self.runs[0]

    @property
    def leaked(self) -> bool:
        """Test labels took part in the training."""
        return self.first.numbers.get("confusion_source") == "test_legacy"

    def statistics(self, measure: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation of a measure; None where there is none."""
        values = [run.numbers[measure] for run in self.runs if run.numbers[measure] is not None]
        return (fmean(values) if values else None, stdev(values) if len(values) > 1 else None)

    def cost(self) -> dict[str, Any]:
        """Means over the runs; None where one has no cost, and of speed where devices differ."""
        costs = [run.cost for run in self.runs if run.cost is not None]
        known = len(costs) == len(self.runs)
        devices = sorted({cost.device for cost in costs})
        alike = known and len(devices) == 1
        on_gpu = known and all(cost.gpu_hours is not None for cost in costs)
        return {
            "images_per_second": fmean(c.images / c.seconds for c in costs) if alike else None,
            "training_seconds": fmean(c.seconds for c in costs) if alike else None,
            "gpu_hours": fmean(c.gpu_hours or 0.0 for c in costs) if on_gpu else None,
            "device": ", ".join(devices) if known else None,
        }

    def published(self) -> tuple[PaperRow, str] | None:
        """The paper's row and top-1 accuracy for it."""
        for table in TABLES.values():
            for row in table.rows:
                for column, cell in zip(table.columns, row.cells, strict=True):
                    if cell is not None and column.measure == "top1" and self.stands_for(row, column):
                        return row, cell
        return None

    def stands_for(self, row: PaperRow, column: Column) -> bool:
        """Whether a cell of the paper is of this method, data set and stage."""
        run = self.first
        same = run.data == column.data and f"{column.family}/{row.recipe}" in run.method.exact
        return same and row.finetuned in run.forms


def run(options: Options) -> None:
    """Gather the evaluations of all runs and lay them out.

    Raises:
        InputError: a folder that holds no run, or none of its evaluations is of use; damaged records or metrics.
        EnvironmentFault: --out exists, or cannot be written.
    """
    if options.out is not None and options.out.exists() and not options.overwrite:
        raise EnvironmentFault(f"{options.out} exists", fix="write elsewhere, or replace it with --overwrite")
    measured: list[Measured] = []
    left_out: list[str] = []
    seen: set[tuple[Path, str | None]] = set()
    for folder in options.folders:
        root, phase = runs.locate(folder)
        if (root.resolve(), phase) in seen:
            console.note(f"compare: {folder} is given twice, and counted once")
        else:
            seen.add((root.resolve(), phase))
            found, others = evaluations_of(root, phase)
            measured += found
            left_out += others
    rows = in_rows(measured)
    if options.paper is None:
        fields: dict[str, Any] = {"rows": [told(row) for row in rows], "differences": differences_of(rows)}
        sheets, records = sheets_of(rows, with_deviations=options.form != "table"), [flat(row) for row in rows]
    else:
        table = TABLES[options.paper]
        for other in (row.first for row in rows if not places(row, table)):
            what = f"{other.name}, finetune {other.stage}, {other.data}"
            console.note(f"compare: in no cell of {options.paper}: {what} ({other.run})")
        records = paper_records(table, rows)
        fields = {"paper": options.paper, "title": table.title, "note": table.note, "cells": records}
        sheets = [paper_sheet(table, rows)]
    publish(options, {"command": "compare", **fields, "left_out": left_out}, sheets, records)


def publish(
    options: Options, fields: dict[str, Any], sheets: Sequence[Sheet], records: Sequence[Mapping[str, Any]]
) -> None:
    """The result on stdout, or in --out."""
    if options.form == "csv":
        lines = csv_text(records)
    else:
        form = FORMS[options.form]
        lines = [line for number, sheet in enumerate(sheets) for line in (*([""] if number else []), *form(sheet))]
        if options.form == "latex":
            lines.insert(0, r"% \usepackage{booktabs}")
    if options.out is None:
        console.result(fields, lines=lines)
        return
    text = artifacts.json_text(fields) if console.as_json else "\n".join(map(console.printable, lines))
    artifacts.make_folder(options.out.parent)
    artifacts.sweep(options.out)
    artifacts.publish(options.out, (text + "\n").encode("utf-8", "backslashreplace"))
    console.result({"command": "compare", "status": "done", "file": str(options.out)}, lines=[f"done: {options.out}"])


# -- reading -----------------------------------------------------------------------------------------------------------


def evaluations_of(root: Path, phase: str | None) -> tuple[list[Measured], list[str]]:
    """The evaluations of a run (of one phase) that are of its present checkpoints; and why others are left out, a line
    each, which are warnings too.

    Raises:
        InputError: no phase, no such evaluation, or a damaged record.
    """
    runs.begun_phases(root, needed_by="compare")
    found, left_out = [], []
    for path in sorted((root / "evaluation").glob(f"*/{artifacts.RUN}")):
        folder = path.parent
        record = runs.read_run(folder, runs.EvaluationEntry)
        if record["phase"] != f"evaluation/{folder.name}":
            raise InputError(f"{path} is of {record['phase']}, and not of evaluation/{folder.name}")
        source = PhaseFolder(root, record["source"]["phase"])
        if phase is not None and source.phase != phase:
            continue
        if why := unusable(source, record):
            left_out.append(f"{folder} is left out: {why}")
            console.warn(left_out[-1])
        else:
            found.append(measured_in(folder, record, source))
    if not found:
        flags = ["--phase", phase] if phase else []
        raise InputError(
            f"{root} holds no evaluation" + (f" of {phase}" if phase else "") + (" of use" if left_out else ""),
            needed_by="compare",
            fix=console.typed("evaluate", "--from", root, *flags),
        )
    return found, left_out


def unusable(source: PhaseFolder, record: Mapping[str, Any]) -> str | None:
    """Why an evaluation says nothing of its run, or None."""
    status = source.status()
    if status == "absent":
        return f"its run has no {source.phase}"
    if status == "interrupted":
        return f"{source.phase} is being trained again"
    if status == "stale":
        return f"{source.phase} is stale ({source.stale_because()})"
    if record["source"]["sha256"] != source.output(artifacts.MODEL)[1]:
        return f"it is of an older checkpoint of {source.phase}"
    return None


def measured_in(folder: Path, record: dict[str, Any], source: PhaseFolder) -> Measured:
    """An evaluation with what is recorded of its checkpoint.

    Raises:
        InputError: a record, recipe or table is damaged.
    """
    trained, recipe = source.record(), source.recipe()
    data = trained["dataset"]["name"]
    family, rho = split_name(data)
    method = recognised(recipe, source.phase, family, rho)
    leading = leading_phases(source)
    label = folder.name.removeprefix(source.phase).removeprefix("-")
    stage, forms = stage_of(source, recipe)
    conditions = conditions_of(folder, record, trained, recipe, source.phase, leading)
    usual = conditions["test images"] == "own test split" and conditions["test_distribution"] == "uniform"
    rescaled = recipe.schedule.rescaled_from
    return Measured(
        run=source.run,
        name=name_of(method, leading),
        method=method,
        data=data,
        stage=f"{stage}, {label}" if label else stage,
        forms=forms if usual and not label else frozenset(),
        seed=recipe.seed,
        numbers=read_numbers(folder),
        conditions=conditions,
        checkpoint=record["source"]["sha256"],
        num_parameters=trained["num_parameters"],
        epochs=epochs_to(source, recipe),
        full_epochs=rescaled or None,
        cost=cost_of(leading) if leading is not None else None,
    )


def split_name(data: str) -> tuple[str, float | None]:
    """cifar100-lt and 200 of cifar100-lt-rho200-seed1; the name itself where it says no rho."""
    found = re.fullmatch(r"(.+-lt)-rho(\d[\d.e+]*)(-.+)?", data)
    return (found[1], float(found[2])) if found else (data, None)


def stage_of(source: PhaseFolder, recipe: Recipe) -> tuple[str, frozenset[bool]]:
    """Measured.stage but for a label, and Measured.forms."""
    last = "stage1" if recipe.stage2 is None else "stage2"
    if source.phase == "finetune":
        origin = source.origin()
        early = origin is not None and origin.phase != last
        return ("after, without stage 2", frozenset()) if early else ("after", frozenset({True}))
    if source.phase != last:
        return "before stage 2", frozenset()
    return ("none", frozenset({True, False})) if recipe.finetune is None else ("before", frozenset({False}))


def epochs_to(source: PhaseFolder, recipe: Recipe) -> tuple[int, ...]:
    """Epochs of the phases up to this one."""
    passed = [source.phase]
    if source.phase != "stage1":
        origin = source.origin()
        passed = ["stage1", *(["stage2"] if origin is not None and origin.phase == "stage2" else []), source.phase]
    return tuple(epochs_of(recipe)[phase] for phase in passed)


def leading_phases(source: PhaseFolder) -> list[PhaseFolder] | None:
    """The phases that lead to a checkpoint, its own last; None where one is out of reach."""
    found = [source]
    while (origin := found[0].origin()) is not None:
        if not origin.done:
            return None
        found.insert(0, origin)
    return found


def cost_of(leading: Sequence[PhaseFolder]) -> Cost:
    """See Cost.

    Raises:
        InputError: metrics are damaged.
    """
    images = seconds = 0.0
    records = [folder.record() for folder in leading]
    for folder in leading:
        path, sha = folder.output(artifacts.METRICS)
        table = artifacts.read_table(path, sha=sha)
        if table.empty or not set(artifacts.METRICS_COLUMNS) <= set(table.columns):
            raise InputError(f"{path} holds no metrics of {folder.phase}", fix="train again with --overwrite")
        images += float((table["images_per_second"] * table["seconds"]).sum())
        seconds += float(table["seconds"].sum())
    devices = [
        r["device"] if r["device"] != "cpu" else f"cpu, {r['threads']} thread{'s' * (r['threads'] > 1)}"
        for r in records
    ]
    return Cost(
        seconds=seconds,
        images=images,
        gpu_hours=None if any(r["device"] == "cpu" for r in records) else sum(r["gpu_hours"] for r in records),
        device=" and ".join(dict.fromkeys(devices)),
    )


def flattened(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by names with dots."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


USUAL = {
    **flattened({"evaluation": Evaluation().model_dump()}),
    "few_inclusive": False,
    "test_distribution": "uniform",
}
"""What an evaluation says that was made before one could choose."""


def conditions_of(
    folder: Path,
    record: Mapping[str, Any],
    trained: Mapping[str, Any],
    recipe: Recipe,
    phase: str,
    leading: Sequence[PhaseFolder] | None,
) -> dict[str, Any]:
    """What runs of one row share: all but the seed, and the precision as it was resolved.

    Raises:
        InputError: the evaluation in `folder` does not say how it was made.
    """
    dataset, made_from = trained["dataset"], record["made_from"]
    evaluated = made_from.get("recipe")
    if not isinstance(evaluated, dict):
        raise InputError(f"{folder / artifacts.RUN} says nothing of how it was evaluated", fix="evaluate again")
    tests = str(made_from.get("dataset"))
    own, _, split = tests.partition(" ")
    own_tests = own == dataset["fingerprint"]
    tables = {key: value for key, value in recipe.tables_of(phase).items() if key != "seed"}
    tables["model"] = {key: value for key, value in tables["model"].items() if key != "precision"}
    init = "unknown"
    if leading is not None:
        init = str(leading[0].record()["made_from"].get("init", "none"))[:12]
    return {
        "data set": dataset["name"],
        "subset": dataset["fingerprint"][:12],
        "test images": f"own {split or 'test'} split"
        if own_tests
        else f"others, {artifacts.sha256(tests.encode())[:12]}",
        "precision": trained["precision"],
        "init": init,
        **flattened(tables),
        **USUAL,
        **flattened(evaluated),
    }


def name_of(method: Recognised, leading: Sequence[PhaseFolder] | None) -> str:
    """The method's name, and in brackets up to MAX_NAMED keys in which it is another. Beyond that it is another method,
    and goes by the file that --recipe named, or by a digest of the keys.
    """
    if not method.changed:
        return method.method
    if len(method.changed) <= MAX_NAMED:
        return f"{method.method} ({said(method.changed)})"
    for folder in reversed(leading or []):
        words = [str(word) for word in folder.record().get("argv", [])]
        given = [w.removeprefix("--recipe=") for w in words if w.startswith("--recipe=")]
        given += [after for word, after in pairwise(words) if word == "--recipe"]
        if given and given[-1] not in recipe_names() and Path(given[-1]).name != artifacts.RECIPE:
            return Path(given[-1]).stem
    return f"recipe {artifacts.digest(method.changed)[:8]}"


def said(keys: Mapping[str, Any]) -> str:
    """key=value, ..."""
    return ", ".join(f"no {key}" if value is None else f"{key}={shown(value)}" for key, value in keys.items())


def shown(value: Any) -> str:
    """A recipe's value in a line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "(none)" if value is None else "(table)" if isinstance(value, dict) else str(value)


# -- rows --------------------------------------------------------------------------------------------------------------


def in_rows(measured: Sequence[Measured]) -> list[Row]:
    """Runs by what they share; a checkpoint that stands in several folders counts once."""
    grouped: dict[str, dict[str, Measured]] = {}
    for run in measured:
        group = grouped.setdefault(run.key, {})
        if (twin := group.get(run.checkpoint)) is not None:
            console.note(f"compare: {run.run} and {twin.run} hold the same checkpoint ({run.stage}): counted once")
        group.setdefault(run.checkpoint, run)
    rows = [Row(list(group.values())) for group in grouped.values()]
    # Of one method in the order of training.
    order = ("before stage 2", "before", "none", "after")
    return sorted(rows, key=lambda r: (r.first.place, order.index(r.first.stage.split(",")[0]), r.first.stage))


def differences_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What rows of the same method, data set, rho and stage differ in: row numbers (from 1), and values by key."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(rows):
        run = row.first
        alike.setdefault((run.method.method, split_name(run.data), run.stage), []).append(number)
    found = []
    for numbers in alike.values():
        if len(numbers) > 1:
            group = [rows[number].first for number in numbers]
            keys = dict.fromkeys(key for run in group for key in run.conditions)
            values = {key: [run.conditions.get(key) for run in group] for key in keys}
            differing = {key: found for key, found in values.items() if any(v != found[0] for v in found)}
            if "schedule.epochs" in differing and len({run.method.recipe for run in group}) == 1:
                # --epochs rescales other keys with it; those that were changed beside it are known.
                kept = {"schedule.epochs", *(key for run in group for key in run.method.changed)}
                kept |= {key for key in differing if key.partition(".")[0] not in RESCALED}
                differing = {key: found for key, found in differing.items() if key in kept}
            found.append({"rows": [number + 1 for number in numbers], "keys": differing})
    return found


RESCALED = ("schedule", "confusion", "stage1", "stage2", "finetune")
"""Tables with counts of epochs."""


def difference_lines(rows: Sequence[Row]) -> list[str]:
    """The same as lines."""
    lines = []
    for entry in differences_of(rows):
        keys = [f"{key}: {', '.join(map(shown, values))}" for key, values in entry["keys"].items()]
        if len(keys) > MAX_LISTED:
            keys = [*keys[:MAX_LISTED], f"and {len(keys) - MAX_LISTED} more keys"]
        lines.append(f"rows {listed(entry['rows'])} differ in {'; '.join(keys)}")
    return lines


def listed(numbers: Sequence[int]) -> str:
    """1, 2 and 4."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def told(row: Row) -> dict[str, Any]:
    """A row as plain values, full precision."""
    run, published = row.first, row.published()
    mean = row.statistics("top1")[0]
    cost = row.cost()
    return {
        "method": run.name,
        "recipe": run.method.recipe,
        "changed": run.method.changed,
        "data": run.data,
        "rho": split_name(run.data)[1],
        "finetune": run.stage,
        "n": len(row.runs),
        "seeds": [r.seed for r in row.runs],
        "runs": [str(r.run) for r in row.runs],
        **{key: dict(zip(("mean", "std"), row.statistics(key), strict=True)) for key in MEASURES},
        "test_labels_in_training": row.leaked,
        "num_parameters": run.num_parameters,
        "num_experts": run.numbers.get("num_experts"),
        "precision": run.conditions["precision"],
        "epochs": list(run.epochs),
        "full_epochs": run.full_epochs,
        **cost,
        "paper": float(published[1]) if published else None,
        "paper_copied": published[0].copied if published else None,
        "difference": mean - float(published[1]) if published and mean is not None else None,
        "conditions": run.conditions,
    }


def flat(row: Row) -> dict[str, Any]:
    """The same for CSV: no value is a list or table."""
    fields = told(row)
    measures = {f"{key}_{part}": value for key in MEASURES for part, value in fields[key].items()}
    record: dict[str, Any] = {}
    for key, value in fields.items():
        if key in MEASURES:
            record |= {name: number for name, number in measures.items() if name.startswith(f"{key}_")}
        elif key in ("seeds", "runs"):
            record[key] = " ".join(map(str, value))
        elif key == "epochs":
            record[key] = "+".join(map(str, value))
        elif key == "changed":
            record[key] = said(value)
        elif key != "conditions":
            record[key] = value
    return record


# -- laying out --------------------------------------------------------------------------------------------------------


def with_deviation(row: Row, measure: str) -> str:
    """A mean with its deviation, two decimals."""
    mean, deviation = row.statistics(measure)
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} +- {deviation:.2f}"


def sheets_of(rows: Sequence[Row], *, with_deviations: bool) -> list[Sheet]:
    """A table of accuracies for each data set, and one of what the training took.

    Args:
        rows: in their order.
        with_deviations: of every measure, and not of top-1 alone, which keeps the table within a terminal.
    """
    numbered = list(enumerate(rows, start=1))
    sheets = []
    for data in dict.fromkeys(row.first.data for row in rows):
        sheets.append(
            accuracy_sheet(data, [(n, row) for n, row in numbered if row.first.data == data], with_deviations)
        )
    lines = accuracy_lines(numbered, with_deviations)
    sheets[-1] = replace(sheets[-1], lines=lines)
    return [*sheets, cost_sheet(numbered)]


def accuracy_sheet(data: str, numbered: Sequence[tuple[int, Row]], with_deviations: bool) -> Sheet:
    """Accuracies on one data set."""
    header = ["#", "method", "finetune", ">n", *(f">{name}" for name in MEASURES.values())]
    published = {number: row.published() for number, row in numbered}
    if any(published.values()):
        header += [">paper", ">diff"]
    table = []
    for number, row in numbered:
        run = row.first
        cells = [str(number), run.name + MARK * row.leaked, run.stage, str(len(row.runs))]
        for measure in MEASURES:
            mean = row.statistics(measure)[0]
            short = "-" if mean is None else f"{mean:.2f}"
            cells.append(with_deviation(row, measure) if with_deviations or measure == "top1" else short)
        if any(published.values()):
            found, mean = published[number], row.statistics("top1")[0]
            if found is None or mean is None:
                cells += ["-", "-"]
            else:
                cells += [found[1] + "*" * found[0].copied, f"{mean - float(found[1]):+.2f}"]
        table.append(cells)
    return Sheet(f"{data}, per cent", header, table)


def accuracy_lines(numbered: Sequence[tuple[int, Row]], with_deviations: bool) -> list[str]:
    """What is said below the accuracies."""
    rows = [row for _, row in numbered]
    lines = legend([[MARK] for row in rows if row.leaked])
    if any(len(row.runs) > 1 for row in rows):
        rest = "" if with_deviations else "; of other columns in --format csv"
        lines.append(f"n: runs; +-: sample standard deviation over them{rest}")
    for number, row in numbered:
        seeds = [r.seed for r in row.runs]
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            lines.append(
                f"row {number} has several runs of seed {listed(twice)}: its +- is not that of {len(seeds)} seeds"
            )
        run = row.first
        if len(run.method.changed) > MAX_NAMED:
            keys = dict(list(run.method.changed.items())[:MAX_LISTED])
            more = len(run.method.changed) - len(keys)
            lines.append(
                f"{run.name}: {run.method.recipe} but for {said(keys)}" + (f" and {more} more" if more else "")
            )
    known = [(number, row, found) for number, row in numbered if (found := row.published())]
    if known:
        lines.append("paper: top-1 in its Tables 1 to 4")
    if any(found[0].copied for *_, found in known):
        lines.append(f"* {COPIED}")
    fewer: dict[str, list[int]] = {}
    for number, row, _ in known:
        if row.first.full_epochs is not None:
            fewer.setdefault(epochs_note(row), []).append(number)
    for note, numbers in fewer.items():
        lines.append(f"row{'s' * (len(numbers) > 1)} {listed(numbers)}: {note}; diff is to the paper's full training")
    return [*lines, *difference_lines(rows)]


def epochs_note(row: Row) -> str:
    """10 of 300 epochs; of both stages."""
    return f"{row.first.conditions['schedule.epochs']} of {row.first.full_epochs} epochs"


def cost_sheet(numbered: Sequence[tuple[int, Row]]) -> Sheet:
    """What the training took."""
    costs = {number: row.cost() for number, row in numbered}
    on_gpu = any(cost["gpu_hours"] is not None for cost in costs.values())
    header = ["#", ">parameters", ">epochs", ">images/s", ">training", *([">GPU-hours"] if on_gpu else []), "device"]
    same: dict[tuple[str, ...], list[int]] = {}
    for number, row in numbered:
        cost = costs[number]
        speed, seconds, hours = (cost[key] for key in ("images_per_second", "training_seconds", "gpu_hours"))
        cells = (
            f"{row.first.num_parameters:,}",
            "+".join(map(str, row.first.epochs)),
            "-" if speed is None else f"{speed:,.0f}",
            "-" if seconds is None else console.duration(seconds),
            *(["-" if hours is None else f"{hours:.2f}"] if on_gpu else []),
            cost["device"] or "-",
        )
        # Evaluations of one checkpoint, in one line; whatever else looks alike, in its own.
        checkpoints = tuple(sorted(r.checkpoint for r in row.runs))
        same.setdefault((*checkpoints, *cells), []).append(number)
    width = len(header) - 1
    table = [[listed(numbers), *key[-width:]] for key, numbers in same.items()]
    lines = [
        "of all phases that lead to the checkpoint, a shared stage 1 in each row; a mean over n",
        "images/s: through the network, an image once for each term",
    ]
    if any(cost["device"] is None for cost in costs.values()):
        lines.append("-: a phase is out of reach")
    return Sheet("training", header, table, lines)


def places(row: Row, table: PaperTable) -> list[tuple[PaperRow, Column]]:
    """The cells of a table that a row stands for."""
    return [(theirs, column) for theirs in table.rows for column in table.columns if row.stands_for(theirs, column)]


def paper_records(table: PaperTable, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A record for every cell of a table and each row of ours for it; one without where there is none."""
    records = []
    for theirs in table.rows:
        for column, cell in zip(table.columns, theirs.cells, strict=True):
            found: list[Row | None] = [row for row in rows if row.stands_for(theirs, column)]
            for ours in found or [None]:
                mean, deviation = ours.statistics(column.measure) if ours is not None else (None, None)
                records.append(
                    {
                        "method": theirs.name,
                        "column": column.header,
                        "data": column.data,
                        "measure": column.measure,
                        "paper": float(cell) if cell is not None else None,
                        "paper_copied": theirs.copied,
                        "ours_mean": mean,
                        "ours_std": deviation,
                        "n": len(ours.runs) if ours is not None else 0,
                        "epochs": ours.first.conditions["schedule.epochs"] if ours is not None else None,
                        "full_epochs": ours.first.full_epochs if ours is not None else None,
                        "test_labels_in_training": ours.leaked if ours is not None else None,
                        "runs": " ".join(str(r.run) for r in ours.runs) if ours is not None else "",
                        "note": theirs.note,
                    }
                )
    return records


def paper_sheet(table: PaperTable, rows: Sequence[Row]) -> Sheet:
    """A table of the paper, each row followed by ours, empty where no run is."""
    letters: dict[str, str] = {}

    def cell_of(row: Row, column: Column, beside: int) -> str:
        seeds = f"{len(row.runs)} run{'s' * (len(row.runs) > 1)}"
        note = seeds if row.first.full_epochs is None else f"{seeds} of {epochs_note(row)}"
        few = row.first.conditions["few_inclusive"]
        if column.measure in GROUPS and few != table.few_inclusive:
            note += ", classes of 20 images are few" if few else ", classes of 20 images are medium"
        if beside > 1:
            note += f", {row.first.run}"
        letter = letters.setdefault(note, letter_of(len(letters)))
        return f"{with_deviation(row, column.measure)} {letter}" + MARK * row.leaked

    body = []
    for theirs in table.rows:
        printed = ["-" if cell is None else cell for cell in theirs.cells]
        body.append([theirs.name + "*" * theirs.copied, "paper", *printed])
        ours = []
        for column in table.columns:
            found = [row for row in rows if row.stands_for(theirs, column)]
            ours.append(" / ".join(cell_of(row, column, len(found)) for row in found))
        body.append(["", "ours", *ours])
    lines = [f"{letter}: {note}" for note, letter in letters.items()]
    lines += legend(body)
    if any(row.copied for row in table.rows):
        lines.append(f"* {COPIED}")
    lines += [f"{row.name}: {row.note}" for row in table.rows if row.note]
    lines += [table.note] if table.note else []
    header = ["method", "", *(f">{column.header}" for column in table.columns)]
    return Sheet(f"{table.title}, per cent", header, body, lines)


def letter_of(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (letter_of(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)
