"""One step of every method against loops over images, pixels and classes, on the same draws."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    COUNTS,
    CP,
    ERM,
    IMAGES,
    LABELS,
    MIX,
    check_against_loop,
    crop,
    draw_epoch,
    fresh,
    in_double,
    slow_loss,
    terms_of,
)
from torch import Tensor

from cpmix_cli.confusion import draw_confused
from cpmix_cli.models import Classifier, build_model
from cpmix_cli.recipe.schema import Model, Optimizer, ParameterGroup
from cpmix_cli.training.plan import make_optimizer
from cpmix_cli.training.randomness import Sampler
from cpmix_cli.training.state import TrainingState

NATURAL = {"draw": "natural", "loss": "cross-entropy"}
LINEAR = {"ratio": "beta", "alpha": 1.0, "mix": "linear", "label": "lambda"}
BOX = {**LINEAR, "mix": "box"}
GATED = {"probability": 0.5, "unmixed_first": 1.5}
DRW = {"reweight": "effective-number", "beta": 0.9, "reweight_after": 2}
CMO = {"partner": "frequency-power", "power": 0.0, **BOX, **GATED}
UNIMIX = {**LINEAR, "ratio": "unimix", "alpha": 0.8, "per_sample": True, "loss": "balanced-softmax"}
LADE = {"loss": "lade", "lader_weight": 0.1, "remine": 0.01}
LDAM = {"loss": "ldam", "scale": 30.0}
SMOOTHING = {"loss": "label-aware-smoothing", "smooth_head": 0.4, "smooth_tail": 0.1}
# A method's terms, by name; "head" is that of the network.
METHODS: dict[str, dict[str, Any]] = {
    "balanced softmax": {"erm": ERM},
    "cpmix": {"erm": ERM, "cp": CP, "mix": MIX},
    "class-balanced": {"erm": {**NATURAL, **DRW, "reweight_after": 0}},
    "class-balanced, divided by the count": {"erm": {**NATURAL, **DRW, "reweight_norm": "count"}},
    "focal": {"erm": {**NATURAL, "loss": "focal", "gamma": 1.0}},
    "class-balanced focal": {"erm": {**NATURAL, **DRW, "loss": "sigmoid-focal", "gamma": 1.0}},
    "ldam-drw": {"erm": {**NATURAL, **LDAM, **DRW}},
    "logit-adjusted": {"erm": {**NATURAL, "loss": "logit-adjusted", "tau": 0.7}},
    "lade": {"erm": {**NATURAL, **LADE}},
    "mixup": {"erm": {**NATURAL, "partner": "permutation", **LINEAR}},
    "cutmix": {"erm": {**NATURAL, "partner": "permutation", **BOX, "probability": 0.5}},
    "regmixup": {"erm": NATURAL, "mix": {**NATURAL, "partner": "permutation", **LINEAR, "alpha": 10.0}},
    "remix-drw": {"erm": {**NATURAL, "partner": "permutation", **LINEAR, "label": "remix", **DRW}},
    "cmo": {"erm": {**NATURAL, **CMO}},
    "cmo, labels of Eq. 9": {"erm": {**NATURAL, **CMO, "label": "imbalance-aware", "t": 0.5}},
    "cmo-ldam-drw": {"erm": {**NATURAL, **LDAM, **CMO, **DRW}},
    "unimix": {"erm": {**NATURAL, "partner": "frequency-power", "power": -1.0, **UNIMIX}},
    "unimix, as its code": {"erm": {**NATURAL, "partner": "unimix", "sample_tau": -0.1, **UNIMIX}},
    "otmix": {"erm": {**NATURAL, "loss": "balanced-softmax", **CMO, "match": "transport", "match_power": 0.0}},
    "label-aware smoothing": {"erm": {"draw": "class-uniform", **SMOOTHING}},
    "cpmix-on-lade": {"erm": {**NATURAL, **LADE}, "cp": CP, "mix": MIX},
    "cpmix-on-ldam-drw": {"erm": {**NATURAL, **LDAM, **DRW}, "cp": CP, "mix": MIX},
    "cpmix, class-uniform": {"erm": NATURAL, "cp": {**CP, "partner": "class-uniform"}},
    "cpmix, random": {"erm": NATURAL, "cp": {**CP, "partner": "random"}},
}


COUNTED = [20.0, 9.0, 4.0, 5.0]
"""Images per class whose predictions were counted, at the start."""


def started(tables: dict[str, Any], epoch: int) -> TrainingState:
    """A fresh state, with a cosine head where a term wants it, and some confusions counted."""
    state = fresh(epoch)
    if any(table["loss"] == "ldam" for table in tables.values()):
        recipe = Model(name="resnet8", head="cosine")
        state.model = in_double(build_model(recipe, 4, (8, 8, 1), torch.Generator().manual_seed(0)))
        state.optimizer = make_optimizer(state.model, Optimizer(weight_decay=2e-4))
    state.confusion += torch.tensor([[0, 3, 1, 0], [5, 0, 0, 2], [1, 0, 0, 0], [0, 0, 4, 0]])
    state.counted_images = torch.tensor(COUNTED, dtype=torch.float64)
    return state


class Loop:
    """A step's loss of some terms in the last epoch, by loops, from confusion counts and network as they were."""

    def __init__(self, tables: dict[str, Any], epoch: int, before: Tensor, network: Classifier) -> None:
        self.tables = tables
        self.epoch = epoch
        self.before = before
        self.network = network
        self.draws = draw_epoch(terms_of(**tables), 24, 64, (11, "stage2"), epoch, epoch, 3)

    def __call__(self, model: Classifier) -> Tensor:
        images, parts = [], []
        for name, table in self.tables.items():
            x, *labelled = self.batch(name, table)
            images += x
            parts.append((table, *labelled))
        logits = model(torch.stack(images))
        total = torch.zeros(())
        for i, (table, y1, y2, lam) in enumerate(parts):
            z = logits[24 * i : 24 * i + 24]
            loss = self.loss(table, z, y1, lam)
            if table.get("partner"):
                loss = loss + self.loss(table, z, y2, [1 - v for v in lam])
            total = total + table.get("weight", 1.0) * loss
        return total

    def number(self, purpose: str, *place: int) -> float:
        return float(self.draws[purpose][(0, *place)])

    def image(self, i: int, purpose: str, b: int) -> Tensor:
        return crop(IMAGES[i], self.draws[purpose][0, b].tolist())

    def of_class(self, c: int, term: str, image: str, augment: str, b: int) -> Tensor:
        members = [i for i in range(24) if int(LABELS[i]) == c]
        return self.image(members[int(self.number(f"{term}/{image}", b) * len(members))], f"{term}/{augment}", b)

    def batch(self, term: str, table: dict[str, Any]) -> tuple[list[Tensor], list[int], list[int], list[float]]:
        """Images, labels, labels of the partners and lambda_y of a term."""
        order = self.draws["order"][0, :24].tolist()
        if table["draw"] == "natural":
            x1 = [self.image(i, "augment", b) for b, i in enumerate(order)]
            y1 = [int(LABELS[i]) for i in order]
        else:
            y1 = [int(self.number(f"{term}/class", b) * 4) for b in range(24)]
            x1 = [self.of_class(c, term, "image", "augment", b) for b, c in enumerate(y1)]
        if "partner" not in table:
            return x1, y1, y1, [1.0] * 24
        if table["partner"] == "permutation":
            chosen = sorted(range(24), key=lambda b: self.number(f"{term}/partner", b))
        elif table["partner"] == "unimix":
            chosen = [self.pick([COUNTS[c] ** table["sample_tau"] for c in y1], term, b) for b in range(24)]
        else:
            chosen = [-1] * 24
        x2, y2 = [], []
        for b in range(24):
            if chosen[b] >= 0:
                x2.append(x1[chosen[b]])
                y2.append(y1[chosen[b]])
            else:
                y2.append(self.partner_class(table, term, b, y1[b]))
                x2.append(self.of_class(y2[b], term, "partner-image", "partner-augment", b))
        gate = self.number(f"{term}/gate", 0) if "probability" in table else 1.0
        if gate and "match" in table:
            place = self.transported(x1, y1, x2, y2)
            x1, y1 = [x1[j] for j in place], [y1[j] for j in place]
        x, lam = [], []
        for b in range(24):
            k = b if table.get("per_sample") else 0
            ratio = self.number(f"{term}/ratio", k)
            n1, n2 = COUNTS[y1[b]], COUNTS[y2[b]]
            if table["ratio"] == "unimix":
                ratio += n2 / (n1 + n2)
                ratio -= math.floor(ratio)
            if not gate:
                x.append(x1[b])
                lam.append(1.0)
                continue
            if table["mix"] == "linear":
                x.append(ratio * x1[b] + (1 - ratio) * x2[b])
            else:
                pixels, ratio = self.pasted(x1[b], x2[b], ratio, *self.draws[f"{term}/box"][0, k].tolist())
                x.append(pixels)
            lam.append(self.label(table, ratio, n1, n2))
        return x, y1, y2, lam

    def pick(self, weights: list[float], term: str, b: int) -> int:
        """The first place at which the running sum passes the draw's share of the total."""
        target, running = self.number(f"{term}/partner", b) * sum(weights), 0.0
        for place, weight in enumerate(weights):
            running += weight
            if running > target:
                return place
        raise AssertionError

    def partner_class(self, table: dict[str, Any], term: str, b: int, own: int) -> int:
        if table["partner"] == "confusion":
            uniform = self.draws[f"{term}/partner"][0, b : b + 1]
            return int(draw_confused(self.before, torch.tensor([own]), uniform)[0])
        weights = {
            "class-uniform": [float(c != own) for c in range(4)],
            "random": [float(n) for n in COUNTS],
            "frequency-power": [n ** table.get("power", 0.0) for n in COUNTS],
        }
        return self.pick(weights[table["partner"]], term, b)

    def pasted(self, x1: Tensor, x2: Tensor, ratio: float, u: float, v: float) -> tuple[Tensor, float]:
        out, taken = x1.clone(), 0
        half = int(8 * math.sqrt(1 - ratio)) // 2
        for i in range(8):
            for j in range(8):
                if int(8 * u) - half <= i < int(8 * u) + half and int(8 * v) - half <= j < int(8 * v) + half:
                    out[:, i, j] = x2[:, i, j]
                    taken += 1
        return out, 1 - taken / 64

    def label(self, table: dict[str, Any], ratio: float, n1: int, n2: int) -> float:
        if table["label"] == "imbalance-aware":
            return table["t"] * ratio + (1 - table["t"]) * n2 / (n1 + n2)
        if table["label"] == "remix" and n1 / n2 >= 3 and ratio < 0.5:
            return 0.0
        if table["label"] == "remix" and n2 / n1 >= 3 and 1 - ratio < 0.5:
            return 1.0
        return ratio

    def transported(self, x1: list[Tensor], y1: list[int], x2: list[Tensor], y2: list[int]) -> list[int]:
        """Sinkhorn's iteration as in every textbook, in float64, on features in eval mode."""
        network = copy.deepcopy(self.network).eval()
        with torch.no_grad():
            f1, f2 = (network.features(torch.stack(x)).double() for x in (x1, x2))
        cost = np.zeros((24, 24))
        for k in range(24):
            for j in range(24):
                cosine = float(f2[k] @ f1[j] / f2[k].norm() / f1[j].norm())
                confused = float(self.before[y2[k], y1[j]] / COUNTED[y2[k]])
                cost[k, j] = 0.05 * (1 - cosine) + 0.95 * (1 - confused)
        kernel, u, v = np.exp(-cost / 0.01), np.ones(24), np.ones(24)
        for _ in range(5000):
            u = 1 / 24 / (kernel @ v)
            v = 1 / 24 / (kernel.T @ u)
        plan = u[:, None] * kernel * v
        return [int(row.argmax()) for row in plan]

    def loss(self, table: dict[str, Any], logits: Tensor, labels: list[int], lam: list[float]) -> Tensor:
        weights = [1.0] * 24
        if "reweight" in table and self.epoch > table["reweight_after"]:
            inverse = [(1 - table["beta"]) / (1 - table["beta"] ** n) for n in COUNTS]
            weights = [4 * inverse[y] / sum(inverse) for y in labels]
            if table.get("reweight_norm") != "count":
                weights = [24 * w / sum(weights) for w in weights]
        both = [torch.tensor(w * v) for w, v in zip(weights, lam, strict=True)]
        return slow_loss(table["loss"], logits, labels, both, COUNTS, table)


