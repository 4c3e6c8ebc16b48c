"""Given weights: import-weights makes them safe, train-stage1 --init starts from them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    Result,
    cpmix,
    files,
    fix_of,
    flip,
    follow_fix,
    must,
    process,
    refused,
    run_commands,
    save,
    signalled,
    unchanged,
)
from safetensors.torch import load_file, save_file
from torch import nn

from cpmix_cli.artifacts.files import PHASES, sha256
from cpmix_cli.commands.train_stage1 import _read_weights
from cpmix_cli.models import build_model
from cpmix_cli.recipe.schema import Model
from cpmix_cli.runtime import console
from cpmix_cli.runtime.errors import InputError
from cpmix_cli.training.state import load_model


@pytest.fixture
def weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of a ResNet-8 for 10 classes, as the digits' recipes have it."""
    return build_model(Model(name="resnet8"), 10, (8, 8, 1), generator).state_dict()


def test_a_checkpoint_becomes_safetensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    content = {"module.a": shared, "b": shared.t(), "c": torch.tensor(3)}
    sha = save({"epoch": 7, "state_dict": content, "optimizer": {"lr": 0.1}}, tmp_path / "w.pth")
    result = must("import-weights", tmp_path / "w.pth", "--sha256", sha[:8].upper(), "--json")
    assert (result.json["num_tensors"], result.json["num_values"]) == (3, 13)
    assert f"to train from it, give train-stage1 --init {tmp_path / 'w.safetensors'}" in result.stderr
    tensors = load_file(tmp_path / "w.safetensors")
    assert sorted(tensors) == ["b", "c", "module.a"]
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
        ([{"a": torch.zeros(2)}], "holds no named tensors, but a list"),
        ({"a": Path("x"), "lr": 0.1}, "holds no named tensors, but a dict"),
        ({"optimizer": {"exp_avg": torch.zeros(2)}}, "holds no named tensors, but a dict"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "has tensors that are not plain: a (complex)"),
        ({"a": torch.empty(2, device="meta")}, "has tensors that are not plain: a (without values)"),
        ({"a": torch.zeros(1).expand(2**40)}, "not plain: a (1,099,511,627,776 values of 4 stored bytes)"),
        ({"a": torch.empty(4, dtype=torch.bits8)}, "has tensors that are not plain: a (bits8)"),
        ({"a": torch.empty(4, dtype=torch.float8_e8m0fnu)}, "not plain: a (float8_e8m0fnu)"),
        ({"__metadata__": torch.zeros(3), "a": torch.zeros(2)}, "__metadata__ (a name that safetensors reserves)"),
        ({"a\udcff": torch.zeros(3)}, "not plain: a\\udcff (a name that is not UTF-8)"),
        ({"a": torch.zeros(2), "lr": os.getcwd}, "is refused, and nothing of it was run: it calls posix.getcwd"),
    ],
)
def test_checkpoints_without_named_tensors_are_refused(content: object, message: str, tmp_path: Path) -> None:
    sha = save(content, tmp_path / "w.pth")
    refused(3, message, "import-weights", tmp_path / "w.pth", "--sha256", sha)


def test_small_tensors_that_repeat_stored_values_are_copied(tmp_path: Path) -> None:
    sha = save({"positions": torch.zeros(1).expand(3, 5), "a": torch.ones(4)}, tmp_path / "w.pth")
    assert must("import-weights", tmp_path / "w.pth", "--sha256", sha, "--json").json["num_values"] == 19


class Settings(dict[str, object]):
    """A class of a training script."""


class Steps(list[int]):
    """Another one."""


