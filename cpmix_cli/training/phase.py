"""A training phase from request to published files: opening the output, resuming, running the loop, publishing.

All three training commands use it. Each command file defines only its recipe, its initial state and its plan.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from cpmix_cli.artifacts import files, locks, records, tables
from cpmix_cli.artifacts.locks import Lock
from cpmix_cli.artifacts.tensors import on_host, read_tensors, sealed_metadata
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.decoding import all_unreadable_named
from cpmix_cli.data.equal_images import warn_of_changed
from cpmix_cli.flags import FinetuneOptions, TrainingOptions, TrainStage2Options
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import loading, plugins
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runs import folders, output
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import next_command
from cpmix_cli.runs.plugin_needs import check_plugin, reference
from cpmix_cli.runs.run_json import BegunRecord, StateRecord
from cpmix_cli.runtime import console, hardware, ranks, signals
from cpmix_cli.runtime.errors import (
    Diverged,
    EnvironmentFault,
    InputError,
    UnreadableError,
    UsageError,
    counted,
    indented,
)
from cpmix_cli.runtime.rounding import percent
from cpmix_cli.runtime.text import quoted
from cpmix_cli.training import loop, metrics
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.class_means import start_from_class_means
from cpmix_cli.training.inputs import TrainingData, training_data
from cpmix_cli.training.plan import PhaseContext, Plan, begin_finetune, begin_stage2, fresh_state, make_plan, rehearsal
from cpmix_cli.training.state import EpochSums, TrainingState, read_state
from cpmix_cli.training.trackers import Description, Tracker, forget, make_trackers, running

FEW_STEPS = 5
"""Least steps per epoch of stage 1 without a warning: recipes count epochs of sets with more."""
_FILES = (
    *(files.RECIPE, files.TRAINING_STATE, files.MODEL, files.CONFUSION_PAIRS, files.CLASS_COUNTS),
    *(files.METRICS, files.RUN),
)
TestAccuracy = Callable[[Dataset, Recipe, Classifier, torch.device], Callable[[], float]]
"""(data set, recipe, network, device) -> function that returns the test accuracy, a fraction, for --eval-every.

See evaluation.prediction.accuracy_on_test(). Passed as a parameter because this room must not import evaluation.
"""


@dataclass(frozen=True)
class PhaseRequest:
    """Request of a command to train a phase."""

    folder: PhaseFolder
    """Output folder."""
    source: PhaseFolder | None
    """Phase whose training state it starts from; None for stage 1."""
    recipe: Recipe
    dataset: Dataset
    options: TrainingOptions
    prepare: Callable[[PhaseContext], tuple[Plan, TrainingState]]
    """Builds the plan and the initial state of the phase."""
    test_accuracy: TestAccuracy
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Other input files by the flag that names them, such as "init"."""

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Inputs of the result: tables of the recipe, and hashes of the other inputs."""
        return {
            "recipe": self.recipe.tables_of(self.folder.phase),
            "dataset": self.dataset.fingerprint,
            "source": self.source.output(files.TRAINING_STATE)[1] if self.source else None,
            **({"plugin": plugin.sha256} if (plugin := self.plugin_of(*self._phases)) else {}),
            **{flag: files.sha256(files.read_bytes(path)) for flag, path in self.inputs.items()},
        }

    @property
    def _phases(self) -> Sequence[str]:
        """Phases whose tables the result depends on."""
        return files.PHASES[: files.PHASES.index(self.folder.phase) + 1]

    def plugin_of(self, *phases: str) -> plugins.Plugin | None:
        """Return the plugin that is given, if the recipe names a function of it in one of these phases."""
        given = plugins.current()
        return given if given is not None and given.is_named_in(self.recipe, phases) else None

    def own_recipe(self) -> dict[str, Any]:
        """Return what names the recipe in the records: see BegunRecord.recipe_name and settings."""
        given = self.options.recipe
        begun: BegunRecord | None = self.source.record() if self.source else None
        if given is not None:
            path, begun = Path(given), None
            if path.name == files.RECIPE:  # of a run, such as in the next command of an interrupted one
                with suppress(InputError):
                    begun = PhaseFolder(path.parent.parent, path.parent.name).begun()
        name = begun.recipe_name if begun else given or self.dataset.recipe()
        return {"recipe_name": name, "settings": [*(begun.settings if begun else ()), *self.options.settings]}


@dataclass(frozen=True)
class _Loaded:
    """Training phase whose inputs are read and checked."""

    plan: Plan
    state: TrainingState
    data: TrainingData
    context: PhaseContext
    resumes: bool
    """True if the state was read from the phase's folder."""
    trackers: Sequence[Tracker]


