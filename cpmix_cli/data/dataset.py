"""Data set folders that build-lt wrote: their records, lists and images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator

from cpmix_cli.artifacts import records, tables
from cpmix_cli.artifacts.files import CLASS_COUNTS, DATASET, HASHES, SEEN, is_there, wait_for
from cpmix_cli.artifacts.records import Record
from cpmix_cli.data.shards import Shards
from cpmix_cli.data.splits import OWN_SOURCES, check_labels
from cpmix_cli.recipe.loading import find_recipe
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError, UsageError, counted, shortened

if TYPE_CHECKING:
    from torch import Tensor

_LOOKED_FOR = 32
"""Number of image files that are looked up below --data-root, to check the folder."""

FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]+$", max_length=255)]
"""Name of a file in the record's own folder."""

SPLITS = ("train", "val", "test")
Storage = Literal["tensors", "shards", "files"]
"""tensors: one tensor per split. shards: packed squares, read one by one. files: the image files below data_root."""


class Shaped(Record):
    """Fields of a record that describe a network's input: the shape of images or points, and pixel statistics."""

    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=3)]
    """Image (H, W, channels) or point (D,)."""
    mean: list[Annotated[float, Field(allow_inf_nan=False)]]
    """Mean per channel on the scale 0..1; empty for points, and for images that stay in their files."""
    std: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """Standard deviation per channel, as for `mean`."""

    @model_validator(mode="after")
    def _statistics_fit(self) -> "Shaped":
        channels = self.shape[-1] if len(self.shape) == 3 else 0
        # Images that stay in their files have no statistics, because build-lt does not decode them.
        if len(self.shape) == 2 or {len(self.mean), len(self.std)} not in ({channels}, {0}):
            raise ValueError(f"shape {self.shape} with {len(self.mean)} means and {len(self.std)} deviations")
        return self


