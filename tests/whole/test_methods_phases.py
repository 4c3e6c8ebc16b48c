"""What methods add to the phases, run for real on digits: heads, finetunes, post-hoc methods, sources of confusion."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import contents, cpmix, must, refused, setting

from cpmix_cli.artifacts import tensors
from cpmix_cli.models import build_model
from cpmix_cli.recipe.schema import Model

SMOOTHING = ("loss=label-aware-smoothing", "smooth_head=0.3", "smooth_tail=0.1")


def weights(run: Path, phase: str) -> dict[str, torch.Tensor]:
    return tensors.read_tensors(run / phase / "model.safetensors")[0]


def logits_of(evaluation: dict[str, Any]) -> torch.Tensor:
    return tensors.read_tensors(Path(evaluation["folder"]) / "logits.safetensors")[0]["logits"]


def test_a_mislas_finetune_learns_scales_and_moves_statistics(digits_run: Path, tmp_path: Path) -> None:
    """Scales are learnt beside the classifier, at another rate; the rest of the network moves its statistics alone."""
    flags = setting("head=scale", "batchnorm=shift", 'groups=[{prefix="head.scale", lr_factor=5.0}]', table="finetune")
    flags += setting(*SMOOTHING, table="finetune.terms.erm")
    out = tmp_path / "mislas"
    must("finetune", "--from", digits_run, "--out", out, *flags)
    before, after = weights(digits_run, "stage2"), weights(out, "finetune")
    assert after.keys() - before.keys() == {"head.scale"}
    assert after["head.scale"].shape == (10,)
    assert 0 < (after["head.scale"] - 1).abs().max() < 1
    moved = {name for name in before if not before[name].equal(after[name])}
    kinds = {name.rsplit(".", 1)[1] for name in moved - {"head.weight", "head.bias"}}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}
    assert must("evaluate", "--from", out, "--json").json["phase"] == "finetune"


def test_lws_finetune_learns_only_scales(digits_run: Path, tmp_path: Path) -> None:
    flags = setting("head=scale", 'train=["head.scale"]', table="finetune")
    must("finetune", "--from", digits_run, "--out", tmp_path, *flags)
    before, after = weights(digits_run, "stage2"), weights(tmp_path, "finetune")
    assert {n for n in after if n not in before or not before[n].equal(after[n])} == {"head.scale"}
    plain = must("evaluate", "--from", digits_run, "--phase", "stage2", "--json").json
    scaled = must("evaluate", "--from", tmp_path, "--json").json
    assert scaled["phase"] == "finetune"
    logits = [logits_of(found) for found in (plain, scaled)]
    torch.testing.assert_close(logits[1], logits[0] * after["head.scale"])


def test_logit_adjustment_after_training_shifts_the_logits(digits_run: Path) -> None:
    plain = must("evaluate", "--from", digits_run, "--json").json
    flags = ("--set", "evaluation.logit_adjustment=1.5")
    adjusted = must("evaluate", "--from", digits_run, *flags, "--json").json
    assert Path(adjusted["folder"]) == digits_run / "evaluation" / "finetune-logit-adjustment-1.5"
    assert (plain["logit_adjustment"], adjusted["logit_adjustment"]) == (0.0, 1.5)
    logits = [logits_of(found) for found in (plain, adjusted)]
    counts = torch.tensor([124, 88, 63, 45, 32, 23, 16, 12, 8, 6.0])
    torch.testing.assert_close(logits[1], logits[0] - 1.5 * (counts / 417).log())
    assert must("evaluate", "--from", digits_run, *flags, "--json").json["status"] == "up to date"
    labelled = must("evaluate", "--from", digits_run, *flags, "--label", "la", "--json").json
    assert Path(labelled["folder"]).name == "finetune-la"


def test_tau_norm_after_training_scales_the_logits_without_bias(digits_run: Path) -> None:
    plain = must("evaluate", "--from", digits_run, "--phase", "stage2", "--json").json
    flags = ("--phase", "stage2", "--set", "evaluation.tau_norm=0.5", "--json")
    normed = must("evaluate", "--from", digits_run, *flags).json
    assert Path(normed["folder"]).name == "stage2-tau-norm-0.5"
    head = weights(digits_run, "stage2")
    logits = [logits_of(found) for found in (plain, normed)]
    norms = head["head.weight"].norm(dim=1)
    expected = (logits[0] - head["head.bias"]) / norms.sqrt()
    torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-4)


def test_tau_is_chosen_on_held_out_images(digits: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    must("build-lt", "digits", "--val-per-class", 3, "--out", data)
    must("train-stage1", "--data", data, "--out", run, "--recipe", "digits/cross-entropy", "--epochs", 4)
    command = ("evaluate", "--from", run, "--split", "val")
    found = must(*command, "--set", "evaluation.tau_norm=1", "--json").json
    assert Path(found["folder"]) == run / "evaluation" / "stage1-val-tau-norm-1"
    assert found["num_test"] == 30
    labels = tensors.read_tensors(data / "val.safetensors")[0]["labels"]
    assert tensors.read_tensors(Path(found["folder"]) / "logits.safetensors")[0]["labels"].equal(labels)
    plain = must(*command, "--json").json
    assert (Path(plain["folder"]).name, plain["status"]) == ("stage1-val", "done")
    assert must(*command, "--json").json["status"] == "up to date"
    train = must("evaluate", "--from", run, "--split", "train", "--json").json
    num_train = len(tensors.read_tensors(data / "train.safetensors")[0]["labels"])
    assert (Path(train["folder"]).name, train["num_test"]) == ("stage1-train", num_train)
    wrong = must("misclassified", "--from", run, "--label", "val", "--json").json
    assert wrong["num_images"] == round(30 * (1 - plain["top1"] / 100))
    assert "next: cpmix misclassified" in must(*command, "--overwrite").stderr

    refused(2, "fix: give --split val, or one of test, train", "evaluate", "--from", run, "--split", "vall")
    assert cpmix(*command, "--test-data", digits).code == 2
    other = ("--out", tmp_path / "other", "--recipe", "digits/cross-entropy", "--epochs", 1)
    must("train-stage1", "--data", digits, *other)
    said = ("has no val split", "  needed by: --split val\n", "--val-per-class")
    refused(3, said, "evaluate", "--from", tmp_path / "other", "--split", "val")


def test_ldam_needs_its_cosine_head(digits: Path, tmp_path: Path) -> None:
    command = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--recipe", "digits/cross-entropy")
    ldam = setting("loss=ldam", "scale=30", table="stage1.terms.erm")
    for settings, message in (
        ((), 'needs model.head = "cosine", not "linear"'),
        (("head=cosine", "head_scale=20"), "needs stage1.terms.erm.scale = model.head_scale (20.0)"),
    ):
        said = f'stage1.terms.erm.loss = "ldam" {message}'
        refused(2, said, *command, *ldam, *setting(*settings, table="model"))
    assert not (tmp_path / "run").exists()


def test_prefixes_of_all_phases_are_checked_before_the_first(digits: Path, tmp_path: Path) -> None:
    command = ("train-stage1", "--data", digits, "--out", tmp_path / "run", "--recipe", "digits/cross-entropy")
    groups = setting('optimizer.groups=[{prefix="haed"}]')
    groups += setting('train=["head.scale"]', 'groups=[{prefix="fc"}]', table="finetune")
    said = 'optimizer.groups: no parameter of the network starts with "haed"'
    refused(2, (said, "finetune.train", "finetune.groups"), *command, *groups)
    must(*command, "--dry-run", *setting("head=scale", 'train=["head.scale"]', table="finetune"))
    cosine = (*setting("head=cosine", table="model"), *setting('train=["head.bias"]', table="finetune"))
    assert cpmix(*command, *cosine).code == 2
    assert not (tmp_path / "run").exists()


def test_class_weights_without_effect_are_reported(digits: Path, tmp_path: Path) -> None:
    flags = setting("reweight=effective-number", "beta=0.1", table="stage1.terms.erm")
    command = ("train-stage1", "--data", digits, "--out", tmp_path, "--recipe", "digits/cross-entropy", "--dry-run")
    assert "the class weights of term erm are all nearly alike: 1 times at most" in must(*command, *flags).stderr
    assert "nearly alike" not in must(*command, *flags, "--set", "stage1.terms.erm.beta=0.99").stderr


def test_class_uniform_draws_under_balanced_softmax_are_warned_of(digits: Path, tmp_path: Path) -> None:
    command = ("train-stage1", "--data", digits, "--out", tmp_path, "--recipe", "digits/balanced-softmax", "--dry-run")
    uniform, warning = setting("stage1.terms.erm.draw=class-uniform"), "which favours rare classes twice"
    assert (
        f"warning: term erm has both class-uniform draws and Balanced Softmax, {warning}: "
        "--set stage1.terms.erm.loss=cross-entropy\n"
    ) in must(*command, *uniform).stderr
    for other in ((), [*uniform, *setting("stage1.terms.erm.loss=cross-entropy")]):
        assert warning not in must(*command, *other).stderr


def test_a_recipe_may_set_a_post_hoc_method(digits: Path, tmp_path: Path) -> None:
    """Then it is the phase's plain evaluation, and predict uses it too."""
    recipe = ("--recipe", "digits/cross-entropy", "--set", "evaluation.logit_adjustment=1", "--epochs", 2)
    must("train-stage1", "--data", digits, "--out", tmp_path, *recipe)
    found = must("evaluate", "--from", tmp_path, "--json").json
    assert Path(found["folder"]) == tmp_path / "evaluation" / "stage1"
    assert found["logit_adjustment"] == 1.0


