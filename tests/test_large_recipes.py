"""Recipes for ImageNet-LT, Places-LT and iNaturalist 2018: the published numbers typed by hand, the rows of the paper
that their runs stand for, and published weights and frozen stages in real training.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cpmix, must
from PIL import Image
from safetensors.torch import load_file, save_file
from test_weights import save

from cpmix_cli.artifacts.tensors import sealed_metadata, tensor_bytes
from cpmix_cli.commands.compare import places
from cpmix_cli.commands.recipes import image_passes
from cpmix_cli.commands.train_stage1 import check_init
from cpmix_cli.models import MODELS, PUBLISHED_WEIGHTS, build_model, load_backbone
from cpmix_cli.recipe.loading import find_recipe, load, recipe_names
from cpmix_cli.recipe.schema import Model, changed
from cpmix_cli.results.comparison import ComparisonRow, EvaluatedRun, evaluations_of
from cpmix_cli.results.methods import recognised
from cpmix_cli.results.paper import PAPER_TABLES
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.schedule import learning_rate

CLASSES = {"imagenet-lt": 1000, "places-lt": 365, "inaturalist2018": 8142}
IMAGES = {"imagenet-lt": 115_846, "places-lt": 62_500, "inaturalist2018": 437_513}
LARGE = [name for name in recipe_names() if name.partition("/")[0] in CLASSES]
LAST_BLOCK = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4.0", "layer4.1"]

# -- all of them -------------------------------------------------------------------------------------------------------


def test_there_is_one_for_every_number_of_table_2() -> None:
    rows = [
        f"{column.data}/{row.recipe}"
        for key in ("table2", "table4", "table7", "table8", "table9")
        for row in PAPER_TABLES[key].rows
        for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True)
        if cell is not None
    ]
    assert sorted({*rows, "places-lt/cpmix-last-block"}) == LARGE
    assert len(LARGE) == 13 + 9 + 7 + 1 + 15


@pytest.mark.parametrize("name", LARGE)
def test_it_fits_its_data_set(name: str) -> None:
    data = name.partition("/")[0]
    recipe = load(name)
    check_fits(recipe, CLASSES[data], (224, 224, 3))
    jitter = "" if data == "inaturalist2018" else "-jitter"
    constants = "inaturalist" if data == "inaturalist2018" else "imagenet"
    assert (recipe.data.augment, recipe.data.crop) == (f"resized-crop-flip{jitter}", 224)
    assert recipe.data.normalisation == constants
    assert recipe.model.name == ("resnet152" if data == "places-lt" else "resnet50")
    assert recipe.confusion.refresh == "epoch"
    assert recipe.confusion.source == "train"
    assert recipe.evaluation.batch_size == (128 if data == "inaturalist2018" else 256)
    assert recipe.model.init == ("resnet152-394f9c45.pth" if data == "places-lt" else "")


def test_the_header_has_the_paper_s_number_and_the_cost() -> None:
    for key in ("table2", "table4"):
        for row in PAPER_TABLES[key].rows:
            for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True):
                if cell is not None:
                    assert cell in header(f"{column.data}/{row.recipe}"), (row.name, column.data)
    for name in LARGE:
        (cost,) = re.findall(r"Cost: [^=]*= ([\d.]+) million image passes", header(name))
        assert cost == f"{image_passes(load(name)) * IMAGES[name.partition('/')[0]] / 1e6:.1f}", name


def header(name: str) -> str:
    """The comment at a recipe's head, in one line."""
    lines = find_recipe(name).read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_what_is_not_comparable_says_so() -> None:
    rows = ["ride", "otmix", "otmix-ride"]
    wanted = {f"{data}/{row}" for data in ("imagenet-lt", "inaturalist2018") for row in rows} | {"places-lt/ride"}
    assert {name for name in LARGE if "not comparable" in header(name)} == wanted
    copied = {row.recipe for row in PAPER_TABLES["table2"].rows if row.copied}
    assert {name.partition("/")[2] for name in LARGE if "copied" in header(name)} == copied


