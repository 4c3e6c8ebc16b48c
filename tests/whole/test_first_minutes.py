"""The script for the first person with a GPU: without one it says so, and all its parts run on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from first_minutes_on_a_gpu import NO_GPU, PARTS
from helpers import Result, without_gpu

SCRIPT = Path(__file__).parents[1] / "first_minutes_on_a_gpu.py"


def run(*words: str) -> Result:
    found = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    return Result(found.returncode, found.stdout, found.stderr)


@without_gpu
def test_without_a_gpu_it_says_so() -> None:
    result = run()
    assert result.code == NO_GPU == 4
    assert result.stdout.startswith("no GPU here: torch ")
    assert result.stdout.endswith(" finds no CUDA device; --device cpu tests this script without one\n")
    assert not result.stderr


def test_help_names_all_parts() -> None:
    result = run("--help")
    assert result.code == 0
    assert all(f"\n{part} " in result.stdout for part in PARTS)
    assert run("nothing").code == 2


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("part", [part for part in PARTS if part != "tests"])  # the tests are run anyway
def test_each_part_runs_on_the_cpu(part: str) -> None:
    result = run("--device", "cpu", part)
    assert result.code == 0, result.stdout
    assert result.stdout.startswith(f"-- {part}\n")
    assert result.stdout.endswith("all good\n")
