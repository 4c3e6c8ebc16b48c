"""evaluate: accuracy, groups, calibration and predictions of a checkpoint, always in fp32.

The test images are the data set's test split, another split with --split, or those of --test-data, another folder of
the same classes.
"""

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cpmix_cli.artifacts import files, locks, tables
from cpmix_cli.data.batches import make_batches
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.equal_images import warn_of_changed
from cpmix_cli.data.longtail import group_of
from cpmix_cli.evaluation import prediction, thresholds
from cpmix_cli.evaluation.accuracy import confusion_matrix, sample_weights, shifted_profile, summary
from cpmix_cli.evaluation.agreement import images_to_learn_from, learn_expert_weights, weakly_changed
from cpmix_cli.evaluation.intervals import too_few_images
from cpmix_cli.evaluation.per_class import as_json, class_columns, interval_row, lines_of, read_classes, totals
from cpmix_cli.evaluation.prediction import Predicted, check_finite, post_hoc, predicted, read_model
from cpmix_cli.evaluation.samples import TestSet, other_tests, own_tests
from cpmix_cli.evaluation.saved import ACCURACY_HEADER, POST_HOC, accuracy_row, accuracy_rows, read_numbers
from cpmix_cli.evaluation.tracked import track
from cpmix_cli.flags import EvaluateOptions
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import loading, schema
from cpmix_cli.recipe.schema import Recipe
from cpmix_cli.runs import folders, output, run_json
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.runs.next_command import command_ahead, with_data
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runs.plugin_needs import check_plugin
from cpmix_cli.runs.repair import build_command
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted
from cpmix_cli.runtime.hardware import use_device
from cpmix_cli.training.randomness import torch_generator

_FILES = (
    files.EVALUATION,
    files.PER_CLASS,
    files.PREDICTIONS,
    files.LOGITS,
    files.SAMPLES,
    files.THRESHOLDS,
    files.RUN,
)