W = {"conv.weight": torch.ones(2), "conv.bias": torch.zeros(2), "bn.weight": torch.full((2,), 3.0)}
V = {name: tensor + 1 for name, tensor in W.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "unread"),
    [
        (np.float64(61.2), "numpy._core.multiarray.scalar, numpy.dtype"),
        (np.array([1, "a", None]), "numpy._core.multiarray._reconstruct, numpy.dtype, numpy.ndarray"),
        (Namespace(lr=0.1, out=Path("x")), "argparse.Namespace, pathlib.PosixPath"),
        (Settings(a=Settings(b=1)), f"{__name__}.Settings"),
        (Steps([1, 2]), f"{__name__}.Steps"),
        (defaultdict(list, a=[1]), "builtins.list, collections.defaultdict"),
        (timedelta(3), "datetime.timedelta"),
        (print, "builtins.print"),
    ],
)
def test_objects_beside_the_tensors_are_left_out(value: object, unread: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "state_dict": W, "other": value}, path, _use_new_zipfile_serialization=zipped)
    result = must("import-weights", path, "--sha256", sha256(path.read_bytes()))
    assert result.stderr == (
        f"left out, and nothing of it was run: {unread}\n"
        f"to train from it, give train-stage1 --init {path.with_suffix('.safetensors')}\n"
    )
    assert load_file(path.with_suffix(".safetensors")).keys() == W.keys()


def test_a_payload_beside_the_tensors_is_left_out_and_never_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return shutil.copy, (str(path), str(canary))

    path, canary = tmp_path / "w.pth", tmp_path / "canary"
    sha = save({"state_dict": W, "other": Payload()}, path)
    said = must("import-weights", path, "--sha256", sha).stderr
    assert said.startswith("left out, and nothing of it was run: shutil.copy\n")
    assert not canary.exists()
    torch.load(path, weights_only=False)  # it would have
    assert canary.exists()


def test_objects_among_the_tensors_are_named(tmp_path: Path) -> None:
    sha = save({**W, "epoch": 3, "best": np.float32(1), "optimizer": {"a": torch.ones(2)}}, tmp_path / "w.pth")
    said = must("import-weights", tmp_path / "w.pth", "--sha256", sha).stderr
    assert "left out what is no tensor: epoch (int), best (numpy._core.multiarray.scalar), optimizer (dict)\n" in said
    assert load_file(tmp_path / "w.safetensors").keys() == W.keys()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"state_dict": W, "best_acc1": torch.tensor(61.2)}, ""),
        ({"model": {"state_dict": W}}, ""),
        ({"state_dict_ema": V, "state_dict": W}, "takes state_dict; --prefix takes state_dict_ema instead\n"),
        (
            {"student": V, "teacher": W, "loss": {"center": torch.ones(1)}},
            "takes teacher; --prefix takes student instead\n",
        ),
        (
            {"ema": V, **W},
            "takes the outermost tensors; --prefix takes ema instead\nleft out what is no tensor: ema (dict)\n",
        ),
        ({"ema": W, "optimizer": {"state": {0: {"exp_avg": V}}, "exp": V}, "epoch": 1}, ""),
        ({"encoder": W, "classifier": {"weight": torch.ones(1)}}, ""),
    ],
)
def test_the_state_dict_is_found_by_its_key_or_its_size(content: object, note: str, tmp_path: Path) -> None:
    path, out = tmp_path / "w.pth", tmp_path / "w.safetensors"
    result = must("import-weights", path, "--sha256", save(content, path))
    assert result.stderr == f"{note}to train from it, give train-stage1 --init {out}\n"
    assert {name: t.tolist() for name, t in load_file(out).items()} == {name: t.tolist() for name, t in W.items()}


