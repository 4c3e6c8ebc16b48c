"""Shared by the tests: the command line in this process, and one trained run on each built-in data set."""

import os

# Before torch is imported. Tests compare bytes, so no command may choose its threads by how busy the machine is.
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers", "printed_lines")

import printed_lines
from helpers import forget_signals, must, pipeline

from cpmix_cli.artifacts import files as artifact_files
from cpmix_cli.runtime import signals
from cpmix_cli.runtime.hardware import num_threads

# The commands set it too; the tests compare bytes, so all of them must use the same number.
torch.set_num_threads(num_threads(os.environ))
# As at a terminal, also under nohup, which a command takes as the wish to go on after SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
artifact_files.LATE_SECONDS = 0.2  # no file of a test comes late, but where that is what it tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--follow-lines", action="store_true", help="do what each printed fix: and next: line says")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--follow-lines"):
        # The processes of one session share a folder, named in the variable that the first of them sets.
        folder = os.environ.get("CPMIX_TESTS_FOLLOWED") or tempfile.mkdtemp(prefix="followed-")
        os.environ["CPMIX_TESTS_FOLLOWED"] = folder
        printed_lines.seen = Path(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with tempfile.TemporaryDirectory() as empty:
        printed_lines.root = getattr(item, "funcargs", {}).get("tmp_path", Path(empty))
        try:
            return (yield)
        finally:
            printed_lines.root = None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and item.get_closest_marker("slow"):
        report.sections.append(("marked slow: make test leaves it out", f"pytest {item.nodeid}"))
    return report


@pytest.fixture
def handlers() -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in signals.HANDLED}
    signals.install()
    forget_signals()
    yield
    forget_signals()
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits-lt-rho20"
    must("build-lt", "digits", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "toy-lt-rho20"
    must("build-lt", "toy", "--out", folder)
    return folder


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
    pipeline(toy, run)
    return run


@pytest.fixture
def toy_run(_toy_run: Path, tmp_path: Path) -> Path:
    """A private copy of a finished CP-Mix run on the toy data."""
    return Path(shutil.copytree(_toy_run, tmp_path / "toy"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240)