def test_torchvision_has_the_weights_by_these_names() -> None:
    from torchvision import models

    for name, url in [
        ("resnet152-394f9c45.pth", models.ResNet152_Weights.IMAGENET1K_V1.url),
        ("resnet50-0676ba61.pth", models.ResNet50_Weights.IMAGENET1K_V1.url),
    ]:
        assert url == f"https://download.pytorch.org/models/{name}"
        assert re.fullmatch(r"[0-9a-f]{64}", PUBLISHED_WEIGHTS[name])
        assert PUBLISHED_WEIGHTS[name].startswith(name[-12:-4])


def test_published_weights_are_known_by_their_whole_hash(tmp_path: Path) -> None:
    """Eight equal digits are not enough of a file whose 64 are known."""
    recipe = load("places-lt/cpmix")
    tensors = {"conv1.weight": torch.zeros(1)}
    whole = PUBLISHED_WEIGHTS["resnet152-394f9c45.pth"]
    for sha, fits in ((whole, True), ("394f9c45" + 56 * "0", False), (whole[:-1] + "9", False)):
        origin = {"file": "resnet152-394f9c45.pth", "sha256": sha}
        path = tmp_path / "w.safetensors"
        path.write_bytes(tensor_bytes(tensors, sealed_metadata(tensors, origin)))
        if fits:
            check_init(recipe, path)
        else:
            with pytest.raises(
                InputError, match=rf"was made from resnet152-394f9c45\.pth, sha256 {sha}; .* sha256 {whole}"
            ):
                check_init(recipe, path)


# -- published settings ------------------------------------------------------------------------------------------------

