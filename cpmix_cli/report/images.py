"""Thumbnails of test images of the most confused cells with their names, on one contact sheet for the page."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cpmix_cli.runtime.text import on_a_line

_MAX_A_CELL = 8
_LARGEST_SIDE = 64  # pixels; larger images are shrunk
_COLUMNS = 80  # WebP has at most 16,383 pixels a side


@dataclass(frozen=True)
class ContactSheet:
    """N thumbnails in rows of one image, and their labels, for the page."""

    true_class: NDArray[Any]
    """True class of each thumbnail [N]."""
    predicted_class: NDArray[Any]
    """[N]."""
    confidence: list[float]
    """Confidence of the prediction in per cent [N]."""
    names: list[str]
    """Path of each image below the folder of the images, or which test image it is [N]."""
    are_files: bool
    """Whether the names are paths."""
    listing: str
    """Flags with which `misclassified --from RUN` lists these images and all others; "" if the page is in no run."""
    side: int
    """Height and width of a thumbnail in pixels."""
    width: int
    """Width of the sheet in pixels."""
    height: int
    sprite: str
    """The sheet as a data: URL of a WebP image."""
    columns: int = _COLUMNS
    """Thumbnails per row."""


def most_confused(predictions: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Choose misclassified test images: most confused cells first, up to 8 most confident images per cell.

    `predictions` has the columns sample_id, label, predicted and confidence; at most `limit` images are returned, with
    true_class, predicted_class, confidence and sample_id.
    """
    wrong = predictions[predictions["label"] != predictions["predicted"]]
    cells = wrong.groupby(["label", "predicted"])["confidence"]
    ranked = wrong.assign(images=cells.transform("size"), place=cells.rank(method="first", ascending=False))
    ranked = ranked[ranked["place"] <= _MAX_A_CELL]
    keys = ["images", "label", "predicted", "place"]
    ranked = ranked.sort_values(keys, ascending=[False, True, True, True]).head(limit)
    chosen = ranked.rename(columns={"label": "true_class", "predicted": "predicted_class"})
    return chosen[["true_class", "predicted_class", "confidence", "sample_id"]].reset_index(drop=True)


def sheet(
    images: Iterable[NDArray[Any]], largest: int, chosen: pd.DataFrame, samples: pd.DataFrame, listing: str
) -> ContactSheet:
    """Make the contact sheet of the images of most_confused(); at least one.

    Args:
        images: uint8 [H, W, 1 or 3] each, in the order of `chosen`.
        largest: largest height or width of the images.
        chosen: result of most_confused().
        samples: rows of `chosen` with path or source_index.
        listing: see ContactSheet.
    """
    are_files = "path" in samples
    side = min(_LARGEST_SIDE, largest)
    width, height = side * min(_COLUMNS, len(chosen)), side * -(-len(chosen) // _COLUMNS)
    page = Image.new("RGB", (width, height))
    for number, pixels in enumerate(images):
        thumbnail = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
        if thumbnail.size != (side, side):
            thumbnail = ImageOps.pad(thumbnail, (side, side), Image.Resampling.BOX)
        page.paste(thumbnail, (number % _COLUMNS * side, number // _COLUMNS * side))
    buffer = io.BytesIO()
    from PIL import _webp  # noqa: F401  # Pillow drops the format, and the reason, if this fails

    page.save(buffer, "WEBP", quality=85)
    return ContactSheet(
        chosen["true_class"].to_numpy(),
        chosen["predicted_class"].to_numpy(),
        [round(100 * value, 4) for value in chosen["confidence"].tolist()],
        [on_a_line(path) for path in samples["path"]]
        if are_files
        else [f"test image {index}" for index in samples["source_index"]],
        are_files,
        listing,
        side,
        width,
        height,
        f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}",
    )
