"""Layout of results as plain lines: tables with padded columns, and sentences, in the columns that a terminal has."""

import re
from collections.abc import Iterator, Sequence

from cpmix_cli.runtime.text import cut, on_a_line, width_of

_GAP = 2
_LEAST_TEXT = 10
"""Columns that a column of text keeps when it is made narrower, unless a word or a part needs more."""


def table_lines(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", width: int | None = None
) -> list[str]:
    """Return a table as plain lines, with columns padded by spaces, which logs and pipes also show well.

    In a given width, headings and texts are broken at words, and columns that still have no room follow in a second
    table below, beside the first column. Numbers are never broken, and words only where they are longer than a column.

    Args:
        header: column names; a column whose name starts with ">" is right-aligned.
        rows: cells, row by row.
        title: line above the table, after an empty line if it starts with a line end; "" for none.
        width: columns of the terminal; None for no limit.
    """
    named = [name.removeprefix(">") for name in header]
    are_numbers = [name.startswith(">") for name in header]
    cells = [[on_a_line(cell) for cell in row] for row in rows]
    columns = list(zip(named, *cells, strict=True))
    lines = [*([""] if title.startswith("\n") else []), *prose([title.removeprefix("\n")], width)] if title else []
    for number, (chosen, sizes) in enumerate(_blocks(columns, are_numbers, width)):
        lines += [""] if number else []
        parts = list(zip(chosen, sizes, strict=True))
        heads = [broken(named[c], size) for c, size in parts]
        tallest = max(map(len, heads))
        top = [[*[""] * (tallest - len(head)), *head] for head in heads]
        for found in (
            top,
            [["-" * size] for size in sizes],
            *([broken(row[c], s, words=True) for c, s in parts] for row in cells),
        ):
            for level in range(max(map(len, found))):
                texts = [part[level] if level < len(part) else "" for part in found]
                padded = (_padded(text, s, is_number=are_numbers[c]) for text, (c, s) in zip(texts, parts, strict=True))
                lines.append((" " * _GAP).join(padded).rstrip())
    return lines


def prose(lines: Sequence[str], width: int | None) -> list[str]:
    """Return sentences as lines, broken at words in a given width. Commands and paths to copy are not for it."""
    return [part for line in lines for part in broken(on_a_line(line), width or 1_000_000)]


def broken(text: str, width: int, *, words: bool = False) -> list[str]:
    """Break a text at spaces into lines of at most so many columns, each with its indent; `words`: longer words too."""
    if width_of(text) <= width:
        return [text]
    indent = text[: len(text) - len(text.lstrip())]
    lines = [indent]
    for word in _pieces(text, width - len(indent)) if words else text.split():
        longer = lines[-1] + (" " if lines[-1].strip() else "") + word
        if width_of(longer) > width and lines[-1].strip():
            longer = indent + word
            lines.append("")
        lines[-1] = longer
    return lines


def _pieces(text: str, width: int) -> Iterator[str]:
    """Yield the words of a text; of one longer than the width its parts, which end at a mark if there is one."""
    for word in text.split():
        while width_of(word) > max(1, width):
            head = cut(word, max(1, width), "")
            head = (re.match(r".*[/=_-]", head) or [head])[0]
            yield head
            word = word[len(head) :]
        yield word


def _padded(text: str, size: int, *, is_number: bool) -> str:
    space = " " * (size - width_of(text))
    return space + text if is_number else text + space


def _blocks(
    columns: Sequence[Sequence[str]], are_numbers: Sequence[bool], width: int | None
) -> list[tuple[list[int], list[int]]]:
    """Return the tables that columns are shown in, one below the other: the columns of each, and their sizes."""
    every = list(range(len(columns)))
    natural = [max(map(width_of, column)) for column in columns]
    if width is None or _total(natural) <= width:
        return [(every, natural)]
    contents = [max(map(width_of, cells), default=0) for _, *cells in columns]
    for height in range(2, 5):  # lines of the heading
        sizes = [max(size, _heading(column[0], height)) for size, column in zip(contents, columns, strict=True)]
        if _total(sizes) <= width:
            return [(every, sizes)]
    least = [
        size if is_number else max(min(size, _LEAST_TEXT), *(_longest_word(text) for text in column))
        for size, is_number, column in zip(sizes, are_numbers, columns, strict=True)
    ]
    blocks = [[0]]
    for c in every[1:]:
        if len(blocks[-1]) > 1 and _total([least[i] for i in (*blocks[-1], c)]) > width:
            blocks.append([0])
        blocks[-1].append(c)
    found = []
    for block in blocks:
        narrow = _shrunk([sizes[i] for i in block], [least[i] for i in block], width)
        texts = [size if are_numbers[i] else min(size, _LEAST_TEXT) for i, size in zip(block, narrow, strict=True)]
        found.append((block, _shrunk(narrow, texts, width)))
    return found


def _shrunk(sizes: list[int], least: list[int], width: int) -> list[int]:
    """Make the widest columns narrower until they fit, or are as narrow as they can be."""
    while _total(sizes) > width and (free := [i for i, size in enumerate(sizes) if size > least[i]]):
        sizes[max(free, key=lambda i: sizes[i])] -= 1
    return sizes


def _total(sizes: Sequence[int]) -> int:
    return sum(sizes) + _GAP * (len(sizes) - 1)


def _heading(name: str, height: int) -> int:
    """Return the smallest size in which a heading has at most so many lines."""
    return next(size for size in range(_longest_word(name), width_of(name) + 1) if len(broken(name, size)) <= height)


def _longest_word(text: str) -> int:
    indent = len(text) - len(text.lstrip())
    return indent + max(map(width_of, text.split()), default=0)
