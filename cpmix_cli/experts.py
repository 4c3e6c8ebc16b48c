"""Several experts in one network: which classes each answers for, and how their logits become one.

Shapes: E experts, N images, C classes.
"""

import torch
from torch import Tensor

from cpmix_cli.data.longtail import FEW_BELOW, MANY_ABOVE
from cpmix_cli.models import Classifier


def target_classes(class_counts: Tensor, num_experts: int) -> Tensor:
    """The classes that each expert answers for [E, C] bool: the first for all, each later one for fewer and rarer.

    Three experts take all, medium and few, few, where all three groups have classes; otherwise expert k of E takes the
    (E - k) / E rarest classes, k from 0.

    Source: Cai et al., ACE, from its description. Differs: for other numbers than three it is not known where the
    splits lie, so they are equal shares of the classes by rank, whatever the groups are.
    """
    num_classes = len(class_counts)
    rank = class_counts.argsort(descending=True, stable=True).argsort(stable=True)  # 0 is the commonest
    experts = torch.arange(num_experts, device=class_counts.device)[:, None]
    shares = rank * num_experts >= experts * num_classes
    if num_experts != 3:
        return shares
    few, many = class_counts < FEW_BELOW, class_counts > MANY_ABOVE
    groups = torch.stack([torch.ones_like(few), ~many, few])
    complete = many.any() & few.any() & ~(many | few).all()
    return torch.where(complete, groups, shares)


def combined(
    logits: Tensor, how: str, model: Classifier, class_counts: Tensor, weights: Tensor | None = None
) -> Tensor:
    """One set of logits [N, C] from those of each expert [E, N, C].

    Args:
        how: `evaluation.aggregate`: "mean"; "targets", with heads scaled to the size of the first and, for each class,
            the mean over the experts that answer for it; else with these weights, where there are.
        model: whose head weights have the sizes.
        weights: of the experts, [E] or for each image [E, N].

    Source of "targets": Cai et al., ACE, from its description: z_k |W_1|^2 / |W_k|^2.
    """
    if weights is not None:
        return (weights.view(len(logits), -1, 1) * logits).sum(0)
    if how != "targets":
        return logits.mean(0)
    sizes = torch.stack([head.weight.detach().square().sum().cpu() for head in model.heads])  # type: ignore[operator]
    own = target_classes(class_counts, len(logits)).to(logits.dtype)[:, None]
    scaled = logits * (sizes[0] / sizes)[:, None, None]
    return (scaled * own).sum(0) / own.sum(0)


def routed_weights(routes: Tensor, threshold: float) -> Tensor:
    """The weights of the experts for each image [E, N]: equal ones of those that it goes through.

    Args:
        routes: logits of the routers [E - 1, N].
        threshold: an image goes on while the chance is above it; 0 lets every image through all experts, 1 through none
            but the first.

    Source: Wang et al., RIDE, Sec. 3.4.
    """
    goes_on = (routes.sigmoid() > threshold) | (threshold == 0)  # a chance may round to 0
    through = torch.cat([torch.ones_like(routes[:1]), goes_on.to(routes.dtype).cumprod(0)])
    return through / through.sum(0)
