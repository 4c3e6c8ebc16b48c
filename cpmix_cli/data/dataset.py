"""Reading a data set folder that build-lt wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator

from cpmix_cli.artifacts import records, tables
from cpmix_cli.artifacts.files import CLASS_COUNTS, DATASET, HASHES, is_there
from cpmix_cli.artifacts.records import Record
from cpmix_cli.data.shards import REPAIR, Shards
from cpmix_cli.data.splits import check_labels
from cpmix_cli.recipe.loading import find_recipe
from cpmix_cli.runtime.errors import InputError, UsageError, shortened

if TYPE_CHECKING:
    from torch import Tensor

_LOOKED_FOR = 32
"""Image files that --data-root is checked for."""

FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]+$", max_length=255)]
"""Name of a file in the record's own folder."""

SPLITS = ("train", "val", "test")
Storage = Literal["tensors", "shards", "files"]
"""One tensor per split; packed squares that are read one by one; the image files themselves, below data_root."""


class Shaped(Record):
    """The fields of a record that say what a network takes: images with their statistics, or points."""

    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=3)]
    mean: list[Annotated[float, Field(allow_inf_nan=False)]]
    std: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    @model_validator(mode="after")
    def _statistics_fit(self) -> "Shaped":
        channels = self.shape[-1] if len(self.shape) == 3 else 0
        # Images that stay in their files have no statistics.
        if len(self.shape) == 2 or {len(self.mean), len(self.std)} not in ({channels}, {0}):
            raise ValueError(f"shape {self.shape} with {len(self.mean)} means and {len(self.std)} deviations")
        return self


class DatasetRequest(Record):
    """The settings of build-lt; equal requests give equal data sets."""

    source: str
    rho: int | float | None
    """Imbalance factor, as given: 20 and 20.0 are written differently."""
    profile: str | None
    subset_seed: int
    val_per_class: int
    test_per_class: int | None
    image_size: int | None
    listing: str | None
    """Digest of the list of image files."""
    storage: Storage = "tensors"
    few_inclusive: bool = False
    """Classes of exactly 20 training images are few."""


class DatasetRecord(Shaped, DatasetRequest):
    """Fields of a dataset.json."""

    name: str
    classes: list[str]
    num_train: int
    num_test: int
    groups: dict[Literal["many", "medium", "few"], int]
    recipe: Annotated[str, Field(max_length=200)]
    files: dict[FileName, str]
    data_root: str | None
    fingerprint: str
    shard_images: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _storage_fits(self) -> "DatasetRecord":
        if (not self.mean and len(self.shape) == 3) != (self.storage == "files"):
            raise ValueError(f"{len(self.mean)} means of storage {self.storage}")
        if self.storage != "tensors" and (self.shape != [self.shape[0]] * 2 + [3] or self.data_root is None):
            raise ValueError(f"{self.storage} of shape {self.shape}, data_root {self.data_root}")
        if len(self.groups) != 3:
            raise ValueError("groups are many, medium and few")
        return self


