"""train-stage1 --init RUN: a data set with other classes starts from a run and keeps what its head knows."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers import must, refused, write_photos
from safetensors.torch import load_file, save_file

from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.recipe.loading import load

FAST = ("--recipe", "digits/cpmix", "--set", "model.name=resnet8", "--set", "optimizer.weight_decay=0", "--epochs", 2)
STILL = ("--set", "optimizer.lr=1e-12")
"""A rate of almost nothing: the trained rows are those that it started from."""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos of three colours."""
    folder = tmp_path_factory.mktemp("earlier")
    return trained(folder, ["red", "green", "yellow"], *FAST)


def trained(folder: Path, colours: list[str], *flags: object) -> Path:
    build(folder, colours)
    must("train-stage1", "--data", folder / "data", "--out", folder / "run", *flags)
    return folder / "run"


def build(folder: Path, colours: list[str]) -> None:
    write_photos(folder / "photos", dict.fromkeys(colours, 8))
    must("build-lt", "image-folder", "--data-root", folder / "photos", "--image-size", 8, "--out", folder / "data")


def rows(run: Path, name: str = "head.weight") -> torch.Tensor:
    return load_file(run / "stage1" / "model.safetensors")[name]


def test_a_data_set_with_one_more_class_keeps_the_rows_of_the_others(earlier: Path, tmp_path: Path) -> None:
    build(tmp_path, ["red", "blue", "green", "yellow"])
    train = ("train-stage1", "--data", tmp_path / "data", *FAST, *STILL, "--init", earlier, "--out")
    said = must(*train, tmp_path / "kept").stderr
    path = earlier / "stage1"
    assert (
        f"starts from 42 tensors of {path}/model.safetensors; the head keeps 3 of 3 classes of {path}; blue is new\n"
        in said
    )
    assert open_dataset(tmp_path / "data").class_names == ["blue", "green", "red", "yellow"]
    said = must(*train, tmp_path / "new", "--set", "model.init_head=new").stderr
    assert f"starts from 42 tensors of {path}/model.safetensors; the head is new\n" in said
    for name in ("head.weight", "head.bias"):
        kept, new, old = rows(tmp_path / "kept", name), rows(tmp_path / "new", name), rows(earlier, name)
        torch.testing.assert_close(kept[[1, 2, 3]], old, atol=1e-8, rtol=0)
        torch.testing.assert_close(kept[0], new[0], atol=1e-8, rtol=0)
        assert not torch.allclose(new[1:], old, atol=1e-3)


def test_classes_that_are_gone_are_not_among_the_kept(earlier: Path, tmp_path: Path) -> None:
    build(tmp_path, ["yellow", "blue", "purple"])
    train = ("train-stage1", "--data", tmp_path / "data", *FAST, "--out", tmp_path / "run", "--dry-run", "--init")
    path = earlier / "stage1"
    said = f"the head keeps 1 of 3 classes of {path}; blue, purple are new\n"
    assert said in must(*train, earlier).stderr
    assert said in must(*train, path / "model.safetensors").stderr


def test_the_head_is_new_without_a_class_or_a_head_in_common(earlier: Path, tmp_path: Path) -> None:
    build(tmp_path, ["blue", "purple"])
    shutil.copy(earlier / "stage1" / "model.safetensors", tmp_path / "copy.safetensors")
    train = ("train-stage1", "--data", tmp_path / "data", *FAST, "--out", tmp_path / "run", "--dry-run", "--init")
    path = earlier / "stage1"
    assert f"the head is new, as that of {path} knows none of these classes\n" in must(*train, earlier).stderr
    assert "copy.safetensors; the head is new\n" in must(*train, tmp_path / "copy.safetensors").stderr
    cosine = must(*train, earlier, "--set", "model.head=cosine").stderr
    assert f"the head is new, as that of {path} is of another kind\n" in cosine


def test_init_head_without_init_is_refused(earlier: Path, tmp_path: Path) -> None:
    train = ("train-stage1", "--data", earlier.parent / "data", *FAST, "--out", tmp_path / "run")
    refused(2, 'model.init_head = "new": without --init the head is new', *train, "--set", "model.init_head=new")


