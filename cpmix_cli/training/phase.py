"""What the three training phases share: opening the output, resuming, running the loop, publishing.

Each phase file says what is its own: the recipe it accepts, the state it starts from and the plan it runs.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from cpmix_cli.artifacts import files, locks, records, tables
from cpmix_cli.artifacts.locks import Lock
from cpmix_cli.artifacts.tensors import read_tensors, sealed_metadata
from cpmix_cli.data.batches import open_batches
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.flags import FinetuneOptions, TrainingOptions, TrainStage2Options
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import loading
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runs import folders, next_command, output, run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.run_json import BegunRecord, StateRecord
from cpmix_cli.runtime import console, hardware, ranks, signals
from cpmix_cli.runtime.errors import Diverged, EnvironmentFault, InputError, UsageError
from cpmix_cli.training import loop, metrics
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.plan import PhaseContext, Plan, begin_finetune, fresh_state, make_plan, rehearsal
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.tensorboard import Tracker, forget

Prepare = Callable[[PhaseContext], tuple[Plan, TrainingState]]
TestAccuracy = Callable[[Dataset, Recipe, Classifier, torch.device], Callable[[], float]]
"""Makes what measures a network for --eval-every: see evaluation.prediction.accuracy_on_test()."""


@dataclass(frozen=True)
class PhaseRequest:
    """A training phase as a command asks for it."""

    folder: PhaseFolder
    """Where it writes."""
    source: PhaseFolder | None
    """The phase whose training state it starts from."""
    recipe: Recipe
    dataset: Dataset
    options: TrainingOptions
    prepare: Prepare
    """Builds the plan, and the state at the phase's beginning."""
    test_accuracy: TestAccuracy
    """Measures the network for --eval-every."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Other files that the result depends on, by the flag that names them."""

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """What the result depends on: the recipe's tables, and hashes of inputs."""
        return {
            "recipe": self.recipe.tables_of(self.folder.phase),
            "dataset": self.dataset.fingerprint,
            "source": self.source.output(files.TRAINING_STATE)[1] if self.source else None,
            **{flag: files.sha256(files.read_bytes(path)) for flag, path in self.inputs.items()},
        }

    def decide(self) -> str:
        """fresh, resume or done, see output.decide(): what the first rank finds."""
        answers, here = ("done", "fresh", "resume"), ranks.current()
        found = "done"
        if here.first:
            found = output.decide(self.folder.path, self.made_from, overwrite=self.options.overwrite)
        return answers[here.max_over_ranks(answers.index(found))]


@dataclass(frozen=True)
class LoadedPhase:
    """A training phase whose inputs are read and found good."""

    plan: Plan
    state: TrainingState
    data: TrainingData
    setting: PhaseContext
    begun: StateRecord | None
    """Metadata of the state that it goes on from."""
    curves: Tracker | None


def train(asked: PhaseRequest) -> None:
    """Run a training phase from where its folder stands to the end, and report the result.

    Several ranks read alike and train together; the first alone holds the lock, writes and reports. A phase that the
    recipe lacks is nothing to do, so that loops over recipes do not break.

    Raises:
        EnvironmentFault: the folder belongs to another recipe or is being written by another process, the device is
            missing, the disk is full, ranks read different files.
        InputError: an input is damaged.
        Diverged, Interrupted: see loop.fit().
    """
    folder, here = asked.folder, ranks.current()
    if asked.source is not None and not asked.recipe.epochs_of(folder.phase):
        report_nothing_to_do(folder.phase, asked.source)
        return
    refuse_unlike(files.digest(asked.made_from), "the recipe, the data set or the inputs that they read")
    how = asked.decide()
    if how == "done":
        if here.first:
            locks.tidy(folder.path)
            report(folder, "up to date")
    elif asked.options.dry_run:
        if here.first:
            locks.refuse_if_held(folder.path)
        started = start(asked, how)
        here.max_over_ranks(0)
        report_dry_run(asked, started, rehearse(started))
    else:
        files.check_place(folder.path, 0)
        with locks.hold(folder.path) if here.first else nullcontext() as lock:
            status = "up to date"
            if (how := asked.decide()) != "done":  # another process may have come first
                started = start(asked, how)
                here.max_over_ranks(0)
                if lock is None:
                    fit(asked, started, lambda: None)
                else:
                    finish(asked, started, lock)
                status = "done"
            if here.first:
                report(folder, status)