class DatasetRequest(Record):
    """Settings of build-lt. Equal requests give equal data sets."""

    source: str
    rho: int | float | None
    """Imbalance factor, with the type that was given: 20 and 20.0 are written differently."""
    profile: str | None
    subset_seed: int
    val_per_class: int
    test_per_class: int | None
    image_size: int | None
    listing: str | None
    """Digest of the list of image files."""
    storage: Storage = "tensors"
    val_capped: bool = False
    """Class counts are those without val split, capped at what val leaves; False: the profile of what val leaves."""
    few_inclusive: bool = False
    """Classes with exactly 20 training images belong to the group few."""


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
    times: str | None = None
    """Digest of the times of the image files' last change; see image_folder.listing()."""
    layout: str = "auto"
    image_column: str | None = None
    """Column of the images, if a flag named it."""
    label_column: str | None = None
    """Column of the labels, if a flag named it."""
    left_out: dict[str, int] = Field(default_factory=dict)
    """Reason -> number of files of the source's folder that are left out; left_out.txt names them."""
    skip_unreadable: bool = False
    """Whether files that cannot be decoded are among them."""

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
    """A data set folder with a checked record. Pixels are read on request."""

    folder: Path
    record: DatasetRecord
    class_counts: NDArray[np.int64]
    """Training images per class [C]."""
    moved_to: Path | None = None
    """Folder of the image files, if it is not the folder in the record."""

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
        """Shape of one image (H, W, channels) or point (D,)."""
        return self.record.shape

    @property
    def storage(self) -> Storage:
        """Form in which images are stored. It decides which method returns them: read(), shards() or paths()."""
        return self.record.storage

    @property
    def has_statistics(self) -> bool:
        """True if mean and deviation of the pixels are known, or not needed (points)."""
        return self.storage != "files"

    @property
    def upright(self) -> bool:
        """True if images are rotated by their EXIF tag. Only a user's own images are; see decoding.py."""
        return self.record.source in OWN_SOURCES

    def recipe(self) -> str:
        """Return the name of the default recipe for this data set; raise InputError if that recipe does not exist."""
        name = self.record.recipe
        try:
            find_recipe(name)
        except UsageError as fault:  # an error of the record, not of the user's --recipe
            raise InputError(f"{self.folder / DATASET}: {fault.message}", fix="name one: --recipe") from fault
        return name

    def read(self, split: str) -> "tuple[Tensor, Tensor]":
        """Return images uint8 [N, H, W, channels] or points float32 [N, D], and labels [N] int64. Storage "tensors".

        Raises:
            InputError: a file is missing or damaged, or a label is outside 0..C - 1.
        """
        import torch  # imported here: it takes seconds, and most commands read no images

        from cpmix_cli.artifacts.tensors import read_tensors

        path = self.folder / f"{split}.safetensors"
        tensors, _ = read_tensors(path, self._sha(path))
        labels = tensors.pop("labels", torch.empty(0))
        inputs = tensors.pop("images" if len(self.shape) == 3 else "points", torch.empty(0))
        dtype = torch.uint8 if len(self.shape) == 3 else torch.float32
        if tensors or labels.dtype != torch.int64 or inputs.dtype != dtype:
            kind = str(dtype).removeprefix("torch.")
            raise InputError(
                f"{path} does not contain exactly the tensors labels (int64) and images or points ({kind})", path=path
            )
        if list(inputs.shape) != [len(labels), *self.shape]:
            raise InputError(
                f"{path} has inputs of shape {list(inputs.shape)} and labels of shape {list(labels.shape)}; "
                f"expected inputs of shape {[len(labels), *self.shape]}",
                path=path,
            )
        if not inputs.isfinite().all():
            raise InputError(f"{path} contains NaN or infinite coordinates", path=path)
        check_labels(path, labels.numpy(), self.num_classes)
        return inputs, labels

    def require(self, split: str) -> None:
        """Raise InputError if the split does not exist, such as val without --val-per-class of build-lt."""
        if split not in self.splits:
            raise InputError(
                f"{self.folder} has no {split} split",
                needed_by=f"--split {split}",
                fix="build one that has it, with --val-per-class or from a folder with train/, val/ and test/",
            )

    @property
    def splits(self) -> list[str]:
        """Names of the splits that exist, in the order train, val, test."""
        return [split for split in SPLITS if f"{split}.parquet" in self.record.files]

    def samples(self, split: str) -> pd.DataFrame:
        """Return the table of a split, one row per sample: sample_id, label and source_index.

        If the samples are image files, the last column is path, relative to `data_root`.

        Raises:
            InputError: the table is missing or damaged.
        """
        path = self.folder / f"{split}.parquet"
        table = tables.read_samples(path, self.data_root is not None, self._sha(path))
        tables.refuse_outside(path, table, "label", self.num_classes)
        return table

    def labels(self, split: str) -> NDArray[np.int64]:
        """Return the class of each image of a split [N]; raises as samples()."""
        return self.samples(split)["label"].to_numpy(np.int64)

    def paths(self, split: str) -> list[Path]:
        """Return the image file of each sample of a split [N], for sources with image files; raises as samples()."""
        root = self.data_root
        assert root is not None  # DatasetRecord requires data_root for storage "shards" and "files"
        return [root / path for path in self.samples(split)["path"]]

    def seen(self, split: str) -> pd.DataFrame | None:
        """Return size, changed_ns and sha256 of each image file when the set was built, one row per sample.

        None unless they are the user's and stay there. Raises as samples().
        """
        path = self.folder / f"{split}-{SEEN}"
        if path.name not in self.record.files:
            return None
        num_images = len(self.labels(split))
        table = tables.read_table(path, tables.SEEN_SCHEMA, self._sha(path), max_rows=num_images)
        if len(table) != num_images:
            raise InputError(f"{path} has {counted(len(table), 'row')}; expected {num_images}", path=path)
        return table

    def shards(self, split: str) -> Shards:
        """Return the packed images of a split. Storage "shards".

        Raises:
            InputError: the file of hashes is damaged, or a shard is missing or has the wrong size.
        """
        shards = self.recorded_shards(split)
        if missing := shards.missing():
            paths = [shards.path(number) for number in missing]
            names = shortened([str(path) for path in paths], 1)
            raise InputError(f"{names}: missing, or of another size than recorded", path=paths[0])
        return shards

    def recorded_shards(self, split: str) -> Shards:
        """Return the same as shards(), without a check that the shards exist."""
        path = self.folder / f"{split}-{HASHES}"
        table = tables.read_table(path, tables.HASHES_SCHEMA, self._sha(path))
        hashes = np.frombuffer(b"".join(table["sha256"]), dtype=np.uint8).reshape(-1, 32)
        return Shards(self.folder, split, hashes, self.shape, self.record.shard_images)

    def check_in_place(self) -> None:
        """Check that the folder still has this data set, which may be moved or built anew while a phase trains.

        Raises:
            InputError: it has not, or the folder of the image files is missing.
        """
        path = self.folder / DATASET
        wait_for(path)
        if not is_there(path):
            raise InputError(
                f"the data set {self.folder} was moved or deleted while it was in use",
                fix="put it back, or give its new folder with --data FOLDER: then the same command goes on",
            )
        if records.read_record(path, DatasetRecord).fingerprint != self.fingerprint:
            raise InputError(
                f"the data set {self.folder} was built anew, from other images or flags, while it was in use",
                fix="put the earlier one back, or give its folder with --data FOLDER: then the same command goes on; "
                "or train anew with --overwrite",
            )
        if self.storage == "files" and self.data_root is not None and not self.data_root.is_dir():
            raise InputError(
                f"the folder {self.data_root} of the images of {self.folder} was moved or deleted while it was in use",
                fix="put it back, or give its new place with --data-root FOLDER: then the same command goes on",
            )

    def _sha(self, path: Path) -> str:
        if path.name not in self.record.files:
            record = self.folder / DATASET
            raise InputError(f"{record} records no file {path.name}", path=record)
        return self.record.files[path.name]

    @property
    def data_root(self) -> Path | None:
        """Folder of the image files; None if the source has no image files."""
        root = self.moved_to or self.record.data_root
        return Path(root) if root is not None else None


