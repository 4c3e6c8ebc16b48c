"""Recipes for ImageNet-LT, Places-LT, iNaturalist 2018: the paper's rows, published weights, frozen stages."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import header, must, refused, save, setting, write_photos
from safetensors.torch import load_file, save_file

from cpmix_cli.artifacts.tensors import sealed_metadata, tensor_bytes
from cpmix_cli.commands.compare import _places
from cpmix_cli.commands.train_stage1 import _check_init
from cpmix_cli.models import MODELS, PUBLISHED_WEIGHTS, build_model
from cpmix_cli.recipe.loading import load, recipe_names
from cpmix_cli.recipe.schema import Model, changed
from cpmix_cli.results.comparison import ComparisonRow, EvaluatedRun, evaluations_of
from cpmix_cli.results.methods import recognised
from cpmix_cli.results.paper import PAPER_TABLES
from cpmix_cli.runtime.errors import InputError, UsageError
from cpmix_cli.training.checks import check_fits
from cpmix_cli.training.pretrained import load_backbone

LARGE = [name for name in recipe_names() if name.startswith(("imagenet-lt", "places-lt", "inaturalist2018"))]
LAST_BLOCK = load("places-lt/cpmix-last-block").model.frozen or []  # typed by hand in test_published.py


def test_every_number_of_the_large_tables_has_a_recipe() -> None:
    rows = [
        f"{column.data}/{row.recipe}"
        for key in ("table2", "table4", "table7", "table8", "table9")
        for row in PAPER_TABLES[key].rows
        for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True)
        if cell is not None
    ]
    assert sorted({*rows, "places-lt/cpmix-last-block"}) == LARGE
    assert len(LARGE) == 13 + 9 + 7 + 1 + 15


def test_each_header_states_the_number_of_the_paper() -> None:
    for key in ("table2", "table4"):
        for row in PAPER_TABLES[key].rows:
            for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True):
                if cell is not None:
                    assert cell in header(f"{column.data}/{row.recipe}"), (row.name, column.data)


def test_recipes_that_are_not_comparable_state_it() -> None:
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
            _check_init(recipe, path)
        else:
            said = rf"was made from resnet152-394f9c45\.pth, sha256 {sha}; .* sha256 {whole}"
            with pytest.raises(InputError, match=said):
                _check_init(recipe, path)


def test_last_block_recipe_differs_only_in_frozen_modules() -> None:
    cp, last = (load(f"places-lt/{name}").tables() for name in ("cpmix", "cpmix-last-block"))
    assert changed(cp, last) == [("model.frozen", None, LAST_BLOCK)]
    with torch.device("meta"):
        network = MODELS["resnet152"](365, (224, 224, 3), Model(name="resnet152"))
    left = {name for name, _ in network.named_parameters() if not name.startswith(tuple(LAST_BLOCK))}
    assert {name.rpartition(".")[0].rpartition(".")[0] or "head" for name in left} == {"layer4.2", "head"}


def test_runs_are_matched_to_rows_of_the_paper(digits_run: Path) -> None:
    """A run's record with the recipe and data set of each number in it: in that cell, and in no other of its table."""
    must("evaluate", "--from", digits_run)
    (measured, *_), _ = evaluations_of(digits_run, None)
    for key in ("table2", "table4", "table7", "table8", "table9"):
        for row in PAPER_TABLES[key].rows:
            for column, cell in zip(PAPER_TABLES[key].columns, row.cells, strict=True):
                if cell is not None:
                    ours = run_of(measured, f"{column.data}/{row.recipe}", row.finetuned)
                    found = _places(ComparisonRow([ours]), PAPER_TABLES[key])
                    assert {(r.recipe, c.data) for r, c in found} == {(row.recipe, column.data)}, (key, row.name)
                    assert {c.measure for _, c in found} == {c.measure for c in PAPER_TABLES[key].columns}
    last = run_of(measured, "places-lt/cpmix-last-block", True)
    assert _places(ComparisonRow([last]), PAPER_TABLES["table2"]) == []
    assert (last.method.method, last.method.changed) == ("CP-Mix, last block", {})


def run_of(measured: EvaluatedRun, name: str, finetuned: bool) -> EvaluatedRun:
    """A record as a run of this recipe on its data set has it, before or after its finetune."""
    recipe = load(name, epochs=20)
    last = "stage2" if recipe.stage2 else "stage1"
    phase = "finetune" if finetuned and recipe.finetune else last
    data = name.partition("/")[0]
    forms = frozenset({finetuned}) if recipe.finetune else frozenset({True, False})
    return replace(measured, data=data, method=recognised(recipe, phase, data, None), forms=forms)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "p", {"red": 24, "green": 12, "blue": 6}, noise=60)
    out = folder / "data"
    must("build-lt", "image-folder", "--data-root", folder / "p", "--image-size", 64, "--out", out)
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("published"), seed=0)


