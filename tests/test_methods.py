"""Methods as recipes: all of them listed, resolved, fit to train; what they share, cost and quote from the paper."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import cpmix, must
from test_build_lt import write_cifar

from cpmix_cli.commands.methods import LARGE
from cpmix_cli.commands.recipes import image_passes
from cpmix_cli.data.longtail import exponential_counts
from cpmix_cli.recipe.loading import find_recipe, load, recipe_names
from cpmix_cli.results.methods import KINDS, all_methods, read_about
from cpmix_cli.runtime.errors import UsageError
from cpmix_cli.training.schedule import learning_rate

CIFAR = [name for name in recipe_names() if name.startswith("cifar")]
METHODS = [name for name in CIFAR if "ablation" not in name]
RHOS = ("200", "100", "50", "10")
NONE = None
# Table 1, rows of single models: CIFAR-100-LT and CIFAR-10-LT at rho 200, 100, 50, 10.
TABLE_1 = {
    "Cross Entropy": ((34.84, 38.32, 43.26, 57.00), (65.68, 70.36, 77.10, 86.89)),
    "LDAM-DRW": ((39.03, 43.64, 47.31, 56.90), (76.14, 79.58, 82.96, 87.48)),
    "Balanced Softmax": ((38.01, 42.71, 46.68, 58.34), (74.48, 77.20, 81.26, 87.46)),
    "MiSLAS": ((NONE, 47.0, 52.3, 63.2), (NONE, 82.1, 85.7, 90.0)),
    "Remix": ((36.99, 41.94, 46.21, 59.36), (NONE, 79.76, NONE, 89.02)),
    "CMO": ((NONE, 43.9, 48.3, 59.5), (NONE, NONE, NONE, NONE)),
    "UniMix": ((42.07, 45.45, 51.11, 61.25), (78.48, 82.75, 84.32, 89.66)),
    "OTmix (BS)": ((NONE, 46.8, 52.3, 62.3), (NONE, 84.0, 86.5, 90.2)),
    "RIDE": ((46.34, 49.83, 52.73, 59.30), (79.16, 82.31, 84.61, 87.19)),
    "SADE": ((NONE, 49.8, 53.9, 63.6), (NONE, NONE, NONE, NONE)),
    "ACE (from its description)": ((NONE, 49.6, 51.9, NONE), (NONE, 81.4, 84.9, NONE)),
    "CMO + RIDE": ((NONE, 50.0, 53.0, 60.2), (NONE, NONE, NONE, NONE)),
    "OTmix + RIDE": ((NONE, 50.7, 53.8, 60.8), (NONE, 82.7, 85.2, 88.7)),
    "CP-Mix + RIDE": ((47.37, 51.40, 55.77, 62.17), (79.67, 81.56, 84.23, 86.70)),
    "CP-Mix": ((43.56, 48.20, 52.12, 61.91), (78.34, 82.44, 85.08, 89.87)),
}
TABLE_2 = {
    "Cross Entropy": (45.5, 32.3, 64.5),
    "Balanced Softmax": (50.6, 39.3, 69.9),
    "LDAM-DRW": (50.3, None, 66.9),
    "MiSLAS": (52.7, 40.4, 71.6),
    "Remix": (48.6, None, 70.5),
    "UniMix": (48.6, None, 70.5),
    "OTmix (BS)": (55.6, None, 71.5),
    "CP-Mix": (53.9, 42.3, 72.3),
    "RIDE": (55.4, 40.3, 72.6),
    "SADE": (None, 40.9, 72.9),
    "ACE (from its description)": (54.7, None, 72.9),
    "CMO + RIDE": (56.2, None, 72.8),
    "OTmix + RIDE": (57.3, None, 73.0),
    "CP-Mix + RIDE": (56.6, None, 73.7),
}
COPIED = {"MiSLAS", "Remix", "CMO", "UniMix", "OTmix (BS)", "SADE", "ACE (from its description)"}
COPIED |= {"CMO + RIDE", "OTmix + RIDE"}
TABLE_4 = (45.5, 50.6, 46.8, 48.9, 51.8, 51.9, 52.3, 52.9, 53.9)
TABLE_3 = [34.84, 38.01, 36.48, 37.21, 41.28, 41.26, 40.26, 42.77, 43.56]
OTHERS = {
    "LADE": "loss",
    "Focal": "loss",
    "Logit adjustment (loss)": "loss",
    "Logit adjustment (post hoc)": "loss",
    "Class-Balanced CE": "reweighting",
    "Class-Balanced Focal": "reweighting",
    "Mixup": "mixing",
    "CutMix": "mixing",
    "RegMixup": "mixing",
    "Remix-DRW": "mixing",
    "CMO (BS)": "mixing",
    "CMO (LDAM-DRW)": "mixing",
    "cRT": "decoupled",
    "LWS": "decoupled",
    "tau-norm": "decoupled",
    "RIDE, 3 experts": "ensemble",
    "RIDE, distilled": "ensemble",
    "RIDE, distilled and routed": "ensemble",
    "RIDE, images turned": "ensemble",
    "CP-Mix on LADE": "CP-Mix",
    "CP-Mix on LDAM-DRW": "CP-Mix",
    "CP-Mix, last block": "CP-Mix",
    "CP-Mix, class-uniform partner": "control",
    "CP-Mix, random partner": "control",
    "Mixup of similar pairs (toy)": "control",
}


# -- the listing -------------------------------------------------------------------------------------------------------


def test_the_methods_and_what_the_paper_has_of_them() -> None:
    listed = must("methods", "--json").json
    assert listed.keys() == {"command", "methods"}
    methods = {method["method"]: method for method in listed["methods"]}
    assert len(methods) == len(listed["methods"])
    ablations = [name for name, method in methods.items() if method["kind"] == "ablation"]
    assert methods.keys() == {*TABLE_1, *OTHERS, *ablations}
    assert {name: methods[name]["kind"] for name in OTHERS} == OTHERS
    for method in methods.values():
        assert method.keys() == {"method", "kind", "paper", "needs", "recipes"}
        assert all(recipe.keys() == {"name", "cells", "copied", "note"} for recipe in method["recipes"])
        assert bool(method["paper"]) != (method["method"] == "Cross Entropy" or method["kind"] == "control")
    for name, rows in TABLE_1.items():
        recipes = {recipe["name"].split("/")[0]: recipe for recipe in methods[name]["recipes"]}
        for data, row in zip(("cifar100-lt", "cifar10-lt"), rows, strict=True):
            large = TABLE_2.get(name, ()) if data == "cifar100-lt" else ()
            cells = dict(zip((*RHOS, *LARGE), (*row, *large), strict=False))
            assert recipes[data]["cells"] == {key: cell for key, cell in cells.items() if cell}
            was_copied = name in COPIED and any(row)
            assert recipes[data]["copied"] == was_copied
    lade = methods["LADE"]["recipes"][1]
    assert (lade["name"], lade["copied"]) == ("cifar100-lt/lade", True)
    assert lade["cells"] == {"places-lt": 39.2, "inaturalist2018": 69.3}
    for name, row in TABLE_2.items():
        recipes = {recipe["name"].split("/")[0]: recipe for recipe in methods[name]["recipes"]}
        for data, cell in zip(LARGE, row, strict=True):
            assert (data in recipes) == (cell is not None), (name, data)
            if cell is not None:
                assert (recipes[data]["cells"], recipes[data]["copied"]) == ({data: cell}, name in COPIED)
    rows_of_ablations = [{"table3": a, "table4": b} for a, b in zip(TABLE_3, TABLE_4, strict=True)]
    assert [methods[name]["recipes"][0]["cells"] for name in ablations] == rows_of_ablations
    assert [methods[name]["recipes"][1]["cells"] for name in ablations] == [{"table4": cell} for cell in TABLE_4]
    kinds = [KINDS.index(method["kind"]) for method in listed["methods"]]
    assert kinds == sorted(kinds)


def test_the_table_marks_what_was_copied() -> None:
    lines = must("methods").stdout.splitlines()
    rows = {line.split("  ")[0]: line for line in lines[: lines.index("")]}
    assert rows["OTmix (BS)"].split()[3:6] == ["46.80*", "52.30*", "62.30*"]
    assert rows["CP-Mix"].split()[2:6] == ["43.56", "48.20", "52.12", "61.91"]
    assert rows["CP-Mix"].endswith("  Yoon et al., arXiv 2024     class counts, confusions")
    assert [line for line in lines if line.startswith("* copied")]
    assert [line for line in lines if line.startswith("CP-Mix  ")][1].split()[1:] == ["53.90", "42.30", "72.30"]
    assert [line for line in lines if line.startswith("LADE  ")][1].split()[1:] == ["39.20*", "69.30*"]
    assert lines[-3:-1] == [
        "all but ablations, cpmix-last-block (places-lt) and fixed-pairs (toy) stand for cifar10-lt too",
        "with a number in the second table, for that data set too; ablations for imagenet-lt",
    ]


def test_every_recipe_of_cifar_says_what_it_is_about() -> None:
    for name in CIFAR:
        about = read_about(find_recipe(name))
        assert about is not None, name
        data, stem = name.split("/")
        if data == "cifar100-lt":
            assert about.kind is not None, name
        else:
            same = read_about(find_recipe(f"cifar100-lt/{stem}"))
            assert same is not None
            assert about.method == same.method
    recipes = [name for method in all_methods() for name in method.recipes]
    assert sorted(recipes) == recipe_names()


def test_a_wrong_about_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[about]\nkind = "magic"\ncells = { 200 = 1.0 }\nauthor = "me"\n')
    with pytest.raises(UsageError) as caught:
        read_about(path)
    text = str(caught.value)
    assert str(path) in text
    for key in ("about.method", "about.kind", "about.cells", "about.author"):
        assert f"{key}" in text
    path.write_text("seed = 1\n")
    assert read_about(path) is None


# -- what they cost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "passes", "ratio"),
    [
        ("cifar100-lt/cpmix", [], 200 + 100 * 3 + 30, 1),
        ("cifar100-lt/balanced-softmax", [], 200 + 100 + 30, 330 / 530),
        ("cifar100-lt/regmixup", [], 350 * 2 + 30, 730 / 530),
        ("cifar100-lt/ablation-5", [], 200 + 100 * 2 + 30, 430 / 530),
        ("cifar100-lt/otmix", [], 240 + (237 * 238 - 4 * 5) / 2 / 240 + 30, (270 + 28193 / 240) / 530),
        ("cifar100-lt/cpmix", ["--epochs", 30], 20 + 10 * 3 + 3, 1),
        ("toy/cpmix", [], 7 + 3 * 3, 1),
    ],
)
def test_budget(name: str, flags: list[object], passes: float, ratio: float) -> None:
    result = must("recipes", name, "--budget", *flags, "--json").json
    assert result.keys() == {"command", "budgets"}
    (entry,) = result["budgets"]
    assert entry["name"] == name
    assert entry["image_passes"] == pytest.approx(passes, abs=1e-4)
    assert entry["to_cpmix"] == pytest.approx(ratio, abs=1e-4)


def test_budget_of_all_recipes_and_of_a_file(tmp_path: Path) -> None:
    listed = must("recipes", "--budget", "--json").json["budgets"]
    assert [entry["name"] for entry in listed] == recipe_names()
    entry = listed[recipe_names().index("cifar100-lt/cpmix")]
    assert entry == {
        "name": "cifar100-lt/cpmix",
        "stage1_epochs": 200,
        "stage2_epochs": 100,
        "finetune_epochs": 30,
        "image_passes": 530.0,
        "to_cpmix": 1.0,
    }
    text = must("recipes", "--budget").stdout
    assert re.search(r"cifar100-lt/cpmix +200 \+ 100 \+ 30 +530\.0 +1\.00\n", text)
    path = tmp_path / "mine.toml"
    path.write_text('extends = "toy/cpmix"\n')
    (entry,) = must("recipes", path, "--budget", "--json").json["budgets"]
    assert (entry["image_passes"], entry["to_cpmix"]) == (16.0, None)
    assert cpmix("recipes", "cifar100-lt/nothing", "--budget").code == 2


def test_the_cost_that_a_header_says_is_the_budget() -> None:
    sizes = {
        "cifar100-lt": int(exponential_counts(500, 100, 200).sum()),
        "cifar10-lt": int(exponential_counts(5000, 10, 200).sum()),
    }
    assert sizes == {"cifar100-lt": 9502, "cifar10-lt": 11203}
    for name in CIFAR:
        header = " ".join(
            find_recipe(name).read_text().split("\nextends")[0].split("\n[")[0].replace("\n#", "").split()
        )
        (cost,) = re.findall(r"Cost at rho 200: [^=]*= ([\d.]+) million image passes", header)
        assert cost == f"{image_passes(load(name)) * sizes[name.split('/')[0]] / 1e6:.1f}", name


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_to_itself(name: str, tmp_path: Path) -> None:
    assert find_recipe(name).read_text().startswith("# ")
    path = tmp_path / "resolved.toml"
    for rho in (None, 200, 100, 50, 10):
        recipe = load(name, rho=rho)
        path.write_text(recipe.to_toml())
        assert load(str(path)) == recipe
    load(name, epochs=20)


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder of ten classes in CIFAR's shape."""
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(folder)
    must("build-lt", "cifar10", "--rho", 4, "--data-root", folder, "--out", folder / "lt")
    return folder / "lt"


