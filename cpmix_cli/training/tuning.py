"""Tuning of a network: which parameters a phase trains, and the layers by which learning rates fall towards the input.

A layer is a numbered block: `layer1.0` of a ResNet, `blocks.3` of a CIFAR ResNet, `encoder.layers.encoder_layer_5` of a
ViT, `features.3.1` of a ConvNeXt, Swin or EfficientNet, whose downsamplings `features.2` are layers of their own. All
that is before the first block is one layer, the stem. What follows the last block, such as a last norm, belongs to the
head, as in BEiT. Blocks of different experts that are equally far from the head are one layer. Networks of timm say
their own layers.
"""

import re
from collections.abc import Sequence

from torch import nn

from cpmix_cli.backbones import Backbone
from cpmix_cli.models import Classifier, within

_NORM = re.compile(r"norm(act)?(\dd)?$", re.IGNORECASE)
"""Name of the type of a normalisation layer: BatchNorm2d, LayerNorm, RmsNorm, BatchNormAct2d."""
_BIAS = re.compile(r"(^|[._])bias$")
_BLOCK, _INNER = re.compile(r"\d[a-z]?$"), re.compile(r"(^|(block|layer)[\d-]*)\d+$")
"""A numbered part of a name (layer1, 3, Mixed_5b), and a number of a block in it (0, denselayer1, block1-0)."""


def matching(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the parameters that `patterns` name: prefixes, or "norm" (all normalisation layers), "bias" (all biases).

    A prefix may be one of the two words as well, such as the module `norm` of a Swin network.
    """
    norms = {name for name, module in network.named_modules() if _NORM.search(type(module).__name__)}
    return [
        name
        for name, _ in network.named_parameters()
        if name.startswith(tuple(patterns))
        or ("norm" in patterns and name.rpartition(".")[0] in norms)
        or ("bias" in patterns and _BIAS.search(name))
    ]


def set_trained(network: Classifier, train: Sequence[str], frozen: Sequence[str], *, idle_in_eval: bool) -> None:
    """Choose the parameters that a phase trains, in place.

    Args:
        network: the network of the phase.
        train: see matching().
        frozen: names of modules that no phase trains; they stay in eval mode.
        idle_in_eval: modules of which nothing is trained stay in eval mode too: their batch norm keeps its statistics,
            and they drop nothing.
    """
    chosen = set(matching(network, train))
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name in chosen and not within(name, frozen)
    still = list(frozen)
    for name, module in network.named_modules() if idle_in_eval else ():
        own = list(module.parameters())
        if name and own and not within(name, still) and not any(p.requires_grad for p in own):
            still.append(name)
    network.frozen = tuple(still)


def layer_depths(network: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter: 0 in the head and after the last block, 1 in that, most in the stem.

    Source: Bao et al., BEiT, layer-wise learning-rate decay.
    """
    if isinstance(network, Backbone) and (known := network.layer_depths()) is not None:
        return known
    leaves = {name for name, module in network.named_modules() if not any(module.children())}
    names = [name for name, _ in network.named_parameters()]
    blocks = {name: _block_of(name, leaves) for name in names}
    order = list(dict.fromkeys(filter(None, blocks.values())))
    depth_of = {block: len(order) - place for place, block in enumerate(order)}
    depths, outside = {}, len(order) + 1
    for name in names:
        outside = 0 if blocks[name] or name.startswith("head.") else outside
        depths[name] = depth_of.get(blocks[name], outside)
    return depths


def _block_of(parameter: str, leaves: set[str]) -> str:
    """Return the numbered block in which a parameter lies; "" if it is in none, or in the head.

    `leaves` are modules without modules: they belong to what they are in, whatever their numbers.
    """
    parts = parameter.split(".")[:-1]
    start = 2 if parts[:1] == ["experts"] else 0
    first = next((i for i, part in enumerate(parts) if i >= start and _BLOCK.search(part)), len(parts))
    last = first + 1 if first + 1 < len(parts) and _INNER.search(parts[first + 1]) else first
    while last >= first and ".".join(parts[: last + 1]) in leaves:
        last -= 1
    outside = first == len(parts) or last < first or parameter.startswith("head.")
    return "" if outside else ".".join(parts[start : last + 1])
