"""Each write, fsync, rename, link, new folder and open for writing of each command fails once; see faults.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "faults.py"


def swept(*arguments: object) -> dict[str, list[int]]:
    """Case -> number of calls that failed, of all calls, of refusals, and of refusals that left the old files whole."""
    command = [sys.executable, SCRIPT, *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^(.+): (\d+) of (\d+) calls failed; (\d+) refused, (\d+) with .*", result.stdout, re.MULTILINE)
    return {name: list(map(int, numbers)) for name, *numbers in lines}


@pytest.mark.slow
@pytest.mark.long
def test_a_failing_call_is_refused_and_the_same_command_ends_in_the_same_bytes() -> None:
    found = swept("--every", 10, "build-lt digits")
    assert list(found) == ["build-lt digits", "build-lt digits --overwrite"]
    tried, _, refused, kept = found["build-lt digits --overwrite"]
    assert tried >= 5
    assert refused == kept >= 1


@pytest.mark.slow
@pytest.mark.long
def test_a_failing_call_of_any_command_loses_nothing() -> None:
    found = swept("--every", 64)
    assert len(found) == 23
    assert sum(tried for tried, *_ in found.values()) >= 15
    for name, (_, _, refused, kept) in found.items():
        if name.endswith("--overwrite") and not name.startswith(("train", "finetune")):
            assert kept == refused, name