@pytest.mark.parametrize("name", CIFAR)
def test_every_recipe_of_cifar_is_fit_to_train(name: str, small_cifar: Path, tmp_path: Path) -> None:
    flags = ["--data", small_cifar, "--recipe", name, "--out", tmp_path / "run"]
    if any(term.teacher for term in load(name).stage1.terms.values()):
        plain = ("--recipe", "cifar10-lt/cross-entropy", "--set", "model.name=resnet8", "--epochs", 1)
        must("train-stage1", "--data", small_cifar, *plain, "--out", tmp_path / "teacher")
        flags += ["--teacher", tmp_path / "teacher"]
    assert must("train-stage1", *flags, "--dry-run", "--json").json["status"] == "dry run"
    assert not (tmp_path / "run").exists()


SHARED = {
    "cpmix": ["balanced-softmax", *(f"ablation-{row}" for row in range(2, 10)), "cpmix-class-uniform", "cpmix-random"],
    "cross-entropy": ["ablation-1", "crt", "lws", "tau-norm", "logit-adjusted-posthoc"],
}


@pytest.mark.parametrize(("base", "name"), [(base, name) for base, names in SHARED.items() for name in names])
def test_shared_stage_1(base: str, name: str) -> None:
    for epochs in (None, 20):
        ours, theirs = (load(f"cifar100-lt/{n}", epochs=epochs) for n in (name, base))
        assert ours.tables_of("stage1") == theirs.tables_of("stage1")