def test_weights_decide_the_default_recipe_of_an_image_folder_and_its_network(earlier: Path, tmp_path: Path) -> None:
    build(tmp_path, ["blue", "purple"])
    weights, path = tmp_path / "weights.safetensors", earlier / "stage1"
    shutil.copy(path / "model.safetensors", weights)
    train = ("train-stage1", "--data", tmp_path / "data", "--out", tmp_path / "run", "--dry-run")
    chosen = "the recipe is image-folder/pretrained, as --init is given, with model.name=resnet8"
    keys = "data.crop=0 data.augment=crop-flip data.padding=1"
    assert f"{chosen} {keys}: the weights are those of a resnet8\n" in must(*train, "--init", weights).stderr
    keys_of_run = "data.augment=crop data.padding=1 data.crop=0 data.normalisation=dataset"
    of_run = f"{chosen} {keys_of_run}: the weights are those of {path}, of other classes\n"
    assert of_run in must(*train, "--init", earlier).stderr
    own = f"{chosen.partition(', with')[0]}, with {keys}: the weights are those of a resnet8\n"
    assert own in must(*train, "--init", weights, "--set", "model.name=resnet8").stderr
    other = ("--recipe", "image-folder/cross-entropy", "--set", "model.name=resnet8")
    assert "the recipe is" not in must(*train, "--init", weights, *other).stderr
    build(tmp_path / "more", ["blue", "green"])  # the run knows green: its head goes on, under the recipe as without
    train = ("train-stage1", "--data", tmp_path / "more" / "data", "--out", tmp_path / "run", "--dry-run")
    said = must(*train, "--init", earlier, "--set", "model.name=resnet8").stderr
    assert f"the head keeps 1 of 3 classes of {path}; blue is new\n" in said
    assert "the recipe is" not in said


def test_the_recipe_that_weights_decided_is_that_of_all_phases(earlier: Path, tmp_path: Path) -> None:
    build(tmp_path, ["blue", "purple"])
    weights = tmp_path / "weights.safetensors"
    shutil.copy(earlier / "stage1" / "model.safetensors", weights)
    run = tmp_path / "run"
    train = ("train-stage1", "--data", tmp_path / "data", "--epochs", 2, "--out", run, "--init", weights)
    must(*train)
    assert must(*train, "--json").json["status"] == "up to date"
    must("train-stage2", "--from", run)
    record = json.loads((run / "stage2" / "run.json").read_text())
    assert record["recipe_name"] == "image-folder/pretrained"
    assert record["settings"] == ["model.name=resnet8", "data.crop=0", "data.augment=crop-flip", "data.padding=1"]
    recipe = load(str(run / "stage2" / "recipe.toml"))
    assert (recipe.stage1.train, recipe.model.init_head, recipe.model.head_scale) == (["head"], "class-means", 25)
    assert recipe.finetune is None
    assert must("finetune", "--from", run, "--json").json["status"] == "skipped"


@pytest.mark.slow
def test_files_of_libraries_are_known_by_their_names_and_get_their_normalisation(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", dict.fromkeys(["blue", "purple"], 8))
    must("build-lt", "image-folder", "--data-root", tmp_path / "photos", "--out", tmp_path / "data")  # 64 x 64
    train = ("train-stage1", "--data", tmp_path / "data", "--out", tmp_path / "run", "--dry-run", "--init")
    chosen = "the recipe is image-folder/pretrained, as --init is given, with"
    made = {
        "mobilenet_v3_small-047dcff4": torchvision.models.mobilenet_v3_small(weights=None),
        "test_vit.r160_in1k": timm.create_model("test_vit"),
        "model": timm.create_model("test_vit"),
    }
    for stem, network in made.items():
        save_file({n: t.contiguous() for n, t in network.state_dict().items()}, tmp_path / f"{stem}.safetensors")
    said = must(*train, tmp_path / "mobilenet_v3_small-047dcff4.safetensors").stderr
    name = "torchvision/mobilenet_v3_small"
    assert (
        f"{chosen} model.name={name} data.crop=64 data.normalisation=network: the weights are those of a {name}\n"
        in said
    )
    said = must(*train, tmp_path / "test_vit.r160_in1k.safetensors").stderr
    assert f"{chosen} model.name=timm/test_vit.r160_in1k data.crop=64 data.normalisation=network: " in said
    said = must(*train, tmp_path / "model.safetensors", "--set", "model.name=timm/test_vit").stderr
    assert f"{chosen} data.crop=64 data.normalisation=network: the weights are those of a timm/test_vit\n" in said
    unknown = refused(3, "does not fit the network", *train, tmp_path / "model.safetensors")
    assert f"{chosen} data.crop=64: the weights are pretrained\n" in unknown.stderr
