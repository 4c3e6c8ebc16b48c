"""Test samples for a checkpoint: a split of its data set, or another folder of the same classes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cpmix_cli.artifacts import tables
from cpmix_cli.artifacts.files import DATASET, SAMPLES, digest, read_bytes, sha256
from cpmix_cli.data import image_folder
from cpmix_cli.data.batches import Batches, open_batches, pictures, stream_batches
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.decoding import all_unreadable_named, check_headers, readable_only
from cpmix_cli.data.equal_images import warn_of_changed
from cpmix_cli.data.stream import FileReader, read_in_order
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runs import run_json
from cpmix_cli.runtime.errors import InputError, shortened


@dataclass(frozen=True)
class TestSet:
    """N test samples with their true classes."""

    open: Callable[[Data, torch.device], Batches]
    """([data] of a recipe, device) -> batches of the samples, cropped and normalised by that recipe."""
    pictures: Callable[[torch.Tensor], torch.Tensor]
    """Positions [B] -> stored images [B, H, W, channels] uint8, or points [B, 2] float32."""
    labels: torch.Tensor
    """True classes [N] int64, numbered as in the trained network."""
    samples: pd.DataFrame
    """N rows with sample_id, label, and path or source_index."""
    data_root: Path | None
    """Folder to which the paths are relative; None without image files."""
    fingerprint: str
    """Hash that identifies the test set in the record of the evaluation."""
    reading: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context in which images are read; there, an image that cannot be read is an error that names all such files."""
    is_part: bool = False
    """Whether files of a split of the data set are left out."""


def own_tests(dataset: Dataset, split: str, *, skip_unreadable: bool = False) -> TestSet:
    """Return the train, val or test split of the data set.

    Args:
        dataset: data set folder.
        split: name of the split.
        skip_unreadable: leave out images in files that cannot be read, with a warning.

    Raises:
        InputError: the data set has no such split, or its files are missing or damaged.
    """
    dataset.require(split)
    samples, fingerprint = dataset.samples(split), f"{dataset.fingerprint} {split}".removesuffix(" test")
    if dataset.storage == "files":
        paths = dataset.paths(split)
        if skip_unreadable and len(kept := readable_only(paths, upright=dataset.upright)) < len(paths):
            warn_of_changed(dataset, split)
            found = _in_files(
                [paths[i] for i in kept],
                samples.iloc[kept],
                dataset,
                upright=dataset.upright,
                data_root=dataset.data_root,
            )
            return replace(found, fingerprint=digest([fingerprint, kept.tolist()]), is_part=True)
    inputs = cache(lambda: dataset.read(split)[0])

    def read(positions: torch.Tensor) -> torch.Tensor:
        if dataset.storage == "tensors":
            return inputs()[positions]
        return torch.from_numpy(np.stack(list(pictures(dataset, split, positions.numpy()))))

    return TestSet(
        lambda recipe, device: open_batches(dataset, split, recipe, device)[0],
        read,
        torch.from_numpy(dataset.labels(split)),
        samples,
        dataset.data_root,
        fingerprint,
        _naming(dataset.paths(split), dataset.upright) if dataset.storage == "files" else nullcontext,
    )


def _naming(paths: Sequence[Path], upright: bool) -> Callable[[], AbstractContextManager[None]]:
    fix = "restore or repair these files; if they have moved, name their folder; or leave them out: --skip-unreadable"
    return partial(all_unreadable_named, paths, upright=upright, fix=fix)


def _in_files(
    paths: Sequence[Path], samples: pd.DataFrame, dataset: Dataset, *, upright: bool, data_root: Path | None
) -> TestSet:
    """Return test samples in image files, without a fingerprint.

    Args:
        paths: image files [N].
        samples: N rows, see TestSet.samples.
        dataset: data set that the network was trained on.
        upright: rotate images by their EXIF tag; see decoding.py.
        data_root: folder to which the paths of `samples` are relative.
    """
    reader = partial(FileReader, paths, dataset.shape, upright=upright)
    return TestSet(
        lambda recipe, device: stream_batches(reader(recipe), recipe, dataset.record, device),
        lambda at: torch.from_numpy(np.stack(list(read_in_order(reader(Data(augment="none")), at.tolist())))),
        torch.tensor(samples["label"].to_numpy(np.int64)),
        samples,
        data_root,
        "",
        _naming(paths, upright),
    )