def test_rows_of_table_3() -> None:
    """Losses and labels of each row's second stage; row 1 has one stage."""
    eq9, plain = ("imbalance-aware", {"alpha": 1.5, "t": 0.5}), ("lambda", {"alpha": 1.5})
    rows = [{}, {"mix": plain}, {"mix": eq9}, {"cp": plain}, {"cp": plain, "mix": plain}, {"cp": eq9}]
    rows += [{"cp": eq9, "mix": eq9}] * 2
    for row, expected in enumerate(rows, start=2):
        stage2 = load(f"cifar100-lt/ablation-{row}").stage2
        assert stage2 is not None
        active = {name: term for name, term in stage2.terms.items() if term.weight > 0}
        assert active.pop("erm").loss == "balanced-softmax"
        assert {
            name: (term.label, {"alpha": term.alpha} | term.parameters) for name, term in active.items()
        } == expected
        assert {term.weight for term in active.values()} <= {2.5}
    assert load("cifar100-lt/ablation-1") == load("cifar100-lt/cross-entropy")
    assert load("cifar100-lt/ablation-8") == load("cifar100-lt/ablation-9") == load("cifar100-lt/cpmix")


TABLE_6 = {1: 0.01, 10: 0.1, 260: 0.1, 261: 1e-3, 280: 1e-3, 281: 1e-5, 300: 1e-5}
SHELL = {1: 0.02, 5: 0.1, 160: 0.1, 161: 1e-3, 180: 1e-3, 181: 1e-5, 200: 1e-5}
RATES = {
    **dict.fromkeys(["balanced-softmax", "cpmix", "cpmix-class-uniform", "cpmix-random"], TABLE_6),
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
    "sade": {1: 0.02, 160: 0.1, 161: 1e-2, 181: 1e-3, 200: 1e-3},
    "ace": {1: 0.02, 320: 0.1, 321: 1e-3, 361: 1e-5, 400: 1e-5},
    "otmix-ride": {1: 0.1, 100: 0.1, 101: 1e-2, 161: 1e-3, 201: 1e-5, 240: 1e-5},
    "mislas": {1: 0.02, 160: 0.1, 161: 1e-2, 181: 1e-3, 200: 1e-3},
}
"""Epoch -> rate; what stands for CIFAR-10-LT alone under its name."""


