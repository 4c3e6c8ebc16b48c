"""run: the six commands in their order, for one seed or several, and an evaluation of each trained phase.

Each step is one of the commands, as a user would type it, and its line is printed. So a run folder of `run` has the
bytes of one that was made by hand, and `run` goes on with what another command began. Steps import torch, not this
file: a wrong flag is refused at once.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from cpmix_cli.artifacts import files, records
from cpmix_cli.flags import (
    SOURCE_NAMES,
    BuildOptions,
    CompareOptions,
    EvaluateOptions,
    FinetuneOptions,
    ReportOptions,
    RunOptions,
    TrainingOptions,
    TrainStage1Options,
    TrainStage2Options,
    given_flags,
    words_of,
)
from cpmix_cli.recipe.early_checks import check_request, was_made_with_plugin
from cpmix_cli.recipe.loading import load, of_dataset, recipe_names
from cpmix_cli.runtime import console, ranks, signals
from cpmix_cli.runtime.errors import EnvironmentFault, InputError, UsageError, counted
from cpmix_cli.runtime.rounding import percent, signed
from cpmix_cli.runtime.text import quoted

if TYPE_CHECKING:
    from cpmix_cli.data.dataset import Dataset

Perform = Callable[[str, Any], object]
"""Does the command of a name with its options, in this process."""
OVERWRITING = "overwriting.json"
"""Steps that an unfinished `run --overwrite` has done, in its run folder."""
LATER = {"stage2": ("train-stage2", TrainStage2Options), "finetune": ("finetune", FinetuneOptions)}
"""Phase after stage 1 -> its command and the options of this."""
_TRAINING = {known.name for known in fields(TrainingOptions)}
_BUILD = {known.name for known in fields(BuildOptions)}
_OF_BUILD = _BUILD - _TRAINING - {"source", "out"}
Measured = dict[str, dict[str, float]]
"""Split -> phase -> balanced accuracy in per cent."""


class _Overwritten(records.Record):
    """Content of OVERWRITING."""

    begun: str
    """Digest of the flags of the run."""
    done: list[str]
    """Command lines of the finished steps."""


@dataclass
class _Steps:
    """Commands that are done one after the other in this process."""

    perform: Perform
    begun: str
    """Digest of the flags of the run."""
    marker: Path | None = None
    """File that says which steps an unfinished --overwrite has done; None without --overwrite."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """JSON results of the steps."""
    _done: list[str] = field(default_factory=list)

    def overwrite(self, marker: Path) -> None:
        """From now on, overwrite what no earlier, interrupted call with the same flags has made anew."""
        self.marker = marker
        if files.is_there(marker):
            try:
                earlier = records.read_record(marker, _Overwritten)
            except InputError as fault:
                raise EnvironmentFault(
                    f"{marker} is damaged, or a file that cpmix did not write", fix="move it to another folder"
                ) from fault
            self._done = list(earlier.done) if earlier.begun == self.begun else []

    def do(self, name: str, options: Any, *, quiet: bool = False) -> dict[str, Any]:
        """Do a command and return its JSON result.

        Args:
            name: name of the command.
            options: its options, without --overwrite.
            quiet: print nothing of its result.

        Raises:
            CpmixError: the command fails.
            Interrupted: a signal came at the end of the step before.
        """
        if signals.pending():
            raise signals.interrupted("what was published stays")
        words = [name, *words_of(options)]
        line = console.typed(*words)
        if self.marker is not None and hasattr(options, "overwrite") and line not in self._done:
            options, words = replace(options, overwrite=True), [*words, "--overwrite"]
        console.note(f"$ {console.typed(*words)}")
        with console.step(name, [str(word) for word in words], quiet=quiet) as found:
            try:
                self.perform(name, options)
            except EnvironmentFault as fault:
                fault.needed_by = fault.needed_by or name
                raise
        _free_memory()
        if self.marker is not None:
            self._done.append(line)
            files.make_folder(self.marker.parent)
            records.publish_record(
                self.marker, {"format": records.FORMAT, "begun": self.begun, "done": list(dict.fromkeys(self._done))}
            )
        self.results += found
        return found[0]


def _free_memory() -> None:
    """Free what a step leaves: cycles of objects, and on a GPU the memory that torch keeps."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Trained:
    """Run of one seed whose phases are trained and evaluated."""

    root: Path
    phases: list[str]
    measured: Measured
    data: Path | None
    """--data of later commands; None if the records of the run lead to the data set."""
    data_root: Path | None


