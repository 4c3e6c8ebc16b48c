"""evaluate: accuracy, groups, calibration and predictions of a checkpoint. Always fp32.

On the data set's own test split, with --split on its training or held-out images, or with --test-data on another folder
of the same classes.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict

from cpmix_cli import artifacts, console, engine, locks, runs
from cpmix_cli import recipe as recipes
from cpmix_cli.data import image_folder
from cpmix_cli.data.batches import Batches, file_batches, make_batches, open_batches, pictures
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.longtail import group_of
from cpmix_cli.data.stream import FileReader, read_in_order
from cpmix_cli.ensembles import images_to_learn_from, weakly_changed, weights_of_agreement
from cpmix_cli.errors import InputError, UsageError
from cpmix_cli.evaluation import (
    Predicted,
    class_accuracy,
    confusion_matrix,
    post_hoc,
    predicted,
    shifted_profile,
    stands_for,
    summary,
    tau_normalised,
)
from cpmix_cli.hardware import use_device
from cpmix_cli.models import Classifier, build_model
from cpmix_cli.randomness import torch_generator
from cpmix_cli.recipe import Data, Recipe
from cpmix_cli.runs import PHASES, PhaseFolder

POST_HOC = ("logit_adjustment", "tau_norm", "aggregate", "routing_threshold", "temperature")
"""Keys of [evaluation] under which the same network gives other logits."""


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    from_folder: Path
    out: Path | None
    phase: str | None
    settings: list[str]
    label: str | None
    split: str
    test_data: Path | None
    test_distribution: str
    ratio: float
    few_inclusive: bool
    device: str
    data: Path | None
    data_root: Path | None
    overwrite: bool

    @property
    def is_plain(self) -> bool:
        """On the test split, where every reader of the evaluation looks for its samples."""
        return self.test_data is None and self.split == "test"

    @property
    def distribution(self) -> str:
        """uniform, or forward-50."""
        return "uniform" if self.test_distribution == "uniform" else f"{self.test_distribution}-{self.ratio:g}"


@dataclass(frozen=True)
class TestSet:
    """What a checkpoint is evaluated on: N samples with their true classes."""

    open: Callable[[Data, torch.device], Batches]
    """Makes their batches, as a recipe sees them on a device."""
    pictures: Callable[[torch.Tensor], torch.Tensor]
    """Positions [B] -> images as they are stored, uint8 [B, H, W, channels]; or points, float32 [B, 2]."""
    labels: torch.Tensor
    """[N] int64, class ids of the trained network."""
    samples: pd.DataFrame
    """sample_id, label and path or source_index of each."""
    data_root: Path | None
    """What the paths are relative to."""
    fingerprint: str


def run(options: Options) -> None:
    """Predict the test samples and publish what follows from it.

    Raises:
        UsageError: a --label that is no file name, a --set beyond [evaluation], or a --split of --test-data.
        InputError: no finished phase, another data set, other classes, or damaged files.
        EnvironmentFault: the output belongs to other settings, the device is not there, the disk is full.
    """
    if options.label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", options.label):
        raise UsageError(f'--label "{options.label}": letters, digits, ".", "_" and "-" only')
    if options.test_data is not None and options.split != "test":
        raise UsageError(
            "--split is of the data set, --test-data another one: give one of the two", needed_by="evaluate"
        )
    if options.test_distribution == "uniform" and options.ratio != 50:
        raise UsageError("--ratio is that of a --test-distribution: forward or backward", needed_by="evaluate")
    if not math.isfinite(options.ratio):
        raise UsageError(f"--ratio {options.ratio:g}: no number that a class can be larger by", needed_by="evaluate")
    root, named = runs.locate(options.from_folder)
    source = runs.choose_phase(root, options.phase or named, PHASES, needed_by="evaluate")
    dataset = runs.find_dataset(root, source.record(), options.data, needed_by="evaluate", data_root=options.data_root)
    if dataset.few_inclusive:
        options = replace(options, few_inclusive=True)
    recipe = requested_recipe(options, source)
    device = use_device(options.device)
    if options.test_data is None:
        tests = own_tests(dataset, options.split)
    else:
        tests = other_tests(options.test_data, dataset)

    label = options.label
    if label is None:
        label = default_label(options, source.recipe(), recipe)
    name = source.phase if label is None else f"{source.phase}-{label}"
    folder = (options.out or root) / "evaluation" / name
    _weights, sha = source.output(artifacts.MODEL)
    made_from = {
        "recipe": {
            "evaluation": recipe.tables()["evaluation"],
            "few_inclusive": options.few_inclusive,
            "test_distribution": options.distribution,
        },
        "dataset": tests.fingerprint,
        "checkpoint": sha,
    }
    if runs.decide(folder, made_from, overwrite=options.overwrite, refresh=True) == "done":
        locks.tidy(folder)
        report(folder, "up to date")
        return
    model = read_model(source, recipe, dataset.num_classes, dataset.shape).to(device)
    batches = tests.open(recipe.data, device)
    profile = requested_profile(options, dataset, tests.labels)
    weights = None
    if recipe.evaluation.aggregate == "test-time":
        weights = learnt_weights(model, tests, recipe, dataset, profile, device)
    counts = torch.tensor(dataset.class_counts)
    found = predicted(model, batches, len(tests.labels), counts, recipe.evaluation, weights)
    artifacts.check_place(folder, 2 * found.experts.numel() * found.experts.element_size() + 100 * len(tests.labels))
    with locks.hold(folder) as lock:
        runs.clear(folder)
        recorder = runs.Recorder(folder, f"evaluation/{name}", made_from, lock)
        publish(recorder, source, recipe, dataset, found, profile, tests, options, sha)
        if not options.is_plain:
            by_path = "path" in tests.samples
            columns = {str(name): column for name, column in tests.samples.items()}
            recorder.publish_table(artifacts.SAMPLES, artifacts.split_schema(by_path), columns)
            recorder.set(data_root=str(tests.data_root) if by_path else None)
        recorder.set(source={"phase": source.phase, "sha256": sha})
        recorder.set(dataset=runs.dataset_entry(dataset, options.out or root))
        recorder.finish()
    report(folder, "done")
    if label is None:  # the report is of the plain evaluation
        flags = ["--phase", options.phase] if options.phase else []
        flags += ["--out", str(options.out)] if options.out else []
        console.note(f"next: {console.typed('confusion-report', '--from', root, *flags)}")
    elif options.out is None:
        flags = ["--phase", source.phase, "--label", label]
        console.note(f"next: {console.typed('misclassified', '--from', root, *flags)}")


def default_label(options: Options, trained: Recipe, recipe: Recipe) -> str | None:
    """What tells an evaluation from the phase's plain one: other test images, another post-hoc method."""
    parts = [part for part, usual in ((options.split, "test"), (options.distribution, "uniform")) if part != usual]
    if options.test_data is not None:
        parts.append(re.sub(r"[^A-Za-z0-9_.-]+", "-", options.test_data.resolve().name))
    for key in POST_HOC:
        value = getattr(recipe.evaluation, key)
        if value != getattr(trained.evaluation, key):
            parts.append(f"{key.replace('_', '-')}-{value if isinstance(value, str) else f'{value:g}'}")
    return "-".join(parts) or None