def continued(
    options: TrainStage2Options | FinetuneOptions, source: PhaseFolder, phase: str, test_accuracy: TestAccuracy
) -> PhaseRequest:
    """Return the request for a phase that starts from another's training state.

    Args:
        options: the command's flags. Without any of a recipe, the source's recipe counts.
        source: the phase that it starts from.
        phase: its name.
        test_accuracy: see PhaseRequest.

    Raises:
        UsageError: the recipe that the flags ask for is wrong, or does not fit the data set.
        InputError: the source is damaged or was trained differently, or its data set is not found.
    """
    dataset = folders.find_dataset(source.run, source.record().dataset, options.data, data_root=options.data_root)
    recipe = source.recipe()  # flags that change it are no reason to take it unverified
    if options.changes_recipe:
        recipe = loading.load(
            options.recipe or str(source.output(files.RECIPE)[0]),
            settings=options.settings,
            epochs=options.epochs,
            seed=options.seed,
            rho=dataset.record.rho,
        )
    check_fits(recipe, dataset.num_classes, dataset.shape, has_statistics=dataset.has_statistics)
    folders.require_same_upstream(source, recipe, origin=options.recipe or "what is asked")
    folder = PhaseFolder(options.out or source.run, phase)
    return PhaseRequest(folder, source, recipe, dataset, options, partial(load_source, source, phase), test_accuracy)


def load_source(source: PhaseFolder, phase: str, setting: PhaseContext) -> tuple[Plan, TrainingState]:
    """Read the source's training state, and return the plan and the state at the beginning of the phase.

    Stage 2 continues with momentum and schedule; the finetune has a fresh optimizer for what it trains.

    Raises:
        InputError: the state is damaged, or does not fit the network.
    """
    path, sha = source.output(files.TRAINING_STATE)
    tensors, _ = read_tensors(path, sha)
    state = fresh_state(setting)
    state.load(tensors, path, optimizer=phase != "finetune")
    if phase == "finetune":
        begin_finetune(setting, state)
    plan = make_plan(setting, phase)
    state.epoch = plan.first_epoch
    return plan, state


SAME_FILES = "put the run folder and the data set where all machines see the same files"


def refuse_unlike(sha: str, what: str, fix: str = SAME_FILES) -> None:
    """Refuse ranks whose digests differ: on another machine a folder of the same name may hold something else.

    Raises:
        EnvironmentFault: they do.
    """
    here = ranks.current()
    parts = [int(sha[i : i + 8], 16) % ranks.ENDED for i in range(0, 32, 8)]
    same = [here.all_equal(part) for part in parts]  # all of them at all ranks
    if not all(same):
        raise EnvironmentFault(f"the {here.size} ranks differ in {what}", fix=fix)


