"""The published settings of every recipe but the ablations', typed by hand; what recipes share; rows of Tables 3, 4."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.recipe.schema import changed
from cpmix_cli.training.schedule import learning_rate

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE = ("imagenet-lt", "places-lt", "inaturalist2018")
BEYOND = {"cifar100-lt/cpmix-strong", "cifar100-lt/cpmix-strong-single"}
"""Recipes whose settings no paper has."""
NAMES = [name for name in recipe_names() if name not in BEYOND]
PUBLISHED = [n for n in NAMES if n.startswith(("cifar", *LARGE)) and "ablation" not in n]
LAST_BLOCK = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4.0", "layer4.1"]


def names(data: str, methods: str) -> list[str]:
    """imagenet-lt/ride and so on of imagenet-lt and "ride ..."."""
    return [f"{data}/{method}" for method in methods.split()]


# -- what recipes share ------------------------------------------------------------------------------------------------

SHARED = {
    **{f"{data}/cpmix": [f"{data}/balanced-softmax"] for data in (*LARGE, "digits", "toy")},
    "cifar100-lt/cpmix": names("cifar100-lt", "balanced-softmax cpmix-class-uniform cpmix-mixed-finetune cpmix-random"),
    "cifar100-lt/cross-entropy": names("cifar100-lt", "crt lws tau-norm logit-adjusted-posthoc"),
    "cifar100-lt/mislas": ["cifar100-lt/h2t"],
}


@pytest.mark.parametrize(("base", "name"), [(base, name) for base, shared in SHARED.items() for name in shared])
def test_recipes_share_stage_1_with_their_base(base: str, name: str) -> None:
    for epochs in (None, 20):
        ours, theirs = (load(n, epochs=epochs) for n in (name, base))
        assert ours.tables_of("stage1") == theirs.tables_of("stage1")
        if name.startswith((*LARGE, "digits", "toy")):
            differing = {key for key, *_ in changed(theirs.tables(), ours.tables())}
            assert differing == {"stage2.terms.cp", "stage2.terms.mix"}


@pytest.mark.parametrize("name", [n for n in NAMES if n.partition("/")[2].startswith("cpmix")])
def test_recipes_of_cpmix_name_their_readings_of_the_paper(name: str) -> None:
    """One forward pass, one lambda a batch and Eq. 9 in L_mix; a class without confusions has a partner too."""
    stage2 = load(name).stage2
    assert stage2 is not None
    assert stage2.forward == "joint"
    assert not any(term.per_sample for term in stage2.terms.values())
    assert stage2.terms["mix"].label == "imbalance-aware"
    text = (RECIPES / f"{name}.toml").read_text()
    whole = name == "cifar100-lt/cpmix"  # which tells them all
    assert (
        "# Differs: the paper leaves open" if whole else "leaves open (forward pass, lambda, Eq. 9 in L_mix"
    ) in text


TICKS: list[dict[str, Any]] = [
    {"stage1.terms.erm.loss": "cross-entropy", "stage2": None},
    {"stage2.terms.cp": None, "stage2.terms.mix": None},
    {"stage2.terms.cp.weight": 0.0, "stage2.terms.mix.label": "lambda", "stage2.terms.mix.t": None},
    {"stage2.terms.cp.weight": 0.0},
    {"stage2.terms.cp.label": "lambda", "stage2.terms.cp.t": None, "stage2.terms.mix.weight": 0.0},
    {f"stage2.terms.{t}.{k}": v for t in ("cp", "mix") for k, v in (("label", "lambda"), ("t", None))},
    {"stage2.terms.mix.weight": 0.0},
    {},
    {},
]
"""Rows of Tables 3 and 4: where each differs from CP-Mix; None where it has no such key. Row 1 has one stage."""


@pytest.mark.parametrize("row", range(1, 10))
@pytest.mark.parametrize(("data", "all_epochs"), [("cifar100-lt", 300), ("imagenet-lt", 180)])
def test_ablation_recipes_differ_only_in_their_ticks(data: str, all_epochs: int, row: int) -> None:
    for epochs in (None, 20):
        theirs, ours = (load(f"{data}/{name}", epochs=epochs) for name in ("cpmix", f"ablation-{row}"))
        ticks = TICKS[row - 1] | ({"schedule.stage1_epochs": epochs or all_epochs} if row == 1 else {})
        assert {key: new for key, _, new in changed(theirs.tables(), ours.tables())} == ticks
        assert (ours.tables_of("stage1") == theirs.tables_of("stage1")) == (row > 1)
    assert row > 1 or load(f"{data}/ablation-1").tables_of("stage1") == load(f"{data}/cross-entropy").tables_of(
        "stage1"
    )


# -- schedules ---------------------------------------------------------------------------------------------------------

TABLE_6 = {1: 0.01, 10: 0.1, 260: 0.1, 261: 1e-3, 280: 1e-3, 281: 1e-5, 300: 1e-5}
SHELL = {1: 0.02, 5: 0.1, 160: 0.1, 161: 1e-3, 180: 1e-3, 181: 1e-5, 200: 1e-5}
COSINE_180 = {1: 0.1, 91: 0.05, 121: 0.025, 180: 0.1 * (1 + np.cos(np.pi * 179 / 180)) / 2}
COSINE_200 = {1: 0.1, 101: 0.05, 200: 0.1 * (1 + np.cos(np.pi * 199 / 200)) / 2}
COSINE_90 = {1: 0.1, 46: 0.05, 90: 0.1 * (1 + np.cos(np.pi * 89 / 90)) / 2}
CMO_100 = {1: 0.02, 5: 0.1, 60: 0.1, 61: 0.01, 80: 0.01, 81: 1e-3, 100: 1e-3}
SADE_200 = {1: 0.02, 160: 0.1, 161: 1e-2, 181: 1e-3, 200: 1e-3}
SADE_30 = {1: 0.01, 10: 0.01, 11: 1e-3, 20: 1e-3, 21: 1e-4, 30: 1e-4}
OTMIX_200 = {1: 0.02, 5: 0.1, 40: 0.1, 41: 0.01, 81: 1e-3, 161: 1e-5, 200: 1e-5}
OTMIX_210 = {1: 0.02, 5: 0.1, 30: 0.1, 31: 0.01, 81: 1e-3, 131: 1e-4, 181: 1e-5, 210: 1e-5}
DOUBLE = {epoch: 2 * rate for epoch, rate in CMO_100.items()}
RATES = {
    **dict.fromkeys(
        ["balanced-softmax", "cpmix", "cpmix-class-uniform", "cpmix-mixed-finetune", "cpmix-random", "cpmix-tuned"],
        TABLE_6,
    ),
    **dict.fromkeys(["cpmix-on-lade", "cpmix-on-ldam-drw"], TABLE_6),
    **dict.fromkeys(["cross-entropy", "crt", "logit-adjusted-posthoc", "lws", "tau-norm"], TABLE_6),
    **dict.fromkeys(["class-balanced", "class-balanced-focal", "focal", "ldam-drw", "unimix"], SHELL),
    **dict.fromkeys(["cmo", "cmo-balanced-softmax", "cmo-ldam-drw", "cifar10-lt/remix-drw"], SHELL),
    "lade": {1: 0.04, 5: 0.2, 120: 0.2, 121: 2e-3, 161: 2e-5, 200: 2e-5},
    "logit-adjusted": {1: 0.1 / 22, 22: 0.1, 691: 0.1, 692: 1e-2, 1060: 1e-3, 1291: 1e-4, 1419: 1e-4},
    "cifar10-lt/logit-adjusted": {1: 0.005, 20: 0.1, 604: 0.1, 605: 1e-2, 927: 1e-3, 1129: 1e-4, 1241: 1e-4},
    "mixup": {1: 0.02, 320: 0.1, 321: 1e-3, 361: 1e-5, 400: 1e-5},
    "remix": {1: 0.02, 320: 0.1, 321: 1e-3, 361: 1e-5, 400: 1e-5},
    "remix-drw": {1: 0.02, 150: 0.1, 151: 1e-2, 251: 1e-3, 300: 1e-3},
    "cutmix": {1: 0.1, 150: 0.1, 151: 1e-2, 226: 1e-3, 300: 1e-3},
    "regmixup": {1: 0.1, 150: 0.1, 151: 1e-2, 251: 1e-3, 350: 1e-3},
    "otmix": {1: 0.1, 100: 0.1, 101: 1e-2, 161: 1e-3, 201: 1e-5, 240: 1e-5},
    **dict.fromkeys(["ride", "ride-3", "ride-distilled", "ride-routed", "ride-rotation", "cmo-ride"], SHELL),
    "cpmix-ride": SHELL,
    "sade": SADE_200,
    "ace": {1: 0.02, 320: 0.1, 321: 1e-3, 361: 1e-5, 400: 1e-5},
    "otmix-ride": {1: 0.1, 100: 0.1, 101: 1e-2, 161: 1e-3, 201: 1e-5, 240: 1e-5},
    **dict.fromkeys(["mislas", "h2t", "balpoe"], SADE_200),
    "imagenet-lt": COSINE_180,
    "places-lt": {1: 0.01, 5: 0.01, 6: 1e-3, 15: 1e-3, 16: 1e-4, 30: 1e-4},
    "inaturalist2018": {1: 0.01, 10: 0.1, 60: 0.1, 61: 0.01, 80: 0.01, 81: 1e-3, 100: 1e-3},
    **dict.fromkeys([f"imagenet-lt/{m}" for m in ("ldam-drw", "ride", "cmo-ride", "cpmix-ride")], CMO_100),
    **dict.fromkeys(["imagenet-lt/otmix", "imagenet-lt/otmix-ride"], OTMIX_200),
    "places-lt/lade": {epoch: 5 * rate for epoch, rate in SADE_30.items()},
    "places-lt/mislas": COSINE_90,
    **dict.fromkeys(["places-lt/ride", "places-lt/sade"], SADE_30),
    **dict.fromkeys([f"inaturalist2018/{m}" for m in ("ride", "cmo-ride", "cpmix-ride", "sade")], DOUBLE),
    **dict.fromkeys(["inaturalist2018/mislas", "inaturalist2018/lade"], COSINE_200),
    "inaturalist2018/otmix": OTMIX_210,
    "inaturalist2018/otmix-ride": {epoch: 2 * rate for epoch, rate in OTMIX_210.items()},
}
"""Recipe, large data set, or method -> epoch -> learning rate at its first step; the last epoch ends the training."""
STAGE_1 = {
    **dict.fromkeys(["cifar100-lt", "cifar10-lt"], 200),
    **dict.fromkeys(["cifar100-lt/cpmix-ride", "cifar10-lt/cpmix-ride"], 133),  # two thirds
    "imagenet-lt": 120,
    "imagenet-lt/cpmix-ride": 67,
    "places-lt": 15,
    "inaturalist2018": 50,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_schedules(name: str) -> None:
    data, method = name.split("/")
    recipe = load(name)
    expected = RATES.get(name) or RATES.get(data) or RATES[method]
    rates = {e: learning_rate(recipe.optimizer.lr, recipe.schedule, e, 0, 75) for e in expected}
    assert rates == pytest.approx(expected)
    assert recipe.schedule.epochs == max(expected)
    assert recipe.schedule.stage1_epochs == (STAGE_1.get(name, STAGE_1[data]) if recipe.stage2 else max(expected))


# -- settings ----------------------------------------------------------------------------------------------------------

ERM = "stage1.terms.erm"
NATURAL = {"draw": "natural", "loss": "cross-entropy", "partner": None, "reweight": None, "weight": 1.0}
BALANCED = {"loss": "balanced-softmax"}
EFFECTIVE = {"reweight": "effective-number", "beta": 0.9999, "reweight_after": 0, "reweight_norm": "count"}
DRW = {**EFFECTIVE, "reweight_after": 160, "reweight_norm": "batch-sum"}
LDAM = {"loss": "ldam", "max_margin": 0.5, "scale": 30.0}
COSINE = {"head": "cosine", "head_scale": 30.0}
LADE = {"loss": "lade", "lader_weight": 0.1, "remine": 0.01}
ALWAYS = {"match": None, "per_sample": False, "probability": 1.0, "unmixed_first": 0, "unmixed_last": 0}
MIXUP = {"partner": "permutation", "ratio": "beta", "alpha": 1.0, "mix": "linear", "label": "lambda", **ALWAYS}
REMIX = {**MIXUP, "label": "remix", "min_ratio": 3.0, "threshold": 0.5}
GATED = {"probability": 0.5, "unmixed_first": 4, "unmixed_last": 3}
CMO = {**MIXUP, "partner": "frequency-power", "power": 0.0, "mix": "box", **GATED}
UNIMIX = {**MIXUP, **BALANCED, "partner": "frequency-power", "power": -1.0, "ratio": "unimix", "alpha": 0.8}
OTMIX = {**CMO, **BALANCED, "alpha": 4.0, "match": "transport", "match_power": 1.0}
H2T = {**NATURAL, **ALWAYS, "draw": "class-uniform", "partner": "frequency-power", "power": 1.0, "ratio": None}
H2T |= {"alpha": None, "mix": "channels", "p": 0.25, "label": "first"}
EQ_9 = {**MIXUP, "alpha": 1.5, "label": "imbalance-aware", "t": 0.5, "loss": "cross-entropy", "weight": 2.5}
CP = {**EQ_9, "draw": "class-uniform", "partner": "confusion"}
CPMIX: dict[str, dict[str, Any]] = {
    ERM: BALANCED,
    "stage2": {"forward": "joint"},
    "stage2.terms.erm": {**NATURAL, **BALANCED},
    "stage2.terms.cp": CP,
    "stage2.terms.mix": {**EQ_9, "draw": "natural"},
}
SGD = {"momentum": 0.9, "nesterov": False, "batch_size": 128}
HEAD = {"kind": "cosine", "head": "keep", "train": ["head"], "batchnorm": "frozen"}
CRT = {"epochs": 10, "lr": 0.2, "weight_decay": 5e-4, "batch_size": 512, "head": "reinit"}
EXPERTS = {**COSINE, "experts": 6, "shared_stages": 1, "expert_width": 0.75}
DIVERSE = {"regulariser": "expert-diversity", "diversity": 0.45, "temperature_spread": 0.05, "against": "mean"}
SGD_OF_RIDE = {"nesterov": True, "weight_decay": 5e-4}
RIDE: dict[str, dict[str, Any]] = {"model": EXPERTS, "optimizer": SGD_OF_RIDE, ERM: {**LDAM, **DRW, **DIVERSE}}
THREE = {**EXPERTS, "experts": 3}
TAUGHT = {"teacher": "distillation", "temperature": 1.5, "factor": 1.0, "of": "experts"}
DISTILLED = {**RIDE, "model": {**EXPERTS, "experts": 4}, ERM: {**RIDE[ERM], **TAUGHT}}
ROUTERS = {"head": "routers", "train": ["routers"], "router_top": 30, "epochs": 5, "lr": 0.01, "batch_size": 512}
ONE_RATE = {"groups": [], "expert_rates": "equal"}
ONE_NETWORK = {"experts": 1, "shared_stages": 1, "expert_width": 1.0, "init": "", "frozen": []}
COMMON: dict[str, dict[str, Any]] = {
    "data": {"augment": "crop-flip", "padding": 4, "normalisation": "cifar10"},
    "model": {**ONE_NETWORK, "name": "resnet32", "head": "linear", "head_scale": 30.0, "head_bias": "drawn"},
    "optimizer": {**SGD, **ONE_RATE, "kind": "sgd", "weight_decay": 2e-4, "micro_batches": 1},
    "confusion": {"start_epoch": 1, "decay": 1.0, "source": "train"},
    "stage1": {"forward": "joint"},
    ERM: NATURAL,
    "finetune": {**SGD, **HEAD, "epochs": 30, "lr": 0.5, "weight_decay": 0.0},
    "finetune.terms.erm": {**NATURAL, "draw": "class-uniform"},
    "evaluation": {"logit_adjustment": 0.0, "tau_norm": 0.0, "aggregate": "mean"},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10-lt": {"finetune": {"lr": 0.1}},
    "balanced-softmax": {ERM: BALANCED, "stage2.terms.erm": {**NATURAL, **BALANCED}},
    "class-balanced": {ERM: EFFECTIVE},
    "class-balanced-focal": {
        "model": {"head_bias": "rare"},
        "optimizer": {"groups": [{"prefix": "head.bias", "lr_factor": 1.0, "weight_decay": 0.0}]},
        ERM: {**EFFECTIVE, "loss": "sigmoid-focal", "gamma": 1.0},
    },
    "cmo": {ERM: CMO},
    "cmo-balanced-softmax": {ERM: {**CMO, **BALANCED}},
    "cmo-ldam-drw": {"model": COSINE, ERM: {**CMO, **LDAM, **DRW}},
    "cpmix": CPMIX,
    "cpmix-class-uniform": {**CPMIX, "stage2.terms.cp": {**CP, "partner": "class-uniform"}},
    "cpmix-on-lade": {**CPMIX, ERM: LADE, "stage2.terms.erm": {**NATURAL, **LADE}},
    "cpmix-on-ldam-drw": {
        **CPMIX,
        "model": COSINE,
        ERM: LDAM,
        "stage2.terms.erm": {**NATURAL, **LDAM, **DRW, "reweight_after": 260},
    },
    "cpmix-mixed-finetune": {**CPMIX, "finetune": {"lr": 0.05}, "finetune.terms.erm": {**CP, "weight": 1.0}},
    "cpmix-random": {**CPMIX, "stage2.terms.cp": {**CP, "partner": "random"}},
    "cpmix-tuned": {
        **CPMIX,
        "optimizer": {"nesterov": True, "weight_decay": 5e-4},
        "finetune": {"lr": 0.05},
        "finetune.terms.erm": {**CP, "weight": 1.0},
    },
    "cpmix-last-block": {**CPMIX, "model": {"frozen": LAST_BLOCK}},
    "cross-entropy": {},
    "crt": {"finetune": CRT},
    "cutmix": {"optimizer": {"nesterov": True, "weight_decay": 1e-4}, ERM: {**MIXUP, "mix": "box", "probability": 0.5}},
    "focal": {ERM: {"loss": "focal", "gamma": 1.0}},
    "lade": {"optimizer": {"weight_decay": 5e-4, "batch_size": 256}, ERM: LADE},
    "ldam-drw": {"model": COSINE, ERM: {**LDAM, **DRW}},
    "logit-adjusted": {"optimizer": {"nesterov": True}, ERM: {"loss": "logit-adjusted", "tau": 1.0}},
    "logit-adjusted-posthoc": {"evaluation": {"logit_adjustment": 1.0}},
    "lws": {"finetune": {**CRT, "epochs": 5, "head": "scale", "train": ["head.scale"]}},
    "mislas": {
        ERM: MIXUP,
        "finetune": {"epochs": 10, "lr": 0.1, "weight_decay": 2e-4, "head": "scale", "batchnorm": "shift"},
        "finetune.terms.erm": {"loss": "label-aware-smoothing"},
    },
    "h2t": {
        ERM: MIXUP,
        "finetune": {"epochs": 10, "lr": 0.02, "weight_decay": 2e-4, "batchnorm": "shift"},
        "finetune.terms.h2t": H2T,
    },
    "cifar10-lt/mislas": {"finetune": {"batchnorm": "frozen"}},
    "mixup": {ERM: MIXUP},
    "otmix": {ERM: {**OTMIX, "feature_weight": 0.05, "regularisation": 0.01}},
    "regmixup": {
        "optimizer": {"nesterov": True, "weight_decay": 5e-4},
        "stage1.terms.mix": {**MIXUP, "draw": "natural", "alpha": 10.0, "loss": "cross-entropy", "weight": 1.0},
    },
    "cifar10-lt/regmixup": {"stage1.terms.mix": {"alpha": 20.0}},
    "remix": {ERM: REMIX},
    "remix-drw": {ERM: {**REMIX, **EFFECTIVE, "reweight_after": 250}},
    "cifar10-lt/remix-drw": {ERM: {"reweight_after": 160}},
    "tau-norm": {"evaluation": {"tau_norm": 1.0}},  # its paper chooses it on held-out images
    "unimix": {"optimizer": {"batch_size": 64}, ERM: {**UNIMIX, "per_sample": True}},
    "ace": {
        "model": {"experts": 3, "shared_stages": 2},
        "optimizer": {"expert_rates": "target-share"},
        ERM: {"loss": "ace", "interference": 1.0, "measure": "norm"},
        "evaluation": {"aggregate": "targets"},
    },
    "cmo-ride": {**RIDE, "model": THREE, ERM: {**CMO, **RIDE[ERM]}},
    "cpmix-ride": {
        **RIDE,
        "confusion": {"predictions": "ensemble"},
        "stage2": {"forward": "joint"},
        "stage2.terms.erm": {**NATURAL, **RIDE[ERM]},
        "stage2.terms.cp": CP,
        "stage2.terms.mix": {**EQ_9, "draw": "natural"},
    },
    "otmix-ride": {**RIDE, "model": THREE, ERM: {**OTMIX, "feature_weight": 0.05, "regularisation": 0.01, **RIDE[ERM]}},
    "ride": RIDE,
    "ride-3": {**RIDE, "model": THREE},
    "ride-distilled": DISTILLED,
    "ride-rotation": {**RIDE, "data": {"augment": "crop-flip-rotate"}},
    "ride-routed": {
        **DISTILLED,
        "finetune": {**ROUTERS, "nesterov": True, "weight_decay": 5e-4},
        "finetune.terms.erm": {"loss": "routing", "pos_weight": 100.0},
        "evaluation": {"aggregate": "routed", "routing_threshold": 0.5},
    },
    "sade": {"model": THREE, "optimizer": SGD_OF_RIDE, ERM: {"loss": "sade", "tau": 2.0}},
    "balpoe": {
        "model": {**THREE, "expert_width": 1.0},
        "optimizer": SGD_OF_RIDE,
        ERM: {**MIXUP, "alpha": 0.4, "loss": "balanced-experts", "taus": [0.0, 1.0, 2.0]},
    },
}
"""Method, CIFAR-10-LT, or both -> table -> its keys, each over COMMON."""


def large(optimizer: tuple[float, int, float], model: dict[str, Any], mixed: tuple[float, float]) -> dict[str, Any]:
    """Settings of all recipes of a large set: rate, batch, weight decay; the network; Table 6's alpha and gamma."""
    lr, batch_size, weight_decay = optimizer
    jitter, constants = ("", "inaturalist") if "head" in model else ("-jitter", "imagenet")
    terms = {"alpha": mixed[0], "weight": mixed[1]}
    return {
        "data": {"augment": f"resized-crop-flip{jitter}", "crop": 224, "normalisation": constants},
        "model": model,
        "optimizer": {"lr": lr, "batch_size": batch_size, "weight_decay": weight_decay},
        "confusion": {"refresh": "epoch"},
        "evaluation": {"batch_size": 128 if constants == "inaturalist" else 256},
        "finetune": {"epochs": 10, "batch_size": batch_size},
        "stage2.terms.cp": terms,
        "stage2.terms.mix": terms,
    }