def continued(
    options: TrainStage2Options | FinetuneOptions, source: PhaseFolder, phase: str, test_accuracy: TestAccuracy
) -> PhaseRequest:
    """Return the request for a phase that starts from another phase's training state.

    Args:
        options: the command's flags; without --recipe, --set, --epochs or --seed, the recipe of `source` is used.
        source: a finished phase.
        phase: "stage2" or "finetune".
        test_accuracy: see TestAccuracy.

    Raises:
        UsageError: the requested recipe has errors, or does not fit the data set.
        InputError: `source` is damaged, or was trained with another recipe; or its data set is not found.
    """
    check_plugin(source)
    dataset = folders.find_dataset(source.run, source.record().dataset, options.data, data_root=options.data_root)
    if options.recipe is not None:
        options = replace(options, recipe=loading.of_dataset(options.recipe, dataset.record.recipe))
    recipe = trained = source.recipe()  # verifies the file, which is needed even if flags change the recipe
    name = options.recipe or str(source.output(files.RECIPE)[0])
    load = partial(loading.load, name, settings=options.settings, rho=dataset.record.rho)
    if options.changes_recipe or source.record().plugin is not None:  # which may have changed since
        recipe = load(epochs=options.epochs, seed=options.seed)
    check_fits(
        recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics, settings=options.settings
    )
    if changed := folders.upstream_changes(source, recipe):
        raise InputError(
            f"{source.path} was trained differently from {options.recipe or 'what is asked'}:{indented(changed)}",
            fix=_upstream_fix(options, source, trained, load, changed),
        )
    folder = PhaseFolder(options.out or source.run, phase)
    return PhaseRequest(folder, source, recipe, dataset, options, partial(_load_source, source, phase), test_accuracy)


def _upstream_fix(
    options: TrainStage2Options | FinetuneOptions,
    source: PhaseFolder,
    trained: Recipe,
    load: Callable[..., Recipe],
    changed: Sequence[str],
) -> str:
    """Return how to continue a phase whose recipe the flags change: --epochs and --seed of that phase, if they suffice.

    Args:
        options: flags of the command.
        source: the trained phase.
        trained: its recipe.
        load: loads the requested recipe with other `epochs` and another `seed`.
        changed: lines of upstream_changes().
    """
    epochs = trained.schedule.epochs if trained.schedule.rescaled_from else None
    with suppress(UsageError):
        if not folders.upstream_changes(source, load(epochs=epochs, seed=trained.seed)):
            keys = [line.partition(":")[0] for line in changed]
            flags = [f"--epochs {epochs}"] if epochs is not None and "schedule.epochs" in keys else []
            flags += [f"--seed {trained.seed}"] if "seed" in keys else []
            parts = [f"give {' '.join(flags)}, as {source.phase} was trained"] if flags else []
            return " and ".join(
                parts + ([f"drop --epochs {options.epochs}"] if epochs is None and options.epochs else [])
            )
    typed = [
        flag for key, flag in loading.typed_flags(options.settings) if any(line.startswith(key) for line in changed)
    ]
    flags = typed or ([f"--recipe {quoted(options.recipe)}"] if options.recipe else ["the changed keys"])
    return f"drop {' '.join(flags)}, or train {source.phase} with that into another folder"


