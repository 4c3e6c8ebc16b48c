"""The foot of a terminal: a progress bar and a table, drawn again and again in one place, below all that is printed.

The cursor rests on an empty line above them. A terminal that becomes narrower breaks their lines anew, and takes the
cursor along with that empty line. So erasing from the cursor to the end of the screen always erases all of them.
rich knows what the terminal can do, and lays out the table. Its Live is not used: it counts lines up from a cursor
below them, and leaves parts behind when a terminal breaks lines anew or a library writes to it.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cpmix_cli.runtime.text import cut, encodable, on_a_line, width_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 76
_LEAST_WIDTH = 56
_LEAST_LABEL = 12
"""Characters of the labels for which a column of numbers is left out."""


class Foot:
    """Lines at the foot of the terminal. While they are there, it stands for sys.stderr: text is written above them."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._stream = console.file
        self._content: tuple[tuple[str, int, int], Sequence[str], Sequence[Sequence[str]]] | None = None
        self._stands = False
        self._widest = _LEAST_WIDTH
        sys.stderr = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text above the lines, which stand below it again when its line has ended."""
        erased, self._stands = ("\r\x1b[J" if self._stands else ""), False
        self._put(erased, text, self._drawn() if text.endswith("\n") else "")
        return len(text)

    def draw(self, bar: tuple[str, int, int], counted: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw a bar and as many rows as fit.

        Args:
            bar: label, finished items and all items.
            counted: texts for the right of the bar, the longest first; the first that fits is shown.
            rows: the heading, then the most important rows first: a label, and numbers.
        """
        self._content = bar, counted, rows
        erased = "\r\x1b[J" if self._stands else ""
        self._put(erased, self._drawn())

    def close(self) -> None:
        """Erase the lines, and give sys.stderr back."""
        if sys.stderr is self:
            sys.stderr = self._stream
        if self._stands:
            self._stands = False
            with suppress(OSError, ValueError):  # the terminal was closed
                self._put("\r\x1b[J")

    def _put(self, *texts: str) -> None:
        """Write in one piece: what is erased and drawn again does not flicker."""
        try:
            self._stream.write("".join(texts))
            self._stream.flush()
        except (OSError, ValueError):
            self._stands = False
            self.close()
            raise

    def _drawn(self) -> str:
        """Return what draws bar and rows below the cursor and leaves it where it was; "" before the first draw()."""
        if self._content is None:
            return ""
        self._stands = True
        bar, counted, rows = self._content
        columns, height = os.get_terminal_size(self._stream.fileno())  # 0 of a terminal that does not know
        width, height = min(columns or 80, WIDTH), height or 24
        shown = list(rows[: max(0, height - 4)])  # the other lines: one of the log, the cursor, the bar, and one more
        while shown and not any(shown[-1][1:]):  # a heading without rows
            shown.pop()
        table, width = self._table(shown, width)
        lines = [self._bar(bar, counted, width), *table]
        above = "\n" if height > 3 else ""
        up = len(lines) - (not above)
        # A terminal that gets narrower meanwhile does not break the lines: they would be more than `up`.
        return f"\x1b[?7l{above}" + "\n".join(lines) + (f"\x1b[{up}A" if up else "") + "\r\x1b[?7h"

    def _bar(self, bar: tuple[str, int, int], counted: Sequence[str], width: int) -> str:
        label, done, total = bar
        label = self._text(label)
        right = next((text for text in counted if width_of(label) + len(text) + 8 <= width), counted[-1])
        room = width - width_of(label) - len(right) - 2
        if room < 1:
            return right[:width]
        full = room * done // max(1, total)
        from rich.text import Text

        parts = (f"{label} ", (self._text("━" * full), "green"), self._text("─" * (room - full)), f" {right}")
        return self._rendered(Text.assemble(*parts), width)[0]

    def _table(self, rows: Sequence[Sequence[str]], width: int) -> tuple[list[str], int]:
        """Return the lines of the rows, and their width: what the widest needed so far, so that nothing jumps.

        A narrower view is broken anew by fewer changes of the terminal's size. Where labels would have little room, the
        first numbers are left out.
        """
        if not rows:
            return [], width
        cells = [[self._text(on_a_line(cell)) for cell in row] for row in rows]
        widths = [max(map(width_of, column)) for column in zip(*(row[1:] for row in cells), strict=True)]
        while len(widths) > 1 and width - sum(widths) - 2 * len(widths) < _LEAST_LABEL:
            widths = widths[1:]
        beside = sum(widths) + 2 * len(widths)
        self._widest = max(self._widest, beside + max(width_of(row[0]) for row in cells))
        width = min(width, self._widest)
        room = max(0, width - beside)
        from rich.table import Column, Table
        from rich.text import Text

        numbers = (Column(width=size, justify="right", no_wrap=True) for size in widths)
        table = Table.grid(Column(width=room, no_wrap=True), *numbers, padding=(0, 2, 0, 0))
        for label, *values in cells:
            shown = [_fitted(label, room, self._text("…")), *values[len(values) - len(widths) :]]
            table.add_row(*map(Text, shown), style="" if table.rows else "bold")
        return self._rendered(table, width), width

    def _text(self, text: str) -> str:
        return encodable(text, self._console.encoding)

    def _rendered(self, content: "RenderableType", width: int) -> list[str]:
        """Return the lines of a text or table in so many columns, with the terminal's codes of colour."""
        self._console.width = width  # else rich takes COLUMNS, which may be of another terminal
        with self._console.capture() as drawn:
            self._console.print(content, width=width, no_wrap=True, overflow="crop")
        return drawn.get().splitlines()


def _fitted(label: str, columns: int, mark: str) -> str:
    """Cut a label to so many columns. Of "A as B" both names are cut, so that each can be told."""
    if width_of(label) <= columns:
        return label
    first, joint, second = label.partition(" as ")
    room = columns - len(joint)
    if not joint or room < 2:
        return cut(label, columns, mark)
    whole = max(room - width_of(second), room // 2)
    first = cut(first, min(whole, width_of(first)), mark)
    return first + joint + cut(second, room - width_of(first), mark)


def foot() -> Foot | None:
    """Return the foot of stderr's terminal; None if stderr is no terminal that can move its cursor."""
    if sys.stderr is None or not sys.stderr.isatty() or not os.environ.get("TERM"):  # rich is not imported for a log
        return None
    from rich.console import Console

    console = Console(file=sys.stderr, highlight=False, emoji=False)
    return Foot(console) if console.is_interactive else None