@pytest.mark.parametrize("name", METHODS)
def test_published_schedules(name: str) -> None:
    recipe = load(name)
    expected = RATES.get(name) or RATES[name.split("/")[1]]
    rates = {e: learning_rate(recipe.optimizer.lr, recipe.schedule, e, 0, 75) for e in expected}
    assert rates == pytest.approx(expected)
    assert recipe.schedule.epochs == max(expected)
    first = 133 if name.endswith("/cpmix-ride") else 200  # two thirds
    assert recipe.schedule.stage1_epochs == (first if recipe.stage2 else max(expected))


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
COMMON: dict[str, dict[str, Any]] = {
    "data": {"augment": "crop-flip", "padding": 4, "normalisation": "cifar10"},
    "model": {"name": "resnet32", "head": "linear", "head_bias": "drawn"},
    "optimizer": {**SGD, "kind": "sgd", "weight_decay": 2e-4, "groups": []},
    "confusion": {"start_epoch": 1, "decay": 1.0, "source": "train"},
    "stage1": {"forward": "joint"},
    ERM: NATURAL,
    "finetune": {**SGD, **HEAD, "epochs": 30, "lr": 0.5, "weight_decay": 0.0},
    "finetune.terms.erm": {**NATURAL, "draw": "class-uniform"},
    "evaluation": {"logit_adjustment": 0.0, "tau_norm": 0.0},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "cifar100-lt": {},
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
    "cpmix-random": {**CPMIX, "stage2.terms.cp": {**CP, "partner": "random"}},
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
    "otmix-ride": {
        **RIDE,
        "model": THREE,
        ERM: {**OTMIX, "feature_weight": 0.05, "regularisation": 0.01, **RIDE[ERM]},
    },
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
}
NO_FINETUNE = {"logit-adjusted-posthoc", "tau-norm", "ace", "cmo-ride", "cpmix-ride", "otmix-ride", "ride", "ride-3"}
NO_FINETUNE |= {"ride-distilled", "ride-rotation", "sade"}
"""Data set, method, or both -> table -> its keys, each over COMMON; reference/methods_*.md have the values."""


