"""The step as a CUDA graph, without a GPU: replays are the eager steps, none waits, all that it touches is known."""

import gc
import weakref
from pathlib import Path

import emulated_graph as emulated
import pytest
import torch
from helpers import must, quick_first
from torch.utils._python_dispatch import _get_current_dispatch_mode

from cpmix_cli.data.dataset import Dataset, open_dataset
from cpmix_cli.models import Classifier
from cpmix_cli.runtime import console
from cpmix_cli.training.cuda_graphs import CudaGraphRunner
from cpmix_cli.training.state import EpochSums

METHODS = emulated.distinct_setups("cifar100-lt")
BOTH_GRAPHS = [5, 2]
"""Replays in three epochs of two full batches and one of what is left, of which the first is eager."""
VARIANTS = {
    "all at once": (
        *("model.precision=bf16", "model.experts=3", "confusion.decay=0.9"),
        *("optimizer.micro_batches=3", "data.augment=crop-flip-rotate", "data.padding=2"),
    ),
    "bf16": ("model.precision=bf16",),
    "two micro-batches": ("optimizer.micro_batches=2",),
    "uneven micro-batches": ("optimizer.micro_batches=3",),
    "decaying counts": ("confusion.decay=0.9",),
    "partners of an epoch": ("confusion.refresh=epoch", "confusion.decay=0.9"),
    "three experts": ("model.experts=3",),
    "separate forwards": ("stage2.forward=separate",),
    "a ratio for each image": ("stage2.terms.mix.per_sample=true",),
    "a frozen stem": ('model.frozen=["conv1", "bn1"]',),
    "jittered crops": ("data.crop=6", "data.augment=resized-crop-flip-jitter", "data.cutout=3"),
    "autoaugment": ("data.augment=crop-flip-autoaugment", "data.fill=128", "data.cutout=4", "data.flip=alternating"),
    "averaged weights": ("optimizer.ema_epochs=60",),
    "adamw by layer": ("optimizer.kind=adamw", "optimizer.lr=0.001", "optimizer.layer_decay=0.7"),
}
RESUMED = ("partners of an epoch", "autoaugment", "averaged weights")


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
    assert replayed.written <= emulated.WRITTEN | {"average"}
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


@pytest.mark.parametrize("settings", quick_first(VARIANTS, pytest.mark.slow, pytest.mark.long))
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
@pytest.mark.parametrize(
    "settings", quick_first({"": (), **{name: VARIANTS[name] for name in RESUMED}}, pytest.mark.slow, pytest.mark.long)
)
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


# -- recordings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", quick_first({"of a full batch": 1, "of the last batch": 2}, pytest.mark.slow))
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Classifier, "expert_logits"), (torch.optim.SGD, "step"), (EpochSums, "add")],
    ids=["in the forward pass", "after the update", "at its end"],
)
def test_a_recording_that_fails_changes_no_bit(
    owner: type, name: str, recording: int, cpmix: emulated.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning says so, and all further steps run eagerly."""
    notes: list[str] = []
    monkeypatch.setattr(console, "warn", notes.append)
    eager = emulated.train(cpmix, emulate=False)
    failed = emulated.train(cpmix, emulate=True, fault=emulated.failing(owner, name, recording=recording))
    assert not failed.differs_from(eager)
    assert failed.num_replays == ([0] if recording == 1 else [3, 0])
    assert notes == [
        "the step cannot be recorded as a CUDA graph (operation not permitted when stream is capturing), so it runs "
        "without one, which is slower; to record none: --set model.cuda_graphs=false"
    ]


def test_a_key_turns_graphs_off_and_changes_neither_bits_nor_hashes(cpmix: emulated.Setup, few_digits: Dataset) -> None:
    off = emulated.setup("cifar100-lt/cpmix", "stage2", few_digits, *emulated.SMALL, "model.cuda_graphs=false")
    found = emulated.train(off, emulate=True)
    assert found.num_replays == []
    assert not found.differs_from(emulated.train(cpmix, emulate=True))
    recipes = [whole.context.recipe for whole in (cpmix, off)]
    assert recipes[0].tables_of("stage2") == recipes[1].tables_of("stage2")
    assert ["cuda_graphs" in recipe.to_toml() for recipe in recipes] == [False, True]


def test_garbage_is_collected_before_a_recording_and_not_during_it() -> None:
    """A graph that is destroyed while another records makes it fail; graphs in garbage wait for the collector."""
    dead: list[int] = []
    recording: list[tuple[bool, list[int]]] = []

    def function(key: int) -> None:
        if isinstance(_get_current_dispatch_mode(), emulated.Tape):
            recording.append((gc.isenabled(), list(dead)))

    class Cycle:
        def __init__(self) -> None:
            self.own = self

    with emulated.recorded([], []):
        runner = CudaGraphRunner(function, torch.device("cuda"))
        runner(1)
        weakref.finalize(Cycle(), dead.append, 1)
        assert not dead
        runner(1)
    assert recording == [(False, [1])]
    assert gc.isenabled()


def test_each_set_of_graphs_has_a_memory_pool_of_its_own() -> None:
    pools: list[object] = []
    with emulated.recorded([], [], pools):
        for _ in range(2):
            runner = CudaGraphRunner(lambda key: None, torch.device("cuda"))
            for key in (1, 2, 1, 2, 1, 2):
                runner(key)
    assert pools == [1, 1, 2, 2]


# -- faults that were put in on purpose --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick_first({name: name for name in emulated.FAULTS}, pytest.mark.slow))
def test_an_error_of_the_replay_only_is_detected(name: str, cpmix: emulated.Setup) -> None:
    eager, replayed = (
        emulated.train(cpmix, emulate=emulate, fault=emulated.FAULTS[name]()) for emulate in (False, True)
    )
    assert replayed.num_replays == BOTH_GRAPHS
    assert replayed.differs_from(eager)


@pytest.mark.parametrize("name", quick_first({name: name for name in emulated.READING}, pytest.mark.slow))
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
