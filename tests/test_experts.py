"""Several experts: the network, its losses and regulariser against loops and limits, and all phases on digits."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import COUNTS, draw_epoch, must, refused, setting, sums_of, terms_of
from torch import Tensor

from cpmix_cli.artifacts import tables
from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.commands.train_stage1 import _prepare
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.evaluation.accuracy import shifted_profile, summary
from cpmix_cli.evaluation.agreement import images_to_learn_from, learn_expert_weights, weakly_changed
from cpmix_cli.experts import combined, routed_weights, target_classes
from cpmix_cli.losses import ace, balanced_softmax, cross_entropy, distillation, expert_diversity, routing, sade
from cpmix_cli.models import Classifier, build_model, change_head
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Finetune, Model, Optimizer
from cpmix_cli.runs.folders import PhaseFolder
from cpmix_cli.training.inputs import training_data
from cpmix_cli.training.objective import ClassWeights, Output, Term, TermBatch
from cpmix_cli.training.plan import PhaseContext, Plan, fresh_state, rehearsal
from cpmix_cli.training.state import TrainingState
from cpmix_cli.training.step import Step

CPU = torch.device("cpu")
Views = Callable[[Tensor, int], tuple[Tensor, Tensor]]
CIFAR = (32, 32, 3)


def network(**keys: object) -> Classifier:
    return build_model(
        Model.model_validate({"name": "resnet8", **keys}), 4, (8, 8, 1), torch.Generator().manual_seed(0)
    )


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "parameters"), [(2, 530_512), (3, 783_856), (4, 1_037_200), (6, 1_543_888)])
def test_resnet32_with_experts_has_the_published_size(
    experts: int, parameters: int, generator: torch.Generator
) -> None:
    """Three and six experts as published; the others by the same 253,344 an expert."""
    recipe = Model(name="resnet32", head="cosine", experts=experts, expert_width=0.75)
    model = build_model(recipe, 100, CIFAR, generator)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.expert_logits(torch.zeros(2, 3, 32, 32)).shape == (experts, 2, 100)


def test_experts_of_resnet50_share_two_stages_and_own_the_rest(generator: torch.Generator) -> None:
    """192 and 384 planes of 4 channels each, after two shared stages; the shared part is torchvision's."""
    recipe = Model(name="resnet50", head="cosine", experts=2, shared_stages=2, expert_width=0.75)
    model = build_model(recipe, 7, (64, 64, 3), generator)
    plain = build_model(Model(name="resnet50"), 7, (64, 64, 3), generator)
    assert model.features(torch.zeros(2, 3, 64, 64)).shape == (2, 2 * 1536)
    assert model.expert_logits(torch.zeros(2, 3, 64, 64)).shape == (2, 2, 7)
    shared = sum(p.numel() for n, p in plain.named_parameters() if n.startswith(("conv1", "bn1", "layer1", "layer2")))
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("shared.")) == shared
    whole = build_model(recipe.model_copy(update={"expert_width": 1.0}), 7, (64, 64, 3), generator)
    own = sum(p.numel() for n, p in plain.named_parameters() if n.startswith(("layer3", "layer4")))
    assert sum(p.numel() for n, p in whole.named_parameters() if n.startswith("experts.")) == 2 * own


def test_each_expert_is_the_plain_network_with_its_own_stages() -> None:
    model = network(experts=3).double().eval()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = model.expert_logits(x)
    for k in range(3):
        plain = network().double().eval()
        weights = model.state_dict()
        names = {"blocks.0.": "shared.0.", "blocks.1.": f"experts.{k}.0.", "blocks.2.": f"experts.{k}.1."}
        names |= {"head.": f"head.{k}.", "conv1.": "conv1.", "bn1.": "bn1."}
        own = {}
        for name in plain.state_dict():
            (begin,) = [b for b in names if name.startswith(b)]
            own[name] = weights[names[begin] + name.removeprefix(begin)]
        plain.load_state_dict(own)
        torch.testing.assert_close(logits[k], plain(x))
        torch.testing.assert_close(plain.expert_logits(x)[0], plain(x))
    torch.testing.assert_close(model(x), logits.mean(0))


def test_detached_experts_leave_the_shared_stages_to_the_first() -> None:
    """The same logits; later experts move only what is theirs, and the first moves what it does in any case."""
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    models = [network(experts=3, detached_experts=detached).train() for detached in (False, True)]
    attached, detached = ([z.square().sum() for z in model.expert_logits(x)] for model in models)
    assert [loss.item() for loss in attached] == pytest.approx([loss.item() for loss in detached])
    shared = [(model.conv1.weight, *model.shared.parameters()) for model in models]  # type: ignore[union-attr, operator]
    for k in range(3):
        moved, left = (
            torch.autograd.grad(losses[k], parameters, retain_graph=True, allow_unused=True)
            for losses, parameters in zip((attached, detached), shared, strict=True)
        )
        for a, b in zip(moved, left, strict=True):
            assert a.any()
            torch.testing.assert_close(
                b if b is not None else torch.zeros_like(a), a if k == 0 else torch.zeros_like(a)
            )
        head = models[1].heads[k].weight
        assert torch.autograd.grad(detached[k], head, retain_graph=True)[0].any()  # type: ignore[arg-type]


