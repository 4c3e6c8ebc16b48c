"""Given weights: import-weights makes them safe, train-stage1 --init starts from them."""

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import cpmix, files, must
from safetensors.torch import load_file, save_file
from torch import nn

from cpmix_cli.engine import load_model
from cpmix_cli.errors import InputError
from cpmix_cli.models import build_model, take_over


class Canary:
    """Unpickled by an unguarded reader, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def save(content: object, path: Path) -> str:
    """torch.save; the file's sha256."""
    torch.save(content, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of a ResNet-8 for 10 classes, as the digits' recipes have it."""
    return build_model("resnet8", 10, (8, 8, 1), generator).state_dict()


# -- import-weights ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_becomes_safetensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    content = {"module.a": shared, "module._orig_mod.b": shared.t(), "c": torch.tensor(3)}
    sha = save({"epoch": 7, "state_dict": content, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    result = must("import-weights", tmp_path / "w.pth", "--sha256", sha[:8].upper(), "--json")
    assert (result.json["num_tensors"], result.json["num_values"]) == (3, 13)
    assert f"next: cpmix train-stage1 --data DATA --out ckpt --init {tmp_path / 'w.safetensors'}" in result.stderr
    tensors = load_file(tmp_path / "w.safetensors")
    assert sorted(tensors) == ["a", "b", "c"]
    assert torch.equal(tensors["b"], shared.t())
    before = (tmp_path / "w.safetensors").read_bytes()
    assert must("import-weights", tmp_path / "w.pth", "--sha256", sha, "--json").json["status"] == "up to date"
    other = save(content, tmp_path / "other.pth")
    command = ["import-weights", tmp_path / "other.pth", "--sha256", other, "--out", tmp_path / "w.safetensors"]
    assert cpmix(*command).code == 4
    assert (tmp_path / "w.safetensors").read_bytes() == before
    must(*command, "--overwrite")
    assert files(tmp_path) == ["other.pth", "w.pth", "w.safetensors"]


def test_a_checkpoint_that_holds_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    sha = save({"a": torch.zeros(2), "b": Canary(tmp_path / "alive")}, tmp_path / "w.pth")
    result = cpmix("import-weights", tmp_path / "w.pth", "--sha256", sha)
    assert result.code == 3
    assert "is no checkpoint of tensors alone, and nothing of it was run" in result.stderr
    result = cpmix("import-weights", tmp_path / "w.pth", "--sha256", "0" * 64)
    assert result.code == 3
    assert f"has sha256 {sha}, not {'0' * 64}" in result.stderr
    assert files(tmp_path) == ["w.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list, not named tensors"),
        ({}, "holds a dict, not named tensors"),
        ({"a": torch.zeros(2), "lr": 0.1}, "has entries that are no tensors: lr"),
    ],
)
def test_checkpoints_of_other_things(content: object, message: str, tmp_path: Path) -> None:
    sha = save(content, tmp_path / "w.pth")
    result = cpmix("import-weights", tmp_path / "w.pth", "--sha256", sha)
    assert result.code == 3
    assert message in result.stderr


def test_files_and_hashes_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"no checkpoint")
    sha = hashlib.sha256(b"no checkpoint").hexdigest()
    assert cpmix("import-weights", tmp_path / "w.pth", "--sha256", sha).code == 3
    assert cpmix("import-weights", tmp_path / "none.pth", "--sha256", sha).code == 3
    for bad in ("abc", "x" * 64, sha + "0"):
        result = cpmix("import-weights", tmp_path / "w.pth", "--sha256", bad)
        assert result.code == 2
        assert "64 hexadecimal digits" in result.stderr
    assert cpmix("import-weights", tmp_path / "w.pth").code == 2


# -- --init ------------------------------------------------------------------------------------------------------------


