"""Where images come from: add a data set here.

A source is a function of a folder that returns a Source; its name in SOURCES is what `build-lt` takes. Nothing here
reads a network.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmix_cli.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True)
class Source:
    """A balanced (or natural) labelled set, before any class is made rare."""

    class_names: list[str]
    labels: NDArray[np.int64]
    """Class of each image of the training pool [N], in the source's order."""
    load: Callable[[NDArray[np.int64]], Array]
    """Positions in the pool -> uint8 images [n, H, W, channels], or float32 points [n, 2]."""
    recipe: str
    """Recipe for this source where none is named."""
    default_rho: float | None = None
    """Imbalance factor where none is given; None keeps the source as it is."""
    profile: str = "exponential"
    test_labels: NDArray[np.int64] | None = None
    """Class of each test image; None holds `test_per_class` images of each class out of the pool."""
    load_test: Callable[[NDArray[np.int64]], Array] | None = None
    test_per_class: int = 0
    files: tuple[Path, ...] = ()
    """Source files, whose hashes the data set records."""


def digits(data_root: Path | None) -> Source:
    """1,797 handwritten digits of 8 x 8 grey pixels, bundled with scikit-learn (UCI, test part: 13 writers).

    The bundle has no test split, so 50 images a class are held out; the same writers stand on both sides.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # The file counts 0..16 set pixels a block; 255 / 16 stretches that to a byte.
    images = (bundle.images * (255 / 16)).round().astype(np.uint8)[..., None]
    return Source(
        class_names=[str(name) for name in bundle.target_names],
        labels=bundle.target.astype(np.int64),
        load=lambda positions: images[positions],
        recipe="digits/cpmix",
        default_rho=20,
        test_per_class=50,
    )


TOY_NAMES = ["red", "purple", "grey", "yellow"]
TOY_CENTRES = np.array([[0, 1], [1, 0], [-1, 0], [0, -1]], dtype=np.float64)
TOY_DEVIATION = 0.4
TOY_POINTS = 1000


def toy(data_root: Path | None) -> Source:
    """Four Gaussians in the plane: majorities red (0, 1) and purple (1, 0), minorities grey (-1, 0) and yellow (0, -1).

    1,000 training points of each are drawn and the profile keeps 1,000 / rho of the minorities; 1,000 test points a
    class. The points themselves are the same at every rho and subset seed.

    Paper: Sec. 3.1, B.1, Fig. 2(a): grey lies beside red, yellow beside purple.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    noise = generator.normal(0.0, TOY_DEVIATION, size=(2, 4, TOY_POINTS, 2))
    points = (TOY_CENTRES[None, :, None, :] + noise).astype(np.float32).reshape(2, -1, 2)
    labels = np.repeat(np.arange(4), TOY_POINTS)
    return Source(
        class_names=TOY_NAMES,
        labels=labels,
        load=lambda positions: points[0, positions],
        recipe="toy/cpmix",
        default_rho=20,
        profile="step",
        test_labels=labels,
        load_test=lambda positions: points[1, positions],
    )


def cifar100(data_root: Path | None) -> Source:
    """CIFAR-100 in the Hugging Face Parquet layout: train-*.parquet and test-*.parquet, columns img{bytes, path} and
    fine_label (or label). 50,000 and 10,000 images of 32 x 32 RGB.

    Raises:
        InputError: files missing, truncated, or not of this layout.
    """
    if data_root is None:
        raise InputError(
            "cifar100 needs the folder that holds train-*.parquet and test-*.parquet",
            needed_by="cpmix build-lt cifar100",
            fix="cpmix build-lt cifar100 --data-root FOLDER   (or set CPMIX_DATA_DIR)",
        )
    train_files, train = _parquet_split(data_root, "train")
    test_files, test = _parquet_split(data_root, "test")
    names = _class_names(train_files[0], num_classes=int(train["labels"].max()) + 1)
    for split, path in ((train, train_files[0]), (test, test_files[0])):
        if split["labels"].min() < 0 or split["labels"].max() >= len(names):
            raise InputError(
                f"{path} has labels {split['labels'].min()} to {split['labels'].max()}; expected 0 to {len(names) - 1}"
            )
    return Source(
        class_names=names,
        labels=train["labels"],
        load=lambda positions: _decode(train["images"], positions, train_files[0]),
        recipe="cifar100-lt/cpmix",
        test_labels=test["labels"],
        load_test=lambda positions: _decode(test["images"], positions, test_files[0]),
        files=(*train_files, *test_files),
    )


def _parquet_split(folder: Path, split: str) -> tuple[list[Path], dict[str, Any]]:
    """Files of a split, and its labels [N] int64 and encoded images, in published order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise InputError(
            f"no {split}-*.parquet in {folder}",
            needed_by="cpmix build-lt cifar100",
            fix="give the folder of the Parquet files with --data-root FOLDER",
        )
    try:
        tables = []
        for path in files:
            columns = pq.read_schema(path).names
            label = next((name for name in ("fine_label", "label") if name in columns), None)
            if label is None or "img" not in columns:
                raise InputError(f"{path} has columns {', '.join(columns)}; expected img and fine_label (or label)")
            tables.append(pq.read_table(path, columns=["img", label]).rename_columns(["img", "label"]))
    except (pa.ArrowException, OSError) as fault:
        raise InputError(
            f"{path} is not a readable Parquet file: {fault}", fix="fetch or copy the file again"
        ) from fault
    table = pa.concat_tables(tables)
    if table["label"].null_count:
        raise InputError(f"{files[0]}: {table['label'].null_count} labels are missing")
    images = pa.chunked_array([chunk.field("bytes") for chunk in table["img"].chunks])
    return files, {"labels": table["label"].to_numpy().astype(np.int64), "images": images}


def _class_names(path: Path, num_classes: int) -> list[str]:
    """Class names from the file's Hugging Face metadata; class_0, class_1, ... where it has none."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for column in ("fine_label", "label"):
        names = features.get(column, {}).get("names")
        if names:
            return list(names)
    return [f"class_{c}" for c in range(num_classes)]


def _decode(encoded: Any, positions: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
    """Encoded images (PNG, WebP, JPEG) at `positions` -> uint8 [n, H, W, 3]."""
    from PIL import Image

    images = []
    for position in positions:
        try:
            with Image.open(io.BytesIO(encoded[int(position)].as_py())) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, TypeError, ValueError) as fault:
            raise InputError(f"image {position} of {path} cannot be decoded: {fault}") from fault
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"{path} holds images of several sizes: {sorted(shapes)}")
    return np.stack(images)


SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits,
    "toy": toy,
    "cifar100": cifar100,
}
