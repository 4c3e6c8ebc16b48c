"""Text from outside, such as names of files and classes, made safe for terminals, shells and spreadsheets."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Control codes, line ends, marks that change the direction of the text after them, characters without a width (but not
# the joiners of words and emoji, U+200C and U+200D), and those that no XML file may have.
_UNSAFE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ufffe\\uffff\\U000e0000-\\U000e007f]"
)
_NOT_TYPED = re.compile(f"{_UNSAFE.pattern}|[\\udc80-\\udcff]")
"""Also the bytes of a file name that are not UTF-8."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = str.maketrans(f"{_BLOCKS}━─…", ".:-=+*#@#-~")
"""Drawn characters -> those of ASCII, for a terminal that lacks them."""
_FORMULA = "=+-@\uff1d\uff0b\uff0d\uff20"  # the last four: their full-width forms


def on_a_line(text: str) -> str:
    """Escape control codes, line ends, direction marks and the like: they could forge or overwrite other lines."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def printable(text: str) -> str:
    """Escape a message as on_a_line(), but keep the indented lines of errors.indented()."""
    return "\n    ".join(map(on_a_line, text.split("\n    ")))


def quoted(*words: object) -> str:
    """Return words of a command line, quoted for the shell; $'...' in words that on_a_line() would change.

    A Path that begins like a flag gets a leading ./
    """
    texts = (f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words)
    return " ".join(map(_quoted, texts))


def _quoted(word: str) -> str:
    if not _NOT_TYPED.search(word):
        return shlex.quote(word)
    return "$'" + _NOT_TYPED.sub(_escape, re.sub(r"[\\']", r"\\\g<0>", word)) + "'"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for one byte
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else _unicode_escape(code)


def _unicode_escape(code: int) -> str:
    """Return the escape of a character in TOML and in $'...' of a shell."""
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def toml_text(text: str) -> str:
    """Escape in TOML text, whose strings are basic strings, what on_a_line() escapes. Its own line ends stay."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else _unicode_escape(ord(found[0])), text)


def csv_cell(value: Any) -> Any:
    """Return the value of a CSV cell. A text that a spreadsheet would calculate as a formula gets a leading '."""
    if not isinstance(value, str):
        return value
    text = on_a_line(value)
    if not text.lstrip().startswith(tuple(_FORMULA)):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def width_of(text: str) -> int:
    """Return the columns that text takes on a terminal: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # imported here, because most text is ASCII and --help is to start fast

    return cell_len(text)


def cut(text: str, columns: int, mark: str = "…") -> str:
    """Return text of at most so many columns; a mark stands for an end that is left out."""
    if width_of(text) <= columns:
        return text
    while text and width_of(text) > columns - len(mark):
        text = text[:-1]
    return (text + mark)[: max(0, columns)]


def encodable(text: str, encoding: str) -> str:
    """Return text that can be written: drawn characters become ASCII where the encoding lacks them, others escapes."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return the course of finite numbers as blocks from their lowest to their highest.

    Args:
        values: numbers in their order; None leaves a gap.
        width: characters at most; of more values, the means of neighbours are drawn.
    """
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    known = [[value for value in part if value is not None] for part in parts]
    means = [sum(part) / len(part) if part else None for part in known]
    low = min((mean for mean in means if mean is not None), default=0.0)
    high = max((mean for mean in means if mean is not None), default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else _BLOCKS[round((mean - low) * scale)] for mean in means)