def test_a_prefix_chooses_among_several_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sha = save({"net_a": W, "net_b": {f"module.{name}": t for name, t in V.items()}}, tmp_path / "w.pth")
    command = ("import-weights", "w.pth", "--sha256", sha)
    result = refused(3, (), *command)
    assert result.stderr.splitlines() == [
        "error: w.pth has several state_dicts:",
        "    net_a (3 tensors)",
        "    net_b (3 tensors)",
        "  needed by: import-weights",
        f"  fix: choose one, such as: cpmix import-weights w.pth --sha256 {sha} --prefix net_a",
    ]
    run_commands(fix_of(result).removeprefix("choose one, such as: "))
    assert torch.equal(load_file("w.safetensors")["conv.weight"], W["conv.weight"])
    for prefix, names in (("net_b.module.", W), ("net_b.module.conv", {"weight": 1, "bias": 1})):
        must(*command, "--prefix", prefix, "--out", "v.safetensors", "--overwrite")
        assert load_file("v.safetensors").keys() == names.keys()
    result = refused(3, "no name in w.pth begins with net_c.\n  needed by: --prefix\n", *command, "--prefix", "net_c")
    assert fix_of(result).startswith("give --prefix net_")


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_whole_network_is_refused_with_the_command_that_saves_its_tensors(wrapped: bool, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    path = tmp_path / "it's w.pth"
    sha = save({"model": network, "epoch": 3} if wrapped else network, path)
    said = f"{path} holds a whole torch.nn.modules.container.Sequential, not its state_dict; nothing of it was run\n"
    follow_in_shell(refused(3, said, "import-weights", path, "--sha256", sha), tmp_path)
    assert load_file(tmp_path / "it's w-state_dict.safetensors").keys() == {"0.weight", "0.bias"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused_with_the_command_that_saves_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.script(nn.Linear(2, 3)).save(path)
    said = f"{path} is a TorchScript archive, no checkpoint of tensors\n"
    follow_in_shell(refused(3, said, "import-weights", path, "--sha256", sha256(path.read_bytes())), tmp_path)
    assert load_file(tmp_path / "w-state_dict.safetensors").keys() == {"weight", "bias"}


@pytest.mark.slow
def test_a_newer_pickle_is_refused_with_the_command_that_saves_it_again(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": W}, path, pickle_protocol=4)
    result = process("import-weights", path, "--sha256", sha256(path.read_bytes()))
    assert result.stderr.startswith(
        f"import-weights: loading torch\nerror: {path} is damaged, or holds more than PyTorch reads as tensors; "
        "nothing of it was run\n  needed by: import-weights\n  fix: fetch the file again from where it was published, "
        "or give one that torch.save(model.state_dict(), FILE) wrote; or, only if you trust its author"
    )
    follow_in_shell(result, tmp_path)
    assert load_file(tmp_path / "w-state_dict.safetensors").keys() == W.keys()


def follow_in_shell(result: Result, folder: Path) -> None:
    """Paste the fix of an error into a shell, without the warning in front of it."""
    *_, command = fix_of(result).rpartition("only if you trust its author, because this runs code of the file: ")
    assert command.startswith("python -c ")
    for name, words in (("python", ""), ("cpmix", "-m cpmix_cli ")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words}"$@"\n')
        (folder / name).chmod(0o755)
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"})


def test_a_shared_prefix_is_named(tmp_path: Path) -> None:
    path, out = tmp_path / "w.pth", tmp_path / "w.safetensors"
    sha = save({f"module.backbone.{name}": tensor for name, tensor in W.items()}, path)
    assert must("import-weights", path, "--sha256", sha).stderr == (
        "all names begin with 'module.backbone.'; train-stage1 --init takes it off, if the network fits then\n"
        f"to train from it, give train-stage1 --init {out}\n"
    )


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
@pytest.mark.long
def test_imported_weights_equal_the_run_and_can_be_trained_further(
    digits: Path, digits_run: Path, tmp_path: Path
) -> None:
    """The checkpoint gives the same weights; a run from them, stopped, goes on bit for bit."""
    model = digits_run / "stage2" / "model.safetensors"
    given = load_file(model)
    sha = save({"state_dict": {f"module.{n}": t for n, t in given.items()}}, tmp_path / "w.pth")
    must("import-weights", tmp_path / "w.pth", "--sha256", sha)
    imported = load_file(tmp_path / "w.safetensors")
    assert {n.removeprefix("module."): t.tolist() for n, t in imported.items()} == {
        n: t.tolist() for n, t in given.items()
    }
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


def test_init_takes_a_run_a_phase_or_a_file(
    digits: Path, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the last finished phase, as for --from; they are recorded by their hash."""
    monkeypatch.chdir(digits_run.parent)
    monkeypatch.setenv("HOME", str(digits_run.parent))
    (tmp_path / "hub").mkdir()
    shutil.copy(digits_run / "stage1" / "model.safetensors", tmp_path / "hub")
    shutil.copytree(digits_run / "stage2", tmp_path / "copied")
    name, last = digits_run.name, [p for p in PHASES if (digits_run / p / "run.json").exists()][-1]
    for given, phase in (
        (digits_run, last),
        (f"{name}/", last),
        (f"~/{name}", last),
        (f"{name}/stage1", "stage1"),
        (digits_run / "stage2", "stage2"),
        (f"~/{name}/stage1/model.safetensors", "stage1"),
        (tmp_path / "hub", "stage1"),
        (tmp_path / "copied", "stage2"),
    ):
        out = tmp_path / f"run {given}".replace("/", " ")
        command = ("train-stage1", "--data", digits, "--epochs", 2, "--out", out, "--init", given)
        said = must(*command).stderr
        assert (f"train-stage1: takes {last} of " in said) == (str(given).rstrip("/").endswith(name)), given
        record = json.loads((out / "stage1" / "run.json").read_text())
        assert record["made_from"]["init"] == sha256((digits_run / phase / "model.safetensors").read_bytes()), given
        assert must(*command, "--json").json["status"] == "up to date"


def test_init_from_a_run_that_is_not_finished_or_damaged_is_refused(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage1 = ("train-stage1", "--data", digits, "--epochs", 4)
    assert signalled(signal.SIGTERM, "epoch=1/", *stage1, "--out", run).code == 75
    init = (*stage1, "--out", tmp_path / "other", "--init")
    for given in (run, run / "stage1"):
        resume = console.typed(
            "train-stage1", "--data", digits, "--out", run, "--recipe", run / "stage1" / "recipe.toml"
        )
        assert fix_of(refused(3, str(run), *init, given)) == resume
    run_commands(resume)
    must(*init, run, "--dry-run")
    refused(2, "model.safetensors is what this command writes\n", *stage1, "--out", run, "--init", run, "--overwrite")
    flip(run / "stage1" / "model.safetensors")
    for given in (run, run / "stage1", run / "stage1" / "model.safetensors"):
        result = refused(3, f"{run / 'stage1' / 'model.safetensors'} is damaged: ", *init, given, "--dry-run")
    follow_fix(result)
    must(*init, run, "--dry-run")


def test_init_says_what_it_took_off_and_left_out(
    digits: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moco = {f"module.encoder_q.{name}": tensor for name, tensor in weights.items()}
    moco |= {f"module.encoder_k.{name}": tensor for name, tensor in weights.items()}
    sha = save({"epoch": 3, "state_dict": {**moco, "module.queue": torch.zeros(2, 4)}}, tmp_path / "moco.pth.tar")
    must("import-weights", "moco.pth.tar", "--sha256", sha)
    train = ("train-stage1", "--data", digits, "--epochs", 2, "--out", "run", "--init")
    assert must(*train, "moco.pth.safetensors").stderr.startswith(
        "took the prefix 'module.encoder_q.' off 44 names of moco.pth.safetensors\n"
        "left out 45 other tensors: module.encoder_k (44), module.queue\n"
        "starts from 42 tensors of moco.pth.safetensors; the head is new\n"
    )
    for named in ("moco.pth.tar", "moco-0123abcd.pth"):  # by its content, and by its name
        (tmp_path / "moco.pth.tar").rename(named) if not Path(named).exists() else None
        hash_of = "0123abcd" if "0123abcd" in named else f"$(sha256sum < {named} | cut -c1-64)"
        result = refused(3, f"{named} is a PyTorch checkpoint; cpmix trains from safetensors alone\n", *train, named)
        made = Path(named).with_suffix(".safetensors")
        assert fix_of(result) == f"give --init {made}; to make it: cpmix import-weights {named} --sha256 {hash_of}"


def test_one_of_several_networks_is_chosen_as_the_error_says(
    digits: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(
        {f"net_{x}.{name}": tensor + (x == "b") for name, tensor in weights.items() for x in "ab"}, "w.safetensors"
    )
    train = ("train-stage1", "--data", digits, "--epochs", 2, "--out", "run", "--dry-run", "--init")
    fix = fix_of(refused(3, "w.safetensors has 2 networks that fit, with these prefixes", *train, "w.safetensors"))
    given, _, command = fix.removeprefix("choose one, and give --init ").partition("; to make it: ")
    run_commands(command)
    must(*train, given)
    assert torch.equal(load_file(given)["conv1.weight"], weights["conv1.weight"])


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
    for other in (digits / "dataset.json", digits_run / "stage1" / "run.json", Path("/dev/null")):
        fix = fix_of(refused(3, str(other), *run, other))
        assert fix == "give a safetensors file; cpmix import-weights makes one of a PyTorch checkpoint"
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
