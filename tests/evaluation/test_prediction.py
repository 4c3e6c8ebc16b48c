"""Mirrored test images: the mean over an image and its mirror image, and how such evaluations are told apart."""

import csv
from pathlib import Path

import pytest
import torch
from helpers import must, refused, setting
from PIL import Image

from cpmix_cli.artifacts.tensors import read_tensors
from cpmix_cli.data.batches import make_batches
from cpmix_cli.data.dataset import open_dataset
from cpmix_cli.evaluation.prediction import predict, predicted, read_model
from cpmix_cli.models import Classifier, build_model, change_head
from cpmix_cli.recipe.loading import load
from cpmix_cli.recipe.schema import Evaluation
from cpmix_cli.runs.folders import PhaseFolder

MIRROR = setting("evaluation.mirror=true")


@pytest.fixture
def network(digits: Path, digits_run: Path) -> Classifier:
    source = PhaseFolder(digits_run, "stage1")
    return read_model(source, source.recipe(), 10, open_dataset(digits).shape)


def logits(network: Classifier, digits: Path, digits_run: Path, images: torch.Tensor, *, mirror: bool) -> torch.Tensor:
    recipe, dataset = PhaseFolder(digits_run, "stage1").recipe(), open_dataset(digits)
    batches = make_batches(images, recipe.data, dataset.record)
    return predict(network, batches, len(images), 50, mirror=mirror)


def test_mirrored_logits_are_the_mean_over_an_image_and_its_mirror_image(
    network: Classifier, digits: Path, digits_run: Path
) -> None:
    images = open_dataset(digits).read("test")[0][:120]  # [N, H, W, channels]
    flipped = images.flip(2)
    plain, other = (logits(network, digits, digits_run, x, mirror=False) for x in (images, flipped))
    both = logits(network, digits, digits_run, images, mirror=True)
    assert both.equal((plain + other) / 2)
    assert not both.equal(plain)
    assert logits(network, digits, digits_run, flipped, mirror=True).equal(both)


def test_a_symmetrical_image_has_its_plain_logits(network: Classifier, digits: Path, digits_run: Path) -> None:
    images = open_dataset(digits).read("test")[0][:60]
    symmetrical = torch.maximum(images, images.flip(2))
    plain, both = (logits(network, digits, digits_run, symmetrical, mirror=m) for m in (False, True))
    assert both.equal(plain)


def test_routes_of_several_experts_are_chosen_by_both_images(digits: Path, generator: torch.Generator) -> None:
    recipe, dataset = load("cifar100-lt/ride-routed", settings=["model.name=resnet8"]), open_dataset(digits)
    assert recipe.finetune is not None
    model = build_model(recipe.model, 10, dataset.shape, generator)
    change_head(model, recipe.finetune, 10, generator)
    data = recipe.data.model_copy(update={"normalisation": "dataset"})
    evaluation, counts = recipe.evaluation.model_copy(update={"mirror": True}), torch.tensor(dataset.class_counts)
    images = dataset.read("test")[0][:100]
    one, other = (
        predicted(model, make_batches(x, data, dataset.record), len(x), counts, evaluation)
        for x in (images, images.flip(2))
    )
    assert one.weights is not None
    assert other.weights is not None
    assert one.weights.equal(other.weights)
    assert one.logits.equal(other.logits)


def test_mirrored_evaluations_are_reported_apart(digits_run: Path, tmp_path: Path) -> None:
    plain = must("evaluate", "--from", digits_run, "--phase", "stage2", "--json").json
    assert "mirror" not in plain
    found = must("evaluate", "--from", digits_run, "--phase", "stage2", *MIRROR)
    said = "evaluate: logits are the mean over each image and its mirror image; report them as such\n"
    assert said in found.stderr
    folder = digits_run / "evaluation" / "stage2-mirror"
    assert f"done: {folder}\n" in found.stdout
    mirrored = must("evaluate", "--from", digits_run, "--phase", "stage2", *MIRROR, "--json").json
    assert (mirrored["mirror"], mirrored["status"]) == (True, "up to date")
    assert not read_tensors(folder / "logits.safetensors")[0]["logits"].equal(
        read_tensors(digits_run / "evaluation" / "stage2" / "logits.safetensors")[0]["logits"]
    )
    file = tmp_path / "results.csv"
    shown = must("compare", digits_run / "stage2", "--append", file).stdout
    assert "before, mirror" in shown
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert sorted((row["label"], row["paper"]) for row in rows) == [("", ""), ("mirror", "")]


def test_a_recipe_with_mirrored_images_is_told_apart_too_and_predict_follows_it(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    must("train-stage1", "--data", digits, "--recipe", "digits/cross-entropy", "--epochs", 1, "--out", run, *MIRROR)
    must("evaluate", "--from", run)
    assert must("evaluate", "--from", run, *setting("evaluation.mirror=false")).stdout.endswith("stage1-mirror-false\n")
    file = tmp_path / "results.csv"
    must("compare", run, "--append", file)
    assert {row["label"] for row in csv.DictReader(file.read_text().splitlines())} == {"mirror", "mirror-false"}
    image = Image.effect_noise((8, 8), 90)
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")
    found = must("predict", tmp_path / "a.png", tmp_path / "b.png", "--from", run, "--top", 10, "--json").json
    a, b = (one["classes"] for one in found["predictions"])
    assert a == b


def test_points_have_no_mirror_image(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    refused(
        2,
        (
            "evaluation.mirror = true: for images, the data set has points",
            "correct or drop --set evaluation.mirror=true",
        ),
        *("train-stage1", "--data", toy, "--out", tmp_path / "new", *MIRROR),
    )
    said = ("holds points, which have no mirror image", "drop --set evaluation.mirror")
    refused(2, said, "evaluate", "--from", toy_run, *MIRROR)


def test_the_key_is_not_in_a_resolved_recipe_unless_it_is_given() -> None:
    assert "mirror" not in Evaluation().model_dump()
    assert Evaluation(mirror=True).model_dump()["mirror"] is True
