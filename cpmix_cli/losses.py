"""Losses, regularisers and class weights: add one here.

Shapes: E experts (1 for a plain network), B images per batch, C classes. The kinds of functions are:

    loss(logits [B, C], labels [B], weights [B], class_counts [C], *, parameters) -> scalar
    regulariser(logits [E, B, C], class_counts [C], reweighting [1], *, parameters) -> scalar
    distillation(logits [E, B, C], teacher [B, C], *, parameters) -> scalar
    routing(logits [E, B, C], routes [E - 1, B], labels [B], *, parameters) -> scalar
    class_weights(class_counts [C], *, parameters) -> [C] with mean 1

Args of all of them:
    logits: raw outputs of the network. A loss gets one expert at a time, and the losses of the experts are summed; a
        loss across experts (ENSEMBLE_LOSSES) and all other kinds get all experts [E, B, C].
    labels: hard labels int64. For a mixed batch the loss is called twice, L(y1, lam) + L(y2, 1 - lam). So no loss
        implements mixing; for a loss that is linear in the labels this equals its soft-label form.
    weights: mixing weight times class weight of each image. A loss is their weighted sum over the batch, divided by B.
    class_counts: training images per class int64.
    reweighting: 1 in epochs that use the class weights, else 0.
    teacher: logits of the teacher network.
    routes: logits of the routers (models.Routers).

Regularisers, distillation and routing are added once per term. The dictionaries at the end give each function its name
in recipes. Keyword-only parameters become recipe keys of a term. NEEDS, below the dictionaries, lists other recipe keys
that a function requires; recipes without them are refused.
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
    """Encode labels [B] -> [B, C] bool, without the host synchronisation of torch's one_hot()."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor) -> Tensor:
    """Cross entropy: (1/B) sum_b w_b (-z_y + log sum_c exp z_c). Paper: Eq. (1) with l = cross entropy."""
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


def logit_adjusted(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    tau: NonNegative = 1.0,
    uniform_share: Fraction = 0.0,
) -> Tensor:
    """Cross entropy of the logits z + tau log n, n the class counts; predictions use the raw logits.

    The raw logits learn the prior n^(1 - tau), whatever the share of uniform labels: the loss is that of the logits
    z + log q - (1 - tau) log n, with q = (1 - s) n + s mean(n) the prior of the batches' labels.

    Args:
        tau: strength of the adjustment; 0 is cross entropy and 1 Balanced Softmax, both for s = 0.
        uniform_share: s, share of the labels that are drawn uniformly over the classes, as those of class-uniform
            partners are.

    Source: Menon et al., Long-tail learning via logit adjustment. They use the prior in place of n, which shifts all
    logits of an image by the same constant and leaves cross entropy unchanged.
    """
    n = class_counts.to(logits.dtype)
    drawn = (1 - uniform_share) * n + uniform_share * n.mean()
    shift = tau * n.log() + (drawn.log() - n.log())  # the difference is exactly 0 without uniform labels
    return cross_entropy(logits + shift, labels, weights, class_counts)


def balanced_softmax(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor) -> Tensor:
    """Cross entropy of the logits z + log n, n the class counts: softmax under the training prior.

    Predictions use the raw logits. With equal counts it is cross entropy. For a uniform test prior it is also the
    Bayias loss of UniMix (Xu et al.).

    Paper: l_ERM, Sec. 4.3 (from Ren et al., Balanced Meta-Softmax).
    """
    return logit_adjusted(logits, labels, weights, class_counts, tau=1.0)