SPREAD = [f"stage1.terms.erm.{k}" for k in ("regulariser=expert-diversity", "diversity=1", "temperature_spread=0.05")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.detached_experts=true"], "detached_experts needs experts other than 1"),
        (["model.expert_width=0.75"], "expert_width needs experts other than 1"),
        (["model.experts=2", "stage1.terms.erm.loss=sade"], 'loss = "sade" needs model.experts = 3, not 2'),
        (["stage1.terms.erm.loss=ace"], 'loss = "ace" needs model.experts = 2 or more, not 1'),
        (["optimizer.expert_rates=target-share"], "needs model.experts = 2 or more"),
        (["evaluation.aggregate=targets"], "needs model.experts = 2 or more"),
        (
            ["model.experts=2", "model.head=cosine", "evaluation.aggregate=targets"],
            'needs model.head = "linear", not "cosine": heads of one size say nothing of cosines',
        ),
        (["model.experts=2", "evaluation.aggregate=routed"], 'needs finetune.head = "routers"'),
        (["model.experts=2", "evaluation.routing_threshold=0.3"], "needs evaluation.routing_threshold = 0.5, not 0.3"),
        (SPREAD, "stage1.terms.erm.temperature_spread needs reweight"),
        (["model.experts=3", "model.shared_stages=3"], "it has 3 stages, and an expert needs one of its own"),
        (["model.experts=3", "model.expert_width=0.77"], "gives channels that no shortcut joins: [16, 25, 49]"),
        (["model.experts=3", "model.name=one-hidden-layer"], "it has no stages to share"),
    ],
)
def test_invalid_expert_settings_are_refused(
    settings: list[str], message: str, digits: Path, toy: Path, tmp_path: Path
) -> None:
    data, recipe = (toy, "toy/cross-entropy") if "one-hidden" in settings[-1] else (digits, "digits/cross-entropy")
    flags = ("--data", data, "--recipe", recipe, "--out", tmp_path / "run")
    refused(2, message, "train-stage1", *flags, *setting(*settings))
    assert not (tmp_path / "run").exists()


# -- losses ------------------------------------------------------------------------------------------------------------

N = torch.tensor(COUNTS)


