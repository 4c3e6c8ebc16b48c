"""Imports go down the list of rooms, never up, and no command imports another: a room knows only the rooms below it."""

import ast
import re
from pathlib import Path

import pytest
from helpers import must

from cpmix_cli import cli

PACKAGE = Path(cli.__file__).parent
RESEARCH = ("losses", "mixing", "confusion", "models", "backbones", "experts")
"""The researcher's files, which are one room though they lie at the top."""
ROOMS = (
    *("completion", "cli", "commands", "bench", "results", "report", "evaluation", "training", "runs"),
    *("research", "data", "recipe", "artifacts", "flags", "runtime"),
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py", "__init__.py"))


def room(parts: tuple[str, ...]) -> str:
    """Of a module, by its path below the package."""
    return "research" if parts[0] in RESEARCH else parts[0]


def imported(path: Path) -> list[tuple[str, ...]]:
    """The modules of the package that a file imports anywhere, also while types are checked."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package == PACKAGE.name and parts and not parts[0].startswith("__"):
                found.append(tuple(parts))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    own = room(path.relative_to(PACKAGE).with_suffix("").parts)
    for parts in imported(path):
        assert ROOMS.index(room(parts)) >= ROOMS.index(own), f"{path} imports {'.'.join(parts)}, a room above"
        if own == "commands":
            assert parts[0] != "commands", f"{path} imports another command, {'.'.join(parts)}"


def test_every_file_lies_in_a_room() -> None:
    assert {room(path.relative_to(PACKAGE).with_suffix("").parts) for path in FILES} == set(ROOMS)


def test_help_lists_every_command_file() -> None:
    listed = [line.split()[0] for line in must("--help").stdout.splitlines() if line.startswith("  ")]
    names = {path.stem.replace("_", "-") for path in FILES if path.parent.name == "commands"}
    assert names <= set(listed)
    assert names == {name for name in listed if (PACKAGE / "commands" / f"{name.replace('-', '_')}.py").exists()}
    assert names == set(cli.typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_the_package_s_readme_lists_every_file() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[`[\w.]+`\]\(([\w/.]+)\): ", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(PACKAGE).as_posix() for path in FILES)
    for name in re.findall(r"`([a-z]+/\w+\.py)`", text):
        assert (PACKAGE / name).is_file() or (PACKAGE.parent / name).is_file(), name