def run(options: EvaluateOptions) -> None:
    """Predict the test samples and publish metrics, predictions and logits.

    Raises:
        UsageError: --label is no file name, --set changes keys outside [evaluation], or flags do not go together.
        InputError: no phase is finished, the data set or classes are others, or files are damaged.
        EnvironmentFault: the output belongs to other settings, the device is missing, or the disk is full.
    """
    if options.label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", options.label):
        raise UsageError(
            f'--label "{options.label}" is no file name of at most 100 letters, digits, ".", "_" and "-"',
            fix="give a name such as --label run-2",
        )
    if options.test_data is not None and options.split != "test":
        raise UsageError(
            f"--split {options.split} and --test-data {options.test_data} name two sets of test images",
            fix="drop one of the two flags",
        )
    if options.test_distribution == "uniform" and options.ratio != 50:
        raise UsageError(
            f"--ratio {options.ratio:g} has no effect on a uniform test distribution",
            fix="give --test-distribution forward or backward as well, or drop --ratio",
        )
    if not math.isfinite(options.ratio):
        raise UsageError(
            f"--ratio {options.ratio:g} is not a finite number", fix="give a number from 1 up, such as --ratio 50"
        )
    target = thresholds.target_of(options.threshold_for) if options.threshold_for is not None else None
    if target is not None and (options.split == "val" or options.test_distribution != "uniform"):
        other = "--split val" if options.split == "val" else f"--test-distribution {options.test_distribution}"
        raise UsageError(
            f"--threshold-for {target} chooses on the val split and measures on other images as they are, not {other}",
            fix=f"drop {other}",
        )
    source = choose(options.from_folder, options.phase)
    check_plugin(source)
    root = source.run
    dataset = folders.find_dataset(root, source.record().dataset, options.data, data_root=options.data_root)
    if dataset.record.few_inclusive:
        options = replace(options, few_inclusive=True)
    recipe = _requested_recipe(options, source)
    device = use_device(options.device, options.threads)
    if options.skip_unreadable and options.test_data is None and dataset.storage != "files":
        raise UsageError(
            f"--skip-unreadable leaves out image files; {dataset.folder} holds its images itself", fix="drop the flag"
        )
    if options.test_data is None:
        tests = own_tests(dataset, options.split, skip_unreadable=options.skip_unreadable)
    elif options.test_data.is_dir():
        tests = other_tests(options.test_data, dataset, skip_unreadable=options.skip_unreadable)
    else:
        raise InputError(
            f"{options.test_data} is not a folder",
            needed_by="--test-data",
            fix="give a folder of FOLDER/CLASS/IMAGE, or a data set folder",
        )

    if recipe.evaluation.mirror and len(dataset.shape) != 3:
        raise UsageError(
            f"{dataset.folder} holds points, which have no mirror image",
            needed_by="evaluation.mirror = true",
            fix="drop --set evaluation.mirror",
        )
    if not len(tests.labels):
        raise InputError(
            f"{dataset.folder} has no {options.split} image to measure an accuracy on",
            needed_by=f"evaluate --split {options.split}",
            fix="give test images with --test-data FOLDER, or build the data set anew with --test-per-class 1",
        )
    evaluations = (options.out or root) / "evaluation"
    label = options.label or _default_label(options, source, recipe, tests, evaluations)
    name = source.phase if label is None else f"{source.phase}-{label}"
    folder = evaluations / name
    _, sha = source.output(files.MODEL)
    target = target or _kept_target(folder)
    made_from: dict[str, Any] = {
        "recipe": {
            "evaluation": recipe.tables()["evaluation"],
            "few_inclusive": options.few_inclusive,
            "test_distribution": options.distribution,
        },
        "dataset": tests.fingerprint,
        "checkpoint": sha,
    }
    val = None
    if target is not None:
        val = _val_split(dataset, target, skip_unreadable=options.skip_unreadable)
        made_from |= {"threshold_for": str(target), "val": val.fingerprint}
    if output.decide(folder, made_from, _FILES, overwrite=options.overwrite, refresh=True) == "done":
        locks.tidy(folder)
        if options.test_data is None:
            warn_of_changed(dataset, options.split)
        _report(folder, "up to date")
        _track(options, source, dataset, folder)
        _follow(options, source, label)
        return
    model = read_model(source, recipe, dataset.num_classes, dataset.shape).to(device)
    batches = tests.open(recipe.data, device)
    profile = _requested_profile(options, dataset, tests.labels)
    weights = None
    counts = torch.tensor(dataset.class_counts)
    if recipe.evaluation.mirror:
        console.note("evaluate: logits are the mean over each image and its mirror image; report them as such")
    with tests.reading():
        if recipe.evaluation.aggregate == "test-time":
            weights = _learnt_weights(model, tests, recipe, dataset, profile, device)
        found = predicted(model, batches, len(tests.labels), counts, recipe.evaluation, weights)
    chosen = None
    if target is not None and val is not None:
        with val.reading():
            opened = val.open(recipe.data, device)
            on_val = predicted(model, opened, len(val.labels), counts, recipe.evaluation, weights)
        scored = (_scored(on_val, val), _scored(found, tests))
        chosen = thresholds.columns_of(target, dataset.class_names, *scored)
    check_finite(found, recipe, source)
    files.check_place(folder, 2 * found.experts.numel() * found.experts.element_size() + 100 * len(tests.labels))
    with locks.hold(folder) as lock:
        recorder = output.Recorder(folder, f"evaluation/{name}", made_from, lock)
        with recorder.replacing():
            _publish(recorder, source, recipe, dataset, found, profile, tests, options)
            if chosen is not None:
                recorder.publish_table(files.THRESHOLDS, tables.THRESHOLDS_SCHEMA, chosen)
            fields: dict[str, Any] = {}
            if not options.is_plain or tests.is_part:
                by_path = "path" in tests.samples
                columns = {str(name): column for name, column in tests.samples.items()}
                recorder.publish_table(files.SAMPLES, tables.split_schema(by_path), columns)
                fields["data_root"] = str(tests.data_root) if by_path else None
            if options.test_data is not None:
                fields["test_data"] = str(options.test_data.resolve())
            fields["source"] = {"phase": source.phase, "sha256": sha}
            recorder.finish(**fields, dataset=folders.dataset_entry(dataset, options.out or root))
    _report(folder, "done")
    _track(options, source, dataset, folder)
    _follow(options, source, label)