def drawn(experts: int, batch: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [E, B, 4], labels and weights."""
    generator = torch.Generator().manual_seed(experts)
    logits = 3 * torch.randn(experts, batch, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (batch,), generator=generator)
    return logits, labels, torch.rand(batch, dtype=torch.float64, generator=generator)


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(z: list[float], temperature: list[float]) -> list[float]:
    e = [math.exp(v / t) for v, t in zip(z, temperature, strict=True)]
    return [v / sum(e) for v in e]


@pytest.mark.parametrize("reweighting", [0.0, 1.0])
def test_expert_diversity_equals_a_plain_loop(reweighting: float) -> None:
    logits, _, _ = drawn(3)
    spread = [4 * n / sum(COUNTS) * 0.3 + 0.7 for n in COUNTS]
    t = [s / max(spread) if reweighting else 1.0 for s in spread]
    total = 0.0
    for b in range(12):
        p = [softmax(logits[e, b].tolist(), t) for e in range(3)]
        q = softmax(logits[:, b].mean(0).tolist(), t)
        total += sum(slow_kl(q, own) for own in p)
    found = expert_diversity(logits, N, torch.tensor([reweighting]), diversity=0.45, temperature_spread=0.3)
    assert float(found) == pytest.approx(-0.45 * (sum(t) / 4) ** 2 * total / 12)


def test_temperatures_of_cifar100_equal_those_by_hand() -> None:
    """At rho 100: 1 for the largest class, 0.807 for the smallest, 0.847 in the mean."""
    counts = torch.tensor(exponential_counts(500, 100, 100), dtype=torch.float64)
    spread = 100 * counts / counts.sum() * 0.05 + 0.95
    temperature = spread / spread.max()
    assert [round(float(v), 3) for v in (temperature[0], temperature[-1], temperature.mean())] == [1.0, 0.807, 0.847]
    logits = torch.zeros(2, 1, 100, dtype=torch.float64)
    logits[0, 0, 0] = 1.0
    log_p = F.log_softmax(logits / temperature, 2)
    q = (logits.mean(0) / temperature).softmax(1)
    expected = -(temperature.mean() ** 2) * (q * (q.log() - log_p)).sum()
    found = expert_diversity(logits, counts.long(), torch.ones(1), diversity=1.0, temperature_spread=0.05)
    torch.testing.assert_close(found, expected)


def test_the_mean_expert_has_no_gradient() -> None:
    logits = drawn(2)[0].requires_grad_()
    expert_diversity(logits, N, torch.zeros(1), diversity=-1.0, temperature_spread=0.0).backward()
    p, q = logits.detach().softmax(2), logits.detach().mean(0).softmax(1)
    torch.testing.assert_close(logits.grad, (p - q) / 12)


DRW = {"reweight": "effective-number", "beta": 0.9, "reweight_after": 2}
LDAM = {"draw": "natural", "loss": "ldam", "scale": 30.0, **DRW}
DIVERSE = {"regulariser": "expert-diversity", "diversity": 0.45, "temperature_spread": 0.05}


def term(**table: object) -> Term:
    (made,) = terms_of(erm=table)
    return made


def batch(labels: Tensor, y2: Tensor | None = None, lam: Tensor | None = None) -> TermBatch:
    weights = torch.tensor([0.4, 0.8, 1.2, 1.6], dtype=torch.float64)
    classes = ClassWeights(weights, torch.ones(1, dtype=torch.float64), (None, None))
    return TermBatch(torch.empty(0), labels, y2, lam, class_weights=classes)


@pytest.mark.parametrize("experts", [1, 3])
def test_ride_sums_ldam_over_its_experts(experts: int) -> None:
    """One expert is LDAM-DRW: its diversity is 0, and so is the gradient of it."""
    logits, labels, _ = drawn(experts)
    logits.requires_grad_()
    single = sum(term(**LDAM).loss(Output(z[None]), batch(labels), N) for z in logits)
    extra = expert_diversity(logits, N, torch.ones(1), diversity=0.45, temperature_spread=0.05)
    found, expected = term(**LDAM, **DIVERSE).loss(Output(logits), batch(labels), N), single + extra * (experts > 1)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_mixed_ride_of_equal_labels_is_ride() -> None:
    """CMO + RIDE: the diversity counts once, whatever lambda is."""
    logits, labels, lam = drawn(3)
    mixed = {"partner": "frequency-power", "power": 0.0, "ratio": "beta", "alpha": 1.0, "mix": "box", "label": "lambda"}
    plain = term(**LDAM, **DIVERSE).loss(Output(logits), batch(labels), N)
    torch.testing.assert_close(
        term(**LDAM, **DIVERSE, **mixed).loss(Output(logits), batch(labels, labels, lam), N), plain
    )


def test_distillation_equals_a_plain_loop() -> None:
    logits, _, _ = drawn(3)
    teacher = drawn(4)[0][0]
    t = [1.5] * 4
    total = 0.0
    for b in range(12):
        q = softmax(teacher[b].tolist(), t)
        total += sum(slow_kl(q, softmax(logits[e, b].tolist(), t)) for e in range(3))
    found = distillation(logits, teacher, temperature=1.5, factor=0.5)
    assert float(found) == pytest.approx(0.5 * 1.5**2 * total / 12)
    assert float(distillation(teacher.expand(3, -1, -1), teacher)) == pytest.approx(0)


def test_sade_sums_three_losses_with_shifted_priors() -> None:
    """Hand-made: priors 40, 30, 30, 10 reversed by rank are 10, 30, 30, 40."""
    counts = torch.tensor([40, 30, 30, 10])
    logits, labels, weights = drawn(3)
    shift = torch.tensor([math.log(40 / 10**2), math.log(30 / 30**2), math.log(30 / 30**2), math.log(10 / 40**2)])
    expected = cross_entropy(logits[0], labels, weights, counts) + balanced_softmax(logits[1], labels, weights, counts)
    expected = expected + cross_entropy(logits[2] + shift.double(), labels, weights, counts)
    torch.testing.assert_close(sade(logits, labels, weights, counts, tau=2.0), expected, atol=1e-6, rtol=1e-6)


def test_sade_ranks_the_larger_id_of_two_equal_classes_as_the_rarer_one() -> None:
    """Priors 40, 30, 10, 10: the last class gets 40 and the third 30, as when the order of the ids is reversed."""
    counts = torch.tensor([40, 30, 10, 10])
    logits, labels, weights = drawn(3)
    shift = torch.tensor([math.log(n / m) for n, m in zip((40, 30, 10, 10), (10, 10, 30, 40), strict=True)]).double()
    expected = cross_entropy(logits[0], labels, weights, counts) + balanced_softmax(logits[1], labels, weights, counts)
    expected = expected + cross_entropy(logits[2] + shift, labels, weights, counts)
    torch.testing.assert_close(sade(logits, labels, weights, counts, tau=1.0), expected, atol=1e-6, rtol=1e-6)


def test_sade_of_a_uniform_prior_is_three_times_cross_entropy() -> None:
    logits, labels, weights = drawn(3)
    logits = logits[:1].expand(3, -1, -1)
    even = torch.full((4,), 7)
    found = sade(logits, labels, weights, even, tau=1.7)
    torch.testing.assert_close(found, 3 * cross_entropy(logits[0], labels, weights, even))


def test_experts_get_target_classes_by_group_or_rank() -> None:
    groups = torch.tensor([300, 19, 100, 101, 20, 2])
    assert target_classes(groups, 3).tolist() == [
        [True] * 6,
        [False, True, True, False, True, True],  # 100 images and less
        [False, True, False, False, False, True],  # less than 20
    ]
    ranks = torch.tensor([50, 60, 70, 80, 90, 95])  # no few classes: thirds by rank
    assert target_classes(ranks, 3).tolist() == [[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4]
    assert target_classes(groups, 2).tolist() == [[True] * 6, [False, True, False, False, True, True]]


def test_ace_equals_a_plain_loop() -> None:
    counts = torch.tensor([300, 60, 15, 4])
    logits, labels, weights = drawn(3)
    total = 0.0
    for e, own in enumerate([{0, 1, 2, 3}, {1, 2, 3}, {2, 3}]):
        members = [b for b in range(12) if int(labels[b]) in own]
        assert members
        for b in members:
            z = logits[e, b].tolist()
            loss = -z[int(labels[b])] + math.log(sum(math.exp(v) for v in z))
            squares = sum(v * v for c, v in enumerate(z) if c not in own)
            loss += 0.7 * math.sqrt(squares)
            total += float(weights[b]) * loss / 12
    z = logits.clone().requires_grad_()
    found = ace(z, labels, weights, counts, interference=0.7)
    assert found.item() == pytest.approx(total)
    found.backward()
    assert z.grad is not None and z.grad.isfinite().all()  # the first expert has no other classes
    none = torch.zeros(12, dtype=torch.int64)  # no image for the later experts
    alone = cross_entropy(logits[0], none, weights, counts)
    torch.testing.assert_close(ace(logits, none, weights, counts), alone)


def test_combined_logits_average_all_experts_or_those_of_each_class() -> None:
    counts = torch.tensor([300, 60, 15, 4])
    model = network(experts=3)
    logits = drawn(3)[0].float()
    torch.testing.assert_close(combined(logits, "mean", model, counts), logits.mean(0))
    for k, head in enumerate(model.heads):
        torch.nn.init.constant_(head.weight, 1.0 + k)  # type: ignore[arg-type]
    found = combined(logits, "targets", model, counts)
    a, b, c = logits[0], logits[1] / 4, logits[2] / 9
    torch.testing.assert_close(found[:, 0], a[:, 0])
    torch.testing.assert_close(found[:, 1], (a[:, 1] + b[:, 1]) / 2)
    torch.testing.assert_close(found[:, 2:], (a + b + c)[:, 2:] / 3)


# -- routers -----------------------------------------------------------------------------------------------------------


def test_routers_learn_if_a_later_expert_is_needed() -> None:
    """Three experts, four images of class 0: right at once; right with the second; with the third; never."""

    def one(c: int, height: float) -> list[float]:
        return [height if k == c else 0.0 for k in range(3)]

    first = [one(0, 9), one(1, 1), one(1, 1), one(1, 9)]
    second = [one(0, 1), one(0, 2), one(1, 1), one(1, 1)]
    logits = torch.tensor([first, second, [one(0, 1), one(1, 9), one(0, 9), one(2, 1)]])
    wanted = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    routes = torch.tensor([[-2.0, 0.5, 1.0, 3.0], [0.1, -0.3, 2.0, -1.0]])
    total = 0.0
    for r, y in zip(routes.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-r))
        total += -100 * math.log(p) if y else -math.log(1 - p)
    assert float(routing(logits, routes, torch.zeros(4, dtype=torch.int64))) == pytest.approx(total / 8, rel=1e-5)


def test_the_threshold_decides_how_many_experts_are_averaged() -> None:
    routes = torch.tensor([[-300.0, 2.0, 2.0, 0.0], [5.0, -3.0, 1.0, 9.0]])
    assert routed_weights(routes, 0.0).allclose(torch.full((3, 4), 1 / 3))  # the full ensemble
    assert routed_weights(routes, 1.0).tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]  # the first expert
    half = routed_weights(routes, 0.5)
    third = pytest.approx(1 / 3)
    assert half.tolist() == [[1.0, 0.5, third, 1.0], [0.0, 0.5, third, 0.0], [0.0, 0.0, third, 0.0]]
    logits = drawn(3, batch=4)[0].float()
    found = combined(logits, "routed", network(experts=3), N, half)
    torch.testing.assert_close(found[0], logits[0, 0])
    torch.testing.assert_close(found[1], logits[:2, 1].mean(0))
    torch.testing.assert_close(found[2], logits[:, 2].mean(0))


def test_routers_see_the_experts_so_far(generator: torch.Generator) -> None:
    model = network(experts=3).eval()
    change_head(model, Finetune.model_construct(head="routers", router_top=30), 4, generator)  # of four classes, four
    x = torch.randn(2, 1, 8, 8, generator=generator)
    logits, routes = model.routed(x)
    torch.testing.assert_close(logits, model.expert_logits(x))
    parts = model.features(x).chunk(3, 1)
    routers = model.routers
    assert routers is not None
    for k in range(2):
        largest = logits[: k + 1].mean(0).sort(1, descending=True).values
        units = routers.units[k](parts[k] / parts[k].norm(dim=1, keepdim=True)).clamp(min=0)
        torch.testing.assert_close(routes[k], routers.decide(torch.cat([largest, units], 1))[:, 0])
    routes.sum().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"routers"}


# -- test sets of another distribution ---------------------------------------------------------------------------------


def test_shifted_profiles_follow_or_reverse_the_training_counts() -> None:
    counts, num_test = torch.tensor([5, 50, 500]), torch.tensor([100, 100, 120])
    assert shifted_profile(counts, num_test, "forward", 50).tolist() == [2, 14, 100]
    assert shifted_profile(counts, num_test, "backward", 50).tolist() == [100, 14, 2]
    assert shifted_profile(counts, num_test, "forward", 1).tolist() == [100, 100, 100]
    equal = torch.tensor([500, 5, 5])  # the larger id counts as the rarer one
    assert shifted_profile(equal, num_test, "forward", 50).tolist() == [100, 14, 2]
    assert shifted_profile(equal, num_test, "backward", 50).tolist() == [2, 14, 100]


def test_weights_are_what_subsets_give_on_average(generator: torch.Generator) -> None:
    """Exactly so for the accuracy; every image of class c counts as profile / images of c."""
    labels = torch.arange(3).repeat_interleave(40)
    logits = torch.randn(120, 3, generator=generator) + 1.5 * F.one_hot(labels, 3)
    profile = torch.tensor([40, 10, 2])
    found = summary(logits, labels, ["many", "medium", "few"], profile)
    right = (logits.argmax(1) == labels).double()
    taken = []
    for _ in range(3000):
        chosen = torch.cat([40 * c + torch.randperm(40, generator=generator)[:n] for c, n in enumerate((40, 10, 2))])
        taken.append(float(right[chosen].mean()))
    assert found["top1"] == pytest.approx(100 * sum(taken) / len(taken), abs=0.3)
    plain = summary(logits, labels, ["many", "medium", "few"])
    assert [found[group] for group in ("many", "medium", "few")] == [plain[g] for g in ("many", "medium", "few")]
    assert summary(logits, labels, ["many"] * 3, torch.tensor([40, 40, 40])) == summary(logits, labels, ["many"] * 3)


# -- weights learnt from test images -----------------------------------------------------------------------------------


def test_the_expert_that_agrees_with_itself_gets_the_weight() -> None:
    """The first says the same of both views, surely; the others say one thing of one and another of the other."""
    sure = torch.tensor([[9.0, 0.0, 0.0, 0.0]])

    calls = []

    def views(batch: Tensor, call: int) -> tuple[Tensor, Tensor]:
        calls.append(call)
        first = torch.stack([sure, sure.roll(1, 1), sure.roll(1, 1)]).expand(-1, len(batch), -1)
        second = torch.stack([sure, sure.roll(2, 1), sure.roll(2, 1)]).expand(-1, len(batch), -1)
        return first, second

    def learnt(views: Views, rate: float) -> Tensor:
        return learn_expert_weights(views, torch.arange(300), 3, Optimizer(lr=rate, nesterov=True), seed=0)

    weights = learnt(views, 0.1)
    assert calls == list(range(15))  # five epochs of three batches
    calls.clear()
    assert float(weights.sum()) == pytest.approx(1)
    assert weights[0] > 0.5
    assert weights[1] == pytest.approx(float(weights[2]))
    again = learnt(views, 1000.0)
    assert again.min() < 0.05
    assert calls == [0, 1, 2]  # it ended after the first epoch
    alike = learnt(lambda b, c: (views(b, c)[0][:1].expand(3, -1, -1),) * 2, 0.1)
    torch.testing.assert_close(alike, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("nesterov", [False, True])
def test_weights_are_learnt_as_the_recipe_trains(nesterov: bool) -> None:
    """Three images, so one step an epoch: five steps of SGD by hand."""
    first, second = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    recipe = Optimizer(lr=0.5, momentum=0.6, nesterov=nesterov, weight_decay=0.2)
    free, moved = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(5):
        own = free.clone().requires_grad_()
        p, q = (torch.einsum("e,ebc->bc", own.softmax(0), z).softmax(1) for z in (first, second))
        loss = -((p * q).sum(1) / p.norm(dim=1) / q.norm(dim=1)).mean()
        (slope,) = torch.autograd.grad(loss, own)
        slope = slope + 0.2 * free
        moved = 0.6 * moved + slope
        free = free - 0.5 * (slope + 0.6 * moved if nesterov else moved)
    assert (free.softmax(0) - 0.5).abs().max() > 0.01
    found = learn_expert_weights(
        lambda b, c: (first[:, b].float(), second[:, b].float()), torch.arange(3), 2, recipe, 0
    )
    torch.testing.assert_close(found, free.softmax(0).float())


def test_weights_are_learnt_from_images_drawn_by_the_profile(generator: torch.Generator) -> None:
    """As many of each class as the profile says, none twice, other ones of another order; without a profile all."""
    labels = torch.arange(3).repeat(40)
    everything = images_to_learn_from(labels, None, generator)
    assert everything.sort().values.tolist() == list(range(120)) and everything.tolist() != list(range(120))
    profile = torch.tensor([40, 7, 2])
    taken = [images_to_learn_from(labels, profile, generator) for _ in range(2)]
    for chosen in taken:
        assert labels[chosen].bincount().tolist() == [40, 7, 2]
        assert len(set(chosen.tolist())) == 49
    rare = [set(chosen[labels[chosen] > 0].tolist()) for chosen in taken]
    assert rare[0] != rare[1]


def test_views_are_random_by_image_and_repeatable() -> None:
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    first, same, other = (weakly_changed(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(first, same) and not torch.equal(first, other)
    grey = weakly_changed(images[:2, :8, :8, :1], torch.Generator().manual_seed(0))
    assert grey.shape == (2, 8, 8, 1)


# -- the phases --------------------------------------------------------------------------------------------------------

CPMIX_RIDE = """
extends = "digits/cpmix"
without = ["finetune"]
model = { experts = 3, head = "cosine", expert_width = 0.75 }
stage1.terms.erm = { loss = "ldam", scale = 30.0, regulariser = "expert-diversity", diversity = 0.45 }
[stage2.terms.erm]
loss = "ldam"
scale = 30.0
reweight = "effective-number"
beta = 0.999
regulariser = "expert-diversity"
diversity = 0.45
temperature_spread = 0.05
"""


@pytest.mark.slow
def test_cpmix_on_ride_runs_through_all_phases(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "ride.toml"
    recipe.write_text(CPMIX_RIDE)
    run = tmp_path / "run"
    first = must("train-stage1", "--data", digits, "--recipe", recipe, "--epochs", 6, "--out", run)
    assert first.stderr.splitlines()[-1] == f"next: cpmix train-stage2 --from {run}"
    must("train-stage2", "--from", run)
    assert must("finetune", "--from", run, "--json").json["skipped"] is True
    found = must("evaluate", "--from", run)
    rows = [" ".join(line.split()[:2]) for line in found.stdout.splitlines()]
    assert [row for row in rows if "expert" in row] == ["expert 1", "expert 2", "expert 3"]
    numbers = must("evaluate", "--from", run, "--json").json
    assert numbers["num_experts"] == len(numbers["experts"]) == 3
    tensors, _ = read_tensors(run / "evaluation" / "stage2" / "logits.safetensors")
    torch.testing.assert_close(tensors["logits"], tensors["expert_logits"].mean(0))
    for z, expert in zip(tensors["expert_logits"], numbers["experts"], strict=True):
        assert expert["top1"] == round(100 * float((z.argmax(1) == tensors["labels"]).double().mean()), 2)
        assert expert["num_test"] == 500
    must("confusion-report", "--from", run)
    # The ensemble's errors are counted, and all of them go into the pairs.
    pairs = tables.read_table(run / "stage2" / "confusion_pairs.parquet")
    epochs = pd.concat([tables.read_table(run / phase / "metrics.parquet") for phase in ("stage1", "stage2")])
    assert pairs["count"].sum() == epochs["num_confusions"].sum()
    assert epochs["num_confusions"].sum() == pytest.approx((417 * (1 - epochs["train_accuracy"])).sum())


@pytest.mark.slow
def test_evaluate_applies_post_hoc_keys_and_test_distributions(digits: Path, tmp_path: Path) -> None:
    flags = ["--recipe", "digits/cross-entropy", "--set", "model.experts=3", "--set", "stage1.terms.erm.loss=sade"]
    must("train-stage1", "--data", digits, *flags, "--epochs", 4, "--out", tmp_path)
    plain = must("evaluate", "--from", tmp_path, "--json").json
    assert (plain["test_distribution"], plain["temperature"]) == ("uniform", 1.0)
    assert (plain["num_test"], plain["num_test_profile"]) == (500, None)
    found = {}
    for way in ("forward", "backward"):
        shifted = must("evaluate", "--from", tmp_path, "--test-distribution", way, "--ratio", 20, "--json").json
        assert shifted["folder"] == str(tmp_path / "evaluation" / f"stage1-{way}-20")
        assert shifted["test_distribution"] == f"{way}-20"
        # 50 images a class at most, then 50 / 20 ** (c / 9), cut to whole ones.
        assert (shifted["num_test"], shifted["num_test_profile"]) == (500, 50 + 35 + 25 + 18 + 13 + 9 + 6 + 4 + 3 + 2)
        assert shifted["balanced_accuracy"] == plain["balanced_accuracy"]
        found[way] = [n["top1"] for n in (shifted, *shifted["experts"])]
    assert found["forward"] != found["backward"]
    assert found["forward"][1] > found["backward"][1]  # the first expert knows the common classes
    warm = must("evaluate", "--from", tmp_path, "--set", "evaluation.temperature=2.5", "--json").json
    assert warm["folder"].endswith("stage1-temperature-2.5")
    assert (warm["top1"], warm["ece"] != plain["ece"]) == (plain["top1"], True)
    # Each expert is measured as their mean is; what is saved is raw.
    flags = ["--set", "evaluation.temperature=2.5", "--set", "evaluation.logit_adjustment=1.0", "--json"]
    changed = must("evaluate", "--from", tmp_path, *flags).json
    tensors, _ = read_tensors(Path(changed["folder"]) / "logits.safetensors")
    raw, _ = read_tensors(tmp_path / "evaluation" / "stage1" / "logits.safetensors")
    assert tensors["expert_logits"].equal(raw["expert_logits"])
    prior = open_dataset(digits).class_counts / 614
    for z, expert in zip(raw["expert_logits"], changed["experts"], strict=True):
        again = summary((z - torch.tensor(prior).log()) / 2.5, raw["labels"], ["many"] * 10)
        assert [expert[key] for key in ("top1", "ece")] == [again[key] for key in ("top1", "ece")]
    assert [expert["top1"] for expert in changed["experts"]] != [expert["top1"] for expert in plain["experts"]]
    flags = ["--set", "evaluation.aggregate=test-time", "--test-distribution", "backward", "--json"]
    learnt = must("evaluate", "--from", tmp_path, *flags).json
    assert learnt["folder"].endswith("stage1-backward-50-aggregate-test-time")
    assert sum(learnt["expert_weights"]) == pytest.approx(1, abs=1e-3)
    tensors, _ = read_tensors(Path(learnt["folder"]) / "logits.safetensors")
    mean = torch.einsum("e,enc->nc", torch.tensor(learnt["expert_weights"]), tensors["expert_logits"])
    torch.testing.assert_close(tensors["logits"], mean, atol=2e-3, rtol=1e-2)  # weights are told with four digits
    again = must("evaluate", "--from", tmp_path, *flags, "--overwrite").json
    assert again["expert_weights"] == learnt["expert_weights"]
    uniform = must("evaluate", "--from", tmp_path, *flags[:2], "--json").json
    assert uniform["folder"].endswith("stage1-aggregate-test-time")
    assert sum(uniform["expert_weights"]) == pytest.approx(1, abs=1e-3)
    assert uniform["expert_weights"] != learnt["expert_weights"]
    evaluate = ("evaluate", "--from", tmp_path)
    refused(2, 'needs finetune.head = "routers"', *evaluate, "--set", "evaluation.aggregate=routed")
    refused(2, "--ratio 10 has no effect on a uniform test distribution", *evaluate, "--ratio", 10)
    infinite = "--ratio inf is not a finite number"
    refused(2, infinite, *evaluate, "--test-distribution", "forward", "--ratio", "inf")
    said = ("--ratio 51 leaves 1 class without a test image: the largest has 50", "fix: give --ratio 50, or less")
    for way in ("forward", "backward"):
        refused(3, said, *evaluate, "--test-distribution", way, "--ratio", 51)
    refused(2, (), *evaluate, "--test-distribution", "sideways")


def test_test_accuracy_in_training_equals_that_of_evaluate(digits: Path, tmp_path: Path) -> None:
    flags = setting("model.experts=3", "stage1.terms.erm.loss=ace", "evaluation.aggregate=targets")
    flags += ["--recipe", "digits/cross-entropy", "--epochs", "3", "--eval-every", "3"]
    must("train-stage1", "--data", digits, *flags, "--out", tmp_path)
    curve = tables.read_table(tmp_path / "stage1" / "metrics.parquet")["test_accuracy"]
    found = must("evaluate", "--from", tmp_path, "--json").json
    assert round(100 * curve.iloc[-1], 2) == found["top1"]
    mean = must("evaluate", "--from", tmp_path, "--set", "evaluation.aggregate=mean", "--json").json
    assert mean["top1"] != found["top1"]


@pytest.mark.slow
def test_a_student_comes_near_its_teacher(digits: Path, tmp_path: Path) -> None:
    """To one that is seldom sure of anything."""
    plain = ["train-stage1", "--data", digits, "--recipe", "digits/cross-entropy", "--epochs", 20]
    must(*plain[:-1], 3, "--out", tmp_path / "teacher")
    taught = [*plain, "--set", "model.experts=2", "--set", "stage1.terms.erm.teacher=distillation"]
    taught += ["--set", "stage1.terms.erm.factor=2.0", "--seed", 1]
    must(*taught, "--teacher", tmp_path / "teacher", "--out", tmp_path / "student")
    must(*plain, "--set", "model.experts=2", "--seed", 1, "--out", tmp_path / "alone")
    logits = {}
    for run in ("teacher", "student", "alone"):
        must("evaluate", "--from", tmp_path / run, "--phase", "stage1")
        tensors, _ = read_tensors(tmp_path / run / "evaluation" / "stage1" / "logits.safetensors")
        logits[run] = tensors["logits"].log_softmax(1)
    student, alone = (
        F.kl_div(logits[run], logits["teacher"], reduction="batchmean", log_target=True) for run in ("student", "alone")
    )
    assert student < 0.5 * alone
    weights = tmp_path / "teacher" / "stage1" / "model.safetensors"
    assert "up to date" in must(*taught, "--teacher", weights, "--out", tmp_path / "student").stdout
    out, teacher = ("--out", tmp_path / "no"), ("--teacher", tmp_path / "teacher")
    refused(2, "stage1.terms.erm learns from a teacher", *taught, *out)
    refused(2, "no term of the recipe learns from a teacher", *plain, *teacher, *out)
    must("build-lt", "digits", "--rho", 5, "--out", tmp_path / "other")
    refused(3, "not on digits-lt-rho5", *taught, "--data", tmp_path / "other", *teacher, *out)
    said = ('of data.normalisation = "dataset", the recipe has "none"', "--set data.normalisation=dataset")
    refused(3, said, *taught, "--set", "data.normalisation=none", *teacher, *out)
    taught_stage1 = ("--set", "stage1.terms.erm.teacher=distillation")
    refused(2, "bench takes no --teacher", "bench", "--data", digits, *taught[3:5], *taught_stage1)
    assert not (tmp_path / "no").exists()


def first_step(context: PhaseContext, plan: Plan, state: TrainingState) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Take the first step of an epoch of one natural term; its images, their labels, and the sums."""
    data = training_data(context.dataset, context.recipe, context.device)
    size = min(plan.batch_size, len(data.labels))
    draws = draw_epoch(plan.terms, len(data.labels), plan.batch_size, (plan.seed, plan.phase), 1, plan.num_epochs, 3)
    chosen = draws["order"][0, :size]
    state.sums = sums_of(plan)
    step = Step(plan, data, state)
    step.begin_epoch(1)
    x = data.batches.batch(chosen, draws["augment"][0, :size])
    step(0)
    return x, data.labels[chosen], state.sums.read()


def test_a_teacher_is_the_mean_of_its_experts_as_they_were_trained(digits: Path, tmp_path: Path) -> None:
    """In eval mode: the step moves none of its running statistics; without the normalised heads of its evaluation."""
    recipe = ["--recipe", "digits/cross-entropy", "--set", "model.experts=2", "--set", "evaluation.tau_norm=1.0"]
    must("train-stage1", "--data", digits, *recipe, "--epochs", 2, "--out", tmp_path)
    settings = ["stage1.terms.erm.teacher=distillation", "model.precision=fp32"]
    context = PhaseContext(load("digits/cross-entropy", settings=settings), open_dataset(digits), CPU, "fp32", {})
    plan, state = _prepare(None, None, PhaseFolder(tmp_path, "stage1"), context)
    assert plan.teacher is not None and not plan.teacher.training
    saved, _ = read_tensors(tmp_path / "stage1" / "model.safetensors")
    student = copy.deepcopy(state.model).train()
    x, labels, sums = first_step(context, plan, state)
    assert all(tensor.equal(saved[name]) for name, tensor in plan.teacher.state_dict().items())
    teacher = build_model(Model(name="resnet8", experts=2), 10, (8, 8, 1), torch.Generator()).eval()
    teacher.load_state_dict(saved)
    with torch.no_grad():
        logits = student(x)
        expected = F.cross_entropy(logits, labels) + distillation(logits[None], teacher.expert_logits(x).mean(0))
    assert sums["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_finetune_trains_only_the_routers(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "routed.toml"
    recipe.write_text(
        'extends = "digits/cross-entropy"\n[model]\nexperts = 3\n[finetune]\nhead = "routers"\ntrain = ["routers"]\n'
        'lr = 0.05\n[finetune.terms.erm]\nloss = "routing"\n[evaluation]\naggregate = "routed"\n'
    )
    run = tmp_path / "run"
    must("train-stage1", "--data", digits, "--recipe", recipe, "--epochs", 12, "--out", run)
    stage1 = must("evaluate", "--from", run, "--phase", "stage1", "--json").json
    assert (stage1["experts_used"], stage1["expert_weights"]) == (3.0, None)  # it has no routers yet
    must("finetune", "--from", run)
    before, after = (read_tensors(run / p / "model.safetensors")[0] for p in ("stage1", "finetune"))
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"routers"}
    found = must("evaluate", "--from", run, "--json").json
    assert 1 <= found["experts_used"] <= 3
    shifted = must("evaluate", "--from", run, "--test-distribution", "backward", "--json").json
    tensors, _ = read_tensors(Path(shifted["folder"]) / "logits.safetensors")
    logits, experts, labels = tensors["logits"], tensors["expert_logits"], tensors["labels"]
    so_far = experts.cumsum(0) / torch.arange(1, 4)[:, None, None]
    used = (so_far - logits).abs().sum(2).argmin(0) + 1.0
    by_class = torch.stack([used[labels == c].double().mean() for c in range(10)])
    profile = torch.from_numpy(exponential_counts(50, 10, 50)).flip(0).double()  # digits' classes stand by their size
    assert shifted["experts_used"] == pytest.approx(float(by_class @ profile / profile.sum()), abs=1e-3)
    assert abs(shifted["experts_used"] - found["experts_used"]) > 0.005
    weight = sum((used >= k).double() / used for k in range(1, 2))
    by_class = torch.stack([weight[labels == c].mean() for c in range(10)])
    assert shifted["expert_weights"][0] == pytest.approx(float(by_class @ profile / profile.sum()), abs=1e-3)
    for threshold, same in (("0", stage1), ("1", stage1["experts"][0])):
        other = must("evaluate", "--from", run, "--set", f"evaluation.routing_threshold={threshold}.0", "--json").json
        assert other["folder"].endswith(f"finetune-routing-threshold-{threshold}")
        assert [other[key] for key in ("top1", "ece")] == [same[key] for key in ("top1", "ece")]
    must("confusion-report", "--from", run)
    routers = ["finetune.head=routers", "finetune.terms.erm.loss=routing"]
    for settings, message in (
        (["finetune.head=routers"], 'finetune.head = "routers" needs finetune.terms.erm.loss = "routing"'),
        (["stage1.terms.erm.loss=routing"], 'stage1.terms.erm.loss = "routing" goes into finetune only'),
        (routers, "needs model.experts = 2 or more"),
        (["model.experts=2", *routers], 'needs finetune.train = ["routers"]'),
    ):
        flags = ("--data", digits, "--recipe", "digits/cross-entropy", "--out", run)
        refused(2, message, "train-stage1", *flags, *setting(*settings))


def test_routers_learn_in_fp32(digits: Path) -> None:
    """Under bf16 autocast too: their loss is that of their logits in full, as the experts' is."""
    settings = ["model.experts=3", "finetune.head=routers", 'finetune.train=["routers"]']
    settings += [f"finetune.terms.erm.{key}" for key in ("loss=routing", "draw=natural")]
    context = PhaseContext(load("digits/cross-entropy", settings=settings), open_dataset(digits), CPU, "bf16", {})
    plan, state = rehearsal(context, "finetune")
    state.model.train(plan.train_mode)
    model = copy.deepcopy(state.model)
    x, labels, sums = first_step(context, plan, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, routes = model.routed(x)
    assert routes.dtype == torch.bfloat16
    assert sums["loss"] == routing(logits.float(), routes.float(), labels).item()


def test_ace_scales_learning_rates_by_the_share_of_images(digits: Path) -> None:
    """Expert k learns at lr times its share of the training images, in its stages and its head."""
    settings = ["model.experts=3", "stage1.terms.erm.loss=ace", "optimizer.expert_rates=target-share"]
    recipe = load("digits/cross-entropy", settings=settings)
    dataset = open_dataset(digits)
    state = fresh_state(PhaseContext(recipe, dataset, CPU, "fp32", {}))
    n = dataset.class_counts
    shares = [1.0, n[n <= 100].sum() / n.sum(), n[n < 20].sum() / n.sum()]
    factors = {id(p): g["lr_factor"] for g in state.optimizer.param_groups for p in g["params"]}
    for name, parameter in state.model.named_parameters():
        part, k = name.split(".")[:2]
        expected = shares[int(k)] if part in ("experts", "head") else 1.0
        assert factors[id(parameter)] == pytest.approx(expected), name
