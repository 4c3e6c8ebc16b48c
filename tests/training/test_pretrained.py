"""Pretrained weights: prefixes of names, several networks in a file, and weights of other networks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cpmix_cli.models import Routers, ScaledHead, build_model
from cpmix_cli.recipe.schema import Model
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.pretrained import keep_head_rows, load_backbone

FILE = Path("w.safetensors")
RESNET8 = Model(name="resnet8")
NUM_NAMES = 44
"""Tensors of a ResNet-8: 35, 7 counters of batch norm, and 2 of the head."""


def weights_of(name: str = "resnet8", seed: int = 1, shape: tuple[int, ...] = (8, 8, 1)) -> dict[str, Tensor]:
    """Weights of a network for 10 classes, with torchvision's names of the head."""
    model = build_model(Model(name=name), 10, shape, torch.Generator().manual_seed(seed))
    return {name.replace("head.", "fc."): tensor for name, tensor in model.state_dict().items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def load(tensors: dict[str, Tensor]) -> nn.Module:
    """A ResNet-8 for 4 classes that starts from these tensors."""
    model = build_model(RESNET8, 4, (8, 8, 1), torch.Generator().manual_seed(0))
    assert load_backbone(model, tensors, FILE, RESNET8, (8, 8, 1)) == NUM_NAMES - 2
    return model


def refusal(tensors: dict[str, Tensor], name: str = "resnet8", shape: tuple[int, ...] = (8, 8, 1)) -> str:
    """The error of tensors that a network refuses; the network stays as it was."""
    model = build_model(Model(name=name), 4, shape, torch.Generator().manual_seed(0))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError) as fault:
        load_backbone(model, tensors, FILE, Model(name=name), shape)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return str(fault.value)


