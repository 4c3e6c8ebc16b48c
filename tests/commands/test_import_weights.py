"""Given weights: import-weights makes them safe, train-stage1 --init starts from them."""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
from helpers import cpmix, files, flip, must, refused, save, signalled, unchanged
from safetensors.torch import load_file, save_file
from torch import nn

from cpmix_cli.commands.train_stage1 import _read_weights
from cpmix_cli.models import build_model
from cpmix_cli.recipe.schema import Model
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.pretrained import load_backbone
from cpmix_cli.training.state import load_model


@pytest.fixture
def weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of a ResNet-8 for 10 classes, as the digits' recipes have it."""
    return build_model(Model(name="resnet8"), 10, (8, 8, 1), generator).state_dict()


def test_a_checkpoint_becomes_safetensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    content = {"module.a": shared, "module._orig_mod.b": shared.t(), "c": torch.tensor(3)}
    sha = save({"epoch": 7, "state_dict": content, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    result = must("import-weights", tmp_path / "w.pth", "--sha256", sha[:8].upper(), "--json")
    assert (result.json["num_tensors"], result.json["num_values"]) == (3, 13)
    assert f"to train from it, give train-stage1 --init {tmp_path / 'w.safetensors'}" in result.stderr
    tensors = load_file(tmp_path / "w.safetensors")
    assert sorted(tensors) == ["a", "b", "c"]
    assert torch.equal(tensors["b"], shared.t())
    before = (tmp_path / "w.safetensors").read_bytes()
    assert must("import-weights", tmp_path / "w.pth", "--sha256", sha, "--json").json["status"] == "up to date"
    other = save(content, tmp_path / "other.pth")
    command = ["import-weights", tmp_path / "other.pth", "--sha256", other, "--out", tmp_path / "w.safetensors"]
    refused(4, (), *command)
    assert (tmp_path / "w.safetensors").read_bytes() == before
    must(*command, "--overwrite")
    assert files(tmp_path) == ["other.pth", "w.pth", "w.safetensors"]


@pytest.mark.parametrize("damage", ["flipped", "foreign"])
def test_a_changed_output_is_not_up_to_date(tmp_path: Path, damage: str) -> None:
    sha = save({"a": torch.ones(4)}, tmp_path / "w.pth")
    command = ["import-weights", tmp_path / "w.pth", "--sha256", sha]
    must(*command)
    out = tmp_path / "w.safetensors"
    whole = flip(out)
    if damage == "foreign":
        out.write_bytes(b"notes")
    with unchanged(tmp_path):
        refused(4, f"{out} holds something else", *command)
    if damage == "foreign":
        with unchanged(tmp_path):
            refused(4, f"{out} holds something else", *command, "--overwrite")
        out.unlink()
    must(*command, "--overwrite")
    assert out.read_bytes() == whole


def test_the_checkpoint_itself_is_never_written_over(tmp_path: Path) -> None:
    sha = save({"a": torch.ones(4)}, tmp_path / "w.safetensors")
    refused(2, "is the checkpoint itself", "import-weights", tmp_path / "w.safetensors", "--sha256", sha, "--overwrite")
    assert hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest() == sha


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds no named tensors, but a list"),
        ({}, "holds no named tensors, but an empty dict"),
        ({"a": torch.zeros(2), "lr": 0.1}, "has entries that are no plain tensors: lr (float)"),
        ({"model": {"state_dict": {"a": torch.zeros(2)}}}, "no plain tensors: state_dict (dict)"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "a (complex)"),
        ({"a": torch.empty(2, device="meta")}, "a (without values)"),
        ({"a": torch.zeros(2), "module.a": torch.ones(2)}, "several entries for one name, once module. and"),
        ({"a": Path("x")}, "is no checkpoint of tensors alone, and nothing of it was run: it holds pathlib."),
    ],
)
def test_checkpoints_without_named_tensors_are_refused(content: object, message: str, tmp_path: Path) -> None:
    sha = save(content, tmp_path / "w.pth")
    refused(3, message, "import-weights", tmp_path / "w.pth", "--sha256", sha)


