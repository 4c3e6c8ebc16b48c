"""Errors of users: each says how it is repaired."""

import ast
from pathlib import Path

import cpmix_cli

PACKAGE = Path(cpmix_cli.__file__).parent
ERRORS = {"InputError", "UsageError", "EnvironmentFault", "Diverged"}


def test_every_error_has_a_fix_or_the_file_that_tells_it() -> None:
    """`fix=`, or `path=`, from which runs/repair.py finds the command."""
    without, total = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                total += 1
                if not {"fix", "path"} & {keyword.arg for keyword in node.keywords}:
                    without.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert without == []
    assert total > 150  # the errors are found
