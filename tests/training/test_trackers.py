"""--tracker wandb and mlflow: curves that equal metrics.parquet, in processes that nothing of a run waits for."""

import fcntl
import json
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Result, contents, cpmix, ended, forget_signals, must, process, refused, signalled
from test_tensorboard import check_curves

from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.recipe.loading import load
from cpmix_cli.runtime import signals
from cpmix_cli.training import loop, trackers

CURVES = {"train/loss": "loss", "train/lr": "learning_rate", "train/loss_erm": "loss_erm", "train/seconds": "seconds"}


def of_metrics(phase: Path) -> dict[str, list[tuple[int, float]]]:
    """Curve -> (epoch, value), as the trackers are to have them."""
    table = pd.read_parquet(phase / "metrics.parquet")
    found = {name: list(zip(table["epoch"], table[column], strict=True)) for name, column in CURVES.items()}
    return {**found, "train/top1": [(e, 100 * v) for e, v in zip(table["epoch"], table["train_accuracy"], strict=True)]}


READ_WANDB = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2
data = open(sys.argv[1], "rb").read()
place, record, records = 7, b"", []  # a log as LevelDB has: blocks of 32 KiB, records in one part or several
while place + 7 <= len(data):
    if (left := 32768 - place % 32768) < 7:
        place += left
        continue
    _, size, part = struct.unpack("<IHB", data[place : place + 7])
    record += data[place + 7 : place + 7 + size]
    place += 7 + size
    if part in (1, 4):
        records.append(wandb_internal_pb2.Record.FromString(record))
        record = b""
