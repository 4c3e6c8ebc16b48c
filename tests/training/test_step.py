"""What one step computes; the graph made of it on a GPU: test_gpu.py and, without one, test_cuda_graphs.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import COUNTS, CP, ERM, LABELS, MIX, data, draw_epoch, fresh, never, plan_of, sums_of, terms_of
from torch import Tensor

from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.recipe.loading import load
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.loop import fit
from cpmix_cli.training.objective import Output, TermBatch, compile_stage
from cpmix_cli.training.step import Step


def test_partners_drawn_ahead_use_the_counts_at_the_start_of_the_epoch() -> None:
    """As if no error of it had been counted; the fall-backs are counted step by step."""
    sums = []
    for ahead in (True, False):
        plan = plan_of(terms_of(erm=ERM, cp=CP, mix=MIX), 100, batch=10)
        plan = replace(plan, partners_ahead=ahead, collect_confusion=ahead)
        state = fresh()
        state.confusion[0, 1] = state.confusion[1, 0] = 3.0
        state.sums = sums_of(plan)
        step, seen = Step(plan, data(), state), []
        for epoch in (1, 2):
            state.epoch_confusion = state.confusion.clone() if epoch == 1 else state.epoch_confusion
            step.begin_epoch(epoch)
            for number in range(3):
                step(number)
                seen.append(state.sums.values.clone())
        sums.append(torch.stack(seen))
    names = list(state.sums.read())
    errors, fallbacks = names.index("errors"), names.index("fallbacks")
    assert sums[0][-1, errors] > 0
    assert sums[1][-1, errors] == 0
    assert len(sums[0][:, fallbacks].unique()) > 2
    sums[0][:, errors] = 0
    assert sums[0].equal(sums[1])


def test_the_last_step_of_an_epoch_has_the_remaining_images() -> None:
    """24 images in batches of 10: the loss of the third step is the mean over the last 4, each seen once an epoch."""
    terms = terms_of(erm=ERM)
    state = fresh()
    plan = plan_of(terms, 100, batch=10)
    state.sums = sums_of(plan)
    step = Step(plan, data(), state)
    step.begin_epoch(1)
    for number in range(2):
        step(number)
    model, before = copy.deepcopy(state.model), state.sums.read()
    step(2)
    draws = draw_epoch(terms, 24, 10, (11, "stage2"), 1, 9, 3)
    order = draws["order"].flatten()
    assert order[:24].sort().values.tolist() == list(range(24))
    last = order[20:24]
    logits = model(data().batches.batch(last, draws["augment"][2, :4])).detach()
    shifted = logits + torch.tensor(COUNTS).log()
    expected = sum(shifted[b].logsumexp(0) - shifted[b, LABELS[i]] for b, i in enumerate(last.tolist())) / 4
    added = {name: value - before[name] for name, value in state.sums.read().items()}
    assert added["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert added["correct"] == (logits.argmax(1) == LABELS[last]).sum()
    assert added["correct"] + added["errors"] == 4


def test_batch_norm_sees_the_images_of_all_terms_together() -> None:
    terms = terms_of(erm=ERM, cp={**CP, "ratio": "beta", "alpha": 1e-3})
    state = fresh()
    seen: list[Tensor] = []
    state.model.bn1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    fit(plan_of(terms, 1), data(), state, publish=never)
    (maps,) = seen
    assert maps.shape == (48, 16, 8, 8)
    pixels = maps.transpose(0, 1).reshape(16, -1).double()
    norm = state.model.bn1
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * pixels.mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * pixels.var(1), rtol=1e-5, atol=1e-7)


def test_crops_are_uniform_over_nine_by_nine_offsets_and_half_are_flipped() -> None:
    """100 epochs of the recipe for CIFAR, seen in the pixels: a chi-square of 80 degrees of freedom, and a binomial."""
    recipe = load("cifar100-lt/cpmix")
    terms = compile_stage(recipe.stage1)
    # Each pixel holds its own row and column, so the crop can be read from it.
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    image = torch.stack([rows, columns, rows], 2).to(torch.uint8)
    plain = recipe.data.model_copy(update={"normalisation": "none"})
    batches = ImageBatches(image.expand(128, -1, -1, -1), plain, [], [])
    offsets, flips = torch.zeros(9, 9), 0.0
    for epoch in range(1, 101):
        draws = draw_epoch(terms, 128, 128, (0, "stage1"), epoch, 9, 3)
        x = (batches.batch(draws["order"][0], draws["augment"][0]) * 255).round()
        middle = x[:, :, 16, 15:17].long()  # inside the image whatever the crop: row + top - 3
        flipped = middle[:, 1, 0] > middle[:, 1, 1]
        top = middle[:, 0, 0] - 13
        left = torch.where(flipped, middle[:, 1, 0] - 13, middle[:, 1, 0] - 12)
        offsets.index_put_((top, left), torch.ones(128), accumulate=True)
        flips += flipped.sum()
    assert offsets.sum() == 12_800
    expected = 12_800 / 81
    assert ((offsets - expected) ** 2 / expected).sum() < 137  # exceeded once in 10,000 sets of draws
    assert abs(flips - 6400) < 4 * math.sqrt(12_800 / 4)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    (term,) = terms_of(erm={"loss": "cross-entropy"})
    term = replace(term, functions={"loss": lambda logits, labels, weights, class_counts: weights})
    batch = TermBatch(torch.empty(0), torch.tensor([0, 1, 1]))
    with pytest.raises(UsageError, match=r'loss "cross-entropy" of term erm returns shape \[3\], not a scalar'):
        term.loss(Output(torch.zeros(1, 3, 2)), batch, torch.tensor([5, 2]))