OPTIMIZER = ("lr", "batch_size", "weight_decay", "nesterov")
SGD: dict[str, tuple[float, int, float, bool]] = {
    "imagenet-lt": (0.1, 192, 5e-4, False),
    "places-lt": (0.01, 128, 5e-4, False),
    "inaturalist2018": (0.1, 256, 2e-4, False),
    "imagenet-lt/ldam-drw": (0.1, 128, 2e-4, False),
    "imagenet-lt/mislas": (0.1, 256, 5e-4, False),
    "imagenet-lt/otmix": (0.1, 128, 2e-4, False),
    **dict.fromkeys(
        [f"imagenet-lt/{m}" for m in ("ride", "cmo-ride", "otmix-ride", "cpmix-ride")], (0.1, 256, 2e-4, True)
    ),
    "places-lt/lade": (0.05, 128, 5e-4, False),
    "places-lt/mislas": (0.1, 256, 5e-4, False),
    **dict.fromkeys(["places-lt/ride", "places-lt/sade"], (0.01, 128, 4e-4, True)),
    **dict.fromkeys(["inaturalist2018/mislas", "inaturalist2018/lade"], (0.1, 256, 1e-4, False)),
    "inaturalist2018/otmix": (0.1, 128, 2e-4, False),
    **dict.fromkeys(
        [f"inaturalist2018/{m}" for m in ("ride", "cmo-ride", "otmix-ride", "cpmix-ride", "sade")],
        (0.2, 512, 2e-4, True),
    ),
}
"""Data set or recipe -> rate, batch, weight decay, Nesterov."""
COSINE_180 = {1: 0.1, 91: 0.05, 121: 0.025, 180: 0.1 * (1 + np.cos(np.pi * 179 / 180)) / 2}
COSINE_200 = {1: 0.1, 101: 0.05, 200: 0.1 * (1 + np.cos(np.pi * 199 / 200)) / 2}
COSINE_90 = {1: 0.1, 46: 0.05, 90: 0.1 * (1 + np.cos(np.pi * 89 / 90)) / 2}
CMO_100 = {1: 0.02, 5: 0.1, 60: 0.1, 61: 0.01, 80: 0.01, 81: 1e-3, 100: 1e-3}
SADE_30 = {1: 0.01, 10: 0.01, 11: 1e-3, 20: 1e-3, 21: 1e-4, 30: 1e-4}
OTMIX_200 = {1: 0.02, 5: 0.1, 40: 0.1, 41: 0.01, 81: 1e-3, 161: 1e-5, 200: 1e-5}
OTMIX_210 = {1: 0.02, 5: 0.1, 30: 0.1, 31: 0.01, 81: 1e-3, 131: 1e-4, 181: 1e-5, 210: 1e-5}
DOUBLE = {epoch: 2 * rate for epoch, rate in CMO_100.items()}
RATES: dict[str, dict[int, float]] = {
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
"""Data set or recipe -> epoch -> rate, at the epoch's first step; the last epoch ends the training."""
STAGE_1 = {"imagenet-lt": 120, "places-lt": 15, "inaturalist2018": 50, "imagenet-lt/cpmix-ride": 67}
FINETUNES = {
    "imagenet-lt": (10, 0.05, 0.0, 192),
    "inaturalist2018": (10, 3.0, 0.0, 256),
    "imagenet-lt/mislas": (10, 0.1, 5e-4, 256),
    "places-lt/mislas": (10, 0.1, 5e-4, 256),
    "inaturalist2018/mislas": (10, 0.1, 1e-4, 256),
}
"""Data set or recipe -> epochs, rate, weight decay, batch."""
NO_FINETUNE = {"ace", "ride", "cmo-ride", "otmix-ride", "cpmix-ride", "sade"}


@pytest.mark.parametrize("name", LARGE)
def test_published_training(name: str) -> None:
    data, method = name.split("/")
    recipe = load(name)
    assert tuple(getattr(recipe.optimizer, key) for key in OPTIMIZER) == SGD.get(name, SGD[data])
    assert (recipe.optimizer.momentum, recipe.optimizer.micro_batches) == (0.9, 1)
    rates = RATES.get(name, RATES[data])
    found = {e: learning_rate(recipe.optimizer.lr, recipe.schedule, e, 0, 100) for e in rates}
    assert found == pytest.approx(rates)
    assert recipe.schedule.epochs == max(rates)
    first = STAGE_1.get(name, STAGE_1[data]) if recipe.stage2 else max(rates)
    assert recipe.schedule.stage1_epochs == first
    none = method in NO_FINETUNE or name in ("inaturalist2018/lade", "inaturalist2018/otmix")
    wanted = None if none else FINETUNES.get(name, FINETUNES.get(data))
    assert (recipe.finetune is None) == (wanted is None)
    if recipe.finetune is not None:
        table = recipe.finetune
        assert (table.epochs, table.lr, table.weight_decay, table.batch_size) == wanted
        assert (table.momentum, table.nesterov, table.kind, table.train) == (0.9, False, "cosine", ["head"])
        assert table.terms["erm"].draw == "class-uniform"
        scaled = method == "mislas"
        assert (table.head, table.batchnorm) == (("scale", "shift") if scaled else ("keep", "frozen"))
        assert table.terms["erm"].loss == ("label-aware-smoothing" if scaled else "cross-entropy")


PLAIN = {"loss": "cross-entropy"}
BALANCED = {"loss": "balanced-softmax"}
BOX = {"partner": "frequency-power", "power": 0.0, "mix": "box", "label": "lambda"}
GATE = {"probability": 0.5, "unmixed_first": 4, "unmixed_last": 3}
DRW = {"reweight": "effective-number", "beta": 0.9999, "reweight_after": 80, "reweight_norm": "batch-sum"}
LDAM = {"loss": "ldam", "max_margin": 0.5, "scale": 30.0, **DRW}
RIDE = {**LDAM, "regulariser": "expert-diversity", "diversity": 0.2, "against": "mean"}
TRANSPORT = {"match": "transport", "match_power": 1.0, "feature_weight": 0.05, "regularisation": 0.01}
OTMIX = {**BOX, **GATE, **TRANSPORT, "alpha": 4.0}
CMO = {**BOX, **GATE, "alpha": 1.0, "match": None}
SPREAD = {"imagenet-lt": 0.02, "inaturalist2018": 0.015, "places-lt": 0.02}
LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy": {**PLAIN, "partner": None},
    "balanced-softmax": {**BALANCED, "partner": None},
    "cpmix": {**BALANCED, "partner": None},
    "cpmix-last-block": {**BALANCED, "partner": None},
    "ldam-drw": LDAM,
    "remix": {**PLAIN, "partner": "permutation", "alpha": 1.0, "label": "remix", "min_ratio": 3.0, "threshold": 0.5},
    "unimix": {**BALANCED, "partner": "frequency-power", "power": -1.0, "ratio": "unimix", "alpha": 0.8},
    "mislas": {**PLAIN, "partner": "permutation", "alpha": 0.2, "mix": "linear", "label": "lambda"},
    "places-lt/lade": {"loss": "lade", "lader_weight": 0.005, "remine": 0.1, "importance": "sample"},
    "inaturalist2018/lade": {"loss": "lade", "lader_weight": 0.05, "remine": 0.5, "importance": "sample"},
    "otmix": {**BALANCED, **OTMIX},
    "ace": {"loss": "ace", "interference": 1.0, "measure": "norm"},
    "ride": RIDE,
    "places-lt/ride": {**RIDE, "reweight_after": 20},
    "cmo-ride": {**RIDE, **CMO},
    "imagenet-lt/otmix-ride": {**RIDE, **OTMIX, "reweight_after": 160},
    "inaturalist2018/otmix-ride": {**RIDE, **OTMIX, "reweight_after": 180},
    "cpmix-ride": {**RIDE, "partner": None},
    "sade": {"loss": "sade", "tau": 1.0},
}
"""Method or recipe -> stage1.terms.erm."""
EXPERTS = {
    "ace": (3, 3, 1.0),
    "ride": (6, 2, 0.75),
    "cpmix-ride": (6, 2, 0.75),
    "cmo-ride": (3, 2, 0.75),
    "otmix-ride": (3, 2, 0.75),
    "sade": (3, 2, 0.75),
    "places-lt/ride": (6, 3, 1.0),
    "places-lt/sade": (3, 3, 1.0),
}
"""Method or recipe -> experts, shared stages, width."""