def test_all_but_the_head_is_taken_over(weights: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    model = build_model("resnet8", 4, (8, 8, 1), generator)
    head = model.head.weight.clone()
    given = {n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    given |= {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}
    assert take_over(model, given, Path("w")) == len([n for n in given if not n.startswith(("head.", "fc."))])
    assert torch.equal(model.head.weight, head)
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, weights[name])


def test_all_that_does_not_fit_is_listed(weights: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    model = build_model("resnet8", 10, (8, 8, 1), generator)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    del weights["bn1.weight"]
    weights["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    weights["bn1.bias"] = torch.full((16,), torch.nan)
    weights["layer9.weight"] = torch.zeros(2)
    with pytest.raises(InputError) as fault:
        take_over(model, weights, Path("w.safetensors"))
    assert str(fault.value).splitlines()[:5] == [
        "error: w.safetensors does not fit the network, 4 tensors:",
        "    bn1.bias: holds values that are not finite",
        "    bn1.weight: missing",
        "    conv1.weight: has shape (16, 3, 3, 3), expected (16, 1, 3, 3)",
        "    layer9.weight: not in the network",
    ]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_stage1_starts_from_given_weights(digits: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """At a rate of almost nothing the trained weights are those of the file."""
    save_file(weights, tmp_path / "w.safetensors")
    run = ["train-stage1", "--data", digits, "--recipe", "digits/cross-entropy", "--epochs", 1, "--out", tmp_path / "r"]
    run += ["--set", "optimizer.lr=1e-12", "--set", "optimizer.weight_decay=0"]
    result = must(*run, "--init", tmp_path / "w.safetensors")
    assert f"tensors of {tmp_path / 'w.safetensors'}; the head is new" in result.stderr
    trained = load_file(tmp_path / "r" / "stage1" / "model.safetensors")
    for name in ("conv1.weight", "blocks.2.conv2.weight", "bn1.bias"):
        torch.testing.assert_close(trained[name], weights[name], atol=1e-8, rtol=0)
    assert not torch.allclose(trained["head.weight"], weights["head.weight"], atol=1e-3)
    assert must(*run, "--init", tmp_path / "w.safetensors", "--json").json["status"] == "up to date"
    refused = cpmix(*run)
    assert refused.code == 4
    assert "init: " in refused.stderr
    weights["bn1.bias"][0] = 1
    save_file(weights, tmp_path / "w.safetensors")
    assert cpmix(*run, "--init", tmp_path / "w.safetensors").code == 4


def test_init_is_checked_before_anything_is_written(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    run = ["train-stage1", "--data", digits, "--out", tmp_path / "r", "--dry-run", "--init"]
    (tmp_path / "w.pth").write_bytes(b"a checkpoint")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    for name, message in (
        ("none.safetensors", "cannot read"),
        ("w.pth", f"cpmix import-weights {tmp_path / 'w.pth'} --sha256 HASH"),
        ("bad.safetensors", "is not a valid safetensors file"),
    ):
        result = cpmix(*run, tmp_path / name)
        assert result.code == 3
        assert message in result.stderr
    model = digits_run / "stage1" / "model.safetensors"
    assert "dry run" in must(*run, model).stdout
    result = cpmix(*run, model, "--recipe", "cifar100-lt/cpmix", "--set", "data.normalisation=dataset")
    assert result.code == 3
    assert "does not fit the network" in result.stderr
    assert not (tmp_path / "r").exists()


# -- torchvision's networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_s_networks(name: str, generator: torch.Generator) -> None:
    """With its weights under its names, the logits are torchvision's own."""
    from torchvision import models

    other = getattr(models, name)(num_classes=7).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    own = build_model(name, 7, (64, 64, 3), generator).eval()
    renamed = {n.replace("fc.", "head."): t for n, t in other.state_dict().items()}
    load_model(own, renamed, Path("w"))
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(own(x), other(x))
        assert own.features(x).shape == (2, own.head.in_features)
    for shape in ((64, 64, 1), (32, 32, 3), (2,)):
        with pytest.raises(ValueError, match="takes RGB images of more than 32 x 32 pixels"):
            build_model(name, 7, shape, generator)
