"""Weights of the experts, learnt from test images without labels (SADE).

Shapes: E experts, N images, C classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmix_cli.recipe.schema import Optimizer

_EPOCHS = 5
_BATCH = 128
_LEAST_WEIGHT = 0.05  # learning stops after an epoch if a weight is below: the weights would collapse on the others


def images_to_learn_from(labels: Tensor, profile: Tensor | None, generator: torch.Generator) -> Tensor:
    """Choose the test images from which the weights are learnt, in random order.

    Args:
        labels: true classes [N] int64; read only to draw a subset of the profile.
        profile: images per class [C] of a long-tailed test set; None: all N images.
        generator: gives the random order; advances in place.

    Returns:
        Positions of the images, [n] int64.
    """
    chosen = torch.randperm(len(labels), generator=generator)
    if profile is None:
        return chosen
    rank = torch.zeros_like(chosen)
    for c in range(len(profile)):
        own = chosen[labels[chosen] == c]
        rank[own] = torch.arange(len(own))
    return chosen[rank[chosen] < profile[labels[chosen]]]


Views = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(positions of images [B], number of the call from 0) -> expert logits of two augmented views, each [E, B, C]."""


def learn_expert_weights(views: Views, chosen: Tensor, num_experts: int, recipe: Optimizer, seed: int) -> Tensor:
    """Learn the weights of the experts for which the predictions of two views of an image agree most, without labels.

    Args:
        views: gives the expert logits of two views of test images.
        chosen: positions of the test images to learn from [n] int64.
        num_experts: E.
        recipe: [optimizer] of the recipe: SGD's learning rate, momentum, Nesterov and weight decay. SGD acts on the
            weights before a softmax.
        seed: seed of the order of the images.

    Returns:
        Weights [E] float32 with sum 1.

    Source: Zhang et al., SADE, Sec. 4.2, and its code: mean cosine of the two softmaxes, 5 epochs, batches of 128.
    Differs: SGD also where the recipe's kind is another.
    """
    generator = torch.Generator().manual_seed(seed)
    free = torch.zeros(num_experts, requires_grad=True)
    optimizer = torch.optim.SGD(
        [free], lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
    )
    call = 0
    for _ in range(_EPOCHS):
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for batch in torch.split(order, _BATCH):
            first, second = (torch.einsum("e,ebc->bc", free.softmax(0), z).softmax(1) for z in views(batch, call))
            optimizer.zero_grad()
            (-F.cosine_similarity(first, second).mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            call += 1
        if free.detach().softmax(0).round(decimals=2).min() < _LEAST_WEIGHT:  # rounded, as its code has it
            break
    return free.detach().softmax(0)


def weakly_changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random view of each image: crop, colour jitter, greyscale, blur, flip.

    Shapes: [B, H, W, channels] uint8 -> the same.

    Source: Zhang et al., SADE, its code for CIFAR: jitter 0.4, 0.4, 0.4, 0.1 with probability 0.8, grey 0.2, blur 0.2.
    """
    from torchvision.transforms import v2  # the import takes a second, and other evaluations do not need it

    change = v2.Compose(
        [
            v2.RandomCrop(list(images.shape[1:3]), padding=4),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.2),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: seed a copy
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([change(image) for image in images.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)