@pytest.mark.parametrize("name", [name for name in LARGE if "ablation" not in name])
def test_published_losses(name: str) -> None:
    data, method = name.split("/")
    recipe = load(name)
    term = recipe.tables()["stage1"]["terms"]["erm"]
    wanted = LOSSES.get(name) or LOSSES[method]
    if wanted.get("regulariser"):
        wanted = {**wanted, "temperature_spread": SPREAD[data]}
    assert {key: term.get(key) for key in wanted} == wanted
    model = recipe.model
    experts = EXPERTS.get(name) or EXPERTS.get(method, (1, 1, 1.0))
    assert (model.experts, model.shared_stages, model.expert_width) == experts
    margins = term["loss"] in ("ldam", "sade")
    linear = name in [f"inaturalist2018/{m}" for m in ("ace", "lade", "mislas", "otmix")]
    cosine = margins or (data == "inaturalist2018" and not linear)
    assert (model.head, model.head_scale) == ("cosine" if cosine else "linear", 30.0)
    assert model.frozen == (LAST_BLOCK if name in ("places-lt/mislas", "places-lt/cpmix-last-block") else [])
    groups = [(g.prefix, g.lr_factor) for g in recipe.optimizer.groups]
    rest = {"places-lt/lade": 0.02, "places-lt/sade": 0.1, "places-lt/ride": 0.1}.get(name)
    assert groups == ([] if rest is None else [("head", 1.0), ("", rest)])
    assert recipe.optimizer.expert_rates == ("target-share" if method == "ace" else "equal")
    assert recipe.evaluation.aggregate == ("targets" if method == "ace" else "mean")