def unwritten_dataset(
    name: str, counts: NDArray[np.int64], shape: list[int], *, recipe: str, rho: float | None, storage: Storage
) -> Dataset:
    """Return a data set that exists only in memory, for timings on random pixels.

    Args:
        name: name of the data set and of its source.
        counts: training images per class [C].
        shape: image shape, [H, W, channels].
        recipe: name of the default recipe.
        rho: imbalance factor.
        storage: form in which images would be stored.
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
    """Open a data set folder.

    Args:
        folder: folder that build-lt wrote.
        data_root: folder of the image files, if it is not the folder in the record.

    Raises:
        InputError: no data set is there, its record or class counts are damaged, or images are not in `data_root`.
        UsageError: `data_root` is given, but the data set has no image files.
    """
    path = folder / DATASET
    if not is_there(path):
        fix = "give --data a folder that cpmix build-lt has written; without one, start with: cpmix build-lt digits"
        if next(folder.glob("*/*.*"), None) is not None:  # perhaps CLASS/IMAGE
            build = console.typed("build-lt", "image-folder", "--data-root", folder)
            fix = f"give --data a folder that cpmix build-lt has written; to make one of these images: {build}"
        raise InputError(f"no data set in {folder} ({DATASET} is missing)", fix=fix)
    record = records.read_record(path, DatasetRecord)
    counts = tables.read_class_counts(folder / CLASS_COUNTS, record.files.get(CLASS_COUNTS, ""))
    if counts["class_name"].tolist() != record.classes:
        counted = folder / CLASS_COUNTS
        raise InputError(f"{counted} has other class names than {path}", path=counted)
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
        raise InputError(
            f"no folder {data_root}",
            needed_by="--data-root",
            fix=f"give the folder that has the images of {dataset.record.data_root}",
        )
    paths = dataset.paths("train")
    looked_for = [paths[i] for i in np.linspace(0, len(paths) - 1, min(_LOOKED_FOR, len(paths)), dtype=int)]
    if missing := [path for path in looked_for if not path.is_file()]:
        raise InputError(
            f"{data_root} is not the folder of {dataset.name}'s images: {len(missing)} of {len(looked_for)} that were "
            f"looked for are not in it, such as {missing[0]}",
            needed_by="--data-root",
            fix=f"name the folder that takes the place of {dataset.record.data_root}",
        )
