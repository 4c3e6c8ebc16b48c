"""Figures as files: PNG, SVG and PDF. Equal figures give equal bytes, in installed fonts that have the letters."""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import counted
from cpmix_cli.runtime.text import on_a_line

Kind = Literal["png", "svg", "pdf"]

matplotlib.rcParams["text.parse_math"] = False  # a $ in a class name starts no formula
matplotlib.rcParams["text.hinting"] = "no_hinting"  # texts are equally wide at any resolution, so one layout fits all

_MAX_LISTED = 10  # letters in a warning
# None: metadata that differ between equal figures
_METADATA: dict[Kind, dict[str, str | None]] = {
    "png": {"Software": "cpmix"},
    "svg": {"Creator": "cpmix", "Date": None},
    "pdf": {"Creator": "cpmix", "CreationDate": None},
}
_MARKS = (b"tEXtSoftware\x00cpmix", b"<dc:title>cpmix</dc:title>", b"/Creator (cpmix)")


def encode(figure: Figure, kind: Kind, *, dpi: float = 150) -> bytes:
    """Encode a Figure as a file. PDFs embed TrueType fonts; SVGs draw text as outlines.

    Args:
        figure: the Figure; its layout is fixed by the first call.
        kind: file format.
        dpi: resolution of a PNG. In PDF and SVG, only of matrices and point clouds.
    """
    buffer = io.BytesIO()
    with boxes_allowed(), matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "cpmix"}):
        if figure.get_layout_engine() is not None:  # only once: a second layout for the next kind would move items
            for _ in range(2):  # the first pass may shrink axes, which changes their ticks and the size of labels
                figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_METADATA[kind])
    return buffer.getvalue()


def is_own(data: bytes) -> bool:
    """Return whether encode() has made a file, by its metadata."""
    return any(mark in data for mark in _MARKS)


@contextmanager
def fonts_for(names: Iterable[str]) -> Iterator[None]:
    """Make and encode figures with installed fonts that have the letters of names; warn of letters that none has."""
    shown = [on_a_line(name) for name in names]
    lacking = set("".join(shown)) - _letters(findfont(FontProperties()))
    families, found = [*matplotlib.rcParams["font.family"]], _fonts_with(lacking) if lacking else {}
    while best := max(found, key=lambda family: len(found[family] & lacking), default=None):
        lacking -= found.pop(best)
        families.append(best)
        found = {family: letters for family, letters in found.items() if letters & lacking}
    if lacking:
        boxed = [name for name in shown if lacking & set(name)]
        listed = " ".join([*sorted(lacking)[:_MAX_LISTED], *(["..."] if len(lacking) > _MAX_LISTED else [])])
        console.warn(
            f"no installed font has the letters {listed} of {counted(len(boxed), 'name')}, such as {boxed[0]}: "
            "the figures have boxes in their places"
        )
    with matplotlib.rc_context({"font.family": families}):
        yield


@contextmanager
def boxes_allowed() -> Iterator[None]:
    """Silence matplotlib's warnings of letters that the font lacks: fonts_for() warns of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _letters(font: str) -> set[str]:
    return set(map(chr, get_font(font).get_charmap()))


def _fonts_with(letters: set[str]) -> dict[str, set[str]]:
    """Return the installed families that have some of the letters, and which, by name."""
    found: dict[str, set[str]] = {}
    others = {get_font(findfont(FontProperties())).family_name, "Last Resort High-Efficiency"}  # which has only boxes
    for font in sorted(fontManager.ttflist, key=lambda font: font.name):
        if font.style == "normal" and font.weight in (400, "normal") and font.name not in others:
            with suppress(OSError, RuntimeError):  # deleted or damaged since matplotlib listed it
                found.setdefault(font.name, letters & _letters(font.fname))
    return {family: has for family, has in found.items() if has}