def start(asked: PhaseRequest, how: str) -> LoadedPhase:
    """Read and check all that a phase needs; writes nothing.

    Args:
        asked: the phase.
        how: what asked.decide() said: "fresh" or "resume".

    Raises:
        EnvironmentFault, InputError: see train().
    """
    folder, source, recipe, dataset = asked.folder, asked.source, asked.recipe, asked.dataset
    device = hardware.use_device(asked.options.device)
    threads = torch.get_num_threads()
    tensors: dict[str, torch.Tensor] = {}
    begun: StateRecord | None = None
    if how == "resume":
        tensors, begun = run_json.read_state(folder.path / files.TRAINING_STATE)
        refuse_unlike(begun.tensors_digest, f"what they read in {folder.path / files.TRAINING_STATE}")
        signals.state_is_saved()
    earlier: BegunRecord | None = begun or (source.record() if source is not None else None)
    precision = earlier.precision if earlier else hardware.resolve_precision(recipe.model.precision, device)
    fix = "start them on machines of one kind, or say which: --device, --set model.precision"
    refuse_unlike(files.digest([device.type, precision]), "device or precision", fix)
    data = training_data(dataset, recipe, device)
    setting = PhaseContext(recipe, dataset, device, precision, {flag: asked.made_from[flag] for flag in asked.inputs})
    plan, state = asked.prepare(setting)
    here = ranks.current()
    if recipe.model.sync_batchnorm and here.size > 1:
        if device.type == "cpu":
            raise UsageError("model.sync_batchnorm: torch has it on GPUs alone", fix="--set model.sync_batchnorm=false")
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(state.model)  # type: ignore[no-untyped-call]
    if begun:
        path, names = folder.path / files.TRAINING_STATE, [term.name for term in plan.terms]
        if begun.columns and sorted(begun.columns) != sorted(metrics.metrics_schema(names).names):
            raise InputError(f"{path} was written by another version of cpmix", fix="run the command with --overwrite")
        state.load(tensors, path)
        state.load_progress(
            tensors,
            path,
            terms=names,
            epoch=begun.epoch,
            step=begun.step,
            columns=begun.columns,
            epochs=(plan.first_epoch, plan.last_epoch),
            num_steps=plan.num_steps(len(data.labels)),
        )
        console.note(f"{folder.phase}: goes on after epoch {begun.epoch}, step {begun.step}")
        if begun.threads != threads:
            console.warn(f"begun with {begun.threads} threads, going on with {threads}: not bit for bit")
        if begun.ranks != here.size:
            console.warn(
                f"begun with {ranks_of(begun.ranks)}, going on with {here.size}: the draws stay the same, but batch "
                "norm sees other parts of a batch, and sums are not bit for bit"
            )
    console.note(
        f"{folder.phase}: {dataset.name}, {len(data.labels):,} images, epochs {state.epoch} to {plan.last_epoch} of "
        f"{plan.num_steps(len(data.labels))} steps; {recipe.model.name}, {parameters(state.model):,} parameters; "
        f"terms: {', '.join(term.name for term in plan.terms)}; {device.type}, {precision}, {threads} threads"
    )
    if (parts := here.size * plan.micro_batches) > 1:
        pieces = f" and {plan.micro_batches} micro-batches each" if plan.micro_batches > 1 else ""
        console.note(
            f"{folder.phase}: batches of {plan.batch_size:,} over {ranks_of(here.size)}{pieces}, "
            f"{-(-plan.batch_size // parts):,} images a forward pass and term; the learning rate is the recipe's, for "
            f"the whole batch: {plan.learning_rate(state.epoch, 0, 1):g} now"
        )
    if not data.batches.resident:
        console.note(f"{folder.phase}: images are read from disk as they are wanted")
    for term in plan.terms:
        class_weights = None if term.reweight is None else term.reweight(data.class_counts)
        if class_weights is not None and (spread := float(class_weights.max() / class_weights.min())) < 1.05:
            console.warn(f"the class weights of term {term.name} are all nearly alike: {spread:.3g} times at most")
    weights, saved = sizes(plan, state)
    there = sum(path.stat().st_size for path in folder.files(files.MODEL, files.TRAINING_STATE))
    files.check_place(folder.path, weights + 2 * saved - there, largest_file=saved)
    curves = Tracker(folder.path) if asked.options.tracker else None
    return LoadedPhase(plan, state, data, setting, begun, curves)


def rehearse(started: LoadedPhase) -> list[str]:
    """Take one step of the phase and of each that its recipe has after it, on what is in memory.

    Returns:
        What was tried, for the report.

    Raises:
        Diverged: a loss is not finite.
    """
    setting, recipe = started.setting, started.setting.recipe
    later = files.PHASES[files.PHASES.index(started.plan.phase) + 1 :]
    phases = [phase for phase in later if getattr(recipe, phase) is not None]
    loop.first_step(started.plan, started.data, started.state)
    for phase in phases:
        plan, state = rehearsal(setting, phase)
        loop.first_step(plan, started.data, state)
    return [started.plan.phase, *phases]