def test_unreadable_files_and_wrong_hashes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"no checkpoint")
    sha = hashlib.sha256(b"no checkpoint").hexdigest()
    refused(3, "", "import-weights", tmp_path / "w.pth", "--sha256", sha)
    refused(3, "", "import-weights", tmp_path / "none.pth", "--sha256", sha)
    said = f"has sha256 {sha}, not {'0' * 64}"
    refused(3, said, "import-weights", tmp_path / "w.pth", "--sha256", "0" * 64)
    for bad in ("abc", "x" * 64, sha + "0"):
        refused(2, "64 hexadecimal digits", "import-weights", tmp_path / "w.pth", "--sha256", bad)
    assert cpmix("import-weights", tmp_path / "w.pth").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoints_end_with_an_input_error(tmp_path: Path, zipped: bool, generator: torch.Generator) -> None:
    """Whatever a damaged file makes the unpickler raise, the user gets an error of 3 lines; cpmix() raises the rest."""
    path, codes = tmp_path / "w.pth", []
    torch.save({"a": torch.zeros(3, 3), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for at in torch.randint(len(whole), (100,), generator=generator).tolist():
        for damaged in (whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(damaged)
            sha = hashlib.sha256(damaged).hexdigest()
            codes.append(cpmix("import-weights", path, "--sha256", sha, "--overwrite").code)
    assert set(codes) <= {0, 3}
    assert codes[1::2] == [3] * 100


def test_weights_are_loaded_except_the_head(weights: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    model = build_model(Model(name="resnet8"), 4, (8, 8, 1), generator)
    head = model.head.weight.clone()
    given = {n: t for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    given |= {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}
    assert load_backbone(model, given, Path("w"), Model(name="resnet8"), (8, 8, 1)) == len(
        [n for n in given if not n.startswith(("head.", "fc."))]
    )
    assert torch.equal(model.head.weight, head)
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, weights[name])


def test_all_that_does_not_fit_is_listed(weights: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    model = build_model(Model(name="resnet8"), 10, (8, 8, 1), generator)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    del weights["bn1.weight"]
    weights["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    weights["bn1.bias"] = torch.full((16,), torch.nan)
    weights["bn1.running_mean"] = torch.full((16,), 1e300, dtype=torch.float64)
    weights["bn1.running_var"] = torch.ones(16, dtype=torch.int8)
    weights["layer9.weight"] = torch.zeros(2)
    with pytest.raises(InputError) as fault:
        load_backbone(model, weights, Path("w.safetensors"), Model(name="resnet8"), (8, 8, 1))
    assert str(fault.value).splitlines()[:7] == [
        "error: w.safetensors does not fit the network, 6 tensors:",
        "    bn1.bias: contains NaN or infinite values",
        "    bn1.running_mean: contains NaN or infinite values",
        "    bn1.running_var: has type int8, expected float32",
        "    bn1.weight: missing",
        "    conv1.weight: has shape (16, 3, 3, 3), expected (16, 1, 3, 3)",
        "    layer9.weight: not in the network",
    ]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_stage1_starts_from_pretrained_weights(digits: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
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
    refused(4, "init: ", *run)
    weights["bn1.bias"][0] = 1
    save_file(weights, tmp_path / "w.safetensors")
    assert cpmix(*run, "--init", tmp_path / "w.safetensors").code == 4


@pytest.mark.slow
def test_imported_weights_equal_the_run_and_can_be_trained_further(
    digits: Path, digits_run: Path, tmp_path: Path
) -> None:
    """The checkpoint gives the same weights; a run from them, stopped, goes on bit for bit."""
    model = digits_run / "stage2" / "model.safetensors"
    given = load_file(model)
    sha = save({"state_dict": {f"module.{n}": t for n, t in given.items()}}, tmp_path / "w.pth")
    must("import-weights", tmp_path / "w.pth", "--sha256", sha)
    imported = load_file(tmp_path / "w.safetensors")
    assert {n: t.tolist() for n, t in imported.items()} == {n: t.tolist() for n, t in given.items()}
    command = ["train-stage1", "--data", str(digits), "--epochs", "45", "--init", str(tmp_path / "w.safetensors")]
    must(*command, "--out", tmp_path / "whole")
    record = json.loads((tmp_path / "whole" / "stage1" / "run.json").read_text())
    assert record["made_from"]["init"] == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()

    command += ["--out", str(tmp_path / "stopped")]
    assert signalled(signal.SIGTERM, "epoch=2/", *command).code == 75
    refused(4, f"init: '{record['made_from']['init']}' -> ", *command, "--init", model)  # the last --init counts
    assert "goes on after epoch" in must(*command).stderr
    whole, stopped = (tmp_path / run / "stage1" / "model.safetensors" for run in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    must("train-stage2", "--from", tmp_path / "stopped", "--dry-run")


def test_a_run_without_init_stays_up_to_date_and_refuses_init(digits: Path, digits_run: Path) -> None:
    """What was made before the flag was there stays up to date, and is refused to given weights."""
    command = ["train-stage1", "--data", digits, "--out", digits_run, "--epochs", 6]
    assert "init" not in json.loads((digits_run / "stage1" / "run.json").read_text())["made_from"]
    assert must(*command, "--json").json["status"] == "up to date"
    refused(4, "init: (none) -> ", *command, "--init", digits_run / "stage2" / "model.safetensors")


def test_weights_that_change_while_they_are_read_are_refused(digits_run: Path) -> None:
    """What is trained from is what was hashed."""
    model = digits_run / "stage1" / "model.safetensors"
    sha = hashlib.sha256(model.read_bytes()).hexdigest()
    assert _read_weights(model, sha).keys() == load_file(model).keys()
    save_file({"a": torch.zeros(2)}, model)
    with pytest.raises(InputError, match="is damaged"):
        _read_weights(model, sha)


def test_init_is_checked_before_anything_is_written(digits: Path, digits_run: Path, tmp_path: Path) -> None:
    run = ["train-stage1", "--data", digits, "--out", tmp_path / "r", "--dry-run", "--init"]
    for name in ("w.pth", "W.PT"):
        (tmp_path / name).write_bytes(b"a checkpoint")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    for name, message in (
        ("none.safetensors", "cannot read"),
        ("w.pth", f"{tmp_path / 'w.pth'} is a PyTorch checkpoint"),
        ("W.PT", f"{tmp_path / 'W.PT'} is a PyTorch checkpoint"),
        ("bad.safetensors", "is not a valid safetensors file"),
    ):
        refused(3, message, *run, tmp_path / name)
    model = digits_run / "stage1" / "model.safetensors"
    assert "dry run" in must(*run, model).stdout
    command = (*run, model, "--recipe", "cifar100-lt/cpmix", "--set", "data.normalisation=dataset")
    refused(3, "does not fit the network", *command)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_networks_give_the_logits_of_torchvision(name: str, generator: torch.Generator) -> None:
    """With its weights under its names, the logits are torchvision's own."""
    from torchvision import models

    other = getattr(models, name)(num_classes=7).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    own = build_model(Model(name=name), 7, (64, 64, 3), generator).eval()
    renamed = {n.replace("fc.", "head."): t for n, t in other.state_dict().items()}
    load_model(own, renamed, Path("w"))
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(own(x), other(x))
        assert own.features(x).shape == (2, own.head.in_features)
    for shape in ((64, 64, 1), (32, 32, 3), (2,)):
        with pytest.raises(ValueError, match="takes RGB images of more than 32 x 32 pixels"):
            build_model(Model(name=name), 7, shape, generator)


def test_imagenet_networks_and_constants_refuse_grey_images(digits: Path, tmp_path: Path) -> None:
    flags = ["--set", "model.name=resnet18", "--set", "data.normalisation=imagenet"]
    command = ("train-stage1", "--data", digits, "--out", tmp_path / "r", "--dry-run", *flags)
    rgb = 'model.name = "resnet18": takes RGB images of more than 32 x 32 pixels'
    channels = 'data.normalisation = "imagenet": for 3 channels, the images have 1'
    refused(2, (rgb, "samples of shape (8, 8, 1)", channels), *command)
