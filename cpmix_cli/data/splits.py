"""Sources and splits: labelled samples in memory or in image files, before a long-tailed subset is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.runtime.errors import InputError

OWN_SOURCES = ("image-folder", "parquet")
"""Sources of a user's own images: encoded images of any size, rotated by their EXIF tag."""


class Split:
    """Labelled samples: a split of a source, or a subset of one.

    Args:
        labels: class of each sample [N].
        read: positions [n] -> images uint8 [n, H, W, channels] or points float32 [n, 2]; None for image files.
        paths: image file of each sample [N], relative to Source.root, or row of a Parquet file (see parquet_rows.py);
            empty if samples are not files.
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
        """Return the subset of the samples at `positions` [n]."""
        paths = [self.paths[i] for i in positions] if self.paths else ()
        return Split(self.labels[positions], self._read, paths, self.positions[positions])

    def load(self) -> NDArray[Any]:
        """Return the samples [N, ...] if they are not files; raise InputError if an image cannot be decoded."""
        assert self._read is not None
        return np.ascontiguousarray(self._read(self.positions))


@dataclass(frozen=True)
class Source:
    """A balanced or naturally imbalanced labelled set, from which build-lt takes a subset."""

    class_names: list[str]
    pool: Split
    """Training samples."""
    recipe: str
    """Default recipe."""
    default_rho: float | None = None
    """Default imbalance factor; None keeps all samples."""
    profile: str = "exponential"
    """Default profile, a key of longtail.PROFILES."""
    test: Split | None = None
    """Test split of the source. If None, `test_per_class` samples per class are held out of the pool."""
    val: Split | None = None
    """Val split of the source, if it has one."""
    test_per_class: int | None = 0
    """Default number of test samples held out per class; None: 20 % of the class, at most 10."""
    files: tuple[Path, ...] = ()
    """Source files. The data set records their hashes."""
    root: Path | None = None
    """Folder of the image files; None if samples are not files."""
    listing: str | None = None
    """Digest of the image files' names and sizes, or of the lists."""
    times: str | None = None
    """Digest of the times of a user's image files' last change, and of their sizes if they come from lists."""
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Reason -> path below `root` -> number of files, see image_folder.LeftOut."""
    name: str = ""
    """Name of the user's folder, for the name of the data set."""


def check_published(what: object, kind: str, found: str, published: str) -> None:
    """Compare a file's hash with the published one.

    Args:
        what: the file, as the message names it.
        kind: kind of hash, as the message names it: "sha256" or "MD5".
        found: hex digest of the file.
        published: hex digest of the published file.

    Raises:
        InputError: the hashes differ.
    """
    if found != published:
        raise InputError(
            f"{what} is not the published file: its {kind} is {found}, published is {published}",
            fix="copy or fetch it again, for example with --download",
        )


def check_labels(path: Path, labels: NDArray[np.int64], num_classes: int, *, fix: str = "") -> None:
    """Check that all labels are in 0..num_classes - 1.

    Args:
        path: file of the labels, for the message.
        labels: class of each sample [N].
        num_classes: C.
        fix: advice for the message; "" is the command that writes the file again.

    Raises:
        InputError: a label is outside the range.
    """
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if not 0 <= low <= high < num_classes:
        raise InputError(f"{path} has labels {low} to {high}; expected 0 to {num_classes - 1}", fix=fix, path=path)