def _load_source(source: PhaseFolder, phase: str, context: PhaseContext) -> tuple[Plan, TrainingState]:
    """Return the plan and the state after `source`; stage 2 keeps the optimizer's state, finetune creates a new one."""
    path, sha = source.output(files.TRAINING_STATE)
    tensors, _ = read_tensors(path, sha)
    state = fresh_state(context)
    state.load(tensors, path, optimizer=phase != "finetune")
    (begin_finetune if phase == "finetune" else begin_stage2)(context, state)
    plan = make_plan(context, phase)
    state.epoch = plan.first_epoch
    return plan, state


def train(asked: PhaseRequest) -> None:
    """Start or resume a training phase, run it to the end, and report the result.

    All ranks read the inputs and train together; only the first rank holds the lock, writes and reports. If the recipe
    has no such phase, the command reports that and succeeds, so scripts over many recipes do not stop.

    Raises:
        EnvironmentFault: the folder belongs to another recipe, or another process is writing it. Or the device is
            missing, the disk is full, or the ranks read different files.
        InputError: an input is damaged.
        Diverged, Interrupted: see loop.fit().
    """
    folder, here = asked.folder, ranks.current()
    _refuse_unlike(files.digest(asked.made_from), "the recipe, the data set or the inputs that they read")
    if asked.source is not None and not asked.recipe.epochs_of(folder.phase):
        reason = f"the recipe has no {'stage 2' if folder.phase == 'stage2' else folder.phase}"
        fields = {"status": "skipped", "skipped": True, "reason": reason}
        console.result(fields, lines=[f"nothing to do: {reason}"])
        console.follow(next_command(asked.source.run, data=asked.options.data, data_root=asked.options.data_root))
        return
    found = _decide(asked)
    if found == "done":
        if here.first:
            locks.tidy(folder.path)
            warn_of_changed(asked.dataset, "train")
            _report(asked, "up to date")
    elif asked.options.dry_run:
        if here.first:
            locks.refuse_if_held(folder.path)
        _rehearse(asked, _load(asked, found))
    else:
        files.check_place(folder.path, 0)
        with locks.hold(folder.path) if here.first else nullcontext() as lock:
            status = "up to date"
            if (found := _decide(asked)) != "done":  # another process may have finished it meanwhile
                loaded = _load(asked, found)
                with running(loaded.trackers):
                    _fit(asked, loaded, lock)
                status = "done"
            if here.first:
                _report(asked, status)


def _decide(asked: PhaseRequest) -> str:
    """Return what the first rank finds in the folder, on all ranks: fresh, resume or done; see output.decide()."""
    answers, here = ("done", "fresh", "resume"), ranks.current()
    found = "done"
    if here.first:
        found = output.decide(asked.folder.path, asked.made_from, _FILES, overwrite=asked.options.overwrite)
    return answers[here.max_over_ranks(answers.index(found))]


def _refuse_unlike(
    sha: str, what: str, fix: str = "put the run folder and the data set where all machines see the same files"
) -> None:
    """Raise if the ranks' digests differ: a folder of the same path may differ between machines."""
    here = ranks.current()
    if not here.all_equal(sha):
        raise EnvironmentFault(f"the {here.size} ranks differ in {what}", fix=fix)