def run(options: RunOptions, perform: Perform) -> None:
    """Build, train, evaluate and report; show which phase to use.

    Args:
        options: flags of the command.
        perform: see Perform.

    Raises:
        UsageError: SOURCE|DATA is neither, a flag does not go with it, the recipe has errors, or there are several
            ranks.
        CpmixError: a step fails, with the exit code of its command.
    """
    _refuse_ranks()
    given = _data_folder(options)
    _check_recipe(options, given)
    if given is None and options.source not in SOURCE_NAMES:
        from cpmix_cli.data.sources import check_source

        check_source(options.source)
    steps = _Steps(perform, files.digest({name: str(value) for name, value in given_flags(options).items()}))
    with tempfile.TemporaryDirectory(prefix="cpmix-") if given is None and options.dry_run else nullcontext() as spare:
        overwrites = options.overwrite and not options.dry_run
        if overwrites and options.out is not None:
            steps.overwrite(options.out / OVERWRITING)
        data = given or _build(steps, options, spare)
        # Imported here: they import torch, or pandas, which the first step has said that it loads.
        from cpmix_cli.data.dataset import open_dataset

        dataset = open_dataset(data, data_root=options.data_root if given else None)
        out = options.out or Path("ckpt") / dataset.record.name
        if overwrites and steps.marker is None:
            steps.overwrite(out / OVERWRITING)
        roots = {out: options.seed} if options.seeds is None else {out / f"seed-{s}": s for s in _seeds(options)}
        asked = _for_training(options, dataset, is_source=given is None)
        runs = [_train(steps, options, replace(asked, seed=seed), dataset, root) for root, seed in roots.items()]
    if options.dry_run:
        status = "dry run" if any(step["status"] == "dry run" for step in steps.results) else "up to date"
        fields = {"status": status, "data": None if spare else str(data), "steps": steps.results}
        console.result(fields, lines=[f"{status}: {out}"])
        return
    _finish(steps, dataset, out, runs)


def _refuse_ranks() -> None:
    if (size := ranks.find(os.environ).size) > 1:
        raise UsageError(
            f"run does its steps in one process, and {size} ranks were started",
            fix="train the phases with torchrun or srun, each by its command; then give the run command in one "
            "process, which evaluates and reports them",
        )


def _data_folder(options: RunOptions) -> Path | None:
    """Return the data set folder that is named in place of a source; None for a source.

    A word that is both is the source, whatever folders there are: ./digits is the folder.
    """
    folder = Path(options.source).expanduser()
    if not (folder / files.DATASET).is_file():
        return None
    if options.source in SOURCE_NAMES:
        console.note(f"run: {options.source} is the source; the data set folder of that name is ./{options.source}")
        return None
    given = [name for name in given_flags(options) if name.removeprefix("--").replace("-", "_") in _OF_BUILD]
    if options.data is not None:
        given.append("--data")
    if given:
        raise UsageError(
            f"{folder} is a data set folder, which is built already; {', '.join(given)} would build one",
            fix=f"drop {' '.join(given)}, or name a source in place of {quoted(folder)}",
        )
    return folder


def _check_recipe(options: RunOptions, data: Path | None) -> None:
    """Check the flags of a recipe as far as possible before anything is built or imported."""
    if options.recipe == "":  # an unset variable of a shell
        raise UsageError("--recipe is empty", fix="give a name that cpmix recipes lists, or drop the flag")
    if options.seed is not None and options.seeds is not None:
        raise UsageError("--seed and --seeds are both given", fix="drop one of the two flags")
    name = options.recipe
    if name is None and options.init is not None:  # the weights decide the recipe
        return
    if data is None:
        source = "image-folder" if options.source == "parquet" else options.source
        homes = [folder for folder in (source, f"{source}-lt") if f"{folder}/cpmix" in recipe_names()]
        name = of_dataset(name, f"{homes[0]}/cpmix") if homes else name
    try:
        check_request(name, options.settings, options.epochs, data=data)
    except UsageError as fault:
        if options.out is None or not any(was_made_with_plugin(options.out / phase) for phase in files.PHASES):
            raise
        from cpmix_cli.runs.folders import PhaseFolder
        from cpmix_cli.runs.plugin_needs import needed_by

        raise needed_by([PhaseFolder(options.out, phase) for phase in files.PHASES]) or fault from None


