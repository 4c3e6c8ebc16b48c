"""Several experts in one network: the target classes of each, and the combination of their logits.

Shapes: E experts, N images, C classes.
"""

import torch
from torch import Tensor

from cpmix_cli.data.longtail import FEW_BELOW, MANY_ABOVE
from cpmix_cli.models import Classifier


def target_classes(class_counts: Tensor, num_experts: int) -> Tensor:
    """Return the target classes of each expert [E, C] bool: all classes for the first, fewer and rarer ones for others.

    Three experts have the targets all, medium + few, and few, if each group has classes. Otherwise expert k = 0, 1, ...
    has the rarest (E - k) / E of the classes.

    Source: Cai et al., ACE, from its description. Differs: the splits for other numbers of experts are unknown, so
    they are equal shares of the classes by rank.
    """
    num_classes = len(class_counts)
    rank = class_counts.argsort(descending=True, stable=True).argsort(stable=True)  # 0: most frequent
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
    """Combine the logits of the experts: [E, N, C] -> [N, C].

    Args:
        logits: raw logits of each expert [E, N, C].
        how: value of `evaluation.aggregate`. "targets" scales z_k to z_k |W_1|^2 / |W_k|^2, W_k the head weights, and
            averages, per class, over the experts that have it as a target. Others are "mean" unless `weights` is given.
        model: network whose heads give |W_k|.
        class_counts: training images per class [C], which determine the targets.
        weights: weights of the experts, [E] or per image [E, N]; they replace `how`.

    Source of "targets": Cai et al., ACE, from its description.
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
    """Return the weights of the experts per image [E, N]: equal for the experts that the image passes, else 0.

    Args:
        routes: logits of the routers [E - 1, N].
        threshold: an image continues to the next expert while the router's probability exceeds it. 0: all images pass
            all experts; 1: only the first.

    Source: Wang et al., RIDE, Sec. 3.4.
    """
    goes_on = (routes.sigmoid() > threshold) | (threshold == 0)  # because a probability may round to 0
    through = torch.cat([torch.ones_like(routes[:1]), goes_on.to(routes.dtype).cumprod(0)])
    return through / through.sum(0)