def fit(asked: PhaseRequest, started: LoadedPhase, publish: Callable[[], None]) -> float:
    """Train to the end of the phase.

    Args:
        asked: the phase.
        started: the same, its inputs read.
        publish: writes the state, see loop.fit().

    Returns:
        Seconds that went into recording CUDA graphs.

    Raises:
        Diverged, Interrupted: see loop.fit().
    """
    dataset, options, state = asked.dataset, asked.options, started.state
    test = None
    if options.eval_every:
        test = asked.test_accuracy(dataset, asked.recipe, state.model, started.setting.device)
    return loop.fit(
        started.plan,
        started.data,
        state,
        publish=publish,
        checkpoint_every=options.checkpoint_every,
        test_accuracy=test,
        eval_every=options.eval_every,
        class_names=dataset.class_names,
        few_inclusive=dataset.record.few_inclusive,
    )


def finish(asked: PhaseRequest, started: LoadedPhase, lock: Lock) -> None:
    """Train to the end of the phase and publish what comes out.

    Raises:
        EnvironmentFault: the disk is full, or the lock is lost.
        Diverged, Interrupted: see loop.fit().
    """
    folder, source, dataset = asked.folder, asked.source, asked.dataset
    plan, state, setting = started.plan, started.state, started.setting
    here = ranks.current()
    origin = None
    if source is not None:
        place = os.path.relpath(source.run.resolve(), folder.run.resolve())
        origin = {"run": place, "phase": source.phase, "sha256": asked.made_from["source"]}
    known = {
        "source": origin,
        "dataset": folders.dataset_entry(dataset, folder.run),
        "precision": setting.precision,
        "threads": torch.get_num_threads(),
        "ranks": here.size,
    }
    # All that can be wrong with the inputs is known by now: only from here on anything is written or taken away.
    recorder = output.Recorder(folder.path, folder.phase, asked.made_from, lock)
    recipe = asked.recipe.to_toml().encode()
    # What is to be overwritten stays until something can take its place: this run may diverge, or find no room.
    overwrites = folder.is_begun and not started.begun
    if not overwrites:
        # Written first: it says what the folder is for, whatever happens to the run.
        recorder.publish(files.RECIPE, recipe)

    def publish_state() -> None:
        nonlocal overwrites
        if overwrites:
            output.clear(folder.path)
            forget(folder.path)
            recorder.publish(files.RECIPE, recipe)
            overwrites = False
        tensors = state.tensors()
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
        # No record holds a hash of it before the phase is done.
        recorder.publish_tensors(files.TRAINING_STATE, tensors, sealed_metadata(tensors, metadata))
        signals.state_is_saved()
        if started.curves:
            started.curves.write(state.history)

    try:
        capture_seconds = fit(asked, started, publish_state)
    except Diverged as fault:
        raise with_last_good_state(fault, folder, source, overwrites) from fault
    if started.begun:  # it may have stopped after its last epoch, with only the derived files missing
        publish_state()
    publish_results(plan, state, dataset, recorder)
    seconds = sum(row["seconds"] or 0.0 for row in state.history)
    on_gpu = setting.device.type == "cuda"
    recorder.finish(
        **known,
        device=hardware.device_name(setting.device) if on_gpu else "cpu",
        num_parameters=parameters(state.model),
        epochs=len(state.history),
        training_seconds=round(seconds, 3),
        capture_seconds=round(capture_seconds, 3),
        gpu_hours=round(here.size * seconds / 3600, 4) if on_gpu else 0.0,
    )


def with_last_good_state(
    fault: Diverged, folder: PhaseFolder, source: PhaseFolder | None, overwrites: bool
) -> Diverged:
    """The error, with what is left to go on with.

    Args:
        fault: what happened.
        folder: of the phase.
        source: the phase that it started from.
        overwrites: what the folder holds is of a run before this one.
    """
    path = folder.path / files.TRAINING_STATE
    fix = fault.fix
    if path.exists() and not overwrites:
        saved = folder.state()
        kept = f"the last good state is kept: epoch {saved.epoch}, step {saved.step}, in {path}"
    elif source is not None:
        kept = f"the last good state is that of {source.phase}, in {source.path / files.TRAINING_STATE}"
        if folder.phase == "stage2":  # whose rate is that of stage 1
            fix = f"lower the weights of its terms, or train {source.phase} again with a lower optimizer.lr"
    else:
        kept = "no state was saved before"
    if overwrites:
        kept += f"; {folder.path} is left as it was"
    return Diverged(f"{fault.message}; {kept}", needed_by=fault.needed_by, fix=fix)