@pytest.mark.parametrize("tables", METHODS.values(), ids=list(METHODS))
def test_one_step_of_each_method_equals_a_plain_loop(tables: dict[str, Any]) -> None:
    """Epochs on both sides of what DRW, windows and chance change; epoch 2 is the last without the weights of DRW."""
    gates = set()
    for epoch in (1, 2, 3, 4):
        state = started(tables, epoch)
        loop = Loop(tables, epoch, state.confusion.clone(), copy.deepcopy(state.model))
        check_against_loop(state, terms_of(**tables), loop)
        gates |= {float(g) for n, g in loop.draws.items() if n.endswith("/gate")}
    assert not gates or gates == {0.0, 1.0}


def test_nesterov_and_parameter_groups_equal_a_plain_loop() -> None:
    """The first group that fits counts; the second step is one of stage 2 by Eq. 13, with the momentum of the first."""
    groups = [
        ParameterGroup(prefix="head.bias", lr_factor=0.5, weight_decay=0.0),
        ParameterGroup(prefix="head", lr_factor=3.0),
        ParameterGroup(prefix="conv1", lr_factor=0.0),
        ParameterGroup(prefix="blocks.1", lr_factor=0.1, weight_decay=0.05),
    ]
    state = fresh()
    state.optimizer = make_optimizer(state.model, Optimizer(nesterov=True, weight_decay=2e-4, groups=groups))
    for epoch, method in ((1, "balanced softmax"), (2, "cpmix")):
        state.epoch, state.step = epoch, 0
        loop = Loop(METHODS[method], epoch, state.confusion.clone(), state.model)
        check_against_loop(state, terms_of(**METHODS[method]), loop, nesterov=True, groups=groups)
        state.confusion[3, 0] += 4.0