def _track(options: EvaluateOptions, source: PhaseFolder, dataset: Dataset, folder: Path) -> None:
    if options.tracker is not None:
        track(options.tracker, source, dataset.name, folder)


def _kept_target(folder: Path) -> thresholds.Target | None:
    """Return --threshold-for of the evaluation that is there, so that the plain command does not undo it."""
    with suppress(InputError, UsageError):
        record = run_json.read_run(folder, run_json.EvaluationRecord)
        return thresholds.target_of(str(record.made_from.inputs().get("threshold_for")))
    return None


def _val_split(dataset: Dataset, target: thresholds.Target, *, skip_unreadable: bool) -> TestSet:
    """Return the val split, on which thresholds are chosen; raises InputError if there is none."""
    if "val" not in dataset.splits or not len(dataset.labels("val")):
        most = max(1, min(10, int(dataset.class_counts.min()) - 1))
        raise InputError(
            f"{dataset.folder} has no val split to choose thresholds on",
            needed_by=f"--threshold-for {target}",
            fix="build a data set that has one, and train on it, such as: "
            + build_command(dataset.folder, "--val-per-class", str(most)),
        )
    return own_tests(dataset, "val", skip_unreadable=skip_unreadable and dataset.storage == "files")


def _scored(found: Predicted, tests: TestSet) -> thresholds.Scored:
    confidence, classes = found.logits.softmax(1).max(1)
    return thresholds.Scored(tests.labels.numpy(), classes.numpy(), confidence.numpy())


def _follow(options: EvaluateOptions, source: PhaseFolder, label: str | None) -> None:
    """Print the next command: the run's, or the one that shows the evaluation that was asked for."""
    if label is None:  # confusion-report reads only the plain evaluation
        flags = ["--phase", options.phase] if options.phase else []
        flags += ["--out", str(options.out)] if options.out else []
        ahead = None if flags else command_ahead(source.run)
        ahead = ahead or console.typed("confusion-report", "--from", source.run, *flags)
    elif options.out is None:
        ahead = console.typed("misclassified", "--from", source.run, "--phase", source.phase, "--label", label)
    else:
        return
    console.follow(with_data(ahead, options.data, options.data_root))


def _default_label(
    options: EvaluateOptions, source: PhaseFolder, recipe: Recipe, tests: TestSet, evaluations: Path
) -> str | None:
    """Return a label from split, test data, distribution and post-hoc method; None for the plain evaluation.

    An evaluation without the files that cannot be read is not the plain one.

    Args:
        options: flags of the command.
        source: the phase that is evaluated.
        recipe: its recipe with --set.
        tests: the test samples.
        evaluations: folder of the evaluations. If one of another --test-data of the same name is there, the label
            begins further up in the path of this one.
    """
    parts = ((options.split, "test"), (options.distribution, "uniform"), ("readable" if tests.is_part else "", ""))
    before = [part for part, usual in parts if part != usual]
    after = []
    trained = source.recipe()
    for key in POST_HOC:
        value = getattr(recipe.evaluation, key)
        if value != getattr(trained.evaluation, key):
            shown = "" if value is True else f"-{value:g}" if isinstance(value, float) else f"-{value}".lower()
            after.append(key.replace("_", "-") + shown)
    if options.test_data is None:
        return "-".join([*before, *after]) or None
    place = options.test_data.resolve()
    for first in range(len(place.parts) - 1, 0, -1):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(place.parts[first:]))
        label = "-".join([*before, name[-150:], *after])  # a file name has at most 255 bytes
        if not _is_of_others(evaluations / f"{source.phase}-{label}", tests, place):
            break
    return label


def _is_of_others(folder: Path, tests: TestSet, place: Path) -> bool:
    """Return whether a folder has an evaluation of other samples than `tests`, from another folder than `place`."""
    try:
        record = run_json.read_run(folder, run_json.EvaluationRecord)
    except InputError:  # none, or a damaged one, which output.decide() reports
        return False
    return tests.fingerprint != record.made_from.dataset and str(place) != (record.test_data or record.data_root)


