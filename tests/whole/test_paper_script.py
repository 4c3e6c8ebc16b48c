"""recipes/paper.sh for real on digits: it stops in time, the same line goes on, rows are appended once."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def paper(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script at one epoch in a folder where the check of the machine has passed."""
    (folder / "out" / "log").mkdir(parents=True, exist_ok=True)
    (folder / "out" / "log" / "check-passed").touch()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(ROOT / "recipes" / "paper.sh"), *words],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "EPOCHS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )


def rows(folder: Path) -> list[tuple[str, str]]:
    with (folder / "out" / "results.csv").open() as file:
        return [(row["method"], row["phase"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.long
def test_the_script_stops_in_time_and_the_same_line_goes_on(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    for minutes in (0.4, 0.5, 1, 2, 4):  # a busy machine needs more of them
        stopped = paper(tmp_path, str(minutes), "out", "digits")
        lines = [line.strip().partition("  ")[2] for line in stopped.stdout.splitlines()]
        assert stopped.returncode == 75, stopped.stdout
        assert lines[0] == "rho20-seed0"
        assert lines[-2:] == [
            "rho20-seed0: goes on next time",
            "not all is measured: the same line goes on: out/results.csv",
        ]
        if (tmp_path / "out" / "results.csv").exists():
            assert rows(tmp_path)[: len(seen)] == seen
            seen = rows(tmp_path)
        if len(seen) >= 2:
            break
    assert seen[:2] == [("CP-Mix", "stage2"), ("CP-Mix", "finetune")]
    assert len(set(seen)) == len(seen)


def test_without_its_three_words_the_script_says_its_usage(tmp_path: Path) -> None:
    told = paper(tmp_path, "15")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("usage: bash recipes/paper.sh MINUTES OUT FOLDER")