def training_data(dataset: Dataset, recipe: Recipe, device: torch.device) -> TrainingData:
    """The training split, on the device or on its way there.

    Raises:
        InputError: a file is damaged, or its labels do not give the recorded class counts.
    """
    batches, labels = open_batches(dataset, "train", recipe.data, device)
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    if counts.tolist() != dataset.class_counts.tolist():
        raise InputError(
            f"{dataset.folder}: class_counts.parquet does not count the training labels",
            fix="cpmix build-lt ... --overwrite",
        )
    return TrainingData(batches, labels.to(device), counts.to(device))


def publish_results(plan: Plan, state: TrainingState, dataset: Dataset, recorder: output.Recorder) -> None:
    """The files derived from the final state: weights, pairs, counts, metrics."""
    recorder.publish_tensors(files.MODEL, state.model.state_dict())
    pairs = tables.confusion_columns(state.confusion)
    recorder.publish_table(files.CONFUSION_PAIRS, tables.CONFUSION_SCHEMA, pairs)
    counts = files.read_bytes(dataset.folder / files.CLASS_COUNTS, dataset.record.files[files.CLASS_COUNTS])
    recorder.publish(files.CLASS_COUNTS, counts)
    columns = {name: [row[name] for row in state.history] for name in state.history[0]}
    schema = metrics.metrics_schema([term.name for term in plan.terms])
    recorder.publish_table(files.METRICS, schema, columns)


def sizes(plan: Plan, state: TrainingState) -> tuple[int, int]:
    """Bytes of the weights and of a training state. A phase takes room for the weights, a state, and its successor
    while that is published.
    """
    weights: int = sum(t.numel() * t.element_size() for t in state.model.state_dict().values())
    slots = 2 if isinstance(state.optimizer, torch.optim.Adam) else 1
    counts = state.confusion.numel() * state.confusion.element_size()
    return weights, weights * (1 + slots) + counts * (1 + plan.partners_ahead)  # those of now and of the epoch's begin


def ranks_of(number: int) -> str:
    """'1 rank', '2 ranks'."""
    return f"{number} rank{'s' if number > 1 else ''}"


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(p.numel() for p in model.parameters())


def report_nothing_to_do(phase: str, source: PhaseFolder) -> None:
    """Report a phase that the recipe lacks, and the next command."""
    reason = f"the recipe has no {'stage 2' if phase == 'stage2' else phase}"
    fields = {"status": "skipped", "skipped": True, "reason": reason}
    console.result(fields, lines=[f"nothing to do: {reason}"])
    console.follow(next_command.next_command(source.run))


def report_dry_run(asked: PhaseRequest, started: LoadedPhase, phases: list[str]) -> None:
    """What a run would do."""
    path, plan = asked.folder.path, started.plan
    weights, saved = sizes(plan, started.state)
    fields = {
        "status": "dry run",
        "folder": str(path),
        "epochs": plan.last_epoch - plan.first_epoch + 1,
        "steps_per_epoch": plan.num_steps(len(started.data.labels)),
        "phases_tried": phases,
        "needed_bytes": weights + 2 * saved,
    }
    tried = f"a step of {', '.join(phases)} taken, loss and gradient finite"
    console.result(fields, lines=[f"dry run: {path} would be written; all checks passed, {tried}"])


def report(folder: PhaseFolder, status: str) -> None:
    """The phase's last epoch as a table, and the next command."""
    record = folder.record()
    path, sha = folder.output(files.METRICS)
    table = tables.read_table(path, sha=sha)
    if table.empty or not set(metrics.METRICS_COLUMNS) <= set(table.columns):
        raise InputError(f"{path} holds no metrics of {folder.phase}", fix="train again with --overwrite")
    last = table.iloc[-1].to_dict()
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
        "-" if accuracy is None else f"{100 * accuracy:.2f}",
        f"{num_pairs:,}",
        console.duration(record.training_seconds),
    ]
    header = ("phase", ">epochs", ">loss", ">train acc %", ">class pairs confused", ">training time")
    console.result(fields, header=header, rows=[row], lines=[f"{status}: {folder.path}"])
    console.follow(next_command.next_command(folder.run))
