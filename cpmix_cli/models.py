"""Networks: add one here.

A network has `features(x) -> [B, D]` and a linear `head`; called, it gives raw logits [B, C]. Its builder takes the
number of classes and the shape of one image (H, W, channels) or point (2,), and raises ValueError for a shape it
cannot take. Which head stands on it is [model] head's business: see build_model().
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpmix_cli.errors import InputError
from cpmix_cli.recipe import Model


class Classifier(nn.Module):
    """Features and a head; subclasses define features() and begin with a linear head."""

    head: nn.Module

    def features(self, x: Tensor) -> Tensor:
        """Inputs -> [B, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Inputs -> raw logits [B, C]."""
        logits: Tensor = self.head(self.features(x))
        return logits


class CosineHead(nn.Module):
    """scale cos(f, w_c), without bias. Source: LDAM-DRW's NormedLinear, which leaves the scale to the loss."""

    def __init__(self, num_features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C], in the weight's precision: bf16 would round a cosine near 1 to two digits."""
        with torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(features.to(self.weight.dtype), dim=1)
            return self.scale * F.linear(directions, F.normalize(self.weight, dim=1))


class ScaledHead(nn.Linear):
    """s_c (w_c f + b_c) with a learnable scale a class, 1 at first. Source: LWS of Kang et al., Decoupling."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features)
        self.weight, self.bias = head.weight, head.bias
        self.scale = nn.Parameter(torch.ones_like(head.bias))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return self.scale * super().forward(features)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with the parameter-free shortcut A: every second pixel, channels padded with zeros."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride = stride
        self.padding = (num_out - num_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_in, H, W] -> [B, num_out, H / stride, W / stride]."""
        # In place where the backward pass does not look: a quarter less memory, and less of it to go through.
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        out += x
        return F.relu(out, inplace=True)


class CifarResNet(Classifier):
    """ResNet of the CIFAR papers: a 3 x 3 stem, three stages of basic blocks at 1, 2, 4 times the width, average pool.

    ResNet-32 is 5 blocks a stage at width 16: 470,004 parameters for 100 classes of RGB images.
    Source: He et al., Sec. 4.2; as in LDAM-DRW (reference/methods_mixing.md section 1c).
    """

    def __init__(self, num_classes: int, num_channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        num_in = width
        for stage in range(3):
            num_out = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(num_in, num_out, stride))
                num_in = num_out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(num_in, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, 4 width]."""
        out: Tensor = self.blocks(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return out.mean((2, 3))


class PointNet(Classifier):
    """One hidden layer of ReLU units over points of the plane. Paper: B.1 (100 units)."""

    def __init__(self, num_classes: int, num_inputs: int, num_hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_inputs, num_hidden)
        self.head = nn.Linear(num_hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, num_hidden]."""
        return F.relu(self.hidden(x))


class ImageNetResNet(Classifier):
    """torchvision's ResNet with its own parameter names, so that its published weights fit; its `fc` is our `head`."""

    def __init__(self, name: str, num_classes: int) -> None:
        from torchvision import models  # a second of import that other networks do not need

        super().__init__()
        network = getattr(models, name)()
        for child, module in network.named_children():
            if child != "fc":
                self.add_module(child, module)
        self.head = nn.Linear(network.fc.in_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]; a feature map has 1 / 32 of the height and width."""
        for child, module in self.named_children():
            if child != "head":
                x = module(x)
        return x.flatten(1)


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every convolution and linear layer anew, in the order of the modules: Kaiming-normal weights (fan in, gain
    sqrt 2), linear biases as PyTorch draws them; the vectors of a cosine head uniform on the cube, then of length 1.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CosineHead):
                module.weight.uniform_(-1, 1, generator=generator)
                module.weight.copy_(F.normalize(module.weight, dim=1))
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    module.bias.uniform_(-bound, bound, generator=generator)


def _takes(shape: Sequence[int], dimensions: int, what: str) -> None:
    if len(shape) != dimensions:
        raise ValueError(f"takes {what}, the data set has samples of shape {tuple(shape)}")


def resnet32(num_classes: int, shape: Sequence[int]) -> Classifier:
    """ResNet-32 for 32 x 32 images."""
    _takes(shape, 3, "images")
    return CifarResNet(num_classes, num_channels=shape[-1], blocks=5, width=16)


def resnet8(num_classes: int, shape: Sequence[int]) -> Classifier:
    """One block a stage at width 16 (75,002 parameters for 10 classes of grey images): for 8 x 8 digits."""
    _takes(shape, 3, "images")
    return CifarResNet(num_classes, num_channels=shape[-1], blocks=1, width=16)


def _imagenet_resnet(name: str, num_classes: int, shape: Sequence[int]) -> Classifier:
    # At 32 pixels the last map is a single one, and batch norm cannot train on a last batch of one image.
    if len(shape) != 3 or shape[-1] != 3 or min(shape[:2]) <= 32:
        raise ValueError(
            f"takes RGB images of more than 32 x 32 pixels, the data set has samples of shape {tuple(shape)}"
        )
    return ImageNetResNet(name, num_classes)


def resnet18(num_classes: int, shape: Sequence[int]) -> Classifier:
    """torchvision's ResNet-18, 11.2 million parameters. Source: He et al., Table 1."""
    return _imagenet_resnet("resnet18", num_classes, shape)


def resnet50(num_classes: int, shape: Sequence[int]) -> Classifier:
    """torchvision's ResNet-50 (stride in the 3 x 3 convolution), 23.5 million parameters and the head."""
    return _imagenet_resnet("resnet50", num_classes, shape)


def one_hidden_layer(num_classes: int, shape: Sequence[int]) -> Classifier:
    """100 hidden units over 2-D points. Paper: B.1."""
    _takes(shape, 1, "points")
    return PointNet(num_classes, num_inputs=shape[-1], num_hidden=100)


MODELS: dict[str, Callable[[int, Sequence[int]], Classifier]] = {
    "resnet32": resnet32,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "one-hidden-layer": one_hidden_layer,
}


def take_over(model: Classifier, tensors: Mapping[str, Tensor], path: Path) -> int:
    """Copy given weights into all of a network but its head, whose classes are others.

    `head.*` and torchvision's `fc.*` are left aside, and counters of batch norm may be missing.

    Args:
        model: changed in place.
        tensors: weights by name.
        path: where they came from, for the message.

    Returns:
        How many tensors were taken.

    Raises:
        InputError: with every tensor that is missing, unknown, of another shape or kind of number, or not finite.
    """
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    given = {name: t for name, t in tensors.items() if not name.startswith(("head.", "fc."))}
    faults = []
    for name in sorted(own.keys() | given.keys()):
        if name not in own:
            faults.append(f"{name}: not in the network")
        elif name not in given:
            if not name.endswith("num_batches_tracked"):
                faults.append(f"{name}: missing")
        elif own[name].shape != given[name].shape:
            faults.append(f"{name}: has shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}")
        elif own[name].is_floating_point() != given[name].is_floating_point():
            faults.append(f"{name}: holds {_kind(given[name])}, expected {_kind(own[name])}")
        elif not given[name].to(own[name].dtype).isfinite().all():  # a float64 may be beyond float32
            faults.append(f"{name}: holds values that are not finite")
    if faults:
        more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise InputError(
            f"{path} does not fit the network, {len(faults)} tensor{'s' if len(faults) > 1 else ''}:\n    "
            + "\n    ".join(faults[:10] + more),
            needed_by="--init",
            fix="choose the network that these weights are of with --set model.name=NAME",
        )
    with torch.no_grad():
        for name in given:
            own[name].copy_(given[name])
    return len(given)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def build_model(
    recipe: Model, num_classes: int, shape: Sequence[int], generator: torch.Generator, *, scaled: bool = False
) -> Classifier:
    """The network of a recipe, its weights drawn from `generator`.

    Args:
        recipe: name and head.
        num_classes: C.
        shape: of one image (H, W, channels) or point (2,).
        generator: for the weights.
        scaled: with a ScaledHead, as `finetune.head = "scale"` leaves it.

    Raises:
        ValueError: the network cannot take such samples.
    """
    model = MODELS[recipe.name](num_classes, shape)
    head = model.head
    assert isinstance(head, nn.Linear)
    if recipe.head == "cosine":
        model.head = CosineHead(head.in_features, num_classes, recipe.head_scale)
    initialise(model, generator)
    if recipe.head_bias == "rare":
        nn.init.constant_(head.bias, -math.log(max(num_classes - 1, 1)))
    if scaled:
        add_scale(model)
    return model


def add_scale(model: Classifier) -> None:
    """Put a learnable scale behind a linear head."""
    assert isinstance(model.head, nn.Linear)
    model.head = ScaledHead(model.head)