@dataclass(frozen=True)
class Dataset:
    """A data set folder with a checked record; pixels are read on request."""

    folder: Path
    record: DatasetRecord
    class_counts: NDArray[np.int64]
    """Training images per class [C]."""
    moved_to: Path | None = None
    """Folder of the image files, if not that of the record."""

    @property
    def fingerprint(self) -> str:
        """Digest of lists, labels and packed pixels."""
        return self.record.fingerprint

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def class_names(self) -> list[str]:
        return self.record.classes

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> list[int]:
        """Shape of one image (H, W, channels) or point (2,)."""
        return self.record.shape

    @property
    def storage(self) -> Storage:
        """How images are stored, and so what returns them: read(), shards() or paths()."""
        return self.record.storage

    @property
    def has_statistics(self) -> bool:
        """Whether mean and deviation of the pixels are known, or not needed (points)."""
        return self.storage != "files"

    @property
    def upright(self) -> bool:
        """Whether images are rotated as EXIF says: people's own are, see decoding.py."""
        return self.record.source == "image-folder"

    def recipe(self) -> str:
        """Return the name of the default recipe for this data set; raise InputError if there is no such recipe."""
        name = self.record.recipe
        try:
            find_recipe(name)
        except UsageError as fault:  # the record names it, no user's --recipe
            raise InputError(f"{self.folder / DATASET}: {fault.message}", fix="name one: --recipe") from fault
        return name

    def read(self, split: str) -> "tuple[Tensor, Tensor]":
        """Return images uint8 [N, H, W, channels] or points float32 [N, 2], and labels [N] int64; of storage "tensors".

        Raises:
            InputError: a file is missing or damaged, or a label lies outside the classes.
        """
        import torch  # takes seconds, and most commands read no images

        from cpmix_cli.artifacts.tensors import read_tensors

        path = self.folder / f"{split}.safetensors"
        tensors, _ = read_tensors(path, self._sha(path))
        labels = tensors.pop("labels", torch.empty(0))
        inputs = tensors.pop("images" if len(self.shape) == 3 else "points", torch.empty(0))
        dtype = torch.uint8 if len(self.shape) == 3 else torch.float32
        if tensors or labels.dtype != torch.int64 or inputs.dtype != dtype:
            raise InputError(f"{path} holds other tensors than those of a split of {self.name}")
        if list(inputs.shape) != [len(labels), *self.shape]:
            raise InputError(
                f"{path} holds inputs of shape {list(inputs.shape)} and labels of {list(labels.shape)}; "
                f"expected one of {self.shape} a label"
            )
        if not inputs.isfinite().all():
            raise InputError(f"{path} holds points that are not finite")
        check_labels(path, labels.numpy(), self.num_classes)
        return inputs, labels

    def require(self, split: str) -> None:
        """Raise InputError if there is no such split: val exists only if build-lt was asked for one."""
        if split not in self.splits:
            raise InputError(
                f"{self.folder} has no {split} split",
                needed_by=f"--split {split}",
                fix="build one that has it, with --val-per-class",
            )

    @property
    def splits(self) -> list[str]:
        """Those of train, val and test that exist."""
        return [split for split in SPLITS if f"{split}.parquet" in self.record.files]

    def samples(self, split: str) -> pd.DataFrame:
        """Return sample_id, label and source_index (or path, below `data_root`) of a split's images, in its order.

        Raises:
            InputError: the list is missing or damaged.
        """
        path = self.folder / f"{split}.parquet"
        schema = tables.split_schema(self.data_root is not None)
        table = tables.read_table(path, schema, self._sha(path))
        tables.refuse_outside(path, table, "label", self.num_classes)
        return table

    def labels(self, split: str) -> NDArray[np.int64]:
        """Return the class of each image of a split [N]; raises as samples()."""
        return self.samples(split)["label"].to_numpy(np.int64)

    def paths(self, split: str) -> list[Path]:
        """Return the image file of each sample of a split, if the source's images are files; raises as samples()."""
        root = self.data_root
        assert root is not None  # DatasetRecord sees to it where images are read from their files
        return [root / path for path in self.samples(split)["path"]]

    def shards(self, split: str) -> Shards:
        """Return the packed images of a split; of storage "shards".

        Raises:
            InputError: its hashes are damaged, or shards are missing or of another size.
        """
        shards = self.recorded_shards(split)
        if missing := shards.missing():
            names = [str(shards.path(number)) for number in missing]
            raise InputError(f"{shortened(names, 1)} missing or not whole", fix=REPAIR)
        return shards

    def recorded_shards(self, split: str) -> Shards:
        """Return shards() without looking whether they exist."""
        path = self.folder / f"{split}-{HASHES}"
        table = tables.read_table(path, tables.HASHES_SCHEMA, self._sha(path))
        hashes = np.frombuffer(b"".join(table["sha256"]), dtype=np.uint8).reshape(-1, 32)
        return Shards(self.folder, split, hashes, self.shape, self.record.shard_images)

    def _sha(self, path: Path) -> str:
        if path.name not in self.record.files:
            raise InputError(f"{self.folder / DATASET} records no {path.name}")
        return self.record.files[path.name]

    @property
    def data_root(self) -> Path | None:
        """Folder of the image files; None if the source's images are no files."""
        root = self.moved_to or self.record.data_root
        return Path(root) if root is not None else None


def unwritten_dataset(
    name: str, counts: NDArray[np.int64], shape: list[int], *, recipe: str, rho: float | None, storage: Storage
) -> Dataset:
    """Return a data set that is in no folder, for timings on random pixels: `counts` [C] training images per class, of
    `shape` (H, W, channels), stored as `storage`, with the default recipe `recipe`.
    """
    fields: dict[str, Any] = {
        "name": name,
        "source": name,
        "rho": rho,
        "classes": [str(c) for c in range(len(counts))],
        "recipe": recipe,
        "files": {},
        "data_root": None,
        "fingerprint": "",
        "storage": storage,
        "shape": shape,
        "mean": [0.5] * shape[-1],
        "std": [0.25] * shape[-1],
    }
    return Dataset(Path(), DatasetRecord.model_construct(**fields), counts)


def open_dataset(folder: Path, *, data_root: Path | None = None) -> Dataset:
    """Return the data set in a folder; its image files are in `data_root`, if not where its record says.

    Raises:
        InputError: no data set there, its record or class counts are damaged, or its images are not in `data_root`.
        UsageError: a `data_root` for a set that has no image files.
    """
    path = folder / DATASET
    if not is_there(path):
        raise InputError(
            f"no data set in {folder} ({DATASET} is missing)", fix="give a folder that build-lt has written with --data"
        )
    record = records.read_record(path, DatasetRecord)
    counts = tables.read_class_counts(folder / CLASS_COUNTS, record.files.get(CLASS_COUNTS, ""))
    if counts["class_name"].tolist() != record.classes:
        raise InputError(f"{folder / CLASS_COUNTS} names other classes than {path}")
    dataset = Dataset(folder, record, np.asarray(counts["num_train"], dtype=np.int64), data_root)
    if data_root is not None:
        _check_moved(dataset, data_root)
    return dataset


def _check_moved(dataset: Dataset, data_root: Path) -> None:
    if dataset.record.data_root is None:
        raise UsageError(
            f"--data-root {data_root}: {dataset.name} has no image files, all of it is in {dataset.folder}",
            fix="drop the flag",
        )
    if not data_root.is_dir():
        raise InputError(f"no folder {data_root}", needed_by="--data-root")
    paths = dataset.paths("train")
    looked_for = [paths[i] for i in np.linspace(0, len(paths) - 1, min(_LOOKED_FOR, len(paths)), dtype=int)]
    if missing := [path for path in looked_for if not path.is_file()]:
        raise InputError(
            f"{data_root} is not the folder of {dataset.name}'s images: {len(missing)} of {len(looked_for)} that were "
            f"looked for are not in it, such as {missing[0]}",
            needed_by="--data-root",
            fix=f"name the folder that takes the place of {dataset.record.data_root}",
        )
