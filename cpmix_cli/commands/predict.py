"""predict: classify a user's images with a trained network. Requires only the run folder, not its data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cpmix_cli.artifacts import files, tables
from cpmix_cli.artifacts.files import THRESHOLDS
from cpmix_cli.data import image_folder
from cpmix_cli.data.decoding import readable_only
from cpmix_cli.evaluation.sorted_copies import SortedFolder, folder_names, open_sorted
from cpmix_cli.evaluation.trained_model import PROBABILITY, TrainedModel, choose_for_use, images_of, probability_columns
from cpmix_cli.flags import PredictOptions
from cpmix_cli.results.table_files import check_out, publish_in_format
from cpmix_cli.runs import run_json
from cpmix_cli.runs.plugin_needs import check_plugin, plugin_words_of
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted
from cpmix_cli.runtime.hardware import use_device
from cpmix_cli.runtime.rounding import percent

NUM_SHOWN = 50
_UNSURE = "unsure"


def _is_own(names: list[str]) -> bool:
    """Return whether a table has the columns of this command."""
    own = tables.PREDICTED_IMAGES_SCHEMA.names
    return names[: len(own)] == own and all(n == _UNSURE or n.startswith(PROBABILITY) for n in names[len(own) :])


def run(options: PredictOptions) -> None:
    """Predict class and confidence of each image.

    Raises:
        UsageError: --out has another ending than those of tables, or flags do not go together.
        InputError: no phase is finished, no images are found, or images cannot be read.
        EnvironmentFault: --out or --sort-into exists or cannot be written, or the device is missing.
    """
    source = choose_for_use(options.from_folder, options.phase)
    check_plugin(source)
    images_of(source)
    if options.probabilities and options.top != 1:
        raise UsageError("--probabilities gives all classes, so --top has no effect", fix="drop one of the two flags")
    if options.probabilities and options.out is None and not console.as_json:
        raise UsageError("--probabilities has no place on a terminal", fix="give --out FILE.csv or --json as well")
    if options.out is not None:
        check_out(options.out, _is_own, overwrite=options.overwrite, example="predictions.csv")
    sorted_folder = None if options.sort_into is None else open_sorted(options.sort_into, options.images)
    device = use_device(options.device, options.threads)
    paths = image_folder.find_images(options.images, skip_unreadable=options.skip_unreadable)
    model = TrainedModel(source, device)
    classes = model.class_names
    limits = None if options.unsure_below is None else _limits(options.unsure_below, model)
    found = paths
    if options.skip_unreadable:
        paths = [paths[i] for i in readable_only(paths, upright=True)]
    probabilities = model.probabilities(paths)
    confidence, classified = probabilities.topk(min(options.top, len(classes)), dim=1)
    unsure = None if limits is None else (confidence[:, 0] < limits[classified[:, 0]]).tolist()

    kept = confidence.shape[1]
    if options.out is not None:
        columns: dict[str, Any] = {
            "path": np.repeat([files.utf8_text(str(path)) for path in paths], kept).tolist(),
            "rank": np.tile(np.arange(1, kept + 1), len(paths)).tolist(),
            "class_id": classified.flatten().tolist(),
            "class_name": [classes[c] for c in classified.flatten().tolist()],
            "confidence": confidence.flatten().numpy(),
        }
        schema = tables.PREDICTED_IMAGES_SCHEMA
        if unsure is not None:
            columns[_UNSURE] = np.repeat(unsure, kept).tolist()
            schema = schema.append(pa.field(_UNSURE, pa.bool_(), nullable=False))
        if options.probabilities:
            for name, column in zip(probability_columns(classes), probabilities.numpy().T, strict=True):
                columns[name] = column
                schema = schema.append(pa.field(name, pa.float32(), nullable=False))
        publish_in_format(options.out, schema, columns)
    lines, fields = _sort(options, sorted_folder, paths, classes, classified[:, 0].tolist(), unsure)
    predictions = []
    rows = []
    for n, (path, row, chances) in enumerate(
        zip(map(str, paths), classified.tolist(), confidence.tolist(), strict=True)
    ):
        guesses = [(classes[c], p) for c, p in zip(row, chances, strict=True)]
        found_classes = [{"class": name, "confidence": round(p, 4)} for name, p in guesses]
        prediction: dict[str, Any] = {"path": path, "classes": found_classes}
        cells = [path, *(cell for name, p in guesses for cell in (name, f"{percent(100 * p, 1)} %"))]
        if unsure is not None:
            prediction[_UNSURE] = unsure[n]
            cells.append(_UNSURE if unsure[n] else "")
        if options.probabilities:
            shares = [round(p, 6) for p in probabilities[n].tolist()]
            prediction["probabilities"] = dict(zip(classes, shares, strict=True))
        predictions.append(prediction)
        rows.append(cells)
    numbers = [""] if kept == 1 else [f" {k}" for k in range(1, kept + 1)]
    if unsure is not None:
        lines.insert(0, f"{sum(unsure):,} of {counted(len(paths), 'image')} {_UNSURE}: below {options.unsure_below}")
        fields["num_unsure"] = sum(unsure)
    if len(paths) > NUM_SHOWN:
        lines.insert(0, f"... and {len(paths) - NUM_SHOWN:,} more; --out FILE.parquet and --json have all")
    if options.out is not None:
        lines.append(f"done: {options.out}")
    fields = {
        "phase": source.phase,
        "num_images": len(paths),
        "num_unreadable": len(found) - len(paths),
        "out": str(options.out) if options.out is not None else None,
        **fields,
        "predictions": predictions,
    }
    header = ["image", *(name for k in numbers for name in (f"class{k}", f">confidence{k}"))]
    header += [] if unsure is None else [_UNSURE]
    console.result(fields, header=header, rows=rows[:NUM_SHOWN], lines=lines)


def _sort(
    options: PredictOptions,
    folder: SortedFolder | None,
    paths: Sequence[Path],
    classes: Sequence[str],
    found: Sequence[int],
    unsure: Sequence[bool] | None,
) -> tuple[list[str], dict[str, Any]]:
    """Copy the images into their folders; return lines and JSON fields about it, none without --sort-into.

    Args:
        options: flags of the command.
        folder: folder of --sort-into.
        paths: images [N].
        classes: class names [C].
        found: predicted classes [N].
        unsure: which images are unsure [N]; None without --unsure-below.
    """
    if folder is None:
        return [], {}
    *of_class, of_unsure = folder_names([*classes, _UNSURE])
    places = [of_class[c] for c in found]
    if unsure is not None:
        places = [of_unsure if is_unsure else place for place, is_unsure in zip(places, unsure, strict=True)]
    is_new = folder.write(paths, places, overwrite=options.overwrite)
    number = len(set(places))
    lines = [f"{'copied' if is_new else 'up to date'}: {counted(number, 'folder')} of images in {options.sort_into}"]
    return lines, {"sorted_into": str(options.sort_into), "sorted": "done" if is_new else "up to date"}


def _limits(given: str, model: TrainedModel) -> Tensor:
    """Return the confidence below which a prediction is unsure, for each class [C] float32.

    Args:
        given: value of --unsure-below.
        model: network that predicts.

    Raises:
        UsageError: `given` is a number outside of 0 to 1.
        InputError: it is no thresholds.parquet of this phase.
    """
    try:
        share = float(given)
    except ValueError:
        pass
    else:
        if not 0 <= share <= 1:
            raise UsageError(f"--unsure-below {given} is no confidence from 0 to 1", fix="give such as 0.8")
        return torch.full((len(model.class_names),), share)
    path, source = Path(given).expanduser(), model.source
    words = ["--from", source.run, "--phase", source.phase, *plugin_words_of(source)]
    again = console.typed("evaluate", *words, "--threshold-for", "precision=0.9")
    fix = f"give a confidence from 0 to 1, or RUN/evaluation/PHASE/{THRESHOLDS} of this run, which this writes: {again}"
    if path.name != THRESHOLDS or not files.is_there(path.parent / files.RUN):
        raise InputError(f"{given} is neither a number nor a {THRESHOLDS} of an evaluation", fix=fix)
    record = run_json.read_run(path.parent, run_json.EvaluationRecord)
    if (
        not source.is_source_of(record)
        or record.made_from.recipe.get("evaluation") != model.recipe.tables()["evaluation"]
    ):
        raise InputError(f"{given} is of another checkpoint, or of other settings of [evaluation]", fix=fix)
    table = tables.read_table(path, tables.THRESHOLDS_SCHEMA, run_json.output_of(path.parent, record, THRESHOLDS)[1])
    return torch.tensor(table["threshold"].fillna(np.inf).to_numpy(), dtype=torch.float32)
