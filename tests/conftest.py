"""Shared by the tests: the command line in this process, and one trained run on each built-in data set."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import files as files
from typer.testing import CliRunner

from cpmix_cli.artifacts import files as artifact_files
from cpmix_cli.cli import app
from cpmix_cli.runtime.hardware import num_threads

# The commands set it too; the tests compare bytes, so all of them must use the same number.
torch.set_num_threads(num_threads(os.environ, Path("/sys/fs/cgroup")))


artifact_files.LATE_SECONDS = 0.2  # no file of a test comes late, but where that is what it tests


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a GPU are skipped where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@dataclass
class Result:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as its one JSON object."""
        return json.loads(self.stdout)


def cpmix(*arguments: object) -> Result:
    """Run a command in this process; a traceback fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def must(*arguments: object) -> Result:
    """Run a command that has to succeed."""
    result = cpmix(*arguments)
    assert result.code == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits data set folder."""
    folder = tmp_path_factory.mktemp("data") / "digits-lt-rho20"
    must("build-lt", "digits", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data set folder."""
    folder = tmp_path_factory.mktemp("data") / "toy-lt-rho20"
    must("build-lt", "toy", "--out", folder)
    return folder


def pipeline(data: Path, run: Path, *flags: object) -> None:
    """All phases after build-lt, each evaluated."""
    must("train-stage1", "--data", data, "--out", run, *flags)
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)
    must("evaluate", "--from", run)
    must("confusion-report", "--from", run)


@pytest.fixture(scope="session")
def _digits_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "digits"
    pipeline(digits, run, "--epochs", 6)
    return run


@pytest.fixture
def digits_run(_digits_run: Path, tmp_path: Path) -> Path:
    """A private copy of a finished CP-Mix run on digits (4 + 2 epochs, finetune 1)."""
    return Path(shutil.copytree(_digits_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def _toy_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "toy"
    must("train-stage1", "--data", toy, "--out", run)
    must("train-stage2", "--from", run)
    must("evaluate", "--from", run)
    must("confusion-report", "--from", run)
    return run


@pytest.fixture
def toy_run(_toy_run: Path, tmp_path: Path) -> Path:
    """A private copy of a finished CP-Mix run on the toy data."""
    return Path(shutil.copytree(_toy_run, tmp_path / "toy"))


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh, fixed generator for test data."""
    return torch.Generator().manual_seed(20240)
