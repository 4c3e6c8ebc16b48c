"""Averaged weights: the average of the steps, its batch norm, and what is published, saved and finetuned of it."""

import signal
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import emulated_graph as emulated
import pandas as pd
import pytest
import torch
from helpers import contents, cpmix, forget_signals, must, setting
from torch import Tensor
from torch.optim.swa_utils import update_bn

from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Optimizer
from cpmix_cli.training import loop
from cpmix_cli.training.averaging import measure_statistics, update_average
from cpmix_cli.training.randomness import torch_generator
from cpmix_cli.training.state import EpochSums
from cpmix_cli.training.step import Step

AVERAGED = "optimizer.ema_epochs=60"
"""At the 9 of 300 epochs that emulated.setup() trains, a horizon of 1.8 epochs."""
EMA = setting(AVERAGED)


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """213 digits of 8 x 8 pixels, 64 to 3 a class."""
    folder = tmp_path_factory.mktemp("data") / "few"
    must("build-lt", "digits", "--rho", 20, "--val-per-class", 60, "--out", folder)
    return open_dataset(folder)


def setup(dataset: Dataset, *settings: str, phase: str = "stage2") -> emulated.Setup:
    return emulated.setup("cifar100-lt/cpmix", phase, dataset, *emulated.SMALL, *settings)


def weights(network: torch.nn.Module | None) -> list[Tensor]:
    assert network is not None
    return [parameter.detach().clone() for parameter in network.parameters()]


# -- the average -------------------------------------------------------------------------------------------------------


def test_the_share_of_a_step_is_that_of_a_mean_until_the_horizon(few_digits: Dataset) -> None:
    plan = replace(setup(few_digits).begin()[0], ema_epochs=2)
    shares = [plan.average_share(epoch, step, 3) for epoch in (1, 2, 3) for step in range(3)]
    assert shares == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 6, 1 / 6, 1 / 6]
    assert replace(plan, ema_epochs=1e-6).average_share(9, 2, 3) == 1


def test_the_average_of_three_steps_equals_that_by_hand(few_digits: Dataset) -> None:
    whole = setup(few_digits, AVERAGED, phase="stage1")
    plan, state = whole.begin()
    state.epoch = 1
    state.sums = EpochSums([term.name for term in plan.terms])
    step = Step(plan, whole.data, state)
    step.begin_epoch(1)
    found = []
    for number in range(3):
        step(number)
        found.append(weights(state.model))
    for average, (a, b, c) in zip(weights(state.average), zip(*found, strict=True), strict=True):
        expected = (a.double() + b.double() + c.double()) / 3
        assert average.double().sub(expected).abs().max() < 1e-6
    assert not weights(state.average)[0].equal(found[-1][0])


def test_a_horizon_of_no_step_gives_the_last_weights(few_digits: Dataset) -> None:
    state = emulated.train(setup(few_digits, "optimizer.ema_epochs=1e-6"), emulate=False).state
    assert all(a.equal(b) for a, b in zip(weights(state.average), weights(state.model), strict=True))


@pytest.mark.parametrize("share", [1e-4, 0.3, 0.7, 1.0])
def test_constant_weights_are_their_own_average(few_digits: Dataset, share: float) -> None:
    network = setup(few_digits).begin()[1].model
    average = deepcopy(network)
    update_average(average, network, torch.tensor(share))
    assert all(a.equal(b) for a, b in zip(weights(average), weights(network), strict=True))


def test_averaging_changes_nothing_of_the_training(few_digits: Dataset) -> None:
    plain, averaged = (emulated.train(setup(few_digits, *keys), emulate=False).tensors for keys in ((), (AVERAGED,)))
    assert all(tensor.equal(averaged[name]) for name, tensor in plain.items())
    assert averaged.keys() - plain.keys() == {n.replace("model.", "average.") for n in plain if n.startswith("model.")}


def test_an_average_that_is_not_finite_is_named(few_digits: Dataset) -> None:
    state = setup(few_digits, AVERAGED).begin()[1]
    assert state.average is not None
    assert state.not_finite() == ""
    state.average.head.bias.data[0] = torch.inf  # type: ignore[union-attr, operator, index]
    assert state.not_finite() == "average.head.bias"


# -- its batch norm ----------------------------------------------------------------------------------------------------


def test_measured_statistics_equal_those_of_a_plain_pass(few_digits: Dataset) -> None:
    """In batches of one size: torch's update_bn() weighs a smaller last batch like the others."""
    whole = setup(few_digits, AVERAGED, "optimizer.batch_size=71")
    plan, state = whole.begin()
    assert state.average is not None
    expected = deepcopy(state.average)
    generator = torch_generator(plan.seed, plan.phase, state.epoch, "average")
    order = torch.randperm(213, generator=generator)
    uniforms = torch.rand(213, whole.data.batches.num_uniforms, dtype=torch.float64, generator=generator)
    images = whole.data.batches.batch(order, uniforms)
    update_bn(images.split(71), expected)  # type: ignore[no-untyped-call]
    measure_statistics(plan, whole.data, state)
    for (name, own), theirs in zip(state.average.named_buffers(), expected.buffers(), strict=True):
        assert own.double().sub(theirs.double()).abs().max() < 1e-5, name
    assert state.average.bn1.momentum == state.model.bn1.momentum  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [1, 2])