def optimizer(lr: float, batch_size: int, weight_decay: float, **more: Any) -> dict[str, dict[str, Any]]:
    return {"optimizer": {"lr": lr, "batch_size": batch_size, "weight_decay": weight_decay, **more}}


def experts(after: int, spread: float, **model: Any) -> dict[str, dict[str, Any]]:
    term = {"reweight_after": after, "diversity": 0.2, "temperature_spread": spread}
    return {"model": {"shared_stages": 2, **model}, ERM: term, "stage2.terms.erm": term}


def smoothed(weight_decay: float, head: float, tail: float) -> dict[str, dict[str, Any]]:
    """MiSLAS."""
    groups = [{"prefix": "head.scale", "lr_factor": 1.0}, {"prefix": "head", "lr_factor": 0.05}]
    return {
        **optimizer(0.1, 256, weight_decay),
        ERM: {"alpha": 0.2},
        "finetune": {"lr": 0.1, "batch_size": 256, "weight_decay": weight_decay, "groups": groups},
        "finetune.terms.erm": {"smooth_head": head, "smooth_tail": tail, "over": "others"},
    }


def slower(factor: float) -> list[dict[str, Any]]:
    """The pretrained backbone."""
    return [{"prefix": "head", "lr_factor": 1.0}, {"prefix": "", "lr_factor": factor}]


