"""Results keep their bits: short runs of many methods against hashes that were recorded once.

The hashes hold for one kind of processor and one version of torch. On another the test records its own in bits.json,
is skipped, and says so: a later run on that machine compares with them.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import CLOCK, must

RECORDED = Path(__file__).with_name("bits.json")
SHARED = Path(__file__).parents[3] / "shared"
RUN = SHARED / "runs" / "cpmix-cifar100-lt-rho200-seed0"
SMALL = ("model.name=resnet8", "data.normalisation=dataset", "optimizer.batch_size=100")
METHODS = dict.fromkeys(["cmo-ldam-drw", "crt", "lade", "mislas", "remix-drw", "sade", "unimix"], SMALL) | {
    "cpmix": (*SMALL, "optimizer.micro_batches=2", "confusion.decay=0.9"),
    "cpmix-ride": (*SMALL, "confusion.refresh=epoch"),
    "otmix": (*SMALL, "stage1.terms.erm.match_power=0.2"),
}
"""Recipe of cifar100-lt, and what --set makes of it on the digits."""

pytestmark = pytest.mark.slow


def machine() -> str:
    """What the bits of a result depend on, the inputs aside."""
    bf16 = ", bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""
    return f"{torch.__version__.partition('+')[0]} {torch.backends.cpu.get_cpu_capability()}{bf16}"


def hashes(run: Path) -> dict[str, str]:
    """The first digits of the sha256 of each phase's weights, confusions and metrics (less the clock's)."""
    found = {}
    for phase in ("stage1", "stage2", "finetune"):
        for name in ("model.safetensors", "confusion_pairs.parquet"):
            if (path := run / phase / name).is_file():
                found[f"{phase}/{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if (path := run / phase / "metrics.parquet").is_file():
            table = pd.read_parquet(path).drop(columns=CLOCK).to_csv()
            found[f"{phase}/metrics.parquet"] = hashlib.sha256(table.encode()).hexdigest()[:16]
    return found


def compare(name: str, found: dict[str, str]) -> None:
    """Compare with what was recorded for this machine; record it where nothing was."""
    recorded = json.loads(RECORDED.read_text())
    own = recorded.setdefault(machine(), {})
    if name in own:
        assert found == own[name]
        return
    own[name] = found
    RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    pytest.skip(f"no bits of {name} were known for {machine()}: recorded in {RECORDED} for the next time")


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> object:
    """Commands run with one thread, which their bits depend on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def flags(method: str, settings: tuple[str, ...]) -> list[object]:
    """The flags that train a method of cifar100-lt for 5 epochs."""
    return ["--recipe", f"cifar100-lt/{method}", "--epochs", 5, *(f for s in settings for f in ("--set", s))]


def train(data: Path, run: Path, *flags: object, teacher: Path | None = None) -> None:
    """All three training phases; those that the recipe lacks do nothing."""
    must("train-stage1", "--data", data, "--out", run, *flags, *(["--teacher", teacher] if teacher else []))
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)


def test_toy_run_gives_the_recorded_bytes(toy: Path, tmp_path: Path, one_thread: object) -> None:
    train(toy, tmp_path)
    compare("toy/cpmix", hashes(tmp_path))


def test_digits_run_gives_the_recorded_bytes(digits: Path, tmp_path: Path, one_thread: object) -> None:
    train(digits, tmp_path)
    compare("digits/cpmix", hashes(tmp_path))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_the_recorded_bytes(digits: Path, tmp_path: Path, one_thread: object, method: str) -> None:
    train(digits, tmp_path, *flags(method, METHODS[method]))
    compare(method, hashes(tmp_path))


def test_routers_and_a_teacher_give_the_recorded_bytes(digits: Path, tmp_path: Path, one_thread: object) -> None:
    must("train-stage1", "--data", digits, "--out", tmp_path / "teacher", *flags("ride", SMALL))
    train(digits, tmp_path / "run", *flags("ride-routed", SMALL), teacher=tmp_path / "teacher")
    compare("ride-routed", hashes(tmp_path / "run"))


@pytest.fixture
def first_release(tmp_path: Path) -> tuple[Path, Path]:
    """Data set and run folder of a run at full length by the first release."""
    if not RUN.is_dir():
        pytest.skip("needs ../shared/runs, a run at full length by the first release")
    if len(os.sched_getaffinity(0)) < 2 or not machine().startswith("2.14.1 AVX512, bf16"):
        pytest.skip("its bits are those of torch 2.14.1 on 2 cores with AVX512-BF16")
    data, run = tmp_path / "data", tmp_path / "run"
    must("build-lt", "cifar100", "--rho", 200, "--data-root", SHARED / "data" / "cifar100", "--out", data)
    shutil.copytree(RUN, run)
    for path in (run, *run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return data, run


@pytest.mark.cifar
@pytest.mark.long
def test_a_run_of_the_first_release_evaluates_to_its_numbers(first_release: tuple[Path, Path]) -> None:
    data, run = first_release
    keys = ("top1", "many", "medium", "few", "ece", "checkpoint_sha256")
    for phase in ("stage2", "finetune"):
        known = json.loads((RUN / "evaluation" / phase / "metrics.json").read_text())
        shutil.rmtree(run / "evaluation" / phase)
        found = must("evaluate", "--from", run, "--phase", phase, "--data", data, "--json").json
        assert {key: found[key] for key in keys} == {key: known[key] for key in keys}
    must("confusion-report", "--from", run, "--data", data)


@pytest.mark.cifar
@pytest.mark.long
def test_a_run_of_the_first_release_finetunes_to_the_same_bits(
    first_release: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = first_release
    again = tmp_path / "again"
    must("finetune", "--from", run, "--out", again, "--phase", "stage2", "--data", data, "--threads", 2)
    assert hashes(again)["finetune/model.safetensors"] == hashes(RUN)["finetune/model.safetensors"]
