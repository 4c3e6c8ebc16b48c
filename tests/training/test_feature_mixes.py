"""Terms that mix features (H2T), in the finetune: against updates by hand, limits, parts of a batch, graphs, ranks."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulated_graph as emulated
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import COUNTS, IMAGES, LABELS, STD, draw_epoch, in_double, must, never, quick_first, setting
from torch import Tensor

from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.data.dataset import Dataset, open_dataset, unwritten_dataset
from cpmix_cli.models import build_model
from cpmix_cli.recipe.schema import Data, Recipe
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.loop import fit
from cpmix_cli.training.objective import Output, TermBatch
from cpmix_cli.training.plan import PhaseContext, Plan, begin_finetune, fresh_state, make_plan
from cpmix_cli.training.state import TrainingState

H2T = {"draw": "class-uniform", "partner": "frequency-power", "power": 1.0, "mix": "channels", "label": "first"}
ON_DIGITS = setting("partner=frequency-power", "power=1", "mix=channels", "label=first", table="finetune.terms.erm")
RATE = 0.2


def finetune(experts: int, p: float, **keys: Any) -> tuple[Plan, TrainingState, TrainingData]:
    """Two epochs of 24 images in batches of 10, on a fresh network in float64 without augmentation."""
    table = {"epochs": 2, "lr": RATE, "momentum": 0.0, "batch_size": 10, "kind": "constant", **keys}
    micro_batches = table.pop("micro_batches", 1)
    tables = {
        "seed": 5,
        "model": {"name": "resnet8", "experts": experts},
        "optimizer": {"micro_batches": micro_batches},
        "schedule": {"epochs": 7, "stage1_epochs": 7},
        "stage1": {"terms": {"erm": {}}},
        "finetune": {"terms": {"h2t": {**H2T, "p": p}}, **table},
    }
    recipe = Recipe.model_validate(tables)
    dataset = unwritten_dataset("few", np.array(COUNTS), [8, 8, 1], recipe="", rho=None, storage="tensors")
    context = PhaseContext(recipe, dataset, torch.device("cpu"), "fp32", {})
    plan, state = make_plan(context, "finetune"), fresh_state(context)
    state.model = in_double(build_model(recipe.model, 4, (8, 8, 1), torch.Generator().manual_seed(0)))
    begin_finetune(context, state)
    batches = ImageBatches(IMAGES, Data(augment="none", normalisation="dataset"), [0.5], [STD])
    return plan, state, TrainingData(batches, LABELS, torch.tensor(COUNTS))


def drawn_pairs(plan: Plan, number: int, num_features: int) -> tuple[list[int], list[int], Tensor]:
    """Images of a step, those of their partners, and the uniform numbers of the channels."""
    epoch, step, size = number // 3 + 1, number % 3, (10, 10, 4)[number % 3]
    draws = draw_epoch(plan.terms, 24, 10, (5, "finetune"), epoch, 2, 3, num_features)

    def image(c: int, purpose: str, b: int) -> int:
        return sum(COUNTS[:c]) + int(float(draws[f"h2t/{purpose}"][step, b]) * COUNTS[c])

    first = [image(int(float(draws["h2t/class"][step, b]) * 4), "image", b) for b in range(size)]
    natural = [int(LABELS[int(float(draws["h2t/partner"][step, b]) * 24)]) for b in range(size)]  # classes lie in order
    return first, [image(c, "partner-image", b) for b, c in enumerate(natural)], draws["h2t/box"][step, 0]


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("p", [0.0, 0.27, 1.0])
def test_a_finetune_on_mixed_features_equals_a_plain_loop(experts: int, p: float) -> None:
    """At 1 the features are those of the partners, at 0 they are the images' own; the labels are always the images'."""
    plan, state, data = finetune(experts, p)
    model = copy.deepcopy(state.model).eval()
    features = model.features(data.batches.plain(torch.arange(24))).detach()
    width = features.shape[1] // experts
    assert width == 64
    fit(plan, data, state, publish=never)

    weights = [p for head in model.heads for p in head.parameters()]
    for number in range(6):
        first, second, uniforms = drawn_pairs(plan, number, features.shape[1])
        mixed = features[first].clone()
        for e in range(experts):
            order = sorted(range(width), key=lambda c: float(uniforms[e * width + c]))
            for c in order[: int(p * width)]:
                mixed[:, e * width + c] = features[second][:, e * width + c]
        loss = torch.zeros((), dtype=torch.float64)
        for e, head in enumerate(model.heads):
            logits = head(mixed[:, e * width : (e + 1) * width])
            loss = loss + F.cross_entropy(logits, LABELS[first])
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= RATE * gradient
    for name, tensor in state.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)


def test_labels_of_the_partners_change_nothing(generator: torch.Generator) -> None:
    """No bit of the loss or of its gradient."""
    plan, _, _ = finetune(1, 0.25)
    (term,) = plan.terms
    logits = torch.randn(1, 9, 4, generator=generator, requires_grad=True)
    y1 = torch.randint(0, 4, (9,), generator=generator)
    found = []
    for y2 in (y1, y1.flip(0), None):
        lam = None if y2 is None else torch.ones(9, dtype=torch.float64)
        loss = term.loss(Output(logits), TermBatch(torch.empty(0), y1, y2, lam), torch.tensor(COUNTS))
        found.append((loss, *torch.autograd.grad(loss, logits)))
    for loss, gradient in found[1:]:
        assert loss.equal(found[0][0])
        assert gradient.equal(found[0][1])


def test_shifted_statistics_see_images_and_partners_apart() -> None:
    """Those of the stem after an epoch of three steps: two updates a step; weights without a gradient stay."""
    plan, state, data = finetune(1, 0.25, batchnorm="shift", epochs=1)
    stem, norm = state.model.conv1, copy.deepcopy(state.model.bn1)
    head = state.model.head.weight.detach().clone()
    fit(plan, data, state, publish=never)
    norm.train()
    for number in range(3):
        for images in drawn_pairs(plan, number, 64)[:2]:
            norm(stem(data.batches.plain(torch.tensor(images))))
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight"):
        torch.testing.assert_close(getattr(state.model.bn1, name), getattr(norm, name), msg=name)
    assert norm.num_batches_tracked == 6
    assert not state.model.head.weight.equal(head)


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_parts_of_a_batch_share_the_channels(micro_batches: int) -> None:
    """Also where the parts are uneven: 10 and 4 images."""
    results = []
    for parts in (1, micro_batches):
        plan, state, data = finetune(3, 0.25, micro_batches=parts)
        fit(plan, data, state, publish=never)
        results.append(state)
    for name, tensor in results[1].model.state_dict().items():
        torch.testing.assert_close(tensor, results[0].model.state_dict()[name], rtol=1e-9, atol=1e-12, msg=name)
    assert results[1].history[-1]["loss"] == pytest.approx(results[0].history[-1]["loss"])


def test_a_term_of_images_beside_it_keeps_its_logits() -> None:
    """One forward pass has the images of the terms that do not mix features, in their order."""
    tables = {"a": {"weight": 0.3}, "h2t": {**H2T, "p": 0.25}, "b": {"draw": "class-uniform"}}
    states = []
    for forward in ("joint", "separate"):
        plan, state, data = finetune(3, 0.25, terms=tables, forward=forward)
        fit(plan, data, state, publish=never)
        states.append(state)
    for key in ("loss", "loss_a", "loss_h2t", "loss_b", "train_accuracy"):
        assert states[0].history[-1][key] == pytest.approx(states[1].history[-1][key]), key
    alone, state, data = finetune(3, 0.25, terms={"h2t": tables["h2t"]}, epochs=1, lr=1e-30)
    fit(alone, data, state, publish=never)
    plan, beside, data = finetune(3, 0.25, terms=tables, epochs=1, lr=1e-30)
    fit(plan, data, beside, publish=never)
    assert beside.history[0]["loss_h2t"] == pytest.approx(state.history[0]["loss"], rel=1e-12)


def test_no_channel_is_the_plain_finetune_bit_for_bit_and_confusions_stay(digits_run: Path, tmp_path: Path) -> None:
    """Images count twice, for both of a pair go through the network."""
    weights, tables = [], []
    for out, flags in (("plain", []), ("none", [*ON_DIGITS, *setting("finetune.terms.erm.p=0.0")])):
        must("finetune", "--from", digits_run, "--out", tmp_path / out, *flags)
        weights.append(read_tensors(tmp_path / out / "finetune" / "model.safetensors")[0])
        tables.append(pd.read_parquet(tmp_path / out / "finetune" / "metrics.parquet"))
        pairs = "confusion_pairs.parquet"
        assert (tmp_path / out / "finetune" / pairs).read_bytes() == (digits_run / "stage2" / pairs).read_bytes()
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())
    assert tables[0]["loss"].equals(tables[1]["loss"])
    images = [int((table["images_per_second"] * table["seconds"]).sum().round()) for table in tables]
    assert images[1] == 2 * images[0]


# -- CUDA graphs -------------------------------------------------------------------------------------------------------

GRAPHS = {
    "as published": (),
    "frozen, a set of channels for each image": (
        *("finetune.batchnorm=frozen", "finetune.terms.h2t.per_sample=true", "model.precision=bf16"),
        *("finetune.kind=linear", "finetune.warmup_epochs=1.5"),
    ),
    "experts, micro-batches, some batches unmixed": (
        *("model.experts=3", "optimizer.micro_batches=3", "finetune.terms.h2t.probability=0.5"),
    ),
}


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """213 digits of 8 x 8 pixels, 64 to 3 a class."""
    folder = tmp_path_factory.mktemp("data") / "few"
    must("build-lt", "digits", "--rho", 20, "--val-per-class", 60, "--out", folder)
    return open_dataset(folder)


@pytest.mark.parametrize("settings", quick_first(GRAPHS, pytest.mark.slow, pytest.mark.long))
def test_replayed_and_resumed_epochs_equal_eager_ones(settings: Sequence[str], few_digits: Dataset) -> None:
    whole = emulated.setup("cifar100-lt/h2t", "finetune", few_digits, *emulated.SMALL, *settings)
    eager, replayed = (emulated.train(whole, emulate=emulate) for emulate in (False, True))
    assert replayed.num_replays == [5, 2]
    assert not replayed.reads
    assert not [name for name in replayed.read if name.startswith("unknown")]
    assert "input h2t.mixing.uniforms" in replayed.read
    assert replayed.written <= emulated.WRITTEN - {"confusion counts"}
    assert not replayed.differs_from(eager)
    half = emulated.train(whole, emulate=False, stop_at=(2, 1))
    rest = emulated.train(whole, emulate=True, start=emulated.resumed(whole, half.state))
    assert half.differs_from(eager)
    assert not rest.differs_from(eager)