def _requested_profile(options: EvaluateOptions, dataset: Dataset, labels: torch.Tensor) -> torch.Tensor | None:
    """Return the test images per class of --test-distribution [C]; None for uniform."""
    if options.test_distribution == "uniform":
        return None
    num_test = torch.bincount(labels, minlength=dataset.num_classes)
    if empty := int((num_test == 0).sum()):
        raise InputError(
            f"{counted(empty, 'class', 'classes')} of {dataset.num_classes} have no test image",
            needed_by=f"evaluate --test-distribution {options.test_distribution}",
            fix="drop --test-distribution, or give test images of every class with --test-data",
        )
    counts, most = torch.tensor(dataset.class_counts), int(num_test.min())
    profile = shifted_profile(counts, num_test, options.test_distribution, options.ratio)
    if not profile.all():
        # The ratio equal to the image count can fail: its quotient may be rounded below 1.
        ratios = range(most, 0, -1)
        highest = next(r for r in ratios if shifted_profile(counts, num_test, options.test_distribution, r).all())
        num_empty = int((profile == 0).sum())
        raise InputError(
            f"--ratio {options.ratio:g} leaves {counted(num_empty, 'class', 'classes')} without a test image: "
            f"the largest has {most}",
            needed_by=f"evaluate --test-distribution {options.test_distribution}",
            fix=f"give --ratio {highest}, or less",
        )
    return profile


