"""How a pretrained network is tuned: trained parameters, layers, AdamW, and heads from class means, against loops."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import (
    COUNTS,
    ERM,
    IMAGES,
    LABELS,
    LR,
    STD,
    contents,
    cpmix,
    data,
    forget_signals,
    fresh,
    must,
    never,
    plan_of,
    refused,
    setting,
    sums_of,
    terms_of,
)
from safetensors.torch import load_file
from torch import nn

from cpmix_cli.data.batches import ImageBatches
from cpmix_cli.models import Classifier, build_model, make_network
from cpmix_cli.recipe.schema import Data, Model, Optimizer, ParameterGroup
from cpmix_cli.training import phase
from cpmix_cli.training.class_means import start_from_class_means
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.loop import fit
from cpmix_cli.training.plan import make_optimizer
from cpmix_cli.training.step import Step
from cpmix_cli.training.tuning import layer_depths, matching


def network(name: str, side: int = 64, **keys: object) -> Classifier:
    with torch.device("meta"):
        return make_network(Model(name=name, **keys), 7, (side, side, 3))  # type: ignore[arg-type]


def torchvision_s(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None)


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: network("resnet32"),  # a stem, 15 blocks, a head
            {"conv1.weight": 16, "bn1.bias": 16, "blocks.0.conv1.weight": 15, "blocks.14.bn2.bias": 1, "head.bias": 0},
        ),
        (
            lambda: network("resnet32", experts=3),  # 5 shared blocks, 10 of each expert
            {"bn1.bias": 16, "shared.0.bn1.bias": 15, "shared.4.bn1.bias": 11}
            | {f"experts.{e}.{block}.conv1.weight": 10 - block for e in range(3) for block in range(10)}
            | {f"head.{e}.bias": 0 for e in range(3)},
        ),
        (
            lambda: network("resnet18"),  # a stem, 8 blocks, a head
            {"bn1.bias": 9, "layer1.0.conv1.weight": 8, "layer2.0.downsample.1.bias": 6, "layer4.1.bn2.bias": 1},
        ),
        (
            lambda: torchvision_s("vit_b_16"),  # BEiT's 14: what embeds, 12 blocks, the head with the last norm
            {
                **dict.fromkeys(["class_token", "conv_proj.weight", "encoder.pos_embedding"], 13),
                **{f"encoder.layers.encoder_layer_{i}.mlp.0.weight": 12 - i for i in range(12)},
                **dict.fromkeys(["encoder.ln.weight", "heads.head.weight"], 0),
            },
        ),
        (
            lambda: torchvision_s("convnext_tiny"),  # a stem, 18 blocks, 3 downsamplings, the head with its norm
            {
                "features.0.0.weight": 22,
                "features.0.1.bias": 22,
                "features.1.0.layer_scale": 21,
                "features.1.2.block.0.bias": 19,
                "features.2.0.weight": 18,
                "features.2.1.weight": 18,
                "features.3.0.block.0.bias": 17,
                "features.6.1.weight": 4,
                "features.7.2.block.5.bias": 1,
                "classifier.0.weight": 0,
                "classifier.2.weight": 0,
            },
        ),
        (
            lambda: network("torchvision/convnext_tiny"),  # the same within the adapter
            {"backbone.features.0.0.weight": 22, "backbone.features.7.2.layer_scale": 1, "head.weight": 0}
            | {"backbone.classifier.0.weight": 0},
        ),
        (
            lambda: network("timm/test_vit", 160),  # timm: what embeds, 6 blocks, the last with the last norm, the head
            {"backbone.cls_token": 7, "backbone.blocks.0.norm1.bias": 6, "backbone.norm.weight": 1, "head.bias": 0},
        ),
        (
            lambda: network("timm/test_convnext", 160),  # timm: the last norm is one layer with the head
            {"backbone.stem.0.weight": 10, "backbone.stages.3.blocks.1.gamma": 1, "backbone.head.norm.bias": 0},
        ),
        (
            lambda: torchvision_s("swin_t"),  # a stem, 12 blocks, 3 mergings, the head with the last norm
            {"features.0.0.weight": 16, "features.2.norm.bias": 13, "features.7.1.mlp.3.bias": 1, "norm.weight": 0},
        ),
        (
            lambda: torchvision.models.regnet_y_400mf(weights=None),  # a stem, 1 + 3 + 6 + 6 blocks
            {"stem.0.weight": 17, "trunk_output.block1.block1-0.proj.0.weight": 16, "fc.weight": 0},
        ),
        (
            lambda: torchvision_s("efficientnet_b0"),  # a stem, 16 blocks, the last convolution
            {"features.0.0.weight": 18, "features.1.0.block.0.0.weight": 17, "features.8.1.bias": 1},
        ),
    ],
    ids=[
        "resnet32",
        "experts",
        "resnet18",
        "vit",
        "convnext",
        "adapter",
        "timm vit",
        "timm convnext",
        "swin",
        "regnet",
        "efficientnet",
    ],
)
def test_the_depths_of_layers_are_those_counted_by_hand(
    make: Callable[[], nn.Module], expected: dict[str, int]
) -> None:
    depths = layer_depths(make())
    assert {name: depths[name] for name in expected} == expected
    assert max(depths.values()) == max(expected.values())


def test_learning_rates_fall_by_layer_and_group_in_every_step() -> None:
    """Two epochs whose rate changes: each parameter moves by rate x group's factor x 0.75 ** depth."""
    state = fresh()
    groups = [ParameterGroup(prefix="bias", weight_decay=0.0), ParameterGroup(prefix="blocks", lr_factor=0.5)]
    recipe = Optimizer(lr=LR, momentum=0, weight_decay=0.1, layer_decay=0.75, groups=groups)
    state.optimizer = make_optimizer(state.model, recipe)
    depth = {"conv1": 4, "bn1": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "head": 0}
    rates = iter([0.1, 0.02])
    plan = plan_of(terms_of(erm=ERM), 2)
    object.__setattr__(plan, "learning_rate", lambda *_: next(rates))
    seen = []
    state.sums = sums_of(plan)
    step = Step(plan, data(), state)
    for epoch, rate in ((1, 0.1), (2, 0.02)):
        before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        step.begin_epoch(epoch)
        state.model.train()
        step(0)
        for name, p in state.model.named_parameters():
            is_bias, block = name.endswith("bias"), ".".join(name.split(".")[: 1 + name.startswith("blocks")])
            factor = (0.5 if name.startswith("blocks") and not is_bias else 1) * 0.75 ** depth[block]
            assert p.grad is not None
            expected = before[name] - rate * factor * (p.grad + (0 if is_bias else 0.1) * before[name])
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12, msg=name)
            seen.append(factor)
    assert len(set(seen)) == 5 + 3  # half the rate in three blocks, but for their biases


