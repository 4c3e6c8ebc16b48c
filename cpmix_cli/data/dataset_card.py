"""Dataset cards: class names and row counts from `dataset_info` in the YAML at the head of a README.md."""

import json
import re
from pathlib import Path

from cpmix_cli.artifacts.files import read_bytes
from cpmix_cli.runtime.errors import CpmixError

_MAX_README = 50_000_000


def _front_matter(root: Path) -> list[str]:
    """Return the lines of the YAML at the head of README.md; [] without one."""
    path = root / "README.md"
    if not path.is_file():
        return []
    try:
        text = read_bytes(path, limit=_MAX_README).decode("utf-8-sig")
    except (CpmixError, UnicodeDecodeError):
        return []
    parts = re.split(r"^---[ \t]*\r?$", text, maxsplit=2, flags=re.MULTILINE)
    return parts[1].splitlines() if len(parts) == 3 and not parts[0].strip() else []


def _value(text: str) -> str:
    """Return a scalar of YAML as text: plain, or in one of its two quotes."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text[1:-1]
    return text


def class_names(root: Path) -> dict[str, list[str]]:
    """Return the class names of each column by README.md's `dataset_info`, where all of its configurations agree.

    Only what `datasets` writes is understood: "- name: COLUMN", "class_label:", "names:", then "'0': NAME".
    """
    found: dict[str, list[list[str]]] = {}
    column, depth = "", -1
    names: list[str] | None = None
    for line in _front_matter(root):
        indent = len(line) - len(line.lstrip())
        if names is not None:
            entry = re.fullmatch(r"""\s*['"]?(\d+)['"]?:\s*(.+)""", line)
            if entry and indent > depth and int(entry[1]) == len(names):
                names.append(_value(entry[2]))
                continue
            names = None
        if entry := re.fullmatch(r"\s*-\s*name:\s*(.+)", line):
            column = _value(entry[1])
        elif re.fullmatch(r"\s*names:\s*", line) and column:
            names, depth = [], indent
            found.setdefault(column, []).append(names)
    return {column: lists[0] for column, lists in found.items() if lists[0] and all(one == lists[0] for one in lists)}


def row_counts(root: Path) -> dict[str, int]:
    """Return the rows of each split by the card of a set with one configuration; {} for others."""
    text = "\n".join(_front_matter(root))
    said = re.findall(r"-\s*name:\s*(\S+)\s*\n\s*num_bytes:\s*[\d.]+\s*\n\s*num_examples:\s*(\d+)", text)
    return {_value(name): int(number) for name, number in said} if len(dict(said)) == len(said) else {}
