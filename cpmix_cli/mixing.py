"""Partners, matches, ratios, mixes and label rules: add a mixing method here.

A mixed term is draw -> partner -> match -> ratio -> mix -> label -> loss. Each step is one function, and the
dictionaries at the end give it its name in recipes. Keyword-only parameters become recipe keys of the term; an
Annotated pydantic Field gives their range. Shapes: B images per batch, K = 1 or B, C classes, E experts, D features.

    partner(uniforms [B], labels [B], state) -> positions in the batch [B] (BATCH_PARTNERS)
                                                or classes [B] (CLASS_PARTNERS)
    match(f1, y1, f2, y2, state)             -> position in the batch of the image to mix with each partner [B]
    ratio(drawn [K], n1 [B], n2 [B])         -> lambda_x [K]
    mix(x1, x2, lam [K], uniforms [K, V])    -> mixed inputs [B, ...] and the resulting lambda_x [K] (MIXES),
                                                or mixed features [B, E, D] and lambda_x (FEATURE_MIXES)
    label(lam [K], n1 [B], n2 [B])           -> lambda_y [B]

Args of all of them (1: the sampled batch, 2: its partners):
    uniforms: random numbers in [0, 1), float64; V per image for a mix (see MIX_UNIFORMS), E D for a mix of features.
    labels, y1, y2: classes of the images [B] int64.
    state: class counts and confusion counts, see MixingState.
    f1, f2: features of the network in eval mode [B, D].
    drawn: samples of Beta(alpha, alpha) [K] float64.
    n1, n2: training images of the classes of each pair [B].
    x1, x2: inputs [B, ...], images are [B, channels, H, W]; or features [B, E, D].
    lam: share of x1 in the mixed input, lambda_x [K]; 1 if the batch stays unmixed. Of a mix that draws without a ratio
        (`replaces` in NEEDS) it is 0 otherwise.

After a class partner, an image of that class is drawn uniformly. A match may call other libraries and synchronise with
the device, so a stage with a match is not captured as a CUDA graph. Paper: Sec. 2.2, 4.
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
    """Counts that partners and matches may read."""

    class_counts: Tensor
    """Training images per class [C] int64, after build-lt's truncation."""
    confusion: Tensor
    """Confusion counts K [C, C] float64: row true, column predicted."""
    num_fallbacks: Tensor
    """Scalar float64: draws of this step from a class without confusions. Partners add to it in place."""
    counted_images: Tensor | None = None
    """Images per class [C] float64 whose predictions K counts, right or wrong; None unless the recipe has a match."""


# -- partners in the batch ---------------------------------------------------------------------------------------------