LINEAR = {"model": {"head": "linear"}}
OF_LARGE: dict[str, dict[str, dict[str, Any]]] = {
    "imagenet-lt": large((0.1, 192, 5e-4), {"name": "resnet50"}, (3.0, 1.0)),
    "places-lt": large((0.01, 128, 5e-4), {"name": "resnet152", "init": "resnet152-394f9c45.pth"}, (1.0, 2.0)),
    "inaturalist2018": large((0.1, 256, 2e-4), {"name": "resnet50", "head": "cosine"}, (1.0, 1.0)),
}
OF_LARGE["imagenet-lt"]["finetune"]["lr"], OF_LARGE["inaturalist2018"]["finetune"]["lr"] = 0.05, 3.0
THREE_SHARED = {"model": {"shared_stages": 3}}
WHOLE_WIDTH = {"shared_stages": 3, "expert_width": 1.0}
OF_RECIPE: dict[str, dict[str, dict[str, Any]]] = {
    "imagenet-lt/ace": THREE_SHARED,
    "imagenet-lt/ldam-drw": {**optimizer(0.1, 128, 2e-4), ERM: {"reweight_after": 80}},
    "imagenet-lt/mislas": smoothed(5e-4, 0.3, 0.0),
    "imagenet-lt/otmix": optimizer(0.1, 128, 2e-4),
    **{
        name: {**optimizer(0.1, 256, 2e-4), **experts(80, 0.02)}
        for name in names("imagenet-lt", "ride cmo-ride cpmix-ride")
    },
    "imagenet-lt/otmix-ride": {**optimizer(0.1, 256, 2e-4), **experts(160, 0.02)},
    "places-lt/lade": {
        **optimizer(0.05, 128, 5e-4, groups=slower(0.02)),
        ERM: {"lader_weight": 0.005, "remine": 0.1, "importance": "sample"},
    },
    "places-lt/mislas": {**smoothed(5e-4, 0.4, 0.1), "model": {"frozen": LAST_BLOCK}},
    "places-lt/ride": {**optimizer(0.01, 128, 4e-4, groups=slower(0.1)), **experts(20, 0.02, **WHOLE_WIDTH)},
    "places-lt/sade": {**optimizer(0.01, 128, 4e-4, groups=slower(0.1)), "model": WHOLE_WIDTH, ERM: {"tau": 1.0}},
    "inaturalist2018/ace": {"model": {"shared_stages": 3, "head": "linear"}},
    "inaturalist2018/lade": {
        **LINEAR,
        **optimizer(0.1, 256, 1e-4),
        ERM: {"lader_weight": 0.05, "remine": 0.5, "importance": "sample"},
    },
    "inaturalist2018/ldam-drw": {ERM: {"reweight_after": 80}},
    "inaturalist2018/mislas": {**LINEAR, **smoothed(1e-4, 0.3, 0.0)},
    "inaturalist2018/otmix": {**LINEAR, **optimizer(0.1, 128, 2e-4)},
    **{
        name: {**optimizer(0.2, 512, 2e-4), **experts(80, 0.015)}
        for name in names("inaturalist2018", "ride cmo-ride cpmix-ride")
    },
    "inaturalist2018/otmix-ride": {**optimizer(0.2, 512, 2e-4), **experts(180, 0.015)},
    "inaturalist2018/sade": {**optimizer(0.2, 512, 2e-4), "model": {"shared_stages": 2}, ERM: {"tau": 1.0}},
}
"""Large data set or a recipe of it -> table -> keys, over those of its method, for the tables that the recipe has."""
NO_FINETUNE = {"logit-adjusted-posthoc", "tau-norm", "ace", "cmo-ride", "cpmix-ride", "otmix-ride", "ride", "ride-3"}
NO_FINETUNE |= {"balpoe", "ride-distilled", "ride-rotation", "sade", "inaturalist2018/lade", "inaturalist2018/otmix"}
NO_FINETUNE |= {name for name in PUBLISHED if name.startswith("places-lt")} - {"places-lt/mislas"}
"""Methods, or recipes."""