def _seeds(options: RunOptions) -> list[int]:
    return [int(part) for part in (options.seeds or "").split(",")]


def _build(steps: _Steps, options: RunOptions, spare: str | None) -> Path:
    """Build the data set, in the folder `spare` if there is one, and return its folder."""
    own = {name: getattr(options, name) for name in _BUILD}
    root = options.data_root or (Path(place) if (place := os.environ.get("CPMIX_DATA_DIR")) else None)
    folder = Path(spare) / "data" if spare is not None else options.data
    # Without --out, the place of the marker is known only by the name of the data set.
    overwrite = options.overwrite and not options.dry_run and steps.marker is None
    if options.init is not None and options.image_size is None and options.pack is None:
        from cpmix_cli.training.starting_point import image_size_for

        own["image_size"] = image_size_for(options.init, options.source, options.settings)
    build = BuildOptions(**{**own, "out": folder, "data_root": root, "overwrite": overwrite})
    try:
        return Path(str(steps.do("build-lt", build)["folder"]))
    except EnvironmentFault as fault:
        fault.fix = fault.fix.replace("--out FOLDER", "--data FOLDER")
        raise


def _for_training(options: RunOptions, dataset: "Dataset", *, is_source: bool) -> TrainingOptions:
    """Return the flags of all phases, with the settings that the default recipe needs for these images."""
    from cpmix_cli.training.checks import fitting_settings

    asked = TrainingOptions(**{name: getattr(options, name) for name in _TRAINING})
    # Without --dry-run, the steps overwrite only what an earlier call has not made anew: _Steps.overwrite().
    root, overwrite = None if is_source else options.data_root, options.overwrite and options.dry_run
    asked = replace(asked, data=None, data_root=root, overwrite=overwrite)
    if options.recipe is not None:
        return asked
    if options.init is not None:
        from cpmix_cli.training.starting_point import default_recipe

        if chosen := default_recipe(options.init, dataset, options.settings):
            return replace(asked, recipe=chosen[0], settings=chosen[1])
    recipe = load(dataset.recipe(), rho=dataset.record.rho)
    fitting = fitting_settings(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    keys = {setting.partition("=")[0] for setting in options.settings}
    needed = [setting for setting in fitting if setting.partition("=")[0] not in keys]
    return replace(asked, settings=[*needed, *options.settings])


def _train(steps: _Steps, options: RunOptions, asked: TrainingOptions, dataset: "Dataset", root: Path) -> _Trained:
    """Train the phases of the recipe in a run folder, and evaluate each on test and, if there is one, on val."""
    from cpmix_cli.runs.folders import PhaseFolder

    common = {name: getattr(asked, name) for name in _TRAINING}
    recipe = load(
        dataset.recipe() if asked.recipe is None else of_dataset(asked.recipe, dataset.record.recipe),
        settings=asked.settings,
        epochs=asked.epochs,
        seed=asked.seed,
        rho=dataset.record.rho,
    )
    splits = [split for split in ("val", "test") if split in dataset.splits]
    measured: Measured = {split: {} for split in splits}
    stage1 = {**common, "data": dataset.folder, "out": root, "init": options.init, "teacher": options.teacher}
    phases: list[str] = []
    data = None
    for phase in files.PHASES:
        if phase == "stage1":
            found = steps.do("train-stage1", TrainStage1Options(**stage1))
        else:
            data = _data_if_moved(phases[-1], root, dataset)
            own = {**common, "from_folder": root, "data": data}
            if PhaseFolder(root, phases[-1]).recipe().tables() == recipe.tables():
                own |= {"recipe": None, "settings": [], "epochs": None, "seed": None}
            name, kind = LATER[phase]
            found = steps.do(name, kind(**own))
        if found["status"] == "skipped":
            continue
        if found["status"] == "dry run":  # which tries the later phases too
            break
        phases.append(phase)
        if options.dry_run:
            continue
        data = _data_if_moved(phase, root, dataset)
        for split in splits:
            evaluation = EvaluateOptions(
                from_folder=root,
                phase=phase,
                split=split,
                device=asked.device,
                threads=asked.threads,
                data=data,
                data_root=asked.data_root,
                plugin=asked.plugin,
                tracker=asked.tracker,
            )
            numbers = steps.do("evaluate", evaluation, quiet=True)
            measured[split][phase] = numbers["balanced_accuracy"]
            console.note(
                f"run: {phase} on {split}: top-1 {percent(numbers['top1'], 2)}, balanced accuracy "
                f"{percent(numbers['balanced_accuracy'], 2)} ({counted(numbers['num_test'], 'image')})"
            )
    return _Trained(root, phases, measured, data, asked.data_root)


def _data_if_moved(phase: str, root: Path, dataset: "Dataset") -> Path | None:
    """Return the data set folder if the record of a phase does not lead to it, else None."""
    from cpmix_cli.runs.folders import PhaseFolder, find_dataset

    with suppress(InputError):
        find_dataset(root, PhaseFolder(root, phase).record().dataset, None)
        return None
    return dataset.folder


def _finish(steps: _Steps, dataset: "Dataset", out: Path, runs: Sequence[_Trained]) -> None:
    """Report the phase to use of each run, compare the runs, and print what was found."""
    phases = runs[0].phases
    means = {
        split: {phase: fmean(trained.measured[split][phase] for trained in runs) for phase in phases}
        for split in runs[0].measured
    }
    from cpmix_cli.runs.phase_choice import best_phase  # imported here: it imports pandas

    best = best_phase(means["val"]) if "val" in means else None
    reported = best or phases[-1]
    pages = []
    for trained in runs:
        report = ReportOptions(from_folder=trained.root, phase=reported, data=trained.data, data_root=trained.data_root)
        pages.append(str(steps.do("confusion-report", report, quiet=len(runs) > 1)["page"]))
    lines = _lines(means, best, reported, {split: len(dataset.labels(split)) for split in means})
    if len(runs) > 1:
        steps.do("compare", CompareOptions(folders=[trained.root for trained in runs], split="test"))
        lines = ["", *lines, _over_seeds(runs, reported), *(f"page: {page}" for page in pages)]
    if steps.marker is not None:
        steps.marker.unlink(missing_ok=True)
    is_old = all(step.get("status", "up to date") in ("up to date", "skipped") for step in steps.results)
    status = "up to date" if is_old else "done"
    ahead = console.typed("misclassified", "--from", runs[0].root, "--phase", reported)
    fields = {
        "status": status,
        "data": str(dataset.folder),
        "phase": best,
        "decided_on": None if best is None else "val",
        "reported": reported,
        "balanced_accuracy": means,
        "runs": [
            {"run": str(trained.root), "phases": trained.phases, "balanced_accuracy": trained.measured, "page": page}
            for trained, page in zip(runs, pages, strict=True)
        ],
        "next": ahead,
        "steps": steps.results,
    }
    console.result(fields, lines=[*console.prose(lines), f"{status}: {out}"])
    console.follow(ahead)


def _lines(
    means: Mapping[str, Mapping[str, float]], best: str | None, reported: str, sizes: Mapping[str, int]
) -> list[str]:
    """Say whether the finetune helped and which phase to use. No phase is chosen by test.

    Args:
        means: split -> phase -> balanced accuracy.
        best: the phase that is best on val; None without val.
        reported: phase of the report.
        sizes: images by split.
    """
    split = "test" if best is None else "val"
    shown = means[split]
    listed = ", ".join(f"{phase} {percent(accuracy, 2)}" for phase, accuracy in shown.items())
    lines = [f"balanced accuracy on {split} ({counted(sizes[split], 'image')}): {listed}"]
    if "finetune" in shown:
        before, after = list(shown)[-2:]
        change = shown[after] - shown[before]
        verdict = (
            "changes nothing" if not change else f"{'helps' if change > 0 else 'does not help'} ({signed(change, 2)})"
        )
        lines.append(f"the finetune {verdict} on {split}, after {before}")
    if best is not None:
        is_tied = list(shown.values()).count(shown[best]) > 1
        lines.append(f"use {best}: {'no other is better' if is_tied else 'it is best'} on val")
    elif len(shown) > 1:
        lines.append(
            f"which phase to use is not decided: there is no val split, and test may not choose (--val-per-class N "
            f"holds one out); the report is of {reported}, the last phase"
        )
    return lines


def _over_seeds(runs: Sequence[_Trained], phase: str) -> str:
    """Return the balanced accuracy of a phase on test, over seeds."""
    found = [trained.measured["test"][phase] for trained in runs]
    mean, deviation = percent(fmean(found), 2), percent(stdev(found), 2)
    return f"{len(found)} seeds, {phase}: balanced accuracy on test {mean} +- {deviation}"