def focal(logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor, *, gamma: NonNegative) -> Tensor:
    """Focal loss: (1/B) sum_b w_b (1 - p_y)^gamma (-log p_y), p the softmax.

    Args:
        gamma: exponent that reduces the loss of well-classified images; 0 is cross entropy.

    Source: Lin et al., Focal loss, on the softmax. Differs: LDAM-DRW's code and its descendants compute p as
    exp(-w CE), so there class weights change the modulation too.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (weights * _chance_of_error(losses) ** gamma * losses).mean()


def _chance_of_error(losses: Tensor) -> Tensor:
    """Return 1 - exp(-loss), exact for small values and above 0, where powers below 1 have no finite slope."""
    return (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)


def sigmoid_focal(
    logits: Tensor, labels: Tensor, weights: Tensor, class_counts: Tensor, *, gamma: NonNegative
) -> Tensor:
    """Sigmoid focal loss: (1/B) sum_b w_b sum_c (1 - p_bc)^gamma BCE(z_bc, [c = y_b]).

    p_bc is the sigmoid probability of the true answer to "is image b of class c?".

    Args:
        gamma: exponent that reduces the loss of well-classified images; 0 is sigmoid cross entropy.

    Source: Cui et al., Class-balanced loss. Use it with `model.head_bias = "rare"`.
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
    """Cross entropy after subtracting scale * m_y from the true class's logit, m_c = max_margin (n_min / n_c)^(1/4).

    Args:
        logits: scale * cosine [B, C], the output of `model.head = "cosine"`.
        max_margin: margin of the rarest class, as a cosine.
        scale: the value of `model.head_scale`.

    Source: Cao et al., LDAM-DRW. Its code multiplies by the scale in the loss instead, which is equivalent.
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
    """LADE: Balanced Softmax + lader_weight sum_c pi_c (-T1_c + T2_c + remine T2_c^2), pi the training prior.

    T1_c is the mean of logit c over the batch's images of class c, or 0 if there are none. T2_c is the log of the mean
    of exp z_c over the batch under a uniform prior: image b has importance weight 1 / (C pi_y_b).

    Args:
        lader_weight: alpha of the paper.
        remine: lambda of the paper's regularisation.
        importance: whose prior gives the importance weights. Only "sample": the class of each image.

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
    """Cross entropy with labels smoothed by eps_y = tail + (head - tail) sin(pi/2 (n_y - n_min) / (n_max - n_min)).

    Args:
        smooth_head: eps of the largest class.
        smooth_tail: eps of the smallest class.
        over: classes that share eps: the C - 1 "others", as in the paper, or "all" including the true class.

    Source: Zhong et al., MiSLAS. Differs: the released code has over = "all".
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
    """Sum of three experts' losses: cross entropy, Balanced Softmax, and cross entropy of z + log pi - tau log pi'.

    pi' are the priors pi in reversed rank: the rarest class gets the largest prior. Among classes of equal count, the
    larger id counts as the rarer class.

    Args:
        logits: of exactly three experts [3, B, C].
        tau: strength of the third expert's inverse adjustment: 2 for CIFAR-100-LT and ImageNet-LT, 1 for Places-LT and
            iNaturalist.

    Source: Zhang et al., SADE, Eq. (3) to (5), and its code.
    """
    order = class_counts.argsort(descending=True, stable=True)
    reversed_counts = torch.empty_like(class_counts).scatter(0, order, class_counts[order.flip(0)])
    inverse = class_counts.to(logits.dtype).log() - tau * reversed_counts.to(logits.dtype).log()
    return (
        cross_entropy(logits[0], labels, weights, class_counts)
        + balanced_softmax(logits[1], labels, weights, class_counts)
        + cross_entropy(logits[2] + inverse, labels, weights, class_counts)
    )


def balanced_experts(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    taus: list[NonNegative],
    uniform_share: Fraction = 0.0,
) -> Tensor:
    """Mean over the experts of the cross entropy of z_e + tau_e log n, n the class counts.

    Expert e learns logits for the prior pi^(1 - tau_e), so the mean of the raw logits is for a uniform prior if the
    mean of the taus is 1: `evaluation.aggregate = "mean"`.

    Args:
        logits: of the experts [E, B, C].
        taus: strength of each expert's adjustment [E]; one expert of 1 is Balanced Softmax.
        uniform_share: see logit_adjusted().

    Source: Sanchez Aimar et al., Balanced Product of Calibrated Experts, and its code: taus 0, 1, 2.
    """
    losses = [
        logit_adjusted(z, labels, weights, class_counts, tau=tau, uniform_share=uniform_share)
        for z, tau in zip(logits, taus, strict=True)
    ]
    return torch.stack(losses).mean()


def ace(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    class_counts: Tensor,
    *,
    interference: NonNegative = 1.0,
    measure: Literal["norm"] = "norm",
) -> Tensor:
    """Sum over experts of cross entropy + interference * ||logits of its non-target classes||.

    The loss of an expert covers only images of its target classes (experts.target_classes()), divided by all B images.
    The second term penalises confidence in the other classes.

    Args:
        logits: of at least two experts [E, B, C].
        interference: factor of the second term.
        measure: size of the other logits. Only "norm": the L2 norm.

    Source: Cai et al., ACE, from its description; its code was not available. Differs: form and factor of the second
    term are unsettled. Third-party code has the norm; sums of squares diverge at a learning rate of 0.1. The division
    by B prevents two or three rare images from moving the shared stages as much as a whole batch.
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
    """Sigmoid cross entropy of the routers' logits.

    The target of router i is 1 if the mean of the first i experts is wrong, but correct after some later expert.

    Args:
        logits: of the experts [E, B, C].
        routes: logits of the routers [E - 1, B].
        labels: true classes [B].
        pos_weight: weight of images with target 1.

    Source: Wang et al., RIDE, Sec. 3.4 and its code.
    """
    so_far = logits.cumsum(0)  # the sum has the same argmax as the mean
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
    """Diversity reward: -diversity mean(T)^2 sum_e KL(q || p_e), lower the more the experts differ from their mean.

    p_e is the softmax of z_e / T, q the softmax of the mean logits, detached. T is 1 while class weights are off; then
    T_c = (C pi_c s + 1 - s) / max_c of the same, with s the temperature spread: lower for rare classes.

    Args:
        diversity: lambda of the paper; a negative value makes the experts more alike.
        temperature_spread: s. Must be 0 in terms without class weights.
        against: reference distribution. Only "mean": the mean of the experts.

    Source: Wang et al., RIDE, and its code, which gave the paper's numbers. Differs: Eq. (2) and (3) of the paper
    have the mean over the other experts of KL(p_e || p_j).
    """
    prior = class_counts.to(logits.dtype) / class_counts.sum()
    spread = len(prior) * prior * temperature_spread + 1 - temperature_spread
    temperature = torch.where(reweighting > 0, spread / spread.max(), 1.0).to(logits.dtype)
    log_p = F.log_softmax(logits / temperature, 2)
    reference = F.log_softmax(logits.detach().mean(0) / temperature, 1)
    divergence = (reference.exp() * (reference - log_p)).sum(2).mean(1).sum()
    return -diversity * temperature.mean() ** 2 * divergence