def groups_of(table: dict[str, Any]) -> dict[str, Any]:
    return {key: table[key] for key in ("groups",) if key in table}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_settings(name: str) -> None:
    data, method = name.split("/")
    expected: dict[str, dict[str, Any]] = {}
    for layer in (COMMON, SETTINGS.get(data, {}), SETTINGS[method], SETTINGS.get(name, {})):
        for table, keys in layer.items():
            expected[table] = expected.get(table, {}) | keys
    for layer in (OF_LARGE.get(data, {}), OF_RECIPE.get(name, {})):
        expected |= {table: expected[table] | keys for table, keys in layer.items() if table in expected}
    recipe = load(name).tables()
    assert ("finetune" not in recipe) == bool({name, method} & NO_FINETUNE)
    if "finetune" not in recipe:
        expected = {table: keys for table, keys in expected.items() if not table.startswith("finetune")}
    stages = ("stage1", "stage2", "finetune")
    if method == "h2t":  # its finetune has its own term in place of the others'
        del expected["finetune.terms.erm"]
    terms = {f"{stage}.terms.{term}" for stage in stages if stage in recipe for term in recipe[stage]["terms"]}
    assert terms == {table for table in expected if ".terms." in table}
    for table, keys in expected.items():
        stage, _, term = table.partition(".terms.")
        found = recipe[stage]["terms"][term] if term else dict(getattr(load(name), stage)) | groups_of(recipe[stage])
        assert {key: found.get(key) for key in keys} == keys, table
    if "cpmix" in name and data in LARGE:
        assert recipe["stage2"]["terms"]["erm"] == recipe["stage1"]["terms"]["erm"]