def check_equal(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    "prefix",
    [
        *("backbone.", "module.", "model.", "encoder_q.", "model.backbone.", "module.model.", "module.encoder_q."),
        *("module._orig_mod.", "encoder.module.", "student.", "0.", "conv1.", "a.b.c.d.e."),
    ],
)
def test_a_prefix_of_all_names_is_taken_off(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of()
    check_equal(load(under(prefix, weights)), weights)
    assert capsys.readouterr().err == f"took the prefix '{prefix}' off {NUM_NAMES} names of w.safetensors\n"


def test_names_of_the_network_are_taken_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of()
    check_equal(load(weights), weights)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prefix", "others", "left_out"),
    [
        (
            "module.encoder_q.",
            {**under("module.encoder_k.", weights_of(seed=2)), "module.queue": torch.zeros(2), "module.queue_ptr": 1},
            "46 other tensors: module.encoder_k (44), module.queue, module.queue_ptr",
        ),
        ("module.base_encoder.", under("module.momentum_encoder.", weights_of(seed=2)), "44 other tensors: module.mom"),
        (
            "online_encoder.net.",
            under("target_encoder.net.", weights_of(seed=2)),
            "44 other tensors: target_encoder (44)",
        ),
        ("teacher.backbone.", under("student.backbone.", weights_of(seed=2)), "44 other tensors: student (44)"),
        ("backbone.", under("backbone_momentum.", weights_of(seed=2)), "44 other tensors: backbone_momentum (44)"),
        ("model.", under("ema_model.module.", weights_of(seed=2)), "44 other tensors: ema_model (44)"),
        ("", under("ema.", weights_of(seed=2)), "44 other tensors: ema (44)"),
        ("module.", {"n_averaged": torch.tensor(3)}, "1 other tensor: n_averaged"),
        ("backbone.", {"head.fc.weight": 1, "data_preprocessor.mean": 1}, "2 other tensors: data_preprocessor, head"),
        ("backbone.", {"backbone.fc.0.weight": 1, "projector.0.weight": 1}, "1 other tensor: projector"),
        (
            "module.",
            {"module.projection_head.0.weight": 1, "module.projection_head.0.bias": 1, "module.prototypes.weight": 1},
            "3 other tensors: module.projection_head (2), module.prototypes",
        ),
        ("", {"classifier.weight": 1, "classifier.bias": 1}, "2 other tensors: classifier (2)"),
    ],
)
def test_other_tensors_of_the_file_are_named(
    prefix: str, others: dict[str, Tensor | int], left_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Momentum encoders, queues, projections and averages. Of two networks, the published one is taken."""
    weights = weights_of()
    more = {name: torch.as_tensor(value) for name, value in others.items()}
    check_equal(load({**more, **under(prefix, weights)}), weights)
    assert f"left out {left_out}" in capsys.readouterr().err


@pytest.mark.parametrize("prefixes", [("net_a.", "net_b."), ("ema.", "momentum."), ("a.", "b.", "c.")])
def test_a_file_of_several_equal_networks_is_refused(
    prefixes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FILE.write_bytes(b"x")
    message = refusal({k: v for prefix in prefixes for k, v in under(prefix, weights_of()).items()})
    sha, name = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", prefixes[0].strip(".")
    assert message.splitlines() == [
        f"error: w.safetensors has {len(prefixes)} networks that fit, with these prefixes of names:",
        *(f"    {prefix}" for prefix in prefixes),
        "  needed by: --init",
        f"  fix: choose one, and give --init w-{name}.safetensors; to make it: "
        f"cpmix import-weights w.safetensors --sha256 {sha} --prefix {name}. --out w-{name}.safetensors",
    ]


def test_weights_that_lack_a_tensor_are_refused_with_the_closest_prefix() -> None:
    tensors = under("model.backbone.", weights_of())
    del tensors["model.backbone.blocks.0.bn1.weight"]
    tensors["model.backbone.conv1.weight"] = torch.zeros(16, 3, 3, 3)
    tensors["model.backbone.neck.weight"] = torch.zeros(1)
    assert refusal(tensors).splitlines() == [
        "error: w.safetensors does not fit the network. With the prefix 'model.backbone.' taken off its names, 33 of "
        "35 tensors of the network are found; what does not fit, 3 tensors:",
        "    blocks.0.bn1.weight: missing",
        "    conv1.weight: has shape (16, 3, 3, 3), expected (16, 1, 3, 3)",
        "    neck.weight: not in the network",
        "  needed by: --init",
        "  fix: give weights of resnet8: these fit no network of cpmix for samples of shape (8, 8, 1)",
    ]


def test_weights_of_a_deeper_network_are_refused_and_its_name_is_given() -> None:
    """They hold all tensors of the shallower one, and more in its stages."""
    shape = (64, 64, 3)
    message = refusal(under("backbone.", weights_of("resnet18", shape=shape)), "resnet10", shape)
    assert "    layer1.1.bn1.bias: not in the network\n" in message
    assert message.endswith("  fix: give --set model.name=resnet18, as these weights require")
    assert "fix: give weights of resnet8: these fit no network" in refusal(weights_of("resnet18", shape=shape))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    tensors = under("module.", weights_of())
    tensors["module.bn1.bias"] = torch.full((16,), value)
    message = refusal(tensors)
    assert (
        "35 of 35 tensors of the network are found; what does not fit, 1 tensor:\n    bn1.bias: contains NaN" in message
    )
    assert message.endswith("  fix: give other weights: those of the network are finite floating-point numbers")


def test_a_network_with_routers_gives_its_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """Routers belong to the head, so the finetuned network of one run can start another."""
    recipe = Model(name="resnet8", experts=2)
    trained, fresh = (build_model(recipe, 10, (8, 8, 1), torch.Generator().manual_seed(seed)) for seed in (1, 2))
    trained.routers = Routers(2, 64, 10, 3)
    load_backbone(fresh, trained.state_dict(), FILE, recipe, (8, 8, 1))
    check_equal(fresh, trained.state_dict())
    num_routers = sum(name.startswith("routers.") for name in trained.state_dict())
    assert capsys.readouterr().err == f"left out {num_routers} other tensors: routers ({num_routers})\n"


def test_weights_are_loaded_except_the_head() -> None:
    model = build_model(RESNET8, 4, (8, 8, 1), torch.Generator().manual_seed(0))
    head = model.head.weight.clone()
    weights = weights_of()
    given = {n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    given |= {"head.weight": torch.zeros(10, 64), "fc.weight": torch.zeros(1000, 64)}
    taken = load_backbone(model, given, FILE, RESNET8, (8, 8, 1))
    assert taken == len([n for n in given if not n.startswith(("head.", "fc."))])
    assert torch.equal(model.head.weight, head)
    check_equal(model, {**weights, **{n: t for n, t in model.state_dict().items() if n.endswith("tracked")}})


def test_all_that_does_not_fit_is_listed() -> None:
    weights = weights_of()
    del weights["bn1.weight"]
    weights["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    weights["bn1.bias"] = torch.full((16,), torch.nan)
    weights["bn1.running_mean"] = torch.full((16,), 1e300, dtype=torch.float64)
    weights["bn1.running_var"] = torch.ones(16, dtype=torch.int8)
    weights["layer9.weight"] = torch.zeros(2)
    assert refusal(weights).splitlines()[:7] == [
        "error: w.safetensors does not fit the network, 6 tensors:",
        "    bn1.bias: contains NaN or infinite values",
        "    bn1.running_mean: contains NaN or infinite values",
        "    bn1.running_var: has type int8, expected float32",
        "    bn1.weight: missing",
        "    conv1.weight: has shape (16, 3, 3, 3), expected (16, 1, 3, 3)",
        "    layer9.weight: not in the network",
    ]


KNOWN = ["cat", "caf\u00e9", "lynx"]


@pytest.mark.parametrize("recipe", [RESNET8, Model(name="resnet8", head="cosine"), Model(name="resnet8", experts=2)])
def test_classes_of_the_same_name_keep_their_rows_of_each_head(recipe: Model) -> None:
    """Reordered, one gone, one new, and one name in another Unicode form."""
    old = build_model(recipe, 3, (8, 8, 1), torch.Generator().manual_seed(1))
    model, drawn = (build_model(recipe, 4, (8, 8, 1), torch.Generator().manual_seed(2)) for _ in range(2))
    classes = ["bobcat", "cafe\u0301", "cat", "dog"]
    assert keep_head_rows(model, old.state_dict(), classes, KNOWN) == ["cafe\u0301", "cat"]
    before, fresh = old.state_dict(), drawn.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            expected = torch.stack([fresh[name][0], before[name][1], before[name][0], fresh[name][3]])
            assert torch.equal(tensor, expected), name
        else:
            assert torch.equal(tensor, fresh[name]), name


def test_rows_of_a_scaled_head_give_its_logits() -> None:
    """The finetuned head s (w f + b) of a run starts a plain one."""
    old = build_model(RESNET8, 3, (8, 8, 1), torch.Generator().manual_seed(1))
    old.replace_heads(ScaledHead)
    with torch.no_grad():
        old.head.scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
    model = build_model(RESNET8, 2, (8, 8, 1), torch.Generator().manual_seed(2))
    assert keep_head_rows(model, old.state_dict(), ["lynx", "cat"], KNOWN) == ["lynx", "cat"]
    features = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.classify(features)[0], old.classify(features)[0][:, [2, 0]])


@pytest.mark.parametrize("recipe", [Model(name="resnet8", head="cosine"), Model(name="resnet8", experts=2)])
def test_a_head_of_another_kind_keeps_no_row(recipe: Model) -> None:
    old = build_model(recipe, 3, (8, 8, 1), torch.Generator().manual_seed(1))
    model = build_model(RESNET8, 3, (8, 8, 1), torch.Generator().manual_seed(2))
    head = model.head.weight.clone()
    assert keep_head_rows(model, old.state_dict(), KNOWN, KNOWN) is None
    assert torch.equal(model.head.weight, head)
