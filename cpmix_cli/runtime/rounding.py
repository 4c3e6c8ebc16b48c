"""One rounding of percentages, for the terminal, figures and the page. data.js has the same as rounded()."""

from math import floor

_SLACK = 1e-7
"""100 * 23 / 160 and 23 / 160 * 100 may differ in their last bit: a value so close to a half counts as the half."""


def percent(value: float, places: int = 0) -> str:
    """Format a percentage or a difference of two with so many decimal places, halves away from zero: 12.5 -> 13."""
    scale = 10**places
    whole = floor(abs(value) * scale + 0.5 + _SLACK)
    return f"{'-' if value < 0 and whole else ''}{whole / scale:.{places}f}"


def signed(value: float, places: int = 0) -> str:
    """Format a difference as percent() does, with a plus sign above zero."""
    return f"{'+' if value > 0 else ''}{percent(value, places)}"
