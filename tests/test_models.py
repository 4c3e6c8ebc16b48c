"""Networks: parameter counts, shapes, initial weights."""

import pytest
import torch
from torch import nn

from cpmix_cli.models import BasicBlock, build_model
from cpmix_cli.recipe import Model


@pytest.mark.parametrize(
    ("name", "classes", "shape", "parameters"),
    [
        ("resnet32", 100, (32, 32, 3), 470_004),
        ("resnet32", 10, (32, 32, 3), 464_154),
        ("resnet8", 10, (8, 8, 1), 75_002),
        ("one-hidden-layer", 4, (2,), 2 * 100 + 100 + 100 * 4 + 4),
    ],
)
def test_parameters_and_shapes(
    name: str, classes: int, shape: tuple[int, ...], parameters: int, generator: torch.Generator
) -> None:
    model = build_model(Model(name=name), classes, shape, generator)
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.zeros(3, shape[2], shape[0], shape[1]) if len(shape) == 3 else torch.zeros(3, *shape)
    assert model(x).shape == (3, classes)
    assert model.features(x).shape == (3, model.head.in_features)


def test_option_a_shortcut_drops_pixels_and_pads_channels() -> None:
    block = BasicBlock(2, 4, 2)
    nn.init.zeros_(block.bn2.weight)  # the residual branch is silent: what comes out is the shortcut
    x = torch.arange(1.0, 33.0).view(1, 2, 4, 4)
    out = block(x)
    assert out[0, 1:3].equal(x[0, :, ::2, ::2])
    assert out[0, [0, 3]].abs().sum() == 0


def test_weights_are_kaiming_normal_and_come_from_the_generator() -> None:
    torch.manual_seed(1)
    first = build_model(Model(name="resnet32"), 100, (32, 32, 3), torch.Generator().manual_seed(3)).state_dict()
    torch.manual_seed(2)
    second = build_model(Model(name="resnet32"), 100, (32, 32, 3), torch.Generator().manual_seed(3)).state_dict()
    other = build_model(Model(name="resnet32"), 100, (32, 32, 3), torch.Generator().manual_seed(4)).state_dict()
    assert all(first[n].equal(second[n]) for n in first)
    assert not first["conv1.weight"].equal(other["conv1.weight"])
    weight = first["blocks.14.conv2.weight"]  # 64 channels of 3 x 3
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert first["head.weight"].std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert first["head.bias"].abs().max() <= 64**-0.5
