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

    Source: Cai et al., ACE, from its description.
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


def combined(logits: Tensor, how: str, model: Classifier, class_counts: Tensor) -> Tensor:
    """One set of logits [N, C] from those of each expert [E, N, C].

    Args:
        logits: raw.
        how: `evaluation.aggregate`: "mean"; or "targets", with heads scaled to the size of the first and, for each
            class, the mean over the experts that answer for it.
        model: whose head weights have the sizes.
        class_counts: [C].

    Source of "targets": Cai et al., ACE, from its description: z_k |W_1|^2 / |W_k|^2.
    """
    if how == "mean":
        return logits.mean(0)
    sizes = torch.stack([head.weight.detach().square().sum().cpu() for head in model.heads])  # type: ignore[operator]
    own = target_classes(class_counts, len(logits)).to(logits.dtype)[:, None]
    scaled = logits * (sizes[0] / sizes)[:, None, None]
    return (scaled * own).sum(0) / own.sum(0)
