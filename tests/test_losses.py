"""Losses and class weights against loops, hand-worked cases, published values and limits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EQ_9, drawn, slow_loss, terms_of
from torch import Tensor

from cpmix_cli import losses
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.training.objective import Output, TermBatch

COUNTS = torch.tensor([100, 40, 10, 2])
CASES: list[tuple[str, dict[str, Any]]] = [
    ("cross-entropy", {}),
    ("balanced-softmax", {}),
    ("logit-adjusted", {"tau": 1.5}),
    ("logit-adjusted", {"tau": 0.8, "uniform_share": 0.15}),
    ("focal", {"gamma": 1.0}),
    ("focal", {"gamma": 0.5}),
    ("sigmoid-focal", {"gamma": 2.0}),
    ("ldam", {"max_margin": 0.5, "scale": 30.0}),
    ("lade", {"lader_weight": 0.3, "remine": 0.2}),
    ("label-aware-smoothing", {"smooth_head": 0.4, "smooth_tail": 0.1}),
    ("label-aware-smoothing", {"smooth_head": 0.4, "smooth_tail": 0.1, "over": "all"}),
]


def test_every_loss_has_a_case() -> None:
    assert {name for name, _ in CASES} == set(losses.LOSSES)


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
def test_loss_and_gradient_equal_a_plain_loop(
    name: str, parameters: dict[str, Any], generator: torch.Generator
) -> None:
    logits, labels, weights = drawn(generator)
    found = losses.LOSSES[name](logits, labels, weights, COUNTS, **parameters)
    expected = slow_loss(name, logits, labels.tolist(), list(weights), COUNTS.tolist(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_balanced_softmax_equals_logit_adjustment_bayias_and_lade(generator: torch.Generator) -> None:
    """Balanced Softmax = logit adjustment at tau 1 = Bayias = LADE without its regulariser, for any scale of counts."""
    logits, labels, weights = drawn(generator)
    pi = COUNTS / COUNTS.sum()
    same = {
        "balanced softmax": losses.balanced_softmax(logits, labels, weights, COUNTS),
        "logit adjustment": losses.logit_adjusted(logits, labels, weights, COUNTS, tau=1.0),
        "scaled counts": losses.balanced_softmax(logits, labels, weights, 7 * COUNTS),
        "bayias": (weights * F.cross_entropy(logits + pi.log() - math.log(1 / 4), labels, reduction="none")).mean(),
        "lade": losses.lade(logits, labels, weights, COUNTS, lader_weight=0.0, remine=0.5),
    }
    first, *others = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in same.values())
    for name, gradient in zip(list(same)[1:], others, strict=True):
        torch.testing.assert_close(gradient, first, msg=name)


def test_losses_become_cross_entropy_at_their_limits(generator: torch.Generator) -> None:
    logits, labels, weights = drawn(generator)
    plain = losses.cross_entropy(logits, labels, weights, COUNTS)
    for loss in (
        losses.balanced_softmax(logits, labels, weights, torch.full((4,), 37)),
        losses.logit_adjusted(logits, labels, weights, COUNTS, tau=0.0),
        losses.logit_adjusted(logits, labels, weights, COUNTS, uniform_share=1.0),
        losses.focal(logits, labels, weights, COUNTS, gamma=0.0),
        losses.ldam(logits, labels, weights, COUNTS, max_margin=0.0, scale=30.0),
        losses.label_aware_smoothing(logits, labels, weights, COUNTS, smooth_head=0.0, smooth_tail=0.0),
    ):
        torch.testing.assert_close(loss, plain)
    targets = F.one_hot(labels, 4).float()
    bce = (weights * F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)).mean()
    torch.testing.assert_close(losses.sigmoid_focal(logits, labels, weights, COUNTS, gamma=0.0), bce)


def test_no_uniform_share_leaves_every_bit(generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        logits, labels, weights = (t.detach().to(dtype) if t.is_floating_point() else t for t in drawn(generator))
        old = losses.cross_entropy(logits + 0.7 * COUNTS.to(dtype).log(), labels, weights, COUNTS)
        assert losses.logit_adjusted(logits, labels, weights, COUNTS, tau=0.7).equal(old)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_the_raw_logits_learn_one_prior_however_the_labels_are_drawn(tau: float) -> None:
    """Best logits without features, for labels of the natural prior, a mixture and the uniform one: n^(1 - tau)."""
    wanted = (1 - tau) * (COUNTS / COUNTS.sum()).double().log()
    for share in (0.0, 0.3, 1.0):
        q = (1 - share) * COUNTS / COUNTS.sum() + share / 4
        logits = wanted.clone().requires_grad_()
        loss = losses.logit_adjusted(
            logits.expand(4, 4), torch.arange(4), 4 * q.double(), COUNTS, tau=tau, uniform_share=share
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.abs().max() < 1e-7, share


def test_the_mixture_s_prior_is_that_of_labels_drawn_from_both(generator: torch.Generator) -> None:
    """Logits of the best classifier without features: log of the shares of 85 % natural and 15 % uniform labels."""
    natural = torch.multinomial(COUNTS / 152, 170_000, replacement=True, generator=generator)
    labels = torch.cat([natural, torch.randint(0, 4, (30_000,), generator=generator)])
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    prior = {"tau": 1.0, "uniform_share": 0.15}
    loss = losses.logit_adjusted(logits.expand(200_000, 4), labels, torch.ones(200_000), COUNTS, **prior)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 0.005  # the raw logits of a uniform prior are right
    loss = losses.balanced_softmax(logits.expand(200_000, 4), labels, torch.ones(200_000), COUNTS)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0] > 0.05


@pytest.mark.parametrize("loss", [losses.focal, losses.sigmoid_focal])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_losses_have_finite_gradients_for_confident_predictions(
    loss: Callable[..., Tensor], gamma: float
) -> None:
    """1 - p rounds to 0 from a gap of 17 on, where its square root has an infinite slope."""
    for gap in (1.0, 18.0, 60.0, 200.0):
        logits = torch.tensor([[gap, -gap, -gap]], requires_grad=True)
        loss(logits, torch.tensor([0]), torch.ones(1), torch.tensor([9, 3, 1]), gamma=gamma).backward()
        assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(("rho", "head"), [(100, 0.158), (200, 0.126), (10, 0.281)])
def test_ldam_margins_on_cifar_100_equal_the_published_ones(rho: float, head: float) -> None:
    """Published for n_max 500: the rarest class has exactly 0.5, the largest what stands here."""
    counts = torch.from_numpy(exponential_counts(500, 100, rho))
    zeros, one = torch.zeros(1, 100), torch.ones(1)
    for label, margin in ((0, head), (99, 0.5)):
        loss = float(losses.ldam(zeros, torch.tensor([label]), one, counts, scale=30.0))
        # Against 99 zeros, log(99 + exp(-30 m)) + 30 m.
        assert loss == pytest.approx(
            math.log(99 + math.exp(-30 * margin)) + 30 * margin, abs=0.02 if label == 0 else 1e-4
        )


@pytest.mark.parametrize(("rho", "head", "tail"), [(100, 0.045, 4.38), (200, 0.024, 5.78), (10, 0.258, 2.52)])
def test_effective_numbers_on_cifar_100_equal_the_published_ones(rho: float, head: float, tail: float) -> None:
    weights = losses.effective_number(torch.from_numpy(exponential_counts(500, 100, rho)), beta=0.9999)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0]) == pytest.approx(head, abs=6e-4)
    assert float(weights[99]) == pytest.approx(tail, abs=6e-3)


def test_effective_number_goes_from_equal_to_inverse_weights() -> None:
    assert losses.effective_number(COUNTS, beta=0.0).tolist() == [1.0] * 4
    inverse = 1 / COUNTS.double()
    torch.testing.assert_close(
        losses.effective_number(COUNTS, beta=1 - 1e-9), inverse / inverse.mean(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("over", ["others", "all"])
def test_label_aware_smoothing_smooths_frequent_classes_more(over: Any) -> None:
    """The gradient of cross entropy is p - q, so the target q can be read from it."""
    for label, eps in ((0, 0.4), (3, 0.1)):
        logits = torch.zeros(1, 4, requires_grad=True)
        loss = losses.label_aware_smoothing(
            logits, torch.tensor([label]), torch.ones(1), COUNTS, smooth_head=0.4, smooth_tail=0.1, over=over
        )
        target = 0.25 - torch.autograd.grad(loss, logits)[0][0]
        assert float(target.sum()) == pytest.approx(1)
        own = 1 - eps if over == "others" else 1 - eps + eps / 4
        assert float(target[label]) == pytest.approx(own)
        assert float(target[1]) == pytest.approx((1 - own) / 3)


def test_two_hard_labels_are_one_soft_label(generator: torch.Generator) -> None:
    logits, first, lam = drawn(generator)
    second = torch.randint(0, 4, (7,), generator=generator)
    soft = lam[:, None] * F.one_hot(first, 4) + (1 - lam[:, None]) * F.one_hot(second, 4)
    expected = F.cross_entropy(logits + COUNTS.log(), soft)
    found = losses.balanced_softmax(logits, first, lam, COUNTS) + losses.balanced_softmax(
        logits, second, 1 - lam, COUNTS
    )
    torch.testing.assert_close(found, expected)


# -- balanced experts --------------------------------------------------------------------------------------------------


def of_experts(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of three experts [3, 7, 4], labels and weights."""
    logits, labels, weights = drawn(generator)
    return torch.stack([logits, -logits, 2 * logits + 1]).detach().double().requires_grad_(), labels, weights.double()


