"""Test images of the most confused cells, small, on one sheet for the page."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageOps

_MAX_A_CELL = 8
_LARGEST_SIDE = 48  # pixels; larger images are shrunk
_COLUMNS = 80  # WebP has at most 16,383 pixels a side


@dataclass(frozen=True)
class ContactSheet:
    """N thumbnails in rows, as the page has them."""

    true_class: NDArray[Any]
    """[N], as predicted_class."""
    predicted_class: NDArray[Any]
    confidence: list[int]
    """Per cent [N]."""
    side: int
    """Pixels of a thumbnail, which is square."""
    width: int
    """Of the sheet, in pixels."""
    height: int
    sprite: str
    """data: URL, WebP."""
    columns: int = _COLUMNS
    """Thumbnails in a row."""


def most_confused(predictions: pd.DataFrame, limit: int) -> pd.DataFrame:
    """The wrong test images to show: most confused cells first, in a cell the most confident, a few of each.

    Args:
        predictions: sample_id, label, predicted, confidence of each test image.
        limit: how many at most.
    """
    wrong = predictions[predictions["label"] != predictions["predicted"]]
    cells = wrong.groupby(["label", "predicted"])["confidence"]
    ranked = wrong.assign(images=cells.transform("size"), place=cells.rank(method="first", ascending=False))
    ranked = ranked[ranked["place"] <= _MAX_A_CELL]
    keys = ["images", "label", "predicted", "place"]
    ranked = ranked.sort_values(keys, ascending=[False, True, True, True]).head(limit)
    chosen = ranked.rename(columns={"label": "true_class", "predicted": "predicted_class"})
    return chosen[["true_class", "predicted_class", "confidence", "sample_id"]].reset_index(drop=True)


def sheet(images: Iterable[NDArray[Any]], largest: int, chosen: pd.DataFrame) -> ContactSheet:
    """One picture of images uint8 [H, W, 1 or 3] with their largest side: those of most_confused(), one at least."""
    side = min(_LARGEST_SIDE, largest)
    width, height = side * min(_COLUMNS, len(chosen)), side * -(-len(chosen) // _COLUMNS)
    page = Image.new("RGB", (width, height))
    for number, pixels in enumerate(images):
        thumbnail = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
        if thumbnail.size != (side, side):
            thumbnail = ImageOps.pad(thumbnail, (side, side), Image.Resampling.BOX)
        page.paste(thumbnail, (number % _COLUMNS * side, number // _COLUMNS * side))
    buffer = io.BytesIO()
    page.save(buffer, "WEBP", quality=85)
    return ContactSheet(
        chosen["true_class"].to_numpy(),
        chosen["predicted_class"].to_numpy(),
        [round(100 * value) for value in chosen["confidence"].tolist()],
        side,
        width,
        height,
        f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}",
    )
