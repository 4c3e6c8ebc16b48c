"""The path on a GPU, on a simulated device: all that meets is there, no step leaves it, the numbers are the CPU's."""

import contextlib
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import emulated_graph as emulated
import pandas as pd
import pytest
import torch
from helpers import contents, forget_signals, must, refused, setting
from simulated_cuda import CUDA, simulated_cuda

from cpmix_cli.artifacts.tensors import on_host, tensor_bytes, tensors_digest
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.runtime import ranks
from cpmix_cli.training import cuda_graphs
from cpmix_cli.training.cuda_graphs import STEPS_IN_FLIGHT, CudaGraphRunner, StepsInFlight
from cpmix_cli.training.state import EpochSums
from cpmix_cli.training.step import Step

METHODS = emulated.distinct_setups("cifar100-lt")


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """213 digits of 8 x 8 pixels, 64 to 3 a class."""
    folder = tmp_path_factory.mktemp("data") / "few"
    must("build-lt", "digits", "--rho", 20, "--val-per-class", 60, "--out", folder)
    return open_dataset(folder)


def first_epoch(recipe: str, phase: str, dataset: Dataset, *settings: str, device: str) -> dict[str, float]:
    """The sums of an epoch of three steps, taken eagerly; on the simulated device, no step crosses to the CPU."""
    with simulated_cuda() if device == "cuda" else contextlib.nullcontext() as simulated:
        whole = emulated.setup(recipe, phase, dataset, *emulated.SMALL, *settings, device=device)
        plan, state = whole.begin()
        state.sums = EpochSums([term.name for term in plan.terms], torch.device(device))
        state.model.train(plan.train_mode)
        step = Step(plan, whole.data, state)
        step.begin_epoch(state.epoch)
        crossings = Counter(simulated.crossings) if simulated else Counter()
        for number in range(3):
            step(number)
        if simulated and "otmix" not in recipe:  # it is never recorded, and asks the CPU
            assert not simulated.crossings - crossings
        return state.sums.read()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "phase"), METHODS.values(), ids=list(METHODS))
def test_steps_of_all_methods_stay_on_the_device(recipe: str, phase: str, few_digits: Dataset) -> None:
    on_cpu, on_device = (first_epoch(recipe, phase, few_digits, device=device) for device in ("cpu", "cuda"))
    assert on_device == pytest.approx(on_cpu, rel=1e-3)


AUGMENTED = {
    "autoaugment": ("augment=crop-flip-autoaugment", "fill=128", "cutout=4", "flip=alternating"),
    "jittered crops": ("augment=resized-crop-flip-jitter", "crop=6", "cutout=3", "flip=alternating"),
}


@pytest.mark.parametrize("keys", AUGMENTED.values(), ids=list(AUGMENTED))
def test_augmentation_stays_on_the_device(keys: Sequence[str], few_digits: Dataset) -> None:
    settings = [f"data.{key}" for key in keys]
    on_cpu, on_device = (
        first_epoch("cifar100-lt/cpmix", "stage2", few_digits, *settings, device=device) for device in ("cpu", "cuda")
    )
    assert on_device == pytest.approx(on_cpu, rel=1e-3)


def test_averaged_weights_stay_on_the_device(few_digits: Dataset) -> None:
    settings = "optimizer.ema_epochs=60"
    on_cpu, on_device = (
        first_epoch("cifar100-lt/cpmix", "stage2", few_digits, settings, device=device) for device in ("cpu", "cuda")
    )
    assert on_device == pytest.approx(on_cpu, rel=1e-3)


def test_a_new_head_is_drawn_for_a_network_on_the_device(few_digits: Dataset) -> None:
    """The numbers are the CPU's."""
    heads = []
    for device in ("cpu", "cuda"):
        with simulated_cuda() if device == "cuda" else contextlib.nullcontext():
            whole = emulated.setup("cifar100-lt/crt", "finetune", few_digits, *emulated.SMALL, device=device)
            heads.append({name: t.cpu() for name, t in whole.begin()[1].model.head.state_dict().items()})
    assert all(heads[0][name].equal(heads[1][name]) for name in ("weight", "bias"))


SMALL = setting("model.name=resnet8", "data.normalisation=dataset", "optimizer.batch_size=100")
PIPELINES = {
    "cpmix": ("digits/cpmix", ()),
    "a new head": ("cifar100-lt/crt", SMALL),
    "a scaled head": ("cifar100-lt/mislas", SMALL),
    "weights of experts learnt in evaluation": (
        "cifar100-lt/sade",
        [*SMALL, *setting("evaluation.aggregate=test-time")],
    ),
    "averaged weights": ("digits/cpmix", setting("optimizer.ema_epochs=30")),
    "adam, partners of an epoch": ("digits/cpmix", setting("optimizer.kind=adam", "confusion.refresh=epoch")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "flags"), PIPELINES.values(), ids=list(PIPELINES))
