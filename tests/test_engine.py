"""The training loop: one step of each stage against a plain loop over samples, and what may change and what may not."""

import copy
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpmix_cli.confusion import draw_confused
from cpmix_cli.data.batches import Batches, ClassPool, ImageBatches, PointBatches
from cpmix_cli.evaluation import prediction
from cpmix_cli.models import Classifier, build_model
from cpmix_cli.recipe.schema import Data, Model, Optimizer, ParameterGroup, Stage
from cpmix_cli.runtime import signals
from cpmix_cli.runtime.errors import Diverged, Interrupted
from cpmix_cli.training.loop import first_step, fit, load_state, make_optimizer, state_tensors
from cpmix_cli.training.objective import Term, compile_stage, draw_epoch
from cpmix_cli.training.step import Plan, TrainingData, TrainingState

LR, MOMENTUM, DECAY = 0.1, 0.9, 2e-4
COUNTS = [14, 6, 3, 1]
IMAGES = torch.randint(0, 256, (24, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
STD = 64 / 255  # a power of two, so both sides normalise to the same float32
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))

ERM = {"draw": "natural", "loss": "balanced-softmax"}
MIXED = {
    "ratio": "beta",
    "alpha": 1.5,
    "mix": "linear",
    "label": "imbalance-aware",
    "t": 0.5,
    "loss": "cross-entropy",
    "weight": 2.5,
}
CP = {"draw": "class-uniform", "partner": "confusion", **MIXED}
MIX = {"draw": "natural", "partner": "permutation", **MIXED}


def terms_of(**tables: dict[str, object]) -> list[Term]:
    return compile_stage(Stage.model_validate({"terms": tables}))


def data() -> TrainingData:
    recipe = Data(augment="crop", padding=1, normalisation="dataset")
    batches = ImageBatches(IMAGES, recipe, [0.5], [STD])
    return TrainingData(batches, LABELS, torch.tensor(COUNTS))


def in_double(model: Classifier) -> Classifier:
    """The network in float64: in float32 two orders of the same sums can fall on two sides of a ReLU's kink."""
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model.double()


def fresh(epoch: int = 1) -> TrainingState:
    model = in_double(build_model(Model(name="resnet8"), 4, (8, 8, 1), torch.Generator().manual_seed(0)))
    recipe = Optimizer(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, batch_size=64)
    confusion = torch.zeros(4, 4, dtype=torch.float64)
    return TrainingState(model, make_optimizer(model, recipe), confusion, epoch=epoch)


def plan_of(terms: list[Term], epochs: int, *, batch: int = 64, joint: bool = True) -> Plan:
    return Plan("stage2", 11, terms, joint, 1, epochs, epochs, batch, lambda *_: LR)


def never() -> None:
    """A publish that writes nowhere: these tests look at the state itself."""


def crop(image: Tensor, uniforms: list[float]) -> Tensor:
    """One augmented image [1, 8, 8], pixel by pixel: black border of 1, crop, normalise."""
    row, column = int(uniforms[0] * 3), int(uniforms[1] * 3)
    out = torch.zeros(1, 8, 8)
    for i in range(8):
        for j in range(8):
            y, x = i + row - 1, j + column - 1
            value = float(image[y, x, 0]) if 0 <= y < 8 and 0 <= x < 8 else 0.0
            out[0, i, j] = (value / 255 - 0.5) / STD
    return out


def one_hot_loss(logits: Tensor, target: list[float], shift: list[float]) -> Tensor:
    """- sum_c q_c log softmax(z + shift)_c of one sample, term by term."""
    z = logits + torch.tensor(shift)
    log_sum = torch.log(sum(torch.exp(z[c]) for c in range(len(target))))  # type: ignore[arg-type]
    return sum((-q * (z[c] - log_sum) for c, q in enumerate(target)), torch.zeros(()))


