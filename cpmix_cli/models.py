"""Networks: add one here.

A network has `features(x) -> [B, D]` and a linear `head`; called, it gives raw logits [B, C]. Its builder takes the
number of classes and the shape of one image (H, W, channels) or point (2,), and raises ValueError for a shape it
cannot take.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Features and a linear head; subclasses define features()."""

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Inputs -> [B, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Inputs -> raw logits [B, C]."""
        logits: Tensor = self.head(self.features(x))
        return logits


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
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


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
        out: Tensor = self.blocks(F.relu(self.bn1(self.conv1(x))))
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


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every convolution and linear layer anew, in the order of the modules: Kaiming-normal weights (fan in, gain
    sqrt 2), linear biases as PyTorch draws them.
    """
    with torch.no_grad():
        for module in model.modules():
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


def one_hidden_layer(num_classes: int, shape: Sequence[int]) -> Classifier:
    """100 hidden units over 2-D points. Paper: B.1."""
    _takes(shape, 1, "points")
    return PointNet(num_classes, num_inputs=shape[-1], num_hidden=100)


MODELS: dict[str, Callable[[int, Sequence[int]], Classifier]] = {
    "resnet32": resnet32,
    "resnet8": resnet8,
    "one-hidden-layer": one_hidden_layer,
}


def build_model(name: str, num_classes: int, shape: Sequence[int], generator: torch.Generator) -> Classifier:
    """A network by name, its weights drawn from `generator`."""
    model = MODELS[name](num_classes, shape)
    initialise(model, generator)
    return model