def test_adamw_decays_weights_apart_from_the_gradient() -> None:
    state = fresh()
    state.optimizer = make_optimizer(state.model, Optimizer(kind="adamw", lr=LR, weight_decay=0.3))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    fit(plan_of(terms_of(erm=ERM), 1), data(), state, publish=never)
    for name, p in state.model.named_parameters():
        assert p.grad is not None
        m, v = 0.1 * p.grad / (1 - 0.9), 0.001 * p.grad.square() / (1 - 0.999)
        expected = before[name] * (1 - LR * 0.3) - LR * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12, msg=name)


# -- trained parameters ------------------------------------------------------------------------------------------------


def test_norm_and_bias_name_the_parameters_of_all_such_layers() -> None:
    net = network("resnet18")
    norms = [n for n, _ in net.named_parameters() if "bn" in n or "downsample.1" in n]
    assert matching(net, ["norm"]) == norms
    assert len(norms) == 2 * 20
    assert matching(net, ["bias"]) == [n for n, _ in net.named_parameters() if n.endswith("bias")]
    assert matching(net, ["head", "norm", "bias"]) == [*norms, "head.weight", "head.bias"]
    vit = torchvision_s("vit_b_16")  # two norms a block and the last one; biases of attention are called in_proj_bias
    assert len(matching(vit, ["norm"])) == 2 * (2 * 12 + 1)
    assert len(matching(vit, ["bias"])) == 12 * 6 + 3
    assert matching(vit, [""]) == [name for name, _ in vit.named_parameters()]


