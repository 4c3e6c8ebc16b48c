"""The finetune's plan: its steps and draws, and the head that comes out of it, against updates by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import COUNTS, IMAGES, LABELS, STD, draw_epoch, fresh, never

from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.data.dataset import unwritten_dataset
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Data, Recipe
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.loop import fit
from cpmix_cli.training.plan import PhaseContext, begin_finetune, make_plan

SGD = {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.03, "batch_size": 10}
FINETUNE = {
    **SGD,
    "epochs": 2,
    "kind": "cosine",
    "head": "scale",
    "groups": [{"prefix": "head.scale", "weight_decay": 0.0}, {"prefix": "head", "lr_factor": 0.5}],
    "terms": {"erm": {"draw": "class-uniform", "loss": "cross-entropy"}},
}
RECIPE = {
    "seed": 5,
    "model": {"name": "resnet8"},
    "schedule": {"epochs": 7, "stage1_epochs": 7},
    "stage1": {"terms": {"erm": {"draw": "natural"}}},
    "finetune": FINETUNE,
}


def context_of(recipe: Recipe, counts: list[int], shape: list[int]) -> PhaseContext:
    dataset = unwritten_dataset("plans", np.array(counts), shape, recipe="", rho=None, storage="tensors")
    return PhaseContext(recipe, dataset, torch.device("cpu"), "fp32", {})


def test_finetune_equals_a_plain_loop_over_steps() -> None:
    """Two epochs of 10 + 10 + 4 images: scales at the whole rate without decay, the classifier at half, no more."""
    state = fresh()
    context = context_of(Recipe.model_validate(RECIPE), COUNTS, [8, 8, 1])
    plan = make_plan(context, "finetune")
    begin_finetune(context, state)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    batches = ImageBatches(IMAGES, Data(augment="none", normalisation="dataset"), [0.5], [STD])
    features = state.model.eval().features(batches.plain(torch.arange(24))).detach()
    fit(plan, TrainingData(batches, LABELS, torch.tensor(COUNTS)), state, publish=never)

    head = {name: before[f"head.{name}"].clone().requires_grad_() for name in ("scale", "weight", "bias")}
    velocity = {name: torch.zeros_like(w) for name, w in head.items()}
    for number in range(6):
        epoch, step = number // 3 + 1, number % 3
        draws = draw_epoch(plan.terms, 24, 10, (5, "finetune"), epoch, 2, 3)
        assert draws["erm/class"].shape == draws["erm/image"].shape == (3, 10)
        images, labels = [], []
        for b in range((10, 10, 4)[step]):
            y = int(float(draws["erm/class"][step, b]) * 4)
            images.append(sum(COUNTS[:y]) + int(float(draws["erm/image"][step, b]) * COUNTS[y]))
            labels.append(y)
        logits = head["scale"] * (features[images] @ head["weight"].t() + head["bias"])
        gradients = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(labels)), list(head.values()))
        rate = 0.2 * (1 + math.cos(math.pi * number / 6)) / 2
        for (name, w), g in zip(head.items(), gradients, strict=True):
            factor, decay = (1.0, 0.0) if name == "scale" else (0.5, 0.03)
            g = g + decay * w.detach()
            velocity[name] = 0.8 * velocity[name] + g
            w.data -= factor * rate * (g + 0.8 * velocity[name])
    for name, tensor in state.model.state_dict().items():
        expected = head[name.removeprefix("head.")].detach() if name.startswith("head.") else before[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8, msg=name)
    assert [row["epoch"] for row in state.history] == [1, 2]


@pytest.mark.parametrize(
    ("name", "num_max", "num_classes", "batch", "steps"),
    [
        ("cifar100-lt/cpmix", 500, 100, 128, 75),  # 9,502 images: 74 * 128 + 30
        ("cifar100-lt/crt", 500, 100, 512, 19),  # 18 * 512 + 286
        ("cifar10-lt/cpmix", 5000, 10, 128, 88),  # 11,203: 87 * 128 + 67
        ("cifar10-lt/lws", 5000, 10, 512, 22),  # 21 * 512 + 451
    ],
)
def test_finetune_steps_cover_all_images(name: str, num_max: int, num_classes: int, batch: int, steps: int) -> None:
    """As many as hold the training images, class-uniform though their draws are."""
    counts = exponential_counts(num_max, num_classes, 200).tolist()
    context = context_of(load(name, rho=200), counts, [32, 32, 3])
    plan = make_plan(context, "finetune")
    assert (plan.batch_size, plan.num_steps(sum(counts))) == (batch, steps)
    draws = draw_epoch(plan.terms, sum(counts), plan.batch_size, (0, "finetune"), 1, plan.num_epochs, 3)
    assert draws["erm/class"].shape == (steps, batch)


def test_the_finetune_warms_up_by_its_own_epochs() -> None:
    """As the stages do: epoch e has the factor min(1, e / warmup_epochs), whatever the schedule."""
    plain, warm = ({"epochs": 4, "lr": 0.2, "warmup_epochs": w, "terms": {"erm": {}}} for w in (0.0, 2.5))
    for kind in ("cosine", "constant"):
        rates = []
        for table in (plain, warm):
            recipe = Recipe.model_validate({**RECIPE, "finetune": {**table, "kind": kind}})
            plan = make_plan(context_of(recipe, COUNTS, [8, 8, 1]), "finetune")
            rates.append([plan.learning_rate(epoch, step, 3) for epoch in range(1, 5) for step in range(3)])
        assert rates[0][0] == 0.2
        factors = np.repeat([1 / 2.5, 2 / 2.5, 1, 1], 3)
        np.testing.assert_allclose(rates[1], factors * rates[0], rtol=1e-12)
    recipe = Recipe.model_validate({**RECIPE, "finetune": {**warm, "kind": "linear"}})
    plan = make_plan(context_of(recipe, COUNTS, [8, 8, 1]), "finetune")
    rates = [plan.learning_rate(epoch, step, 2) for epoch in range(1, 5) for step in range(2)]
    assert rates == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2, 0.4 / 3, 0.2 / 3, 0])
