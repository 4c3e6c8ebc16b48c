"""One rounding of percentages, for the terminal, figures and the page: halves away from zero.

rounded() and signed() of report/browser/data.js follow the same rule.
"""

from math import copysign, floor, isfinite

_SLACK = 1e-7
"""100 * 23 / 160 and 23 / 160 * 100 may differ in their last bit: a value so close to a half counts as the half."""


def rounded(value: float, places: int = 0) -> float:
    """Round a percentage or a difference of two to so many decimal places: 12.5 -> 13.0, where round() gives 12.0.

    NaN and infinity, as of a network that diverged, are returned as they are.
    """
    if not isfinite(value):
        return value
    scale = 10**places
    return copysign(floor(abs(value) * scale + 0.5 + _SLACK) / scale, value)


def percent(value: float, places: int = 0) -> str:
    """Format a percentage or a difference of two with so many decimal places, as rounded() does; never "-0"."""
    return f"{rounded(value, places) + 0.0:.{places}f}"


def signed(value: float, places: int = 0) -> str:
    """Format a difference as percent() does, with a plus sign above zero, but not above what is rounded to zero."""
    text = percent(value, places)
    return f"+{text}" if float(text) > 0 else text