def permutation(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """Pair by a random permutation of the batch: mixup of Zhang et al., and RegMixup. Paper: Eq. (16), App. A."""
    return uniforms.argsort()


def unimix(uniforms: Tensor, labels: Tensor, state: MixingState, *, sample_tau: float) -> Tensor:
    """Sample an image of the batch with probability proportional to n_y ** sample_tau, with replacement.

    Args:
        sample_tau: exponent. The batch follows n, so the partners' classes follow n ** (1 + sample_tau). Far below 0,
            the rarest image of a batch is the partner of nearly all images.

    Source: UniMix's released code, sample_tau = -0.1 on CIFAR-100. Differs: tau of the paper (Xu et al.) is -1 and
    applies to classes among all images: see `frequency_power`.
    """
    weights = state.class_counts[labels].to(torch.float64) ** sample_tau
    return draw_weighted(weights.expand(len(labels), -1), uniforms)


# -- partner classes ---------------------------------------------------------------------------------------------------


def confusion(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """Sample a class from the confusions of each label's class. Paper: Algorithm 1, Sec. 4.3."""
    classes, fell_back = draw_confused(state.confusion, labels, uniforms)
    state.num_fallbacks += fell_back.sum()
    return classes


def class_uniform(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """Sample any other class uniformly: the control that keeps class balance and ignores confusions."""
    weights = torch.ones(len(labels), len(state.class_counts), dtype=torch.float64, device=labels.device)
    return draw_weighted(weights.scatter_(1, labels[:, None], 0.0), uniforms)


def random(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """Sample the class of a random training image, own class included: the control without class balance."""
    frequencies = state.class_counts.to(torch.float64).expand(len(labels), -1)
    return draw_weighted(frequencies, uniforms)


def frequency_power(uniforms: Tensor, labels: Tensor, state: MixingState, *, power: float) -> Tensor:
    """Sample a class with probability proportional to n_c ** power, whatever the label.

    Args:
        power: exponent: 0 for uniform classes, -1 for inverse frequency, 1 for the training distribution.

    Source: Park et al., CMO, whose released code weights images by n^-1: power = 0; Xu et al., UniMix: power = -1.
    """
    weights = state.class_counts.to(torch.float64) ** power
    return draw_weighted(weights.expand(len(labels), -1), uniforms)


def fixed(uniforms: Tensor, labels: Tensor, state: MixingState, *, pairs: list[list[int]]) -> Tensor:
    """Return the class that `pairs` assigns to each label; a class without a pair is mixed with itself.

    Args:
        pairs: pairs of class ids; each pair counts in both directions.

    Paper: Sec. 3.1, Fig. 2(d).
    """
    partner = labels
    for a, b in pairs:  # where(): torch 2.14 would copy numbers that are assigned to elements from the host
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
    """Match partners k to images j by optimal transport: argmax_j T_kj of the entropic transport plan T.

    The cost is w (1 - cos(f_k, f_j)) + (1 - w) (1 - P(class of j | class of k)). P is the share of all images of a
    class that were predicted as another class: a row of K divided by the counted images of the class.

    Args:
        feature_weight: w, share of the feature distance in the cost.
        regularisation: weight of the entropy.

    Source: Gao et al., OTmix. Differs: here features are pooled, in eval mode and without gradient. The released CIFAR
    code takes them before the pooling in train mode, which updates batch norm's statistics two more times per step.
    """
    import ot

    f1, f2 = (F.normalize(f.double(), dim=1) for f in (f1, f2))
    assert state.counted_images is not None
    confused = (state.confusion[y2] / state.counted_images[y2, None].clamp(min=1e-12))[:, y1]
    cost = feature_weight * (1 - f2 @ f1.t()) + (1 - feature_weight) * (1 - confused)
    even = torch.full((len(y1),), 1 / len(y1), dtype=cost.dtype, device=cost.device)
    # Logarithmic domain, because exp(-cost / regularisation) = exp(-100) underflows in float32.
    plan = ot.sinkhorn(even, even, cost, regularisation, method="sinkhorn_log", stopThr=1e-6, warn=False)
    return torch.as_tensor(plan).argmax(1)


# -- ratios ------------------------------------------------------------------------------------------------------------


def beta(drawn: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """Return lambda ~ Beta(alpha, alpha), the draws themselves. Paper: Sec. 2.2."""
    return drawn


def unimix_ratio(drawn: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """Return (drawn + n2 / (n1 + n2)) mod 1; for alpha < 1 most values lie near n2 / (n1 + n2).

    Source: Xu et al., UniMix. Requires `per_sample = true`.
    """
    return (drawn + n2.to(torch.float64) / (n1 + n2)) % 1.0


# -- mixes -------------------------------------------------------------------------------------------------------------


def linear(x1: Tensor, x2: Tensor, lam: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return lambda x1 + (1 - lambda) x2. Paper: Eq. (7)."""
    weight = lam.to(x1.dtype).view(-1, *[1] * (x1.dim() - 1))
    return weight * x1 + (1 - weight) * x2, lam


def box(x1: Tensor, x2: Tensor, lam: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a box of x2 into x1; the resulting lambda is the remaining area share of x1.

    The box has sqrt(1 - lambda) of the image's height and width, rounded down to even pixels. Its centre is uniform
    over the image (V = 2); parts outside the image are cut off.

    Source: Yun et al., CutMix, and its code.
    """
    edges = []
    for axis, length in enumerate(x1.shape[2:]):
        half = (length * (1 - lam).sqrt()).long() // 2  # [K]
        centre = (uniforms[:, axis] * length).long()
        place = torch.arange(length, device=x1.device)
        edges.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))
    inside = edges[0][:, :, None] & edges[1][:, None, :]  # [K, H, W]
    return torch.where(inside[:, None], x2, x1), 1 - inside.double().mean((1, 2))


def channels(x1: Tensor, x2: Tensor, lam: Tensor, uniforms: Tensor, *, p: Fraction) -> tuple[Tensor, Tensor]:
    """Overwrite int(p D) random channels of each expert's features; the resulting lambda is the share of those left.

    Args:
        x1, x2: features [B, E, D], or maps [B, E, D, ...]: with average pooling this is the same.
        lam: see above.
        uniforms: one for each channel [K, E D]; those with the smallest are overwritten.
        p: share of the channels.

    Source: Li et al., H2T, and its code: p = 0.25, one set of channels per step and expert.
    """
    experts, width = x1.shape[1:3]
    rank = uniforms.view(-1, experts, width).argsort(2).argsort(2)
    taken = (rank < int(p * width)) & (lam < 1).view(-1, 1, 1)  # [K, E, D]
    mixed = torch.where(taken.view(*taken.shape, *[1] * (x1.dim() - 3)), x2, x1)
    return mixed, 1 - taken.double().mean((1, 2))


# -- label rules -------------------------------------------------------------------------------------------------------


def same_ratio(lam: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """Return lambda_y = lambda, the labels of vanilla mixup. Paper: Eq. (3)."""
    return lam.expand(len(n1))


def first(lam: Tensor, n1: Tensor, n2: Tensor) -> Tensor:
    """Return lambda_y = 1: only the label of the term's own image."""
    return torch.ones_like(lam).expand(len(n1))


def imbalance_aware(lam: Tensor, n1: Tensor, n2: Tensor, *, t: Fraction) -> Tensor:
    """Return lambda_y = t lambda + (1 - t) n2 / (n1 + n2), which favours the rarer class. Paper: Eq. (9).

    Args:
        t: weight of lambda; 1 is vanilla mixup. Swapping the pair and lambda with 1 - lambda gives the same label.
    """
    rarity = n2.to(torch.float64) / (n1 + n2)
    return t * lam + (1 - t) * rarity


def remix(lam: Tensor, n1: Tensor, n2: Tensor, *, min_ratio: AtLeastOne = 3.0, threshold: Fraction = 0.5) -> Tensor:
    """Label with only the rarer class if the pair is imbalanced and the more frequent class has a small share.

    Args:
        min_ratio: least ratio of the two class counts for the rule to apply; kappa of the paper.
        threshold: share of the more frequent class below which it applies; tau of the paper.

    Otherwise lambda_y = lambda. Source: Chou et al., Remix.
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
FEATURE_MIXES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"channels": channels}
MIX_UNIFORMS = {"linear": 0, "box": 2}
"""V: random numbers per image that a mix of inputs uses."""
LABELS: dict[str, Callable[..., Any]] = {
    "lambda": same_ratio,
    "first": first,
    "imbalance-aware": imbalance_aware,
    "remix": remix,
}
NEEDS: dict[Callable[..., Any], Needs] = {
    fixed: Needs(class_pairs="pairs"),
    transport: Needs(package="ot", extra="transport"),
    box: Needs(images=True),
    channels: Needs(
        {"finetune.train": [["head"], ["head."], ["head.weight"], ["head.scale"]]},
        "features are mixed without a gradient",
        stage="finetune",
        replaces=("ratio", "alpha"),
    ),
}
"""Function -> its requirements beyond its own parameters."""