# Table 6: alpha and gamma of both mixed terms; t is 0.5 everywhere.
ALPHA_GAMMA = {"imagenet-lt": (3.0, 1.0), "places-lt": (1.0, 2.0), "inaturalist2018": (1.0, 1.0)}


@pytest.mark.parametrize("name", [name for name in LARGE if "/cpmix" in name])
def test_published_mixed_terms(name: str) -> None:
    recipe = load(name)
    assert recipe.stage2 is not None
    assert recipe.stage2.forward == "joint"
    terms = recipe.stage2.terms
    assert terms["erm"] == recipe.stage1.terms["erm"]
    assert {key: (term.draw, term.partner) for key, term in terms.items() if key != "erm"} == {
        "cp": ("class-uniform", "confusion"),
        "mix": ("natural", "permutation"),
    }
    for key in ("cp", "mix"):
        term = terms[key]
        assert (term.alpha, term.weight) == ALPHA_GAMMA[name.partition("/")[0]]
        assert (term.label, term.parameters) == ("imbalance-aware", {"t": 0.5})
        assert (term.ratio, term.mix, term.loss, term.per_sample) == ("beta", "linear", "cross-entropy", False)


@pytest.mark.parametrize(
    ("data", "head", "tail"), [("imagenet-lt", 0.3, 0.0), ("inaturalist2018", 0.3, 0.0), ("places-lt", 0.4, 0.1)]
)
def test_mislas_has_its_smoothing(data: str, head: float, tail: float) -> None:
    finetune = load(f"{data}/mislas").finetune
    assert finetune is not None
    assert finetune.terms["erm"].parameters == {"smooth_head": head, "smooth_tail": tail, "over": "others"}
    assert [(g.prefix, g.lr_factor) for g in finetune.groups] == [("head.scale", 1.0), ("head", 0.05)]


TICKS: list[dict[str, Any]] = [
    {"schedule.stage1_epochs": 180, "stage1.terms.erm.loss": "cross-entropy", "stage2": None},
    {"stage2.terms.cp": None, "stage2.terms.mix": None},
    {"stage2.terms.cp.weight": 0.0, "stage2.terms.mix.label": "lambda", "stage2.terms.mix.t": None},
    {"stage2.terms.cp.weight": 0.0},
    {"stage2.terms.cp.label": "lambda", "stage2.terms.cp.t": None, "stage2.terms.mix.weight": 0.0},
    {f"stage2.terms.{t}.{k}": v for t in ("cp", "mix") for k, v in (("label", "lambda"), ("t", None))},
    {"stage2.terms.mix.weight": 0.0},
    {},
    {},
]
"""Rows of Table 4: where each differs from CP-Mix; None where it has no such key."""


@pytest.mark.parametrize("row", range(1, 10))
def test_rows_of_table_4_differ_in_their_ticks(row: int) -> None:
    for epochs in (None, 20):
        theirs, ours = (load(f"imagenet-lt/{name}", epochs=epochs) for name in ("cpmix", f"ablation-{row}"))
        ticks = TICKS[row - 1] | ({"schedule.stage1_epochs": 20} if row == 1 and epochs else {})
        assert {key: new for key, _, new in changed(theirs.tables(), ours.tables())} == ticks
        assert (ours.tables_of("stage1") == theirs.tables_of("stage1")) == (row > 1)


@pytest.mark.parametrize("data", CLASSES)
def test_balanced_softmax_shares_stage_1_with_cpmix(data: str) -> None:
    bs, cp = (load(f"{data}/{name}") for name in ("balanced-softmax", "cpmix"))
    assert {key for key, *_ in changed(cp.tables(), bs.tables())} == {"stage2.terms.cp", "stage2.terms.mix"}