@pytest.mark.long
def test_all_commands_on_the_device_give_the_numbers_of_the_cpu(
    recipe: str, flags: Sequence[str], digits: Path, tmp_path: Path
) -> None:
    losses, tops = [], []
    for device in ("cpu", "cuda"):
        run, at = tmp_path / device, ("--device", device)
        eager = setting("model.precision=fp32", "model.cuda_graphs=false")
        with simulated_cuda() if device == "cuda" else contextlib.nullcontext():
            first = ("train-stage1", "--data", digits, "--out", run, "--recipe", recipe, "--epochs", 4, *flags, *eager)
            must(*first, *at, "--eval-every", 1)
            must("train-stage2", "--from", run, *at)
            must("finetune", "--from", run, *at)
            tops.append(must("evaluate", "--from", run, *at, "--json").json["top1"])
        tables = [pd.read_parquet(path) for path in sorted(run.glob("*/metrics.parquet"))]
        losses.append([loss for table in tables for loss in table["loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert tops[1] == pytest.approx(tops[0], abs=3)


OTHERS = """
    train-stage1 --recipe cifar100-lt/ride --set model.experts=6 --data DIGITS --out teacher
    train-stage1 --recipe cifar100-lt/ride-routed --teacher teacher --data DIGITS --out routed
    finetune --from routed
    evaluate --from routed
    train-stage1 --recipe cifar100-lt/ace --eval-every 1 --data DIGITS --out ace
    evaluate --from ace --test-distribution forward --ratio 5
    train-stage1 --recipe cifar100-lt/tau-norm --data DIGITS --out tau
    evaluate --from tau
    train-stage1 --set confusion.decay=0.9 --set confusion.refresh=epoch --data DIGITS --out decay
    train-stage2 --from decay
    train-stage1 --init decay --set model.init_head=class-means --set stage1.train=["head"] --data DIGITS --out tuned
    train-stage2 --from tuned
    train-stage1 --data TOY --out toy
    train-stage2 --from toy
    finetune --from toy
    evaluate --from toy
"""


@pytest.mark.slow
def test_teachers_routers_experts_and_points_run_on_the_device(
    digits: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with simulated_cuda():
        for line in OTHERS.strip().splitlines():
            words = line.replace("DIGITS", str(digits)).replace("TOY", str(toy)).split()
            if words[0] == "train-stage1":
                words += [] if "TOY" in line else [*SMALL, "--epochs", "3"]
                words += setting("model.cuda_graphs=false")
            must(*words, "--device", "cuda")


def test_a_run_on_the_device_resumes_to_the_same_end_and_records_cudnn(
    digits: Path, tmp_path: Path, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--data", digits, "--epochs", 3, *setting("model.cuda_graphs=false"))
    with simulated_cuda():
        must("train-stage1", *flags, "--out", tmp_path / "whole")
        real = Step.__call__

        def stopping(step: Step, number: int) -> None:
            real(step, number)
            if number == 2:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patched:
            patched.setattr(Step, "__call__", stopping)
            refused(
                75, "SIGTERM received; stage1 is saved at epoch 1, step 3", "train-stage1", *flags, "--out", tmp_path
            )
        forget_signals()
        must("train-stage1", *flags, "--out", tmp_path)
    assert contents(tmp_path / "stage1") == contents(tmp_path / "whole" / "stage1")
    record = json.loads((tmp_path / "stage1" / "run.json").read_text())
    assert record["device"] == "simulated"
    assert record["cudnn"] == {"version": 90_000, "benchmark": False, "deterministic": True}


def test_a_dry_run_on_the_device_records_the_step_of_each_batch_size(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []
    monkeypatch.setattr(CudaGraphRunner, "_record", lambda runner, key: recorded.append(key))
    flags = (
        "--data",
        digits,
        "--out",
        tmp_path / "run",
        "--epochs",
        3,
        "--dry-run",
        *setting("optimizer.batch_size=300"),
    )
    with simulated_cuda():
        result = must("train-stage1", *flags)
        assert [key for key, _ in groupby(recorded)] == [300, 117, 300, 117, 64, 33]
        recorded.clear()
        must("train-stage1", *flags, *setting("model.cuda_graphs=false"))
    assert not recorded
    assert "a step of stage1, stage2, finetune taken" in result.stdout
    must("train-stage1", *flags)
    assert not recorded


# -- checkpoints -------------------------------------------------------------------------------------------------------


def tensors_of(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    found = {f"weight.{i}": maps + i for i in range(20)} | {"count": torch.tensor(7), "none": torch.empty(0, 3)}
    found |= {"sums": torch.rand(5, dtype=torch.float64, generator=generator), "mask": torch.tensor([True, False])}
    return {name: tensor.to(device) for name, tensor in found.items()}


def test_tensors_of_the_device_cross_once_per_type_and_keep_their_bytes() -> None:
    expected, digest = tensor_bytes(tensors_of("cpu"), {"a": 1}), tensors_digest(tensors_of("cpu"))
    with simulated_cuda() as device:
        tensors = tensors_of("cuda")
        device.crossings.clear()
        copied = on_host(tensors)
        assert device.crossings == {"to": 4}  # float32, float64, int64, bool
        assert tensor_bytes(copied, {"a": 1}) == tensor_bytes(tensors, {"a": 1}) == expected
        assert tensors_digest(copied) == tensors_digest(tensors) == digest


def test_tensors_are_copied_one_by_one_where_the_device_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with simulated_cuda() as device:
        tensors = tensors_of("cuda")
        device.crossings.clear()
        monkeypatch.setattr(torch, "empty", full)
        copied = on_host(tensors)
        monkeypatch.undo()
        assert device.crossings == {"to": len(tensors)}
        assert all(copied[name].equal(tensor) for name, tensor in tensors_of("cpu").items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found_by_one_read(value: float, few_digits: Dataset) -> None:
    with simulated_cuda() as device:
        _, state = emulated.setup("digits/cpmix", "stage2", few_digits, device="cuda").begin()
        state.sums = EpochSums(["erm"], CUDA)
        state.model.get_parameter("conv1.weight").data.fill_(3e38)  # finite, and its square is not
        device.crossings.clear()
        assert not state.not_finite()
        assert device.crossings.total() == 1
        state.model.get_parameter("blocks.0.conv2.weight").data[3, 2, 1, 0] = value
        assert state.not_finite() == "model.blocks.0.conv2.weight"


# -- the host ahead of the device --------------------------------------------------------------------------------------


class Late:
    """An event of a device that finishes work only when the host has asked often enough."""

    log: ClassVar[list[str]] = []
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        Late.made += 1
        self.number, self.asked = 0, 0

    def record(self) -> None:
        Late.log.append("record")
        self.asked = 0

    def query(self) -> bool:
        Late.log.append("query")
        self.asked += 1
        return self.asked == 3


def test_the_host_waits_for_the_step_eight_back() -> None:
    Late.log, Late.made = [], 0
    steps = StepsInFlight(torch.device("cuda"), Late)
    for _ in range(STEPS_IN_FLIGHT):
        steps.launched()
    assert Late.log == ["record"] * 8
    for _ in range(5):
        Late.log.clear()
        steps.launched()
        assert Late.log == ["query", "query", "query", "record"]
    assert Late.made == 8
    on_cpu = StepsInFlight(torch.device("cpu"), Late)
    on_cpu.launched()
    assert Late.made == 8


def test_several_ranks_never_wait_for_a_step_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was lost would block the device; the ranks notice it between two steps."""
    monkeypatch.setattr(ranks, "_current", ranks.Ranks(0, 2))
    monkeypatch.setattr(cuda_graphs, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(Late, "query", lambda _: False)
    steps = StepsInFlight(torch.device("cuda"), Late)
    began = time.monotonic()
    for _ in range(STEPS_IN_FLIGHT + 2):
        steps.launched()
    assert 0.1 <= time.monotonic() - began < 5


# -- the simulation itself ---------------------------------------------------------------------------------------------


MEETINGS: dict[str, Callable[[torch.Tensor], object]] = {
    "a sum": lambda t: t + torch.ones(3),
    "an index of the CPU": lambda t: t[torch.zeros(3, dtype=torch.int64)],
    "an index of the device": lambda t: torch.ones(3)[t.long()],
    "a generator of the CPU": lambda t: t.uniform_(generator=torch.Generator()),
    "an array": lambda t: t.numpy(),
    "a choice": lambda t: torch.where(t > 0, t, torch.ones(3)),
    "a loss": lambda t: torch.nn.functional.cross_entropy(t[None], torch.zeros(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_what_cuda_refuses_the_simulated_device_refuses(name: str) -> None:
    with simulated_cuda():
        tensor = torch.zeros(3, device="cuda")
        assert tensor.device == CUDA and (tensor + 1).view(3, 1).device == CUDA and tensor.cpu().device.type == "cpu"
        with pytest.raises((RuntimeError, TypeError)):
            MEETINGS[name](tensor)


def test_what_makes_the_host_wait_is_counted() -> None:
    with simulated_cuda() as device:
        tensor = torch.zeros(3, device="cuda")
        for call in (
            lambda: tensor.tolist(),
            lambda: tensor.to("cpu"),
            lambda: tensor[tensor > 0],
            lambda: float(tensor[0]),
        ):
            before = device.crossings.total()
            call()
            assert device.crossings.total() == before + 1
