"""Errors of users: each says how it is repaired."""

import ast
from pathlib import Path

import cpmix_cli

PACKAGE = Path(cpmix_cli.__file__).parent
ERRORS = {"InputError", "UsageError", "EnvironmentFault", "Diverged"}
OTHERS = {"commands", "bench", "recipe", "flags.py", "cli.py"}


def test_every_error_has_a_fix_or_the_file_that_tells_it() -> None:
    """`fix=`, or `path=`, from which runs/repair.py finds the command."""
    without, total = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                total += 1
                if place.parts[0] not in OTHERS and not {"fix", "path"} & {k.arg for k in node.keywords}:
                    without.append(f"{place}:{node.lineno}")
    assert without == []
    assert total > 150  # the errors are found
