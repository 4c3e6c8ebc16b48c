"""Several experts in one network: the target classes of each, and the combination of their logits.

Shapes: E experts, N images, C classes.
"""

from collections.abc import Callable

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
        how: value of `evaluation.aggregate`; see combiner().
        model: network of these experts.
        class_counts: training images per class [C].
        weights: weights of the experts, [E] or per image [E, N]; they replace `how`.
    """
    if weights is not None:
        return (weights.view(len(logits), -1, 1) * logits).sum(0)
    return combiner(how, model, class_counts)(logits)


def combiner(how: str, model: Classifier, class_counts: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that combines logits of experts without weights: [E, N, C] -> [N, C].

    What it needs of the network is computed here and not in the function, which an exported graph contains.

    Args:
        how: value of `evaluation.aggregate`. "targets" scales z_k to z_k |W_1|^2 / |W_k|^2, W_k the head weights, and
            averages, per class, over the experts that have it as a target. Others are "mean".
        model: network whose heads give |W_k|.
        class_counts: training images per class [C], which determine the targets.

    Source of "targets": Cai et al., ACE, from its description.
    """
    if how != "targets":
        return lambda logits: logits.mean(0)
    sizes = torch.stack([head.weight.detach().square().sum().cpu() for head in model.heads])  # type: ignore[operator]
    targets, scales = target_classes(class_counts, len(sizes))[:, None], (sizes[0] / sizes)[:, None, None]

    def by_targets(logits: Tensor) -> Tensor:
        own = targets.to(logits.dtype)
        return (logits * scales * own).sum(0) / own.sum(0)

    return by_targets


def routed_weights(routes: Tensor, threshold: float) -> Tensor:
    """Return the weights of the experts per image [E, N]: equal for the experts that the image passes, else 0.

    Args:
        routes: logits of the routers [E - 1, N].
        threshold: an image continues to the next expert while the router's probability exceeds it. 0: all images pass
            all experts; 1: only the first.

    Source: Wang et al., RIDE, Sec. 3.4.
    """
    goes_on = (routes.sigmoid() > threshold) | (threshold == 0)  # because a probability may round to 0
    number = torch.arange(1, len(routes) + 1, device=routes.device)[:, None]
    passes = goes_on.long().cumsum(0) == number  # a running product, which ONNX lacks
    through = torch.cat([torch.ones_like(routes[:1]), passes.to(routes.dtype)])
    return through / through.sum(0)
