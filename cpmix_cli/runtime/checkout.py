"""Checkout: the commit of the code that runs, if cpmix runs from a git checkout."""

import os
import subprocess
from pathlib import Path


def commit_of_code() -> str | None:
    """Return the tag or commit, with "-dirty" if tracked files have changes; None if the package is no checkout."""
    root = Path(__file__).parents[2]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in hooks
    # Without the ceiling, git would find the checkout of another project that holds the virtual environment.
    variables |= {"GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=2, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, another user's checkout, a slow disk
        return None
    return found.stdout.decode(errors="replace").strip() or None
