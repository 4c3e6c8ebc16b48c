"""evaluate: accuracy, groups, calibration and predictions of a checkpoint on the test split. Always fp32."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpmix_cli import artifacts, console, engine, runs
from cpmix_cli import recipe as recipes
from cpmix_cli.data.dataset import Dataset
from cpmix_cli.data.longtail import group_of
from cpmix_cli.errors import UsageError
from cpmix_cli.evaluation import class_accuracy, confusion_matrix, make_split, summary
from cpmix_cli.models import Classifier, build_model
from cpmix_cli.randomness import torch_generator
from cpmix_cli.recipe import Recipe
from cpmix_cli.runs import PHASES, PhaseFolder


@dataclass(frozen=True)
class Options:
    """The command's flags."""

    from_folder: Path
    out: Path | None
    phase: str | None
    settings: list[str]
    label: str | None
    few_inclusive: bool
    device: str
    data: Path | None
    overwrite: bool


def run(options: Options) -> None:
    """Predict the test split and publish what follows from it.

    Raises:
        InputError: no finished phase, another data set, or damaged files.
        EnvironmentFault: the output belongs to other settings, the device is not there, the disk is full.
    """
    if options.label is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", options.label):
        raise UsageError(f'--label "{options.label}": letters, digits, ".", "_" and "-" only')
    root, named = runs.locate(options.from_folder)
    source = runs.choose_phase(root, options.phase or named, PHASES, needed_by="evaluate")
    dataset = runs.find_dataset(root, source.record(), options.data, needed_by="evaluate")
    recipe = requested_recipe(options, source)
    device = engine.resolve_device(options.device)

    name = source.phase if options.label is None else f"{source.phase}-{options.label}"
    folder = (options.out or root) / "evaluation" / name
    _weights, sha = source.output(artifacts.MODEL)
    made_from = {
        "recipe": {
            "evaluation": recipe.tables()["evaluation"],
            "few_inclusive": options.few_inclusive,
        },
        "dataset": dataset.fingerprint,
        "checkpoint": sha,
    }
    if runs.decide(folder, made_from, overwrite=options.overwrite, refresh=True) == "done":
        report(folder, "up to date")
        return
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = read_model(source, recipe, dataset).to(device)
    batches, labels = make_split(dataset, "test", recipe, device)
    logits = engine.predict(model, batches, len(labels), recipe.evaluation.batch_size)
    runs.clear(folder)
    recorder = runs.Recorder(folder, f"evaluation/{name}", made_from)
    publish(recorder, source, dataset, logits, labels, options.few_inclusive, sha)
    recorder.set(source={"phase": source.phase, "sha256": sha})
    recorder.set(dataset=runs.dataset_entry(dataset, options.out or root))
    recorder.finish()
    report(folder, "done")
    if options.label is None:  # the report is of the plain evaluation
        flags = f" --phase {options.phase}" if options.phase else ""
        flags += f" --out {options.out}" if options.out else ""
        console.note(f"next: cpmix confusion-report --from {root}{flags}")


def requested_recipe(options: Options, source: PhaseFolder) -> Recipe:
    """The checkpoint's recipe; --set may change [evaluation] only.

    Raises:
        UsageError: a setting reaches into what was trained.
    """
    if not options.settings:
        return source.recipe()
    path = source.output(artifacts.RECIPE)[0]
    recipe = recipes.load(str(path), settings=options.settings)
    trained = {k: v for k, v in source.recipe().tables().items() if k != "evaluation"}
    asked = {k: v for k, v in recipe.tables().items() if k != "evaluation"}
    if changed := recipes.differences(trained, asked):
        raise UsageError(f"evaluate --set changes what was trained: {'; '.join(changed)}")
    return recipe


def read_model(source: PhaseFolder, recipe: Recipe, dataset: Dataset) -> Classifier:
    """The network of a phase with its trained weights.

    Raises:
        InputError: the weights are damaged or of another network.
    """
    path, sha = source.output(artifacts.MODEL)
    tensors, _ = artifacts.read_tensors(path, sha)
    generator = torch_generator(recipe.seed, "weights")
    model = build_model(recipe.model.name, dataset.num_classes, dataset.shape, generator)
    engine.load_model(model, tensors, path)
    return model


def publish(
    recorder: runs.Recorder,
    source: PhaseFolder,
    dataset: Dataset,
    logits: torch.Tensor,
    labels: torch.Tensor,
    few_inclusive: bool,
    checkpoint: str,
) -> None:
    """metrics.json, per_class.parquet, predictions.parquet and logits.safetensors."""
    groups = [group_of(int(n), few_inclusive=few_inclusive) for n in dataset.class_counts]
    numbers = {
        "phase": source.phase,
        **summary(logits, labels, groups),
        "checkpoint_sha256": checkpoint,
    }
    recorder.publish(artifacts.EVALUATION, (json.dumps(numbers, indent=1) + "\n").encode())

    confidence, predicted = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, predicted, dataset.num_classes)
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
        "sample_id": dataset.sample_ids("test"),
        "label": labels.numpy(),
        "predicted": predicted.numpy(),
        "confidence": confidence.numpy(),
    }
    recorder.publish_table(artifacts.PREDICTIONS, artifacts.PREDICTIONS_SCHEMA, columns)
    recorder.publish_tensors(artifacts.LOGITS, {"logits": logits, "labels": labels})


ACCURACY_HEADER = (
    "evaluation",
    ">top-1",
    ">many",
    ">medium",
    ">few",
    ">balanced",
    ">ECE",
    ">test images",
)


def accuracy_rows(evaluations: Path) -> list[list[str]]:
    """A table row for each finished evaluation of a run, in the order of its phases."""
    rows = []
    for path in sorted(evaluations.glob(f"*/{artifacts.RUN}"), key=lambda p: _place(p.parent.name)):
        record = artifacts.read_record(path)
        sha = record["outputs"][artifacts.EVALUATION]
        n = json.loads(artifacts.read_bytes(path.parent / artifacts.EVALUATION, sha))
        keys = ("top1", "many", "medium", "few", "balanced_accuracy", "ece")
        cells = ["-" if n[k] is None else f"{n[k]:.2f}" for k in keys]
        rows.append([path.parent.name, *cells, f"{n['num_test']:,}"])
    return rows


def _place(name: str) -> tuple[int, str]:
    phase = name.split("-")[0]
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), name)


def report(folder: Path, status: str) -> None:
    """This evaluation as JSON; as a table with the run's others beside it."""
    record = artifacts.read_record(folder / artifacts.RUN)
    sha = record["outputs"][artifacts.EVALUATION]
    numbers = json.loads(artifacts.read_bytes(folder / artifacts.EVALUATION, sha))
    console.result(
        {"command": "evaluate", "status": status, "folder": str(folder), **numbers},
        title="per cent of the test split; many: more than 100 training images, few: fewer than 20",
        header=ACCURACY_HEADER,
        rows=accuracy_rows(folder.parent),
        lines=[f"{status}: {folder}"],
    )