HEAD_FIRST = setting(
    'stage1.train=["head"]', "optimizer.kind=adamw", "optimizer.lr=1e-3", "model.init_head=class-means"
)
FLAGS = ("--recipe", "digits/cpmix", "--epochs", 3, *setting("optimizer.batch_size=128", "finetune.batch_size=256"))


@pytest.fixture(scope="module")
def pretrained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained on digits, as a file of weights alone."""
    run = tmp_path_factory.mktemp("pretrained")
    must("train-stage1", "--data", digits, "--out", run, *FLAGS)
    return Path((run / "stage1" / "model.safetensors").rename(run / "weights.safetensors"))


def test_a_stage_of_the_head_alone_leaves_weights_and_statistics_and_the_next_trains_all(
    pretrained: Path, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = must("train-stage1", "--data", digits, "--out", run, *FLAGS, *HEAD_FIRST, "--init", pretrained).stderr
    assert "starts from 42 tensors of" in said
    assert "the head is that of class means\n" in said
    assert "stage1: one pass over the training images, for a head from class means\n" in said
    must("train-stage2", "--from", run)
    started = load_file(pretrained)
    first, second = (load_file(run / name / "model.safetensors") for name in ("stage1", "stage2"))
    for name, before in started.items():
        assert first[name].equal(before) == (not name.startswith("head.")), name
        assert not second[name].equal(first[name]), name
    must("finetune", "--from", run, "--set", 'finetune.train=["head", "norm", "bias"]')
    third = load_file(run / "finetune" / "model.safetensors")
    changed = {name for name, tensor in third.items() if not tensor.equal(second[name])}
    assert changed == {n for n in third if "bn" in n and n.endswith(("weight", "bias"))} | {"head.weight", "head.bias"}
    state = load_file(run / "stage2" / "training_state.safetensors")  # 8 steps of the head, then 4 of all
    steps = {
        n.removeprefix("optimizer.").removesuffix(".step"): float(t) for n, t in state.items() if n.endswith(".step")
    }
    assert {name: 12.0 if name.startswith("head.") else 4.0 for name in steps} == steps
    assert len(steps) == len(list(build_model(Model(name="resnet8"), 10, (8, 8, 1), torch.Generator()).parameters()))


@pytest.mark.slow
def test_tuning_in_two_stages_resumes_bit_for_bit_and_computes_class_means_once(
    pretrained: Path, handlers: object, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM after every step; optimizer AdamW, rates by layer, warm-up in steps, weights averaged."""
    more = [
        "schedule.warmup_steps=5",
        "schedule.warmup_epochs=0",
        "optimizer.layer_decay=0.7",
        "optimizer.ema_epochs=60",
    ]
    passes, real_step, real = [], Step.__call__, phase.start_from_class_means

    def stop(step: Step, number: int) -> None:
        real_step(step, number)
        signal.raise_signal(signal.SIGTERM)

    def counted(*given: object) -> None:
        passes.append(1)
        real(*given)  # type: ignore[arg-type]

    def phases(run: Path) -> list[int]:
        codes = []
        train = ("train-stage1", "--data", digits, "--out", run, *FLAGS, *HEAD_FIRST, *setting(*more))
        for words in ((*train, "--init", pretrained), ("train-stage2", "--from", run), ("finetune", "--from", run)):
            while True:
                forget_signals()
                codes.append(cpmix(*words).code)
                if codes[-1] != 75:
                    break
        return codes

    monkeypatch.setattr(phase, "start_from_class_means", counted)
    assert phases(tmp_path / "whole") == [0, 0, 0]
    assert len(passes) == 1
    monkeypatch.setattr(Step, "__call__", stop)
    assert phases(tmp_path / "stopped") == [*[75] * 8, 0, *[75] * 4, 0, *[75] * 2, 0]
    assert len(passes) == 2
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stage1.train=[]"], "stage1.train = []: List should have at least 1 item"),
        (['stage1.train=["heat"]'], 'stage1.train: no parameter of the network starts with "heat"; some are conv1'),
        (["model.name=one-hidden-layer", 'finetune.train=["norm"]'], "is of a normalisation layer; some are hidden"),
        (['stage2.train=["head"]', 'model.frozen=["head"]'], "stage2.train: all of it is frozen, nothing is left"),
        (["schedule.warmup_steps=10"], "schedule.warmup_steps = 10 needs schedule.warmup_epochs = 0, not"),
        (
            ["optimizer.kind=adamw", "optimizer.nesterov=true"],
            'optimizer.kind = "adamw" needs optimizer.nesterov = fal',
        ),
        (["optimizer.layer_decay=0"], "optimizer.layer_decay = 0: Input should be greater than 0"),
        (
            ["optimizer.layer_decay=0.5", 'stage1.train=["head"]', 'stage2.train=["head"]'],
            "optimizer.layer_decay = 0.5: the stages train the head alone, which has the whole rate",
        ),
        (["model.init_head=class-means"], "the features are random, and their means say nothing"),
        (["model.init_head=class-means", "model.head_bias=rare"], 'needs model.head_bias = "drawn"'),
    ],
)
def test_keys_of_tuning_that_do_not_fit_are_refused(
    settings: list[str], message: str, digits: Path, toy: Path, tmp_path: Path
) -> None:
    folder = toy if "one-hidden-layer" in settings[0] else digits
    recipe = ("--recipe", "toy/cpmix" if folder == toy else "digits/cpmix")
    if folder == toy:
        settings = [*settings, "finetune.terms={erm={}}"]
    refused(2, message, "train-stage1", "--data", folder, *recipe, *setting(*settings), "--out", tmp_path / "r")