def other_tests(folder: Path, dataset: Dataset, *, skip_unreadable: bool = False) -> TestSet:
    """Return the test samples of another folder: the test split of a data set folder, or class sub-folders of images.

    Classes are matched by name. Classes of the network may be missing, but every class of the folder must be known.

    Args:
        folder: the other folder.
        dataset: data set that the network was trained on.
        skip_unreadable: leave out files of the folder that cannot be read, with a warning.

    Raises:
        InputError: the folder has unknown classes, images of another shape, or files that cannot be read.
    """
    if (folder / DATASET).is_file():
        other = open_dataset(folder)
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
                fix=f"give a data set with classes of the network only: {shortened(dataset.class_names, 20)}",
            )
        # Normalise as in training: the network was not trained on inputs scaled by the test set's own statistics.
        own = {"mean": dataset.record.mean, "std": dataset.record.std}
        other = replace(other, record=other.record.model_copy(update=own))
        tests = own_tests(other, "test", skip_unreadable=skip_unreadable)
        to_own = torch.tensor([dataset.class_names.index(name) for name in other.class_names])
        labels = to_own[tests.labels]
        return replace(tests, labels=labels, samples=tests.samples.assign(label=labels.numpy()))
    if len(dataset.shape) != 3:
        raise InputError(
            f"{folder} is no data set folder, and a network of points takes no images",
            needed_by="evaluate --test-data",
            fix="give a data set folder of points, built with: cpmix build-lt toy",
        )
    found = image_folder.scan(
        folder, layout="classes", class_names=dataset.class_names, skip_unreadable=skip_unreadable
    )
    image_folder.warn_of(folder, found.left_out)
    files = found.splits["train"]  # the images of all classes
    paths = [folder / path for path in files.paths]
    if skip_unreadable:
        kept = readable_only(paths, upright=True)
        files, paths = files.take(kept), [paths[i] for i in kept]
    else:
        check_headers(paths)

    content: Any = image_folder.listing(folder, files.paths)  # sizes and times: hashing would read millions of images
    if dataset.storage == "tensors":
        content = [[path, sha256(read_bytes(folder / path))] for path in files.paths]
    samples = pd.DataFrame({"sample_id": files.positions, "label": files.labels, "path": files.paths})
    tests = _in_files(paths, samples, dataset, upright=True, data_root=folder.resolve())
    return replace(tests, fingerprint=digest([content, files.labels.tolist()]))


def evaluated_tests(evaluation: Path, dataset: Dataset) -> TestSet:
    """Return the test samples of a finished evaluation, in the order of its predictions.

    Args:
        evaluation: folder of the evaluation.
        dataset: data set that the network was trained on.

    Raises:
        InputError: the samples are missing, or are others by now.
    """
    record = run_json.read_run(evaluation, run_json.EvaluationRecord)
    if SAMPLES not in record.outputs:
        return own_tests(dataset, "test")
    path, sha = run_json.output_of(evaluation, record, SAMPLES)
    samples = tables.read_samples(path, record.data_root is not None, sha)
    place = Path(record.test_data) if record.test_data is not None else None
    again = f"evaluate again, with the flags that wrote {evaluation}, and --overwrite"
    is_own = place is None or (place / DATASET).is_file()
    try:
        other = dataset if place is None or not is_own else open_dataset(place)
    except InputError as fault:
        raise InputError(f"the images of {evaluation} are not found: {fault.message}", fix=again) from fault
    if is_own and other.storage != "files":  # its own copy, which stays as it was
        known = (split for split in dataset.splits if record.made_from.dataset.endswith(f" {split}"))
        tests = own_tests(other, "test" if place is not None else next(known, "test"))
        if tests.samples["sample_id"].tolist() == samples["sample_id"].tolist():
            return tests
    root = dataset.data_root if place is None and dataset.data_root else record.data_root
    if record.data_root is None or root is None:
        raise InputError(f"the images of {evaluation} are not found: they are others by now", fix=again)
    paths = [Path(root) / path for path in samples["path"]]
    return _in_files(paths, samples, dataset, upright=other.upright or not is_own, data_root=Path(root))
