"""Networks: parameter counts, shapes, initial weights."""

import pytest
import torch
import torchvision
from torch import nn

from cpmix_cli.models import BasicBlock, CosineHead, build_model
from cpmix_cli.recipe.schema import Model


@pytest.mark.parametrize(
    ("name", "classes", "shape", "parameters"),
    [
        ("resnet32", 100, (32, 32, 3), 470_004),
        ("resnet32", 10, (32, 32, 3), 464_154),
        ("resnet8", 10, (8, 8, 1), 75_002),
        ("one-hidden-layer", 4, (2,), 2 * 100 + 100 + 100 * 4 + 4),
        ("resnet10", 1000, (224, 224, 3), 5_418_792),
        ("resnet101", 1000, (224, 224, 3), 44_549_160),
        ("resnext50", 1000, (224, 224, 3), 25_028_904),
        ("resnet152", 365, (224, 224, 3), 58_891_693),
    ],
)
def test_models_have_their_parameters_and_shapes(
    name: str, classes: int, shape: tuple[int, ...], parameters: int
) -> None:
    with torch.device("meta"):
        model = build_model(Model(name=name), classes, shape, torch.Generator())
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


@pytest.mark.parametrize(("name", "theirs"), [("resnet18", "resnet18"), ("resnext50", "resnext50_32x4d")])
def test_imagenet_s_networks_start_as_torchvision_s(name: str, theirs: str, generator: torch.Generator) -> None:
    """Convolutions are normal with variance 2 / (out channels x k x k), also with groups; the head is torch's own."""
    own = build_model(Model(name=name), 1000, (64, 64, 3), generator).state_dict()
    other = getattr(torchvision.models, theirs)().state_dict()
    other = {key.replace("fc.", "head."): value for key, value in other.items()}
    assert own.keys() == other.keys()
    for key, value in other.items():
        if value.dim() > 1 or key == "head.bias":
            assert own[key].std().item() == pytest.approx(value.std().item(), rel=0.1), key
        else:  # batch norm
            assert own[key].equal(value), key
    assert own["head.weight"].abs().max() <= own["head.weight"].shape[1] ** -0.5


def test_experts_of_imagenet_s_networks_start_so_too(generator: torch.Generator) -> None:
    recipe = Model(name="resnet10", experts=2, shared_stages=3, expert_width=0.75)
    own = build_model(recipe, 50, (64, 64, 3), generator).state_dict()
    for expert in range(2):
        weight = own[f"experts.{expert}.0.conv1.weight"]  # to 384 channels
        assert weight.std().item() == pytest.approx((2 / (384 * 9)) ** 0.5, rel=0.02)
        assert own[f"head.{expert}.weight"].abs().max() <= 384**-0.5


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50", "resnet101", "resnet152", "resnext50"])
def test_imagenet_s_networks_take_any_image_of_more_than_32_pixels(name: str) -> None:
    width = 512 if name in ("resnet10", "resnet18") else 2048
    for side in (33, 64, 225):
        with torch.device("meta"):
            model = build_model(Model(name=name), 7, (side, side + 1, 3), torch.Generator())
            assert model.features(torch.zeros(2, 3, side, side + 1)).shape == (2, width)
    with pytest.raises(ValueError, match="more than 32 x 32 pixels"):
        build_model(Model(name=name), 7, (32, 64, 3), torch.Generator())


@pytest.mark.parametrize("name", ["resnet10", "resnext50"])
def test_they_train_on_one_image_of_33_pixels_under_a_cosine_head(name: str, generator: torch.Generator) -> None:
    model = build_model(Model(name=name, head="cosine", head_scale=5.0), 7, (33, 33, 3), generator).train()
    logits = model(torch.randn(1, 3, 33, 33, generator=generator))
    assert isinstance(model.head, CosineHead)
    assert logits.shape == (1, 7)
    assert logits.abs().max() <= 5
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_resnext_has_no_experts() -> None:
    with pytest.raises(
        ValueError, match=r"model\.experts = 3: the groups of its convolutions have no narrower version"
    ):
        build_model(Model(name="resnext50", experts=3), 7, (64, 64, 3), torch.Generator())


def test_resnet10_is_resnet18_with_one_block_a_stage(generator: torch.Generator) -> None:
    """Stem, BN 9,408 + 128; blocks 73,984, 230,144, 919,040 and 3,673,088; head 512 x 10 + 10."""
    model = build_model(Model(name="resnet10"), 10, (64, 64, 3), generator)
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    assert sizes == {
        "conv1": 64 * 3 * 7 * 7,
        "bn1": 2 * 64,
        "layer1": 2 * (64 * 64 * 9 + 2 * 64),
        "layer2": 128 * 64 * 9 + 128 * 128 * 9 + 128 * 64 + 3 * 2 * 128,
        "layer3": 256 * 128 * 9 + 256 * 256 * 9 + 256 * 128 + 3 * 2 * 256,
        "layer4": 512 * 256 * 9 + 512 * 512 * 9 + 512 * 256 + 3 * 2 * 512,
        "head": 512 * 10 + 10,
    }
