"""The step as a CUDA graph, without a GPU: replays are the eager steps, none waits, all that it touches is known."""

from pathlib import Path

import emulated_graph as emulated
import pytest
import torch
from helpers import must

from cpmix_cli.data.dataset import Dataset, open_dataset

METHODS = emulated.distinct_setups("cifar100-lt")
BOTH_GRAPHS = [5, 2]
"""Replays in three epochs of two full batches and one of what is left, of which the first is eager."""
VARIANTS = {
    "bf16": ("model.precision=bf16",),
    "two micro-batches": ("optimizer.micro_batches=2",),
    "uneven micro-batches": ("optimizer.micro_batches=3",),
    "decaying counts": ("confusion.decay=0.9",),
    "partners of an epoch": ("confusion.refresh=epoch", "confusion.decay=0.9"),
    "three experts": ("model.experts=3",),
    "separate forwards": ("stage2.forward=separate",),
    "a ratio for each image": ("stage2.terms.mix.per_sample=true",),
    "a frozen stem": ('model.frozen=["conv1", "bn1"]',),
    "jittered crops": ("data.crop=6", "data.augment=resized-crop-flip-jitter"),
    "adam": ("optimizer.kind=adam", "optimizer.lr=0.001"),
    "all at once": (
        *("model.precision=bf16", "model.experts=3", "confusion.decay=0.9"),
        *("optimizer.micro_batches=3", "data.augment=crop-flip-rotate", "data.padding=2"),
    ),
}


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """213 digits of 8 x 8 pixels, 64 to 3 a class."""
    folder = tmp_path_factory.mktemp("data") / "few"
    must("build-lt", "digits", "--rho", 20, "--val-per-class", 60, "--out", folder)
    return open_dataset(folder)


@pytest.fixture
def cpmix(few_digits: Dataset) -> emulated.Setup:
    """Stage 2 of CP-Mix."""
    return emulated.setup("cifar100-lt/cpmix", "stage2", few_digits, *emulated.SMALL)


def check(eager: emulated.Outcome, replayed: emulated.Outcome) -> None:
    """What holds of every training that is recorded."""
    assert replayed.num_replays == BOTH_GRAPHS
    assert not replayed.reads
    assert not [name for name in replayed.read if name.startswith("unknown")]
    assert replayed.written <= emulated.WRITTEN
    assert not replayed.differs_from(eager)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "phase"), METHODS.values(), ids=list(METHODS))
def test_replayed_epochs_of_all_methods_equal_eager_ones(recipe: str, phase: str, few_digits: Dataset) -> None:
    """But those of OTmix, which are never recorded."""
    whole = emulated.setup(recipe, phase, few_digits, *emulated.SMALL)
    replayed = emulated.train(whole, emulate=True)
    if "otmix" in recipe and phase == "stage1":
        assert replayed.num_replays == []
    else:
        check(emulated.train(whole, emulate=False), replayed)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=list(VARIANTS))
def test_replayed_epochs_of_all_settings_equal_eager_ones(settings: tuple[str, ...], few_digits: Dataset) -> None:
    whole = emulated.setup("cifar100-lt/cpmix", "stage2", few_digits, *emulated.SMALL, *settings)
    check(*(emulated.train(whole, emulate=emulate) for emulate in (False, True)))


@pytest.mark.parametrize(("recipe", "phase"), [("toy/cpmix", "stage2"), ("toy/fixed-pairs", "stage1")])
def test_replayed_epochs_of_points_equal_eager_ones(recipe: str, phase: str, toy: Path) -> None:
    dataset = open_dataset(toy)
    batch = len(dataset.labels("train")) // 3 + 1
    whole = emulated.setup(recipe, phase, dataset, f"optimizer.batch_size={batch}")
    check(*(emulated.train(whole, emulate=emulate) for emulate in (False, True)))


@pytest.mark.parametrize("stop_at", [(8, 1), (8, 3)], ids=["in an epoch", "at its end"])
@pytest.mark.parametrize("settings", [(), ("confusion.refresh=epoch", "confusion.decay=0.9")], ids=["", "ahead"])
def test_a_resumed_run_replays_to_the_same_end(
    settings: tuple[str, ...], stop_at: tuple[int, int], few_digits: Dataset
) -> None:
    whole = emulated.setup("cifar100-lt/cpmix", "stage2", few_digits, *emulated.SMALL, *settings)
    eager = emulated.train(whole, emulate=False)
    half = emulated.train(whole, emulate=True, stop_at=stop_at)
    rest = emulated.train(whole, emulate=True, start=emulated.resumed(whole, half.state))
    assert half.num_replays and rest.num_replays
    assert half.differs_from(eager)
    assert not rest.differs_from(eager)


def test_a_step_of_cpmix_reads_and_writes_only_known_tensors(cpmix: emulated.Setup) -> None:
    mixing = ("mixing.choice", "mixing.ratio", "mixing.uniforms")
    inputs = {
        *("learning_rate", "counts_errors", "fallbacks", "draws.natural.index", "draws.natural.augment"),
        *("cp.labels", "cp.first.index", "cp.first.augment", "cp.second.augment", "cp.mixing.image"),
        *(f"cp.{name}" for name in mixing),
        *(f"mix.{name}" for name in mixing),
        "erm.labels",  # and those of mix, on the CPU the same tensor
    }
    found = emulated.train(cpmix, emulate=True)
    assert found.written == emulated.WRITTEN
    assert found.read == {
        *(emulated.WRITTEN | {"step number", "class counts", "images", "images by class"}),
        *(f"input {name}" for name in inputs),
    }


def test_a_distilled_step_reads_its_teacher_but_never_writes_it(few_digits: Dataset) -> None:
    found = emulated.train(
        emulated.setup("cifar100-lt/ride-distilled", "stage1", few_digits, *emulated.SMALL), emulate=True
    )
    assert "teacher" in found.read - found.written


# -- faults that were put in on purpose --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", emulated.FAULTS)
def test_an_error_of_the_replay_only_is_detected(name: str, cpmix: emulated.Setup) -> None:
    eager, replayed = (
        emulated.train(cpmix, emulate=emulate, fault=emulated.FAULTS[name]()) for emulate in (False, True)
    )
    assert replayed.num_replays == BOTH_GRAPHS
    assert replayed.differs_from(eager)


@pytest.mark.parametrize("name", emulated.READING)
def test_a_step_that_waits_for_the_device_is_detected(name: str, cpmix: emulated.Setup) -> None:
    call, fault = emulated.READING[name]
    assert emulated.train(cpmix, emulate=True, fault=emulated.at_its_end(fault)).reads == {call: 2}


def test_a_read_of_an_unknown_tensor_is_detected(cpmix: emulated.Setup) -> None:
    stray = torch.zeros(1)
    fault = emulated.at_its_end(lambda step, _: step._state.sums.values.add_(stray))
    found = emulated.train(cpmix, emulate=True, fault=fault)
    assert [name for name in found.read if name.startswith("unknown")] == ["unknown (1,) torch.float32"]


def test_a_write_to_a_read_only_tensor_is_detected(cpmix: emulated.Setup) -> None:
    fault = emulated.at_its_end(lambda step, _: step._data.class_counts.add_(1))
    found = emulated.train(cpmix, emulate=True, fault=fault)
    assert found.written - emulated.WRITTEN == {"class counts"}
