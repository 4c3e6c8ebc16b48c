"""Colour maps of confusion matrices and their differences, for figures and the page, in light and dark.

A map of confusions runs from the background at zero to the strongest contrast at one. A map of differences has the
background in its middle, worse (orange) below and better (blue) above. Lightness in OKLab changes with the distance
from zero only and always in one direction, so that larger values look larger, also without colours.
"""

from typing import Literal, get_args

from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.typing import ColorType

Mode = Literal["light", "dark"]
Kind = Literal["confusion", "difference"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MODES: tuple[Mode, ...] = get_args(Mode)

# (distance from zero, colour): lightness grows slightly faster near zero, so that one image differs from none.
_AT = (0.0, 0.03, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
_CONFUSION: dict[Mode, tuple[str, ...]] = {
    "light": ("#ffffff", "#eef5f8", "#c7e3f2", "#77bdef", "#3e92e6", "#3068c9", "#314399", "#28275f", "#16102d"),
    "dark": ("#15171a", "#1a222e", "#1c3347", "#005c74", "#00868b", "#2bab91", "#7dca92", "#c4e2a0", "#fdfac9"),
}
_ARM_AT = (0.0, 0.06, 0.2, 0.5, 1.0)
_WORSE: dict[Mode, tuple[str, ...]] = {
    "light": ("#ffffff", "#faeee4", "#f0ccb2", "#d6895a", "#942500"),
    "dark": ("#15171a", "#2c221e", "#543527", "#a05e2d", "#ffb34f"),
}
_BETTER: dict[Mode, tuple[str, ...]] = {
    "light": ("#ffffff", "#e5f1fa", "#b3d6f0", "#5e9dd8", "#144097"),
    "dark": ("#15171a", "#20242c", "#2e3f54", "#4076a3", "#62d4ff"),
}
_LEVELS = 257  # odd, so that the middle of a difference is one level


def colour_map(kind: Kind, mode: Mode = "light") -> Colormap:
    """Return a matplotlib colour map over [0, 1]; masked values have the background's colour.

    Args:
        kind: "confusion": zero is at 0; "difference": zero is at 0.5, worse below, better above.
        mode: "light": zero is white; "dark": zero is the background of dark pages, #15171a.
    """
    if kind == "confusion":
        anchors = list(zip(_AT, _CONFUSION[mode], strict=True))
    else:
        worse = [(0.5 - at / 2, colour) for at, colour in zip(_ARM_AT, _WORSE[mode], strict=True)]
        better = [(0.5 + at / 2, colour) for at, colour in zip(_ARM_AT, _BETTER[mode], strict=True)]
        anchors = [*reversed(worse), *better[1:]]
    # Not transparent: PDF viewers draw dark seams between transparent and filled cells.
    colours = LinearSegmentedColormap.from_list(f"cpmix {kind} {mode}", anchors, N=_LEVELS)
    return colours.with_extremes(bad=_CONFUSION[mode][0])


def stops(kind: Kind, mode: Mode, number: int = 65) -> list[str]:
    """Return an odd number of equally spaced colours of a map as hex text, for the page."""
    colours = colour_map(kind, mode)
    return [to_hex(colours(k / (number - 1))) for k in range(number)]


def text_colour(fill: ColorType) -> Literal["black", "white"]:
    """Return which of black and white has the larger WCAG contrast with a colour; it is 4.5 : 1 at least."""
    # Black wins above the luminance whose contrasts are equal: (1 + 0.05) / (l + 0.05) = (l + 0.05) / (0 + 0.05).
    return "black" if luminance(fill) + 0.05 > (1.05 * 0.05) ** 0.5 else "white"


def luminance(colour: ColorType) -> float:
    """Return the relative luminance of a colour as WCAG 2 defines it, 0 to 1."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
