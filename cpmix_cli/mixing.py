"""Partners, ratios, mixes and label rules: add a mixing method here.

Shapes: B batch, C classes. A mixed term is draw -> partner -> ratio -> mix -> label -> loss, and each step is one
function found by its name in the dictionaries at the foot. Keyword-only parameters become recipe keys of the term; an
Annotated pydantic Field gives their range.

    partner(uniforms [B], labels [B], state) -> positions in the batch [B] (BATCH_PARTNERS)
                                                or classes [B] (CLASS_PARTNERS)
    ratio(generator, shape)                  -> lambda_x of that shape, drawn ahead of an epoch
    mix(x1, x2, lam [B or 1])                -> mixed inputs, and lambda_x as it came out
    label(lam, n1 [B], n2 [B])               -> lambda_y [B]

A class partner is followed by a uniform draw of an image of that class. Paper: Sec. 2.2 and 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from cpmix_cli.confusion import draw_confused, draw_weighted

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass
class MixingState:
    """What partners may look at."""

    class_counts: Tensor
    """Training images a class [C] int64, as truncated by build-lt."""
    confusion: Tensor
    """K [C, C] float64."""
    num_fallbacks: Tensor
    """Scalar float64: draws of this epoch whose class had no confusion yet. Partners add to it in place."""


# -- partners in the batch ---------------------------------------------------------------------------------------------


def permutation(uniforms: Tensor, labels: Tensor, state: MixingState) -> Tensor:
    """A random permutation of the batch: the mixup of Zhang et al. and RegMixup. Paper: Eq. (16), App. A."""
    return uniforms.argsort()


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


def fixed(uniforms: Tensor, labels: Tensor, state: MixingState, *, pairs: list[list[int]]) -> Tensor:
    """The class paired with each class beforehand, both ways; classes of no pair are mixed within themselves.

    Args:
        pairs: class ids two by two.

    Paper: Sec. 3.1, Fig. 2(d).
    """
    partner = torch.arange(len(state.class_counts), device=labels.device)
    for a, b in pairs:
        partner[a], partner[b] = b, a
    return partner[labels]


# -- ratios ------------------------------------------------------------------------------------------------------------


def beta(generator: np.random.Generator, shape: tuple[int, ...], *, alpha: Positive) -> NDArray[np.float64]:
    """lambda ~ Beta(alpha, alpha). Paper: Sec. 2.2."""
    return generator.beta(alpha, alpha, size=shape)


# -- mixes -------------------------------------------------------------------------------------------------------------


def linear(x1: Tensor, x2: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """lambda x1 + (1 - lambda) x2. Paper: Eq. (7)."""
    weight = lam.to(x1.dtype).view(-1, *[1] * (x1.dim() - 1))
    return weight * x1 + (1 - weight) * x2, lam


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


BATCH_PARTNERS: dict[str, Callable[..., Tensor]] = {"permutation": permutation}
CLASS_PARTNERS: dict[str, Callable[..., Tensor]] = {
    "confusion": confusion,
    "class-uniform": class_uniform,
    "random": random,
    "fixed": fixed,
}
RATIOS: dict[str, Callable[..., NDArray[np.float64]]] = {"beta": beta}
MIXES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"linear": linear}
LABELS: dict[str, Callable[..., Any]] = {
    "lambda": same_ratio,
    "imbalance-aware": imbalance_aware,
}