def imported(folder: Path, seed: int) -> Path:
    """Random weights of a ResNet-10 by torchvision's names, in a file named by its hash, imported."""
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
FLAGS = ["--recipe", "imagenet-lt/cpmix", "--epochs", "3", *setting(*SMALL)]


@pytest.mark.slow
def test_frozen_modules_stay_unchanged_through_all_phases(photos: Path, published: Path, tmp_path: Path) -> None:
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
def test_frozen_names_must_exist_and_leave_parameters_to_train(name: str, frozen: list[str], message: str) -> None:
    recipe = load(f"imagenet-lt/{name}", settings=[f"model.frozen={frozen}"])
    with pytest.raises(UsageError) as fault:
        check_fits(recipe, 1000, (224, 224, 3))
    assert message in str(fault.value)
    assert "1 error:" in str(fault.value) or "all of it" in message


def test_freezing_a_module_keeps_modules_with_longer_names_trainable() -> None:
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
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"layer1.0.conv1.weight", "head.bias"}


@pytest.mark.slow
def test_a_recipe_requires_its_published_weights(photos: Path, published: Path, tmp_path: Path) -> None:
    name = published.with_suffix(".pth").name
    run = ["train-stage1", "--data", photos, *FLAGS, "--out", tmp_path / "run", "--dry-run"]
    wanted = [*run, "--set", f"model.init={name}"]
    result = refused(2, f'model.init = "{name}": the recipe starts from these weights', *wanted)
    assert f"fix: give --init {published.name} as well; to make it, fetch {name} from where" in result.stderr
    assert result.stderr.endswith(f", then: cpmix import-weights {name} --sha256 {name[9:17]}\n")
    (tmp_path / "other").mkdir()
    other = imported(tmp_path / "other", seed=1)
    said = (f'the recipe has model.init = "{name}", sha256 {name[9:17]}\n', "any weights with --set model.init=")
    result = refused(3, said, *wanted, "--init", other)
    made_from = rf"{other} was made from {other.stem}\.pth, sha256 {other.stem[9:]}[0-9a-f]{{56}}; "
    assert re.search(made_from, result.stderr)
    checkpoint = published.with_suffix(".pth")
    said = ("is a PyTorch checkpoint", f"cpmix import-weights {checkpoint} --sha256 {name[9:17]}\n")
    refused(3, said, *wanted, "--init", checkpoint)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    said = "foreign.safetensors does not say what it was made from; the recipe has model.init"
    refused(3, said, *wanted, "--init", tmp_path / "foreign.safetensors")
    refused(3, f"{tmp_path} holds no phase of a run, and no model.safetensors", *wanted, "--init", tmp_path)
    assert must(*wanted, "--init", published, "--json").json["status"] == "dry run"
    assert must(*run, "--set", "model.init=", "--init", other, "--json").json["status"] == "dry run"
    random = must(*run, "--json")
    assert random.json["status"] == "dry run"
    said = "without --init, conv1, bn1, layer1, layer2, layer3 stay at random weights (model.frozen)"
    assert random.stderr.count(said) == 1
    assert "random weights" not in must(*wanted, "--init", published).stderr
    assert not (tmp_path / "run").exists()


def test_places_lt_names_torchvision_s_weights(photos: Path, tmp_path: Path) -> None:
    flags = ("--data", photos, "--recipe", "places-lt/cpmix", "--out", tmp_path / "r")
    name = "resnet152-394f9c45.pth"
    fetch = f"cpmix import-weights {name} --sha256 {PUBLISHED_WEIGHTS[name]}\n"
    said = (f"https://download.pytorch.org/models/{name}", fetch)
    refused(2, said, "train-stage1", *flags, *setting("crop=0", "augment=crop-flip", table="data"))


@pytest.mark.slow
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
    given = {f"backbone.{name.replace('head.', 'fc.')}": t for name, t in plain.state_dict().items()}
    load_backbone(experts, given, Path("w"), recipe, (64, 64, 3))
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        for features in experts.features(x).chunk(3, 1):
            torch.testing.assert_close(features, plain.features(x))
    assert all(torch.equal(head.weight, own) for head, own in zip(experts.heads, heads, strict=True))
    halved = recipe.model_copy(update={"expert_width": 0.5})
    narrow = build_model(halved, 5, (64, 64, 3), generator)
    with pytest.raises(InputError, match=r"(?s)experts\.0\.0\.bn1\.bias: .*fix: give --set model\.expert_width=1\.0"):
        load_backbone(narrow, given, Path("w"), halved, (64, 64, 3))