def requested_profile(options: Options, dataset: Dataset, labels: torch.Tensor) -> torch.Tensor | None:
    """What --test-distribution asks for [C].

    Raises:
        InputError: a class has no test image, or would have none under this ratio.
    """
    if options.test_distribution == "uniform":
        return None
    num_test = torch.bincount(labels, minlength=dataset.num_classes)
    if empty := int((num_test == 0).sum()):
        raise InputError(f"{empty} classes have no test image", needed_by="evaluate --test-distribution")
    counts, most = torch.tensor(dataset.class_counts), int(num_test.min())
    profile = shifted_profile(counts, num_test, options.test_distribution, options.ratio)
    if not profile.all():
        # The number of images itself, or the one below: a quotient may come out short of 1.
        ratios = range(most, 0, -1)
        highest = next(r for r in ratios if shifted_profile(counts, num_test, options.test_distribution, r).all())
        num_empty = int((profile == 0).sum())
        raise InputError(
            f"--ratio {options.ratio:g} leaves {num_empty} class{'es' if num_empty > 1 else ''} without a test image: "
            f"the largest has {most}",
            needed_by=f"evaluate --test-distribution {options.test_distribution}",
            fix=f"--ratio {highest}, or less",
        )
    return profile


def learnt_weights(
    model: Classifier,
    tests: TestSet,
    recipe: Recipe,
    dataset: Dataset,
    profile: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Weights of the experts [E], from unlabelled test images; of a subset of them, drawn once, where the test set is
    to be long-tailed.

    Raises:
        InputError: the data are points.
    """
    if len(dataset.shape) != 3:
        raise InputError("points have no augmented views", needed_by='evaluation.aggregate = "test-time"')
    chosen = images_to_learn_from(tests.labels, profile, torch_generator(recipe.seed, "test-time"))

    def views(batch: torch.Tensor, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for number in range(2):
            changed = weakly_changed(tests.pictures(batch), torch_generator(recipe.seed, "view", call, number))
            batches = make_batches(changed.to(device), recipe.data, dataset.record["mean"], dataset.record["std"])
            found.append(engine.predict(model, batches, len(batch), recipe.evaluation.batch_size))
        return found[0], found[1]

    weights = weights_of_agreement(views, chosen, recipe.model.experts, recipe.optimizer, recipe.seed)
    console.note(f"evaluate: weights of the experts, learnt without labels: {', '.join(f'{w:.3f}' for w in weights)}")
    if weights.max() > 0.5:
        console.warn(
            "one expert has more than half of the weight: an expert that gives every image the same few classes agrees "
            'with itself too; compare with evaluation.aggregate = "mean"'
        )
    return weights


def own_tests(dataset: Dataset, split: str) -> TestSet:
    """The data set's own train, val or test split.

    Raises:
        InputError: it has none, or its files are damaged.
    """
    dataset.require(split, needed_by=f"evaluate --split {split}")
    fingerprint = dataset.fingerprint if split == "test" else f"{dataset.fingerprint} {split}"
    if dataset.storage == "tensors":
        inputs, labels = dataset.read(split)
        return in_memory(dataset, inputs, labels, dataset.samples(split), dataset.data_root, fingerprint)

    def read(positions: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(pictures(dataset, split, positions.numpy()))))

    return TestSet(
        lambda recipe, device: open_batches(dataset, split, recipe, device)[0],
        *(read, dataset.labels(split), dataset.samples(split), dataset.data_root, fingerprint),
    )


def in_memory(dataset: Dataset, inputs: torch.Tensor, *rest: Any) -> TestSet:
    """Samples that are all read, normalised as in training: what a test set's own mean would do to it, the network of
    `dataset` has not seen.
    """
    mean, std = dataset.record["mean"], dataset.record["std"]
    return TestSet(
        lambda recipe, device: make_batches(inputs.to(device), recipe, mean, std), lambda at: inputs[at], *rest
    )


def other_tests(folder: Path, dataset: Dataset) -> TestSet:
    """Another folder's images as test samples: the test split of a data set folder, or class sub-folders of images.

    Classes are matched by name; some may be missing, none may be unknown.

    Raises:
        InputError: classes that the network does not know, images of another shape, unreadable files.
    """
    if (folder / artifacts.DATASET).is_file():
        other = open_dataset(folder, needed_by="evaluate --test-data")
        if other.shape != dataset.shape:
            raise InputError(
                f"{folder} has samples of shape {tuple(other.shape)}, the network takes {tuple(dataset.shape)}",
                needed_by="evaluate --test-data",
                fix="build it again at that size, or give the folder of the images themselves",
            )
        if unknown := [name for name in other.class_names if name not in dataset.class_names]:
            raise InputError(
                f"{folder} has classes that the network does not know: {', '.join(unknown)}",
                needed_by="evaluate --test-data",
            )
        own = {key: dataset.record[key] for key in ("mean", "std")}  # see in_memory()
        tests = own_tests(replace(other, record=other.record | own), "test")
        to_own = torch.tensor([dataset.class_names.index(name) for name in other.class_names])
        labels = to_own[tests.labels]
        return replace(tests, labels=labels, samples=tests.samples.assign(label=labels.numpy()))
    if len(dataset.shape) != 3:
        raise InputError(f"{folder}: a network of points takes no images", needed_by="evaluate --test-data")
    files = image_folder.scan(folder, class_names=dataset.class_names)
    samples = pd.DataFrame({"sample_id": np.arange(len(files.paths)), "label": files.labels, "path": files.paths})
    labels = torch.from_numpy(files.labels)
    if dataset.storage == "tensors":
        inputs = files.read(np.arange(len(files.paths)), dataset.shape)
        fingerprint = artifacts.digest([files.paths, files.labels.tolist(), artifacts.sha256(inputs.tobytes())])
        return in_memory(dataset, torch.from_numpy(inputs), labels, samples, folder.resolve(), fingerprint)
    paths = [folder / path for path in files.paths]

    def reader(recipe: Data) -> FileReader:
        return FileReader(paths, dataset.shape[0], recipe, upright=True, needed_by="evaluate --test-data")

    def read(positions: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(read_in_order(reader(Data(augment="none")), positions.tolist()))))

    mean, std = dataset.record["mean"], dataset.record["std"]
    return TestSet(
        lambda recipe, device: file_batches(reader(recipe), recipe, mean, std, device),
        *(read, labels, samples, folder.resolve(), artifacts.digest([files.listing, files.labels.tolist()])),
    )


def requested_recipe(options: Options, source: PhaseFolder) -> Recipe:
    """The checkpoint's recipe; --set may change [evaluation] only.

    Raises:
        UsageError: a setting reaches into what was trained.
        InputError: the checkpoint's recipe is missing or damaged.
    """
    own = source.recipe()  # verified, before settings are laid over it
    if not options.settings:
        return own
    path = source.output(artifacts.RECIPE)[0]
    recipe = recipes.load(str(path), settings=options.settings)
    trained = {k: v for k, v in own.tables().items() if k != "evaluation"}
    asked = {k: v for k, v in recipe.tables().items() if k != "evaluation"}
    if changed := recipes.differences(trained, asked):
        raise UsageError(f"evaluate --set changes what was trained: {'; '.join(changed)}")
    return recipe


def read_model(source: PhaseFolder, recipe: Recipe, num_classes: int, shape: Sequence[int]) -> Classifier:
    """The network of a phase with its trained weights, normalised as [evaluation] says.

    Args:
        source: the phase.
        recipe: which network it is.
        num_classes: C.
        shape: of one image of the data set (H, W, channels) or point (2,).

    Raises:
        InputError: the weights are damaged or of another network.
    """
    path, sha = source.output(artifacts.MODEL)
    tensors, _ = artifacts.read_tensors(path, sha)
    generator = torch_generator(recipe.seed, "weights")
    scaled = source.phase == "finetune" and recipe.finetune is not None and recipe.finetune.head == "scale"
    top = 0
    if source.phase == "finetune" and recipe.finetune is not None and recipe.finetune.head == "routers":
        top = recipe.finetune.router_top
    seen = recipe.data.input_shape(shape)
    model = build_model(recipe.model, num_classes, seen, generator, scaled=scaled, router_top=top)
    engine.load_model(model, tensors, path)
    if recipe.evaluation.tau_norm:
        tau_normalised(model, recipe.evaluation.tau_norm)
    return model


def publish(
    recorder: runs.Recorder,
    source: PhaseFolder,
    recipe: Recipe,
    dataset: Dataset,
    found: Predicted,
    profile: torch.Tensor | None,
    tests: TestSet,
    options: Options,
    checkpoint: str,
) -> None:
    """metrics.json, per_class.parquet, predictions.parquet and logits.safetensors."""
    labels, logits, experts, weights = tests.labels, found.logits, found.experts, found.weights
    groups = [group_of(int(n), few_inclusive=options.few_inclusive) for n in dataset.class_counts]
    shares, used = None, float(len(experts))
    if weights is not None:
        by_image = weights.view(len(experts), -1).double().expand(-1, len(labels))
        share_of_images = stands_for(labels, profile)
        share_of_images /= share_of_images.sum()
        shares = [round(share, 4) for share in (by_image @ share_of_images).tolist()]
        used = round(float((by_image > 0).double().sum(0) @ share_of_images), 3)
    counts = torch.tensor(dataset.class_counts)
    own = [post_hoc(z, counts, recipe.evaluation) for z in experts] if len(experts) > 1 else []
    numbers = {
        "phase": source.phase,
        **summary(logits, labels, groups, profile),
        "test_distribution": options.distribution,
        "num_test_profile": None if profile is None else int(profile.sum()),
        "num_experts": len(experts),
        "expert_weights": shares,
        "experts_used": used,
        "experts": [summary(z, labels, groups, profile) for z in own],
        **{key: getattr(recipe.evaluation, key) for key in POST_HOC},
        "confusion_source": recipe.confusion.source,
        "checkpoint_sha256": checkpoint,
    }
    recorder.publish(artifacts.EVALUATION, (json.dumps(numbers, indent=1) + "\n").encode())

    confidence, classes = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, classes, dataset.num_classes)
    columns: dict[str, Any] = {
        "class_id": range(dataset.num_classes),
        "class_name": dataset.class_names,
        "group": groups,
        "num_train": dataset.class_counts,
        "num_test": matrix.sum(1).numpy(),
        "num_correct": matrix.diagonal().numpy(),
        "accuracy": (100 * class_accuracy(matrix)).numpy(),
    }
    recorder.publish_table(artifacts.PER_CLASS, artifacts.PER_CLASS_SCHEMA, columns)
    columns = {
        "sample_id": tests.samples["sample_id"],
        "label": labels.numpy(),
        "predicted": classes.numpy(),
        "confidence": confidence.numpy(),
    }
    recorder.publish_table(artifacts.PREDICTIONS, artifacts.PREDICTIONS_SCHEMA, columns)
    tensors = {"logits": logits, "labels": labels}
    recorder.publish_tensors(artifacts.LOGITS, tensors if len(experts) == 1 else {**tensors, "expert_logits": experts})


ACCURACY_HEADER = (
    "evaluation",
    ">top-1",
    ">many",
    ">medium",
    ">few",
    ">balanced",
    ">ECE",
    ">images",
)


MARK = " (!)"
"""Behind the name of an evaluation whose network was trained with the test split's labels."""


def accuracy_rows(evaluations: Path, own: str) -> list[list[str]]:
    """A table row for each finished evaluation of a run, in the order of its phases.

    Raises:
        InputError: the evaluation in the folder named `own` is damaged; of another that is, a warning tells.
    """
    rows = []
    for path in sorted(evaluations.glob(f"*/{artifacts.RUN}"), key=lambda p: _place(p.parent.name)):
        try:
            n = read_numbers(path.parent)
        except InputError as fault:
            if path.parent.name == own:
                raise
            console.warn(f"left out: {fault.message}")
            continue
        mark = MARK if n.get("confusion_source") == "test_legacy" else ""
        rows.append(accuracy_row(path.parent.name + mark, n))
    return rows


def accuracy_row(name: str, numbers: dict[str, Any]) -> list[str]:
    """The cells under ACCURACY_HEADER."""
    keys = ("top1", "many", "medium", "few", "balanced_accuracy", "ece")
    cells = ["-" if numbers[key] is None else f"{numbers[key]:.2f}" for key in keys]
    return [name, *cells, f"{numbers['num_test']:,}"]


def legend(rows: Sequence[Sequence[str]]) -> list[str]:
    """What MARK means, where one of the rows has it."""
    marked = any(MARK in cell for row in rows for cell in row)
    return [f"{MARK.strip()} test labels took part in the training"] if marked else []


class Numbers(BaseModel):
    """What readers of an evaluation's metrics.json count on."""

    model_config = ConfigDict(strict=True)

    top1: float
    many: float | None
    medium: float | None
    few: float | None
    balanced_accuracy: float
    ece: float
    num_test: int
    experts: list[dict[str, float | int | None]]


def read_numbers(evaluation: Path) -> dict[str, Any]:
    """An evaluation's metrics.json, verified.

    Raises:
        InputError: it or the evaluation's record is missing or damaged.
    """
    record = runs.read_run(evaluation, runs.EvaluationEntry)
    path, sha = runs.output_of(evaluation, record, artifacts.EVALUATION)
    try:
        numbers: dict[str, Any] = json.loads(artifacts.read_bytes(path, sha, limit=artifacts.MAX_RECORD))
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{path} is no JSON") from fault
    return artifacts.checked(path, Numbers, numbers)


def _place(name: str) -> tuple[int, str]:
    phase = name.split("-")[0]
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), name)


def report(folder: Path, status: str) -> None:
    """This evaluation as JSON; as a table with the run's others beside it, and each expert's row."""
    numbers = read_numbers(folder)
    rows = accuracy_rows(folder.parent, folder.name)
    experts = [accuracy_row(f"expert {k}", n) for k, n in enumerate(numbers["experts"], start=1)]
    console.result(
        {"command": "evaluate", "status": status, "folder": str(folder), **numbers},
        title="per cent; many: more than 100 training images, few: fewer than 20",
        header=ACCURACY_HEADER,
        rows=[*rows, *experts],
        lines=[*legend(rows), f"{status}: {folder}"],
    )