def test_ldam_trains_a_cosine_head(digits: Path, tmp_path: Path) -> None:
    drw = ("reweight=effective-number", "beta=0.999", "reweight_after=2")
    flags = setting("loss=ldam", "scale=30", *drw, table="stage1.terms.erm")
    flags += ["--set", "model.head=cosine", "--recipe", "digits/cross-entropy", "--epochs", "4"]
    must("train-stage1", "--data", digits, "--out", tmp_path, *flags)
    must("finetune", "--from", tmp_path)
    found = must("evaluate", "--from", tmp_path, "--json").json
    assert logits_of(found).abs().max() <= 30.001
    assert {name for name in weights(tmp_path, "finetune") if name.startswith("head")} == {"head.weight"}
    assert found["top1"] > 40


OTMIX = ["partner=frequency-power", "power=0", "match=transport", "ratio=beta", "alpha=4", "mix=box", "label=lambda"]
OTMIX += ["probability=0.5", "loss=balanced-softmax"]


@pytest.mark.parametrize(("table", "settings"), [("stage1.terms.erm", OTMIX), ("model", ["experts=2"])])
def test_the_same_command_gives_the_same_bytes(digits: Path, tmp_path: Path, table: str, settings: list[str]) -> None:
    flags = ("--data", digits, "--recipe", "digits/cross-entropy", "--epochs", 3, *setting(*settings, table=table))
    for run in "ab":
        must("train-stage1", *flags, "--out", tmp_path / run)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_match_counts_all_images_of_unmixed_batches(digits: Path, tmp_path: Path) -> None:
    """Of three epochs two are unmixed: each image is counted twice, right or wrong."""
    settings = [*(s for s in OTMIX if not s.startswith("probability")), "unmixed_first=40"]  # of 60, rescaled to 2 of 3
    flags = ("--data", digits, "--recipe", "digits/cross-entropy", "--epochs", 3)
    must("train-stage1", *flags, *setting(*settings, table="stage1.terms.erm"), "--out", tmp_path / "run")
    found, _ = tensors.read_tensors(tmp_path / "run" / "stage1" / "training_state.safetensors")
    counts = pd.read_parquet(tmp_path / "run" / "stage1" / "class_counts.parquet")["num_train"]
    assert found["counted_images"].tolist() == (2 * counts).tolist()
    assert 0 < found["confusion"].sum() < found["counted_images"].sum()


@pytest.mark.parametrize("bias", ["drawn", "rare"])
def test_the_head_starts_from_the_bias_of_the_recipe(bias: str, generator: torch.Generator) -> None:
    model = build_model(Model.model_validate({"name": "resnet8", "head_bias": bias}), 10, (8, 8, 1), generator)
    rare = torch.full((10,), -2.1972246)  # -log 9
    assert torch.allclose(model.state_dict()["head.bias"], rare) == (bias == "rare")


def test_a_cosine_head_gives_cosines(generator: torch.Generator) -> None:
    """As LDAM's: no bias, class vectors of length 1 at first; 469,904 parameters for ResNet-32 at 100 classes."""
    model = build_model(Model(head="cosine"), 100, (32, 32, 3), generator)
    assert sum(p.numel() for p in model.parameters()) == 469_904
    vectors = model.head.weight.detach()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(100))
    features = torch.randn(3, 64, generator=generator)
    angles = torch.nn.functional.cosine_similarity(features[:, None], vectors[None], dim=2)
    torch.testing.assert_close(model.head(features), 30 * angles)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head(features).dtype == torch.float32
