"""misclassified: list the test images in the off-diagonal cells of a confusion matrix."""

from pathlib import Path
from typing import Any

import pandas as pd

from cpmix_cli.artifacts import files, tables
from cpmix_cli.evaluation.saved import read_predictions
from cpmix_cli.flags import MisclassifiedOptions
from cpmix_cli.results.table_files import check_out, publish_in_format
from cpmix_cli.runs import folders, run_json
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted, give_one_of
from cpmix_cli.runtime.rounding import percent


def run(options: MisclassifiedOptions) -> None:
    """List the misclassified images of an evaluation, most confident errors first.

    Raises:
        UsageError: --true or --predicted is no class, or --out has another ending than those of tables.
        InputError: the phase is not evaluated, or files are damaged.
        EnvironmentFault: --out exists or cannot be written.
    """
    if options.out is not None:
        names = tables.MISCLASSIFIED_SCHEMA.names
        check_out(options.out, names.__eq__, overwrite=options.overwrite, example="misclassified.csv")
    source = choose(options.from_folder, options.phase)
    root = source.run
    classes = tables.read_class_counts(*source.output(files.CLASS_COUNTS))["class_name"].tolist()
    true = _class_id("--true", options.true, classes)
    predicted = _class_id("--predicted", options.predicted, classes)
    evaluation = root / "evaluation" / (source.phase if options.label is None else f"{source.phase}-{options.label}")
    table, _ = read_predictions(evaluation, source, len(classes))

    wrong = table[table["label"] != table["predicted"]]
    for column, wanted in (("label", true), ("predicted", predicted)):
        if wanted is not None:
            wrong = wrong[wrong[column] == wanted]
    wrong = wrong.sort_values(["confidence", "sample_id"], ascending=[False, True])
    images = _origins(options, root, evaluation, wrong)
    confidences = wrong["confidence"].tolist()
    found = [
        {"image": image, "true": classes[t], "predicted": classes[p], "confidence": round(c, 4)}
        for image, t, p, c in zip(images, wrong["label"], wrong["predicted"], confidences, strict=True)
    ]
    rows = [
        [str(f["image"]), str(f["true"]), str(f["predicted"]), f"{percent(100 * confidence, 1)} %"]
        for f, confidence in zip(found[: options.limit], confidences, strict=False)
    ]
    lines = [counted(len(found), "misclassified image")]
    if len(found) > len(rows):
        lines = [f"{len(rows)} of {lines[0]}; more with --limit N, all with --json or --out FILE.csv"]
    lines = console.prose(lines)
    if options.out is not None:
        is_path = [isinstance(image, str) for image in images]
        columns: dict[str, Any] = {
            "sample_id": wrong["sample_id"].tolist(),
            "path": [files.utf8_text(str(image)) if p else None for image, p in zip(images, is_path, strict=True)],
            "source_index": [None if p else image for image, p in zip(images, is_path, strict=True)],
            "true_class": wrong["label"].tolist(),
            "true_name": [classes[c] for c in wrong["label"]],
            "predicted_class": wrong["predicted"].tolist(),
            "predicted_name": [classes[c] for c in wrong["predicted"]],
            "confidence": wrong["confidence"].to_numpy(),
        }
        publish_in_format(options.out, tables.MISCLASSIFIED_SCHEMA, columns)
        lines.append(f"done: {options.out}")
    out = str(options.out) if options.out is not None else None
    fields = {"phase": source.phase, "num_images": len(found), "out": out, "images": found}
    console.result(fields, header=("image", "true", "predicted", ">confidence"), rows=rows, lines=lines)


def _class_id(flag: str, given: str | None, classes: list[str]) -> int | None:
    """Return the id of a class given by name, or by id if no class has that name."""
    if given is None:
        return None
    if given in classes:
        return classes.index(given)
    if given.isdecimal() and len(given) < 10 and int(given) < len(classes):
        return int(given)
    raise UsageError(
        f'{flag} "{given}" is neither a class nor a class id from 0 to {len(classes) - 1}',
        fix=give_one_of(given, classes, flag),
    )


def _origins(options: MisclassifiedOptions, root: Path, evaluation: Path, wrong: pd.DataFrame) -> list[str | int]:
    """Return the file path of each image, or its index in the published test split."""
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    if files.SAMPLES in record.outputs:
        data_root = Path(record.data_root) if record.data_root is not None else None
        path, sha = run_json.output_of(evaluation, record, files.SAMPLES)
        samples = tables.read_samples(path, data_root is not None, sha)
    else:
        dataset = folders.find_dataset(root, record.dataset, options.data, data_root=options.data_root)
        samples, data_root = dataset.samples("test"), dataset.data_root
    if not wrong["sample_id"].isin(samples["sample_id"]).all():
        raise InputError(f"{evaluation} is of other samples than are recorded", fix="evaluate again with --overwrite")
    chosen = samples.set_index("sample_id").loc[wrong["sample_id"]]
    if data_root is not None:
        return [str(data_root / path) for path in chosen["path"]]
    return [int(i) for i in chosen["source_index"]]