def test_statistics_are_means_over_images_whatever_the_batches(few_digits: Dataset, parts: int) -> None:
    whole = setup(few_digits, AVERAGED, "data.augment=none", f"optimizer.micro_batches={parts}")
    plan, state = whole.begin()
    measure_statistics(plan, whole.data, state)
    assert state.average is not None
    with torch.no_grad():
        maps = state.average.conv1(whole.data.batches.plain(torch.arange(213)))  # type: ignore[operator]
    mean: Tensor = state.average.bn1.running_mean  # type: ignore[union-attr, assignment]
    assert mean.sub(maps.mean((0, 2, 3))).abs().max() < 1e-5
    assert state.average.bn1.num_batches_tracked == {1: 3, 2: 6}[parts]  # type: ignore[union-attr]


def test_frozen_modules_keep_their_statistics_and_weights(few_digits: Dataset) -> None:
    whole = setup(few_digits, AVERAGED, 'model.frozen=["conv1", "bn1"]')
    plan, state = whole.begin()
    buffers = dict(state.model.named_buffers())
    buffers["bn1.running_mean"].fill_(0.5)  # as if pretrained
    emulated.fit(whole, plan, state, None)
    assert state.average is not None
    own = dict(state.average.named_buffers())
    assert own["bn1.running_mean"].eq(0.5).all()
    assert not own["blocks.0.bn1.running_mean"].equal(buffers["blocks.0.bn1.running_mean"])


# -- phases ------------------------------------------------------------------------------------------------------------


def train(data: Path, run: Path, *flags: object) -> None:
    must("train-stage1", "--data", data, "--out", run, "--epochs", 3, *flags)
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)


def tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    found = read_tensors(path)[0]
    return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor], names: Sequence[str] = ()) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].equal(other[name]) for name in names or one)


def test_the_average_is_published_and_finetuned_and_the_weights_train_on(digits: Path, tmp_path: Path) -> None:
    train(digits, tmp_path / "plain")
    train(digits, tmp_path / "ema", *EMA)
    for phase in ("stage1", "stage2"):
        saved, published = (tmp_path / "ema" / phase / f"{name}.safetensors" for name in ("training_state", "model"))
        assert equal(tensors(published), tensors(saved, "average."))
        assert not tensors(published)["head.weight"].equal(tensors(saved, "model.")["head.weight"])
        assert equal(tensors(saved, "model."), tensors(tmp_path / "plain" / phase / "model.safetensors"))
    before, after = (tensors(tmp_path / "ema" / phase / "model.safetensors") for phase in ("stage2", "finetune"))
    assert equal(before, after, [name for name in before if not name.startswith("head.")])
    assert not equal(before, after)
    assert not tensors(tmp_path / "ema" / "finetune" / "training_state.safetensors", "average.")


def test_eval_every_measures_the_average(digits: Path, tmp_path: Path) -> None:
    flags = ("--recipe", "digits/cross-entropy", "--epochs", 3, *EMA)
    must("train-stage1", "--data", digits, "--out", tmp_path / "a", *flags, "--eval-every", 1)
    said = must("train-stage1", "--data", digits, "--out", tmp_path / "b", *flags).stderr
    assert "stage1: one pass over the training images, for the batch norm of the averaged weights\n" in said
    a, b = (contents(tmp_path / name) for name in "ab")
    assert [name for name in a if a[name] != b[name]] == ["stage1/metrics.parquet"]
    measured = pd.read_parquet(tmp_path / "a" / "stage1" / "metrics.parquet")["test_accuracy"].iloc[-1]
    assert round(100 * measured, 2) == must("evaluate", "--from", tmp_path / "a", "--json").json["top1"]


def test_points_and_adam_are_averaged_too(toy: Path, tmp_path: Path) -> None:
    must("train-stage1", "--data", toy, "--out", tmp_path, *EMA, *setting("optimizer.kind=adam", "optimizer.lr=0.001"))
    state = tmp_path / "stage1" / "training_state.safetensors"
    assert equal(tensors(state, "average."), tensors(tmp_path / "stage1" / "model.safetensors"))


def test_an_interrupted_last_pass_is_made_again(
    handlers: object, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train-stage1", "--data", digits, "--epochs", 3, *EMA, "--out")
    must(*command, tmp_path / "whole")
    real = measure_statistics

    def interrupted(*arguments: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(loop, "measure_statistics", interrupted)
        stopped = cpmix(*command, tmp_path / "stopped")
    assert stopped.code == 75
    assert "stage1 is saved at epoch 2, step" in stopped.stderr
    forget_signals()
    assert not (tmp_path / "stopped" / "stage1" / "model.safetensors").exists()
    must(*command, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


# -- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_is_quiet_and_a_number_of_epochs() -> None:
    assert "ema_epochs" not in Optimizer().model_dump()
    assert Optimizer(ema_epochs=2.5).model_dump()["ema_epochs"] == 2.5
    recipe = load("cifar100-lt/cpmix", settings=["optimizer.ema_epochs=5"], epochs=60)
    assert recipe.optimizer.ema_epochs == 1.0