found = {"rows": []}
for record in records:
    if record.HasField("run"):
        config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        found |= {"id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
        found["config"] = config
    elif record.HasField("history"):
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        found["rows"].append(row)
    elif record.HasField("exit"):
        found["exit"] = record.exit.exit_code
print(json.dumps(found))
"""


def of_wandb(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, Any] = process(path, code=READ_WANDB).json
    names = {name for row in found["rows"] for name in row if not name.startswith("_") and name != "epoch"}
    found["curves"] = {n: [(row["epoch"], row[n]) for row in found["rows"] if n in row] for n in names}
    return found


def of_mlflow(database: Path) -> dict[str, Any]:
    with sqlite3.connect(database) as connection:
        ((run, name, status, experiment),) = connection.execute(
            "select run_uuid, runs.name, status, experiments.name from runs join experiments using (experiment_id)"
        ).fetchall()
        curves: dict[str, list[tuple[int, float]]] = {}
        for key, step, value in connection.execute("select key, step, value from metrics order by step"):
            curves.setdefault(key, []).append((step, value))
        parameters = dict(connection.execute("select key, value from params").fetchall())
    return {"id": run, "name": name, "status": status, "experiment": experiment, "curves": curves, "config": parameters}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key, login or setting of a user; a database of MLflow in the test's folder."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def wait_for_the_process(path: Path) -> None:
    """Wait until the process of an interrupted run has written its last rows."""
    for _ in range(1200):
        if path.is_file() and path.read_text():
            with path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} is not written")


@pytest.mark.slow
@pytest.mark.long
def test_a_resumed_run_has_each_epoch_once_and_the_bits_of_a_run_without(
    places: Path, handlers: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    must("build-lt", "toy", "--val-per-class", 2, "--out", places / "data")
    command = ("train-stage1", "--data", places / "data", "--epochs", 6, "--out")
    must(*command, places / "plain")
    real = loop.epoch_line

    def stops(plan: Any, row: dict[str, Any]) -> str:
        if row["epoch"] == 2:
            signals._handle(signals.HANDLED[0], None)
        return real(plan, row)

    monkeypatch.setattr(loop, "epoch_line", stops)
    tracked = (*command, places / "seed-0", "--tracker", "tensorboard,mlflow,wandb")
    began = time.monotonic()
    ended(cpmix(*tracked), 75, "SIGTERM received")
    assert time.monotonic() - began < 20  # it waits for no tracker
    phase = places / "seed-0" / "stage1"
    for name in ("wandb", "mlflow"):
        wait_for_the_process(phase / f"tracker-{name}.json")
    forget_signals()
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{places}/mlflow.db")
    monkeypatch.setenv("HOME", str(places))
    result = must(*tracked)
    assert "warning" not in result.stderr

    own = {n: d for n, d in contents(phase).items() if not n.startswith(("wandb/", "tracker-", "events.out"))}
    assert own == contents(places / "plain" / "stage1")
    check_curves(phase)
    recipe = load(str(phase / "recipe.toml")).tables()
    name = f"{places.name}/seed-0"
    found = of_wandb(phase)
    assert found["curves"].items() >= of_metrics(phase).items()
    assert (found["name"], found["group"], found["exit"]) == (f"{name}/stage1", name, 0)
    assert found["config"].items() >= {**recipe, "dataset": "toy-lt-rho20-val2"}.items()
    assert json.loads((phase / "tracker-wandb.json").read_text())["id"] == found["id"]
    found = of_mlflow(places / "mlflow.db")
    assert found["curves"].items() >= of_metrics(phase).items()
    assert (found["name"], found["status"], found["experiment"]) == (f"{name}/stage1", "FINISHED", "cpmix")
    assert found["config"]["optimizer.lr"] == str(recipe["optimizer"]["lr"])
    assert f"--tracker mlflow: run {found['id']} in sqlite:///{places}/mlflow.db\n" in result.stderr

    expected = of_metrics(phase)
    for split in ("val", "test"):
        evaluated = ("evaluate", "--from", phase, "--split", split, "--tracker", "wandb,mlflow")
        numbers = must(*evaluated, "--json").json
        for share in ("top1", "balanced_accuracy", "many", "medium", "few"):
            if numbers[share] is not None:
                expected[f"{split}/{share}"] = [(4, numbers[share])]
    assert "warning" not in must(*evaluated).stderr  # it is up to date, and adds nothing
    for found in (of_wandb(phase), of_mlflow(places / "mlflow.db")):
        assert found["curves"].items() >= expected.items()
        loss = read_tensors(places / "seed-0" / "evaluation" / "stage1-val" / "logits.safetensors")[0]
        mean = torch.nn.functional.cross_entropy(loss["logits"].double(), loss["labels"])
        assert found["curves"]["val/loss"] == [(4, pytest.approx(float(mean)))]


@pytest.mark.slow
def test_a_server_that_is_not_there_costs_a_warning(places: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    for name, value in {"MLFLOW_TRACKING_URI": nowhere, "WANDB_BASE_URL": nowhere, "WANDB_API_KEY": "0" * 40}.items():
        monkeypatch.setenv(name, value)
    result = must("train-stage1", "--data", toy, "--epochs", 2, "--out", places / "run", "--tracker", "wandb,mlflow")
    why = f"{nowhere} cannot be reached: Connection refused"
    assert sorted(line for line in result.stderr.splitlines() if line.startswith("warning: --tracker")) == [
        f"warning: --tracker mlflow: {why}; the run goes on without",
        f"warning: --tracker wandb: {why}; it is written offline, for wandb sync",
    ]
    assert of_wandb(places / "run" / "stage1")["curves"].items() >= of_metrics(places / "run" / "stage1").items()


def test_a_package_that_is_missing_costs_a_warning(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    result = must("train-stage1", "--data", toy, "--out", tmp_path, "--tracker", "wandb,mlflow", "--dry-run")
    assert [line for line in result.stderr.splitlines() if line.startswith("warning")] == [
        f"warning: --tracker {name}: {name} is not installed (pip install 'cpmix[{name}]'); the run goes on without"
        for name in ("wandb", "mlflow")
    ]


def tracked_with(code: str, toy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Train with a package wandb of this code."""
    package = folder / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return must("train-stage1", "--data", toy, "--epochs", 2, "--out", folder / "run", "--tracker", "wandb")


FAILURES = {
    "raise RuntimeError('first\\nsecond')": "RuntimeError: first",
    "import nowhere_to_be_found": "nowhere_to_be_found is not installed (pip install 'cpmix[wandb]')",
    "raise ImportError('no descriptors')": "cannot be imported: no descriptors",
    "import os; os._exit(3)": "its process ended",
    "print('noise', flush=True)": "AttributeError: module 'wandb' has no attribute 'Settings'",
    "import time; time.sleep(600)": "not done 1 s after the end of the phase, and stopped",
}


@pytest.mark.parametrize(("code", "why"), FAILURES.items())
def test_a_failing_package_costs_a_warning(
    code: str, why: str, places: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "SILENT_SECONDS", 1.0 if "sleep" in code else 30.0)
    result = tracked_with(code, toy, places, monkeypatch)
    assert [line for line in result.stderr.splitlines() if "racker" in line] == [
        f"warning: --tracker wandb: {why}; the run goes on without"
    ]
    assert "noise" not in result.stdout + result.stderr


def test_files_of_a_user_are_kept(places: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage1 = places / "run" / "stage1"
    stage1.mkdir(parents=True)
    (stage1 / "tracker-wandb.json").write_text("mine")
    (stage1 / "tracker-mlflow.json").write_text('{"cpmix": "tracker", "run": "1"}\n')
    result = tracked_with("", toy, places, monkeypatch)
    why = f"{stage1}/tracker-wandb.json is a file that cpmix did not write"
    assert f"warning: --tracker wandb: {why}; the run goes on without\n" in result.stderr
    must("train-stage1", "--data", toy, "--epochs", 2, "--out", places / "run", "--overwrite")
    assert [path.name for path in stage1.glob("tracker-*")] == ["tracker-wandb.json"]


@pytest.mark.slow
def test_a_signal_is_answered_while_a_tracker_hangs(places: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = places / "packages" / "mlflow"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    flags = ("--data", toy, "--epochs", 3000, "--out", places / "run", "--tracker", "mlflow")
    began = time.monotonic()
    result = signalled(signal.SIGTERM, "epoch=2/", "train-stage1", *flags)
    ended(result, 75, "SIGTERM received; stage1 is saved at epoch ")
    assert time.monotonic() - began < 120  # the process of the tracker would wait for 600


def test_trackers_are_a_list_of_known_names(toy: Path, tmp_path: Path) -> None:
    flags = ("--data", toy, "--out", tmp_path, "--tracker")
    result = refused(2, (), "train-stage1", *flags, "tensorboard,wanda")
    said = "needed by: train-stage1\n  fix: give --tracker wandb, or one of mlflow, tensorboard\n"
    assert result.stderr == f'error: --tracker "wanda" is unknown\n  {said}'
    refused(2, '--tracker "" is unknown', "train-stage1", *flags, "wandb,")