# -- distillation ------------------------------------------------------------------------------------------------------


def distillation(
    logits: Tensor,
    teacher: Tensor,
    *,
    temperature: Positive = 1.5,
    factor: NonNegative = 1.0,
    of: Literal["experts"] = "experts",
) -> Tensor:
    """Distillation: factor T^2 sum_e KL(q || p_e), q and p_e the softmax of the teacher's and expert e's logits / T.

    Args:
        logits: of the experts [E, B, C].
        teacher: logits of the teacher in eval mode [B, C].
        temperature: T.
        factor: weight of the loss; 0 switches distillation off.
        of: student of the loss. Only "experts": each expert.

    Source: Wang et al., RIDE, Sec. 3.3 and its code. Differs: the released code trains the experts' mean logits, and
    keeps the teacher in training mode, so its batch-norm statistics drift.
    """
    target = F.log_softmax(teacher / temperature, 1)
    log_p = F.log_softmax(logits / temperature, 2)
    return factor * temperature**2 * (target.exp() * (target - log_p)).sum(2).mean(1).sum()


# -- class weights -----------------------------------------------------------------------------------------------------


def effective_number(class_counts: Tensor, *, beta: BelowOne) -> Tensor:
    """Class weights (1 - beta) / (1 - beta^n_c), scaled to mean 1; beta = 0 weights all classes equally.

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
ENSEMBLE_LOSSES: dict[str, Callable[..., Tensor]] = {"sade": sade, "ace": ace, "balanced-experts": balanced_experts}
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
    balanced_experts: Needs(per_expert="taus"),
    routing: Needs({"finetune.head": ["routers"]}, stage="finetune"),
    expert_diversity: Needs(idle_without={"temperature_spread": "reweight"}),
    distillation: Needs(stage="stage1"),
}
"""Function -> its requirements beyond its own parameters."""