@pytest.mark.parametrize("name", METHODS)
def test_published_settings(name: str) -> None:
    data, method = name.split("/")
    expected: dict[str, dict[str, Any]] = {}
    for layer in (COMMON, SETTINGS[data], SETTINGS[method], SETTINGS.get(name, {})):
        for table, keys in layer.items():
            expected[table] = expected.get(table, {}) | keys
    recipe = load(name).tables()
    assert ("finetune" not in recipe) == (method in NO_FINETUNE)
    if "finetune" not in recipe:
        expected = {table: keys for table, keys in expected.items() if not table.startswith("finetune")}
    stages = ("stage1", "stage2", "finetune")
    terms = {f"{stage}.terms.{term}" for stage in stages if stage in recipe for term in recipe[stage]["terms"]}
    assert terms == {table for table in expected if ".terms." in table}
    for table, keys in expected.items():
        found = recipe
        for part in table.split("."):
            found = found[part]
        assert {key: found.get(key) for key in keys} == keys, table


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
def test_mislas_by_rho(data: str, rho: float, smooth: tuple[float, float], factor: float) -> None:
    finetune = load(f"{data}/mislas", rho=rho).finetune
    assert finetune is not None
    parameters = finetune.terms["erm"].parameters
    assert (parameters["smooth_head"], parameters["smooth_tail"]) == smooth
    assert [(g.prefix, g.lr_factor) for g in finetune.groups] == [("head.scale", 1.0), ("head", factor)]
