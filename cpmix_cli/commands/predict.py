"""predict: classify a user's images with a trained network. Requires only the run folder, not its data set."""

import io
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cpmix_cli.artifacts import files, tables
from cpmix_cli.data import image_folder
from cpmix_cli.data.batches import stream_batches
from cpmix_cli.data.decoding import LEAVE_OUT, all_unreadable_named, check_headers, readable_only
from cpmix_cli.data.stream import FileReader
from cpmix_cli.evaluation.prediction import check_finite, predicted, read_model
from cpmix_cli.flags import PredictOptions
from cpmix_cli.results.table_formats import csv_text
from cpmix_cli.runs.phase_choice import choose
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.runtime.hardware import use_device

NUM_SHOWN = 50


def _is_own(data: bytes) -> bool:
    """Return whether a file has predictions of this command."""
    names = tables.PREDICTED_IMAGES_SCHEMA.names
    with suppress(pa.ArrowInvalid):
        return bool(pq.read_schema(io.BytesIO(data)).names == names)
    return data.startswith(",".join(names).encode())


def run(options: PredictOptions) -> None:
    """Predict class and confidence of each image.

    Raises:
        UsageError: --out is neither a Parquet nor a CSV file.
        InputError: no phase is finished, no images are found, or images cannot be read.
        EnvironmentFault: --out exists or cannot be written, or the device is missing.
    """
    source = choose(options.from_folder, options.phase)
    seen = source.record().dataset
    if len(seen.shape) != 3:
        raise InputError(
            f"{source.path} was trained on points ({seen.name}) and takes no images",
            fix="give --from a run that was trained on images",
        )
    suffix = options.out.suffix.lower() if options.out is not None else ""
    if options.out is not None:
        if suffix not in (".parquet", ".csv"):
            raise UsageError(
                f"--out {options.out} ends in neither .parquet nor .csv",
                fix="give a name such as --out predictions.csv",
            )
        files.refuse_existing(options.out, _is_own, overwrite=options.overwrite)
    device = use_device(options.device, options.threads)
    paths = image_folder.find_images(options.images, skip_unreadable=options.skip_unreadable)
    counts = tables.read_class_counts(*source.output(files.CLASS_COUNTS))
    classes = counts["class_name"].tolist()
    recipe = source.recipe()
    model = read_model(source, recipe, len(classes), seen.shape).to(device)
    found = paths
    if options.skip_unreadable:
        paths = [paths[i] for i in readable_only(paths, upright=True)]
    else:
        check_headers(paths)
    reader = FileReader(paths, seen.shape, recipe.data, upright=True)
    batches = stream_batches(reader, recipe.data, seen, device)
    class_counts = torch.tensor(counts["num_train"].to_numpy())
    with all_unreadable_named(paths, upright=True, fix=LEAVE_OUT):
        found_logits = predicted(model, batches, len(paths), class_counts, recipe.evaluation)
    check_finite(found_logits, recipe, source)
    confidence, classified = found_logits.logits.softmax(1).topk(min(options.top, len(classes)), dim=1)

    kept = confidence.shape[1]
    columns = {
        "path": np.repeat([files.utf8_text(str(path)) for path in paths], kept),
        "rank": np.tile(np.arange(1, kept + 1), len(paths)),
        "class_id": classified.flatten().numpy(),
        "class_name": [classes[c] for c in classified.flatten().tolist()],
        "confidence": confidence.flatten().numpy(),
    }
    if options.out is not None:
        rows_of_csv = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        data = (
            ("\n".join(csv_text(rows_of_csv)) + "\n").encode()
            if suffix == ".csv"
            else tables.table_bytes(tables.PREDICTED_IMAGES_SCHEMA, columns)
        )
        files.publish_out(options.out, data)
    predictions = []
    rows = []
    for path, row, chances in zip(map(str, paths), classified.tolist(), confidence.tolist(), strict=True):
        guesses = [(classes[c], round(p, 4)) for c, p in zip(row, chances, strict=True)]
        predictions.append({"path": path, "classes": [{"class": name, "confidence": p} for name, p in guesses]})
        rows.append([path, *(cell for name, p in guesses for cell in (name, f"{100 * p:.1f} %"))])
    numbers = [""] if kept == 1 else [f" {k}" for k in range(1, kept + 1)]
    lines = []
    if len(paths) > NUM_SHOWN:
        lines.append(f"... and {len(paths) - NUM_SHOWN:,} more; --out FILE.parquet and --json have all")
    if options.out is not None:
        lines.append(f"done: {options.out}")
    fields = {
        "phase": source.phase,
        "num_images": len(paths),
        "num_unreadable": len(found) - len(paths),
        "out": str(options.out) if options.out is not None else None,
        "predictions": predictions,
    }
    header = ["image", *(name for k in numbers for name in (f"class{k}", f">confidence{k}"))]
    console.result(fields, header=header, rows=rows[:NUM_SHOWN], lines=lines)