def _load(asked: PhaseRequest, found: str) -> _Loaded:
    """Read and check all inputs of a phase; write nothing."""
    folder, source, recipe, dataset = asked.folder, asked.source, asked.recipe, asked.dataset
    # The ranks come here together, so that none of them uses a core that another one looks at.
    here, device = ranks.current(), hardware.use_device(asked.options.device, asked.options.threads)
    path = folder.path / files.TRAINING_STATE
    tensors: dict[str, torch.Tensor] = {}
    begun: StateRecord | None = None
    if found == "resume":
        tensors, begun = read_state(path)
        _refuse_unlike(begun.tensors_digest, f"what they read in {path}")
        signals.state_is_saved()
    earlier: BegunRecord | None = begun or (source.record() if source is not None else None)
    precision = earlier.precision if earlier else hardware.resolve_precision(recipe.model.precision, device)
    fix = "start them on machines of one kind, or say which: --device, --set model.precision"
    _refuse_unlike(files.digest([device.type, precision]), "device or precision", fix)
    data = training_data(dataset, recipe, device)
    context = PhaseContext(recipe, dataset, device, precision, {flag: asked.made_from[flag] for flag in asked.inputs})
    plan, state = asked.prepare(context)
    if recipe.model.sync_batchnorm and here.size > 1:
        if device.type == "cpu":
            raise UsageError(
                "model.sync_batchnorm: torch has it on GPUs alone", fix="give --set model.sync_batchnorm=false"
            )
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(state.model)  # type: ignore[no-untyped-call]
    if begun:
        resume(plan, state, tensors, begun, path, len(data.labels))
        _note_resumed(folder.phase, begun)
    _note_plan(asked, plan, state, data, context)
    weights, saved = _sizes(plan, state)
    old = [folder.path / name for name in (files.MODEL, files.TRAINING_STATE)]
    there = sum(path.stat().st_size for path in old if path.is_file())
    files.check_place(folder.path, weights + 2 * saved - there, largest_file=saved)
    trackers = (
        make_trackers(asked.options.tracker, Description(folder.path, recipe, dataset.name)) if here.first else []
    )
    if begun is None and recipe.model.init_head == "class-means" and source is None and not asked.options.dry_run:
        with _reading(dataset, ["train"]):
            start_from_class_means(plan, data, state.model)
    here.max_over_ranks(0)
    return _Loaded(plan, state, data, context, begun is not None, trackers)


def resume(
    plan: Plan,
    state: TrainingState,
    tensors: Mapping[str, torch.Tensor],
    saved: StateRecord,
    path: Path,
    num_images: int,
) -> None:
    """Restore a state from saved tensors and metadata. All are checked first.

    Args:
        plan: plan of the phase.
        state: initial state of the phase; changes in place.
        tensors: content of training_state.safetensors.
        saved: metadata of that file.
        path: that file, for messages.
        num_images: training images.

    Raises:
        InputError: the file belongs to another network, phase or version of cpmix.
    """
    names = [term.name for term in plan.terms]
    sums, history = tensors.get("sums", torch.empty(0)), tensors.get("history", torch.empty(0))
    state.sums = EpochSums(names, state.confusion.device)
    is_known = not saved.columns or sorted(saved.columns) == sorted(metrics.metrics_schema(names).names)
    if not is_known or len(sums) != len(state.sums.values):
        raise InputError(f"{path} was written by another version of cpmix", path=path)
    state.load(tensors, path)
    num_steps = plan.num_steps(num_images)
    if not (plan.first_epoch <= saved.epoch <= plan.last_epoch and saved.step <= num_steps):
        raise InputError(
            f"{path} was saved at epoch {saved.epoch}, step {saved.step}; {plan.phase} has epochs "
            f"{plan.first_epoch} to {plan.last_epoch} of {counted(num_steps, 'step')}",
            path=path,
        )
    finished = saved.epoch - plan.first_epoch + (saved.step == num_steps)
    if len(history) != finished or history.numel() != finished * len(saved.columns):
        raise InputError(f"{path} has metrics of {counted(len(history), 'epoch')}; expected {finished}", path=path)
    state.epoch, state.step = saved.epoch, saved.step
    state.sums.values.copy_(sums)
    rows = (zip(saved.columns, row, strict=True) for row in history.tolist())
    state.history = [{name: None if value != value else value for name, value in row} for row in rows]


def _note_resumed(phase: str, begun: StateRecord) -> None:
    size, threads = ranks.current().size, torch.get_num_threads()
    console.note(f"{phase}: goes on after epoch {begun.epoch}, step {begun.step}")
    if begun.threads != threads:
        console.warn(
            f"begun with {counted(begun.threads, 'thread')}, going on with {threads}: not bit for bit without "
            f"--threads {begun.threads}"
        )
    if begun.ranks != size:
        console.warn(
            f"begun with {counted(begun.ranks, 'rank')}, going on with {size}: the draws stay the same, but batch "
            "norm sees other parts of a batch, and sums are not bit for bit"
        )


