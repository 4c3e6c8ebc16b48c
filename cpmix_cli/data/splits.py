"""Records of a source: its labelled samples, in memory or as image files, before any class is made rare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.runtime.errors import InputError


class Split:
    """Labelled samples: the training pool of a source, a split of its own, or the part of one chosen for a data set.

    Args:
        labels: class of each sample [N].
        read: positions [n] -> images uint8 [n, H, W, channels] or points float32 [n, 2]; None if samples are files.
        paths: image file of each sample [N], below Source.root; empty if samples are no files.
        positions: position of each sample in the source's order [N]; 0 to N - 1 by default.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        read: Callable[[NDArray[np.int64]], NDArray[Any]] | None = None,
        paths: Sequence[str] = (),
        positions: NDArray[np.int64] | None = None,
    ) -> None:
        self.labels = labels
        self.paths = paths
        self.positions = np.arange(len(labels)) if positions is None else positions
        self._read = read

    def take(self, positions: NDArray[np.int64]) -> "Split":
        """Return the samples at `positions` [n]."""
        paths = [self.paths[i] for i in positions] if self.paths else ()
        return Split(self.labels[positions], self._read, paths, self.positions[positions])

    def load(self) -> NDArray[Any]:
        """Return samples that are no files: [N, ...]; raise InputError if an image of the source cannot be decoded."""
        assert self._read is not None
        return np.ascontiguousarray(self._read(self.positions))


@dataclass(frozen=True)
class Source:
    """A balanced (or naturally imbalanced) labelled set."""

    class_names: list[str]
    pool: Split
    """Training images or points."""
    recipe: str
    """Recipe for this source where none is named."""
    default_rho: float | None = None
    """Imbalance factor where none is given; None keeps all samples."""
    profile: str = "exponential"
    test: Split | None = None
    """The source's test split; None holds `test_per_class` samples of each class out of the pool."""
    val: Split | None = None
    """The source's val split, if it has one."""
    test_per_class: int | None = 0
    """Test samples per class where none are given; None: the smaller of 10 and 20 per cent."""
    files: tuple[Path, ...] = ()
    """Source files; the data set records their hashes."""
    root: Path | None = None
    """Folder of the image files; None if samples are no files."""
    listing: str | None = None
    """Digest of the image files' names and sizes, or of the lists."""
    name: str = ""
    """Name of the user's folder: part of the data set's name."""


def check_published(what: object, kind: str, found: str, published: str) -> None:
    """Raise InputError if the hash of a file (`what`, of the `kind` sha256 or MD5) is not the published one."""
    if found != published:
        raise InputError(
            f"{what} is not the published file: its {kind} is {found}, published is {published}",
            fix="copy or fetch it again, for example with --download",
        )


def check_labels(path: Path, labels: NDArray[np.int64], num_classes: int) -> None:
    """Raise InputError if one of labels [N] is not 0 to num_classes - 1."""
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if not 0 <= low <= high < num_classes:
        raise InputError(f"{path} has labels {low} to {high}; expected 0 to {num_classes - 1}")
