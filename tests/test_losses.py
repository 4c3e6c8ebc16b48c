"""Losses against loops and limits."""

import math

import pytest
import torch

from cpmix_cli.losses import LOSSES, balanced_softmax, cross_entropy


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_is_the_weighted_mean_of_a_loop(name: str, generator: torch.Generator) -> None:
    logits = torch.randn(7, 4, generator=generator)
    labels = torch.randint(0, 4, (7,), generator=generator)
    weights = torch.rand(7, generator=generator)
    counts = torch.tensor([100, 40, 10, 2])
    shift = {"cross-entropy": [0.0] * 4, "balanced-softmax": [math.log(n) for n in counts.tolist()]}
    total = 0.0
    for z, y, w in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True):
        z = [a + b for a, b in zip(z, shift[name], strict=True)]
        total += w * (math.log(sum(math.exp(a) for a in z)) - z[y])
    found = LOSSES[name](logits, labels, weights, counts)
    assert float(found) == pytest.approx(total / 7, rel=1e-5)


def test_balanced_softmax_by_hand() -> None:
    # z = (0, 0), n = (3, 1): the rare class has probability 1/4 under the prior.
    logits, one = torch.zeros(1, 2), torch.ones(1)
    found = balanced_softmax(logits, torch.tensor([1]), one, torch.tensor([3, 1]))
    assert float(found) == pytest.approx(math.log(4))


def test_balanced_softmax_with_equal_counts_is_cross_entropy(generator: torch.Generator) -> None:
    logits = torch.randn(9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, ones = torch.randint(0, 6, (9,), generator=generator), torch.ones(9)
    losses = [f(logits, labels, ones, torch.full((6,), 37)) for f in (balanced_softmax, cross_entropy)]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