# -- heads from class means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"head": "cosine"}, {}, {"experts": 3}], ids=["cosine", "linear", "experts"])
def test_a_head_from_class_means_equals_a_loop_over_images(keys: dict[str, object]) -> None:
    model = build_model(Model(name="resnet8", **keys), 4, (8, 8, 1), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a trained network has them
            nn.init.uniform_(module.running_mean, generator=torch.Generator().manual_seed(1))
    batches = ImageBatches(IMAGES, Data(augment="crop-flip", padding=2, normalisation="dataset"), [0.5], [STD])
    plan = plan_of(terms_of(erm=ERM), 1, batch=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from_class_means(plan, TrainingData(batches, LABELS, torch.tensor(COUNTS)), model)

    model.eval()
    x = ((IMAGES.float() / 255 - 0.5) / STD).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = torch.cat([model.features(x[i : i + 1]) for i in range(24)]).double()
    width = features.shape[1] // len(model.heads)
    for k, head in enumerate(model.heads):
        own = features[:, k * width : (k + 1) * width]
        means, variance = [], 0.0
        for c in range(4):
            rows = [own[i] for i in range(24) if LABELS[i] == c]
            means.append(sum(rows) / len(rows))  # type: ignore[arg-type]
            variance += sum(float((row - means[c]).square().sum()) for row in rows) / (24 * width)
        for c, mean in enumerate(means):
            if "head" in keys:
                expected = mean / math.sqrt(float(mean @ mean))
            else:
                expected = mean / variance
                assert head.bias[c].item() == pytest.approx(-float(mean @ mean) / (2 * variance), rel=1e-4)
            torch.testing.assert_close(head.weight[c].double(), expected, rtol=1e-4, atol=1e-6)
        if "head" not in keys:  # the nearest mean wins
            logits = F.linear(own.float(), head.weight, head.bias)
            nearest = torch.cdist(own, torch.stack(means)).argmin(1)
            assert logits.argmax(1).equal(nearest)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if name.startswith("head")}


def test_new_keys_are_not_in_a_resolved_recipe_that_does_not_set_them(capsys: object) -> None:
    shown = must("recipes", "digits/cpmix", "--json").json
    text = json.dumps(shown)
    assert "class-uniform" in text
    for key in ("layer_decay", "warmup_steps", "init_head"):
        assert key not in text
