"""Shared by the tests: the command line in this process, and one trained run on each built-in data set."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import exact_contents
from equality import files as files
from PIL import Image
from typer.testing import CliRunner

from cpmix_cli.artifacts import files as artifact_files
from cpmix_cli.artifacts import records
from cpmix_cli.cli import app
from cpmix_cli.runtime import signals
from cpmix_cli.runtime.hardware import num_threads

# The commands set it too; the tests compare bytes, so all of them must use the same number.
torch.set_num_threads(num_threads(os.environ))


artifact_files.LATE_SECONDS = 0.2  # no file of a test comes late, but where that is what it tests


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


# -- commands ----------------------------------------------------------------------------------------------------------


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


def refused(code: int, messages: str | Sequence[str], *arguments: object) -> Result:
    """Run a command that has to end with this exit code and with each message on stderr."""
    return ended(cpmix(*arguments), code, messages)


def ended(result: Result, code: int, messages: str | Sequence[str] = ()) -> Result:
    """Check the exit code of a command and that stderr has each message and no traceback; returns its result."""
    assert result.code == code, result.stderr
    for message in (messages,) if isinstance(messages, str) else messages:
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    return result


def process(*arguments: object, code: str = "", **options: Any) -> Result:
    """Run cpmix, or some Python code, in a process of its own; the options are those of subprocess.run()."""
    options["env"] = {**os.environ, **options.get("env", {})}
    command = [sys.executable, *(("-c", code) if code else ("-m", "cpmix_cli")), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, **options)
    return Result(found.returncode, found.stdout, found.stderr)


def signalled(number: signal.Signals, at: str, *arguments: object) -> Result:
    """Run cpmix in a process of its own and send it a signal after the first line of stderr that has `at`."""
    command = [sys.executable, "-m", "cpmix_cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        any(at in line for line in running.stderr)
        running.send_signal(number)
        stderr = running.stderr.read()
    return Result(running.returncode, "", stderr)


def setting(*values: object, table: str = "") -> list[str]:
    """Flags --set for changes such as "optimizer.lr=0.1", or "lr=0.1" of the table "optimizer"."""
    prefix = f"{table}." if table else ""
    return [word for value in values for word in ("--set", f"{prefix}{value}")]


def trained(data: Path, run: Path, *flags: object) -> Path:
    """Train stage 1 and evaluate the run; returns the run's folder."""
    must("train-stage1", "--data", data, "--out", run, *flags)
    must("evaluate", "--from", run)
    return run


# -- files -------------------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Check that all files of these folders have the same bytes before and after."""
    before = [exact_contents(folder) for folder in folders]
    yield
    assert [exact_contents(folder) for folder in folders] == before


def flip(path: Path, place: int = -1, bit: int = 1) -> bytes:
    """Flip bits of one byte of a file; returns the bytes that it had before."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= bit
    path.write_bytes(damaged)
    return whole


def edit_record(path: Path, **changes: object) -> None:
    """Change fields of a record and seal it again, as a stranger would who knows how."""
    records.publish_record(path, {**records.read_fields(path), **changes})


def write_image(path: Path, pixels: Any = (0, 0, 0), size: tuple[int, int] = (20, 20)) -> Path:
    """Write an image: of one colour, or an array of pixels [height, width, 3] uint8; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", size, pixels) if isinstance(pixels, str | tuple) else Image.fromarray(pixels)).save(path)
    return path


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


# -- signals -----------------------------------------------------------------------------------------------------------


def forget_signals() -> None:
    """Make this process one that has had no signal and trains nothing."""
    signals._pending, signals._has_state = None, False


@pytest.fixture
def handlers() -> Iterator[None]:
    """cpmix's signal handlers in this process."""
    previous = {number: signal.getsignal(number) for number in signals.HANDLED}
    signals.install()
    forget_signals()
    yield
    forget_signals()
    for number, handler in previous.items():
        signal.signal(number, handler)


# -- data sets and runs ------------------------------------------------------------------------------------------------


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