@pytest.mark.parametrize(
    ("data", "rho", "smooth", "factor"),
    [
        ("cifar10-lt", 10, (0.1, 0.0), 0.2),
        ("cifar10-lt", 50, (0.2, 0.0), 0.2),
        ("cifar10-lt", 100, (0.3, 0.0), 0.5),
        ("cifar10-lt", 200, (0.3, 0.0), 0.5),
        ("cifar100-lt", 10, (0.2, 0.0), 0.1),
        ("cifar100-lt", 50, (0.3, 0.0), 0.1),
        ("cifar100-lt", 100, (0.4, 0.1), 0.2),
        ("cifar100-lt", 200, (0.4, 0.1), 0.2),
    ],
)
def test_mislas_smooths_by_rho(data: str, rho: float, smooth: tuple[float, float], factor: float) -> None:
    finetune = load(f"{data}/mislas", rho=rho).finetune
    assert finetune is not None
    parameters = finetune.terms["erm"].parameters
    assert (parameters["smooth_head"], parameters["smooth_tail"]) == smooth
    assert [(g.prefix, g.lr_factor) for g in finetune.groups] == [("head.scale", 1.0), ("head", factor)]


def test_h2t_decays_weights_by_rho() -> None:
    for rho, decay in ((200, 2e-4), (100, 5e-4), (50, 2e-4)):
        finetune = load("cifar100-lt/h2t", rho=rho).finetune
        assert finetune is not None
        assert (finetune.weight_decay, finetune.lr) == (decay, 0.02)
