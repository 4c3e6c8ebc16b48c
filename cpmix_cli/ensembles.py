"""Several experts in one network: which classes each answers for, and how their logits become one.

Shapes: E experts, N images, C classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmix_cli.data.longtail import FEW_BELOW, MANY_ABOVE
from cpmix_cli.models import Classifier
from cpmix_cli.recipe import Optimizer

TEST_TIME_EPOCHS = 5
TEST_TIME_BATCH = 128
LEAST_WEIGHT = 0.05
"""Below it for any expert the learning of weights ends: what follows is a collapse on the others."""


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
        logits: raw.
        how: `evaluation.aggregate`: "mean"; "targets", with heads scaled to the size of the first and, for each class,
            the mean over the experts that answer for it; else with these weights, where there are.
        model: whose head weights have the sizes.
        class_counts: [C].
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


def images_to_learn_from(labels: Tensor, profile: Tensor | None, generator: torch.Generator) -> Tensor:
    """Positions of the test images that weights are learnt from, in random order: all, or so many of each class.

    Args:
        labels: [N]; which class an image is of is looked at for its number alone.
        profile: images a class [C], as many as there are at most; None for all.
        generator: of the order, and of which images of a class they are.
    """
    chosen = torch.randperm(len(labels), generator=generator)
    if profile is None:
        return chosen
    rank = torch.zeros_like(chosen)
    for c in range(len(profile)):
        own = chosen[labels[chosen] == c]
        rank[own] = torch.arange(len(own))
    return chosen[rank[chosen] < profile[labels[chosen]]]


def weights_of_agreement(
    views: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    chosen: Tensor,
    num_experts: int,
    recipe: Optimizer,
    seed: int,
) -> Tensor:
    """The weights of the experts [E], of sum 1, under which predictions of two views of an image agree most. No label
    is looked at.

    Args:
        views: positions of images [B] and the number of the call -> expert logits of two augmented views, [E, B, C].
        chosen: positions of the test images.
        num_experts: E.
        recipe: [optimizer]: rate, momentum, Nesterov and weight decay of SGD on weights that go through a softmax.
        seed: of the order.

    Source: Zhang et al., SADE, Sec. 4.2, and its code: mean cosine of the two softmaxes, 5 epochs, batches of 128.
    Differs: SGD also where the recipe's kind is another.
    """
    generator = torch.Generator().manual_seed(seed)
    free = torch.zeros(num_experts, requires_grad=True)
    optimizer = torch.optim.SGD(
        [free], lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
    )
    call = 0
    for _ in range(TEST_TIME_EPOCHS):
        for batch in torch.split(chosen[torch.randperm(len(chosen), generator=generator)], TEST_TIME_BATCH):
            weights = free.softmax(0)
            if weights.min() < LEAST_WEIGHT:
                return weights.detach()
            first, second = (torch.einsum("e,ebc->bc", weights, z).softmax(1) for z in views(batch, call))
            optimizer.zero_grad()
            (-F.cosine_similarity(first, second).mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            call += 1
    return free.detach().softmax(0)


def weakly_changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of each image [B, H, W, channels] uint8: crop, colours, grey, blur, flip.

    Source: Zhang et al., SADE, its code for CIFAR: jitter 0.4, 0.4, 0.4, 0.1 with probability 0.8, grey 0.2, blur 0.2.
    """
    from torchvision.transforms import v2  # a second of import that other evaluations do not need

    change = v2.Compose(
        [
            v2.RandomCrop(list(images.shape[1:3]), padding=4),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.2),
            v2.RandomHorizontalFlip(),
        ]
    )
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: it gets one of ours
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.stack([change(image) for image in images.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)