def test_the_last_block_is_all_that_differs() -> None:
    cp, last = (load(f"places-lt/{name}").tables() for name in ("cpmix", "cpmix-last-block"))
    assert changed(cp, last) == [("model.frozen", None, LAST_BLOCK)]
    with torch.device("meta"):
        network = MODELS["resnet152"](365, (224, 224, 3), Model(name="resnet152"))
    left = {name for name, _ in network.named_parameters() if not name.startswith(tuple(LAST_BLOCK))}
    assert {name.rpartition(".")[0].rpartition(".")[0] or "head" for name in left} == {"layer4.2", "head"}


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet10", 1000, 5_418_792),
        ("resnet101", 1000, 44_549_160),
        ("resnext50", 1000, 25_028_904),
        ("resnet152", 365, 58_891_693),
    ],
)
def test_networks_have_their_known_size(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        network = MODELS[name](classes, (224, 224, 3), Model(name=name))
    assert sum(p.numel() for p in network.parameters()) == parameters


# -- the paper's rows --------------------------------------------------------------------------------------------------


def test_their_runs_stand_for_the_paper_s_rows(digits_run: Path) -> None:
    """A run's record with the recipe and data set of each number in it: in that cell, and in no other of its table."""
    must("evaluate", "--from", digits_run)
    (measured, *_), _ = evaluations_of(digits_run, None)
    for key in ("table2", "table4", "table7", "table8", "table9"):
        for row in PAPER_TABLES[key].rows:
            for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True):
                if cell is not None:
                    found = places(
                        ComparisonRow([run_of(measured, f"{column.data}/{row.recipe}", row.finetuned)]),
                        PAPER_TABLES[key],
                    )
                    assert {(r.recipe, c.data) for r, c in found} == {(row.recipe, column.data)}, (key, row.name)
                    assert {c.measure for _, c in found} == {c.measure for c in PAPER_TABLES[key].columns}
    last = run_of(measured, "places-lt/cpmix-last-block", True)
    assert places(ComparisonRow([last]), PAPER_TABLES["table2"]) == []
    assert (last.method.method, last.method.changed) == ("CP-Mix, last block", {})


def run_of(measured: EvaluatedRun, name: str, finetuned: bool) -> EvaluatedRun:
    """A record as a run of this recipe on its data set has it, before or after its finetune."""
    recipe = load(name, epochs=20)
    last = "stage2" if recipe.stage2 else "stage1"
    phase = "finetune" if finetuned and recipe.finetune else last
    data = name.partition("/")[0]
    forms = frozenset({finetuned}) if recipe.finetune else frozenset({True, False})
    return replace(measured, data=data, method=recognised(recipe, phase, data, None), forms=forms)


