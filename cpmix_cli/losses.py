"""Losses, regularisers and class weights: add one here.

Shapes: E experts (1 of a plain network), B batch, C classes. A loss is

    loss(logits [B, C], labels [B], weights [B], class_counts [C], *, parameters) -> scalar

with hard labels. A mixed batch calls it twice, L(y1, lam) + L(y2, 1 - lam), so no loss knows of mixing: with a loss
that is linear in the labels that is its soft-label form. `weights` are the mixing weights times the class weights; the
scalar is their weighted sum over B, divided by B. It is taken of each expert, and the sum is what counts; one that
treats experts differently (ENSEMBLE_LOSSES) has logits [E, B, C]. A regulariser knows no labels, and is added once:

    regulariser(logits [E, B, C], class_counts [C], reweighting [1], *, parameters) -> scalar

`reweighting` is 1 in epochs whose class weights count, else 0. What a teacher says is learnt by

    distillation(logits [E, B, C], teacher [B, C], *, parameters) -> scalar

which is added once too. Routers (models.Routers) are trained by a loss that has their logits [E - 1, B] as well:

    routing(logits [E, B, C], routes [E - 1, B], labels [B], *, parameters) -> scalar

Class weights are

    class_weights(class_counts [C], *, parameters) -> [C], of mean 1

All are found by name in the dictionaries at the foot; keyword-only parameters become recipe keys of a term. What a
loss needs of the rest of the recipe stands in NEEDS, below the dictionaries; recipes are refused that do not have it.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cpmix_cli.experts import target_classes
from cpmix_cli.recipe.functions import Needs

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """[B] -> [B, C] bool. torch's one_hot looks at the labels first, which makes the host wait."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor) -> Tensor:
    """(1/B) sum_b w_b (-z_y + log sum_c exp z_c). Paper: Eq. (1) with l = cross entropy."""
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


def logit_adjusted(
    logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor, *, tau: NonNegative = 1.0
) -> Tensor:
    """Cross entropy of z + tau log n; the raw logits are used at test time.

    Source: Menon et al., Long-tail learning via logit adjustment; n for the prior adds a constant to all
    logits of an image, which cross entropy does not see.
    """
    return cross_entropy(logits + tau * class_counts.to(logits.dtype).log(), labels, weights, class_counts)


def balanced_softmax(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor) -> Tensor:
    """Cross entropy of z + log n: the softmax under the training prior. The raw logits are used at test time.

    Paper: l_ERM, Sec. 4.3 (from Ren et al., Balanced Meta-Softmax). With equal counts it is cross entropy; for a
    uniform test prior it is also the Bayias loss of UniMix (Xu et al.).
    """
    return logit_adjusted(logits, labels, weights, class_counts, tau=1.0)


