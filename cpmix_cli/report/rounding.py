"""One rounding of percentages for figures, tables and the page's script: halves away from zero."""

from decimal import ROUND_HALF_UP, Decimal


def percent(value: float, places: int = 0) -> str:
    """Format a percentage as toFixed() of the page's script does: 12.5 -> 13. f"{12.5:.0f}" would give 12."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))