def test_regmixup_averages_over_both_batches() -> None:
    """Cross entropy over 2 B images [x; x_mix], labels [y; y] and [y; y_partner]: both terms at half their weight."""
    tables = {name: {**table, "weight": 0.5} for name, table in METHODS["regmixup"].items()}
    state = started(tables, 1)
    loop = Loop(tables, 1, state.confusion.clone(), state.model)

    def mean(model: Classifier) -> Tensor:
        clean, y, _, _ = loop.batch("erm", tables["erm"])
        mixed, _, partners, (lam, *_) = loop.batch("mix", tables["mix"])
        logits = model(torch.stack(clean + mixed))
        first, second = (F.cross_entropy(logits, torch.tensor(y + other)) for other in (y, partners))
        return lam * first + (1 - lam) * second

    check_against_loop(state, terms_of(**tables), mean)


def test_cmo_mixes_half_the_batches_inside_its_window() -> None:
    """Of 200 epochs those from 5 to 197 mix, half of their batches: 4 to 196 counted from 0, as published."""
    terms = terms_of(erm={**NATURAL, **CMO, "unmixed_first": 4, "unmixed_last": 3})
    drawn = [draw_epoch(terms, 64, 2, (0, "stage1"), epoch, 200, 3) for epoch in range(1, 201)]
    gates = [draws["erm/gate"].mean().item() for draws in drawn]
    mixing = [epoch for epoch, share in enumerate(gates, 1) if share > 0]
    assert mixing == list(range(5, 198))
    assert sum(gates) / len(mixing) == pytest.approx(0.5, abs=0.02)


def test_transport_matching_becomes_more_frequent_over_epochs() -> None:
    (term,) = terms_of(erm={**NATURAL, **CMO, "match": "transport", "match_power": 1.0})

    def matches(seed: int, epoch: int) -> bool:
        shape = {"batch_size": 1, "num_uniforms": 1, "num_epochs": 10}
        sampler = Sampler({"erm": term.recipe}, torch.zeros(1, dtype=torch.int64), 1, key=(seed, "stage1"), **shape)
        return sampler.epoch(epoch).terms[0].matching

    shares = [sum(matches(seed, epoch) for seed in range(1000)) / 1000 for epoch in (1, 5, 10)]
    assert shares == pytest.approx([0.1, 0.5, 1.0], abs=0.05)
