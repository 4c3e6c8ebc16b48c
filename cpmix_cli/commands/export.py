"""export: one file of a trained network for other programs, from uint8 images to logits, as ONNX or PyTorch's .pt2."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.artifacts import files
from cpmix_cli.evaluation import export
from cpmix_cli.evaluation.trained_model import TrainedModel, choose_for_use, images_of
from cpmix_cli.flags import ExportOptions
from cpmix_cli.runs.folders import find_dataset
from cpmix_cli.runs.plugin_needs import check_plugin
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.runtime.hardware import use_device


def run(options: ExportOptions) -> None:
    """Export a network and compare the file with it; the file is published only if both answer alike.

    Raises:
        UsageError: --out has another ending than the format.
        InputError: no phase is finished, it was trained on points, or its weights are too large for ONNX.
        EnvironmentFault: a package is missing, torch cannot export the network, the file answers otherwise, or --out
            exists with other content or cannot be written.
    """
    form, began = options.form, time.monotonic()
    if options.out is not None and options.out.suffix.lower() != f".{form}":
        raise UsageError(
            f"--out {options.out} does not end in .{form}, the format of the file",
            fix=f"give a name such as --out model.{form}, or the format with --format",
        )
    export.check_packages(form)
    source = choose_for_use(options.from_folder, options.phase)
    check_plugin(source)
    images_of(source)
    out = options.out or source.run / "export" / f"{source.phase}.{form}"
    model = TrainedModel(source, use_device("cpu"))
    if model.recipe.evaluation.aggregate == "test-time":
        console.note(
            "export: takes the mean of the experts, as predict does; weights that evaluate learns are not in it"
        )
    if form == "onnx":
        export.check_size(model)
    about = export.description(model)
    _check_place(out, form, about, overwrite=options.overwrite)
    images, origin = _images(options, model)
    console.note(f"export: makes {out}, which takes seconds to minutes")
    data, answer = export.exported(model, form, export.metadata(about))
    difference = export.largest_difference(model, images, answer)
    status = "done"
    if not options.overwrite and out.is_file() and files.read_bytes(out) == data:
        status = "up to date"
    else:
        files.refuse_existing(out, lambda _: True, overwrite=options.overwrite, why="holds something else")
        files.publish_out(out, data)
    sizes = " and ".join(map(str, export.BATCH_SIZES))
    fields: dict[str, Any] = {
        "status": status,
        "out": str(out),
        "format": form,
        "bytes": len(data),
        "sha256": files.sha256(data),
        "num_compared": len(images),
        "compared_on": origin,
        "batch_sizes": list(export.BATCH_SIZES),
        "largest_difference": difference,
        "seconds": round(time.monotonic() - began, 1),
        **about,
    }
    lines = [
        *_lines(about),
        f"compared: {len(images)} {origin}, in batches of {sizes}: the same classes, logits within {difference:.1e}",
        f"{status}: {out} ({len(data) / 1e6:,.1f} MB)",
    ]
    console.result(fields, lines=lines)


def _check_place(out: Path, form: str, about: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace a file that cpmix did not export, or without --overwrite one of another network or version."""
    found: list[Any] = []

    def is_own(data: bytes) -> bool:
        found.append(export.description_in(data, form))
        return found[0] is not None

    files.refuse_existing(out, is_own, overwrite=True)
    if found and found[0] != about:
        files.refuse_existing(
            out, lambda _: True, overwrite=overwrite, why="is of another checkpoint, or of another version of cpmix"
        )


def _images(options: ExportOptions, model: TrainedModel) -> tuple[list[NDArray[np.uint8]], str]:
    """Return images to compare on, and what they are: test images of the run, or random ones if these are missing."""
    source = model.source
    try:
        dataset = find_dataset(source.run, source.record().dataset, options.data, data_root=options.data_root)
        return export.some_of(dataset), f"test images of {dataset.name}"
    except InputError as fault:
        if options.data is not None or options.data_root is not None:
            raise
        console.warn(f"compared on random images only: {fault.message}")
        return export.generated(model.seen.shape), "random images"


def _lines(about: dict[str, Any]) -> list[str]:
    """Return how a program uses the file, as lines for people."""
    given, prepared, output, settings = (about[key] for key in ("input", "preprocessing", "output", "evaluation"))
    _, height, width, _ = given["shape"]
    neutral = {"experts": 1, "logit_adjustment": 0.0, "temperature": 1.0, "tau_norm": 0.0, "mirror": False}
    more = [f"{key} = {settings[key]}".lower() for key, value in neutral.items() if settings[key] != value]
    return [
        f"prepare: turn upright (EXIF), RGB, transparency on white, shorter side to {prepared['resize_shorter_side']} "
        f"({prepared['resize_filter']}, antialias), centre crop {height} x {width}",
        f"input: {given['name']}, uint8 [N, {height}, {width}, 3], RGB",
        f"in the graph: {', '.join(['mean and deviation of the pixels', *more])}",
        f"output: {output['name']}, float32 [N, {output['shape'][1]}]; softmax gives the probabilities of predict",
    ]