# -- published weights and frozen stages, trained ----------------------------------------------------------------------

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (20, 60, 210)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder of three classes, 24, 12 and 6 images of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.Generator(np.random.PCG64(0))
    for (name, colour), count in zip(COLOURS.items(), (24, 12, 6), strict=True):
        (folder / "p" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + generator.normal(0, 60, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "p" / name / f"{i:02d}.png")
    out = folder / "data"
    must("build-lt", "image-folder", "--data-root", folder / "p", "--image-size", 64, "--out", out)
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-10's weights as import-weights made them, from a file named by its hash as torchvision's are."""
    folder = tmp_path_factory.mktemp("published")
    return imported(folder, seed=0)


def imported(folder: Path, seed: int) -> Path:
    """Random weights for 1,000 classes under torchvision's names, saved and imported."""
    generator = torch.Generator().manual_seed(seed)
    state = build_model(Model(name="resnet10"), 1000, (64, 64, 3), generator).state_dict()
    sha = save({name.replace("head.", "fc."): t for name, t in state.items()}, folder / "w.pth")
    path = (folder / "w.pth").rename(folder / f"resnet10-{sha[:8]}.pth")
    must("import-weights", path, "--sha256", sha[:8])
    return path.with_suffix(".safetensors")


STAGES = ["conv1", "bn1", "layer1", "layer2", "layer3"]
SMALL = ["model.name=resnet10", "data.crop=0", "data.augment=crop-flip", "optimizer.batch_size=16"]
SMALL += ["finetune.batch_size=16", "model.precision=fp32", f"model.frozen={STAGES}"]
# A finetune that asks for more than the head, in training mode: what is frozen stays even so.
SMALL += ['finetune.train=["layer3", "layer4", "head"]', "finetune.batchnorm=shift"]
FLAGS = ["--recipe", "imagenet-lt/cpmix", "--epochs", 3, *(word for key in SMALL for word in ("--set", key))]


def test_what_is_frozen_stays_through_all_phases(photos: Path, published: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    name = published.with_suffix(".pth").name
    must("train-stage1", "--data", photos, *FLAGS, "--set", f"model.init={name}", "--init", published, "--out", run)
    must("train-stage2", "--from", run)
    must("finetune", "--from", run)
    before = load_file(published)
    for phase in ("stage1", "stage2", "finetune"):
        after = load_file(run / phase / "model.safetensors")
        frozen = {n for n in after if n.startswith(tuple(STAGES))}
        assert len(frozen) == 54
        for tensor in frozen:
            assert torch.equal(after[tensor], before[tensor]), (phase, tensor)
        moved = after.keys() - frozen
        assert {n.partition(".")[0] for n in moved} == {"layer4", "head"}
        for tensor in moved:
            assert tensor not in before or not torch.equal(after[tensor], before[tensor]), (phase, tensor)
        before |= {n: after[n] for n in moved}


@pytest.mark.parametrize(
    ("name", "frozen", "message"),
    [
        ("cpmix", ["layer"], 'the network has no "layer", but conv1, bn1, layer1, layer2, layer3, layer4, head'),
        ("cpmix", [""], 'the network has no "", but conv1'),
        ("cpmix", [*LAST_BLOCK[:5], "layer4", "head"], "model.frozen: all of it is frozen, nothing is left to train"),
        ("cpmix", ["head"], "finetune.train: all of it is frozen, nothing is left to train"),
        ("ride", ["layer1"], 'the network has no "layer1", but shared, experts, head'),
    ],
)
def test_what_is_frozen_is_there_and_leaves_something(name: str, frozen: list[str], message: str) -> None:
    recipe = load(f"imagenet-lt/{name}", settings=[f"model.frozen={frozen}"])
    with pytest.raises(UsageError) as fault:
        check_fits(recipe, 1000, (224, 224, 3))
    assert message in str(fault.value)
    assert "1 fault:" in str(fault.value) or "all of it" in message


def test_a_frozen_module_is_not_its_namesakes() -> None:
    """layer3.1 of ResNet-101 is neither layer3.10 nor layer3.19."""
    with torch.device("meta"):
        network = MODELS["resnet101"](5, (64, 64, 3), Model(name="resnet101"))
    network.frozen = ("layer3.1", "bn1")
    network.train()
    still = {name for name, module in network.named_modules() if not module.training}
    assert {name.partition(".")[0] for name in still} == {"layer3", "bn1"}
    assert all(name == "bn1" or name.split(".")[1] == "1" for name in still)
    recipe = Model(name="resnet10", frozen=["layer1.0.conv1", "head.bias"])
    small = build_model(recipe, 5, (64, 64, 3), torch.Generator().manual_seed(0))
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {
        "layer1.0.conv1.weight",
        "head.bias",
    }


def test_a_recipe_wants_its_published_weights(photos: Path, published: Path, tmp_path: Path) -> None:
    name = published.with_suffix(".pth").name
    run = ["train-stage1", "--data", photos, *FLAGS, "--out", tmp_path / "run", "--dry-run"]
    wanted = [*run, "--set", f"model.init={name}"]
    result = cpmix(*wanted)
    assert result.code == 2
    assert f'model.init = "{name}": the recipe starts from these weights' in result.stderr
    assert f"cpmix import-weights {name} --sha256 {name[9:17]}, and give --init {published.name}" in result.stderr
    (tmp_path / "other").mkdir()
    other = imported(tmp_path / "other", seed=1)
    result = cpmix(*wanted, "--init", other)
    assert result.code == 3
    assert re.search(
        rf"{other} was made from {other.stem}\.pth, sha256 {other.stem[9:]}[0-9a-f]{{56}}; ", result.stderr
    )
    assert f'the recipe has model.init = "{name}", sha256 {name[9:17]}\n' in result.stderr
    assert "or take any weights with --set model.init=" in result.stderr
    result = cpmix(*wanted, "--init", published.with_suffix(".pth"))
    assert result.code == 3
    assert "is a PyTorch checkpoint" in result.stderr
    assert f"cpmix import-weights {published.with_suffix('.pth')} --sha256 {name[9:17]}\n" in result.stderr
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    result = cpmix(*wanted, "--init", tmp_path / "foreign.safetensors")
    assert result.code == 3
    assert "foreign.safetensors does not say what it was made from; the recipe has model.init" in result.stderr
    result = cpmix(*wanted, "--init", tmp_path)
    assert result.code == 3
    assert f"cannot read {tmp_path}" in result.stderr
    assert must(*wanted, "--init", published, "--json").json["status"] == "dry run"
    assert must(*run, "--set", "model.init=", "--init", other, "--json").json["status"] == "dry run"
    random = must(*run, "--json")
    assert random.json["status"] == "dry run"
    said = "without --init, conv1, bn1, layer1, layer2, layer3 stay at random weights (model.frozen)"
    assert random.stderr.count(said) == 1
    assert "random weights" not in must(*wanted, "--init", published).stderr
    assert not (tmp_path / "run").exists()


def test_places_lt_names_torchvision_s_weights(photos: Path, tmp_path: Path) -> None:
    flags = ["--set", "data.crop=0", "--set", "data.augment=crop-flip"]
    result = cpmix("train-stage1", "--data", photos, "--recipe", "places-lt/cpmix", *flags, "--out", tmp_path / "r")
    assert result.code == 2
    assert "https://download.pytorch.org/models/resnet152-394f9c45.pth" in result.stderr
    sha = PUBLISHED_WEIGHTS["resnet152-394f9c45.pth"]
    assert f"cpmix import-weights resnet152-394f9c45.pth --sha256 {sha}, and give" in result.stderr


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_experts_all_start_from_the_published_stages(shared: int, generator: torch.Generator) -> None:
    """Of full width, the features of each are those of the network itself."""
    plain = build_model(Model(name="resnet10"), 5, (64, 64, 3), generator).eval()
    for name, buffer in plain.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    recipe = Model(name="resnet10", experts=3, shared_stages=shared)
    experts = build_model(recipe, 5, (64, 64, 3), generator).eval()
    heads = [head.weight.clone() for head in experts.heads]
    given = {name.replace("head.", "fc."): t for name, t in plain.state_dict().items()}
    load_backbone(experts, given, Path("w"))
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        for features in experts.features(x).chunk(3, 1):
            torch.testing.assert_close(features, plain.features(x))
    assert all(torch.equal(head.weight, own) for head, own in zip(experts.heads, heads, strict=True))
    narrow = build_model(recipe.model_copy(update={"expert_width": 0.5}), 5, (64, 64, 3), generator)
    with pytest.raises(InputError, match=r"experts\.0\.0\.bn1\.bias: has shape"):
        load_backbone(narrow, given, Path("w"))