@pytest.mark.parametrize("share", [0.0, 0.15])
def test_balanced_experts_equal_a_plain_loop(share: float, generator: torch.Generator) -> None:
    """Also by their gradient, and that of numbers."""
    logits, labels, weights = of_experts(generator)
    taus = [0.0, 1.0, 2.0]
    found = losses.balanced_experts(logits, labels, weights, COUNTS, taus=taus, uniform_share=share)
    total = torch.zeros(())
    for z, tau in zip(logits, taus, strict=True):
        keys = {"tau": tau, "uniform_share": share}
        total = total + slow_loss("logit-adjusted", z, labels.tolist(), list(weights), COUNTS.tolist(), keys)
    expected = total / 3
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(
        lambda z: losses.balanced_experts(z, labels, weights, COUNTS, taus=taus, uniform_share=share), logits
    )


def test_one_balanced_expert_is_balanced_softmax(generator: torch.Generator) -> None:
    logits, labels, weights = drawn(generator)
    found = losses.balanced_experts(logits[None], labels, weights, COUNTS, taus=[1.0])
    assert found.equal(losses.balanced_softmax(logits, labels, weights, COUNTS))


def test_mixed_labels_of_balanced_experts_are_soft_labels(generator: torch.Generator) -> None:
    """Through the term, which calls the loss for both labels; the experts' mean is taken once."""
    logits, first, lam = of_experts(generator)
    second = torch.randint(0, 4, (7,), generator=generator)
    (term,) = terms_of(
        erm={"loss": "balanced-experts", "taus": [0.0, 1.0, 2.0], "partner": "permutation", **EQ_9, "alpha": 0.4}
    )
    found = term.loss(Output(logits), TermBatch(torch.empty(0), first, second, lam), COUNTS)
    soft = lam[:, None] * F.one_hot(first, 4) + (1 - lam[:, None]) * F.one_hot(second, 4)
    prior = (COUNTS / COUNTS.sum()).double().log()
    expected = sum(F.cross_entropy(z + tau * prior, soft) for tau, z in enumerate(logits)) / 3
    torch.testing.assert_close(found, expected)


def test_the_mean_of_balanced_experts_is_for_a_uniform_prior() -> None:
    """Each expert at its optimum has z_e = log p(y | x) - tau_e log pi; the mean is log p(x | y) + constant."""
    pi = (COUNTS / COUNTS.sum()).double()
    likelihood = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    posterior = likelihood * pi / (likelihood * pi).sum()
    logits = torch.stack([posterior.log() - tau * pi.log() for tau in (0, 1, 2)]).requires_grad_()
    labels = torch.arange(4)
    loss = losses.balanced_experts(
        logits[:, None].expand(3, 4, 4), labels, 4 * posterior, COUNTS, taus=[0.0, 1.0, 2.0]
    )  # the expected loss of an image with these likelihoods
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.zeros(3, 4, dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(logits.mean(0).softmax(0), likelihood, rtol=1e-6, atol=0)
