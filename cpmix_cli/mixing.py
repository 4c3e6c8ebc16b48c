"""Partners, matches, ratios, mixes and label rules: add a mixing method here.

Shapes: B batch, K = 1 or B, C classes. A mixed term is draw -> partner -> match -> ratio -> mix -> label -> loss, and
each step is one function found by its name in the dictionaries at the foot. Keyword-only parameters become recipe keys
of the term; an Annotated pydantic Field gives their range.

    partner(uniforms [B], labels [B], state) -> positions in the batch [B] (BATCH_PARTNERS)
                                                or classes [B] (CLASS_PARTNERS)
    match(f1, y1, f2, y2, state)             -> for each partner the position of its image in the batch [B]
    ratio(drawn [K], n1 [B], n2 [B])         -> lambda_x [K], from draws of Beta(alpha, alpha)
    mix(x1, x2, lam [K], uniforms [K, V])    -> mixed inputs, and lambda_x as it came out; V: see MIX_UNIFORMS
    label(lam [K], n1 [B], n2 [B])           -> lambda_y [B]

1 is the batch that was drawn, 2 its partners; f are features [B, D] of the network in eval mode. A class partner is
followed by a uniform draw of an image of that class.
A match may run other libraries and wait for the device, so a stage that has one is no CUDA graph. Paper: Sec. 2.2, 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cpmix_cli.confusion import draw_confused, draw_weighted
from cpmix_cli.recipe.functions import Needs

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AtLeastOne = Annotated[float, Field(ge=1)]


@dataclass
class MixingState:
    """What partners and matches may look at."""

    class_counts: Tensor
    """Training images a class [C] int64, as truncated by build-lt."""
    confusion: Tensor
    """K [C, C] float64."""
    num_fallbacks: Tensor
    """Scalar float64: draws of this step whose class had no confusion yet. Partners add to it in place."""


# -- partners in the batch ---------------------------------------------------------------------------------------------


def permutation(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """A random permutation of the batch: the mixup of Zhang et al. and RegMixup. Paper: Eq. (16), App. A."""
    return uniforms.argsort()


def unimix(uniforms: Tensor, labels: Tensor, state: MixingState, *, sample_tau: float) -> Tensor:
    """An image of the batch with probability in proportion to n_y ** sample_tau, with replacement.

    The batch itself goes by n, so a partner's class goes by n ** (1 + sample_tau). Far below 0 the one rarest image of
    a batch is the partner of nearly all. Source: UniMix's released code, sample_tau = -0.1 on CIFAR-100. Differs: the
    tau of the paper (Xu et al.) is that of classes among all images, -1: `frequency_power`.
    """
    weights = state.class_counts[labels].to(torch.float64) ** sample_tau
    return draw_weighted(weights.expand(len(labels), -1), uniforms)


# -- partner classes ---------------------------------------------------------------------------------------------------


def confusion(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """A class that the model takes `labels` for. Paper: Algorithm 1, Sec. 4.3."""
    classes, fell_back = draw_confused(state.confusion, labels, uniforms)
    state.num_fallbacks += fell_back.sum()
    return classes


def class_uniform(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """Any other class, all alike: the control that keeps class balance and drops confusion."""
    weights = torch.ones(len(labels), len(state.class_counts), dtype=torch.float64, device=labels.device)
    return draw_weighted(weights.scatter_(1, labels[:, None], 0.0), uniforms)


def random(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """The class of a random training image, its own included: the control without balance or confusion."""
    frequencies = state.class_counts.to(torch.float64).expand(len(labels), -1)
    return draw_weighted(frequencies, uniforms)


def frequency_power(uniforms: Tensor, labels: Tensor, state: MixingState, *, power: float) -> Tensor:
    """A class with probability in proportion to n_c ** power, whatever the own one is: 0 draws classes uniformly, -1 by
    their inverse frequency, 1 as they are.

    Source: Park et al., CMO, whose released code weights images by n^-1: power = 0; Xu et al., UniMix: power = -1.
    """
    weights = state.class_counts.to(torch.float64) ** power
    return draw_weighted(weights.expand(len(labels), -1), uniforms)


def fixed(uniforms: Tensor, labels: Tensor, state: MixingState, *, pairs: list[list[int]]) -> Tensor:
    """The class paired with each class beforehand, both ways; classes of no pair are mixed within themselves. `pairs`
    has class ids two by two. Paper: Sec. 3.1, Fig. 2(d).
    """
    partner = labels
    for a, b in pairs:  # numbers in where() stay with the operation; assigned to an element, torch 2.14 sends them over
        partner = torch.where(labels == a, b, torch.where(labels == b, a, partner))
    return partner


# -- matches -----------------------------------------------------------------------------------------------------------


def transport(
    f1: Tensor,
    y1: Tensor,
    f2: Tensor,
    y2: Tensor,
    state: MixingState,
    *,
    feature_weight: Fraction = 0.05,
    regularisation: Positive = 0.01,
) -> Tensor:
    """The image that optimal transport sends each partner to: argmax_j T_kj of the entropic plan between partners k and
    images j, at cost w (1 - cos(f_k, f_j)) + (1 - w) (1 - P(j's class | k's class)), w the feature_weight, P the rows
    of the confusions.

    Args:
        regularisation: of the entropy.

    Source: Gao et al., OTmix. Differs: features are pooled, in eval mode and without a gradient; the
    released CIFAR code takes them before the pool in train mode, which moves batch norm's statistics twice more a step.
    """
    import ot

    f1, f2 = (F.normalize(f.double(), dim=1) for f in (f1, f2))
    rows = state.confusion[y2]
    confused = (rows / rows.sum(1, keepdim=True).clamp(min=1e-12))[:, y1]
    cost = feature_weight * (1 - f2 @ f1.t()) + (1 - feature_weight) * (1 - confused)
    even = torch.full((len(y1),), 1 / len(y1), dtype=cost.dtype, device=cost.device)
    # In the logarithmic domain: at a cost of 1 and a regularisation of 0.01, exp(-100) is 0 in float32.
    plan = ot.sinkhorn(even, even, cost, regularisation, method="sinkhorn_log", stopThr=1e-6, warn=False)
    return torch.as_tensor(plan).argmax(1)


# -- ratios ------------------------------------------------------------------------------------------------------------


def beta(drawn: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """lambda ~ Beta(alpha, alpha). Paper: Sec. 2.2."""
    return drawn


def unimix_ratio(drawn: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """lambda ~ Beta(alpha, alpha) shifted by n2 / (n1 + n2), round the circle: for alpha < 1 most often near that.

    Source: Xu et al., UniMix; wants `per_sample = true`.
    """
    return (drawn + n2.to(torch.float64) / (n1 + n2)) % 1.0


# -- mixes -------------------------------------------------------------------------------------------------------------


def linear(x1: Tensor, x2: Tensor, lam: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """lambda x1 + (1 - lambda) x2. Paper: Eq. (7)."""
    weight = lam.to(x1.dtype).view(-1, *[1] * (x1.dim() - 1))
    return weight * x1 + (1 - weight) * x2, lam


def box(x1: Tensor, x2: Tensor, lam: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """x1 with a box of x2 pasted in, of sides sqrt(1 - lambda) those of the image, its centre anywhere and what sticks
    out cut off; lambda is counted again as the share of x1 that is left. V = 2: the centre.

    Source: Yun et al., CutMix, and its code, which cuts the sides down to whole and even pixels.
    """
    edges = []
    for axis, length in enumerate(x1.shape[2:]):
        half = (length * (1 - lam).sqrt()).long() // 2  # [K]
        centre = (uniforms[:, axis] * length).long()
        place = torch.arange(length, device=x1.device)
        edges.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
    inside = edges[0][:, :, None] & edges[1][:, None, :]  # [K, H, W]
    return torch.where(inside[:, None], x2, x1), 1 - inside.double().mean((1, 2))


# -- label rules -------------------------------------------------------------------------------------------------------


def same_ratio(lam: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """lambda_y = lambda: the labels of vanilla mixup. Paper: Eq. (3)."""
    return lam.expand(len(n1))


def imbalance_aware(lam: Tensor, n1: Tensor, n2: Tensor, *, t: Fraction) -> Tensor:
    """lambda_y = t lambda + (1 - t) n2 / (n1 + n2): leans to the rarer class. Paper: Eq. (9).

    Swapping the pair and taking 1 - lambda gives the same target; t = 1 is vanilla mixup.
    """
    rarity = n2.to(torch.float64) / (n1 + n2)
    return t * lam + (1 - t) * rarity


def remix(lam: Tensor, n1: Tensor, n2: Tensor, *, min_ratio: AtLeastOne = 3.0, threshold: Fraction = 0.5) -> Tensor:
    """The rarer class alone where the counts differ by min_ratio or more and lambda of the commoner one is below the
    threshold; else lambda. Source: Chou et al., Remix: kappa and tau.
    """
    lam = lam.expand(len(n1))
    to_second = (n1 >= min_ratio * n2) & (lam < threshold)
    to_first = (n2 >= min_ratio * n1) & (1 - lam < threshold)
    return torch.where(to_first, 1.0, torch.where(to_second, 0.0, lam))


BATCH_PARTNERS: dict[str, Callable[..., Tensor]] = {"permutation": permutation, "unimix": unimix}
CLASS_PARTNERS: dict[str, Callable[..., Tensor]] = {
    "confusion": confusion,
    "class-uniform": class_uniform,
    "random": random,
    "frequency-power": frequency_power,
    "fixed": fixed,
}
MATCHES: dict[str, Callable[..., Tensor]] = {"transport": transport}
RATIOS: dict[str, Callable[..., Tensor]] = {"beta": beta, "unimix": unimix_ratio}
MIXES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"linear": linear, "box": box}
MIX_UNIFORMS = {"linear": 0, "box": 2}
"""V, the uniforms that a mix takes."""
LABELS: dict[str, Callable[..., Any]] = {"lambda": same_ratio, "imbalance-aware": imbalance_aware, "remix": remix}
NEEDS: dict[Callable[..., Any], Needs] = {
    fixed: Needs(class_pairs="pairs"),
    transport: Needs(package="ot", extra="transport"),
    box: Needs(images=True),
}
"""Function -> what it needs beside its parameters."""
