"""Averaged weights: an exponential moving average over the steps, and the statistics of its batch norm."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpmix_cli.runtime import ranks
from cpmix_cli.training.inputs import STEPS_AHEAD, TrainingData
from cpmix_cli.training.plan import Plan
from cpmix_cli.training.randomness import seed_torch, torch_generator
from cpmix_cli.training.state import TrainingState


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, share: Tensor) -> None:
    """Move the average towards the network's weights: a <- (1 - share) a + share w, in place.

    Args:
        average: network of the same architecture on the same device.
        network: the network in training.
        share: scalar float32 on the device; see Plan.average_share().
    """
    for own, new in zip(average.parameters(), network.parameters(), strict=True):
        own.lerp_(new, share)


@torch.no_grad()
def measure_statistics(
    plan: Plan, data: TrainingData, state: TrainingState, check: Callable[[], None] = lambda: None
) -> None:
    """Compute the batch norm statistics of the averaged network, from one pass over the augmented training images.

    The average of statistics would not be the statistics of the averaged weights. Each image is seen once, in an order
    and with an augmentation that only seed, phase and epoch decide. The statistics of the batches are averaged over
    images. Frozen modules keep theirs. All ranks compute the same.

    Args:
        plan: plan of the phase.
        data: training split.
        state: its average changes in place.
        check: called before each batch; may raise.
    """
    network = state.average
    assert network is not None
    for own, theirs in zip(network.buffers(), state.model.buffers(), strict=True):
        own.copy_(theirs)  # those of frozen modules may be pretrained
    network.train()
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
    generator, place = torch_generator(plan.seed, plan.phase, state.epoch, "average"), data.batches.device
    seed_torch(data.labels.device, plan.seed, plan.phase, state.epoch, "average", "dropout")
    num_images, num_uniforms = len(data.labels), data.batches.num_uniforms
    order = torch.randperm(num_images, generator=generator)
    uniforms = torch.rand(num_images, num_uniforms, dtype=torch.float64, generator=generator)
    size = -(-plan.batch_size // (plan.micro_batches * ranks.current().size))
    parts = [slice(first, first + size) for first in range(0, num_images, size)]
    requests = [(order[part].to(place), uniforms[part].to(place)) for part in parts]
    momentum, seen = norms[0].momentum, 0
    for number, (index, own) in enumerate(requests):
        check()
        for coming in requests[number : number + STEPS_AHEAD + 1]:
            data.batches.prefetch(*coming)
        seen += len(index)
        for norm in norms:
            norm.momentum = len(index) / seen  # share of this batch: the mean over all images so far
        x = data.batches.batch(index, own)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            network.features(x)
    for norm in norms:
        norm.momentum = momentum
