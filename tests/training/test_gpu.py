"""On a GPU: eager steps against graphs, in float32 and bf16, and what only streams and events can show.

Each test has a case on the CPU where it says something there; the others are skipped without a GPU. Without one, see
test_cuda_graphs.py and test_simulated_cuda.py.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import COUNTS, CP, ERM, IMAGES, LABELS, LR, MIX, must, plan_of, setting, sums_of, terms_of

from cpmix_cli.artifacts.tensors import on_host, tensor_bytes
from cpmix_cli.data.autoaugment import NUM_UNIFORMS, AutoAugment
from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.data.stream import UPLOADS_IN_USE, Uploads
from cpmix_cli.models import build_model
from cpmix_cli.recipe.schema import Data, Model, Optimizer
from cpmix_cli.runtime import console, hardware
from cpmix_cli.training.cuda_graphs import STEPS_IN_FLIGHT, CudaGraphRunner, StepsInFlight, own_stream, synchronize
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.plan import make_optimizer
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.step import Step

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
TERMS: dict[str, Any] = {
    "stage 1": {"erm": ERM},
    "stage 2": {"erm": ERM, "cp": CP, "mix": MIX},
    "other partners": {
        "uniform": {**CP, "partner": "class-uniform"},
        "random": {**CP, "partner": "random", "per_sample": True},
        "fixed": {**CP, "partner": "fixed", "pairs": [[0, 1], [2, 3]]},
    },
}
TOLERANCE = {"fp32": (1e-3, 1e-4), "bf16": (0.05, 0.02)}
"""Relative and absolute, between the weights of eager steps and of graphs, which should be equal bit for bit."""


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """What a command sets for a GPU; threads stay as they are."""
    threads = torch.get_num_threads()
    hardware.use_device("auto")
    torch.set_num_threads(threads)
    yield


def started(
    terms: Any, *, precision: str, joint: bool = True, adam: bool = False, device: str
) -> tuple[Step, TrainingState]:
    """A step at the beginning of epoch 1, on 24 images in batches of 10, in the precision and layout of training."""
    model = build_model(Model(name="resnet8"), 4, (8, 8, 1), torch.Generator().manual_seed(0))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    kind: Any = "adam" if adam else "sgd"
    optimizer = make_optimizer(model, Optimizer(kind=kind, lr=0.01))
    state = TrainingState(model, optimizer, torch.zeros(4, 4, dtype=torch.float64, device=device), epoch=1)
    plan = replace(plan_of(terms, 100, batch=10, joint=joint), precision=precision, learning_rate=lambda *_: LR / 10)
    state.sums = sums_of(plan, device)
    batches = ImageBatches(IMAGES.to(device), Data(augment="crop", padding=1), [0.5], [0.25])
    step = Step(plan, TrainingData(batches, LABELS.to(device), torch.tensor(COUNTS, device=device)), state)
    step.begin_epoch(1)
    return step, state


@contextmanager
def host_that_never_waits() -> Iterator[None]:
    """Calls that make the host wait for the GPU are errors inside; torch warns once that it does not know all."""
    switch = torch._C._cuda_set_sync_debug_mode  # torch.cuda.set_sync_debug_mode() looks for a driver first
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        switch(2)
    try:
        yield
    finally:
        switch(0)


CASES = product(TERMS, ["joint", "separate"], ["sgd", "adam"], ["fp32", "bf16"])


@pytest.mark.parametrize(
    ("device", "terms", "forward", "optimizer", "precision"),
    [("cpu", "stage 2", "joint", "adam", "bf16"), *(pytest.param("cuda", *c, marks=pytest.mark.gpu) for c in CASES)],
)
def test_a_step_never_waits_for_the_gpu(device: str, terms: str, forward: str, optimizer: str, precision: str) -> None:
    with own_stream(torch.device(device)):
        step, _ = started(
            terms_of(**TERMS[terms]),
            joint=forward == "joint",
            adam=optimizer == "adam",
            precision=precision,
            device=device,
        )
        for epoch in range(1, 7):
            step.begin_epoch(epoch)
            for number in range(3):
                before = step.capture_seconds
                if epoch in (2, 3, 4):  # a recording waits
                    step(number)
                    continue
                with host_that_never_waits():
                    step(number)
                assert step.capture_seconds == before
    assert (step.capture_seconds > 0) == (device == "cuda")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_equal_eager_ones(
    device: str, precision: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs 5 to 8 from graphs, against the same ones taken eagerly; the first epoch against the CPU in float32.

    Dropout draws on the device, where a graph takes the seed of each step at its replay; the CPU draws other numbers.
    """
    states, losses = [], []
    for place, eager in ((device, 3), (device, 10**9), ("cpu", 3)):
        monkeypatch.setattr("cpmix_cli.training.cuda_graphs.EAGER_STEPS", eager)
        with own_stream(torch.device(place)):
            terms = terms_of(erm=ERM, cp=CP, mix=MIX)
            step, state = started(terms, device=place, precision=precision if len(states) < 2 else "fp32")
            if dropout:
                state.model.head.register_forward_pre_hook(lambda _, x: (F.dropout(x[0], dropout),))
            for epoch in range(1, 9):
                step.begin_epoch(epoch)
                for number in range(3):
                    step(number)
                if epoch == 1:
                    losses.append(state.sums.read()["loss"])
        assert (step.capture_seconds > 0) == (place == "cuda" and eager == 3)
        states.append(on_host(state.tensors()))
    replayed, eagerly, _ = states
    relative, absolute = TOLERANCE[precision]
    for name, tensor in replayed.items():
        counts = name in ("confusion", "sums")  # a prediction may change, and with it a partner
        rtol, atol = (0.05, 3.0) if counts and device == "cuda" else (relative, absolute)
        torch.testing.assert_close(tensor, eagerly[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    if dropout:
        assert losses[0] == pytest.approx(losses[1], rel=relative)
        return
    assert losses == [pytest.approx(losses[2], rel=1e-3 if precision == "fp32" else 0.03)] * 3


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_maps_are_channels_last_in_the_precision_of_the_recipe(device: str, precision: str) -> None:
    step, state = started(terms_of(erm=ERM), device=device, precision=precision)
    seen: list[torch.Tensor] = []
    block = state.model.get_submodule("blocks.1.conv1")
    block.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with own_stream(torch.device(device)):
        step(0)
    gradient = block.get_parameter("weight").grad
    assert gradient is not None
    for tensor in (*seen, block.get_parameter("weight"), gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert seen[1].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert gradient.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["digits/cpmix", "cifar100-lt/crt", "cifar100-lt/mislas"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_phases_run_on_the_gpu(recipe: str, precision: str, digits: Path, tmp_path: Path) -> None:
    """After a dry run, which records without a warning."""
    run, cuda = tmp_path / "run", ("--device", "cuda")
    small = setting("model.name=resnet8", "data.normalisation=dataset", "optimizer.batch_size=100")
    flags = ("--recipe", recipe, "--epochs", 12, *small, *setting(f"model.precision={precision}"))
    first = ("train-stage1", "--data", digits, "--out", run, *flags, *cuda)
    assert "warning" not in must(*first, "--dry-run").stderr
    assert "warning" not in must(*first).stderr
    must("train-stage2", "--from", run, *cuda)
    must("finetune", "--from", run, *cuda)
    assert must("evaluate", "--from", run, *cuda, "--json").json["top1"] > 60


@pytest.mark.gpu
def test_a_recording_that_fails_on_the_gpu_goes_on_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """And later recordings of other work succeed."""
    notes: list[str] = []
    monkeypatch.setattr(console, "warn", notes.append)
    device = torch.device("cuda")
    counter = torch.zeros((), device=device)

    def counts(key: int) -> None:
        counter.add_(torch.ones(1000, device=device).sum() / 1000)
        if key == 2 and torch.cuda.is_current_stream_capturing():
            float(counter)

    with own_stream(device):
        failing, other = CudaGraphRunner(counts, device), CudaGraphRunner(counts, device)
        for number in range(1, 9):
            failing(1)
            failing(2)
            assert float(counter) == 2 * number
        assert len(notes) == 1 and "cannot be recorded as a CUDA graph" in notes[0]
        assert not failing.records
        for _ in range(8):
            other(1)
        assert float(counter) == 24 and other.records and len(notes) == 1
        assert len(torch.ones(2**28, device=device)) == 2**28  # the allocator still works, after it frees its cache


@pytest.mark.gpu
def test_the_host_is_at_most_eight_steps_ahead_of_the_gpu() -> None:
    device = torch.device("cuda")
    steps, events = StepsInFlight(device), []
    with own_stream(device):
        for _ in range(3 * STEPS_IN_FLIGHT):
            torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
            events.append(torch.cuda.Event())
            events[-1].record()
            steps.launched()
            assert sum(not event.query() for event in events) <= STEPS_IN_FLIGHT
        synchronize(device)


@pytest.mark.gpu
def test_uploads_to_the_gpu_arrive_whole_while_it_is_busy() -> None:
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    uploads = Uploads(device)
    sums, expected = [], []
    with own_stream(device):
        for _ in range(5 * UPLOADS_IN_USE):
            images = torch.randint(0, 256, (1_000_000,), dtype=torch.uint8, generator=generator)
            expected.append(int(images.sum()))
            with uploads.sent(images) as (sent,):
                torch.cuda._sleep(2_000_000)
                sums.append(sent.long().sum())
            del sent
        assert torch.stack(sums).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_of_the_gpu_has_the_bytes_of_copies_made_one_by_one(precision: str) -> None:
    step, state = started(terms_of(erm=ERM), device="cuda", precision=precision)
    with own_stream(torch.device("cuda")):
        for number in range(3):
            step(number)
        tensors = state.tensors()
        began = time.perf_counter()
        packed = on_host(tensors)
        assert time.perf_counter() - began < 1
        assert tensor_bytes(packed) == tensor_bytes({name: t.detach().cpu() for name, t in tensors.items()})
        assert state.not_finite() == ""


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_on_a_gpu_gives_the_bytes_of_the_cpu(
    channels: int, device: str, generator: torch.Generator
) -> None:
    """On the CPU they are torchvision's: see test_autoaugment.py."""
    images = torch.randint(0, 256, (2000, 32, 32, channels), dtype=torch.uint8, generator=generator)
    images[::3] = images[::3] // 3 + torch.linspace(0, 150, 32).to(torch.uint8).view(1, 1, -1, 1)
    uniforms = torch.rand(2000, NUM_UNIFORMS, dtype=torch.float64, generator=generator)
    policies = [AutoAugment(32, 32, channels, 128, torch.device(name)) for name in ("cpu", device)]
    assert policies[1](images.to(device), uniforms.to(device)).cpu().equal(policies[0](images, uniforms))
