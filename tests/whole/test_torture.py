"""A short run of `make torture`: SIGKILL at any moment, the same command again, the same bytes in the end."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.long
def test_killed_and_resumed_commands_leave_the_same_bytes() -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "torture.py"), "--kills", "20"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kills, after_first_step = (
        int(re.search(rf"^ *{what}: (\d+)", result.stdout, re.MULTILINE)[1])  # type: ignore[index]
        for what in ("kills", "after a first step")
    )
    assert kills >= 20
    assert after_first_step >= 10
    assert "\ndifferences: 0\n" in result.stdout
    assert "twenty build-lt at once: 1 built: data, 19 up to date: data" in result.stdout
