"""The training loop: one step of each stage against a plain loop over samples, and what may change and what may not."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import CP, ERM, LABELS, MIX, data, draw_epoch, fresh, in_double, never, plan_of, terms_of

from cpmix_cli.data.batches import ClassPool, PointBatches
from cpmix_cli.evaluation import prediction
from cpmix_cli.models import build_model
from cpmix_cli.recipe.schema import Model, Optimizer
from cpmix_cli.runtime.errors import Diverged
from cpmix_cli.training.inputs import TrainingData
from cpmix_cli.training.loop import first_step, fit
from cpmix_cli.training.plan import Plan, make_optimizer
from cpmix_cli.training.state import TrainingState


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


def test_confusions_are_counted_from_the_start_epoch_and_decay() -> None:
    late, decayed = fresh(), fresh()
    plan = plan_of(terms_of(erm=ERM), 3, batch=7)
    fit(Plan(**{**vars(plan), "confusion_start": 3}), data(), late, publish=never)
    assert [row["num_confusions"] for row in late.history[:2]] == [0, 0]
    assert late.confusion.sum() == late.history[2]["num_confusions"]
    fit(Plan(**{**vars(plan), "confusion_decay": 0.5}), data(), decayed, publish=never)
    a, b, c = (row["num_confusions"] for row in decayed.history)
    assert a and b is not None and c is not None
    assert decayed.confusion.sum() == a / 4 + b / 2 + c


def test_errors_are_counted_only_in_unmixed_batches() -> None:
    terms = terms_of(erm={**MIX, "probability": 0.5})
    state = fresh()
    fit(plan_of(terms, 6, batch=8), data(), state, publish=never)
    gates = [draw_epoch(terms, 24, 8, (11, "stage2"), epoch, 6, 3)["erm/gate"] for epoch in range(1, 7)]
    unmixed = [24 - 8 * int(gate.sum()) for gate in gates]
    for row, most in zip(state.history, unmixed, strict=True):
        assert row["train_accuracy"] is None
        assert row["num_confusions"] is not None and 0 <= row["num_confusions"] <= most
    assert state.confusion.sum() == sum(row["num_confusions"] or 0 for row in state.history) > 0


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


def test_the_mix_term_at_t_1_with_equal_counts_equals_mixup() -> None:
    """L(y1, lambda) + L(y2, 1 - lambda) with the labels of vanilla mixup, on the same draws."""
    vanilla = {k: v for k, v in MIX.items() if k != "t"} | {"label": "lambda"}
    states = [fresh(), fresh()]
    for state, table in zip(states, ({**MIX, "t": 1.0}, vanilla), strict=True):
        fit(plan_of(terms_of(mix=table), 2), data(), state, publish=never)
    assert states[0].history[-1]["loss"] == states[1].history[-1]["loss"]
    assert states[0].history[-1]["num_confusions"] is None
    assert states[0].history[-1]["train_accuracy"] is None


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


def test_draws_depend_only_on_seed_phase_epoch_and_purpose() -> None:
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