def _note_plan(
    asked: PhaseRequest, plan: Plan, state: TrainingState, data: TrainingData, context: PhaseContext
) -> None:
    """Print what will be trained, and warn of terms whose class weights or draws are hardly meant."""
    size, num_images = ranks.current().size, len(data.labels)
    num_steps, first, last = plan.num_steps(num_images), state.epoch, plan.last_epoch
    epochs = (
        f"epoch {last}, {counted(num_steps, 'step')}"
        if first == last
        else f"epochs {first} to {last}, {counted(num_steps, 'step')} each"
    )
    console.note(f"{plan.phase}: {asked.dataset.name}, {counted(num_images, 'image')}, {epochs}")
    console.note(
        f"{plan.phase}: {asked.recipe.model.name}, {_num_parameters(state.model):,} parameters; "
        f"terms: {', '.join(term.name for term in plan.terms)}; {context.device.type}, {context.precision}, "
        f"{counted(torch.get_num_threads(), 'thread')}"
    )
    if plan.phase == "stage1" and num_steps < FEW_STEPS:
        console.warn(
            f"an epoch has only {counted(num_steps, 'step')}, with batches of {plan.batch_size} images: lower "
            "optimizer.batch_size and optimizer.lr with --set, or raise --epochs"
        )
    if (parts := size * plan.micro_batches) > 1:
        pieces = f" and {plan.micro_batches} micro-batches each" if plan.micro_batches > 1 else ""
        console.note(
            f"{plan.phase}: batches of {plan.batch_size:,} over {counted(size, 'rank')}{pieces}, "
            f"{-(-plan.batch_size // parts):,} images a forward pass and term; the learning rate is the recipe's, for "
            f"the whole batch: {plan.learning_rate(state.epoch, 0, 1):g} now"
        )
    if (plugin := plugins.current()) is not None:
        use = "is recorded in the run" if asked.plugin_of(*files.PHASES) else "is not used: the recipe names none of it"
        console.note(f"{plan.phase}: plugin {plugin.path}, sha256 {plugin.sha256[:12]}, {use}")
    if not data.batches.resident:
        console.note(f"{plan.phase}: images are read from disk as they are wanted")
    for term in plan.terms:
        if reweight := term.functions.get("reweight"):
            class_weights = reweight(data.class_counts)
            if (spread := float(class_weights.max() / class_weights.min())) < 1.05:
                console.warn(f"the class weights of term {term.name} are all nearly alike: {spread:.3g} times at most")
        if term.recipe.draw == "class-uniform" and term.recipe.loss == "balanced-softmax":
            console.warn(
                f"term {term.name} has both class-uniform draws and Balanced Softmax, which favours rare classes "
                f"twice: --set {plan.phase}.terms.{term.name}.loss=cross-entropy"
            )


def _rehearse(asked: PhaseRequest, loaded: _Loaded) -> None:
    """Run one step of the phase and of each later phase of its recipe, in memory only, and report it."""
    path, plan = asked.folder.path, loaded.plan
    with _reading(asked.dataset, ["train"]):
        loop.first_step(plan, loaded.data, loaded.state)
    tried = [plan.phase]
    for phase in files.PHASES[files.PHASES.index(plan.phase) + 1 :]:
        if getattr(asked.recipe, phase) is not None:
            later, state = rehearsal(loaded.context, phase)
            loop.first_step(later, loaded.data, state)
            tried.append(phase)
    weights, saved = _sizes(plan, loaded.state)
    fields = {
        "status": "dry run",
        "folder": str(path),
        "epochs": plan.last_epoch - plan.first_epoch + 1,
        "steps_per_epoch": plan.num_steps(len(loaded.data.labels)),
        "phases_tried": tried,
        "needed_bytes": weights + 2 * saved,
    }
    steps = f"a step of {', '.join(tried)} taken, loss and gradient finite"
    console.result(fields, lines=[f"dry run: {path} would be written; all checks passed, {steps}"])