def check_against_loop(
    state: TrainingState,
    terms: list[Term],
    loop: Callable[[Classifier], Tensor],
    *,
    nesterov: bool = False,
    groups: Sequence[ParameterGroup] = (),
) -> TrainingState:
    """Run one step by fit() and one by hand (momentum from the state, if any); compare weights and loss.

    Args:
        state: changed in place.
        terms: of the plan.
        loop: the network -> the loss by hand.
        nesterov: of the state's optimizer.
        groups: of the same.
    """
    by_hand = copy.deepcopy(state)
    fit(plan_of(terms, state.epoch), data(), state, publish=never)

    model = by_hand.model.train()
    loss = loop(model)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        buffer = by_hand.optimizer.state.get(p, {}).get("momentum_buffer")
        own = next((group for group in groups if name.startswith(group.prefix)), ParameterGroup(prefix=""))
        step = g + (DECAY if own.weight_decay is None else own.weight_decay) * p.detach()
        velocity = step if buffer is None else MOMENTUM * buffer + step
        expected = p.detach() - LR * own.lr_factor * (step + MOMENTUM * velocity if nesterov else velocity)
        found = state.model.get_parameter(name).detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert state.history[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    return state


def erm_loop(epoch: int) -> Callable[[Classifier], Tensor]:
    """Balanced Softmax over the samples of the epoch's one step."""
    draws = draw_epoch(terms_of(erm=ERM), 24, 64, (11, "stage2"), epoch, 9, 3)
    prior = [float(torch.tensor(n).log()) for n in COUNTS]

    def loop(model: Classifier) -> Tensor:
        order = draws["order"][0, :24].tolist()
        x = torch.stack([crop(IMAGES[i], draws["augment"][0, b].tolist()) for b, i in enumerate(order)])
        logits = model(x)
        losses = []
        for b, i in enumerate(order):
            target = [float(c == LABELS[i]) for c in range(4)]
            losses.append(one_hot_loss(logits[b], target, prior))
        return torch.stack(losses).sum() / len(losses)

    return loop


def test_one_step_of_stage_1_is_that_of_a_loop_over_samples() -> None:
    check_against_loop(fresh(), terms_of(erm=ERM), erm_loop(1))


def test_two_steps_with_nesterov_and_parameter_groups() -> None:
    """v = 0.9 v + g + decay w, and w loses factor * rate * (g + decay w + 0.9 v); the first group that fits counts."""
    groups = [
        ParameterGroup(prefix="head.bias", lr_factor=0.5, weight_decay=0.0),
        ParameterGroup(prefix="head", lr_factor=3.0),
        ParameterGroup(prefix="conv1", lr_factor=0.0),
        ParameterGroup(prefix="blocks.1", lr_factor=0.1, weight_decay=0.05),
    ]
    recipe = Optimizer(momentum=MOMENTUM, nesterov=True, weight_decay=DECAY, groups=groups)
    state = fresh()
    state.optimizer = make_optimizer(state.model, recipe)
    for epoch in (1, 2):
        state.epoch, state.step = epoch, 0
        check_against_loop(state, terms_of(erm=ERM), erm_loop(epoch), nesterov=True, groups=groups)


def test_one_step_of_stage_2_is_that_of_a_loop_over_samples() -> None:
    """Equation (13) on the same draws: three batches in one forward, Eq. (9) labels, stage 1's momentum carried on."""
    state = fresh()
    fit(plan_of(terms_of(erm=ERM), 2), data(), state, publish=never)
    state.confusion[3, 0] += 4.0
    before = state.confusion.clone()
    state.epoch, state.step = 3, 0
    terms = terms_of(erm=ERM, cp=CP, mix=MIX)
    draws = draw_epoch(terms, 24, 64, (11, "stage2"), 3, 9, 3)
    prior = [float(torch.tensor(n).log()) for n in COUNTS]
    by_class = [torch.nonzero(c == LABELS).flatten().tolist() for c in range(4)]

    def eq9(lam: float, a: int, b: int) -> list[float]:
        lam_y = 0.5 * lam + 0.5 * COUNTS[b] / (COUNTS[a] + COUNTS[b])
        target = [0.0] * 4
        target[a] += lam_y
        target[b] += 1 - lam_y
        return target

    def loop(model: Classifier) -> Tensor:
        order = draws["order"][0, :24].tolist()
        natural = [crop(IMAGES[i], draws["augment"][0, b].tolist()) for b, i in enumerate(order)]
        labels = [int(LABELS[i]) for i in order]
        targets = [[float(c == y) for c in range(4)] for y in labels]

        lam = float(draws["cp/ratio"][0, 0])
        paired = []
        for b in range(24):
            c_t = int(float(draws["cp/class"][0, b]) * 4)
            uniform = draws["cp/partner"][0, b : b + 1]
            c_m = int(draw_confused(before, torch.tensor([c_t]), uniform)[0])
            pictures = []
            for c, image, augment in (
                (c_t, "cp/image", "cp/augment"),
                (c_m, "cp/partner-image", "cp/partner-augment"),
            ):
                i = by_class[c][int(float(draws[image][0, b]) * COUNTS[c])]
                pictures.append(crop(IMAGES[i], draws[augment][0, b].tolist()))
            paired.append(lam * pictures[0] + (1 - lam) * pictures[1])
            targets.append(eq9(lam, c_t, c_m))

        lam = float(draws["mix/ratio"][0, 0])
        partner = sorted(range(24), key=lambda b: float(draws["mix/partner"][0, b]))
        mixed = [lam * natural[b] + (1 - lam) * natural[partner[b]] for b in range(24)]
        targets += [eq9(lam, labels[b], labels[partner[b]]) for b in range(24)]

        logits = model(torch.stack(natural + paired + mixed))
        shifts = [prior] * 24 + [[0.0] * 4] * 48
        losses = [one_hot_loss(z, q, s) for z, q, s in zip(logits, targets, shifts, strict=True)]
        erm, cp, mix = (torch.stack(losses[24 * i : 24 * i + 24]).sum() / 24 for i in range(3))
        return erm + 2.5 * cp + 2.5 * mix

    check_against_loop(state, terms, loop)


def test_confusions_are_the_errors_of_the_epoch() -> None:
    state = fresh()
    # One step an epoch: its predictions are those of the network as it stood, in train mode, on the augmented batch.
    before = copy.deepcopy(state.model).train()
    terms = terms_of(erm=ERM, cp=CP)
    fit(plan_of(terms, 1), data(), state, publish=never)
    draws = draw_epoch(terms, 24, 64, (11, "stage2"), 1, 9, 3)
    separate = fresh()
    fit(plan_of(terms, 1, joint=False), data(), separate, publish=never)
    order = draws["order"][0, :24]
    predictions = before(data().batches.batch(order, draws["augment"][0, :24])).argmax(1)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for y, p in zip(LABELS[order].tolist(), predictions.tolist(), strict=True):
        expected[y, p] += y != p
    assert separate.confusion.equal(expected)
    assert expected.sum() > 0


def test_confusions_add_up_over_epochs_and_partial_batches() -> None:
    state = fresh()
    fit(plan_of(terms_of(erm=ERM, cp=CP), 4, batch=7), data(), state, publish=never)
    assert sum(row["num_confusions"] or 0 for row in state.history) == state.confusion.sum()
    assert state.confusion.diagonal().sum() == 0
    for row in state.history:
        assert row["num_confusions"] == round(24 * (1 - (row["train_accuracy"] or 0)))


def test_confusion_start_and_decay() -> None:
    late, decayed = fresh(), fresh()
    plan = plan_of(terms_of(erm=ERM), 3, batch=7)
    fit(Plan(**{**vars(plan), "confusion_start": 3}), data(), late, publish=never)
    assert [row["num_confusions"] for row in late.history[:2]] == [0, 0]
    assert late.confusion.sum() == late.history[2]["num_confusions"]
    fit(Plan(**{**vars(plan), "confusion_decay": 0.5}), data(), decayed, publish=never)
    a, b, c = (row["num_confusions"] for row in decayed.history)
    assert a and b is not None and c is not None
    assert decayed.confusion.sum() == a / 4 + b / 2 + c


def test_separate_forwards_give_each_term_its_own_batch_statistics() -> None:
    terms = terms_of(erm=ERM, cp=CP)
    states = [fresh(), fresh()]
    for state, joint in zip(states, (True, False), strict=True):
        fit(plan_of(terms, 1, joint=joint), data(), state, publish=never)
    assert states[0].model.bn1.num_batches_tracked == 1
    assert states[1].model.bn1.num_batches_tracked == 2
    assert states[0].history[0]["loss"] != states[1].history[0]["loss"]


def test_a_term_of_weight_0_is_left_out() -> None:
    with_zero, without = fresh(), fresh()
    fit(plan_of(terms_of(erm=ERM, cp={**CP, "weight": 0.0}), 2), data(), with_zero, publish=never)
    fit(plan_of(terms_of(erm=ERM), 2), data(), without, publish=never)
    assert with_zero.history[-1].keys() == without.history[-1].keys()
    for name, tensor in without.model.state_dict().items():
        assert tensor.equal(with_zero.model.state_dict()[name])


def test_t_1_and_equal_counts_make_the_mix_term_plain_mixup() -> None:
    """L(y1, lambda) + L(y2, 1 - lambda) with the labels of vanilla mixup, on the same draws."""
    vanilla = {k: v for k, v in MIX.items() if k != "t"} | {"label": "lambda"}
    states = [fresh(), fresh()]
    for state, table in zip(states, ({**MIX, "t": 1.0}, vanilla), strict=True):
        fit(plan_of(terms_of(mix=table), 2), data(), state, publish=never)
    assert states[0].history[-1]["loss"] == states[1].history[-1]["loss"]
    assert states[0].history[-1]["num_confusions"] is None
    assert states[0].history[-1]["train_accuracy"] is None


class Signalling:
    """Images whose reader gets SIGTERM while it makes the natural batch of a step (the first of three a step)."""

    def __init__(self, batches: Batches, at: int) -> None:
        self._batches = batches
        self._left = 3 * at
        self.num_uniforms, self.device, self.resident = batches.num_uniforms, batches.device, True

    def batch(self, indices: Tensor, uniforms: Tensor) -> Tensor:
        if self._left == 0:
            signal.raise_signal(signal.SIGTERM)
        self._left -= 1
        return self._batches.batch(indices, uniforms)

    def plain(self, indices: Tensor) -> Tensor:
        return self._batches.plain(indices)

    def prefetch(self, indices: Tensor, uniforms: Tensor | None) -> None:
        self._batches.prefetch(indices, uniforms)


def signalling(step: int) -> TrainingData:
    whole = data()
    return TrainingData(Signalling(whole.batches, step), whole.labels, whole.class_counts)


def test_stopping_at_any_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a real signal, saved as tensors and loaded into a fresh state, a run goes on bit for bit."""
    terms = terms_of(erm=ERM, cp=CP, mix=MIX)
    plan = plan_of(terms, 2, batch=10)  # 3 steps an epoch
    whole = fresh()
    fit(plan, data(), whole, publish=never)
    previous = signal.signal(signal.SIGTERM, signals._handle)
    for stop_at in range(6):
        first = fresh()
        saved: dict[str, Tensor] = {}

        def save(state: TrainingState = first, into: dict[str, Tensor] = saved) -> None:
            into.clear()
            into.update({n: t.clone() for n, t in state_tensors(state).items()})

        monkeypatch.setattr(signals, "_pending", None)
        with pytest.raises(Interrupted, match="SIGTERM") as caught:
            fit(plan, signalling(stop_at), first, publish=save)
        assert caught.value.exit_code == 75
        assert (first.epoch, first.step) == (stop_at // 3 + 1, stop_at % 3 + 1)
        monkeypatch.setattr(signals, "_pending", None)

        second = fresh()
        load_state(second, saved, Path("memory"))
        second.epoch, second.step = first.epoch, first.step
        second.sums, second.history = saved["sums"], list(first.history)
        fit(plan, data(), second, publish=never)
        for name, tensor in state_tensors(whole).items():
            if name not in ("sums", "history"):  # they hold the clock
                assert tensor.equal(state_tensors(second)[name]), (stop_at, name)
        assert [without_clock(r) for r in second.history] == [without_clock(r) for r in whole.history]
    signal.signal(signal.SIGTERM, previous)


def without_clock(row: dict[str, float | None]) -> dict[str, float | None]:
    return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}


def test_a_loss_that_is_not_finite_stops_with_step_and_rate() -> None:
    points = PointBatches(torch.tensor([[1.0, 0.0], [float("inf"), 0.0]]))
    broken = TrainingData(points, torch.tensor([0, 1]), torch.tensor([1, 1]))
    model = build_model(Model(name="one-hidden-layer"), 2, (2,), torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, Optimizer())
    state = TrainingState(model, optimizer, torch.zeros(2, 2, dtype=torch.float64), epoch=1)
    published = []
    with pytest.raises(Diverged, match=r"step 1 of epoch 1, learning rate 0\.1") as caught:
        fit(plan_of(terms_of(erm=ERM), 3), broken, state, publish=lambda: published.append(1))
    assert caught.value.exit_code == 5
    assert not published


def test_weights_that_one_update_makes_infinite_are_never_published() -> None:
    """Loss and gradient are finite; 1e307 times a gradient above 18 is not."""
    points = PointBatches(torch.tensor([[1e3, -1e3], [-1e3, 1e3]], dtype=torch.float64))
    large = TrainingData(points, torch.tensor([0, 1]), torch.tensor([1, 1]))
    model = in_double(build_model(Model(name="one-hidden-layer"), 2, (2,), torch.Generator().manual_seed(0)))
    published: list[int] = []
    for run in (fit, first_step):
        own = copy.deepcopy(model)
        state = TrainingState(own, make_optimizer(own, Optimizer()), torch.zeros(2, 2, dtype=torch.float64), epoch=1)
        plan = replace(plan_of(terms_of(erm=ERM), 1), learning_rate=lambda *_: 1e307)
        more = {"publish": lambda: published.append(1)} if run is fit else {}
        with pytest.raises(Diverged, match="weights are not finite after step 1 of epoch 1: model"):
            run(plan, large, state, **more)  # type: ignore[operator]
    assert not published


def test_optimizer_groups_match_prefixes() -> None:
    model = build_model(Model(name="one-hidden-layer"), 2, (2,), torch.Generator().manual_seed(0))
    groups = [ParameterGroup(prefix="head.", lr_factor=10.0, weight_decay=0.0)]
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.5, groups=groups))
    found = {(g["lr_factor"], g["weight_decay"]): len(g["params"]) for g in optimizer.param_groups}
    assert found == {(1.0, 0.5): 2, (10.0, 0.0): 2}


def test_draws_depend_on_seed_phase_epoch_and_purpose_alone() -> None:
    terms = terms_of(erm=ERM, cp=CP)
    first = draw_epoch(terms, 24, 8, (0, "stage2"), 5, 9, 3)
    alone = draw_epoch(terms_of(cp=CP), 24, 8, (0, "stage2"), 5, 9, 3)
    assert set(alone) < set(first)
    for purpose in alone:
        assert first[purpose].equal(alone[purpose])
    for seed, phase, epoch in ((1, "stage2", 5), (0, "stage1", 5), (0, "stage2", 6)):
        other = draw_epoch(terms, 24, 8, (seed, phase), epoch, 9, 3)
        assert not other["order"].equal(first["order"])
        assert not other["cp/class"].equal(first["cp/class"])
    assert not first["cp/image"].equal(first["cp/partner-image"])


def test_class_uniform_draws_reach_every_class_alike() -> None:
    terms = terms_of(cp=CP)
    draws = draw_epoch(terms, 24, 24, (0, "stage2"), 1, 9, 3)
    pool = ClassPool(LABELS, 4)
    found = torch.zeros(4)
    for epoch in range(400):
        draws = draw_epoch(terms, 24, 24, (0, "stage2"), epoch, 9, 3)
        classes = (draws["cp/class"][0] * 4).long()
        assert (LABELS[pool.draw(classes, draws["cp/image"][0])] == classes).all()
        found += torch.bincount(classes, minlength=4)
    torch.testing.assert_close(found / found.sum(), torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_prediction_keeps_order_and_ignores_batch_size() -> None:
    model = build_model(Model(name="resnet8"), 4, (8, 8, 1), torch.Generator().manual_seed(0))
    batches = data().batches
    whole = prediction.predict(model, batches, 24, 24)
    parts = prediction.predict(model, batches, 24, 5)
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (1, 24, 4)
    one = F.softmax(model(batches.plain(torch.tensor([3]))), 1)
    torch.testing.assert_close(whole[0, 3].softmax(0), one[0].detach())
