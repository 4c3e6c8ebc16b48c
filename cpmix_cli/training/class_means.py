"""A head from class means: the mean features of each class's training images, before stage 1 of a pretrained network.

Source: Shi et al., LIFT, and its code, with a cosine head.
"""

import torch
from torch import Tensor, nn

from cpmix_cli.models import Classifier, CosineHead
from cpmix_cli.runtime import console, ranks
from cpmix_cli.training.inputs import STEPS_AHEAD, TrainingData
from cpmix_cli.training.plan import Plan


@torch.no_grad()
def start_from_class_means(plan: Plan, data: TrainingData, model: Classifier) -> None:
    """Set the head by the class means of the features, from one pass over the images without augmentation.

    The features are those of the network in eval mode, with m_c the mean over class c. A cosine head gets w_c = m_c,
    normalised. A linear head gets w_c = m_c / v and b_c = -|m_c|^2 / (2 v), where v is the mean squared difference of a
    feature from its class mean: the classes are then Gaussians of variance v and equal priors (nearest class mean).
    Each expert has its own features. All ranks compute the same.

    Args:
        plan: plan of stage 1: images of a batch, precision.
        data: training split.
        model: changes in place.
    """
    console.note("stage1: one pass over the training images, for a head from class means")
    counts = data.class_counts.double()[:, None]
    sums = torch.zeros(len(counts), model.num_features, dtype=torch.float64, device=counts.device)
    squares = torch.zeros_like(sums[0])
    model.eval()
    place, size = data.batches.device, -(-plan.batch_size // (plan.micro_batches * ranks.current().size))
    images = torch.arange(len(data.labels), device=place)
    parts = [images[first : first + size] for first in range(0, len(images), size)]
    for number, index in enumerate(parts):
        for coming in parts[number : number + STEPS_AHEAD + 1]:
            data.batches.prefetch(coming, None)
        x = data.batches.plain(index)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            features = model.features(x).double()
        # A product adds in one order; index_add_ on CUDA does not.
        sums += _one_hot(data.labels[index.to(data.labels.device)], len(counts)).T @ features
        squares += features.square().sum(0)
    means = sums / counts
    spread = (squares - (counts * means.square()).sum(0)).chunk(len(model.heads))
    for head, own, left in zip(model.heads, means.chunk(len(model.heads), 1), spread, strict=True):
        if isinstance(head, CosineHead):
            head.weight.copy_(nn.functional.normalize(own, dim=1))
        else:
            assert isinstance(head, nn.Linear)
            variance = (left.sum() / (len(data.labels) * len(left))).clamp_min(torch.finfo(torch.float32).tiny)
            head.weight.copy_(own / variance)
            head.bias.copy_(-own.square().sum(1) / (2 * variance))


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return nn.functional.one_hot(labels, num_classes).double()