def _fit(asked: PhaseRequest, loaded: _Loaded, lock: Lock | None) -> None:
    """Train to the end of the phase; the first rank, which holds the lock, publishes the files."""
    folder, source, dataset, options = asked.folder, asked.source, asked.dataset, asked.options
    plan, state, context = loaded.plan, loaded.state, loaded.context
    test_accuracy = None
    if options.eval_every:
        test_accuracy = asked.test_accuracy(dataset, asked.recipe, state.result, context.device)
    fit = partial(
        loop.fit,
        plan,
        loaded.data,
        state,
        check_data=dataset.check_in_place,
        checkpoint_every=options.checkpoint_every,
        test_accuracy=test_accuracy,
        eval_every=options.eval_every,
        class_names=dataset.class_names,
        few_inclusive=dataset.record.few_inclusive,
    )
    if lock is None:
        fit(publish=lambda: None)
        return
    splits = ["train", "test"] if options.eval_every else ["train"]
    origin = None
    if source is not None:
        place = os.path.relpath(source.run.resolve(), folder.run.resolve())
        origin = {"run": place, "phase": source.phase, "sha256": asked.made_from["source"]}
    known = {
        "source": origin,
        "dataset": folders.dataset_entry(dataset, folder.run),
        "precision": context.precision,
        "threads": torch.get_num_threads(),
        "ranks": ranks.current().size,
        **asked.own_recipe(),
        **({"plugin": reference(plugin)} if (plugin := asked.plugin_of(*files.PHASES)) else {}),
    }
    # All inputs are checked by now: files are written or deleted only from here on.
    recorder = output.Recorder(folder.path, folder.phase, asked.made_from, lock)
    recipe = asked.recipe.to_toml().encode()
    if loaded.resumes:  # its [about] may have changed since, which is no reason to change the file
        with suppress(InputError):
            recipe = files.read_bytes(folder.path / files.RECIPE, folder.state().recipe_sha256)
    # Until its first state is published, this run may diverge or fill the disk: the old one stays usable.
    overwrites = folder.is_begun and not loaded.resumes
    if not overwrites:
        # Written first: it identifies the folder even if the run is killed.
        recorder.publish(files.RECIPE, recipe)

    def publish_state() -> None:
        nonlocal overwrites
        tensors = on_host(state.tensors())
        metadata = {
            "format": records.FORMAT,
            "phase": folder.phase,
            "made_from": asked.made_from,
            **known,
            "epoch": state.epoch,
            "step": state.step,
            "columns": list(state.history[0]) if state.history else [],
            "inputs": {flag: str(path.resolve()) for flag, path in asked.inputs.items()},
            "recipe_sha256": files.sha256(recipe),
        }
        with recorder.replacing() if overwrites else nullcontext():
            if overwrites:
                recorder.publish(files.RECIPE, recipe)
            # Sealed with its own digest: run.json, which has the hashes, does not exist before the phase is done.
            recorder.publish_tensors(files.TRAINING_STATE, tensors, sealed_metadata(tensors, metadata))
        signals.state_is_saved()
        if overwrites:
            forget(folder.path)
            overwrites = False
        for tracker in loaded.trackers:
            tracker.write(state.history)

    try:
        with _reading(dataset, splits):
            capture_seconds = fit(publish=publish_state)
    except Diverged as fault:
        raise _with_last_good_state(fault, folder, source, overwrites) from fault
    if loaded.resumes:  # the run may have stopped after its last epoch; then fit() publishes no state
        publish_state()
    recorder.publish_tensors(files.MODEL, state.result.state_dict())
    pairs = tables.confusion_columns(state.confusion.cpu().numpy())
    recorder.publish_table(files.CONFUSION_PAIRS, tables.CONFUSION_SCHEMA, pairs)
    counts = files.read_bytes(dataset.folder / files.CLASS_COUNTS, dataset.record.files[files.CLASS_COUNTS])
    recorder.publish(files.CLASS_COUNTS, counts)
    columns = {name: [row[name] for row in state.history] for name in state.history[0]}
    recorder.publish_table(files.METRICS, metrics.metrics_schema([term.name for term in plan.terms]), columns)
    seconds = sum(row["seconds"] or 0.0 for row in state.history)
    on_gpu = context.device.type == "cuda"
    recorder.finish(
        **known,
        device=hardware.device_name(context.device) if on_gpu else "cpu",
        num_parameters=_num_parameters(state.model),
        epochs=len(state.history),
        training_seconds=round(seconds, 3),
        capture_seconds=round(capture_seconds, 3),
        gpu_hours=round(ranks.current().size * seconds / 3600, 4) if on_gpu else 0.0,
        **({"cudnn": hardware.cudnn_settings()} if on_gpu else {}),
    )


