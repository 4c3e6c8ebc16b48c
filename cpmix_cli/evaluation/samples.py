"""Test samples of a checkpoint: a split of its data set, or another folder of the same classes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cpmix_cli.artifacts.files import DATASET, digest, read_bytes, sha256
from cpmix_cli.data import image_folder
from cpmix_cli.data.batches import Batches, open_batches, pictures, stream_batches
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.data.decoding import check_headers
from cpmix_cli.data.stream import FileReader, read_in_order
from cpmix_cli.recipe.schema import Data
from cpmix_cli.runtime.errors import InputError


@dataclass(frozen=True)
class TestSet:
    """N samples with their true classes, to evaluate a checkpoint on."""

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


def own_tests(dataset: Dataset, split: str) -> TestSet:
    """Return the data set's own train, val or test split.

    Raises:
        InputError: it has none, or its files are damaged.
    """
    dataset.require(split)
    inputs = cache(lambda: dataset.read(split)[0])

    def read(positions: torch.Tensor) -> torch.Tensor:
        if dataset.storage == "tensors":
            return inputs()[positions]
        return torch.from_numpy(np.stack(list(pictures(dataset, split, positions.numpy()))))

    return TestSet(
        lambda recipe, device: open_batches(dataset, split, recipe, device)[0],
        read,
        torch.from_numpy(dataset.labels(split)),
        dataset.samples(split),
        dataset.data_root,
        dataset.fingerprint if split == "test" else f"{dataset.fingerprint} {split}",
    )


def other_tests(folder: Path, dataset: Dataset) -> TestSet:
    """Return another folder's test samples: the test split of a data set folder, or class sub-folders of images.

    Classes are matched by name; some may be missing, none may be unknown.

    Raises:
        InputError: classes that the network does not know, images of another shape, unreadable files.
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
            )
        # Normalised as in training: the network has not seen what a test set's own statistics would do to it.
        own = {"mean": dataset.record.mean, "std": dataset.record.std}
        tests = own_tests(replace(other, record=other.record.model_copy(update=own)), "test")
        to_own = torch.tensor([dataset.class_names.index(name) for name in other.class_names])
        labels = to_own[tests.labels]
        return replace(tests, labels=labels, samples=tests.samples.assign(label=labels.numpy()))
    if len(dataset.shape) != 3:
        raise InputError(f"{folder}: a network of points takes no images", needed_by="evaluate --test-data")
    _, files = image_folder.scan(folder, class_names=dataset.class_names)
    paths = [folder / path for path in files.paths]
    check_headers(paths)

    reader = partial(FileReader, paths, dataset.shape, upright=True)
    # An edit may keep a file's size; millions of images are not read for that.
    content: Any = image_folder.listing(folder, files.paths)
    if dataset.storage == "tensors":
        content = [[path, sha256(read_bytes(folder / path))] for path in files.paths]
    return TestSet(
        lambda recipe, device: stream_batches(reader(recipe), recipe, dataset.record, device),
        lambda at: torch.from_numpy(np.stack(list(read_in_order(reader(Data(augment="none")), at.tolist())))),
        torch.from_numpy(files.labels),
        pd.DataFrame({"sample_id": files.positions, "label": files.labels, "path": files.paths}),
        folder.resolve(),
        digest([content, files.labels.tolist()]),
    )
