"""Networks: add one here.

A network has `features(x) -> [B, D]` and a linear `head`; a call returns raw logits [B, C]. A network of E experts has
one head per expert on concatenated features [B, E D]. `expert_logits(x)` returns [E, B, C], with E = 1 for a plain
network, and the logits are their mean.

A builder in MODELS takes the number of classes, the shape of one sample and the [model] table. It raises ValueError for
what it does not support. Networks of libraries are in backbones.py. build_model() replaces the linear head if
`model.head` says so.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpmix_cli.recipe.schema import Finetune, Model


class Classifier(nn.Module):
    """Features and a head. A subclass defines features() and creates a linear head."""

    head: nn.Module
    routers: "Routers | None"
    """Routers of a network with several experts, see change_head(); None without."""
    frozen: tuple[str, ...]
    """Names of modules and parameters that the phase never trains; see within()."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = None
        self.frozen = ()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but keep frozen modules in eval mode so that their batch norm keeps its statistics."""
        super().train(mode)
        for name, module in self.named_modules():
            if within(name, self.frozen):
                module.training = False
        return self

    def places_of(self, name: str) -> list[str]:
        """Return the tensors of this network that start from the published tensor `name`."""
        return [name]

    def is_head(self, name: str) -> bool:
        """Return whether a published tensor, or one of cpmix, belongs to a head: these are never the network's."""
        return name.startswith(("head.", "fc."))

    def fitted(self, name: str, tensor: Tensor) -> Tensor:
        """Return a published tensor, or what this network can take of it, such as resampled position embeddings."""
        return tensor

    def draw_weights(self, layer: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
        """Draw the initial weights of a layer: Kaiming-normal (fan in, gain sqrt 2). Source: LDAM-DRW's code."""
        nn.init.kaiming_normal_(layer.weight, generator=generator)

    def features(self, x: Tensor) -> Tensor:
        """Compute features: inputs [B, ...] -> [B, D], or [B, E D] with experts."""
        raise NotImplementedError

    def expert_logits(self, x: Tensor) -> Tensor:
        """Compute raw logits of each expert: inputs [B, ...] -> [E, B, C]."""
        return self.classify(self.features(x))

    def classify(self, features: Tensor) -> Tensor:
        """Compute raw logits of each expert: features [B, D], or [B, E D] with experts -> [E, B, C]."""
        logits: Tensor = self.head(features)
        return logits if isinstance(self.head, ExpertHeads) else logits[None]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits of experts [E, B, C] and routers [E - 1, B]; the routers' gradient stops at their inputs."""
        assert self.routers is not None
        features = self.features(x)
        logits: Tensor = self.head(features)
        return logits, self.routers(features.detach(), logits.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Compute raw logits, the mean over the experts: inputs [B, ...] -> [B, C]."""
        return self.expert_logits(x).mean(0)

    @property
    def heads(self) -> list[nn.Module]:
        """The head of each expert; a plain network has one."""
        return list(self.head) if isinstance(self.head, ExpertHeads) else [self.head]

    @property
    def num_features(self) -> int:
        """D, or E D with experts."""
        weights = [head.get_parameter("weight") for head in self.heads]
        return sum(weight.shape[1] for weight in weights)

    def replace_heads(self, make: Callable[[nn.Linear], nn.Module]) -> None:
        """Replace each linear head by make(head)."""
        made = []
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            made.append(make(head))
        self.head = ExpertHeads(made) if isinstance(self.head, ExpertHeads) else made[0]


def within(name: str, modules: Iterable[str]) -> bool:
    """Return whether `name` is or lies in one of the modules: layer3.1 contains layer3.1.conv1, but not layer3.10."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


class ExpertHeads(nn.ModuleList):
    """One head per expert."""

    def forward(self, features: Tensor) -> Tensor:
        """Apply each head to its features: [B, E D] -> [E, B, C]."""
        return torch.stack([head(own) for head, own in zip(self, features.chunk(len(self), 1), strict=True)])


class CosineHead(nn.Module):
    """Cosine head: logit c = scale * cos(f, w_c). Source: LDAM-DRW's NormedLinear, which scales in the loss."""

    def __init__(self, num_features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits [B, D] -> [B, C] in the weight's precision: bf16 rounds cosines near 1 to two digits."""
        with torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(features.to(self.weight.dtype), dim=1)
            return self.scale * F.linear(directions, F.normalize(self.weight, dim=1))


class ScaledHead(nn.Linear):
    """Linear head times a learnable scale per class, initially 1. Source: LWS of Kang et al., Decoupling."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features)
        self.weight, self.bias = head.weight, head.bias
        self.scale = nn.Parameter(torch.ones_like(head.bias))

    def forward(self, features: Tensor) -> Tensor:
        """Compute s_c (w_c f + b_c): [B, D] -> [B, C]."""
        return self.scale * super().forward(features)


class Routers(nn.Module):
    """Binary classifiers after each expert but the last: whether an image continues to the next expert.

    Router k has two kinds of inputs: the largest mean logits of experts 0 to k, and NUM_UNITS ReLU units. The units
    see the normalised features of expert k.

    Source: Wang et al., RIDE, Sec. 3.4 and its code.
    """

    NUM_UNITS = 16

    def __init__(self, num_experts: int, num_features: int, num_classes: int, top: int) -> None:
        super().__init__()
        self.top = min(top, num_classes)
        self.units = nn.ModuleList(nn.Linear(num_features, self.NUM_UNITS) for _ in range(num_experts - 1))
        self.decide = nn.Linear(self.top + self.NUM_UNITS, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Compute the routers' logits: features [B, E D], logits [E, B, C] -> [E - 1, B]."""
        found = []
        for k, part in enumerate(features.chunk(len(self.units) + 1, 1)[:-1]):
            largest = logits[: k + 1].mean(0).topk(self.top, 1).values
            seen = F.relu(self.units[k](F.normalize(part.to(largest.dtype), dim=1)))
            found.append(self.decide(torch.cat([largest, seen], 1)).squeeze(1))
        return torch.stack(found)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with shortcut A, which has no parameters: strided pixels, zero-padded channels."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride = stride
        self.padding = (num_out - num_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Compute [B, num_in, H, W] -> [B, num_out, H / stride, W / stride]."""
        # In place where the backward pass does not need the input: saves a quarter of the memory, and time.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        out += x
        return F.relu(out, inplace=True)


class CifarResNet(Classifier):
    """ResNet of the CIFAR papers: 3 x 3 stem, three stages of basic blocks at 1, 2 and 4 times the width, average pool.

    ResNet-32 has 5 blocks per stage and width 16: 470,004 parameters for 100 classes of RGB images.
    Source: He et al., Sec. 4.2; as in LDAM-DRW.
    """

    def __init__(self, num_classes: int, num_channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*_basic_stages([width, width, 2 * width, 4 * width], blocks))
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, channels, H, W] -> [B, 4 * width]."""
        out: Tensor = self.blocks(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return out.mean((2, 3))


def _basic_stages(widths: Sequence[int], blocks: int, *, first: int = 0) -> list[BasicBlock]:
    """Make the blocks of stages `first`, `first` + 1, ...; widths[0] are the input channels. Stage 0 has stride 1."""
    made = []
    for number, num_out in enumerate(widths[1:]):
        for block in range(blocks):
            num_in, stride = (num_out, 1) if block else (widths[number], 2 if first + number else 1)
            made.append(BasicBlock(num_in, num_out, stride))
    return made


class Experts(nn.ModuleList):
    """Experts on the same feature maps; if detached, only the first expert's gradient reaches the shared stages."""

    def __init__(self, experts: Iterable[nn.Module], *, detached: bool) -> None:
        super().__init__(experts)
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the experts' outputs: [B, channels, H, W] -> [B, E D, H', W']."""
        first, *later = self
        others = x.detach() if self.detached else x
        return torch.cat([first(x), *(expert(others) for expert in later)], 1)


class CifarExperts(Classifier):
    """A CifarResNet with separate later stages and heads per expert, narrowed by `model.expert_width`.

    Example: ResNet-32 with one shared stage, 3 / 4 of the width and cosine heads for 100 classes. Three experts have
    783,856 parameters, six have 1,543,888.
    Source: Wang et al., RIDE, and its code.
    """

    def __init__(self, num_classes: int, num_channels: int, blocks: int, width: int, recipe: Model) -> None:
        super().__init__()
        shared, experts = recipe.shared_stages, recipe.experts
        if shared > 2:
            raise ValueError(f"model.shared_stages = {shared}: it has 3 stages, and an expert needs one of its own")
        self.conv1 = nn.Conv2d(num_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        self.shared = nn.Sequential(*_basic_stages(widths[: shared + 1], blocks))
        own = [widths[shared], *(round(recipe.expert_width * w) for w in widths[shared + 1 :])]
        if any((b - a) % 2 for a, b in itertools.pairwise(own)):
            raise ValueError(
                f"model.expert_width = {recipe.expert_width:g} gives channels that no shortcut joins: {own}"
            )
        stages = (nn.Sequential(*_basic_stages(own, blocks, first=shared)) for _ in range(experts))
        self.experts = Experts(stages, detached=recipe.detached_experts)
        self.head = ExpertHeads(nn.Linear(own[-1], num_classes) for _ in range(experts))

    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, channels, H, W] -> [B, E D]."""
        out: Tensor = self.experts(self.shared(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return out.mean((2, 3))


class PointNet(Classifier):
    """One hidden layer of ReLU units on 2-D points. Paper: B.1 (100 units)."""

    def __init__(self, num_classes: int, num_inputs: int, num_hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_inputs, num_hidden)
        self.head = nn.Linear(num_hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, num_inputs] -> [B, num_hidden]."""
        return F.relu(self.hidden(x))


class TorchvisionWeights(Classifier):
    """Network with the initial weights of torchvision's ResNets: fan out, and linear layers as torch draws them."""

    def draw_weights(self, layer: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
        """Draw Kaiming-normal weights (fan out, gain sqrt 2) of a convolution, and uniform ones of a linear layer."""
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", generator=generator)
        else:
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)


class ImageNetResNet(TorchvisionWeights):
    """torchvision's ResNet under its parameter names, which published weights use; only `fc` is called `head`."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        network = _torchvision_resnet(name)
        for child, module in network.named_children():
            if child != "fc":
                self.add_module(child, module)
        self.head = nn.Linear(network.fc.in_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, 3, H, W] -> [B, D], the mean of maps of H / 32 x W / 32."""
        for child, module in self.named_children():
            if child != "head":
                x = module(x)
        return x.flatten(1)


class ImageNetExperts(TorchvisionWeights):
    """torchvision's ResNet with separate later stages and heads per expert, narrowed by `model.expert_width`.

    Source: Wang et al., RIDE, and its code: experts of ResNet-50 have 192 and 384 planes instead of 256 and 512, and
    1,536 features.
    """

    def __init__(self, name: str, num_classes: int, recipe: Model) -> None:
        super().__init__()
        shared, experts = recipe.shared_stages, recipe.experts
        if shared > 3:
            raise ValueError(f"model.shared_stages = {shared}: it has 4 stages, and an expert needs one of its own")
        network = _torchvision_resnet(name)
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        block, planes = type(stages[0][0]), [64, 128, 256, 512]
        self.shared = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, *stages[:shared])
        own = [round(recipe.expert_width * p) for p in planes[shared:]]
        lengths = [len(stage) for stage in stages[shared:]]

        def branch() -> nn.Sequential:
            # torchvision's _make_layer() reads the input channels here, and updates them.
            network.inplanes = planes[shared - 1] * block.expansion
            made = (network._make_layer(block, *stage, stride=2) for stage in zip(own, lengths, strict=True))
            return nn.Sequential(*itertools.chain.from_iterable(made))

        self.experts = Experts((branch() for _ in range(experts)), detached=recipe.detached_experts)
        self.head = ExpertHeads(nn.Linear(own[-1] * block.expansion, num_classes) for _ in range(experts))
        # Module of torchvision -> modules here; a block of a separate stage exists once per expert.
        self._places = {"conv1": ["shared.0"], "bn1": ["shared.1"]}
        self._places |= {f"layer{n}": [f"shared.{n + 3}"] for n in range(1, shared + 1)}
        blocks = [f"layer{n}.{b}" for n, length in enumerate(lengths, shared + 1) for b in range(length)]
        self._places |= {block: [f"experts.{e}.{i}" for e in range(experts)] for i, block in enumerate(blocks)}

    def places_of(self, name: str) -> list[str]:
        """Return the shared tensor, or one tensor per expert, that starts from torchvision's tensor `name`."""
        for module, places in self._places.items():
            if name.startswith(f"{module}."):
                return [place + name.removeprefix(module) for place in places]
        return [name]

    def features(self, x: Tensor) -> Tensor:
        """Compute features: [B, 3, H, W] -> [B, E D]."""
        out: Tensor = self.experts(self.shared(x))
        return out.mean((2, 3))


def _torchvision_resnet(name: str) -> Any:
    """Make torchvision's network of that name. ResNet-10, which it lacks, is ResNet-18 with one block per stage."""
    from torchvision.models import resnet  # imported here: it takes a second, and other networks do not need it

    if name == "resnet10":
        return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    return getattr(resnet, name)()


def _initialise(model: Classifier, part: nn.Module, generator: torch.Generator) -> None:
    """Initialise convolutions, linear layers and cosine heads of a network's part in the order of the modules.

    Weights are the network's draw_weights(), and linear biases PyTorch's default. Class vectors of a cosine head are
    uniform in the cube, then normalised.
    """
    with torch.no_grad():
        for module in part.modules():
            if isinstance(module, CosineHead):
                module.weight.uniform_(-1, 1, generator=generator)
                module.weight.copy_(F.normalize(module.weight, dim=1))
            if isinstance(module, nn.Conv2d | nn.Linear):
                model.draw_weights(module, generator)
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    module.bias.uniform_(-bound, bound, generator=generator)


def cifar_resnet(num_classes: int, shape: Sequence[int], recipe: Model, *, blocks: int) -> Classifier:
    """Build a ResNet of the CIFAR papers of width 16, with `model.experts` experts.

    Args:
        num_classes: C.
        shape: (H, W, channels) of an image.
        recipe: table [model].
        blocks: basic blocks per stage.

    Raises:
        ValueError: the samples are points, or the experts' keys do not fit the network.
    """
    if len(shape) != 3:
        raise ValueError(f"takes images, the data set has samples of shape {tuple(shape)}")
    if recipe.experts > 1:
        return CifarExperts(num_classes, shape[-1], blocks, 16, recipe)
    return CifarResNet(num_classes, num_channels=shape[-1], blocks=blocks, width=16)


def imagenet_resnet(num_classes: int, shape: Sequence[int], recipe: Model, *, name: str) -> Classifier:
    """Build one of torchvision's ResNets (stride in the 3 x 3 convolution), with `model.experts` experts.

    Args:
        num_classes: C.
        shape: (H, W, 3) of an image, more than 32 pixels in height and width.
        recipe: table [model].
        name: name of the network in torchvision, or "resnet10".

    Raises:
        ValueError: the samples have another shape, or the experts' keys do not fit the network.
    """
    if recipe.experts > 1 and name.startswith("resnext"):
        raise ValueError(f"model.experts = {recipe.experts}: the groups of its convolutions have no narrower version")
    # At 32 pixels the last feature map has one pixel, so batch norm fails on a last batch of one image.
    if len(shape) != 3 or shape[-1] != 3 or min(shape[:2]) <= 32:
        raise ValueError(
            f"takes RGB images of more than 32 x 32 pixels, the data set has samples of shape {tuple(shape)}"
        )
    if recipe.experts > 1:
        return ImageNetExperts(name, num_classes, recipe)
    return ImageNetResNet(name, num_classes)


def one_hidden_layer(num_classes: int, shape: Sequence[int], recipe: Model) -> Classifier:
    """Build a network of 100 hidden units for points. Paper: B.1.

    Args:
        num_classes: C.
        shape: (number of coordinates,) of a point.
        recipe: table [model].

    Raises:
        ValueError: the samples are images, or the recipe has several experts.
    """
    if len(shape) != 1:
        raise ValueError(f"takes points, the data set has samples of shape {tuple(shape)}")
    if recipe.experts > 1:
        raise ValueError(f"model.experts = {recipe.experts}: it has no stages to share")
    return PointNet(num_classes, num_inputs=shape[-1], num_hidden=100)


MODELS: dict[str, Callable[[int, Sequence[int], Model], Classifier]] = {
    "resnet32": partial(cifar_resnet, blocks=5),  # for 32 x 32 images
    "resnet8": partial(cifar_resnet, blocks=1),  # for 8 x 8 digits: 75,002 parameters at 10 classes of grey images
    # Parameters without the head. ResNet-10 is the smaller network of the ImageNet-LT papers (Liu et al., OLTR).
    "resnet10": partial(imagenet_resnet, name="resnet10"),  # 4.9 million
    "resnet18": partial(imagenet_resnet, name="resnet18"),  # 11.2 million. Source: He et al., Table 1
    "resnet50": partial(imagenet_resnet, name="resnet50"),  # 23.5 million
    "resnet101": partial(imagenet_resnet, name="resnet101"),  # 42.5 million
    "resnet152": partial(imagenet_resnet, name="resnet152"),  # 58.1 million. Paper: Places-LT
    "resnext50": partial(imagenet_resnet, name="resnext50_32x4d"),  # 23.0 million
    "one-hidden-layer": one_hidden_layer,
}


def make_network(recipe: Model, num_classes: int, shape: Sequence[int]) -> Classifier:
    """Make the network of a recipe with a linear head and with any weights: build_model() draws them.

    Args:
        recipe: table [model].
        num_classes: C.
        shape: shape of a sample: (H, W, channels) or (2,).

    Raises:
        ValueError: the network does not support such samples or keys.
        EnvironmentFault: it is of a library that is not installed.
    """
    if recipe.name not in MODELS:
        from cpmix_cli import backbones  # imported here, because it makes Classifiers

        return backbones.make_backbone(recipe, num_classes, shape)
    if recipe.drop_path:
        raise ValueError(f"model.drop_path = {recipe.drop_path:g}: the network has no drop path")
    return MODELS[recipe.name](num_classes, shape, recipe)


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's global CPU generator, with which libraries draw weights, and restore its state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def build_model(recipe: Model, num_classes: int, shape: Sequence[int], generator: torch.Generator) -> Classifier:
    """Build and initialise the network of a recipe.

    Args:
        recipe: table [model].
        num_classes: C.
        shape: shape of a sample: (H, W, channels) or (2,).
        generator: source of the random weights.

    Raises:
        ValueError, EnvironmentFault: see make_network().
    """
    own = recipe.name in MODELS
    with nullcontext() if own else _seeded(generator):
        model = make_network(recipe, num_classes, shape)
    if recipe.head == "cosine":
        model.replace_heads(lambda head: CosineHead(head.in_features, num_classes, recipe.head_scale))
    _initialise(model, model if own else model.head, generator)
    if recipe.head_bias == "rare":
        for head in model.heads:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, -math.log(max(num_classes - 1, 1)))
    model.frozen = tuple(recipe.frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not within(name, model.frozen)
    return model


def change_head(model: Classifier, recipe: Finetune, num_classes: int, generator: torch.Generator) -> None:
    """Prepare the head of a trained network for the finetune, in place, by `finetune.head`.

    Args:
        model: the trained network.
        recipe: table [finetune].
        num_classes: C.
        generator: source of random weights for a new head or routers.
    """
    if recipe.head == "reinit":
        device = next(model.head.parameters()).device
        _initialise(model, model.head.cpu(), generator)  # a generator draws only where it is
        model.head.to(device)
    elif recipe.head == "scale":
        model.replace_heads(ScaledHead)
    elif recipe.head == "routers":
        weight = model.heads[0].weight
        assert isinstance(weight, Tensor)
        routers = Routers(len(model.heads), weight.shape[1], num_classes, recipe.router_top)
        _initialise(model, routers, generator)
        model.routers = routers.to(weight.device)


PUBLISHED_WEIGHTS = {
    "resnet50-0676ba61.pth": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    "resnet152-394f9c45.pth": "394f9c45966e3651a89bbb78a48410a6755854ce4a5ab64927cf1c7247f85e58",
}
"""File name -> SHA-256 of torchvision's weights that recipes name: IMAGENET1K_V1 of ResNet-50 and ResNet-152.

torchvision publishes the first 8 digits in the name. The other digits are those that several projects pin."""