def focal(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor, *, gamma: NonNegative) -> Tensor:
    """(1/B) sum_b w_b (1 - p_y)^gamma (-log p_y), p the softmax; gamma = 0 is cross entropy.

    Source: Lin et al., Focal loss, on the softmax. Differs: LDAM-DRW's code (and what descends from it) takes p
    as exp(-w CE), so that class weights bend the modulation too.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (weights * _chance_of_error(losses) ** gamma * losses).mean()


def _chance_of_error(losses: Tensor) -> Tensor:
    """1 - exp(-loss), exact where it is small and never 0, where a power of it below 1 has no finite slope."""
    return (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)


def sigmoid_focal(
    logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor, *, gamma: NonNegative
) -> Tensor:
    """(1/B) sum_b w_b sum_c (1 - p_bc)^gamma BCE(z_bc, [c = y_b]), p the sigmoid's chance of what is true of class c;
    gamma = 0 is the sigmoid cross entropy.

    Source: Cui et al., Class-balanced loss; wants `model.head_bias = "rare"`.
    """
    targets = _one_hot(labels, logits.shape[1]).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (weights * (_chance_of_error(losses) ** gamma * losses).sum(1)).mean()


def ldam(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    max_margin: NonNegative = 0.5,
    scale: Positive,
) -> Tensor:
    """Cross entropy of z - scale m_y e_y with margins m_c = max_margin (n_min / n_c)^(1/4).

    Args:
        logits: scale times cosines, as `model.head = "cosine"` gives them.
        max_margin: of the rarest class, as a cosine.
        scale: `model.head_scale`.

    Source: Cao et al., LDAM-DRW, and its code, which multiplies by s in the loss: the same.
    """
    margins = max_margin * (class_counts.min() / class_counts.to(logits.dtype)) ** 0.25
    shift = scale * _one_hot(labels, logits.shape[1]) * margins
    return cross_entropy(logits - shift, labels, weights, class_counts)


def lade(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    lader_weight: NonNegative,
    remine: NonNegative,
    importance: Literal["sample"] = "sample",
) -> Tensor:
    """Balanced Softmax + lader_weight sum_c pi_c (-T1_c + T2_c + remine T2_c^2).

    T1_c is the mean logit c over the batch's images of class c (0 without one); T2_c the log of the mean of exp z_c
    over the batch under a uniform prior, that is with image b weighted by 1 / (C pi_y_b).

    Args:
        lader_weight: alpha of the paper.
        remine: lambda of its regularisation.
        importance: the one way to bring T2 to the uniform prior: by the class of each image.

    Source: Hong et al., LADE. Differs: the released code weights by the prior of the column, 1 / (C pi_c).
    """
    prior = class_counts.to(logits.dtype) / class_counts.sum()
    batch_size, num_classes = logits.shape
    own = _one_hot(labels, num_classes).to(logits.dtype)
    mean_own = (own * logits).sum(0) / own.sum(0).clamp(min=1)
    uniform = torch.logsumexp(logits - torch.log(num_classes * prior[labels][:, None]), 0) - math.log(batch_size)
    regulariser = (prior * (-mean_own + uniform + remine * uniform**2)).sum()
    return balanced_softmax(logits, labels, weights, class_counts) + lader_weight * weights.mean() * regulariser


def label_aware_smoothing(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    smooth_head: Fraction,
    smooth_tail: Fraction,
    over: Literal["others", "all"] = "others",
) -> Tensor:
    """Cross entropy with labels smoothed by eps_y, between smooth_head for the largest class and smooth_tail for the
    smallest: eps_y = tail + (head - tail) sin(pi/2 (n_y - n_min) / (n_max - n_min)).

    Args:
        over: the classes that eps is spread over: the C - 1 others, as the paper says. Differs: the code spreads it
            over all, the true one included: "all".

    Source: Zhong et al., MiSLAS.
    """
    counts = class_counts.to(logits.dtype)
    place = (counts[labels] - counts.min()) / (counts.max() - counts.min()).clamp(min=1)
    eps = smooth_tail + (smooth_head - smooth_tail) * torch.sin(math.pi / 2 * place)
    log_p = F.log_softmax(logits, 1)
    own = log_p.gather(1, labels[:, None]).squeeze(1)
    if over == "all":
        smoothed = log_p.mean(1)
    else:
        smoothed = (log_p.sum(1) - own) / (logits.shape[1] - 1)
    return (weights * -((1 - eps) * own + eps * smoothed)).mean()


# -- losses across experts ---------------------------------------------------------------------------------------------


def sade(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor, *, tau: NonNegative = 2.0) -> Tensor:
    """Three experts of different skill: cross entropy; Balanced Softmax; and cross entropy of z + log pi - tau log pi',
    where pi' has the priors of pi in reversed rank, so that the rarest class has the largest.

    Args:
        logits: [3, B, C].
        tau: of the third: 2 for CIFAR-100-LT and ImageNet-LT, 1 for Places-LT and iNaturalist.

    Source: Zhang et al., SADE, Eq. (3) to (5). Classes of equal count take their places in the order of their ids.
    """
    order = class_counts.argsort(stable=True)
    reversed_counts = torch.empty_like(class_counts).scatter(0, order, class_counts[order.flip(0)])
    inverse = class_counts.to(logits.dtype).log() - tau * reversed_counts.to(logits.dtype).log()
    return (
        cross_entropy(logits[0], labels, weights, class_counts)
        + balanced_softmax(logits[1], labels, weights, class_counts)
        + cross_entropy(logits[2] + inverse, labels, weights, class_counts)
    )


def ace(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    interference: NonNegative = 1.0,
    measure: Literal["norm"] = "norm",
) -> Tensor:
    """For each expert, over the images of the classes that it answers for: cross entropy, and the size of its logits of
    the other classes, which it is not to be confident of; divided by all images of the batch.

    Args:
        logits: [E, B, C], E >= 2.
        interference: factor of that size.
        measure: the one measure of size: the L2 norm.

    Source: Cai et al., ACE, from its description; the code is not at hand. Which classes are whose: see
    experts.target_classes(). Differs: form and factor of the second part are not settled; third-party code has the
    norm (sums of squares diverge at a learning rate of 0.1). Divided by its own images alone, two or three rare ones
    would move the shared stages as much as a whole batch.
    """
    targets = target_classes(class_counts, len(logits))
    total = logits.new_zeros(())
    for z, own in zip(logits, targets, strict=True):
        chosen = weights * own[labels].to(weights.dtype)
        losses = F.cross_entropy(z, labels, reduction="none")
        others = torch.linalg.vector_norm(z * ~own, dim=1)
        total = total + (chosen * (losses + interference * others)).mean()
    return total


def routing(logits: Tensor, routes: Tensor, labels: Tensor, *, pos_weight: Positive = 100.0) -> Tensor:
    """Sigmoid cross entropy of the routers: after expert i an image wants the next where the mean of the experts so far
    is wrong, and that with some later ones is right.

    Args:
        pos_weight: factor of those images.

    Source: Wang et al., RIDE, Sec. 3.4 and its code.
    """
    so_far = logits.cumsum(0)  # the mean has the same largest class
    right = (so_far.argmax(2) == labels).long()  # [E, B]
    later = right.flip(0).cumsum(0).flip(0)[1:] > 0
    wanted = (later & (right[:-1] == 0)).to(routes.dtype)
    factor = torch.where(wanted > 0, pos_weight, 1.0)
    return F.binary_cross_entropy_with_logits(routes, wanted, factor)


# -- regularisers ------------------------------------------------------------------------------------------------------


def expert_diversity(
    logits: Tensor,
    class_counts: Tensor,
    reweighting: Tensor,
    *,
    diversity: float,
    temperature_spread: Fraction = 0.0,
    against: Literal["mean"] = "mean",
) -> Tensor:
    """- diversity mean(T)^2 sum_e KL(q || p_e): experts that differ from their mean are rewarded.

    p_e is the softmax of z_e / T, q that of the mean logits, without a gradient. T is 1 until class weights count, then
    T_c = C pi_c s + 1 - s over its largest, s the spread: lower for rare classes.

    Args:
        diversity: lambda; below 0 experts are drawn together.
        temperature_spread: s; 0 where no class weights come, and T stays 1.
        against: the one reference: the mean expert.

    Source: Wang et al., RIDE, and its code, which the paper's numbers come from. Differs: Eq. (2) and (3) of the paper
    have the mean over the other experts of KL(p_e || p_j).
    """
    prior = class_counts.to(logits.dtype) / class_counts.sum()
    spread = len(prior) * prior * temperature_spread + 1 - temperature_spread
    temperature = torch.where(reweighting > 0, spread / spread.max(), 1.0).to(logits.dtype)
    log_p = F.log_softmax(logits / temperature, 2)
    reference = F.log_softmax(logits.detach().mean(0) / temperature, 1)
    divergence = (reference.exp() * (reference - log_p)).sum(2).mean(1).sum()
    return -diversity * temperature.mean() ** 2 * divergence


# -- what a teacher says -----------------------------------------------------------------------------------------------


def distillation(
    logits: Tensor,
    teacher: Tensor,
    *,
    temperature: Positive = 1.5,
    factor: NonNegative = 1.0,
    of: Literal["experts"] = "experts",
) -> Tensor:
    """factor T^2 sum_e KL(q || p_e), q and p_e the softmax of the teacher's and each expert's logits over T.

    Args:
        temperature: T.
        factor: 0 learns nothing from the teacher.
        of: the one student: each expert.

    Source: Wang et al., RIDE, Sec. 3.3 and its code. Differs: the released code has the experts' mean logits learn, and
    leaves the teacher in training mode, so that its statistics drift; here it is in eval mode.
    """
    target = F.log_softmax(teacher / temperature, 1)
    log_p = F.log_softmax(logits / temperature, 2)
    return factor * temperature**2 * (target.exp() * (target - log_p)).sum(2).mean(1).sum()


# -- class weights -----------------------------------------------------------------------------------------------------


def effective_number(class_counts: Tensor, *, beta: BelowOne) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), scaled to mean 1; beta = 0 weights all alike.

    Source: Cui et al., Class-balanced loss.
    """
    counts = class_counts.to(torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return weights / weights.mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross-entropy": cross_entropy,
    "balanced-softmax": balanced_softmax,
    "logit-adjusted": logit_adjusted,
    "focal": focal,
    "sigmoid-focal": sigmoid_focal,
    "ldam": ldam,
    "lade": lade,
    "label-aware-smoothing": label_aware_smoothing,
}
ENSEMBLE_LOSSES: dict[str, Callable[..., Tensor]] = {"sade": sade, "ace": ace}
ROUTING_LOSSES: dict[str, Callable[..., Tensor]] = {"routing": routing}
REGULARISERS: dict[str, Callable[..., Tensor]] = {"expert-diversity": expert_diversity}
DISTILLATIONS: dict[str, Callable[..., Tensor]] = {"distillation": distillation}
CLASS_WEIGHTS: dict[str, Callable[..., Tensor]] = {"effective-number": effective_number}
NEEDS: dict[Callable[..., Tensor], Needs] = {
    ldam: Needs(
        {"model.head": ["cosine"]}, "it takes its margins off scaled cosines", repeats={"scale": "model.head_scale"}
    ),
    sade: Needs({"model.experts": [3]}, "each of its experts has a loss of its own"),
    ace: Needs({"model.experts": range(2, 101)}),
    routing: Needs({"finetune.head": ["routers"]}, stage="finetune"),
    expert_diversity: Needs(idle_without={"temperature_spread": "reweight"}),
    distillation: Needs(stage="stage1"),
}
"""Function -> what it needs beside its parameters."""