def _learnt_weights(
    model: Classifier,
    tests: TestSet,
    recipe: Recipe,
    dataset: Dataset,
    profile: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Learn the weights of the experts [E] from unlabelled test images.

    With a test distribution, the images are a subset with that distribution, drawn once.
    """
    if len(dataset.shape) != 3:
        raise InputError(
            f"{dataset.folder} holds points, which have no augmented views",
            needed_by='evaluation.aggregate = "test-time"',
            fix="give --set evaluation.aggregate=mean",
        )
    chosen = images_to_learn_from(tests.labels, profile, torch_generator(recipe.seed, "test-time"))

    def views(batch: torch.Tensor, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for number in range(2):
            changed = weakly_changed(tests.pictures(batch), torch_generator(recipe.seed, "view", call, number))
            batches = make_batches(changed.to(device), recipe.data, dataset.record)
            found.append(prediction.predict(model, batches, len(batch), recipe.evaluation.batch_size))
        return found[0], found[1]

    weights = learn_expert_weights(views, chosen, recipe.model.experts, recipe.optimizer, recipe.seed)
    console.note(f"evaluate: weights of the experts, learnt without labels: {', '.join(f'{w:.3f}' for w in weights)}")
    if weights.max() > 0.5:
        console.warn(
            "one expert has more than half of the weight: an expert that gives every image the same few classes agrees "
            'with itself too; compare with evaluation.aggregate = "mean"'
        )
    return weights


def _requested_recipe(options: EvaluateOptions, source: PhaseFolder) -> Recipe:
    """Return the recipe of the checkpoint with --set, which may change only [evaluation]."""
    own = source.recipe()  # verifies the file, before --set is applied
    if not options.settings:
        return own
    recipe = loading.load(str(source.output(files.RECIPE)[0]), settings=options.settings)
    if changed := schema.differences({**own.tables(), "evaluation": {}}, {**recipe.tables(), "evaluation": {}}):
        raise UsageError(
            f"--set changes what {source.path} was trained with: {'; '.join(changed)}",
            fix="change only keys of [evaluation], such as --set evaluation.tau_norm=1, or train with the others",
        )
    return recipe


def _publish(
    recorder: output.Recorder,
    source: PhaseFolder,
    recipe: Recipe,
    dataset: Dataset,
    found: Predicted,
    profile: torch.Tensor | None,
    tests: TestSet,
    options: EvaluateOptions,
) -> None:
    """Publish metrics.json, per_class.parquet, predictions.parquet and logits.safetensors."""
    labels, logits, experts, weights = tests.labels, found.logits, found.experts, found.weights
    groups = [group_of(int(n), few_inclusive=options.few_inclusive) for n in dataset.class_counts]
    shares, used = None, float(len(experts))
    if weights is not None:
        by_image = weights.view(len(experts), -1).double().expand(-1, len(labels))
        share_of_images = sample_weights(labels, profile)
        share_of_images /= share_of_images.sum()
        shares = [round(share, 4) for share in (by_image @ share_of_images).tolist()]
        used = round(float((by_image > 0).double().sum(0) @ share_of_images), 3)
    counts = torch.tensor(dataset.class_counts)
    confidence, classes = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, classes, dataset.num_classes).numpy()
    by_class = None if profile is None else profile.numpy()
    own = [post_hoc(z, counts, recipe.evaluation) for z in experts] if len(experts) > 1 else []
    own_keys = recipe.tables()["evaluation"]  # quiet keys only where they are given: older evaluations keep their bytes
    numbers = {
        "phase": source.phase,
        **summary(logits, labels, groups, profile),
        **totals(matrix, groups, by_class),
        "test_distribution": options.distribution,
        "num_test_profile": None if profile is None else int(profile.sum()),
        "num_experts": len(experts),
        "expert_weights": shares,
        "experts_used": used,
        "experts": [summary(z, labels, groups, profile) for z in own],
        **{key: own_keys[key] for key in POST_HOC if key in own_keys},
        "checkpoint_sha256": source.output(files.MODEL)[1],
    }
    recorder.publish(files.EVALUATION, (json.dumps(numbers, indent=1) + "\n").encode())

    columns: dict[str, Any] = {
        "class_id": range(dataset.num_classes),
        "class_name": dataset.class_names,
        "group": groups,
        "num_train": dataset.class_counts,
        **class_columns(matrix, by_class),
    }
    recorder.publish_table(files.PER_CLASS, tables.PER_CLASS_SCHEMA, columns)
    columns = {
        "sample_id": tests.samples["sample_id"],
        "label": labels.numpy(),
        "predicted": classes.numpy(),
        "confidence": confidence.numpy(),
    }
    recorder.publish_table(files.PREDICTIONS, tables.PREDICTIONS_SCHEMA, columns)
    tensors = {"logits": logits, "labels": labels}
    recorder.publish_tensors(files.LOGITS, tensors if len(experts) == 1 else {**tensors, "expert_logits": experts})


def _report(folder: Path, status: str) -> None:
    """Print this evaluation as JSON; or all evaluations of the run, and the experts and classes of this one."""
    numbers, classes = read_numbers(folder), read_classes(folder)
    rows, lines = accuracy_rows(folder.parent, folder.name), []
    found = numbers.model_dump()
    record = run_json.read_run(folder, run_json.EvaluationRecord)
    if files.THRESHOLDS in record.outputs:
        target = str(record.made_from.inputs()["threshold_for"])
        table = tables.read_table(folder / files.THRESHOLDS, tables.THRESHOLDS_SCHEMA, record.outputs[files.THRESHOLDS])
        found["thresholds"] = thresholds.as_json(target, table)
        thresholds.warn_of(target, table)
    if "intervals" in found:
        rows.insert([row[0] for row in rows].index(folder.name) + 1, interval_row(found["intervals"]))
        lines = lines_of(classes, found["macro_f1"], folder)
        names, groups = classes["class_name"].tolist(), classes["group"].tolist()
        if few := too_few_images(names, groups, classes["num_test"].to_numpy()):
            console.warn(few)
        lines += thresholds.lines_of(found["thresholds"]) if "thresholds" in found else []
    else:
        console.note(f"{folder} is of an older version, without precision, F1 and intervals; --overwrite adds them")
    experts = [accuracy_row(f"expert {k}", n) for k, n in enumerate(numbers.experts, start=1)]
    console.result(
        {"status": status, "folder": str(folder), "phase": numbers.phase, **found, "classes": as_json(classes)},
        title="per cent; many: more than 100 training images, few: fewer than 20",
        header=ACCURACY_HEADER,
        rows=[*rows, *experts],
        lines=[*lines, f"{status}: {folder}"],
    )