@contextmanager
def _reading(dataset: Dataset, splits: Sequence[str]) -> Iterator[None]:
    """Context in which images of these splits are read: one that cannot be read is named with all others.

    Raises:
        InputError: the data set was moved meanwhile; or files of it cannot be read.
    """
    try:
        yield
    except UnreadableError:  # perhaps for a moment
        raise
    except InputError:
        dataset.check_in_place()
        if dataset.storage != "files":
            raise
        fix = (
            "restore or repair these files; if they have moved, name their folder with --data-root; or build the data "
            "set without them: the same build-lt command with --overwrite --skip-unreadable"
        )
        paths = [path for split in splits for path in dataset.paths(split)]
        with all_unreadable_named(paths, upright=dataset.upright, fix=fix):
            raise


def _with_last_good_state(
    fault: Diverged, folder: PhaseFolder, source: PhaseFolder | None, overwrites: bool
) -> Diverged:
    """Return the error with the last good state named; `overwrites`: the folder still holds the run to be replaced."""
    path = folder.path / files.TRAINING_STATE
    fix = fault.fix
    if path.exists() and not overwrites:
        saved = folder.state()
        kept = f"the last good state is kept: epoch {saved.epoch}, step {saved.step}, in {path}"
    elif source is not None:
        kept = f"the last good state is that of {source.phase}, in {source.path / files.TRAINING_STATE}"
        if folder.phase == "stage2":  # it shares the learning rate of stage 1
            fix = f"lower the weights of its terms, or train {source.phase} again with a lower optimizer.lr"
    else:
        kept = "no state was saved before"
    if overwrites:
        kept += f"; {folder.path} is left as it was"
    return Diverged(f"{fault.message}; {kept}", needed_by=fault.needed_by, fix=fix)


def _sizes(plan: Plan, state: TrainingState) -> tuple[int, int]:
    """Return the bytes of the weights and of one training state.

    A phase needs room for the weights and two states: the old one stays until the new one is published.
    """
    weights: int = sum(t.nbytes for t in state.model.state_dict().values())
    slots = 2 if isinstance(state.optimizer, torch.optim.Adam) else 1
    counts = state.confusion.nbytes * (1 + plan.partners_ahead)  # K now, and K at the start of the epoch
    return weights, weights * (1 + slots + (state.average is not None)) + counts


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _report(asked: PhaseRequest, status: str) -> None:
    """Print the phase's last epoch as a table, and the next command."""
    folder = asked.folder
    record = folder.record()
    last = metrics.read_metrics(folder).iloc[-1].to_dict()
    numbers = {k: None if v != v else v for k, v in last.items()}
    num_classes = len(tables.read_class_counts(*folder.output(files.CLASS_COUNTS)))
    num_pairs = len(tables.read_confusions(*folder.output(files.CONFUSION_PAIRS), num_classes))
    fields = {
        "status": status,
        "folder": str(folder.path),
        "phase": folder.phase,
        "epochs": record.epochs,
        "seconds": record.training_seconds,
        "num_confusion_pairs": num_pairs,
        **{k: numbers[k] for k in ("loss", "train_accuracy", "num_confusions", "num_fallbacks")},
    }
    accuracy = numbers["train_accuracy"]
    row = [
        folder.phase,
        str(record.epochs),
        f"{numbers['loss']:.4f}",
        "-" if accuracy is None else percent(100 * accuracy, 2),
        f"{num_pairs:,}",
        console.duration(record.training_seconds),
    ]
    header = ("phase", ">epochs", ">loss", ">train acc %", ">class pairs confused", ">training time")
    console.result(fields, header=header, rows=[row], lines=[f"{status}: {folder.path}"])
    console.follow(next_command(folder.run, data_root=asked.options.data_root))
